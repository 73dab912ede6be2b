"""Pruning together with quantization: a pruned weight has level 0, in the training forward as in the packed integers.

The mask lives in the weight's quantizer, as a buffer: it is part of every checkpoint, moves with the model, and is
shared where the weight is shared. The float master weight keeps its value under the mask, so that a later update of
the mask can bring it back.

    magnitude    the least |w| go, over the model or in each layer (Han et al. 2015), on a cubic schedule
                 (Zhu & Gupta 2017): s(t) = s_final * (1 - (1 - t)**3)
    movement     the weights that training moves towards zero go: scores S are trained with dL/dS = dL/dw * w
                 (Sanh et al. 2020)
    nm_2_4       two of every four neighbours along the input dimension go, as sparse matrix units want it
    nm_4_8       four of every eight

Whole channels are the matter of :mod:`qat.compression.channels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration import processes
from qat.errors import PruneError, UnsupportedError, nearest
from qat.modules.base import QuantizedModule
from qat.quantizers.quantizer import Quantizer
from qat.rewriter import prepared_state, quantized_modules

METHODS = ("none", "magnitude", "movement", "nm_2_4", "nm_4_8", "channels")
BLOCKS: dict[str, tuple[int, int]] = {"nm_2_4": (2, 4), "nm_4_8": (4, 8)}
"""Method -> (weights that stay, of so many neighbours)."""
SHELTERED = 0.02
"""Share of each layer's weights, the strongest ones, that global pruning leaves, as far as the sparsity allows."""


