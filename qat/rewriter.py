"""``prepare``: decide what happens to each module, then swap. ``coverage``: say what was decided, and why.

Deciding and doing are two steps. The :class:`Plan` that the first makes is plain data; a deployed checkpoint stores it,
and ``load`` carries out the same plan on a fresh skeleton without deciding anything anew.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qat.errors import PrepareError, RecipeError
from qat.modules.base import REGISTRY, LayerPlan, QuantizedModule, adopt
from qat.modules.functional import MOVERS, QuantizedFunction, take_codes
from qat.modules.normalization import Absorbed, QuantizedBatchNorm, clamp_of
from qat.modules.precision import NarrowFloat, keep_in
from qat.numerics.formats import TensorSpec, get_format
from qat.recipe import Recipe, Rule
from qat.tracing import Call, Key, Trace, leaves, run, trace_by_running, trace_symbolically

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OPAQUE: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "nn.MultiheadAttention reads the raw weights of its children",
    nn.TransformerEncoderLayer: "nn.TransformerEncoderLayer reads the raw weights of its children in eval",
}
"""Modules that bypass their children's forward: a swapped child would be silently inactive."""


@dataclass
class Plan:
    """Everything ``prepare`` decided, as plain data.

    Attributes:
        layers: module name -> its plan.
        narrow: module name -> floating point type it is kept in.
        absorbed: names of activation functions taken over by quantizers.
        movers: names of modules that codes pass through.
        batch_norms: names of all batch norms.
        kept: module or parameter name -> why it stays float.
        backward_dtype: see :class:`~qat.recipe.Recipe`.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    narrow: dict[str, str] = field(default_factory=dict)
    absorbed: list[str] = field(default_factory=list)
    movers: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    backward_dtype: str = "auto"

    @property
    def structured(self) -> bool:
        """Whether anything depends on who feeds whom."""
        return bool(self.absorbed or self.movers or any(p.batch_norm or p.output for p in self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        return {"layers": {n: p.to_dict() for n, p in self.layers.items()}, "narrow": dict(self.narrow),
                "absorbed": list(self.absorbed), "movers": list(self.movers), "batch_norms": list(self.batch_norms),
                "kept": dict(self.kept), "backward_dtype": self.backward_dtype}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        values = dict(data)
        values["layers"] = {n: LayerPlan.from_dict(p) for n, p in values["layers"].items()}
        return cls(**values)


@dataclass
class Prepared:
    """What a prepared model remembers about its making (kept on the root module, not in its state dict)."""

    recipe: Recipe
    plan: Plan
    functions: list[Call] | None
    macs: dict[str, int]


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` came out of :func:`prepare`, :func:`~qat.deploy.convert` or ``load``."""
    return "_qat" in model.__dict__


def prepared_state(model: nn.Module) -> Prepared:
    """What ``prepare`` left on the model; :class:`PrepareError` if it is a float model."""
    if not is_prepared(model):
        raise PrepareError("this model is not prepared: call qat.prepare(model, recipe) first")
    return model.__dict__["_qat"]


