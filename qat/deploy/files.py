"""Putting what was written in place in one step: whatever happens, the old file or folder is there, or the new one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat.errors import CheckpointError


def check_free(target: Path, replaces: Callable[[Path], bool]) -> None:
    """Refuse a path where something else than an empty folder is, or than one that ``replaces`` says is ours.

    Raises:
        CheckpointError: there is.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaces(target))):
        raise CheckpointError(f"{target} exists and is not a checkpoint but something else: choose another path, or "
                              "remove it")


@contextmanager
def new_folder(target: Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends, and vanishes if it fails.

    Args:
        replaces: whether a folder that is there already is one of ours, so that it may be replaced.

    Raises:
        CheckpointError: something else is there already; it cannot be written.
    """
    check_free(target, replaces)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
        yield Path(temporary)
        os.chmod(temporary, 0o755)
        put_in_place(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(target: Path, voucher: str) -> Iterator[Path]:
    """A temporary folder whose files go where ``target`` is when the block ends; it vanishes if that fails.

    Args:
        target: the file that matters; other files are left beside it.
        voucher: name of the file that says what the others hold. An old one goes first and the new one comes last: if
            that is interrupted, there is none, rather than one that says the wrong thing.

    Raises:
        CheckpointError: a folder is there already; it cannot be written.
    """
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: this format is one file, choose another path")
    new, temporary = not target.parent.exists(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
        yield Path(temporary)
        names = sorted((p.name for p in Path(temporary).iterdir()), key=lambda name: (name == voucher, name))
        for name in names:
            with open(Path(temporary) / name, "rb") as file:
                os.fsync(file.fileno())
        (target.parent / voucher).unlink(missing_ok=True)
        _sync_directory(target.parent)
        for name in names:
            os.replace(Path(temporary) / name, target.parent / name)
        _sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if new and target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()


def measured(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: ``bytes`` and ``sha256``."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_file(path: Path, about: Mapping[str, Any]) -> None:
    """Hold a file against what a manifest says of it; its length first.

    Raises:
        CheckpointError: it is truncated or altered.
        OSError: it is not there.
    """
    size = path.stat().st_size
    if size != about["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, the manifest says {about['bytes']}: it is truncated or was "
                              "changed")
    if measured(path)["sha256"] != about["sha256"]:
        raise CheckpointError(f"{path} does not have the checksum of the manifest: it was changed or damaged")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file, and have it on the disk before going on."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(temporary: str | os.PathLike[str], target: Path) -> None:
    """Rename onto a free or empty target, or exchange with an old checkpoint, which then is what is ``temporary``."""
    _rename_onto(os.fspath(temporary), target)
    _sync_directory(target.parent)


def _rename_onto(temporary: str, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(temporary, target)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is not None and exchange(-100, os.fsencode(temporary), -100, os.fsencode(str(target)), 2) == 0:
        return
    aside = Path(f"{temporary}.old")
    os.rename(target, aside)
    os.rename(temporary, target)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
