"""Mistakes a user can make, told in one line."""


class UserError(Exception):
    """A mistake in what the user gave: the command line prints it as one line and exits with 2.

    The text names the file or option, the key, the value found and what is allowed.
    """


class BudgetError(UserError, ValueError):
    """A budget that no route of this backbone can satisfy."""


def short(value: object, length: int = 80) -> str:
    """A value as it may stand in a message: what a user's file holds has no bound of its own."""
    import reprlib

    shown = reprlib.Repr()
    shown.maxlevel = 2
    shown.maxstring = shown.maxother = shown.maxlong = length
    return shown.repr(value)


def choices(names) -> str:
    """Join names for an error message: ``a, b or c``."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def unknown(what: str, found: object, allowed) -> UserError:
    """Build the error for a name outside a fixed set, with the closest name suggested."""
    import difflib

    allowed = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(found), allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"{what}: {short(found)} is not one of {choices(allowed)}{hint}")


EXTRAS = {
    "train": ("trl", "datasets"),
    "eval": ("lm_eval", "rouge_score"),
    "report": ("scipy", "matplotlib"),
    "track": ("wandb", "wandb_workspaces", "pandas"),
    "gguf": ("gguf",),
}
"""Packages that the core serves without, by the extra of this distribution that brings them (pyproject.toml)."""


def lacking(package: str) -> UserError | None:
    """The error for a package that is not installed; None for one that no extra brings, whose absence is no choice."""
    for extra, packages in EXTRAS.items():
        if package in packages:
            return UserError(f"{package} is not installed; it comes with: pip install 'buddy-routing[{extra}]'")
    return None


def needs(*packages: str) -> None:
    """Ask for packages of extras before the work that ends in them begins.

    Raises:
        UserError: one is not installed; names the extra that brings it.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None and (error := lacking(package)):
            raise error
