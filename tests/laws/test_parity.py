"""Law 4: prepared (eval) and deployed models are ``torch.equal``; law 5: a recipe that does nothing changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.kernels import table
from qat.modules.base import QuantizedModule
from qat.numerics.formats import FORMATS
from qat.recipe import PRESETS

# 1-bit inputs behind a ReLU warn by design (tests/calibration holds that they do); here only parity is asked
pytestmark = pytest.mark.filterwarnings("ignore:1-bit activations that never change sign")

INTEGER = [n for n in PRESETS if n not in ("fp16", "bf16")]
NO_ZERO = [("w1a1", m) for m in ("transposed", "1d", "3d")]
"""Transposed convolutions spread their input with zeros, which a 1-bit input does not have."""


@pytest.mark.parametrize(("preset", "model"), [c for c in itertools.product(PRESETS, zoo.ZOO) if c not in NO_ZERO])
def test_every_preset_on_every_model(preset: str, model: str) -> None:
    float_model = zoo.build(model)
    one, seven, none = (zoo.inputs(model, n) for n in (1, 7, 0))
    before, after = zoo.assert_parity(float_model, preset, seven, one, none)
    quantized = [m for m in after.modules() if isinstance(m, QuantizedModule) and m.plan.weight is not None]
    assert preset in ("fp16", "bf16") or len(quantized) >= 3, "nothing was quantized"
    assert all(m.frozen and "weight" not in m._parameters for m in quantized)
    assert not torch.equal(before(seven), float_model.eval()(seven)), "quantized, and yet no value moved"


@pytest.mark.parametrize(("preset", "model"), NO_ZERO)
def test_transposed_inputs_without_a_zero_are_refused_by_prepare(preset: str, model: str) -> None:
    with pytest.raises(qat.QuantizationError, match="zero"):
        qat.prepare(zoo.build(model), preset, example_inputs=zoo.inputs(model, 2))


@pytest.mark.parametrize("model", zoo.ZOO)
@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic", "w4a4"])
def test_without_example_inputs(preset: str, model: str) -> None:
    zoo.assert_parity(zoo.build(model), preset, zoo.inputs(model, 7), zoo.inputs(model, 1), traced=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("preset", "model"), list(itertools.product(
    ["w8a8", "w8a8_dynamic", "w4a16", "w2a2", "w158a8", "fp16"], ["mlp", "conv", "transposed", "tied", "residual"])))
def test_narrow_models(preset: str, model: str, dtype: torch.dtype) -> None:
    x = zoo.inputs(model, 5, dtype)
    before, after = zoo.assert_parity(zoo.build(model, dtype), preset, x, zoo.inputs(model, 1, dtype))
    assert before(x).dtype == after(x).dtype == dtype


@pytest.mark.parametrize("output", ["int8", {"format": "int8", "power_of_two": True}, {"format": "uint8"}], ids=str)
@pytest.mark.parametrize("model", [m for m in zoo.ZOO if m != "tied"])
def test_chained_codes(model: str, output: Any) -> None:
    recipe = zoo.every_layer(output=output)
    _, after = zoo.assert_parity(zoo.build(model), recipe, zoo.inputs(model, 7), zoo.inputs(model, 1),
                             zoo.inputs(model, 0))
    if model != "residual":             # there, each output is read by an add, which no rule here names
        assert any(m.plan.emits_codes for m in after.modules() if isinstance(m, QuantizedModule))
    zoo.assert_parity(zoo.build(model), recipe, zoo.inputs(model, 3), traced=False)


SCHEMES: list[tuple[Any, Any]] = [
    *((name, "int8") for name in FORMATS if FORMATS[name].signed),
    *(("int8", name) for name in FORMATS),
    ({"format": "uint8", "symmetric": False}, "uint8"),
    ({"format": "int4", "symmetric": False, "granularity": "per_tensor"},
     {"format": "uint4", "observer": "percentile"}),
    ({"format": "int8", "granularity": "per_tensor"}, {"format": "uint8", "dynamic": True, "symmetric": False}),
    ("int8", {"format": "int8", "dynamic": True, "granularity": "per_tensor"}),
    ("int8", {"format": "uint8", "dynamic": True, "granularity": "per_tensor", "symmetric": False}),
    ({"format": "int8", "power_of_two": True}, {"format": "int8", "power_of_two": True}),
    ({"format": "int8", "scale_dtype": "float16"}, {"format": "int8", "scale_dtype": "bfloat16"}),
    ({"format": "int8", "observer": "mse"}, {"format": "uint8", "observer": "percentile", "percentile": 99.0}),
    ("int8", {"format": "uint8", "observer": "entropy"}), ("int8", {"format": "int8", "observer": "moving_average"}),
    ({"format": "int4", "learned": "lsq"}, {"format": "uint8", "learned": "lsq_plus"}),
    ("int8", {"format": "uint4", "learned": "pact"}), ("int8", {"format": "int8", "learned": "lsq"}),
    ("binary", {"format": "binary", "learned": "rsign"}), ("int8", {"format": "uint2", "observer": "mean"}),
    ({"format": "int3", "learned": "lsq", "observer": "mean"},
     {"format": "int4", "learned": "lsq", "observer": "mean"}),
    ({"format": "int4", "symmetric": False}, None), ("binary", None), ("ternary", None), ("int2_midrise", None),
]


@pytest.mark.parametrize(("weight", "activation"), SCHEMES, ids=lambda s: str(s))
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_every_scheme_a_recipe_can_name(model: str, weight: Any, activation: Any) -> None:
    zoo.assert_parity(zoo.build(model), zoo.every_layer(weight, activation), zoo.inputs(model, 7), zoo.inputs(model, 1))


@pytest.mark.parametrize("activation", ["int8", "uint4", {"format": "int8", "dynamic": True},
                                        {"format": "uint8", "dynamic": True, "symmetric": False}, None], ids=str)
@pytest.mark.parametrize("size", [1, 3, 12])
def test_groups_on_integers(size: int, activation: Any) -> None:
    weight = {"format": "int4", "granularity": "per_group", "group_size": size}
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 1))
    zoo.assert_parity(model, zoo.every_layer(weight, activation), torch.randn(7, 12), torch.randn(1, 12),
                      torch.randn(0, 12), torch.randn(2, 3, 12))


@pytest.mark.parametrize("preset", INTEGER)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 8), (2, 0, 8), (1, 1, 1, 8)], ids=str)
def test_linear_layers_take_any_leading_shape(preset: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    before = zoo.prepared(model, preset, [torch.randn(5, 8)])
    after, _ = qat.convert(before, [torch.randn(5, 8)])
    x = torch.randn(shape)
    assert before(x).shape == model(x).shape
    assert torch.equal(before(x), after(x))


@pytest.mark.parametrize("output", [None, "int8"])
@pytest.mark.parametrize("preset_input", ["int8", {"format": "int8", "dynamic": True}], ids=str)
def test_convolutions_without_a_batch_dimension(preset_input: Any, output: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(2, 2, 1))
    x = torch.randn(3, 6, 5)
    before, _ = zoo.assert_parity(model, zoo.every_layer("int8", preset_input, output), x)
    assert before(x).shape == model(x).shape


# torch warns of its own float convolution with even kernels
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", [
    {"kernel_size": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": (1, 4), "padding": "same"}, {"kernel_size": 2, "padding": 3},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "groups": 2}, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": (4, 2), "padding": (2, 1), "padding_mode": "circular"}], ids=str)
@pytest.mark.parametrize("activation", ["int8", "uint4", "binary", "int2_midrise", {"format": "int8", "dynamic": True},
                                        {"format": "uint8", "dynamic": True, "symmetric": False}], ids=str)
def test_convolution_geometries(geometry: dict[str, Any], activation: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, **geometry))
    x = torch.randn(2, 4, 7, 6)
    before, _ = zoo.assert_parity(model, zoo.every_layer("int8", activation), x, torch.randn(1, 4, 5, 9))
    assert before(x).shape == model(x).shape


@pytest.mark.parametrize("geometry", [
    {"kernel_size": 1}, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "padding": 3, "dilation": 4},
    {"kernel_size": (1, 4), "stride": (3, 1)}, {"kernel_size": 3, "groups": 2, "bias": False},
    {"kernel_size": 2, "stride": 5, "output_padding": 3}], ids=str)
@pytest.mark.parametrize("activation", ["int8", "uint4", {"format": "int8", "dynamic": True}], ids=str)
def test_transposed_geometries(geometry: dict[str, Any], activation: Any) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, **geometry))
    x = torch.randn(2, 4, 4, 6)
    before, _ = zoo.assert_parity(model, zoo.every_layer("int8", activation), x, torch.randn(1, 4, 5, 3))
    with torch.no_grad():
        expected, got = model.eval()(x), before(x)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < (0.05 if activation != "uint4" else 0.6) * float(expected.abs().max())


def test_the_output_size_of_a_transposed_convolution_is_passed_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[8, 8])

    before, _ = zoo.assert_parity(Net(), "w8a8", torch.randn(2, 2, 3, 3))
    assert before(torch.randn(2, 2, 3, 3)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("backend", ["reference", "float"])
def test_the_backend_does_not_matter(backend: str) -> None:
    """Deploy with the table's choice, run on another backend: still the same bits."""
    for name in ("mlp", "conv", "transposed"):
        x = zoo.inputs(name, 5)
        before, after = zoo.assert_parity(zoo.build(name), "w8a8", x)
        expected = before(x)
        with table.use(backend):
            assert torch.equal(before(x), expected)
            assert torch.equal(after(x), expected)


