"""Prepared in eval against deployed, bit for bit, on every image of the digits set; and the size on disk.

    python benchmarks/parity.py

Each scheme, with static and with dynamic activations, with and without batch norm: prepared, calibrated, trained for a
few steps, converted, saved, loaded. Then the deployed size of a model of over a million parameters.
"""

from __future__ import annotations

import os
import tempfile

import torch
from harness import machine, table
from sklearn.datasets import load_digits
from torch import nn

import qat

SCHEMES = ("w8a8", "w4a4", "w4a8", "w2a8", "w1a8")
DYNAMIC = {"dynamic": True, "granularity": "per_token", "learned": None, "observer": "minmax"}


class Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width) if norm else nn.Identity(),
                       nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def network(norm: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16) if norm else nn.Identity(), nn.ReLU(),
                         Block(16, norm), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Block(32, norm),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(256)])


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        rows = torch.arange(64) + step * 64 % (len(images) - 64)
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def size(folder: str) -> int:
    return os.path.getsize(os.path.join(folder, "model.safetensors"))


def parity() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    images, labels = nn.functional.interpolate(images, scale_factor=2.0), torch.tensor(digits.target)
    rows = []
    for norm in (True, False):
        torch.manual_seed(0)
        network_float = network(norm)
        train(network_float, images, labels, 120, 3e-3)
        for scheme in SCHEMES:
            for dynamic in (False, True):
                recipe = qat.Recipe.preset(scheme, **({"input": DYNAMIC} if dynamic else {}))
                model = qat.prepare(network_float, recipe, example_inputs=images[:8])
                qat.calibrate(model, images[:512].split(128))
                train(model, images, labels, 30, 1e-3)
                deployed, _ = qat.convert(model, [images[:64]])
                with tempfile.TemporaryDirectory() as folder:
                    qat.save(deployed, folder)
                    loaded = qat.load(folder, network(norm))
                a, b, c = (logits(m, images) for m in (model, deployed, loaded))
                accuracy = (b.argmax(1) == labels).float().mean().item()
                rows.append([scheme, "dynamic" if dynamic else "static", "yes" if norm else "no",
                             str(torch.equal(a, b)), str(torch.equal(b, c)), f"{accuracy:.2%}"])
    table(f"prepared (eval) against deployed, all {len(images)} images",
          ["scheme", "activations", "batch norm", "equal", "equal after load", "accuracy"], rows)


def sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 128))
    count = sum(p.numel() for p in model.parameters())
    x = torch.randn(64, 512)
    rows = []
    for scheme in (*SCHEMES, "w158a8", "w4a16", "w1a16"):
        recipe = qat.Recipe.preset(scheme, edges="same")
        prepared = qat.calibrate(qat.prepare(model, recipe, example_inputs=x), [x])
        deployed, _ = qat.convert(prepared, [x])
        with tempfile.TemporaryDirectory() as folder:
            qat.save(deployed, folder)
            rows.append([scheme, f"{size(folder):,}", f"{size(folder) / (4 * count):.4f}"])
    table(f"model.safetensors of a model of {count:,} parameters (float32: {4 * count:,} bytes), edges: same",
          ["scheme", "bytes", "of float"], rows)


if __name__ == "__main__":
    print(machine())
    parity()
    sizes()
