"""Quantized linear and embedding layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.kernels import ste, table
from qat.kernels.backends import OneRow
from qat.modules.base import QuantizedModule, register
from qat.numerics import affine
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import FrozenQuantizer


@register
class QuantizedLinear(QuantizedModule, nn.Linear):
    """``y = x @ w.T + b`` on integers: x (..., in), w (out, in).

    With float activations (weight-only) the codes are dequantized and multiplied in floating point.
    """

    replaces = nn.Linear

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.in_features if role == "input" else self.out_features,)

    def forward(self, input: Tensor | QuantizedTensor) -> Any:
        x = input
        if self._one_row and self._is_one_row(x):
            return self._one_row(x)
        if self.calibrating or self.plan.weight is None:
            return self.finish(F.linear(self.float_input(x), self.weight, self.bias))
        weight = self.quantized_weight()
        if self.plan.input is None:
            values = self.float_input(x)
            return self.finish(F.linear(values, weight.dequantize(values.dtype), self.bias))
        codes = self.quantized_input(x)
        if self._one_row is None and self.frozen and not torch.compiler.is_compiling():
            self._one_row = self._serve_one_row(codes)
        return self.finish(self.product(codes, weight))

    def _is_one_row(self, x: Tensor | QuantizedTensor) -> bool:
        return (isinstance(x, Tensor) and x.numel() == self.in_features
                and x.dtype == torch.float32 and x.is_contiguous() and x.device.type == "cpu"
                and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or table.overridden()
                         or (x.requires_grad and torch.is_grad_enabled())))

    def _serve_one_row(self, codes: QuantizedTensor) -> OneRow | bool:
        """The short way for one row, or False where there is none."""
        weight = self.quantized_weight()
        kernel = self.kernel_weight(weight)
        assert kernel is not None
        fixed = isinstance(self.input_quantizer, FrozenQuantizer) and self.output_quantizer is None
        if not fixed or codes.device.type != "cpu" or weight.spec.granularity == "per_group" \
                or not OneRow.serves(codes, kernel):
            return False
        call = ste.Product(codes, weight, kernel)
        return OneRow(codes, kernel, call.scale_x() * call.multiplier_w(), self.bias)


@register
class QuantizedEmbedding(QuantizedModule, nn.Embedding):  # type: ignore[misc]
    """Rows of a table of codes, dequantized after they are looked up: indices (...) to (..., embedding_dim)."""

    replaces = nn.Embedding
    takes_input_spec = False

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.embedding_dim,) if role == "output" else ()

    def forward(self, input: Tensor) -> Any:
        indices = input
        if self.calibrating or self.plan.weight is None:
            return self.finish(self._look_up(indices, self.weight))
        table = self.quantized_weight()
        if table.carrier is not None:
            return self.finish(self._look_up(indices, table.dequantize(self.weight.dtype)))
        spec = table.spec
        rows = F.embedding(indices, table.codes)
        flat = rows.reshape(-1, rows.shape[-1])
        if spec.granularity != "per_tensor":
            scale, zero_point = table.scale[indices.reshape(-1)], table.zero_point
            zero_point = zero_point[indices.reshape(-1)] if isinstance(zero_point, Tensor) else zero_point
        else:
            scale, zero_point = table.scale, table.zero_point
        values = affine.dequantize(flat, scale, zero_point, spec).reshape(rows.shape)
        return self.finish(values.to(self.float_dtype))

    def _look_up(self, indices: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(indices, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq,
                           self.sparse)
