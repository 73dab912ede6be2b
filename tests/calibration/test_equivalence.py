"""Where channels can be rescaled, found by trying; and that nothing stays changed that was not verified."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.calibration.equivalence import Edits, Rewrite, Structure, floating
from qat.errors import CalibrationError
from qat.rewriter import prepared_state

REWRITES = ("equalization", "hadamard", "smoothquant", "awq")


class Block(nn.Module):
    """A residual block as language models have them: stacked q, k, v with two heads for each of k and v, and a gate."""

    def __init__(self, width: int = 16, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.o = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.gate_up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        for one in (self.norm1, self.norm2):
            nn.init.uniform_(one.weight, 0.3, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (t.view(batch, time, -1, 4).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(
            [width, width // 2, width // 2], -1))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, width)
        x = x + self.o(y)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Embedding, position, blocks, norm, head."""

    def __init__(self, width: int = 16, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(31, width), nn.Parameter(torch.randn(6, width))
        self.blocks = nn.Sequential(Block(width, norm), Block(width, norm))
        self.norm, self.head = norm(width), nn.Linear(width, 31)
        nn.init.uniform_(self.norm.weight, 0.3, 2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


class Plus(nn.Module):
    """An RMS norm whose weight is the difference to 1, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Softplus(Plus):
    """A norm with a gain that is no multiple of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * F.softplus(self.weight)


def structure(model: nn.Module, x: Any, recipe: Any = "w8a8") -> Structure:
    return Structure(qat.prepare(model, recipe, x), [x])


def pairs(found: Structure) -> dict[str, dict[str, list[int]]]:
    return {f"{s.producer.name}[{s.start}:{s.stop}]": {n: c.tolist() for n, c in s.readers.items()}
            for s in found.scalings()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items() if "quantizer" not in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def float_output(model: nn.Module, x: Any) -> Tensor:
    with floating(model):
        return model(x)


# ---------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w8a8_dynamic"])
def test_channels_are_followed_through_stacked_projections_repeated_heads_and_gates(recipe: str) -> None:
    found = pairs(structure(Block(), torch.randn(2, 5, 16), recipe))
    assert found == {
        "norm1[0:16]": {"qkv": list(range(16))}, "norm2[0:16]": {"gate_up": list(range(16))},
        "qkv[24:32]": {"o": [*range(24, 28), *range(24, 28), *range(28, 32), *range(28, 32)]},
        "gate_up[32:64]": {"down": list(range(32, 64))}}


def test_channels_are_followed_through_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.LeakyReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU6(), nn.Conv2d(6, 3, 1), nn.Flatten(),
        nn.Linear(3 * 2 * 2, 5), nn.GELU(), nn.Linear(5, 2)).eval()
    found = structure(model, torch.randn(3, 2, 6, 6))
    assert pairs(found) == {"1[0:4]": {"3": [0, 1, 2, 3]}, "3[0:4]": {"6": [0, 1, 2, 3]},
                            "8[0:3]": {"10": [i // 4 for i in range(12)]}}
    assert "1 in front" not in str(found.reasons)
    assert set(found.reasons) == {"8", "12"}                  # ReLU6, though its quantizer absorbed it, and GELU
    assert all("do not pass through" in r for r in found.reasons.values())


def test_channels_that_a_concatenation_brings_from_elsewhere_are_left_alone() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, torch.relu(self.a(x)), torch.tanh(self.b(x))], -1))

    assert pairs(structure(Joined(), torch.randn(7, 4))) == {"a[0:3]": {"c": [-1, -1, -1, -1, 0, 1, 2, -1, -1]}}


def test_a_relu_that_is_silent_on_the_batch_is_followed_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    nn.init.constant_(model[0].bias, -100.0)
    assert pairs(structure(model, torch.randn(1, 3))) == {"0[0:5]": {"2": [0, 1, 2, 3, 4]}}


def test_attention_is_rescaled_by_parts_as_the_whole_model_and_behind_norms() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(6)
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            memory = self.other(x[..., :6])
            return self.attention(self.norm(x), memory, memory)[0]

    eight = list(range(8))
    found = pairs(structure(Cross(), torch.randn(2, 5, 8)))
    assert found == {"norm[0:8]": {"attention.q": eight}, "attention.v[0:8]": {"attention.out": eight},
                     "other[0:6]": {"attention.k": eight[:6], "attention.v": eight[:6]}}
    x = torch.randn(2, 5, 8)
    whole = qat.prepare(nn.MultiheadAttention(8, 2, batch_first=True), "w8a8", (x, x, x))
    assert pairs(Structure(whole, [(x, x, x)])) == {"v[0:8]": {"out": eight}}
    with floating(whole):
        expected = whole(x, x, x)[0]
    qat.calibrate(whole, [(x, x, x)], algorithms=["equalization", "hadamard", "smoothquant"])
    with floating(whole):
        torch.testing.assert_close(whole(x, x, x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "unit"), [(nn.LayerNorm, 0.0), (nn.RMSNorm, 0.0), (Plus, 1.0), (Softplus, None),
                                            (nn.PReLU, None)])
def test_norms_are_recognised_by_what_they_do(norm: Callable[[int], nn.Module], unit: float | None) -> None:
    model = nn.Sequential(norm(6), nn.Linear(6, 3))
    prepared = qat.prepare(model, "w8a8", torch.randn(4, 6))
    before = state(prepared)
    node = Structure(prepared, [torch.randn(4, 6)]).nodes.get("0")
    assert (None if node is None else node.unit) == unit
    assert same(before, state(prepared))


class Refusals(nn.Module):
    """The output of ``first`` goes where ``way`` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2 if way == "experts" else way == "shared"))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        if way == "shared":
            self.experts[0].weight = self.second.weight
        if way == "parametrized":
            nn.utils.parametrizations.weight_norm(self.first)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.way == "returned":
            return self.second(y), y
        if self.way == "function":
            return self.second(y) + y @ self.matrix
        if self.way == "experts":
            return self.experts[int(x.sum() > 0)](y)
        if self.way == "hidden":
            return self.second(y) + torch.from_numpy(y.detach().numpy().copy())
        if self.way == "twice":
            return self.second(self.second(y))
        return self.second(y) if self.way != "shared" else self.second(y) + self.experts[0](x)


@pytest.mark.parametrize(("way", "layer", "reason"), [
    ("returned", "second", "the model returns it"), ("function", "second", "nothing in front of it"),
    ("experts", "experts.1", "may read it too"), ("hidden", "second", "changes what the model returns"),
    ("twice", "second", ""), ("shared", "second", "shared with experts.0"), ("parametrized", "second", "")])
def test_what_cannot_be_rescaled_keeps_its_bits_and_coverage_says_why(way: str, layer: str, reason: str) -> None:
    x = torch.rand(5, 6)
    model = qat.prepare(Refusals(way), {"rules": [{"weight": "int8", "input": {"format": "int8", "dynamic": True}}]}, x)
    before = state(model)
    qat.calibrate(model, [x], algorithms=["equalization", "smoothquant", "hadamard"])
    assert same(before, state(model))
    note = prepared_state(model).notes[layer]
    assert "smoothquant: not rescaled" in note
    assert reason in note
    assert reason in str(qat.coverage(model))


# ---------------------------------------------------------------------------------------------------- proof


def test_a_rewrite_that_changes_the_function_is_undone_bit_for_bit_and_the_right_ones_stay() -> None:
    x = torch.randn(9, 6)
    model = qat.prepare(nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU()))), "w8a8", x)
    found = Structure(model, [x])
    right = [s.rewrite(torch.rand(6) + 0.5) for s in found.scalings()]
    assert len(right) == 3
    layer = model[4]
    wrong = Rewrite(("4",), [layer.weight], lambda: layer.weight.mul_(1.001))
    expected, before = float_output(model, x), state(model)
    edits = Edits()
    assert found.settle([right[0], wrong, *right[1:]], edits) == [wrong]
    after = state(model)
    assert not any(torch.equal(after[n], before[n]) for n in after if n.endswith("weight"))
    torch.testing.assert_close(float_output(model, x), expected, rtol=1e-5, atol=1e-6)
    edits.undo()
    assert same(before, state(model))


def test_no_batch_and_no_finite_batch_are_errors_before_anything_changes() -> None:
    model = qat.prepare(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "w8a8", torch.randn(2, 4))
    before = state(model)
    for batches, message in (([], "at least one batch"), ([torch.full((2, 4), torch.nan)], "finite")):
        with pytest.raises(CalibrationError, match=message):
            qat.calibrate(model, batches, algorithms="smoothquant")
    assert same(before, state(model))


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{n: (lambda n=n: zoo.build(n), lambda n=n: zoo.inputs(n, 4)) for n in zoo.ZOO},
    "rms": (Model, lambda: torch.randint(0, 31, (3, 6))),
    "layer_norm": (lambda: Model(24, nn.LayerNorm), lambda: torch.randint(0, 31, (3, 6))),
    "plus": (lambda: Model(24, Plus), lambda: torch.randint(0, 31, (3, 6))),
    "encoder": (lambda: nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(
        16, 2, 24, norm_first=True, batch_first=True), 2, enable_nested_tensor=False), nn.LayerNorm(16),
        nn.Linear(16, 3)), lambda: torch.randn(2, 5, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("recipe", "dtype"), [("w8a8", torch.float32), ("w4a16", torch.bfloat16)])
def test_the_float_function_stays_on_data_never_seen_and_convert_is_equal(name: str, recipe: str,
                                                                          dtype: torch.dtype) -> None:
    build, inputs = FUNCTIONS[name]

    def data() -> Tensor:
        x = inputs()
        return x.to(dtype) if x.is_floating_point() else x

    model, x, fresh = build().to(dtype).eval(), data(), data()
    with torch.no_grad():
        expected = model(fresh)
    prepared = qat.prepare(model, {"preset": recipe, "calibration": list(REWRITES)}, x)
    qat.calibrate(prepared, [x, data()]).eval()
    made = float_output(prepared, fresh)
    limit = 1e-5 if dtype == torch.float32 else 0.06
    assert float((made - expected).abs().max()) <= limit * float(expected.abs().max())
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    with torch.no_grad():
        assert torch.equal(prepared(fresh), deployed(fresh))


def test_everything_trains_and_saves_afterwards(tmp_path: Any) -> None:
    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(Model(), {"preset": "w4a8", "calibration": list(REWRITES)}, x)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    qat.calibrate(model, [x])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model(x).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    deployed, _ = qat.convert(model.eval(), [x])
    qat.save(deployed, tmp_path / "out")
    loaded = qat.load(tmp_path / "out", Model())
    with torch.no_grad():
        assert torch.equal(loaded(x), deployed(x))
        assert torch.equal(model(x), deployed(x))


def test_pruned_weights_stay_pruned_and_training_mode_comes_back() -> None:
    x = torch.randn(8, 6)
    model = qat.prepare(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "w8a8", x)
    qat.prune(model, sparsity=0.5)
    masks = {n: m.clone() for n, m in model.state_dict().items() if n.endswith("mask")}
    expected = float_output(model, x)
    qat.calibrate(model.train(), [x], algorithms=["equalization", "smoothquant"])
    assert model.training
    assert masks
    assert same(masks, {n: m for n, m in model.state_dict().items() if n.endswith("mask")})
    torch.testing.assert_close(float_output(model, x), expected, rtol=1e-5, atol=1e-6)


def test_two_calibrations_and_a_copy_agree() -> None:
    x = torch.randint(0, 31, (3, 6))
    model = qat.prepare(Model(), {"preset": "w8a8", "calibration": ["hadamard", "smoothquant"]}, x)
    other = copy.deepcopy(model)
    for one in (model, other):
        qat.calibrate(one, [x])
    assert same(state(model), state(other))
