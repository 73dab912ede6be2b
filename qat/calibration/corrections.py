"""Bias correction: the error that rounding makes on average goes into the biases.

    bias += mean over rows of (w x - w' x')

with ``w, x`` the weights and inputs of the float model, ``w', x'`` those of the quantized one, corrected already up to
the layer. (Nagel et al. 2019, Data-Free Quantization, arXiv 1906.04721, section 4.2, with measured means.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.rounding import each_product, layer_stops, matrix_of, moments_of
from qat.calibration.walk import Arrival
from qat.errors import CalibrationError, UnsupportedError
from qat.modules.base import QuantizedModule
from qat.modules.normalization import QuantizedBatchNorm
from qat.rewriter import quantized_modules
from qat.tracing import run


def mean_error(weight: Tensor, values: Tensor, mean: Tensor, float_mean: Tensor) -> Tensor:
    """``w x - w' x'`` on average, for each output channel: (groups * out,).

    Args:
        weight, values: w and w', (groups * out, in).
        mean, float_mean: the means of x' and of x, (groups, in).
    """
    groups = len(mean)
    wanted, made = (torch.bmm(w.float().reshape(groups, -1, w.shape[1]), x.unsqueeze(-1))
                    for w, x in ((weight, float_mean), (values, mean)))
    return (wanted - made).flatten()


def correct_biases(model: nn.Module, batches: Sequence[Any], progress: Callable[[str, int, int], None] | None = None,
                   *, reference: nn.Module) -> Mapping[str, str]:
    """Bias correction for every layer of a prepared model, in the order in which they run.

    The error goes into the layer's bias, or, where it has none, into that of the batch norm behind it.

    Args:
        model: prepared, with ranges and its final codes; changed in place.
        reference: :func:`~qat.calibration.rounding.float_reference` of it before any rounding.

    Returns:
        A note for each product with a quantized weight.
    """
    stops, twins = layer_stops(model), quantized_modules(reference)
    with torch.no_grad():
        norms = {layer: model.get_submodule(n) for layer, n in norms_behind(reference, stops, batches[:1]).items()}

    def one(product: QuantizedModule, name: str, arrivals: list[Arrival]) -> str:
        bias, gain = bias_behind(product, norms.get(name))
        if bias is None:
            return "none, there is no bias to correct"
        try:
            moments = moments_of(product, twins[product.name], stops[name], twins[name], arrivals)
        except (UnsupportedError, CalibrationError) as error:
            return f"none, {str(error).removeprefix(f'{product.name}: ')}"
        values = product.quantized_weight().dequantize().flatten(1)
        mean, float_mean = (total / moments.count for total in (moments.mean, moments.float_mean))
        missing = mean_error(matrix_of(twins[product.name]), values, mean, float_mean)
        bias.add_((missing if gain is None else missing * gain).to(bias.dtype))
        size = (moments.scale() / moments.count).sqrt()
        return f"mean output error {float(missing.square().mean().sqrt() / size):.3g} of the output -> 0"

    return each_product(model, batches, progress, "bias_correction", reference, one, "none, no batch came here")


def norms_behind(model: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> dict[str, str]:
    """The batch norms that each read the output of one of ``layers``, and of nothing else: layer -> norm, by name."""
    made: dict[int, tuple[str, Any]] = {}           # with the output itself, so that its id stays its own
    read: dict[str, set[str]] = {}
    handles = []
    for name in layers:
        handles.append(model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: made.__setitem__(id(y), (name, y))))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedBatchNorm):
            handles.append(module.register_forward_pre_hook(
                lambda module, args, name=name: read.setdefault(name, set()).add(made.get(id(args[0]), ("",))[0])))
    try:
        for batch in batches:
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: norm for norm, sources in read.items() if len(sources) == 1 for layer in sources if layer}


def bias_behind(product: QuantizedModule, norm: nn.Module | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The bias that a product's mean error can go into, and the gain between the two; None, None if there is none.

    Args:
        norm: the batch norm behind.
    """
    if nn.utils.parametrize.is_parametrized(product, "bias"):
        return None, None
    own = getattr(product, "bias", None)
    if own is not None:
        return own, None
    if not isinstance(norm, QuantizedBatchNorm) or norm.bias is None or norm.running_mean is None:
        return None, None
    return norm.bias, norm.gain_and_offset()[0]
