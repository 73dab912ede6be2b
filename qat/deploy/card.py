"""The model card: ``README.md`` beside an export says what is in it, how it was proven, how each runtime loads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.rewriter import Row, coverage, prepared_state, quantized_modules


def model_card(deployed: nn.Module, format: str, target: str | None, made: Path, example_inputs: Any,
               sizes: Mapping[str, int], notes: Sequence[str], metrics: Mapping[str, Any]) -> str:
    """The text of a model card, the same for the same model: no times, no paths.

    Args:
        deployed: what was exported. ``made``: the file or folder, which may lie in another place later.
        format: as it is called in :data:`qat.deploy.export.FORMATS`. ``target``: for whom it was written.
        example_inputs: with which it was written, if any.
        sizes: file -> bytes.
        notes: what a user of this checkpoint must know, each a sentence or two.
        metrics: what was measured -> a figure, or text.
    """
    state, covered = prepared_state(deployed), coverage(deployed)
    kept = [row for row in covered.rows if row.status == "kept"]
    schemes = Counter((row.weight, row.input) for row in covered.rows if row.status == "quantized")
    parameters = Counter[tuple[str, str]]()
    for row in covered.rows:
        if row.status == "quantized":
            parameters[row.weight, row.input] += row.params
    lines = [
        f"# {type(deployed).__name__}, quantized", "",
        f"Format: {format}{'' if target is None else f', for {target}'}. Recipe: {state.recipe.name or 'its own'}.", "",
        "| weights | inputs | layers | parameters |", "|---|---|---|---|",
        *(f"| {weight} | {inputs} | {count} | {parameters[weight, inputs]:,} |"
          for (weight, inputs), count in sorted(schemes.items())), "",
        f"{covered.quantized_params:,} of {covered.total_params:,} parameters are quantized ({covered.fraction:.1%}).",
        *_listed("Kept in floating point", _grouped(kept)),
        "", "## Certificate", "", _certificate(deployed.__dict__.get("_qat_certificate")),
        *(["", "## Metrics", "", "| measured | value |", "|---|---|",
           *(f"| {name} | {_figure(value)} |" for name, value in metrics.items())] if metrics else []),
        *_listed("To know", notes),
        "", "## Loading",
        *(line for runtime, language, code in LOADING[format](deployed, target, made, example_inputs)
          for line in ("", f"{runtime}:", "", f"```{language}", *code.splitlines(), "```")),
        "", "## Files", "", "| file | bytes |", "|---|---|",
        *(f"| {name} | {size:,} |" for name, size in sorted(sizes.items())), "",
        f"Together {sum(sizes.values()):,} bytes; the parameters as float32 numbers would be "
        f"{4 * covered.total_params:,}.",
    ]
    return "\n".join(lines) + "\n"


def _grouped(rows: Sequence[Row]) -> list[str]:
    """Reasons, each with how many layers of which kinds it is about and the first of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.reason), []).append(row)
    return [f"{len(found)} x {kind} ({sum(r.params for r in found):,} parameters; {found[0].name}"
            f"{', ...' if len(found) > 1 else ''}): {reason}" for (kind, reason), found in groups.items()]


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {entry}" for entry in entries)] if entries else []


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _certificate(proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return "None is stored with this model."
    return (f"On {proof['samples']:,} samples in {proof['batches']} "
            f"{'batch' if proof['batches'] == 1 else 'batches'} the deployed model was compared with the "
            f"trained one in {len(proof['layers'])} layers: greatest output difference "
            f"{proof['max_output_difference']:g}, equal predictions {proof['prediction_agreement']:.2%}, "
            f"{'equal bit for bit' if proof['equal'] else 'NOT EQUAL'}. That is about the deployed model, whose "
            "codes and scales are the ones in this file.")


# -------------------------------------------------------------------------------------------------- loading

Code = list[tuple[str, str, str]]
"""Runtime, language, and code that works in the folder where the export is."""


def _transformers(deployed: nn.Module, target: str | None, made: Path, example_inputs: Any) -> Code:
    name = type(deployed).__name__
    name = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
    found = [("transformers, with the package compressed-tensors", "python",
              f'from transformers import {name}\n\nmodel = {name}.from_pretrained(".").eval()')]
    kinds = (p.dtype for p in deployed.parameters() if p.is_floating_point())
    dtype = str(next(kinds, torch.float32)).removeprefix("torch.")
    # by itself vLLM runs float32 models in bfloat16
    return [*found, ("vLLM", "bash", f"vllm serve . --dtype {dtype}")] if target == "vllm" else found


def _llama_cpp(deployed: nn.Module, target: str | None, made: Path, example_inputs: Any) -> Code:
    return [
        ("llama.cpp", "bash", f'llama-cli --model {made.name} --prompt "Once upon a time"'),
        ("transformers, with the packages gguf and accelerate; it dequantizes", "python",
         "from transformers import AutoModelForCausalLM\n\n"
         f'model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{made.name}").eval()'),
    ]


def _torch(deployed: nn.Module, target: str | None, made: Path, example_inputs: Any) -> Code:
    args = example_inputs if isinstance(example_inputs, tuple | list | Mapping) else (example_inputs,)
    leaves = pytree.tree_map(_zeros, dict(args) if isinstance(args, Mapping) else tuple(args))
    call = (", ".join(f"{name}={_python(value)}" for name, value in leaves.items()) if isinstance(leaves, dict)
            else ", ".join(map(_python, leaves)))
    home = type(deployed).__module__
    types = f"import {home}  # registers the type of its output\n" if home.startswith("transformers.") else ""
    return [("torch, which needs nothing of this package. Loading a .pt2 file can execute code that is in it: load "
             "only those that you trust", "python",
             f'import torch\n{types}\nmodel = torch.export.load("{made.name}").module()\nwith torch.no_grad():\n'
             f"    output = model({call})")]


def _executorch(deployed: nn.Module, target: str | None, made: Path, example_inputs: Any) -> Code:
    args = example_inputs if isinstance(example_inputs, tuple | list | Mapping) else (example_inputs,)
    leaves = pytree.tree_leaves(pytree.tree_map(_zeros, dict(args) if isinstance(args, Mapping) else tuple(args)))
    return [("ExecuTorch; for inputs of these shapes only", "python",
             f"import torch\nfrom executorch.runtime import Runtime\n\n"
             f'method = Runtime.get().load_program("{made.name}").load_method("forward")\n'
             f"outputs = method.execute([{', '.join(map(_python, leaves))}])")]


class _Source(str):
    """Code, among values that have a ``repr``."""


def _zeros(value: Any) -> Any:
    return _Source(f"torch.zeros({tuple(value.shape)}, dtype={value.dtype})") if isinstance(value, Tensor) else value


def _python(value: Any) -> str:
    """Nested containers of code and plain values as code."""
    if isinstance(value, _Source):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_python(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_python, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value)


def _onnx(deployed: nn.Module, target: str | None, made: Path, example_inputs: Any) -> Code:
    import onnx

    graph = onnx.load(made, load_external_data=False).graph
    feeds = []
    for entry in graph.input:
        shape = tuple(d.dim_value or 1 for d in entry.type.tensor_type.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        feeds.append(f'    "{entry.name}": numpy.zeros({shape}, "{dtype}"),')
    inputs = "\n".join(["inputs = {", *feeds, "}"])
    exact = any(m.plan.weight is not None and m.plan.input is None and m.plan.kind != "Embedding"
                for m in quantized_modules(deployed).values())
    options = ('options = onnxruntime.SessionOptions()\n# else it quantizes the inputs of weight-only layers\n'
               'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")\n' if exact else "")
    found = [
        ("onnxruntime", "python", f"import numpy\nimport onnxruntime\n\n{options}"
         f'session = onnxruntime.InferenceSession("{made.name}"{", options" if exact else ""}, '
         f'providers=["CPUExecutionProvider"])\n{inputs}\noutputs = session.run(None, inputs)'),
        ("OpenVINO", "python", "import numpy\nimport openvino\n\n"
         f'model = openvino.Core().compile_model("{made.name}", "CPU", '
         '{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})\n'
         f"{inputs}\noutputs = model(inputs)"),
    ]
    if target == "tensorrt":
        return [("TensorRT, whose rules were checked; nothing was executed there", "bash",
                 f"trtexec --onnx={made.name} --stronglyTyped"), *found]
    return found[1:] if target == "openvino" else found[:1] if target in (None, "onnxruntime") else found


LOADING: dict[str, Callable[[nn.Module, str | None, Path, Any], Code]] = {
    "compressed-tensors": _transformers, "executorch": _executorch, "gguf": _llama_cpp, "onnx": _onnx,
    "torch-export": _torch,
}
"""Format -> how its runtimes load it."""
