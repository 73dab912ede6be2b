"""Compiled models run the same kernels, through one opaque operator for each product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import qat


@pytest.mark.parametrize("model", ["mlp", "conv", "1d"])
@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic"])
def test_compiled_equals_eager(model: str, preset: str) -> None:
    torch._dynamo.reset()
    x = zoo.inputs(model, 5)
    prepared = zoo.prepared(zoo.build(model), preset, [x])
    deployed, _ = qat.convert(prepared, [x])
    with torch.no_grad():
        expected = deployed(x)
        for candidate in (prepared, deployed):
            assert torch.equal(torch.compile(candidate, backend="aot_eager")(x), expected)


# torch's own compiler instantiates autograd functions, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_training_has_the_gradients_of_eager() -> None:
    torch._dynamo.reset()
    x = zoo.inputs("mlp", 5)
    model = zoo.prepared(zoo.build("mlp"), "w8a8", [x]).train()
    model(x).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


class Reads(nn.Module):
    """Its own parameters, and the weight of a layer, are read by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.experts = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Module()
        self.experts.stacked = nn.Parameter(torch.randn(3, 16, 16) * 0.2)
        self.own = nn.Parameter(torch.randn(16, 16) * 0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.table(tokens)).relu() @ self.own
        x = x + F.linear(x, self.layer.weight) + F.linear(x, self.experts.stacked[1])
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "w4a16"])
@pytest.mark.filterwarnings("ignore:group_size", "ignore:.*should not be instantiated:DeprecationWarning")
def test_models_whose_parameters_functions_read_can_be_compiled(preset: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (3, 5))
    prepared = zoo.prepared(Reads(), preset, [tokens])
    deployed, _ = qat.convert(prepared, [tokens])
    with torch.no_grad():
        expected = prepared(tokens)
        assert torch.equal(torch.compile(prepared, backend="aot_eager")(tokens), expected)
        assert torch.equal(torch.compile(deployed, backend="aot_eager")(tokens), expected)
    prepared.train()
    found = []
    for model in (prepared, torch.compile(prepared, backend="aot_eager")):
        prepared.zero_grad()
        model(tokens).square().mean().backward()
        found.append({n: p.grad for n, p in prepared.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
