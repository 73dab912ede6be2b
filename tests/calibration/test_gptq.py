"""GPTQ: codes chosen one input after another, on tensors and on models."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.calibration.gptq import Hessian, gptq, output_error, ranges
from qat.errors import CalibrationError, RecipeError
from qat.modules.attention import QuantizedMultiheadAttention
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.rewriter import prepared_state, quantized_modules

FORMATS = ("int8", "int4", "int3", "int2", "uint4", "uint2", "int3_midrise", "int2_midrise", "ternary", "binary")


def weight_spec(format: str, granularity: str = "per_channel", **more: Any) -> TensorSpec:
    size = 8 if granularity == "per_group" else None
    symmetric = False if format.startswith("u") else None
    return TensorSpec(format, granularity, size, symmetric=symmetric, **more).for_weight()


def correlated(*shape: int) -> Tensor:
    """Inputs that depend on each other, some much greater than others, as those of real layers do."""
    inputs = shape[-1]
    return torch.randn(shape) @ torch.randn(inputs, inputs) * torch.rand(inputs).add(0.1)


def hessian_of(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) @ x / x.shape[-2]


def inverse_form(weight: Tensor, hessian: Tensor, scale: Tensor, spec: TensorSpec, order: bool, damp: float) -> Tensor:
    """The algorithm as it was published: float64, the inverse of H, errors passed on to the inputs behind."""
    inputs = len(hessian)
    turn = hessian.diagonal().argsort(descending=True) if order else torch.arange(inputs)
    w, h = weight.double()[:, turn], hessian.double()[turn][:, turn]
    h += damp * h.diagonal().mean() * torch.eye(inputs)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for j in range(inputs):
        codes[:, turn[j]] = affine.quantize(w[:, j], scale, None, spec)
        error = (w[:, j] - codes[:, turn[j]] * scale) / upper[j, j]
        w -= error.unsqueeze(1) * upper[j] * (torch.arange(inputs) > j)
    return codes


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("inputs", [1, 7, 32, 33, 100])
def test_the_codes_are_those_of_the_published_form(inputs: int, order: bool) -> None:
    weight, hessian, spec = torch.randn(6, inputs), hessian_of(correlated(4 * inputs, inputs)), weight_spec("int4")
    codes, scale, zero_point = gptq(weight, hessian, spec, order=order, damp=0.02)
    assert zero_point is None
    assert torch.equal(codes, inverse_form(weight, hessian, scale, spec, order, 0.02))


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("groups", "outputs", "inputs"), [(1, 24, 48), (3, 8, 72)])
def test_outputs_come_nearer_though_weights_go_farther(groups: int, outputs: int, inputs: int, format: str,
                                                       granularity: str, order: bool) -> None:
    weight, hessian = torch.randn(groups * outputs, inputs), hessian_of(correlated(groups, 200, inputs))
    spec = weight_spec(format, granularity)
    placed = ranges(weight, spec)
    nearest = weight - affine.dequantize(affine.quantize(weight, *placed, spec), *placed, spec)
    codes, scale, zero_point = gptq(weight, hessian, spec, order=order)
    values = affine.dequantize(codes, scale, zero_point, spec)
    assert output_error(weight - values, hessian) < output_error(nearest, hessian)
    assert (weight - values).square().sum() > nearest.square().sum()
    assert torch.equal(affine.quantize(values, scale, zero_point, spec), codes)      # values of the grid
    again = gptq(weight, hessian, spec, order=order)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)
    if order or granularity != "per_group":
        assert torch.equal(scale, placed[0])


@pytest.mark.parametrize("observer", ["minmax", "mse", "mean"])
def test_each_observer_finds_the_range_of_a_group_when_its_turn_comes(observer: str) -> None:
    weight, hessian = torch.randn(5, 32), hessian_of(correlated(100, 32))
    spec = weight_spec("int3", "per_group", observer=observer)
    codes, scale, _ = gptq(weight, hessian, spec, order=False)
    static = ranges(weight, spec)[0]
    assert torch.equal(scale[:, 0], static[:, 0])                   # nothing has happened yet
    assert not torch.equal(scale[:, 1:], static[:, 1:])
    assert output_error(weight - affine.dequantize(codes, scale, None, spec), hessian) < output_error(weight, hessian)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(("format", "granularity"), [("int4", "per_channel"), ("uint3", "per_group"),
                                                     ("ternary", "per_tensor")])
def test_pruned_values_stay_at_level_0(format: str, granularity: str, order: bool) -> None:
    weight, hessian, spec = torch.randn(9, 40), hessian_of(correlated(90, 40)), weight_spec(format, granularity)
    mask = torch.rand(9, 40) > 0.5
    codes, scale, zero_point = gptq(weight, hessian, spec, mask=mask, order=order)
    assert not affine.levels(codes, zero_point, spec)[~mask].any()
    pruned = torch.where(mask, weight, 0.0)
    placed = ranges(pruned, spec)
    nearest = affine.dequantize(affine.quantize(pruned, *placed, spec), *placed, spec)
    assert output_error(pruned - affine.dequantize(codes, scale, zero_point, spec), hessian) \
        < output_error(pruned - nearest, hessian)


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, x, spec = torch.randn(6, 20), correlated(60, 20), weight_spec("int4")
    x[:, ::3] = 0.0
    codes, scale, _ = gptq(weight, hessian_of(x), spec)
    assert torch.equal(codes[:, ::3], affine.quantize(weight, scale, None, spec)[:, ::3])
    alone, _, _ = gptq(weight, torch.zeros(20, 20), spec)
    assert torch.equal(alone, affine.quantize(weight, scale, None, spec))


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    x = correlated(3, 64)
    weight, hessian, spec = torch.randn(4, 64), hessian_of(x), weight_spec("int4")
    codes, scale, _ = gptq(weight, hessian, spec, damp=0.0)
    nearest = affine.dequantize(affine.quantize(weight, scale, None, spec), scale, None, spec)
    assert output_error(weight - affine.dequantize(codes, scale, None, spec), hessian) \
        < output_error(weight - nearest, hessian)
    with pytest.raises(CalibrationError, match="positive definite"):
        gptq(weight, hessian - 1e9 * torch.ones(64, 64), spec)
    with pytest.raises(CalibrationError, match="NaN"):
        gptq(weight, hessian.fill_(torch.nan), spec)


def test_the_hessian_is_the_mean_over_all_rows_however_they_come() -> None:
    rows = torch.randn(2, 1000, 5)
    hessian = Hessian()
    for piece in rows.split([1, 0, 3, 500, 496], 1):
        hessian.add(piece.half() if piece.shape[1] == 3 else piece)
    assert hessian.rows == 1000
    torch.testing.assert_close(hessian.mean(), hessian_of(rows), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- models


class Tokens(nn.Module):
    """A recurrent layer or a transformer block between two linear layers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.front, self.body, self.head = nn.Linear(16, 16), body, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.front(x))
        return self.head(y[0] if isinstance(y, tuple) else y)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8))


