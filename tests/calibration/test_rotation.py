"""Rotations folded into weights: the matrices, where they fit, what they are for, and what stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_equivalence import Block, Model, float_output, same, state
from torch import Tensor, nn

import qat
from qat.calibration.rotation import hadamard_matrix, rotation
from qat.rewriter import prepared_state


def with_outliers(norm: Any, *readers: Any) -> None:
    """Two channels behind a norm get large, and the columns that read them small: the function stays."""
    norm.weight[[3, 17]] *= 60.0
    if getattr(norm, "bias", None) is not None:
        norm.bias[[3, 17]] *= 60.0
    for reader in readers:
        reader.weight[:, [3, 17]] /= 60.0


W4A4 = {"weight": "int4", "input": {"format": "int4", "dynamic": True, "granularity": "per_token"}}


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 48, 60, 96, 128, 176, 768])
def test_hadamard_matrices(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix[:, 0], torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 10, 52, 92])
def test_orders_without_a_known_matrix(n: int) -> None:
    assert hadamard_matrix(n) is None


@pytest.mark.parametrize("n", [1, 2, 6, 12, 50, 64])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_rotations_are_orthogonal_spread_a_channel_and_may_keep_the_ones(n: int, keeps_ones: bool) -> None:
    q, kind = rotation(n, torch.Generator().manual_seed(3), keeps_ones)
    one = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, one, rtol=0, atol=1e-12)
    assert ("Hadamard" in kind) == (hadamard_matrix(n) is not None)
    if keeps_ones:
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(ones @ q, ones, rtol=0, atol=1e-12)
    if n >= 50:
        assert float(q.abs().max()) < 0.7
    again, _ = rotation(n, torch.Generator().manual_seed(3), keeps_ones)
    assert torch.equal(q, again)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_rotation_saves_w4a4_from_outliers(norm: type[nn.Module]) -> None:
    model = Model(64, norm).eval()
    with torch.no_grad():
        for block in model.blocks:
            with_outliers(block.norm1, block.qkv)
            with_outliers(block.norm2, block.gate_up)
    x, fresh = torch.randint(0, 31, (8, 6)), torch.randint(0, 31, (40, 6))
    with torch.no_grad():
        expected = model(fresh)
    errors = {}
    for algorithms in ([], ["hadamard"]):
        prepared = qat.prepare(model, {"rules": [{"match": {"type": "Linear"}, **W4A4}], "calibration": algorithms}, x)
        qat.calibrate(prepared, [x]).eval()
        torch.testing.assert_close(float_output(prepared, fresh), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            errors[bool(algorithms)] = float((prepared(fresh) - expected).square().mean())
    assert errors[True] < 0.3 * errors[False]
    notes = prepared_state(prepared).notes
    assert notes["head"] == "hadamard: a stream of 64 channels rotated by a randomized Hadamard matrix"
    assert notes["blocks.0.qkv"].endswith("heads of 4 values rotated by a randomized Hadamard matrix")
    assert notes["blocks.1.o"].endswith("heads of 4 values rotated by a randomized Hadamard matrix")


def test_a_width_without_a_hadamard_matrix_says_so() -> None:
    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(nn.Sequential(nn.Embedding(31, 10), nn.LayerNorm(10), nn.Linear(10, 4)), "w8a8_dynamic", x)
    expected = float_output(model, x)
    qat.calibrate(model, [x], algorithms="hadamard")
    assert prepared_state(model).notes["2"] == "hadamard: a stream of 10 channels rotated by a random orthogonal matrix"
    torch.testing.assert_close(float_output(model, x), expected, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """A block between an embedding and a head that share their weight."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(31, 16), Block(16)
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 31, bias=False)
        self.way = way
        if way not in ("bias", "bias_zero"):
            self.head.weight = self.embedding.weight
        if way == "gain":
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        if "bias" in way:
            self.norm = nn.LayerNorm(16)
            nn.init.normal_(self.norm.bias)
        if way in ("bias", "bias_zero"):
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        if way == "bias_zero":
            nn.init.zeros_(self.norm.weight[:1])
        if way == "post_norm":
            self.after = nn.RMSNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + (torch.linspace(0, 1, 16) if self.way == "outside" else 0.0)
        x = self.block(x)
        if self.way == "post_norm":
            x = x + self.after(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("way", ["plain", "bias_tied", "bias"])
def test_a_head_is_rotated_with_its_embedding_and_stays_tied_if_it_was(way: str) -> None:
    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(Tied(way), "w8a8", x)
    expected, before = float_output(model, x), state(model)
    qat.calibrate(model, [x], algorithms="hadamard")
    assert (model.head.weight is model.embedding.weight) == (way != "bias")
    assert not torch.equal(before["embedding.weight"], model.embedding.weight)
    torch.testing.assert_close(float_output(model, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("way", "reason"), [
    ("gain", "cannot be folded into head, which shares its weight"),
    ("bias_zero", "the bias of norm goes with gains of zero"),
    ("post_norm", "after"), ("outside", "linspace in the model writes to it")])
def test_what_cannot_be_rotated_keeps_its_bits_and_says_why(way: str, reason: str) -> None:
    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(Tied(way), "w8a8", x)
    before = state(model)
    qat.calibrate(model, [x], algorithms={"hadamard": {"heads": False}})
    assert same(before, state(model))
    assert reason in prepared_state(model).notes["block.qkv"]


def test_a_rotation_that_would_change_the_function_is_undone() -> None:
    class Scaled(nn.Module):
        """What is added to the stream passes a gain for each channel, which no rotation commutes with."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(31, 16), nn.RMSNorm(16)
            self.body, self.last, self.head = nn.Linear(16, 16), nn.RMSNorm(16), nn.Linear(16, 3)
            self.register_buffer("gain", torch.linspace(0.5, 2.0, 16))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.head(self.last(x + torch.tanh(self.body(self.norm(x)) * self.gain)))

    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(Scaled(), "w8a8", x)
    before = state(model)
    qat.calibrate(model, [x], algorithms="hadamard")
    assert same(before, state(model))
    assert "not rotated" in prepared_state(model).notes["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_with_outliers(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.15))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
        for layer in model.model.layers:
            with_outliers(layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            with_outliers(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
    model = model.to(dtype).eval()
    x, fresh = ({"input_ids": torch.randint(0, 40, (4, 10))} for _ in range(2))
    with torch.no_grad():
        expected = model(**fresh).logits.float()
    errors = {}
    for algorithms in ([], ["hadamard"], ["hadamard", "smoothquant"]):
        recipe = {"rules": [{"match": {"type": "Linear"}, **W4A4}], "calibration": algorithms}
        prepared = qat.prepare(model, recipe, x)
        qat.calibrate(prepared, [x]).eval()
        with torch.no_grad():
            errors[len(algorithms)] = float((prepared(**fresh).logits.float() - expected).square().mean())
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.6 * errors[0]
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    with torch.no_grad():
        assert torch.equal(deployed(**fresh).logits, prepared(**fresh).logits)
