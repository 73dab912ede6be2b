"""ExecuTorch files (``.pte``): the integers that were trained, in int8 kernels of XNNPACK.

The deployed model is exported with the pattern that XNNPACK's partitioner fuses in place of its arithmetic on codes:

    dequantize(x), dequantize(w) -> linear | convolution, with bias -> (clamp) -> quantize

Activations are int8; codes of an absorbed ReLU, uint8, become int8 with a zero point 128 lower, and no value changes.
Biases are whole steps of ``scale_x * scale_w``, int32 in the file, and the accumulators are multiplied once by
``scale_x * scale_w / scale_out``: what layers of recipes that ``requantize`` compute. Sums of two activations
(:class:`qat.modules.functional.Add`) are not computed as this package computes them, and a code behind one may be one
off; ReLU, pooling and concatenation run in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from qat import targets
from qat.deploy.files import write_synced
from qat.deploy.integers import Integers
from qat.deploy.weights import check_layers
from qat.errors import OverflowBoundError, UnsupportedError
from qat.kernels import ste, table
from qat.modules.base import QuantizedModule
from qat.modules.composite import Composite
from qat.modules.convolution import QuantizedConvolution
from qat.modules.functional import QuantizedAdd, QuantizedMatMul
from qat.modules.linear import LinearProduct, QuantizedEmbedding
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.rewriter import quantized_modules
from qat.tracing import evaluating

with warnings.catch_warnings():      # of libraries that it imports, about themselves
    warnings.simplefilter("ignore")
    from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        AddConfig,
        DeQuantizedPerTensorConfig,
        QuantizedPerTensorConfig,
    )
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

CONVOLUTIONS = ("Conv1d", "Conv2d")
CODES, SCALE, POINT, BIAS = (f"executorch_{part}" for part in ("codes", "scale", "zero_point", "bias"))
DEAD_STEPS = 2**20
"""What the bias of a channel without weights becomes on the int32 grid that is chosen for it."""
LOWEST = -3.4e38

TARGETS = ("executorch", "arm")

_ops: Any = torch.ops.quantized_decomposed


def write(deployed: nn.Module, path: Path, example_inputs: Any = None, target: str | None = None) -> None:
    """Write ``deployed`` to the file ``path``; see :func:`qat.export`.

    While it runs, no other thread may use modules of this package: their arithmetic is replaced for that long.

    Args:
        example_inputs: one batch (a tensor, a tuple of arguments or a dict of keywords); the file takes inputs of these
            shapes, the size of the batch included.
        target: a name of :mod:`qat.targets`, whose rules are checked first; None: ``executorch``.

    Raises:
        UnsupportedError: a layer that XNNPACK does not run on integers, by name.
        OverflowBoundError: a bias that an int32 accumulator cannot hold exactly.
        CheckpointError: the file cannot be written.
    """
    aim = targets.get(target or "executorch")
    if example_inputs is None:
        raise UnsupportedError("an ExecuTorch file holds a graph: give qat.export(..., example_inputs=one_batch)")
    modules = quantized_modules(deployed)
    check_layers(deployed, aim)
    for name, module in modules.items():
        _check(name or "the model", module)
    program = exported(deployed, example_inputs)
    with _quiet():
        manager = to_edge_transform_and_lower(program, partitioner=[_partitioner()])
        _check_delegated(manager.exported_program(), modules)
        buffer = manager.to_executorch(ExecutorchBackendConfig()).buffer
    write_synced(path, bytes(buffer))


# ------------------------------------------------------------------------------------------- what can be expressed


def _check(name: str, module: QuantizedModule) -> None:
    """Refuse a layer whose integers are no pattern of XNNPACK.

    Raises:
        UnsupportedError: it is one.
    """
    plan = module.plan
    quantizers = module.activation_quantizers()
    if isinstance(module, Composite):
        raise UnsupportedError(f"{name}: a {plan.kind} is no int8 kernel of XNNPACK; leave it in floating point by a "
                               f"rule with its name and keep: float32, or export with format='onnx'")
    if isinstance(module, QuantizedMatMul) and plan.input is not None:
        raise UnsupportedError(f"{name}: XNNPACK has no int8 product of two activations; leave it in floating point by "
                               "a rule with its name and keep: float32, or export with format='onnx'")
    specs = [(role.removesuffix("_quantizer"), quantizer.spec) for role, quantizer in quantizers.items()]
    for role, spec in [*specs, *((r, s) for r, s in (("input", plan.input), ("output", plan.output)) if s is not None)]:
        _check_activation(name, role, spec)
    if plan.weight is None:
        return
    if plan.weight.granularity == "per_group":
        raise UnsupportedError(f"{name}: XNNPACK's int8 kernels have no scales for groups of inputs; use granularity: "
                               "per_channel")
    if isinstance(module, QuantizedEmbedding):
        return
    if plan.input is None:
        raise UnsupportedError(f"{name}: its inputs are floating point, and XNNPACK's int8 kernels take int8 codes; "
                               "give it an input: int8 spec, or keep: float32")
    if not (isinstance(module, LinearProduct) or
            (isinstance(module, QuantizedConvolution) and plan.kind in CONVOLUTIONS)):
        raise UnsupportedError(f"{name}: a quantized {plan.kind} is no int8 kernel of XNNPACK; leave it in floating "
                               "point by a rule with its name and keep: float32, or export with format='onnx'")
    if not plan.requantize:
        raise UnsupportedError(f"{name}: it was trained with a float bias, and XNNPACK adds whole int32 steps; train "
                               "with requantize: true, as recipe, changes = qat.targets.adjust(recipe, 'executorch') "
                               "does")


def _check_activation(name: str, role: str, spec: TensorSpec) -> None:
    fmt = spec.fmt
    if (spec.dynamic or spec.granularity != "per_tensor" or fmt.grid != "affine"
            or (fmt.lo, fmt.hi) not in ((-128, 127), (0, 255))):
        raise UnsupportedError(f"{name}: {spec} is no {role} of XNNPACK's int8 kernels, whose activations are static "
                               "int8 or uint8 with one scale; use format: int8, granularity: per_tensor and dynamic: "
                               "false, or export with format='onnx'")


# --------------------------------------------------------------------------------------------- the pattern's parts


def exported(deployed: nn.Module, example_inputs: Any) -> ExportedProgram:
    """The model in operators of PyTorch and ``quantized_decomposed``, before XNNPACK takes its part.

    The codes of the layer ``name`` are the buffer ``name.executorch_codes``, its scales ``name.executorch_scale``.

    Raises:
        UnsupportedError: the model has no graph.
    """
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (
        tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,), {})
    floats = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, list(deployed.parameters())))
              if isinstance(t, Tensor) and t.is_floating_point()]
    narrow = {t.dtype for t in floats} - {torch.float32}
    if narrow:
        raise UnsupportedError(f"ExecuTorch files are written for float32 models, and this one has {narrow.pop()}: "
                               "call model.float() before export")
    with evaluating(deployed), torch.no_grad(), _constants(deployed), _patterns(), _quiet():
        program = _export(deployed, args, kwargs)
        graph = program.module(check_guards=False)
        assert isinstance(graph, torch.fx.GraphModule)
        _fix_scales(graph)
        _drop_unused(graph)
        return _export(graph, args, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs)
    except (RuntimeError, TypeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        found: BaseException = error
        while found.__cause__ is not None:
            found = found.__cause__
        if isinstance(found, UnsupportedError):
            raise found from None
        text = " ".join(str(found).strip().split("\n")[:2])[:400]
        raise UnsupportedError(f"this model has no graph of torch.export: {text}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about their own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _constants(deployed: nn.Module) -> Iterator[None]:
    """Each quantized layer has its integers as buffers inside the block."""
    layers = [m for m in quantized_modules(deployed).values() if m.plan.weight is not None]
    try:
        for layer in layers:
            weight = Integers(layer)
            _check_weight(layer, weight)
            scale = np.array(np.broadcast_to(weight.scale, weight.codes.shape[:1]))
            layer._buffers[CODES] = torch.from_numpy(weight.codes)
            layer._buffers[SCALE] = torch.from_numpy(scale)
            layer._buffers[POINT] = torch.zeros(len(scale), dtype=torch.int64)
            bias = getattr(layer, "bias", None)
            layer._buffers[BIAS] = None if bias is None else bias.detach().float().clone()
        yield
    finally:
        for layer in layers:
            for name in (CODES, SCALE, POINT, BIAS):
                layer._buffers.pop(name, None)


def _check_weight(layer: QuantizedModule, weight: Integers) -> None:
    if not weight.signed or (weight.zero_point is not None and weight.zero_point.any()):
        raise UnsupportedError(f"{layer.name}: XNNPACK's int8 weights have zero point 0, and {layer.plan.weight} is "
                               "not so; use symmetric: true for weights")
    if (weight.scale <= 0).any():
        raise UnsupportedError(f"{layer.name}: a folded batch norm makes {int((weight.scale <= 0).sum())} scales "
                               "negative, and their channels hold the lowest code, which has no mirror image; keep "
                               "this layer's batch norm unfolded, or train its gains positive")


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int | None, grid: ste.Grid,
              offset: Tensor | None = None) -> QuantizedTensor:
    fmt, spec = grid.spec.fmt, grid.spec
    point = int(zero_point or 0)
    floor = None if fmt.lo == point and grid.floor == 0.0 else grid.floor
    if floor == 0.0 and grid.ceiling is None:
        x = F.relu(x)
    elif floor is not None or grid.ceiling is not None:
        low = grid.floor if grid.floor is not None else LOWEST
        x = F.hardtanh(x, low, -LOWEST if grid.ceiling is None else grid.ceiling)
    if not fmt.signed:
        point -= 128
        spec = spec.replace(format="int8", symmetric=False, learned=None)
    codes = _ops.quantize_per_tensor.tensor(x, scale, torch.full((), point, dtype=torch.int32), -128, 127, torch.int8)
    return QuantizedTensor(codes, scale, point, spec, None, x.dtype)


def _dequantize(self: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    point = torch.full((), int(self.zero_point or 0), dtype=torch.int32)
    return _ops.dequantize_per_tensor.tensor(self.codes, self.scale, point, -128, 127, torch.int8)


def _product(self: QuantizedModule, x: QuantizedTensor, weight: Any, geometry: Any = None) -> Tensor:
    state = self._buffers
    w = _ops.dequantize_per_channel(state[CODES], state[SCALE], state[POINT], 0, -128, 127, torch.int8)
    if geometry is None:
        return F.linear(x.dequantize(), w, state[BIAS])
    convolve = F.conv1d if geometry.dims == 1 else F.conv2d
    return convolve(x.dequantize(), w, state[BIAS], geometry.stride, geometry.padding, geometry.dilation,
                    geometry.groups)


def _embed(self: QuantizedEmbedding, input: Tensor) -> Any:
    if self.plan.weight is None:
        return _EMBED(self, input)
    codes, scales = self.get_buffer(CODES), self.get_buffer(SCALE)
    rows, scale = F.embedding(input, codes), F.embedding(input, scales.unsqueeze(1))
    return self.finish(rows.to(torch.float32) * scale)


_EMBED = QuantizedEmbedding.forward


@contextmanager
def _patterns() -> Iterator[None]:
    """All modules of this package compute in the pattern that XNNPACK fuses, inside the block."""
    replaced: list[tuple[Any, str, Any]] = [
        (ste, "quantize", _quantize), (QuantizedTensor, "dequantize", _dequantize),
        (QuantizedModule, "product", _product), (QuantizedModule, "quantized_weight", lambda self: None),
        (LinearProduct, "_serve_one_row", lambda self: None), (QuantizedEmbedding, "forward", _embed),
        (QuantizedAdd, "sum_of_codes", lambda self, a, b: a.dequantize() + b.dequantize())]
    with ExitStack() as stack:
        stack.enter_context(table.use("reference"))         # no shortcut around the products
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


# ------------------------------------------------------------------------------------------------------- the graph


def _fix_scales(graph: torch.fx.GraphModule) -> None:
    """Scales and zero points of activations as numbers in the graph, and biases as whole steps of them."""
    for node in list(graph.graph.nodes):
        for tensors, numbers in ((_ops.quantize_per_tensor.tensor, _ops.quantize_per_tensor.default),
                                 (_ops.dequantize_per_tensor.tensor, _ops.dequantize_per_tensor.default)):
            if node.target is tensors:
                x, scale, point, *rest = node.args
                node.args = (x, float(_value(graph, scale)), int(_value(graph, point)), *rest)
                node.target = numbers
    steps: dict[str, float] = {}
    for node in graph.graph.nodes:
        if node.target is not _ops.dequantize_per_channel.default:
            continue
        layer = node.args[0].target.removesuffix(CODES)
        for product in node.users:
            x, bias = product.args[0], product.args[2] if len(product.args) > 2 else None
            if not isinstance(bias, torch.fx.Node):
                continue
            step = x.args[1]
            if steps.setdefault(layer, step) != step:
                raise UnsupportedError(f"{layer[:-1]}: it is called with inputs on different grids, and its bias has "
                                       "one; give each call a layer of its own")
    for layer, step in steps.items():
        owner = graph.get_submodule(layer[:-1])
        _round_bias(layer[:-1], owner, step)
    for node in list(graph.graph.nodes):
        if node.target is _ops.dequantize_per_tensor.default:
            for reader in list(node.users)[1:]:         # fused kernels take away that of their own
                with graph.graph.inserting_after(node):
                    reader.replace_input_with(node, graph.graph.node_copy(node, lambda n: n))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _value(graph: torch.fx.GraphModule, node: Any) -> Any:
    """What a node computes from nothing but constants."""
    if not isinstance(node, torch.fx.Node):
        return node
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(graph.get_submodule(owner), name)
    if node.op != "call_function" or not callable(node.target):
        raise UnsupportedError("a scale is computed from the inputs: XNNPACK's int8 kernels have static ranges")
    args, kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), lambda a: _value(graph, a))
    return node.target(*args, **kwargs)


def _round_bias(name: str, owner: nn.Module, step: float) -> None:
    """Make the bias the float32 numbers that XNNPACK's serializer turns into the steps that the layer adds.

    Raises:
        OverflowBoundError: there are none.
    """
    codes, scale, bias = (owner._buffers[part] for part in (CODES, SCALE, BIAS))
    assert codes is not None
    assert scale is not None
    assert bias is not None
    dead = ~codes.flatten(1).any(1)
    fine = bias.abs() / step / DEAD_STEPS
    scale = torch.where(dead & (fine > torch.finfo(torch.float32).tiny), fine, scale)
    grid = scale * step
    steps = (bias / grid).round()
    made = steps * grid
    for candidate in (torch.nextafter(made, torch.full_like(made, torch.inf)),
                      torch.nextafter(made, torch.full_like(made, -torch.inf)), bias):
        made = torch.where(torch.round(made * (1 / grid)) == steps, made, candidate)
    wrong = (torch.round(made * (1 / grid)) != steps) | (steps.abs() >= 2**30)
    if wrong.any():
        worst = int(wrong.nonzero()[0])
        raise OverflowBoundError(
            f"{name}: the bias {float(bias[worst]):g} of channel {worst} is {float(steps[worst]):.3g} steps of "
            f"scale_x * scale_w = {float(grid[worst]):.3g}, which the file cannot hold exactly; widen the scale of "
            "that channel's weights (per_tensor, or clip the batch norm's gain)")
    owner._buffers[SCALE], owner._buffers[BIAS] = scale, made


def _drop_unused(graph: torch.fx.GraphModule) -> None:
    """Forget parameters and buffers that the graph does not read: the file would hold them."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(remove_duplicate=False),
                                *graph.named_buffers(remove_duplicate=False)) if n not in used]:
        owner, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(owner), attribute)


