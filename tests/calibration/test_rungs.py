"""Rungs of a ladder of bit widths: what quantizers work with, what stays, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.calibration.ranges import activation_quantizers
from qat.errors import CalibrationError, ConvertError, PrepareError, SpecError
from qat.modules.base import QuantizedModule
from qat.numerics.formats import FORMATS, TensorSpec
from qat.quantizers.quantizer import make_quantizer, widened
from qat.recipe import PRESETS
from qat.rewriter import quantized_modules

pytestmark = pytest.mark.filterwarnings("ignore:1-bit activations that never change sign")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(torch.nan_to_num(v, 7.0) if v.is_floating_point() else v,
                    torch.nan_to_num(b[k], 7.0) if v.is_floating_point() else b[k]) for k, v in a.items())


def specs(model: nn.Module) -> dict[str, TensorSpec]:
    return {q.name: q.spec for m in quantized_modules(model).values()
            for q in (m.weight_quantizer, m.input_quantizer, m.output_quantizer) if q is not None}


@pytest.mark.parametrize(("spec", "bits", "weight", "positive", "format"), [
    ("int4", 8, True, False, "int8"), ("int4", 4, True, False, "int4"), ("int8", 4, True, False, "int8"),
    ("int2_midrise", 4, True, False, "int4_midrise"), ("int2_midrise", 8, True, False, "int8"),
    ("ternary", 3, True, False, "int3"), ("ternary", 2, True, False, "ternary"),
    ("binary", 2, True, False, "int2_midrise"), ("binary", 4, True, False, "int4"),
    ("binary", 1, False, False, "binary"),
    ("binary", 4, False, False, "int4"), ("binary", 2, False, True, "uint2"), ("uint2", 8, False, True, "uint8"),
    ("int2", 8, False, False, "int8"),
])
def test_the_wider_form_of_a_grid(spec: str, bits: int, weight: bool, positive: bool, format: str) -> None:
    assert widened(TensorSpec(spec), bits, weight, positive).format == format


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "8"])
def test_bits_that_no_grid_has(bits: Any) -> None:
    model = zoo.prepared(zoo.mlp(), "w2a2", [torch.randn(3, 12)])
    before = state(model)
    with pytest.raises(SpecError, match="1 to 8 bits"):
        qat.set_rung(model, [torch.randn(3, 12)], weight=bits)
    assert same(state(model), before)


@pytest.mark.parametrize("preset", [n for n in PRESETS if n not in ("fp16", "bf16", "w8a16", "mixed_w8a8_bf16")])
def test_every_rung_of_every_preset(preset: str) -> None:
    """Names and shapes of the state are those of the recipe's own widths; codes fit the rung; the end deploys."""
    x = torch.randn(16, 3, 8, 8)
    model = zoo.prepared(zoo.conv_net(), preset, [x])
    own, before = specs(model), state(model)
    for bits in (8, 5, 3, 2):
        qat.set_rung(model, [x[:9], x[9:]], weight=bits, input=bits)
        after = state(model)
        assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
        assert all(s.bits == max(own[n].bits, bits) for n, s in specs(model).items())
        assert bool(torch.isfinite(model(x)).all())
        for module in quantized_modules(model).values():
            if module.plan.weight is not None:
                codes = module.quantized_weight().codes
                fmt = module.weight_quantizer.spec.fmt
                assert fmt.lo <= int(codes.min()) < int(codes.max()) <= fmt.hi
        again = zoo.prepared(zoo.conv_net(), preset, [x])
        qat.set_rung(again, None, weight=bits, input=bits)
        again.load_state_dict(after)
        assert torch.equal(again(x), model(x)), "a checkpoint of this rung computes something else"
        toggled = zoo.prepared(zoo.conv_net(), preset, [x])
        toggled.load_state_dict(after)
        qat.set_rung(toggled, None, weight=bits, input=bits)
        assert torch.equal(toggled(x), model(x)), "the order of loading and toggling matters"
    if any(s.bits < 2 for s in own.values()):
        with pytest.raises(ConvertError, match=r"higher rung.*set_rung"):
            qat.convert(model, [x])
    qat.set_rung(model, [x])
    assert specs(model) == own
    zoo_parity(model, x)


def zoo_parity(model: nn.Module, x: Tensor) -> None:
    deployed, certificate = qat.convert(model, [x])
    assert certificate.equal
    assert torch.equal(model(x), deployed(x))


