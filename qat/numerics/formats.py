"""Number formats, granularities and tensor specs: pure data, the ground floor of the house.

A *format* is a grid of numbers with an integer code for each. Three maps describe it:

    value --affine.quantize--> code            the integer that is stored (int8: -128..127)
    code  --Format.levels-->   level           the integer that enters the matrix product
    level * scale * unit  =    value           ``unit`` is 1, or 1/2 for mid-rise grids: a power of two never rounds

A *spec* says how one tensor is put on such a grid: format, granularity of the scales, symmetric or affine,
where the range comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qat.errors import SpecError, nearest


@dataclass(frozen=True)
class Format:
    """A grid of values with integer codes ``lo..hi``.

    ========  ===========================  ===============================  =========
    grid      codes                        level of a code                  unit
    ========  ===========================  ===============================  =========
    affine    ``lo..hi``                   ``code - zero_point``            1
    midrise   ``lo..hi``                   ``2 * code + 1`` (never zero)    1/2
    sign      ``-1, +1``                   ``code``                         1
    ========  ===========================  ===============================  =========

    The mid-rise grid at 2 bits is -1.5, -0.5, 0.5, 1.5 times the scale, the "SEQ" grid of ParetoQ
    (Liu et al. 2025). The sign grid is that of binary networks: ``sign(0) = +1``.
    """

    name: str
    bits: int
    lo: int
    hi: int
    grid: str = "affine"

    @property
    def signed(self) -> bool:
        return self.lo < 0

    @property
    def has_zero(self) -> bool:
        """Whether real zero is on the grid (affine grids); zero-free grids pad with level 0."""
        return self.grid == "affine"

    @property
    def unit(self) -> float:
        """``value = level * scale * unit``."""
        return 0.5 if self.grid == "midrise" else 1.0

    @property
    def span(self) -> float:
        """Scales that fit into the symmetric range: ``scale = greatest magnitude / span``."""
        if self.grid == "sign":
            return 1.0
        if self.name == "ternary":
            return 1.0
        if self.grid == "midrise":
            return float(-self.lo)
        return (self.hi - self.lo) / 2 if self.signed else float(self.hi)

    @property
    def dtype(self) -> torch.dtype:
        """The torch type that holds unpacked codes."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def level_bound(self) -> int:
        """The greatest magnitude of a level when the zero point is 0."""
        return 2 * self.hi + 1 if self.grid == "midrise" else max(abs(self.lo), abs(self.hi))

    @property
    def values(self) -> int:
        """How many different values the grid holds: never more than ``2 ** bits``."""
        return 2 if self.grid == "sign" else self.hi - self.lo + 1

    def levels(self, codes: Tensor) -> Tensor:
        """The integers that enter the matrix product, before a zero point is taken off; same dtype as ``codes``.

        >>> get_format("int2_midrise").levels(torch.tensor([-2, -1, 0, 1], dtype=torch.int8)).tolist()
        [-3, -1, 1, 3]
        """
        return codes * 2 + 1 if self.grid == "midrise" else codes

    def unsigned(self) -> Format:
        """The format of the same width for values that are never negative (after a ReLU).

        >>> get_format("int8").unsigned().name
        'uint8'
        """
        return FORMATS.get("u" + self.name, self) if self.signed and self.grid == "affine" else self

    def __str__(self) -> str:
        return self.name


def _affine(bits: int) -> list[Format]:
    half = 2 ** (bits - 1)
    return [Format(f"int{bits}", bits, -half, half - 1), Format(f"uint{bits}", bits, 0, 2 * half - 1)]


FORMATS: dict[str, Format] = {
    f.name: f
    for f in [
        *[f for bits in (8, 7, 6, 5, 4, 3, 2) for f in _affine(bits)],
        *[Format(f"int{b}_midrise", b, -(2 ** (b - 1)), 2 ** (b - 1) - 1, "midrise") for b in (4, 3, 2)],
        Format("uint1", 1, 0, 1),
        Format("ternary", 2, -1, 1),
        Format("binary", 1, -1, 1, "sign"),
    ]
}
"""Every format by name. A new affine, mid-rise or sign grid is one line here."""


