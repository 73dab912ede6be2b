"""Both products of the attention of Hugging Face models, through transformers' own interface.

A module that looks its attention function up in transformers' ``AttentionInterface`` gets two children, ``scores`` and
``context``, and a copy of its config that names our function. So nothing is patched: masks, caches and projections stay
those of the model, and a rule finds the children by name (``*.scores``) or by type (``MatMul``).

    scores        = codes(q) @ codes(k)^T * (scale_q * scale_k * scaling)  [soft cap] [+ position bias] [+ mask]
    probabilities = unsigned codes, zero point 0 (:func:`qat.kernels.activations.softmax`), sinks in their denominators
    context       = codes(probabilities) @ codes(v) * (scale of the query * scale_v)

Keys and values are put on their grids token by token: static ranges have one scale (values: one for each channel),
dynamic ones a scale for each token of each head; the second product sums over tokens, so the scales of its values go
into the probabilities. The codes of a token never depend on others, so a token has the same codes in a prompt and in a
later step, and a cache may hold the codes themselves (:mod:`qat.modules.kv_cache`). Queries that share a head of keys
(GQA) are rows of one product: keys and values are not repeated.

Whether our floating point formula is that of the model is not believed but seen: :func:`watching` runs the model on
example inputs and compares, for each module, with what the model's own function returns.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import PrepareError, UnsupportedError
from qat.kernels import activations, ste
from qat.modules.attention import (
    AttentionProduct,
    by_heads,
    float_softmax,
    probability_spec,
    signed,
    split_heads,
    value_quantizer,
)
from qat.modules.base import register
from qat.modules.functional import MatMul
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import Quantizer

CHILDREN = ("scores", "context")
"""Names of the children that make the two products."""
IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention functions of transformers that ours can stand in for: they differ in masks and in what they return."""
PREFIX = "qat_"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


class AttentionScores(MatMul):
    """``q @ k^T * factor``: q (N, heads, L, head_dim), k (N, heads, S, head_dim) to (N, heads, L, S).

    Args:
        heads: heads of the keys.
        width: ``heads * head_dim`` of the keys.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def forward(self, q: Tensor, k: Tensor, factor: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (q @ k.transpose(-1, -2)).to(dtype or q.dtype) * factor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "transformers" in sys.modules:       # a pickled model may arrive in a process that has not prepared any
            connect()


class AttentionContext(MatMul):
    """``probabilities @ v``: (N, heads, L, S) and v (N, S, heads * head_dim) to (N, heads, L, head_dim).

    Args:
        heads: heads of the values.
        width: ``heads * head_dim`` of the values.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        values = split_heads(v, self.heads)
        return probabilities.to(values.dtype) @ values


