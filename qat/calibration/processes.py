"""What several processes have seen, merged by all-reduces of ``torch.distributed``.

The reductions used, minimum and exact addition, give every process the same bits, and the same ones for each way of
dealing the batches out. No process waits for a batch of another: what is merged is merged at points that all of them
reach, whatever each has seen until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from qat.errors import CalibrationError
from qat.modules.normalization import QuantizedBatchNorm, several_processes
from qat.quantizers.observers import Observer
from qat.rewriter import is_sharded

T = TypeVar("T")

__all__ = ["agree", "copy_first", "held", "merge", "merge_batch_norm", "parts", "reduced", "several_processes", "whole"]

HOLDS = "_qat_whole"
"""The attribute of a sharded model that counts the blocks in which it is whole."""


def reduced(vector: Tensor, operation: Any) -> Tensor:
    """A vector reduced over all processes; the same bits on each of them, on the device of ``vector``."""
    travelling = _travelling(vector)
    dist.all_reduce(travelling, operation)
    return travelling.to(vector.device)


@torch.no_grad()
def copy_first(tensors: Iterable[Tensor]) -> None:
    """Give these tensors, in the same order on all processes, the values that they have in process 0."""
    for tensor in tensors:
        travelling = _travelling(tensor.contiguous())
        dist.broadcast(travelling, src=0)
        tensor.copy_(travelling)


def _travelling(tensor: Tensor) -> Tensor:
    """A copy of a tensor where the processes can exchange it."""
    nccl = "nccl" in dist.get_backend()
    return tensor.detach().to(torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu", copy=True)


def merge(observers: Sequence[Observer], as_batches_of_their_own: bool = False) -> None:
    """Merge what the observers have seen since their last ``mark``; the same observers on all processes, in one order.

    Args:
        as_batches_of_their_own: moving averages take the batches of all processes one after another, in the order of
            the ranks; otherwise the batches of one round as one.
    """
    if not observers:
        return
    place, places = (dist.get_rank(), dist.get_world_size()) if as_batches_of_their_own else (0, 1)
    rounds = reduced(torch.tensor([o.rounds for o in observers]), dist.ReduceOp.MAX).tolist()
    extremes = _together((o.extremes(n, place, places) for o, n in zip(observers, rounds)), dist.ReduceOp.MIN)
    additions = _together((o.additions(e) for o, e in zip(observers, extremes)), dist.ReduceOp.SUM)
    for observer, least, total in zip(observers, extremes, additions):
        observer.merge(least, total)


def merge_batch_norm(norms: Sequence[QuantizedBatchNorm], weighted: bool = False) -> None:
    """Average running means and variances over the processes.

    Args:
        weighted: by the batches each process has seen since its statistics were reset; otherwise all alike.
    """
    if not norms:
        return
    stored = [t for m in norms for t in (m.running_mean, m.running_var)]
    share = [float(m.num_batches_tracked) if weighted else 1.0 for m in norms for _ in range(2)]
    own = (torch.cat([t.double().flatten() * n, t.new_tensor([n], dtype=torch.float64)])
           for t, n in zip(stored, share))
    for tensor, total in zip(stored, _together(own, dist.ReduceOp.SUM)):
        if float(total[-1]):
            tensor.copy_((total[:-1] / total[-1]).view_as(tensor))
    if weighted:
        seen = reduced(torch.stack([m.num_batches_tracked for m in norms]), dist.ReduceOp.SUM)
        for norm, count in zip(norms, seen):
            norm.num_batches_tracked.copy_(count)


def agree(count: int, failure: Exception | None, findings: T) -> tuple[int, T]:
    """The batches of all processes together, and the findings of the first process that had any batch.

    Raises:
        Exception: ``failure``, if there was one in this process.
        CalibrationError: there was one in another; the message names the process. So no process waits for one that
            has given up.
    """
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (count, None if failure is None else str(failure), findings if count else None))
    if failure is not None:
        raise failure
    for rank, (_, message, _) in enumerate(said):
        if message is not None:
            raise CalibrationError(f"process {rank}: {message}")
    first = next((found for number, _, found in said if number), findings)
    return sum(number for number, _, _ in said), first


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The parameters of a fully sharded model (FSDP2) are whole inside the block; any other model is so anyway.

    All processes gather them here, once: inside the block each may call the model as often as it has batches. They are
    copies, and what is written to them is lost.
    """
    if not is_sharded(model):
        yield
        return
    _hold(model, 1)
    try:
        yield
    finally:
        _hold(model, -1)


@contextmanager
def parts(model: nn.Module) -> Iterator[None]:
    """Inside the block each process has its own parts of the parameters again, which may be written; in `whole` too."""
    holds = held(model)
    if holds:
        _hold(model, -holds)
    try:
        yield
    finally:
        if holds:
            _hold(model, holds)


def held(model: nn.Module) -> int:
    """How many blocks of `whole` the model is in now."""
    return int(model.__dict__.get(HOLDS, 0))


def _hold(model: Any, change: int) -> None:
    """Gather the parameters when the first block asks for it, and let go of them behind the last one."""
    before = held(model)
    model.__dict__[HOLDS] = before + change
    if not before:
        with torch.inference_mode(False):  # what is gathered now may be used for training later
            model.unshard()
    elif not before + change:
        model.reshard()


def _together(parts: Iterable[Tensor], operation: Any) -> list[Tensor]:
    """Many vectors reduced in one piece."""
    vectors = list(parts)
    whole = torch.cat([v.to(vectors[0].device) for v in vectors])
    pieces = (reduced(whole, operation) if len(whole) else whole).split([len(v) for v in vectors])
    return [piece.to(v.device) for piece, v in zip(pieces, vectors)]
