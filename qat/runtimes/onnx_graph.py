"""ONNX files of this package, read: where their codes are, which layer a node belongs to, which types meet in it."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from qat.errors import CheckpointError, UnsupportedError
from qat.runtimes.base import Codes, Operator, Read, Session
from qat.runtimes.watch import owner_of

KINDS = {onnx.TensorProto.FLOAT: "f32", onnx.TensorProto.UINT8: "u8", onnx.TensorProto.INT8: "s8",
         onnx.TensorProto.INT32: "s32", onnx.TensorProto.INT64: "s64", onnx.TensorProto.INT4: "s4",
         onnx.TensorProto.UINT4: "u4", onnx.TensorProto.FLOAT16: "f16", onnx.TensorProto.BFLOAT16: "bf16",
         onnx.TensorProto.BOOL: "bool", onnx.TensorProto.DOUBLE: "f64"}
WEIGHT = re.compile(r"(?:^|/)([^/]*)\.weight_codes")


def load(path: Path) -> onnx.ModelProto:
    """The file, checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is no ONNX file, or damaged: {reason}") from None
    return model


@dataclass(frozen=True)
class Place:
    """A value of the graph that holds codes."""

    layer: str
    value: str
    unsigned: bool


def layer_of(name: str) -> str:
    """The layer in the name of a node or value that this package has written; "" for others."""
    head, slash, _ = name.rpartition("/")
    return owner_of(head) if slash else ""


def _neighbours(graph: onnx.GraphProto) -> tuple[dict[str, onnx.NodeProto], dict[str, list[onnx.NodeProto]]]:
    """Value -> the node that makes it, and the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    return {value: node for node in graph.node for value in node.output}, readers


def places(model: onnx.ModelProto) -> list[Place]:
    """Where the graph has codes of activations, in the order of the computation."""
    graph = model.graph
    makers, readers = _neighbours(graph)
    kinds = {t.name: t.data_type for t in graph.initializer}
    found = []
    for node in graph.node:
        layer, value, unsigned = layer_of(node.name), node.output[0], True
        if "/" not in node.name:
            continue
        if node.op_type == "QuantizeLinear":
            point = node.input[2] if len(node.input) > 2 else ""
            kind = kinds.get(point) or (_attribute(makers[point], "to") if point in makers else None)
            unsigned = kind != onnx.TensorProto.INT8
            after = readers.get(value, [])
            if len(after) == 1 and after[0].op_type == "Clip":          # a narrower grid, or an absorbed activation
                value = after[0].output[0]
        elif node.op_type == "Cast" and makers.get(node.input[0]) is not None:
            before, kind = makers[node.input[0]], _attribute(node, "to")
            if (before.op_type != "Clip" or layer_of(before.name) != layer
                    or kind not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)):
                continue
            unsigned = kind == onnx.TensorProto.UINT8
        elif node.op_type == "Where" and [kinds.get(v) for v in node.input[1:]] == [onnx.TensorProto.INT8] * 2:
            unsigned = False
        elif node.op_type != "DynamicQuantizeLinear":
            continue
        found.append(Place(layer, value, unsigned))
    return found


def with_codes(model: onnx.ModelProto) -> tuple[bytes, list[Place]]:
    """The model with all its codes as further outputs, int32; read through a Cast, so that runtimes fuse as before."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    found = places(copied)
    for i, place in enumerate(found):
        name = f"codes_{i}"
        copied.graph.node.append(onnx.helper.make_node("Cast", [place.value], [name], f"codes/{i}",
                                                       to=onnx.TensorProto.INT32))
        copied.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None))
    return copied.SerializeToString(), found


def feed(names: Iterable[str], inputs: Any) -> dict[str, np.ndarray]:
    """Inputs of a model by the names of the graph's.

    Raises:
        UnsupportedError: too many, or too few.
    """
    names = list(names)
    given = dict(inputs) if isinstance(inputs, Mapping) else None
    if given is None or set(names) - set(given):
        leaves = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        if len(leaves) != len(names):
            raise UnsupportedError(f"the file has the inputs {', '.join(names)}, and {len(leaves)} tensors were given")
        given = dict(zip(names, leaves))
    return {name: given[name].detach().cpu().contiguous().numpy() for name in names}


def open_batch(first: Iterable[Any]) -> int | None:
    """The only batch size of a file, from the first dimension of each of its inputs; None: it is open."""
    fixed = {d for d in first if isinstance(d, int)}
    return fixed.pop() if len(fixed) == 1 else None


