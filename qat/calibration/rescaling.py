"""Rewrites that rescale channels: SmoothQuant, AWQ, cross-layer equalization.

All three multiply the columns of layers by ``s`` and divide what makes their inputs by it, wherever that is possible
(:mod:`qat.calibration.equivalence`), so the float function stays. They differ in how ``s`` is chosen:

    smoothquant    s = max|x|^alpha / max|w|^(1 - alpha)      outliers move from activations into weights
    awq            s = mean|x|^a, a by search                 columns that matter more get finer steps of the grid
    equalization   s = sqrt(range_before / range_behind)      rows and columns of one range, for grids of one scale

AWQ then looks for the range of each group of weights that makes the least error in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.equivalence import (
    Edits,
    Node,
    Rewrite,
    Scaling,
    Structure,
    all_finite,
    column_ranges,
    columns_multiplied,
    float_tensors,
    floating,
    row_ranges,
    wide,
)
from qat.errors import RecipeError, UnsupportedError
from qat.modules.base import QuantizedModule
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import StaticQuantizer, dynamic_qparams
from qat.rewriter import quantized_modules
from qat.tracing import run

Progress = Callable[[str, int, int], None]

ROWS = 512
"""How many rows of a layer's inputs an error is measured on."""
ALPHAS = tuple(i / 20 for i in range(4, 20))
"""What ``alpha: auto`` chooses from."""
SHRINKS = tuple(1.0 - i / 20 for i in range(11))
"""What AWQ's ``clip`` chooses from: shares of the full range."""


# ---------------------------------------------------------------------------------------------------- pure cores


