"""Static ranges from data, and the switches of the schedule: observing, frozen ranges, frozen batch norm."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from qat.calibration import processes
from qat.errors import CalibrationError, NotCalibratedError
from qat.modules.normalization import QuantizedBatchNorm
from qat.quantizers.quantizer import LearnedQuantizer, Quantizer, StaticQuantizer
from qat.rewriter import Prepared, prepared_state, quantized_modules
from qat.tracing import Trace, evaluating, run, tracing


def activation_quantizers(model: nn.Module) -> list[Quantizer]:
    """The quantizers of the activations of all quantized modules."""
    return [q for m in quantized_modules(model).values() for q in m.activation_quantizers().values()]


def find_ranges(model: nn.Module, batches: Iterable[Any], ignore_nonfinite: bool = False,
                merge: Literal["batches", "parts"] | None = "batches",
                only: Collection[Quantizer] | None = None) -> list[int]:
    """The ranges of :func:`qat.calibrate`: every static one from data; learned scales get their start from it.

    Args:
        only: the quantizers whose ranges are set; the others stay as they are. None: all, but weights whose range
            somebody has placed.

    Returns:
        The numbers of the batches of this process that counted.
    """
    together = merge is not None and processes.several_processes()
    state = prepared_state(model)
    modules = quantized_modules(model)
    chosen = None if only is None else {id(q) for q in only}
    quantizers = [q for q in activation_quantizers(model)
                  if isinstance(q, StaticQuantizer) and (chosen is None or id(q) in chosen)]
    before = [(q, q.observing, {k: v.clone() for k, v in q.state_dict().items()}) for q in quantizers]
    for q in quantizers:
        if not q.frozen:
            q.observer.reset()
            q.observing = True
            if together:
                q.observer.mark()
    kept: list[int] = []
    count, failure = 0, None
    try:
        try:
            with processes.whole(model), calibrating(model), evaluating(model), torch.no_grad():
                for index, batch in enumerate(batches):
                    with _seeing_functions(model, state):
                        if _observe(model, batch, index, ignore_nonfinite, quantizers):
                            kept.append(index)
                count = len(kept)
        except Exception as error:
            failure = error
            if not together:
                raise
        if together:
            count, (state.functions, state.macs) = processes.agree(count, failure, (state.functions, state.macs))
        if not count:
            raise CalibrationError("calibration needs at least one batch")
        if together:
            processes.merge([q.observer for q in quantizers if not q.frozen], merge == "batches")
        for q in quantizers:
            q.settle()
    except BaseException:
        for q, _, values in before:
            q.load_state_dict(values)
        raise
    finally:
        for q, observing, _ in before:
            q.observing = observing
            q.observer.unmark()
    with processes.whole(model), torch.no_grad():
        for module in modules.values():
            weights = module.weight_quantizer
            if (isinstance(weights, StaticQuantizer) and module.plan.tied_to is None and not weights.frozen
                    and (chosen is None or id(weights) in chosen)):
                weights.restart()
                weights.quantize(module.weight_matrix())
    _warn(quantizers)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedBatchNorm)}
    unseen = [n for n, m in norms.items() if quantizers and not m.has_seen_data]
    for norm in norms.values():
        norm.unseen = unseen
    return kept


@contextmanager
def _seeing_functions(model: nn.Module, state: Prepared) -> Iterator[None]:
    """The first run shows which matrix products the model calls as functions."""
    if state.functions is not None:
        yield
        return
    trace = Trace()
    with tracing(model, trace):
        yield
    state.functions = [c for c in trace.functions if not str(c.function).startswith("~")]
    for call in trace.calls:
        if call.module is not None and not state.macs.get(call.module):
            state.macs[call.module] = call.macs


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Quantized modules compute in floating point, and observe what is observing, inside the block."""
    modules = [m for m in quantized_modules(model).values() if not m.calibrating]
    for module in modules:
        module.calibrating = True
    try:
        yield
    finally:
        for module in modules:
            module.calibrating = False


def _observe(model: nn.Module, batch: Any, index: int, ignore: bool, quantizers: list[StaticQuantizer]) -> bool:
    """Run one batch; whether it counted."""
    kept = [q.observer.snapshot() for q in quantizers] if ignore else []
    try:
        run(model, batch)
        return True
    except CalibrationError as error:
        if not ignore:
            raise CalibrationError(f"batch {index}: {error}") from None
        for q, snapshot in zip(quantizers, kept):
            q.observer.restore(snapshot)
        warnings.warn(f"batch {index} left out of calibration: {error}", stacklevel=3)
        return False


