"""What AdaRound, block-wise reconstruction and bias correction win over the nearest codes, on scikit-learn's digits.

    python benchmarks/rounding.py

For each net and recipe: the squared error of the logits on held-out images, relative to the float net's, its accuracy
there, and the seconds that ``calibrate`` took.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import qat
from qat.training.models import MLP, ResidualNet

RECIPES = {
    "w4a8": {"weight": "int4", "input": "int8"},
    "w4a8 per tensor": {"weight": {"format": "int4", "granularity": "per_tensor"}, "input": "int8"},
    "w3a8": {"weight": {"format": "int3", "observer": "mse"}, "input": "int8"},
    "w2a8": {"weight": {"format": "int2_midrise", "observer": "mse"}, "input": "int8"},
}
ALGORITHMS = [[], ["bias_correction"], ["adaround"], ["adaround", "bias_correction"], ["reconstruction"]]


def trained(net: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    held_out, truth = images[1300:], labels[1300:]
    nets = {"cnn": trained(ResidualNet(), images[:1300], labels[:1300], 8),
            "mlp": trained(MLP(64, (64, 64)), images[:1300], labels[:1300], 15)}
    for kind, net in nets.items():
        with torch.no_grad():
            expected = net(held_out)
        print(f"{kind}: float accuracy {float((expected.argmax(1) == truth).float().mean()):.4f}")
        for name, rule in RECIPES.items():
            for algorithms in ALGORITHMS:
                model = qat.prepare(net, {"rules": [rule], "calibration": algorithms}, images[:4])
                start = time.perf_counter()
                qat.calibrate(model, list(images[:512].split(64)))
                seconds = time.perf_counter() - start
                with torch.no_grad():
                    logits = model.eval()(held_out)
                error = float((logits - expected).square().sum() / expected.square().sum())
                accuracy = float((logits.argmax(1) == truth).float().mean())
                print(f"{kind}  {name:16}  {' + '.join(algorithms) or 'nearest':28}  error {error:.4f}  "
                      f"accuracy {accuracy:.4f}  {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
