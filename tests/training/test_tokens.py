"""The loss and the metric of sequences, against torch's own."""

import math

import pytest
import torch
from torch.nn import functional as F

from qat.training import BitsPerByte, TokenCrossEntropy


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4)])
def test_the_loss_is_the_mean_over_positions(shape):
    output, target = torch.randn(*shape, 7, requires_grad=True), torch.randint(0, 7, shape)
    loss = TokenCrossEntropy()(output, target)
    expected = F.cross_entropy(output.movedim(-1, 1), target)
    torch.testing.assert_close(loss, expected)
    smooth = TokenCrossEntropy(label_smoothing=0.1)(output, target)
    torch.testing.assert_close(smooth, F.cross_entropy(output.movedim(-1, 1), target, label_smoothing=0.1))
    loss.backward()
    assert output.grad.abs().sum() > 0


def test_bits_per_byte_add_up_over_batches_and_ignore_padding():
    output, target = torch.randn(6, 5, 256), torch.randint(0, 256, (6, 5))
    target[4, 2:] = -100
    metric = BitsPerByte()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.update(output[part], target[part])
    expected = F.cross_entropy(output.flatten(0, 1), target.flatten()) / math.log(2)
    torch.testing.assert_close(metric.compute(), expected)
    assert metric.count == 27
    torch.testing.assert_close(TokenCrossEntropy()(output, target) / math.log(2), expected)


def test_bits_per_byte_of_half_precision_and_of_nothing():
    metric = BitsPerByte()
    metric.update(torch.zeros(1, 1000, 256, dtype=torch.bfloat16), torch.zeros(1, 1000, dtype=torch.long))
    assert float(metric.compute()) == pytest.approx(8.0, abs=1e-5)
    empty = BitsPerByte()
    empty.update(torch.zeros(0, 4, 256), torch.zeros(0, 4, dtype=torch.long))
    assert empty.compute().isnan()


def test_bits_of_two_processes_are_summed():
    """What torchmetrics does when it synchronizes: states of all ranks, reduced by their own function."""
    ranks = [BitsPerByte(), BitsPerByte()]
    output, target = torch.randn(5, 3, 256), torch.randint(0, 256, (5, 3))
    ranks[0].update(output[:2], target[:2])
    ranks[1].update(output[2:], target[2:])
    merged = BitsPerByte()
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), F.cross_entropy(output.flatten(0, 1), target.flatten()) / math.log(2))
