"""AdaRound: codes that are not the nearest, and better for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from trained import digits

import qat
from qat.calibration.rounding import Moments, adaround, layer_stops, neighbours
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import make_quantizer
from qat.training.models import ByteTransformer


def correlated(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs as behind a ReLU, which have much in common."""
    basis = torch.randn(max(2, inputs // 4), inputs, generator=torch.Generator().manual_seed(7))
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, len(basis), generator=noise) @ basis / len(basis) ** 0.5
    return (x + 0.3 * torch.randn(rows, inputs, generator=noise)).relu()


def on_grid(weight: torch.Tensor, **spec) -> tuple[TensorSpec, torch.Tensor, torch.Tensor | None]:
    """A spec for ``weight`` with the range that its observer finds."""
    quantizer = make_quantizer(TensorSpec(**spec, fixed=True).for_weight(), weight.shape)
    quantizer.quantize(weight)
    return quantizer.spec, *quantizer.present()


FORMATS = ("int8", "int4", "int3", "int2", "int4_midrise", "int2_midrise", "ternary", "binary")
GRIDS = [*({"format": f} for f in FORMATS),
         {"format": "uint4", "symmetric": False}, {"format": "int4", "granularity": "per_tensor"},
         {"format": "int3", "granularity": "per_group", "group_size": 8},
         {"format": "uint3", "symmetric": False, "granularity": "per_group", "group_size": 8}]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("groups", [1, 2])
def test_less_output_error_and_more_weight_error_on_every_grid(grid: dict, groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12 * groups, 24) * 0.2
    spec, scale, zero_point = on_grid(weight, **grid)
    seen, fresh = (Moments.none(weight, groups) for _ in range(2))
    for moments, seed in ((seen, 1), (fresh, 2)):
        moments.add(weight, torch.stack([correlated(600, 24, seed + 10 * g) for g in range(groups)]))
    codes = adaround(weight, seen, spec, scale, zero_point, steps=200)
    nearest = affine.quantize(weight, scale, zero_point, spec)
    chosen, plain = (affine.dequantize(c, scale, zero_point, spec) for c in (codes, nearest))
    assert codes.dtype == spec.fmt.dtype
    lower, upper = neighbours(weight, scale, zero_point, spec)
    assert bool(((codes == lower) | (codes == upper)).all())
    assert bool((seen.error(weight, chosen) <= seen.error(weight, plain)).all())
    assert float(fresh.error(weight, chosen).mean()) < 0.8 * float(fresh.error(weight, plain).mean())
    assert float((chosen - weight).square().mean()) > float((plain - weight).square().mean())


def test_it_comes_close_to_the_best_of_all_roundings() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    spec, scale, zero_point = on_grid(weight, format="int3")
    moments = Moments.none(weight, 1)
    moments.add(weight, correlated(200, 8).unsqueeze(0))
    lower, upper = neighbours(weight, scale, zero_point, spec)
    errors = []
    for ups in itertools.product((False, True), repeat=8):
        values = affine.dequantize(torch.where(torch.tensor(ups), upper, lower), scale, zero_point, spec)
        errors.append(moments.error(weight, values)[0])
    best = torch.stack(errors).amin(0)
    nearest, chosen = (moments.error(weight, affine.dequantize(c, scale, zero_point, spec))[0] for c in (
        affine.quantize(weight, scale, zero_point, spec), adaround(weight, moments, spec, scale, zero_point, damp=0.0)))
    assert float(chosen.sum() - best.sum()) < 0.1 * float(nearest.sum() - best.sum())


def test_moments_stand_for_the_rows() -> None:
    torch.manual_seed(0)
    weight, values = torch.randn(2, 6, 5)
    floats, rows = torch.randn(2, 3, 40, 5)     # three groups of two outputs
    moments = Moments.none(weight, 3)
    for part in (slice(0, 7), slice(7, 40)):
        moments.add(weight, rows[:, part], floats[:, part])
    wanted, made = (x @ w.reshape(3, 2, 5).transpose(1, 2) for x, w in ((floats, weight), (rows, values)))
    expected = (wanted - made).square().sum(1) / wanted.square().sum(1).mean()
    torch.testing.assert_close(moments.error(weight, values), expected, rtol=1e-4, atol=1e-5)
    assert moments.count == 40


def test_codes_make_up_for_what_the_layers_before_have_done_to_the_inputs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 12)
    spec, scale, zero_point = on_grid(weight, format="int4")
    floats = correlated(500, 12)
    rows = 0.8 * floats                         # a systematic error, that larger weights undo
    knowing, blind = (Moments.none(weight, 1) for _ in range(2))
    knowing.add(weight, rows.unsqueeze(0), floats.unsqueeze(0))
    blind.add(weight, rows.unsqueeze(0))
    errors = [float(knowing.error(weight, affine.dequantize(
        adaround(weight, m, spec, scale, zero_point), scale, zero_point, spec)).mean()) for m in (knowing, blind)]
    assert errors[0] < 0.5 * errors[1]


