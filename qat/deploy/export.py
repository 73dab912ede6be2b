"""``export``: a deployed model as a file or folder that another runtime loads, with the same integers.

Beside a file ``model.onnx`` lie its manifest, ``model.onnx.json``, and its card; a folder has ``export.json`` and
``README.md`` in it. The manifest holds format, target and options, the recipe, the certificate, and length and SHA-256
of each file; no times and no paths, so exporting twice gives the same bytes. :func:`verify` holds files against it.

The card of a file is ``README.md`` if that is free, or is the card that was written for this very file and not edited
since; else it is ``model.onnx.md``. What this package did not write is never replaced, the file itself apart.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from qat import targets
from qat.deploy.card import model_card
from qat.deploy.files import check_file, measured, new_files, new_folder, write_synced
from qat.deploy.weights import check_layers, weight_layers
from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.rewriter import is_prepared, prepared_state, quantized_modules

VERSION = 1
MANIFEST = "export.json"
"""In a folder. (``manifest.json`` is that of a deployed folder, which ``qat.load`` reads.)"""
LARGEST_MANIFEST = 64 * 2**20


class Format(NamedTuple):
    """One format.

    Attributes:
        module: it has a function ``write(deployed, path, example_inputs, target, **options)`` that writes the new file,
            or fills the empty folder, ``path``; it may return sentences for the model card. ``TARGETS``: the targets
            that it knows; without it, those of :mod:`qat.targets` that read ONNX. It is imported when it is asked for.
        extra: of this package, that it needs; None.
        suffix: of its file; None: it is a folder.
    """

    module: str
    extra: str | None
    suffix: str | None


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format("qat.deploy.compressed_tensors", "llm", None),
    "executorch": Format("qat.deploy.executorch_file", "executorch", ".pte"),
    "gguf": Format("qat.deploy.gguf", "gguf", ".gguf"),
    "onnx": Format("qat.deploy.onnx", "onnx", ".onnx"),
    "torch-export": Format("qat.deploy.torch_export", None, ".pt2"),
}


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file or folder.
        files: name -> bytes, of what a runtime reads.
        manifest, card: the files that describe it.
    """

    path: Path
    files: Mapping[str, int]
    manifest: Path
    card: Path


def export(deployed: nn.Module, path: str | os.PathLike[str], format: str, example_inputs: Any = None,
           target: str | None = None, *, metrics: Mapping[str, Any] | None = None, **options: Any) -> Exported:
    """Write a deployed model in the format of another runtime, with its manifest and its model card.

    A format that cannot hold what a layer does is an error that names the layer, and no file is left behind; nothing is
    written in floating point silently. Writing twice gives the same bytes.

    Args:
        deployed: from :func:`qat.convert` or :func:`qat.load`.
        path: a file, or for formats of several files a folder; an export that is there already is replaced.
        format: a key of :data:`FORMATS`.
        example_inputs: one batch, for formats that hold a graph.
        target: a name of :mod:`qat.targets`; None: any runtime of this format.
        metrics: for the card: what was measured -> a figure, or text.
        options: those of the format.

    Raises:
        CheckpointError: the model is not deployed; the file cannot be written; ``path`` holds what is not an export.
        UnsupportedError: an unknown format or target; something that the format cannot hold; the extra is missing.
    """
    module = load_format(format)
    check_deployed(deployed)
    write: Callable[..., Iterable[str] | None] = module.write
    known = [n for n in inspect.signature(write).parameters if n not in inspect.signature(export).parameters]
    for option in options:
        if option not in known:
            raise UnsupportedError(f"format {format} has no option {option!r}{nearest(option, known)}; options are "
                                   f"{', '.join(known) or 'none'}")
    path = Path(path)
    with _placed(path, FORMATS[format].suffix is None) as (made, describing, card):
        notes = write(deployed, made, example_inputs=example_inputs, target=target, **options) or ()
        products = [made] if made.is_file() else sorted(made.iterdir())
        sizes = {file.name: file.stat().st_size for file in products}
        text = model_card(deployed, format, target, made, example_inputs, sizes, list(notes), metrics or {})
        write_synced(describing / card, text.encode())
        manifest = {
            "qat_export": VERSION, "format": format, "target": target, "model": type(deployed).__name__,
            "options": {name: _plain(name, value) for name, value in options.items()},
            "recipe": prepared_state(deployed).recipe.to_dict(),
            "certificate": deployed.__dict__.get("_qat_certificate"),
            "files": {file.name: measured(file) for file in products},
            "card": {"file": card, "sha256": measured(describing / card)["sha256"]},
        }
        content = json.dumps(manifest | {"digest": _digest(manifest)}, indent=1, sort_keys=True)
        write_synced(describing / manifest_of(path, made.is_dir()).name, content.encode())
    home = path if made == describing else path.parent
    return Exported(path, sizes, manifest_of(path, path.is_dir()), home / card)


