"""Calibration, the switches of the schedule, and law 11: who may move a range, and when."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.calibration.ranges import activation_quantizers
from qat.errors import CalibrationError, NotCalibratedError, PrepareError
from qat.quantizers.quantizer import StaticQuantizer


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.state_dict().items() if "quantizer" in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v.nan_to_num(7.0), b[k].nan_to_num(7.0)) if v.is_floating_point()
                                        else torch.equal(v, b[k]) for k, v in a.items())


def linear(spec: Any = "int8", **rule: Any) -> nn.Module:
    return qat.prepare(nn.Sequential(nn.Linear(4, 3)), zoo.every_layer("int8", spec), **rule)


def test_ranges_are_those_of_the_data() -> None:
    model = qat.calibrate(linear("uint8"), [torch.full((2, 4), -1.0), torch.full((1, 4), 3.0), torch.zeros(0, 4)])
    quantizer = model[0].input_quantizer
    assert float(quantizer.scale) == float(torch.tensor(3.0) / 255 + torch.tensor(1.0) / 255)
    assert int(quantizer.zero_point) == round(1.0 / (4.0 / 255))
    again = qat.calibrate(model, [torch.full((2, 4), 0.5)])
    assert float(again[0].input_quantizer.scale) == float(torch.tensor(0.5) / 255), "old data is not forgotten"


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_gives_a_finite_scale_and_is_deterministic(observer: str) -> None:
    for data in (torch.randn(64, 4), torch.rand(64, 4) + 1, torch.zeros(3, 4), torch.full((3, 4), 1e-30),
                 torch.randn(9, 4) * 1e30):
        found = []
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = qat.calibrate(linear({"format": "int8", "observer": observer}), [data[:5], data[5:]])
            scale = model[0].input_quantizer.scale
            assert bool(torch.isfinite(scale) & (scale > 0))
            assert bool(torch.isfinite(model(data)).all())
            found.append(scale)
        assert torch.equal(found[0], found[1])


def test_no_batch_is_an_error_and_changes_nothing() -> None:
    model = linear()
    for batches in ([], iter(())):
        with pytest.raises(CalibrationError, match="calibration needs at least one batch"):
            qat.calibrate(model, batches)
    with pytest.raises(NotCalibratedError, match=r"0\.input.*calibrate"):
        model(torch.randn(2, 4))
    qat.calibrate(model, [torch.randn(2, 4)])
    before = scales(model)
    with pytest.raises(CalibrationError):
        qat.calibrate(model, [])
    assert same(scales(model), before)
    with pytest.raises(PrepareError, match="prepare"):
        qat.calibrate(nn.Linear(2, 2), [torch.randn(1, 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_layer_and_batch(bad: float) -> None:
    model = qat.calibrate(linear(), [torch.randn(3, 4)])
    before, x = scales(model), torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"batch 1: 0\.input: NaN or infinity"):
        qat.calibrate(model, [torch.randn(3, 4), x])
    assert same(scales(model), before)
    assert not any(q.observing for q in activation_quantizers(model))
    assert not model[0].calibrating
    good = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="batch 1 left out"):
        qat.calibrate(model, [good, x], ignore_nonfinite=True)
    expected = qat.calibrate(linear(), [good])
    assert torch.equal(model[0].input_quantizer.scale, expected[0].input_quantizer.scale)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(CalibrationError, match="at least one"):
        qat.calibrate(model, [x], ignore_nonfinite=True)


def test_an_error_of_the_model_leaves_no_trace() -> None:
    model = qat.calibrate(linear(), [torch.randn(3, 4)])
    before = scales(model)
    with pytest.raises(RuntimeError):
        qat.calibrate(model, [torch.randn(3, 4) * 50, torch.randn(3, 5)])
    assert same(scales(model), before)
    assert model.training
    assert not model[0].calibrating


@pytest.mark.parametrize("spec", ["int8", "uint8", {"format": "ternary"}, {"format": "int8", "observer": "mse"},
                                  {"format": "int8", "learned": "lsq"}], ids=str)
def test_an_input_that_is_always_zero_is_warned_of_once(spec: Any) -> None:
    model = linear(spec)
    with pytest.warns(UserWarning, match=r"always zero.*0\.input") as caught:
        qat.calibrate(model, [torch.zeros(3, 4), torch.zeros(2, 4)])
    assert len(caught) == 1
    assert float(model[0].input_quantizer.scale) == 1.0
    assert torch.equal(model(torch.zeros(2, 4)), model[0].bias.expand(2, 3))


def test_dead_channels_and_constant_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].weight[2] = 0.5
    for weight in ("int8", "int4", "ternary", "binary", "int2_midrise", {"format": "int4", "learned": "lsq"},
                   {"format": "int8", "observer": "mse"}):
        before, after = zoo.assert_parity(model, zoo.every_layer(weight, "int8"), torch.randn(5, 4))
        assert bool((torch.isfinite(after[0].weight_scale) & (after[0].weight_scale > 0)).all())
        if weight not in ("binary", "int2_midrise"):
            assert torch.equal(before(torch.randn(5, 4))[:, 1], model[0].bias[1].expand(5))


def test_one_bit_activations_that_never_change_sign_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"never change sign.*0\.input"):
        qat.calibrate(linear("binary"), [torch.rand(5, 4) + 0.1, torch.rand(2, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.calibrate(linear("binary"), [torch.rand(5, 4), -torch.rand(5, 4)])


# ------------------------------------------------------------------------------------------------ law 11


class Watch(nn.Module):
    """Dropout and a batch norm in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.a = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.drop(self.norm(x)))


