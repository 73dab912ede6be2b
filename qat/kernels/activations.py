"""Kernels of activations alone: their products, and what attention has between its two, a softmax in codes and dropout.

Gradients travel on carriers, as in :mod:`qat.kernels.ste`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.errors import UnsupportedError
from qat.kernels import ste, table
from qat.kernels.contract import Activation
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor


@dataclass
class Matmul:
    """One integer product of two activations: operands, and how the result is rescaled.

    Attributes:
        a: (..., m, k). ``scale``: () or, one for each row, a shape that broadcasts against (..., m, 1).
        b: (..., k, n), whose leading dimensions broadcast against those of ``a``. ``scale``: () or, one for each
            column or for each matrix, a shape that broadcasts against (..., 1, n).
        factor: a constant on the result (attention: ``1 / sqrt(k)``); it goes into the multiplier.
        backward_dtype: the type in which the matrix products of the backward run.
    """

    a: QuantizedTensor
    b: QuantizedTensor
    factor: float = 1.0
    backward_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for tensor, dim, what in ((self.a, -1, "left operand varies along its rows"),
                                  (self.b, -2, "right operand varies along its columns")):
            if tensor.scale.dim() >= -dim and tensor.scale.shape[dim] != 1:
                raise UnsupportedError(f"the scale of the {what} ({tuple(tensor.scale.shape)} for codes of shape "
                                       f"{tuple(tensor.shape)}), so it cannot be taken out of the integer sum")

    def scale(self, tensor: QuantizedTensor) -> Tensor:
        """What one level of an operand is worth, float32."""
        return tensor.scale if tensor.spec.fmt.unit == 1.0 else tensor.scale * tensor.spec.fmt.unit

    def forward(self) -> Tensor:
        """``float32(acc) * multiplier``, and times the scales of the rows where there are any; (..., m, n) float32."""
        scale_a, scale_b = self.scale(self.a), self.scale(self.b)
        if self.factor != 1.0:
            scale_b = scale_b * self.factor
        a, b = Activation.of(self.a), Activation.of(self.b)
        if scale_a.dim() == 0:
            return table.matmul(a, b, scale_a * scale_b)
        return table.matmul(a, b, scale_b).mul_(scale_a)


def matmul(call: Matmul, dtype: torch.dtype) -> Tensor:
    """Run an integer product of two activations; differentiable in both through their carriers.

        dL/da = factor * (g * scale_b) @ levels_b^T          dL/db = factor * levels_a^T @ (g * scale_a)

    Raises:
        UnsupportedError: a scale that varies along the dimension that is summed over.
    """
    carried = (call.a.carrier, call.b.carrier)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in carried):
        return _Matmul.apply(*carried, call).to(dtype)
    return call.forward().to(dtype)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_carrier, b_carrier, call):
        nothing = call.a.codes.new_empty(0)
        a, b = (replace(t, codes=nothing, carrier=None) for t in (call.a, call.b))
        ctx.a, ctx.b, ctx.factor, ctx.dtype = a, b, call.factor, call.backward_dtype
        ctx.save_for_backward(call.a.codes, call.b.codes)
        return call.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = (replace(t, codes=codes) for t, codes in zip((ctx.a, ctx.b), ctx.saved_tensors))
        call = Matmul(a, b, ctx.factor, ctx.dtype)
        g_a = g_b = None
        if ctx.needs_input_grad[0]:
            g_a = _other_operand(g, call.scale(b) * ctx.factor, ctx.dtype,
                                 lambda low: low @ b.levels(ctx.dtype).transpose(-1, -2))
            g_a = g_a.sum_to_size(a.shape).to(a.dtype)
        if ctx.needs_input_grad[1]:
            g_b = _other_operand(g, call.scale(a) * ctx.factor, ctx.dtype,
                                 lambda low: a.levels(ctx.dtype).transpose(-1, -2) @ low)
            g_b = g_b.sum_to_size(b.shape).to(b.dtype)
        return g_a, g_b, None


def _other_operand(g: Tensor, scale: Tensor, dtype: torch.dtype, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of one operand, with the scale of the other: inside the sum only where it varies there; float32."""
    if scale.dim():
        return multiply((g * scale).to(dtype)).float()
    return multiply(g.to(dtype)).float().mul_(scale)


