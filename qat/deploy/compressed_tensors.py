"""compressed-tensors: a folder that ``transformers`` and vLLM load as it is.

The folder holds ``config.json`` with a ``quantization_config``, ``model.safetensors`` (or shards and their index), what
belongs to tokenizer and generation. Codes and scales are those of the deployed model:

    pack-quantized   ``weight_packed`` int32 (out, ceil(in * bits / 32)): fields ``level + 2^(bits-1)`` of a row, the
                     first in the lowest bits; ``weight_shape`` int64 (2,): weight-only layers, and weights below 8 bits
    int-quantized    ``weight`` int8 (out, in): layers with integer activations, per token and dynamic or with one
                     static scale; embeddings, at any width
    both             ``weight_scale`` (out, in / group_size), (out, 1) or (1,), in the dtype of the model

Grids that are not affine go in as their levels: ternary and binary weights as 2 bits; mid-rise weights of b bits as
b + 1 bits, with half the scale.

The format: github.com/vllm-project/compressed-tensors, version 0.20.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.deploy.checkpoint import file_names, shards, write_tensors
from qat.deploy.files import write_synced
from qat.deploy.weights import exactly, other_tensors, weight_layers
from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.modules.base import QuantizedModule
from qat.numerics import packing
from qat.numerics.formats import get_format
from qat.quantizers.quantizer import FrozenQuantizer
from qat.rewriter import quantized_modules

TARGETS = ("transformers", "vllm")
COPIED = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
          "generation_config.json", "*.model")
"""Files of the float model's folder that go along."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one."""

Scheme = dict[str, Any]


def write(deployed: nn.Module, path: Path, example_inputs: Any = None, target: str | None = None, *,
          source: str | os.PathLike[str] | None = None, dequantize: bool | Iterable[str] = False) -> list[str]:
    """Fill the empty folder ``path``; returns what a user must know of it, for the card.

    Args:
        deployed: a model of transformers, whose ``config`` is written too.
        example_inputs: not needed.
        target: ``transformers``: whatever it loads. ``vllm``: what vLLM runs too: 4 and 8 bits, no integer embedding.
            None is ``transformers``.
        source: folder of the float model, whose tokenizer and generation files are copied.
        dequantize: layers that the format or target lacks are written in floating point, with the values of their
            codes: True for all of them, or globs of their names. The card lists them. Layers whose inputs are quantized
            are refused all the same.

    Raises:
        UnsupportedError: what cannot be written exactly, with the layer's name and the remedy.
        CheckpointError: ``source`` is no folder.
    """
    if target not in (None, *TARGETS):
        raise UnsupportedError(f"unknown target {target!r}{nearest(str(target), TARGETS)}; targets of this format are "
                               f"{', '.join(TARGETS)}")
    config = getattr(deployed, "config", None)
    if not hasattr(config, "to_diff_dict"):
        raise UnsupportedError(f"{type(deployed).__name__} is not a model of transformers: compressed-tensors folders "
                               "are loaded by its config; use another format, or qat.save")
    layers, floats, tensors = _layers(deployed, target or "transformers", dequantize)
    settings = _config(deployed, config, layers)
    extra = _copied(deployed, source)
    for name, origin in extra.items():
        write_synced(path / name, origin if isinstance(origin, bytes) else origin.read_bytes())
    write_synced(path / "config.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    _write_shards(path, tensors)
    return _notes(deployed, floats, layers)


# -------------------------------------------------------------------------------------------------- layers


def _layers(deployed: nn.Module, target: str, dequantize: bool | Iterable[str],
            ) -> tuple[dict[str, Scheme], list[str], dict[str, Tensor]]:
    """The schemes of quantized layers, the names of dequantized ones, and all tensors of the file."""
    modules = weight_layers(deployed)
    dtype = _dtype(modules)
    schemes: dict[str, Scheme] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        inputs, own = _inputs(name, module, dtype, target)

        def integers(name=name, module=module, inputs=inputs):
            return _weight(name, module, inputs, dtype, target)

        def floats(module=module):
            return None, {"weight": module.weight.to(module.float_dtype)}

        scheme, weight = exactly(name, integers, floats, dequantize if inputs is None else False)
        if scheme is not None:
            schemes[name] = scheme
        tensors |= {f"{name}.{key}": value for key, value in (own | weight).items()}
    if not schemes:
        raise UnsupportedError("no layer of this model would be integers in the file: save the float model instead")
    if target == "vllm":
        _check_fused(deployed, schemes, tensors)
    tensors |= dict(other_tensors(deployed, modules))
    tensors = {name: value.cpu().contiguous() for name, value in sorted(tensors.items())}
    return schemes, [name for name in modules if name not in schemes], tensors


def _check_fused(deployed: nn.Module, schemes: Mapping[str, Scheme], tensors: Mapping[str, Tensor]) -> None:
    """Layers that vLLM makes one of have one scheme, and quantize the input that they share in one way.

    Raises:
        UnsupportedError: they have not.
    """
    for owner, module in deployed.named_modules():
        for together in FUSED:
            names = [f"{owner}.{name}".lstrip(".") for name in together
                     if isinstance(getattr(module, name, None), nn.Module)]
            if len(names) < 2:
                continue
            for name in names[1:]:
                if schemes.get(name) != schemes.get(names[0]):
                    raise UnsupportedError(f"{name}: vLLM computes {', '.join(names)} as one layer, and they are "
                                           "quantized in different ways: one rule for all of them")
                for key in ("input_scale", "input_zero_point"):
                    one, other = tensors.get(f"{names[0]}.{key}"), tensors.get(f"{name}.{key}")
                    if one is not None and other is not None and not torch.equal(one, other):
                        raise UnsupportedError(f"{name}: vLLM computes {', '.join(names)} as one layer, and the scales "
                                               "of their input differ: observe it instead of learning them, or use "
                                               "dynamic: true")


def _dtype(modules: Mapping[str, QuantizedModule]) -> torch.dtype:
    """The floating point type in which the model is loaded: that of its layers when they were float."""
    return Counter(m.float_dtype for m in modules.values()).most_common(1)[0][0] if modules else torch.float32


def _weight(name: str, module: QuantizedModule, inputs: dict[str, Any] | None, dtype: torch.dtype, target: str,
            ) -> tuple[Scheme | None, dict[str, Tensor]]:
    """Scheme and weight of one layer."""
    kind = module.plan.kind
    if kind == "Embedding" and target == "vllm":
        raise UnsupportedError(f"{name}: vLLM has no integer embeddings: keep: float32 in the recipe")
    weight = module.quantized_weight()
    spec = weight.spec
    if weight.zero_point is not None:
        raise UnsupportedError(f"{name}: its weight has a zero point; transformers loads symmetric weights only: leave "
                               "out symmetric: false")
    levels, scale = weight.levels(), weight.scale * spec.fmt.unit
    least, most = spec.fmt.levels(torch.tensor([spec.fmt.lo, spec.fmt.hi])).tolist()
    bits = 1 + max((-least - 1).bit_length(), most.bit_length())
    if target == "vllm":
        bits = 4 if bits <= 4 else 8
    kept = _kept(f"{name}: its scales are", scale, dtype, "weight")
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
               **({"strategy": "group", "group_size": spec.group_size} if spec.group_size else
                  {"strategy": "channel" if scale.dim() else "tensor"})}
    packed = kind == "Linear" and (bits < 8 or inputs is None)
    own = {"weight_scale": kept if kept.dim() == 2 else kept.reshape(-1, 1) if kept.dim() else kept.reshape(1)}
    own |= {"weight_packed": pack_rows(levels, bits), "weight_shape": torch.tensor(levels.shape)} if packed else {
        "weight": levels}
    return {"weights": weights, "input_activations": inputs, "output_activations": None,
            "format": "pack-quantized" if packed else "int-quantized", "kind": kind}, own


