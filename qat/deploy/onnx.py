"""ONNX files: the integers that were trained, as Q/DQ patterns or integer operators that runtimes execute.

Two steps. The deployed model is run once under ``torch.export`` with its arithmetic on codes left opaque (quantize,
product, dequantize: everything that composites do between their products is followed, loops over time included). Then
each of these opaque nodes is written out (:mod:`qat.deploy.onnx_lowering`), with what surrounds it in view:

    qdq        DequantizeLinear -> Conv | Gemm | MatMul -> QuantizeLinear: what runtimes fuse into one kernel, with an
               int32 bias at scale_x * scale_w, or a float one where the target wants that. Of a recipe that does not
               ``requantize``, an int32 bias is rounded here, and about one code in a hundred or thousand is another
    integer    ConvInteger | MatMulInteger -> Cast -> Mul -> Add: ``float32(acc) * multiplier + bias``, the expression
               of training itself, bit for bit; it serves every scheme, but runtimes convolve slowly in it
    auto       qdq where fused kernels compute what the layer computes, bit for bit; else integer

``integer`` is the default where no target asks for another. The fast and exact files for onnxruntime are those of
models that were trained for it: ``qat.targets.adjust(recipe, "onnxruntime")``.

Weight-only layers are blocked DequantizeLinear + MatMul, which onnxruntime runs on the packed codes (MatMulNBits). It
quantizes their activations too unless ``session.qdq_matmulnbits_accuracy_level`` is set to 1.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import onnxscript  # noqa: F401  torch's exporter needs it
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from qat import targets
from qat.deploy.files import write_synced
from qat.deploy.onnx_lowering import Lowering, scope_of
from qat.deploy.onnx_rules import check_explicit_quantization
from qat.deploy.weights import check_layers
from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.kernels import activations, ste, table, weight_only
from qat.modules.base import QuantizedModule
from qat.modules.functional import QuantizedAdd
from qat.modules.linear import QuantizedEmbedding
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import DynamicQuantizer
from qat.rewriter import quantized_modules
from qat.tracing import evaluating

OPSET, IR_VERSION = 21, 10
FORMS = ("auto", "qdq", "integer")
SYMBOL = re.compile(r"s\d+")
LARGEST_FILE = 2**31 - 1


def write(deployed: nn.Module, path: Path, example_inputs: Any = None, target: str | None = None,
          form: str | None = None, dynamic_batch: bool = True) -> None:
    """Write ``deployed`` to the file ``path``; see :func:`qat.export`.

    While it runs, no other thread may use modules of this package: their arithmetic is opaque for that long.

    Args:
        example_inputs: one batch (a tensor, a tuple of arguments or a dict of keywords). Everything but the first
            dimension keeps the size that it has there; so does the number of time steps of recurrent layers.
        target: a name of :mod:`qat.targets`, whose rules are checked first.
        form: one of :data:`FORMS`; None: what the target asks for.
        dynamic_batch: leave the first dimension of the inputs open, if it is greater than 1 in the example and the
            model allows it.

    Raises:
        UnsupportedError: a layer or an operator that ONNX or the target cannot hold, by name.
        OverflowBoundError: an int32 bias, or a sum with it, that could overflow.
        CheckpointError: the file cannot be written, or would be larger than the 2 GiB that the format allows.
    """
    aim = targets.get(target or "generic")
    form = form or aim.form
    if form not in FORMS:
        raise UnsupportedError(f"unknown form {form!r}{nearest(str(form), FORMS)}; forms are {', '.join(FORMS)}")
    if example_inputs is None:
        raise UnsupportedError("ONNX holds a graph: give qat.export(..., example_inputs=one_batch)")
    modules = quantized_modules(deployed)
    check_layers(deployed, aim)
    program = _traced(deployed, example_inputs, dynamic_batch, aim.symmetric_activations is not True)
    model = program.model
    Lowering(model, modules, aim, form).run()
    _tidy(model)
    slow = sum(node.op_type == "ConvInteger" for node in model.graph)
    if slow and form == "auto":
        warnings.warn(f"{slow} convolutions become ConvInteger, exact but slow: kernels that are fast compute with an "
                      "int32 bias and quantize at once, which these layers do not. Fit the recipe before training: "
                      f"recipe, changes = qat.targets.adjust(recipe, {aim.name!r})", stacklevel=3)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    if aim.explicit:
        check_explicit_quantization(proto, aim.name)
    data = proto.SerializeToString(deterministic=True)
    if len(data) > LARGEST_FILE:
        raise CheckpointError(f"{path}: an ONNX file holds at most 2 GiB, and this model has {len(data):,} bytes")
    write_synced(path, data)


# ------------------------------------------------------------------------------- the graph, arithmetic left opaque


def _traced(deployed: nn.Module, inputs: Any, dynamic_batch: bool, unsigned: bool) -> torch.onnx.ONNXProgram:
    """The graph of the model, with nodes of the domain ``qat`` for what it does with codes."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (
        tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    narrow = {t.dtype for t in (*tensors, *deployed.parameters()) if t.is_floating_point()} - {torch.float32}
    if narrow:
        raise UnsupportedError(f"ONNX files are written for float32 models, and this one has {narrow.pop()}: call "
                               "model.float() before export")
    shapes = torch.utils._pytree.tree_map(
        lambda t: {0: torch.export.Dim.AUTO} if isinstance(t, Tensor) and t.dim() and dynamic_batch else None,
        (args, kwargs))
    with warnings.catch_warnings(), evaluating(deployed), torch.no_grad(), _opaque(unsigned):
        warnings.simplefilter("ignore")         # of the exporter, about its own parts
        try:
            program = torch.onnx.export(deployed, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, verbose=False,
                                        dynamic_shapes={**_named(deployed, shapes[0]), **shapes[1]})
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(f"this model has no ONNX graph: {_innermost(error)}") from error
    assert program is not None
    return program