def smoothing_scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)`` for each channel; 1 where either is 0 (Xiao et al. 2022, SmoothQuant)."""
    s = activations**alpha / weights.clamp(min=torch.finfo(weights.dtype).tiny) ** (1.0 - alpha)
    return _where_both(activations, weights, s)


def salience_scale(magnitude: Tensor, exponent: float) -> Tensor:
    """``mean|x|^exponent``, so that the geometric mean of the least and the greatest is 1 (Lin et al. 2023, AWQ)."""
    alive = magnitude > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    s = magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny) ** exponent
    s = (s / (s[alive].max() * s[alive].min()).sqrt()).clamp(1e-4, 1e4)
    return torch.where(alive, s, torch.ones_like(s))


def equalizing_scale(before: Tensor, behind: Tensor) -> Tensor:
    """``sqrt(before / behind)``: dividing rows and multiplying columns by it gives both the range
    ``sqrt(before * behind)``; 1 where either is 0 (Nagel et al. 2019)."""
    return _where_both(before, behind, (before / behind.clamp(min=torch.finfo(behind.dtype).tiny)).sqrt())


def _where_both(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return torch.where((a > 0) & (b > 0) & torch.isfinite(s) & (s > 0), s, torch.ones_like(s))


def on_grid(x: Tensor, spec: TensorSpec, mask: Tensor | None = None) -> Tensor:
    """``x`` quantized and dequantized with the range it has itself."""
    scale, zero_point = dynamic_qparams(x, spec, mask)
    return affine.dequantize(affine.quantize(x, scale, zero_point, spec), scale, zero_point, spec)


def product_error(weight: Tensor, rows: Tensor, factor: Tensor, weight_spec: TensorSpec | None,
                  input_spec: TensorSpec | None, mask: Tensor | None = None) -> float:
    """Squared error of a quantized product, relative to the product, if columns are multiplied by ``factor``.

    Args:
        weight: (out, in // groups, *kernel), float32.
        rows: (groups, rows, in // groups * taps), the inputs.
        factor: (in,), what columns are multiplied by and inputs divided.
    """
    groups, _, width = rows.shape
    taps = width * groups // len(factor)
    scaled = columns_multiplied(weight, factor, groups)
    inputs = rows / factor.repeat_interleave(taps).reshape(groups, 1, width)
    if weight_spec is not None:
        scaled = on_grid(scaled, weight_spec, mask)
    if input_spec is not None:
        inputs = on_grid(inputs.reshape(-1, width), input_spec).reshape(inputs.shape)
    exact = rows @ weight.reshape(groups, -1, width).transpose(1, 2)
    made = inputs @ scaled.reshape(groups, -1, width).transpose(1, 2)
    return float((made - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(exact.dtype).tiny))


def clipped_scale(weight: Tensor, rows: Tensor, spec: TensorSpec, scale: Tensor, zero_point: Tensor | None,
                  shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """The share of each scale that makes the least error in the outputs (Lin et al. 2023, the clipping of AWQ).

    Args:
        weight: (out, in // groups, *kernel), float32.
        rows: (groups, rows, in // groups * taps), the inputs.
        scale, zero_point: those of the full range. Zero points stay where they are as a range shrinks.

    Returns:
        A scale in the shape of ``scale``. What other scales do to an output does not count for one of them, but where
        there is one scale for all.
    """
    groups, count, width = rows.shape
    block = spec.group_size if spec.granularity == "per_group" and spec.group_size else width
    blocked = rows.reshape(groups, count, -1, block).transpose(1, 2)               # groups, blocks, rows, block
    gram = blocked.transpose(2, 3) @ blocked if block <= count else None

    def error(values: Tensor) -> Tensor:
        delta = (values - weight).reshape(groups, -1, width // block, block).transpose(1, 2)
        each = (blocked @ delta.transpose(2, 3)).square().sum(2) if gram is None else ((delta @ gram) * delta).sum(3)
        each = each.transpose(1, 2).reshape(len(weight), -1)                       # out, blocks
        return each.sum() if scale.dim() == 0 else each.reshape(scale.shape)

    best, least = scale, torch.full(scale.shape, torch.inf, dtype=weight.dtype, device=weight.device)
    for shrink in shrinks:
        tried = affine.round_scale(scale * shrink, spec)
        codes = affine.quantize(weight, tried, zero_point, spec)
        found = error(affine.dequantize(codes, tried, zero_point, spec))
        best, least = torch.where(found < least, tried, best), torch.minimum(found, least)
    return best


# ---------------------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """What a layer reads, over all batches.

    Attributes:
        greatest, mean: of the magnitude of each input channel, (in,), float32.
        rows: some inputs as rows of a matrix, (groups, rows, in // groups * taps); None: it does not say.
    """

    greatest: Tensor
    mean: Tensor
    rows: Tensor | None


def observed(model: nn.Module, batches: Sequence[Any], nodes: Iterable[Node], rows: int = ROWS) -> dict[str, Inputs]:
    """What these layers read as the model runs in floating point; those that no batch reaches are left out.

    Tensors with NaN or infinity do not count; finding ranges says what is to be said of them.
    """
    greatest: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    samples: dict[str, list[Tensor]] = {}
    each = -(-rows // len(batches))
    with ExitStack() as hooks, floating(model):
        for one in nodes:
            def look(module: nn.Module, args: Any, kwargs: Any, node: Node = one) -> None:
                x, name = (*args, *kwargs.values())[0], node.name
                if not isinstance(x, Tensor) or not x.numel() or not bool(torch.isfinite(x).all()):
                    return
                magnitude = node.effective_input(x).abs().movedim(node.axis(x), -1).reshape(-1, node.inputs).float()
                top, whole = magnitude.amax(0), magnitude.sum(0)
                greatest[name] = torch.maximum(greatest[name], top) if name in greatest else top
                total[name] = total[name] + whole if name in total else whole
                counts[name] = counts.get(name, 0) + len(magnitude)
                if rows and isinstance(module, QuantizedModule):
                    try:
                        matrix = module.input_rows(x)
                    except UnsupportedError:
                        return
                    step = max(1, matrix.shape[1] // each)
                    samples.setdefault(name, []).append(matrix[:, ::step][:, :each].float().clone())

            hooks.callback(one.module.register_forward_pre_hook(look, with_kwargs=True).remove)
        for batch in batches:
            run(model, batch)
    return {n: Inputs(greatest[n], total[n] / counts[n], torch.cat(samples[n], 1)[:, : 2 * rows] if n in samples
                      else None) for n in greatest}


# ---------------------------------------------------------------------------------------------------- drivers


def _progress(progress: Progress | None, name: str, done: int, total: int) -> None:
    if progress is not None:
        progress(name, done, total)


def _error(scaling: Scaling, inputs: Mapping[str, Inputs], s: Tensor) -> float:
    """The errors of all quantized readers whose columns are multiplied by ``s`` (channels of the producer,)."""
    total = 0.0
    for name in scaling.readers:
        node, rows = scaling.nodes[name], inputs[name].rows
        if not isinstance(node.module, QuantizedModule) or rows is None:
            continue
        plan, quantizer = node.module.plan, node.module.weight_quantizer
        weight = wide(node.matrix() if quantizer is None else quantizer.masked(node.matrix())).float()
        mask = None if quantizer is None else quantizer.mask
        total += product_error(weight, rows, scaling.spread(name, s), plan.weight, plan.input, mask)
    return total


def _left_alone(structure: Structure, name: str, scalings: Iterable[Scaling], inputs_only: bool = False,
                otherwise: str = "nothing in front of it takes scales") -> dict[str, str]:
    """A note for each layer that an algorithm is for, but cannot serve.

    Args:
        inputs_only: it is for layers that quantize their inputs.
    """
    served = {n for s in scalings for n in s.readers}
    return {n: f"{name}: not rescaled ({structure.reasons.get(n, otherwise)})"
            for n, m in quantized_modules(structure.model).items()
            if n not in served and m.plan.weight is not None and m.plan.kind != "Embedding"
            and (m.plan.input is not None or not inputs_only)}


def _carried_out(structure: Structure, name: str, chosen: Mapping[int, tuple[Scaling, Tensor, str]],
                 notes: dict[str, str]) -> None:
    """Divide producers and multiply readers by what was chosen, verified; say what was done and what not."""
    rewrites = [scaling.rewrite(1.0 / s) for scaling, s, _ in chosen.values()]
    refused = structure.settle(rewrites, Edits())
    for rewrite, (scaling, _, text) in zip(rewrites, chosen.values()):
        for reader in scaling.readers:
            notes[reader] = (f"{name}: not rescaled (it would change what the model returns)" if rewrite in refused
                             else f"{name}: {text}")


def smoothquant(model: nn.Module, batches: Sequence[Any], progress: Progress | None = None,
                alpha: float | str = 0.5) -> dict[str, str]:
    """Move outliers of activations into weights, in place (Xiao et al. 2022).

    It serves layers that quantize their inputs, behind a norm or any layer that can take scales.

    Args:
        alpha: 0 leaves all the difficulty to the activations, 1 moves all of it into the weights; ``auto`` chooses for
            each producer what makes the least error in the outputs of its readers, no change included.

    Raises:
        RecipeError: alpha is neither a number from 0 to 1 nor ``auto``.
    """
    if alpha != "auto" and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise RecipeError(f"calibration smoothquant: alpha is a number from 0 to 1, or auto, not {alpha!r}")
    structure = Structure(model, batches)
    scalings = [s for s in structure.scalings() if any(_quantizes_input(s.nodes[n]) for n in s.readers)]
    inputs = observed(model, batches, {n: s.nodes[n] for s in scalings for n in s.readers}.values(),
                      ROWS if alpha == "auto" else 0)
    chosen: dict[int, tuple[Scaling, Tensor, str]] = {}
    for place, scaling in enumerate(scalings):
        if not all(n in inputs for n in scaling.readers):
            continue
        activations = scaling.gather({n: inputs[n].greatest for n in scaling.readers})
        weights = scaling.gather({n: column_ranges(wide(scaling.nodes[n].matrix()).float(), scaling.nodes[n].groups)
                                  for n in scaling.readers})
        used: float = 0.5
        if alpha == "auto":
            unchanged = _error(scaling, inputs, torch.ones_like(activations))
            least, used = min((_error(scaling, inputs, smoothing_scale(activations, weights, a)), a) for a in ALPHAS)
            if least >= unchanged:
                continue
        else:
            used = float(alpha)
        text = f"outliers moved into the weights from {scaling.producer.name} (alpha {used:g})"
        chosen[place] = scaling, smoothing_scale(activations, weights, used), text
        _progress(progress, "smoothquant", place + 1, len(scalings))
    notes = _left_alone(structure, "smoothquant", scalings, inputs_only=True)
    _carried_out(structure, "smoothquant", chosen, notes)
    return notes


def _quantizes_input(node: Node) -> bool:
    return isinstance(node.module, QuantizedModule) and (node.module.plan.input is not None or node.module.plan.chained)


def awq(model: nn.Module, batches: Sequence[Any], progress: Progress | None = None, steps: int = 20,
        clip: bool = True) -> dict[str, str]:
    """Give columns that carry more finer steps, then clip the ranges of weights, in place (Lin et al. 2023).

    It serves layers with quantized weights; what their inputs are quantized to is taken into account too.

    Args:
        steps: how many exponents between 0 and 1 are tried.
        clip: choose the range of each group (or channel, or tensor) of weights by the error in the layer's output.

    Raises:
        RecipeError: ``steps`` is no positive whole number.
    """
    if not isinstance(steps, int) or steps < 1:
        raise RecipeError(f"calibration awq: steps is a positive whole number, not {steps!r}")
    structure = Structure(model, batches)
    scalings = [s for s in structure.scalings() if any(s.nodes[n].quantized for n in s.readers)]
    inputs = observed(model, batches, {n: s.nodes[n] for s in scalings for n in s.readers}.values())
    chosen: dict[int, tuple[Scaling, Tensor, str]] = {}
    for place, scaling in enumerate(scalings):
        if not all(n in inputs for n in scaling.readers):
            continue
        magnitude = scaling.gather({n: inputs[n].mean for n in scaling.readers}, "mean")
        exponents = [i / steps for i in range(steps)]
        errors = [_error(scaling, inputs, salience_scale(magnitude, a)) for a in exponents]
        best = min(range(steps), key=errors.__getitem__)
        if best:
            text = f"columns scaled by |x|^{exponents[best]:g}, undone in {scaling.producer.name}"
            chosen[place] = scaling, salience_scale(magnitude, exponents[best]), text
        _progress(progress, "awq", place + 1, len(scalings))
    notes = _left_alone(structure, "awq", scalings)
    _carried_out(structure, "awq", chosen, notes)
    if clip:
        for name, text in _clip(model, batches).items():
            notes[name] = f"{notes[name]}, {text}" if name in notes else f"awq: {text}"
    return notes


def _clip(model: nn.Module, batches: Sequence[Any]) -> dict[str, str]:
    """Place the range of every quantized weight where it makes the least error in its layer's output.

    A clipped weight is smaller on average, and what that does to a layer's output adds up over layers, so each range is
    tried in the model, with all weights on their grids, and stays only where the model's output error falls.
    """
    nodes = [Node(n, m, "layer") for n, m in quantized_modules(model).items()
             if isinstance(m.weight_quantizer, StaticQuantizer) and m.plan.tied_to is None
             and m.plan.kind != "Embedding"]
    tied = {m.plan.tied_to for m in quantized_modules(model).values()}
    notes: dict[str, str] = {}
    found: dict[Node, tuple[Tensor, Tensor, Tensor | None]] = {}
    for node in nodes:                          # one by one: rows of all layers at once may not fit the memory
        if node.name in tied:
            notes[node.name] = "not clipped (its weight is shared)"
    nodes = [n for n in nodes if n.name not in tied]
    for few in (nodes[i : i + 32] for i in range(0, len(nodes), 32)):
        inputs = observed(model, batches, few)
        for node in few:
            quantizer: StaticQuantizer = node.module.weight_quantizer
            rows = inputs[node.name].rows if node.name in inputs else None
            if rows is None:
                notes[node.name] = "not clipped (its inputs are not seen)"
                continue
            weight = wide(quantizer.masked(node.matrix())).float()
            scale, zero_point = dynamic_qparams(weight, quantizer.spec, quantizer.mask)
            found[node] = scale, clipped_scale(weight, rows, quantizer.spec, scale, zero_point), zero_point
    better = _better_in_the_model(model, batches, found)
    for node, (scale, best, zero_point) in found.items():
        if node in better:
            node.module.weight_quantizer.place(best, zero_point)
            notes[node.name] = f"ranges clipped to {float((best / scale).mean()):.0%} on average"
        else:
            notes[node.name] = "not clipped (the model's output error would not fall)"
    return notes


def _better_in_the_model(model: nn.Module, batches: Sequence[Any],
                         found: Mapping[Node, tuple[Tensor, Tensor, Tensor | None]]) -> set[Node]:
    """Of weights with two scales each, those whose second scale lowers the model's output error on a batch.

    They are tried one after another, in the order of the modules; activations are floating point.
    """
    better: set[Node] = set()
    with floating(model):
        batch = next(b for b in batches if all_finite(float_tensors(run(model, b))))
        expected = float_tensors(run(model, batch))

        def error() -> float:
            made = float_tensors(run(model, batch))
            return sum(float((a.double() - b.double()).nan_to_num().square().sum()) for a, b in zip(made, expected))

        kept = {node: node.matrix().clone() for node in found}
        try:
            for node, (scale, _, zero_point) in found.items():
                node.write(_on_grid(kept[node], scale, zero_point, node.module.weight_quantizer))
            least = error()
            for node, (scale, best, zero_point) in found.items():
                node.write(_on_grid(kept[node], best, zero_point, node.module.weight_quantizer))
                tried = error()
                if tried < least:
                    least = tried
                    better.add(node)
                else:
                    node.write(_on_grid(kept[node], scale, zero_point, node.module.weight_quantizer))
        finally:
            for node, matrix in kept.items():
                node.write(matrix)
    return better


def _on_grid(matrix: Tensor, scale: Tensor, zero_point: Tensor | None, quantizer: StaticQuantizer) -> Tensor:
    """The values that a weight would have with this scale."""
    weight = quantizer.masked(matrix)
    codes = affine.quantize(weight, scale, zero_point, quantizer.spec)
    return affine.dequantize(codes, scale, zero_point, quantizer.spec)


def equalization(model: nn.Module, batches: Sequence[Any], progress: Progress | None = None,
                 sweeps: int = 20) -> dict[str, str]:
    """Give the rows of a layer and the columns of the next one ranges alike, in place (Nagel et al. 2019).

    It serves layers behind layers, with anything between them that scales pass through; a batch norm between them
    takes the scales (its gain and its bias), and the rows in front of it count as they are with its gain. Where such a
    layer has one scale for all of its weights, its rows get one range, and the running statistics follow.

    Args:
        sweeps: passes over all pairs, at most; it ends where nothing moves any more.

    Raises:
        RecipeError: ``sweeps`` is no positive whole number.
    """
    if not isinstance(sweeps, int) or sweeps < 1:
        raise RecipeError(f"calibration equalization: sweeps is a positive whole number, not {sweeps!r}")
    structure = Structure(model, batches)
    behind = {n: structure.nodes[m] for n, node in structure.nodes.items() if node.kind == "batch_norm"
              and (m := _in_front(structure, n))}
    scalings = [s for s in structure.scalings() if (s.producer.kind == "layer" or s.producer.name in behind)
                and any(n.quantized for n in (behind.get(s.producer.name, s.producer),
                                              *(s.nodes[r] for r in s.readers)))]
    totals = _equalized(scalings, behind, sweeps, progress)
    chosen = {i: (scaling, total, f"columns of one range with the rows of "
                  f"{behind.get(scaling.producer.name, scaling.producer).name}")
              for i, (scaling, total) in enumerate(zip(scalings, totals))}
    notes = _left_alone(structure, "equalization", scalings, otherwise="no layer in front of it takes scales")
    _carried_out(structure, "equalization", chosen, notes)
    rows = [(layer, _rows_equalized(layer, structure.nodes[norm])) for norm, layer in behind.items()
            if _one_scale(layer) and not (structure.shared(layer) or structure.shared(structure.nodes[norm]))]
    refused = structure.settle([r for _, r in rows], Edits())
    for layer, rewrite in rows:
        if rewrite not in refused:
            text = f"rows of one range, undone in {rewrite.layers[1]}"
            notes[layer.name] = f"{notes[layer.name]}; {text}" if layer.name in notes else f"equalization: {text}"
    return notes


def _in_front(structure: Structure, norm: str) -> str | None:
    """The layer whose output this batch norm reads, if nobody else reads it."""
    key = structure.trace.of(norm)[0].inputs[0]
    made = structure.trace.producer(key)
    name = None if made is None else made.module
    alone = len(structure.trace.consumers(key)) == 1
    return name if alone and name in structure.nodes and structure.nodes[name].kind == "layer" else None


def _equalized(scalings: Sequence[Scaling], behind: Mapping[str, Node], sweeps: int,
               progress: Progress | None) -> list[Tensor]:
    """What columns are multiplied by in all, for each pair: the sweeps, on copies of the weights."""
    copies: dict[str, Tensor] = {}
    gains: dict[str, Tensor] = {}
    for scaling in scalings:
        for node in (behind.get(scaling.producer.name, scaling.producer), *(scaling.nodes[r] for r in scaling.readers)):
            copies.setdefault(node.name, wide(node.matrix()).clone())
        if scaling.producer.name in behind:
            norm = scaling.producer.module
            gains[scaling.producer.name] = (wide(norm.weight) / (wide(norm.running_var) + norm.eps).sqrt()).abs()
    totals = [torch.ones(s.producer.channels, dtype=copies[next(iter(s.readers))].dtype) for s in scalings]
    for sweep in range(sweeps if scalings else 0):
        moved = 0.0
        for place, scaling in enumerate(scalings):
            name = scaling.producer.name
            rows = row_ranges(copies[behind[name].name if name in behind else name])
            rows = rows * gains[name] if name in behind else rows
            columns = scaling.gather({r: column_ranges(copies[r], scaling.nodes[r].groups) for r in scaling.readers})
            s = equalizing_scale(rows, columns.to(rows))
            if name in behind:
                gains[name] = gains[name] / s
            else:
                copies[name] = copies[name] / s.reshape(-1, *[1] * (copies[name].dim() - 1))
            for reader in scaling.readers:
                factor = scaling.spread(reader, s)
                copies[reader] = columns_multiplied(copies[reader], factor, scaling.nodes[reader].groups)
            totals[place] = totals[place].to(s) * s
            moved = max(moved, float(s.log().abs().max()))
        _progress(progress, "equalization", sweep + 1, sweeps)
        if moved < 1e-3:
            break
    return totals


def _one_scale(node: Node) -> bool:
    module = node.module
    return node.quantized and module.plan.weight.granularity == "per_tensor"


def _rows_equalized(layer: Node, norm: Node) -> Rewrite:
    """Rows are multiplied up to the greatest range among them; the batch norm behind divides by it."""

    def apply() -> None:
        ranges = row_ranges(wide(layer.matrix()))
        s = torch.where(ranges > 0, ranges.max() / ranges.clamp(min=torch.finfo(ranges.dtype).tiny), 1.0)
        layer.multiply_outputs(s)
        module = norm.module
        module.running_mean.copy_(wide(module.running_mean) * s)
        module.running_var.copy_((wide(module.running_var) + module.eps) * s.square() - module.eps)

    return Rewrite((layer.name, norm.name), [*layer.tensors(), *norm.tensors()], apply)


