"""Deciding: which module is quantized how, and what follows from who feeds whom. :mod:`qat.rewriter` does it.

The :class:`Plan` that comes out is plain data; a deployed checkpoint stores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qat.errors import PrepareError, RecipeError
from qat.modules.base import REGISTRY, LayerPlan, QuantizedModule, quantized_type
from qat.modules.functional import MOVERS, QuantizedFunction
from qat.modules.normalization import clamp_of
from qat.numerics.formats import TensorSpec
from qat.recipe import Recipe, Rule
from qat.tracing import Call, Key, Trace

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


class Planner:
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
            quantized = quantized_type(module)
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
        tied = {id(weights[e]) for e in edges if weights[e] is not None}
        for name, plan in self.result.layers.items():
            shares = id(weights[name]) in tied  # what shares a weight with an edge shares its codes
            if not (name in edges or shares) or self.rules[name].explicit:
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
                raise PrepareError(f"{name}: a transposed convolution spreads its input with zeros, which needs an "
                                   f"affine format with one zero point, not {source}; give it a rule of its own")
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
                    plan, others = self.result.layers[name], [n for n in planned if n != name]
                    if plan.weight != chosen:
                        plan.weight = chosen
                        plan.reason = f"as {', '.join(others)}, shared weight"
            for name in planned[1:]:
                self.result.layers[name].tied_to = planned[0]

    def function_readers(self, owner: str) -> list[str]:
        """Function calls that read the weight of a module (``F.linear(h, self.embedding.weight)``)."""
        aliases = self.aliases[owner]
        return [f"a call of {c.function} in {c.owner or 'the model'}"
                for c in (self.trace.functions if self.trace else ())
                if not str(c.function).startswith("~") and c.owner not in aliases
                and any(f"{a}.weight" in c.parameters for a in aliases)]

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
                    t in layers and (spec := layers[t].input) is not None and not layers[t].chained and self.quiet(t)
                    and layers[t].kind not in ("Add", "Concat") and takes_clamps(spec)
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
        """Whether nobody else reads what an in-place module overwrites.

        A run shows versions of tensors, a symbolic trace does not.
        """
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
            if (follower and (clamp := clamp_of(self.modules[follower])) and plan.output.fmt.has_zero
                    and len(self.calls(follower)) == 1 and self.quiet(follower)):
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
        for reader in self.readers(key):
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
            if (plan is None or plan.kind == "Embedding" or not self.quiet(reader.module)
                    or getattr(module, "padding_mode", "zeros") != "zeros"):
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


def takes_clamps(spec: TensorSpec) -> bool:
    """Whether a quantizer with this spec can take over a clamp from zero up that is in front of it."""
    return (spec.fmt.has_zero and spec.format != "ternary") or spec.learned == "rsign"


def unsigned(spec: TensorSpec) -> TensorSpec:
    """``spec`` for values that are never negative: unsigned codes whose lowest is real zero."""
    return spec.replace(format=spec.fmt.unsigned().name, symmetric=spec.learned != "pact",
                        learned="lsq" if spec.learned == "lsq_plus" else spec.learned)
