"""Deciding: which module is quantized how, and what follows from who feeds whom. :mod:`qat.rewriter` does it.

The :class:`Plan` that comes out is plain data; a deployed checkpoint stores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from qat.errors import PrepareError, RecipeError
from qat.modules.base import REGISTRY, LayerPlan, QuantizedModule, quantized_type
from qat.modules.composite import Composite
from qat.modules.functional import MOVERS, QuantizedFunction, QuantizedMatMul
from qat.modules.normalization import clamp_of
from qat.modules.parameters import SUFFIX, QuantizedParameters, Reading, as_matrix
from qat.numerics.formats import TensorSpec
from qat.recipe import PLACING, Recipe, Rule
from qat.tracing import Call, Key, Trace

FUNCTIONS = ("Add", "Concat", "MatMul", "AttentionScores", "AttentionContext")
"""Kinds whose operands are quantized one by one, whether they come as codes or not."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OPAQUE = "a floating point nn.MultiheadAttention reads the raw weights of its children"
"""Why what is inside of a module that bypasses its children's forward stays float: a swap would be inactive."""
WHOLES = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers whose type a rule may name for all that is inside of them."""


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
        traced: module name -> its new children, with their kinds, for functions that its forward called.
        attention: attention module of transformers that calls our function -> heads and channels of keys and values.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    narrow: dict[str, str] = field(default_factory=dict)
    absorbed: list[str] = field(default_factory=list)
    movers: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    backward_dtype: str = "auto"
    traced: dict[str, dict[str, str]] = field(default_factory=dict)
    attention: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def structured(self) -> bool:
        """Whether anything depends on who feeds whom."""
        return bool(self.absorbed or self.movers or any(p.batch_norm or p.output for p in self.layers.values()))

    @property
    def parameters(self) -> set[str]:
        """Dotted names of the quantized parameters that functions read."""
        return {_join(n, part.removesuffix(SUFFIX)) for n, p in self.layers.items()
                if p.kind == QuantizedParameters.kind for part, own in p.parts.items() if own.weight is not None}

    def makes(self, call: Call) -> bool:
        """Whether a quantized module makes this product of a function in a way of its own."""
        owner = self.layers.get(call.owner)
        if owner is not None and owner.kind != QuantizedParameters.kind:
            return True
        between = call.function == "multi_head_attention_forward"       # it makes products of activations too
        return not between and not self.parameters.isdisjoint(call.parameters)

    def to_dict(self) -> dict[str, Any]:
        return {"layers": {n: p.to_dict() for n, p in self.layers.items()}, "narrow": dict(self.narrow),
                "absorbed": list(self.absorbed), "movers": list(self.movers), "batch_norms": list(self.batch_norms),
                "kept": dict(self.kept), "backward_dtype": self.backward_dtype,
                "traced": {n: dict(made) for n, made in self.traced.items()},
                "attention": {n: dict(sizes) for n, sizes in self.attention.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        values = dict(data)
        values["layers"] = {n: LayerPlan.from_dict(p) for n, p in values["layers"].items()}
        return cls(**values)


@dataclass
class Product:
    """One weight and the product it makes: a layer's, or that of one part of a composite.

    Attributes:
        plan: the layer's or the part's.
        holder, attribute: name of the module that holds the weight, and the weight's name in it.
        weight: (out, in, ...) as it enters the product; None for a function without weight.
        rows: which rows of the attribute, where it is not all.
        owner: name of the planned module.
    """

    plan: LayerPlan
    holder: str
    attribute: str
    weight: Tensor | None
    rows: tuple[int, int] | None
    owner: str

    def shares(self, other: Product, modules: Mapping[str, nn.Module]) -> bool:
        """Whether both are one weight."""
        mine, theirs = (modules[p.holder]._parameters.get(p.attribute) for p in (self, other))
        return mine is not None and mine is theirs and self.rows == other.rows


class Planner:
    """Decides. One instance for one model; ``plan()`` is read top to bottom."""

    def __init__(self, model: nn.Module, recipe: Recipe, trace: Trace | None,
                 readings: Mapping[tuple[str, str], Reading] | None = None) -> None:
        self.model, self.recipe, self.trace, self.readings = model, recipe, trace, readings or {}
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
        self.fix_ranges()
        self.settle_ties()
        self.settle_requantizing()
        self.result.batch_norms = [n for n, m in self.modules.items() if type(m) in BATCH_NORMS]
        if self.trace is not None:
            self.fold_batch_norms()
            self.hand_over()
            self.chain()
            if self.recipe.absorb:
                self.absorb()
        return self.result

    # ------------------------------------------------------------------ rules

    def apply_rules(self) -> None:
        used: set[Rule] = set()
        refused: dict[Rule, str] = {}
        opaque: set[str] = set()        # float attention, as far as it is known: parents come before their children
        held: set[str] = set()
        for name, module in self.modules.items():
            if name in held:            # its weight is a part of the composite around it
                continue
            rule = self.rule(name)
            leaf = not any(True for _ in module.children()) and bool(module._parameters)
            quantized = quantized_type(module)
            parts: dict[str, Rule | None] = {}
            read = self.read_by_functions(name, module, quantized)
            if quantized is not None and issubclass(quantized, Composite):
                parts = {part: self.rule(name, part) for part in (*quantized.sources(module), *quantized.products)}
            elif read:
                quantized = QuantizedParameters
                parts = {attribute: self.rule(name, attribute) for attribute in read}
            if rule is None or rule.keep is not None:
                rule = next((r for r in parts.values() if r is not None and r.keep is None), rule)
            inside = any(name.startswith(f"{o}." if o else "") for o in opaque)
            if isinstance(module, nn.MultiheadAttention):
                opaque.add(name)
            if rule is None:
                if leaf or quantized:
                    self.result.kept[name] = "no rule matches"
                continue
            if rule.keep is not None:
                if isinstance(module, nn.MultiheadAttention):
                    self.result.kept[name] = f"{rule} keeps it; float32, since {OPAQUE}"
                if leaf or (quantized is not None and issubclass(quantized, QuantizedFunction)):
                    used.add(rule)
                    self.result.kept[name] = f"{rule} keeps it {rule.keep}"
                    if rule.keep != "float32":
                        if inside or isinstance(module, BATCH_NORMS):
                            self.result.kept[name] += f"; float32, since {OPAQUE if inside else 'batch norm'}"
                        else:
                            self.result.narrow[name] = rule.keep
                continue
            reason = OPAQUE if inside else self.obstacle(name, module, quantized, rule)
            if reason is not None:
                refused.setdefault(rule, f"{name}: {reason}")
                if leaf or any(p is not None for p in module._parameters.values()):
                    self.result.kept[name] = reason
                continue
            assert quantized is not None
            if issubclass(quantized, QuantizedParameters):
                plan = self.parameters(name, read, parts)
            elif issubclass(quantized, Composite):
                plan = self.composite(name, quantized, rule, parts)
            else:
                plan = self.layer(quantized, rule)
            if read:
                used.update(r for r in parts.values() if r is not None)
            active = [p for p in (plan, *plan.parts.values()) if p.weight or p.input or p.output]
            if not active:
                said = {self.result.kept[_join(name, a)] for a in read if _join(name, a) in self.result.kept}
                self.result.kept[name] = "; ".join(sorted(said)) or f"{rule} says nothing for a {plan.kind}"
                continue
            if issubclass(quantized, Composite):
                used.update(r for r in parts.values() if r is not None)
                opaque.discard(name)
            if issubclass(quantized, Composite) and not read:
                held |= {_join(name, s.weight.rpartition(".")[0]) for s in quantized.sources(module).values()} - {name}
            used.add(rule)
            self.rules[name] = rule
            self.result.layers[name] = plan
        taken = [n for n, rule in self.rules.items() if rule.optional and n in self.modules]
        for rule in self.recipe.rules:
            if any(rule.matches(a, self.kinds(n)) for n in taken for a in self.aliases[n]):
                continue                # an optional rule in front, as presets have, was faster
            if rule not in used and not rule.optional:
                because = f" ({refused[rule]})" if rule in refused else ""
                if rule.type in FUNCTIONS and not because:
                    because = (f" (no qat.{rule.type} of that name, and no such function in a forward that can be "
                               f"traced: write a qat.{rule.type} into the model; attention of transformers is found "
                               "with example_inputs)")
                raise RecipeError(f"{rule} matches nothing{because}; modules are "
                                  f"{', '.join(n for n in list(self.modules)[:12] if n)}...")

    def rule(self, name: str, part: str | None = None) -> Rule | None:
        """The first rule that matches a module; for a part of a composite also by the part's own dotted name."""
        kinds = self.kinds(name)
        return next((r for r in self.recipe.rules for a in self.aliases[name]
                     if r.matches(a, kinds) or (part is not None and r.matches(_join(a, part), kinds))), None)

    def kinds(self, name: str) -> tuple[str, ...]:
        """The class names that a rule's ``type`` may name for a module."""
        steps = name.split(".")
        around = [self.modules.get(".".join(steps[:i])) for i in range(len(steps))]
        own: list[Any] = [self.modules[name], *(m for m in around if isinstance(m, WHOLES))]
        return tuple(c.__name__ for m in own for c in type(m).__mro__ if c not in (object, nn.Module))

    def read_by_functions(self, name: str, module: nn.Module,
                          quantized: type[QuantizedModule] | None) -> dict[str, Reading]:
        """The parameters of a module that are quantized by what functions do with them.

        They are those that a product reads in the forward of a module without a quantized form, or from outside of a
        module with one (a head that is the table of an embedding, a convolution that is never called). The ``weight``
        of a layer that is known, or derived from one, is one whatever reads it; and so is what nobody reads under this
        name, but under another one (a table that a model keeps for its encoder and decoder).
        """
        if quantized is not None and issubclass(quantized, Composite):
            return {}
        known = any(base in REGISTRY for base in type(module).__mro__)
        found: dict[str, Reading] = {}
        for attribute, parameter in module._parameters.items():
            reading = self.readings.get((name, attribute))
            if reading is None:
                continue
            if known and attribute == "weight" and reading.others:
                reading = replace(reading, floating=[*reading.floating, *reading.others])
            tied = any(other.products and self.modules[holder]._parameters.get(a) is parameter
                       for (holder, a), other in self.readings.items())
            if not (reading.products or reading.others) and tied:
                reading = replace(reading, layouts=["table"])
            if reading.products:
                found[attribute] = reading
            elif reading.others:
                self.result.kept[_join(name, attribute)] = (
                    f"{attribute} is read by {', '.join(dict.fromkeys(reading.others))}, not by a matrix product")
        return {} if quantized is not None and not any(r.outside for r in found.values()) else found

    def obstacle(self, name: str, module: nn.Module, quantized: type[QuantizedModule] | None, rule: Rule) -> str | None:
        """Why this module cannot be quantized, or None."""
        others = {a: r for (holder, a), r in self.readings.items() if holder == name and r.others and not r.products}
        if quantized is None:
            if others:
                return "; ".join(self.result.kept[_join(name, a)] for a in others)
            base = next((b.__name__ for b in type(module).__mro__ if b in REGISTRY), None)
            if base is not None:
                return f"{type(module).__name__} overrides the forward of {base}" + (
                    "" if self.readings else ": give prepare example_inputs, and it is seen what reads its weight")
            return f"no quantized form of {type(module).__name__}"
        if issubclass(quantized, QuantizedFunction) and not (
                rule.explicit or rule.type or issubclass(quantized, QuantizedMatMul)):
            return "adds and concatenations are quantized by rules that name them"
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites the weight at every look-up"
        return None

    def layer(self, quantized: type[QuantizedModule], rule: Rule) -> LayerPlan:
        weight = rule.weight if not issubclass(quantized, QuantizedFunction) else None
        source = rule.input if quantized.takes_input_spec else None
        if source is not None:
            source = source.for_activation()
            if source.granularity == "per_token" and "Conv" in quantized.replaces.__name__:
                source = source.replace(granularity="per_sample")
        output = rule.output if quantized.takes_output_spec else None
        return LayerPlan(quantized.replaces.__name__, None if weight is None else weight.for_weight(), source,
                         None if output is None else output.for_activation())

    def composite(self, name: str, quantized: type[Composite], rule: Rule,
                  parts: Mapping[str, Rule | None]) -> LayerPlan:
        """A plan with a plan for each part, which may have a rule of its own."""
        plan = LayerPlan(quantized.replaces.__name__, output=None if rule.output is None
                         else rule.output.for_activation())
        for part, own in parts.items():
            plan.parts[part] = LayerPlan("MatMul" if part in quantized.products else "Part")
            if own is None or own.keep is not None:
                plan.parts[part].reason = "no rule matches" if own is None else f"{own} keeps it float32"
                continue
            if part not in quantized.products:
                plan.parts[part].weight = None if own.weight is None else own.weight.for_weight()
            plan.parts[part].input = None if own.input is None else own.input.for_activation()
            if part in quantized.products and own.input is None:
                plan.parts[part].reason = f"{own} leaves activations in floating point"
            self.rules[_join(name, part)] = own
        return plan

    def parameters(self, name: str, read: Mapping[str, Reading], rules: Mapping[str, Rule | None]) -> LayerPlan:
        """A plan with a plan for each parameter that functions read."""
        plan = LayerPlan(QuantizedParameters.kind)
        for attribute, reading in read.items():
            own, part = rules[attribute], LayerPlan("Part", layout=reading.layout)
            if own is None or own.keep is not None:
                part.reason = "no rule matches" if own is None else f"{own} keeps it float32"
                self.result.kept[_join(name, attribute)] = part.reason
                continue
            plan.parts[attribute + SUFFIX] = part
            self.rules[_join(name, attribute + SUFFIX)] = own
            part.weight = None if own.weight is None else own.weight.for_weight()
            source = None if own.input is None else own.input.for_activation()
            if source is not None and part.layout == "kernel" and source.granularity == "per_token":
                source = source.replace(granularity="per_sample")
            part.input = None if part.layout == "table" or not reading.layouts else source
            if reading.floating:
                part.reason = f"dequantized for {', '.join(dict.fromkeys(reading.floating))}"
        return plan

    def products(self) -> dict[str, Product]:
        """Every weight in the plan, by the name of its layer or part, in the order of the modules."""
        found: dict[str, Product] = {}
        for name, plan in self.result.layers.items():
            module = self.modules[name]
            if not plan.parts:
                found[name] = Product(plan, name, "weight", getattr(module, "weight", None), None, name)
                continue
            if plan.kind == QuantizedParameters.kind:
                for part, own in plan.parts.items():
                    attribute = part.removesuffix(SUFFIX)
                    weight = as_matrix(module._parameters[attribute], own.layout)
                    found[_join(name, part)] = Product(own, name, attribute, weight, None, name)
                continue
            quantized: Any = quantized_type(module)
            for part, source in quantized.sources(module).items():
                found[_join(name, part)] = Product(
                    plan.parts[part], _join(name, source.weight.rpartition(".")[0]), source.attribute,
                    source.read(module, source.weight), source.rows, name)
        return found

    def edges(self, products: Mapping[str, Product]) -> set[str]:
        """The first and the last matmul-like layer: in the order they run (where known) or are defined."""
        names = [n for n, p in self.result.layers.items() if p.kind not in ("Embedding", *FUNCTIONS)
                 and not (p.parts and all(own.layout == "table" for own in p.parts.values()))]
        if self.trace is not None:
            order = {n: i for i, c in reversed(list(enumerate(self.trace.calls))) for n in (
                [c.module] if c.module is not None else [p.rpartition(".")[0] for p in c.parameters])}
            names = sorted((n for n in names if n in order), key=lambda n: order[n]) or names
        found: set[str] = set()
        for name, first in ((names[0], True), (names[-1], False)) if names else ():
            if not self.result.layers[name].parts:
                found.add(name)
                continue
            functions = self.result.layers[name].kind == QuantizedParameters.kind
            quantized: Any = QuantizedParameters if functions else quantized_type(self.modules[name])
            found |= {_join(name, part) for part in quantized.edge(list(self.result.layers[name].parts), first)}
        return found

    def treat_edges(self) -> None:
        if self.recipe.edges != "int8":
            return
        products = self.products()
        edges = self.edges(products)
        for name, product in products.items():
            # what shares a weight with an edge shares its codes
            edge = name in edges or any(product.shares(products[e], self.modules) for e in edges)
            plan = product.plan
            if not edge or name not in self.rules or self.rules[name].explicit:
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
        for name, product in self.products().items():
            plan, weight = product.plan, product.weight
            spec, source = plan.weight, plan.input
            if plan.kind.startswith("ConvTranspose") and source is not None and not (
                    source.fmt.has_zero and (source.symmetric or not source.dynamic)):
                raise PrepareError(f"{name}: a transposed convolution spreads its input with zeros, which needs an "
                                   f"affine format with one zero point, not {source}; give it a rule of its own")
            if spec is None or spec.granularity != "per_group" or weight is None:
                continue
            size = spec.group_size
            assert size is not None
            inputs = weight.numel() // (weight.shape[0] if plan.kind == "Part" else self.out_channels(name))
            if inputs % size and spec.group_fallback == "divisor":
                divisor = math.gcd(inputs, 1 << (size.bit_length() - 1))
                plan.weight = spec.replace(group_size=divisor)
                plan.reason = f"group_size {size} does not divide {inputs} inputs: {divisor}"
            elif inputs % size:
                wrong.append(f"{name} ({inputs} inputs)")
            if plan.input is not None and (plan.kind not in ("Linear", "Conv1D", "Part") or plan.layout == "kernel"):
                raise PrepareError(f"{name}: per_group weights under integer activations are for Linear; give "
                                   f"{plan.kind} layers a rule with per_channel weights")
        if wrong:
            raise PrepareError(f"group_size does not divide the inputs of {', '.join(wrong)}; choose another size, or "
                               "group_fallback: divisor")

    def fix_ranges(self) -> None:
        """Where an algorithm is to choose the codes of weights, their ranges stand still."""
        if any(algorithm.name in PLACING for algorithm in self.recipe.calibration):
            for product in self.products().values():
                if product.plan.weight is not None:
                    product.plan.weight = product.plan.weight.replace(fixed=True)

    def out_channels(self, name: str) -> int:
        module = self.modules[name]
        for attribute in ("out_features", "out_channels", "num_embeddings", "nf"):
            if hasattr(module, attribute):
                return int(getattr(module, attribute))
        raise PrepareError(f"{name}: cannot tell its output channels")

    # ------------------------------------------------------------------ ties

    def settle_ties(self) -> None:
        """Products that share a weight share its quantizer; all of them are quantized, or none."""
        products = self.products()
        planned_at: dict[tuple[str, str], list[str]] = {}
        for name, product in products.items():
            planned_at.setdefault((product.holder, product.attribute), []).append(name)
        readers: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1:
                    readers.setdefault(id(parameter), []).extend(planned_at.get((name, attribute), [name]))
        for names in readers.values():
            planned = [n for n in names if n in products]
            if not planned:
                continue
            floats = [n for n in names if n not in products] + self.function_readers(products[planned[0]])
            if len({products[n].plan.layout == "columns" for n in planned}) > 1:
                floats = floats or [n for n in planned if products[n].plan.layout == "columns"]     # two matrices
            if not floats and len({products[n].rows for n in planned}) > 1:
                floats = [n for n in planned if any(_overlap(products[n].rows, products[o].rows) for o in planned)]
            for rows in dict.fromkeys(products[n].rows for n in planned):
                sharing = [n for n in planned if products[n].rows == rows]
                others = floats + [n for n in sharing if len(sharing) > 1 and products[n].plan.kind == "Part"
                                   and n not in self.rules]     # a part that no rule quantizes
                if not others:
                    self.tie(sharing, products)
                for name in sharing if others else ():
                    self.keep_float(name, products[name], f"its weight is shared with {others[0]}, which stays float")

    def tie(self, names: list[str], products: Mapping[str, Product]) -> None:
        """Give products of one weight one spec, and one quantizer."""
        specs = {n: products[n].plan.weight for n in names}
        if len(set(specs.values())) > 1:
            firm = {n: s for n, s in specs.items() if not self.rules[n].optional}
            if len({s for n, s in firm.items() if self.rules[n].explicit or len(firm) == len(specs)}) > 1:
                raise PrepareError("a shared weight has one set of codes, but the rules disagree: " +
                                   "; ".join(f"{n}: {s}" for n, s in specs.items()))
            chosen = max((s for s in (firm or specs).values() if s is not None), key=lambda s: s.bits)
            for name in names:
                plan, others = products[name].plan, [n for n in names if n != name]
                if plan.weight != chosen:
                    plan.weight = chosen
                    plan.reason = f"as {', '.join(others)}, shared weight"
        for name in names[1:]:
            products[name].plan.tied_to = names[0]

    def keep_float(self, name: str, product: Product, reason: str) -> None:
        """Take a layer or part out of the plan again; a composite without any part left goes too."""
        if name == product.owner:
            del self.result.layers[name]
            self.result.kept[name] = reason
            return
        product.plan.weight = product.plan.input = None
        product.plan.reason = reason
        layer = self.result.layers.get(product.owner)
        if layer is not None and not any(p.weight or p.input for p in layer.parts.values()) and layer.output is None:
            del self.result.layers[product.owner]
            self.result.kept[product.owner] = reason

    def function_readers(self, product: Product) -> list[str]:
        """Function calls that read a weight (``F.linear(h, self.embedding.weight)``)."""
        owner = self.result.layers.get(product.owner)
        if owner is not None and owner.kind == QuantizedParameters.kind:
            return []                   # they get its codes
        aliases = self.aliases[product.holder]
        return [f"a call of {c.function} in {c.owner or 'the model'}"
                for c in (self.trace.functions if self.trace else ())
                if not str(c.function).startswith("~") and c.owner not in (*aliases, product.owner)
                and any(_join(a, product.attribute) in c.parameters for a in aliases)]

    def settle_requantizing(self) -> None:
        """Codes are made of codes where the recipe says so and every scale stands still."""
        if not self.recipe.requantize:
            return
        for plan in self.result.layers.values():
            plan.requantize = plan.kind == "Add" and plan.output is not None
        for plan in (product.plan for product in self.products().values()):
            static = plan.input is not None and not plan.input.dynamic and plan.input.granularity == "per_tensor"
            if static and plan.weight is not None and plan.weight.granularity != "per_group":
                plan.requantize = True

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
            channels_first = {"Linear": 2, "Conv1D": 2, "Conv1d": 3, "Conv2d": 4, "Conv3d": 5, "ConvTranspose1d": 3,
                              "ConvTranspose2d": 4, "ConvTranspose3d": 5}.get(plan.kind)
            fits = calls[0].dims == channels_first or (calls[0].dims == 0 and channels_first != 2)
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
                    and layers[t].kind not in FUNCTIONS and takes_clamps(spec)
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

    def hand_over(self) -> None:
        """Where codes are made of accumulators, the quantizer of an only reader stands behind the layer that it reads.

        Every value is quantized as before, at the same place of the model; the accumulator is at hand there.
        """
        layers = self.result.layers
        for name, plan in layers.items():
            calls = self.calls(name)
            if (not plan.requantize or plan.output is not None or plan.parts or plan.kind in FUNCTIONS
                    or len(calls) != 1 or not self.quiet(name)):
                continue
            takers, _ = self.takers(self.tail(name)[0].outputs[0])
            if takers is None or len(takers) > 1:
                continue
            taker = next(iter(takers))
            spec = layers[taker].input
            if (spec is not None and not spec.dynamic and spec.granularity == "per_tensor" and spec.fmt.grid == "affine"
                    and spec.learned in (None, "lsq") and len(self.calls(taker)) == 1
                    and layers[taker].kind not in FUNCTIONS):
                plan.output = spec

    def tail(self, name: str) -> tuple[Call, str | None]:
        """The call whose result the output quantizer of a layer sees: its own, that of the batch norm, or of the
        activation function behind, which is named then."""
        call = self.calls(self.result.layers[name].batch_norm or name)[0]
        readers = self.readers(call.outputs[0])
        follower = readers[0].module if len(readers) == 1 and readers[0] is not None else None
        if (follower and self.recipe.absorb and clamp_of(self.modules[follower]) and len(self.calls(follower)) == 1
                and self.quiet(follower)):
            return self.calls(follower)[0], follower
        return call, None

    def chain(self) -> None:
        """Layers with an output spec pass codes on, where everyone who reads them takes codes."""
        layers = self.result.layers
        for name in [n for n, p in layers.items() if p.output is not None]:
            plan, calls = layers[name], self.calls(name)
            assert plan.output is not None
            if plan.parts or len(calls) != 1 or plan.output.granularity != "per_tensor" or not self.quiet(name):
                continue
            tail, follower = self.tail(name)
            if follower and plan.output.fmt.has_zero:
                plan.output_absorbs, plan.output = clamp_of(self.modules[follower]), unsigned(plan.output)
                self.result.absorbed.append(follower)
            elif follower:
                tail = self.calls(plan.batch_norm or name)[0]
            takers, movers = self.takers(tail.outputs[0], plan.output)
            if takers is None:
                continue
            plan.emits_codes = True
            self.result.movers += [m for m in movers if m not in self.result.movers]
        self.chain_consumers()

    def takers(self, key: Key, spec: TensorSpec | None = None) -> tuple[set[str] | None, list[str]]:
        """The layers that read a tensor, through modules that only move values; None if one of them needs floats, or
        codes of other bits than those of ``spec``."""
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
            if (plan is None or plan.kind == "Embedding" or plan.parts or not self.quiet(reader.module)
                    or getattr(module, "padding_mode", "zeros") != "zeros"):
                return None, []
            if plan.input is not None and spec is not None and plan.input.bits != spec.bits:
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
                if plan.kind in FUNCTIONS:
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


def _join(*names: str) -> str:
    """A dotted name."""
    return ".".join(n for n in names if n)


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    """Whether two different ranges of rows have a row in common; None is all rows."""
    return a != b and (a is None or b is None or (a[0] < b[1] and b[0] < a[1]))