def softmax(scores: Tensor, spec: TensorSpec, backward_dtype: torch.dtype = torch.float32,
            worth: Tensor | None = None, sink: Tensor | None = None) -> QuantizedTensor:
    """``softmax(scores)`` over the last dimension as unsigned codes with zero point 0, whose values add up to one.

        codes = round(exp(score - greatest) * hi)         in [0, 1] by nature: a range that needs no data
        scale = 1 / (sum of the codes of a row)           so a row of probabilities sums to one in integers

    Putting the *unnormalized* exponentials on the grid uses all of it in each row, however many keys share the
    attention: probabilities themselves would all round to zero where more than twice ``hi`` keys share it evenly. A
    row in which everything is masked (``-inf``) is all zeros.

    Where each key's values have a scale of their own, that scale cannot be taken out of the sum over keys that follows;
    but it is positive, so it goes into the left operand, whose rows have a scale each:

        codes = round(exp(score - greatest) * worth / m * hi)      m: the greatest of a row
        value = probability * worth                                probabilities still add up to one

    Args:
        scores: (..., queries, keys), float32; may hold ``-inf``.
        spec: an unsigned format.
        backward_dtype: the type in which the exponentials are kept for the backward.
        worth: the scale of each key's values, float32, positive, broadcasts against (..., 1, keys).
        sink: a score that takes its share of the attention and has no value (learned sinks), float32, broadcasts
            against (..., queries, 1).

    The gradient is the softmax's, with the probabilities that were used: ``e / sum * (g - sum(g * probabilities))``.
    """
    if torch.is_grad_enabled() and (scores.requires_grad or (sink is not None and sink.requires_grad)):
        carrier, codes, scale = _Softmax.apply(scores, sink, worth, spec, backward_dtype)
    else:
        carrier, (_, codes, _, scale, _) = None, _exponentials(scores, spec, worth, sink)
    return QuantizedTensor(codes, scale, None, spec, carrier)


def _exponentials(scores: Tensor, spec: TensorSpec, worth: Tensor | None,
                  sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``exp(score - greatest)``; its codes; the step of their grid; their scale; what is left for the sink."""
    lowest = torch.finfo(scores.dtype).min
    top = scores.amax(-1, keepdim=True).clamp(min=lowest) if scores.shape[-1] else scores.new_zeros(())
    exponentials = (scores - top).exp_()
    if worth is None:
        step = torch.full((), 1.0 / spec.fmt.hi, device=scores.device)
        codes = affine.quantize(exponentials, step, None, spec.replace(granularity="per_tensor", dynamic=False))
        total = codes.sum(-1, keepdim=True, dtype=torch.int32).float()
    else:
        weighted = exponentials * worth
        step = weighted.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
        step = step.div_(spec.fmt.hi).clamp_(min=affine.TINY)
        codes = affine.quantize(weighted, step, None, spec)
        # in float64 the order of the sum does not show: a query has the same sum beside later, masked keys or without
        total = (codes * worth.reciprocal()).sum(-1, keepdim=True, dtype=torch.float64).float()
    others = total if sink is None else total + (sink - top).exp_() / step
    scale = torch.where(others > 0, others, 1.0).reciprocal_()
    return exponentials, codes, step, scale, 1.0 - total * scale


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, sink, worth, spec, backward_dtype):
        exponentials, codes, step, scale, left = _exponentials(scores, spec, worth, sink)
        ctx.sink = None if sink is None else sink.shape
        ctx.save_for_backward(exponentials.to(backward_dtype), codes, scale, scale / step, left, worth)
        ctx.mark_non_differentiable(codes, scale)
        return ste.ghost(scores), codes, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        exponentials, codes, scale, share, left, worth = ctx.saved_tensors
        mean = (g * codes).sum(-1, keepdim=True).mul_(scale)
        g_sink = (mean * -left).sum_to_size(ctx.sink) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, g_sink, None, None, None
        g = g if worth is None else g * worth
        return (g - mean).mul_(exponentials).mul_(share), g_sink, None, None, None


def dropout(x: QuantizedTensor, rate: float) -> QuantizedTensor:
    """Codes of zero point 0 with dropout: dropped codes are 0, and the others' scale grows by ``1 / (1 - rate)``."""
    keep = torch.empty_like(x.codes, dtype=torch.uint8).bernoulli_(1.0 - rate)
    grown = 1.0 / (1.0 - rate) if rate < 1.0 else 1.0
    return ste.rearranged(x, x.codes * keep, lambda g: (g * keep).mul_(grown), x.scale * grown)
