"""Stand-ins for weights: what a function gets in place of a parameter, and what can be told of its call.

Indexing and transposing a :class:`WeightView` only move along its content; a :class:`Read` describes a call that
multiplies with one. Who answers the other functions, and how products are computed, is the matter of
:mod:`qat.modules.parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from qat.kernels import ste
from qat.numerics.tensor import QuantizedTensor

# ------------------------------------------------------------------------------------------------------- the view


class WeightView(Tensor):
    """A stand-in for a parameter, or for a piece of it, that only its ``reader`` can tell the values of.

    As a tensor it has the right shape, dtype and device; its elements are NaN, so that a function that passes by
    ``__torch_function__`` does not go unnoticed.

    Attributes:
        reader: who answers functions that read values: :meth:`read` of a part, or of those who watch.
        content: the values, or their codes with scales (..., out, 1 or groups); (..., out, in).
        turned: whether the last two dimensions are exchanged, seen from outside.
        kernel: whether it is the kernel of a convolution: (out, in // groups, ...), whatever its other dimensions.
        parameter: dotted name of the parameter.
    """

    reader: Any
    content: Tensor | QuantizedTensor
    turned: bool
    kernel: bool
    parameter: str

    @classmethod
    def of(cls, reader: Any, content: Tensor | QuantizedTensor, turned: bool = False, kernel: bool = False,
           parameter: str = "", dtype: torch.dtype | None = None, ghost: Tensor | None = None) -> WeightView:
        if ghost is None:
            shape = (*content.shape[:-2], *content.shape[:-3:-1]) if turned else content.shape
            ghost = torch.full((), torch.nan, dtype=dtype or content.dtype, device=content.device).expand(shape)
        view: WeightView = ghost.as_subclass(cls)
        view.reader, view.content, view.turned, view.kernel, view.parameter = reader, content, turned, kernel, parameter
        return view

    def moved(self, content: Tensor | QuantizedTensor, turned: bool | None = None, kernel: bool | None = None,
              dtype: torch.dtype | None = None) -> WeightView:
        """Another piece of the same parameter."""
        return WeightView.of(self.reader, content, self.turned if turned is None else turned,
                             self.kernel if kernel is None else kernel, self.parameter, dtype or self.dtype)

    def values(self) -> Tensor:
        """The values in floating point, with their gradient."""
        content = self.content
        if isinstance(content, QuantizedTensor):        # laid out alike, whether the codes were packed or not
            content = dequantized(content, self.kernel, self.dtype).contiguous()
        return content.transpose(-1, -2) if self.turned else content.to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        view = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, cls))
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        moved = _move(view, func, args[1:], kwargs) if args and args[0] is view else None
        return view.reader.read(func, view, args, kwargs) if moved is None else moved


def dequantized(content: QuantizedTensor, kernel: bool, dtype: torch.dtype) -> Tensor:
    """The values of codes whose scales have the dimensions of the codes (for kernels: the scales of a weight)."""
    if kernel:
        return content.dequantize(dtype)
    groups = content.scale.shape[-1]
    if groups == 1:
        return replace(content, spec=content.spec.replace(granularity="per_column", group_size=None)).dequantize(dtype)
    shape = content.codes.shape
    blocks = (*shape[:-1], groups, shape[-1] // groups)
    parted = ste.rearranged(
        replace(content, spec=content.spec.replace(granularity="per_column", group_size=None)),
        content.codes.reshape(blocks), lambda g: g.reshape(shape), content.scale.unsqueeze(-1),
        content.zero_point.unsqueeze(-1) if isinstance(content.zero_point, Tensor) else content.zero_point)
    return parted.dequantize(dtype).reshape(shape)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps",
        "is_xpu", "is_sparse", "is_quantized", "is_leaf", "grad", "grad_fn", "itemsize", "nbytes", "is_nested")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    Tensor.stride, Tensor.storage_offset, Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.get_device,
    Tensor.is_inference, Tensor.data_ptr,
    torch.is_floating_point, torch.is_complex, torch.numel, Tensor.is_shared, Tensor.is_pinned, Tensor.__hash__,
}
_TURNS = {"t", "transpose", "swapaxes", "swapdims", "permute", "adjoint"}
_TURNING = {Tensor.T.__get__, Tensor.mT.__get__}                   # type: ignore[attr-defined]
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous"}


def _move(view: WeightView, func: Any, args: Any, kwargs: Any) -> Any:
    """The view, or views, that ``func`` makes of one; None if it is not a matter of moving."""
    name = getattr(func, "__name__", "")
    if name in _TURNS or func in _TURNING:
        sizes = (2, 3, 5, 7, 11, 13)[: view.dim()]                 # all different: the result says what was exchanged
        turned = func(torch.empty(sizes, device="meta"), *args, **kwargs).shape
        if turned == sizes:
            return view.moved(view.content)
        return view.moved(view.content, not view.turned) if turned == (*sizes[:-2], *sizes[:-3:-1]) else None
    if name in _CASTS:
        with torch._C.DisableTorchFunctionSubclass():
            cast = func(view, *args, **kwargs)
        if not isinstance(cast, Tensor) or cast.device != view.device or not cast.is_floating_point():
            return None
        return view.moved(view.content, dtype=cast.dtype)
    if name in ("squeeze", "unsqueeze"):
        return _reshaped_kernel(view, func, args, kwargs)
    pieces: Callable[..., Any] | None = _PIECES.get(name)
    return None if pieces is None else pieces(view, *args, **kwargs)


def _reshaped_kernel(view: WeightView, func: Any, args: Any, kwargs: Any) -> WeightView | None:
    """A kernel (out, 1, size) that loses its dimension of one, or gets it back; the output channels stay in front."""
    whole = isinstance(view.content, Tensor) and view.dim() > 2 and not view.turned
    if not (view.kernel or whole):
        return None
    content = view.content
    shape = func(content if isinstance(content, Tensor) else content.codes, *args, **kwargs).shape
    if shape[0] != content.shape[0] or content.shape[0] == 1:
        return None
    if isinstance(content, Tensor):
        return view.moved(content.reshape(shape), kernel=True)
    before = content.shape
    return view.moved(ste.rearranged(content, content.codes.reshape(shape), lambda g: g.reshape(before)))


def _piece(view: WeightView, index: Any) -> WeightView | None:
    """``view[index]``, where the last two dimensions stay: whole matrices, and slices of their rows and columns."""
    steps = list(index) if isinstance(index, tuple) else [index]
    if any(s is None or isinstance(s, bool | list) or (isinstance(s, Tensor) and (s.is_floating_point()
           or s.dtype == torch.bool)) for s in steps) or view.kernel:
        return None
    if any(s is Ellipsis for s in steps):
        at = next(i for i, s in enumerate(steps) if s is Ellipsis)
        steps[at : at + 1] = [slice(None)] * (view.dim() - len(steps) + 1)
    steps += [slice(None)] * (view.dim() - len(steps))
    if len(steps) < 2 or not all(isinstance(s, slice) for s in steps[-2:]) \
            or sum(isinstance(s, Tensor) and s.dim() > 0 for s in steps) > 1:
        return None
    if view.turned:
        steps[-2:] = steps[:-3:-1]
    content, where = view.content, tuple(steps)
    if isinstance(content, Tensor):
        return view.moved(content[where])
    if content.scale.shape[-1] > 1 and where[-1] != slice(None):
        return None                                                # groups cut in two
    coarse = (*where[:-1], slice(None))
    point = content.zero_point
    return view.moved(replace(
        content, codes=content.codes[where], scale=content.scale[coarse],
        zero_point=point[coarse] if isinstance(point, Tensor) else point,
        carrier=None if content.carrier is None else content.carrier[where]))


def _along(view: WeightView, dim: int, step: Any) -> WeightView | None:
    return _piece(view, (*[slice(None)] * (dim % view.dim()), step))


def _parts_along(view: WeightView, sizes: list[int], dim: int) -> tuple[WeightView, ...] | None:
    found, start = [], 0
    for size in sizes:
        piece = _along(view, dim, slice(start, start + size))
        if piece is None:
            return None
        found.append(piece)
        start += size
    return tuple(found)


def _split(view: WeightView, size: Any, dim: int = 0) -> tuple[WeightView, ...] | None:
    length = view.shape[dim]
    sizes = list(size) if isinstance(size, tuple | list) else [min(size, length - i) for i in range(0, length, size)]
    return _parts_along(view, sizes, dim)


def _chunk(view: WeightView, chunks: int, dim: int = 0) -> tuple[WeightView, ...] | None:
    return _split(view, -(-view.shape[dim] // chunks), dim)


def _unbind(view: WeightView, dim: int = 0) -> tuple[WeightView, ...] | None:
    found = [_along(view, dim, i) for i in range(view.shape[dim])]
    return None if any(v is None for v in found) else tuple(v for v in found if v is not None)


def _reshape(view: WeightView, *shape: Any) -> WeightView | None:
    """Rows in another order of dimensions, seen from outside: (experts * rows, columns) as (experts, rows, columns)."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    with torch._C.DisableTorchFunctionSubclass():
        new = tuple(torch.empty(view.shape, device="meta").reshape(sizes).shape)
    if view.kernel or len(new) < 2 or view.dim() < 2 or new[-1] != view.shape[-1] or (view.turned and view.dim() > 2):
        return None
    content = view.content

    def rearrange(value: Tensor) -> Tensor:
        """Values, codes or scales: (..., out, in, or groups of it, or 1)."""
        if not view.turned:
            return value.reshape(*new[:-1], value.shape[-1])
        lead = new[:-2]                                            # the inputs are divided among the matrices
        if value.shape[-1] == 1:
            return value.expand(*lead, *value.shape)
        return value.reshape(value.shape[0], *lead, value.shape[-1] // math.prod(lead)).movedim(0, -2)

    if isinstance(content, Tensor):
        return view.moved(rearrange(content))
    if view.turned and content.scale.shape[-1] > 1 and content.scale.shape[-1] % math.prod(new[:-2]):
        return None                                                # groups cut in two
    point = content.zero_point
    return view.moved(replace(
        content, codes=rearrange(content.codes), scale=rearrange(content.scale),
        zero_point=rearrange(point) if isinstance(point, Tensor) else point,
        carrier=None if content.carrier is None else rearrange(content.carrier)))


_PIECES: dict[str, Callable[..., Any]] = {
    "__getitem__": _piece, "select": _along, "index_select": _along, "unbind": _unbind, "split": _split,
    "chunk": _chunk, "view": _reshape, "reshape": _reshape,
    "narrow": lambda view, dim, start, length: _along(view, dim, slice(start, start + length)),
}

# ------------------------------------------------------------------------------------------------------- products


@dataclass
class Read:
    """One call of a function with a weight.

    Attributes:
        func, args, kwargs: the function and its arguments.
        arguments: the same by name.
        view: the weight; where the product is a matrix one, as it stands there: (..., in, out).
        x: name of the activation (of a look-up: of the indices) among the arguments.
        kind: ``matmul``, ``grouped``, ``convolution`` or ``embedding``.
        bias: name of what is added to the product; None: nothing is.
        left: whether the weight is the left operand.
    """

    func: Any
    args: Any
    kwargs: Any
    arguments: dict[str, Any]
    view: WeightView
    kind: str
    x: str = "input"
    bias: str | None = None
    left: bool = False

    @property
    def input(self) -> Tensor:
        """The activation, as it comes."""
        return self.arguments[self.x]

    @property
    def added(self) -> Tensor | None:
        return None if self.bias is None else self.arguments.get(self.bias)

    @property
    def vector(self) -> Tensor | None:
        """What is added, where it is one number for each output of the weight."""
        added = self.added
        fits = added is not None and not self.left and tuple(added.shape) == (self.view.shape[-1],)
        return added if fits else None

    def rows(self, x: Tensor) -> Tensor:
        """The activation (..., in), which is (..., in, columns) where the weight is the left operand; or back."""
        return x.transpose(-1, -2) if self.left else x

    def result(self, y: Tensor) -> Tensor:
        """What the function returns, of the product with :meth:`rows` and :attr:`vector`."""
        y = y.transpose(-1, -2).contiguous() if self.left else y     # in the order of the float product, for views
        return y if self.added is None or self.vector is not None else y + self.added

    def again(self, x: Tensor) -> Tensor:
        """The function on values, with ``x`` for the activation."""
        own = self.input
        args, kwargs = pytree.tree_map(lambda t: x if t is own else t, (self.args, self.kwargs))
        return self.func(*plain(args), **plain(kwargs))


_OPERANDS, _CONVOLUTION = ("input", "other"), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_GROUPED = ("input", "other", "offs", "bias", "out_dtype")
SIGNATURES: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.linear: ("linear", ("input", "weight", "bias")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
                    ("matmul", _OPERANDS)),
    Tensor.__rmatmul__: ("matmul", ("other", "input")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), ("added", ("bias", *_OPERANDS))),
    **{f: ("grouped", _GROUPED) for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f},
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), ("convolution", _CONVOLUTION)),
    F.embedding: ("embedding", ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
                                "sparse")),
}
"""Functions whose products run on integers: their kind, and the names of their arguments."""
FLOATING = {torch.einsum: "einsum", F.bilinear: "bilinear", torch.mv: "mv", Tensor.mv: "mv",
            F.conv_transpose1d: "conv_transpose1d", F.conv_transpose2d: "conv_transpose2d",
            F.conv_transpose3d: "conv_transpose3d",
            F.multi_head_attention_forward: "multi_head_attention_forward"}
