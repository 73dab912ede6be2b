"""SmoothQuant, AWQ and equalization: the cores against brute force, and what they are for against doing without."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pydoc_data import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.calibration.equivalence import floating
from qat.calibration.rescaling import clipped_scale, equalizing_scale, on_grid, salience_scale, smoothing_scale
from qat.errors import RecipeError
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import dynamic_qparams
from qat.rewriter import prepared_state
from qat.training.models import ByteTransformer


def error(model: nn.Module, reference: nn.Module, batches: Iterable[Tensor]) -> float:
    """Squared error of the outputs relative to the outputs."""
    with torch.no_grad():
        pairs = [(model(x), reference(x)) for x in batches]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)


def quantized(model: nn.Module, batches: Sequence[Tensor], algorithms: Any, weight: Any, activation: Any = None
              ) -> nn.Module:
    rule = {"weight": weight, **({"input": activation} if activation else {})}
    prepared = qat.prepare(model, {"rules": [rule], "calibration": algorithms}, batches[0])
    return qat.calibrate(prepared, batches).eval()


# ---------------------------------------------------------------------------------------------------- cores


def test_the_scales_are_those_of_the_papers() -> None:
    x, w = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([0.25, 1.0, 1.0, 0.0])
    assert smoothing_scale(x, w, 0.5).tolist() == pytest.approx([20.0, 1.0, 1.0, 1.0])
    assert smoothing_scale(x, w, 1.0).tolist() == pytest.approx([100.0, 1.0, 1.0, 1.0])
    assert equalizing_scale(x, w).tolist() == pytest.approx([20.0, 1.0, 1.0, 1.0])
    s = salience_scale(torch.tensor([16.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert salience_scale(torch.zeros(3), 0.5).tolist() == [1.0] * 3


@pytest.mark.parametrize(("spec", "shape", "groups"), [
    (TensorSpec("int4"), (6, 16), 1), (TensorSpec("int3", "per_group", group_size=4), (6, 16), 1),
    (TensorSpec("int4", "per_tensor"), (6, 16), 1), (TensorSpec("uint4", symmetric=False), (6, 16), 1),
    (TensorSpec("int4"), (6, 2, 3, 3), 2), (TensorSpec("int2_midrise"), (6, 16), 1), (TensorSpec("binary"), (6, 16), 1),
    (TensorSpec("int4", "per_group", group_size=4, scale_dtype="float16"), (6, 16), 1),
], ids=str)
@pytest.mark.parametrize("rows", [3, 50])
def test_clipping_finds_the_share_with_the_least_error_in_the_outputs(spec: TensorSpec, shape: tuple[int, ...],
                                                                      groups: int, rows: int) -> None:
    spec = spec.for_weight()
    weight = torch.randn(shape)
    weight.view(-1)[::5] *= 4
    width = weight[0].numel()
    x = torch.randn(groups, rows, width) * torch.logspace(-1, 1, width)
    scale, zero_point = dynamic_qparams(weight, spec)
    shrinks = (1.0, 0.8, 0.6)
    best = clipped_scale(weight, x, spec, scale, zero_point, shrinks)
    assert best.shape == scale.shape

    def errors(tried: Tensor) -> Tensor:
        """For each scale, with everything that it does not govern exact."""
        values = affine.dequantize(affine.quantize(weight, tried, zero_point, spec), tried, zero_point, spec)
        delta = (values - weight).reshape(groups, -1, width)
        if spec.granularity == "per_group":
            size = spec.group_size
            return torch.stack([(x[0, :, i: i + size] @ delta[0, :, i: i + size].T).square().sum(0)
                                for i in range(0, width, size)], 1)
        each = (x @ delta.transpose(1, 2)).square().sum(1).reshape(-1)
        return each if spec.granularity == "per_channel" else each.sum()

    chosen = errors(best)
    for shrink in shrinks:
        assert bool((chosen <= errors(affine.round_scale(scale * shrink, spec)) * (1 + 1e-4) + 1e-9).all())


def test_on_grid_is_the_quantizer() -> None:
    x = torch.randn(5, 8)
    for spec in (TensorSpec("int4"), TensorSpec("ternary"), TensorSpec("int3", "per_group", group_size=4)):
        assert torch.equal(on_grid(x, spec.for_weight()), qat.quantizers.quantizer.make_quantizer(spec, x.shape)(x))


# ---------------------------------------------------------------------------------------------------- data and models


@pytest.fixture(scope="module")
def language() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A byte transformer that has learned a little, calibration batches, and others."""
    text = torch.frombuffer(bytearray("".join(topics.topics.values()).encode()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)

    def batch(start: int, stop: int, count: int, length: int = 49) -> Tensor:
        places = torch.randint(start, stop - length, (count,), generator=generator)
        return torch.stack([text[i: i + length] for i in places.tolist()])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ByteTransformer(width=48, heads=2, layers=2)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        for _ in range(60):
            tokens = batch(0, len(text) - 50_000, 12)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(loss.detach()) < 3.0
    calibration = [batch(0, len(text) - 50_000, 8)[:, :-1] for _ in range(3)]
    fresh = [batch(len(text) - 50_000, len(text), 16)[:, :-1] for _ in range(3)]
    return model.eval(), calibration, fresh


def with_outliers(model: nn.Module, factors: Sequence[float] = (50.0, 80.0, 100.0)) -> nn.Module:
    """The same function, but some channels of the gains of norms are large and the columns that read them small."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            for norm, readers in ((block.norm1, (attention.query, attention.key, attention.value)),
                                  (block.norm2, (block.up,))):
                channels, by = torch.randperm(len(norm.weight))[: len(factors)], torch.tensor(factors)
                norm.weight[channels] *= by
                norm.bias[channels] *= by
                for reader in readers:
                    reader.weight[:, channels] /= by
    return model


# ---------------------------------------------------------------------------------------------------- smoothquant


@pytest.mark.parametrize("alpha", [0.5, 0.75, "auto"])
def test_smoothquant_saves_a_static_w8a8_model_from_outliers(language: Any, alpha: Any) -> None:
    model, calibration, fresh = language
    model = with_outliers(model)
    plain = error(quantized(model, calibration, [], "int8", "int8"), model, fresh)
    smooth = error(quantized(model, calibration, {"smoothquant": {"alpha": alpha}}, "int8", "int8"), model, fresh)
    assert smooth < 0.05 * plain


def test_smoothquant_on_an_mlp_with_outliers_in_hidden_channels() -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 80
        model[1].weight[:, 3] /= 80
        model[1].weight[5] *= 60
        model[1].bias[5] *= 60
        model[3].weight[:, 5] /= 60
    calibration, fresh = [torch.randn(64, 32) for _ in range(2)], [torch.randn(500, 32)]
    plain = error(quantized(model, calibration, [], "int8", "int8"), model, fresh)
    smooth = quantized(model, calibration, ["smoothquant"], "int8", "int8")
    assert error(smooth, model, fresh) < 0.1 * plain
    assert "0 (alpha 0.5)" in prepared_state(smooth).notes["1"]
    assert "1 (alpha 0.5)" in prepared_state(smooth).notes["3"]


def test_smoothquant_is_not_for_float_activations() -> None:
    model = qat.prepare(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "w8a16", torch.randn(4, 8))
    before = model[1].weight.clone()
    qat.calibrate(model, [torch.randn(4, 8)], algorithms="smoothquant")
    assert torch.equal(model[1].weight, before)
    assert prepared_state(model).notes == {}


@pytest.mark.parametrize(("algorithm", "message"), [
    ({"smoothquant": {"alpha": 1.5}}, "alpha is a number from 0 to 1, or auto"),
    ({"smoothquant": {"alpha": "best"}}, "alpha"), ({"equalization": {"sweeps": 0}}, "sweeps is a positive"),
    ({"hadamard": {"seed": 0.5}}, "seed is a whole number")])
def test_options_out_of_range_are_errors(algorithm: Any, message: str) -> None:
    model = qat.prepare(nn.Sequential(nn.Linear(4, 4)), "w8a8", torch.randn(2, 4))
    with pytest.raises(RecipeError, match=message):
        qat.calibrate(model, [torch.randn(2, 4)], algorithms=algorithm)


# ---------------------------------------------------------------------------------------------------- awq

GRIDS = [{"format": f, **g} for f in ("int4", "int3") for g in (
    {}, {"granularity": "per_group", "group_size": 32}, {"granularity": "per_group", "group_size": 128})]


@pytest.mark.parametrize("weight", GRIDS, ids=lambda w: f"{w['format']}-{w.get('group_size', 'channel')}")
def test_awq_beats_the_nearest_codes_where_channels_are_unequal(weight: dict[str, Any]) -> None:
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.LayerNorm(128),
                          nn.Linear(128, 32)).eval()
    with torch.no_grad():
        for layer in (model[1], model[3], model[5]):
            nn.init.normal_(layer.weight, std=0.08)
        for norm in (model[0], model[4]):
            norm.weight[torch.randperm(128)[:5]] *= 16.0
    calibration, fresh = [torch.randn(64, 128) for _ in range(4)], [torch.randn(500, 128)]
    plain = error(quantized(model, calibration, [], weight), model, fresh)
    scaled = error(quantized(model, calibration, {"awq": {"clip": False, "steps": 10}}, weight), model, fresh)
    clipped = error(quantized(model, calibration, {"awq": {"steps": 10}}, weight), model, fresh)
    assert scaled < 0.85 * plain
    assert clipped < scaled


@pytest.mark.parametrize("format", ["int4", "int3"])
def test_awq_on_the_byte_transformer(language: Any, format: str) -> None:
    model, calibration, fresh = language
    for one, gain in ((model, 0.95), (with_outliers(model, (8.0, 12.0, 16.0)), 0.85)):
        plain = error(quantized(one, calibration, [], format), one, fresh)
        better = error(quantized(one, calibration, {"awq": {"steps": 10}}, format), one, fresh)
        assert better < gain * plain


def test_awq_places_ranges_and_a_new_calibration_lets_go_of_them() -> None:
    x = torch.randn(32, 16)
    model = quantized(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)), [x], ["awq"], "int4")
    quantizer = model[1].weight_quantizer
    assert quantizer.frozen
    full, _ = dynamic_qparams(model[1].weight.detach(), quantizer.spec)
    assert bool((quantizer.scale <= full).all())
    assert bool((quantizer.scale < full).any())
    qat.calibrate(model, [x], algorithms=[])
    assert not quantizer.frozen


# ---------------------------------------------------------------------------------------------------- equalization


def convolutions(batch_norm: bool) -> nn.Sequential:
    """Plain, depthwise and pooled convolutions, with channels of very different ranges."""
    def block(inputs: int, outputs: int, groups: int = 1) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=not batch_norm), *norm, nn.ReLU()]

    model = nn.Sequential(*block(2, 12), *block(12, 12, 12), nn.MaxPool2d(2), *block(12, 16), nn.Flatten(),
                          nn.Linear(16 * 9, 5)).eval()
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for i, (layer, following) in enumerate(pairwise(layers)):
            s = 2.0 ** (torch.rand(layer.weight.shape[0]) * 6 - 3)
            if batch_norm:
                own = 2.0 ** (torch.rand(len(s)) * 6 - 3)
                layer.weight.mul_(own.reshape(-1, 1, 1, 1))
                norms[i].running_var.copy_((1 + norms[i].eps) * own.square() - norms[i].eps)
                norms[i].weight.mul_(s)
            else:
                layer.weight.mul_(s.reshape(-1, 1, 1, 1))
                layer.bias.mul_(s)
            if isinstance(following, nn.Linear):
                following.weight.div_(s.repeat_interleave(9))
            else:
                following.weight.div_(s.reshape((-1, 1, 1, 1) if following.groups > 1 else (1, -1, 1, 1)))
    return model


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("weight", "activation"), [
    ({"format": "int8", "granularity": "per_tensor"}, "int8"), ({"format": "int4", "granularity": "per_tensor"}, None),
    ("int4", "int8")])
def test_equalization_saves_convolutions_with_unequal_channels(batch_norm: bool, weight: Any, activation: Any) -> None:
    model = convolutions(batch_norm)
    calibration, fresh = [torch.randn(16, 2, 6, 6) for _ in range(2)], [torch.randn(100, 2, 6, 6)]
    plain = error(quantized(model, calibration, [], weight, activation), model, fresh)
    equal = quantized(model, calibration, ["equalization"], weight, activation)
    assert error(equal, model, fresh) < 0.2 * plain
    with floating(equal), torch.no_grad():
        torch.testing.assert_close(equal(fresh[0]), model(fresh[0]), rtol=1e-4, atol=1e-5)


def test_equalized_rows_and_columns_have_one_range_and_sweeps_converge() -> None:
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(2.0 ** (torch.rand(8, 1) * 8 - 4))
    steps: list[tuple[str, int, int]] = []
    prepared = qat.prepare(model, "w8a8", torch.randn(4, 8))
    qat.calibrate(prepared, [torch.randn(4, 8)], algorithms={"equalization": {"sweeps": 500}},
                  progress=lambda *step: steps.append(step))
    for one, other in ((prepared[0], prepared[2]), (prepared[2], prepared[4])):
        rows, columns = one.weight.detach().abs().amax(1), other.weight.detach().abs().amax(0)
        torch.testing.assert_close(rows, columns, rtol=5e-3, atol=0.0)
    assert 1 < len(steps) < 500
    assert steps[0] == ("equalization", 1, 500)
