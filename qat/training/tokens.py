"""Loss and metric where each position of a sequence has a class of its own, and the classes are the last dimension.

torch's own losses have the classes in dimension 1. A loss says where they are by its ``class_dim``, from which the
evaluation of a run takes the predictions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Mean cross-entropy over all positions, in nats: output (..., classes), target (...).

    Takes the options of ``nn.CrossEntropyLoss``; positions whose target is ``ignore_index`` do not count.

    >>> TokenCrossEntropy()(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    tensor(1.3863)
    """

    class_dim = -1

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.flatten(0, -2), target.flatten())


class BitsPerByte(Metric):
    """Mean bits that the model needs for a byte: cross-entropy to the base 2. Lower is better.

    ``update``: logits (..., classes) and target (...); positions whose target is ``ignore_index`` do not count. A model
    that knows nothing of bytes needs 8:

    >>> metric = BitsPerByte()
    >>> metric.update(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.long))
    >>> metric.compute()
    tensor(8.)
    """

    full_state_update = False
    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    nats: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        flat = target.flatten()
        self.nats += nn.functional.cross_entropy(
            output.flatten(0, -2).float(), flat, ignore_index=self.ignore_index, reduction="sum"
        )
        self.count += (flat != self.ignore_index).sum()

    def compute(self) -> Tensor:
        return self.nats / self.count / math.log(2)
