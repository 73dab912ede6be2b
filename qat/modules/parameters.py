"""Parameters that functions read: stacked experts, routers, weights of modules with a forward of their own.

``F.linear(x, self.experts[e])`` has no module to swap. So whoever reads such a parameter gets a
:class:`~qat.modules.views.WeightView` instead, a stand-in that owns no values: indexing and transposing it only move
along the codes, and a matrix product with it runs on integers. Any other function that is given one sees the
dequantized values. Forwards stay as they were written, whether they loop over experts, gather them (``torch.bmm``) or
group their tokens (``torch._grouped_mm``).

    prepared    the view is of the codes of the float parameter, with its straight-through gradient
    deployed    it is of the packed codes; the float parameter is gone
    watched     (by ``prepare``, on the float model) it is of the values, and notes who reads them, and how

Each expert has scales of its own: a parameter (..., out, in) is seen by its quantizer as the matrix (... * out, in).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.kernels import activations, ste, weight_only
from qat.kernels.contract import Geometry, Weight
from qat.modules.adapted import FACTORS, Adapted
from qat.modules.base import LayerPlan, QuantizedModule, quantized_type
from qat.modules.composite import Composite, Part, Source
from qat.modules.views import FLOATING, SIGNATURES, Read, WeightView, dequantized, layout_of, plain, understood
from qat.numerics.tensor import QuantizedTensor

SUFFIX = "_product"
"""A parameter's name with this behind is the name of the part that quantizes it."""


def as_matrix(weight: Tensor, layout: str) -> Tensor:
    """A parameter with output channels first, as its quantizer sees it: (out, in), or a kernel as it is."""
    if layout == "kernel":
        return weight
    weight = weight.transpose(-1, -2) if layout == "columns" else weight
    return weight.reshape(-1, weight.shape[-1])


