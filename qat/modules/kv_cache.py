"""A cache of keys and values as packed codes, for ``generate`` of any Hugging Face decoder, float or quantized.

    cache = qat.QuantizedCache(model)                               # int8, or the grids of its quantized attention
    cache = qat.QuantizedCache(model, keys="int4", values="int4")   # a scale for each token of each head
    model.generate(**inputs, past_key_values=cache)

Every token is put on its grid once, alone, when it arrives; what attention is given is what was stored, in the prompt
as in later steps. What that means:

- A prepared model and the deployed one with caches of the same grids generate the same tokens, bit for bit.
- With the grids of the model's own quantized attention (the default there) the cache changes nothing at all: logits are
  those of a float cache, bit for bit, since attention puts every token on that grid anyway. The codes go to the integer
  products as they are; nothing is quantized twice.
- Other grids: attention works with the stored codes (a scale for each token, no zero point in values) or with the
  values dequantized from them. They are off the float ones by at most half a scale: by
  ``max |x| / (2 ** bits - 1)`` of the token's head for symmetric codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import SpecError, UnsupportedError
from qat.modules.attention_interface import attached, carrying
from qat.numerics import affine, packing
from qat.numerics.formats import SCALE_DTYPES, TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import dynamic_qparams

try:
    from transformers.cache_utils import (
        DYNAMIC_LAYER_TYPE_MAPPING,
        CacheLayerMixin,
        DynamicCache,
        EncoderDecoderCache,
        get_layer_types_and_kwargs,
    )
except ImportError:
    raise UnsupportedError("a quantized cache is one of transformers' caches: pip install .[llm]") from None

KEPT_WHOLE = ("full_attention",)
WINDOWED = ("sliding_attention", "chunked_attention")
WITHOUT = ("dummy", "conv", "linear_attention")
"""Types of layers that transformers' caches know: all tokens, the last ones, and layers without keys and values."""


def cache_spec(spec: TensorSpec | Mapping[str, Any] | str) -> TensorSpec:
    """A spec for keys or values: the range of each token of each head, or of each group of it, taken when it arrives.

    >>> str(cache_spec("int4"))
    'int4 per_token dynamic'

    Raises:
        SpecError: a static or learned range, which only the attention of a prepared model has; another granularity.
    """
    spec = spec if isinstance(spec, TensorSpec) else TensorSpec.from_dict(spec)
    if spec.learned or spec.observer != "minmax" or spec.granularity not in (None, "per_token", "per_group"):
        raise SpecError(f"{spec}: a cache puts each token on its grid when it arrives: per_token, or per_group with a "
                        "group_size. Static ranges are those of quantized attention: prepare the model, and leave keys "
                        "and values out")
    symmetric = spec.symmetric is not False
    if symmetric and not spec.fmt.signed:
        raise SpecError(f"{spec.format} cannot hold negative values: use {spec.format.lstrip('u')}, or symmetric: "
                        "false")
    grouped = spec.granularity == "per_group"
    return spec.replace(granularity="per_group" if grouped else "per_token", dynamic=not grouped, symmetric=symmetric)


