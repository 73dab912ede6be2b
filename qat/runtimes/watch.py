"""A deployed model looked at while it runs in torch: the codes at each quantizer, the kernel of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from qat.deploy.convert import outputs
from qat.kernels import requantize, ste, table, weight_only
from qat.kernels.backends import FLOAT
from qat.modules.functional import QuantizedAdd, QuantizedConcat
from qat.modules.linear import QuantizedEmbedding
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.rewriter import quantized_modules
from qat.runtimes.base import Codes, Operator
from qat.tracing import evaluating, run


@dataclass
class Made:
    """What one quantizer made, and of what; ``source`` is None where codes were made of accumulators."""

    layer: str
    tensor: QuantizedTensor
    source: Tensor | None


@dataclass
class Watched:
    """One run of a model: all tensors that it returned, and all codes, those of one tensor on one grid once."""

    outputs: list[Tensor]
    made: list[Made]

    def codes(self) -> list[Codes]:
        return [Codes(m.layer, m.tensor.codes, m.tensor.codes.dtype == torch.uint8) for m in self.made]

    def output_scale(self) -> float | None:
        """The scale of the grid on which the first output is, if it is on one with one scale."""
        first = self.outputs[0]
        for m in reversed(self.made):
            if (m.tensor.scale.dim() == 0 and m.tensor.codes.numel() == first.numel()
                    and torch.equal(m.tensor.dequantize(first.dtype).flatten(), first.flatten())):
                return float(m.tensor.scale) * m.tensor.spec.fmt.unit
        return None


@dataclass
class _Scope:
    """The dotted names of the modules whose forward runs now, innermost last."""

    names: list[str] = field(default_factory=list)

    @property
    def layer(self) -> str:
        return owner_of(self.names[-1] if self.names else "")


def owner_of(name: str) -> str:
    """The module that a quantizer belongs to; any other name as it is.

    >>> owner_of("block.add.input_quantizer"), owner_of("block.add")
    ('block.add', 'block.add')
    """
    head, _, last = name.rpartition(".")
    return head if last.endswith("_quantizer") else name


@contextmanager
def _scopes(model: nn.Module) -> Iterator[_Scope]:
    scope, handles = _Scope(), []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: scope.names.append(name)

    def leave(*_: Any) -> None:
        scope.names.pop()

    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        yield scope
    finally:
        for handle in handles:
            handle.remove()


def watch(deployed: nn.Module, inputs: Any, backend: str | None = None) -> Watched:
    """Run a deployed model on one batch and keep the codes that its quantizers make.

    Args:
        backend: run all products on this one; then no layer takes a short way that makes its codes elsewhere. Codes are
            the same on all backends.
    """
    made: list[Made] = []
    seen: set[Any] = set()
    inside = 0

    def keep(layer: str, source: Tensor | None, codes: Tensor, scale: Tensor, point: Any, spec: TensorSpec,
             *grid: Any) -> None:
        if source is not None:      # ``made`` keeps it alive, so that no other tensor gets its place
            key = (source.data_ptr(), source._version, source.shape, source.stride(), tuple(scale.flatten().tolist()),
                   tuple(point.flatten().tolist()) if isinstance(point, Tensor) else point, str(spec), *grid)
            if key in seen:
                return
            seen.add(key)
        made.append(Made(layer, QuantizedTensor(codes, scale, point, spec), source))

    def watched(true: Callable[..., Any], take: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                result = true(*args, **kwargs)
            finally:
                inside -= 1
            if not inside:
                take(result, *args, **kwargs)
            return result
        return call

    with _scopes(deployed) as scope, ExitStack() as stack:
        takers: list[tuple[Any, str, Callable[..., Any]]] = [
            (ste, "quantize", lambda made, x, scale, point, grid, offset=None: keep(
                scope.layer, x, made.codes, scale, point, grid.spec, grid.floor, grid.ceiling)),
            (requantize, "product", lambda codes, sums, scale, point, grid: keep(
                scope.layer, None, codes, scale, point, grid.spec)),
            (requantize, "addition", lambda codes, a, b, scale, point, grid: keep(
                scope.layer, None, codes, scale, point, grid.spec)),
            (affine, "quantize", lambda codes, x, scale, point, spec: keep(scope.layer, x, codes, scale, point, spec))]
        for owner, name, take in takers:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), take)))
        if backend is not None:
            stack.enter_context(table.use(backend))
        stack.enter_context(evaluating(deployed))
        with torch.no_grad():
            return Watched(outputs(run(deployed, inputs)), made)


def kernels(deployed: nn.Module, inputs: Any) -> list[Operator]:
    """The kernel of every quantized layer that runs on these inputs.

    A layer that multiplies integers carried in floating point (the backend ``float``) is said to have f32 operands.
    Steps of recurrent layers, and linear layers on one row, have a shorter way to the same kernel (``int_mm``).
    """
    found: dict[Operator, int] = {}
    modules = quantized_modules(deployed)
    called: dict[str, None] = {}

    def note(layer: str, operator: str, *operands: str, result: str = "", sums: bool = False) -> None:
        row = Operator(layer, operator, operands, result, 1, sums)
        found[row] = found.get(row, 0) + 1

    with _scopes(deployed) as scope, ExitStack() as stack:
        choose, choose_matmul = table.choose, table.choose_matmul
        product, addition = weight_only.product, requantize.addition

        def chosen(op: str, x: Any, w: Any, geometry: Any = None) -> Any:
            backend = choose(op, x, w, geometry)
            plan = modules[scope.layer].plan if scope.layer in modules else None
            weight = "s8" if plan is None or plan.weight is None else type_of(plan.weight)
            operands = ("f32", "f32") if backend is FLOAT else (kind_of(x.values), weight)
            note(scope.layer, backend.name, *operands)
            return backend

        def chosen_matmul(a: Any, b: Any) -> Any:
            backend = choose_matmul(a, b)
            operands = ("f32", "f32") if backend is FLOAT else (kind_of(a.values), kind_of(b.values))
            note(scope.layer, backend.name, *operands)
            return backend

        def weighed(x: Tensor, w: QuantizedTensor, *rest: Any) -> Tensor:
            note(scope.layer, "weight_only", kind_of(x), type_of(w.spec), result=kind_of(x))
            return product(x, w, *rest)

        def summed(a: QuantizedTensor, b: QuantizedTensor, *rest: Any) -> Tensor:
            codes = addition(a, b, *rest)
            note(scope.layer, "sum of codes", kind_of(a.codes), kind_of(b.codes), result=kind_of(codes), sums=True)
            return codes

        for owner, name, function in ((table, "choose", chosen), (table, "choose_matmul", chosen_matmul),
                                      (weight_only, "product", weighed), (requantize, "addition", summed)):
            stack.enter_context(mock.patch.object(owner, name, function))
        handles = [module.register_forward_hook(lambda *_, name=name: called.setdefault(name))
                   for name, module in modules.items()]
        try:
            with evaluating(deployed), torch.no_grad():
                run(deployed, inputs)
        finally:
            for handle in handles:
                handle.remove()
    recorded = {row.layer for row in found}
    for name in called:
        module, plan = modules[name], modules[name].plan
        if name in recorded:
            continue
        if isinstance(module, QuantizedAdd | QuantizedConcat):
            note(name, "sum" if isinstance(module, QuantizedAdd) else "concatenation", "f32", "f32", sums=True)
        elif isinstance(module, QuantizedEmbedding) and plan.weight is not None:
            note(name, "look-up", type_of(plan.weight))
        elif getattr(module, "_one_row", None) and plan.weight is not None and plan.input is not None:
            note(name, "int_mm", type_of(plan.input), type_of(plan.weight))
    return [Operator(row.layer, row.operator, row.operands, row.result, count, row.sums)
            for row, count in found.items()]


def type_of(spec: TensorSpec) -> str:
    """The type of codes.

    >>> type_of(TensorSpec("uint4"))
    'u4'
    """
    return f"{'s' if spec.fmt.signed else 'u'}{spec.bits}"


KINDS = {torch.uint8: "u8", torch.int8: "s8", torch.int16: "s16", torch.int32: "s32", torch.float32: "f32",
         torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def kind_of(tensor: Tensor) -> str:
    """The type of a tensor's elements, as operators name it."""
    return KINDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


