"""Quantized linear and embedding layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.kernels import ste, table, weight_only
from qat.kernels.backends import FewCalls, FewNarrowCalls
from qat.modules.base import QuantizedModule, register, register_by_name
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import PackedTensor, QuantizedTensor
from qat.quantizers.quantizer import FrozenQuantizer


class LinearProduct(QuantizedModule):
    """``y = x @ w.T + b`` on integers: x (..., in), w (out, in).

    With float activations (weight-only) the product is that of :mod:`qat.kernels.weight_only`, before and after
    ``convert``, in eval and in training. A frozen layer holds codes of up to 4 bits, and all codes of weight-only
    layers, as they are packed, beside what its kernels have packed for the shapes that came.
    """

    in_features: int
    out_features: int

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.in_features if role == "input" else self.out_features,)

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        return self.float_input(x).reshape(1, -1, self.in_features)

    def forward(self, input: Tensor | QuantizedTensor) -> Any:
        x = input
        if self.plan.batch_norm and len(x.shape) > 2:
            raise UnsupportedError(
                f"{self.name}: {self.plan.batch_norm} is folded into it for inputs (rows, features), but normalizes "
                f"another dimension of {tuple(x.shape)}; prepare with such example_inputs")
        if self.frozen and self._one_row is None and not self.calibrating:
            self._serve_one_row()
        if self._one_row and self._is_one_row(x):
            return self._one_row(x)
        if self.calibrating or self.plan.weight is None:
            return self.finish(weight_only.linear(self.float_input(x), self.float_matrix(), self.bias))
        weight = self.quantized_weight()
        if self.plan.input is None:
            return self.finish(weight_only.product(self.float_input(x), weight, self.bias, self.kernel_weight(weight)))
        return self.finish(self.product(self.quantized_input(x), weight))

    def stays_packed(self, spec: TensorSpec) -> bool:
        return (spec.bits <= 4 or self.plan.input is None) and 8 % spec.bits == 0

    def _is_one_row(self, x: Tensor | QuantizedTensor) -> bool:
        return (isinstance(x, Tensor) and x.numel() == self.in_features
                and x.dtype == torch.float32 and x.is_contiguous() and x.device.type == "cpu"
                and not (torch.is_autocast_enabled("cpu") or table.overridden()
                         or (x.requires_grad and torch.is_grad_enabled())))

    @torch.compiler.disable
    def _serve_one_row(self) -> None:
        """Prepare the short way for one row; ``_one_row`` becomes False where there is none."""
        source, weight = self.input_quantizer, self.quantized_weight()
        self._one_row = False
        if source is None or self.output_quantizer is not None or source.ceiling is not None:
            return
        spec, fmt = source.spec, source.spec.fmt
        scale, zero_point = source.present() if isinstance(source, FrozenQuantizer) else (None, None)
        if scale is None:
            fits = spec.granularity == "per_token" and bool(spec.symmetric) and fmt.signed and source.floor is None
        else:
            fits = source.floor is None or (bool(spec.symmetric) and not fmt.signed)
        if not fits:
            return
        kernel = self.kernel_weight(weight)
        assert kernel is not None
        row = torch.zeros(1, self.in_features, dtype=fmt.dtype, device=weight.device)
        call = ste.Product(QuantizedTensor(row, torch.ones(()) if scale is None else scale, zero_point, spec), weight,
                           whole_bias=self.plan.requantize and scale is not None)
        multiplier, bias, steps = call.multiplier_w(), self.bias, None
        if bias is not None and call.whole_bias:
            steps, bias = call.split(bias.detach().float())
        number = int(zero_point or 0) if not isinstance(zero_point, Tensor) else 0      # a layer has one
        run = weight.spec.group_size
        if run is None and FewCalls.serves(row, spec, zero_point, kernel):
            self._one_row = FewCalls(spec, kernel, multiplier, bias, scale, number, steps)
        elif run is not None and FewNarrowCalls.serves(row, spec, zero_point, kernel, run):
            self._one_row = FewNarrowCalls(spec, kernel, multiplier, bias, scale, number, run)

    def float_matrix(self) -> Tensor:
        """The float weight as (out, in), with pruned values at zero."""
        return self.float_weight()


@register
class QuantizedLinear(LinearProduct, nn.Linear):
    """``nn.Linear`` on integers."""

    replaces = nn.Linear


@register_by_name("transformers.pytorch_utils.Conv1D")
class QuantizedConv1D(LinearProduct):
    """A linear layer whose weight is (in, out), on integers; its codes are (out, in) like every layer's."""

    @property
    def in_features(self) -> int:               # type: ignore[override]
        return self.nx

    @property
    def out_features(self) -> int:              # type: ignore[override]
        return self.nf

    def weight_matrix(self) -> Tensor:
        return self.weight.t()

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def float_matrix(self) -> Tensor:
        return self.float_weight().t()


@register
class QuantizedEmbedding(QuantizedModule, nn.Embedding):  # type: ignore[misc]
    """Rows of a table of codes, dequantized after they are looked up: indices (...) to (..., embedding_dim)."""

    replaces = nn.Embedding
    takes_input_spec = False

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.embedding_dim,) if role == "output" else ()

    def stays_packed(self, spec: TensorSpec) -> bool:
        return spec.bits * self.embedding_dim % 8 == 0      # rows begin at whole bytes

    def forward(self, input: Tensor) -> Any:
        indices = input
        if self.calibrating or self.plan.weight is None:
            return self.finish(self._look_up(indices, self.float_weight()))
        table = self.quantized_weight()
        if table.carrier is not None:
            return self.finish(self._look_up(indices, table.dequantize(self.weight.dtype)))
        spec = table.spec
        rows = table.looked_up(indices) if isinstance(table, PackedTensor) else F.embedding(indices, table.codes)
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
