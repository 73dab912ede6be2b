"""Where the shapes of a model come from: a count, a configuration, headers of files, or a module. No value is read.

Exact shapes come before estimates, and :attr:`~qat.deploy.memory.Contents.source` says which it was:

1. a deployed directory: its manifest;
2. ``*.safetensors``: their headers (an index names the files where there are several);
3. a ``config.json`` and an installed transformers that knows its ``model_type``: the model on the meta device, built
   from this file alone: nothing is downloaded, and no code that the file names is run;
4. a ``config.json`` alone: an estimate from the numbers that the families call by many names;
5. a count.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qat.deploy.checkpoint import MANIFEST, file_names, read_manifest
from qat.deploy.configurations import (
    KEYS,
    NAMED_BY_USER,
    described_by,
    estimate,
    text_section,
    transformer_of,
    with_notes,
)
from qat.deploy.memory import Contents, Weight, positive
from qat.errors import CheckpointError, ConfigError
from qat.modules.base import quantized_type

CONFIG = "config.json"
SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT = re.compile(r"([+-]?\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)")
VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
               "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
"""Bytes of one value by the name of its type in a safetensors header."""
OWN = ("weight_codes", "weight_scale", "weight_zero_point")
"""Tensors that stand for a weight in a deployed directory."""

def read_contents(plan: object, given: Mapping[str, int | None] | None = None) -> Contents:
    """What is known about ``plan``: a count (``175B``, ``1.5e9``, 7000000000), a file or a directory.

    Args:
        given: numbers of :data:`NAMED_BY_USER` that complete or replace those found.

    Raises:
        ConfigError: none of these; a file that is missing or damaged; a number that means nothing.
    """
    numbers = _checked(given)
    path = Path(plan) if isinstance(plan, str) else None
    count = _count(plan)
    if count is not None:
        return from_count(f"{count:,} parameters", count, numbers)
    if path is None or not path.exists():
        raise ConfigError(f"plan={plan}: there is no such file or directory, and it is not a count such as 175B, 1.5e9 "
                          "or 7000000000.")
    if path.name == MANIFEST:
        path = path.parent
    try:
        if path.is_dir():
            return _of_directory(path, numbers)
        if path.suffix == ".safetensors":
            return _of_files([path], path, path.parent / CONFIG, numbers)
        return from_config(_read_json(path), str(path), numbers)
    except CheckpointError as error:
        raise ConfigError(f"plan={plan}: {error}.") from error
    except OSError as error:
        raise ConfigError(f"plan={plan}: {error.strerror or error}.") from error


def _checked(given: Mapping[str, int | None] | None) -> dict[str, int]:
    numbers = {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in numbers.items():
        if key not in NAMED_BY_USER or not positive(value):
            raise ConfigError(f"{key} must be a whole number of at least 1, not {value!r}.")
    return numbers


def _count(plan: object) -> int | None:
    """The number that ``plan`` says; None for something that is not a number."""
    if isinstance(plan, bool) or not isinstance(plan, int | float | str):
        raise ConfigError(f"plan={plan}: give a count such as 175B, a config.json or a directory.")
    text = str(plan).strip()
    found = COUNT.fullmatch(text)
    suffix = found[2].upper() if found else ""
    if found is None or (suffix and suffix not in SUFFIXES and Path(text).exists()):
        if isinstance(plan, float):  # nan and infinity
            raise ConfigError(f"plan={plan}: a count of parameters is a positive number.")
        return None
    if suffix and suffix not in SUFFIXES:
        raise ConfigError(f"plan={plan}: {found[2]!r} is no unit of a count; units are {', '.join(SUFFIXES)} "
                          "(thousand, million, billion, trillion).")
    value = Decimal(found[1].replace("_", "")) * SUFFIXES.get(suffix, 1)
    if not 0 < value < 10**18 or value != int(value):
        raise ConfigError(f"plan={plan}: a count of parameters is a positive whole number.")
    return int(value)


def _of_directory(path: Path, numbers: Mapping[str, int]) -> Contents:
    if (path / MANIFEST).is_file():
        return _of_deployed(path, numbers)
    files = _weight_files(path)
    if files:
        return _of_files(files, path, path / CONFIG, numbers)
    if (path / CONFIG).is_file():
        return from_config(_read_json(path / CONFIG), str(path), numbers)
    raise ConfigError(f"plan={path}: this directory holds no {MANIFEST}, no {CONFIG}, no *.safetensors and no run.")


def _weight_files(path: Path) -> list[Path]:
    """The files of one set of weights: those of an index, ``model.safetensors``, or all."""
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        index = next((i for i in indices if i.name.startswith("model.")), indices[0])
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
            raise ConfigError(f"{index} is damaged: weight_map does not name files beside it.")
        files = [path / name for name in sorted(set(names.values()))]
        if missing := [f.name for f in files if not f.is_file()]:
            raise ConfigError(f"{index} names {', '.join(missing[:4])}, which is not there.")
        return files
    whole = path / file_names(1)[0]
    return [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------- headers


Header = dict[str, tuple[tuple[int, ...], str]]
"""Name -> shape and type of a tensor."""


def read_headers(files: Iterable[Path]) -> Header:
    """Shapes and types of all tensors in ``files``, without reading one.

    Raises:
        ConfigError: a damaged file.
    """
    found: Header = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    one = tensors.get_slice(name)
                    found[name] = tuple(one.get_shape()), one.get_dtype()
        except SafetensorError as error:
            raise ConfigError(f"{file} is damaged: {error}.") from error
    return found


def _of_files(files: list[Path], path: Path, config: Path, numbers: Mapping[str, int]) -> Contents:
    """The tensors of ``files``; where they are packed codes already, the shapes come from the configuration."""
    header = read_headers(files)
    if not header:
        raise ConfigError(f"plan={path}: there are no tensors in {', '.join(f.name for f in files[:4])}.")
    settings = _read_json(config) if config.is_file() else {}
    size = sum(math.ceil(math.prod(shape) * value_bytes(kind)) for shape, kind in header.values())
    names = {kind for _, kind in header.values()}
    stored = (f"stored ({'/'.join(sorted(names))})" if len(names) < 3 else "stored", size, 0)
    if any(_is_matrix(shape) and kind.startswith(("I", "U")) for shape, kind in header.values()):
        note = "The files hold packed codes, which do not say their shapes: precisions are reckoned from config.json."
        if not settings:
            raise ConfigError(f"plan={path}: the files hold packed codes, and without a {CONFIG} beside them nothing "
                              "says what they stand for.")
        return with_notes(from_config(settings, str(path), numbers), stored=stored, notes=(note,))
    several = f" of {len(files)} files" if len(files) > 1 else ""
    found = Contents(str(path), f"exact: safetensors headers{several}", (), stored=stored)
    found = described_by(found, _beside(config), numbers)
    vocabulary = found.transformer.vocabulary if found.transformer else 0
    return replace(found, weights=tuple(_classified(header, vocabulary)))


def value_bytes(kind: str) -> float:
    """Bytes of one value of a type of safetensors headers; sub-byte types are named by their bits.

    >>> value_bytes("BF16"), value_bytes("F4")
    (2, 0.5)
    """
    if kind in VALUE_BYTES:
        return VALUE_BYTES[kind]
    bits = re.match(r"[A-Z]+(\d+)", kind)
    if bits is None:
        raise ConfigError(f"the type {kind} of a tensor is unknown.")
    return int(bits[1]) / 8


def _classified(header: Header, vocabulary: int) -> Iterator[Weight]:
    """A weight for each tensor, with the roles that names and shapes tell.

    Embeddings and heads are what lies outside of numbered blocks, or has a row for each word. The first layer is the
    first matrix of the first block, with what makes queries in front.
    """
    matrices = [n for n, (shape, kind) in header.items() if _is_matrix(shape) and kind.startswith(("F", "BF"))]
    numbered = [n for n in matrices if re.search(r"\.\d+\.", f".{n}")]
    outside = set(matrices) - set(numbered)
    words = {n for n in matrices if vocabulary and header[n][0][0] == vocabulary}
    edges = outside | words
    inside = sorted((n for n in numbered if n not in edges), key=_natural)
    if inside:
        block = re.split(r"(?<=\.\d)\.", inside[0])[0]
        head = [n for n in inside if n.startswith(f"{block}.")] or inside[:1]
        edges.add(min(head, key=lambda n: (not re.search(r"(^|[._])q", n.removeprefix(block)), "att" not in n,
                                           _natural(n))))
    if not outside and inside:
        edges.add(inside[-1])
    for name, (shape, kind) in header.items():
        role = "float" if name not in matrices else "edge" if name in edges else "matrix"
        floating = kind.startswith(("F", "BF"))
        bias = header.get(f"{name.removesuffix('weight')}bias")
        yield Weight(name, math.prod(shape), _inputs(name, shape, None if bias is None else bias[0]), role,
                     value_bytes(kind), _is_expert(name), floating)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[0] > 1 and math.prod(shape) > shape[0]


def _is_expert(name: str) -> bool:
    """Whether a weight belongs to one of several experts, by its dotted name (``shared_expert`` does not)."""
    return any(part in ("experts", "local_experts") for part in name.split("."))


def _inputs(name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> int:
    """Length of a row: (out, in, ...); (in, out) where the bias says so; (experts, out, in)."""
    if len(shape) < 2:
        return max(1, math.prod(shape))
    if _is_expert(name) and len(shape) == 3:
        return max(1, shape[-1])
    if len(shape) == 2 and bias == (shape[1],) and shape[0] != shape[1]:
        return max(1, shape[0])
    return max(1, math.prod(shape[1:]))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which block 10 comes after block 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


# ---------------------------------------------------------------------------------------------------- modules


def weights_of(model: nn.Module, kept_bytes: float | None = None) -> list[Weight]:
    """The weights of a float model, on whatever device (``meta`` too), with the roles that ``prepare`` gives.

    Shared ones are listed once. Edges are embeddings, what shares their weight, and the first and the last layer in
    the order of definition.

    Args:
        kept_bytes: of one value that stays floating point; None: as the model has it.
    """
    found: dict[int, tuple[str, nn.Module, torch.Tensor]] = {}
    for name, module in model.named_modules():
        temporary = module._non_persistent_buffers_set
        for key, value in (*module._parameters.items(),
                           *((k, b) for k, b in module._buffers.items() if k not in temporary)):
            if value is not None:
                found.setdefault(id(value), (f"{name}.{key}".lstrip("."), module, value))
    layers = [i for i, (_, module, value) in found.items()
              if isinstance(value, nn.Parameter) and not isinstance(module, nn.Embedding) and _is_layer(module, value)]
    edges = {i for i, (_, module, _) in found.items() if isinstance(module, nn.Embedding)}
    tied = any(isinstance(m, nn.Linear) and id(m.weight) in edges for m in model.modules())
    edges |= set(layers[:1] if tied else layers[:1] + layers[-1:])
    weights = []
    for i, (name, module, value) in found.items():
        shape = tuple(value.shape)
        role = "edge" if i in edges else "matrix" if i in layers else "float"
        outputs = next((getattr(module, a) for a in ("out_features", "out_channels", "num_embeddings", "nf")
                        if positive(getattr(module, a, None))), None)
        inputs = value.numel() // outputs if role != "float" and outputs else _inputs(name, shape, None)
        floating = value.is_floating_point()
        size = value.element_size() if kept_bytes is None or not floating else kept_bytes
        weights.append(Weight(name, value.numel(), max(1, inputs), role, size, _is_expert(name), floating))
    return weights


def from_module(model: nn.Module, title: str, source: str, config: Mapping[str, Any] | None = None,
                given: Mapping[str, int | None] | None = None, kept_bytes: float | None = None) -> Contents:
    """The contents of a float model.

    Args:
        config: numbers about it under the names of :data:`KEYS`.
        given: as for :func:`read_contents`.
        kept_bytes: as for :func:`weights_of`.
    """
    found = described_by(Contents(title, source, tuple(weights_of(model, kept_bytes))), config or {}, _checked(given))
    if lacking := _unquantized(model):
        found = with_notes(found, notes=(f"{', '.join(lacking)}: without a quantized form in this package yet; their "
                                    "matrices are counted as quantized.",))
    return found


def _is_layer(module: nn.Module, value: torch.Tensor) -> bool:
    if value.dim() < 2:
        return False
    return quantized_type(module) is not None or _is_matrix(tuple(value.shape))


def _unquantized(model: nn.Module) -> list[str]:
    """Types of modules with weights of two and more dimensions that ``prepare`` has no quantized form of yet."""
    inside = set()
    for module in model.modules():
        if quantized_type(module) is not None:
            inside |= {id(m) for m in module.modules()}
    return sorted({type(m).__name__ for m in model.modules() if id(m) not in inside
                   and any(p is not None and _is_matrix(tuple(p.shape)) for p in m._parameters.values())})


def _completed(config: Mapping[str, Any]) -> Any:
    """The configuration as an object of transformers, which knows the defaults of its family; or why there is none."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed"
    kinds: Mapping[str, Any] = transformers.CONFIG_MAPPING
    name = config.get("model_type")
    if not isinstance(name, str) or name not in kinds:
        return f"transformers does not know model_type {name!r}"
    try:
        with _offline():
            return kinds[name].from_dict(_description(config))
    except Exception as error:
        return _refusal(error)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is downloaded meanwhile, whatever a configuration may refer to."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _description(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what asks for other code, kernels, values or a quantization: architecture alone."""
    kept = {k: _description(v) if isinstance(v, dict) else v for k, v in config.items()
            if k not in ("quantization_config", "auto_map") and not k.startswith("_")
            and not k.endswith("_implementation")}
    return {**kept, "use_pretrained_backbone": False} if "use_pretrained_backbone" in kept else kept