@dataclass(frozen=True)
class Pruning:
    """What is pruned, how far and when: the ``prune`` section of a run.

    Args:
        method: ``none``, ``magnitude``, ``movement``, ``nm_2_4``, ``nm_4_8`` (weights), or ``channels``.
        sparsity: share of the weights, or of the channels of each layer, that goes. N:M patterns say it themselves.
        scope: ``global``: one ranking for all layers, each of which keeps its strongest weight at least; ``layer``:
            each layer loses the same share, a small one perhaps all.
        exclude: globs on layer names that stay dense (``channels``: keep their output channels).
        begin, end: fractions of the quantized training between which the sparsity grows.
        every_n_steps: optimizer steps between two updates of the masks.
        multiple_of: ``channels``: what is left is a multiple of this.

    Raises:
        PruneError: an unknown or meaningless value.
    """

    method: str = "none"
    sparsity: float = 0.5
    scope: str = "global"
    exclude: tuple[str, ...] = ()
    begin: float = 0.0
    end: float = 0.5
    every_n_steps: int = 10
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PruneError(f"prune.method {self.method!r} is unknown{nearest(str(self.method), METHODS)}; "
                             f"methods are {', '.join(METHODS)}")
        if self.scope not in ("global", "layer"):
            raise PruneError(f"prune.scope is global or layer, not {self.scope!r}")
        if not _number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise PruneError(f"prune.sparsity is the share of weights that goes, from 0 to below 1, not "
                             f"{self.sparsity!r}")
        if self.method in BLOCKS and self.sparsity != 0.5:
            raise PruneError(f"{self.method} prunes half of the weights by its pattern: leave out prune.sparsity")
        if not (_number(self.begin) and _number(self.end) and 0 <= self.begin <= self.end <= 1):
            raise PruneError("prune.begin and prune.end are fractions of the training with 0 <= begin <= end <= 1, not "
                             f"{self.begin!r} and {self.end!r}")
        for key in ("every_n_steps", "multiple_of"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PruneError(f"prune.{key} is a whole number of at least 1, not {value!r}")
        if isinstance(self.exclude, str) or not all(isinstance(e, str) for e in self.exclude):
            raise PruneError(f"prune.exclude is a list of layer names or globs, not {self.exclude!r}")

    @property
    def masks(self) -> bool:
        """Whether single weights are masked (and not channels cut out)."""
        return self.method not in ("none", "channels")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Pruning:
        """From a plain dict; None is no pruning.

        Raises:
            PruneError: an unknown key, with the nearest known one, or a wrong value.
        """
        known = [f.name for f in fields(cls)]
        for key in data or {}:
            if key not in known:
                raise PruneError(f"prune.{key} is not an option{nearest(str(key), known)}; options are "
                                 f"{', '.join(known)}")
        values = dict(data or {})
        if isinstance(values.get("exclude"), list):
            values["exclude"] = tuple(values["exclude"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; ``from_dict`` inverts it."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    def sparsity_at(self, progress: float) -> float:
        """The target after this fraction of the training: the cubic of Zhu & Gupta (2017), steep first.

        >>> [Pruning("magnitude", 0.8, end=1.0).sparsity_at(t) for t in (0.0, 0.5, 1.0)]
        [0.0, 0.7000000000000001, 0.8]
        """
        if progress >= self.end:
            return self.sparsity
        done = max(0.0, (progress - self.begin) / (self.end - self.begin))
        return self.sparsity * (1 - (1 - done) ** 3)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------- masks


def prune(model: nn.Module, method: str = "magnitude", sparsity: float = 0.5, scope: str = "global",
          exclude: Sequence[str] = ()) -> nn.Module:
    """Prune the weights of a prepared model at once, in place; train on, and the pruned weights stay at level 0.

    For a schedule give :class:`qat.training.PruningSchedule` to the trainer; for whole channels see
    :func:`prune_channels`.

    Args:
        model: a prepared model; returned.
        method: ``magnitude``, ``nm_2_4`` or ``nm_4_8`` (``movement`` needs the schedule: its scores are trained).
        sparsity: share of the weights that goes.
        scope: ``global`` or ``layer``.
        exclude: globs on layer names that stay dense.

    Raises:
        PruneError: a layer on a grid without zero (named); nothing to prune; a wrong option.
        PrepareError: the model is not prepared.
    """
    if method in ("none", "movement", "channels"):
        remedy = {"movement": "movement pruning learns what to prune: use qat.training.PruningSchedule",
                  "channels": "whole channels leave the float model, before prepare: use qat.prune_channels",
                  "none": "method none prunes nothing"}[method]
        raise PruneError(remedy)
    pruning = Pruning.from_dict({"method": method, "sparsity": sparsity, "scope": scope, "exclude": exclude})
    attach(model, pruning)
    set_sparsity(model, pruning, pruning.sparsity)
    return model


def attach(model: nn.Module, pruning: Pruning) -> dict[str, QuantizedModule]:
    """Give the weight quantizers that ``pruning`` is about masks (everything kept), and scores where it trains them.

    Masks that are there already stay as they are. The plan of each layer says whether it is pruned, and if not why.

    Returns:
        The layers to prune, by name; of layers that share a weight the first.

    Raises:
        PruneError: a layer on a grid without zero (named); nothing to prune; a pattern in ``exclude`` without match.
    """
    layers, dense = _choose(model, pruning)
    with processes.whole(model):
        weights = {name: _weight(name, module) for name, module in layers.items()}
    for name, module in layers.items():
        quantizer, weight = _quantizer(module), weights[name]
        if quantizer.mask is None:
            quantizer.mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        if pruning.method == "movement" and quantizer.scores is None:
            quantizer.scores = nn.Parameter(torch.zeros(weight.shape, device=weight.device))
        _say(module, f"pruned: {pruning.method}")
    modules = quantized_modules(model)
    for name, reason in dense.items():
        if _quantizer(modules[name]).mask is None:      # else it keeps what it was pruned to before
            _say(modules[name], f"not pruned: {reason}")
    return layers


def set_sparsity(model: nn.Module, pruning: Pruning, share: float) -> None:
    """Make the masks anew so that ``share`` of the weights is pruned. The same weights give the same masks.

    N:M patterns reach ``share`` by completing that part of their blocks whose lost weights are the smallest.
    """
    layers = {n: m for n, m in _choose(model, pruning)[0].items() if _quantizer(m).mask is not None}
    with processes.whole(model), torch.no_grad():
        ranks = _ranks(layers)
        if pruning.method in BLOCKS:
            keep, block = BLOCKS[pruning.method]
            masks = {n: block_mask(r, keep, block, share / pruning.sparsity) for n, r in ranks.items()}
        elif pruning.scope == "layer":
            masks = {n: _without_lowest(r, round(share * r.numel())) for n, r in ranks.items()}
        else:
            masks = _global_masks(ranks, share)
        for name, mask in masks.items():
            target = _quantizer(layers[name]).mask
            assert target is not None
            target.copy_(mask)


def _choose(model: nn.Module, pruning: Pruning) -> tuple[dict[str, QuantizedModule], dict[str, str]]:
    """The layers to prune, and why the others stay dense."""
    prepared_state(model)
    modules = {n: m for n, m in quantized_modules(model).items() if m.weight_quantizer is not None or m.frozen}
    if any(m.frozen for m in modules.values()):
        raise PruneError("this model is deployed: its integers are fixed; prune the prepared model, and convert it")
    for pattern in pruning.exclude:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise PruneError(f"prune.exclude: {pattern!r} matches no quantized layer{nearest(pattern, modules)}")
    owners = {n: m.plan.tied_to or n for n, m in modules.items()}       # a shared weight goes by all of its names
    excluded = {owners[n] for n in modules if any(fnmatchcase(n, pattern) for pattern in pruning.exclude)}
    multiplied = {owners[n] for n, m in modules.items() if m.plan.kind != "Embedding"}
    layers: dict[str, QuantizedModule] = {}
    dense: dict[str, str] = {}
    for name, module in modules.items():
        if module.plan.tied_to is not None:
            continue
        fmt = _quantizer(module).spec.fmt
        matrix = _quantizer(module).shape
        assert matrix is not None
        if name in excluded:
            dense[name] = "excluded"
        elif name not in multiplied:
            dense[name] = "its rows are looked up, not multiplied"
        elif not fmt.has_zero:
            raise PruneError(f"{name}: {fmt} has no zero, so a pruned weight has no code; give the layer an affine or "
                             "ternary format, or add it to prune.exclude")
        elif pruning.method in BLOCKS and matrix[1] % BLOCKS[pruning.method][1]:
            dense[name] = f"{matrix[1]} inputs are no blocks of {BLOCKS[pruning.method][1]}"
        else:
            layers[name] = module
    if not layers:
        raise PruneError("there is nothing to prune: " + ("; ".join(f"{n}: {r}" for n, r in dense.items())
                                                          or "the model has no quantized weights"))
    return layers, dense


def _quantizer(module: QuantizedModule) -> Quantizer:
    assert module.weight_quantizer is not None
    return module.weight_quantizer


def _weight(name: str, module: QuantizedModule) -> Tensor:
    """The float weight with output channels first."""
    weight = module.weight_matrix()
    if weight.shape != _quantizer(module).shape:
        raise UnsupportedError(f"{name}: its weight is a shard of shape {tuple(weight.shape)}, but masks need it "
                               "whole: prune under DDP or one process")
    return weight.detach()


def _say(module: QuantizedModule, words: str) -> None:
    """Note in the plan, once, what coverage is to say."""
    said = [part for part in module.plan.reason.split("; ") if part and not part.startswith(("pruned:", "not pruned:"))]
    module.plan.reason = "; ".join([*said, words])


def _ranks(layers: dict[str, QuantizedModule]) -> dict[str, Tensor]:
    """What is pruned from the low end: scores, once training has moved them, else |w|; float32, as the weights."""
    scores = {name: _quantizer(module).scores for name, module in layers.items()}
    if any(s is not None and bool(s.any()) for s in scores.values()):
        return {name: s.detach().float() for name, s in scores.items() if s is not None}
    return {name: _weight(name, module).float().abs() for name, module in layers.items()}


def _global_masks(ranks: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """One ranking for all layers; the strongest weights of each layer stand above it."""
    sheltered = min(SHELTERED, (1 - share) / 2)     # of what is to stay, half at most: the other half is ranked
    flat = []
    for rank in ranks.values():
        row = rank.flatten().clone()
        if row.numel():
            safe = max(1, int(sheltered * row.numel()))
            row[row.topk(safe).indices] = torch.inf
        flat.append(row)
    sizes = [row.numel() for row in flat]
    device = flat[0].device
    line = torch.cat([row.to(device) for row in flat])
    free = int(torch.isfinite(line).sum())
    mask = _without_lowest(line, min(free, round(share * line.numel())))
    return {name: part.reshape(rank.shape).to(rank.device)
            for (name, rank), part in zip(ranks.items(), mask.split(sizes), strict=True)}


def _without_lowest(rank: Tensor, count: int) -> Tensor:
    """True but for exactly ``count`` lowest values; of equal ones the first go.

    >>> _without_lowest(torch.tensor([3.0, 1.0, 1.0, 1.0]), 2)
    tensor([ True, False, False,  True])
    """
    flat = rank.flatten()
    if count <= 0 or not flat.numel():
        return torch.ones(rank.shape, dtype=torch.bool, device=rank.device)
    border = flat.kthvalue(count).values
    keep = flat >= border
    level = (flat == border).nonzero().flatten()
    keep[level[: count - int((~keep).sum())]] = False
    return keep.reshape(rank.shape)


def block_mask(rank: Tensor, keep: int, block: int, share: float = 1.0) -> Tensor:
    """The N:M mask: of each ``block`` neighbours along dimension 1 the ``keep`` highest stay.

    Args:
        rank: (out, in, *kernel) with ``in`` a multiple of ``block``.
        share: part of the values outside of the pattern that go already, the lowest first.

    >>> block_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    last = rank.movedim(1, -1)
    blocks = last.reshape(*last.shape[:-1], -1, block)
    place = blocks.sort(dim=-1, stable=True).indices.argsort(-1)
    outside = (place < block - keep).reshape(last.shape).movedim(-1, 1)
    if share >= 1.0:
        return ~outside
    candidates = torch.where(outside, rank, torch.inf)
    return _without_lowest(candidates, round(share * int(outside.sum())))


# ---------------------------------------------------------------------------------------------------- what is found


def sparsity(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The zeros among the integers of each weight of a prepared or deployed model, counted from its codes.

    Returns:
        layer -> ``weights`` (their number), ``zeros`` (those of level 0), ``share``, and ``pattern``: ``2:4`` or
        ``4:8`` where every block along the input has at least so many zeros, else None. A shared weight counts once,
        for its first layer.
    """
    prepared_state(model)
    found: dict[str, dict[str, Any]] = {}
    for name, module in quantized_modules(model).items():
        if module.plan.weight is None or module.plan.tied_to is not None:
            continue
        quantizer = module.weight_quantizer
        observing = quantizer is not None and quantizer.observing
        if quantizer is not None:
            quantizer.observing = False
        with torch.no_grad():
            zero = module.quantized_weight().levels() == 0
        if quantizer is not None:
            quantizer.observing = observing
        zeros, count = int(zero.sum()), zero.numel()
        pattern = next((f"{keep}:{block}" for keep, block in BLOCKS.values() if _holds(zero, keep, block)), None)
        found[name] = {"weights": count, "zeros": zeros, "share": zeros / count if count else 0.0, "pattern": pattern}
    return found


def _holds(zero: Tensor, keep: int, block: int) -> bool:
    """Whether at most ``keep`` of each ``block`` values along dimension 1 are not zero."""
    if zero.dim() < 2 or not zero.numel() or zero.shape[1] % block:
        return False
    last = zero.movedim(1, -1)
    return bool((last.reshape(-1, block).sum(-1) >= block - keep).all())
