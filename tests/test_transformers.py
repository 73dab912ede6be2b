"""A tour of transformers: each architecture is prepared, trained, converted, saved and loaded, equal bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from architectures import ARCHITECTURES, MIXTURES, build

import qat
from qat.errors import CheckpointError
from qat.modules.base import QuantizedModule
from qat.modules.parameters import ParameterPart
from qat.tracing import leaves

UNUSED = ("mask_emb", "r_s_bias", "seg_embed", "masked_spec_embed", "mask_token")
"""Parameters that no forward of these batches reads: they get no gradient in the float model either."""


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    return [t for t in leaves(model(**batch)) if isinstance(t, Tensor) and t.is_floating_point()]


def assert_equal(one: nn.Module, other: nn.Module, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, actual = outputs(one, batch), outputs(other, batch)
    assert len(expected) == len(actual) > 0
    for a, b in zip(expected, actual):
        assert torch.equal(a, b)


def prepared(name: str, recipe: Any, **more: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The float model, the prepared and calibrated one, and a batch."""
    model, batch = build(name, **more)
    result = qat.prepare(model, recipe, example_inputs=batch)
    return model, qat.calibrate(result, [batch]), batch


def weights(model: nn.Module) -> list[QuantizedModule]:
    return [m for m in model.modules() if isinstance(m, QuantizedModule) and m.plan.weight is not None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tour(name: str, tmp_path: Path) -> None:
    model, trained, batch = prepared(name, "w8a8")
    table = qat.coverage(trained)
    assert table.total_params == sum(p.numel() for p in model.parameters())
    assert table.fraction >= 0.95, str(table)
    assert all(r.reason for r in table.rows if r.status == "kept")
    with torch.no_grad():
        near, far = outputs(trained, batch)[0], outputs(model, batch)[0]
    assert 0 < float((near - far).norm()) < 0.2 * float(far.norm())

    trained.train()
    loss = sum(t.float().square().mean() for t in outputs(trained, batch))
    assert isinstance(loss, Tensor)
    loss.backward()
    for key, parameter in trained.named_parameters():
        if parameter.requires_grad and not key.endswith(UNUSED):
            assert parameter.grad is not None, key
            assert bool(torch.isfinite(parameter.grad).all()), key
    for module in weights(trained):
        if module.weight.is_leaf and module.weight.requires_grad:       # others are computed: weight norm
            assert bool(module.weight.grad.any()), module.name
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad.sign()

    deployed, certificate = qat.convert(trained.eval(), [batch])
    assert certificate.equal
    assert_equal(trained, deployed, batch)
    assert_equal(copy.deepcopy(trained), copy.deepcopy(deployed), batch)
    for module in weights(deployed):
        assert module.frozen
        assert "weight" not in module._parameters
    floats = sum(p.numel() for p in deployed.parameters())
    assert floats <= 0.05 * table.total_params, "a float copy of a quantized weight is left"

    qat.save(deployed, tmp_path / "deployed")
    loaded = qat.load(tmp_path / "deployed", build(name)[0])
    assert_equal(deployed, loaded, batch)
    assert qat.coverage(loaded).fraction >= 0.95


OTHERS = ("llama", "gpt2", "gpt_oss", "qwen3_moe", "bert", "bart", "wav2vec2", "convnext", "mamba", "xlnet")


@pytest.mark.parametrize("recipe", ["w8a8_dynamic", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes(name: str, recipe: str) -> None:
    _, trained, batch = prepared(name, recipe)
    trained.train()
    sum(t.float().square().mean() for t in outputs(trained, batch)).backward()      # type: ignore[union-attr]
    assert not [k for k, p in trained.named_parameters() if p.requires_grad and p.grad is None
                and not k.endswith(UNUSED)]
    deployed, certificate = qat.convert(trained.eval(), [batch])
    assert certificate.equal
    assert_equal(trained, deployed, batch)


# ------------------------------------------------------------------------------------------------ mixtures of experts


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_dynamic", "w4a16"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_however_they_are_multiplied(name: str, implementation: str, recipe: str) -> None:
    """Loops, gathered matrices and grouped tokens see the same codes, and nearly the same sums."""
    model, batch = build(name)
    assert name in MIXTURES
    model.set_experts_implementation(implementation)            # type: ignore[operator]
    trained = qat.calibrate(qat.prepare(model, recipe, example_inputs=batch), [batch])
    parts = {n: m for n, m in trained.named_modules() if isinstance(m, ParameterPart)}
    assert {n.rpartition(".")[2] for n in parts} >= {"gate_up_proj_product", "down_proj_product"}
    for part in parts.values():
        assert part.plan.weight is not None
        assert (part.plan.input is None) == (recipe == "w4a16")
    sum(t.float().square().mean() for t in outputs(trained, batch)).backward()      # type: ignore[union-attr]
    for part in parts.values():
        assert part.weight.grad is not None
    deployed, _ = qat.convert(trained, [batch])
    assert_equal(trained, deployed, batch)
    other = "eager" if implementation != "eager" else "grouped_mm"
    expected = outputs(deployed, batch)[0]
    deployed.set_experts_implementation(other)                  # type: ignore[operator]
    assert torch.allclose(outputs(deployed, batch)[0], expected, atol=1e-4)


def test_each_expert_has_scales_of_its_own() -> None:
    model, batch = build("mixtral")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        experts.gate_up_proj[1] *= 100.0                        # type: ignore[index, operator]
    trained = qat.calibrate(qat.prepare(model, "w8a8", example_inputs=batch), [batch])
    deployed, _ = qat.convert(trained, [batch])
    part: Any = deployed.get_submodule("model.layers.0.mlp.experts.gate_up_proj_product")
    count, out, _ = part.full_shape
    assert part.weight_scale.shape == (count * out,)
    scales = part.weight_scale.reshape(count, out)
    assert float(scales[1].min()) > 10 * float(scales[0].max())
    error = (part.weight - experts.gate_up_proj).abs().amax(-1)                     # type: ignore[operator]
    assert bool((error <= 0.51 * scales).all())


def test_an_expert_without_tokens() -> None:
    """Nobody reads it, and it is converted all the same; a batch without tokens passes."""
    model, batch = build("mixtral")
    few = {"input_ids": batch["input_ids"][:1, :1]}
    trained = qat.calibrate(qat.prepare(model, "w8a8", example_inputs=few), [batch])
    deployed, _ = qat.convert(trained, [few, batch])
    for inputs in (few, batch):
        assert_equal(trained, deployed, inputs)
    experts: Any = deployed.get_submodule("model.layers.0.mlp.experts")
    nothing = torch.zeros(0, model.config.hidden_size)          # type: ignore[union-attr, arg-type]
    chosen = torch.zeros(0, 2, dtype=torch.long)
    assert experts(nothing, chosen, torch.zeros(0, 2)).shape == nothing.shape


# ------------------------------------------------------------------------------------------------ ties, types, files


@pytest.mark.parametrize("name", ["qwen2 tied", "gpt2", "gemma3", "bart", "t5"])
def test_ties_are_kept(name: str, tmp_path: Path) -> None:
    _, trained, batch = prepared(name, "w8a8")
    deployed, _ = qat.convert(trained, [batch])
    heads = (deployed.get_input_embeddings(), deployed.get_output_embeddings())      # type: ignore[operator]
    assert len({id(b) for m in heads for n, b in m.named_buffers() if n.endswith("weight_codes")}) == 1
    assert any("shared with" in r.reason for r in qat.coverage(trained).rows)
    qat.save(deployed, tmp_path / "tied")
    loaded = qat.load(tmp_path / "tied", build(name)[0])
    heads = (loaded.get_input_embeddings(), loaded.get_output_embeddings())          # type: ignore[operator]
    assert len({id(b) for m in heads for n, b in m.named_buffers() if n.endswith("weight_codes")}) == 1
    assert_equal(deployed, loaded, batch)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "mamba"])
def test_bfloat16(name: str) -> None:
    model, batch = build(name)
    model.bfloat16()
    trained = qat.calibrate(qat.prepare(model, "w8a8", example_inputs=batch), [batch])
    deployed, _ = qat.convert(trained, [batch])
    assert_equal(trained, deployed, batch)
    assert outputs(deployed, batch)[0].dtype == outputs(model, batch)[0].dtype


def test_generation_reads_raw_kernels_in_integers() -> None:
    """Token by token a state space model reads the weight of its convolution, which is never called as a module."""
    _, trained, batch = prepared("mamba", "w8a8")
    deployed, _ = qat.convert(trained, [batch])
    prompt, made = batch["input_ids"][:, :6], []
    for model in (trained.eval(), deployed):
        model.config.use_cache = True                           # type: ignore[union-attr]
        made.append(model.generate(prompt, max_new_tokens=5, do_sample=False))      # type: ignore[operator]
    assert torch.equal(*made)
    rows = {r.name: r for r in qat.coverage(trained).rows}
    assert rows["backbone.layers.0.mixer.conv1d.weight"].status == "quantized"
    assert rows["backbone.layers.0.mixer.conv1d.weight"].input.startswith("int8")


def test_linear_layers_with_turned_weights_need_no_example() -> None:
    model, batch = build("gpt2")
    unseen = qat.prepare(model, "w8a8")
    rows = {r.name: r for r in qat.coverage(unseen).rows}
    assert rows["transformer.h.0.attn.c_attn"].status == "quantized"
    assert rows["transformer.h.0.attn.c_attn"].kind == "Conv1D"
    seen = qat.prepare(model, "w8a8", example_inputs=batch)
    rows = {r.name: r for r in qat.coverage(seen).rows}
    assert rows["transformer.h.0.attn.c_attn"].macs == batch["input_ids"].numel() * 64 * 192
    layer: Any = seen.get_submodule("transformer.h.0.attn.c_attn")
    assert layer.weight.shape == (64, 192)
    assert layer.weight_quantizer.shape == (192, 64)
    for trained in (unseen, seen):
        deployed, _ = qat.convert(qat.calibrate(trained, [batch]), [batch])
        assert_equal(trained, deployed, batch)
        row = torch.randn(1, 1, 64)
        shipped: Any = deployed.get_submodule("transformer.h.0.attn.c_attn")
        assert torch.equal(trained.get_submodule("transformer.h.0.attn.c_attn").eval()(row), shipped(row))
        assert shipped.weight.shape == (64, 192)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    _, trained, batch = prepared("mixtral", "w8a8")
    deployed, _ = qat.convert(trained, [batch])
    qat.save(deployed, tmp_path / "mixtral")
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        qat.load(tmp_path / "mixtral", build("llama")[0])
