"""Composites: parts that read rows of a stacked matrix, or the weight of a child."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.modules.base import REGISTRY, register
from qat.modules.composite import Composite, Part, Source


class Gated(nn.Module):
    """Two products from one stacked matrix, and a child whose weight is read from outside, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(8, 6))
        self.stacked_bias = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = nn.functional.linear(x, self.stacked, self.stacked_bias).chunk(2, -1)
        return nn.functional.linear(a * b.sigmoid(), self.out.weight, self.out.bias)


class QuantizedGated(Composite, Gated):
    replaces = Gated

    @classmethod
    def sources(cls, module: nn.Module) -> dict[str, Source]:
        return {"a": Source("stacked", "stacked_bias", (0, 4)), "b": Source("stacked", "stacked_bias", (4, 8)),
                "to_out": Source("out.weight", "out.bias")}

    def forward(self, x: Tensor) -> Any:
        part = self.parts
        return self.finish(part["to_out"](part["a"](x) * part["b"](x).sigmoid()))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(QuantizedGated)
    yield
    del REGISTRY[Gated]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), Gated())


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic", "w4a8", "w4a16", "w2a8", "w1a8"])
def test_parts_of_rows_and_of_children(preset: str, tmp_path: Path) -> None:
    x, float_model = torch.randn(5, 6), model()
    before, after = zoo.assert_parity(float_model, preset, x, torch.randn(2, 3, 6), torch.randn(0, 6))
    assert set(float_model.state_dict()) <= set(before.state_dict())
    before.load_state_dict(float_model.state_dict())
    qat.calibrate(before, [x])
    before.train()(x).square().sum().backward()
    for name in ("1.stacked", "1.stacked_bias", "1.out.weight", "1.out.bias"):
        gradient = before.get_parameter(name).grad
        assert gradient is not None
        assert all(bool(row.any()) for row in gradient)
    assert {"1.stacked", "1.out.weight"}.isdisjoint(after.state_dict())
    assert {"1.stacked_bias", "1.out.bias"} <= set(after.state_dict())
    assert after[1].stacked.shape == (8, 6)
    assert torch.equal(after[1].stacked[4:], after[1].b.weight)
    qat.save(after, tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", model())(x), after(x))
    twin = copy.deepcopy(after)
    assert torch.equal(twin(x), after(x))
    assert twin[1].a.owner is twin[1]


def test_coverage_counts_rows_once_and_says_who_reads_the_child() -> None:
    x = torch.randn(5, 6)
    before = zoo.prepared(model(), "w8a8", [x])
    after, _ = qat.convert(before, [x])
    for m in (before, after):
        table = qat.coverage(m)
        rows = {r.name: r for r in table.rows}
        assert table.total_params == sum(p.numel() for p in model().parameters())
        assert (rows["1.a"].params, rows["1.b"].params, rows["1.to_out"].params) == (4 * 7, 4 * 7, 6 * 5)
        assert rows["1.out"].reason == "read by 1.to_out"
        assert table.fraction == 1.0


def test_a_rule_for_linear_reaches_no_part_and_no_child_of_a_composite() -> None:
    rules = [{"match": {"type": "Linear"}, "weight": "int4"}, {"match": {"type": "Gated"}, "weight": "int8"}]
    before = qat.prepare(model(), {"rules": rules})
    assert {p.plan.weight.bits for p in before.modules() if isinstance(p, Part)} == {8}
    assert type(before[1].out) is nn.Linear


def test_a_stacked_matrix_of_which_a_part_stays_float_is_kept_for_it() -> None:
    recipe = {"rules": [{"match": {"name": "1.b"}, "keep": "float32"}, {"weight": "int8", "input": "int8"}]}
    before, after = zoo.assert_parity(model(), recipe, torch.randn(5, 6))
    assert "1.stacked" in after.state_dict()
    assert after[1].a.frozen
    rows = {r.name: r for r in qat.coverage(after).rows}
    assert rows["1.b"].status == "kept"
    assert sum(r.params for r in rows.values()) == sum(p.numel() for p in before.parameters())


def test_rows_that_overlap_with_another_reader_stay_float() -> None:
    tied = model()
    tied[0] = nn.Linear(6, 8)
    tied.insert(1, nn.Linear(8, 6))
    tied[0].weight = tied[2].stacked
    before = qat.prepare(tied, zoo.every_layer())
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["0"].status == rows["2.a"].status == rows["2.b"].status == "kept"
    assert "shared" in rows["0"].reason
    assert rows["2.to_out"].status == "quantized"