def get_format(name: str | Format) -> Format:
    """The format called ``name``; :class:`SpecError` with the nearest name when there is none.

    >>> get_format("int4").hi
    7
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        raise SpecError(f"unknown format {name!r}{nearest(str(name), FORMATS)}; formats are {', '.join(FORMATS)}")
    return FORMATS[name]


GRANULARITIES = {
    "per_tensor": "one scale, shape ()",
    "per_channel": "one scale for each output channel, shape (out,)",
    "per_group": "one scale for each run of group_size inputs of an output channel, shape (out, in // group_size)",
    "per_token": "one scale for each row (last dimension) of an activation, shape (..., 1)",
    "per_column": "one scale for each column (last dimension) of an activation, shape (columns,): for the right "
                  "operand of a product of two activations (attention's values), which sums over rows",
    "per_sample": "one scale for each sample of a batch: what per_token means for the input of a convolution",
}
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "entropy", "mean")
LEARNED = ("lsq", "lsq_plus", "pact", "rsign")
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Args:
        format: name of a number format, see :data:`FORMATS`.
        granularity: ``per_tensor``, ``per_channel``, ``per_group`` (weights), ``per_token`` (activations).
            Left out: ``per_channel`` for weights, ``per_tensor`` for activations, ``per_token`` for dynamic ones.
        group_size: length of a group along the input, for ``per_group``.
        group_fallback: ``error``, or ``divisor``: the largest power of two that divides the input.
        symmetric: zero point fixed at 0. Left out: true for weights and dynamic activations, false for static ones.
        dynamic: the range is taken from each batch when it arrives, not from calibration.
        observer: where a static range comes from: ``minmax``, ``moving_average``, ``percentile``, ``mse``, ``entropy``,
            or ``mean``: LSQ's start ``2 * mean|x| / sqrt(greatest code)`` (Esser et al. 2020).
        percentile: share of the mass, in percent, that ``percentile`` keeps inside the range.
        learned: ``lsq`` (scale), ``lsq_plus`` (scale and zero point), ``pact`` (upper clip), ``rsign`` (scale, and a
            threshold for each channel; binary activations) are trained by gradient.
        scale_dtype: the type a file format stores scales in; they are rounded to it *before* training.
        power_of_two: scales are rounded up to powers of two, so that requantization never rounds twice.
        fixed: of a weight: once found, the range stands still instead of following the weight. Algorithms that choose
            codes (GPTQ, say) need it, and ``prepare`` sets it for them.

    Raises:
        SpecError: for a combination that means nothing.
    """

    format: str
    granularity: str | None = None
    group_size: int | None = None
    group_fallback: str = "error"
    symmetric: bool | None = None
    dynamic: bool = False
    observer: str = "minmax"
    percentile: float = 99.99
    learned: str | None = None
    scale_dtype: str = "float32"
    power_of_two: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        _choice("granularity", self.granularity, [None, *GRANULARITIES])
        _choice("observer", self.observer, OBSERVERS)
        _choice("learned", self.learned, [None, *LEARNED])
        _choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _choice("group_fallback", self.group_fallback, ("error", "divisor"))
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise SpecError(f"group_size={self.group_size} and granularity={self.granularity}: a group size goes "
                            "with granularity: per_group, and per_group needs one")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise SpecError(f"group_size must be a positive whole number, not {self.group_size!r}")
        if not 50.0 < self.percentile <= 100.0:
            raise SpecError(f"percentile must lie in (50, 100], not {self.percentile}")
        if self.symmetric is False and (not fmt.has_zero or fmt.name == "ternary"):
            raise SpecError(f"{fmt} is symmetric by nature: leave out symmetric: false")
        if self.dynamic and self.learned:
            raise SpecError("a range is either dynamic (taken from each batch) or learned, not both")
        if self.dynamic and self.observer != "minmax":
            raise SpecError(f"a dynamic range has no observer; leave out observer: {self.observer}")
        if self.learned == "pact" and self.symmetric:
            raise SpecError("pact learns the upper clip of values that are never negative: it is not symmetric")
        if self.learned == "lsq_plus" and (self.symmetric or not fmt.has_zero):
            raise SpecError("lsq_plus learns a zero point: it needs an affine format and symmetric: false")
        if self.learned == "rsign" and fmt.grid != "sign":
            raise SpecError(f"rsign learns where binary activations change sign: it needs format: binary, not {fmt}")
        if self.observer == "mean" and self.symmetric is False:
            raise SpecError("observer: mean gives a scale and no zero point: leave out symmetric: false")
        if self.granularity in ("per_token", "per_sample") and not self.dynamic:
            raise SpecError(f"{self.granularity} scales are known only when the batch arrives: add dynamic: true")

    @cached_property
    def fmt(self) -> Format:
        return get_format(self.format)

    @property
    def bits(self) -> int:
        return self.fmt.bits

    def replace(self, **changes: Any) -> TensorSpec:
        return dataclasses.replace(self, **changes)

    def for_weight(self) -> TensorSpec:
        """This spec with the defaults of a weight filled in.

        Raises:
            SpecError: per-token or dynamic weights, unsigned symmetric weights, learned zero points of weights.
        """
        granularity = self.granularity or "per_channel"
        if granularity in ("per_token", "per_sample", "per_column") or self.dynamic:
            raise SpecError("weights have no tokens and no batches: use per_tensor, per_channel or per_group, static")
        if self.learned in ("pact", "lsq_plus", "rsign"):
            raise SpecError(f"{self.learned} is for activations; weights learn their scale with learned: lsq")
        symmetric = True if self.symmetric is None else self.symmetric
        if symmetric and not self.fmt.signed:
            raise SpecError(f"{self.format} cannot hold negative weights: use {self.format.lstrip('u')}, "
                            "or symmetric: false")
        if self.learned and not symmetric:
            raise SpecError("learned weight scales are symmetric: leave out symmetric: false")
        return self.replace(granularity=granularity, symmetric=symmetric)

    def for_activation(self) -> TensorSpec:
        """This spec with the defaults of an activation filled in.

        Raises:
            SpecError: per-channel or per-group activations, whose scales would sit inside the integer sum.
        """
        granularity = self.granularity or ("per_token" if self.dynamic else "per_tensor")
        if granularity not in ("per_tensor", "per_token", "per_sample"):
            raise SpecError(f"{granularity} activation scales cannot be taken out of an integer sum: "
                            "use per_tensor, or per_token with dynamic: true")
        if self.symmetric is not None:
            symmetric = self.symmetric
        else:
            by_nature = not self.fmt.has_zero or self.format == "ternary"
            symmetric = by_nature or self.dynamic or self.learned == "lsq" or self.observer == "mean"
        if self.fixed:
            raise SpecError("fixed: is for weights; ranges of activations stand still unless they observe")
        if self.learned == "pact" and self.fmt.signed:
            raise SpecError(f"pact is for values that are never negative: use u{self.format}")
        return self.replace(granularity=granularity, symmetric=symmetric)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict without the entries that are at their defaults; ``from_dict`` inverts it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.name == "format" or getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | str) -> TensorSpec:
        """A spec from a dict, or from a bare format name.

        Raises:
            SpecError: an unknown key (the nearest is named), or a value of the wrong kind.
        """
        if isinstance(data, str):
            return cls(data)
        if not isinstance(data, Mapping):
            raise SpecError(f"a tensor spec is a mapping such as {{format: int8}}, not {data!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise SpecError(f"unknown key {key!r} in a tensor spec{nearest(str(key), known)}; "
                                f"keys are {', '.join(known)}")
        if "format" not in data:
            raise SpecError(f"a tensor spec needs a format: {dict(data)!r}")
        values = dict(data)
        for key in ("dynamic", "power_of_two", "fixed"):
            if key in values and not isinstance(values[key], bool):
                raise SpecError(f"{key} must be true or false, not {values[key]!r}")
        if not isinstance(values.get("symmetric"), bool | None):
            raise SpecError(f"symmetric must be true or false, not {values['symmetric']!r}")
        if not isinstance(values.get("percentile", 99.99), int | float):
            raise SpecError(f"percentile must be a number, not {values['percentile']!r}")
        return cls(**values)

    def __str__(self) -> str:
        words = [self.format]
        if self.granularity:
            words.append(self.granularity + (f"({self.group_size})" if self.group_size else ""))
        if self.dynamic:
            words.append("dynamic")
        if self.learned:
            words.append(self.learned)
        return " ".join(words)


def _choice(key: str, value: object, known: Any) -> None:
    if value not in list(known):
        names = [k for k in known if k is not None]
        raise SpecError(f"unknown {key} {value!r}{nearest(str(value), names)}; known are {', '.join(names)}")
