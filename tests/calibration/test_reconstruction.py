"""Block-wise reconstruction: blocks trained to give their float output."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained import digits

import qat
from qat.calibration import algorithms
from qat.calibration.reconstruction import blocks
from qat.calibration.rounding import layer_stops
from qat.training.models import MLP, ByteTransformer, ResidualNet

W2: dict[str, Any] = {"rules": [{"weight": {"format": "int2_midrise", "observer": "mse"}, "input": "int8"}]}
W3: dict[str, Any] = {"rules": [{"weight": {"format": "int3", "observer": "mse", "learned": "lsq"}, "input": "int8"}]}


class Gate(nn.Module):
    """Two layers inside a chain that is inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b(self.a(x).relu()).sigmoid()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Gate(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Scaled(nn.Sequential):
    """A container with a forward of its own is no mere container."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Attributes(nn.Module):
    """Blocks that are attributes; the backbone, which is most of the model, is not one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Gated(), Gated()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


SHARED = Gated()
STRUCTURES: dict[str, tuple[Any, list[str]]] = {
    "residual": (lambda: ResidualNet(stages=2), ["stem.0", "blocks.0", "blocks.1", "head"]),
    "transformer": (lambda: ByteTransformer(9, 8, 2, 2), ["embedding", "blocks.0", "blocks.1", "head"]),
    "one block": (lambda: ByteTransformer(9, 8, 2, 1), ["embedding", "blocks.0", "head"]),
    "layers": (lambda: MLP(8, (4, 4), 2), ["1", "3", "5"]),
    "outermost": (lambda: nn.Sequential(Gated(), Gated(), nn.Linear(8, 2)), ["0", "1", "2"]),
    "backbone": (lambda: nn.Sequential(nn.Identity(), ByteTransformer(9, 8, 2, 2)),
                 ["1.embedding", "1.blocks.0", "1.blocks.1", "1.head"]),
    "attributes": (Attributes, ["first", "second", "head"]),
    "own forward": (lambda: nn.Sequential(Scaled(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)),
                    ["0", "1", "2"]),
    "shared": (lambda: nn.Sequential(SHARED, SHARED, nn.Linear(8, 2)), ["0", "2"]),
    "composites": (lambda: nn.Sequential(nn.LSTM(8, 4, batch_first=True)), ["0"]),
    "torch's": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False),
                ["layers.0", "layers.1"]),
    "a layer alone": (lambda: nn.Linear(8, 2), [""]),
}


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_blocks_hold_each_layer_once(structure: str) -> None:
    build, expected = STRUCTURES[structure]
    model = qat.prepare(build(), {"rules": [{"weight": "int4"}]})
    found = blocks(model)
    assert list(found) == expected
    inside = [m for b in found.values() for m in b.modules()]
    assert all(inside.count(layer) == 1 for layer in layer_stops(model).values())


@pytest.mark.parametrize(("kind", "recipe", "factor"), [("cnn", W2, 0.5), ("cnn", W3, 0.5), ("mlp", W2, 0.3)],
                         ids=["cnn-w2", "cnn-w3-learned", "mlp-w2"])
def test_it_beats_the_nearest_codes_on_held_out_data_and_is_deployed_bit_for_bit(kind: str, recipe: Any, factor: float,
                                                                                tmp_path) -> None:
    task = digits(kind)
    plain = task.quantized(recipe, [])
    model = task.quantized(recipe, [{"reconstruction": {"steps": 60 if kind == "cnn" else 120}}, "bias_correction"])
    assert task.error(model) < factor * task.error(plain)
    for layer in layer_stops(model).values():
        with torch.no_grad():
            assert torch.equal(layer.quantized_weight().dequantize(), layer.weight)      # it lies on its grid
    deployed, certificate = qat.convert(model, task.batches[:1])
    assert certificate.equal
    qat.save(deployed, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(qat.load(tmp_path / "out", task.net)(task.held_out), model(task.held_out))
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert all("output error" in rows[name] for name in layer_stops(model))


def test_a_small_transformer_with_learned_ranges_of_activations() -> None:
    net = ByteTransformer(16, 24, 2, 2).eval()
    batches = [torch.randint(0, 16, (8, 12)) for _ in range(6)]
    learned = {"format": "int8", "learned": "lsq", "observer": "mse"}
    recipe = {"rules": [{"match": {"type": "Embedding"}, "weight": "int8"},
                        {"weight": {"format": "int2_midrise", "observer": "mse"}, "input": learned}]}
    errors, scales = [], []
    for chosen in ([], [{"reconstruction": {"steps": 60}}]):
        model = qat.calibrate(qat.prepare(net, {**recipe, "calibration": chosen}), batches[:5]).eval()
        with torch.no_grad():
            errors.append(float((model(batches[5]) - net(batches[5])).square().mean()))
        scales.append([model.blocks[1].up.input_quantizer.present()[0].detach(),
                       model.blocks[1].up.quantized_weight().scale])
    assert errors[1] < 0.7 * errors[0]
    assert all(not torch.equal(a, b) for a, b in zip(*scales))
    assert qat.convert(model, batches[:1])[1].equal


def test_it_never_gets_worse() -> None:
    task = digits("mlp")
    plain = task.quantized(W3, [])
    model = task.quantized(W3, [{"reconstruction": {"steps": 3, "learning_rate": 1e3, "scale_learning_rate": 5.0}}])
    for name, layer in layer_stops(model).items():
        with torch.no_grad():
            before, after = plain.get_submodule(name).quantized_weight(), layer.quantized_weight()
        assert torch.equal(before.codes, after.codes), name
        assert torch.equal(before.scale, after.scale), name


def test_flags_gradients_randomness_and_mode_come_back_and_it_is_the_same_each_time() -> None:
    task, steps, weights = digits("mlp"), [], []
    model = qat.prepare(task.net, {**W2, "calibration": [{"reconstruction": {"steps": 5}}]}, task.batches[0]).train()
    model[1].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones_like(model[3].bias)
    names = list(model.state_dict())
    before = torch.get_rng_state()
    for _ in range(2):
        model.load_state_dict(task.net.state_dict(), strict=False)
        qat.calibrate(model, task.batches, progress=lambda *step: steps.append(step))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert not model[1].weight.requires_grad
    assert model[3].weight.requires_grad
    assert torch.equal(model[3].bias.grad, torch.ones_like(model[3].bias))
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert list(model.state_dict()) == names
    assert steps == [("reconstruction", n, 3) for n in (1, 2, 3)] * 2


@dataclass
class Hidden:
    states: Tensor
    count: int


Pair = namedtuple("Pair", ["hidden", "extra"])


class Cache:
    """What it was given grows, as the cache of a decoder does."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Odd(nn.Module):
    """Takes a dataclass and a cache, works in place, and returns what it likes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: Hidden, *, cache: Cache, dropped: None = None) -> Any:
        x = hidden.states.relu_()
        cache.seen.append(x)
        y = Hidden(x + self.down(F.gelu(self.up(x))) / len(cache.seen), hidden.count + 1)
        return {"dataclass": y, "tuple": (y.states, None, y.count), "named": Pair({"y": y.states}, y.states.sum()),
                "tensor": y.states}[self.kind]