def prepare(model: nn.Module, recipe: Recipe | Mapping[str, Any] | str, example_inputs: Any = None,
            inplace: bool = False) -> nn.Module:
    """A trainable copy of ``model`` whose layers compute on integers.

    Hooks, ties, dtype, device, ``train``/``eval`` mode and ``requires_grad`` are kept; state-dict keys are a superset
    of the float model's.

    Args:
        model: any module.
        recipe: a :class:`Recipe`, its dict, or the name of a preset.
        example_inputs: one batch (a tensor, a tuple of arguments or a dict of keywords). With it the model is run once,
            in eval, to see who feeds whom: batch norms are folded, ReLUs absorbed, function calls seen. Without it the
            structure is found symbolically where that is possible.
        inplace: rewrite ``model`` itself.

    Raises:
        RecipeError: a rule that matches nothing.
        PrepareError: prepared already; group sizes that do not divide; tied weights under different rules.
    """
    if isinstance(recipe, str):
        recipe = Recipe.preset(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    if is_prepared(model) or any(isinstance(m, QuantizedModule) for m in model.modules()):
        raise PrepareError("this model is prepared already; prepare the float model, or load its weights into a new one")
    for name, module in model.named_modules():
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise PrepareError(f"{name or 'the model'} is lazy and has no weights yet: run it once before prepare")
    if not inplace:
        try:
            model = copy.deepcopy(model)
        except RuntimeError as error:
            raise PrepareError(f"this model cannot be copied ({error}); give inplace=True, or use the weight norm of "
                               "nn.utils.parametrizations") from None
    trace = trace_by_running(model, example_inputs) if example_inputs is not None else trace_symbolically(model)
    plan = _Planner(model, recipe, trace).plan()
    if example_inputs is not None and plan.structured and not _same_function(model, plan, example_inputs):
        warnings.warn("this model reads values between layers in ways that tracing does not see, so no batch norm is "
                      "folded, no ReLU absorbed and no codes are passed on", stacklevel=2)
        plan = _Planner(model, recipe, None).plan()
    model = carry_out(model, plan)
    functions = None
    if trace is not None and trace.executed:
        functions = [c for c in trace.functions if not str(c.function).startswith("~") and c.owner not in plan.layers]
    macs: dict[str, int] = {}
    for call in trace.calls if trace else ():
        if call.module is not None:
            macs[call.module] = macs.get(call.module, 0) + call.macs
    model.__dict__["_qat"] = Prepared(recipe, plan, functions, macs)
    _check_active(model)
    return model


def _same_function(model: nn.Module, plan: Plan, inputs: Any) -> bool:
    """Whether folding, absorbing and chaining leave the function alone, in eval and in training.

    A trial copy computes in floating point with everything folded, absorbed and passed on; it must agree with the
    float model up to the order of roundings.
    """
    trial = carry_out(copy.deepcopy(model), copy.deepcopy(plan))
    for module in quantized_modules(trial).values():
        module.calibrating = module.checking = True
    for training in (False, True):
        results = []
        for candidate in (model, trial):
            saved = {k: v.clone() for k, v in candidate.state_dict().items() if isinstance(v, torch.Tensor)}
            modes = {m: m.training for m in candidate.modules()}
            candidate.train(training)
            try:
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(0)
                    results.append([t for t in leaves(run(candidate, inputs)) if isinstance(t, torch.Tensor)])
            except Exception:
                if candidate is trial:
                    return False
                break  # the float model itself cannot run on these inputs in this mode: nothing to compare
            finally:
                candidate.load_state_dict(saved, strict=False)
                for part, mode in modes.items():
                    part.training = mode
        if len(results) == 2 and not (len(results[0]) == len(results[1])
                                      and all(_close(a, b) for a, b in zip(*results))):
            return False
    return True


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    size = float(a.abs().max()) if a.numel() else 0.0
    return not a.numel() or float((a - b).abs().max()) <= 0.02 * max(size, 1e-6)


def carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    """Swap the modules of ``model``, in place, as ``plan`` says."""
    modules = dict(model.named_modules())
    for name, layer in sorted(plan.layers.items(), key=lambda item: item[1].tied_to is not None):
        if name not in modules:
            raise PrepareError(f"the plan names a module {name!r} that this model does not have")
        module, quantized = modules[name], _quantized_type(modules[name])
        if quantized is None or quantized.replaces.__name__ != layer.kind:
            raise PrepareError(f"{name} is a {type(module).__name__}, but the plan was made for a {layer.kind}")
        shared = modules[layer.tied_to].weight_quantizer if layer.tied_to else None
        swapped = quantized.swap(module, name, layer, shared)
        swapped.backward_dtype = plan.backward_dtype
    folded = {layer.batch_norm: name for name, layer in plan.layers.items() if layer.batch_norm}
    for name in plan.batch_norms:
        QuantizedBatchNorm.swap(modules[name], modules.get(folded.get(name, "\0")))
    for name in plan.absorbed:
        adopt(Absorbed, modules[name])
    for name in plan.movers:
        take_codes(modules[name])
    for name, dtype in plan.narrow.items():
        keep_in(modules[name], dtype)
    return model


def _quantized_type(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class for a module: by its type, or a base type whose forward it did not override."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    if kind in REGISTRY:
        return REGISTRY[kind]
    for base in kind.__mro__:
        if base in REGISTRY and kind.forward is base.forward and kind.__call__ is base.__call__:
            return REGISTRY[base]
    return None


class _Planner:
    """Decides. One instance for one model; ``plan()`` is read top to bottom."""

    def __init__(self, model: nn.Module, recipe: Recipe, trace: Trace | None) -> None:
        self.model, self.recipe, self.trace = model, recipe, trace
        self.modules = dict(model.named_modules())
        self.aliases: dict[str, list[str]] = {}
        first = {id(m): n for n, m in self.modules.items()}
        for alias, module in model.named_modules(remove_duplicate=False):
            self.aliases.setdefault(first[id(module)], []).append(alias)
        self.result = Plan(backward_dtype=recipe.backward_dtype)
        self.rules: dict[str, Rule] = {}

    def plan(self) -> Plan:
        self.apply_rules()
        self.treat_edges()
        self.check_groups()
        self.settle_ties()
        self.result.batch_norms = [n for n, m in self.modules.items() if type(m) in BATCH_NORMS]
        if self.trace is not None:
            self.fold_batch_norms()
            self.chain()
            self.absorb()
        return self.result

    # ------------------------------------------------------------------ rules

    def apply_rules(self) -> None:
        used: set[Rule] = set()
        refused: dict[Rule, str] = {}
        opaque = {n: reason for n, m in self.modules.items() for kind, reason in OPAQUE.items() if isinstance(m, kind)}
        for name, module in self.modules.items():
            kinds = self.kinds(name)
            rule = next((r for r in self.recipe.rules if any(r.matches(a, kinds) for a in self.aliases[name])), None)
            leaf = not any(True for _ in module.children()) and bool(module._parameters)
            quantized = _quantized_type(module)
            inside = next((o for o in opaque if name == o or name.startswith(f"{o}." if o else "")), None)
            if rule is None:
                if leaf or quantized:
                    self.result.kept[name] = "no rule matches"
                continue
            if rule.keep is not None:
                if not leaf and inside is not None:
                    self.result.kept[name] = f"{rule} keeps it; float32, since {opaque[inside]}"
                if leaf:
                    used.add(rule)
                    self.result.kept[name] = f"{rule} keeps it {rule.keep}"
                    if rule.keep != "float32":
                        if inside is not None or isinstance(module, BATCH_NORMS):
                            self.result.kept[name] += f"; float32, since {opaque.get(inside or '', 'batch norm')}"
                        else:
                            self.result.narrow[name] = rule.keep
                continue
            reason = self.obstacle(module, quantized, rule, opaque[inside] if inside is not None else None)
            if reason is not None:
                refused.setdefault(rule, f"{name}: {reason}")
                if leaf or any(p is not None for p in module._parameters.values()):
                    self.result.kept[name] = reason
                continue
            assert quantized is not None
            plan = self.layer(name, quantized, rule)
            if plan.weight is None and plan.input is None and plan.output is None:
                self.result.kept[name] = f"{rule} says nothing for a {plan.kind}"
                continue
            used.add(rule)
            self.rules[name] = rule
            self.result.layers[name] = plan
        taken = [n for n, rule in self.rules.items() if rule.optional]
        for rule in self.recipe.rules:
            if any(rule.matches(a, self.kinds(n)) for n in taken for a in self.aliases[n]):
                continue                # an optional rule in front, as presets have, was faster
            if rule not in used and not rule.optional:
                because = f" ({refused[rule]})" if rule in refused else ""
                raise RecipeError(f"{rule} matches nothing{because}; modules are "
                                  f"{', '.join(n for n in list(self.modules)[:12] if n)}...")

    def kinds(self, name: str) -> tuple[str, ...]:
        """The class names that a rule's ``type`` may name for a module."""
        return tuple(c.__name__ for c in type(self.modules[name]).__mro__ if c not in (object, nn.Module))

    def obstacle(self, module: nn.Module, quantized: type[QuantizedModule] | None, rule: Rule,
                 opaque: str | None) -> str | None:
        """Why this module cannot be quantized, or None."""
        if opaque is not None:
            return opaque
        if quantized is None:
            base = next((b.__name__ for b in type(module).__mro__ if b in REGISTRY), None)
            if base is not None:
                return f"{type(module).__name__} overrides the forward of {base}"
            return f"no quantized form of {type(module).__name__}"
        if issubclass(quantized, QuantizedFunction) and not (rule.explicit or rule.type):
            return "functions are quantized by rules that name them"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "max_norm rewrites the weight at every look-up"
        return None

    def layer(self, name: str, quantized: type[QuantizedModule], rule: Rule) -> LayerPlan:
        weight = rule.weight if not issubclass(quantized, QuantizedFunction) else None
        source = rule.input if quantized.takes_input_spec else None
        if source is not None:
            source = source.for_activation()
            if source.granularity == "per_token" and "Conv" in quantized.replaces.__name__:
                source = source.replace(granularity="per_sample")
        return LayerPlan(quantized.replaces.__name__, None if weight is None else weight.for_weight(), source,
                         None if rule.output is None else rule.output.for_activation())

    def products(self) -> list[str]:
        """Names of the matmul-like layers, in the order they run (where known) or are defined."""
        names = [n for n, p in self.result.layers.items() if p.kind not in ("Embedding", "Add", "Concat")]
        if self.trace is None:
            return names
        order = {c.module: i for i, c in reversed(list(enumerate(self.trace.calls))) if c.module is not None}
        return sorted((n for n in names if n in order), key=lambda n: order[n]) or names

    def treat_edges(self) -> None:
        products = self.products()
        if self.recipe.edges != "int8" or not products:
            return
        weights = {n: getattr(self.modules[n], "weight", None) for n in self.result.layers}
        edges = {products[0], products[-1]}
        tied = {id(weights[e]) for e in edges}  # what shares a weight with an edge shares its codes
        for name in [n for n in self.result.layers if n in edges or (weights[n] is not None and id(weights[n]) in tied)]:
            plan = self.result.layers[name]
            if self.rules[name].explicit:
                continue
            if plan.weight is not None and plan.weight.bits < 8:
                plan.weight = TensorSpec("int8").for_weight()
                plan.reason = "edge: int8"
            if plan.input is not None and plan.input.bits < 8:
                dynamic = plan.input.dynamic
                plan.input = TensorSpec("int8", plan.input.granularity, dynamic=dynamic).for_activation()
                plan.reason = "edge: int8"

    def check_groups(self) -> None:
        wrong = []
        for name, plan in self.result.layers.items():
            spec, weight = plan.weight, getattr(self.modules[name], "weight", None)
            source = plan.input
            if plan.kind.startswith("ConvTranspose") and source is not None and not (
                    source.fmt.has_zero and (source.symmetric or not source.dynamic)):
                raise PrepareError(f"{name}: a transposed convolution spreads its input with zeros, which needs an affine "
                                   f"format with one zero point, not {source}; give it a rule of its own")
            if spec is None or spec.granularity != "per_group" or weight is None:
                continue
            size = spec.group_size
            assert size is not None
            inputs = weight.numel() // self.out_channels(name)
            if inputs % size and spec.group_fallback == "divisor":
                divisor = math.gcd(inputs, 1 << (size.bit_length() - 1))
                plan.weight = spec.replace(group_size=divisor)
                plan.reason = f"group_size {size} does not divide {inputs} inputs: {divisor}"
            elif inputs % size:
                wrong.append(f"{name} ({inputs} inputs)")
            if plan.input is not None and plan.kind != "Linear":
                raise PrepareError(f"{name}: per_group weights under integer activations are for Linear; give "
                                   f"{plan.kind} layers a rule with per_channel weights")
        if wrong:
            raise PrepareError(f"group_size does not divide the inputs of {', '.join(wrong)}; choose another size, or "
                               "group_fallback: divisor")

    def out_channels(self, name: str) -> int:
        module = self.modules[name]
        for attribute in ("out_features", "out_channels", "num_embeddings"):
            if hasattr(module, attribute):
                return int(getattr(module, attribute))
        raise PrepareError(f"{name}: cannot tell its output channels")

    # ------------------------------------------------------------------ ties

    def settle_ties(self) -> None:
        """Modules that share a weight share its quantizer; all of them are quantized, or none."""
        owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() > 1:
                    owners.setdefault(id(parameter), []).append(name)
        for names in owners.values():
            planned = [n for n in names if n in self.result.layers]
            if not planned:
                continue
            floats = [n for n in names if n not in planned] + self.function_readers(names[0])
            if floats:
                for name in planned:
                    del self.result.layers[name]
                    self.result.kept[name] = f"its weight is shared with {floats[0]}, which stays float"
                continue
            specs = {n: self.result.layers[n].weight for n in planned}
            if len(set(specs.values())) > 1:
                firm = {n: s for n, s in specs.items() if not self.rules[n].optional}
                if len({s for n, s in firm.items() if self.rules[n].explicit or len(firm) == len(specs)}) > 1:
                    raise PrepareError("a shared weight has one set of codes, but the rules disagree: " +
                                       "; ".join(f"{n}: {s}" for n, s in specs.items()))
                chosen = max((s for s in (firm or specs).values() if s is not None), key=lambda s: s.bits)
                for name in planned:
                    if self.result.layers[name].weight != chosen:
                        self.result.layers[name].weight = chosen
                        self.result.layers[name].reason = f"as {', '.join(n for n in planned if n != name)}, shared weight"
            for name in planned[1:]:
                self.result.layers[name].tied_to = planned[0]

    def function_readers(self, owner: str) -> list[str]:
        """Function calls that read the weight of a module (``F.linear(h, self.embedding.weight)``)."""
        return [f"a call of {c.function} in {c.owner or 'the model'}" for c in (self.trace.functions if self.trace else ())
                if not str(c.function).startswith("~") and c.owner not in self.aliases[owner]
                and any(f"{a}.weight" in c.parameters for a in self.aliases[owner])]

    # ------------------------------------------------------------------ what follows from who feeds whom

    def calls(self, name: str) -> list[Call]:
        assert self.trace is not None
        return self.trace.of(name)

    def readers(self, key: Key) -> list[Call | None]:
        assert self.trace is not None
        return self.trace.consumers(key)

    def quiet(self, name: str) -> bool:
        """Whether nobody listens in on a module with hooks."""
        module = self.modules[name]
        return not (module._forward_hooks or module._forward_pre_hooks)

    def fold_batch_norms(self) -> None:
        for name in self.result.batch_norms:
            module, calls = self.modules[name], self.calls(name)
            if len(calls) != 1 or module.running_mean is None or not self.quiet(name) or len(self.aliases[name]) > 1:
                continue
            source = calls[0].inputs[0]
            assert self.trace is not None
            producer = self.trace.producer(source)
            if producer is None or producer.module not in self.result.layers:
                continue
            plan = self.result.layers[producer.module]
            channels_first = {"Linear": 2, "Conv1d": 3, "Conv2d": 4, "Conv3d": 5, "ConvTranspose1d": 3,
                              "ConvTranspose2d": 4, "ConvTranspose3d": 5}.get(plan.kind)
            fits = calls[0].dims == channels_first or (calls[0].dims == 0 and plan.kind != "Linear")
            if (fits and plan.kind != "Embedding" and plan.weight is not None and plan.input is not None
                    and plan.weight.granularity != "per_group" and plan.tied_to is None
                    and len(self.calls(producer.module)) == 1 and self.readers(source) == [calls[0]]
                    and self.quiet(producer.module) and not any(p.tied_to == producer.module
                                                                for p in self.result.layers.values())):
                plan.batch_norm = name

    def absorb(self) -> None:
        """Activation functions in front of quantizers become part of them, where every reader is such a quantizer."""
        candidates = {n: c for n, m in self.modules.items() if (c := clamp_of(m)) is not None
                      and n not in self.result.absorbed and self.quiet(n) and self.calls(n) and self.harmless(n)}
        layers = self.result.layers

        def source(call: Call) -> str | None:
            assert self.trace is not None
            producer = self.trace.producer(call.inputs[0]) if call.inputs else None
            return None if producer is None else producer.module

        changed = True
        while changed:
            changed = False
            takers: dict[str, set[str]] = {}
            for name in candidates:
                for call in self.calls(name):
                    for reader in self.readers(call.outputs[0]):
                        takers.setdefault(name, set()).add("" if reader is None or reader.module is None
                                                           else reader.module)
            for name, clamp in list(candidates.items()):
                fine = bool(takers.get(name)) and all(
                    t in layers and layers[t].input is not None and not layers[t].chained and self.quiet(t)
                    and layers[t].kind not in ("Add", "Concat")
                    and get_format(layers[t].input.format).has_zero  # type: ignore[union-attr]
                    and layers[t].input.format != "ternary"  # type: ignore[union-attr]
                    and getattr(self.modules[t], "padding_mode", "zeros") == "zeros"
                    and all(candidates.get(source(c) or "") == clamp for c in self.calls(t))
                    for t in takers[name])
                if not fine:
                    del candidates[name]
                    changed = True
        for name, clamp in candidates.items():
            self.result.absorbed.append(name)
            for taker in takers[name]:
                spec = layers[taker].input
                assert spec is not None
                layers[taker].input = unsigned(spec)
                layers[taker].absorbs = clamp

    def harmless(self, name: str) -> bool:
        """Whether nobody else reads what an in-place module overwrites (a run shows versions, a symbolic trace does not)."""
        assert self.trace is not None
        return (self.trace.executed or not getattr(self.modules[name], "inplace", False)
                or all(len(self.readers(c.inputs[0])) == 1 for c in self.calls(name)))

    def chain(self) -> None:
        """Layers with an output spec pass codes on, where everyone who reads them takes codes."""
        layers = self.result.layers
        for name in [n for n, p in layers.items() if p.output is not None]:
            plan, calls = layers[name], self.calls(name)
            assert plan.output is not None
            if len(calls) != 1 or plan.output.granularity != "per_tensor" or not self.quiet(name):
                continue
            tail = calls[0]
            if plan.batch_norm:
                tail = self.calls(plan.batch_norm)[0]
            readers = self.readers(tail.outputs[0])
            follower = readers[0].module if len(readers) == 1 and readers[0] is not None else None
            if follower and (clamp := clamp_of(self.modules[follower])) and get_format(plan.output.format).has_zero \
                    and len(self.calls(follower)) == 1 and self.quiet(follower):
                plan.output_absorbs, plan.output = clamp, unsigned(plan.output)
                self.result.absorbed.append(follower)
                tail = self.calls(follower)[0]
            takers, movers = self.takers(tail.outputs[0], plan.output)
            if takers is None:
                continue
            plan.emits_codes = True
            self.result.movers += [m for m in movers if m not in self.result.movers]
        self.chain_consumers()

    def takers(self, key: Key, spec: TensorSpec) -> tuple[set[str] | None, list[str]]:
        """The layers that read a tensor, through modules that only move values; None if one of them needs floats."""
        found: set[str] = set()
        movers: list[str] = []
        readers = self.readers(key)
        for reader in readers:
            if reader is None or reader.module is None:
                return None, []
            module = self.modules[reader.module]
            if type(module) in MOVERS and len(self.calls(reader.module)) == 1 and self.quiet(reader.module):
                movers.append(reader.module)
                if reader.outputs[0] != key:            # else it returned its input: who reads that is seen here anyway
                    beyond, more = self.takers(reader.outputs[0], spec)
                    if beyond is None:
                        return None, []
                    found |= beyond
                    movers += more
                continue
            plan = self.result.layers.get(reader.module)
            if plan is None or plan.kind == "Embedding" or not self.quiet(reader.module) or getattr(module, "padding_mode", "zeros") != "zeros":
                return None, []
            if plan.input is not None and plan.input.bits != spec.bits:
                return None, []
            found.add(reader.module)
        return (found or None), movers

    def chain_consumers(self) -> None:
        """A layer all of whose calls get codes has no input quantizer; if only some do, nobody sends it codes."""
        layers = self.result.layers
        changed = True
        while changed:
            changed = False
            for name, plan in layers.items():
                if plan.kind in ("Add", "Concat"):
                    continue
                senders = [self.sender(c.inputs[0]) for c in self.calls(name) if c.inputs]
                coded = [s for s in senders if s is not None and layers[s].emits_codes]
                plan.chained = bool(coded) and len(coded) == len(senders)
                if coded and not plan.chained:
                    for sender in coded:
                        layers[sender].emits_codes = False
                        changed = True

    def sender(self, key: Key) -> str | None:
        """The quantized layer whose output a tensor is, through folded, absorbed and moving modules."""
        assert self.trace is not None
        producer = self.trace.producer(key)
        while producer is not None and producer.module is not None and producer.module not in self.result.layers:
            passes = (producer.module in self.result.absorbed or producer.module in self.result.movers
                      or any(p.batch_norm == producer.module for p in self.result.layers.values()))
            if not passes or not producer.inputs:
                return None
            producer = self.trace.producer(producer.inputs[0])
        return None if producer is None else producer.module


def unsigned(spec: TensorSpec) -> TensorSpec:
    """``spec`` for values that are never negative: unsigned codes whose lowest is real zero."""
    return spec.replace(format=spec.fmt.unsigned().name, symmetric=spec.learned != "pact",
                        learned="lsq" if spec.learned == "lsq_plus" else spec.learned)


def _check_active(model: nn.Module) -> None:
    """Fault 1: each quantizer is reachable and its grid holds no more than ``2 ** bits`` values.

    Raises:
        PrepareError: naming the module whose quantizer is shadowed or does nothing.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for role in ("weight_quantizer", "input_quantizer", "output_quantizer"):
            if getattr(module, role) is not module._modules.get(role):
                raise PrepareError(f"{name}: an attribute of {type(module).__name__} called {role} hides its quantizer; "
                                   "rename it")
        quantizer = module.weight_quantizer
        if quantizer is not None and module.weight.numel():
            with torch.no_grad():
                codes = quantizer.codes(module.weight_matrix())
            quantizer.restart()  # weights may still change before the first step
            fmt = quantizer.spec.fmt
            if codes.is_floating_point() or int(codes.min()) < fmt.lo or int(codes.max()) > fmt.hi:
                raise PrepareError(f"{name}: its weight quantizer returns values outside of {fmt}; it is not quantizing")


# ---------------------------------------------------------------------------------------------------- coverage


@dataclass(frozen=True)
class Row:
    """One line of coverage. ``status``: ``quantized``, ``kept`` or ``unobserved``."""

    name: str
    kind: str
    status: str
    weight: str
    input: str
    params: int
    macs: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Every parameter and every matrix product of a model, as quantized or kept, with the reason."""

    rows: tuple[Row, ...]

    @property
    def quantized_params(self) -> int:
        return sum(r.params for r in self.rows if r.status == "quantized")

    @property
    def total_params(self) -> int:
        return sum(r.params for r in self.rows)

    @property
    def fraction(self) -> float:
        """Share of the parameters that are quantized; 0 for a model without any."""
        return self.quantized_params / self.total_params if self.total_params else 0.0

    @property
    def unobserved(self) -> bool:
        """Whether function calls could not be seen yet."""
        return any(r.status == "unobserved" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dict(vars(r)) for r in self.rows], "quantized_params": self.quantized_params,
                "total_params": self.total_params}

    def __str__(self) -> str:
        head = ("name", "kind", "status", "weight", "input", "params", "MACs", "reason")
        lines = [head, *((r.name, r.kind, r.status, r.weight, r.input, f"{r.params:,}", f"{r.macs:,}", r.reason)
                         for r in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.rjust(w) if i in (5, 6) else cell.ljust(w)
                          for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
        text.append(f"{self.quantized_params:,} of {self.total_params:,} parameters quantized ({self.fraction:.1%})")
        return "\n".join(text)


def coverage(model: nn.Module) -> Coverage:
    """Every parameter, and every matrix product the model was seen to make, as quantized or kept, with the reason.

    Raises:
        PrepareError: the model is not prepared.
    """
    state = prepared_state(model)
    rows: list[Row] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if getattr(module, "is_quantizer", False) or ".weight_quantizer" in name or ".input_quantizer" in name:
            continue
        if isinstance(module, QuantizedModule):
            rows.append(_quantized_row(name, module, state, seen))
            continue
        own = {k: p for k, p in module._parameters.items() if p is not None and id(p) not in seen}
        seen.update(id(p) for p in own.values())
        if any(p is not None for p in module._parameters.values()):
            folded = getattr(module, "_producer", None)
            default = f"no quantized form of {type(module).__name__}"
            reason = f"folded into {folded[0].name} in eval" if folded else state.plan.kept.get(name, default)
            if not folded and isinstance(module, QuantizedBatchNorm):
                reason = "batch norm, not folded"
            if isinstance(module, NarrowFloat):
                reason = state.plan.kept.get(name, reason)
            rows.append(Row(name, type(module).__name__, "kept", "", "", sum(p.numel() for p in own.values()),
                            state.macs.get(name, 0), reason))
    for call in state.functions or ():
        used = f" of {', '.join(call.parameters)}" if call.parameters else ""
        rows.append(Row(f"{call.owner or 'model'}: {call.function}", "function", "kept", "", "", 0, call.macs,
                        f"called as a function{used}: no module to swap"))
    if state.functions is None:
        rows.append(Row("(function calls)", "function", "unobserved", "", "", 0, 0,
                        "seen when the model runs: give prepare example_inputs, or calibrate"))
    return Coverage(tuple(rows))


def _quantized_row(name: str, module: QuantizedModule, state: Prepared, seen: set[int]) -> Row:
    plan = module.plan
    params = 0
    if module.frozen:
        if id(module.weight_codes) not in seen:
            params += math.prod(module.weight_shape)
        seen.add(id(module.weight_codes))
    for key, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            params += parameter.numel()
    reasons = [plan.reason] if plan.reason else []
    if plan.tied_to:
        reasons.append(f"weight shared with {plan.tied_to}, quantized once")
    if plan.chained:
        reasons.append("takes codes")
    if plan.absorbs:
        reasons.append("ReLU absorbed" if plan.absorbs == (0.0, None) else f"clamp{plan.absorbs} absorbed")
    if plan.batch_norm:
        reasons.append(f"{plan.batch_norm} folded in eval")
    if plan.output:
        reasons.append(f"output {plan.output}" + (" as codes" if plan.emits_codes else ""))
    return Row(name, plan.kind, "quantized", str(plan.weight or "float"), str(plan.input or "float"), params,
               state.macs.get(name, 0), "; ".join(reasons))


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """All quantized modules by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}

