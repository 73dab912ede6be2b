"""AdaRound: of the two codes next to each weight, the one that suits the layer's output.

The nearest codes have the least error in the weights, not in what comes out. With ``x`` the inputs that the float model
has and ``x'`` those that the layers before, rounded already, make, the output error of values ``w + d`` is

    sum over rows of |w x - (w + d) x'|^2 = sum |w (x - x')|^2 - 2 tr(w K d^T) + tr(d H d^T)
    H = sum x' x'^T,    K = sum (x - x') x'^T

so that two matrices stand for all the data, however much there is, and each output channel is a problem of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.walk import Arrival, walk
from qat.errors import CalibrationError, UnsupportedError
from qat.modules.adapted import Adapted
from qat.modules.base import QuantizedModule
from qat.modules.composite import Composite, Part
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import DynamicQuantizer, StaticQuantizer
from qat.rewriter import quantized_modules

STRETCH = (-0.1, 1.1)
"""Where the rectified sigmoid would end, if it were not cut to [0, 1]: so it reaches both at finite arguments."""
WARM_UP, SHARPNESS = 0.2, (20.0, 2.0)
"""The share of the steps without the regularizer; its exponent, from there on."""
UNFOLDED = 1 << 24
"""Values of unfolded inputs of a convolution that are made at once."""


# ------------------------------------------------------------------------------------------------- pure functions


@dataclass
class Moments:
    """What the inputs of a layer are, as far as its mean and its mean squared output error go. Float32 sums over rows.

    Attributes:
        gram: H, (groups, in, in).
        cross: K, (groups, in, in).
        mean, float_mean: sums of the inputs of the quantized and of the float model, (groups, in).
        missed: for each output channel sum of ``(w (x - x'))^2``, (groups, out).
        power: for each output channel sum of ``(w x)^2``, (groups, out).
        count: how many rows there were.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    float_mean: Tensor
    missed: Tensor
    power: Tensor
    count: int = 0

    @classmethod
    def none(cls, weight: Tensor, groups: int) -> Moments:
        """Before the first row; ``weight`` (groups * out, in)."""
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
        squares, rows, channels = (weight.new_zeros(2, *size, dtype=torch.float32) for size in (
            (groups, inputs, inputs), (groups, inputs), (groups, outputs)))
        return cls(*squares, *rows, *channels)

    def add(self, weight: Tensor, rows: Tensor, floats: Tensor | None = None) -> None:
        """Take rows (groups, rows, in) into account; ``floats``: the float model's; None: the same."""
        rows, weight = rows.float(), weight.float().reshape(*self.missed.shape, -1)
        floats = rows if floats is None else floats.float()
        self.gram.baddbmm_(rows.transpose(1, 2), rows)
        self.mean += rows.sum(1)
        self.float_mean += floats.sum(1)
        self.power += (floats @ weight.transpose(1, 2)).square().sum(1)
        self.count += rows.shape[1]
        if floats is not rows:
            apart = floats - rows
            self.cross.baddbmm_(apart.transpose(1, 2), rows)
            self.missed += (apart @ weight.transpose(1, 2)).square().sum(1)

    def error(self, weight: Tensor, values: Tensor) -> Tensor:
        """The squared output error of ``values`` in the place of ``weight`` for each channel, (groups, out).

        Relative to the mean squared output of the layer's channels.
        """
        return self._error(*self._shaped(weight, values)) / self.scale()

    def _error(self, weight: Tensor, change: Tensor) -> Tensor:
        return (self.missed - 2 * ((weight @ self.cross) * change).sum(-1) + ((change @ self.gram) * change).sum(-1))

    def _shaped(self, weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*self.missed.shape, -1)
        return weight.float().reshape(shape), (values.float() - weight.float()).reshape(shape)

    def damped(self, damp: float) -> Tensor:
        """The Gram matrices with their diagonals raised by ``damp * in / count`` of their mean."""
        gram = self.gram.clone()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(-1, keepdim=True) * (damp * gram.shape[-1] / max(1, self.count))
        return gram

    def scale(self) -> Tensor:
        """The mean of ``power`` over the output channels, positive."""
        return self.power.mean().clamp(min=affine.TINY)


def neighbours(weight: Tensor, scale: Tensor, zero_point: Tensor | int | None,
               spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The codes of the two grid values around each weight (beyond the grid's ends: the two last ones).

    Returns:
        Lower and upper codes, of ``spec.fmt.dtype``, in the shape of ``weight`` (out, in).

    >>> low, high = neighbours(torch.tensor([[0.4, -0.6, 9.0]]), torch.ones(1), None, TensorSpec("int4").for_weight())
    >>> low.tolist(), high.tolist()
    ([[0, -1, 6]], [[1, 0, 7]])
    """
    fmt = spec.fmt
    nearest = affine.quantize(weight, scale, zero_point, spec)
    step = 2 if fmt.grid == "sign" else 1
    above = affine.dequantize(nearest, scale, zero_point, spec) > weight.float()
    lower = (nearest.to(torch.int16) - above.to(torch.int16) * step).clamp(fmt.lo, fmt.hi - step)
    return lower.to(fmt.dtype), (lower + step).to(fmt.dtype)


def adaround(weight: Tensor, moments: Moments, spec: TensorSpec, scale: Tensor, zero_point: Tensor | int | None = None,
             mask: Tensor | None = None, steps: int = 400, learning_rate: float = 0.1,
             regularization: float = 10.0, damp: float = 0.5) -> Tensor:
    """Codes of ``weight`` with the least output error, each one of the two next to its weight.

    How far up a weight is rounded is ``h(v) = clamp(sigmoid(v) * 1.2 - 0.1, 0, 1)``; ``v`` is trained by Adam on the
    output error (in units of that of the nearest codes) plus ``regularization`` times the mean of
    ``1 - |2 h - 1|^beta``, with beta falling from 20 to 2, which drives each ``h`` to 0 or 1. An output channel whose
    nearest codes are better keeps them. (Nagel et al. 2020, Up or Down?, arXiv 2004.10568.)

    What few rows say of many inputs is half chance: the diagonal of H is raised by ``damp * inputs / rows`` of its
    mean, which holds codes to their weights as far as the data are few.

    Args:
        weight: (groups * out, in), float.
        moments: of the inputs.
        spec, scale, zero_point: the grid, as in :func:`qat.numerics.affine.quantize`.
        mask: bool, (groups * out, in): False where a weight is pruned; it gets the code of zero.

    Returns:
        Codes of ``spec.fmt.dtype``, (groups * out, in).
    """
    weight = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
    nearest = affine.quantize(weight, scale, zero_point, spec)
    lower, upper = neighbours(weight, scale, zero_point, spec)

    def values(codes: Tensor) -> Tensor:
        return affine.dequantize(codes, scale, zero_point, spec)

    shape = (*moments.missed.shape, -1)
    low, span = values(lower), values(upper) - values(lower)
    start, (floats, change) = (weight - low) / span, moments._shaped(weight, values(nearest))
    low, span, start = (t.reshape(shape) for t in (low, span, start))
    gram = moments.damped(damp)
    unit = ((change @ gram) * change).sum(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    pull = floats @ moments.cross / unit
    free = None if mask is None else mask.reshape(shape)
    v = torch.logit((start.clamp(0, 1) - STRETCH[0]) / (STRETCH[1] - STRETCH[0]))
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(steps):
        opened = v.sigmoid()
        h = (opened * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp_(0, 1)
        slope = opened * (1 - opened) * (STRETCH[1] - STRETCH[0]) * ((h > 0) & (h < 1))
        change = low + h * span - floats
        if free is not None:
            change *= free
        gradient = ((change @ gram) / unit - pull) * (2 * span)
        progress = (step / max(1, steps) - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            beta = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * 0.5 * (1 + math.cos(math.pi * progress))
            way = 2 * h - 1
            gradient -= way.abs().pow(beta - 1) * way.sign() * (2 * beta * regularization / v.shape[-1])
        gradient *= slope
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        v -= learning_rate * (first / (1 - 0.9 ** (step + 1))) / (
            (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
    codes = torch.where(v.reshape(weight.shape) >= 0, upper, lower)
    if mask is not None:
        codes = torch.where(mask, codes, nearest)
    better = moments.error(weight, values(codes)) < moments.error(weight, values(nearest))
    return torch.where(better.reshape(-1, 1), codes, nearest)


# --------------------------------------------------------------------------------------- layers and their inputs


def float_reference(model: nn.Module) -> nn.Module:
    """A copy of a prepared model that computes in floating point, with batch norms folded as the original folds them.

    Raises:
        CalibrationError: the model cannot be copied.
    """
    try:
        reference = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise CalibrationError(f"comparing with the float model takes a copy of it, and this model cannot be copied "
                               f"({error})") from None
    for module in quantized_modules(reference).values():
        module.calibrating = module.checking = True
    return reference


def products_at(stop: QuantizedModule) -> list[QuantizedModule]:
    """The products with a quantized weight that a stop makes: itself, or the parts of a composite, in their order."""
    products = stop.parts.values() if isinstance(stop, Composite) else [stop]
    return [p for p in products if p.weight_quantizer is not None]


def layer_stops(model: nn.Module) -> dict[str, QuantizedModule]:
    """Every layer with a quantized weight, composites whole, in the order in which the model holds them."""
    return {n: m for n, m in quantized_modules(model).items() if not isinstance(m, Part) and products_at(m)}


def weight_parameter(product: QuantizedModule) -> nn.Parameter | None:
    """The parameter that holds a product's weight; None where the weight is computed from others."""
    holder, attribute = ((product.source.holder(product.owner), product.source.attribute)
                         if isinstance(product, Part) else (product, "weight"))
    return None if isinstance(holder, Adapted) else holder._parameters.get(attribute)


def shared_weights(model: nn.Module) -> set[str]:
    """The names of products whose weight another module holds or reads too."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for key in {id(p) for p in module._parameters.values() if p is not None}:
            holders[key] = holders.get(key, 0) + 1
    products = {n: m for n, m in quantized_modules(model).items() if m.weight_quantizer is not None}
    tied = {m.plan.tied_to for m in products.values()}
    return {n for n, m in products.items()
            if n in tied or m.plan.tied_to is not None or holders.get(id(weight_parameter(m)), 0) > 1}


def inputs_of(product: QuantizedModule, stop: nn.Module, arrival: Arrival) -> list[Any]:
    """What ``product`` is called with while ``stop``, which holds it, runs on ``arrival``: once for each call."""
    if product is stop:
        return [arrival.args[0] if arrival.args else arrival.kwargs["input"]]
    seen: list[Any] = []
    handle = product.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        stop(*arrival.args, **arrival.kwargs)
    finally:
        handle.remove()
    return seen


def _pieces(product: QuantizedModule, x: Any) -> int:
    """Into how many pieces the batch may be cut, so that the unfolded input of a convolution stays small."""
    kernel = getattr(product, "kernel_size", ())
    quantizer = product.input_quantizer
    alone = isinstance(quantizer, DynamicQuantizer) and quantizer.spec.granularity == "per_tensor"
    if isinstance(x, QuantizedTensor) or alone or x.dim() != len(kernel) + 2:
        return 1
    return min(len(x), 1 + x.numel() * math.prod(kernel) // UNFOLDED)


def rows_of(product: QuantizedModule, x: Any, pieces: int = 1) -> Iterator[Tensor]:
    """The input ``x`` as rows (groups, rows, in), see :meth:`~QuantizedModule.input_rows`, in pieces of the batch."""
    for piece in (x,) if pieces < 2 else x.tensor_split(pieces):
        yield product.input_rows(piece)


def moments_of(product: QuantizedModule, twin: QuantizedModule, stop: nn.Module, twin_stop: nn.Module,
               arrivals: Sequence[Arrival]) -> Moments:
    """The moments of a product's inputs over all arrivals; ``twin`` is the same product of the float model.

    Where the float model took another way, its inputs count as those of the quantized one.

    Raises:
        UnsupportedError: the product does not show its inputs as rows.
        CalibrationError: it was never called.
    """
    weight = matrix_of(twin)
    moments: Moments | None = None
    for arrival in arrivals:
        inputs = inputs_of(product, stop, arrival)
        floats = [] if arrival.beside is None else inputs_of(twin, twin_stop, arrival.beside)
        alike = len(floats) == len(inputs) and all(a.shape == b.shape for a, b in zip(inputs, floats))
        for i, x in enumerate(inputs):
            if not math.prod(x.shape):
                continue
            pieces = _pieces(product, x)
            beside = rows_of(twin, floats[i], pieces) if alike else None
            for rows in rows_of(product, x, pieces):
                if moments is None:
                    moments = Moments.none(weight, len(rows))
                moments.add(weight, rows, None if beside is None else next(beside))
    if moments is None:
        raise CalibrationError(f"{product.name}: nothing arrived")
    return moments


def matrix_of(product: QuantizedModule) -> Tensor:
    """The float weight with output channels first and pruned values at zero, flattened to (groups * out, in)."""
    matrix, quantizer = product.weight_matrix().detach(), product.weight_quantizer
    matrix = matrix if quantizer is None or quantizer.mask is None else torch.where(quantizer.mask, matrix, 0.0)
    return matrix.flatten(1)


def hold_codes(product: QuantizedModule, codes: Tensor, scale: Tensor, zero_point: Tensor | int | None) -> str:
    """Let the float weight be the values of ``codes``, so that the quantizer finds these codes again.

    Returns:
        "", or why the weight is as it was: a weight that is computed from others, or too coarse a type.
    """
    quantizer = product.weight_quantizer
    assert quantizer is not None
    before = product.weight_matrix().detach().clone()
    if weight_parameter(product) is None and not nn.utils.parametrize.is_parametrized(product, "weight"):
        return "its weight is computed from others"
    try:
        product.write_weight(affine.dequantize(codes, scale, zero_point, quantizer.spec).reshape(before.shape))
    except CalibrationError as error:
        return str(error).removeprefix(f"{product.name}: ")
    if torch.equal(quantizer.codes(product.weight_matrix()), codes.reshape(before.shape)):
        return ""
    product.write_weight(before)
    return f"weights of {before.dtype} are too coarse for this grid"


# --------------------------------------------------------------------------------------------------------- driver


def each_product(model: nn.Module, batches: Sequence[Any], progress: Callable[[str, int, int], None] | None,
                 algorithm: str, reference: nn.Module, one: Callable[[QuantizedModule, str, list[Arrival]], str],
                 unreached: str) -> dict[str, str]:
    """Work on every product with a quantized weight, in the order in which layers run, the float model beside.

    Args:
        algorithm: its name in recipes.
        one: does the work on a product, given the name of its stop and what arrived there; what it did, in words.
        unreached: what is said of products that no batch came to.

    Returns:
        A note for each product.
    """
    stops, title = layer_stops(model), algorithm.replace("_", " ")
    notes: dict[str, str] = {}
    done = 0

    def work(name: str, arrivals: list[Arrival]) -> None:
        nonlocal done
        for product in products_at(stops[name]):
            notes[product.name] = f"{title}: {one(product, name, arrivals)}"
        done += 1
        if progress is not None:
            progress(algorithm, done, len(stops))

    with torch.no_grad():
        missing = walk(model, batches, stops, work, beside=reference)
    notes.update({product.name: f"{title}: {unreached}" for name in missing for product in products_at(stops[name])})
    return notes


def round_adaptively(model: nn.Module, batches: Sequence[Any], progress: Callable[[str, int, int], None] | None = None,
                     *, reference: nn.Module, steps: int, learning_rate: float,
                     regularization: float, damp: float) -> Mapping[str, str]:
    """AdaRound for every layer of a prepared model, in the order in which they run.

    Inputs are those that the rounded layers before make; outputs to meet are the float model's (asymmetric
    reconstruction). Ranges that are placed already stay; the others are placed as they are.

    Args:
        model: prepared, with ranges; changed in place.
        reference: :func:`float_reference` of it.
        steps, learning_rate, regularization, damp: see :func:`adaround`.

    Returns:
        A note for each product with a quantized weight.
    """
    stops, twins, shared = layer_stops(model), quantized_modules(reference), shared_weights(model)

    def one(product: QuantizedModule, name: str, arrivals: list[Arrival]) -> str:
        quantizer = product.weight_quantizer
        assert isinstance(quantizer, StaticQuantizer)
        if product.name in shared:
            return "nearest codes, the weight is shared"
        try:
            moments = moments_of(product, twins[product.name], stops[name], twins[name], arrivals)
        except (UnsupportedError, CalibrationError) as error:
            return f"nearest codes, {str(error).removeprefix(f'{product.name}: ')}"
        weight, spec, mask = matrix_of(product).clone(), quantizer.spec, quantizer.mask
        scale, zero_point = quantizer.place(*_tensors(quantizer))
        codes = adaround(weight, moments, spec, scale, zero_point, None if mask is None else mask.flatten(1),
                         steps, learning_rate, regularization, damp)
        nearest = quantizer.codes(product.weight_matrix()).flatten(1)
        trouble = hold_codes(product, codes, scale, zero_point)
        if trouble:
            return f"nearest codes, {trouble}"
        before, after = (float(moments.error(weight, affine.dequantize(c, scale, zero_point, spec)).mean())
                         for c in (nearest, codes))
        return f"output error {before:.2g} -> {after:.2g}"

    return each_product(model, batches, progress, "adaround", reference, one, "nearest codes, no batch came here")


def _tensors(quantizer: StaticQuantizer) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as they are at work, to be placed."""
    scale, zero_point = quantizer.present()
    if isinstance(zero_point, int):
        zero_point = torch.tensor(zero_point, dtype=torch.int32, device=scale.device)
    return scale.detach().clone(), zero_point
