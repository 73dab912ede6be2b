"""Adds, concatenations and products of two activations as modules: they can have quantizers and pass codes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import activations, requantize, ste
from qat.modules.base import LayerPlan, QuantizedModule, adopt, register
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import FrozenQuantizer, Quantizer, make_quantizer


class Add(nn.Module):
    """``a + b``: write ``self.add(a, b)`` instead of ``a + b`` where a residual sum is to be quantized."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Concat(nn.Module):
    """``torch.cat`` of all arguments along ``dim``."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.dim)


class MatMul(nn.Module):
    """``a @ b``: write ``self.product(a, b)`` where a product of two activations is to run on integers.

    Shapes as for ``torch.matmul``: a (..., m, k) or (k,), b (..., k, n) or (k,), leading dimensions broadcast.
    """

    is_product = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class QuantizedFunction(QuantizedModule):
    """A module without weight whose operands and result are quantized.

    An ``input:`` spec quantizes each operand that does not arrive as codes, by one quantizer for all operands (so a
    concatenation needs no rescale; the operands of a matrix product have one each); an ``output:`` spec quantizes the
    result.
    """

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> Any:
        return super().swap(module, name, plan)

    def operand(self, x: Tensor | QuantizedTensor) -> Tensor:
        return self.float_input(x)


@register
class QuantizedAdd(QuantizedFunction, Add):
    """The sum of two tensors, or of two tensors of codes, dequantized and then put on the output's grid; or straight
    from codes to codes, where the plan says so."""

    replaces = Add

    def forward(self, a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> Any:
        on_grids = self.input_quantizer is not None or not any(isinstance(t, Tensor) for t in (a, b))
        if self.calibrating or not self.plan.codes_from_sums or not on_grids:
            return self.finish(self.operand(a) + self.operand(b))
        return self.finish(self.sum_of_codes(self.quantized_input(a), self.quantized_input(b)))

    def sum_of_codes(self, a: QuantizedTensor, b: QuantizedTensor) -> Tensor | QuantizedTensor:
        quantizer = self.output_quantizer
        assert quantizer is not None
        if not requantize.adds_codes(a, b, quantizer.spec):
            return a.dequantize() + b.dequantize()
        if isinstance(quantizer, FrozenQuantizer) and not torch.is_grad_enabled():
            made = QuantizedTensor(a.codes, *quantizer.present(), quantizer.spec, None, a.dtype)
        else:
            made = quantizer.quantize(a.dequantize() + b.dequantize())
        return replace(made, codes=requantize.addition(a, b, made.scale, made.zero_point, quantizer.grid()))


@register
class QuantizedConcat(QuantizedFunction, Concat):
    """The concatenation of tensors, or of tensors of codes, put on the output's grid."""

    replaces = Concat

    def forward(self, *tensors: Tensor | QuantizedTensor) -> Any:
        return self.finish(torch.cat([self.operand(t) for t in tensors], self.dim))


@register
class QuantizedMatMul(QuantizedFunction, MatMul):
    """The product of two activations on integers, each with a quantizer of its own.

    The scales of a product must not vary along the dimension that is summed over: a dynamic ``per_token`` range is
    taken for each row of ``a`` and for each column of ``b``.
    """

    replaces = MatMul
    roles = ("input", "right", "output")

    right_quantizer: Quantizer | None

    def make_activation_quantizers(self) -> None:
        super().make_activation_quantizers()
        self.right_quantizer = None if self.plan.input is None else make_quantizer(self.plan.input)

    def quantizer_of(self, operand: int) -> Quantizer | None:
        return self.right_quantizer if operand == 1 else self.input_quantizer

    def forward(self, a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> Any:
        if self.calibrating or self.plan.input is None:
            left, right = self.float_operand(a, self.input_quantizer), self.float_operand(b, self.right_quantizer)
            return self.finish(left @ right)
        return self.finish(self.multiply(self.left(a), self.right(b)))

    def left(self, a: Tensor | QuantizedTensor) -> QuantizedTensor:
        """The codes of the left operand, (..., m, k)."""
        return self.quantized_input(a)

    def right(self, b: Tensor | QuantizedTensor) -> QuantizedTensor:
        """The codes of the right operand, (..., k, n), with dynamic ranges for each column."""
        if isinstance(b, QuantizedTensor):
            return b
        assert self.right_quantizer is not None
        if b.dim() < 2 or self.right_quantizer.spec.granularity != "per_token":
            return self.right_quantizer.quantize(b)
        return ste.transposed(self.right_quantizer.quantize(b.transpose(-1, -2)))

    def multiply(self, a: QuantizedTensor, b: QuantizedTensor, factor: float = 1.0,
                 dtype: torch.dtype | None = None) -> Tensor:
        """``factor * (a @ b)`` as integers, in ``dtype`` or the one that the float product would return."""
        row, column = a.codes.dim() == 1, b.codes.dim() == 1
        if row:
            a = ste.rearranged(a, a.codes.unsqueeze(0), lambda g: g.squeeze(0))
        if column:
            b = ste.rearranged(b, b.codes.unsqueeze(1), lambda g: g.squeeze(1))
        call = activations.Matmul(a, b, factor, self.backward_type(b))
        y = activations.matmul(call, dtype or self.result_dtype(a))
        if column:
            y = y.squeeze(-1)
        return y.squeeze(-1 if column else -2) if row else y


class TakesCodes(nn.Module):
    """Mixin for a module that only moves values about (flatten, identity): codes go through it as they are."""

    def forward(self, input: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        x = input
        if not isinstance(x, QuantizedTensor):
            return super().forward(x)
        shape = x.codes.shape
        return ste.rearranged(x, super().forward(x.codes), lambda g: g.reshape(shape))


MOVERS: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten, nn.Identity)
"""Modules that only move values about."""


def take_codes(module: nn.Module) -> nn.Module:
    """Let codes pass through ``module``, in place."""
    return adopt(TakesCodes, module)
