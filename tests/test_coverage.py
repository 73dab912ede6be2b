"""Law 7: coverage is total. Every parameter once, every matrix product, nothing skipped silently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.errors import PrepareError
from qat.recipe import PRESETS


class Functions(nn.Module):
    """Matrix products that no module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.expert = nn.Parameter(torch.randn(3, 5, 5))
        self.proj = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.shift = nn.Parameter(torch.zeros(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(F.linear(x, self.weight) + self.shift)
        x = x @ self.expert[0] + torch.einsum("bi,io->bo", x, self.expert[1])
        return F.scaled_dot_product_attention(x[None], x[None], x[None])[0] * self.scale


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", ["conv", "tied", "residual"])
def test_every_parameter_is_counted_once(model: str, preset: str) -> None:
    float_model = zoo.build(model)
    prepared = qat.prepare(float_model, preset, example_inputs=zoo.inputs(model, 2))
    table = qat.coverage(prepared)
    assert table.total_params == sum(p.numel() for p in float_model.parameters())
    names = [r.name for r in table.rows]
    assert len(set(names)) == len(names)
    assert all(r.status in ("quantized", "kept") for r in table.rows)
    assert all(r.reason for r in table.rows if r.status == "kept")
    owners = {n.rpartition(".")[0] for n, _ in float_model.named_parameters(remove_duplicate=False)}
    assert owners <= set(names)


def test_calls_of_functions_are_listed_with_their_parameters() -> None:
    x = torch.randn(2, 4)
    late, seen = qat.calibrate(qat.prepare(Functions(), "w8a8"), [x]), qat.prepare(Functions(), "w8a8", x)
    for model in (late, seen):
        table = qat.coverage(model)
        assert not table.unobserved
        calls = {r.name.split(": ")[1]: r for r in table.rows if r.kind == "function"}
        assert all(r.status == "kept" for r in calls.values())
        assert sum(r.params for r in table.rows) == sum(p.numel() for p in Functions().parameters())
    assert set(calls) == {"scaled_dot_product_attention"}
    rows = {r.name: r for r in table.rows}
    assert (rows["weight"].status, rows["weight"].params, rows["weight"].macs) == ("quantized", 20, 2 * 4 * 5)
    assert (rows["expert"].status, rows["expert"].params) == ("quantized", 75)
    assert "dequantized for einsum" in rows["expert"].reason
    assert (rows[""].status, rows[""].params) == ("kept", 10)
    assert "shift is read by add, not by a matrix product" in rows[""].reason
    calls = {r.name.split(": ")[1]: r for r in qat.coverage(late).rows if r.kind == "function"}
    assert set(calls) == {"linear", "matmul", "einsum", "scaled_dot_product_attention"}
    assert "weight" in calls["linear"].reason
    assert "example_inputs" in calls["linear"].reason
    assert calls["linear"].macs == 2 * 4 * 5


def test_until_the_model_runs_functions_are_unobserved() -> None:
    model = qat.prepare(Functions(), "w8a8")
    assert qat.coverage(model).unobserved
    assert "calibrate" in str(qat.coverage(model))
    qat.calibrate(model, [torch.randn(2, 4)])
    assert not qat.coverage(model).unobserved


def test_macs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.ConvTranspose2d(6, 2, 2, stride=2),
                          nn.Flatten(1, 2), nn.Linear(8, 5))
    rows = {r.name: r.macs for r in qat.coverage(qat.prepare(model, "w8a8",
            example_inputs=torch.randn(2, 3, 4, 4))).rows}
    assert rows["0"] == 2 * 6 * 16 * 9
    assert rows["1"] == 2 * 6 * 16 * 2 * 4
    assert rows["3"] == 2 * 16 * 8 * 5


def test_deployed_models_are_covered_too() -> None:
    x = zoo.inputs("conv", 2)
    before = zoo.prepared(zoo.build("conv"), "w8a8", [x])
    after, _ = qat.convert(before, [x])
    first, second = qat.coverage(before), qat.coverage(after)
    names = {r.name for r in first.rows if r.status == "quantized"}
    assert names == {r.name for r in second.rows if r.status == "quantized"}
    assert second.fraction >= first.fraction > 0.8


def test_float_models_have_no_coverage() -> None:
    with pytest.raises(PrepareError, match=r"qat\.prepare"):
        qat.coverage(nn.Linear(2, 2))


def test_the_table_is_readable_and_plain_data() -> None:
    table = qat.coverage(qat.prepare(zoo.build("tied"), "w8a8", example_inputs=zoo.inputs("tied", 2)))
    text = str(table)
    assert "weight shared with table, quantized once" in text
    assert "parameters quantized" in text.splitlines()[-1]
    assert table.to_dict()["total_params"] == table.total_params
