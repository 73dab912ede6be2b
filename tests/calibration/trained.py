"""Two small networks, trained on scikit-learn's digits for a few seconds, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qat
from qat.training.models import MLP, ResidualNet


@dataclass
class Digits:
    """A trained float net, calibration batches, and images that neither training nor calibration has seen."""

    net: nn.Module
    batches: list[Tensor]
    held_out: Tensor
    labels: Tensor

    def quantized(self, recipe: Any, algorithms: Any = ()) -> nn.Module:
        """Prepared and calibrated, in eval."""
        model = qat.prepare(self.net, {**recipe, "calibration": list(algorithms)}, self.held_out[:4])
        return qat.calibrate(model, self.batches).eval()

    def error(self, model: nn.Module) -> float:
        """The squared error of the logits on held-out images, relative to the float net's."""
        with torch.no_grad():
            expected, actual = self.net(self.held_out), model(self.held_out)
        return float((actual - expected).square().sum() / expected.square().sum())

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.held_out).argmax(1) == self.labels).float().mean())


@cache
def digits(kind: str) -> Digits:
    """``cnn`` (two stages of residual blocks) or ``mlp``."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        net = ResidualNet(stages=2) if kind == "cnn" else MLP(64, (48, 48))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(4 if kind == "cnn" else 12):
            for batch in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
    return Digits(net.eval(), list(images[:384].split(64)), images[1200:], labels[1200:])
