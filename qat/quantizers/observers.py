"""Observers: what they have seen, and the scale and zero point that follow from it.

Every observer keeps its state in buffers whose shapes are final from the start, so state dicts load at any time.

What several processes have seen since they last agreed (``mark``) is merged by two reductions, whose results do not
depend on the order of the processes: a vector by minimum (least values, greatest ones negated), then one by addition
(histograms on a common width, counts, sums). A process that saw nothing adds the neutral element of each::

    extremes = reduce(min, [o.extremes() for o in observers])
    additions = reduce(add, [o.additions(extremes) for o in observers])
    for o in observers: o.merge(extremes, additions)                        # now all are equal, bit for bit

:mod:`qat.calibration.processes` does this with all-reduces.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError, SpecError
from qat.numerics import affine
from qat.numerics.formats import TensorSpec

BINS = 4096
"""Bins of a histogram, symmetric about zero; their width is a power of two."""

CANDIDATES = 100
"""How many clipping ranges a search tries."""


class KeepsPrecision(nn.Module):
    """A module whose own tensors stay in their floating-point type when a model is cast: scales, ranges, histograms."""

    def _apply(self, fn, recurse=True):
        """Move and cast with the model, but without rounding anything of its own."""
        kept = [(store, key, value) for store in (self._buffers, self._parameters)
                for key, value in store.items() if value is not None and value.is_floating_point()]
        kept = [(store, key, value.detach().clone()) for store, key, value in kept]
        super()._apply(fn, recurse)
        for store, key, value in kept:
            moved = store[key]
            if moved is not None and moved.dtype != value.dtype:
                moved.data = value.to(moved.device)
        return self


class Observer(KeepsPrecision):
    """Least and greatest value seen, for each scale.

    Args:
        spec: what the range is for.
        shape: shape of the tensors observed, with the leading dimension that scales follow; None for activations.

    Buffers: ``low`` and ``high``, float32 in the shape of the scale.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__()
        self.spec = spec
        size = affine.scale_shape(shape, spec) if shape is not None else ()
        self.register_buffer("low", torch.full(size, torch.inf, dtype=torch.float32))
        self.register_buffer("high", torch.full(size, -torch.inf, dtype=torch.float32))

    @property
    def empty(self) -> bool:
        """Whether nothing has been seen yet."""
        return bool((self.low > self.high).any())

    def reset(self) -> None:
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take a batch into account. An empty batch changes nothing.

        Raises:
            CalibrationError: NaN or infinity in ``x``.
        """
        if x.numel() == 0:
            return
        low, high = affine.reduce_range(x.detach(), self.spec)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise CalibrationError("NaN or infinity")
        self.update(x.detach(), low, high)

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    @property
    def silent(self) -> bool:
        """Whether everything seen was zero."""
        return not bool(self.low.any() | self.high.any())

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A float checkpoint holds nothing for an observer: nothing is missing then."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for what has been seen."""
        return affine.choose_qparams(self.low, self.high, self.spec)

    aside: ClassVar[tuple[str, ...]] = ()
    """Attributes beside the buffers that change with what is seen."""

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that has been seen, for :meth:`restore`."""
        return ({name: value.clone() for name, value in self._buffers.items() if value is not None},
                {name: copy.copy(getattr(self, name)) for name in self.aside})

    def restore(self, snapshot: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Forget what was seen since the snapshot."""
        buffers, attributes = snapshot
        for name, value in buffers.items():
            getattr(self, name).copy_(value)
        for name, value in attributes.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------- several processes

    def mark(self) -> None:
        """Every process has seen the same until now: what comes from here on is news to the others."""

    def unmark(self) -> None:
        """This process goes on alone: nothing is news any more."""

    @property
    def rounds(self) -> int:
        """How many batches the news holds one by one; 0 where their order does not matter."""
        return 0

    def extremes(self, rounds: int = 0, place: int = 0, places: int = 1) -> Tensor:
        """The news that is merged by minimum: a vector, float64.

        Args:
            rounds: the greatest :attr:`rounds` of all processes.
            place, places: with 0 and 1, the batches that the processes saw in one round count as parts of one batch;
                with the rank and the number of processes, as batches of their own, in the order of the ranks.
        """
        return torch.cat([self.low.flatten(), -self.high.flatten()]).double()

    def additions(self, extremes: Tensor) -> Tensor:
        """The news that is merged by addition: a vector, float64; ``extremes`` are the merged ones."""
        return self.low.new_zeros(0, dtype=torch.float64)

    def merge(self, extremes: Tensor, additions: Tensor) -> None:
        """Take over what all processes have seen, this one included, and :meth:`mark` it."""
        low, high = extremes.chunk(2)
        self.low.copy_(low.view_as(self.low))
        self.high.copy_(-high.view_as(self.high))
        self.mark()


