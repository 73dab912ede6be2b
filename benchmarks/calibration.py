"""What calibration algorithms win over rounding to nearest, on data that neither training nor calibration has seen.

    python benchmarks/calibration.py [models=digits,text] [seed=0]      # some ten minutes

Two models that are trained here first: the residual network on scikit-learn's digits, and the byte transformer on
Python's own documentation. Each line: a scheme, an algorithm, the squared error of the logits relative to the float
model's, the score (accuracy in percent; bits per byte) and the seconds of ``calibrate``. Outliers are planted without
changing the function: three channels of each norm's gain times 50, 80 and 100, and what reads them divided.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qat
from qat.training.models import ByteTransformer, ResidualNet

PER_TOKEN = {"format": "int8", "dynamic": True, "granularity": "per_token"}
ROUNDINGS = ("gptq", "awq", "awq+gptq", "adaround", "reconstruction")
BY = torch.tensor([50.0, 80.0, 100.0])


@dataclass
class Task:
    """A trained model, what to calibrate with, what to measure with, and how.

    Attributes:
        plant: makes a copy with the same function and outliers in its activations.
        activation: int8 inputs as they suit the model.
    """

    model: nn.Module
    data: Sequence[Tensor]
    test: Sequence[tuple[Tensor, Tensor]]
    score: Callable[[Tensor, Tensor], float]
    plant: Callable[[nn.Module], nn.Module]
    activation: Any


def digits() -> Task:
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images))
    images, labels = images[order], torch.tensor(bunch.target)[order]
    model = ResidualNet()
    train(model, 1200, lambda: torch.randint(0, 1300, (64,)), lambda i: F.cross_entropy(model(images[i]), labels[i]))
    test = [(images[1300:], labels[1300:])]
    return Task(model, list(images[:512].split(64)), test, lambda y, t: 100 * float((y.argmax(1) == t).float().mean()),
                unequal_channels, {"format": "int8"})


def unequal_channels(model: nn.Module) -> nn.Module:
    """Inside each block: the batch norm between its two convolutions."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            norm, reader = block.body[0][1], block.body[1][0]
            channels = torch.randperm(norm.num_features)[: len(BY)]
            norm.weight[channels] *= BY
            norm.bias[channels] *= BY
            reader.weight[:, channels] /= BY.view(1, -1, 1, 1)
    return model


def text(length: int = 64, held_out: int = 50_000) -> Task:
    known = torch.frombuffer(bytearray("".join(topics.topics.values()).encode()), dtype=torch.uint8).long()

    def windows(start: int, stop: int, count: int) -> Tensor:
        return torch.stack([known[i : i + length + 1]
                            for i in torch.randint(start, stop - length - 1, (count,)).tolist()])

    split, model = len(known) - held_out, ByteTransformer()
    train(model, 600, lambda: windows(0, split, 16),
          lambda w: F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten()))
    test = [windows(split, len(known), 16) for _ in range(16)]
    return Task(model, [windows(0, split, 8)[:, :-1] for _ in range(8)], [(w[:, :-1], w[:, 1:]) for w in test],
                lambda y, t: float(F.cross_entropy(y.flatten(0, 1), t.flatten())) / math.log(2), large_gains, PER_TOKEN)


def large_gains(model: nn.Module) -> nn.Module:
    """In each block: the two norms."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            for norm, readers in ((block.norm1, (attention.query, attention.key, attention.value)),
                                  (block.norm2, (block.up,))):
                channels = torch.randperm(len(norm.weight))[: len(BY)]
                norm.weight[channels] *= BY
                norm.bias[channels] *= BY
                for reader in readers:
                    reader.weight[:, channels] /= BY
    return model


def train(model: nn.Module, steps: int, draw: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(draw()).backward()
        optimizer.step()
    model.eval()


def measure(model: nn.Module, recipe: Any, task: Task) -> tuple[float, float, float]:
    """Relative error of the logits, score, seconds of calibrate."""
    prepared = qat.prepare(model, recipe, task.data[0])
    start = time.perf_counter()
    qat.calibrate(prepared, task.data).eval()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        pairs = [(prepared(x), model(x), t) for x, t in task.test]
    error = sum((a - b).square().sum() for a, b, _ in pairs) / sum(b.square().sum() for _, b, _ in pairs)
    return float(error), sum(task.score(a, t) for a, _, t in pairs) / len(pairs), seconds


def main() -> None:
    options = {"models": "digits,text", "seed": "0"}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"unknown option {key!r}: choose from {', '.join(options)}")
        options[key] = value
    console = Console(width=110)
    for name in options["models"].split(","):
        torch.manual_seed(int(options["seed"]))
        task = {"digits": digits, "text": text}[name]()
        schemes: dict[str, tuple[dict[str, Any], nn.Module, tuple[str, ...]]] = {
            "W4 weight-only": ({"weight": "int4"}, task.model, ROUNDINGS),
            "W3 weight-only": ({"weight": "int3"}, task.model, ROUNDINGS),
            "W4A8": ({"weight": "int4", "input": task.activation}, task.model, (*ROUNDINGS, "bias_correction")),
            "W8A8, outliers": ({"weight": "int8", "input": "int8"}, task.plant(task.model),
                               ("smoothquant", "equalization", "hadamard")),
        }
        with torch.no_grad():
            score = sum(task.score(task.model(x), t) for x, t in task.test) / len(task.test)
        table = Table("scheme", "algorithm", "error", "score", "seconds", "beats nearest", box=SIMPLE_HEAD,
                      title=f"{name}: float {score:.4g}")
        for scheme, (rule, model, algorithms) in schemes.items():
            nearest = 0.0
            for algorithm in ("", *algorithms):
                recipe = {"rules": [rule], "calibration": [a for a in algorithm.split("+") if a]}
                error, score, seconds = measure(model, recipe, task)
                nearest = nearest or error
                verdict = "" if not algorithm else f"{nearest / error:.1f}x" if error < nearest else "no"
                table.add_row(scheme, algorithm or "nearest", f"{error:.5f}", f"{score:.4g}", f"{seconds:.1f}", verdict)
        console.print(table)


if __name__ == "__main__":
    main()
