"""The opaque nodes of a traced model written out as ONNX operators, see :mod:`qat.deploy.onnx`."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qat import targets
from qat.deploy.integers import Integers
from qat.errors import OverflowBoundError, PatternError, UnsupportedError
from qat.modules.base import QuantizedModule
from qat.numerics import affine
from qat.numerics.formats import TensorSpec, get_format

DOMAIN = "qat"
GEMM_SWALLOWS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign", "Elu", "Selu",
                 "ThresholdedRelu", "Clip")
DEAD_STEPS = 2**22
"""What the bias of a channel without weights becomes on the int32 grid that is chosen for it."""


_ONNX_TYPES = {(True, 8): ir.DataType.INT8, (False, 8): ir.DataType.UINT8, (True, 4): ir.DataType.INT4,
               (False, 4): ir.DataType.UINT4}


class Lowering:
    """Replaces the opaque nodes of a graph by what a runtime executes."""

    def __init__(self, model: ir.Model, modules: Mapping[str, QuantizedModule], target: targets.Target,
                 form: str) -> None:
        self.graph, self.modules, self.target, self.form = model.graph, modules, target, form
        self.weights: dict[str, Integers] = {}
        self.made: dict[tuple[Any, ...], ir.Value] = {}
        self.node: ir.Node = model.graph[0] if len(model.graph) else ir.Node("", "Identity", [])
        self.layer = ""
        self.new: list[ir.Node] = []

    def run(self) -> None:
        self._merge_quantizers()
        for node in list(self.graph):
            if node.domain != DOMAIN or node.graph is None:
                continue
            self.node, self.new = node, []
            self.layer = self._text("layer") or scope_of(node)
            results: list[ir.Value] = getattr(self, f"_{node.op_type}")()
            self._splice(node, results)

    def _splice(self, node: ir.Node, results: Sequence[ir.Value]) -> None:
        self.graph.insert_before(node, self.new)
        for old, new in zip(node.outputs, results):
            if new.shape is None:
                new.shape, new.type = old.shape, old.type
            if old in self.graph.outputs:
                new.name = old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _merge_quantizers(self) -> None:
        """One node for all that put the same tensor on the same grid."""
        seen: dict[tuple[Any, ...], ir.Node] = {}
        for node in list(self.graph):
            if node.domain != DOMAIN or node.op_type not in ("Quantize", "QuantizeDynamically"):
                continue
            scale = node.inputs[1] if len(node.inputs) > 1 else None
            known = None if scale is None else constant(scale)
            key = (node.op_type, node.inputs[0], scale if known is None else known.tobytes(),
                   *(key_of(v) for v in node.inputs[2:]),
                   *sorted((k, str(a.value)) for k, a in node.attributes.items()))
            first = seen.setdefault(key, node)
            if first is not node:
                ir.convenience.replace_all_uses_with(list(node.outputs), list(first.outputs))
                self.graph.remove(node, safe=True)

    # -------------------------------------------------------------------------------------------- small pieces

    def _text(self, name: str) -> str:
        attribute = self.node.attributes.get(name)
        return "" if attribute is None else str(attribute.value)

    def _number(self, name: str, default: Any = None) -> Any:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def _op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        node = ir.node(kind, list(inputs), attributes=attributes, num_outputs=outputs)
        node.name = f"{self.layer}/{kind}" if self.layer else kind
        self.new.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def _const(self, array: Any, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; the same for the same numbers under the same name."""
        array = np.asarray(array, order="C")           # ascontiguousarray would make a scalar a vector of one
        key = (name, array.tobytes(), array.shape, array.dtype.str, dtype)
        if key not in self.made:
            tensor = ir.Tensor(array.astype(dtype.numpy()) if dtype is not None else array, dtype=dtype)
            unique = name
            for i in range(1, 1 + len(self.graph.initializers)):
                if unique not in self.graph.initializers:
                    break
                unique = f"{name}_{i}"
            tensor.name = unique
            value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
            self.made[key] = value
        return self.made[key]

    def _refuse(self, what: str, remedy: str) -> UnsupportedError:
        return UnsupportedError(f"{self.layer or 'the model'}: {what}; {remedy}")

    def _no_pattern(self, what: str, remedy: str) -> PatternError:
        return PatternError(str(self._refuse(what, remedy)))

    # ------------------------------------------------------------------------------------------- activations

    def _spec(self, prefix: str = "") -> TensorSpec:
        granularity = self._text(f"{prefix}granularity")
        dynamic = granularity in ("per_token", "per_sample")
        return TensorSpec(self._text(f"{prefix}format"), granularity, dynamic=dynamic)

    def _point(self, prefix: str, moving: ir.Value | None, dtype: Any) -> ir.Value:
        """The zero point in the type of the codes."""
        if moving is None:
            return self._const(np.array(self._number(f"{prefix}zero_point"), dtype), f"zero_point_{dtype.__name__}")
        known = constant(moving)
        if known is not None:
            return self._const(known.astype(dtype), f"{self.layer}.zero_point")
        wanted = ir.DataType.UINT8 if dtype is np.uint8 else ir.DataType.INT8
        return self._op("Cast", moving, to=wanted)

    @staticmethod
    def _one_scale(scale: ir.Value) -> bool:
        return scale.shape is not None and len(scale.shape) == 0

    def _Quantize(self) -> list[ir.Value]:
        x, scale, moving = self._inputs(3)
        spec = self._spec()
        fmt = spec.fmt
        dtype = np.int8 if fmt.signed else np.uint8
        wanted = ir.DataType.INT8 if fmt.signed else ir.DataType.UINT8
        floor, ceiling = self._number("floor"), self._number("ceiling")
        if fmt.grid == "sign":
            one = self._const(np.array(1, np.int8), "one")
            return [self._op("Where", self._op("GreaterOrEqual", x, self._float(0.0)), one,
                             self._const(np.array(-1, np.int8), "minus_one"))]
        native = fmt.grid == "affine" and self._one_scale(scale)   # along the last axis, kernels take 20 times as long
        known = constant(scale)
        lo, hi = fmt.lo, fmt.hi
        if floor is not None or ceiling is not None:
            if native and known is not None and known.ndim == 0 and moving is None:
                ends = [affine.quantize(torch.tensor(e), torch.tensor(known), self._number("zero_point"), spec).item()
                        for e in (-np.inf if floor is None else floor, np.inf if ceiling is None else ceiling)]
                lo, hi = max(lo, int(ends[0])), min(hi, int(ends[1]))
            else:
                x = self._op("Clip", x, None if floor is None else self._float(floor),
                             None if ceiling is None else self._float(ceiling))
        if native:
            codes = self._op("QuantizeLinear", x, scale, self._point("", moving, dtype))
            whole = np.iinfo(dtype)
            if (lo, hi) != (whole.min, whole.max):
                codes = self._op("Clip", codes, self._const(np.array(lo, dtype), f"lowest_{dtype.__name__}"),
                                 self._const(np.array(hi, dtype), f"highest_{dtype.__name__}"))
            return [codes]
        free = self._op("Div", x, scale)
        free = self._op("Floor" if fmt.grid == "midrise" else "Round", free)
        if moving is not None:
            free = self._op("Add", free, self._op("Cast", moving, to=ir.DataType.FLOAT))
        elif self._number("zero_point"):
            free = self._op("Add", free, self._float(self._number("zero_point")))
        return [self._op("Cast", self._op("Clip", free, self._float(lo), self._float(hi)), to=wanted)]

    def _QuantizeDynamically(self) -> list[ir.Value]:
        return self._op("DynamicQuantizeLinear", self.node.inputs[0], outputs=3)

    def _Dequantize(self) -> list[ir.Value]:
        codes, scale, moving = self._inputs(3)
        spec = self._spec()
        if spec.fmt.grid == "affine" and (self._one_scale(scale) or spec.granularity == "per_column"):
            return [self._dq(codes, scale, moving, "", spec)]
        values = self._op("Cast", self._levels(codes, spec), to=ir.DataType.FLOAT)
        if moving is not None:
            values = self._op("Sub", values, self._op("Cast", moving, to=ir.DataType.FLOAT))
        return [self._op("Mul", values, self._worth(scale, spec))]

    def _dq(self, codes: ir.Value, scale: ir.Value, moving: ir.Value | None, prefix: str, spec: TensorSpec) -> ir.Value:
        dtype = np.int8 if spec.fmt.signed else np.uint8
        along = {} if self._one_scale(scale) else {"axis": -1}
        return self._op("DequantizeLinear", codes, scale, self._point(prefix, moving, dtype), **along)

    def _levels(self, codes: ir.Value, spec: TensorSpec) -> ir.Value:
        """Codes as the integers that enter a product, before a zero point is taken off."""
        if spec.fmt.grid != "midrise":
            return codes
        wide = self._op("Cast", codes, to=ir.DataType.INT32)
        odd = self._op("Add", self._op("Mul", wide, self._const(np.array(2, np.int32), "two")),
                       self._const(np.array(1, np.int32), "one_int32"))
        return self._op("Cast", odd, to=ir.DataType.INT8)

    def _worth(self, scale: ir.Value, spec: TensorSpec, factor: float = 1.0) -> ir.Value:
        """What one level is worth: ``scale * unit``, times a factor."""
        known = constant(scale)
        for one in (spec.fmt.unit, factor):
            if one == 1.0:
                continue
            if known is not None:
                known = (known * np.float32(one)).astype(np.float32)
            else:
                scale = self._op("Mul", scale, self._float(one))
        return scale if known is None else self._const(known, "scale")

    def _float(self, number: float) -> ir.Value:
        return self._const(np.array(number, np.float32), "number")

    def _inputs(self, count: int) -> list[Any]:
        return [*self.node.inputs, *[None] * (count - len(self.node.inputs))]

    # -------------------------------------------------------------------------------------------- the products

    def _weight(self) -> tuple[QuantizedModule, Integers]:
        layer = self.modules[self.layer]
        if self.layer not in self.weights:
            owner = layer.plan.tied_to
            tied = owner is not None and owner in self.weights
            self.weights[self.layer] = self.weights[owner] if tied else Integers(layer)  # type: ignore[index]
        return layer, self.weights[self.layer]

    def _quantized_at_once(self) -> bool:
        """Whether the result goes to one quantizer with one fixed scale, and nowhere else."""
        result = self.node.outputs[0]
        uses = list(result.uses())
        if len(uses) != 1 or result in self.graph.outputs:
            return False
        reader = uses[0].node
        if reader.domain != DOMAIN or reader.op_type != "Quantize":
            return False
        scale = reader.inputs[1]
        return (scale is not None and self._one_scale(scale) and constant(scale) is not None
                and get_format(reader.attributes["format"].value).grid == "affine")

    def _Product(self) -> list[ir.Value]:
        codes, scale, moving = self._inputs(3)
        layer, weight = self._weight()
        spec = self._spec()
        known = constant(scale)
        fixed = spec.fmt.grid == "affine" and known is not None and known.ndim == 0 and moving is None
        bias = None if layer.bias is None else layer.bias.detach().float().numpy()
        suits = fixed and weight.group is None and (weight.zero_point is None or self._is_linear or
                                                    not weight.zero_point.any())
        if self.form == "qdq" and not suits:
            raise self._no_pattern(f"{layer.plan.weight} weights with {spec} inputs are no Q/DQ pattern",
                                   "static per_tensor inputs and per_channel weights are; or export with "
                                   "form='integer'")
        if suits and (self.form == "qdq" or (self.form == "auto" and self._is_exact(bias, known, weight))):
            return [self._qdq(codes, scale, known, spec, weight, bias)]
        levels = self._levels(codes, spec)
        integer = self._integer_linear if self._is_linear else self._integer_convolution
        return [integer(levels, scale, moving, spec, weight, bias)]

    def _is_exact(self, bias: Any, step: Any, weight: Integers) -> bool:
        """Whether runtimes have a kernel for the pattern, and it computes what the layer computes."""
        plan = self.modules[self.layer].plan
        if self.target.bias == "float32":
            return self._quantized_at_once()
        if not ((plan.codes_from_sums and self._quantized_at_once())
                or (plan.requantize and plan.output is None and self._is_linear and bias is not None
                and not self._quantized_at_once())):
            return False
        if bias is None:
            return True
        _, steps = self._bias_steps(bias, step, self._worth_with(bias, step, weight))
        whole = weight.dead | (np.abs(steps) < affine.INT32_STEPS)
        return bool((whole & (np.abs(steps) + self._greatest_sums(weight) < 2**31)).all())

    @property
    def _is_linear(self) -> bool:
        return "group" not in self.node.attributes

    def _geometry(self, codes: np.ndarray) -> dict[str, Any]:
        padding = list(self._number("padding"))
        return {"kernel_shape": list(codes.shape[2:]), "strides": list(self._number("strides")),
                "pads": padding * 2, "dilations": list(self._number("dilations")), "group": self._number("group")}

    def _qdq(self, codes: ir.Value, scale: ir.Value, known: Any, spec: TensorSpec, weight: Integers,
             bias: Any) -> ir.Value:
        step = np.asarray(known, np.float32)
        worth = self._worth_with(bias, step, weight)
        self._check_signs(worth)
        worth_value = self._const(worth, f"{self.layer}.weight_scale")
        matrix = self._const(weight.codes, f"{self.layer}.weight_codes")
        point = self._weight_point(weight)
        w = self._op("DequantizeLinear", matrix, worth_value, point, **({"axis": 0} if worth.ndim else {}))
        x = self._rows(codes) if self._is_linear else codes
        x = self._dq(x, scale, None, "", spec)
        inputs = [x, w] if bias is None else [x, w, self._bias(bias, step, worth, weight)]
        if self._is_linear:
            return self._as_it_came(self._op("Gemm", *inputs, transB=1), codes, weight.codes.shape[0])
        return self._op("Conv", *inputs, **self._geometry(weight.codes))

    def _check_signs(self, scale: np.ndarray) -> None:
        if self.target.positive_scales and (scale < 0).any():
            raise self._refuse(f"a folded batch norm makes {int((scale < 0).sum())} scales negative, and their "
                               f"channels hold the lowest code, which has no mirror image; {self.target.name} wants "
                               "positive scales", "keep this layer's batch norm unfolded, or train its gains positive")

    def _weight_point(self, weight: Integers) -> ir.Value:
        points = np.zeros(weight.scale.shape, weight.codes.dtype) if weight.zero_point is None else weight.zero_point
        return self._const(points, f"{self.layer}.weight_zero_point")

    def _bias(self, bias: np.ndarray, step: Any, worth: np.ndarray, weight: Integers) -> ir.Value:
        """The bias as the target wants it.

        Raises:
            OverflowBoundError: it leaves int32, alone or with the greatest sum that the layer can have.
        """
        if self.target.bias == "float32":
            return self._const(bias, f"{self.layer}.bias")
        grid, codes = self._bias_steps(bias, step, worth)
        if not (np.abs(codes) + self._greatest_sums(weight) < 2**31).all():
            worst = int(np.nan_to_num(np.abs(codes), nan=np.inf).argmax())
            raise OverflowBoundError(
                f"{self.layer}: the bias {bias[worst]:g} of channel {worst} is {codes[worst]:.3g} steps of "
                f"scale_x * scale_w = {grid[worst]:.3g}, which int32 cannot hold; widen the scale of that channel's "
                "weights (per_tensor, or clip the batch norm's gain), or export with form='integer', whose bias is "
                "float")
        scale = self._const((step * worth).astype(np.float32), f"{self.layer}.bias_scale")
        values = self._const(codes.astype(np.int32), f"{self.layer}.bias_codes")
        point = self._const(np.zeros(scale.shape.numpy() if scale.shape else (), np.int32), "zero_points_int32")
        return self._op("DequantizeLinear", values, scale, point, **({"axis": 0} if worth.ndim else {}))

    @staticmethod
    def _worth_with(bias: Any, step: Any, weight: Integers) -> np.ndarray:
        """The scale of each channel's weights; for one that has nothing but a bias, one that gives it a fine grid."""
        if bias is None or not weight.dead.any():
            return weight.scale
        fine = np.abs(bias).astype(np.float32) / step / np.float32(DEAD_STEPS)
        return np.where(weight.dead & (fine > affine.TINY), fine, weight.scale).astype(np.float32)

    @staticmethod
    def _bias_steps(bias: np.ndarray, step: Any, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The step of each channel's accumulator, (out,), and the bias in steps, divided in float32 as layers do."""
        grid = np.broadcast_to((step * worth).astype(np.float32), bias.shape)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return grid, np.rint(bias / grid).astype(np.float64)

    @staticmethod
    def _greatest_sums(weight: Integers) -> np.ndarray:
        """What the accumulator of each channel cannot exceed, (out,)."""
        points = 0 if weight.zero_point is None else weight.zero_point.reshape(-1, *[1] * (weight.codes.ndim - 1))
        return np.abs(weight.codes.astype(np.int64) - points).reshape(len(weight.codes), -1).sum(1) * 255

    def _rows(self, codes: ir.Value) -> ir.Value:
        """(..., in) as (rows, in)."""
        assert codes.shape is not None
        if len(codes.shape) == 2:
            return codes
        return self._op("Reshape", codes, self._const(np.array([-1, int(str(codes.shape[-1]))], np.int64), "shape"))

    def _as_it_came(self, y: ir.Value, codes: ir.Value, outputs: int) -> ir.Value:
        """(rows, out) with the leading dimensions of the codes; behind the quantizer, where one follows at once."""
        assert codes.shape is not None
        if len(codes.shape) == 2:
            return y
        lead = list(codes.shape[:-1])
        if sum(not isinstance(d, int) for d in lead) <= 1:
            sizes = [d if isinstance(d, int) else -1 for d in lead]
            shape = self._const(np.array([*sizes, outputs], np.int64), "shape")
        else:
            front = self._op("Shape", codes, start=0, end=-1)
            shape = self._op("Concat", front, self._const(np.array([outputs], np.int64), "shape"), axis=0)
        if not self._quantized_at_once():
            return self._op("Reshape", y, shape)
        reader = next(iter(self.node.outputs[0].uses())).node
        opaque, layer = self.node, self.layer
        self.node, self.layer = reader, scope_of(reader)
        placed = self._op("Reshape", self._Quantize_of(y), shape)
        self.node, self.layer = opaque, layer
        ir.convenience.replace_all_uses_with(reader.outputs[0], placed, replace_graph_outputs=True)
        placed.shape, placed.type = reader.outputs[0].shape, reader.outputs[0].type
        assert reader.graph is not None
        reader.graph.remove(reader, safe=True)
        return y

    def _Quantize_of(self, y: ir.Value) -> ir.Value:
        self.node.replace_input_with(0, y)
        return self._Quantize()[0]

    def _result(self, acc: ir.Value, scale: ir.Value, spec: TensorSpec, weight: Integers, bias: Any,
                shape: tuple[int, ...]) -> ir.Value:
        plan, known = self.modules[self.layer].plan, constant(scale)
        if plan.requantize and known is not None and known.ndim == 0:
            return self._from_sums(acc, known, weight, bias, shape)
        multiplier, by_row = self._multiplier(scale, spec, weight.scale, shape)
        return self._rescaled(acc, multiplier, by_row, bias, shape)

    def _from_sums(self, acc: ir.Value, step: Any, weight: Integers, bias: Any, shape: tuple[int, ...]) -> ir.Value:
        """``float32(acc + steps) * multiplier``; in steps of the output's grid, where the layer makes its codes so."""
        grid, out = (step * weight.scale).astype(np.float32), np.float32(1.0)
        if self.modules[self.layer].plan.codes_from_sums and self._quantized_at_once():
            out = self._at_scale_one(next(iter(self.node.outputs[0].uses())).node)
        outside = None
        if bias is not None:
            steps, rest = (t.numpy().reshape(shape or -1) for t in affine.whole_steps(
                *map(torch.as_tensor, (bias, grid, weight.dead))))
            acc = self._op("Add", acc, self._const(steps.astype(np.int32), f"{self.layer}.bias_codes"))
            outside = (rest / out).astype(np.float32) if rest.any() else None
        multiplier = (grid / out).astype(np.float32)
        multiplier = multiplier.reshape(shape) if shape and multiplier.ndim else multiplier
        y = self._op("Mul", self._op("Cast", acc, to=ir.DataType.FLOAT),
                     self._const(multiplier, f"{self.layer}.multiplier"))
        return y if outside is None else self._op("Add", y, self._const(outside, f"{self.layer}.bias"))

    def _at_scale_one(self, reader: ir.Node) -> Any:
        """Let a quantizer take values in steps of its grid; returns the scale that it had."""
        out, spec = constant(reader.inputs[1]), get_format(reader.attributes["format"].value)
        point = reader.attributes["zero_point"].value
        for name in ("floor", "ceiling"):
            if name in reader.attributes:
                code = affine.quantize(torch.tensor(float(reader.attributes[name].value)), torch.tensor(out), point,
                                       TensorSpec(spec.name, "per_tensor"))
                reader.attributes[name] = ir.AttrFloat32(name, float(code) - point)
        reader.replace_input_with(1, self._float(1.0))
        return out

    def _multiplier(self, scale: ir.Value, spec: TensorSpec, weight: np.ndarray, shape: tuple[int, ...]
                    ) -> tuple[ir.Value, ir.Value | None]:
        """What an accumulator is multiplied by: one number for each output; and one for each row, where there are."""
        weight = weight if not shape or not weight.ndim else weight.reshape(shape)
        by_channel = self._const(weight, f"{self.layer}.weight_scale")
        worth = self._worth(scale, spec)
        return (self._op("Mul", worth, by_channel), None) if self._one_scale(scale) else (by_channel, worth)

    def _rescaled(self, acc: ir.Value, multiplier: ir.Value, by_row: ir.Value | None, bias: Any,
                  shape: tuple[int, ...]) -> ir.Value:
        y = self._op("Mul", self._op("Cast", acc, to=ir.DataType.FLOAT), multiplier)
        y = y if by_row is None else self._op("Mul", y, by_row)
        return y if bias is None else self._op("Add", y, self._const(bias.reshape(shape or -1), f"{self.layer}.bias"))

    def _integer_linear(self, codes: ir.Value, scale: ir.Value, moving: ir.Value | None, spec: TensorSpec,
                        weight: Integers, bias: Any) -> ir.Value:
        if weight.group is not None:
            return self._integer_groups(codes, scale, moving, spec, weight, bias)
        matrix = self._const(weight.codes.T, f"{self.layer}.weight_codes")
        acc = self._matmul_integer(codes, moving, "", spec, matrix, weight)
        return self._result(acc, scale, spec, weight, bias, ())

    def _matmul_integer(self, codes: ir.Value, moving: ir.Value | None, prefix: str, spec: TensorSpec,
                        matrix: ir.Value, weight: Integers) -> ir.Value:
        dtype = np.int8 if spec.fmt.signed else np.uint8
        rows = moving is not None and not self._one_scale(moving)
        if rows and weight.zero_point is not None:
            raise self._refuse("inputs with a zero point for each row cannot meet weights with zero points",
                               "use symmetric: true for one of them")
        point = None if rows or spec.fmt.grid != "affine" else self._point(prefix, moving, dtype)
        w_point = None if weight.zero_point is None else self._weight_point(weight)
        acc = self._op("MatMulInteger", codes, matrix, point, w_point)
        if rows:        # sum (x - z) w = sum x w - z sum w
            sums = self._const(weight.codes.astype(np.int32).sum(1), f"{self.layer}.weight_sums")
            acc = self._op("Sub", acc, self._op("Mul", moving, sums))
        return acc

    def _integer_groups(self, codes: ir.Value, scale: ir.Value, moving: ir.Value | None, spec: TensorSpec,
                        weight: Integers, bias: Any) -> ir.Value:
        """One integer product for each group of inputs, all in one batched MatMulInteger; rescaled, then added up."""
        if weight.zero_point is not None or (moving is not None and not self._one_scale(moving)):
            raise self._refuse("groups of inputs with zero points of their own are no integer operator",
                               "use symmetric: true for weight and input")
        out, inputs = weight.codes.shape
        size, groups = weight.group or inputs, weight.scale.shape[1]
        matrix = self._const(weight.codes.reshape(out, groups, size).transpose(1, 2, 0), f"{self.layer}.weight_codes")
        split = self._op("Reshape", self._rows(codes), self._const(np.array([-1, groups, size], np.int64), "shape"))
        split = self._op("Transpose", split, perm=[1, 0, 2])
        dtype = np.int8 if spec.fmt.signed else np.uint8
        point = self._point("", moving, dtype) if spec.fmt.grid == "affine" else None
        acc = self._op("Cast", self._op("MatMulInteger", split, matrix, point), to=ir.DataType.FLOAT)
        step = self._const(weight.scale.T[:, None, :], f"{self.layer}.weight_scale")
        first = self._const(np.array([0], np.int64), "axes")
        total = self._op("ReduceSum", self._op("Mul", acc, step), first, keepdims=0)
        total = self._reshaped_like(total, codes, out)
        y = self._op("Mul", total, self._worth(scale, spec))
        return y if bias is None else self._op("Add", y, self._const(bias, f"{self.layer}.bias"))

    def _reshaped_like(self, y: ir.Value, codes: ir.Value, outputs: int) -> ir.Value:
        front = self._op("Shape", codes, start=0, end=-1)
        return self._op("Reshape", y, self._op("Concat", front, self._const(np.array([outputs], np.int64), "shape"),
                                               axis=0))

    def _integer_convolution(self, codes: ir.Value, scale: ir.Value, moving: ir.Value | None, spec: TensorSpec,
                             weight: Integers, bias: Any) -> ir.Value:
        if weight.group is not None:
            raise self._refuse("a convolution with scales for groups of inputs is no ONNX operator",
                               "use granularity: per_channel")
        if moving is not None and not self._one_scale(moving):
            raise self._refuse("a convolution with a zero point for each sample is no ONNX operator",
                               "use symmetric: true for its input")
        if spec.fmt.grid != "affine" and any(self._number("padding")):
            raise self._refuse(f"ONNX pads with a code of the input's grid, and {spec.fmt} has none for zero",
                               "use an affine format for the input of padded convolutions")
        points = None if weight.zero_point is None else np.unique(weight.zero_point)
        if points is not None and len(points) > 1:
            raise self._refuse("convolutions with a zero point for each channel are no ONNX operator",
                               "use symmetric weights")
        dtype = np.int8 if spec.fmt.signed else np.uint8
        point = self._point("", moving, dtype) if spec.fmt.grid == "affine" else None
        w_point = None if points is None else self._const(points[0], f"{self.layer}.weight_zero_point")
        acc = self._op("ConvInteger", codes, self._const(weight.codes, f"{self.layer}.weight_codes"), point, w_point,
                       **self._geometry(weight.codes))
        shape = (-1, *[1] * (weight.codes.ndim - 2))
        return self._result(acc, scale, spec, weight, bias, shape)

    def _MatMul(self) -> list[ir.Value]:
        a, scale_a, moving_a, b, scale_b, moving_b = self._inputs(6)
        left, right, factor = self._spec("a_"), self._spec("b_"), float(self._number("factor"))
        plain = (left.fmt.grid == right.fmt.grid == "affine" and self._one_scale(scale_a) and self._one_scale(scale_b)
                 and moving_a is None and moving_b is None)
        if self.form == "qdq" and not plain:
            raise self._no_pattern(f"a product of {left} and {right} activations is no Q/DQ pattern",
                                   "keep it in floating point by a rule with its name and keep: float32")
        if plain and (self.form == "qdq" or (self.form == "auto" and factor == 1.0 and self._quantized_at_once())):
            y = self._op("MatMul", self._dq(a, scale_a, None, "a_", left), self._dq(b, scale_b, None, "b_", right))
            return [y if factor == 1.0 else self._op("Mul", y, self._float(factor))]
        acc = self._two_activations(a, moving_a, left, b, moving_b, right)
        worth_a, worth_b = self._worth(scale_a, left), self._worth(scale_b, right, factor)
        y = self._op("Cast", acc, to=ir.DataType.FLOAT)
        if self._one_scale(scale_a):
            return [self._op("Mul", y, self._op("Mul", worth_a, worth_b))]
        return [self._op("Mul", self._op("Mul", y, worth_b), worth_a)]

    def _two_activations(self, a: ir.Value, moving_a: ir.Value | None, left: TensorSpec, b: ir.Value,
                         moving_b: ir.Value | None, right: TensorSpec) -> ir.Value:
        """The int32 sums of (a - z_a) @ (b - z_b).

        Zero points for each row of ``a`` or column of ``b`` are taken off afterwards, in int32 too:
        ``a @ (b - z) = a @ b - (sum of each row of a) * z``.
        """
        points, wide = [], [moving is not None and not self._one_scale(moving) for moving in (moving_a, moving_b)]
        if all(wide):
            raise self._refuse("a product of activations that both have zero points for rows or columns is no ONNX "
                               "operator", "use symmetric: true for one of them")
        for prefix, moving, spec, many in (("a_", moving_a, left, wide[0]), ("b_", moving_b, right, wide[1])):
            dtype = np.int8 if spec.fmt.signed else np.uint8
            points.append(None if many or spec.fmt.grid != "affine" else self._point(prefix, moving, dtype))
        a, b = self._levels(a, left), self._levels(b, right)
        acc = self._op("MatMulInteger", a, b, *points)
        if not any(wide):
            return acc
        other, moving, axis, point = (a, moving_b, -1, points[0]) if wide[1] else (b, moving_a, -2, points[1])
        values = self._op("Cast", other, to=ir.DataType.INT32)
        if point is not None:
            values = self._op("Sub", values, self._op("Cast", point, to=ir.DataType.INT32))
        sums = self._op("ReduceSum", values, self._const(np.array([axis], np.int64), "axes"), keepdims=1)
        return self._op("Sub", acc, self._op("Mul", sums, moving))

    # --------------------------------------------------------------------------------- weights with float inputs

    def _FloatProduct(self) -> list[ir.Value]:
        layer, weight = self._weight()
        y = self._op("MatMul", self.node.inputs[0], self._transposed_values(weight))
        if layer.bias is None:
            return [y]
        bias, shape = layer.bias.detach().numpy(), self.node.outputs[0].shape
        if shape is not None and len(shape) == 2 and any(u.node.op_type in GEMM_SWALLOWS
                                                         for u in self.node.outputs[0].uses()):
            # onnxruntime makes one float Gemm of matrix product, sum and activation, and forgets the codes
            return [self._op("Sub", y, self._const(-bias, f"{self.layer}.negative_bias"))]
        return [self._op("Add", y, self._const(bias, f"{self.layer}.bias"))]

    def _Weight(self) -> list[ir.Value]:
        """The values of a weight with output channels first; where only its transpose is read, that."""
        _, weight = self._weight()
        result = self.node.outputs[0]
        if weight.codes.ndim == 2:
            for reader in [u.node for u in result.uses()]:
                if reader.op_type == "Transpose" and list(reader.attributes["perm"].value) == [1, 0]:
                    turned = self._transposed_values(weight)
                    turned.shape, turned.type = reader.outputs[0].shape, reader.outputs[0].type
                    ir.convenience.replace_all_uses_with(reader.outputs[0], turned, replace_graph_outputs=True)
                    self.graph.remove(reader, safe=True)
        codes, scale, point = weight.codes, weight.scale, weight.zero_point
        if weight.group is None:
            return [self._values(weight, codes, scale, point, 0)]
        inputs = codes.reshape(len(codes), -1)
        values = self._values(weight, inputs, scale, point, 1, weight.group)
        if inputs.shape == codes.shape:
            return [values]
        return [self._op("Reshape", values, self._const(np.array(codes.shape, np.int64), "shape"))]

    def _transposed_values(self, weight: Integers) -> ir.Value:
        """The values of a weight as (in, out), in blocks along the input where runtimes have kernels for those."""
        inputs = weight.codes.shape[1]
        block = weight.group or next((size for size in (128, 64, 32, 16) if inputs % size == 0), None)
        if block is None or weight.scale.ndim == 0:
            return self._values(weight, weight.codes.T, weight.scale, weight.zero_point, 1)

        def along(values: Any) -> Any:
            if values is None or weight.group is not None:
                return None if values is None else values.T
            return np.broadcast_to(values, (inputs // block, len(values)))

        return self._values(weight, weight.codes.T, along(weight.scale), along(weight.zero_point), 0, block)

    def _values(self, weight: Integers, codes: Any, scale: Any, point: Any, axis: int,
                block: int | None = None) -> ir.Value:
        self._check_signs(scale)
        kind = _ONNX_TYPES[weight.signed, weight.bits]
        inputs = [self._const(codes, f"{self.layer}.weight_codes", kind),
                  self._const(scale, f"{self.layer}.weight_scale")]
        if point is not None:
            inputs.append(self._const(point, f"{self.layer}.weight_zero_point", kind))
        place = {"axis": axis} if scale.ndim else {}
        return self._op("DequantizeLinear", *inputs, **place, **({"block_size": block} if block else {}))

    def _Embedding(self) -> list[ir.Value]:
        """Rows of codes are looked up, then dequantized."""
        _, weight = self._weight()
        indices = self.node.inputs[0]

        def looked_up(values: Any, name: str) -> ir.Value:
            held = self._const(values, f"{self.layer}.{name}")
            return held if not values.ndim else self._op("Gather", held, indices)

        rows = self._op("Cast", looked_up(weight.codes, "weight_codes"), to=ir.DataType.FLOAT)
        if weight.group is not None:
            assert indices is not None
            rows = self._reshaped_to_groups(rows, indices, weight)
        scale = looked_up(weight.scale, "weight_scale")
        point = None if weight.zero_point is None else looked_up(weight.zero_point, "weight_zero_point")
        last = self._const(np.array([-1], np.int64), "axes")
        if point is not None:
            point = self._op("Cast", point, to=ir.DataType.FLOAT)
            rows = self._op("Sub", rows, self._op("Unsqueeze", point, last) if weight.scale.ndim else point)
        y = self._op("Mul", rows, self._op("Unsqueeze", scale, last) if weight.scale.ndim else scale)
        if weight.group is not None:
            y = self._reshaped_like(y, self._op("Unsqueeze", indices, last), weight.codes.shape[1])
        return [y]

    def _reshaped_to_groups(self, rows: ir.Value, indices: ir.Value, weight: Integers) -> ir.Value:
        ends = self._const(np.array([weight.scale.shape[1], weight.group], np.int64), "shape")
        return self._op("Reshape", rows, self._op("Concat", self._op("Shape", indices), ends, axis=0))


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a value that is known before the model runs."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def key_of(value: ir.Value | None) -> Any:
    known = constant(value)
    return value if known is None else known.tobytes()


def scope_of(node: ir.Node) -> str:
    """The dotted name of the module in whose forward a node was made."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = ast.literal_eval(scopes) if scopes else []
    return str(names[-2]) if len(names) > 1 else ""