class MovingAverageObserver(Observer):
    """Exponential moving average of each batch's least and greatest value (Jacob et al. 2018)."""

    momentum = 0.1
    aside = ("_news",)
    _base: tuple[Tensor, Tensor] | None = None
    _news: list[tuple[Tensor, Tensor]]

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__(spec, shape)
        self._news = []

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if self._base is not None:
            self._news.append((low, high))
        self.average(low, high)

    def average(self, low: Tensor, high: Tensor) -> None:
        """One step of the average; the first range is its start."""
        if self.empty:
            self.low.copy_(low)
            self.high.copy_(high)
        else:
            self.low.lerp_(low, self.momentum)
            self.high.lerp_(high, self.momentum)

    def mark(self) -> None:
        self._base, self._news = (self.low.clone(), self.high.clone()), []

    def unmark(self) -> None:
        self._base, self._news = None, []

    @property
    def rounds(self) -> int:
        return len(self._news)

    def extremes(self, rounds: int = 0, place: int = 0, places: int = 1) -> Tensor:
        vector = self.low.new_full((rounds, places, 2, self.low.numel()), torch.inf, dtype=torch.float64)
        for index, (low, high) in enumerate(self._news):
            vector[index, place, 0] = low.flatten()
            vector[index, place, 1] = -high.flatten()
        return vector.flatten()

    def merge(self, extremes: Tensor, additions: Tensor) -> None:
        assert self._base is not None
        self.low.copy_(self._base[0])
        self.high.copy_(self._base[1])
        for low, high in extremes.to(self.low.dtype).view(-1, 2, *self.low.shape):
            if not bool(torch.isinf(low).any()):  # else no process had a batch here
                self.average(low, -high)
        self.mark()


class MeanMagnitudeObserver(Observer):
    """``mean |x|`` over everything seen: the scale of sign and ternary grids.

    On every other grid ``2 * mean |x| / sqrt(greatest code)``, where LSQ starts (Esser et al. 2020). ``high`` holds the
    sum, ``low`` the count; float64, so that the order of the batches is lost in rounding the scale.
    """

    aside = ("signs",)
    _base: tuple[Tensor, Tensor] | None = None

    def reset(self) -> None:
        self.low.zero_()
        self.high.zero_()
        self.signs: set[bool] = set()

    @property
    def silent(self) -> bool:
        return not bool(self.high.any())

    @property
    def one_sided(self) -> bool:
        """Whether no value, or every value, seen since the last reset was negative."""
        return len(self.signs) == 1

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__(spec, shape)
        self.low, self.high = self.low.double(), self.high.double()
        self.reset()

    @property
    def empty(self) -> bool:
        return bool((self.low == 0).any())

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.signs |= {bool(s) for s in (x < 0).aminmax()}
        self.high += affine.rows(x.abs(), self.spec).sum(-1, dtype=torch.float64).view_as(self.high)
        self.low += x.numel() // max(1, self.low.numel())

    def mark(self) -> None:
        self._base = self.high.clone(), self.low.clone()

    def extremes(self, rounds: int = 0, place: int = 0, places: int = 1) -> Tensor:
        return -torch.tensor([True in self.signs, False in self.signs], dtype=torch.float64, device=self.low.device)

    def additions(self, extremes: Tensor) -> Tensor:
        assert self._base is not None
        return torch.cat([(now - then).flatten() for now, then in zip((self.high, self.low), self._base)])

    def merge(self, extremes: Tensor, additions: Tensor) -> None:
        assert self._base is not None
        self.signs = {sign for sign, seen in zip((True, False), extremes.tolist()) if seen}
        for buffer, then, news in zip((self.high, self.low), self._base, additions.chunk(2)):
            buffer.copy_(then + news.view_as(then))
        self.mark()

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        fmt = self.spec.fmt
        factor = 1.0 if fmt.grid == "sign" or fmt.name == "ternary" else 2.0 / math.sqrt(fmt.hi)
        return affine.round_scale(self.high / self.low * factor, self.spec), None