def _named(model: nn.Module, shapes: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by the names that the forward gives them; ``*args`` takes those that are left."""
    named: dict[str, Any] = {}
    left = list(shapes)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[name], left = tuple(left), []
        elif left and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            named[name] = left.pop(0)
    return named


def _innermost(error: BaseException) -> str:
    """What the exporter says in the end, without its advertisements."""
    found = error
    while found.__cause__ is not None:
        found = found.__cause__
        if isinstance(found, UnsupportedError):
            raise found
    text = str(found).strip().split("\n")
    return " ".join(text[:2])[:400]


class _Weight(QuantizedTensor):
    """Stands in for the codes of a layer's weight while the model is followed: it has their shape, and the layer."""

    def __init__(self, layer: QuantizedModule) -> None:
        spec = layer.plan.weight
        assert spec is not None
        codes = layer.weight_codes.new_empty(layer.weight_shape, dtype=spec.fmt.dtype)
        super().__init__(codes, layer.weight_scale, None, spec.for_weight())
        self.layer = layer

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return symbolic("qat::Weight", (), {"layer": self.layer.name}, dtype=torch.float32, shape=self.shape,
                        version=1).to(dtype or torch.float32)


def _grid(x: QuantizedTensor, prefix: str = "") -> tuple[list[Tensor | None], dict[str, Any]]:
    """Codes, scale and zero point of an activation as inputs and attributes of an opaque node."""
    point = x.zero_point
    moving = isinstance(point, Tensor)
    attributes = {f"{prefix}format": x.spec.format, f"{prefix}granularity": str(x.spec.granularity),
                  f"{prefix}zero_point": 0 if moving else int(point or 0)}
    return [x.codes, x.scale, point if isinstance(point, Tensor) else None], attributes


def _quantize(x: Tensor, scale: Tensor, zero_point: Any, grid: ste.Grid, offset: Any = None) -> QuantizedTensor:
    return _placed(x, scale, zero_point, grid)


def _quantize_unsigned(x: Tensor, scale: Tensor, zero_point: Any, grid: ste.Grid,
                       offset: Any = None) -> QuantizedTensor:
    """int8 codes as uint8, 128 higher: the same levels, in the type that kernels take on either side of a ReLU."""
    spec = grid.spec
    if spec.format == "int8" and spec.granularity == "per_tensor" and not isinstance(zero_point, Tensor):
        grid = replace(grid, spec=spec.replace(format="uint8", symmetric=False, learned=None))
        zero_point = int(zero_point or 0) + 128
    return _placed(x, scale, zero_point, grid)


def _placed(x: Tensor, scale: Tensor, zero_point: Any, grid: ste.Grid) -> QuantizedTensor:
    codes = QuantizedTensor(x, scale, zero_point, grid.spec)
    inputs, attributes = _grid(codes)
    attributes |= {k: float(v) for k, v in (("floor", grid.floor), ("ceiling", grid.ceiling)) if v is not None}
    made = symbolic("qat::Quantize", inputs, attributes, dtype=grid.spec.fmt.dtype, shape=x.shape, version=1)
    return QuantizedTensor(made, scale, zero_point, grid.spec, None, x.dtype)


def _quantize_raw(x: Tensor, scale: Tensor, zero_point: Any, spec: TensorSpec) -> Tensor:
    return _placed(x, scale, zero_point, ste.Grid(spec)).codes


def _dynamically(self: DynamicQuantizer, x: Tensor) -> QuantizedTensor:
    """As ``DynamicQuantizeLinear`` where that is the scheme, else step by step."""
    spec = self.spec
    if spec.format != "uint8" or spec.granularity != "per_tensor" or spec.symmetric or self.ceiling is not None:
        return ste.quantize(x, *self.placing(x))
    codes, scale, point = torch.onnx.ops.symbolic_multi_out(
        "qat::QuantizeDynamically", (self.clamp(x),), {}, dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()), version=1)
    return QuantizedTensor(codes, scale, point.to(torch.int32), spec, None, x.dtype)


