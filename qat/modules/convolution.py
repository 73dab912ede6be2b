"""Quantized convolutions of one, two and three dimensions, plain and transposed.

A transposed convolution is a plain one: its input is spread out with zeros (codes of real zero) and its kernel is
flipped, so that every backend serves it. Its weight is seen, and stored, as that plain convolution's:
(out, in // groups, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.kernels import ste, table
from qat.kernels.backends import ONEDNN
from qat.kernels.contract import Activation, Geometry
from qat.modules.base import QuantizedModule, register
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import FrozenQuantizer


def batched(x: QuantizedTensor, dims: int) -> QuantizedTensor:
    """Codes that arrived without a batch dimension get one."""
    return ste.rearranged(x, x.codes.unsqueeze(0), lambda g: g.squeeze(0)) if x.codes.dim() == dims + 1 else x


def unbatched(y: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
    """The one sample of a batch."""
    return y.squeeze(0) if isinstance(y, Tensor) else ste.rearranged(y, y.codes.squeeze(0), lambda g: g.unsqueeze(0))


def window_rows(x: Tensor, groups: int, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
                ) -> Tensor:
    """What a kernel sees at each place of a padded input: (batch, in, *spatial) to (groups, places, in * kernel)."""
    dims = len(kernel)
    for dim, (size, step, spread) in enumerate(zip(kernel, stride, dilation)):
        x = x.unfold(2 + dim, (size - 1) * spread + 1, step)[..., ::spread]
    batch, channels, *rest = x.shape
    grouped = x.reshape(batch, groups, channels // groups, *rest)
    places, taps = list(range(3, 3 + dims)), list(range(3 + dims, 3 + 2 * dims))
    return grouped.permute(1, 0, *places, 2, *taps).reshape(groups, -1, channels // groups * math.prod(kernel))


class QuantizedConvolution(QuantizedModule):
    """x (batch, in, *spatial) or (in, *spatial); weight (out, in // groups, *kernel)."""

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.in_channels if role == "input" else self.out_channels, *[1] * len(self.kernel_size))

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        dims = len(self.kernel_size)
        values = self.float_input(x)
        values = values if values.dim() == dims + 2 else values.unsqueeze(0)
        if self.padding_mode == "zeros":
            before, after = self._paddings()
            values = F.pad(values, [n for pair in zip(reversed(before), reversed(after)) for n in pair])
        else:
            values = self._pad(values)
        return window_rows(values, self.groups, self.kernel_size, self.stride, self.dilation)

    def forward(self, input: Tensor | QuantizedTensor) -> Any:
        x = input
        if self.calibrating or self.plan.weight is None:
            return self.finish(self._conv_forward(self.float_input(x), self.float_weight(), self.bias))
        weight = self.quantized_weight()
        if self.plan.input is None:
            values = self.float_input(x)
            return self.finish(self._conv_forward(values, weight.dequantize(values.dtype), self.bias))
        single = len(x.shape) == len(self.kernel_size) + 1
        if isinstance(x, Tensor):
            x = self._pad(x.unsqueeze(0) if single else x)
        y = self._integer(batched(self.quantized_input(x), len(self.kernel_size)), weight)
        return self.finish(unbatched(y) if single else y)

    def _pad(self, x: Tensor) -> Tensor:
        """Padding that is not zeros is made before the quantizer: it repeats values, so it repeats codes."""
        if self.padding_mode == "zeros":
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _integer(self, x: QuantizedTensor, weight: QuantizedTensor) -> Tensor | QuantizedTensor:
        before, after = self._paddings()
        geometry = Geometry(self.stride, after, self.dilation, self.groups)
        if before == after and (codes := self._requantized(x, weight, geometry)) is not None:
            return codes
        y = self.product(x, weight, geometry=geometry)
        whole = y.shape[2:]
        window = (slice(None), slice(None), *(slice(right - left, None) for left, right in zip(before, after)))
        if before == after:
            return y
        if isinstance(y, Tensor):
            return y[window]
        return ste.rearranged(y, y.codes[window], lambda g: F.pad(g, [
            n for size, now in zip(reversed(whole), reversed(g.shape[2:])) for n in (size - now, 0)]))

    def _requantized(self, x: QuantizedTensor, weight: QuantizedTensor, geometry: Geometry) -> QuantizedTensor | None:
        """The output's codes straight from the kernel, where that is the same rounding; else None.

        So it is for 8-bit codes whose scale is a power of two: the kernel's multiplication by the reciprocal is then
        the division of the one rounding, bit for bit.
        """
        out = self.output_quantizer
        if (not self.plan.emits_codes or not isinstance(out, FrozenQuantizer) or not out.spec.power_of_two
                or out.spec.bits != 8 or out.ceiling is not None or x.scale.dim() or x.carrier is not None
                or self.plan.codes_from_sums or torch.compiler.is_compiling() or self.result_dtype(x) != torch.float32):
            return None
        kernel, activation = self.kernel_weight(weight), Activation.of(x)
        assert kernel is not None
        if table.choose("convolution", activation, kernel, geometry) is not ONEDNN:
            return None
        call = ste.Product(x, weight, kernel)
        scale, zero_point = out.present()
        assert not isinstance(zero_point, Tensor)       # an output has one scale
        codes = ONEDNN.convolution_requantized(activation, kernel, geometry, call.scale_x() * call.multiplier_w(),
                                               None if self.bias is None else self.bias.float(), float(scale),
                                               zero_point or 0, out.spec.fmt.dtype)
        return QuantizedTensor(codes, scale, zero_point, out.spec, None, self.result_dtype(x))

    def _paddings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Zeros before and after, for each spatial dimension (``same`` pads one more behind for even kernels)."""
        if self.padding_mode != "zeros" or self.padding == "valid":
            return (0,) * len(self.kernel_size), (0,) * len(self.kernel_size)
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return self.padding, self.padding


@register
class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """``nn.Conv1d`` on integers."""

    replaces = nn.Conv1d


@register
class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """``nn.Conv2d`` on integers."""

    replaces = nn.Conv2d


@register
class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """``nn.Conv3d`` on integers."""

    replaces = nn.Conv3d


class QuantizedTransposedConvolution(QuantizedModule):
    """x (batch, in, *spatial); ``weight`` (in, out // groups, *kernel), its codes (out, in // groups, *kernel)."""

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.in_channels if role == "input" else self.out_channels, *[1] * len(self.kernel_size))

    def weight_matrix(self) -> Tensor:
        weight = self.weight
        taps = list(range(3, weight.dim() + 1))
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2).flip(taps)
        return grouped.reshape(self.out_channels, self.in_channels // self.groups, *weight.shape[2:])

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        taps = list(range(3, matrix.dim() + 1))
        grouped = matrix.reshape(self.groups, -1, *matrix.shape[1:]).transpose(1, 2).flip(taps)
        return grouped.reshape(self.in_channels, self.out_channels // self.groups, *matrix.shape[2:])

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        """As for every layer: the rows of the plain convolution, without what ``output_size`` adds at the edge."""
        dims = len(self.kernel_size)
        values = self.float_input(x)
        values = values if values.dim() == dims + 2 else values.unsqueeze(0)
        spread, _ = self._canvas(values.shape[2:], list(self.output_padding))
        return window_rows(spread(values, 0.0), self.groups, self.kernel_size, (1,) * dims, self.dilation)

    def forward(self, input: Tensor | QuantizedTensor, output_size: list[int] | None = None) -> Any:
        x = input
        dims = len(self.kernel_size)
        single = len(x.shape) == dims + 1
        if isinstance(x, Tensor) and single:
            x = x.unsqueeze(0)
        sized = torch.empty((1, 1, *x.shape[-dims:]), device="meta")
        extra = self._output_padding(sized, output_size, list(self.stride), list(self.padding),
                                     list(self.kernel_size), dims, list(self.dilation))
        if self.calibrating or self.plan.weight is None:
            y = self._float(self.float_input(x), self.float_weight(), self.bias, extra)
        elif self.plan.input is None:
            values = self.float_input(x)
            weight = self.weight_from_matrix(self.quantized_weight().dequantize(values.dtype))
            y = self._float(values, weight, self.bias, extra)
        else:
            spread = self._spread(batched(self.quantized_input(x), dims), extra)
            geometry = Geometry((1,) * dims, (0,) * dims, self.dilation, self.groups)
            made = self.product(spread, self.quantized_weight(), geometry=geometry)
            return self.finish(unbatched(made) if single else made)
        return self.finish(unbatched(y) if single else y)

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None, extra: list[int]) -> Tensor:
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(self.kernel_size)]
        return convolve(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

    def _spread(self, x: QuantizedTensor, extra: list[int]) -> QuantizedTensor:
        """The codes ``stride`` apart on a canvas of real zeros, with the margin that the flipped kernel needs."""
        if isinstance(x.zero_point, Tensor):
            raise UnsupportedError(f"{self.name}: a transposed convolution needs one zero point for the batch; use "
                                   "symmetric: true for dynamic inputs")
        if not x.spec.fmt.has_zero:
            raise UnsupportedError(f"{self.name}: {x.spec.fmt} has no zero to spread the input with; use an affine "
                                   "format for the input of transposed convolutions")
        spread, back = self._canvas(x.shape[2:], extra)
        return ste.rearranged(x, spread(x.codes, int(x.zero_point or 0)), back)

    def _canvas(self, sizes: torch.Size, extra: list[int]
                ) -> tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor], Tensor]]:
        """How an input of these spatial sizes is spread on a canvas filled with a value, and how its gradient comes
        back."""
        margins = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel_size, self.padding)]
        spans = [(n - 1) * s + 1 for n, s in zip(sizes, self.stride)]
        window = (slice(None), slice(None), *(slice(max(0, m), max(0, m) + n, s)
                                              for m, n, s in zip(margins, spans, self.stride)))
        full = [max(0, m) + n + max(0, m + e) for m, n, e in zip(margins, spans, extra)]
        crop = (slice(None), slice(None), *(slice(max(0, -m), f - max(0, -(m + e)))
                                            for m, f, e in zip(margins, full, extra)))

        def spread(x: Tensor, fill: float) -> Tensor:
            canvas = x.new_full((*x.shape[:2], *full), fill)
            canvas[window] = x
            return canvas[crop]

        def back(g: Tensor) -> Tensor:
            canvas = g.new_zeros((*g.shape[:2], *full))
            canvas[crop] = g
            return canvas[window]

        return spread, back


@register
class QuantizedConvTranspose1d(QuantizedTransposedConvolution, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` on integers."""

    replaces = nn.ConvTranspose1d


@register
class QuantizedConvTranspose2d(QuantizedTransposedConvolution, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` on integers."""

    replaces = nn.ConvTranspose2d


@register
class QuantizedConvTranspose3d(QuantizedTransposedConvolution, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` on integers."""

    replaces = nn.ConvTranspose3d
