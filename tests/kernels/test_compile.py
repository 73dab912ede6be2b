"""Compiled models run the same kernels, through one opaque operator for each product."""

from __future__ import annotations

import pytest
import torch
import zoo

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