def _refusal(error: Exception) -> str:
    """What foreign code says to a configuration that it cannot use, whatever the class of its error."""
    return f"transformers could not use it: {(str(error).strip() or repr(error)).splitlines()[0].rstrip('.')}"


def _built(described: Any) -> nn.Module | str:
    """The model that a configuration of transformers describes, on the meta device; or why there is none."""
    if isinstance(described, str):
        return described
    import transformers

    wanted = [getattr(transformers, str(name), None) for name in described.architectures or ()]
    classes = [c for c in wanted if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
    general = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    try:
        with torch.device("meta"), _offline():
            if classes:
                return classes[0](described)
            return next(k for k in general if type(described) in k._model_mapping).from_config(described)
    except StopIteration:
        return f"transformers has no model for model_type {described.model_type!r}"
    except Exception as error:
        return _refusal(error)


def _beside(path: Path) -> Mapping[str, Any]:
    """What a ``config.json`` beside the weights says about the transformer; {} where there is none."""
    if not path.is_file():
        return {}
    config = _read_json(path)
    return _settings(config, _completed(config)) or {}


def _settings(config: Mapping[str, Any], described: Any) -> Mapping[str, Any] | None:
    """The section about text, completed by the defaults of its family where transformers knows them."""
    text = text_section(config)
    if isinstance(described, str):
        return text
    own = described.to_dict()
    return {**(text or {}), **(text_section(own) or {})} or None


# ------------------------------------------------------------------------------------------- deployed directories


def _of_deployed(path: Path, numbers: Mapping[str, int]) -> Contents:
    """A deployed directory: what is stored, and the shapes that the codes stand for."""
    manifest = read_manifest(path)
    aliases = manifest["aliases"]
    weights, stored, scales = [], 0, 0
    try:
        plans = dict(_plans(manifest["plan"]["layers"]))
        for name, shape in manifest["weight_shapes"].items():
            plan, key = plans[name], f"{name}.{OWN[0]}".lstrip(".")
            if key not in manifest["tensors"] or key in aliases:
                continue
            eight = plan["kind"] == "Embedding" or str(plan.get("reason", "")).startswith("edge")
            weights.append(Weight(name, math.prod(shape), max(1, math.prod(shape[1:])), "edge" if eight else "matrix"))
        for name, entry in manifest["tensors"].items():
            kind, shape = getattr(torch, entry["dtype"]), entry["shape"]
            size, own = math.prod(shape) * kind.itemsize, name.rpartition(".")[2]
            of_quantizers = "quantizer." in name or own in OWN[1:]
            stored, scales = stored + size * (not of_quantizers), scales + size * of_quantizers
            if not of_quantizers and own not in OWN:
                weights.append(Weight(name, math.prod(shape), max(1, math.prod(shape[1:])), "float", kind.itemsize,
                                      floating=kind.is_floating_point))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path / MANIFEST} is damaged: {error!r}.") from error
    found = Contents(str(path), "exact: the manifest of the deployed model", tuple(weights),
                     stored=("deployed", stored, scales))
    return described_by(found, _beside(path / CONFIG), numbers)