@pytest.mark.parametrize("training", [True, False])
def test_calibration_runs_in_eval_and_gives_the_mode_back(training: bool) -> None:
    model, x = qat.prepare(Watch().train(training), "w8a8"), torch.randn(9, 4) * 5
    model.drop.eval()                                  # a mode of its own comes back too
    statistics = model.norm.running_mean.clone()
    qat.calibrate(model, [x])
    assert model.training is training
    assert model.a.training is training
    assert not model.drop.training
    assert torch.equal(model.norm.running_mean, statistics)
    other = qat.calibrate(qat.prepare(Watch(), "w8a8"), [x])
    assert torch.equal(model.a.input_quantizer.scale,
                       other.a.input_quantizer.scale), "dropout or batch statistics got in"


@pytest.mark.filterwarnings("ignore:1-bit activations that never change sign")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "w2a2", "w1a1", "w8a8_dynamic"])
def test_without_observing_no_range_moves_in_train_or_eval(preset: str, training: bool) -> None:
    x = zoo.inputs("mlp", 6)
    model = qat.calibrate(qat.prepare(zoo.build("mlp"), preset, example_inputs=x), [x]).train(training)
    model(x)
    before = scales(model)
    for factor in (100.0, 0.01):
        model(x * factor)
    assert same(scales(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_observing_moves_ranges_in_train_and_in_eval(training: bool) -> None:
    model = qat.calibrate(linear(), [torch.randn(6, 4)]).train(training)
    before = model[0].input_quantizer.scale.clone()
    qat.set_observing(model, True)
    model.train(not training)
    assert model[0].input_quantizer.observing, "train() and eval() do not switch observing"
    model.train(training)
    model(torch.randn(6, 4) * 100)
    assert float(model[0].input_quantizer.scale) > 20 * float(before)
    qat.set_observing(model, False)
    moved = scales(model)
    model(torch.randn(6, 4) * 1e4)
    assert same(scales(model), moved)


def test_a_frozen_range_stays_for_good() -> None:
    model = qat.calibrate(linear(), [torch.randn(6, 4)])
    qat.freeze_ranges(model)
    before = scales(model)
    qat.set_observing(model, True)
    model(torch.randn(6, 4) * 100)
    qat.calibrate(model, [torch.randn(6, 4) * 100])
    assert same(scales(model), before)


def test_a_batch_without_rows_changes_no_statistics() -> None:
    for spec in ("int8", {"format": "int8", "observer": "moving_average"}, {"format": "int8", "observer": "mse"},
                 "binary"):
        model = qat.calibrate(linear(spec), [torch.randn(6, 4)])
        qat.set_observing(model, True)
        model(torch.randn(6, 4))
        before = scales(model)
        assert model(torch.zeros(0, 4)).shape == (0, 3)
        assert same(scales(model), before)


def test_weight_scales_follow_the_weight_but_activation_scales_do_not() -> None:
    model = qat.calibrate(linear(), [torch.randn(6, 4)])
    x = torch.randn(2, 4)
    y = model(x)
    with torch.no_grad():
        model[0].weight *= 2.0
        model[0].bias *= 2.0
    assert torch.equal(model(x), 2.0 * y)


# ------------------------------------------------------------------------------------------------ batch norm


def test_batch_norm_statistics_can_be_frozen() -> None:
    x = zoo.inputs("conv", 6)
    model = zoo.prepared(zoo.build("conv"), "w8a8", [x]).train()
    qat.freeze_batch_norm(model)
    before = model[1].running_mean.clone()
    model(x)
    assert torch.equal(model[1].running_mean, before)
    assert not model.train()[1].training
    qat.freeze_batch_norm(model, False)
    assert model[1].training
    model(x)
    assert not torch.equal(model[1].running_mean, before)


def test_re_estimated_statistics_are_plain_averages() -> None:
    x = torch.randn(6, 3, 8, 8)
    model = zoo.prepared(zoo.build("conv"), "w8a8", [x]).train()
    qat.reestimate_batch_norm(model, [x, x * 1.5])
    assert model.training
    assert model[1].momentum == 0.1
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(y.detach().mean((0, 2, 3))))
    qat.reestimate_batch_norm(model, [x, x * 1.5])
    torch.testing.assert_close(model[1].running_mean, (seen[0] + seen[1]) / 2, rtol=1e-4, atol=1e-5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="at least one batch"):
        qat.reestimate_batch_norm(model, [])
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items()), \
        "an empty loader wiped the statistics out"


