"""Binary activations with learned thresholds (``rsign``): formula, gradient, start, and the way through ``convert``."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.errors import SpecError
from qat.kernels import ste
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import FrozenQuantizer, ThresholdQuantizer, make_quantizer

RSIGN: dict[str, Any] = {"format": "binary", "learned": "rsign"}


def quantizer(channels: tuple[int, ...], *data: Tensor) -> ThresholdQuantizer:
    """Calibrated on ``data``."""
    made = make_quantizer(TensorSpec(**RSIGN), channels=channels)
    assert isinstance(made, ThresholdQuantizer)
    for x in data:
        made.observe(x)
    made.settle()
    return made


@pytest.mark.parametrize(("channels", "shape"), [((3,), (5, 3)), ((3, 1), (2, 3, 4)), ((3, 1, 1), (2, 3, 4, 2)),
                                                 ((3, 1, 1), (3, 4, 2)), ((), (4, 3)), ((3,), (0, 3))], ids=str)
def test_each_channel_changes_sign_at_its_own_threshold(channels: tuple[int, ...], shape: tuple[int, ...]) -> None:
    q = quantizer(channels, torch.randn(64, *shape[1:]) if len(shape) > len(channels) else torch.randn(shape))
    with torch.no_grad():
        q.channel_threshold.normal_()
    x, scale = torch.randn(shape), q.log_scale.exp()
    threshold = q.channel_threshold * scale
    codes = q.codes(x)
    assert torch.equal(codes, torch.where(x >= threshold, 1, -1).to(torch.int8))
    assert torch.equal(q(x), codes * scale)
    exactly = threshold.expand(shape)
    assert bool((q.codes(exactly) == 1).all()), "sign(0) is +1"


def test_the_start_lies_inside_the_positive_range_behind_a_relu() -> None:
    x = torch.relu(torch.randn(500, 4) * torch.tensor([0.1, 1.0, 10.0, 3.0]) + 1)
    q = quantizer((4,), x[:100], x[100:101], x[101:])
    threshold = q.threshold(q.present()[0])
    torch.testing.assert_close(threshold, x.mean(0))
    assert bool((threshold > 0).all())
    spread = x.double().var(0, unbiased=False).mean().mul(2 / math.pi).sqrt()
    torch.testing.assert_close(q.present()[0].double(), spread, rtol=1e-5, atol=0)
    ones = (q.codes(x) == 1).float().mean(0)
    assert bool(((ones > 0.2) & (ones < 0.8)).all()), "a channel says nothing"
    larger = quantizer((4,), x * 1000)
    assert torch.equal(larger.codes(x * 1000), q.codes(x))
    torch.testing.assert_close(larger.channel_threshold, q.channel_threshold)


@pytest.mark.parametrize(("channels", "shape"), [((3,), (6, 3)), ((3, 1, 1), (5, 3, 4, 2)), ((), (6, 3))], ids=str)
def test_gradients_are_those_of_the_formula(channels: tuple[int, ...], shape: tuple[int, ...]) -> None:
    q = quantizer(channels, torch.randn(64, *shape[1:]) + 0.3)
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    q(x).backward(g)
    scale = q.log_scale.detach().exp()
    relative = q.channel_threshold.detach()
    u = x.detach() - relative * scale
    code = torch.where(u >= 0, 1.0, -1.0)
    through = g * (u.abs() <= ste.SIGN_WINDOW * scale)
    assert 0 < int((through == 0).sum()) < through.numel()
    torch.testing.assert_close(x.grad, through)
    values = x[0].numel()
    g_threshold = -through.sum_to_size(relative.shape) / math.sqrt(values / max(1, relative.numel()))
    torch.testing.assert_close(q.channel_threshold.grad, g_threshold * scale)
    g_scale = (g * code).sum() / math.sqrt(values) + (g_threshold * relative).sum()
    torch.testing.assert_close(q.log_scale.grad, g_scale * scale)


def test_an_absorbed_relu_changes_no_code_and_lets_cut_values_learn() -> None:
    """Behind a positive threshold the ReLU decides nothing; without it small negative values still get a gradient."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(200, 4)
    prepared = qat.calibrate(qat.prepare(model, zoo.every_layer("int8", RSIGN), example_inputs=x), [x])
    q = prepared[2].input_quantizer
    assert "ReLU absorbed" in str(next(r for r in qat.coverage(prepared).rows if r.name == "2").reason)
    values = prepared[0](x).detach().requires_grad_()
    assert bool((q.threshold(q.present()[0]) > 0).all())
    assert torch.equal(q.codes(values), q.codes(torch.relu(values)))
    q(values).sum().backward()
    assert bool((values.grad[values < 0] != 0).any())


def small_net() -> nn.Module:
    return zoo.batch_norms_of_any_sign(nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, groups=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 9, 3, bias=False)))


