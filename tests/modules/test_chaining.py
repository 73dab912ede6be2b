"""Output specs: codes flow from layer to layer, and the gradients are those of floats between the layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.modules.base import QuantizedModule
from qat.numerics.tensor import QuantizedTensor


def taps(model: nn.Module, x: Any) -> dict[str, type]:
    """The type that enters each quantized module."""
    seen: dict[str, type] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            handles.append(module.register_forward_pre_hook(
                lambda m, args, name=name: seen.__setitem__(name, type(args[0]))))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def stack() -> nn.Module:
    return zoo.batch_norms_of_any_sign(nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1),
        nn.Flatten(),
        nn.Linear(32, 5), nn.ReLU6(), nn.Linear(5, 2)))


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
@pytest.mark.parametrize("training", [True, False])
def test_codes_flow(training: bool, traced: bool) -> None:
    x = torch.randn(4, 3, 6, 6)
    model = zoo.prepared(stack(), zoo.every_layer(output="int8"), [x], traced).train(training)
    assert taps(model, x) == {"0": Tensor, "3": QuantizedTensor, "4": QuantizedTensor, "6": QuantizedTensor,
                              "8": QuantizedTensor}
    assert model[3].input_quantizer is None
    assert isinstance(model(x), Tensor)


def float_between(model: nn.Module) -> nn.Module:
    """The same prepared model with every output dequantized: floats between the layers, on the same grids."""
    result = copy.deepcopy(model)
    chained = [m for m in result.modules() if isinstance(m, QuantizedModule) and m.plan.chained]
    senders = [m for m in result.modules() if isinstance(m, QuantizedModule) and m.plan.emits_codes]
    assert len(chained) == len(senders) > 0
    for sender, taker in zip(senders, chained):
        sender.plan.emits_codes = False
        taker.plan.chained = False
        taker.input_quantizer = copy.deepcopy(sender.output_quantizer)
        taker.input_quantizer.absorb(None, None)
    return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("output", ["int8", "uint8", {"format": "int4", "symmetric": True}], ids=str)
def test_gradients_are_those_of_floats_between_the_layers(output: Any, training: bool) -> None:
    x = torch.randn(4, 3, 6, 6)
    bits = {"format": "int4"} if "int4" in str(output) else "int8"
    chained = zoo.prepared(stack(), zoo.every_layer("int8", bits, output), [x]).train(training)
    plain = float_between(chained)
    g = torch.randn(4, 2)
    y, z = chained(x), plain(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    (y * g).sum().backward()
    (z * g).sum().backward()
    for (name, one), (_, other) in zip(chained.named_parameters(), plain.named_parameters()):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert bool(chained[0].weight.grad.any())


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
@pytest.mark.parametrize("mover",
                         [nn.Identity, nn.Flatten, lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Identity()),
                                   nn.Dropout], ids=["identity", "flatten", "several", "dropout"])
def test_codes_pass_through_modules_that_move_nothing(mover: Any, traced: bool) -> None:
    """In eval these return the very tensor they were given."""
    model, x = nn.Sequential(nn.Linear(6, 5), mover(), nn.Linear(5, 4)), torch.randn(7, 6)
    before, _ = zoo.assert_parity(model, zoo.every_layer(output="int8"), x, traced=traced)
    assert before(x).shape == (7, 4)


def test_unflatten_is_a_mover() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1))
    before, _ = zoo.assert_parity(model, zoo.every_layer(output="int8"), torch.randn(7, 6))
    assert before[2].plan.chained


@pytest.mark.parametrize("model", [
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))], ids=["conv", "flatten", "transposed"])
def test_dynamic_output_specs_compute_the_right_thing_or_are_refused(model: Any) -> None:
    x = torch.randn(2, 3, 6, 6)
    recipe = zoo.every_layer("int8", {"format": "int8", "dynamic": True}, {"format": "int8", "dynamic": True})
    net = model().eval()
    try:
        prepared = qat.prepare(net, recipe, example_inputs=x)
    except qat.QuantizationError:
        return
    before = qat.calibrate(prepared, [x]).eval()
    with torch.no_grad():
        expected = net(x)
        assert float((before(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_residual_adds_and_concatenations_on_codes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.add, self.cat = qat.Add(), qat.Concat()
            self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.add(self.a(x), self.b(x))
            return self.d(self.cat(self.c(y), y))

    rules = [{"match": {"type": t}, "output": "int8"} for t in ("Add", "Concat")]
    recipe = {"rules": [*rules, {"weight": "int8", "input": "int8", "output": "int8"}]}
    net, x = Net().eval(), torch.randn(5, 3, 4, 4)
    before, after = zoo.assert_parity(net, recipe, x, torch.randn(1, 3, 2, 5))
    with torch.no_grad():
        expected = net(x)
        assert float((after(x) - expected).abs().max()) < 0.06 * float(expected.abs().max())
    seen = taps(before, x)
    assert seen["add"] is seen["c"] is seen["cat"] is seen["d"] is QuantizedTensor
    before.train()(x).sum().backward()
    assert all(bool(p.grad.any()) for p in before.parameters())


def test_adds_stay_float_unless_a_rule_names_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.add = nn.Linear(4, 4), qat.Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.a(x), x)

    x = torch.randn(3, 4)
    before, _ = zoo.assert_parity(Net(), "w8a8", x)
    assert type(before.add) is qat.Add


def test_a_model_that_leaves_the_traced_path_says_so() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, skip: bool = False) -> Tensor:
            return self.b(x if skip else self.a(x))

    x = torch.randn(3, 4)
    before = zoo.prepared(Fork(), zoo.every_layer(output="int8"), [x])
    with pytest.raises(qat.QuantizationError, match=r"b expects codes.*output:"):
        before(x, skip=True)
