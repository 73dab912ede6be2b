"""What the benchmarks share: steps timed in turn within one run, allocator peaks in fresh processes, tables.

Machines are noisy: what counts is the ratio of medians of steps that ran alternately in one process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from qat.pipeline.host import keep_freed_memory

keep_freed_memory()  # as train.py does


def alternate(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 3,
              budget: float = 20.0) -> dict[str, float]:
    """Median seconds of one call of each step; the steps run in turn, ``rounds`` times or until the budget is spent.

    A turn lasts at least two milliseconds: short steps are called several times in it, as timeit does.
    """
    calls: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(warmup):
            start = time.perf_counter()
            step()
            calls[name] = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > budget:
            break
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                step()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def allocator_peak(step: Callable[[], object]) -> int:
    """Bytes that one call of ``step`` holds at its peak beyond what was held before (after one warm-up call)."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])


def in_fresh_process(script: str, *arguments: str) -> str:
    """The last line that ``python script arguments`` prints; empty if it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else ""


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a plain table with right-aligned figures."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def machine() -> str:
    """One line that says what this ran on."""
    from datetime import date

    kind = torch.backends.cpu.get_cpu_capability()
    features = [n for n, on in (("VNNI", torch.cpu._is_vnni_supported()),
                                ("AMX", torch.cpu._is_amx_tile_supported())) if on]
    return (f"{date.today()}  torch {torch.__version__}  {torch.get_num_threads()} threads  {kind} {' '.join(features)}"
            + (f"  {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
