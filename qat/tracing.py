"""Who feeds whom: the calls a model makes, found by running it, or symbolically where there are no example inputs.

The rewriter needs it to fold batch norms, absorb activation functions and pass codes from layer to layer; coverage
needs it to see matrix products that are called as functions, and to count multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from qat.numerics.tensor import QuantizedTensor

Key = tuple[int, int]

PRODUCTS: dict[Any, str] = {
    F.linear: "linear", torch.matmul: "matmul", Tensor.matmul: "matmul", Tensor.__matmul__: "matmul",
    Tensor.__rmatmul__: "matmul", torch.mm: "mm", Tensor.mm: "mm", torch.bmm: "bmm", Tensor.bmm: "bmm",
    torch.mv: "mv", Tensor.mv: "mv", torch.addmm: "addmm", Tensor.addmm: "addmm", torch.baddbmm: "baddbmm",
    Tensor.baddbmm: "baddbmm", torch.einsum: "einsum", F.bilinear: "bilinear", F.embedding: "embedding",
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
    F.multi_head_attention_forward: "multi_head_attention_forward",
    F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d", F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d", F.conv_transpose3d: "conv_transpose3d",
    **({torch._grouped_mm: "_grouped_mm"} if hasattr(torch, "_grouped_mm") else {}),
    **({F.grouped_mm: "grouped_mm"} if hasattr(F, "grouped_mm") else {}),
}
"""Functions that multiply matrices, or look rows up; coverage lists each of their calls."""


@dataclass
class Call:
    """One call of a leaf module or of a function.

    Attributes:
        module: dotted name of the leaf module, or None for a function.
        function: name of the function, or None.
        owner: dotted name of the module whose forward made the call.
        inputs, outputs: keys of the tensors that went in and came out, in order.
        dims: number of dimensions of the first output; 0 if unknown.
        macs: multiply-accumulates of a matrix product.
        parameters: names of the model's parameters among the arguments of a function.
    """

    module: str | None
    function: str | None
    owner: str
    inputs: list[Key]
    outputs: list[Key]
    dims: int = 0
    macs: int = 0
    parameters: list[str] = field(default_factory=list)


@dataclass
class Trace:
    """All calls in order, the keys of the tensors that the model returned, and (of a run) the shapes of all tensors."""

    calls: list[Call] = field(default_factory=list)
    returned: set[Key] = field(default_factory=set)
    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    executed: bool = False

    def of(self, module: str) -> list[Call]:
        """The calls of one module."""
        return [c for c in self.calls if c.module == module]

    def consumers(self, key: Key) -> list[Call | None]:
        """The calls that read a tensor; None stands for the model's caller."""
        readers: list[Call | None] = [c for c in self.calls if key in c.inputs]
        return [*readers, None] if key in self.returned else readers

    def producer(self, key: Key) -> Call | None:
        """The last call that made a tensor (not one that returned its input); None if it came from outside."""
        return next((c for c in reversed(self.calls) if key in c.outputs and key not in c.inputs), None)

    @property
    def functions(self) -> list[Call]:
        return [c for c in self.calls if c.function is not None]


def leaves(values: Any) -> list[Any]:
    """The leaves of nested containers, dataclasses and mappings of any type included."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(values):
        if is_dataclass(leaf) and not isinstance(leaf, type | QuantizedTensor):
            found += leaves([getattr(leaf, f.name) for f in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += leaves(dict(leaf))
        else:
            found.append(leaf)
    return found


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one step: it has no children, or torch runs it whole."""
    return (not any(True for c in module.children() if not getattr(c, "is_quantizer", False))
            or isinstance(module, nn.MultiheadAttention | nn.RNNBase) or getattr(module, "is_composite", False))


