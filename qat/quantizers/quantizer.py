"""Quantizers: float tensor in, codes out; or, called like a module, the quantized-dequantized tensor.

    quantizer(x)             a tensor again, with the straight-through gradient: a drop-in fake-quantize module
    quantizer.quantize(x)    a QuantizedTensor: the codes, for the integer kernels

Both use the same observer, the same scale, the same rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.errors import CalibrationError, NotCalibratedError, SpecError
from qat.kernels import ste
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.observers import ChannelMomentsObserver, KeepsPrecision, make_observer


class Quantizer(KeepsPrecision):
    """Base of all quantizers.

    Args:
        spec: completed by ``for_weight()`` or ``for_activation()``.
        shape: shape of the weight; for an activation None, or any shape with its number of columns (``per_column``).

    Attributes:
        own: the spec of the recipe. ``spec``, the one at work, differs from it on a higher rung of a ladder of bit
            widths only.
        name: dotted name in the model, for messages.
        observing: whether ranges move. Set by ``calibrate`` and the schedule; independent of ``train()``/``eval()``.
        floor, ceiling: clamp of an absorbed activation function (ReLU: 0 and None).
        mask: bool, in the shape of the weight: False where the weight is pruned; None: nothing is. A buffer.
        scores: float32, in the shape of the weight: what movement pruning trains; None elsewhere. A parameter.
    """

    is_quantizer = True
    mask: Tensor | None
    scores: nn.Parameter | None

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__()
        self.spec = self.own = spec
        self.shape = shape
        self.name = ""
        self.observing = False
        self.floor: float | None = None
        self.ceiling: float | None = None
        self.register_buffer("mask", None)
        self.register_parameter("scores", None)

    @property
    def is_weight(self) -> bool:
        return self.shape is not None and self.spec.granularity != "per_column"

    @property
    def calibrated(self) -> bool:
        """Whether there is a range to quantize with."""
        return True

    def absorb(self, floor: float | None, ceiling: float | None) -> None:
        """Take over an activation function in front that clamps to ``[floor, ceiling]``."""
        self.floor, self.ceiling = floor, ceiling

    def clamp(self, x: Tensor) -> Tensor:
        """The absorbed activation function alone, in floating point."""
        return x if self.floor is None and self.ceiling is None else x.clamp(self.floor, self.ceiling)

    def masked(self, x: Tensor) -> Tensor:
        """The weight with pruned values at zero, which every grid that holds zero has a code for (level 0)."""
        if self.mask is None:
            return x
        return torch.where(self.mask, x, 0.0) if self.scores is None else _Movement.apply(x, self.scores, self.mask)

    def work_at(self, bits: int | None, afresh: bool = True) -> bool:
        """Work with at least ``bits`` bits for now (a rung of a ladder of bit widths); None: with the spec's own.

        The tensors of the state keep their names and shapes, so a checkpoint of any rung loads.

        Args:
            afresh: forget the range, which belongs to another grid; False where it was loaded for this rung.

        Returns:
            Whether the grid is another now.
        """
        spec = self.own if bits is None else widened(self.own, bits, self.is_weight, self.floor == 0.0)
        changed, self.spec = spec != self.spec, spec
        return changed

    def observe(self, x: Tensor) -> None:
        """Take ``x`` into account for the range."""

    def follow(self, x: Tensor) -> None:
        """Observe ``x`` if the range is to follow the data now.

        What gradient checkpointing computes once more has been seen: in a backward no range moves.
        """
        if self.observing and torch._C._current_graph_task_id() == -1:
            self.observe(x)

    def placing(self, x: Tensor) -> tuple[Tensor, Tensor | int | None, ste.Grid, Tensor | None]:
        """Scale, zero point, grid and learned offset for ``x``: the arguments of :func:`qat.kernels.ste.quantize`.

        Raises:
            NotCalibratedError: there is no range yet.
        """
        raise NotImplementedError

    @property
    def only_places(self) -> bool:
        """Whether :meth:`placing` says all there is to quantizing: then others may do it in a way of their own."""
        return type(self).quantize is Quantizer.quantize and not (self._forward_hooks or self._forward_pre_hooks)

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes of ``x``, with a carrier for the gradient where one is needed.

        Raises:
            NotCalibratedError: there is no range yet.
        """
        x = self.masked(x)
        return ste.quantize(x, *self.placing(x))

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of ``x``, in its shape."""
        return self.quantize(x).codes

    def forward(self, x: Tensor) -> Tensor:
        """``dequantize(quantize(x))`` in the dtype of ``x``, with the straight-through gradient."""
        return self.quantize(x).dequantize(x.dtype)

    def grid(self, **changes: Any) -> ste.Grid:
        return ste.Grid(self.spec, self.floor, self.ceiling, **changes)

    def freeze(self) -> Quantizer:
        """This quantizer without its observer, parameters and history: what a deployed model keeps."""
        return self

    def extra_repr(self) -> str:
        if self.floor is None and self.ceiling is None:
            return f"{self.spec}"
        return f"{self.spec}, absorbs clamp({self.floor}, {self.ceiling})"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A state dict without any of this quantizer's tensors is a float checkpoint: nothing is missing then."""
        own = set(self._parameters) | set(self._buffers)
        known = any(key.startswith(prefix) for key in state_dict)
        if self.is_weight:
            self._match_pruning(state_dict, prefix, known)
        if not own or known:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.loaded()
        else:
            self.restart()

    def _match_pruning(self, state_dict: dict[str, Any], prefix: str, known: bool) -> None:
        """Have a mask and scores where the checkpoint has them; one without them is that of a dense model."""
        empty: dict[str, Any] = {"mask": lambda like: torch.ones_like(like, dtype=torch.bool),
                                 "scores": lambda like: torch.zeros_like(like, dtype=torch.float32)}
        for key, make in empty.items():
            own, stored = getattr(self, key), state_dict.get(prefix + key)
            if own is None and stored is not None:
                assert self.shape is not None
                value = make(torch.empty(self.shape, device=stored.device))
                setattr(self, key, nn.Parameter(value) if key == "scores" else value)
            elif own is not None and stored is None:
                own.data.copy_(make(own.data))
                if known:
                    state_dict[prefix + key] = own.data

    def loaded(self) -> None:
        """Called after a state dict was loaded."""

    def restart(self) -> None:
        """Called when a float checkpoint was loaded: what was derived from the old weights is void."""


