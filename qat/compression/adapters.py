"""Fine-tuning with low-rank adapters inside the quantizer: add them, carry them about, merge them.

    model = qat.add_adapters(model, rank=8)        # the base is frozen; before or after qat.prepare
    ...                                            # train: only the adapters and the learned scales move
    state = qat.adapter_state(model)               # a few per cent of the model
    deployed, certificate = qat.convert(model, batches)    # merged: no adapter is left
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, PrepareError, RecipeError, SpecError, nearest
from qat.modules.adapted import FACTORS, SCALING, Adapted
from qat.modules.base import QuantizedModule, adopt, shed

ADAPTABLE = (nn.Linear, nn.modules.conv._ConvNd)
SHARING = (*ADAPTABLE, nn.Embedding)
"""A module of these types may share the weight of an adapted one; it shares the adapter then."""


def add_adapters(model: nn.Module, rank: int = 8, alpha: float = 16.0, match: str | Sequence[str] | None = None,
                 also_train: str | Sequence[str] = (), inplace: bool = False) -> nn.Module:
    """A copy of ``model`` with frozen weights and trainable low-rank corrections of linear layers and convolutions.

    ``weight = base + alpha / rank * (up @ down)`` (Hu et al. 2021), ``up`` being zero at first, so the model computes
    what it did. Quantized layers put that sum on their grid. Afterwards only the factors, learned quantizer scales, and
    what ``also_train`` names have ``requires_grad``. The factors are float32 where the weight is narrower.

    Args:
        model: float or prepared.
        rank: of the corrections; a layer with fewer rows or columns gets that many.
        alpha: the correction is scaled by ``alpha / rank``.
        match: globs on the dotted names of the layers; None: every linear layer and convolution.
        also_train: globs on names of parameters that are trained as they are (``head.*``, ``*.bias``); a layer whose
            weight is among them gets no adapter.
        inplace: change ``model`` itself.

    Raises:
        SpecError: a rank below 1 or an alpha that is not a finite number.
        RecipeError: a glob that matches nothing.
        PrepareError: the model is deployed or has adapters already; a weight that something else computes or reads.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SpecError(f"adapters: rank is a whole number of at least 1, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SpecError(f"adapters: alpha is a finite number, not {alpha!r}")
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise PrepareError(f"{name or 'the model'} has an adapter already; qat.merge_adapters(model) merges it")
        if isinstance(module, QuantizedModule) and module.frozen:
            raise PrepareError(f"{name or 'the model'} is deployed: its weight is codes; add adapters to the prepared "
                               "model")
    if not inplace:
        model = copy.deepcopy(model)
    trained = _trained(model, also_train)
    targets = _targets(model, match, {id(p) for p in trained})
    quantizers = {id(p) for m in model.modules() if getattr(m, "is_quantizer", False) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in quantizers:
            parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for weight, modules in targets:
        down, up = _factors(weight, rank)
        scaling = torch.tensor(alpha / rank, dtype=down.dtype, device=down.device)
        for module in modules:
            adapted = adopt(Adapted, module)
            adapted.register_parameter("adapter_down", down)
            adapted.register_parameter("adapter_up", up)
            adapted.register_buffer(SCALING, scaling)
    return model


def merge_adapters(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` whose weights hold their corrections; it computes the same bits, and no adapter is left.

    ``convert`` does it by itself. Whether parameters have ``requires_grad`` stays as it is.
    """
    if not inplace:
        model = copy.deepcopy(model)
    merged: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Adapted):
            base = module._parameters["weight"]
            assert base is not None
            if id(base) not in merged:
                merged[id(base)] = nn.Parameter(module.corrected().detach(), requires_grad=base.requires_grad)
            module._parameters["weight"] = merged[id(base)]
            for name in FACTORS:
                del module._parameters[name]
            del module._buffers[SCALING]
            shed(Adapted, module)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by state-dict name: parameters with ``requires_grad``, the quantizers' state, buffers.

    Everything but the frozen base: a few per cent of the whole, and enough to restore a fine-tuned model on top of the
    base with :func:`load_adapter_state`.

    Raises:
        PrepareError: the model has no adapters.
    """
    frozen = _frozen(model)
    return {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and name not in frozen}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load what :func:`adapter_state` returned into a model with the same base and the same adapters, in place.

    Raises:
        PrepareError: the model has no adapters.
        CheckpointError: the state is of another model, recipe or rank; the message names the tensors. The model is
            unchanged then.
    """
    wanted = adapter_state(model)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(v.shape)}" for n, v in wanted.items()
              if n in state and state[n].shape != v.shape]
    if missing or unexpected or shapes:
        said = "; ".join(f"{what} {', '.join(names[:6])}" for what, names in
                         (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes)) if names)
        raise CheckpointError(f"this adapter state is of another model, recipe or rank: {said}")
    model.load_state_dict(dict(state), strict=False)
    return model


def _frozen(model: nn.Module) -> set[str]:
    """Names of the parameters that training leaves alone."""
    if not any(isinstance(m, Adapted) for m in model.modules()):
        raise PrepareError("this model has no adapters: call qat.add_adapters(model) first")
    return {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _globs(globs: str | Sequence[str]) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)


def _trained(model: nn.Module, globs: str | Sequence[str]) -> list[nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, nn.Parameter] = {}
    for glob in _globs(globs):
        names = [n for n in parameters if fnmatch.fnmatchcase(n, glob)]
        if not names:
            raise RecipeError(f"also_train: {glob!r} matches no parameter{nearest(glob, parameters)}")
        found |= {id(parameters[n]): parameters[n] for n in names}
    return list(found.values())


def _targets(model: nn.Module, match: str | Sequence[str] | None,
             trained: set[int]) -> list[tuple[nn.Parameter, list[nn.Module]]]:
    """The weights that get adapters, each with the modules that share it."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    layers = [m for m in model.modules() if isinstance(m, ADAPTABLE)]
    if match is not None:
        for glob in _globs(match):
            if not any(fnmatch.fnmatchcase(n, glob) for m in layers for n in names[id(m)]):
                known = [n for m in layers for n in names[id(m)]]
                raise RecipeError(f"adapters: {glob!r} matches no linear layer or convolution{nearest(glob, known)}")
        layers = [m for m in layers
                  if any(fnmatch.fnmatchcase(n, g) for g in _globs(match) for n in names[id(m)])]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    targets: dict[int, tuple[nn.Parameter, list[nn.Module]]] = {}
    for module in layers:
        name, weight = names[id(module)][0] or "the model", module._parameters.get("weight")
        if weight is None:
            raise PrepareError(f"{name}: its weight is computed by a parametrization or a hook, so there is no base to "
                               "freeze; remove that, or leave the layer out with match=")
        if isinstance(weight, nn.UninitializedParameter):
            raise PrepareError(f"{name} is lazy and has no weight yet: run the model once before adding adapters")
        if id(weight) in trained or not weight.numel() or id(weight) in targets:
            continue
        for other, key in owners[id(weight)]:
            if key != "weight" or not isinstance(other, SHARING):
                raise PrepareError(f"{name}: {names[id(other)][0] or 'the model'} ({type(other).__name__}) reads the "
                                   "same weight and would not see the adapter; leave the layer out with match=")
        targets[id(weight)] = weight, [other for other, _ in owners[id(weight)]]
    if not targets:
        raise RecipeError("adapters: nothing to adapt, no linear layer or convolution that is not trained anyway")
    return list(targets.values())


def _factors(weight: nn.Parameter, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """``down`` uniform in +-1/sqrt(columns), ``up`` zero."""
    rows = weight.shape[0]
    columns = weight.numel() // rows
    rank = min(rank, rows, columns)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    down = torch.empty(rank, columns, dtype=dtype, device=weight.device).uniform_(-1, 1).div_(math.sqrt(columns))
    return nn.Parameter(down), nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=weight.device))
