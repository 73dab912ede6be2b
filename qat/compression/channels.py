"""Structured pruning: whole channels leave a float model, and its layers really get smaller.

A channel can only leave everywhere at once: the layer that makes it, the batch norms and depthwise convolutions it
passes, every layer that reads it, and what it is added to. :class:`Dependencies` finds these groups from a traced run
(:mod:`qat.tracing`); removing a channel then is the same as multiplying it by zero wherever it is read. That is proven
on the example inputs before anything is changed, and a group for which it does not hold is left as it is, and said.

Importance of a channel: the squared norms of all weights that make or read it, each tensor relative to its mean, times
the squared gain of batch norms on the way (the group norm of Fang et al. 2023, DepGraph).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qat.compression.pruning import Pruning
from qat.errors import PruneError, nearest
from qat.modules.base import QuantizedModule
from qat.modules.functional import Add, Concat
from qat.rewriter import check_open, is_prepared
from qat.tracing import Call, Key, Trace, evaluating, leaves, run, trace_by_running

Conv = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd
Norm = nn.modules.batchnorm._NormBase

POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Threshold,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)
SPATIAL_MODULES: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)
"""Modules that treat each channel alone."""
ALONE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus",
    "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "clamp", "clamp_min", "clamp_max", "abs", "neg", "exp", "sqrt", "rsqrt", "square", "contiguous", "clone", "detach",
    "to", "float", "half", "bfloat16", "double", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "interpolate", "pad", "mean", "sum", "amax", "amin", "std", "var",
}
"""Functions of one tensor that treat each channel alone (means and sums: over the dimensions behind it)."""
TOGETHER = {"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "div", "idiv", "rdiv", "truediv",
            "itruediv", "rtruediv", "maximum", "minimum", "pow"}
"""Functions that combine tensors channel by channel."""
RESHAPES = {"flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten"}
JOINS = {"cat", "concat", "concatenate"}


class Axis:
    """The channels of one producer, or of several that are added up: they leave together (a union-find node)."""

    def __init__(self, size: int, maker: str) -> None:
        self.size, self.makers, self.reason = size, [maker], ""
        self.parent = self

    def root(self) -> Axis:
        node = self
        while node.parent is not node:
            node.parent = node.parent.parent
            node = node.parent
        return node

    def join(self, other: Axis) -> None:
        own, other = self.root(), other.root()
        if own is not other:
            other.parent = own
            own.makers += other.makers
            own.reason = own.reason or other.reason

    def hold(self, reason: str) -> None:
        """Leave these channels alone."""
        root = self.root()
        root.reason = root.reason or reason


Segments = tuple[tuple[Axis, int], ...]
"""What lies along a dimension: axes one after another, each channel ``repeat`` places wide (flattened pixels)."""


@dataclass(frozen=True)
class Layout:
    """Dimension ``dim`` of a tensor holds these channels."""

    dim: int
    segments: Segments

    def hold(self, reason: str) -> None:
        for axis, _ in self.segments:
            axis.hold(reason)


@dataclass(frozen=True)
class Binding:
    """Dimension ``dim`` of a module's tensor follows these channels; ``role``: ``makes``, ``reads`` or ``passes``."""

    module: str
    tensor: str
    dim: int
    segments: Segments
    role: str