class OddNet(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Odd(kind) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for i, block in enumerate(self.blocks):
            y = block(Hidden(x.clone(), i), cache=cache)
            y = y[0] if isinstance(y, tuple) else y
            y = y["y"] if isinstance(y, dict) else y
            x = y.states if isinstance(y, Hidden) else y
        assert len(cache.seen) == 2
        return x


@pytest.mark.parametrize("kind", ["dataclass", "tuple", "named", "tensor"])
def test_blocks_may_take_and_return_what_they_like(kind: str) -> None:
    net = OddNet(kind).eval()
    batches = [torch.randn(n, 8) for n in (16, 7, 30)]
    recipe = {"rules": [{"weight": {"format": "int2_midrise", "observer": "mse"}, "input": "int8"}]}
    errors = []
    for chosen in ([], [{"reconstruction": {"steps": 40}}]):
        model = qat.calibrate(qat.prepare(net, {**recipe, "calibration": chosen}, batches[0]), batches).eval()
        with torch.no_grad():
            errors.append(sum(float((model(b) - net(b)).square().sum()) for b in batches))
    assert errors[1] < 0.8 * errors[0]
    assert list(blocks(model)) == ["blocks.0", "blocks.1"]


def test_it_goes_on_from_codes_that_another_algorithm_has_chosen_and_keeps_their_scale() -> None:
    task = digits("mlp")

    def coarse(model: nn.Module, *_: Any) -> dict[str, str]:
        """Stands in for an algorithm that places ranges and rounds in a way of its own, here: down."""
        for layer in layer_stops(model).values():
            scale, _ = layer.weight_quantizer.place(layer.weight_quantizer.present()[0] * 1.25)
            codes = (layer.quantized_weight().codes - 1).clamp(-4, 3)
            layer.write_weight(codes.float() * scale[:, None])
        return {}

    errors, scales = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(algorithms.ROUNDINGS, "gptq", lambda m, b, p, **_: coarse(m))
        for chosen in (["gptq"], ["gptq", "reconstruction"]):
            model = task.quantized({"rules": [{"weight": "int3", "input": "int8"}]}, chosen)
            errors.append(task.error(model))
            scales.append([layer.weight_quantizer.scale for layer in layer_stops(model).values()])
    assert errors[1] < 0.2 * errors[0]          # the float net is the measure, not what was rounded before
    assert all(torch.equal(a, b) for a, b in zip(*scales))


def test_low_precision_weights_that_cannot_be_trained_and_blocks_that_never_run() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Gated() for _ in range(3))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tied(self.normed(self.blocks[1](self.blocks[0](x)))))

    net = Net().bfloat16()
    batches = [torch.randn(16, 8, dtype=torch.bfloat16) for _ in range(3)]
    model = qat.prepare(net, {"rules": [{"weight": "int3"}], "calibration": [{"reconstruction": {"steps": 20}}]})
    qat.calibrate(model, batches)
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert "no batch came here" in rows["blocks.2.body.0"]
    assert "computed from others" in rows["normed"]
    assert "it is shared" in rows["tied"]
    assert "it is shared" in rows["head"]
    first = model.blocks[0].body[0]
    assert first.weight.dtype == torch.bfloat16
    assert "reconstruction of blocks.0: output error" in rows["blocks.0.body.0"]
    assert not torch.equal(first.weight, net.blocks[0].body[0].weight)
