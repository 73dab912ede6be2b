"""``export``: a deployed model as a file or folder that another runtime loads, with the same integers."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.rewriter import is_prepared, quantized_modules

FORMATS: dict[str, tuple[str, str | None]] = {
    "compressed-tensors": ("qat.deploy.compressed_tensors", "llm"),
    "executorch": ("qat.deploy.executorch_file", "executorch"),
    "gguf": ("qat.deploy.gguf", "gguf"),
    "onnx": ("qat.deploy.onnx", "onnx"),
    "torch-export": ("qat.deploy.torch_export", None),
}
"""Format -> module with a function ``write(deployed, path, example_inputs, target, **options)``, and the extra that it
needs, if any. A module is imported when its format is asked for."""


def export(deployed: nn.Module, path: str | os.PathLike[str], format: str, example_inputs: Any = None,
           target: str | None = None, **options: Any) -> None:
    """Write a deployed model in the format of another runtime.

    A format that cannot hold what a layer does is an error that names the layer, and no file is left behind; nothing is
    written in floating point silently. Writing twice gives the same bytes.

    Args:
        deployed: from :func:`qat.convert` or :func:`qat.load`.
        path: a file, or for formats of several files a folder; what is there already is replaced in one step.
        format: a key of :data:`FORMATS`.
        example_inputs: one batch, for formats that hold a graph.
        target: a name of :mod:`qat.targets`; None: any runtime of this format.
        options: those of the format.

    Raises:
        CheckpointError: the model is not deployed, or the file cannot be written.
        UnsupportedError: an unknown format or target; something that the format cannot hold; the extra is missing.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"unknown format {format!r}{nearest(str(format), FORMATS)}; formats are "
                               f"{', '.join(FORMATS)}")
    if not is_prepared(deployed) or any(not m.frozen for m in quantized_modules(deployed).values()
                                        if m.plan.weight is not None):
        raise CheckpointError("only deployed models are exported: deployed, certificate = qat.convert(model, batches)")
    module, extra = FORMATS[format]
    try:
        write: Callable[..., None] = importlib.import_module(module).write
    except ImportError as error:
        if extra is None:
            raise
        raise UnsupportedError(f"format {format} needs the extra {extra}: pip install '.[{extra}]' ({error})") from None
    known = [n for n in inspect.signature(write).parameters if n not in inspect.signature(export).parameters]
    for option in options:
        if option not in known:
            raise UnsupportedError(f"format {format} has no option {option!r}{nearest(option, known)}; options are "
                                   f"{', '.join(known) or 'none'}")
    write(deployed, Path(path), example_inputs=example_inputs, target=target, **options)
