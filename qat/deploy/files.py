"""Putting what was written in place in one step: whatever happens, the old file or folder is there, or the new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.deploy.checkpoint import put_in_place
from qat.errors import CheckpointError


@contextmanager
def new_folder(target: Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends, and vanishes if it fails.

    Args:
        replaces: whether a folder that is there already is one of ours, so that it may be replaced.

    Raises:
        CheckpointError: something else is there already; it cannot be written.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaces(target))):
        raise CheckpointError(f"{target} exists and is something else: choose another path, or remove it")
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
def new_file(target: Path) -> Iterator[Path]:
    """The path of a temporary file, with the suffix of ``target``, that takes its place when the block ends.

    Raises:
        CheckpointError: a folder is there already; it cannot be written.
    """
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: this format is one file, choose another path")
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
        made = Path(temporary) / target.name
        yield made
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
