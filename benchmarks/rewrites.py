"""What the rewrites that leave the float function alone are worth: a byte transformer, plain and with planted outliers.

    python benchmarks/rewrites.py [steps=300]           # some minutes on one core

The model learns Python's own documentation; everything is measured on a part of it that it has not seen. Outliers are
planted without changing the function: three channels of the gain of each norm in the blocks times 50, 80 and 100, and
the columns that read them divided. Each line: the squared error of the logits relative to the logits, and the loss.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.training.models import ByteTransformer

HELD_OUT, LENGTH = 50_000, 65
PER_TOKEN = {"dynamic": True, "granularity": "per_token"}
SCHEMES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "W8A8 static": ({"weight": "int8", "input": "int8"}, ("smoothquant", "hadamard", ["hadamard", "smoothquant"])),
    "W4A8 per token": ({"weight": "int4", "input": {"format": "int8", **PER_TOKEN}}, ("smoothquant", "hadamard")),
    "W4A4 per token": ({"weight": "int4", "input": {"format": "int4", **PER_TOKEN}}, ("smoothquant", "hadamard")),
    **{f"W{bits} {name}": ({"weight": {"format": f"int{bits}", **groups}}, ({"awq": {"clip": False}}, "awq"))
       for bits in (4, 3) for name, groups in (
           ("per channel", {}), ("groups of 32", {"granularity": "per_group", "group_size": 32}),
           ("groups of 128", {"granularity": "per_group", "group_size": 128, "group_fallback": "divisor"}))},
}


def batch(text: Tensor, start: int, stop: int, count: int) -> Tensor:
    places = torch.randint(start, stop - LENGTH, (count,))
    return torch.stack([text[i : i + LENGTH] for i in places.tolist()])


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def with_outliers(model: nn.Module) -> nn.Module:
    """The same function, with outliers in what the layers of each block read."""
    model, by = copy.deepcopy(model), torch.tensor([50.0, 80.0, 100.0])
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            for norm, readers in ((block.norm1, (attention.query, attention.key, attention.value)),
                                  (block.norm2, (block.up,))):
                channels = torch.randperm(len(norm.weight))[: len(by)]
                norm.weight[channels] *= by
                norm.bias[channels] *= by
                for reader in readers:
                    reader.weight[:, channels] /= by
    return model


def measure(model: nn.Module, rule: dict[str, Any], algorithms: Any, data: Sequence[Tensor], test: Sequence[Tensor]
            ) -> str:
    prepared = qat.prepare(model, {"rules": [rule], "calibration": algorithms}, data[0])
    qat.calibrate(prepared, data).eval()
    with torch.no_grad():
        pairs = [(prepared(t[:, :-1]), model(t[:, :-1])) for t in test]
        error = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        return f"{float(error):9.5f} {sum(float(loss(prepared, t)) for t in test) / len(test):8.4f}"


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray("".join(topics.topics.values()).encode()), dtype=torch.uint8).long()
    known = len(text) - HELD_OUT
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        step = loss(model, batch(text, 0, known, 16))
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
    model.eval()
    data = [batch(text, 0, known, 8)[:, :-1] for _ in range(8)]
    test = [batch(text, known, len(text), 16) for _ in range(8)]
    with torch.no_grad():
        print(f"float: loss {sum(float(loss(model, t)) for t in test) / len(test):.4f}")
    print(f"{'':40}{'plain model':>20}{'with outliers':>22}")
    outliers = with_outliers(model)
    for name, (rule, tried) in SCHEMES.items():
        for algorithms in ([], *tried):
            cells = [measure(m, rule, algorithms, data, test) for m in (model, outliers)]
            print(f"{name:18}{algorithms or 'ranges alone'!s:30}{cells[0]}   {cells[1]}", flush=True)


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (a.split("=") for a in sys.argv[1:])})
