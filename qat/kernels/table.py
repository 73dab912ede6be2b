"""Which backend runs: an ordered table that can be printed and overridden.

    >>> from qat.kernels import table
    >>> with table.use("reference"):          # everything on the reference backend, inside this block
    ...     pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from qat.errors import UnsupportedError, nearest
from qat.kernels.backends import COLUMNS, FLOAT, INT_MM, ONEDNN, REFERENCE, Backend
from qat.kernels.contract import LASTING, Activation, Geometry, Weight

BACKENDS: dict[str, Backend] = {b.name: b for b in (REFERENCE, ONEDNN, INT_MM, COLUMNS, FLOAT)}


@dataclass(frozen=True)
class Entry:
    """One line of the table: on ``device``, for ``op``, where ``when`` holds, ``backend`` runs if it supports it.

    ``when`` is given the operands: activation and weight, or two activations for ``matmul``.
    """

    op: str
    device: str
    backend: str
    why: str
    when: Callable[[Any, Any], bool] = lambda x, w: True


LARGE_MATRIX = 3 * 2**16
"""Multiply-accumulates from which one ``torch._int_mm`` a matrix beats a batched float product (measured: 64**3 does
not, 128 * 32 * 128 does by two, 256 * 64 * 256 by seven)."""

FEW_ROWS = 4
"""Rows up to which sums of columns beat one int8 product for each group of inputs that share a scale. (Against a single
int8 product they lose: 0.41 against 0.14 ms for one row and 5632 x 2048, where AVX512 has VNNI.)"""

TABLE: list[Entry] = [
    Entry("linear", "cpu", "int_mm", "one row: a matrix-vector kernel",
          lambda x, w: x.values.shape[0] == 1 and x.fixed),
    Entry("linear", "cpu", "int_mm", "weights that change: nothing to pack", lambda x, w: not w.lasting),
    Entry("linear", "cpu", "onednn", "frozen weights, packed once; rescale fused"),
    Entry("linear", "cpu", "int_mm", "zero points for each row"),
    Entry("linear", "cuda", "int_mm", "int8 tensor cores"),
    Entry("linear", "*", "float", "exact in floating point"),
    Entry("convolution", "cpu", "onednn", "fused int8 kernel"),
    Entry("convolution", "cuda", "int_mm", "unfolded, int8 tensor cores"),
    Entry("convolution", "*", "float", "exact in floating point"),
    Entry("matmul", "cpu", "int_mm", "two activations, each matrix large enough for a call of its own",
          lambda a, b: a.values.shape[-2] * a.values.shape[-1] * b.values.shape[-1] >= LARGE_MATRIX),
    Entry("matmul", "cuda", "int_mm", "two activations, large matrices on int8 tensor cores",
          lambda a, b: a.values.shape[-2] * a.values.shape[-1] * b.values.shape[-1] >= 256**3),
    Entry("matmul", "*", "float", "two activations, batched, exact in floating point"),
]
"""First match that supports the operands runs. Insert an :class:`Entry` at the front to override."""

_forced: list[str] = []


def overridden() -> bool:
    """Whether a backend is forced by :func:`use` right now."""
    return bool(_forced)



@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run everything inside the block on one backend.

    Raises:
        UnsupportedError: an unknown name; or, when a layer runs, operands that the backend does not support.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"unknown backend {backend!r}{nearest(backend, BACKENDS)}; known: {', '.join(BACKENDS)}")
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def choose_matmul(a: Activation, b: Activation) -> Backend:
    """The backend that multiplies these two activations."""
    return _first("matmul", a, b, lambda backend: backend.supports_matmul(a, b))


def choose(op: str, x: Activation, w: Weight, geometry: Geometry | None = None) -> Backend:
    """The backend that runs ``op`` (``linear`` or ``convolution``) on these operands.

    Weights that last remember the choice for each shape.
    """
    key = (op, geometry, x.values.shape, x.values.dtype, x.zero_point if x.fixed else "tensor", len(TABLE))
    if w.lasting and not _forced and key in w.chosen:
        return w.chosen[key]
    backend = _choose(op, x, w, geometry)
    if w.lasting and not _forced and len(w.chosen) < 64:
        w.chosen[key] = backend
    return backend


def _choose(op: str, x: Activation, w: Weight, geometry: Geometry | None) -> Backend:
    def supports(backend: Backend) -> bool:
        return backend.supports_linear(x, w) if geometry is None else backend.supports_convolution(x, w, geometry)

    return _first(op, x, w, supports)


def _first(op: str, x: Activation, w: Weight | Activation, supports: Callable[[Backend], bool]) -> Backend:
    """The first entry of the table that serves these operands; the forced backend, if there is one."""
    if _forced:
        backend = BACKENDS[_forced[-1]]
        if not supports(backend):
            other = w if isinstance(w, Weight) else w.values
            raise UnsupportedError(f"backend {backend.name} does not support this {op}: activations "
                                   f"{x.values.dtype} {tuple(x.values.shape)} on {x.values.device}, "
                                   f"{'weight' if isinstance(w, Weight) else 'and'} {other.dtype} {tuple(other.shape)}")
        return backend
    device = x.values.device.type
    for entry in TABLE:
        if entry.op == op and entry.device in (device, "*") and entry.when(x, w):
            backend = BACKENDS[entry.backend]
            if supports(backend):
                return backend
    return REFERENCE


def linear(x: Activation, w: Weight, multiplier: Tensor, bias: Tensor | None) -> Tensor:
    """``float32(acc) * multiplier + bias`` for ``x.values`` (rows, in) and ``w.levels`` (out, in)."""
    if opaque():
        return torch.ops.qat.linear(*_as_tensors(x, w), multiplier, bias)
    return choose("linear", x, w).linear(x, w, multiplier, bias)


def convolution(x: Activation, w: Weight, geometry: Geometry, multiplier: Tensor, bias: Tensor | None) -> Tensor:
    """``float32(acc) * multiplier + bias`` for ``x.values`` (batch, in, *spatial)."""
    if opaque():
        return torch.ops.qat.convolution(*_as_tensors(x, w), geometry.stride, geometry.padding, geometry.dilation,
                                         geometry.groups, multiplier, bias)
    return choose("convolution", x, w, geometry).convolution(x, w, geometry, multiplier, bias)


def matmul(a: Activation, b: Activation, multiplier: Tensor) -> Tensor:
    """``float32(acc) * multiplier`` for ``a.values`` (..., m, k) and ``b.values`` (..., k, n)."""
    if opaque():
        return torch.ops.qat.matmul(*_pieces(a), *_pieces(b), multiplier)
    return choose_matmul(a, b).matmul(a, b, multiplier)


# ------------------------------------------------------------------------------ one opaque operator for compilers


def opaque() -> bool:
    """Whether a product is one operator to whoever traces now: to compilers; to an exporter that forces no backend."""
    return torch.compiler.is_compiling() and not (torch.compiler.is_exporting() and bool(_forced))


def _as_tensors(x: Activation, w: Weight) -> tuple[Tensor, Tensor | None, int, int, Tensor, int, int]:
    """The operands as arguments that a compiled graph can carry."""
    return (*_pieces(x), w.levels, w.bound, w.handle)


def _pieces(x: Activation) -> tuple[Tensor, Tensor | None, int, int]:
    offsets = x.zero_point if isinstance(x.zero_point, Tensor) else None
    return x.values, offsets, 0 if offsets is not None else int(x.zero_point or 0), x.bound


def _as_activation(values: Tensor, offsets: Tensor | None, zero_point: int, bound: int) -> Activation:
    return Activation(values, offsets if offsets is not None else (zero_point or None), bound)


def _as_operands(values: Tensor, offsets: Tensor | None, zero_point: int, bound: int, levels: Tensor, level_bound: int,
                 handle: int) -> tuple[Activation, Weight]:
    return _as_activation(values, offsets, zero_point, bound), LASTING.get(handle) or Weight(levels, level_bound)


@custom_op("qat::linear", mutates_args=())
def _linear(values: Tensor, offsets: Tensor | None, zero_point: int, bound: int, levels: Tensor, level_bound: int,
            handle: int, multiplier: Tensor, bias: Tensor | None) -> Tensor:
    x, w = _as_operands(values, offsets, zero_point, bound, levels, level_bound, handle)
    return choose("linear", x, w).linear(x, w, multiplier, bias)


@_linear.register_fake
def _(values, offsets, zero_point, bound, levels, level_bound, handle, multiplier, bias):
    return values.new_empty((values.shape[0], levels.shape[0]), dtype=torch.float32)


@custom_op("qat::convolution", mutates_args=())
def _convolution(values: Tensor, offsets: Tensor | None, zero_point: int, bound: int, levels: Tensor, level_bound: int,
                 handle: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
                 multiplier: Tensor, bias: Tensor | None) -> Tensor:
    x, w = _as_operands(values, offsets, zero_point, bound, levels, level_bound, handle)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y = choose("convolution", x, w, geometry).convolution(x, w, geometry, multiplier, bias)
    return y.contiguous(memory_format=_memory_format(values))


@_convolution.register_fake
def _(values, offsets, zero_point, bound, levels, level_bound, handle, stride, padding, dilation, groups, multiplier,
      bias):
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    size = (values.shape[0], levels.shape[0], *geometry.output_size(values.shape, levels.shape))
    return values.new_empty(size, dtype=torch.float32).contiguous(memory_format=_memory_format(values))


@custom_op("qat::matmul", mutates_args=())
def _matmul(a: Tensor, a_offsets: Tensor | None, a_zero_point: int, a_bound: int, b: Tensor, b_offsets: Tensor | None,
            b_zero_point: int, b_bound: int, multiplier: Tensor) -> Tensor:
    left, right = _as_activation(a, a_offsets, a_zero_point, a_bound), _as_activation(b, b_offsets, b_zero_point,
                                                                                      b_bound)
    return choose_matmul(left, right).matmul(left, right, multiplier).contiguous()


@_matmul.register_fake
def _(a, a_offsets, a_zero_point, a_bound, b, b_offsets, b_zero_point, b_bound, multiplier):
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=torch.float32)


def _memory_format(values: Tensor) -> torch.memory_format:
    """channels_last for activations that are, else contiguous."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if values.dim() == dims and values.is_contiguous(memory_format=memory_format) and not values.is_contiguous():
            return memory_format
    return torch.contiguous_format


def describe() -> str:
    """The table as text, one line an entry."""
    return "\n".join(f"{e.op:<12} {e.device:<5} {e.backend:<10} {e.why}" for e in TABLE)