class _Movement(torch.autograd.Function):
    """The masked weight; scores get the gradient that a soft mask would (Sanh et al. 2020, movement pruning).

    ``dL/dscores = dL/dmasked * weight``, pruned positions included: so a weight that wants to move away from zero
    comes back.
    """

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight, mask = ctx.saved_tensors
        return torch.where(mask, gradient, 0.0), gradient.float() * weight, None


class DynamicQuantizer(Quantizer):
    """The range of each tensor is taken from the tensor itself: dynamic activations, and weights by ``minmax``.

    It has no state, so a weight's scale follows the weight, and the first forward after ``load_state_dict`` is right.
    """

    def placing(self, x: Tensor) -> tuple[Tensor, Tensor | int | None, ste.Grid, Tensor | None]:
        seen = self.clamp(x.detach())
        scale, zero_point = dynamic_qparams(seen, self.spec, self.mask)
        return scale, zero_point, self.grid(clipped=not self.is_weight and not self._covers()), None

    def _covers(self) -> bool:
        """Whether the range always holds the tensor, so that nothing is clipped."""
        return self.spec.fmt.grid != "sign" and self.floor is None and self.ceiling is None


def dynamic_qparams(x: Tensor, spec: TensorSpec, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for exactly this tensor; pruned values (``mask`` False) do not count for a mean."""
    if spec.fmt.grid == "sign" or spec.fmt.name == "ternary":
        mean = affine.mean_magnitude(x, spec)
        if mask is not None:
            mean = mean / affine.mean_magnitude(mask.float(), spec).clamp(min=affine.TINY)
        return affine.round_scale(mean, spec), None
    return affine.choose_qparams(*affine.reduce_range(x, spec), spec)


class StaticQuantizer(Quantizer):
    """The range comes from an observer, and stands still unless ``observing``.

    Buffers:
        scale: float32, () or the shape of the weight's scale; NaN until calibrated.
        zero_point: int32 likewise; only for affine specs.
        range_frozen: bool; whether :meth:`freeze_range` was called.
    """

    scale: Tensor
    zero_point: Tensor | None
    range_frozen: Tensor

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None, channels: tuple[int, ...] = ()) -> None:
        super().__init__(spec, shape)
        self.observer = make_observer(spec, shape, channels)
        size = self.observer.low.shape
        self.register_buffer("scale", torch.full(size, torch.nan, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32) if spec.symmetric is False else None)
        self.register_buffer("range_frozen", torch.zeros((), dtype=torch.bool))
        self._fixed_zero_point: int | None = None
        self._calibrated = False
        self.frozen = False

    @property
    def calibrated(self) -> bool:
        return self._calibrated

    def observe(self, x: Tensor) -> None:
        """Take ``x`` into account and derive scale and zero point anew.

        Raises:
            CalibrationError: NaN or infinity in ``x``; the message names the layer.
        """
        if self.frozen or x.numel() == 0:
            return
        try:
            self.observer.observe(self.clamp(x.detach()))
        except CalibrationError as error:
            raise CalibrationError(f"{self.name or 'quantizer'}: {error} in the data observed; remove it, or pass "
                                   "ignore_nonfinite=True to calibrate") from None
        self._calibrated = False

    def settle(self) -> None:
        """Derive scale and zero point from what the observer has seen."""
        if self.frozen or self.observer.empty:
            return
        scale, zero_point = self.observer.qparams()
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        self.loaded()

    def place(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor | int | None]:
        """Quantize with this scale and zero point, which somebody else has chosen; the range is frozen with them.

        Returns:
            Both as they are at work: a learned scale is its logarithm's exponential.
        """
        with torch.no_grad():
            self.scale.copy_(scale)
            if self.zero_point is not None and zero_point is not None:
                self.zero_point.copy_(zero_point)
            self.loaded()
            self.freeze_range()
            scale, placed = self.present()
            return scale.detach(), placed

    def freeze_range(self) -> None:
        """Freeze the observer together with its scale, until :meth:`forget`."""
        if not self._calibrated:
            self.settle()
        self.observing, self.frozen = False, True
        self.range_frozen.fill_(True)

    def loaded(self) -> None:
        self.frozen = bool(self.range_frozen)
        self._calibrated = not bool(torch.isnan(self.scale).any())
        if self.zero_point is not None and self.zero_point.dim() == 0:
            self._fixed_zero_point = int(self.zero_point)

    def restart(self) -> None:
        if self.is_weight:
            self.forget()

    def forget(self) -> None:
        """Be as before any range was known."""
        self.observer.reset()
        self.scale.fill_(torch.nan)
        self._calibrated = self.frozen = False
        self.range_frozen.fill_(False)

    def work_at(self, bits: int | None, afresh: bool = True) -> bool:
        """As for every quantizer.

        Raises:
            CalibrationError: the range is frozen, so it cannot be found anew.
        """
        before = self.spec
        if not super().work_at(bits, afresh):
            return False
        if afresh and self.frozen:
            self.spec = before
            raise CalibrationError(f"{self.name or 'quantizer'}: its range is frozen, so its bits stay as they are; "
                                   "freeze ranges after the last rung of the ladder")
        self.follow_spec()
        if afresh:
            self.forget()
        return True

    def follow_spec(self) -> None:
        """Have an observer for another spec with the same buffers."""
        kept, self.observer = self.observer, make_observer(self.spec, self.shape).to(self.scale.device)
        self.observer.load_state_dict(kept.state_dict())

    def placing(self, x: Tensor) -> tuple[Tensor, Tensor | int | None, ste.Grid, Tensor | None]:
        self.follow(x)
        if not self._calibrated:
            if self.is_weight and self.observer.empty:
                self.observe(x)
            self.settle()
        if not self._calibrated:
            raise NotCalibratedError(f"{self.name or 'quantizer'} has no range yet: run qat.calibrate(model, batches) "
                                     "first, or use dynamic: true")
        scale, zero_point = self.scale, self.fixed_zero_point()
        if torch.is_grad_enabled():     # another forward may move the range before the backward of this one has run
            scale = scale.clone()
            zero_point = zero_point.clone() if isinstance(zero_point, Tensor) else zero_point
        return scale, zero_point, self.grid(), None

    def freeze(self) -> Quantizer:
        """A quantizer with this scale and zero point and nothing else.

        Raises:
            NotCalibratedError: there is no range yet.
        """
        if not self._calibrated:
            self.settle()
        if not self._calibrated:
            raise NotCalibratedError(f"{self.name or 'quantizer'} has no range to freeze: run qat.calibrate(model, "
                                     "batches) first")
        scale, zero_point = self.present()
        return FrozenQuantizer.holding(self, scale.detach(), zero_point)

    def present(self) -> tuple[Tensor, Tensor | int | None]:
        """Scale and zero point as they are now."""
        return self.scale, self.fixed_zero_point()

    def fixed_zero_point(self) -> Tensor | int | None:
        """None where it is zero by nature, an int where there is one, else the buffer."""
        return self.zero_point if self._fixed_zero_point is None else self._fixed_zero_point


class FrozenQuantizer(Quantizer):
    """A scale and a zero point that will not change: what is left of any calibrated quantizer after ``convert``.

    ``threshold`` is what is subtracted first (``rsign``), in the shape in which it broadcasts; else None.
    """

    scale: Tensor
    zero_point: Tensor | None
    threshold: Tensor | None

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__(spec, shape)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32) if spec.symmetric is False else None)
        self.register_buffer("threshold", None)
        self._zero_point: Tensor | int | None = None if self.zero_point is None else 0

    @classmethod
    def holding(cls, source: Quantizer, scale: Tensor, zero_point: Tensor | int | None) -> FrozenQuantizer:
        """The frozen form of ``source``."""
        frozen = cls(source.spec, source.shape)
        frozen.name, frozen.floor, frozen.ceiling = source.name, source.floor, source.ceiling
        frozen.training = source.training
        frozen.scale = scale.clone()
        if isinstance(source, ThresholdQuantizer):
            frozen.threshold = source.threshold(scale).detach().clone()
        if frozen.zero_point is not None:
            zero_point = torch.as_tensor(0 if zero_point is None else zero_point, device=scale.device)
            frozen.zero_point = zero_point.to(torch.int32).expand(scale.shape).clone()
        frozen.loaded()
        return frozen

    def loaded(self) -> None:
        zero_point = self.zero_point
        self._zero_point = int(zero_point) if zero_point is not None and zero_point.dim() == 0 else zero_point

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.loaded()
        return self

    def present(self) -> tuple[Tensor, Tensor | int | None]:
        """Scale and zero point."""
        return self.scale, self._zero_point

    @property
    def only_places(self) -> bool:
        return self.threshold is None and not (self._forward_hooks or self._forward_pre_hooks)

    def placing(self, x: Tensor) -> tuple[Tensor, Tensor | int | None, ste.Grid, Tensor | None]:
        return self.scale, self._zero_point, self.grid(), None

    def quantize(self, x: Tensor) -> QuantizedTensor:
        if self.threshold is not None:
            return ste.quantize_above(x, self.threshold, self.scale, ste.Grid(self.spec))
        return super().quantize(x)


class LearnedQuantizer(StaticQuantizer):
    """The scale is trained by gradient (LSQ; LSQ+ with the offset; PACT the upper clip), from the observer's start.

    Parameters:
        log_scale: natural logarithm of the scale, so that the scale is positive by construction.
        offset: the real value of the lowest code (``lsq_plus`` only).

    LSQ's gradient scale ``1 / sqrt(values for each scale * greatest code)`` is applied (Esser et al. 2020).
    """

    log_scale: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None, channels: tuple[int, ...] = ()) -> None:
        super().__init__(spec, shape, channels)
        if spec.scale_dtype != "float32" or spec.power_of_two:
            raise SpecError("a learned scale is free: leave out scale_dtype and power_of_two")
        size = self.scale.shape
        self.log_scale = nn.Parameter(torch.full(size, torch.nan, dtype=torch.float32))
        self.offset = nn.Parameter(torch.zeros(size, dtype=torch.float32)) if spec.learned == "lsq_plus" else None

    def settle(self) -> None:
        super().settle()
        if self._calibrated:
            with torch.no_grad():
                self.log_scale.copy_(self.scale.log())
                if self.offset is not None:
                    assert self.zero_point is not None
                    self.offset.copy_((self.spec.fmt.lo - self.zero_point) * self.scale)

    def loaded(self) -> None:
        super().loaded()
        self._fixed_zero_point = None

    def place(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor | int | None]:
        with torch.no_grad():
            self.log_scale.copy_(scale.log())
        return super().place(scale, zero_point)

    def forget(self) -> None:
        super().forget()
        with torch.no_grad():
            self.log_scale.fill_(torch.nan)

    def present(self) -> tuple[Tensor, Tensor | int | None]:
        """Scale (differentiable) and zero point as they are now.

        Raises:
            NotCalibratedError: the scale has become NaN or infinite in training.
        """
        scale = self.log_scale.float().exp()
        if self.offset is not None:
            fmt = self.spec.fmt
            zero_point = (fmt.lo - self.offset.detach() / scale.detach()).round().clamp(fmt.lo, fmt.hi)
            return scale, int(zero_point) if zero_point.dim() == 0 else zero_point.to(torch.int32)
        return scale, 0 if self.zero_point is not None else None

    def follow(self, x: Tensor) -> None:
        """Only the start of a learned scale comes from what is observed."""
        if not self._calibrated:
            super().follow(x)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor | int | None]:
        """Scale and zero point as they are now, from the observer's start where training has not begun.

        Raises:
            NotCalibratedError: there is nothing to start from.
            CalibrationError: training has made the scale 0, infinite or NaN.
        """
        super().placing(x)
        scale, zero_point = self.present()
        # (a question about values would cut a compiled graph in two)
        if not torch.compiler.is_compiling() and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CalibrationError(f"{self.name}: a learned scale has become 0, infinite or NaN; lower its learning "
                                   "rate")
        return scale, zero_point

    def gradient_factor(self, x: Tensor, sharing: int) -> float:
        """LSQ's ``1 / sqrt(values for each of the ``sharing`` learned numbers * greatest code)``."""
        values = x.numel() / max(1, sharing)
        if not self.is_weight and x.dim() > 0:
            values /= max(1, x.shape[0])
        return 1.0 / math.sqrt(max(1.0, values) * max(abs(self.spec.fmt.lo), self.spec.fmt.hi))

    def placing(self, x: Tensor) -> tuple[Tensor, Tensor | int | None, ste.Grid, Tensor | None]:
        scale, zero_point = self.start(x)
        grid = self.grid(learned=self.spec.learned, scale_gradient=self.gradient_factor(x, scale.numel()))
        return scale, zero_point, grid, self.offset


class ThresholdQuantizer(LearnedQuantizer):
    """Binary activations that learn where each channel changes sign: ``sign(x - threshold) * scale``.

    This is the RSign of ReActNet (Liu et al. 2020) with a scale. After a ReLU, the sign of ``x`` itself is constant and
    carries nothing; here the threshold starts at the channel's mean, inside the positive range. A ReLU (or another
    clamp) in front that is absorbed is dropped altogether: behind a threshold inside its range it decides no sign, and
    without it the values that it cuts off go on learning.

    Parameters:
        log_scale: as in :class:`LearnedQuantizer`.
        channel_threshold: the thresholds in units of the scale, so that one learning rate suits inputs of any size;
            in the shape ``channels``.
    """

    observer: ChannelMomentsObserver

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None, channels: tuple[int, ...] = ()) -> None:
        super().__init__(spec, shape, channels)
        self.channel_threshold = nn.Parameter(torch.zeros(channels))

    def threshold(self, scale: Tensor) -> Tensor:
        """The thresholds in units of the input, float32 (differentiable)."""
        return self.channel_threshold.float() * scale

    def settle(self) -> None:
        super().settle()
        if self._calibrated and self.spec.fmt.grid == "sign":
            with torch.no_grad():
                self.channel_threshold.copy_(self.observer.means() / self.scale)

    def follow_spec(self) -> None:
        self.observer.spec = self.spec

    def quantize(self, x: Tensor) -> QuantizedTensor:
        if self.spec.fmt.grid != "sign":  # a higher rung of a ladder
            return super().quantize(x)
        scale, _ = self.start(x)
        grid = ste.Grid(self.spec, learned="lsq", scale_gradient=self.gradient_factor(x, 1))
        slow = self.gradient_factor(x, self.channel_threshold.numel())
        threshold = ste.scaled_gradient(self.threshold(scale), slow)
        if not bool(torch.isfinite(threshold).all()):
            raise CalibrationError(f"{self.name}: a learned threshold has become infinite or NaN; lower its learning "
                                   "rate")
        return ste.quantize_above(x, threshold, scale, grid)


