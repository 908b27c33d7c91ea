"""How much memory training takes, measured alike in every process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """The most that this process takes from now on, beyond what it takes now.

    Made once torch, the process group and the kernels are loaded, and before the model is: what
    :meth:`taken` then gives is weights, gradients, optimiser state, activations and communication
    buffers together. The libraries, some hundred MB that every process maps, are left out: they are
    the same in both runs and shared by the processes of one machine.

    On a GPU this is what torch's allocator gave out. On Linux the kernel's high-water mark of the
    resident set is put back first, so that a peak while importing does not count. Elsewhere the
    mark cannot be put back, and the figure is a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        _give_back()
        if device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif _put_back_mark():
            self.method = "VmHWM since a reset, less VmRSS then"
            self._before = _status("VmRSS")
        else:
            self.method = "growth of ru_maxrss (a lower bound)"
            self._before = _maxrss()

    def taken(self) -> int:
        """Bytes at the peak so far, beyond those at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        now = _status("VmHWM") if self.method.startswith("VmHWM") else _maxrss()
        return now - self._before


def _give_back() -> None:
    """Return to the system what was freed: what takes it again would seem to take nothing."""
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, others may not
        ctypes.CDLL(None).malloc_trim(0)


def _put_back_mark() -> bool:
    """Set VmHWM to the present resident set; False where the kernel does not offer that."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
