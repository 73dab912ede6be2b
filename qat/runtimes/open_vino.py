"""OpenVINO on the CPU, which reads ONNX; its operators come from the runtime model that it has compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import openvino as ov
import torch
from torch import Tensor, nn

from qat.deploy.export import export
from qat.errors import CheckpointError, PatternError, UnsupportedError
from qat.runtimes.base import Operator, Runtime
from qat.runtimes.onnx_graph import WEIGHT, OnnxSession, feed, layer_of, open_batch

PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
SUMS = ("Eltwise", "Concatenation")


class OpenVinoSession(OnnxSession):
    """One file; floating point stays float32, and nothing is quantized that the file does not quantize."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.core = ov.Core()
        self.compiled = self._start(self.model.SerializeToString())
        self.batch = open_batch(None if d.is_dynamic else d.get_length()
                                for d in (i.partial_shape[0] for i in self.compiled.inputs if len(i.partial_shape)))

    def _start(self, content: bytes) -> Any:
        try:
            return self.core.compile_model(self.core.read_model(content, b""), "CPU", {
                "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
                "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: OpenVINO cannot compile it: {_last(error)}") from None

    def __call__(self, inputs: Any) -> list[Tensor]:
        return self._run(self.compiled, inputs)

    def _run(self, started: Any, inputs: Any) -> list[Tensor]:
        try:
            made = started(feed([i.any_name for i in started.inputs], inputs))
        except RuntimeError as error:
            raise UnsupportedError(f"{self.path}: OpenVINO cannot run it: {_last(error)}") from None
        return [torch.from_numpy(made[o].copy()) for o in started.outputs]

    def operators(self) -> list[Operator]:
        found: dict[Operator, int] = {}

        def note(layer: str, operator: str, operands: list[str], result: str, sums: bool) -> None:
            row = Operator(layer, operator, tuple(operands), result, 1, sums)
            found[row] = found.get(row, 0) + 1

        for op in self.compiled.get_runtime_model().get_ordered_ops():
            about = {k: str(getattr(v, "value", v)) for k, v in op.get_rt_info().items()}
            kind, names = about.get("layerType", ""), about.get("originalLayersNames", "").split(",")
            inputs = [i.get_source_output().get_node().get_friendly_name() for i in op.inputs()]
            types = [_type(i) for i in op.inputs()]
            result = _type(op.outputs()[0]) if op.outputs() else ""
            operator = f"{kind} {about.get('primitiveType', '')}".strip()
            if kind in PRODUCTS or (kind == "Subgraph" and any("/MatMul" in n for n in names)):
                weights = [match[1] for name in inputs if (match := WEIGHT.search(name))] if kind in PRODUCTS else []
                layer = weights[0] if weights else next((layer_of(n.split("/WithoutBiases")[0]) for n in names
                                                         if "/" in n and "QuantizeLinear" not in n), "")
                note(layer, operator, types[:2], result, False)
                for other in {layer_of(n) for n in names if "/QuantizeLinear" in n} - {layer, ""}:
                    note(other, f"fused into {operator}", [types[0], *types[3:4]], result, True)
            elif kind == "Gather":
                for match in filter(None, map(WEIGHT.search, inputs)):
                    note(match[1], operator, types[:1], result, False)
            elif kind in SUMS:
                for other in {layer_of(n) for n in names if "/QuantizeLinear" in n} - {""}:
                    note(other, operator, types[:2], result, True)
        return [Operator(r.layer, r.operator, r.operands, r.result, n, r.sums) for r, n in found.items()]


def _type(port: Any) -> str:
    name = port.get_element_type().get_type_name() if hasattr(port, "get_element_type") else "?"
    return {"i8": "s8", "i4": "s4", "i32": "s32", "i64": "s64"}.get(name, name)


def _last(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class OpenVino(Runtime):
    """OpenVINO's CPU plugin, on a Q/DQ file; where the recipe has products that are no Q/DQ pattern, on one that writes
    those as integer operators."""

    name: ClassVar[str] = "openvino"
    format: ClassVar[str] = "onnx"
    target: ClassVar[str | None] = "openvino"
    suffix: ClassVar[str] = ".onnx"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str | None] = "openvino"

    def export(self, deployed: nn.Module, path: Path, example_inputs: Any) -> None:
        try:
            export(deployed, path, self.format, example_inputs, self.target, form="qdq")
        except PatternError:
            export(deployed, path, self.format, example_inputs, self.target, form="auto")

    def start(self, path: Path) -> OpenVinoSession:
        return OpenVinoSession(path)
