"""A ladder of bit widths: the warm start of a narrow model from the next wider one, without swapping a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qat.calibration import processes
from qat.calibration.ranges import activation_quantizers, find_ranges
from qat.errors import ConvertError
from qat.quantizers.quantizer import Quantizer, StaticQuantizer
from qat.rewriter import prepared_state, quantized_modules


def set_rung(model: nn.Module, batches: Iterable[Any] | None = None, weight: int | None = None,
             input: int | None = None) -> nn.Module:
    """Let a prepared model work with at least so many bits for now; left out: with those of its recipe.

    Train on a high rung, step down, train on: each width starts from the next higher one (8, 4, 2, 1). With
    ``weight=8`` alone, binary activations are learned first and binary weights after them (Martinez et al. 2020). What
    is wider than a rung by its recipe stays so. Ranges and learned scales of the grids that change start anew; the rest
    goes on as it is.

    Args:
        model: a prepared model; changed in place, and returned.
        batches: data for the ranges of activations whose grid changes, as for :func:`~qat.calibrate`. None: nothing is
            found anew, since the state of this rung was loaded from a checkpoint.
        weight: bits of weights, 1 to 8; None: their own.
        input: bits of activations (inputs and outputs), likewise.

    Raises:
        SpecError: bits that no grid has.
        CalibrationError: the batches are empty; a range that would have to change is frozen. The model is as it was.
        ConvertError: the model is deployed.
    """
    prepared_state(model)
    modules = quantized_modules(model)
    if any(m.frozen for m in modules.values()):
        raise ConvertError("this model is deployed: its bits are what they are; set rungs on the prepared model")
    quantizers = {id(q): (q, input) for q in activation_quantizers(model)}
    quantizers |= {id(q): (q, weight) for m in modules.values() if (q := m.weight_quantizer) is not None}
    before = [(q, q.spec, {k: v.clone() for k, v in q.state_dict().items()}) for q, _ in quantizers.values()]
    try:
        changed: list[Quantizer] = [q for q, bits in quantizers.values() if q.work_at(bits, batches is not None)]
        if batches is not None:
            with processes.whole(model):
                _find_ranges(model, batches, changed)
    except BaseException:
        for q, spec, values in before:
            q.spec = spec
            if isinstance(q, StaticQuantizer):
                q.follow_spec()
                q.load_state_dict(values)
        raise
    return model


def _find_ranges(model: nn.Module, batches: Iterable[Any], changed: list[Quantizer]) -> None:
    """Ranges of activations from data; those of weights from the weights, which need none."""
    static = {id(q): q for q in changed if isinstance(q, StaticQuantizer)}
    if any(not q.is_weight for q in static.values()):
        find_ranges(model, batches, only=changed)
        return
    for module in quantized_modules(model).values():
        weights = module.weight_quantizer
        if weights is not None and id(weights) in static and module.plan.tied_to is None:
            with torch.no_grad():
                weights.quantize(module.weight_matrix())
