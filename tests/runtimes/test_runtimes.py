"""Runtimes against torch: figures, codes at every quantizer, and the operators that really ran."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import qat
from qat import runtimes, targets
from qat.errors import CheckpointError, UnsupportedError
from qat.runtimes import RuntimeRow, RuntimeTable
from qat.runtimes.base import Codes, Operator
from qat.runtimes.watch import differences, watch
from tests import zoo

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def deploy(model: nn.Module, recipe: Any, x: Tensor) -> nn.Module:
    return qat.convert(zoo.prepared(model.eval(), recipe, [x]), [x])[0]


def ran(row: RuntimeRow) -> Counter[str]:
    return Counter({name: sum(o.count for o in row.operators if o.operator == name)
                    for name in {o.operator for o in row.operators}})


def rows(table: RuntimeTable) -> dict[str, RuntimeRow]:
    return {r.runtime: r for r in table.rows}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("model", "shape", "operators", "layers"), [
    (zoo.mlp, (12,), {"QGemm": 2, "MatMulInteger": 1}, 3),
    (zoo.Residual, (3, 5, 7), {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1}, 4),
    (zoo.conv_net, (3, 8, 8), {"QLinearConv": 4, "QGemm": 1}, 5),
    (Recurrent, (4, 6), {"QGemm": 6}, 3),
    (Encoder, (7, 12), {"QGemm": 7, "MatMulInteger": 2}, 9),
])
def test_onnxruntime_computes_what_torch_computes(model: Any, shape: tuple[int, ...], operators: dict[str, int],
                                                  layers: int) -> None:
    x = torch.randn(40, *shape)
    deployed = deploy(model(), targets.default_recipe("onnxruntime"), x)
    table = qat.compare_runtimes(deployed, [x[:9], torch.randn(5, *shape)], repeats=1)
    ours, theirs = table.rows
    assert ran(theirs) == operators
    assert all(o.integer for o in theirs.operators)
    assert (theirs.integer_layers, theirs.layers, theirs.unseen, theirs.in_float) == (layers, layers, [], {})
    assert theirs.uncompared == []
    assert theirs.codes_beside == 0.0
    recurrent = model is Recurrent          # sigmoid and tanh have other last bits there, which move a code at times
    assert theirs.code_difference is not None
    assert theirs.code_difference <= recurrent
    assert theirs.differing_codes is not None
    assert theirs.differing_codes <= 0.005 * recurrent
    assert theirs.agreement == ours.agreement == 1.0
    assert theirs.output_steps is not None
    assert theirs.output_steps < (1.0 if recurrent else 1e-3)
    assert (ours.output_difference, ours.code_difference) == (0.0, 0)
    assert ours.compared_codes >= theirs.compared_codes > 0
    assert {o.layer for o in ours.operators} == {o.layer for o in theirs.operators}
    assert table.examples == 14
    assert min(r.latency_ms for r in table.rows) > 0            # type: ignore[type-var]
    assert json.loads(json.dumps(table.to_dict()))["rows"][1]["operators"][0]["layer"]


def test_every_layer_that_ran_in_floating_point_is_named() -> None:
    """A convolution whose output has no scale runs as float in Q/DQ form; a kept layer is said to be kept."""
    x = torch.randn(8, 3, 5, 7)
    recipe = {"rules": [{"match": {"name": "head"}, "keep": "float32"}, {"weight": "int8", "input": "int8"}]}
    deployed = deploy(zoo.Residual(), recipe, x)

    class Plain(type(runtimes.get("onnxruntime"))):             # type: ignore[misc]
        options = {"form": "qdq"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.runtimes.onnx_runtime.OnnxRuntime", Plain)
        table = qat.compare_runtimes(deployed, [x], repeats=1)
    row = rows(table)["onnxruntime"]
    assert {"stem", "conv"} <= set(row.in_float)
    assert "f32" in row.in_float["stem"]
    assert list(table.kept) == ["head"]
    said = str(table)
    assert "onnxruntime runs in floating point what is quantized: stem: " in said
    assert "kept in floating point by the recipe: head (" in said
    deployed = deploy(zoo.Residual(), targets.default_recipe("openvino"), x)
    table = qat.compare_runtimes(deployed, [x], ["torch"], repeats=1)
    assert table.rows[0].in_float == {"add": "sum(f32 x f32)"}      # with requantize it is a sum of codes


def test_weights_alone_and_tables() -> None:
    x = torch.randn(6, 64)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 24))
    weight = {"format": "int4", "granularity": "per_group", "group_size": 16}
    table = qat.compare_runtimes(deploy(model, zoo.every_layer(weight, None), x), [x], repeats=1)
    row = rows(table)["onnxruntime"]
    assert ran(row) == {"MatMulNBits": 2}
    assert {o.operands for o in row.operators} == {("f32", "u4")}
    assert (row.integer_layers, row.code_difference) == (2, None)
    tokens = torch.randint(0, 11, (6, 5))
    table = qat.compare_runtimes(deploy(zoo.Tied(), "w8a8", tokens), [tokens], repeats=1)
    row = rows(table)["onnxruntime"]
    assert ran(row)["Gather"] == 1
    assert row.integer_layers == row.layers == 3


def test_openvino_runs_on_integers_and_differs_by_single_codes() -> None:
    x = torch.randn(64, 3, 5, 7)
    deployed = deploy(zoo.Residual(), targets.default_recipe("openvino"), x)
    row = rows(qat.compare_runtimes(deployed, [x], ["openvino"], repeats=1))["openvino"]
    assert {o.operator.split()[0] for o in row.operators if not o.sums} == {"Convolution", "FullyConnected"}
    assert (row.integer_layers, row.layers, row.in_float) == (4, 4, {})
    assert row.code_difference is not None
    assert row.code_difference <= 1
    assert row.differing_codes is not None
    assert row.differing_codes < 1e-3
    assert row.agreement == 1.0


def test_what_openvino_runs_in_floating_point_is_named() -> None:
    """Integer operators instead of Q/DQ, which attention with dynamic probabilities needs, are no kernels there."""
    x = torch.randn(8, 7, 12)
    deployed = deploy(Encoder(), targets.default_recipe("onnxruntime"), x)
    row = rows(qat.compare_runtimes(deployed, [x], ["openvino"], repeats=1))["openvino"]
    assert set(row.in_float) == {o.layer for o in row.operators if not o.integer} - {""}
    assert "encoder.layers.0.linear1" in row.in_float
    assert row.uncompared == []


def test_steps_of_an_output_that_is_on_a_grid() -> None:
    x = torch.randn(8, 12)
    spec = {"format": "int8"}
    deployed = deploy(nn.Sequential(nn.Linear(12, 6)), zoo.every_layer(spec, spec, spec, edges="same"), x)
    table = qat.compare_runtimes(deployed, [x], ["torch"], repeats=1)
    assert table.own_step
    assert table.step == float(deployed[0].output_quantizer.scale)      # type: ignore[index]
    free = qat.compare_runtimes(deploy(nn.Sequential(nn.Linear(12, 6)), "w8a8", x), [x], ["torch"], repeats=1)
    assert not free.own_step


def test_metric_of_the_caller() -> None:
    x, target = torch.randn(8, 12), torch.randint(0, 3, (8,))
    deployed = deploy(zoo.mlp(), "w8a8", x)
    metric = MulticlassAccuracy(3, average="micro")
    table = qat.compare_runtimes(deployed, [(x, target)], metric=metric, metric_name="accuracy", repeats=1)
    with torch.no_grad():
        right = (deployed(x).argmax(-1) == target).float().mean()
    assert [r.metric for r in table.rows] == pytest.approx([float(right)] * 2)
    assert "accuracy" in str(table).splitlines()[0]


def test_a_file_for_one_batch_size() -> None:
    """Smaller batches are filled up, larger ones cut."""
    x = torch.randn(7, 12)
    deployed = deploy(zoo.mlp(), "w8a8", x)

    class Fixed(type(runtimes.get("onnxruntime"))):             # type: ignore[misc]
        options = {"dynamic_batch": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.runtimes.onnx_runtime.OnnxRuntime", Fixed)
        table = qat.compare_runtimes(deployed, [x[:3], x, x[:1]], ["onnxruntime"], repeats=1)
    assert table.rows[0].agreement == 1.0
    assert table.rows[0].output_steps is not None
    assert table.rows[0].output_steps < 1e-3


def test_codes_that_differ_are_counted_and_attributed() -> None:
    x = torch.randn(5, 12)
    watched = watch(deploy(zoo.mlp(), "w8a8", x), x)
    ours = watched.codes()
    assert [c.layer for c in ours] == ["0", "2", "4"]
    moved = [Codes(c.layer, c.codes.int() + 128 * (not c.unsigned), True) for c in ours]
    found, unknown = differences(ours, moved)
    assert unknown == []
    assert all(d.greatest == d.differing == 0 for d in found.values())
    moved[1].codes[0, :2] += torch.tensor([1, 3])
    found, _ = differences(ours, moved)
    assert (found["2"].greatest, found["2"].differing, found["2"].codes) == (3, 2, 35)
    assert found["4"].differing == 0
    assert differences(ours, [*moved, Codes("strange", torch.zeros(3, 3), True)])[1] == ["strange"]


def test_faults_are_typed_and_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 12)
    model = zoo.prepared(zoo.mlp(), "w8a8", [x])
    with pytest.raises(CheckpointError, match="only deployed models"):
        qat.compare_runtimes(model, [x])
    deployed = qat.convert(model, [x])[0]
    with pytest.raises(UnsupportedError, match="unknown runtime 'onnxruntme', did you mean 'onnxruntime'"):
        qat.compare_runtimes(deployed, [x], ["torch", "onnxruntme"])
    with pytest.raises(UnsupportedError, match="at least one batch"):
        qat.compare_runtimes(deployed, [])
    path = tmp_path / "m.onnx"
    qat.export(deployed, path, "onnx", x)
    session = runtimes.open(path, "onnxruntime")
    assert session(x)[0].shape == (5, 3)
    with pytest.raises(UnsupportedError, match=r"m\.onnx"):
        session(x[:, :4])
    with pytest.raises(UnsupportedError, match="2 tensors were given"):
        session((x, x))
    whole = path.read_bytes()
    flipped = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]       # a number, as good to ONNX as any other
    renamed = whole.replace(b"MatMulInteger", b"MatMulIntegex")
    for damaged in (whole[: len(whole) // 2], b"", b"nothing", renamed, flipped):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.onnx"):
            runtimes.open(path, "onnxruntime")
    with pytest.raises(CheckpointError, match="there is no"):
        runtimes.open(tmp_path / "none.onnx", "onnxruntime")
    (tmp_path / "m.onnx.json").unlink()                                 # as of others: the format itself is checked
    for damaged in (whole[: len(whole) // 2], b"nothing"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.onnx is no ONNX file, or damaged"):
            runtimes.open(path, "onnxruntime")
    with pytest.raises(UnsupportedError, match=r"qat\.load"):
        runtimes.open(path, "torch")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "qat.runtimes.open_vino", raising=False)
    with pytest.raises(UnsupportedError, match=r"none of the runtimes ran.*pip install '\.\[openvino\]'"):
        qat.compare_runtimes(deployed, [x], ["openvino"])
    table = qat.compare_runtimes(deployed, [x], ["openvino", "torch"], repeats=1)
    assert table.rows[0].error is not None
    assert table.rows[1].error is None
    assert "openvino did not run: " in str(table)


def test_a_model_that_a_runtime_cannot_take_is_a_row_that_says_why() -> None:
    x = torch.randn(8, 3, 8, 8)
    deployed = deploy(zoo.conv_net(), targets.default_recipe("onnxruntime"), x)
    deployed.double()
    table = qat.compare_runtimes(deployed, [x.double()], repeats=1)
    assert "float64" in str(rows(table)["onnxruntime"].error)
    assert rows(table)["torch"].agreement == 1.0


def test_operators_of_other_runtimes_are_integers_or_not() -> None:
    assert Operator("a", "MUL_MAT", ("q8_0", "q4_0")).integer
    assert not Operator("a", "MUL_MAT", ("f32", "q4_0")).integer
    assert str(Operator("a", "QGemm", ("u8", "s8"), "u8", 2)) == "QGemm(u8 x s8 -> u8) x2"