def test_every_static_quantizer_is_found() -> None:
    model = zoo.prepared(zoo.build("conv"), zoo.every_layer(output="int8"), [zoo.inputs("conv", 2)])
    found = {id(q) for q in activation_quantizers(model)}
    assert found == {id(m) for m in model.modules() if isinstance(m, StaticQuantizer) and not m.is_weight}


def test_unsigned_symmetric_inputs_that_are_negative_warn() -> None:
    model = qat.prepare(torch.nn.Linear(4, 2), {"rules": [{"weight": "int8", "input": {"format": "uint8",
                                                                                        "symmetric": True}}]})
    with pytest.warns(UserWarning, match="cut all negative values off"):
        qat.calibrate(model, [torch.randn(8, 4)])


@pytest.mark.filterwarnings("error:the ranges of this model")
def test_ranges_behind_batch_norms_that_have_seen_no_data() -> None:
    """Said once, when training begins, by whichever of them runs first; not where ranges follow, or data was seen."""
    x, kinds = torch.randn(32, 3, 6, 6), (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    float_model = nn.Sequential(*kinds, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 2))

    def calibrated(model: nn.Module) -> nn.Module:
        return qat.calibrate(qat.prepare(model, "w8a8", x), [x])

    fresh = calibrated(float_model)
    fresh.eval()(x)
    twin = copy.deepcopy(fresh)
    for model in (fresh, twin):
        with pytest.warns(UserWarning, match=r"no data \(1, 4\).*qat\.set_observing"):
            model.train()(x)
        model(x)
    following = calibrated(float_model)
    qat.set_observing(following, True)
    following.train()(x)
    assert torch.equal(qat.calibrate(fresh, [x]).train()(x), fresh(x))
    float_model.train()(x)
    calibrated(float_model).train()(x)
