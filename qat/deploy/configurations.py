"""What a ``config.json`` says of a transformer, by the many names that families of models have for one number."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qat.deploy.memory import Contents, Transformer, Weight, positive
from qat.errors import ConfigError

KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers",
               "layers", "depth"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "embed_dim", "width"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_n_heads",
                 "multi_query_group_num"),
    "head_dim": ("head_dim", "d_kv", "kv_channels", "attention_head_size"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
                     "inner_dim", "hidden_dim"),
    "vocabulary": ("vocab_size", "padded_vocab_size", "n_vocab", "num_embeddings"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "active_experts": ("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_top_k", "moe_k"),
    "expert_intermediate": ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size",
                            "ffn_hidden_size"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_intermediate": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "dense_layers": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "latent": ("kv_lora_rank",),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
}
"""What the families of models call one number in their configurations; the first name that is there counts."""
NAMED_BY_USER = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "experts",
                 "active_experts", "expert_intermediate")
"""Numbers that a user may give beside, or against, what was found."""
ENCODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
            "ForMultipleChoice", "ForImageClassification", "ForNextSentencePrediction", "ForPreTraining")
"""Endings of ``architectures``: tasks without generation, so without a KV cache."""


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a configuration that has layers and a width: itself, or a nested one, that for text first."""
    if all(any(k in config for k in KEYS[key]) for key in ("layers", "hidden")):
        return config
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    for key in sorted(nested, key=lambda k: not any(w in k for w in ("text", "llm", "language", "decoder"))):
        if (found := text_section(nested[key])) is not None:
            return found
    return None