def _product(call: ste.Product, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert isinstance(call.w, _Weight)
    inputs, attributes = _grid(call.x)
    shape: tuple[Any, ...] = (*call.x.shape[:-1], call.w.shape[0])
    attributes |= {"layer": call.w.layer.name}
    if (geometry := call.geometry) is not None:
        shape = (call.x.shape[0], call.w.shape[0], *geometry.output_size(call.x.shape, call.w.shape))
        attributes |= {"strides": list(geometry.stride), "padding": list(geometry.padding),
                       "dilations": list(geometry.dilation), "group": geometry.groups}
    return symbolic("qat::Product", inputs, attributes, dtype=torch.float32, shape=shape, version=1).to(dtype)


def _requantized(self: QuantizedModule, call: ste.Product, bias: Tensor | None) -> QuantizedTensor:
    assert self.output_quantizer is not None
    return self.output_quantizer.quantize(_product(call, bias, call.x.dtype))


def _matmul(call: activations.Matmul, dtype: torch.dtype) -> Tensor:
    (left, a), (right, b) = _grid(call.a, "a_"), _grid(call.b, "b_")
    batch = torch.broadcast_shapes(call.a.shape[:-2], call.b.shape[:-2])
    return symbolic("qat::MatMul", [*left, *right], {**a, **b, "factor": float(call.factor)}, dtype=torch.float32,
                    shape=(*batch, call.a.shape[-2], call.b.shape[-1]), version=1).to(dtype)


def _float_product(x: Tensor, w: QuantizedTensor, bias: Tensor | None, kernel: Any = None) -> Tensor:
    assert isinstance(w, _Weight)
    return symbolic("qat::FloatProduct", (x,), {"layer": w.layer.name}, dtype=torch.float32,
                    shape=(*x.shape[:-1], w.shape[0]), version=1).to(x.dtype)


def _dequantize(self: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    inputs, attributes = _grid(self)
    return symbolic("qat::Dequantize", inputs, attributes, dtype=torch.float32, shape=self.shape,
                    version=1).to(dtype or self.dtype)


def _embed(self: QuantizedEmbedding, input: Tensor) -> Any:
    if self.plan.weight is None:
        return _EMBED(self, input)
    return self.finish(symbolic("qat::Embedding", (input,), {"layer": self.name}, dtype=torch.float32,
                                shape=(*input.shape, self.embedding_dim), version=1))


_EMBED = QuantizedEmbedding.forward


@contextmanager
def _opaque(unsigned: bool) -> Iterator[None]:
    """All modules of this package compute with opaque nodes instead of codes inside the block.

    Args:
        unsigned: whether int8 codes of activations become uint8.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (ste, "quantize", _quantize_unsigned if unsigned else _quantize),
        (ste, "product", _product), (activations, "matmul", _matmul),
        (affine, "quantize", _quantize_raw), (weight_only, "product", _float_product),
        (QuantizedTensor, "dequantize", _dequantize), (QuantizedEmbedding, "forward", _embed),
        (DynamicQuantizer, "quantize", _dynamically), (QuantizedModule, "quantized_weight", lambda self: _Weight(self)),
        (QuantizedModule, "requantized", _requantized),
        (QuantizedAdd, "sum_of_codes", lambda self, a, b: a.dequantize() + b.dequantize()),
        (QuantizedModule, "kernel_weight", lambda self, weight: weight)]
    with ExitStack() as stack:
        stack.enter_context(table.use("reference"))         # no shortcut around the products
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def _tidy(model: ir.Model) -> None:
    """Drop what nothing reads, and all that differs from one machine to the next."""
    for step in (passes.RemoveUnusedNodesPass(), passes.CommonSubexpressionEliminationPass(),
                 passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass()):
        step(model)
    graph = model.graph
    taken: dict[str, int] = {}
    ends = set(graph.outputs)
    fixed = {v.name for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph:
        scope = scope_of(node)
        node.metadata_props.clear()
        node.doc_string = None
        kind = node.name or node.op_type
        if scope and "/" not in kind:           # runtimes name fused operators after these
            kind = f"{scope}/{node.op_type}"
        taken[kind] = taken.get(kind, -1) + 1
        node.name = kind if not taken[kind] else f"{kind}_{taken[kind]}"
        for i, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in ends:
                value.shape = None
            if value.name not in fixed:
                value.name = f"{node.name}.{i}" if i else f"{node.name}.out"
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([d if isinstance(d, int) else SYMBOL.sub(
                lambda found: names.setdefault(found[0], f"dim_{len(names)}" if names else "batch"), str(d))
                for d in value.shape])
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "deployed"
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "qat", None, None