def _thread() -> int:
    """The thread that runs; what a compiler follows is one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class ParameterPart(Part):
    """The products with one parameter that functions read.

    Attributes:
        full_shape: of the parameter.
    """

    full_shape: tuple[int, ...]
    _shared: dict[int, dict[bool, QuantizedTensor]]     # of the forward that each thread is in

    def __init__(self, owner: nn.Module, name: str, plan: LayerPlan, source: Source) -> None:
        nn.Module.__init__(self)
        self._owner, self.source, self._shared = [owner], source, {}
        self.plan = plan
        self.full_shape = tuple(self.weight.shape)
        self.training = owner.training
        self.equip(name, plan)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.frozen:
            owner, attribute = self.owner, self.source.attribute
            if isinstance(owner, Adapted) and attribute == "weight":
                return owner.corrected()
            return owner._parameters[attribute]
        return super().__getattr__(name)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The parameter's shape as (..., out, in)."""
        shape = self.full_shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.plan.layout == "columns" else shape

    def canonical(self, weight: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (..., out, in), or back."""
        return weight.transpose(-1, -2) if self.plan.layout == "columns" else weight

    def weight_matrix(self) -> Tensor:
        return as_matrix(self.weight, self.plan.layout)

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        return self.canonical(matrix.reshape(self.canonical_shape))

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.canonical_shape[-1],) if role == "input" and self.plan.layout in ("rows", "columns") else ()

    @property
    def shows_rows(self) -> bool:
        return self.plan.layout in ("rows", "columns")      # where a convolution looks is not in its input

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        if not self.shows_rows:
            return QuantizedModule.input_rows(self, x)
        return self.float_input(x).reshape(1, -1, self.canonical_shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shared": {}}

    @contextmanager
    def quantized_once(self) -> Iterator[None]:
        """All views that this thread makes inside the block are of one quantization of the parameter."""
        thread = _thread()
        if thread in self._shared:
            yield
            return
        self._shared[thread] = {}
        try:
            yield
        finally:
            del self._shared[thread]

    def quantized_weight(self) -> QuantizedTensor:
        shared = self._shared.get(_thread())
        if shared is None or self.frozen:
            return super().quantized_weight()
        key = torch.is_grad_enabled()
        if key not in shared:
            shared[key] = super().quantized_weight()
        return shared[key]

    def view(self) -> WeightView:
        """What readers of the parameter get."""
        kernel, turned, path = self.plan.layout == "kernel", self.plan.layout == "columns", self.name
        if self.calibrating or self.plan.weight is None:
            return WeightView.of(self, self.canonical(self.float_weight()), turned, kernel, path)
        weight = self.quantized_weight()
        if not kernel:
            weight = self._spread_out(weight)
        return WeightView.of(self, weight, turned, kernel, path, self.float_dtype)

    def _spread_out(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Codes (..., out, in) with scales (..., out, 1 or groups)."""
        shape, matrix = self.canonical_shape, weight.shape

        def spread(value: Tensor) -> Tensor:
            value = value.expand(matrix[0]) if value.dim() == 0 else value
            return value.reshape(*shape[:-1], value.shape[1] if value.dim() == 2 else 1)

        spec, point = weight.spec, weight.zero_point
        spec = spec.replace(granularity="per_channel") if spec.granularity == "per_tensor" else spec
        return replace(ste.rearranged(weight, weight.codes.reshape(shape), lambda g: g.reshape(matrix)),
                       scale=spread(weight.scale), spec=spec,
                       zero_point=spread(point) if isinstance(point, Tensor) else point)

    # ------------------------------------------------------------------------------------------------ reading

    @torch.compiler.disable
    def read(self, func: Any, view: WeightView, args: Any, kwargs: Any) -> Any:
        """``func`` with this parameter among its arguments: on integers if it can be, else of the values."""
        read = understood(func, view, args, kwargs)
        if read is None:
            return func(*plain(args), **plain(kwargs))
        if read.kind == "embedding":
            return self._look_up(read.input, read)
        x = read.rows(read.input)
        if self.plan.weight is not None and read.kind != "convolution" and not read.view.turned:
            return self._of_values(x, read)         # the sum runs over what the scales are for
        return self(x, read)                        # with its hooks, which take rows of inputs

    def forward(self, x: Tensor, read: Read) -> Tensor:  # type: ignore[override]
        """The product that ``read`` describes, with ``x`` for the rows of its activation."""
        content = read.view.content
        if self.calibrating or not isinstance(content, QuantizedTensor) or self.plan.input is None:
            return self._of_values(self.float_input(x), read)
        if read.kind == "convolution":
            return self._convolve(x, content, read)
        if read.kind == "grouped":
            return self._grouped(self.quantized_input(x), content, read.arguments["offs"])
        return read.result(self._multiply(self.quantized_input(x), content, read.vector))

    def _of_values(self, x: Tensor, read: Read) -> Tensor:
        """The product of rows with the values of the weight."""
        if self.calibrating:
            return read.again(read.rows(x))
        if read.kind == "matmul" and read.view.dim() == 2:
            return read.result(weight_only.linear(x, read.view.values().transpose(-1, -2), read.vector))
        return read.again(read.rows(x).contiguous())

    def _multiply(self, x: QuantizedTensor, weight: QuantizedTensor, vector: Tensor | None) -> Tensor:
        """``x @ w.T + vector`` of codes (..., out, in)."""
        if len(weight.shape) == 2:
            y = self._matrix(x, weight, vector)
        elif weight.scale.shape[-1] > 1:            # integer partial sums for each group: matrix by matrix
            y = torch.stack([self._matrix(_taken(x, i), _taken(weight, i), vector) for i in range(len(weight.codes))])
        else:
            dense = replace(weight, spec=weight.spec.replace(granularity="per_tensor"))
            call = activations.Matmul(x, ste.transposed(dense), 1.0, self.backward_type(x))
            y = activations.matmul(call, self.result_dtype(x))
            y = y if vector is None else y + vector
        return y

    def _matrix(self, x: QuantizedTensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """``x @ w.T + b`` for one matrix of codes (out, in)."""
        kernel = None
        grouped, point = weight.spec.granularity == "per_group", weight.zero_point
        scale = weight.scale if grouped else weight.scale.squeeze(-1)
        point = point.squeeze(-1) if isinstance(point, Tensor) and not grouped else point
        flat = replace(weight, scale=scale, zero_point=point)
        if self.frozen:
            codes = flat.codes
            kernel = self._kernel_of(flat, (codes.storage_offset(), tuple(codes.shape), codes.stride())
                                     if self._codes is not None and _same_storage(codes, self._codes.codes) else None)
        call = ste.Product(x, flat, kernel, backward_dtype=self.backward_type(x), whole_bias=self.plan.requantize)
        return ste.product(call, bias, self.result_dtype(x))

    def _kernel_of(self, weight: QuantizedTensor, key: Any) -> Weight | None:
        """The matrix as kernels take it, kept with what they derive from it: each expert is one."""
        if key is None:
            return None
        kept: Any = self._kernel
        if kept is None:
            kept = self._kernel = {}                            # type: ignore[assignment]
        if key not in kept:
            kept[key] = Weight.of(replace(weight, codes=weight.codes.contiguous()), lasting=True)
        return kept[key]

    def _grouped(self, x: QuantizedTensor, weight: QuantizedTensor, ends: Tensor) -> Tensor:
        """x (rows, in), sorted by matrix; matrix i takes the rows up to ``ends[i]``. Rows beyond the last get zeros."""
        rows, pieces, start = x.shape[0], [], 0
        for i, end in enumerate(ends.tolist()):
            if end > start:
                pieces.append(self._matrix(_taken(x, slice(start, end)), _taken(weight, i), None))
                start = end
        if start < rows or not pieces:
            pieces.append(torch.zeros(rows - start, weight.shape[-2], dtype=self.result_dtype(x), device=x.device))
        return torch.cat(pieces)

    def _convolve(self, x: Tensor, weight: QuantizedTensor, read: Read) -> Tensor:
        dims, given = len(weight.shape) - 2, read.arguments
        stride, dilation = (_tuple(given.get(key, 1), dims) for key in ("stride", "dilation"))
        padding, before = given.get("padding", 0), None
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
            before, padding = [t // 2 for t in total], tuple(t - t // 2 for t in total)
        padding = (0,) * dims if padding == "valid" else _tuple(padding, dims)
        single = x.dim() == dims + 1
        codes = self.quantized_input(x.unsqueeze(0) if single else x)
        kernel = self._kernel_of(weight, (tuple(weight.shape),)) if self.frozen else None
        call = ste.Product(codes, weight, kernel, None, Geometry(stride, padding, dilation, given.get("groups", 1)),
                           self.backward_type(codes))
        y = ste.product(call, read.added, self.result_dtype(codes))
        for dim, (left, right) in enumerate(zip(before or padding, padding)):
            y = y.narrow(2 + dim, right - left, y.shape[2 + dim] - (right - left)) if left != right else y
        return y.squeeze(0) if single else y

    def _look_up(self, indices: Tensor, read: Read) -> Tensor:
        content = read.view.content
        if self.calibrating or not isinstance(content, QuantizedTensor) or content.carrier is not None \
                or read.view.turned:
            return read.again(indices)
        flat = indices.reshape(-1)
        rows = dequantized(_taken(content, flat), False, read.view.dtype)
        return rows.reshape(*indices.shape, rows.shape[-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.plan.layout} {self.full_shape}"


def _taken(x: QuantizedTensor, index: Any) -> QuantizedTensor:
    """The codes at ``index`` along the first dimension, with their scales and gradient."""
    point = x.zero_point
    return replace(x, codes=x.codes[index], scale=x.scale[index] if x.scale.dim() else x.scale,
                   zero_point=point[index] if isinstance(point, Tensor) and point.dim() else point,
                   carrier=None if x.carrier is None else x.carrier[index])


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


class QuantizedParameters(Composite):
    """Any module some of whose parameters are quantized although functions read them.

    Its class, its forward and everything else stay; reading one of those parameters gives a :class:`WeightView`.
    """

    is_composite: ClassVar[bool] = False        # its children are called, and have calls of their own
    kind: ClassVar[str] = "Parameters"

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Any = None) -> Any:
        adopted = QuantizedModule.swap.__func__(cls, module, name, plan)       # type: ignore[attr-defined]
        for part, own in plan.parts.items():
            attribute = part.removesuffix(SUFFIX)
            adopted.add_module(part, ParameterPart(adopted, f"{name}.{part}" if name else part, own,
                                                   Source(attribute)))
        return adopted

    def part_macs(self, total: int) -> dict[str, int]:
        """Nothing: calls of functions say it, not calls of the module."""
        return {}

    @torch.compiler.disable
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """A forward quantizes each parameter once, however often it reads it; compilers, which cannot follow stand-ins,
        leave it as it is."""
        blocks = [p.quantized_once() for p in self.parts.values() if isinstance(p, ParameterPart)]
        for block in blocks:
            block.__enter__()
        try:
            return super()._call_impl(*args, **kwargs)
        finally:
            for block in reversed(blocks):
                block.__exit__(None, None, None)

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_modules", {}).get(f"{name}{SUFFIX}")
        if not isinstance(part, ParameterPart) or _is_shared_out(self._parameters.get(name)):
            return super().__getattr__(name)
        return part.view()


def _is_shared_out(parameter: Tensor | None) -> bool:
    """Whether each process has a part of a parameter (a ``DTensor``): between forwards, when only FSDP2 asks for it."""
    return hasattr(parameter, "_local_tensor")


# ------------------------------------------------------------------------------------------------------- watching


@dataclass
class Reading:
    """How a float model reads one of its parameters.

    Attributes:
        layouts: ``rows``, ``columns``, ``kernel`` or ``table``, one for each product that can run on integers.
        floating: other products, by name.
        others: functions that are no products, by name.
        outside: whether something else than the forward of the module that holds it reads it.
        readers: the modules whose forwards read it.
        shape: of the parameter.
    """

    layouts: list[str] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    outside: bool = False
    readers: set[str] = field(default_factory=set)
    shape: tuple[int, ...] = ()

    @property
    def products(self) -> bool:
        """Whether any product reads it."""
        return bool(self.layouts or self.floating)

    @property
    def layout(self) -> str:
        """The layout that most products see; look-ups go along with rows."""
        matrices = [k for k in self.layouts if k != "table"]
        if not matrices:
            return "table" if self.layouts else "rows"
        return max(dict.fromkeys(matrices), key=matrices.count)


class _Watch:
    """Notes each function that reads a parameter."""

    def __init__(self) -> None:
        self.readings: dict[tuple[str, str], Reading] = {}
        self.running: list[str] = []

    def read(self, func: Any, view: WeightView, args: Any, kwargs: Any) -> Any:
        result = func(*plain(args), **plain(kwargs))
        if not any(isinstance(t, Tensor) for t in pytree.tree_leaves(result)):
            return result
        read = understood(func, view, args, kwargs)
        for other in {t.parameter: t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, WeightView)}.values():
            holder, _, attribute = other.parameter.rpartition(".")
            reading = self.readings[holder, attribute]
            if read is not None:
                reading.layouts.append(layout_of(read))
            elif func in FLOATING or func in SIGNATURES:
                reading.floating.append(FLOATING.get(func) or func.__name__)
            else:
                reading.others.append(getattr(func, "__name__", str(func)))
            reading.outside |= holder not in self.running
            reading.readers.add(self.running[-1] if self.running else "")
        return result


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[tuple[str, str], Reading]]:
    """See which functions read the parameters of a float ``model``, of two dimensions and more, inside the block.

    Returns:
        (name of the module, name of its parameter) -> how it was read.
    """
    watch, replaced, handles, closed = _Watch(), [], [], []
    for name, module in model.named_modules():
        quantized = quantized_type(module)
        if quantized is not None and issubclass(quantized, Composite):
            closed.append(name)         # torch reads its weights whole, and so does what takes its place
        if any(name == c or name.startswith(f"{c}." if c else "") for c in closed):
            continue
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.running.append(name)))
        handles.append(module.register_forward_hook(lambda *_, name=name: watch.running.remove(name)))
        corrected = module.corrected().detach() if isinstance(module, Adapted) else None
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and parameter.is_floating_point():
                replaced.append((module, attribute, parameter))
                if corrected is not None and attribute in FACTORS:
                    module._parameters[attribute] = None        # readers see one weight, with its correction in it
                    continue
                watch.readings[name, attribute] = Reading(shape=tuple(parameter.shape))
                seen = parameter.detach() if corrected is None or attribute != "weight" else corrected
                module._parameters[attribute] = WeightView.of(
                    watch, seen, parameter=f"{name}.{attribute}" if name else attribute, ghost=seen)
    try:
        yield watch.readings
    finally:
        for handle in handles:
            handle.remove()
        for module, attribute, parameter in replaced:
            module._parameters[attribute] = parameter