def _warn(quantizers: list[StaticQuantizer]) -> None:
    """One warning each for inputs that are always zero, and for 1-bit inputs that never change sign."""
    silent = [q.name for q in quantizers if not q.observer.empty and q.spec.fmt.grid != "sign" and q.observer.silent]
    if silent:
        warnings.warn(f"always zero in calibration, so their scale is 1: {', '.join(silent)}", stacklevel=3)
    cut = [q.name for q in quantizers if not q.spec.fmt.signed and q.spec.symmetric and q.floor is None
           and bool((q.observer.low < 0).any())]
    if cut:
        warnings.warn(f"unsigned symmetric codes cut all negative values off at {', '.join(cut)}: use a signed format, "
                      "or symmetric: false", stacklevel=3)
    stuck = [q.name for q in quantizers if q.spec.fmt.grid == "sign" and getattr(q.observer, "one_sided", False)]
    if stuck:
        warnings.warn(f"1-bit activations that never change sign carry nothing: {', '.join(stuck)}; put them in front "
                      "of the activation function", stacklevel=3)


def set_observing(model: nn.Module, on: bool) -> None:
    """Let the static activation ranges of ``model`` follow the data from now on, or stand still.

    Independent of ``train()`` and ``eval()``; frozen ranges stay frozen. Learned scales only take their start from
    what they observe.
    """
    for q in activation_quantizers(model):
        q.observing = on and not getattr(q, "frozen", False)
    for module in model.modules():
        if on and isinstance(module, QuantizedBatchNorm):
            module.unseen = []


def freeze_ranges(model: nn.Module) -> None:
    """Freeze every observer of ``model`` together with its scale. Learned scales go on learning."""
    for q in activation_quantizers(model):
        q.observing = False
        if isinstance(q, StaticQuantizer):
            q.freeze_range()


def freeze_batch_norm(model: nn.Module, on: bool = True) -> None:
    """Normalize with the running statistics, and let them stand still, although the model is in ``train()``."""
    for module in model.modules():
        if isinstance(module, QuantizedBatchNorm):
            module.statistics_frozen = on
            module.train(model.training)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], merge: bool = True) -> None:
    """Recompute the running statistics of every batch norm as plain averages over ``batches``, with present weights.

    Weights that oscillate between two codes corrupt the moving averages at 4 bits and below (Nagel et al. 2022).

    In a run of several processes the averages are over the batches of all of them, as in :func:`calibrate`.

    Args:
        model: a prepared model; changed in place. If it fails, the statistics are as they were.
        batches: any iterable of inputs, as for :func:`calibrate`.
        merge: with the statistics of the other processes, if there are any. False: this process alone.

    Raises:
        CalibrationError: no batch at all.
    """
    merge = merge and processes.several_processes()
    norms = [m for m in model.modules() if isinstance(m, QuantizedBatchNorm) and m.running_mean is not None]
    before = [(m, m.momentum, {k: v.clone() for k, v in m.state_dict().items()}) for m in norms]
    count, failure = 0, None
    try:
        with processes.whole(model), evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True
            try:
                for batch in batches:
                    run(model, batch)
                    count += 1
            except Exception as error:
                failure = error
                if not merge:
                    raise
        if merge:
            count, _ = processes.agree(count, failure, None)
        if not count:
            raise CalibrationError("batch norm re-estimation needs at least one batch")
        if merge:
            processes.merge_batch_norm(norms, weighted=True)
    except BaseException:
        for norm, _, values in before:
            norm.load_state_dict(values)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum


def start_merging(model: nn.Module) -> None:
    """From here on this process observes together with the others: call it on all of them, on equal models.

    Raises:
        NotCalibratedError: a learned scale of an activation has no start yet; each process would take one of its own.
    """
    for q in _followers(model):
        q.observer.mark()
    bare = [q.name for q in activation_quantizers(model) if isinstance(q, LearnedQuantizer) and not q.calibrated]
    if bare:
        raise NotCalibratedError(f"learned scales without a start would differ between processes: {', '.join(bare)}; "
                                 "run qat.calibrate(model, batches) on all processes first (calibration_batches in the "
                                 "schedule)")


def merge_ranges(model: nn.Module) -> None:
    """Merge what the observers of all processes have seen since the last time, so that scales are equal bit for bit.

    To be called on all processes at the same points of a training that observes, such as after each step. The batches
    of one step count as parts of one batch: ranges are those that one process would get from the whole batch, if it
    had the same weights and, in front of a quantizer, the same values. Learned scales are parameters: their gradients
    are averaged like any other.
    """
    followers = _followers(model)
    processes.merge([q.observer for q in followers])
    for q in followers:
        q.settle()


def merge_batch_norm(model: nn.Module) -> None:
    """Average the running statistics of batch norms in training over all processes.

    Each then knows the data of all, and all fold the same gain in eval. (DDP copies those of rank 0 to the others
    before each step, and what the others have seen is lost.)
    """
    norms = [m for m in model.modules() if isinstance(m, QuantizedBatchNorm) and m.running_mean is not None]
    processes.merge_batch_norm([m for m in norms if m.training])


def _followers(model: nn.Module) -> list[StaticQuantizer]:
    """The static quantizers whose ranges follow the activations until they are frozen."""
    return [q for q in activation_quantizers(model)
            if isinstance(q, StaticQuantizer) and not isinstance(q, LearnedQuantizer) and not q.frozen]