class ChannelMomentsObserver(Observer):
    """Mean of each channel, and how far values lie from it: where learned thresholds (``rsign``) start.

    Sums, so that they add up over batches and processes. ``low`` and ``high`` are followed too.

    Args:
        channels: the shape in which one number for each channel broadcasts against what is observed; () for one.

    Buffers: ``count`` (), ``total`` and ``squares`` (``channels``), float64.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    _base: tuple[Tensor, ...] | None = None

    def __init__(self, spec: TensorSpec, channels: tuple[int, ...] = ()) -> None:
        super().__init__(spec)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(channels, dtype=torch.float64))

    def reset(self) -> None:
        super().reset()
        for buffer in (self.count, self.total, self.squares):
            buffer.zero_()

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        super().update(x, low, high)
        values = x.float()  # squares of 24 bits, so that float64 sums keep them whole, in any order
        self.count += x.numel() // max(1, self.total.numel())
        self.total += values.double().sum_to_size(self.total.shape)
        self.squares += values.square().double().sum_to_size(self.squares.shape)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self.count, self.total, self.squares

    def mark(self) -> None:
        self._base = tuple(s.clone() for s in self.sums)

    def additions(self, extremes: Tensor) -> Tensor:
        assert self._base is not None
        return torch.cat([(now - then).flatten() for now, then in zip(self.sums, self._base)])

    def merge(self, extremes: Tensor, additions: Tensor) -> None:
        assert self._base is not None
        for buffer, then, news in zip(self.sums, self._base, additions.split([s.numel() for s in self.sums])):
            buffer.copy_(then + news.view_as(then))
        super().merge(extremes, additions)

    def means(self) -> Tensor:
        """float32, in the shape ``channels``: behind a ReLU they lie inside the positive range."""
        return (self.total / self.count.clamp(min=1)).float()

    def variances(self) -> Tensor:
        count = self.count.clamp(min=1)
        return (self.squares / count - (self.total / count).square()).clamp(min=0)

    @property
    def one_sided(self) -> bool:
        """Whether all values of each channel were equal, so that no threshold can tell them apart."""
        return not self.empty and not bool((self.variances() > 1e-12 * self.squares / self.count).any())

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """The mean distance from the channel's mean, were the values normally distributed.

        On a wider grid, where a ladder of bit widths begins, the range of everything.
        """
        if self.spec.fmt.grid != "sign":
            return super().qparams()
        spread = self.variances().mean() * (2 / math.pi)
        return affine.round_scale(spread.sqrt().float(), self.spec), None


class HistogramObserver(Observer):
    """A histogram with bins of a power-of-two width about zero; when values outgrow it, pairs of bins are merged.

    So histograms of different batches or processes add up exactly, in any order. For one scale only.
    """

    histogram: Tensor
    width: Tensor

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__(spec, shape)
        if self.low.dim():
            raise SpecError(f"observer {spec.observer} keeps one histogram: it needs granularity: per_tensor "
                            f"(weights: minmax or mse)")
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("width", torch.zeros((), dtype=torch.float32))

    _base: tuple[Tensor, float] | None = None

    def reset(self) -> None:
        super().reset()
        self.histogram.zero_()
        self.width.zero_()

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        super().update(x, low, high)
        reach = float(torch.maximum(-low, high))
        least = max(reach / (BINS // 2), affine.TINY)       # what underflows would have no width
        needed = float(torch.ldexp(torch.ones(()), torch.frexp(torch.tensor(least))[1]))
        if float(self.width) == 0.0:
            self.width.fill_(needed)
        self.widen(needed)
        index = (x.float() / self.width).floor_().add_(BINS // 2).clamp_(0, BINS - 1).long()
        self.histogram += torch.bincount(index.reshape(-1), minlength=BINS).to(self.histogram.dtype)

    def widen(self, width: float) -> None:
        """Make the bins at least ``width`` wide."""
        self.histogram.copy_(_widened(self.histogram, float(self.width), width))
        self.width.clamp_(min=width)

    def mark(self) -> None:
        self._base = self.histogram.clone(), float(self.width)

    def extremes(self, rounds: int = 0, place: int = 0, places: int = 1) -> Tensor:
        return torch.cat([super().extremes(), -self.width.double().view(1)])

    def additions(self, extremes: Tensor) -> Tensor:
        assert self._base is not None
        width = -float(extremes[-1])
        return _widened(self.histogram, float(self.width), width) - _widened(*self._base, width)

    def merge(self, extremes: Tensor, additions: Tensor) -> None:
        assert self._base is not None
        width = -float(extremes[-1])
        self.histogram.copy_(_widened(*self._base, width) + additions)
        self.width.fill_(width)
        super().merge(extremes[:-1], additions)

    def centers(self) -> Tensor:
        """The value at the middle of each bin, float64."""
        return (torch.arange(BINS, dtype=torch.float64, device=self.width.device) - BINS // 2 + 0.5) * self.width

    def candidates(self) -> list[tuple[Tensor, Tensor]]:
        """Ranges to try: the whole, and shrunken copies of it."""
        low, high = self.low.clamp(max=0.0), self.high.clamp(min=0.0)
        return [(low * f, high * f) for f in torch.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES).tolist()]

    def best(self, loss) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the candidate range with the least ``loss(scale, zero_point)``."""
        tried = [affine.choose_qparams(low, high, self.spec) for low, high in self.candidates()]
        losses = torch.stack([loss(scale, zero_point) for scale, zero_point in tried])
        return tried[int(losses.argmin())]