def cnn() -> nn.Module:
    return zoo.batch_norms_of_any_sign(nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(8 * 49, 5)))


def lstm() -> nn.Module:
    return Tokens(nn.LSTM(16, 16, num_layers=2, batch_first=True))


def transformer() -> nn.Module:
    return Tokens(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (32,)), "cnn": (cnn, (3, 10, 10)), "lstm": (lstm, (12, 16)), "transformer": (transformer, (12, 16))}
RECIPES: dict[str, dict[str, Any]] = {
    "w4": {"weight": {"format": "int4", "fixed": True}},
    "w3": {"weight": {"format": "int3", "observer": "mse"}},
    "w4a8": {"weight": {"format": "int4", "learned": "lsq", "observer": "mse"}, "input": "int8"},
}


def inputs(name: str, count: int, times: int) -> list[Tensor]:
    shape = MODELS[name][1]
    mixing = torch.randn(shape[-1], shape[-1])
    return [(torch.randn(count, *shape) @ mixing) / shape[-1] ** 0.5 for _ in range(times)]


def recipe(rule: dict[str, Any], *calibration: Any) -> qat.Recipe:
    return qat.Recipe.from_dict({"rules": [rule], "calibration": list(calibration)})


@pytest.mark.filterwarnings("ignore:gptq. fewer rows")
@pytest.mark.parametrize("scheme", list(RECIPES))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_comes_nearer_to_float_and_ships_the_codes_that_were_chosen(name: str, scheme: str, tmp_path) -> None:
    model = MODELS[name][0]().eval()
    *batches, held_out = inputs(name, 48, 5)
    expected, errors, codes = model(held_out).detach(), {}, {}
    steps: list[tuple[str, int, int]] = []
    for kind in ("nearest", "gptq"):
        prepared = qat.prepare(model, recipe(RECIPES[scheme], *(["gptq"] if kind == "gptq" else [])), held_out)
        threads = threading.active_count()
        qat.calibrate(prepared, batches, progress=lambda *step: steps.append(step))
        assert threading.active_count() == threads
        errors[kind] = (prepared(held_out) - expected).square().mean().item()
        codes = {n: m.quantized_weight().codes for n, m in quantized_modules(prepared).items() if m.weight_quantizer}
    assert errors["gptq"] < 0.8 * errors["nearest"]
    assert steps == [("gptq", n + 1, len(codes)) for n in range(len(codes))]
    notes = prepared_state(prepared).notes
    assert notes.keys() == codes.keys()
    assert all("output error" in note for note in notes.values())
    assert "gptq: output error" in str(qat.coverage(prepared))
    for n, module in quantized_modules(prepared).items():
        if module.weight_quantizer is not None:              # the float weights are values of the grid
            matrix = module.weight_matrix()
            assert torch.equal(module.weight_quantizer(matrix), matrix), n
    deployed, certificate = qat.convert(prepared, [held_out])
    assert certificate.equal
    assert torch.equal(deployed(held_out), prepared(held_out))
    for n, module in quantized_modules(deployed).items():
        if n in codes:
            assert torch.equal(module.quantized_weight().codes, codes[n]), n
    qat.save(deployed, tmp_path)
    loaded = qat.load(tmp_path, MODELS[name][0]())
    assert torch.equal(loaded(held_out), deployed(held_out))