def _plans(layers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, plan in layers.items():
        full = f"{prefix}.{name}".lstrip(".")
        yield full, plan
        yield from _plans(plan.get("parts") or {}, full)


# ---------------------------------------------------------------------------------------------------- configurations


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; :class:`ConfigError` names the file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a configuration: it holds a {type(content).__name__}, not an object.")
    return content


def from_config(config: Mapping[str, Any], title: str, numbers: Mapping[str, int] | None = None) -> Contents:
    """The contents of the model that a ``config.json`` describes: built by transformers, or estimated.

    Raises:
        ConfigError: it has no number of layers or no width; a number that means nothing.
    """
    numbers = numbers or {}
    text = text_section(config)
    dtype = next((config[k] for k in ("dtype", "torch_dtype") if isinstance(config.get(k), str)), None)
    if dtype is None and text is not None:
        dtype = next((text[k] for k in ("dtype", "torch_dtype") if isinstance(text.get(k), str)), "float32")
    kind = getattr(torch, str(dtype).removeprefix("torch."), torch.float32)
    size = kind.itemsize if isinstance(kind, torch.dtype) else 4
    if text is not None:
        described_by(Contents(title, "", ()), text, numbers)      # wrong numbers are said before anything is built
    described = _completed(config)
    text = _settings(config, described) or config
    model = _built(described) if not numbers else "numbers were given beside it"
    if isinstance(model, nn.Module):
        return from_module(model, title, "exact: built by transformers on the meta device", text, numbers, size)
    one = transformer_of(text, numbers)
    if one is None:
        wanted = " or ".join(", ".join(KEYS[key][:3]) for key in ("layers", "hidden"))
        raise ConfigError(f"{title}: {CONFIG} says neither how many layers nor how wide ({wanted}), and {model}.")
    found = described_by(Contents(title, f"estimate from {CONFIG} ({model})", ()), text, numbers)
    notes: tuple[str, ...] = ()
    counted = text_section(config)
    if counted is not config and any(isinstance(v, dict) and v is not counted and text_section(v)
                                     for v in config.values()):
        notes = ("The estimate counts the text model alone, not the other parts of the configuration.",)
    return with_notes(replace(found, weights=tuple(estimate(one, text, size))), notes=notes)


# ---------------------------------------------------------------------------------------------------- counts


def usual_shape(parameters: int) -> tuple[int, int]:
    """(layers, hidden) of a decoder of the usual proportions: an estimate, for words only.

        parameters = 12 * layers * hidden ** 2      hidden = 128 * layers

    >>> usual_shape(175 * 10**9)
    (96, 12288)
    """
    layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    return layers, 128 * layers


def from_count(title: str, parameters: int, numbers: Mapping[str, int] | None = None) -> Contents:
    """A model of which only the size is known, and perhaps some ``numbers``.

    All parameters count as matrices at the width asked for: two thirds read ``hidden`` inputs, one third
    ``intermediate``. With ``vocabulary`` the two tables of words are edges.
    """
    numbers = numbers or {}
    layers, hidden = usual_shape(parameters)
    width = numbers.get("hidden", hidden)
    wide = numbers.get("intermediate", 4 * width)
    words = 2 * numbers.get("vocabulary", 0) * numbers.get("hidden", 0)
    if words >= parameters:
        raise ConfigError(f"plan={title}: the tables of {numbers['vocabulary']:,} words of {width:,} values alone are "
                          f"{words:,} parameters.")
    rest = parameters - words
    third = rest // 24 * 8                                      # whole bytes at each width
    weights = [Weight("read hidden", rest - third, width), Weight("read intermediate", third, wide)]
    if words:
        weights.append(Weight("words", words, width, "edge"))
    exact = "hidden" in numbers
    found = described_by(Contents(title, "a count of parameters alone" if not numbers else
                                "a count of parameters and the numbers given", tuple(weights), estimated=not exact),
                       {}, numbers)
    notes = ["A count says nothing of norms and 8-bit edges: all parameters are reckoned at each width."]
    if not words:
        notes = [f"{notes[0][:-1]} (hidden= and vocabulary= set the tables of words apart)."]
    if not exact:
        notes.append(f"~ estimated: with usual proportions it would have about {layers} layers of {hidden:,}.")
    return with_notes(found, notes=tuple(notes))
