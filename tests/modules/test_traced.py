"""Residual sums that a forward writes as ``+`` become modules where a rule asks for them, and nowhere else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.errors import RecipeError
from qat.modules.functional import QuantizedAdd, QuantizedConcat, QuantizedMatMul
from qat.training.models import ResidualNet

SUMS: dict[str, Any] = {"rules": [{"match": {"type": "Add"}, "input": "int8", "output": "int8"},
                                  {"weight": "int8", "input": "int8"}]}
ALL: dict[str, Any] = {"rules": [{"match": {"type": t}, "input": "int8"} for t in ("Add", "Concat", "MatMul")]
                       + [{"weight": "int8", "input": "int8"}]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += x
        size = x.shape[-1] + x.size(0)                  # numbers, not tensors
        z = torch.cat([torch.add(y, self.b(y)), x], dim=-1) / size
        return z @ z.transpose(-1, -2) + 1.0


def test_functions_become_modules() -> None:
    model, x = nn.Sequential(Block(), nn.ReLU()), torch.randn(2, 5, 8)
    before, after = zoo.assert_parity(model, ALL, x, torch.randn(3, 4, 8))
    kinds = {n: type(m) for n, m in before.named_modules()}
    assert kinds["0.add"] is kinds["0.add_1"] is QuantizedAdd
    assert kinds["0.concat"] is QuantizedConcat
    assert kinds["0.matmul"] is QuantizedMatMul
    assert before[0].concat.dim == -1
    assert "0.add_2" not in kinds, "a number was taken for a tensor"
    assert isinstance(before[0], Block)
    assert set(model.state_dict()) <= set(before.state_dict())
    assert type(model[0]) is Block
    assert not hasattr(model[0], "add")
    for m in (before, after):
        assert torch.equal(copy.deepcopy(m)(x), before(x))
        assert torch.equal(pickle.loads(pickle.dumps(m))(x), before(x))


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
def test_a_residual_network(traced: bool, tmp_path: Any) -> None:
    model = zoo.batch_norms_of_any_sign(ResidualNet())
    x = torch.randn(4, 1, 16, 16)
    before, after = zoo.assert_parity(model, SUMS, x, traced=traced)
    sums = [m for m in before.modules() if isinstance(m, QuantizedAdd)]
    assert len(sums) == 3
    assert all(m.output_quantizer is not None for m in sums)
    qat.save(after, tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", ResidualNet())(x), after(x))
    before.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in before.parameters())


def test_only_where_a_rule_asks() -> None:
    x = torch.randn(2, 5, 8)
    for recipe in ("w8a8", {"rules": [{"match": {"type": "Add"}, "keep": "float32", "optional": True},
                                      {"weight": "int8", "input": "int8"}]}):
        before = qat.prepare(Block(), recipe, example_inputs=x)
        assert not any(isinstance(m, qat.Add) for m in before.modules())
    model = Block()
    float_y = model.eval()(x).detach()
    rule = {"match": {"type": "Add", "name": "add"}, "input": "int8"}
    prepared = qat.calibrate(qat.prepare(model, {"rules": [rule]}, example_inputs=x), [x])
    assert float((prepared(x) - float_y).detach().abs().max()) < 0.1 * float(float_y.abs().max())
    assert not any(isinstance(m, qat.Concat | qat.MatMul) for m in prepared.modules())


class Optional(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.a(x) + (x if skip is None else skip)


class Branches(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x if x.sum() > 0 else x


class Modes(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, self.training) + x


class Overwrites(Block):
    """What it was given changes: its caller sees that."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.a(x)
        return x


class Shared(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        y += x
        return z * y


@pytest.mark.parametrize("kind", [Optional, Branches, Modes, Overwrites, Shared], ids=lambda k: k.__name__)
def test_what_cannot_be_traced_is_left_alone_and_the_rule_says_so(kind: type[nn.Module]) -> None:
    model = kind().requires_grad_(False)
    with pytest.raises(RecipeError, match=r"write a qat\.Add into the model"):
        qat.prepare(model, SUMS, example_inputs=torch.randn(2, 5, 8), inplace=True)
    assert type(model) is kind
    assert not hasattr(model, "add")
