"""What benchmarks share: calls timed in turns, ratios with their intervals, and the peak of this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torchgraft.bench.meters.spread import Ratio, interval

__all__ = ["Call", "keep_memory", "peak_bytes", "ratio", "reset_peak", "rounds", "shown"]

Call = Callable[[], object]


def keep_memory() -> None:
    """Let this process keep what it frees, where its C library can be told so.

    Outputs of some MiB are handed back to the system else, now and then, and fetched again page by page: that takes
    longer than a norm does, and falls on whichever call comes next.
    """
    trim, mapped, most = -1, -3, 1 << 25
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim, 1 << 30)
        library.mallopt(mapped, most)


def rounds(calls: Sequence[Call], count: int) -> list[list[float]]:
    """Return seconds of each call, (rounds, calls), in turns, after a warm-up of each."""
    for call in calls:
        call()
    found = []
    for turn in range(count):
        row = [0.0] * len(calls)
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for place in order:
            begun = time.perf_counter()
            calls[place]()
            row[place] = time.perf_counter() - begun
        found.append(row)
    return found


def ratio(rows: list[list[float]], over: int, under: int) -> Ratio:
    """Return the interval of the ratio of two columns."""
    return interval([row[over] / row[under] for row in rows])


def reset_peak() -> None:
    """Forget the largest resident size of this process so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the largest resident size of this process since the mark was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say the peak resident size")


def shown(value: Sequence[float]) -> str:
    """Return a ratio with its interval."""
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