@dataclass
class Dependencies:
    """Which dimensions of which tensors belong together, found from who feeds whom.

    Attributes:
        axes: everything that a layer makes.
        bindings: the tensors to cut.
    """

    model: nn.Module
    trace: Trace
    axes: list[Axis] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.made: dict[tuple[str, str], Axis] = {}
        self.layouts: dict[Key, Layout] = {}
        self.slots: dict[tuple[int, int], Segments] = {}
        self.inside = {call.owner for call in self.trace.functions}
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for call in self.trace.calls:
            self.visit(call)
        for key in self.trace.returned:
            if key in self.layouts:
                self.layouts[key].hold("the model returns them")
        for call in self.trace.functions:
            read = {id(self.parameters[p]) for p in call.parameters}
            for (tensor, _), segments in self.slots.items():
                if tensor in read:
                    Layout(0, segments).hold(f"{str(call.function).lstrip('~')} reads the weight as a function")

    # ---------------------------------------------------------------- calls

    def visit(self, call: Call) -> None:
        if call.module is None:
            self.function(call)
            return
        module = self.modules[call.module]
        source = self.layouts.get(call.inputs[0]) if call.inputs else None
        if isinstance(module, nn.Linear | Conv | nn.Embedding):
            self.layer(call, module, source)
        elif isinstance(module, Norm):
            self.norm(call, module, source)
        elif isinstance(module, nn.PReLU):
            if source is not None and module.num_parameters > 1:
                self.bind(call.module, "weight", 0, source.segments, "passes")
            self.passes(call, source)
        elif isinstance(module, Add):
            self.together(call)
        elif isinstance(module, Concat):
            self.join(call)
        elif isinstance(module, nn.Flatten | nn.Unflatten):
            self.reshape(call)
        elif isinstance(module, POINTWISE_MODULES + SPATIAL_MODULES):
            self.passes(call, source)
        elif call.module not in self.inside:     # else its functions were seen one by one
            self.hold(call, f"{type(module).__name__} {call.module} mixes them")

    def function(self, call: Call) -> None:
        name = str(call.function).lstrip("~").strip("_")
        sources = [k for k in call.inputs if k in self.layouts]
        if not sources:
            return
        if name in ALONE or (name in TOGETHER and len(call.inputs) == 1):
            self.passes(call, self.layouts[sources[0]])
        elif name in TOGETHER:
            self.together(call)
        elif name in JOINS:
            self.join(call)
        elif name in RESHAPES:
            self.reshape(call)
        else:
            self.hold(call, f"{name} in {call.owner or 'the model'} mixes them")

    def hold(self, call: Call, reason: str) -> None:
        for key in call.inputs:
            if key in self.layouts:
                self.layouts[key].hold(reason)

    def opaque(self, call: Call, reason: str) -> None:
        """Neither what this layer reads nor what it makes can leave."""
        assert call.module is not None
        self.hold(call, reason)
        if (call.module, "out") not in self.made:
            module: Any = self.modules[call.module]
            made = self.made[call.module, "out"] = Axis(
                next(getattr(module, k) for k in ("out_features", "out_channels", "embedding_dim")
                     if hasattr(module, k)), call.module)  # fmt: skip
            made.hold(reason)
            self.axes.append(made)

    def layer(self, call: Call, module: Any, source: Layout | None) -> None:
        assert call.module is not None
        shape, out = self.trace.shapes[call.inputs[0]], call.outputs[0]
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            self.opaque(call, f"the weight of {call.module} is computed by a hook or parametrization")
            return
        transposed = isinstance(module, Transposed)
        groups = module.groups if isinstance(module, Conv) else 1
        inner, outer = {True: (0, 1), False: (1, 0)}[transposed or isinstance(module, nn.Embedding)]
        spatial = len(module.kernel_size) if isinstance(module, Conv) else 0
        along = len(shape) - spatial - 1
        if source is not None and source.dim != along:
            source.hold(f"{call.module} does not read them along its inputs")
            source = None
        if groups > 1:
            if source is None or groups != module.in_channels:
                self.opaque(call, f"{call.module} is a grouped convolution" if source is not None else
                            f"{call.module} follows the channels of its input, which stay")
                return
            each = module.out_channels // groups                # depthwise: each channel makes ``each`` of its own
            wide = tuple((axis, repeat * each) for axis, repeat in source.segments)
            if transposed:
                self.bind(call.module, "weight", 0, source.segments, "passes")
            else:
                self.bind(call.module, "weight", 0, wide, "passes")
            self.bind(call.module, "bias", 0, wide, "passes")
            self.layouts[out] = Layout(along, wide)
            return
        if source is not None:
            self.bind(call.module, "weight", inner, source.segments, "reads")
        made = self.made.get((call.module, "out"))
        if made is None:
            made = self.made[call.module, "out"] = Axis(module.weight.shape[outer], call.module)
            self.axes.append(made)
        self.bind(call.module, "weight", outer, ((made, 1),), "makes")
        self.bind(call.module, "bias", 0, ((made, 1),), "makes")
        result = len(self.trace.shapes[out]) - 1 - spatial
        self.layouts[out] = Layout(result, ((made, 1),))

    def norm(self, call: Call, module: Any, source: Layout | None) -> None:
        """Batch and instance norms: a gain, an offset and statistics for each channel."""
        if source is None:
            return
        assert call.module is not None
        if source.dim != 1 and not (isinstance(module, nn.modules.instancenorm._InstanceNorm) and source.dim == 0):
            source.hold(f"{call.module} normalizes another dimension")
            return
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            self.bind(call.module, tensor, 0, source.segments, "passes")
        self.passes(call, source)

    def passes(self, call: Call, source: Layout | None) -> None:
        """Each channel stays where it is; what lies behind it may shrink or vanish."""
        if source is None or not call.outputs:
            return
        before, after = self.trace.shapes[call.inputs[0]], self.trace.shapes[call.outputs[0]]
        if before[: source.dim + 1] != after[: source.dim + 1]:
            source.hold(f"{call.function or call.module} reduces over them".replace("~", ""))
            return
        for key in call.outputs:
            self.layouts[key] = source

    def together(self, call: Call) -> None:
        """Tensors combined place by place, broadcast from the right."""
        out = len(self.trace.shapes[call.outputs[0]])
        known = [(self.layouts[k], self.trace.shapes[k]) for k in call.inputs if k in self.layouts]
        if not known:
            return
        places = {layout.dim - len(shape) for layout, shape in known}
        if len(places) > 1:
            self.hold(call, f"{call.function or call.module} combines different dimensions of them".replace("~", ""))
            return
        place = places.pop()
        first = known[0][0]
        for layout, _ in known[1:]:
            self.unify(first.segments, layout.segments, "combined with channels that are arranged in another way")
        for key in call.inputs:
            shape = self.trace.shapes[key]
            if key not in self.layouts and len(shape) >= -place and shape[place] != 1:
                first.hold("combined with a tensor that is no layer's output")
        self.layouts[call.outputs[0]] = Layout(out + place, first.segments)

    def join(self, call: Call) -> None:
        """A concatenation: along the channels it lines them up, along another dimension they are the same ones."""
        shapes = [self.trace.shapes[k] for k in call.inputs]
        known = [self.layouts.get(k) for k in call.inputs]
        total = self.trace.shapes[call.outputs[0]]
        dims = {layout.dim for layout in known if layout is not None}
        dim = dims.pop() if len(dims) == 1 else None
        if dim is None:
            self.hold(call, "concatenated along different dimensions")
            return
        segments: list[tuple[Axis, int]] = []
        if sum(shape[dim] for shape in shapes) == total[dim] and len(shapes) > 1:
            for layout, shape in zip(known, shapes, strict=True):
                foreign = Axis(shape[dim], "")
                foreign.hold("they come from outside")
                segments += layout.segments if layout is not None else ((foreign, 1),)
        else:
            layouts = [layout for layout in known if layout is not None]
            for layout in layouts[1:]:
                self.unify(layouts[0].segments, layout.segments, "joined with channels arranged in another way")
            if len(layouts) < len(shapes):
                layouts[0].hold("joined with a tensor that is no layer's output")
            segments = list(layouts[0].segments)
        self.layouts[call.outputs[0]] = Layout(dim, tuple(segments))

    def reshape(self, call: Call) -> None:
        """Row-major: find the dimension that now holds the channels, with all or none of what lay behind them."""
        source = self.layouts.get(call.inputs[0])
        if source is None:
            return
        before, after = self.trace.shapes[call.inputs[0]], self.trace.shapes[call.outputs[0]]
        front = math.prod(before[: source.dim])
        for dim in range(len(after)):
            if math.prod(after[:dim]) != front:
                continue
            width = 1
            for taken in range(source.dim, len(before)):
                width *= before[taken]
                if after[dim] == width and width >= before[source.dim]:
                    each = width // before[source.dim]
                    segments = tuple((axis, repeat * each) for axis, repeat in source.segments)
                    self.layouts[call.outputs[0]] = Layout(dim, segments)
                    return
        source.hold(f"{call.function or call.module} splits them".replace("~", ""))

    # ---------------------------------------------------------------- bookkeeping

    def bind(self, name: str, tensor: str, dim: int, segments: Segments, role: str) -> None:
        """Tie a dimension of a tensor to channels; where it is tied already, these are the same channels."""
        value = self.modules[name]._parameters.get(tensor)
        value = self.modules[name]._buffers.get(tensor) if value is None else value
        if value is None:
            return
        old = self.slots.setdefault((id(value), dim), segments)
        if old is not segments:
            self.unify(old, segments, f"{name} reads different channels at different times")
        binding = Binding(name, tensor, dim, segments, role)
        if not any(b.module == name and b.tensor == tensor and b.dim == dim for b in self.bindings):
            self.bindings.append(binding)

    def unify(self, a: Segments, b: Segments, reason: str) -> None:
        if [(axis.size, repeat) for axis, repeat in a] == [(axis.size, repeat) for axis, repeat in b]:
            for (one, _), (other, _) in zip(a, b, strict=True):
                one.join(other)
        else:
            Layout(0, a + b).hold(reason)

    def groups(self) -> list[Axis]:
        """The roots, in the order they were found."""
        return list(dict.fromkeys(axis.root() for axis in self.axes))

    def tensor(self, binding: Binding) -> Tensor:
        module = self.modules[binding.module]
        value = module._parameters.get(binding.tensor)
        found = module._buffers[binding.tensor] if value is None else value
        assert found is not None
        return found

    def importance(self, group: Axis) -> Tensor:
        """One figure for each channel of the group; see the head of the file. Float32, on the CPU."""
        norms, gains = torch.zeros(group.size), torch.ones(group.size)
        seen: set[tuple[int, int]] = set()
        for binding in self.bindings:
            value = self.tensor(binding).detach()
            if (id(self.tensor(binding)), binding.dim) in seen or binding.tensor != "weight":
                continue
            seen.add((id(self.tensor(binding)), binding.dim))
            squares = value.float().cpu().square().movedim(binding.dim, 0).reshape(value.shape[binding.dim], -1).sum(1)
            start = 0
            for axis, repeat in binding.segments:
                length = axis.size * repeat
                if axis.root() is group:
                    each = squares[start:start + length].reshape(axis.size, repeat).sum(1)
                    relative = each / each.mean().clamp(min=torch.finfo(torch.float32).tiny)
                    if value.dim() == 1:
                        gains *= relative
                    else:
                        norms += relative
                start += length
        return norms * gains


