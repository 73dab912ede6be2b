"""Deployed checkpoints: a directory with ``model.safetensors`` and ``manifest.json``.

Large models have several files of tensors, ``model-00001-of-00003.safetensors`` and so on. The manifest holds the plan,
recipe, coverage, certificate, tensor shapes and the SHA-256 of the files; no times and no paths, so saving twice gives
the same bytes. Loading executes nothing from the files.

Saving writes a temporary directory beside the target, syncs it, and exchanges the two in one step: killed at any
moment, either the old checkpoint is there or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from qat.compression.adapters import merge_adapters
from qat.compression.channels import pruned_shapes, take_shapes
from qat.deploy.convert import drop_folded, share_codes
from qat.deploy.files import check_file, new_folder, write_synced
from qat.errors import CheckpointError, PrepareError, QuantizationError
from qat.modules.base import QuantizedModule
from qat.modules.precision import NarrowFloat
from qat.numerics import packing
from qat.planning import Plan
from qat.quantizers.quantizer import FrozenQuantizer
from qat.recipe import Recipe
from qat.rewriter import Prepared, carry_out, coverage, is_prepared, prepared_state, quantized_modules
from qat.tracing import Call

VERSION = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 256 * 2**20
SHARD = 4 * 2**30
"""Bytes of tensors after which another file is begun."""


def save(deployed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a deployed model to the directory ``path``.

    An existing checkpoint there is replaced in one step; any other existing directory is left alone.

    Raises:
        CheckpointError: the model is not deployed; ``path`` is something else already; the disk is full or read-only.
    """
    if not is_prepared(deployed) or any(not m.frozen for m in quantized_modules(deployed).values()
                                        if m.plan.weight is not None):
        raise CheckpointError("only deployed models are saved: deployed, certificate = qat.convert(model, batches)")
    tensors, aliases = _unique_tensors(deployed)
    parts = list(shards(tensors))
    with new_folder(Path(path), is_checkpoint) as folder:
        files = {name: write_tensors(folder / name, {key: tensors[key] for key in keys})
                 for name, keys in zip(file_names(len(parts)), parts)}
        homes = {key: name for name, keys in zip(files, parts) for key in keys}
        entries = {key: entry(value, homes[key]) for key, value in tensors.items()}
        write_synced(folder / MANIFEST, manifest_text(deployed, entries, aliases, files))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one that :func:`save` wrote."""
    return (folder / MANIFEST).exists()


def shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names of the tensors of each file; at least one file, if only an empty one."""
    shard: list[str] = []
    size = 0
    for name, value in tensors.items():
        if shard and size + value.nbytes > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += value.nbytes
    yield shard


def file_names(count: int) -> list[str]:
    """The names of so many files of tensors."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def tensor_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of tensors of a deployed checkpoint, as its manifest names them."""
    return [Path(path) / name for name in read_manifest(path)["files"]]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and sync a file of tensors; what a manifest says of it."""
    data = to_safetensors(dict(tensors), {"format": "pt"})
    write_synced(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def entry(value: Tensor, file: str) -> dict[str, Any]:
    """What a manifest says of a tensor."""
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "file": file}


def manifest_text(deployed: nn.Module, tensors: Mapping[str, Any], aliases: Mapping[str, str],
                  files: Mapping[str, Any]) -> bytes:
    """The manifest of a deployed model."""
    state = prepared_state(deployed)
    proof = deployed.__dict__.get("_qat_certificate")
    content = {
        "format": "qat", "version": VERSION, "torch": torch.__version__.split("+")[0],
        "recipe": state.recipe.to_dict(), "plan": state.plan.to_dict(), "coverage": coverage(deployed).to_dict(),
        "certificate": proof, "macs": state.macs, "notes": state.notes,
        "functions": [[c.owner, c.function, c.macs, c.parameters] for c in state.functions or ()],
        "tensors": tensors, "files": files,
        "weight_shapes": {n: list(m.weight_shape) for n, m in quantized_modules(deployed).items() if m.frozen},
        "pruned_shapes": pruned_shapes(deployed),
        "aliases": aliases,
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each shared tensor once, and the other names of the shared ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, not a tensor: a checkpoint holds tensors only")
        key = (value.data_ptr(), value.numel(), tuple(value.stride()))
        if value.numel() and key in owner:
            aliases[name] = owner[key]
            continue
        owner[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def load(path: str | os.PathLike[str], skeleton: nn.Module) -> nn.Module:
    """The deployed model in the directory ``path``.

    Args:
        skeleton: a float model of the same architecture; its weights are not used, and it is not changed. Of a model
            whose channels were pruned, the architecture before that: the smaller shapes are in the manifest.

    Raises:
        CheckpointError: a damaged, incomplete or unsafe file, another version, or another architecture; the message
            names the tensor.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    values = _read_tensors(folder, manifest)
    try:
        recipe, plan = Recipe.from_dict(manifest["recipe"]), Plan.from_dict(manifest["plan"])
        if is_prepared(skeleton):
            raise PrepareError("the skeleton is prepared already: give the float architecture")
        model = take_shapes(merge_adapters(skeleton), manifest.get("pruned_shapes", {}))
        model = carry_out(model, plan).eval()
    except (QuantizationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} does not fit this architecture: {error}") from None
    modules = quantized_modules(model)
    for module in modules.values():
        module.skeleton()
    share_codes(modules)
    for part in model.modules():
        if isinstance(part, NarrowFloat):
            part.skeleton()
    drop_folded(model)
    for name, owner in manifest["aliases"].items():
        if owner in values:
            values[name] = values[owner]
    _assign(model, values, folder)
    _tie(model, manifest["aliases"])
    share_codes(modules)
    for name, module in modules.items():
        _check_codes(name, module)
    functions = [_function(*entry) for entry in manifest["functions"]]
    model.__dict__["_qat"] = Prepared(recipe, plan, functions, dict(manifest["macs"]), dict(manifest["notes"]))
    model.__dict__["_qat_certificate"] = manifest["certificate"]
    return model.requires_grad_(False)


