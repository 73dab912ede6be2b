"""What the benchmarks share: steps timed in turn within one run, allocator peaks in fresh processes, tables.

Machines are noisy: what counts is the ratio of medians of steps that ran alternately in one process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def session_options() -> Any:
    """Options of onnxruntime for a session beside others: as many threads as torch has, which do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # it would slow the others' turns
    return options


def own_int8(model: nn.Module, calibration: Tensor, x: Tensor) -> Callable[[], Any] | None:
    """The step of onnxruntime on its own static quantization of ``model``; None where it is not installed."""
    if not all(importlib.util.find_spec(p) for p in ("onnx", "onnxruntime", "onnxscript")):
        return None
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": calibration.numpy()}])

        def get_next(self) -> dict[str, object] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, ready, target = (os.path.join(folder, n) for n in ("float.onnx", "ready.onnx", "int8.onnx"))
        torch.onnx.export(model, (calibration[:2],), source, input_names=["x"], dynamo=True, external_data=False,
                          verbose=False, dynamic_shapes=({0: torch.export.Dim.AUTO},))
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_static(ready, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        session = onnxruntime.InferenceSession(target, session_options(), providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)