@pytest.mark.parametrize("options", [{}, {"order": False}, {"damp": 0.1}])
def test_groups_of_inputs_and_the_same_codes_again(options: dict[str, Any]) -> None:
    *batches, held_out = inputs("mlp", 64, 3)
    model = mlp()
    rule = {"weight": {"format": "int3", "granularity": "per_group", "group_size": 16}}
    made = []
    for _ in range(2):
        prepared = qat.calibrate(qat.prepare(model, recipe(rule, {"gptq": options}), held_out), batches)
        made.append(prepared.state_dict())
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())
    nearest = qat.calibrate(qat.prepare(model, recipe(rule), held_out), batches)
    expected = model(held_out).detach()
    assert (prepared(held_out) - expected).square().mean() < (nearest(held_out) - expected).square().mean()


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("spec", [
    {"format": "uint4", "symmetric": False, "granularity": "per_tensor"},
    {"format": "uint3", "symmetric": False, "granularity": "per_group", "group_size": 8},
    {"format": "int4", "learned": "lsq", "granularity": "per_group", "group_size": 8},
    {"format": "int4", "scale_dtype": "bfloat16"}, {"format": "int2_midrise", "power_of_two": True},
    {"format": "ternary"}, {"format": "binary", "granularity": "per_group", "group_size": 16}])
def test_every_kind_of_range_is_placed_and_frozen_with_its_codes(spec: dict[str, Any], order: bool) -> None:
    batches = inputs("mlp", 64, 3)
    prepared = qat.prepare(mlp(), recipe({"weight": spec, "input": "int8"}, {"gptq": {"order": order}}), batches[0])
    qat.calibrate(prepared, batches)
    notes = prepared_state(prepared).notes
    assert any(note.startswith("gptq: ") for note in notes.values())
    codes = {}
    for n, module in quantized_modules(prepared).items():
        matrix, quantizer = module.weight_matrix(), module.weight_quantizer
        assert torch.equal(quantizer(matrix), matrix) == notes[n].startswith("gptq: ")
        codes[n] = quantizer.codes(matrix)
    deployed, certificate = qat.convert(prepared, batches[:1])
    assert certificate.equal
    assert all(torch.equal(m.quantized_weight().codes, codes[n]) for n, m in quantized_modules(deployed).items())