@dataclass(frozen=True)
class Grid:
    """How keys or values (N, heads, S, head_dim) become codes: as a product of attention does it, or by a spec."""

    spec: TensorSpec
    product: Any = None

    def __call__(self, x: Tensor) -> QuantizedTensor:
        if self.product is not None:
            return self.product.codes_of(x)
        rows = x.reshape(-1, x.shape[-1])
        scale, zero_point = dynamic_qparams(rows, self.spec)
        codes = affine.quantize(rows, scale, zero_point, self.spec).reshape(x.shape)
        by_token = (*x.shape[:-1], scale.shape[-1])
        return QuantizedTensor(codes, scale.reshape(by_token),
                               None if zero_point is None else zero_point.reshape(by_token), self.spec, dtype=x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Grid:
        return self                     # copies of a cache belong to the same model

    @classmethod
    def of(cls, product: Any, otherwise: TensorSpec) -> Grid:
        """That of a quantized product whose codes of a token depend on that token alone; else by a spec."""
        quantizer = getattr(product, "right_quantizer", None)
        alone = quantizer is not None and (not quantizer.spec.dynamic or quantizer.spec.granularity == "per_token")
        return cls(otherwise, product if alone else None)

    def without_product(self) -> Grid:
        """By the spec."""
        return replace(self, product=None)


@dataclass(frozen=True)
class Store:
    """Keys or values as packed codes, every row filled up to whole bytes.

    Attributes:
        packed: uint8 (N, heads, S, bytes).
        scale: (N, heads, S, groups) in the spec's ``scale_dtype``; or that of a static range, which holds for all.
        zero_point: likewise, in the type of the codes; None or a number where it is one.
        width: head_dim.
        static: whether scale and zero point hold for all tokens.
        dtype: of the values that came.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | int | None
    spec: TensorSpec
    width: int
    static: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: QuantizedTensor) -> Store:
        fmt, static, point = x.spec.fmt, x.scale.dim() != 4, x.zero_point
        whole = 8 // math.gcd(8, fmt.bits)
        codes = F.pad(x.codes, (0, -x.shape[-1] % whole), value=fmt.hi)
        packed = packing.pack(codes, fmt).reshape(*x.shape[:-1], packing.packed_size(codes.shape[-1], fmt.bits))
        scale = x.scale if static else x.scale.to(SCALE_DTYPES[x.spec.scale_dtype])
        point = point.to(fmt.dtype) if isinstance(point, Tensor) and not static else point
        return cls(packed, scale, point, x.spec, x.shape[-1], static, x.dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> Store:
        """With ``change`` made to every tensor that has batch, heads and tokens."""
        if self.static:
            return replace(self, packed=change(self.packed))
        point = change(self.zero_point) if isinstance(self.zero_point, Tensor) else self.zero_point
        return replace(self, packed=change(self.packed), scale=change(self.scale), zero_point=point)

    def followed_by(self, new: Store) -> Store:
        """These tokens and the new ones."""
        point = self.zero_point
        if self.static:
            return replace(self, packed=torch.cat([self.packed, new.packed], 2))
        if isinstance(point, Tensor) and isinstance(new.zero_point, Tensor):
            point = torch.cat([point, new.zero_point], 2)
        return replace(self, packed=torch.cat([self.packed, new.packed], 2),
                       scale=torch.cat([self.scale, new.scale], 2), zero_point=point)

    @property
    def length(self) -> int:
        return self.packed.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that grow with the tokens."""
        own = [self.packed] if self.static else [self.packed, self.scale, self.zero_point]
        return sum(t.nbytes for t in own if isinstance(t, Tensor))

    def codes(self) -> QuantizedTensor:
        """The codes (N, heads, S, head_dim)."""
        fmt = self.spec.fmt
        each = self.packed.shape[-1] * 8 // fmt.bits
        codes = packing.unpack(self.packed.contiguous(), fmt, (*self.packed.shape[:-1], each))[..., : self.width]
        point = self.zero_point
        point = point.to(torch.int32) if isinstance(point, Tensor) else point
        return QuantizedTensor(codes.contiguous(), self.scale.float(), point, self.spec, dtype=self.dtype)

    def values(self, summed: bool) -> Tensor:
        """The values in floating point; they carry their codes where an integer product can use them.

        Args:
            summed: whether that product sums over the tokens, so that zero points may not differ from token to token.
        """
        codes = self.codes()
        if self.spec.granularity == "per_group":
            rows = (codes.codes.flatten(0, 2), codes.scale.flatten(0, 2),
                    codes.zero_point.flatten(0, 2) if isinstance(codes.zero_point, Tensor) else codes.zero_point)
            return affine.dequantize(*rows, self.spec).reshape(codes.shape).to(self.dtype)
        usable = self.static or not summed or not isinstance(codes.zero_point, Tensor)
        return carrying(codes.dequantize(), codes) if usable else codes.dequantize()


class QuantizedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer as codes; with ``sliding_window`` only those of the last ``sliding_window - 1``
    tokens, as transformers' own sliding layers keep them."""

    is_compileable = False
    is_croppable = True

    def __init__(self, keys: Grid, values: Grid, sliding_window: int | None = None) -> None:
        self.grids = keys, values
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.stores: tuple[Store, Store] | None = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The stored keys in floating point (cross-attention reads them so)."""
        return None if self.stores is None else self.stores[0].values(summed=False)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.stores is None else self.stores[1].values(summed=True)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return 0 if self.stores is None else sum(s.nbytes for s in self.stores)

    def _settle(self, states: tuple[Tensor, Tensor]) -> None:
        """Use the grids of attention only where attention is handed what is stored, as far as shapes tell.

        (Latent attention stores what its keys and values are computed from.)
        """
        for product, x in zip((g.product for g in self.grids), states):
            if product is not None and (product.heads, product.width) != (x.shape[1], x.shape[1] * x.shape[3]):
                self.grids = self.grids[0].without_product(), self.grids[1].without_product()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; all that attention may see, as stored.

        Raises:
            UnsupportedError: a gradient is wanted: codes that were stored carry none.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedError("a quantized cache carries no gradient: train with use_cache=False, or generate "
                                   "under torch.no_grad()")
        if self.stores is None:
            self.lazy_initialization(key_states, value_states)
            self._settle((key_states, value_states))
        new = [Store.of(grid(x)) for grid, x in zip(self.grids, (key_states, value_states))]
        keys, values = new if self.stores is None else [s.followed_by(n) for s, n in zip(self.stores, new)]
        self.seen += key_states.shape[-2]
        self.stores = keys, values
        if self.sliding_window is not None:
            if not self.record_past:
                self._keep_window()
            else:                       # more is kept than the mask knows of: until crop
                visible = self.sliding_window - 1 + key_states.shape[-2]
                keys, values = (s.each(lambda t: t[:, :, -visible:]) for s in self.stores)
        return keys.values(summed=False), values.values(summed=True)

    def _keep_window(self) -> None:
        assert self.sliding_window is not None
        first = 1 - self.sliding_window
        if self.sliding_window == 1:
            self._change(lambda t: t[:, :, t.shape[2]:])
        elif self.stores is not None and self.stores[0].length >= self.sliding_window:
            self._change(lambda t: t[:, :, first:].contiguous())

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.stores is not None:
            keys, values = (s.each(change) for s in self.stores)
            self.stores = keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next ``query_length`` queries see, and the position of the first of them."""
        if self.sliding_window is None:
            return self.seen + query_length, 0
        past = min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    def activate_past_recording(self) -> None:
        """Keep what leaves a window until the next ``crop``."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: a positive number.
            UnsupportedError: a window has let go of the tokens that would come back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        full = self.sliding_window is not None and self.seen >= self.sliding_window
        if full and not self.record_past and tokens_to_remove:
            raise UnsupportedError("this window is full and has let go of the tokens before it: call "
                                   "activate_past_recording() before generating")
        if tokens_to_remove:
            self._change(lambda t: t[:, :, :tokens_to_remove])
            self.seen = max(0, self.seen + tokens_to_remove)
        if full:
            self._keep_window()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])

    def offload(self) -> None:
        self._change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda t: t.to(self.device, non_blocking=True))


class QuantizedCache(DynamicCache):
    """Keys and values of all layers of a decoder as packed codes: ``generate(..., past_key_values=...)`` fills it.

    Args:
        model: the model that it will be used with, float, prepared or deployed; not kept, but for the quantizers of its
            attention. Encoders with a decoder need two: :meth:`paired`.
        keys, values: a spec, its dict or a format name, see :func:`cache_spec`; None: the grid of the layer's own
            quantized attention, and int8 where there is none (or where several modules share a number, as the two
            attentions of a decoder with an encoder do).
        paired: this is one of the two caches of :meth:`paired`.

    Raises:
        UnsupportedError: not a model of transformers; a layer whose cache holds more than keys and values.
        SpecError: a spec that no cache can carry out.
    """

    def __init__(self, model: nn.Module, keys: TensorSpec | Mapping[str, Any] | str | None = None,
                 values: TensorSpec | Mapping[str, Any] | str | None = None, *, paired: bool = False) -> None:
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise UnsupportedError(f"{type(model).__name__} is not a model of transformers: it has no config")
        if config.is_encoder_decoder and not paired:
            raise UnsupportedError(f"{type(model).__name__} has two kinds of attention with a cache each: "
                                   "QuantizedCache.paired(model)")
        specs = [cache_spec("int8" if spec is None else spec) for spec in (keys, values)]
        products = self._products(model)
        layers: list[Any] = []
        for index, (kind, options) in enumerate(zip(*get_layer_types_and_kwargs(config.get_text_config(decoder=True)))):
            if kind in KEPT_WHOLE + WINDOWED:
                scores, context = products.get(index, (None, None))
                grids = (Grid.of(scores if keys is None else None, specs[0]),
                         Grid.of(context if values is None else None, specs[1]))
                layers.append(QuantizedCacheLayer(*grids, **options))
            elif kind in WITHOUT:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
            else:
                raise UnsupportedError(f"layer {index} of {type(model).__name__} is of type {kind!r}, whose cache has "
                                       f"more than keys and values; quantized are {', '.join(KEPT_WHOLE + WINDOWED)}")
        super(DynamicCache, self).__init__(layers=layers)

    @classmethod
    def paired(cls, model: nn.Module, keys: TensorSpec | Mapping[str, Any] | str | None = None,
               values: TensorSpec | Mapping[str, Any] | str | None = None) -> QuantizedCachePair:
        """The two caches of a decoder that also attends to an encoder."""
        return QuantizedCachePair(cls(model, keys, values, paired=True), cls(model, keys, values, paired=True))

    @staticmethod
    def _products(model: nn.Module) -> dict[int, tuple[Any, Any]]:
        """The products of the one quantized attention module that has the number of a layer."""
        found: dict[int, list[tuple[Any, Any]]] = {}
        for module in model.modules():
            index: Any = getattr(module, "layer_idx", None)
            if isinstance(index, int) and attached(module):
                found.setdefault(index, []).append((module.scores, module.context))
        return {index: products[0] for index, products in found.items() if len(products) == 1}

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedCacheLayer))


class QuantizedCachePair(EncoderDecoderCache):
    """The cache of a decoder's own attention, and that of its attention to the encoder."""

    self_attention_cache: QuantizedCache
    cross_attention_cache: QuantizedCache

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points of both."""
        return self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes
