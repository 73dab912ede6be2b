"""Deployed int8 inference against float32 torch: single layers, an MLP block, a convolutional block.

    python benchmarks/inference.py                # everything, eager and compiled
    python benchmarks/inference.py linear mlp

Medians of alternating calls in one process. onnxruntime's own static int8 of the same float model runs beside it where
onnx and onnxruntime are installed. Targets: single layers 2.5x, the MLP block 2.0x, convolutions 1.8x with float
between layers and 2.5x with codes passed on.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from harness import alternate, machine, own_int8, table
from torch import nn

import qat

ROWS = (1, 32, 512)


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


def conv() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last).eval()


W8A8 = qat.Recipe.preset("w8a8")
DYNAMIC = qat.Recipe.preset("w8a8_dynamic")
CHAINED = qat.Recipe.from_dict({"rules": [
    {"match": {"type": "Conv2d"}, "weight": {"format": "int8"}, "input": {"format": "int8"},
     "output": {"format": "uint8", "symmetric": True, "power_of_two": True}}]})


def deploy(model: nn.Module, x: torch.Tensor, recipe: qat.Recipe) -> nn.Module:
    prepared = qat.calibrate(qat.prepare(model, recipe, example_inputs=x).eval(), [x])
    return qat.convert(prepared, [x])[0]


def compare(title: str, model: nn.Module, x: torch.Tensor, recipes: dict[str, qat.Recipe], rounds: int) -> None:
    torch._dynamo.reset()
    model = model.eval()
    steps: dict[str, Callable[[], object]] = {"float32 eager": lambda: model(x)}
    compiled_float = torch.compile(copy.deepcopy(model))
    steps["float32 compiled"] = lambda: compiled_float(x)
    for name, recipe in recipes.items():
        deployed = deploy(model, x, recipe)
        twin = copy.deepcopy(deployed)
        with torch.no_grad():
            twin(x)  # unpacks its codes, so that the compiler finds them
            compiled = torch.compile(twin)
            same = torch.equal(deployed(x), compiled(x))
        steps[f"qat {name} eager"] = lambda deployed=deployed: deployed(x)
        steps[f"qat {name} compiled{'' if same else ' (last bits differ)'}"] = lambda compiled=compiled: compiled(x)
    other = own_int8(model, x, x)
    if other is not None:
        steps["onnxruntime int8"] = other
    with torch.no_grad():
        times = alternate(steps, rounds=rounds, warmup=5, budget=15.0)
    eager, compiled_time = times["float32 eager"], times["float32 compiled"]
    table(title, ["variant", "ms", "x of eager", "x of compiled"],
          [[n, f"{t * 1e3:.4f}", f"{eager / t:.2f}", f"{compiled_time / t:.2f}"] for n, t in times.items()])


def main(parts: list[str]) -> None:
    print(machine())
    torch.manual_seed(0)
    if "linear" in parts:
        for inputs, outputs in ((512, 2048), (4096, 4096)):
            for rows in ROWS:
                compare(f"linear {inputs} x {outputs}, {rows} rows", linear(inputs, outputs),
                        torch.randn(rows, inputs), {"w8a8": W8A8, "w8a8 dynamic": DYNAMIC}, 300 if rows < 64 else 60)
    if "mlp" in parts:
        for rows in ROWS:
            compare(f"MLP block, {rows} rows", mlp(), torch.randn(rows, 512), {"w8a8": W8A8}, 300 if rows < 64 else 60)
    if "conv" in parts:
        x = torch.randn(64, 64, 28, 28).to(memory_format=torch.channels_last)
        compare("convolutional block (3 x Conv-BN-ReLU, 64 channels, 28 x 28, batch 64)", conv(), x,
                {"w8a8": W8A8, "w8a8 chained": CHAINED}, 30)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["linear", "mlp", "conv"]
    unknown = [part for part in chosen if part not in ("linear", "mlp", "conv")]
    if unknown:
        sys.exit(f"unknown part {unknown[0]!r}: choose from linear, mlp, conv")
    main(chosen)