@pytest.mark.parametrize("output", [None, RSIGN, "int8"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_prepared_and_deployed_are_equal_after_training(dtype: torch.dtype, output: Any) -> None:
    x = torch.randn(9, 2, 8, 8).to(dtype)
    model = qat.prepare(small_net().to(dtype), zoo.every_layer("binary", RSIGN, output), example_inputs=x)
    qat.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    thresholds = [q for q in model.modules() if isinstance(q, ThresholdQuantizer)]
    before = [q.channel_threshold.clone() for q in thresholds]
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()
    moved = [not torch.equal(q.channel_threshold, b) for q, b in zip(thresholds, before)]
    assert all(moved)
    assert all(q.channel_threshold.dtype == torch.float32 for q in thresholds)
    model.eval()
    deployed, certificate = qat.convert(model, [x])
    assert certificate.equal
    for batch in (x, x[:1], x[:0]):
        assert torch.equal(model(batch), deployed(batch))
        assert deployed(batch).dtype == dtype
    assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))


def test_thresholds_survive_state_dicts_and_checkpoints(tmp_path: Path) -> None:
    x = torch.randn(9, 2, 8, 8)
    model = zoo.prepared(small_net(), zoo.every_layer("binary", RSIGN), [x])
    with torch.no_grad():
        for q in model.modules():
            if isinstance(q, ThresholdQuantizer):
                q.channel_threshold.normal_()
    fresh = qat.prepare(small_net(), zoo.every_layer("binary", RSIGN), example_inputs=x).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    deployed, _ = qat.convert(model, [x])
    qat.save(deployed, tmp_path / "deployed")
    loaded = qat.load(tmp_path / "deployed", small_net())
    assert torch.equal(loaded(x), deployed(x))
    frozen = [m for m in loaded.modules() if isinstance(m, FrozenQuantizer)]
    assert [tuple(q.threshold.shape) for q in frozen] == [(2, 1, 1), (4, 1, 1), (45,)]


def test_thresholds_and_what_was_seen_keep_their_precision() -> None:
    """A count of 100,000 does not fit float16."""
    fake = qat.FakeQuantize(RSIGN)
    fake(torch.randn(100_000) + 3.0)
    fake.half()
    q = fake.quantizer
    assert float(q.observer.count) == 100_000
    assert q.observer.total.dtype == torch.float64
    assert q.channel_threshold.dtype == torch.float32
    histogram = qat.FakeQuantize({"format": "int8", "observer": "percentile"})
    histogram(torch.randn(100_000))
    assert float(histogram.half().quantizer.observer.histogram.sum()) == 100_000


def test_a_threshold_that_diverges_is_an_error() -> None:
    q = quantizer((3,), torch.randn(5, 3))
    q.name = "head.input"
    with torch.no_grad():
        q.channel_threshold[1] = float("nan")
    with pytest.raises(qat.QuantizationError, match=r"head\.input.*learned threshold"):
        q(torch.randn(2, 3))


def test_an_input_that_says_nothing_is_warned_of() -> None:
    model = qat.prepare(nn.Sequential(nn.Linear(4, 3)), zoo.every_layer("int8", RSIGN))
    with pytest.warns(UserWarning, match=r"never change sign.*0\.input"):
        qat.calibrate(model, [torch.full((5, 4), 3.0), torch.full((2, 4), 3.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.calibrate(model, [torch.rand(5, 4) + 5.0])
    assert torch.isfinite(model(torch.randn(2, 4))).all()


@pytest.mark.parametrize(("spec", "role", "says"), [
    ({"format": "int8", "learned": "rsign"}, "for_activation", "binary"),
    ({**RSIGN, "dynamic": True}, "for_activation", "dynamic"),
    ({**RSIGN, "granularity": "per_channel"}, "for_activation", "integer sum"), (RSIGN, "for_weight", "activations"),
    ({"format": "int8", "observer": "mean", "symmetric": False}, "for_weight", "no zero point"),
], ids=str)
def test_specs_that_mean_nothing(spec: dict[str, Any], role: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        getattr(TensorSpec.from_dict(spec), role)()


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "int2_midrise", "uint4"])
def test_the_start_of_lsq(name: str) -> None:
    """``2 * mean|x| / sqrt(Qp)`` (Esser et al. 2020, section 2.1), for each row of a weight and for activations."""
    spec = TensorSpec(name, learned="lsq", observer="mean")
    x, top = torch.randn(5, 40), spec.fmt.hi
    if spec.fmt.signed:
        weights = make_quantizer(spec, x.shape)
        weights.quantize(x)
        torch.testing.assert_close(weights.present()[0], 2 * x.abs().mean(1) / math.sqrt(top))
    inputs = make_quantizer(spec)
    for part in (x.abs()[:3], x.abs()[3:]):
        inputs.observe(part)
    inputs.settle()
    torch.testing.assert_close(inputs.present()[0], 2 * x.abs().mean() / math.sqrt(top))
