"""A run folder that survives a kill at any moment: every file is complete or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from qat.errors import CheckpointError, ConfigError
from qat.numerics.tensor import add_to_digest

CHECKSUM = "sha256"
"""What the metadata of weights call the digest of the state dict."""


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary neighbour of ``path``, bring it to the disk, and only then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        fill(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What `write_text` wrote as JSON.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def save_weights(network: nn.Module, path: Path) -> None:
    """The state dict as safetensors, with its checksum; tied tensors are stored once."""
    metadata = {CHECKSUM: _checksum(network.state_dict())}
    write(path, lambda temporary: save_model(network, str(temporary), metadata))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or of another architecture.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: the run has not come that far. Continue it with resume={path.parents[1]}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    values |= {name: values[owner] for name, owner in metadata.items() if owner in values}
    if metadata.get(CHECKSUM) != _checksum(values):
        raise CheckpointError(f"{path} is damaged: its weights do not have the checksum that was stored with them.")
    try:
        network.load_state_dict(values)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights of this network: {error}") from error


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        add_to_digest(digest, name, state[name])
    return digest.hexdigest()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written like every other file of the run folder; damaged ones are said to be."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """As ever.

        Raises:
            CheckpointError: the file is missing or damaged.
            PermissionError, MemoryError: it cannot be read now, whatever is in it.
        """
        try:
            with zipfile.ZipFile(path) as archive:  # torch's format; torch itself does not compare the checksums in it
                if (changed := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(changed)
            return super().load_checkpoint(path, *args, **options)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing.") from error
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # a damaged file can mislead torch's reader into almost any of them, and its advice
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}). Delete it, and this stage begins "
                                  "anew.") from error


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own ``folder`` while the block runs, so that two processes never write into one run; a kill gives it back.

    Raises:
        ConfigError: another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another process is running in {folder}.") from error
        yield
