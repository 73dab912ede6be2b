"""Adds and concatenations as modules, so that they can have quantizers of their own and pass codes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.ste import rearranged
from qat.modules.base import LayerPlan, QuantizedModule, adopt, register
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import Quantizer


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


class QuantizedFunction(QuantizedModule):
    """A module without weight whose operands and result are quantized.

    An ``input:`` spec quantizes each operand that does not arrive as codes, by one quantizer for all operands (so a
    concatenation needs no rescale); an ``output:`` spec quantizes the result.
    """

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> Any:
        return super().swap(module, name, plan)

    def operand(self, x: Tensor | QuantizedTensor) -> Tensor:
        return self.float_input(x)


@register
class QuantizedAdd(QuantizedFunction, Add):
    """The sum of two tensors, or of two tensors of codes, dequantized and then put on the output's grid."""

    replaces = Add

    def forward(self, a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> Any:
        return self.finish(self.operand(a) + self.operand(b))


@register
class QuantizedConcat(QuantizedFunction, Concat):
    """The concatenation of tensors, or of tensors of codes, put on the output's grid."""

    replaces = Concat

    def forward(self, *tensors: Tensor | QuantizedTensor) -> Any:
        return self.finish(torch.cat([self.operand(t) for t in tensors], self.dim))


class TakesCodes(nn.Module):
    """Mixin for a module that only moves values about (flatten, identity): codes go through it as they are."""

    def forward(self, input: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        x = input
        if not isinstance(x, QuantizedTensor):
            return super().forward(x)
        shape = x.codes.shape
        return rearranged(x, super().forward(x.codes), lambda g: g.reshape(shape))


MOVERS: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten, nn.Identity)
"""Modules that only move values about."""


def take_codes(module: nn.Module) -> nn.Module:
    """Let codes pass through ``module``, in place."""
    return adopt(TakesCodes, module)