def transformer_of(config: Mapping[str, Any], numbers: Mapping[str, int] | None = None) -> Transformer | None:
    """The numbers of a configuration under whatever names; ``numbers`` go before them. None: too little is said.

    Raises:
        ConfigError: a number that is not positive.
    """
    said = functools.partial(_number, {k: v for k, v in config.items() if v is not None}, numbers or {})
    inner = {**_dict(config.get("attn_config")), **_dict(config.get("ffn_config"))}
    nested = functools.partial(_number, inner, {})
    layers, hidden = said("layers"), said("hidden")
    if layers is None or hidden is None:
        return None
    encoder = 0
    if config.get("is_encoder_decoder") or "encoder_layers" in config:
        encoder = _number(config, {}, "", ("encoder_layers", "num_layers", "num_hidden_layers", "n_layers")) or layers
        layers = (numbers or {}).get("layers") or _number(config, {}, "", ("decoder_layers", "num_decoder_layers")) \
            or encoder
    known_heads = said("heads")
    heads = known_heads or 1
    one_for_all = config.get("multi_query") is True and not config.get("new_decoder_architecture")
    kv_heads = 1 if one_for_all and "kv_heads" not in (numbers or {}) else said("kv_heads") or nested("kv_heads") \
        or heads
    head_dim = said("head_dim") or max(1, hidden // heads)
    value_dim, latent = head_dim, said("latent") or 0
    if latent:
        rope = _number(config, {}, "", ("qk_rope_head_dim",)) or 0
        nope = _number(config, {}, "", ("qk_nope_head_dim",)) or head_dim
        head_dim, value_dim = nope + rope, _number(config, {}, "", ("v_head_dim",)) or nope
        latent += rope
    ratio = config.get("expansion_ratio")
    intermediate = said("intermediate") or (int(ratio * hidden) if isinstance(ratio, int | float) else 4 * hidden)
    experts = said("experts") or nested("experts") or 0
    experts = experts if experts > 1 else 0
    wide = said("expert_intermediate") or nested("expert_intermediate") or intermediate
    shared = said("shared_intermediate") or (said("shared_experts") or 0) * wide
    dense = (said("dense_layers") or 0) if experts else layers
    step = next((config[k] for k in ("decoder_sparse_step", "moe_layer_frequency", "interleave_moe_layer_step")
                 if positive(config.get(k))), 1)
    if experts and step > 1:
        dense = layers - layers // step
    return Transformer(
        layers, hidden, heads, kv_heads, head_dim, value_dim, intermediate, said("vocabulary") or 0, _gated(config),
        experts, (said("active_experts") or nested("active_experts") or 1) if experts else 0, wide if experts else 0,
        shared if experts else 0, min(dense, layers), encoder, latent, _windows(config, layers),
        bool(encoder) or not _encoder_only(config))  # fmt: skip


def described_by(found: Contents, config: Mapping[str, Any], numbers: Mapping[str, int]) -> Contents:
    """``found`` with the transformer that ``config`` and ``numbers`` make, and what must be said about it."""
    one = transformer_of(config, numbers)
    headless = not any(key in config for key in KEYS["heads"]) and "heads" not in numbers
    if one is None or (config and headless):
        lacking = [f"{key}=" for key in ("layers", "hidden", "heads") if key not in numbers]
        return with_notes(found, notes=(
            "KV cache and activations are unknown: nothing here says layers and widths; give "
            f"{', '.join(lacking)} (and kv_heads=, intermediate=, vocabulary=).",))
    notes = []
    if headless:
        notes.append("The number of heads is unknown: keys and values are taken to be as wide as hidden.")
    if not one.vocabulary:
        notes.append("The vocabulary is unknown: logits are not among the activations.")
    if not one.caches:
        notes.append("An encoder: it keeps no KV cache.")
    if one.latent:
        notes.append("Latent attention: the cache holds the latent vectors.")
    if 0 in one.windows:
        notes.append(f"{one.windows.count(0)} of {one.layers} layers keep a state in place of keys and values; it is "
                     "not counted.")
    if any(one.windows):
        bounded = sum(1 for w in one.windows if w)
        notes.append(f"{bounded} of {one.layers} layers keep the last {max(w for w in one.windows if w):,} positions.")
    return with_notes(replace(found, transformer=one, positions=_number(config, {}, "positions")), notes=tuple(notes))


def with_notes(found: Contents, notes: tuple[str, ...] = (), **changes: Any) -> Contents:
    return replace(found, notes=(*notes, *found.notes), **changes)


def _number(config: Mapping[str, Any], numbers: Mapping[str, int], key: str,
            names: tuple[str, ...] | None = None) -> int | None:
    """A number that the user gave, or the first of its names in ``config``; of a list for each layer, the greatest."""
    if key in numbers:
        return numbers[key]
    for name in KEYS[key] if names is None else names:
        value = config.get(name)
        if isinstance(value, list) and value:
            value = max((v for v in value if positive(v)), default=value)
        if value is None or isinstance(value, list | dict | str | bool):
            if isinstance(value, str):
                raise ConfigError(f"{name} of the configuration must be a positive whole number, not {value!r}.")
            continue
        if (value == 0 and key not in ("layers", "hidden", "heads")) or (key == "positions" and not positive(value)):
            continue
        if not positive(value):
            raise ConfigError(f"{name} of the configuration must be a positive whole number, not {value!r}.")
        return int(value)
    return None


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _gated(config: Mapping[str, Any]) -> bool:
    """Whether the feed-forward layers multiply two projections: by their activation, or by the norm they came with."""
    act = " ".join(str(config.get(k, "")) for k in ("hidden_act", "hidden_activation", "activation_function",
                                                    "activation", "feed_forward_proj", "act_fn"))
    if "feed_forward_proj" in config or "relu2" in act:
        return "gated" in act
    return any(word in act for word in ("silu", "swi", "glu", "gated")) or "rms_norm_eps" in config \
        or "ffn_config" in config


def _encoder_only(config: Mapping[str, Any]) -> bool:
    names = [a for a in config.get("architectures") or () if isinstance(a, str)]
    if config.get("is_decoder"):
        return False
    if names and any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return False
    if names and all(name.endswith(ENCODERS) for name in names):
        return True
    return bool(config.get("type_vocab_size")) or "patch_size" in config


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer how many positions it keeps; () where all keep all."""
    window, chunk = config.get("sliding_window"), config.get("attention_chunk_size")
    kinds = config.get("layer_types")
    if positive(config.get("state_size")) and not isinstance(kinds, list):
        return (0,) * layers
    if isinstance(kinds, list) and len(kinds) == layers:
        sizes = {"full_attention": None, "sliding_attention": window if positive(window) else None,
                 "chunked_attention": chunk if positive(chunk) else None, "attention": None}
        found = tuple(sizes.get(str(kind), None if "attention" in str(kind) and "linear" not in str(kind) else 0)
                      for kind in kinds)
        return found if any(w is not None for w in found) else ()
    if positive(window) and config.get("use_sliding_window") is not False:
        return (int(str(window)),) * layers
    return ()


def estimate(one: Transformer, config: Mapping[str, Any], size: float) -> Iterator[Weight]:
    """The weights of a transformer of the usual build, several of a kind together."""
    hidden, query, kv = one.hidden, one.heads * one.head_dim, one.kv_heads * one.head_dim
    plain = "rms_norm_eps" not in config and "feed_forward_proj" not in config
    biased = plain and any(k in config for k in ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon")) \
        and config.get("bias", config.get("use_bias", True)) is not False
    if any(k in config for k in ("activation_dropout", "n_embd")) and plain:
        biased = config.get("bias", True) is not False
    attention = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    if one.latent:
        rank = _number(config, {}, "latent") or one.latent
        low = _number(config, {}, "", ("q_lora_rank",))
        attention = [*([(hidden, low), (low, query)] if low else [(hidden, query)]), (hidden, one.latent),
                     (rank, one.heads * (one.head_dim - (one.latent - rank) + one.value_dim)),
                     (one.heads * one.value_dim, hidden)]

    def feed_forward(width: int) -> list[tuple[int, int]]:
        return [*[(hidden, width)] * (2 if one.gated else 1), (width, hidden)]

    def several(name: str, matrices: list[tuple[int, int]], copies: int, expert: bool = False) -> Iterator[Weight]:
        for i, (inputs, outputs) in enumerate(matrices):
            yield Weight(f"{name}.{i}", inputs * outputs * copies, inputs, "matrix", size, expert)
        if biased:
            yield Weight(f"{name}.bias", copies * sum(o for _, o in matrices), 1, "float", size)

    layers = one.layers + one.encoder_layers
    yield Weight("first", hidden * attention[0][1], hidden, "edge", size)
    for weight in several("attention", attention, layers + (one.layers if one.encoder_layers else 0)):
        first = weight.name == "attention.0"
        yield replace(weight, count=weight.count - hidden * attention[0][1]) if first else weight
    sparse = one.layers - one.dense_layers if one.experts else 0
    yield from several("feed_forward", feed_forward(one.intermediate), layers - sparse)
    if sparse:
        yield from several("experts", feed_forward(one.expert_intermediate), sparse * one.experts, expert=True)
        yield Weight("router", hidden * one.experts * sparse, hidden, "matrix", size)
        if one.shared_intermediate:
            yield from several("shared", feed_forward(one.shared_intermediate), sparse)
    if one.vocabulary:
        table = one.vocabulary * hidden
        yield Weight("embedding", table, hidden, "edge", size)
        if config.get("tie_word_embeddings", True) is False and one.caches:
            yield Weight("head", table, hidden, "edge", size)
    positions = _number(config, {}, "positions")
    rotary = any(config.get(k) for k in ("rope_theta", "rotary_pct", "rotary_dim", "rope_scaling", "rope_parameters",
                                         "rotary_emb_base", "alibi", "rotary"))
    if biased and positions and not rotary:
        yield Weight("positions", positions * hidden * (2 if one.encoder_layers else 1), hidden, "edge", size)
    norms = 2 * layers + (one.layers + 2 if one.encoder_layers else 1)
    yield Weight("norms", norms * hidden * (2 if biased else 1), 1, "float", size)
