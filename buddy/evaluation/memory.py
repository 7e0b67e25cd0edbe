"""The most memory that something took: a GPU's allocator knows, and of the process on Linux the kernel does."""

from __future__ import annotations

from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"


class Peak:
    """The most memory held since this was made.

    On a GPU that is what PyTorch's allocator gave out; on a CPU the resident set of the whole process, interpreter and
    libraries included.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text(_FORGET_PEAK)
        except OSError:  # another system, or a container that forbids it: its peak would be that of what ran before
            self._known = False

    def mb(self) -> float | None:
        """The most so far, MB of 2**20 bytes; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return _of_process("VmHWM") if self._known else None


def _of_process(name: str) -> float | None:
    """A figure of the kernel's on this process, MB; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else None