@dataclass
class Difference:
    """Codes of one layer held against each other: the greatest difference, how many differ, of how many."""

    greatest: int = 0
    differing: int = 0
    codes: int = 0

    def take(self, ours: Codes, theirs: Codes) -> None:
        """Add what differs between two tensors of as many codes."""
        shift = 128 * (theirs.unsigned - ours.unsigned)
        gap = (ours.codes.flatten().int() + shift - theirs.codes.flatten().int()).abs()
        self.greatest = max(self.greatest, int(gap.max()) if gap.numel() else 0)
        self.differing += int((gap > 0).sum())
        self.codes += gap.numel()


def differences(ours: Sequence[Codes], theirs: Sequence[Codes]) -> tuple[dict[str, Difference], list[str]]:
    """The codes of a runtime against those of torch, layer by layer; and the layers where that cannot be said.

    A file may quantize a tensor once that torch quantizes for several layers, or twice: equal codes count once there.
    """
    found: dict[str, Difference] = {}
    unknown: list[str] = []
    missing: list[str] = []
    for layer in dict.fromkeys(c.layer for c in theirs):
        a, b = ([c for c in codes if c.layer == layer] for codes in (ours, theirs))
        if len(a) != len(b):
            a, b = _distinct(a), _distinct(b)
        if len(a) != len(b) or any(x.codes.numel() != y.codes.numel() for x, y in zip(a, b)):
            unknown.append(layer)
            continue
        for x, y in zip(a, b):
            found.setdefault(layer, Difference()).take(x, y)
    left = [c for c in ours if c.layer not in found]
    for c in [c for c in theirs if c.layer in unknown]:     # a composite may quantize for its part
        match = next((o for o in left if o.codes.numel() == c.codes.numel() and _related(o.layer, c.layer)), None)
        if match is None:
            missing.append(c.layer)
            continue
        left = [o for o in left if o is not match]
        found.setdefault(c.layer, Difference()).take(match, c)
    return {n: d for n, d in found.items() if n not in missing}, list(dict.fromkeys(missing))


def _related(one: str, other: str) -> bool:
    """Whether one of two modules is inside of the other."""
    short, long = sorted((one, other), key=len)
    return f"{long}.".startswith(f"{short}." if short else "")


def _distinct(codes: Sequence[Codes]) -> list[Codes]:
    kept: list[Codes] = []
    for c in codes:
        if not any(k.codes.shape == c.codes.shape and torch.equal(k.codes, c.codes) for k in kept):
            kept.append(c)
    return kept