def test_pruned_weights_stay_zero_and_a_weight_on_its_grid_stays() -> None:
    torch.manual_seed(0)
    weight, mask = torch.randn(8, 16), torch.rand(8, 16) > 0.5
    moments = Moments.none(weight, 1)
    moments.add(torch.where(mask, weight, 0.0), correlated(300, 16).unsqueeze(0))
    for grid in ({"format": "int3"}, {"format": "uint3", "symmetric": False}):
        spec, scale, zero_point = on_grid(torch.where(mask, weight, 0.0), **grid)
        values = affine.dequantize(adaround(weight, moments, spec, scale, zero_point, mask), scale, zero_point, spec)
        assert not values[~mask].any()
        again = Moments.none(values, 1)
        again.add(values, correlated(300, 16).unsqueeze(0))
        assert torch.equal(affine.dequantize(adaround(values, again, spec, scale, zero_point), scale, zero_point, spec),
                           values)


RECIPES = {
    "w4a8": {"rules": [{"weight": "int4", "input": "int8"}]},
    "w3": {"rules": [{"weight": {"format": "int3", "observer": "mse"}}]},
    "w3a8 learned": {"rules": [{"weight": {"format": "int3", "observer": "mse", "learned": "lsq"}, "input": "int8"}]},
}


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_it_beats_the_nearest_codes_on_held_out_data_and_is_deployed_bit_for_bit(kind: str, recipe: str,
                                                                                tmp_path) -> None:
    task = digits(kind)
    plain, model = task.quantized(RECIPES[recipe], []), task.quantized(RECIPES[recipe], ["adaround"])
    assert task.error(model) < 0.5 * task.error(plain)
    assert task.accuracy(model) >= task.accuracy(plain) - 0.01
    for name, layer in layer_stops(model).items():
        floats = task.net.get_submodule(name).weight
        with torch.no_grad():
            moved, near = (float((held.quantized_weight().dequantize() - floats).square().mean())
                           for held in (layer, plain.get_submodule(name)))
        assert moved > near
        assert torch.equal(layer.quantized_weight().dequantize(), layer.weight)      # it lies on its grid
    deployed, certificate = qat.convert(model, task.batches[:1])
    assert certificate.equal
    qat.save(deployed, tmp_path / "out")
    loaded = qat.load(tmp_path / "out", digits(kind).net)
    with torch.no_grad():
        expected = model(task.held_out)
        assert torch.equal(deployed(task.held_out), expected)
        assert torch.equal(loaded(task.held_out), expected)
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert all("adaround: output error" in rows[name] for name in layer_stops(model))


