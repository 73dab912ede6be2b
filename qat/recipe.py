"""Recipes: which module is quantized how. Rules, presets, YAML and dicts.

A recipe is an ordered list of rules; the first rule that matches a module wins. Unknown keys are refused with the
nearest known one, and a rule that matches nothing is an error when the model is prepared.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qat.errors import RecipeError, SpecError, nearest
from qat.numerics.formats import TensorSpec

BACKWARD_DTYPES = ("auto", "float32", "bfloat16")
EDGES = ("int8", "same")
KEEP = ("float32", "float16", "bfloat16")
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "equalization": {"sweeps": 20},
    "hadamard": {"seed": 0, "stream": True, "heads": True},
    "smoothquant": {"alpha": 0.5},
    "awq": {"steps": 20, "clip": True},
    "gptq": {"damp": 0.01, "order": True},
    "adaround": {"steps": 400, "learning_rate": 0.1, "regularization": 10.0, "damp": 0.5},
    "reconstruction": {"steps": 200, "learning_rate": 0.02, "scale_learning_rate": 2e-3},
    "bias_correction": {},
}
"""What ``calibrate`` can do beyond ranges: the algorithms in the order in which they run, with their options.

The first four change weights and leave the float function alone: ``equalization`` (``sweeps`` over pairs of layers at
most), ``hadamard`` (``seed`` of the signs; whether to rotate the residual ``stream`` and the ``heads`` of attention),
``smoothquant`` (``alpha`` from 0 to 1, or ``auto``), ``awq`` (``steps`` exponents tried; ``clip`` the ranges too).
Options of roundings: ``qat/calibration/gptq.py``, ``rounding.py`` and ``reconstruction.py`` explain them where they use
them.
"""
_KEYS = ("name", "backward_dtype", "edges", "calibration", "absorb", "requantize")
"""Keys of a recipe beside its rules."""
PLACING = ("awq", "gptq", "adaround", "reconstruction")
"""Algorithms that choose codes, so that the ranges of weights must stand still."""


@dataclass(frozen=True)
class Rule:
    """What happens to the modules that match.

    Attributes:
        name: glob on the dotted name (``head*``, ``*.attn.*``); None matches all.
        type: class name of the module (``Linear``) or of one of its bases; None matches all quantizable types.
        weight, input, output: specs; None leaves that tensor in floating point.
        keep: stay floating point in this type (``float32``, ``float16``, ``bfloat16``).
        optional: matching nothing is not an error (for rules of presets, which serve any model).
    """

    name: str | None = None
    type: str | None = None
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    keep: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep not in KEEP:
            raise RecipeError(f"keep: {self.keep!r} is not a floating point type{nearest(str(self.keep), KEEP)}; "
                              f"types are {', '.join(KEEP)}")
        if self.keep is not None and (self.weight or self.input or self.output):
            raise RecipeError(f"{self}: keep: means floating point, so weight, input and output have no place beside "
                              "it")
        if self.keep is None and not (self.weight or self.input or self.output):
            raise RecipeError(f"{self}: a rule needs a weight, input or output spec, or keep: float32")
        try:
            if self.weight is not None:
                self.weight.for_weight()
            if self.input is not None:
                self.input.for_activation()
            if self.output is not None:
                self.output.for_activation()
        except SpecError as error:
            raise RecipeError(f"{self}: {error}") from None

    @property
    def explicit(self) -> bool:
        """Whether the rule was written for particular modules, by name."""
        return self.name not in (None, "*")

    def matches(self, name: str, kinds: tuple[str, ...]) -> bool:
        """Whether a module called ``name``, whose class and base classes are ``kinds``, falls under this rule."""
        return (self.name is None or fnmatch.fnmatchcase(name, self.name)) and (self.type is None or self.type in kinds)

    def to_dict(self) -> dict[str, Any]:
        match = {k: v for k, v in (("name", self.name), ("type", self.type)) if v is not None}
        result: dict[str, Any] = {"match": match} if match else {}
        for key in ("weight", "input", "output"):
            spec = getattr(self, key)
            if spec is not None:
                result[key] = spec.to_dict()
        if self.keep is not None:
            result["keep"] = self.keep
        if self.optional:
            result["optional"] = True
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """A rule from a dict; :class:`RecipeError` for unknown keys."""
        _check_keys("a rule", data, ("match", "weight", "input", "output", "keep", "optional"))
        match = data.get("match") or {}
        _check_keys("match", match, ("name", "type"))
        values: dict[str, Any] = {k: None if v is None else str(v) for k, v in match.items()}
        for key in ("weight", "input", "output"):
            if data.get(key) is not None:
                try:
                    values[key] = TensorSpec.from_dict(data[key])
                except SpecError as error:
                    raise RecipeError(f"{key} of rule {dict(match) or '*'}: {error}") from None
        keep = data.get("keep")
        values["keep"] = "float32" if keep is True else keep
        values["optional"] = bool(data.get("optional", False))
        return cls(**values)

    def __str__(self) -> str:
        match = ", ".join(f"{k}: {v}" for k, v in (("name", self.name), ("type", self.type)) if v is not None)
        return f"rule {{{match or 'everything'}}}"


@dataclass(frozen=True)
class Algorithm:
    """One calibration algorithm with all of its options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> str | dict[str, Any]:
        """Its name; with the options that differ from the defaults, if there are any."""
        changed = {k: v for k, v in self.options if v != CALIBRATIONS[self.name][k]}
        return {self.name: changed} if changed else self.name


