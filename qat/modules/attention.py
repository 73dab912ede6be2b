"""``nn.MultiheadAttention`` on integers: its four projections, and both products of activations.

    scores        = codes(q) @ codes(k)^T * (scale_q * scale_k / sqrt(head_dim))  + masks, in float32
    probabilities = unsigned codes, zero point 0, range [0, 1] whatever the data
                    (:func:`qat.kernels.activations.softmax`)
    context       = codes(probabilities) @ codes(v) * (scale of the query * scale_v of the channel)

The second product sums over the tokens, so the values may have a scale for each channel: static ranges have one for
each of ``embed_dim``; dynamic ones are taken for each channel of each head from the tokens themselves. Softmax, masks
and dropout compute the same expressions before and after ``convert``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.kernels import activations, ste
from qat.modules.base import LayerPlan, QuantizedModule, register
from qat.modules.composite import Composite, Part, Source
from qat.modules.functional import QuantizedMatMul
from qat.modules.precision import NarrowFloat
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import DynamicQuantizer, Quantizer, make_quantizer

SINGLE_SCALE_OBSERVERS = ("percentile", "mse", "entropy")
"""Observers that keep one histogram; where each channel has a range of its own it is the least and greatest value."""


def signed(spec: TensorSpec) -> TensorSpec:
    """``spec`` for the result of a projection, which has values of either sign: as it is, unless it cannot hold them.

    >>> signed(TensorSpec("uint4", "per_tensor", symmetric=True)).format
    'int4'
    """
    if spec.fmt.signed or (spec.symmetric is False and spec.learned != "pact"):
        return spec
    return spec.replace(format=spec.format.lstrip("u"), symmetric=True, learned="lsq" if spec.learned else None)


def probability_spec(spec: TensorSpec) -> TensorSpec:
    """Unsigned codes of the same width, zero point 0, one scale for each row.

    >>> str(probability_spec(TensorSpec("int8", "per_tensor")))
    'uint8 per_token dynamic'
    """
    return TensorSpec(f"uint{spec.bits}", "per_token", symmetric=True, dynamic=True)


def value_quantizer(spec: TensorSpec, channels: int) -> Quantizer:
    """The quantizer of values (..., tokens, channels), which the product sums over the tokens.

    A static range has a scale for each channel, in the shape (channels,); a dynamic one what ``spec`` says.
    """
    if spec.dynamic:
        return make_quantizer(spec)
    observer = "minmax" if spec.observer in SINGLE_SCALE_OBSERVERS else spec.observer
    learned = "lsq" if spec.learned == "rsign" else spec.learned
    spec = spec.replace(granularity="per_column", observer=observer, learned=learned)
    return make_quantizer(spec, torch.Size((1, channels)))


def by_heads(values: QuantizedTensor, heads: int) -> QuantizedTensor:
    """Codes (N, S, channels) with a scale for each channel as (N, heads, S, channels // heads)."""
    shape = (heads, 1, values.shape[-1] // heads)
    point = values.zero_point
    return ste.rearranged(values, split_heads(values.codes, heads), lambda g: g.transpose(1, 2).flatten(2),
                          values.scale.reshape(shape), point.reshape(shape) if isinstance(point, Tensor) else point)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, S, channels) to (N, heads, S, channels // heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class AttentionProduct(QuantizedMatMul):
    """A product of attention: two operands of either sign, in floating point or on integers."""

    takes_output_spec: ClassVar[bool] = False       # softmax and masks come behind, in floating point

    def make_activation_quantizers(self) -> None:
        spec = None if self.plan.input is None else signed(self.plan.input)
        self.output_quantizer = None
        self.input_quantizer = None if spec is None else make_quantizer(spec)
        self.right_quantizer = None if spec is None else self.make_right_quantizer(spec)

    def make_right_quantizer(self, spec: TensorSpec) -> Quantizer:
        return make_quantizer(spec)

    def scores(self, q: Any, k: Any, factor: float, dtype: torch.dtype) -> Tensor:
        """``q @ k^T * factor`` in ``dtype``: q (..., L, head_dim), k (..., S, head_dim) to (..., L, S)."""
        if self.calibrating or self.plan.input is None:
            left, right = self.float_operand(q, self.input_quantizer), self.float_operand(k, self.right_quantizer)
            return (left @ right.transpose(-1, -2)).to(dtype) * factor
        codes = ste.transposed(k) if isinstance(k, QuantizedTensor) else self.right(k.transpose(-1, -2))
        return self.multiply(self.left(q), codes, factor, dtype)


class Scores(AttentionProduct):
    """``q @ k^T / sqrt(head_dim)`` in float32: q (N, H, L, head_dim), k (N, H, S, head_dim) to (N, H, L, S)."""

    _owner: list[nn.Module]

    def __init__(self, owner: nn.Module, name: str, plan: LayerPlan) -> None:
        super().__init__()
        self._owner = [owner]           # in a list: a module in an attribute would become a child
        self.training = owner.training
        self.equip(name, plan)

    @property
    def owner(self) -> Any:
        """The attention module."""
        return self._owner[0]

    def device(self) -> torch.device:
        return self.owner.device()

    def initial_dtype(self) -> torch.dtype:
        return self.owner.float_dtype

    def forward(self, q: Any, k: Any) -> Tensor:
        return self.scores(q, k, 1.0 / math.sqrt(q.shape[-1]), torch.float32)


class Context(Scores):
    """``probabilities @ v``: (N, H, L, S) and v (N, S, embed_dim) to (N, L, embed_dim), in the dtype of v."""

    def make_activation_quantizers(self) -> None:
        super().make_activation_quantizers()
        self.input_quantizer = None     # the probabilities arrive as codes

    def make_right_quantizer(self, spec: TensorSpec) -> Quantizer:
        return value_quantizer(spec, self.owner.embed_dim)

    def forward(self, probabilities: Any, v: Any) -> Tensor:
        if not isinstance(probabilities, QuantizedTensor):
            values = self.split(self.float_operand(v, self.right_quantizer))
            y = probabilities.to(values.dtype) @ values
        else:
            y = self.multiply(probabilities, self.values(v), 1.0, v.dtype)
        return y.transpose(1, 2).reshape(*v.shape[:1], y.shape[2], v.shape[2])

    def split(self, x: Tensor) -> Tensor:
        """(N, S, embed_dim) to (N, H, S, head_dim)."""
        return split_heads(x, self.owner.num_heads)

    def values(self, v: Tensor) -> QuantizedTensor:
        """The codes of the values, (N, H, S, head_dim), with one scale for each channel."""
        assert self.right_quantizer is not None
        if self.right_quantizer.spec.dynamic:
            return self.right(self.split(v))
        return by_heads(self.right_quantizer.quantize(v), self.owner.num_heads)


@register
class QuantizedMultiheadAttention(Composite, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whole, on integers.

    Parts ``q``, ``k``, ``v`` and ``out`` read ``in_proj_weight`` (or the three separate matrices) and
    ``out_proj.weight``; ``scores`` and ``context`` are the two products of activations. A rule may name any of them
    (``*.attention.scores``). Arguments and results are those of the float module, with two differences: the weights
    returned are the probabilities that were used, in integers, and a query that may attend to nothing gets zeros
    (torch's two code paths disagree: zeros without ``need_weights``, NaN with).
    """

    replaces = nn.MultiheadAttention
    products: ClassVar[dict[str, Any]] = {"scores": Scores, "context": Context}

    q: Part
    k: Part
    v: Part
    out: Part
    scores: Scores
    context: Context

    @classmethod
    def sources(cls, module: nn.Module) -> dict[str, Source]:
        width: Any = module.embed_dim
        stacked = module.in_proj_weight is not None
        bias = "in_proj_bias" if module.in_proj_bias is not None else None
        found = {}
        for i, name in enumerate("qkv"):
            rows = (i * width, (i + 1) * width)
            found[name] = (Source("in_proj_weight", bias, rows) if stacked
                           else Source(f"{name}_proj_weight", bias, None, rows))
        out: Any = module.out_proj
        return {**found, "out": Source("out_proj.weight", None if out.bias is None else "out_proj.bias")}

    @classmethod
    def edge(cls, names: Sequence[str], first: bool) -> Sequence[str]:
        return ("q", "k", "v") if first else ("out",)

    def part_macs(self, total: int) -> dict[str, int]:
        """Nothing: how often a weight is used depends on two lengths, so the whole is said of the whole."""
        return {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Any, Tensor | None]:
        """As the float module: see :meth:`torch.nn.MultiheadAttention.forward` for shapes and masks.

        Raises:
            UnsupportedError: nested tensors.
            RuntimeError: ``is_causal`` without the mask that it is a hint about; a mask of the wrong shape.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise UnsupportedError(f"{self.name}: nested tensors have no integer attention; give a padded batch and "
                                   "key_padding_mask")
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{self.name}: is_causal is a hint about attn_mask: give the mask too "
                               "(nn.Transformer.generate_square_subsequent_mask)")
        batched = query.dim() == 3
        swap = batched and not self.batch_first
        same_key, same_value = key is query, value is key       # before they become other objects
        query = self._batch_first(query, batched, swap)
        key = query if same_key else self._batch_first(key, batched, swap)
        value = key if same_value else self._batch_first(value, batched, swap)
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, query.shape[0], query.shape[1], key.shape[1])
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None and k.shape[1] > key.shape[1]:
            mask = F.pad(mask, (0, k.shape[1] - key.shape[1]))
        context, probabilities = self._attend(q, k, v, mask, need_weights)
        y = self.out(context, None, context.dtype)
        weights = None
        if need_weights and probabilities is not None:
            weights = probabilities.dequantize(y.dtype) if isinstance(probabilities, QuantizedTensor) \
                else probabilities.to(y.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        y = y.transpose(0, 1) if swap else y
        return self.finish(y if batched else y.squeeze(0)), weights

    @staticmethod
    def _batch_first(x: Tensor, batched: bool, swap: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x.transpose(0, 1) if swap else x

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections. In self-attention one set of codes serves all whose quantizers are alike."""
        inputs: list[Tensor | QuantizedTensor] = [query, key, value]
        if key is query and self._shares(self.q, self.k):
            inputs[0] = inputs[1] = self.q.quantized_input(query)
        if value is key and self._shares(self.k, self.v):
            codes = inputs[1] if isinstance(inputs[1], QuantizedTensor) else self.k.quantized_input(key)
            inputs[1] = inputs[2] = codes
        q, k, v = (part(x) for part, x in zip((self.q, self.k, self.v), inputs))
        return q, k, v

    @staticmethod
    def _shares(one: Part, other: Part) -> bool:
        """Whether two parts put the same tensor on the same codes."""
        a: Any = one.input_quantizer
        b: Any = other.input_quantizer
        if (a is None or b is None or a.spec != b.spec or one.calibrating or a.observing or b.observing
                or one.plan.weight is None or other.plan.weight is None or a.spec.learned):
            return False
        if isinstance(a, DynamicQuantizer):
            return True
        if a.scale.device.type != "cpu" or torch.compiler.is_compiling():     # looking would wait for the device
            return False
        return torch.equal(a.scale, b.scale) and (a.zero_point is None or torch.equal(a.zero_point, b.zero_point))

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, queries: int,
              keys: int) -> Tensor | None:
        """Both masks as one float32 tensor to add, that broadcasts against (batch, heads, queries, keys)."""
        total: Tensor | None = None
        if attn_mask is not None:
            wanted = [(queries, keys), (batch * self.num_heads, queries, keys)]
            if tuple(attn_mask.shape) not in wanted:
                raise RuntimeError(f"{self.name}: attn_mask has shape {tuple(attn_mask.shape)}; it must be "
                                   f"{wanted[0]} or {wanted[1]}")
            total = _additive(attn_mask)
            total = total.unflatten(0, (batch, self.num_heads)) if total.dim() == 3 else total[None, None]
        if padding is not None:
            if padding.numel() != batch * keys or padding.shape[-1] != keys:
                raise RuntimeError(f"{self.name}: key_padding_mask has shape {tuple(padding.shape)}; it must be "
                                   f"{(batch, keys)}, or {(keys,)} without a batch")
            hidden = _additive(padding).reshape(batch, 1, 1, keys)
            total = hidden if total is None else total + hidden
        return total

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                need_weights: bool) -> tuple[Tensor, Tensor | QuantizedTensor | None]:
        """(N, L, embed_dim), and the probabilities (N, H, L, S) unless nobody sees them."""
        rate = self.dropout if self.training else 0.0
        split = self.context.split
        integer = self.context.plan.input is not None
        if not (integer or need_weights or self.scores.plan.input is not None):
            y = F.scaled_dot_product_attention(split(q), split(k), split(v), None if mask is None else mask.to(q.dtype),
                                               rate)
            return y.transpose(1, 2).flatten(2), None
        scores = self.scores(split(q), split(k))
        if mask is not None:
            scores = scores + mask
        if integer and not self.calibrating:
            assert self.context.plan.input is not None
            spec = probability_spec(self.context.plan.input)
            codes = activations.softmax(scores, spec, self.context.backward_type(v))
            codes = activations.dropout(codes, rate) if rate else codes
            return self.context(codes, v), codes
        values = float_softmax(scores)
        values = F.dropout(values, rate) if rate else values
        return self.context(values, v), values


def float_softmax(scores: Tensor) -> Tensor:
    """The softmax over the last dimension; zeros where everything is masked (``-inf``)."""
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def _additive(mask: Tensor) -> Tensor:
    """A mask as float32 to add: a bool mask hides where it is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)
    return mask.float()


def step_by_step(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fast paths where something inside of them was swapped.

    In eval without gradients ``nn.TransformerEncoderLayer`` hands the raw weights of its children to one fused kernel,
    and ``nn.TransformerEncoder`` packs padded batches into nested tensors for it: swapped children would silently not
    run. Both look at an attribute of theirs first, and that is what is set here; their step-by-step path calls every
    child.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
                isinstance(m, QuantizedModule | NarrowFloat) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0      # neither: the fused kernel does not know the activation
            else:
                module.use_nested_tensor = False
