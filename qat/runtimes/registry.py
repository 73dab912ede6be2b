"""Runtimes by name."""

from __future__ import annotations

import importlib

from qat.errors import UnsupportedError, nearest
from qat.runtimes.base import Runtime

RUNTIMES: dict[str, tuple[str, str, str | None]] = {
    "torch": ("qat.runtimes.torch_runtime", "Torch", None),
    "onnxruntime": ("qat.runtimes.onnx_runtime", "OnnxRuntime", "onnx"),
    "llama.cpp": ("qat.runtimes.llama_cpp", "LlamaCpp", "llama-cpp"),
    "openvino": ("qat.runtimes.open_vino", "OpenVino", "openvino"),
}
"""Name -> module, class, and the extra that it needs, if any. A module is imported when its runtime is asked for."""


def check_name(name: str) -> None:
    """Raises:
        UnsupportedError: there is no such runtime; the nearest is named.
    """
    if name not in RUNTIMES:
        raise UnsupportedError(f"unknown runtime {name!r}{nearest(str(name), RUNTIMES)}; runtimes are "
                               f"{', '.join(RUNTIMES)}")


def get(name: str) -> Runtime:
    """The runtime of this name.

    Raises:
        UnsupportedError: an unknown name, or an extra that is not installed.
    """
    check_name(name)
    module, kind, extra = RUNTIMES[name]
    try:
        made: Runtime = getattr(importlib.import_module(module), kind)()
    except ImportError as error:
        if extra is None:
            raise
        raise UnsupportedError(f"runtime {name} needs the extra {extra}: pip install '.[{extra}]' ({error})") from None
    made.check()
    return made
