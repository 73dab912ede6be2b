"""Hardware targets as data: what each runtime executes on integers, and how a recipe is fitted to it.

    recipe = qat.targets.default_recipe("tensorrt")
    recipe, changes = qat.targets.adjust(recipe, "x86_avx2")       # changes: what, and why, in sentences

What a target cannot run is changed where another scheme does the same job (said in the list), and refused where none
does; nothing becomes floating point silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from qat.errors import SpecError, UnsupportedError, nearest
from qat.numerics.formats import FORMATS, TensorSpec
from qat.recipe import Recipe, Rule

AFFINE = tuple(n for n, f in FORMATS.items() if f.grid == "affine")
SIGNED = tuple(n for n in AFFINE if FORMATS[n].signed)
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
ATTENTION = ("AttentionScores", "AttentionContext")
"""The products of activations in attention of transformers."""


@dataclass(frozen=True)
class Target:
    """What one runtime executes.

    Attributes:
        name, summary: for people.
        weights: formats of weights that meet quantized inputs; () : such layers do not exist here.
        weight_only: formats of weights that meet floating point inputs; ().
        granularities: of weights that meet quantized inputs.
        weight_only_granularities, group_sizes: of weight-only layers; group sizes () : any.
        symmetric_weights: whether weights must have zero point 0.
        activations: formats of static and dynamic activations.
        static: whether activations with ranges from calibration exist.
        dynamic: granularities of activations whose range is taken from each batch; (): there are none.
        symmetric_activations: True: zero points must be 0; False: they must be free; None: as the recipe likes.
        absorbs: whether ReLUs may become part of quantizers, whose codes are unsigned then.
        fuses: kinds of layers that only run on integers where their output has a scale too.
        quantized_operands: kinds of functions whose operands need scales.
        operators: kinds of layers that run on integers; (): all that this package quantizes. Where they are
            embeddings and linear layers alone, the file holds no others.
        rounding: how the runtime puts values on a grid.
        bias: ``int32`` (whole steps of scale_x * scale_w, and training rounds to them), ``float32``, or None: as the
            recipe likes.
        scale_dtype: in which its files hold scales of weights; ``model``: that of the float model.
        form: the form of ONNX that it wants, see :mod:`qat.deploy.onnx`; None: it reads no ONNX.
        explicit: whether its ONNX must follow the rules of explicit quantization, see :mod:`qat.deploy.onnx_rules`.
        positive_scales: whether it refuses negative scales.
        recipe: what :func:`default_recipe` starts from: the name of a preset.
    """

    name: str
    summary: str
    weights: tuple[str, ...] = AFFINE
    weight_only: tuple[str, ...] = tuple(FORMATS)
    granularities: tuple[str, ...] = ("per_channel", "per_tensor")
    weight_only_granularities: tuple[str, ...] = ("per_group", "per_channel", "per_tensor")
    group_sizes: tuple[int, ...] = ()
    symmetric_weights: bool = True
    activations: tuple[str, ...] = AFFINE
    static: bool = True
    dynamic: tuple[str, ...] = ()
    symmetric_activations: bool | None = None
    absorbs: bool = True
    fuses: tuple[str, ...] = ()
    quantized_operands: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    rounding: str = "half to even, by division"
    bias: str | None = None
    scale_dtype: str = "float32"
    form: str | None = "integer"
    explicit: bool = False
    positive_scales: bool = False
    recipe: str = "w8a8"

    @property
    def only_linear(self) -> bool:
        """Whether nothing but linear layers and embeddings can be integers."""
        return bool(self.operators) and set(self.operators) <= {"Linear", "Embedding"}


_INT8 = ("int8",)
_BYTES = ("int8", "uint8")
_FUSED = (*CONVOLUTIONS, "Add", "Concat")
_SEVEN_BITS = tuple(n for n in SIGNED if FORMATS[n].bits <= 7)

TARGETS: dict[str, Target] = {t.name: t for t in [
    Target("generic", "anything this package quantizes", weights=tuple(FORMATS), activations=tuple(FORMATS),
           granularities=("per_channel", "per_tensor", "per_group"), symmetric_weights=False,
           dynamic=("per_token", "per_tensor", "per_sample")),
    Target("onednn", "x86 with VNNI: u8 x s8 dot products into int32", weights=SIGNED, fuses=_FUSED,
           dynamic=("per_token", "per_tensor")),
    Target("x86_avx2", "x86 without VNNI: pair sums of u8 x s8 saturate at int16, so weights have 7 bits",
           weights=_SEVEN_BITS, fuses=_FUSED, dynamic=("per_token", "per_tensor")),
    Target("arm", "ARM with dot products: s8 x s8 into int32", weights=SIGNED, fuses=_FUSED,
           dynamic=("per_token", "per_tensor"), bias="int32"),
    Target("executorch", "ExecuTorch with XNNPACK: s8 x s8 into int32, and from there straight to int8", weights=SIGNED,
           activations=_BYTES, fuses=("Linear", *_FUSED), bias="int32", form=None),
    Target("tensorrt", "TensorRT, explicit quantization: zero points 0, int8, int4 weight-only in blocks",
           weights=_INT8, weight_only=("int4",), weight_only_granularities=("per_group",), group_sizes=(128, 64),
           activations=_INT8, symmetric_activations=True, absorbs=False, quantized_operands=("Add",),
           operators=("Linear", *CONVOLUTIONS, "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "MatMul",
                      "Add"),
           bias="float32", form="qdq", explicit=True, positive_scales=True),
    Target("onnxruntime", "onnxruntime on CPUs", weights=tuple(FORMATS), symmetric_weights=False, fuses=_FUSED,
           dynamic=("per_tensor",), bias="int32", form="auto"),
    Target("openvino", "OpenVINO, which reads ONNX with Q/DQ", weights=SIGNED, activations=_BYTES, fuses=_FUSED,
           bias="float32", form="qdq", positive_scales=True),
    Target("vllm", "vLLM with compressed-tensors: W8A8 and weight-only linear layers", weights=_INT8,
           weight_only=("int4", "int8"), weight_only_granularities=("per_group", "per_channel"),
           group_sizes=(128, 64, 32), activations=_INT8, dynamic=("per_token",), static=False,
           symmetric_activations=True, absorbs=False, operators=("Linear",), scale_dtype="model", form=None,
           recipe="w8a8_dynamic"),
    Target("llama_cpp", "llama.cpp: GGUF, weight-only, groups of 32 with float16 scales", weights=(),
           weight_only=("int8", "int4", "ternary"), weight_only_granularities=("per_group",), group_sizes=(32,),
           activations=(), static=False, operators=("Linear", "Embedding"), scale_dtype="float16", form=None,
           recipe="w8a16"),
]}
"""Every target by name. A new one is one entry here."""


def get(name: str | Target) -> Target:
    """The target called ``name``.

    Raises:
        UnsupportedError: there is none; the nearest is named.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UnsupportedError(f"unknown target {name!r}{nearest(str(name), TARGETS)}; targets are "
                               f"{', '.join(TARGETS)}")
    return TARGETS[name]


