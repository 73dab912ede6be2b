"""Static ranges from data, and the switches of the schedule: observing, frozen ranges, frozen batch norm."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from qat.errors import CalibrationError, ConvertError
from qat.modules.base import QuantizedModule
from qat.modules.normalization import QuantizedBatchNorm
from qat.quantizers.quantizer import Quantizer, StaticQuantizer
from qat.rewriter import prepared_state, quantized_modules
from qat.tracing import Trace, evaluating, run, tracing


def activation_quantizers(model: nn.Module) -> list[Quantizer]:
    """The input and output quantizers of all quantized modules."""
    found = [q for m in quantized_modules(model).values() for q in (m.input_quantizer, m.output_quantizer)]
    return [q for q in found if q is not None]


def calibrate(model: nn.Module, batches: Iterable[Any], ignore_nonfinite: bool = False,
              only: Collection[Quantizer] | None = None) -> nn.Module:
    """Set every static range from data; learned scales get their start from it.

    The model runs in floating point, in eval, without gradients; its own mode comes back afterwards. Ranges start
    anew: what was observed before is forgotten. The first run also shows which matrix products the model calls as
    functions (see :func:`qat.coverage`). If it fails, the quantizers are as they were.

    Args:
        model: a prepared model; changed in place, and returned.
        batches: any iterable of inputs (a tensor, a tuple of arguments, or a dict of keyword arguments each).
        ignore_nonfinite: leave batches out that make NaN or infinity, with a warning, instead of raising.
        only: the quantizers whose ranges are set; the others stay as they are. None: all.

    Raises:
        CalibrationError: no batch at all; NaN or infinity (the message names layer and batch).
    """
    state = prepared_state(model)
    modules = quantized_modules(model)
    if any(m.frozen for m in modules.values()):
        raise ConvertError("this model is deployed: its ranges are frozen; calibrate the prepared model")
    chosen = None if only is None else {id(q) for q in only}
    quantizers = [q for q in activation_quantizers(model)
                  if isinstance(q, StaticQuantizer) and (chosen is None or id(q) in chosen)]
    before = [(q, q.observing, {k: v.clone() for k, v in q.state_dict().items()}) for q in quantizers]
    for q in quantizers:
        if not q.frozen:
            q.observer.reset()
            q.observing = True
    count = 0
    try:
        with _calibrating(modules.values()), evaluating(model), torch.no_grad():
            for index, batch in enumerate(batches):
                if state.functions is None:
                    trace = Trace()
                    with tracing(model, trace):
                        count += _observe(model, batch, index, ignore_nonfinite, quantizers)
                    state.functions = [c for c in trace.functions if not str(c.function).startswith("~")]
                    for call in trace.calls:
                        if call.module is not None and not state.macs.get(call.module):
                            state.macs[call.module] = call.macs
                else:
                    count += _observe(model, batch, index, ignore_nonfinite, quantizers)
        if not count:
            raise CalibrationError("calibration needs at least one batch")
        for q in quantizers:
            q.settle()
    except BaseException:
        for q, _, values in before:
            q.load_state_dict(values)
        raise
    finally:
        for q, observing, _ in before:
            q.observing = observing
    for module in modules.values():
        weights = module.weight_quantizer
        if (isinstance(weights, StaticQuantizer) and module.plan.tied_to is None
                and (chosen is None or id(weights) in chosen)):
            weights.restart()
            with torch.no_grad():
                weights.quantize(module.weight_matrix())
    _warn(quantizers)
    return model


class _calibrating:
    """Quantized modules compute in floating point and observe, inside the block."""

    def __init__(self, modules: Iterable[QuantizedModule]) -> None:
        self.modules = list(modules)

    def __enter__(self) -> None:
        for module in self.modules:
            module.calibrating = True

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            module.calibrating = False


def _observe(model: nn.Module, batch: Any, index: int, ignore: bool, quantizers: list[StaticQuantizer]) -> int:
    """Run one batch; 1 if it counted."""
    kept = [{k: v.clone() for k, v in q.observer.state_dict().items()} for q in quantizers] if ignore else []
    try:
        run(model, batch)
        return 1
    except CalibrationError as error:
        if not ignore:
            raise CalibrationError(f"batch {index}: {error}") from None
        for q, values in zip(quantizers, kept):
            q.observer.load_state_dict(values)
        warnings.warn(f"batch {index} left out of calibration: {error}", stacklevel=3)
        return 0


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


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute the running statistics of every batch norm as plain averages over ``batches``, with present weights.

    Weights that oscillate between two codes corrupt the moving averages at 4 bits and below (Nagel et al. 2022).

    Raises:
        CalibrationError: no batch at all.
    """
    norms = [m for m in model.modules() if isinstance(m, QuantizedBatchNorm) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
    count = 0
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        try:
            for batch in batches:
                run(model, batch)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    if not count:
        for norm, values in zip(norms, before):
            norm.load_state_dict(values)
        raise CalibrationError("batch norm re-estimation needs at least one batch")

