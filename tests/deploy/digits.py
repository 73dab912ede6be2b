"""Networks trained on scikit-learn's digits for a moment, for tests of files."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def images() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) between 0 and 1, and their digits."""
    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """``model`` after 60 steps, in eval mode."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2)
    for step in range(60):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()
