"""Every error this package raises on purpose.

Each message names the layer or tensor it is about and says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantizationError(Exception):
    """Base class: catching it catches every error that this package raises on purpose."""


class SpecError(QuantizationError, ValueError):
    """A tensor spec that no quantizer can carry out (0 bits, per-token weights, an unknown format)."""


class RecipeError(QuantizationError, ValueError):
    """A recipe that cannot be read or applied: an unknown key, a rule that matches nothing."""


class PrepareError(QuantizationError):
    """The model cannot be rewritten as asked (prepared twice, shared weights under different rules)."""


class CalibrationError(QuantizationError):
    """Calibration data that cannot give a range: none at all, or NaN and infinity."""


class NotCalibratedError(CalibrationError):
    """A static range is needed before any data has set it."""


class OverflowBoundError(QuantizationError, ArithmeticError):
    """The integer sum of a layer may not fit the accumulator."""


class PruneError(QuantizationError, ValueError):
    """Pruning that cannot be done: a grid without zero, a pattern that fits no layer, an unknown option."""


class ConvertError(QuantizationError):
    """The prepared model cannot be frozen yet; the message says what is missing."""


class ParityError(QuantizationError):
    """The deployed model does not compute what the prepared model computes."""


class CheckpointError(QuantizationError):
    """A checkpoint that is damaged, unsafe, of another version, or of another architecture."""


class UnsupportedError(QuantizationError, NotImplementedError):
    """A combination that no kernel, target or file format can carry."""


class PatternError(UnsupportedError):
    """A product of integers that is no Q/DQ pattern of ONNX; integer operators can express it."""


class ConfigError(QuantizationError, ValueError):
    """A run configuration with a wrong or unsafe value."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: ``", did you mean 'int8'?"``, or ``""`` when nothing is close.

    >>> nearest("int9", ["int8", "binary"])
    ", did you mean 'int8'?"
    >>> nearest("zzz", ["int8"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