def _widened(histogram: Tensor, width: float, target: float) -> Tensor:
    """A histogram with bins of ``target``: while they are narrower, bins 2i and 2i + 1 become one, about one zero.

    Both widths are powers of two; 0 is the width of a histogram that holds nothing.
    """
    while 0.0 < width < target:
        wider = torch.zeros_like(histogram)
        wider[BINS // 4 : BINS // 4 + BINS // 2] = histogram.view(-1, 2).sum(1)
        histogram, width = wider, width * 2
    return histogram


class PercentileObserver(HistogramObserver):
    """The range that holds ``spec.percentile`` percent of the mass, the rest cut off evenly at both ends."""

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        mass = self.histogram.cumsum(0) / self.histogram.sum()
        tail = (1.0 - self.spec.percentile / 100.0) / (2.0 if float(self.low) < 0.0 < float(self.high) else 1.0)
        edges = (torch.arange(BINS, device=self.width.device) - BINS // 2) * self.width
        first = int((mass <= tail).sum()) if float(self.low) < 0.0 else 0
        last = min(int((mass < 1.0 - tail).sum()), BINS - 1) if float(self.high) > 0.0 else BINS - 1
        low = torch.maximum(edges[first], self.low)
        high = torch.minimum(edges[last] + self.width, self.high)
        return affine.choose_qparams(low, high, self.spec)


class HistogramMSEObserver(HistogramObserver):
    """The range with the least mean squared error, searched over the histogram."""

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        values = self.centers().float()

        def loss(scale: Tensor, zero_point: Tensor | None) -> Tensor:
            codes = affine.quantize(values, scale, zero_point, self.spec)
            error = affine.dequantize(codes, scale, zero_point, self.spec) - values
            return (error.double().square() * self.histogram).sum()

        return self.best(loss)


class EntropyObserver(HistogramObserver):
    """The range with the least Kullback-Leibler divergence of the quantized from the seen distribution.

    As TensorRT's calibrator does (Migacz 2017): mass outside the range falls on its ends, and each code spreads its
    mass evenly over the bins that are not empty.
    """

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        seen = self.histogram / self.histogram.sum()
        full = seen > 0
        values = self.centers().float()

        def loss(scale: Tensor, zero_point: Tensor | None) -> Tensor:
            fmt = self.spec.fmt
            free = affine.rounded(values, scale, zero_point, self.spec)
            inside = (free >= fmt.lo) & (free <= fmt.hi)
            codes = (free.clamp(fmt.lo, fmt.hi) - fmt.lo).long()
            kept = seen * inside
            reference = kept.clone()
            for end, lost in ((0, seen[free < fmt.lo].sum()), (-1, seen[free > fmt.hi].sum())):
                reached = inside.nonzero()
                if reached.numel():
                    reference[reached[end]] += lost
            spread = full & inside
            mass = torch.zeros(fmt.values, dtype=seen.dtype, device=seen.device).index_add_(0, codes, kept)
            count = torch.zeros_like(mass).index_add_(0, codes, spread.to(seen.dtype))
            model = torch.where(spread, mass[codes] / count[codes].clamp(min=1), 0.0)
            model = model / model.sum().clamp(min=1e-300)
            terms = torch.where(reference > 0, reference * (reference / model.clamp(min=1e-12)).log(), 0.0)
            return terms.sum()

        return self.best(loss)


class RowMSEObserver(Observer):
    """The range with the least mean squared error for each row of a weight, searched on the weight last seen."""

    def __init__(self, spec: TensorSpec, shape: torch.Size | None = None) -> None:
        super().__init__(spec, shape)
        self.found: tuple[Tensor, Tensor | None] | None = None

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)
        shape = self.low.shape
        best = torch.full(shape, torch.inf, device=x.device)
        scale, zero_point = affine.choose_qparams(low, high, self.spec)
        for factor in torch.linspace(1.0, 0.2, CANDIDATES // 2).tolist():
            tried, offset = affine.choose_qparams(low * factor, high * factor, self.spec)
            codes = affine.quantize(x, tried, offset, self.spec)
            error = affine.dequantize(codes, tried, offset, self.spec) - x.float()
            loss = affine.rows(error.square_(), self.spec).sum(-1).reshape(shape)
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, tried, scale)
            if zero_point is not None and offset is not None:
                zero_point = torch.where(better, offset, zero_point)
        self.found = scale, zero_point

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        if self.found is None:
            return super().qparams()
        return self.found


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": Observer,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": HistogramMSEObserver,
    "entropy": EntropyObserver,
    "mean": MeanMagnitudeObserver,
}
"""Observers by name, for activations."""


def make_observer(spec: TensorSpec, shape: torch.Size | None = None, channels: tuple[int, ...] = ()) -> Observer:
    """The observer a spec asks for.

    Sign and ternary grids take their scale from the mean magnitude; ``mse`` on weights searches each row; ``rsign``
    needs the mean of each channel.

    Args:
        shape: shape of the weight; None for an activation.
        channels: the shape in which one number for each channel broadcasts against an activation.
    """
    fmt = spec.fmt
    if spec.learned == "rsign":
        return ChannelMomentsObserver(spec, channels)
    if spec.observer != "mse" and (fmt.grid == "sign" or fmt.name == "ternary"):
        return MeanMagnitudeObserver(spec, shape)
    if spec.observer == "mse" and fmt.grid == "sign":
        return MeanMagnitudeObserver(spec, shape)
    if shape is not None and spec.observer == "mse":
        return RowMSEObserver(spec, shape)
    return OBSERVERS[spec.observer](spec, shape)
