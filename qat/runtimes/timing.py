"""Times that can be compared."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def alternating_times(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each call. They take turns, so that a disturbance meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, made) in itertools.product(range(repeats + 2), calls.items()):
        _wait(device)
        start = time.perf_counter()
        made()
        _wait(device)
        if turn >= 2:  # the first turns warm caches up
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