def test_it_is_the_same_each_time_and_leaves_randomness_and_mode_alone() -> None:
    task, steps = digits("mlp"), []
    model = qat.prepare(task.net, {**RECIPES["w3"], "calibration": ["adaround"]}).train()
    before = torch.get_rng_state()
    weights = []
    for _ in range(2):
        model.load_state_dict(task.net.state_dict(), strict=False)
        qat.calibrate(model, task.batches, progress=lambda *step: steps.append(step))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert steps == [("adaround", n, 3) for n in (1, 2, 3)] * 2


class Mixed(nn.Module):
    """A transposed convolution, a recurrent layer, attention, a projection that is called twice, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 8, 3, stride=2, groups=2)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice, self.never, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.recurrent(self.up(x).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.twice(self.twice(x).tanh()))


def test_parts_of_composites_and_transposed_convolutions_take_part() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 4, 9) for _ in range(6)]
    net, errors = Mixed().eval(), []
    for algorithms in ([], ["adaround"]):
        rules = [{"match": {"name": "never"}, "weight": "int8"}, {"weight": "int3", "input": "int8"}]
        model = qat.prepare(net, {"rules": rules, "calibration": algorithms}, batches[0])
        qat.calibrate(model.eval(), batches[:5])
        with torch.no_grad():
            errors.append(float((model(batches[5]) - net(batches[5])).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    for name in ("up", "recurrent.ih_l0", "recurrent.hh_l0", *(f"attention.{p}" for p in ("q", "k", "v", "out")),
                 "twice", "head"):
        assert "adaround: output error" in rows[name], name
    assert "no batch came here" in rows["never"]
    assert qat.convert(model, batches[:1])[1].equal


def test_layers_that_cannot_are_noted_and_keep_their_nearest_codes() -> None:
    torch.manual_seed(0)
    net = ByteTransformer(20, 16, 2, 1).eval()
    net.head.weight = net.embedding.weight
    model = qat.prepare(net, {"rules": [{"weight": "int4"}], "calibration": ["adaround"]})
    qat.calibrate(model, [torch.randint(0, 20, (2, 5))])
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert "nearest codes, the weight is shared" in rows["embedding"]
    assert "nearest codes, the weight is shared" in rows["head"]
    assert torch.equal(model.embedding.weight, net.embedding.weight)
    untied = qat.prepare(ByteTransformer(20, 16, 2, 1), {"rules": [{"weight": "int4"}], "calibration": ["adaround"]})
    qat.calibrate(untied, [torch.randint(0, 20, (2, 5))])
    assert "does not show its inputs" in {r.name: r.reason for r in qat.coverage(untied).rows}["embedding"]


def test_weights_that_are_computed_from_others() -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    turned = nn.utils.parametrize.register_parametrization
    free = nn.Linear(8, 4)

    class Squared(nn.Module):
        def forward(self, w):
            return w * w.abs()

    turned(free, "weight", Squared())
    model = qat.prepare(nn.Sequential(normed, nn.ReLU(), free), {"rules": [{"weight": "int3"}],
                                                                 "calibration": ["adaround"]}, torch.randn(2, 8))
    before = model[2].weight.detach().clone()
    qat.calibrate(model, [torch.randn(64, 8)])
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert "adaround: output error" in rows["0"]
    assert "parametrization" in rows["2"]
    assert torch.equal(model[2].weight, before)


def test_a_range_that_is_placed_already_stays() -> None:
    torch.manual_seed(0)
    model = qat.prepare(nn.Sequential(nn.Linear(8, 4)), {"rules": [{"weight": "int4"}], "calibration": ["adaround"]})
    from qat.calibration import algorithms
    place = {"awq": lambda model, *_, **__: model[0].weight_quantizer.place(torch.full((4,), 0.125)) and {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "REWRITES", place)
        qat.calibrate(model, [torch.randn(32, 8)], algorithms=["awq", "adaround"])
    assert model[0].weight_quantizer.scale.tolist() == [0.125] * 4
    assert torch.equal(model[0].weight / 0.125, (model[0].weight / 0.125).round())