def _partitioner() -> XnnpackPartitioner:
    """XNNPACK's partitioner, with products, sums and the quantizers themselves on int8, all else in floating point.

    It would run what lies between two quantizers on int8 too (ReLU, pooling, concatenation), but those kernels want one
    grid on both sides: with two, they round once more, or the file does not load.
    """
    made = XnnpackPartitioner()
    for config in made.target_partitioner_configs.values():
        if not isinstance(config, (GEMMConfig, AddConfig, QuantizedPerTensorConfig, DeQuantizedPerTensorConfig)):
            config.set_enabled_precision_types([ConfigPrecisionType.FP32])
    return made


def _check_delegated(program: ExportedProgram, modules: Mapping[str, QuantizedModule]) -> None:
    """Refuse a program in which codes of a weight are read by anything but a kernel of XNNPACK.

    Raises:
        UnsupportedError: a layer is left over, by name.
    """
    held = [name.removesuffix(f".{CODES}") for name in program.graph_signature.inputs_to_buffers.values()
            if name.endswith(CODES)]
    left = [name for name in held if not isinstance(modules[name], QuantizedEmbedding)]
    if left:
        raise UnsupportedError(f"{left[0]}: XNNPACK runs a layer on integers only where one quantizer reads its result "
                               f"at once, and nothing else; give it an output: int8 spec, as recipe, changes = "
                               "qat.targets.adjust(recipe, 'executorch') does, or keep: float32 "
                               f"({len(left)} layers: {', '.join(left[:8])})")