"""Other products: they are made in floating point, of the dequantized weight."""


def plain(values: Any) -> Any:
    """``values`` with the values of each view in its place."""
    return pytree.tree_map(lambda t: t.values() if isinstance(t, WeightView) else t, values)


def understood(func: Any, view: WeightView, args: Any, kwargs: Any) -> Read | None:
    """``func`` as a product with ``view`` that can run on integers; None if it is none."""
    if func not in SIGNATURES:
        return None
    kind, names = SIGNATURES[func]
    aliases = {"mat2": "other", "mat_b": "other", "mat_a": "input", "self": "input", "tensor2": "other",
               "batch1": "input", "batch2": "other", "mat1": "input"}
    given = {**dict(zip(names, args)), **{aliases.get(k, k): v for k, v in kwargs.items()}}
    if set(given) - set(names) or sum(isinstance(t, WeightView) for t in pytree.tree_leaves(given)) != 1:
        return None                     # alpha, beta, out; two weights

    def read(seen: WeightView, kind: str, **more: Any) -> Read:
        return Read(func, args, kwargs, given, seen, kind, **more)

    turned = view.moved(view.content, not view.turned)
    if "weight" in names:
        if given.get("weight") is not view:
            return None
        if kind == "linear":
            return read(turned, "matmul", bias="bias") if view.dim() == 2 and not view.kernel else None
        if kind == "convolution":
            return read(view, kind, bias="bias") if not view.turned else None
        return read(view, kind) if view.dim() == 2 and given.get("max_norm") is None else None
    if view.kernel or "other" not in given or not 2 <= view.dim() <= 3:
        return None
    left = given["input"] is view
    x = given["other" if left else "input"]
    if not isinstance(x, Tensor):
        return None
    if kind == "grouped":
        plain = given.get("bias") is None and given.get("out_dtype") is None and given.get("offs") is not None
        return read(view, kind) if plain and not left and (x.dim(), view.dim()) == (2, 3) else None
    if x.dim() < (2 if left else 1) or (view.dim() == 3 and x.dim() != 3):
        return None
    return read(turned if left else view, "matmul", x="other" if left else "input",
                bias="bias" if kind == "added" else None, left=left)


def layout_of(read: Read) -> str:
    """How the parameter lies: ``rows`` (..., out, in), ``columns`` (..., in, out), ``kernel`` or ``table``.

    Of the view of a float parameter, whose ``content`` is taken to be (..., out, in).
    """
    if read.kind in ("convolution", "embedding"):
        return "kernel" if read.kind == "convolution" else "table"
    return "rows" if read.view.turned else "columns"
