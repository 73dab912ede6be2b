"""GGUF: one file for llama.cpp and what is built on it, of Llama-like language models.

Blocks hold one scale d (float16) and integers; ``value = d * level``:

    Q8_0     32 inputs   d, 32 x int8                              levels -128..127
    Q4_0     32 inputs   d, 16 bytes: element i low, i + 16 high   levels -8..7, stored + 8
    TQ2_0   256 inputs   64 bytes of four 2-bit fields, d          ternary, stored + 1
    TQ1_0   256 inputs   52 bytes of five base-3 digits, d         ternary, stored + 1

A layer goes in exactly, or not at all: its weight is symmetric, its scales are float16 numbers (``scale_dtype:
float16`` rounds them before training), and each serves whole blocks: groups of 32 inputs or a multiple, channels, or
the tensor. :func:`recipe` is a recipe for it. Rows of ``q_proj`` and ``k_proj`` are reordered where llama.cpp turns
neighbouring channels and transformers turns halves.

The runtime quantizes activations itself, in blocks; layers that were trained with quantized inputs are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from qat.deploy.weights import exactly, other_tensors, weight_layers
from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.modules.base import QuantizedModule
from qat.recipe import Recipe

TARGETS = ("llama_cpp", "llama.cpp")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of a config -> architecture of the file."""
INTERLEAVED = ("llama",)
"""Architectures whose rotary embedding turns neighbouring channels."""
LAYERS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
"""What a block multiplies by."""
TERNARY = ("TQ2_0", "TQ1_0", "Q4_0")
FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "TQ1_0": "MOSTLY_TQ1_0", "TQ2_0": "MOSTLY_TQ2_0"}
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"{1,3}".join(_WORDS): "llama-bpe", "".join(_WORDS): "qwen2"}
"""How a tokenizer splits text into words -> what llama.cpp calls that."""


Stored = tuple[np.ndarray, gguf.GGMLQuantizationType]


def recipe(weight: str = "int4", edges: str = "int8") -> Recipe:
    """A weight-only recipe whose models go into a GGUF file exactly.

    Args:
        weight: format of the linear layers: ``int4`` (Q4_0), ``int8`` (Q8_0), or another of up to 8 bits.
        edges: format of the embedding and of the head, which often share a weight.

    >>> recipe("int8").rules[-1].weight.scale_dtype
    'float16'
    """
    def groups(format: str) -> dict[str, Any]:
        return {"format": format, "granularity": "per_group", "group_size": 32, "scale_dtype": "float16"}

    return Recipe.from_dict({"name": f"gguf_{weight}", "rules": [
        {"match": {"type": "Embedding"}, "weight": groups(edges)},
        {"match": {"name": "*lm_head"}, "weight": groups(edges), "optional": True},
        {"match": {"type": "Linear"}, "weight": groups(weight)},
    ]})


def write(deployed: nn.Module, path: Path, example_inputs: Any = None, target: str | None = None, *,
          source: str | os.PathLike[str] | None = None, ternary: str = "TQ2_0", pre: str | None = None,
          dequantize: bool | Iterable[str] = False) -> list[str]:
    """Write the new file ``path``; returns what a user must know of it, for the card.

    Args:
        deployed: a causal language model of transformers, of a type in :data:`ARCHITECTURES`.
        example_inputs: not needed.
        target: ``llama_cpp``, ``llama.cpp`` or None, which are the same.
        source: folder of the float model, whose tokenizer goes into the file; without it the file has none.
        ternary: type of ternary layers, ``TQ2_0``, ``TQ1_0`` or ``Q4_0``; Q4_0 where 256 does not divide their inputs.
        pre: how the tokenizer splits text into words, in llama.cpp's terms, where that cannot be told from its file.
        dequantize: layers that do not fit are written in floating point, with the values of their codes: True for all
            of them, or globs of their names.

    Raises:
        UnsupportedError: what cannot be written exactly, with the layer's name and the remedy.
        CheckpointError: ``source`` has no tokenizer.
    """
    if target not in (None, *TARGETS):
        raise UnsupportedError(f"unknown target {target!r}{nearest(str(target), TARGETS)}; the target of this format "
                               f"is {TARGETS[0]}")
    if ternary not in TERNARY:
        raise UnsupportedError(f"ternary={ternary!r} is unknown{nearest(str(ternary), TERNARY)}; types are "
                               f"{', '.join(TERNARY)}")
    config = getattr(deployed, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES or not hasattr(deployed, "lm_head"):
        raise UnsupportedError(f"{type(deployed).__name__} (model_type {kind!r}) cannot be written: this exporter "
                               f"knows causal language models of type {', '.join(ARCHITECTURES)}")
    assert config is not None
    architecture = ARCHITECTURES[str(kind)]
    tensors = _tensors(deployed, architecture, ternary, dequantize)
    frequencies = _rope_frequencies(config)
    if frequencies is not None:
        tensors["rope_freqs.weight"] = (frequencies, gguf.GGMLQuantizationType.F32)
    tokenizer = None if source is None else _read_tokenizer(Path(source), config.vocab_size, pre)
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, config, Counter(kind.name for data, kind in tensors.values() if data.ndim == 2))
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        tokenizer(writer)
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _notes(tensors, tokenizer is not None)