def widened(spec: TensorSpec, bits: int, weight: bool, positive: bool) -> TensorSpec:
    """``spec`` with at least ``bits`` bits: the grid of a higher rung that is nearest to its own.

    Args:
        weight: whether it is a weight's.
        positive: whether no value is negative (behind an absorbed ReLU).

    >>> widened(TensorSpec("binary", learned="rsign"), 4, weight=False, positive=True).format
    'uint4'

    Raises:
        SpecError: no grid has so many bits.
    """
    fmt = spec.fmt
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SpecError(f"a rung has 1 to 8 bits, not {bits!r}")
    if bits <= fmt.bits:
        return spec
    name = f"int{bits}"
    if fmt.grid == "midrise" or (fmt.grid == "sign" and weight):
        name = f"{name}_midrise" if bits <= (4 if fmt.grid == "midrise" else 2) else name
    if not fmt.signed or (positive and not weight):
        name = f"u{name}"
    observer = spec.observer
    if not weight and (fmt.grid == "sign" or (fmt.name == "ternary" and observer != "mse")):
        observer = "minmax"  # these grids keep no histogram, so their wider forms have none either
    return spec.replace(format=name, observer=observer, learned="lsq" if spec.learned == "rsign" else spec.learned)


def make_quantizer(spec: TensorSpec, shape: torch.Size | None = None, channels: tuple[int, ...] = ()) -> Quantizer:
    """The quantizer a spec asks for.

    Args:
        spec: as written in a recipe; defaults are filled in here (``per_column``: an activation's, filled in already).
        shape: shape of the weight (output channels first); None for an activation; a shape that ends in the number of
            columns for an activation with a scale for each.
        channels: of an activation: the shape in which one number for each channel broadcasts against it, such as
            (in, 1, 1) for the input of a two-dimensional convolution; () where its channels are not known.

    Weights with ``observer: minmax`` follow their weight at every step, unless their range is ``fixed``; other
    observers are searched when observing.
    """
    columns = spec.granularity == "per_column"
    if not columns:
        spec = spec.for_weight() if shape is not None else spec.for_activation()
    if spec.learned == "rsign":
        return ThresholdQuantizer(spec, None, channels)
    if spec.learned:
        return LearnedQuantizer(spec, shape)
    follows = shape is not None and not columns and spec.observer in ("minmax", "moving_average") and not spec.fixed
    if spec.dynamic or follows:
        return DynamicQuantizer(spec, shape)
    return StaticQuantizer(spec, shape)


class FakeQuantize(nn.Module):
    """The fake-quantize observer module every user of this field knows, for anybody's code.

    Args:
        spec: a spec, a dict or a format name: ``FakeQuantize("int8")``.
        observing: whether it follows the data from the start; set the attribute to stop.

    Called on a tensor it returns the quantized-dequantized tensor of the same shape and dtype, with the
    straight-through gradient.

    >>> fake = FakeQuantize({"format": "int8", "symmetric": True})
    >>> fake(torch.tensor([-1.0, 0.0, 0.999]))
    tensor([-0.9961,  0.0000,  0.9961])
    """

    def __init__(self, spec: TensorSpec | dict[str, Any] | str, observing: bool = True) -> None:
        super().__init__()
        self.quantizer = make_quantizer(spec if isinstance(spec, TensorSpec) else TensorSpec.from_dict(spec))
        self.observing = observing

    @property
    def observing(self) -> bool:
        return self.quantizer.observing

    @observing.setter
    def observing(self, on: bool) -> None:
        self.quantizer.observing = on

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of ``x``."""
        return self.quantizer.codes(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)
