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
from qat.runtimes.base import Operator, Runtime
from qat.runtimes.onnx_graph import OnnxSession, feed, open_batch, operators

FAILURES = (failures.Fail, failures.InvalidArgument, failures.InvalidGraph, failures.InvalidProtobuf,
            failures.RuntimeException, failures.NoSuchFile, failures.NotImplemented)


class OnnxRuntimeSession(OnnxSession):
    """One file. Weight-only layers keep floating point activations (``qdq_matmulnbits_accuracy_level`` 1)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self.session = self._start(self.model.SerializeToString(), optimized)
            self.optimized = onnx.load(optimized)
        self.batch = open_batch(i.shape[0] for i in self.session.get_inputs() if i.shape)

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
        return self._run(self.session, inputs)

    def _run(self, started: Any, inputs: Any) -> list[Tensor]:
        try:
            given = feed([i.name for i in started.get_inputs()], inputs)
            return [torch.from_numpy(y) for y in started.run(None, given)]
        except FAILURES as error:
            raise UnsupportedError(f"{self.path}: onnxruntime cannot run it: {_first(error)}") from None

    def operators(self) -> list[Operator]:
        return operators(self.optimized)


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

    def start(self, path: Path) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(path)
