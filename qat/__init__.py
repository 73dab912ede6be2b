"""qat: quantization-aware training in which the training forward is the deployed integer computation.

    recipe = qat.Recipe.preset("w8a8")
    model = qat.prepare(model, recipe, example_inputs=x)
    qat.calibrate(model, batches)
    ...                                                  # train it like any other model
    deployed, certificate = qat.convert(model, batches)
    qat.save(deployed, "out/")
"""

from typing import Any

from qat import errors, targets
from qat.calibration import (
    calibrate,
    freeze_batch_norm,
    freeze_ranges,
    reestimate_batch_norm,
    set_observing,
    set_rung,
)
from qat.compression import (
    ChannelReport,
    Distillation,
    Distiller,
    Pruning,
    adapter_state,
    add_adapters,
    load_adapter_state,
    merge_adapters,
    prune,
    prune_channels,
    sparsity,
)
from qat.deploy import Certificate, convert, export, load, resident_bytes, save, stream, verify_export, without_weights
from qat.errors import QuantizationError
from qat.modules.functional import Add, Concat, MatMul
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import FakeQuantize
from qat.recipe import Recipe, Rule
from qat.rewriter import Coverage, coverage, is_prepared, prepare
from qat.runtimes import compare_runtimes


def __getattr__(name: str) -> Any:
    """``QuantizedCache`` needs transformers, so it is imported when it is asked for."""
    if name == "QuantizedCache":
        from qat.modules.kv_cache import QuantizedCache

        return QuantizedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Add", "Certificate", "ChannelReport", "Concat", "Coverage", "Distillation", "Distiller", "FakeQuantize",
           "MatMul", "Pruning", "QuantizationError", "QuantizedTensor", "Recipe", "Rule", "TensorSpec",
           "adapter_state", "add_adapters", "calibrate", "compare_runtimes", "convert", "coverage",
           "errors", "export", "freeze_batch_norm", "freeze_ranges", "is_prepared", "load",
           "load_adapter_state", "merge_adapters", "prepare", "prune", "prune_channels",
           "reestimate_batch_norm", "resident_bytes", "save", "set_observing", "set_rung", "sparsity",
           "stream", "targets", "verify_export", "without_weights"]