# ---------------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that leave or stay together: the layers that make them, their number before and after, why they stay."""

    layers: tuple[str, ...]
    before: int
    after: int
    reason: str = ""


@dataclass(frozen=True)
class ChannelReport:
    """What :func:`prune_channels` did, group by group, and what it left as it was and why."""

    groups: tuple[ChannelGroup, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [f"{', '.join(g.layers)}: {g.before} -> {g.after} channels" if not g.reason
                 else f"{', '.join(g.layers)}: {g.before} channels kept: {g.reason}" for g in self.groups]
        return "\n".join([*lines, f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"])


def prune_channels(model: nn.Module, example_inputs: Any, sparsity: float = 0.5, multiple_of: int = 1,
                   exclude: Sequence[str] = (), inplace: bool = False) -> tuple[nn.Module, ChannelReport]:
    """A float model with the least important channels of every group of layers cut out.

    The model gets new, smaller parameters: make the optimizer afterwards. Prepare it like any other model; a deployed
    checkpoint of it loads onto the unpruned skeleton, since its manifest knows the shapes.

    Args:
        model: a float model.
        example_inputs: one batch, on which the model is traced and the result proven.
        sparsity: share of the channels of each group that goes; at least ``multiple_of`` of them stay.
        multiple_of: what stays is a multiple of this (rounded up): 8 or 16 suit vector units.
        exclude: globs on names of layers whose output channels all stay.
        inplace: change ``model`` itself.

    Raises:
        PruneError: the model is prepared, or compiled by TorchScript; no channel can go; a pattern without match; an
            option that means nothing.
    """
    if is_prepared(model) or any(isinstance(m, QuantizedModule) for m in model.modules()):
        raise PruneError("this model is prepared: prune the channels of the float model, then prepare it")
    check_open(model, PruneError)
    Pruning.from_dict({"method": "channels", "sparsity": sparsity, "multiple_of": multiple_of, "exclude": exclude})
    if not inplace:
        model = copy.deepcopy(model)
    found = Dependencies(model, trace_by_running(model, example_inputs))
    names = [name for axis in found.axes for name in axis.makers]
    for pattern in exclude:
        hits = [axis for axis in found.axes if any(fnmatchcase(name, pattern) for name in axis.makers)]
        if not hits:
            raise PruneError(f"exclude: {pattern!r} matches no layer{nearest(pattern, names)}")
        for axis in hits:
            axis.hold("excluded")
    for axis in found.axes:
        if not any(axis.root() is a.root() for b in found.bindings if b.role == "reads" for a, _ in b.segments):
            axis.hold("no layer reads them")
    before = sum(p.numel() for p in model.parameters())
    kept = {group: _kept(found.importance(group), sparsity, multiple_of)
            for group in found.groups() if not group.reason}
    kept = {group: mask for group, mask in kept.items() if not bool(mask.all())}
    if kept and not _proven(found, kept, example_inputs):
        for group in list(kept):
            if not _proven(found, {group: kept[group]}, example_inputs):
                group.hold("without them the rest would compute something else")
                del kept[group]
        if kept and not _proven(found, kept, example_inputs):
            raise PruneError("no set of channels can leave this model without changing what the rest computes: exclude "
                             "layers that read their number of channels in ways that tracing does not see")
    if not kept and sparsity > 0:
        raise PruneError("no channel of this model can go: " + "; ".join(
            f"{', '.join(g.makers)}: {g.reason or 'too few for multiple_of'}" for g in found.groups()))
    _cut(model, found, kept)
    groups = [ChannelGroup(tuple(g.makers), g.size, int(kept[g].sum()) if g in kept else g.size,
                           "" if g in kept else g.reason or "too few to lose one") for g in found.groups()]
    return model, ChannelReport(tuple(groups), before, sum(p.numel() for p in model.parameters()))


def _kept(importance: Tensor, sparsity: float, multiple_of: int) -> Tensor:
    """True for the channels that stay."""
    size = len(importance)
    count = max(1, size - math.floor(size * sparsity + 1e-9))
    count = min(size, -(-count // multiple_of) * multiple_of)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:count]] = True
    return mask


def _along(segments: Segments, kept: Mapping[Axis, Tensor]) -> Tensor:
    """True for the places along a dimension that stay."""
    return torch.cat([kept.get(axis.root(), torch.ones(axis.size, dtype=torch.bool)).repeat_interleave(repeat)
                      for axis, repeat in segments])


def _proven(found: Dependencies, kept: Mapping[Axis, Tensor], inputs: Any) -> bool:
    """Whether the cut model computes what the whole one computes when nobody reads the lost channels."""
    silent, cut = copy.deepcopy(found.model), copy.deepcopy(found.model)
    modules = dict(silent.named_modules())
    with torch.no_grad():
        for b in found.bindings:
            if b.role == "reads":
                weight = modules[b.module]._parameters[b.tensor]
                assert weight is not None
                stays = _along(b.segments, kept).to(weight.device)
                weight.mul_(stays.reshape([-1 if d == b.dim else 1 for d in range(weight.dim())]))
    _cut(cut, found, kept)
    try:
        with evaluating(silent), evaluating(cut), torch.no_grad(), torch.random.fork_rng():
            results = []
            for candidate in (silent, cut):
                torch.manual_seed(0)
                results.append([t for t in leaves(run(candidate, inputs)) if isinstance(t, Tensor)])
    except Exception:  # whatever a model raises when its own idea of its widths no longer holds
        return False
    return len(results[0]) == len(results[1]) and all(_close(a, b) for a, b in zip(*results, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of roundings."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.03
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-6))


def _cut(model: nn.Module, found: Dependencies, kept: Mapping[Axis, Tensor]) -> None:
    """Cut all bound tensors of ``model`` (``found.model`` or a copy of it), in place."""
    modules = dict(model.named_modules())
    plans: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    for b in found.bindings:
        if any(axis.root() in kept for axis, _ in b.segments):
            plans.setdefault(b.module, {}).setdefault(b.tensor, []).append((b.dim, _along(b.segments, kept)))

    def cut(name: str, tensor: str, value: Tensor) -> Tensor:
        for dim, stays in plans[name][tensor]:
            value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
        return value

    _replace(modules, {n: list(t) for n, t in plans.items()}, cut)


def _replace(modules: Mapping[str, nn.Module], tensors: Mapping[str, Iterable[str]],
             make: Callable[[str, str, Tensor], Tensor]) -> None:
    """Give modules smaller tensors, and the attributes that go with them; what was shared stays shared."""
    made: dict[int, Any] = {}
    for name, keys in tensors.items():
        module, shapes = modules[name], {}
        for key in keys:
            store: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            old = store[key]
            if id(old) not in made:
                new = make(name, key, old.detach()).clone(memory_format=_memory_format(old))
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                made[id(made[id(old)])] = made[id(old)]
            store[key] = made[id(old)]
            shapes[key] = list(made[id(old)].shape)
        _set_sizes(module)
        module.__dict__["pruned_shapes"] = module.__dict__.get("pruned_shapes", {}) | shapes


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for dims, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=fmt) and not tensor.is_contiguous():
            return fmt
    return torch.contiguous_format


def _set_sizes(module: nn.Module) -> None:
    """Bring ``out_channels`` and the like in line with the tensors."""
    m: Any = module
    if isinstance(module, Conv):
        shape, depthwise = m.weight.shape, 1 < m.groups == m.in_channels
        each = m.out_channels // m.groups
        if depthwise:
            m.in_channels = m.groups = shape[0] if m.transposed else shape[0] // each
            m.out_channels = m.groups * each
        elif m.transposed:
            m.in_channels, m.out_channels = shape[0], shape[1] * m.groups
        else:
            m.in_channels, m.out_channels = shape[1] * m.groups, shape[0]
    elif isinstance(module, nn.Linear):
        m.out_features, m.in_features = m.weight.shape
    elif isinstance(module, nn.Embedding):
        m.num_embeddings, m.embedding_dim = m.weight.shape
    elif isinstance(module, Norm):
        m.num_features = next(len(t) for t in (m.weight, m.running_mean) if t is not None)
    elif isinstance(module, nn.PReLU):
        m.num_parameters = len(m.weight)


# ---------------------------------------------------------------------------------------------------- shapes on disk


def pruned_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Tensor name -> shape, for everything that :func:`prune_channels` or :func:`take_shapes` has made smaller."""
    return {f"{name}.{key}".lstrip("."): list(shape) for name, module in model.named_modules()
            for key, shape in module.__dict__.get("pruned_shapes", {}).items()}


def take_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Make a freshly built, unpruned model as small as :func:`pruned_shapes` says, in place; its values are not used.

    Raises:
        PruneError: a tensor that this model does not have, or that is smaller already.
    """
    modules = dict(model.named_modules())
    wanted: dict[str, list[str]] = {}
    for full, shape in shapes.items():
        name, _, key = full.rpartition(".")
        module = modules.get(name)
        own = None if module is None else module._parameters.get(key, module._buffers.get(key))
        if own is None:
            raise PruneError(f"the pruned model has a tensor {full!r} that this architecture does not have")
        if len(shape) != own.dim() or not all(type(s) is int and 1 <= s <= o for s, o in zip(shape, own.shape)):
            raise PruneError(f"{full} of shape {tuple(own.shape)} cannot become {tuple(shape)}: give the architecture "
                             "as it was before pruning")
        wanted.setdefault(name, []).append(key)

    def corner(name: str, key: str, value: Tensor) -> Tensor:
        return value[tuple(slice(0, s) for s in shapes[f"{name}.{key}".lstrip(".")])]

    _replace(modules, wanted, corner)
    return model
