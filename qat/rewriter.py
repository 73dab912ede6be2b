"""Doing and saying: ``prepare`` swaps modules as a plan says, ``coverage`` says what was decided, and why.

:mod:`qat.planning` decides. ``load`` carries out the plan that a deployed checkpoint stores, on a fresh skeleton,
without deciding anything anew.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from qat.errors import PrepareError, QuantizationError, RecipeError
from qat.modules import attention_interface
from qat.modules.adapted import FACTORS, Adapted
from qat.modules.attention import step_by_step
from qat.modules.base import QuantizedModule, adopt, adopted_layers, quantized_type
from qat.modules.composite import Composite, Part
from qat.modules.functional import Add, Concat, MatMul, take_codes
from qat.modules.normalization import Absorbed, QuantizedBatchNorm
from qat.modules.parameters import QuantizedParameters, watching
from qat.modules.precision import NarrowFloat, keep_in
from qat.modules.traced import KINDS, Traced, replace_functions, restore
from qat.planning import Plan, Planner
from qat.recipe import Recipe
from qat.tracing import Call, evaluating, leaves, run, trace_by_running, trace_symbolically

WRAPPED = ("this is what torch.compile wraps around a model: give the model itself (its ._orig_mod), and compile what "
           "comes out, or in its place: model.compile()")


@dataclass
class Prepared:
    """What a prepared model remembers about its making (kept on the root module, not in its state dict).

    Attributes:
        functions: the products it was seen to make with functions; None: not seen yet.
        macs: module name -> multiply-accumulates.
        notes: layer name -> what calibration algorithms did to it, or why they did not; for coverage.
    """

    recipe: Recipe
    plan: Plan
    functions: list[Call] | None
    macs: dict[str, int]
    notes: dict[str, str] = field(default_factory=dict)


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` came out of :func:`prepare`, :func:`~qat.deploy.convert` or ``load``."""
    return "_qat" in model.__dict__


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` is a unit of FSDP2, so that each process keeps a part of its parameters."""
    return hasattr(model, "unshard")


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are shared out among processes.

    Raises:
        PrepareError: a part of it is a unit of FSDP2.
    """
    for name, module in model.named_modules():
        if is_sharded(module):
            raise PrepareError(f"{name or 'the model'} is sharded already (FSDP2), but prepare reads whole weights: "
                               "prepare first, then qat.training.shard; under Lightning leave fully_shard out of "
                               "configure_model, ModelParallelStrategy shards the prepared network")


def check_open(model: nn.Module, error: type[QuantizationError]) -> None:
    """Refuse a model of which a part is compiled by TorchScript, which lets nobody see or change its layers, and what
    ``torch.compile`` wraps around a model, which loses what is remembered about it.

    Raises:
        error: it names that part.
    """
    if isinstance(model, OptimizedModule):
        raise error(WRAPPED)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise error(f"{name or 'the model'} is compiled by TorchScript, which lets nobody see or change its "
                        "layers: put the module that it was made of in its place")


def prepared_state(model: nn.Module) -> Prepared:
    """What ``prepare`` left on the model; :class:`PrepareError` if it is a float model."""
    if not is_prepared(model):
        if isinstance(model, OptimizedModule):
            raise PrepareError(WRAPPED)
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
        PrepareError: prepared already; group sizes that do not divide; tied weights under different rules; a module
            that is lazy, or compiled by TorchScript; the wrapper of torch.compile.
    """
    if isinstance(recipe, str):
        recipe = Recipe.preset(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    if is_prepared(model) or any(isinstance(m, QuantizedModule) for m in model.modules()):
        raise PrepareError("this model is prepared already; prepare the float model, or load its weights into a new "
                           "one")
    for name, module in model.named_modules():
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise PrepareError(f"{name or 'the model'} is lazy and has no weights yet: run it once before prepare")
    check_open(model, PrepareError)
    check_whole(model)
    if not inplace:
        try:
            model = copy.deepcopy(model)
        except RuntimeError as error:
            raise PrepareError(f"this model cannot be copied ({error}); give inplace=True, or use the weight norm of "
                               "nn.utils.parametrizations") from None
    traced = _functions_to_modules(model, recipe, example_inputs)
    attention, kept = _attention_to_modules(model, recipe, example_inputs)
    if example_inputs is None:
        trace, readings = trace_symbolically(model), None
    else:
        with watching(model) as readings:
            trace = trace_by_running(model, example_inputs)
    plan = Planner(model, recipe, trace, readings).plan()
    if example_inputs is not None and plan.structured and not _same_function(model, plan, example_inputs):
        warnings.warn("this model reads values between layers in ways that tracing does not see, so no batch norm is "
                      "folded, no ReLU absorbed and no codes are passed on", stacklevel=2)
        plan = Planner(model, recipe, None, readings).plan()
    plan.traced, plan.attention = traced, attention
    plan.kept.update(kept)
    model = carry_out(model, plan)
    functions = None
    if trace is not None and trace.executed:
        functions = [c for c in trace.functions if not str(c.function).startswith("~")
                     and not plan.makes(c)]
    macs: dict[str, int] = {}
    for call in trace.calls if trace else ():
        names = [call.module] if call.module is not None else [p for p in call.parameters if p in plan.parameters]
        if not names and call.macs and call.owner in plan.layers:
            names = [call.owner]        # a layer of another library, that called the function itself
        for name in names:
            macs[name] = macs.get(name, 0) + call.macs
    model.__dict__["_qat"] = Prepared(recipe, plan, functions, macs)
    _check_active(model)
    return model


def decisions(model: nn.Module) -> dict[str, Any]:
    """What ``prepare`` decided for a prepared model, as plain data that a training checkpoint can hold.

    :func:`prepare_as` carries it out on a fresh float model, without example inputs.
    """
    state = prepared_state(model)
    functions = None if state.functions is None else [[c.owner, c.function, c.macs, list(c.parameters)]
                                                      for c in state.functions]
    return {"recipe": state.recipe.to_dict(), "plan": state.plan.to_dict(), "functions": functions,
            "macs": dict(state.macs), "notes": dict(state.notes)}


def prepare_as(model: nn.Module, decided: Mapping[str, Any]) -> nn.Module:
    """Swap the modules of a float ``model``, in place, as :func:`decisions` of another one of its kind says.

    A model that is prepared in this very way takes over what the other one has seen of its calls.

    Raises:
        PrepareError: it is prepared already, in another way, or has other modules.
        RecipeError: the data are of another version.
    """
    try:
        recipe, plan = Recipe.from_dict(decided["recipe"]), Plan.from_dict(decided["plan"])
        functions = None if decided["functions"] is None else [
            Call(None, function, owner, [], [], 0, macs, parameters)
            for owner, function, macs, parameters in decided["functions"]]
        macs, notes = dict(decided["macs"]), dict(decided["notes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"these are not the decisions of this version of prepare: {error}") from None
    if is_prepared(model):
        state = prepared_state(model)
        if state.plan.to_dict() != plan.to_dict():
            raise PrepareError("this model is prepared already, in another way")
        state.functions, state.macs, state.notes = functions, macs, notes
        return model
    model = carry_out(model, plan)
    model.__dict__["_qat"] = Prepared(recipe, plan, functions, macs, notes)
    _check_active(model)
    return model


def _functions_to_modules(model: nn.Module, recipe: Recipe, inputs: Any) -> dict[str, dict[str, str]]:
    """Make modules of the sums, concatenations and products that rules name by type, where forwards can be traced.

    With example inputs the model must return the very same tensors afterwards; else everything is undone.
    """
    kinds = {r.type for r in recipe.rules if r.type in KINDS and r.keep is None}
    if not kinds:
        return {}
    before = _results(model, inputs) if inputs is not None else []
    traced = {n: made for n, m in list(model.named_modules()) if (made := replace_functions(m, kinds))}
    if traced and inputs is not None:
        try:
            after = _results(model, inputs)
            same = len(after) == len(before) and all(map(_equal, before, after))
        except Exception:  # a trace that does not run is a wrong one
            same = False
        if not same:
            for name in traced:
                restore(model.get_submodule(name))
            traced = {}
    return traced


def _results(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The tensors that the model returns in eval; its random numbers are always the same."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [t.clone() for t in leaves(run(model, inputs)) if isinstance(t, torch.Tensor)]


def _attention_to_modules(model: nn.Module, recipe: Recipe,
                          inputs: Any) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Give the attention modules of transformers whose products a rule quantizes modules for them.

    Returns:
        Those modules with what :func:`~qat.modules.attention_interface.attach` needs; and the products (by the names
        that they would have) that a rule asks for but that stay float, with the reason.
    """
    wanted = [n for n in attention_interface.callers(model) if any(_asks(recipe, n, c) for c in
                                                                    attention_interface.CHILDREN)]
    if not wanted:
        return {}, {}
    if inputs is None:
        reason = "whether its attention has the usual formula is seen on example inputs: give them to prepare"
        return {}, dict.fromkeys(_products(wanted), reason)
    before, failure = _results(model, inputs), ""
    try:
        with attention_interface.watching(model) as seen:
            after = _results(model, inputs)
        if len(before) != len(after) or not all(map(_equal, before, after)):
            failure = "the model computes something else when its attention goes through another function"
    except Exception as error:  # whatever a model does that finds an attention function it does not know
        failure = f"the model does not run with another attention function: {error}"
    reasons = {n: failure or (seen[n].reason if n in seen else "it did not run on the example inputs") for n in wanted}
    attention = {n: seen[n].sizes for n in wanted if not reasons[n]}
    for name, sizes in attention.items():
        attention_interface.attach(model.get_submodule(name), **sizes)
    return attention, {p: reason for n, reason in reasons.items() if reason for p in _products([n])}


def _products(names: Iterable[str]) -> list[str]:
    """The names of the products of attention modules."""
    return [f"{n}.{c}" if n else c for n in names for c in attention_interface.CHILDREN]


def _asks(recipe: Recipe, name: str, child: str) -> bool:
    """Whether the recipe quantizes this product of an attention module."""
    kinds = (f"Attention{child.capitalize()}", "MatMul")
    rule = next((r for r in recipe.rules if r.matches(f"{name}.{child}" if name else child, kinds)), None)
    return rule is not None and rule.input is not None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


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
            saved = [(t, t.clone()) for t in candidate.state_dict(keep_vars=True).values()
                     if isinstance(t, torch.Tensor) and not t.is_meta]
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
                with torch.no_grad():
                    for tensor, value in saved:
                        tensor.copy_(value)
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
    for name, made in plan.traced.items():
        owner = dict(model.named_modules()).get(name)
        if owner is not None and not isinstance(owner, Traced) and replace_functions(owner, set(made.values())) != made:
            raise PrepareError(f"{name}: its forward no longer calls the functions that the plan made modules of")
    for name, sizes in plan.attention.items():
        attention = dict(model.named_modules()).get(name)
        if attention is not None and not attention_interface.attached(attention):
            attention_interface.attach(attention, **sizes)
    modules = dict(model.named_modules())
    for name, layer in plan.layers.items():
        if name not in modules:
            raise PrepareError(f"the plan names a module {name!r} that this model does not have")
        module = modules[name]
        if layer.kind == QuantizedParameters.kind:
            QuantizedParameters.swap(module, name, layer)
            continue
        quantized = quantized_type(module)
        if quantized is None or quantized.replaces.__name__ != layer.kind:
            raise PrepareError(f"{name} is a {type(module).__name__}, but the plan was made for a {layer.kind}")
        quantized.swap(module, name, layer)
    swapped, home = quantized_modules(model), next((p.device for p in model.parameters()), None)
    for one in swapped.values():
        one.backward_dtype = plan.backward_dtype
        if one.plan.tied_to is not None:
            one.weight_quantizer = swapped[one.plan.tied_to].weight_quantizer
        if home is not None and one.device() is None:  # a function has no tensor that says where it runs
            for quantizer in one.activation_quantizers().values():
                quantizer.to(home)
    folded = {layer.batch_norm: name for name, layer in plan.layers.items() if layer.batch_norm}
    for name in plan.batch_norms:
        QuantizedBatchNorm.swap(modules[name], modules.get(folded.get(name, "\0")))
    for name in plan.absorbed:
        adopt(Absorbed, modules[name])
    for name in plan.movers:
        take_codes(modules[name])
    for name, dtype in plan.narrow.items():
        keep_in(modules[name], dtype)
    step_by_step(model)
    return model


def _stands_in(weight: torch.Tensor) -> bool:
    """Whether a weight has yet to be read: no storage, or less than its values would take."""
    return weight.is_meta or weight.untyped_storage().nbytes() < weight.numel() * weight.element_size()


def _check_active(model: nn.Module) -> None:
    """Fault 1: each quantizer is reachable and its grid holds no more than ``2 ** bits`` values.

    Raises:
        PrepareError: naming the module whose quantizer is shadowed or does nothing.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for role in ("weight_quantizer", *(f"{r}_quantizer" for r in module.roles)):
            if getattr(module, role) is not module._modules.get(role):
                raise PrepareError(f"{name}: an attribute of {type(module).__name__} called {role} hides its "
                                   "quantizer; rename it")
        quantizer = module.weight_quantizer
        if quantizer is not None and module.weight.numel() and not _stands_in(module.weight):
            with torch.no_grad():
                codes = quantizer.codes(module.weight_matrix())
            quantizer.restart()  # weights may still change before the first step
            fmt = quantizer.spec.fmt
            if codes.is_floating_point() or int(codes.min()) < fmt.lo or int(codes.max()) > fmt.hi:
                raise PrepareError(f"{name}: its weight quantizer returns values outside of {fmt}; it is not "
                                   "quantizing")


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


REMEDIES = {**dict.fromkeys(("matmul", "bmm", "mm"), "; for activations use qat.MatMul"),
            "scaled_dot_product_attention": "; use nn.MultiheadAttention, or qat.MatMul for both products"}
"""Functions -> the module to use in their place."""


def coverage(model: nn.Module) -> Coverage:
    """Every parameter, and every matrix product the model was seen to make, as quantized or kept, with the reason.

    Raises:
        PrepareError: the model is not prepared.
    """
    state = prepared_state(model)
    rows: list[Row] = []
    seen: set[Any] = set()
    between: set[int] = set()               # a composite's products of two activations
    held: dict[int, str] = {}               # children of composites whose weights are read by parts
    for name, module in model.named_modules():
        if getattr(module, "is_quantizer", False) or ".weight_quantizer" in name or ".input_quantizer" in name:
            continue
        if isinstance(module, Part):
            continue                        # its composite has said it
        owner, computed, _ = f"{name}.".rpartition("parametrizations.")
        if computed and isinstance(model.get_submodule(owner.rstrip(".")), QuantizedModule):
            continue                        # what computes a quantized weight was counted with it
        if id(module) in between:
            continue
        if isinstance(module, QuantizedParameters):
            rows += _parameter_rows(name, module, state, seen)
        elif isinstance(module, QuantizedModule):
            rows += _quantized_rows(name, module, state, seen)
            if isinstance(module, Composite):
                held.update({id(h): p.name for p in module.parts.values()
                             if (h := p.source.holder(module)) is not module})
                between |= {id(m) for m in module.between_activations.values()}
        if isinstance(module, QuantizedModule):
            continue
        if id(module) in held:
            rows.append(Row(name, type(module).__name__, "quantized", "in parts", "in parts", 0, 0,
                            f"read by {held[id(module)]}"))
            continue
        if isinstance(module, MatMul):
            rows.append(Row(name, type(module).__name__, "kept", "", "", 0, state.macs.get(name, 0),
                            state.plan.kept.get(name, "no rule matches")))
        own = {k: p for k, p in module._parameters.items() if p is not None and id(p) not in seen}
        seen.update(id(p) for p in own.values())
        if isinstance(module, Add | Concat) and name in state.plan.kept:
            rows.append(Row(name, type(module).__name__, "kept", "", "", 0, 0, state.plan.kept[name]))
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
        remedy = "; give prepare example_inputs, if it had none" if used else REMEDIES.get(str(call.function), "")
        product = f"{call.owner}.scores" if call.owner else "scores"
        if remedy and product in state.plan.kept:
            remedy = f"; {state.plan.kept[product]}"
        rows.append(Row(f"{call.owner or 'model'}: {call.function}", "function", "kept", "", "", 0, call.macs,
                        f"called as a function{used}: no module to swap{remedy}"))
    if state.functions is None:
        rows.append(Row("(function calls)", "function", "unobserved", "", "", 0, 0,
                        "seen when the model runs: give prepare example_inputs, or calibrate"))
    return Coverage(tuple(_noted(r, state.notes.get(r.name)) for r in rows))


def _noted(row: Row, note: str | None) -> Row:
    """A row with what calibration has to say."""
    return replace(row, reason="; ".join(t for t in (row.reason, note) if t))


def _quantized_rows(name: str, module: QuantizedModule, state: Prepared, seen: set[Any]) -> list[Row]:
    """The row of a quantized module; for a composite also one for each part, which counts the part's parameters."""
    if not isinstance(module, Composite):
        return [_quantized_row(name, module, state.macs.get(name, 0), _own_params(module, seen))]
    total = state.macs.get(name, 0)
    macs = module.part_macs(total)
    parts = [_quantized_row(f"{name}.{key}" if name else key, part, macs.get(key, 0), _part_params(part, seen))
             for key, part in module.parts.items()]
    parts += [_quantized_row(f"{name}.{key}" if name else key, product, 0, 0)
              for key, product in module.between_activations.items()]
    return [_quantized_row(name, module, total - sum(macs.values()), _own_params(module, seen)), *parts]


def _parameter_rows(name: str, module: QuantizedParameters, state: Prepared, seen: set[Any]) -> list[Row]:
    """A row for each parameter that functions read, and one for all others of the module."""
    rows = []
    for part in module.parts.values():
        own = f"{name}.{part.source.attribute}" if name else part.source.attribute
        row = _quantized_row(own, part, state.macs.get(own, 0), _part_params(part, seen))
        rows.append(_noted(row, state.notes.get(part.name)))
    rest = {k: p for k, p in module._parameters.items() if p is not None and id(p) not in seen}
    if rest:
        seen.update(id(p) for p in rest.values())
        reasons = [state.plan.kept.get(f"{name}.{k}" if name else k, f"no matrix product reads {k}") for k in rest]
        kind, params = adopted_layers(type(module))[-1].__name__, sum(p.numel() for p in rest.values())
        rows.append(Row(name, kind, "kept", "", "", params, 0, "; ".join(dict.fromkeys(reasons))))
    return rows


def _own_params(module: QuantizedModule, seen: set[Any]) -> int:
    """Parameters of a module that nobody has counted yet."""
    params = 0
    if module.frozen:
        if id(module.weight_codes) not in seen:
            params += math.prod(module.weight_shape)
        seen.add(id(module.weight_codes))
    computing = module._modules.get("parametrizations")
    for parameter in (*module._parameters.values(), *(() if computing is None else computing.parameters())):
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            params += parameter.numel()
    return params


def _part_params(part: Part, seen: set[Any]) -> int:
    """The same for the rows of its composite's parameters that a part reads."""
    params = _own_params(part, seen)
    for path in (part.source.weight, part.source.bias):
        holder, _, attribute = (path or "").rpartition(".")
        parameter = part.owner.get_submodule(holder)._parameters.get(attribute)
        rows = part.source.rows_of(str(path))
        if parameter is not None and (id(parameter), rows) not in seen:
            counted = path == part.source.weight and part.frozen     # by its codes
            if not counted and (rows is not None or id(parameter) not in seen):
                params += part.source.read(part.owner, str(path)).numel()
            seen |= {id(parameter), (id(parameter), rows)}
    adapter = _adapter(part)
    for factor in () if adapter is None else (adapter._parameters[name] for name in FACTORS):
        if factor is not None and id(factor) not in seen:
            seen.add(id(factor))
            params += factor.numel()
    return params


def _adapter(module: QuantizedModule) -> Adapted | None:
    """What corrects the weight of a layer or part, if anything does."""
    holder, attribute = ((module.source.holder(module.owner), module.source.attribute) if isinstance(module, Part)
                         else (module, "weight"))
    return holder if isinstance(holder, Adapted) and attribute == "weight" else None


def _quantized_row(name: str, module: QuantizedModule, macs: int, params: int) -> Row:
    plan = module.plan
    if not (plan.weight or plan.input or plan.output or plan.parts):
        return Row(name, plan.kind, "kept", "", "", params, macs, plan.reason)
    reasons = [plan.reason] if plan.reason else []
    if plan.tied_to:
        reasons.append(f"weight shared with {plan.tied_to}, quantized once")
    if plan.chained:
        reasons.append("takes codes")
    if plan.absorbs:
        reasons.append("ReLU absorbed" if plan.absorbs == (0.0, None) else f"clamp{plan.absorbs} absorbed")
    if plan.batch_norm:
        reasons.append(f"{plan.batch_norm} folded in eval")
    adapter = _adapter(module)
    if adapter is not None:
        reasons.append(f"adapter of rank {len(adapter.adapter_down)} inside the quantizer")
    if plan.output:
        reasons.append(f"output {plan.output}" + (" as codes" if plan.emits_codes else ""))
    inside = "in parts" if plan.parts else "float"
    return Row(name, plan.kind, "quantized", str(plan.weight or inside), str(plan.input or inside), params, macs,
               "; ".join(reasons))


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """All quantized modules by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}