def _notes(tensors: Mapping[str, Stored], tokenizer: bool) -> list[str]:
    count = Counter(kind.name for data, kind in tensors.values() if data.ndim == 2)
    types = ", ".join(f"{number} {name}" for name, number in sorted(count.items()))
    notes = [f"Matrices by type: {types}. The weights of blocks are those of the deployed model, bit for bit; "
             "llama.cpp quantizes activations itself, so its outputs are close, not equal."]
    return notes if tokenizer else [*notes, "There is no tokenizer in the file (source= names the folder of one)."]


# -------------------------------------------------------------------------------------------------- tensors

def _tensors(deployed: nn.Module, architecture: str, ternary: str,
             dequantize: bool | Iterable[str]) -> dict[str, Stored]:
    """All tensors under their names in the file."""
    config: Any = deployed.config
    modules = weight_layers(deployed)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    found: dict[str, Stored] = {}

    def add(name: str, stored: Stored) -> None:
        home = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if home is None:
            raise UnsupportedError(f"{name}: the architecture {architecture} of GGUF has no such tensor")
        found[home] = stored

    for name, module in modules.items():
        if module.plan.input is not None:
            raise UnsupportedError(f"{name}: its input is quantized, and llama.cpp quantizes activations in its own "
                                   "way: use a weight-only recipe, such as qat.deploy.gguf.recipe()")
        if name == "lm_head" and module.plan.tied_to is not None:
            continue                                    # llama.cpp reads the table where there is no output.weight
        order = _order(name, module.weight_shape[0], config, architecture)

        def integers(name=name, module=module, order=order):
            return _blocks(name, module, order, ternary)

        def floats(module=module, order=order):
            return _floats(module.weight.detach()[order].to(module.float_dtype))

        add(f"{name}.weight", exactly(name, integers, floats, dequantize))
    for name, value in other_tensors(deployed, modules):
        add(name, _floats(value[_order(name.rpartition(".")[0], len(value), config, architecture)]))
    return found