def test_under_autocast() -> None:
    for name in ("mlp", "conv"):
        x = zoo.inputs(name, 5)
        before, after = zoo.assert_parity(zoo.build(name), "w8a8", x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(before(x), after(x))
            assert before(x).dtype == torch.bfloat16


@pytest.mark.parametrize("model", zoo.ZOO)
def test_parity_after_training(model: str) -> None:
    """Weights, learned scales and batch norm statistics that have moved freeze as they are."""
    x = zoo.inputs(model, 7)
    trained = zoo.prepared(zoo.build(model), "w4a4", [x])
    trained.train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    start = trained(x).detach()
    for _ in range(3):
        optimizer.zero_grad()
        trained(x).float().square().mean().backward()
        optimizer.step()
    trained.eval()
    deployed, certificate = qat.convert(trained, [x])
    assert certificate.equal
    assert torch.equal(trained(x), deployed(x))
    assert not torch.equal(start, trained(x))


def test_the_codes_are_integers_and_stand_for_the_float_weight() -> None:
    model = nn.Sequential(nn.Linear(9, 4))
    deployed, _ = qat.convert(zoo.prepared(model, "w8a8", [torch.randn(6, 9)]), [torch.randn(6, 9)])
    layer = deployed[0]
    scale = model[0].weight.abs().amax(1) / 127.5
    expected = (model[0].weight / scale[:, None]).round().clamp(-128, 127)
    assert layer.quantized_weight().codes.dtype == torch.int8
    assert torch.equal(layer.quantized_weight().codes.float(), expected)
    assert torch.equal(layer.weight_scale, scale)


def test_the_forward_is_the_integer_formula() -> None:
    """Written out by hand: codes, an int64 product, two roundings."""
    model = nn.Sequential(nn.Linear(9, 4))
    x = torch.randn(6, 9)
    before = zoo.prepared(model, "w8a8", [x])
    layer = before[0]
    scale_x, zero_point = layer.input_quantizer.scale, int(layer.input_quantizer.zero_point)
    codes_x = ((x / scale_x).round() + zero_point).clamp(-128, 127).long()
    scale_w = model[0].weight.abs().amax(1) / 127.5
    codes_w = (model[0].weight / scale_w[:, None]).round().clamp(-128, 127).long()
    acc = (codes_x - zero_point) @ codes_w.t()
    assert torch.equal(before(x), acc.float() * (scale_x * scale_w) + model[0].bias)


# ------------------------------------------------------------------------------------------------ law 5


@pytest.mark.parametrize("recipe", [{"rules": []}, {"rules": [{"keep": "float32"}]}], ids=["no rules", "keep float32"])
@pytest.mark.parametrize("model", zoo.ZOO)
def test_a_no_op_recipe_is_bit_identical(model: str, recipe: dict[str, Any]) -> None:
    float_model, x = zoo.build(model), zoo.inputs(model, 5)
    for training in (True, False):
        kept = qat.prepare(float_model.train(training), recipe, example_inputs=x)
        torch.manual_seed(1)
        expected = float_model(x)
        torch.manual_seed(1)
        assert torch.equal(kept(x), expected)
    assert list(kept.state_dict()) == list(float_model.state_dict())
    assert qat.coverage(kept).quantized_params == 0