class OnnxSession(Session):
    """A session on an ONNX file, whose codes are read from a copy of its graph with more outputs.

    Attributes:
        path, model: the file, and what is in it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load(path)
        self._watching: tuple[Any, list[Place]] | None = None

    @abstractmethod
    def _start(self, content: bytes) -> Any:
        """What runs a serialized model.

        Raises:
            CheckpointError: the runtime cannot read it.
            UnsupportedError: the runtime has no kernel for it.
        """

    @abstractmethod
    def _run(self, started: Any, inputs: Any) -> list[Tensor]:
        """All outputs of what :meth:`_start` returned.

        Raises:
            UnsupportedError: inputs of other shapes or types than the file has.
        """

    def codes(self, inputs: Any) -> Read:
        if self._watching is None:
            content, found = with_codes(self.model)
            self._watching = self._start(content), found
        started, found = self._watching
        values = self._run(started, inputs)
        own = len(values) - len(found)
        codes = [Codes(p.layer, v, p.unsigned) for p, v in zip(found, values[own:], strict=True)]
        return Read(codes, values[:own])


# ------------------------------------------------------------------------------------------- operators of a graph

PRODUCTS = {"QLinearConv": (0, 3), "ConvInteger": (0, 1), "MatMulInteger": (0, 1), "QGemm": (0, 3),
            "QLinearMatMul": (0, 3), "MatMulIntegerToFloat": (0, 1), "DynamicQuantizeMatMul": (0, 1),
            "MatMulNBits": (0, 1), "Conv": (0, 1), "FusedConv": (0, 1), "NhwcFusedConv": (0, 1),
            "ConvTranspose": (0, 1), "Gemm": (0, 1), "FusedGemm": (0, 1), "MatMul": (0, 1), "FusedMatMul": (0, 1),
            "Gather": (0,), "GatherBlockQuantized": (0,)}
"""Operators that multiply or look up, and the positions of their operands."""
SUMS = {"QLinearAdd": (0, 3), "Add": (0, 1), "QLinearConcat": (2, 5), "Concat": (0, 1)}
POINTS = {"QLinearConv": 7, "QLinearMatMul": 7, "QGemm": 8, "QLinearAdd": 7, "QLinearConcat": 1, "QuantizeLinear": 2}
"""Where the zero point of the result is: the result has its type."""
RESULTS = {"MatMulInteger": "s32", "ConvInteger": "s32", "DequantizeLinear": "f32", "MatMulIntegerToFloat": "f32",
           "DynamicQuantizeMatMul": "f32", "MatMulNBits": "f32", "DynamicQuantizeLinear": "u8", "Shape": "s64"}


def operators(model: onnx.ModelProto) -> list[Operator]:
    """Products, look-ups of quantized tables, sums and concatenations of an optimized graph.

    An operator belongs to the layer whose weight it reads; without a weight, to the one in its name or in that of what
    it makes.
    """
    graph = model.graph
    makers, readers = _neighbours(graph)
    kinds = {t.name: KINDS.get(t.data_type, str(t.data_type)) for t in graph.initializer}
    kinds |= {v.name: KINDS.get(v.type.tensor_type.elem_type, "?") for v in graph.input}
    found: dict[Operator, int] = {}
    for node in graph.node:
        result = _result(node, kinds)
        kinds |= dict.fromkeys(node.output, result)
        positions = PRODUCTS.get(node.op_type) or SUMS.get(node.op_type)
        if positions is None or len(node.input) <= max(positions):
            continue
        given = [node.input[i] for i in positions]
        operands = [kinds.get(v, "?") for v in given]
        sums = node.op_type in SUMS
        origin = None if sums else _weight(given[-1], makers)
        layer = WEIGHT.search(origin)[1] if origin and WEIGHT.search(origin) else ""     # type: ignore[index]
        if node.op_type.startswith("Gather") and not layer:
            continue
        if layer and len(operands) > 1:
            assert origin is not None
            operands[-1] = kinds.get(origin, operands[-1])      # stored so, whatever unpacks it on the way
        if node.op_type == "DynamicQuantizeMatMul":
            operands[0] = "u8"
        elif node.op_type == "MatMulNBits":
            bits = _attribute(node, "bits")
            operands = ["s8" if _attribute(node, "accuracy_level") == 4 else "f32", f"u{bits}"]
            layer = layer or layer_of(node.name)
        layer = layer or _named(node, readers, sums)
        row = Operator(layer, node.op_type, tuple(operands), result, 1, sums)
        found[row] = found.get(row, 0) + 1
    return [Operator(r.layer, r.operator, r.operands, r.result, n, r.sums) for r, n in found.items()]


def _named(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], sums: bool) -> str:
    if not sums:
        return layer_of(node.name) or layer_of(node.output[0])
    after = readers.get(node.output[0], [])
    quantizers = [n.name for n in after if n.op_type == "QuantizeLinear"]
    return layer_of(node.output[0]) if node.op_type.startswith("QLinear") else (
        layer_of(quantizers[0]) if len(after) == len(quantizers) == 1 else "")


def _weight(value: str, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """The initializer that a weight comes from, whatever unpacks or turns it on the way."""
    while value in makers and makers[value].op_type in ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Mul",
                                                        "Sub", "Identity"):
        value = makers[value].input[0]
    return None if value in makers else value


def _result(node: onnx.NodeProto, kinds: Mapping[str, str]) -> str:
    if node.op_type == "Cast":
        return KINDS.get(_attribute(node, "to"), "?")
    position = POINTS.get(node.op_type)
    if position is not None:
        return kinds.get(node.input[position], "?") if len(node.input) > position and node.input[position] else "f32"
    return RESULTS.get(node.op_type) or (kinds.get(node.input[0], "f32") if len(node.input) else "f32")


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