def _inputs(name: str, module: QuantizedModule, dtype: torch.dtype, target: str,
            ) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """How a layer's input is quantized, and the tensors that say it."""
    if module.plan.input is None:
        return None, {}
    spec, quantizer = module.plan.input.for_activation(), module.input_quantizer
    if not spec.fmt.has_zero or spec.format == "ternary" or not spec.fmt.signed or module.plan.absorbs:
        raise UnsupportedError(f"{name}: inputs of {spec.format} codes are not in the format"
                               + ("; the activation function in front is absorbed: prepare without example_inputs"
                                  if module.plan.absorbs else ": use input: {format: int8}"))
    if target == "vllm" and spec.bits != 8:
        raise UnsupportedError(f"{name}: vLLM runs 8-bit inputs, not {spec.format}: use input: {{format: int8}}")
    common = {"num_bits": spec.bits, "type": "int", "symmetric": bool(spec.symmetric)}
    if spec.dynamic:
        if not spec.symmetric:
            raise UnsupportedError(f"{name}: dynamic inputs with a zero point are not run by every loader: leave out "
                                   "symmetric: false")
        if spec.granularity not in ("per_token", "per_tensor"):
            raise UnsupportedError(f"{name}: {spec.granularity} inputs are not in the format: use per_token")
        return {**common, "strategy": "token" if spec.granularity == "per_token" else "tensor", "dynamic": True}, {}
    assert isinstance(quantizer, FrozenQuantizer)
    kept = _kept(f"{name}: the scale of its input is", quantizer.scale, dtype, "input")
    own: dict[str, Tensor] = {"input_scale": kept.reshape(1)}
    if not spec.symmetric:
        zero_point: Any = quantizer.zero_point
        own["input_zero_point"] = torch.as_tensor(zero_point, dtype=torch.int8).reshape(1)
    return {**common, "strategy": "tensor", "dynamic": False}, own


