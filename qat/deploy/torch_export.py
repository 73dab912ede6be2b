"""torch.export: one ``.pt2`` file with the deployed computation in torch's own operators.

The file holds packed codes, scales and what is float anyway; the graph unpacks the codes, and multiplies the integers
in floating point of a width that holds every sum exactly. So it needs neither this package nor a special kernel, and
layers with integer inputs compute what the deployed model computes, bit for bit. Weight-only layers dequantize and
multiply, as the deployed model does for more than 16 rows; for fewer it sums in another order, and last bits differ.

**Loading a ``.pt2`` file can execute code that is in it: never load one that you do not trust.** ``qat.load`` executes
nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.errors import UnsupportedError, nearest
from qat.kernels import table
from qat.kernels.backends import FLOAT
from qat.rewriter import quantized_modules
from qat.tracing import evaluating

TARGETS = ("torch",)
BATCH = "batch"


def write(deployed: nn.Module, path: Path, example_inputs: Any = None, target: str | None = None, *,
          dynamic_shapes: Any = BATCH) -> list[str]:
    """Write the new file ``path``; returns what a user must know of it, for the card.

    Args:
        deployed: any deployed model that torch.export can follow.
        example_inputs: one batch, of at least two samples where the batch may vary.
        target: ``torch`` or None, which is the same.
        dynamic_shapes: ``"batch"``: the first dimension of every input may vary; None: all shapes are those of
            ``example_inputs``; else what ``torch.export.export`` takes.

    Raises:
        UnsupportedError: no example inputs; torch.export cannot follow the model, or not with these dynamic shapes; a
            float copy of a quantized weight would be in the file.
    """
    if target not in (None, *TARGETS):
        raise UnsupportedError(f"unknown target {target!r}{nearest(str(target), TARGETS)}; the target of this format "
                               f"is {TARGETS[0]}")
    program = program_of(deployed, example_inputs, dynamic_shapes)
    with tempfile.TemporaryDirectory(prefix=".draft.", dir=path.parent) as draft:
        made = Path(draft) / "model.pt2"        # entries begin with the name
        torch.export.save(program, made)
        _without_number(made, path)
    shapes = "The first dimension of the inputs may vary" if dynamic_shapes == BATCH else (
        "The inputs have the shapes of the example" if dynamic_shapes is None else "Some dimensions of the inputs vary")
    return [f"{shapes}. Integers travel in floating point wide enough to hold every sum: the outputs of layers with "
            "integer inputs are those of the deployed model, bit for bit, and there is no integer kernel."]


def program_of(deployed: nn.Module, example_inputs: Any, dynamic_shapes: Any = BATCH) -> torch.export.ExportedProgram:
    """The deployed computation as an exported program; arguments and errors as in :func:`write`."""
    if example_inputs is None:
        raise UnsupportedError("torch.export follows the model on a batch: give example_inputs")
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (
        tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,), None)
    if dynamic_shapes == BATCH:
        dynamic_shapes = pytree.tree_map(_first, kwargs if kwargs is not None else args)
    model = copy.deepcopy(deployed)         # what modules keep for later would be tensors of the tracer
    try:
        with evaluating(model), torch.no_grad(), table.use(FLOAT.name):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            program = program.run_decompositions({})
    except Exception as error:      # torch.export raises of many kinds, some of them private
        reason = str(error).strip().split("\n")[0]
        remedy = ("; with dynamic_shapes=None all shapes are those of example_inputs" if dynamic_shapes is not None
                  else "")
        raise UnsupportedError(f"torch.export cannot follow {type(deployed).__name__}: {type(error).__name__}: {reason}"
                               f"{remedy}") from error
    _without_origins(program)
    program.example_inputs = None           # data of whoever exported
    _check(program, deployed)
    return program


def _first(value: Any) -> Any:
    """The first dimension of a tensor may vary."""
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() else None


def _check(program: torch.export.ExportedProgram, deployed: nn.Module) -> None:
    """No operator of this package is left, and no float tensor is as large as a quantized weight that is in codes."""
    strange = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("qat.")})
    if strange:
        raise UnsupportedError(f"the graph would need operators of this package: {', '.join(strange)}")
    weights = {math.prod(m.weight_shape): name for name, m in quantized_modules(deployed).items() if m.frozen}
    own = deployed.state_dict()
    for name, value in stored(program).items():
        if value.is_floating_point() and name not in own and value.numel() in weights:
            raise UnsupportedError(f"{weights[value.numel()]}: the file would hold its weight in floating point, as "
                                   f"{name}")


def stored(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """All tensors that a program's file holds."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return {**program.state_dict, **constants}


def _without_origins(program: torch.export.ExportedProgram) -> None:
    """Forget where nodes come from: addresses, and paths of whoever exported."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("from_node", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                    node.meta.pop(key, None)


def _without_number(made: Path, target: Path) -> None:
    """Write the archive again with the digest of its entries as its number: the same program is the same bytes."""
    with zipfile.ZipFile(made) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    numbers = [name for name in entries if name.endswith("/serialization_id")]
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for name, content in entries.items()
                                     if name not in numbers)).hexdigest()
    for name in numbers:
        entries[name] = f"{int(digest, 16) % 10 ** 40:040}".encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
