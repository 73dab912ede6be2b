"""onnxruntime on the CPU; its operators come from the graph that it has optimized."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as failures
from torch import Tensor

from qat.errors import CheckpointError, UnsupportedError
from qat.runtimes.base import Operator, Read, Runtime, Session
from qat.runtimes.onnx_graph import Place, as_codes, feed, load, open_batch, operators, with_codes

FAILURES = (failures.Fail, failures.InvalidArgument, failures.InvalidGraph, failures.InvalidProtobuf,
            failures.RuntimeException, failures.NoSuchFile, failures.NotImplemented)


class OnnxRuntimeSession(Session):
    """One file. Weight-only layers keep floating point activations (``qdq_matmulnbits_accuracy_level`` 1)."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load(path)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self.session = self._start(self.model.SerializeToString(), optimized)
            self.optimized = onnx.load(optimized)
        self.batch = open_batch(i.shape[0] for i in self.session.get_inputs() if i.shape)
        self._watching: tuple[Any, list[Place]] | None = None

    def _start(self, content: bytes, optimized: Path | None = None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # it would slow the others' turns
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except failures.NotImplemented as error:
            raise UnsupportedError(f"{self.path}: onnxruntime has no kernel: {_first(error)}") from None
        except FAILURES as error:
            raise CheckpointError(f"{self.path}: onnxruntime cannot read it: {_first(error)}") from None

    def __call__(self, inputs: Any) -> list[Tensor]:
        return [torch.from_numpy(y) for y in self._run(self.session, inputs)]

    def _run(self, session: Any, inputs: Any) -> list[Any]:
        """
        Raises:
            UnsupportedError: inputs of other shapes or types than the file has.
        """
        try:
            return session.run(None, feed([i.name for i in session.get_inputs()], inputs))
        except FAILURES as error:
            raise UnsupportedError(f"{self.path}: onnxruntime cannot run it: {_first(error)}") from None

    def operators(self) -> list[Operator]:
        return operators(self.optimized)

    def codes(self, inputs: Any) -> Read:
        if self._watching is None:
            content, places = with_codes(self.model)
            self._watching = self._start(content), places
        session, places = self._watching
        values = self._run(session, inputs)
        own = len(values) - len(places)
        return Read(as_codes(places, values[own:]), [torch.from_numpy(y) for y in values[:own]])


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


class OnnxRuntime(Runtime):
    """onnxruntime's CPU kernels."""

    name: ClassVar[str] = "onnxruntime"
    format: ClassVar[str] = "onnx"
    target: ClassVar[str | None] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"

    def open(self, path: Path) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(path)