def _kept(whose: str, scale: Tensor, dtype: torch.dtype, role: str) -> Tensor:
    """Scales in the dtype in which loaders hold them, if that is exact."""
    kept = scale.to(dtype)
    if not torch.equal(kept.float(), scale):
        raise UnsupportedError(f"{whose} float32, and the model is loaded in {_called(dtype)}, which would round: "
                               f"train with scale_dtype: {_called(dtype)} in the {role}'s spec, or a float32 model")
    return kept


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack_rows(levels: Tensor, bits: int) -> Tensor:
    """Levels (out, in) as int32 words (out, ceil(in * bits / 32)); what is left of the last word is zero bits."""
    out, inputs = levels.shape
    fmt = get_format(f"int{bits}")
    rows = F.pad(levels, (0, -inputs % 32), value=fmt.lo)
    return packing.pack(rows, fmt).view(torch.int32).view(out, -1)[:, :-(-inputs * bits // 32)].contiguous()


# -------------------------------------------------------------------------------------------------- files


def _config(deployed: nn.Module, config: Any, layers: Mapping[str, Scheme]) -> dict[str, Any]:
    """``config.json``: the model's own, and how it is quantized.

    The commonest scheme of linear layers has the target ``Linear``; layers of all others are named, and names win. The
    head is named in any case: to vLLM its type is not ``Linear``.
    """
    find_head: Any = getattr(deployed, "get_output_embeddings", lambda: None)
    head = find_head()
    heads = [name for name in layers if deployed.get_submodule(name) is head]
    groups: dict[str, list[str]] = {}
    for name, scheme in layers.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
    linear = [key for key in groups if json.loads(key)["kind"] == "Linear"]
    main = max(linear, key=lambda key: len(groups[key]), default=None)
    config_groups = {}
    for number, key in enumerate(sorted(groups, key=lambda key: (key == main, groups[key]))):
        scheme = json.loads(key)
        del scheme["kind"]
        targets = ["Linear", *(n for n in groups[key] if n in heads)] if key == main else groups[key]
        config_groups[f"group_{number}"] = {"targets": targets, **scheme}
    formats = {group["format"] for group in config_groups.values()}
    ignore = [name for name, module in deployed.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    settings = dict(config.to_diff_dict())
    settings["architectures"] = settings.get("architectures") or [type(deployed).__name__]
    settings["dtype"] = _called(_dtype(weight_layers(deployed)))
    if _copies(deployed, layers) or heads:
        settings["tie_word_embeddings"] = False
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups, "ignore": ignore, "kv_cache_scheme": None, "global_compression_ratio": None,
    }
    return settings


def _copies(deployed: nn.Module, layers: Mapping[str, Scheme]) -> list[str]:
    """Layers that share the codes of another one; loaders tie floating point weights only, so each gets its own."""
    modules = quantized_modules(deployed)
    return [name for name in layers if modules[name].plan.tied_to is not None]


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    parts = list(shards(tensors))
    homes = dict(zip(file_names(len(parts)), parts))
    for file, names in homes.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
                 "weight_map": {name: file for file, names in homes.items() for name in names}}
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())


def _copied(deployed: nn.Module, source: str | os.PathLike[str] | None) -> dict[str, Path | bytes]:
    """What goes along: file name -> where it is, or what is in it."""
    found: dict[str, Path | bytes] = {}
    if (generation := getattr(deployed, "generation_config", None)) is not None:
        found["generation_config.json"] = generation.to_json_string().encode()
    if source is None:
        return found
    folder = Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"source={str(folder)!r} is not the folder of the float model")
    return found | {file.name: file for file in sorted(folder.iterdir())
                    if file.is_file() and any(fnmatch.fnmatchcase(file.name, glob) for glob in COPIED)}


def _notes(deployed: nn.Module, floats: list[str], layers: Mapping[str, Scheme]) -> list[str]:
    modules = quantized_modules(deployed)
    notes = [f"{name} was trained as {modules[name].plan.weight} and is written in floating point, with the values of "
             "its codes: this format has no integers for it." for name in floats]
    if copies := _copies(deployed, layers):
        notes.append(f"{', '.join(copies)}: shares its weight with another layer; here each has a copy of the codes, "
                     "and tie_word_embeddings is off, as loaders tie floating point weights only.")
    if any(scheme["input_activations"] for scheme in layers.values()):
        notes.append("Integer inputs: transformers computes these layers in floating point on quantized values, vLLM "
                     "on integers; they round elsewhere than the deployed model does, so outputs are close, not equal.")
    if any(scheme["input_activations"] is None for scheme in layers.values()):
        notes.append("Weight-only layers: the dequantized weights are those of the deployed model, bit for bit.")
    return notes