def _function(owner: str, function: str, macs: int, parameters: list[str]) -> Call:
    return Call(None, function, owner, [], [], 0, macs, parameters)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged, too large, or of another version.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes: too large for a manifest")
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; a checkpoint is a directory with {MANIFEST} and "
                              "model.safetensors") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "qat":
        raise CheckpointError(f"{path} is not the manifest of a qat checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')!r}; this package reads version {VERSION}")
    needed = {"recipe": dict, "plan": dict, "certificate": dict, "coverage": dict, "tensors": dict, "aliases": dict,
              "functions": list, "macs": dict, "notes": dict, "files": dict}
    for key, kind in needed.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path} is damaged: {key} is missing or not a {kind.__name__}")
    pruned = manifest.get("pruned_shapes", {})
    if not isinstance(pruned, dict) or not all(isinstance(shape, list) for shape in pruned.values()):
        raise CheckpointError(f"{path} is damaged: pruned_shapes are not lists by name")
    for name, about in manifest["files"].items():
        if not re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) or not isinstance(about, dict) or not (
                isinstance(about.get("bytes"), int) and isinstance(about.get("sha256"), str)):
            raise CheckpointError(f"{path} is damaged: {name!r} is not a file of tensors with its length and checksum")
    if not all(isinstance(said, dict) and said.get("file") in manifest["files"]
               for said in manifest["tensors"].values()):
        raise CheckpointError(f"{path} is damaged: not every tensor is in one of the files")
    if not all(isinstance(owner, str) for owner in manifest["aliases"].values()):
        raise CheckpointError(f"{path} is damaged: aliases are not names")
    if not all(isinstance(entry, list) and len(entry) == 4 for entry in manifest["functions"]):
        raise CheckpointError(f"{path} is damaged: functions are not lists of four")
    return manifest


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of all files."""
    values: dict[str, Tensor] = {}
    for name, about in manifest["files"].items():
        said = {key: value for key, value in manifest["tensors"].items() if value["file"] == name}
        values |= read_tensors(folder / name, about, said)
    return values


def read_tensors(path: Path, about: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, after length, checksum, names, types and shapes were found to be as a manifest says.

    Raises:
        CheckpointError: they are not.
    """
    try:
        check_file(path, about)
        with safe_open(path, framework="pt") as tensors:
            names = set(tensors.keys())
            if names != set(said):
                odd = sorted(names ^ set(said))
                raise CheckpointError(f"{path} and its manifest name different tensors: {', '.join(odd[:8])}")
            values = {name: tensors.get_tensor(name) for name in sorted(names)}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    for name, value in values.items():
        if entry(value, said[name]["file"]) != said[name]:
            raise CheckpointError(f"{path}: {name} is {value.dtype} {tuple(value.shape)}, the manifest says "
                                  f"{said[name]}")
    return values


def _assign(model: nn.Module, values: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(values)), sorted(set(values) - set(own))
    if missing or unexpected:
        raise CheckpointError(f"{folder} is for another architecture: missing {', '.join(missing[:8]) or 'nothing'}; "
                              f"unexpected {', '.join(unexpected[:8]) or 'nothing'}")
    for name, value in values.items():
        floats = own[name].is_floating_point() and value.is_floating_point()
        exact = not floats or "quantizer." in name or name.endswith("weight_scale")
        if exact and own[name].dtype != value.dtype:
            raise CheckpointError(f"{folder}: {name} is {value.dtype}, this architecture needs {own[name].dtype}")
        if own[name].shape != value.shape:
            raise CheckpointError(f"{folder}: {name} has shape {tuple(value.shape)}, this architecture needs "
                                  f"{tuple(own[name].shape)}")
    model.load_state_dict(values, strict=True, assign=True)


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Parameters that were shared are shared again: assigning them by name has made two of one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, owner in aliases.items():
        (where, _, key), (other, _, own) = name.rpartition("."), owner.rpartition(".")
        if where in modules and other in modules and modules[where]._parameters.get(key) is not None:
            modules[where]._parameters[key] = modules[other]._parameters.get(own, modules[where]._parameters[key])


def _check_codes(name: str, module: QuantizedModule) -> None:
    """Codes, scales and zero points lie where their formats say."""
    spec = module.plan.weight
    if spec is not None:
        if not bool(torch.isfinite(module.weight_scale).all()):
            raise CheckpointError(f"{name}.weight_scale is not finite")
        zero_point = module.weight_zero_point
        if zero_point is not None and bool(((zero_point < spec.fmt.lo) | (zero_point > spec.fmt.hi)).any()):
            raise CheckpointError(f"{name}.weight_zero_point is outside of {spec.fmt.lo}..{spec.fmt.hi}")
        try:
            packing.unpack(module.weight_codes, spec.fmt, module.weight_shape)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.weight_codes: {error}") from None
    for role, quantizer in module.activation_quantizers().items():
        if isinstance(quantizer, FrozenQuantizer):
            scale, zero_point, fmt = quantizer.scale, quantizer.zero_point, quantizer.spec.fmt
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise CheckpointError(f"{name}.{role}.scale must be positive")
            if quantizer.threshold is not None and not bool(torch.isfinite(quantizer.threshold).all()):
                raise CheckpointError(f"{name}.{role}.threshold is not finite")
            if zero_point is not None and bool(((zero_point < fmt.lo) | (zero_point > fmt.hi)).any()):
                raise CheckpointError(f"{name}.{role}.zero_point is outside of {fmt.lo}..{fmt.hi}")
