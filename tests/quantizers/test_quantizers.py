"""Quantizers: the drop-in fake-quantize module, observers, learned scales (fault 13)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.errors import NotCalibratedError
from qat.numerics import affine
from qat.numerics.formats import FORMATS, TensorSpec
from qat.quantizers.observers import OBSERVERS, make_observer
from qat.quantizers.quantizer import make_quantizer

SPECS: list[Any] = [*FORMATS, {"format": "int8", "dynamic": True},
                    {"format": "uint8", "dynamic": True, "symmetric": False},
                    {"format": "int8", "observer": "mse"}, {"format": "uint4", "learned": "lsq_plus"}]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 2, 2), (0, 4)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fake_quantize_drops_into_anybody_s_code(spec: Any, shape: tuple[int, ...]) -> None:
    fake = qat.FakeQuantize(spec)
    fake(torch.linspace(-1, 1, 12).reshape(3, 4))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.rand(shape) - 0.5).to(dtype).requires_grad_()
        y = fake(x)
        assert y.shape == x.shape
        assert y.dtype == dtype
        y.sum().backward()
        assert x.grad is not None
        codes = fake.codes(x)
        assert codes.dtype == fake.quantizer.spec.fmt.dtype
        assert len(codes.unique()) <= 2 ** fake.quantizer.spec.bits


def test_fake_quantize_and_codes_share_scale_and_rounding() -> None:
    fake = qat.FakeQuantize("uint8")
    x = torch.randn(50)
    y = fake(x)
    fake.observing = False
    q = fake.quantizer
    assert torch.equal(y, (fake.codes(x).float() - float(q.zero_point)) * q.scale)
    assert torch.equal(fake(x * 10), fake(x * 10).clamp(y.min(), y.max())), "a range that stands still clips"


def test_without_data_there_is_no_range() -> None:
    fake = qat.FakeQuantize("int8", observing=False)
    with pytest.raises(NotCalibratedError, match="calibrate"):
        fake(torch.randn(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -200.0, 200.0])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_learned_scale_that_leaves_the_positive_numbers_is_an_error(granularity: str, bad: float) -> None:
    quantizer = make_quantizer(TensorSpec("int4", granularity, learned="lsq"), torch.Size((3, 4)))
    quantizer.name = "head.weight"
    quantizer(torch.randn(3, 4))
    with torch.no_grad():
        quantizer.log_scale.view(-1)[-1] = bad
    with pytest.raises(qat.QuantizationError, match=r"head\.weight.*learned scale"):
        quantizer(torch.randn(3, 4))


def test_a_learned_scale_stays_positive_under_any_step() -> None:
    quantizer = make_quantizer(TensorSpec("int4", "per_tensor", learned="lsq"), torch.Size((3, 4)))
    weight = torch.randn(3, 4)
    optimizer = torch.optim.SGD([quantizer.log_scale], lr=0.0)
    quantizer(weight)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=3.0)
    for _ in range(5):
        optimizer.zero_grad()
        quantizer(weight).sum().backward()
        optimizer.step()
        assert float(quantizer.present()[0].detach()) > 0


# ------------------------------------------------------------------------------------------------ observers


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_do_not_depend_on_empty_batches(name: str) -> None:
    spec = TensorSpec("int8", observer=name).for_activation()
    one, other = make_observer(spec), make_observer(spec)
    x = torch.randn(64)
    one.observe(x)
    other.observe(x[:0])
    other.observe(x)
    other.observe(torch.zeros(0, 3))
    assert all(a is b or torch.equal(a, b) for a, b in zip(one.qparams(), other.qparams()))


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_histograms_do_not_depend_on_the_order(name: str) -> None:
    spec = TensorSpec("uint8", observer=name, percentile=99.0).for_activation()
    parts = [torch.randn(500), torch.randn(500) * 30, torch.rand(500) * 0.01, torch.full((500,), 1e-43)]
    found = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        observer = make_observer(spec)
        for i in order:
            observer.observe(parts[i])
        assert float(observer.histogram.sum()) == 2000
        assert float(observer.width) < 0.2
        found.append(observer.qparams())
    for scale, zero_point in found[1:]:
        assert torch.equal(scale, found[0][0])
        assert torch.equal(zero_point, found[0][1])


def test_searches_clip_outliers() -> None:
    x = torch.cat([torch.randn(20_000), torch.tensor([60.0])])
    plain = TensorSpec("int4", symmetric=True).for_activation()
    whole = float(affine.choose_qparams(*affine.reduce_range(x, plain), plain)[0])

    def error(scale: torch.Tensor) -> float:
        return float((affine.dequantize(affine.quantize(x, scale, None, plain), scale, None, plain) - x).square().sum())

    for name in ("percentile", "mse", "entropy"):
        observer = make_observer(plain.replace(observer=name, percentile=99.9))
        observer.observe(x)
        scale, _ = observer.qparams()
        assert float(scale) < 0.7 * whole
        if name == "mse":
            assert error(scale) < error(torch.tensor(whole))


def test_percentile_keeps_what_it_says() -> None:
    x = torch.arange(1000).float()
    observer = make_observer(TensorSpec("uint8", observer="percentile", percentile=90.0).for_activation())
    observer.observe(x)
    scale, zero_point = observer.qparams()
    assert abs(float(scale) * 255 - 900) < 2
    assert int(zero_point) == 0


def test_mse_weights_beat_minmax_on_every_row() -> None:
    weight = torch.randn(6, 40)
    errors = []
    for observer in ("minmax", "mse"):
        quantizer = make_quantizer(TensorSpec("int2", observer=observer), weight.shape)
        errors.append((quantizer(weight) - weight).square().sum(1))
    assert bool((errors[1] <= errors[0]).all())
    assert bool((errors[1] < 0.9 * errors[0]).any())


def test_moving_average() -> None:
    observer = make_observer(TensorSpec("int8", observer="moving_average", symmetric=True).for_activation())
    for top in (1.0, 2.0):
        observer.observe(torch.tensor([-0.5, top]))
    assert float(observer.high) == pytest.approx(1.1)
    assert float(observer.low) == -0.5


def test_quantizers_are_ordinary_modules() -> None:
    net = nn.Sequential(nn.Linear(3, 3), qat.FakeQuantize("int8"))
    net(torch.randn(5, 3))
    fresh = nn.Sequential(nn.Linear(3, 3), qat.FakeQuantize("int8", observing=False))
    fresh.load_state_dict(net.state_dict())
    net[1].observing = False
    x = torch.randn(4, 3)
    assert torch.equal(fresh(x), net(x))
    assert net.half()[1].quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize("kind", ["Linear", "RNN"])
def test_a_range_that_moves_on_leaves_the_gradients_of_earlier_calls_alone(kind: str, observer: str) -> None:
    """One module, used twice before one backward: its second input is ten times as wide."""
    module = nn.Linear(6, 4) if kind == "Linear" else nn.RNN(6, 4)
    rule = {"match": {}, "weight": "int8", "input": {"format": "int8", "observer": observer, "symmetric": False}}
    net = qat.prepare(nn.Sequential(module), qat.Recipe.from_dict({"rules": [rule]}))
    narrow, wide = torch.randn(5, 3, 6), torch.randn(5, 3, 6) * 10
    qat.calibrate(net, [narrow])

    def gradients(both: bool) -> list[torch.Tensor]:
        used = copy.deepcopy(net)
        qat.set_observing(used, True)
        outputs = [used(x) for x in ((narrow, wide) if both else (narrow,))]
        y = outputs[0] if kind == "Linear" else outputs[0][0]
        return list(torch.autograd.grad(y.sum(), list(used.parameters())))

    for together, alone in zip(gradients(both=True), gradients(both=False)):
        assert torch.equal(together, alone)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mean"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_each_batch_once(reentrant: bool, observer: str) -> None:
    """What is computed once more in the backward is what the forward was, and moves no range a second time."""
    rule = {"match": {"type": "Linear"}, "weight": "int8", "input": {"format": "int8", "observer": observer}}
    float_net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    net = qat.prepare(float_net, qat.Recipe.from_dict({"rules": [rule]}))
    qat.calibrate(net, [torch.randn(9, 6)])
    qat.set_observing(net, True)
    plain, x = copy.deepcopy(net), torch.randn(9, 6) * 3
    grads = []
    for model, call in ((net, lambda x: checkpoint(net, x, use_reentrant=reentrant)), (plain, plain)):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers()))