def test_the_way_up_and_down_ends_where_calibration_begins() -> None:
    """Weights and data being the same, the ranges found after a descent are those found without a ladder."""
    x = torch.randn(32, 3, 8, 8)
    for preset in ("w2a2", "w4a4", "w1a1", "w8a8"):
        direct = zoo.prepared(zoo.conv_net(), preset, [x])
        climbed = copy.deepcopy(direct)
        for bits in (8, 4):
            qat.set_rung(climbed, [x], weight=bits, input=bits)
        qat.set_rung(climbed, [x])
        assert same(state(direct), state(climbed)), preset
        assert torch.equal(direct(x), climbed(x))


def test_a_higher_rung_is_nearer_to_the_float_model() -> None:
    float_model, x = zoo.conv_net().eval(), torch.randn(32, 3, 8, 8)
    model = zoo.prepared(float_model, "w1a1", [x])
    errors = []
    for widths in ({"weight": 8, "input": 8}, {"weight": 4, "input": 4}, {}):
        qat.set_rung(model, [x], **widths)
        with torch.no_grad():
            errors.append(float((model(x) - float_model(x)).square().mean()))
    assert errors[0] < errors[1] < errors[2]


def test_only_what_changes_is_found_anew() -> None:
    x = torch.randn(16, 12)
    model = zoo.prepared(nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3)),
                         "w4a4", [x])
    quantizer = model[2].input_quantizer
    with torch.no_grad():
        quantizer.log_scale.add_(0.5)
    learned = quantizer.log_scale.clone()
    qat.set_rung(model, iter(()), weight=8)     # weights need no data
    assert torch.equal(quantizer.log_scale, learned)
    qat.set_rung(model, [x], weight=8, input=8)
    assert not torch.equal(quantizer.log_scale, learned)
    inner = quantizer.log_scale.clone()
    qat.set_rung(model, [x * 100], input=8)
    assert torch.equal(quantizer.log_scale, inner), "a grid that stays keeps its scale"


def test_what_fails_changes_nothing() -> None:
    x = torch.randn(16, 12)
    model = zoo.prepared(zoo.mlp(), "w2a2", [x])
    qat.set_rung(model, [x], weight=4, input=4)
    before, held = state(model), specs(model)
    for batches, error in ((iter(()), "at least one batch"), ([x * float("nan")], "NaN")):
        with pytest.raises(CalibrationError, match=error):
            qat.set_rung(model, batches)
        assert same(state(model), before)
        assert specs(model) == held
    qat.freeze_ranges(model)
    with pytest.raises(CalibrationError, match=r"frozen.*last rung"):
        qat.set_rung(model, [x])
    assert specs(model) == held


def test_float_and_deployed_models_have_no_rungs() -> None:
    x = torch.randn(4, 12)
    with pytest.raises(PrepareError, match="prepare"):
        qat.set_rung(zoo.mlp(), [x], weight=8)
    deployed, _ = qat.convert(zoo.prepared(zoo.mlp(), "w2a2", [x]), [x])
    with pytest.raises(ConvertError, match="deployed"):
        qat.set_rung(deployed, [x], weight=8)


def test_shared_weights_and_codes_passed_on() -> None:
    tokens = zoo.inputs("tied", 5)
    model = zoo.prepared(zoo.build("tied"), zoo.every_layer({"format": "int2_midrise", "learned": "lsq"}, "int4"),
                         [tokens])
    qat.set_rung(model, [tokens], weight=8, input=8)
    assert model.table.weight_quantizer is model.head.weight_quantizer
    assert model.head.weight_quantizer.spec.bits == 8
    qat.set_rung(model, [tokens])
    zoo_parity(model, tokens)
    x = torch.randn(6, 3, 8, 8)
    chained = zoo.prepared(zoo.conv_net(), zoo.every_layer("int4", "int4", "int4"), [x])
    assert any(m.plan.emits_codes for m in chained.modules() if isinstance(m, QuantizedModule))
    qat.set_rung(chained, [x], input=8)
    assert all(q.spec.bits == 8 for q in activation_quantizers(chained))
    qat.set_rung(chained, [x])
    zoo_parity(chained, x)


def test_every_format_has_a_wider_form_with_the_same_state() -> None:
    for name, fmt in FORMATS.items():
        for observer in ("minmax", "mse", "percentile", "mean"):
            for learned in (None, "lsq"):
                spec = TensorSpec(name, observer=observer, learned=learned)
                for shape in ((None, (6, 4)) if fmt.signed and observer != "percentile" else (None,)):
                    q = make_quantizer(spec, None if shape is None else torch.Size(shape))
                    x = torch.rand(6, 4) - (0.5 if fmt.signed else 0.0)
                    q.observe(x) if shape is None else None
                    before = {k: v.shape for k, v in q.state_dict().items()}
                    q.work_at(8)
                    assert {k: v.shape for k, v in q.state_dict().items()} == before, (name, observer, learned, shape)
                    q.observe(x) if shape is None else None
                    assert float((q(x).detach() - x).abs().max()) < 0.1