class _Recorder(TorchFunctionMode):
    """Records the functions called outside of torch's own leaf modules."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[str] = [""]
        self.silent = 0
        self.numbers = WeakIdKeyDictionary()
        self.count = 0
        self.names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}

    def keys(self, values: Any) -> list[Key]:
        """A number for each tensor (kept without keeping the tensor alive), and its version."""
        found = []
        with torch._C.DisableTorchFunction():
            for t in leaves(values):
                t = t.codes if isinstance(t, QuantizedTensor) else t
                if isinstance(t, Tensor):
                    if t not in self.numbers:
                        self.count += 1
                        self.numbers[t] = self.count
                    found.append((self.numbers[t], 0 if t.is_inference() else t._version))
                    self.trace.shapes[found[-1]] = tuple(t.shape)
        return found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.silent:
            return func(*args, **kwargs)
        inputs = self.keys((args, kwargs))
        result = func(*args, **kwargs)
        outputs = self.keys(result)
        if func in _SHAPES or (not outputs and getattr(func, "__name__", "") in ("__get__", "__set__")):
            return result
        name = PRODUCTS.get(func)
        used = [known for t in pytree.tree_leaves((args, kwargs))
                if (known := getattr(t, "parameter", "") or self.names.get(id(t)))]     # a piece of a parameter, or all
        first = next((t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)), None)
        macs = _function_macs(name, (*args, *kwargs.values()), first) if name else 0
        self.trace.calls.append(Call(
            None, name or f"~{getattr(func, '__name__', func)}", self.stack[-1], inputs, outputs,
            0 if first is None else first.dim(), macs, used))
        return result


_SHAPES = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.stride,
           Tensor.is_contiguous, Tensor.nelement, Tensor.ndimension, Tensor.is_complex, Tensor.is_inference,
           Tensor.element_size, Tensor.storage_offset, Tensor.get_device, Tensor.type}


@contextmanager
def tracing(model: nn.Module, trace: Trace) -> Iterator[Trace]:
    """Record into ``trace`` every call that ``model`` makes inside the block."""
    recorder = _Recorder(trace, model)
    handles = []

    def enter(name: str, leaf: bool, quiet: bool):
        def hook(module, args, kwargs):
            recorder.stack.append(name)
            pending.append(recorder.keys((args, kwargs)) if not recorder.silent else [])
            recorder.silent += quiet
        return hook

    def leave(name: str, leaf: bool, quiet: bool):
        def hook(module, args, kwargs, result):
            recorder.silent -= quiet
            recorder.stack.pop()
            inputs = pending.pop()
            if name == "":
                trace.returned.update(recorder.keys(result))
            if leaf and not recorder.silent:
                first = next((t for t in pytree.tree_leaves(result) if isinstance(t, Tensor | QuantizedTensor)), None)
                trace.calls.append(Call(name, None, name, inputs, recorder.keys(result),
                                        0 if first is None else len(first.shape),
                                        _module_macs(module, args, kwargs, first)))
        return hook

    pending: list[list[Key]] = []
    for name, module in model.named_modules():
        if getattr(module, "is_quantizer", False):
            continue
        leaf = is_leaf(module)
        quiet = leaf and (type(module).__module__.startswith(("torch.", "qat.")) or _is_quantized(module))
        handles.append(module.register_forward_pre_hook(enter(name, leaf, quiet), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name, leaf, quiet), with_kwargs=True))
    try:
        with recorder:
            yield trace
        trace.executed = True
    finally:
        for handle in handles:
            handle.remove()


def uncompiled() -> AbstractContextManager[None]:
    """Compiled models run as they are written, inside the block: whoever looks at layers needs them one by one."""
    return torch.compiler.set_stance("force_eager")


def run(model: nn.Module, inputs: Any) -> Any:
    """Call ``model``, uncompiled, on one batch: a tensor, a tuple or list of arguments, or a dict of keywords."""
    with uncompiled():
        return call(model, inputs)


@dataclass
class Arguments:
    """A batch with positional and keyword arguments, such as what a block inside of a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` on one batch, as :func:`run`."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside the block; every module gets its own mode back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace_by_running(model: nn.Module, inputs: Any) -> Trace:
    """The calls of ``model(inputs)``, in eval, without gradients; the random state is left as it was."""
    trace = Trace()
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(), tracing(model, trace):
        run(model, inputs)
    return trace


class _LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def trace_symbolically(model: nn.Module) -> Trace | None:
    """The calls of ``model`` without running it; None where it cannot be traced (control flow on data)."""
    try:
        with evaluating(model):
            graph = _LeafTracer().trace(model)
    except Exception:
        return None
    trace = Trace()
    names = {n: n for n, _ in model.named_modules(remove_duplicate=False)}
    first = {id(m): n for n, m in reversed(list(model.named_modules(remove_duplicate=False)))}
    modules = dict(model.named_modules(remove_duplicate=False))

    def key(node: torch.fx.Node) -> Key:
        return (id(node), 0)

    for node in graph.nodes:
        inputs = [key(n) for n in node.all_input_nodes]
        if node.op == "call_module" and str(node.target) in names:
            trace.calls.append(Call(first[id(modules[str(node.target)])], None, str(node.target), inputs, [key(node)]))
        elif node.op in ("call_function", "call_method"):
            trace.calls.append(Call(None, f"~{node.target}", "", inputs, [key(node)]))
        elif node.op == "output":
            trace.returned.update(inputs)
    return trace


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "plan") or hasattr(module, "narrow") or hasattr(module, "statistics_frozen")


def _module_macs(module: nn.Module, args: Any, kwargs: Any, first: Any) -> int:
    """Multiply-accumulates of a matmul-like module; 0 for anything else."""
    if first is None:
        return 0
    if isinstance(module, nn.MultiheadAttention):
        return _attention_macs(module, **dict(zip(("query", "key", "value"), args)), **kwargs)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):     # each weight once for each token
        directions = 2 if getattr(module, "bidirectional", False) else 1
        width = (getattr(module, "proj_size", 0) or module.hidden_size) * directions
        names = [n for layer in getattr(module, "_all_weights", [["weight_ih", "weight_hh"]]) for n in layer]
        used = sum(getattr(module, n).numel() for n in names if n.startswith("weight"))
        return math.prod(first.shape) // width * used
    if isinstance(module, nn.Linear):
        return math.prod(first.shape) * module.in_features
    if getattr(module, "is_product", False):                # of two activations: sums along the rows of the first
        return math.prod(first.shape) * args[0].shape[-1]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        taken = next((t for t in pytree.tree_leaves(args) if isinstance(t, Tensor | QuantizedTensor)), None)
        each = module.out_channels // module.groups * math.prod(module.kernel_size)
        return 0 if taken is None else math.prod(taken.shape) * each
    if isinstance(module, nn.modules.conv._ConvNd):
        return math.prod(first.shape) * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    return 0


def _attention_macs(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> int:
    """Four projections, and two products for each pair of a query and a key."""
    width = module.embed_dim
    queries, keys = query.numel() // width, key.numel() // module.kdim
    pairs = queries * key.shape[1 if module.batch_first and key.dim() == 3 else 0]
    return width * (queries * 2 * width + keys * (module.kdim + module.vdim) + 2 * pairs)


def _function_macs(name: str, args: Any, first: Tensor | None) -> int:
    if first is None or name in ("embedding", "einsum"):
        return 0
    tensors = [t for t in args if isinstance(t, Tensor)]
    if name.startswith("conv") and len(tensors) > 1:
        return first.numel() * tensors[1][0].numel()
    if name == "scaled_dot_product_attention":
        return 2 * first.numel() * tensors[1].shape[-2]
    if name in ("addmm", "baddbmm"):
        return first.numel() * tensors[1].shape[-1] if len(tensors) > 1 else 0
    return first.numel() * tensors[0].shape[-1] if tensors else 0