def algorithms(wanted: Any) -> tuple[Algorithm, ...]:
    """``calibration:`` as written (a name, ``{name: options}``, a list of them), in the order in which they run.

    Raises:
        RecipeError: an unknown name or option; the nearest is named.
    """
    if isinstance(wanted, str | Mapping | Algorithm):
        wanted = [wanted]
    if not isinstance(wanted, list | tuple):
        raise RecipeError(f"calibration: is a list of algorithms, not {wanted!r}")
    found: dict[str, Algorithm] = {}
    for one in wanted:
        if isinstance(one, Algorithm):
            one = {one.name: dict(one.options)}
        for name, options in (one if isinstance(one, Mapping) else {one: None}).items():
            if name not in CALIBRATIONS:
                raise RecipeError(f"calibration: {name!r} is unknown{nearest(str(name), CALIBRATIONS)}; "
                                  f"known are {', '.join(CALIBRATIONS)}")
            _check_keys(f"calibration {name}", options or {}, tuple(CALIBRATIONS[name]))
            found[name] = Algorithm(name, tuple((CALIBRATIONS[name] | dict(options or {})).items()))
    if "gptq" in found and "adaround" in found:
        raise RecipeError("calibration: gptq and adaround both choose the codes of weights: leave one of them out")
    return tuple(found[name] for name in CALIBRATIONS if name in found)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        rules: ordered; the first that matches a module wins; modules that none matches stay as they are.
        backward_dtype: ``auto`` (follows the trainer's precision), ``float32`` or ``bfloat16``.
        edges: ``int8``: the first and the last matmul-like layer run at W8A8 whatever their (unnamed) rule says;
            ``same``: no exception.
        calibration: algorithms that ``calibrate`` runs beside the ranges, see :data:`CALIBRATIONS`: names, or
            ``{name: {option: value}}``. They run in the order of that table, whatever the order here.
        absorb: whether ReLUs in front of quantizers become part of them, whose codes are unsigned then.
        requantize: whether static layers go from integers to integers as runtimes with int32 biases do: biases are
            whole steps of the accumulator (scale_x * scale_w), and codes of the output are made of accumulators (and
            of the codes of sums) in one multiplication.
        name: the preset's name, for reports.
    """

    rules: tuple[Rule, ...] = ()
    backward_dtype: str = "auto"
    edges: str = "same"
    calibration: tuple[Algorithm, ...] = ()
    absorb: bool = True
    requantize: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        rules: Any = self.rules
        if not isinstance(rules, list | tuple):
            raise RecipeError(f"rules: is a list of rules, not {type(rules).__name__}")
        object.__setattr__(self, "rules", tuple(r if isinstance(r, Rule) else Rule.from_dict(r) for r in rules))
        object.__setattr__(self, "calibration", algorithms(self.calibration))
        for switch in ("absorb", "requantize"):
            if not isinstance(getattr(self, switch), bool):
                raise RecipeError(f"{switch}: is true or false, not {getattr(self, switch)!r}")
        for key, value, known in (("backward_dtype", self.backward_dtype, BACKWARD_DTYPES),
                                  ("edges", self.edges, EDGES)):
            if value not in known:
                raise RecipeError(f"{key}: {value!r} is unknown{nearest(str(value), known)}; "
                                  f"choices are {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; ``from_dict`` inverts it."""
        result: dict[str, Any] = {"backward_dtype": self.backward_dtype, "edges": self.edges}
        if self.name:
            result = {"name": self.name, **result}
        if not self.absorb:
            result["absorb"] = False
        if self.requantize:
            result["requantize"] = True
        result["rules"] = [rule.to_dict() for rule in self.rules]
        if self.calibration:
            result["calibration"] = [a.to_dict() for a in self.calibration]
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from a dict with ``rules``, or with ``preset`` and overrides.

        Raises:
            RecipeError: an unknown key, preset or spec; the nearest is named.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a mapping with rules: or preset:, not {type(data).__name__}")
        if "preset" in data:
            overrides = {k: v for k, v in data.items() if k != "preset"}
            return cls.preset(str(data["preset"]), **overrides)
        _check_keys("a recipe", data, (*_KEYS, "rules"))
        values: dict[str, Any] = {k: data[k] for k in _KEYS if k != "calibration" and data.get(k) is not None}
        return cls(rules=data.get("rules") or (), calibration=data.get("calibration") or (), **values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a YAML file; :class:`RecipeError` names the file."""
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {error}") from None
        try:
            return cls.from_dict(data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Recipe:
        """The preset called ``name``.

        Args:
            overrides: ``backward_dtype``, ``edges``, ``calibration``, ``absorb``, ``requantize``; ``weight`` and
                ``input``: dicts that change single keys of the specs of the preset's general rule; ``rules``: rules
                put in front of the preset's.
        """
        if name not in PRESETS:
            raise RecipeError(f"unknown preset {name!r}{nearest(str(name), PRESETS)}; presets are {', '.join(PRESETS)}")
        _check_keys(f"overrides of preset {name}", overrides,
                    (*_KEYS, "weight", "input", "rules"))
        data = {"name": name, **PRESETS[name]}
        rules = [dict(rule) for rule in data["rules"]]
        for key in ("weight", "input"):
            if overrides.get(key) is not None:
                if not isinstance(overrides[key], Mapping):
                    raise RecipeError(f"{key}: override of preset {name} is a mapping such as {{format: int8}}, "
                                      f"not {overrides[key]!r}")
                if not any(rule.get(key) for rule in rules):
                    raise RecipeError(f"preset {name} has no {key} spec to override")
                for rule in rules:
                    if rule.get(key) and not rule.get("optional"):
                        rule[key] = {**rule[key], **overrides[key]}
        if not isinstance(overrides.get("rules") or [], list | tuple):
            raise RecipeError(f"rules: is a list of rules, not {type(overrides['rules']).__name__}")
        data["rules"] = [*(overrides.get("rules") or []), *rules]
        data |= {k: v for k, v in overrides.items() if k in _KEYS and v is not None}
        return cls.from_dict(data)


def _check_keys(where: str, data: Any, known: tuple[str, ...]) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is a mapping with keys {', '.join(known) or 'none'}, not {data!r}")
    for key in data:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} in {where}{nearest(str(key), known)}; keys are {', '.join(known)}")


def _preset(weight: dict[str, Any] | None = None, activation: dict[str, Any] | None = None,
            front: list[dict[str, Any]] | None = None, edges: str = "same", keep: str | None = None,
            optional: bool = False) -> dict[str, Any]:
    rule: dict[str, Any] = {"keep": keep} if keep else {"weight": weight}
    if activation:
        rule["input"] = activation
    if optional:
        rule["optional"] = True
    return {"edges": edges, "rules": [*(front or []), rule]}


_INT8 = {"format": "int8"}
_ROWS8 = [{"match": {"type": "Embedding"}, "weight": {"format": "int8"}, "optional": True}]
_LSQ_INPUT = {"learned": "lsq", "observer": "mse"}


def _learned(fmt: str) -> dict[str, Any]:
    return {"format": fmt, "learned": "lsq", "observer": "mse"}


def _groups(fmt: str) -> dict[str, Any]:
    return {"format": fmt, "granularity": "per_group", "group_size": 128, "group_fallback": "divisor"}


PRESETS: dict[str, dict[str, Any]] = {
    "w8a8": _preset(_INT8, _INT8),
    "w8a8_dynamic": _preset(_INT8, {"format": "int8", "dynamic": True, "granularity": "per_token"}),
    "w8a16": _preset(_INT8),
    "w8a4": _preset(_INT8, {"format": "int4", **_LSQ_INPUT}, edges="int8", front=_ROWS8),
    "w4a16": _preset(_groups("int4"), edges="int8", front=_ROWS8),
    "w4a8": _preset(_learned("int4"), _INT8, edges="int8", front=_ROWS8),
    "w4a4": _preset(_learned("int4"), {"format": "int4", **_LSQ_INPUT}, edges="int8", front=_ROWS8),
    "w3a8": _preset(_learned("int3"), _INT8, edges="int8", front=_ROWS8),
    "w2a8": _preset(_learned("int2_midrise"), _INT8, edges="int8", front=_ROWS8),
    "w2a2": _preset(_learned("int2_midrise"), {"format": "int2", **_LSQ_INPUT}, edges="int8", front=_ROWS8),
    "w158a8": _preset({"format": "ternary"}, _INT8, edges="int8", front=_ROWS8),
    "w1a8": _preset({"format": "binary"}, _INT8, edges="int8", front=_ROWS8),
    "w1a1": _preset({"format": "binary"}, {"format": "binary", "learned": "rsign"}, edges="int8", front=_ROWS8),
    "w3a16": _preset(_groups("int3"), edges="int8", front=_ROWS8),
    "w2a16": _preset(_groups("int2_midrise"), edges="int8", front=_ROWS8),
    "w1a16": _preset(_groups("binary"), edges="int8", front=_ROWS8),
    "fp16": _preset(keep="float16"),
    "bf16": _preset(keep="bfloat16"),
    "mixed_w8a8_w4a8": _preset(
        _INT8, _INT8, optional=True, edges="int8",
        front=[*_ROWS8,
               {"match": {"type": "Linear"}, "weight": _learned("int4"), "input": _INT8, "optional": True}]),
    "mixed_w8a8_bf16": _preset(
        _INT8, _INT8, front=[{"match": {"name": "*norm*"}, "keep": "bfloat16", "optional": True}]),
}
"""Presets by name, as dicts. Below 8 bits they come with ``edges: int8``."""


