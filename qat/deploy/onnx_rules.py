"""TensorRT's rules of explicit quantization, held against the graph of an ONNX file: rules checked, not executed.

    codes       int8 activations with one scale each; int8 weights with one scale for each output channel, or one;
                int4 weights in blocks along the input, of layers whose other operand is floating point
    zero points 0, everywhere
    scales      positive, known before the model runs
    places      both operands of a quantized product, and of a quantized sum, come out of a DequantizeLinear
    bias        floating point
    nothing     that makes integers in another way: no ConvInteger, MatMulInteger, DynamicQuantizeLinear, QLinear*
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from qat.errors import UnsupportedError

INTEGER_OPERATORS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")
PRODUCTS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}
"""Operator -> the axis of the second operand along which its output channels lie (Gemm with transB)."""
EIGHT, FOUR = TensorProto.INT8, TensorProto.INT4


def broken_rules(model: onnx.ModelProto) -> list[str]:
    """What in the graph breaks the rules, a sentence each; empty: nothing."""
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: list[str] = []
    for node in graph.node:
        where = f"{node.name or node.op_type}"
        if node.op_type in INTEGER_OPERATORS:
            found.append(f"{where}: {node.op_type} is not explicit quantization")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += [f"{where}: {text}" for text in _grid(node, constants, readers)]
        elif node.op_type in (*PRODUCTS, "Add"):
            found += [f"{where}: {text}" for text in _operands(node, constants, makers)]
        elif _reads_codes(node, makers):
            found.append(f"{where}: {node.op_type} between QuantizeLinear and DequantizeLinear")
    return found


def _attribute(node: Any, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _grid(node: Any, constants: dict[str, Any], readers: dict[str, list[Any]]) -> list[str]:
    found = []
    if node.input[1] not in constants:
        return ["its scale is computed, not constant"]
    scale = numpy_helper.to_array(constants[node.input[1]])
    if (scale <= 0).any():
        found.append("a scale is not positive")
    if len(node.input) > 2 and node.input[2]:
        point = constants.get(node.input[2])
        if point is None or numpy_helper.to_array(point).astype("int64").any():
            found.append("its zero point is not 0")
        if point is not None and point.data_type not in (EIGHT, FOUR):
            found.append(f"codes of type {TensorProto.DataType.Name(point.data_type)}; int8 and int4 are allowed")
    stored = constants.get(node.input[0])
    if stored is None:
        if scale.ndim:
            found.append("an activation has one scale, not several")
        return found
    if stored.data_type == EIGHT and scale.ndim > 1:
        found.append("int8 weights have a scale for each output channel, not for blocks")
    if stored.data_type == EIGHT and scale.ndim == 1:
        axis = _attribute(node, "axis", 1)
        for reader in readers.get(node.output[0], []):
            wanted = PRODUCTS.get(reader.op_type)
            if wanted is not None and axis % len(stored.dims) != wanted:
                found.append(f"its scales lie along axis {axis}, the output channels of {reader.op_type} along axis "
                             f"{wanted}")
    if stored.data_type == FOUR and (scale.ndim != 2 or not _attribute(node, "block_size", 0)):
        found.append("int4 weights are blocked, of two dimensions")
    return found


def _source(name: str, makers: dict[str, Any]) -> Any:
    """What made a tensor, seen through what only moves values."""
    node = makers.get(name)
    while node is not None and node.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"):
        node = makers.get(node.input[0])
    return node


def _operands(node: Any, constants: dict[str, Any], makers: dict[str, Any]) -> list[str]:
    sources = [_source(name, makers) for name in node.input[:2]]
    quantized = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
    found = []
    weight = quantized[1] and sources[1].input[0] in constants
    block = weight and constants[sources[1].input[0]].data_type == FOUR
    if block and quantized[0]:
        found.append("int4 weights are for floating point inputs")
    if any(quantized) and not all(quantized) and not block:
        free = [n for n, q in zip(node.input, quantized) if not q and n not in constants]
        if free:
            found.append(f"{', '.join(free)} does not come out of a DequantizeLinear, the other operand does")
    bias = node.input[2] if node.op_type != "Add" and len(node.input) > 2 else ""
    if bias and (s := _source(bias, makers)) is not None and s.op_type == "DequantizeLinear":
        found.append("its bias is quantized")
    return found


def _reads_codes(node: Any, makers: dict[str, Any]) -> bool:
    moves = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
    return node.op_type not in moves and any((s := _source(n, makers)) is not None and s.op_type == "QuantizeLinear"
                                             for n in node.input)


def check_explicit_quantization(model: onnx.ModelProto, target: str) -> None:
    """Raise where the graph breaks the rules.

    Raises:
        UnsupportedError: naming the first nodes.
    """
    found = broken_rules(model)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UnsupportedError(f"{target}: {'; '.join(found[:5])}{more}; begin with "
                               f"qat.targets.default_recipe({target!r})")
