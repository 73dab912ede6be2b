"""Runtimes that execute exported models, behind one protocol, and their comparison with torch."""

from __future__ import annotations

import os
from pathlib import Path

from qat.runtimes.base import Operator, Runtime, Session
from qat.runtimes.compare import RuntimeRow, RuntimeTable, compare_runtimes
from qat.runtimes.registry import RUNTIMES, get

__all__ = ["RUNTIMES", "Operator", "Runtime", "RuntimeRow", "RuntimeTable", "Session", "compare_runtimes", "get",
           "open"]


def open(path: str | os.PathLike[str], runtime: str) -> Session:
    """Open an exported file or folder with a runtime.

    Raises:
        UnsupportedError: an unknown runtime, or one that is not installed.
        CheckpointError: no such file, or a damaged one.
    """
    return get(runtime).open(Path(path))