@register
class QuantizedAttentionScores(AttentionProduct, AttentionScores):
    """The scores on integers. The keys may come as codes, (N, heads, S, head_dim), from a quantized cache."""

    replaces = AttentionScores

    heads: int
    width: int

    def codes_of(self, k: Tensor) -> QuantizedTensor:
        """The keys (N, heads, S, head_dim) as codes: what a cache may keep of them."""
        assert self.right_quantizer is not None
        return self.right_quantizer.quantize(k)

    def forward(self, q: Any, k: Any, factor: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return self.scores(q, k, factor, dtype or q.dtype)


@register
class QuantizedAttentionContext(AttentionProduct, AttentionContext):
    """The context on integers. Probabilities arrive as codes; values may, (N, heads, S, head_dim), from a cache."""

    replaces = AttentionContext

    heads: int
    width: int

    def make_activation_quantizers(self) -> None:
        super().make_activation_quantizers()
        self.input_quantizer = None     # the probabilities arrive as codes

    def make_right_quantizer(self, spec: TensorSpec) -> Quantizer:
        if spec.granularity == "per_token":     # its scale goes into the probabilities, a zero point could not
            spec = spec.replace(format=signed(spec.replace(symmetric=True)).format, symmetric=True)
        return value_quantizer(spec, self.width)

    def codes_of(self, v: Tensor) -> QuantizedTensor:
        """The values (N, heads, S, head_dim) as codes: what a cache may keep of them."""
        assert self.right_quantizer is not None
        if self.right_quantizer.spec.dynamic:
            return self.right_quantizer.quantize(v)
        return by_heads(self.right_quantizer.quantize(v.transpose(1, 2).flatten(2)), self.heads)

    def forward(self, probabilities: Any, v: Any) -> Tensor:
        if isinstance(probabilities, QuantizedTensor):
            return self.multiply(probabilities, v, 1.0, v.dtype)
        values = split_heads(self.float_operand(v, self.right_quantizer), self.heads)
        return probabilities.to(values.dtype) @ values


# ------------------------------------------------------------------------------------- codes that travel with values


def carrying(values: Tensor, codes: QuantizedTensor) -> Tensor:
    """``values``, with the codes that they were dequantized from: quantized attention takes these, others the values.

    Whatever a model makes of the values (a slice, a concatenation) is an ordinary tensor again.
    """
    values._qat_codes = codes  # type: ignore[attr-defined]
    return values


def carried(values: Tensor) -> QuantizedTensor | None:
    """The codes that ``values`` travel with, if any."""
    return getattr(values, "_qat_codes", None)


# ------------------------------------------------------------------------------------- the attention function


@dataclass
class Scoring:
    """What happens between the two products, as a call of the interface says it.

    Attributes:
        scaling: factor on the scores.
        softcap: scores are ``softcap * tanh(score / softcap)`` where there is one.
        position_bias: added to the scores.
        mask: added to the scores, float32, or bool: False hides.
        sink: (heads,): scores that take their share and have no value.
        dropout: rate at which probabilities are dropped.
    """

    scaling: float
    softcap: float | None
    position_bias: Tensor | None
    mask: Tensor | None
    sink: Tensor | None
    dropout: float

    def scores(self, scores: Tensor) -> Tensor:
        """(N, H, L, S) as they enter the softmax."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.position_bias is not None:
            scores = scores + self.position_bias
        if self.mask is None:
            return scores
        if self.mask.dtype == torch.bool:
            return scores.masked_fill(~self.mask, -torch.inf)
        return scores + self.mask


def attend(scores: Any, context: Any, query: Tensor, key: Tensor, value: Tensor, how: Scoring,
           need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Attention: query (N, H, L, d), key (N, K, S, d), value (N, K, S, e), H a multiple of K.

    Args:
        scores, context: the modules that make the products, float or quantized.

    Returns:
        (N, L, H, e); and, where they are needed, the probabilities that were used, (N, H, L, S).
    """
    heads, groups, length = query.shape[1], key.shape[1], query.shape[2]
    if heads % groups:
        raise UnsupportedError(f"{getattr(scores, 'name', 'attention')}: {heads} heads of queries do not share "
                               f"{groups} heads of keys evenly")
    k: Any = (carried(key) or scores.codes_of(key)) if _on_integers(scores) else key
    rows = query.reshape(query.shape[0], groups, -1, query.shape[3])
    raw = scores(rows, k, how.scaling, torch.float32)
    raw = how.scores(raw.reshape(raw.shape[0], heads, length, raw.shape[-1]))
    sink = None if how.sink is None else how.sink.float().reshape(1, -1, 1, 1)
    if not _on_integers(context):
        probabilities = float_softmax(raw if sink is None else torch.cat([raw, sink.expand(*raw.shape[:3], 1)], -1))
        probabilities = F.dropout(probabilities[..., : raw.shape[-1]], how.dropout)
        grouped = probabilities.reshape(raw.shape[0], groups, -1, raw.shape[-1])
        y = context(grouped, value.transpose(1, 2).flatten(2))
        return _by_query(y, heads, length), probabilities.to(query.dtype) if need_weights else None
    v = carried(value) or context.codes_of(value)
    worth = None
    if v.spec.granularity == "per_token":
        worth = v.scale
        v = ste.rearranged(v, v.codes, lambda g: g / worth, torch.ones((), device=value.device), v.zero_point)
    by_key = None if worth is None else worth.transpose(-1, -2).repeat_interleave(heads // groups, 1)
    codes = activations.softmax(raw, probability_spec(context.plan.input), context.backward_type(value), by_key, sink)
    codes = activations.dropout(codes, how.dropout) if how.dropout else codes
    y = _by_query(context(_regrouped(codes, groups), v), heads, length)
    if not need_weights:
        return y, None
    used = codes.dequantize(torch.float32)
    return y, (used if by_key is None else used / by_key).to(query.dtype)


def _on_integers(product: Any) -> bool:
    """Whether a product is quantized, and not computing in floating point to be calibrated."""
    return isinstance(product, AttentionProduct) and product.plan.input is not None and not product.calibrating


def _by_query(y: Tensor, heads: int, length: int) -> Tensor:
    """(N, K, rows, e) to (N, L, H, e)."""
    return y.reshape(y.shape[0], heads, length, y.shape[-1]).transpose(1, 2).contiguous()


def _regrouped(codes: QuantizedTensor, groups: int) -> QuantizedTensor:
    """Probabilities (N, H, L, S) as (N, K, rows, S)."""
    shape = codes.shape
    together = codes.codes.reshape(shape[0], groups, -1, shape[3])
    return ste.rearranged(codes, together, lambda g: g.reshape(shape), codes.scale.reshape(*together.shape[:3], 1))


def _forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
             dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
             softcap: float | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None,
             cache: Any = None, *, implementation: str, products: tuple[Any, Any] | None = None,
             **_: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function, as transformers calls it; ``implementation``: whose masks it is given.

    Raises:
        UnsupportedError: the model's masks are for another function by now; a paged cache; sinks that are not one
            number for each head; masks of another shape.
    """
    scores, context = products or (module.scores, module.context)
    name = getattr(scores, "name", "") or type(module).__name__
    masks = module.config._qat_own._attn_implementation
    if masks != implementation:
        raise UnsupportedError(f"{name}: prepared for the masks of {implementation!r} attention, but the model was set "
                               f"to {masks!r} since: model.set_attn_implementation({implementation!r})")
    if cache is not None:
        raise UnsupportedError(f"{name}: quantized attention has no paged cache; generate without continuous batching")
    if s_aux is not None and s_aux.numel() != query.shape[1]:
        raise UnsupportedError(f"{name}: {s_aux.numel()} attention sinks for {query.shape[1]} heads")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4):
        raise UnsupportedError(f"{name}: quantized attention takes masks of shape (batch, heads, queries, keys), not "
                               f"{getattr(attention_mask, 'shape', type(attention_mask).__name__)}")
    if implementation == "sdpa" and attention_mask is None and query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal:      # aligned at the upper left, as torch does it; a static cache is longer than its prompt
            length = query.shape[2]
            key, value = _first(key, length), _first(value, length)
            position_bias = None if position_bias is None else position_bias[..., :length]
            attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril_()[None, None]
    how = Scoring(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap, position_bias,
                  attention_mask, s_aux, float(dropout) if module.training else 0.0)
    return attend(scores, context, query, key, value, how, need_weights=implementation == "eager")


def _first(x: Tensor, length: int) -> Tensor:
    """The first tokens of keys or values; themselves, with their codes, where there are no more."""
    return x if x.shape[2] <= length else x[:, :, :length]


# ------------------------------------------------------------------------------------- finding, attaching, detaching


def connect() -> None:
    """Register our functions with transformers, each with the masks of the one it stands in for."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for implementation in IMPLEMENTATIONS:
        AttentionInterface.register(PREFIX + implementation, partial(_forward, implementation=implementation))
        AttentionMaskInterface.register(PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def callers(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` that look their attention function up in transformers' interface, by name."""
    if "transformers" not in sys.modules:
        return {}
    return {name: m for name, m in model.named_modules() if _source(m) is not None and hasattr(m, "config")
            and isinstance(getattr(m.config, "_attn_implementation", None), str)}


def _source(module: nn.Module) -> Callable[..., Any] | None:
    """The function of a module's class that looks the attention function up."""
    for kind in type(module).__mro__:
        if kind.__module__ in ("torch.nn.modules.module", "transformers.modeling_utils"):
            continue                    # the base of all models checks names there, and calls nothing
        for made in vars(kind).values():
            made = inspect.unwrap(made) if inspect.isfunction(made) else None
            if made is not None and INTERFACE in made.__code__.co_names and INTERFACE in made.__globals__:
                return made
    return None


def own_function(module: Any) -> Callable[..., Any] | None:
    """The attention function that ``module`` would call by itself; None if it cannot be told."""
    source = _source(module)
    assert source is not None
    implementation = module.config._attn_implementation
    if implementation != "eager":
        return source.__globals__[INTERFACE].get(implementation)
    found = [f for n in source.__code__.co_names if inspect.isfunction(f := source.__globals__.get(n))
             and list(inspect.signature(f).parameters)[:4] == ["module", "query", "key", "value"]]
    return found[0] if len(found) == 1 else None


def attach(module: Any, heads: int, keys: int, values: int) -> None:
    """Give an attention module its two children, and have it call our function.

    Args:
        heads: heads of keys and values.
        keys, values: their channels, ``heads * head_dim``.

    Raises:
        PrepareError: it runs an attention function whose masks ours does not take.
    """
    implementation = module.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise PrepareError(f"{type(module).__name__}: {foreign(implementation)}")
    connect()
    module.scores, module.context = AttentionScores(heads, keys), AttentionContext(heads, values)
    module.scores.training = module.context.training = module.training
    module.config = redirected(module.config, PREFIX + implementation)


def foreign(implementation: str) -> str:
    """Why attention under another function stays as it is."""
    return (f"its attention function is {implementation!r}; build the model with attn_implementation="
            f"{' or '.join(map(repr, IMPLEMENTATIONS))}")


def attached(module: nn.Module) -> bool:
    """Whether ``module`` calls our function."""
    return isinstance(module._modules.get("scores"), AttentionScores)


def detach(module: Any) -> None:
    """Undo :func:`attach`."""
    if attached(module):
        module.config = module.config._qat_own
        del module.scores, module.context


def redirected(config: Any, implementation: str) -> Any:
    """A copy of a config, for one module, that names another attention function; it remembers the model's own."""
    changed = copy.copy(config)
    changed._attn_implementation_internal = implementation
    changed.__dict__["_qat_own"] = config
    return changed


@dataclass
class Seen:
    """What was seen of an attention module: the arguments of :func:`attach`, and why it stays float, or ``""``."""

    heads: int = 0
    keys: int = 0
    values: int = 0
    reason: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return {"heads": self.heads, "keys": self.keys, "values": self.values}


@dataclass
class _Watch:
    """Stands in for the attention function of a module, returns what that returns, and compares."""

    own: Callable[..., Any]
    implementation: str
    seen: list[Seen] = field(default_factory=list)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.own(module, query, key, value, *args, **kwargs)
        heads = value.shape[1]
        seen = Seen(heads, heads * key.shape[3], heads * value.shape[3])
        self.seen.append(seen)
        products = AttentionScores(heads, seen.keys), AttentionContext(heads, seen.values)
        spread = float((query.float() @ key.float()[:, :1].transpose(-1, -2)).std()) if query.numel() else 0.0
        for gain in (1.0, 3.0 * query.shape[-1] ** 0.5 / max(spread, 1e-30)):
            # untrained models attend evenly, whatever the formula: then larger queries tell
            gained = query * min(gain, 1e6)
            expected = result[0] if gain == 1.0 else self.own(module, gained, key, value, *args, **kwargs)[0]
            try:
                actual, _ = _forward(module, gained, key, value, *args, implementation=self.implementation,
                                     products=products, **kwargs)
            except UnsupportedError as error:
                seen.reason = str(error)
                break
            if not _close(actual, expected):
                seen.reason = "its attention is not the usual formula"
        return result


def _watched(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module.config._qat_watch(module, *args, **kwargs)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of roundings, in the type that they were computed in."""
    if a.shape != b.shape:
        return False
    tolerance = math.sqrt(torch.finfo(b.dtype).eps)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return not a.numel() or float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-30)


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Compare, inside the block, our formula with what each attention module of ``model`` computes; it runs as ever.

    Yields:
        Attention modules by name; filled in when the block ends. Modules that did not run are not among them.
    """
    found: dict[str, Seen] = {}
    watched: list[tuple[str, Any, Any, _Watch]] = []
    for name, module in callers(model).items():
        own, implementation = own_function(module), module.config._attn_implementation
        taken = next((n for n in CHILDREN if hasattr(module, n)), None)
        if implementation not in IMPLEMENTATIONS:
            found[name] = Seen(reason=foreign(implementation))
        elif own is None:
            found[name] = Seen(reason="it is not clear which attention function it calls")
        elif taken is not None:
            found[name] = Seen(reason=f"it has an attribute {taken!r}, which is the name of a product")
        else:
            watch = _Watch(own, implementation)
            watched.append((name, module, module.config, watch))
            module.config = redirected(module.config, f"{PREFIX}watch")
            module.config.__dict__["_qat_watch"] = watch
    try:
        if watched:
            from transformers import AttentionInterface

            AttentionInterface.register(f"{PREFIX}watch", _watched)
        yield found
    finally:
        for name, module, config, watch in watched:
            module.config = config
            if watch.seen:
                found[name] = next((s for s in watch.seen if s.reason), watch.seen[0])
                if len({tuple(s.sizes.values()) for s in watch.seen}) > 1:
                    found[name].reason = "its values change their number of heads or channels from call to call"