def default_recipe(target: str | Target) -> Recipe:
    """The recipe to begin with where ``target`` is where the model will run."""
    aim = get(target)
    return adjust(Recipe.preset(aim.recipe), aim)[0]


def adjust(recipe: Recipe, target: str | Target, dtype: str = "float32") -> tuple[Recipe, list[str]]:
    """``recipe`` as ``target`` can run it, and what was changed and why.

    Args:
        dtype: floating point type of the model, in which the files of some targets hold scales.

    Raises:
        UnsupportedError: a scheme that has no counterpart there, by name.

    >>> recipe, changes = adjust(Recipe.preset("w8a8"), "x86_avx2")
    >>> recipe.rules[-1].weight.format
    'int7'
    """
    aim = get(target)
    fitting = _Fitting(aim if aim.scale_dtype != "model" else replace(aim, scale_dtype=dtype))
    rules: list[Rule] = []
    for rule in recipe.rules:
        for part in fitting.kinds(rule, rules):
            rules += fitting.rule(part, rules)
    rules = [*fitting.functions(rules), *rules]     # in front: the first rule that matches wins
    changes: dict[str, None] = dict.fromkeys(fitting.changes)
    edges = recipe.edges
    alone = any(r.weight is not None and r.input is None and r.weight.bits < 8 for r in rules)
    if edges == "int8" and (not aim.static or "int8" not in aim.weights or (alone and "int8" not in aim.weight_only)):
        edges = "same"
        kind = "weight-only" if aim.static and "int8" in aim.weights else "static"
        changes[f"edges: same instead of int8, because {aim.name} does not run {kind} int8 layers"] = None
        if alone and {"Embedding", "Linear"} <= set(aim.operators) and "int8" in aim.weight_only:
            head = Rule(name="*lm_head", type="Linear", weight=TensorSpec("int8"), optional=True)
            rules = [*_Fitting(fitting.target).rule(head, ()), *rules]
            changes[f"{head}: int8 weights in the place of edges: int8, as embeddings, which heads often share"] = None
    absorbs = recipe.absorb and aim.absorbs
    if absorbs != recipe.absorb:
        changes[f"absorb: false, because {aim.name} has no unsigned codes: ReLUs stay in front of quantizers"] = None
    requantize = recipe.requantize or aim.bias == "int32"
    if requantize != recipe.requantize:
        changes[f"requantize: true, because {aim.name} adds int32 biases to its accumulators"] = None
    name = f"{recipe.name} for {aim.name}" if recipe.name and changes else recipe.name
    return replace(recipe, rules=tuple(rules), edges=edges, absorb=absorbs, requantize=requantize,
                   name=name), list(changes)


@dataclass
class _Fitting:
    """One recipe on its way to a target."""

    target: Target
    changes: list[str] = field(default_factory=list)

    def say(self, rule: Rule, what: str, why: str) -> None:
        self.changes.append(f"{rule}: {what}, because {why}")

    def refuse(self, rule: Rule, what: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{rule}: {what} cannot run on {self.target.name}: {why}")

    def kinds(self, rule: Rule, before: Iterable[Rule]) -> list[Rule]:
        """The rule, limited to the kinds of layers that the target runs on integers.

        A rule of a preset for another kind keeps it in floating point; one that somebody wrote is refused.
        """
        aim = self.target
        if not aim.operators or rule.keep is not None:
            return [rule]
        floats = [k for k in ("Embedding", *ATTENTION) if k not in aim.operators] if aim.only_linear else [
            k for k in ATTENTION if k not in aim.operators]
        only = f"{aim.name} runs {', '.join(aim.operators)} on integers only"
        if rule.type in floats or (aim.only_linear and rule.type in (*CONVOLUTIONS, "MatMul", "Add", "Concat")):
            if not rule.optional:
                raise self.refuse(rule, rule.type, f"{only}; say keep: float32")
            self.say(rule, "keep: float32", only)
            return [replace(rule, weight=None, input=None, output=None, keep="float32")]
        if rule.type is not None:
            return [rule]
        if aim.only_linear:
            done = {r.type for r in before if r.name in (None, rule.name)}
            made = [replace(rule, type=k) for k in aim.operators if k not in done]
            self.say(rule, f"for {' and '.join(str(r.type) for r in made)} alone", only)
            return [made[0], *(replace(r, optional=True) for r in made[1:])]
        covered = {r.type for r in before if r.keep is not None and r.name in (None, rule.name)}
        kept = [replace(rule, type=k, weight=None, input=None, output=None, keep="float32", optional=True)
                for k in floats if k not in covered and rule.input is not None]
        if kept:
            self.say(rule, f"keep: float32 for {', '.join(str(r.type) for r in kept)}", only)
        return [*kept, rule]

    def rule(self, rule: Rule, before: Iterable[Rule]) -> list[Rule]:
        """The rule, and in front of it those for kinds that are treated in another way, unless ``before`` has them."""
        if rule.keep is not None:
            return [rule]
        weight, given = rule.weight, rule.input
        if given is not None:
            given = self.activation(rule, given)
        if weight is not None and (rule.type != "Embedding" or "Embedding" in self.target.operators):
            weight = self.weight(rule, weight, given is None)
        output = None if rule.output is None else self.activation(rule, rule.output)
        fitted = replace(rule, weight=weight, input=given, output=output)
        if weight is None or given is None or given.dynamic or output is not None or not self.target.fuses:
            return [fitted]
        covered = {r.type for r in before if r.name in (None, rule.name)}
        kinds = [k for k in self.target.fuses
                 if k not in ("Add", "Concat") and rule.type in (None, k) and k not in covered]
        if not kinds:
            return [fitted]
        self.say(rule, f"output: {given.format} for {', '.join(kinds)}",
                 f"{self.target.name} runs them on integers only where the output has a scale")
        chained = replace(given, learned=None if given.learned == "rsign" else given.learned)
        if rule.type is not None:
            return [replace(fitted, output=chained)]
        return [*(replace(fitted, type=k, output=chained, optional=True) for k in kinds),
                replace(fitted, optional=True)]

    def functions(self, rules: Iterable[Rule]) -> list[Rule]:
        """Rules for sums and concatenations, where the target wants their scales and no rule has named them."""
        rules = list(rules)
        spec = next((r.input for r in reversed(rules) if r.input is not None and not r.input.dynamic), None)
        if spec is None:
            return []
        found = []
        for kind in ("Add", "Concat"):
            if any(r.type == kind for r in rules):
                continue
            if kind in self.target.fuses:
                rule = Rule(type=kind, input=spec, output=spec, optional=True)
                self.say(rule, f"input and output: {spec.format}",
                         f"{self.target.name} fuses {kind} with scales only")
            elif kind in self.target.quantized_operands:
                rule = Rule(type=kind, input=spec, optional=True)
                self.say(rule, f"input: {spec.format}", f"{self.target.name} wants both operands on a grid")
            else:
                continue
            found.append(rule)
        return found

    def weight(self, rule: Rule, spec: TensorSpec, alone: bool) -> TensorSpec:
        """A weight's spec; ``alone``: its inputs stay floating point."""
        aim = self.target
        formats = aim.weight_only if alone else aim.weights
        where = "weight-only layers" if alone else "layers with quantized inputs"
        if not formats:
            raise self.refuse(rule, f"{where} ({spec})", "it has none; drop the input: spec" if not alone else
                              "it has none; give an input: spec")
        if spec.format not in formats:
            other = self._format(spec, formats)
            if other is None:
                raise self.refuse(rule, f"{spec.format} weights", f"{where} there have {', '.join(formats)}")
            why = ("pair sums of u8 x s8 saturate at int16 there" if aim.name == "x86_avx2"
                   else f"{where} there have {', '.join(formats)}")
            self.say(rule, f"weight format {other} instead of {spec.format}", why)
            spec = replace(spec, format=other, symmetric=None if FORMATS[other].signed else spec.symmetric)
        if aim.symmetric_weights and spec.symmetric is False:
            self.say(rule, "symmetric weights", f"{aim.name} has zero points 0 for weights")
            spec = replace(spec, format=spec.format.removeprefix("u"), symmetric=None)
        allowed = aim.weight_only_granularities if alone else aim.granularities
        granularity = spec.granularity or "per_channel"
        if granularity not in allowed:
            size = None if allowed[0] != "per_group" else aim.group_sizes[0] if aim.group_sizes else 128
            self.say(rule, f"weights {allowed[0]}{'' if size is None else f' ({size})'} instead of {granularity}",
                     f"{aim.name} has no others")
            spec = replace(spec, granularity=allowed[0], group_size=size)
        elif granularity == "per_group" and aim.group_sizes and spec.group_size not in aim.group_sizes:
            size = max((s for s in aim.group_sizes if s <= (spec.group_size or 0)), default=min(aim.group_sizes))
            self.say(rule, f"groups of {size} instead of {spec.group_size}",
                     f"{aim.name} has groups of {', '.join(map(str, aim.group_sizes))}")
            spec = replace(spec, group_size=size)
        if aim.scale_dtype != "float32" and spec.scale_dtype != aim.scale_dtype:
            if spec.learned:
                self.say(rule, "scales that are not learned", f"{aim.name} stores them in {aim.scale_dtype}")
            self.say(rule, f"scales in {aim.scale_dtype}", f"the files of {aim.name} hold them so")
            spec = replace(spec, scale_dtype=aim.scale_dtype, learned=None)
        return spec

    def activation(self, rule: Rule, spec: TensorSpec) -> TensorSpec:
        aim = self.target
        if not aim.activations:
            raise self.refuse(rule, f"{spec} activations", "it has floating point activations; drop the "
                              "input: spec, or begin with its default_recipe (recipe=target in a run)")
        if spec.format not in aim.activations:
            other = self._format(spec, aim.activations)
            if other is None:
                raise self.refuse(rule, f"{spec.format} activations", f"activations there are "
                                                                      f"{', '.join(aim.activations)}")
            self.say(rule, f"activation format {other} instead of {spec.format}",
                     f"{aim.name} has {', '.join(aim.activations)}")
            spec = replace(spec, format=other, learned=None if spec.learned == "pact" else spec.learned)
        if spec.dynamic and not aim.dynamic:
            self.say(rule, "static ranges", f"{aim.name} has no dynamic ones")
            spec = replace(spec, dynamic=False, granularity="per_tensor")
        elif not spec.dynamic and not aim.static:
            self.say(rule, f"ranges taken {aim.dynamic[0]} from each batch", f"{aim.name} has no static ones")
            spec = replace(spec, dynamic=True, granularity=aim.dynamic[0], observer="minmax", learned=None)
        elif spec.dynamic and (spec.granularity or "per_token") not in aim.dynamic:
            self.say(rule, f"dynamic ranges {aim.dynamic[0]} instead of {spec.granularity or 'per_token'}",
                     f"{aim.name} computes one range for each tensor (DynamicQuantizeLinear)"
                     if aim.name == "onnxruntime" else f"{aim.name} has no others")
            spec = replace(spec, granularity=aim.dynamic[0])
        if aim.name == "onnxruntime" and spec.dynamic and (spec.format != "uint8" or spec.symmetric is not False):
            self.say(rule, "uint8 codes with a zero point", "that is what DynamicQuantizeLinear makes")
            spec = replace(spec, format="uint8", symmetric=False)
        if aim.symmetric_activations and spec.symmetric is not True and FORMATS[spec.format].grid == "affine":
            self.say(rule, "symmetric activations", f"{aim.name} has zero points 0")
            spec = replace(spec, symmetric=True, learned="lsq" if spec.learned == "lsq_plus" else spec.learned)
        return spec

    @staticmethod
    def _format(spec: TensorSpec, allowed: Iterable[str]) -> str | None:
        """The format of an affine grid that takes the place of another: the narrowest that is not narrower, else the
        widest; None where there is none."""
        wanted = FORMATS[spec.format]
        if wanted.grid != "affine" or wanted.name == "ternary":
            return None
        fit = [FORMATS[n] for n in allowed if FORMATS[n].grid == "affine" and FORMATS[n].name != "ternary"]
        fit = [f for f in fit if f.signed == wanted.signed] or fit
        wide = [f for f in fit if f.bits >= wanted.bits]
        best = min(wide, key=lambda f: f.bits) if wide else max(fit, key=lambda f: f.bits, default=None)
        return None if best is None else best.name


def check(target: str | Target, layer: str, kind: str, weight: TensorSpec | None, given: TensorSpec | None,
          output: TensorSpec | None = None, dtype: str | None = None) -> None:
    """Hold one layer of a model against a target.

    Args:
        layer: its name, for the message. ``kind``: ``Linear``, ``Conv2d``, ...
        weight, given, output: specs of weight, input and output.
        dtype: of the layer when it was float, in which the files of some targets hold scales; None: not known.

    Raises:
        UnsupportedError: the target cannot run it; the message says what would have to change.
    """
    aim = get(target)
    if aim.operators and kind not in (*aim.operators, "Embedding") and (weight or given):
        raise UnsupportedError(f"{layer}: {aim.name} runs no {kind} on integers, only {', '.join(aim.operators)}; give "
                               "it a rule with keep: float32")
    if kind == "Embedding" and kind not in aim.operators:
        return
    if aim.scale_dtype == "model":
        aim = replace(aim, scale_dtype=dtype or "float32")
    specs: dict[str, Any] = {"weight": weight, "input": given, "output": output}
    for role, spec in ((k, v) for k, v in specs.items() if v is not None):
        fitting = _Fitting(aim)
        rule = Rule(name=layer, **{role: spec})
        try:
            if role == "weight":
                fitting.weight(rule, spec, given is None)
            else:
                fitting.activation(rule, spec)
        except (SpecError, UnsupportedError) as error:
            raise UnsupportedError(f"{layer}: {error}") from None
        if fitting.changes:
            raise UnsupportedError(f"{layer}: its {role} ({spec}) does not run on {aim.name}. What would: "
                                   f"{'; '.join(fitting.changes)}. Fit the recipe before training: recipe, changes = "
                                   f"qat.targets.adjust(recipe, {aim.name!r})")
