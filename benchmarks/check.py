"""Whether this Python has what buddy needs: versions, requirements that are not met, and every module of buddy imported.

    python benchmarks/check.py

Exit status 1 if a module cannot be imported. A requirement that is not met (a version outside a package's declared
range) is a warning: a folder of wheels beside a machine's own packages often mixes versions that work together all
the same, and the imports show it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import tomllib
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("train", "eval", "report", "gguf")
"""Of those in pyproject.toml what measuring needs; `track` is not among them, as WANDB_MODE=disabled needs none of it."""


def unmet(requirements: list[str]) -> Iterator[str]:
    """Requirements that are missing or outside their range, those of the requirements included."""
    seen: set[str] = set()
    queue = [("buddy", requirement) for requirement in requirements]
    while queue:
        parent, text = queue.pop(0)
        requirement = Requirement(text)
        wanted = [{"extra": extra} for extra in requirement.extras or [""]]
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{parent} needs {requirement}, which is not there"
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            yield f"{parent} needs {requirement}, here is {found.version}"
        key = f"{canonical(requirement.name)}{sorted(requirement.extras)}"
        if key not in seen:
            seen.add(key)
            for needed in found.requires or []:
                marker = Requirement(needed).marker
                if marker is None or any(marker.evaluate(extra) for extra in wanted):
                    queue.append((found.name, re.sub(r"\s*;.*", "", needed)))


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def broken() -> Iterator[tuple[str, str]]:
    """Modules of buddy that cannot be imported, with the reason."""
    import buddy

    for module in pkgutil.walk_packages(buddy.__path__, "buddy."):
        if module.name == "buddy.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:  # whatever it is, it is what we look for
            yield module.name, "".join(traceback.format_exception_only(error)).strip()


def main() -> None:
    """Print versions, GPU, warnings; exit 1 if something cannot be imported."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(f"python {sys.version.split()[0]} ({sys.executable})")
    failures = []
    brought = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    needed = list(dict.fromkeys(requirement for part in brought for requirement in part))
    for text in needed:
        name = Requirement(text).name
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} - (missing)")
            failures.append(f"{name}: not installed")
    failures += [f"{name}: {reason}" for name, reason in broken()]
    # Only imported when a command uses them.
    for name in ("trl", "peft", "datasets", "gguf", "lm_eval.tasks", "matplotlib.pyplot", "jinja2"):
        try:
            importlib.import_module(name)
        except Exception as error:
            failures.append(f"{name}: {error}")
    for warning in dict.fromkeys(unmet(needed)):
        print(f"warning: {warning}")
    print(gpu())
    for failure in failures:
        print(f"error: cannot be imported: {failure}")
    sys.exit(bool(failures))


def gpu() -> str:
    """The GPU that torch sees, in words."""
    try:
        import torch
    except ImportError:
        return "no torch"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch: everything would run on the CPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.device_count()} GPU(s): {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"


if __name__ == "__main__":
    main()