def check_deployed(model: nn.Module) -> None:
    """Raises:
        CheckpointError: the model is not deployed.
    """
    if not is_prepared(model) or any(not m.frozen for m in quantized_modules(model).values()
                                     if m.plan.weight is not None):
        raise CheckpointError("only deployed models are exported: deployed, certificate = qat.convert(model, batches)")


def load_format(format: str) -> ModuleType:
    """The module that writes a format.

    Raises:
        UnsupportedError: there is no such format, the nearest is named; its extra is missing.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"unknown format {format!r}{nearest(str(format), FORMATS)}; formats are "
                               f"{', '.join(FORMATS)}")
    name, extra, _ = FORMATS[format]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if extra is None:
            raise
        raise UnsupportedError(f"format {format} needs the extra {extra}: pip install '.[{extra}]' ({error})") from None


def own_target(format: str, target: str | None) -> str | None:
    """``target`` if the format knows it by that name; else None, which is any runtime of the format."""
    names = getattr(load_format(format), "TARGETS", None) or [t.name for t in targets.TARGETS.values() if t.form]
    return target if target in names else None


def check_target(model: nn.Module, target: str) -> None:
    """Hold the layers of a prepared or deployed model against a target, before it is trained, say.

    Raises:
        UnsupportedError: a layer that the target cannot run, by name; nothing is quantized; a target that runs language
            models of transformers alone, and another model.
    """
    aim = targets.get(target)
    plans = [m.plan for m in quantized_modules(model).values()]
    if not any(p.weight or p.input or p.output or p.parts for p in plans):
        raise UnsupportedError(f"nothing of {type(model).__name__} is quantized: {aim.name} runs "
                               f"{', '.join(aim.operators) or 'its layers'} on integers, and it has none of these that "
                               "the recipe matches")
    if aim.only_linear:
        if not hasattr(getattr(model, "config", None), "model_type"):
            others = ", ".join(name for name, other in targets.TARGETS.items() if not other.only_linear)
            raise UnsupportedError(f"{aim.name} runs models of transformers, and {type(model).__name__} is none: take "
                                   f"another target, such as {others}")
        weight_layers(model)
    check_layers(model, aim)


# -------------------------------------------------------------------------------------------------- manifests


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Hold an exported file or folder against the manifest beside it, or in it; returns the manifest.

    Without a manifest nothing is promised, and the result is empty.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the manifest is damaged, or something else.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} is missing: there is no such file or folder")
    home = path if path.is_dir() else path.parent
    voucher = manifest_of(path, path.is_dir())
    if not voucher.exists():
        return {}
    manifest = _read(voucher)
    if path.is_file() and path.name not in manifest["files"]:
        raise CheckpointError(f"{voucher} says nothing of {path.name}: it was renamed, or belongs to another file")
    for name, about in manifest["files"].items():
        try:
            check_file(home / name, about)
        except OSError as error:
            raise CheckpointError(f"{home / name} is missing or cannot be read: {error.strerror or error}") from None
    return manifest


def manifest_of(path: Path, folder: bool) -> Path:
    """Where the manifest of an exported file or folder is."""
    return path / MANIFEST if folder else path.with_name(f"{path.name}.json")


def _read(path: Path) -> dict[str, Any]:
    """A manifest, checked."""
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes: too large for a manifest")
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged, or not the manifest of an export: it is not JSON") from None
    if not isinstance(manifest, dict) or "qat_export" not in manifest:
        raise CheckpointError(f"{path} is damaged, or not the manifest of an export: move it away to open the file "
                              "without a promise")
    if manifest["qat_export"] != VERSION:
        raise CheckpointError(f"{path} has version {manifest['qat_export']!r}; this package reads version {VERSION}")
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{path} is damaged: it does not have its own checksum")
    files, card = manifest.get("files"), manifest.get("card")
    if not isinstance(files, dict) or not isinstance(card, dict) or not all(
            isinstance(name, str) and name == os.path.basename(name) for name in (*files, card.get("file"))) or not all(
            isinstance(about, dict) and isinstance(about.get("bytes"), int) and isinstance(about.get("sha256"), str)
            for about in files.values()):
        raise CheckpointError(f"{path} is damaged: its files are not names with their lengths and checksums")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, whatever it says that it is."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _plain(name: str, value: Any) -> Any:
    """An option as a manifest says it: a folder by its name alone, an object by its type."""
    if isinstance(value, os.PathLike) or (name == "source" and isinstance(value, str)):
        return os.path.basename(os.path.normpath(value))
    if isinstance(value, Mapping):
        return {str(key): _plain("", item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain("", item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


# -------------------------------------------------------------------------------------------------- places


@contextmanager
def _placed(path: Path, folder: bool) -> Iterator[tuple[Path, Path, str]]:
    """What to write, the folder for what describes it, and the name of the card; all of it is put in place at the end.

    Raises:
        CheckpointError: something that is not ours would be replaced.
    """
    if folder:
        with new_folder(path, _replaceable) as temporary:
            yield temporary, temporary, "README.md"
        return
    voucher = manifest_of(path, False)
    before = _read(voucher) if voucher.exists() else {}
    card = _free_card(path, before.get("card", {}))
    with new_files(path, voucher.name) as temporary:
        yield temporary / path.name, temporary, card


def _free_card(path: Path, before: Mapping[str, Any]) -> str:
    """The name of the card of a file: ``README.md``, if there is none but our own, else one of its own."""
    own = f"{path.name}.md"
    for name in dict.fromkeys((before.get("file", "README.md"), "README.md", own)):
        there = path.parent / name
        if there.exists():
            if before.get("file") == name and measured(there)["sha256"] == before.get("sha256"):
                return name
        elif name == own or not any(p.stem.lower() == "readme" for p in _entries(path.parent)):
            return name
    raise CheckpointError(f"{path.parent / own} is there already, and is not the card that was written for "
                          f"{path.name}, or was edited since: move it away, or choose another path")


def _entries(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _replaceable(folder: Path) -> bool:
    """Whether a folder is an export, and nothing else.

    Raises:
        CheckpointError: it is one, but there is more in it, or its card was edited.
    """
    if not (folder / MANIFEST).is_file():
        return False
    manifest = _read(folder / MANIFEST)
    card = manifest["card"]
    strange = sorted({p.name for p in folder.iterdir()} - {MANIFEST, card["file"], *manifest["files"]})
    if (folder / card["file"]).is_file() and measured(folder / card["file"])["sha256"] != card["sha256"]:
        strange.append(f"an edited {card['file']}")
    if strange:
        raise CheckpointError(f"{folder} is an export that also holds {', '.join(strange[:8])}, which would be lost: "
                              "choose another path, or move it away")
    return True