@pytest.mark.parametrize("options", [{"damp": -1}, {"damp": "0.1"}, {"damp": True}, {"damp": torch.nan}, {"order": 1}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    prepared = qat.prepare(mlp(), recipe({"weight": "int4"}, {"gptq": options}))
    with pytest.raises(RecipeError, match=f"gptq: {next(iter(options))}"):
        qat.calibrate(prepared, inputs("mlp", 40, 1))


@pytest.mark.parametrize("rule", [
    RECIPES["w4a8"], {"weight": {"format": "int3", "granularity": "per_group", "group_size": 16}},
    {"weight": {"format": "binary", "granularity": "per_group", "group_size": 16}}], ids=["w4a8", "w3", "w1"])
def test_training_goes_on_from_the_codes(rule: dict[str, Any]) -> None:
    model, batches = mlp(), inputs("mlp", 64, 3)
    prepared = qat.calibrate(qat.prepare(model, recipe(rule, "gptq"), batches[0]), batches)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-2)
    before, losses = prepared[0].weight.clone(), []
    for _ in range(5):
        loss = (prepared(batches[0]) - model(batches[0]).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not torch.equal(prepared[0].weight, before)
    assert losses[-1] < losses[0]
    _, certificate = qat.convert(prepared, batches[:1])
    assert certificate.equal


def test_a_range_that_was_placed_already_is_kept() -> None:
    from qat.calibration.gptq import round_weights

    prepared = qat.prepare(mlp(), recipe({"weight": "int4"}, "gptq"))
    batches = inputs("mlp", 64, 2)
    qat.calibrate(prepared, batches, algorithms=[])
    placed = prepared[2].weight_quantizer
    placed.place(placed.scale * 0.8)
    scale = placed.scale.clone()
    round_weights(prepared, batches)
    assert torch.equal(placed.scale, scale)
    matrix = prepared[2].weight_matrix()
    assert torch.equal(placed(matrix), matrix)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


class Oddities(nn.Module):
    """A tied head, an expert that nobody asks, a weight that is computed, one used in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(16, 16)
        self.even, self.odd = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.utils.parametrize.register_parametrization(self.even, "weight", Symmetric())
        nn.utils.parametrize.register_parametrization(self.odd, "weight", Symmetric())
        self.odd.parametrizations.weight[0].right_inverse = lambda weight: weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.first(self.table(tokens)).relu()).relu()
        return self.head(self.normed(self.odd(self.even(x).relu()).relu()))


def test_what_stays_rounded_to_nearest_says_why() -> None:
    tokens = torch.randint(24, (64, 4))
    prepared = qat.prepare(Oddities(), recipe({"weight": "int4"}, "gptq"), tokens)
    qat.calibrate(prepared, [tokens])
    notes = prepared_state(prepared).notes
    assert {n: "nearest: " in note for n, note in notes.items()} == {
        "table": True, "head": True, "first": False, "second": True, "unused": True, "even": True,
        "odd": True, "normed": False}
    assert "embedding table" in notes["head"]
    assert "that of first" in notes["second"]
    assert "no batch" in notes["unused"]
    assert "computed" in notes["even"]
    assert "computed" in notes["odd"]
    assert "no batch" in str(qat.coverage(prepared))
    _, certificate = qat.convert(prepared, [tokens])
    assert certificate.equal


def test_few_rows_are_warned_about_once() -> None:
    prepared = qat.prepare(mlp(), recipe({"weight": "int4"}, "gptq"))
    with pytest.warns(UserWarning, match=r"^gptq: fewer rows than inputs.*0 \(5 rows of 32 inputs\)") as caught:
        qat.calibrate(prepared, inputs("mlp", 5, 1))
    assert len(caught) == 1


def test_bad_inputs_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prepared = qat.prepare(model, recipe({"weight": "int4"}, "gptq"))
    x = torch.randn(8, 4)
    x[3, 2] = torch.inf
    with pytest.raises(CalibrationError, match=r"^0: NaN or infinity"):
        qat.calibrate(prepared, [x])


def test_low_precision_weights_take_the_codes_too() -> None:
    model = mlp().bfloat16()
    batches = [x.bfloat16() for x in inputs("mlp", 64, 2)]
    prepared = qat.prepare(model, recipe({"weight": {"format": "uint8", "symmetric": False}, "input": "int8"}, "gptq"))
    qat.calibrate(prepared, batches)
    assert all(note.startswith("gptq: ") for note in prepared_state(prepared).notes.values())
    _, certificate = qat.convert(prepared, batches[:1])
    assert certificate.equal


def test_pruned_models_stay_pruned() -> None:
    model, batches = mlp(), inputs("mlp", 64, 2)
    prepared = qat.prepare(model, recipe({"weight": "int4"}, "gptq"))
    mask = torch.rand(48, 32) > 0.5
    prepared[0].weight_quantizer.mask = mask
    qat.calibrate(prepared, batches)
    assert not prepared[0].weight[~mask].any()
    assert prepared_state(prepared).notes["0"].startswith("gptq: ")


def test_the_parts_of_a_composite_can_take_turns(monkeypatch) -> None:
    from qat.calibration import gptq as module

    batches = inputs("transformer", 32, 2)
    notes = []
    for limit in (1 << 28, 1):
        monkeypatch.setattr(module, "HESSIANS", limit)
        prepared = qat.prepare(transformer(), recipe({"weight": "int4"}, "gptq"), batches[0])
        assert any(isinstance(m, QuantizedMultiheadAttention) for m in prepared.modules())
        qat.calibrate(prepared, batches)
        notes.append(prepared_state(prepared).notes)
    assert notes[0].keys() == notes[1].keys()
    assert all(note.startswith("gptq: ") for note in notes[1].values())


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (40, 4, 6, 6)), (nn.Linear(6, 4), (30, 5, 6)), (nn.Linear(6, 4), (6,))])
@pytest.mark.parametrize("activation", ["int8", {"format": "int8", "dynamic": True}])
def test_batches_are_cut_into_pieces_where_that_changes_nothing(layer: nn.Module, shape: tuple[int, ...], monkeypatch,
                                                                 activation: Any) -> None:
    from qat.calibration import gptq as module

    x = torch.randn(shape)
    prepared = qat.prepare(nn.Sequential(layer), {"rules": [{"weight": "int4", "input": activation}]})
    qat.calibrate(prepared, [x])
    found = []
    for limit in (1 << 24, 64):
        monkeypatch.setattr(module, "CHUNK", limit)
        hessian = Hessian()
        module._gather(prepared[0], hessian, x)
        found.append(hessian.mean())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