def layer_names(architecture: str, blocks: int) -> dict[str, str]:
    """Names of weights in a file -> names of layers in transformers."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], blocks)
    layers = ["model.embed_tokens", "lm_head",
              *(f"model.layers.{block}.{layer}" for block in range(blocks) for layer in LAYERS)]
    return {f"{home}.weight": layer for layer in layers if (home := names.get_name(layer)) is not None}


def _order(name: str, rows: int, config: Any, architecture: str) -> Tensor:
    """The order in which the rows of a layer go into the file."""
    order = torch.arange(rows)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None or architecture not in INTERLEAVED:
        return order
    return order.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _floats(value: Tensor) -> Stored:
    """A tensor in floating point; vectors are float32, which holds all narrower numbers."""
    value = value.cpu().contiguous()
    if value.dim() < 2 or value.dtype == torch.float32:
        return value.float().numpy(), gguf.GGMLQuantizationType.F32
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
    return value.numpy(), gguf.GGMLQuantizationType.F16


def _blocks(name: str, module: QuantizedModule, order: Tensor, ternary: str) -> Stored:
    """The codes of a layer, its rows in ``order``, in blocks."""
    weight = module.quantized_weight()
    spec, (out, inputs) = weight.spec, tuple(weight.shape)
    if weight.zero_point is not None:
        raise UnsupportedError(f"{name}: its weight has a zero point, which these blocks lack: leave out symmetric: "
                               "false")
    if inputs % 32 or (spec.group_size or 32) % 32:
        raise UnsupportedError(f"{name}: blocks have 32 inputs, and one scale each; this layer has {inputs} inputs"
                               + (f" in groups of {spec.group_size}: use a group_size of 32 or a multiple"
                                  if spec.group_size else ": keep: float32"))
    scale = weight.scale * spec.fmt.unit
    d = scale.half()
    if not torch.equal(d.float(), scale):
        raise UnsupportedError(f"{name}: blocks have float16 scales, and those of this layer would be rounded: train "
                               "with scale_dtype: float16, as qat.deploy.gguf.recipe() says")
    levels = weight.levels().cpu()[order]
    d = (d.expand(out) if d.dim() == 0 else d).reshape(out, -1).cpu()[order]
    least, most = spec.fmt.levels(torch.tensor([spec.fmt.lo, spec.fmt.hi])).tolist()
    kind = "Q4_0" if least >= -8 and most <= 7 else "Q8_0"
    if spec.format == "ternary" and inputs % 256 == 0 and (spec.group_size or 256) % 256 == 0:
        kind = ternary
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    d = d.repeat_interleave(inputs // size // d.shape[1], dim=1)
    packed = PACKERS[kind](levels.view(out, -1, size), d.unsqueeze(-1).view(torch.uint8))
    return packed.reshape(out, -1).numpy(), gguf.GGMLQuantizationType[kind]


def _q8_0(levels: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, levels.view(torch.uint8)], -1)


def _q4_0(levels: Tensor, d: Tensor) -> Tensor:
    fields = (levels + 8).view(torch.uint8)
    return torch.cat([d, fields[..., :16] | fields[..., 16:] << 4], -1)


def _tq2_0(levels: Tensor, d: Tensor) -> Tensor:
    fields = (levels + 1).view(torch.uint8).unflatten(-1, (2, 4, 32))
    packed = fields[..., 0, :] | fields[..., 1, :] << 2 | fields[..., 2, :] << 4 | fields[..., 3, :] << 6
    return torch.cat([packed.flatten(-2), d], -1)


def _tq1_0(levels: Tensor, d: Tensor) -> Tensor:
    """Digits of base 3, the first the most significant, as a fraction of 243 in 256ths, rounded up."""
    digits = (levels + 1).to(torch.int32)
    first, second, last = digits.split([160, 80, 16], -1)
    weights = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32).unsqueeze(-1)
    numbers = torch.cat([(first.unflatten(-1, (5, 32)) * weights).sum(-2),
                         (second.unflatten(-1, (5, 16)) * weights).sum(-2),
                         (last.unflatten(-1, (4, 4)) * weights[:4]).sum(-2)], -1)
    return torch.cat([((numbers * 256 + 242) // 243).to(torch.uint8), d], -1)


PACKERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "TQ2_0": _tq2_0, "TQ1_0": _tq1_0}
"""Levels (out, blocks, size) and scales (out, blocks, 2) as bytes to the bytes of the blocks."""


# -------------------------------------------------------------------------------------------------- metadata


def _describe(writer: gguf.GGUFWriter, config: Any, types: Counter[str]) -> None:
    """What the runtime must know to build the model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    if _rope(config).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    main = next((kind for kind, _ in types.most_common() if kind in FILE_TYPES), "F32")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(main, "ALL_F32")])


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _rope_frequencies(config: Any) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by (Llama 3.1 and later); None where they are as they are.

    Raises:
        UnsupportedError: another scaling, a part of the channels, another activation function.
    """
    if config.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act {config.hidden_act!r}: GGUF's Llama-like architectures compute silu")
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"rotary embedding {rope}: this exporter writes rope_type default, linear and llama3 "
                               "over all channels of a head")
    if kind != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for channel in range(0, head_dim, 2):
        turns = length / (2 * math.pi * rope["rope_theta"] ** (channel / head_dim))     # in the length trained on
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


# -------------------------------------------------------------------------------------------------- tokenizer


def _read_tokenizer(folder: Path, size: int, pre: str | None) -> Any:
    """What writes the tokenizer of a folder into a file.

    Raises:
        CheckpointError: no readable ``tokenizer.json`` there.
        UnsupportedError: a tokenizer that llama.cpp has not.
    """
    try:
        data = json.loads((folder / "tokenizer.json").read_bytes())
        model, added = data["model"], data.get("added_tokens") or []
        vocabulary: dict[str, int] = dict(model["vocab"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"source={str(folder)!r} has no readable tokenizer.json: {error}") from None
    if model.get("type") != "BPE":
        raise UnsupportedError(f"a {model.get('type')} tokenizer: this exporter writes BPE tokenizers; leave out "
                               "source= for a file without tokenizer")
    pieces = bool(model.get("byte_fallback"))
    split = "default" if pieces else pre or _split(data.get("pre_tokenizer") or {})
    texts: dict[int, str] = {number: text for text, number in vocabulary.items()}
    kinds: dict[int, int] = {}
    for token in added:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
    if max(texts) >= size:
        raise UnsupportedError(f"the tokenizer has {max(texts) + 1} tokens, the model {size}")
    if pieces:
        kinds |= {number: gguf.TokenType.BYTE for number, text in texts.items()
                  if len(text) == 6 and text.startswith("<0x") and text.endswith(">")}
        if model.get("unk_token") in vocabulary:
            kinds[vocabulary[model["unk_token"]]] = gguf.TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or []):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ", 1)), rank)
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=size)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama" if pieces else "gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
        if pieces:          # pieces are joined by greatest score: in the order of the merges
            writer.add_token_scores([-float(ranks.get(texts.get(number, ""), len(ranks))) for number in range(size)])
        writer.add_token_types([kinds.get(number, gguf.TokenType.NORMAL if number in texts else gguf.TokenType.UNUSED)
                                for number in range(size)])
        special.add_to_gguf(writer, quiet=True)

    return add


def _split(pre_tokenizer: dict[str, Any]) -> str:
    """What llama.cpp calls a way to split text into words."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if len(patterns) == 1 and patterns[0] in SPLITS:
        return SPLITS[patterns[0]]
    if not patterns and [step.get("type") for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise UnsupportedError("it cannot be told from tokenizer.json how llama.cpp should split text into words: give "
                           "pre=, such as 'llama-bpe' or 'qwen2'")
