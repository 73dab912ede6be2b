"""Learned scales, and scores of pruning, in the optimizers that a user made: groups of their own, without weight decay.

Weight decay would pull the logarithm of a scale towards 0, that is a scale towards 1, whatever the weights are; and a
scale moves a whole layer, so it wants a smaller rate than a weight (0.01 to 0.1 times; Esser et al. 2020). The scores
of movement pruning train at the rate of the weights; decay would forget what they have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qat.errors import ConfigError

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Keys of parameter groups that are learning rates."""
RATE_LISTS = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_values")
OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
"""What schedulers keep for each group."""
MATRICES_ONLY: tuple[type, ...] = (torch.optim.Muon,)
"""Optimizers that make each step of a matrix orthogonal, which means nothing for scales."""


def give_scales_their_groups(network: nn.Module, configured: Any, factor: float) -> None:
    """Split what a LightningModule's ``configure_optimizers`` returned, in place; schedulers follow.

    Each group that holds learned scales beside other parameters gives them to a new group behind all others: a copy of
    its options, ``weight_decay`` 0, its rates times ``factor``, ``role: scales``. So the groups that the user made keep
    their numbers. A scale that no optimizer holds, because parameters were chosen by name, or one that is for matrices
    only (Muon), joins the group of another that trains what is nearest to it in the network. Scores of movement pruning
    are treated likewise, at the group's own rates (``role: scores``).

    Args:
        network: a prepared network.
        configured: an optimizer, a list of them, (optimizers, schedulers), or dicts with ``optimizer`` and
            ``lr_scheduler``.
        factor: learned scales train at this multiple of the group's learning rate.

    Raises:
        ConfigError: there is no optimizer that can train scales.
    """
    roles: dict[str, dict[int, tuple[str, nn.Parameter]]] = {"scores": {}, "scales": {}}
    for name, module in network.named_modules():
        if getattr(module, "is_quantizer", False):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    role = "scores" if key == "scores" else "scales"
                    roles[role][id(parameter)] = f"{name}.{key}" if name else key, parameter
    parts = list(_parts(configured))
    optimizers = _unique([p for p in parts if isinstance(p, Optimizer)])
    schedulers = _unique([s for p in parts if not isinstance(p, Optimizer) for s in _with_inner(p)])
    for role, parameters in roles.items():
        if parameters and optimizers:
            rate = factor if role == "scales" else 1.0
            _give(network, optimizers, schedulers, parameters, {"role": role}, rate)


def _give(network: nn.Module, optimizers: list[Optimizer], schedulers: list[Any],
          own: Mapping[int, tuple[str, nn.Parameter]], options: Mapping[str, Any], factor: float) -> None:
    """Move these parameters of quantizers, by id, to groups with these options."""
    if all(isinstance(o, MATRICES_ONLY) for o in optimizers):
        raise ConfigError(f"{type(optimizers[0]).__name__} trains matrices only, and this recipe learns "
                          f"{options['role']}: configure another optimizer beside it, such as AdamW for the biases.")
    moving: dict[tuple[int, int], list[tuple[str, nn.Parameter]]] = {}
    held: set[int] = set()
    for place, group in _groups(optimizers):
        if isinstance(optimizers[place[0]], MATRICES_ONLY):
            _keep(group, [i for i, p in enumerate(group["params"]) if id(p) not in own])
        for parameter in group["params"]:
            if id(parameter) in own:
                moving.setdefault(place, []).append(own[id(parameter)])
                held.add(id(parameter))
    for key, parameter in own.items():
        if key not in held:
            moving.setdefault(_nearest(network, parameter[0], optimizers), []).append(parameter)
    for number, optimizer in enumerate(optimizers):
        mine = {index: named for (owner, index), named in sorted(moving.items()) if owner == number}
        if isinstance(optimizer, torch.optim.LBFGS):  # knows one group, and no weight decay
            params = optimizer.param_groups[0]["params"]
            params += [p for named in mine.values() for _, p in named if id(p) not in held]
            continue
        followers = [s for s in schedulers if s.optimizer is optimizer]
        for index, named in mine.items():
            _split(optimizer, index, named, options, factor, followers)


def _split(
    optimizer: Optimizer, index: int, named: list[tuple[str, nn.Parameter]], options: Mapping[str, Any], factor: float,
    schedulers: list[Any],
) -> None:
    """Move these parameters from group ``index`` to one of their own."""
    group, count = optimizer.param_groups[index], len(optimizer.param_groups)
    moved = {id(p) for _, p in named}
    stay = [i for i, p in enumerate(group["params"]) if id(p) not in moved]
    scaled = {key: group[key] * factor for key in RATES if key in group}
    changes = {**scaled, **options, **({"weight_decay": 0.0} if "weight_decay" in group else {})}
    if not stay:
        group.update(changes)
        for scheduler in schedulers:
            for name, values in _lists(scheduler, count):
                if name in RATE_LISTS:
                    values[index] = values[index] * factor
        return
    named_too = "param_names" in group
    copied = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    _keep(group, stay)
    params: list[Any] = list(named) if named_too else [p for _, p in named]
    optimizer.add_param_group({**copied, **changes, "params": params})
    for scheduler in schedulers:
        for name, values in _lists(scheduler, count):
            values.append(values[index] * factor if name in RATE_LISTS else values[index])


def _keep(group: dict[str, Any], stay: list[int]) -> None:
    """Leave only the parameters with these numbers in a group."""
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][i] for i in stay]


def _lists(scheduler: Any, count: int) -> Iterator[tuple[str, list[Any]]]:
    """The scheduler's lists with an item for each group."""
    for name in (*RATE_LISTS, *OTHER_LISTS):
        values = vars(scheduler).get(name)
        if isinstance(values, list) and len(values) == count:
            yield name, values


def _parts(configured: Any) -> Iterator[Any]:
    """The optimizers and schedulers in whatever ``configure_optimizers`` may return."""
    if isinstance(configured, Mapping):
        for value in configured.values():
            yield from _parts(value)
    elif isinstance(configured, list | tuple):
        for value in configured:
            yield from _parts(value)
    elif isinstance(configured, Optimizer) or (hasattr(configured, "optimizer") and hasattr(configured, "step")):
        yield configured


def _with_inner(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it chains."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _with_inner(inner)


def _unique(values: list[Any]) -> list[Any]:
    return list({id(v): v for v in values}.values())


def _groups(optimizers: list[Optimizer]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            yield (number, index), group


def _nearest(network: nn.Module, name: str, optimizers: list[Optimizer]) -> tuple[int, int]:
    """The group that trains a parameter of the module whose scale this is, or of the module around it, and so on."""
    fit = [(place, group) for place, group in _groups(optimizers)
           if not isinstance(optimizers[place[0]], MATRICES_ONLY)]
    where = {id(p): place for place, group in fit for p in group["params"]}
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        around = network.get_submodule(".".join(parts[:cut]))
        for parameter in around.parameters():
            if id(parameter) in where:
                return where[id(parameter)]
    return fit[0][0]
