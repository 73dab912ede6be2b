"""``calibrate``: everything that data alone can do for a prepared model.

    rewrites     weights change, the float function does not: outliers move to where they do no harm
    ranges       of activations from data, of weights from the weights
    roundings    weights move onto the grid, to codes that suit the data better than the nearest ones
    corrections  what error is left on average goes into the biases

A recipe names the algorithms beyond ranges (``calibration: [smoothquant, gptq]``). All of them only change float
weights, biases and ranges: modules, their forward and ``convert`` know nothing of it, and training goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from qat.calibration import processes
from qat.calibration.corrections import correct_biases
from qat.calibration.gptq import round_weights
from qat.calibration.ranges import find_ranges
from qat.calibration.reconstruction import reconstruct
from qat.calibration.rescaling import awq, equalization, smoothquant
from qat.calibration.rotation import hadamard
from qat.calibration.rounding import float_reference, round_adaptively
from qat.errors import CalibrationError, ConvertError, RecipeError
from qat.quantizers.quantizer import DynamicQuantizer, StaticQuantizer
from qat.recipe import PLACING
from qat.recipe import algorithms as chosen_algorithms
from qat.rewriter import prepared_state, quantized_modules

Progress = Callable[[str, int, int], None]
"""Called with the name of an algorithm, how many of its steps are done, and how many there are."""
Driver = Callable[..., Mapping[str, str]]
"""``driver(model, batches, progress, **options)`` changes a prepared model in place; it returns a note for each layer
that it changed, or would have changed but could not."""

REWRITES: dict[str, Driver] = {"equalization": equalization, "hadamard": hadamard, "smoothquant": smoothquant,
                               "awq": awq}
ROUNDINGS: dict[str, Driver] = {
    "gptq": round_weights,
    "adaround": round_adaptively,
    "reconstruction": reconstruct,
    "bias_correction": correct_biases,
}
COMPARING = ("adaround", "reconstruction", "bias_correction")
"""Drivers that take ``reference=`` too: the model as it was before any rounding, in floating point."""


def calibrate(model: nn.Module, batches: Iterable[Any], ignore_nonfinite: bool = False,
              merge: Literal["batches", "parts"] | None = "batches", algorithms: Any = None,
              progress: Progress | None = None) -> nn.Module:
    """Set every static range from data, and do what the recipe's ``calibration:`` names.

    Learned scales get their start from it. The model runs in eval, without gradients; its own mode comes back
    afterwards. Ranges start anew: what was observed before is forgotten. The first run also shows which matrix products
    the model calls as functions (see :func:`qat.coverage`). If finding ranges fails, the quantizers are as they were.
    Algorithms that compare with the float model (AdaRound, reconstruction, bias correction) hold a copy of it.

    In a run of several processes (an initialized ``torch.distributed`` group) each calibrates with batches of its own,
    as many as it has, and their ranges are merged: all processes get those that one would get from all batches.

    Args:
        model: a prepared model; changed in place, and returned.
        batches: any iterable of inputs (a tensor, a tuple of arguments, or a dict of keyword arguments each).
        ignore_nonfinite: leave batches out that make NaN or infinity, with a warning, instead of raising.
        merge: how ranges are merged with those of the other processes, if there are any; all of them must call
            ``calibrate`` then. "batches": as one process would see the batches in the order rank 0's first, rank 1's
            first, ..., rank 0's second. "parts": the first ones of all are parts of one batch, and so on. (Only moving
            averages see a difference.) None: this process calibrates alone.
        algorithms: as ``calibration:`` in a recipe. None: those of the model's recipe. ``[]``: ranges alone.
        progress: called as algorithms go on.

    Raises:
        CalibrationError: no batch at all; NaN or infinity (the message names layer and batch); algorithms beyond ranges
            in a run of several processes. Where ranges are merged, an error in one process is raised in all of them.
        RecipeError: an unknown algorithm or option; one that chooses codes, for a model whose recipe did not name it.
        ConvertError: the model is deployed.
    """
    if merge not in ("batches", "parts", None):
        raise CalibrationError(f"merge must be 'batches', 'parts' or None, not {merge!r}")
    state = prepared_state(model)
    modules = quantized_modules(model)
    if any(m.frozen for m in modules.values()):
        raise ConvertError("this model is deployed: its ranges are frozen; calibrate the prepared model")
    wanted = state.recipe.calibration if algorithms is None else chosen_algorithms(algorithms)
    if not wanted:
        _release(model)
        find_ranges(model, batches, ignore_nonfinite, merge)
        return model
    if merge is not None and processes.several_processes():
        raise CalibrationError(f"{', '.join(a.name for a in wanted)}: algorithms beyond ranges run in one process; "
                               "calibrate before the processes start, or give merge=None")
    batches = list(batches)
    following = [n for n, m in modules.items() if isinstance(m.weight_quantizer, DynamicQuantizer)]
    for algorithm in wanted:
        if algorithm.name in PLACING and following:
            raise RecipeError(f"{algorithm.name} chooses codes, so ranges of weights must stand still: name it under "
                              f"calibration: in the recipe given to prepare, not only now ({following[0]})")
    _release(model)
    state.notes.clear()
    if ignore_nonfinite:        # algorithms get the batches that are good for ranges
        batches = [batches[index] for index in find_ranges(model, batches, ignore_nonfinite, merge)]
    for algorithm in wanted:
        if algorithm.name in REWRITES:
            _note(state.notes, REWRITES[algorithm.name](model, batches, progress, **dict(algorithm.options)))
    find_ranges(model, batches, ignore_nonfinite, merge)
    reference = float_reference(model) if any(a.name in COMPARING for a in wanted) else None
    for algorithm in wanted:
        if algorithm.name in ROUNDINGS:
            options = dict(algorithm.options) | ({"reference": reference} if algorithm.name in COMPARING else {})
            _note(state.notes, ROUNDINGS[algorithm.name](model, batches, progress, **options))
    return model


def _release(model: nn.Module) -> None:
    """Let go of the ranges of weights that an earlier calibration has placed."""
    for module in quantized_modules(model).values():
        if isinstance(module.weight_quantizer, StaticQuantizer) and module.plan.tied_to is None:
            module.weight_quantizer.restart()


def _note(notes: dict[str, str], more: Mapping[str, str]) -> None:
    """Add to what is known of each layer, for coverage."""
    for name, text in more.items():
        notes[name] = f"{notes[name]}; {text}" if name in notes else text
