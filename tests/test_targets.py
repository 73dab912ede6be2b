"""Targets: recipes are fitted or refused, and each change is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qat
from qat import targets
from qat.errors import UnsupportedError
from qat.rewriter import quantized_modules
from qat.training.models import ResidualNet


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_the_default_recipe_needs_no_change_and_quantizes(name: str) -> None:
    recipe = targets.default_recipe(name)
    assert targets.adjust(recipe, name) == (recipe, [])
    assert qat.Recipe.from_dict(recipe.to_dict()) == recipe
    model, x = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(16, 128)
    prepared = qat.prepare(model, recipe, example_inputs=x)
    layers = quantized_modules(qat.calibrate(prepared, [x]))
    assert len(layers) == 2
    for layer, module in layers.items():
        targets.check(name, layer, module.plan.kind, module.plan.weight, module.plan.input)


def largest_pair(weight: str) -> int:
    """The greatest sum of two products of a uint8 code with a code of this format."""
    spec = qat.TensorSpec(weight)
    return 2 * 255 * spec.fmt.level_bound


def test_seven_bits_keep_pair_sums_in_int16() -> None:
    aim = targets.get("x86_avx2")
    assert largest_pair("int8") > 2**15 - 1, "which is why"
    assert aim.weights
    assert all(largest_pair(n) <= 2**15 - 1 for n in aim.weights)
    recipe = targets.default_recipe("x86_avx2")
    model, x = ResidualNet(), torch.randn(8, 1, 8, 8)
    prepared = qat.calibrate(qat.prepare(model.eval(), recipe, example_inputs=x), [x])
    deployed, _ = qat.convert(prepared, [x])
    layers = [m for m in quantized_modules(deployed).values() if m.plan.weight is not None]
    assert len(layers) == 10
    for module in layers:
        codes = module.quantized_weight().codes.flatten(1).int()
        pairs = codes[:, : codes.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        assert int((255 * pairs.clamp(min=0)).sum(-1).max() if pairs.numel() else 0) <= 2**15 - 1
        assert int((255 * pairs.clamp(max=0)).sum(-1).min() if pairs.numel() else 0) >= -(2**15)


@pytest.mark.parametrize(("preset", "target", "said"), [
    ("w8a8", "x86_avx2", "saturate at int16"),
    ("w8a8", "vllm", "per_token from each batch"),
    ("w8a8", "tensorrt", "zero points 0"),
    ("w8a8", "onnxruntime", "only where the output has a scale"),
    ("w8a8_dynamic", "onnxruntime", "DynamicQuantizeLinear"),
    ("w8a8_dynamic", "tensorrt", "has no dynamic ones"),
    ("w4a16", "llama_cpp", "groups of 32"),
    ("w3a16", "vllm", "weight format int4 instead of int3"),
    ("w4a8", "tensorrt", "weight format int8 instead of int4"),
    ("w4a16", "tensorrt", "edges: same instead of int8, because tensorrt does not run weight-only int8"),
    ("w4a16", "llama_cpp", "int8 weights in the place of edges"),
    ("w8a8", "vllm", "for Linear alone"),
    ("w4a16", "vllm", "rule {type: Embedding}: keep: float32"),
    ("w8a8", "tensorrt", "keep: float32 for AttentionScores, AttentionContext"),
])
def test_changes_are_made_and_said(preset: str, target: str, said: str) -> None:
    recipe, changes = targets.adjust(qat.Recipe.preset(preset), target)
    assert any(said in c for c in changes), changes
    assert targets.adjust(recipe, target) == (recipe, [])


@pytest.mark.parametrize(("preset", "target", "named"), [
    ("w1a8", "tensorrt", "binary weights"), ("w8a8", "llama_cpp", "activations"), ("w2a8", "vllm", "int2_midrise"),
    ("w1a1", "onednn", "binary"),
])
def test_what_has_no_counterpart_is_refused_by_name(preset: str, target: str, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        targets.adjust(qat.Recipe.preset(preset), target)


def test_scales_are_held_in_the_type_of_the_model() -> None:
    for dtype in ("bfloat16", "float16"):
        recipe, changes = targets.adjust(qat.Recipe.preset("w4a16"), "vllm", dtype)
        assert any(f"scales in {dtype}" in c for c in changes)
        assert targets.adjust(recipe, "vllm", dtype) == (recipe, [])
        weight = recipe.rules[-1].weight
        assert weight is not None
        assert weight.scale_dtype == dtype
        targets.check("vllm", "layer", "Linear", weight, None, dtype=dtype)
        with pytest.raises(UnsupportedError, match=f"layer: its weight.*scales in {dtype}"):
            targets.check("vllm", "layer", "Linear", weight.replace(scale_dtype="float32"), None, dtype=dtype)
    assert not any("scales" in c for c in targets.adjust(qat.Recipe.preset("w4a16"), "vllm")[1])


@pytest.mark.parametrize("kind", ["Conv2d", "Embedding", "AttentionScores"])
def test_rules_that_somebody_wrote_for_what_a_target_lacks_are_refused(kind: str) -> None:
    spec = qat.TensorSpec("int8")
    rule = qat.Rule(type=kind, weight=None if "Att" in kind else spec, input=spec if "Att" in kind else None)
    with pytest.raises(UnsupportedError, match=f"{kind} cannot run on vllm.*keep: float32"):
        targets.adjust(qat.Recipe(rules=(rule,)), "vllm")


def test_unknown_targets_name_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match="did you mean 'tensorrt'"):
        targets.get("tensorr")


def test_signed_codes_leave_relus_where_they_are() -> None:
    recipe = targets.default_recipe("tensorrt")
    assert not recipe.absorb
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(2, 1, 8, 8)
    prepared = qat.prepare(model, recipe, example_inputs=x)
    plan = quantized_modules(prepared)["2"].plan
    assert plan.absorbs is None
    assert plan.input is not None
    assert plan.input.format == "int8"
