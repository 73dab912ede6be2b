"""Quantizing a model that need not fit in memory: read, quantized and written one unit after another.

A *unit* is a block (a member of a list of like modules, such as a decoder layer) or what stands outside of the blocks
(an embedding, a head). The model's parameters have no storage (they are on the meta device) but for the unit at work,
and what is done is on the disk at once. Beside one unit and its inputs nothing is in memory, and work that was
interrupted goes on at the unit where it stopped.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qat.calibration import calibrate
from qat.calibration.walk import Arrival, walk
from qat.compression.pruning import sparsity
from qat.deploy.checkpoint import (
    MANIFEST,
    entry,
    file_names,
    is_checkpoint,
    manifest_text,
    read_tensors,
    write_tensors,
)
from qat.deploy.convert import Certificate, drop_folded, outputs, share_codes
from qat.deploy.files import check_free, put_in_place, write_synced
from qat.errors import CheckpointError, ParityError, PrepareError
from qat.modules.base import LayerPlan, QuantizedModule
from qat.modules.parameters import watching
from qat.modules.precision import NarrowFloat
from qat.numerics.tensor import add_to_digest
from qat.quantizers.quantizer import StaticQuantizer
from qat.recipe import Recipe
from qat.rewriter import Prepared, prepare, prepared_state, quantized_modules
from qat.tracing import Arguments, call, evaluating, run

JOURNAL = "progress.json"
META = torch.device("meta")
Progress = Callable[[str, int, int], None]


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built inside the block have parameters without storage, and buffers as ever.

    Building a model costs neither time nor memory then; tied parameters are tied.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device != META:
            param = type(param)(param.to(META), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class TensorFolder:
    """The tensors of a folder of safetensors files, read one by one.

    Args:
        path: a folder with ``*.safetensors``, in one file or several.

    Raises:
        CheckpointError: there are none; a file is damaged; two files hold one tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.homes: dict[str, Path] = {}
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else []
        if not files:
            raise CheckpointError(f"{self.path} is not a folder with safetensors files")
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    if name in self.homes:
                        raise CheckpointError(f"{name} is in {self.homes[name].name} and in {file.name}")
                    self.homes[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.homes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names. What was read before is not kept."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.homes[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, keys in wanted.items():
            with _opened(file) as tensors:      # closing it lets go of its pages
                found |= {key: tensors.get_tensor(key) for key in keys}
        return found

    def fingerprint(self) -> str:
        """A digest of the names, sizes and headers of the files."""
        digest = hashlib.sha256()
        for file in sorted(set(self.homes.values())):
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(length))
        return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None


class Floats:
    """The float weights of a model, in a folder of tensors by the names of its state dict.

    Args:
        model: any model; which of its parameters are tied is taken from it now.
    """

    def __init__(self, model: nn.Module, source: TensorFolder) -> None:
        self.source = source
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self.names.setdefault(id(parameter), []).append(name)

    def first(self, name: str) -> str:
        """The first name of the parameter called ``name``: its own, or that of the one it is tied to."""
        return self.names[id(self.parameters[name])][0]

    def stored(self, name: str) -> str:
        """The name under which the folder holds a parameter.

        Raises:
            CheckpointError: it does not.
        """
        ties = self.names[id(self.parameters[name])] if name in self.parameters else []
        for candidate in (name, *ties):
            if candidate in self.source:
                return candidate
        raise CheckpointError(f"{self.source.path} holds no tensor {name}, which this architecture needs")

    def fill(self, name: str, module: nn.Module) -> None:
        """Give the module called ``name`` the tensors of its own.

        Raises:
            CheckpointError: one is missing, or has another shape.
        """
        wanted = {key: self.stored(_joined(name, key)) for key, p in module._parameters.items() if p is not None}
        wanted |= {key: _joined(name, key) for key, b in module._buffers.items()
                   if b is not None and key not in module._non_persistent_buffers_set
                   and _joined(name, key) in self.source}
        values = self.source.read(set(wanted.values()))
        for key, full in wanted.items():
            own, value = getattr(module, key), values[full]
            if own.shape != value.shape:
                raise CheckpointError(f"{self.source.path}: {full} has shape {tuple(value.shape)}, this architecture "
                                      f"needs {tuple(own.shape)}")
            value = value.to(own.dtype)
            if key in module._buffers:
                module._buffers[key] = value
            else:
                module._parameters[key] = nn.Parameter(value, requires_grad=own.requires_grad)


def missing(model: nn.Module, source: str | os.PathLike[str]) -> list[str]:
    """The parameters of ``model`` that a folder of safetensors files does not hold, by the names of its state dict."""
    floats = Floats(model, TensorFolder(source))
    return [names[0] for names in floats.names.values() if not any(name in floats.source for name in names)]


def read_weights(model: nn.Module, source: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the weights in a folder of safetensors files, in place; ties stay.

    Raises:
        CheckpointError: a tensor is missing or of another shape; a file is damaged.
    """
    floats = Floats(model, TensorFolder(source))
    shared = {names[0]: names[1:] for names in floats.names.values() if len(names) > 1}
    for name, module in model.named_modules():
        floats.fill(name, module)
    for first, others in shared.items():
        for name in others:
            module, _, key = name.rpartition(".")
            model.get_submodule(module)._parameters[key] = model.get_parameter(first)
    return model


@contextmanager
def visiting(model: nn.Module, source: str | os.PathLike[str]) -> Iterator[nn.Module]:
    """Let a float model whose parameters have no storage run, inside the block: each unit is read when it is called.

    Raises:
        CheckpointError: as for :func:`read_weights`.
    """
    floats, units = Floats(model, TensorFolder(source)), units_of(model)
    inside = {_joined(n, k) for n, m in units.items() for k, _ in m.named_modules()}
    for name, module in model.named_modules():
        if name not in inside:
            floats.fill(name, module)

    def read(unit: str) -> Callable[..., None]:
        def enter(module: nn.Module, _: Any) -> None:
            for key, part in module.named_modules():
                floats.fill(_joined(unit, key), part)
        return enter

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        _empty(module)
        _give_back()

    hooks = [m.register_forward_pre_hook(read(n)) for n, m in units.items()]
    hooks += [m.register_forward_hook(leave) for m in units.values()]
    try:
        with torch.no_grad():
            yield model
    finally:
        for hook in hooks:
            hook.remove()


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The units of a model, in the order of its modules: members of its outermost lists of like modules, and the
    largest modules without such a list beside them."""
    found: dict[str, nn.Module] = {}

    def descend(name: str, module: nn.Module) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if not any(p.dim() > 1 for p in child.parameters()):
                continue                # norms: next to nothing, and often folded into a neighbour
            if _is_list(module) or not any(map(_is_list, child.modules())):
                found.setdefault(path, child)
            else:
                descend(path, child)

    descend("", model)
    seen: set[int] = set()
    return {n: m for n, m in found.items() if not (id(m) in seen or seen.add(id(m)))}  # type: ignore[func-returns-value]


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a list of blocks: two or more members of one type, which have children."""
    kinds = [type(m) for m in module.children() if any(True for _ in m.children())]
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(kinds) > len(set(kinds))


def stream(model: nn.Module, source: str | os.PathLike[str], target: str | os.PathLike[str],
           recipe: Recipe | Mapping[str, Any] | str, example_inputs: Any, batches: Sequence[Any] = (),
           progress: Progress | None = None, ready: Callable[[nn.Module], object] | None = None) -> Certificate:
    """Quantize the model whose weights are in the folder ``source``, and write it, deployed, to the folder ``target``.

    The model walks through ``batches`` unit by unit: each is read, calibrated on what the quantized units before it
    make of the data (ranges, and every algorithm of the recipe), frozen, compared with itself before freezing, and
    written. Peak memory is that of the largest unit in floating point, its codes, and its inputs for all batches.

    Args:
        model: the architecture, its parameters on the meta device (see :func:`without_weights`); it is used up.
        source: a folder of safetensors files with the float model's tensors, by the names of its state dict.
        target: as for :func:`qat.save`; ``qat.load`` reads it. Meanwhile the work is in ``.<name>.partial`` beside it;
            if it was interrupted, the same call goes on where it stopped.
        recipe: as for :func:`qat.prepare`.
        example_inputs: one small batch, which shows what the model calls; its weights are zeros at that time.
        batches: data for ranges, algorithms and the certificate. None: weights are rounded to nearest; a recipe with
            static ranges or algorithms needs data.
        progress: called with "quantize", the units done, and how many there are.
        ready: called with the prepared model, before weights are read; what it raises ends the call.

    Returns:
        The certificate: each unit compared with itself before freezing, on the data of its first batch.

    Raises:
        CheckpointError: a tensor is missing, or of another shape; ``target`` is something else already; the partial
            work beside it belongs to another model or recipe.
        ParityError: a frozen unit differs from the prepared one.
        PrepareError, RecipeError, CalibrationError: as for ``prepare`` and ``calibrate``.
    """
    if any(p.device != META for p in model.parameters()):
        raise PrepareError("stream reads the weights itself: build the architecture inside of qat.without_weights()")
    made = _Stream(model, TensorFolder(source), Path(target), recipe, example_inputs, list(batches), progress)
    if ready is not None:
        ready(made.model)
    return made.run()


class _Alone(nn.Module):
    """A unit as a model by itself, in which its modules have the names that they have in the whole model."""

    def __init__(self, name: str, unit: nn.Module, state: Prepared) -> None:
        super().__init__()
        self.eval()
        holder: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            holder.add_module(step, nn.ModuleDict().eval())     # a unit is a member of a container
            holder = holder.get_submodule(step)
        holder.add_module(last, unit)
        self._unit = name
        self.__dict__["_qat"] = Prepared(state.recipe, state.plan, [], {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self._unit)(*args, **kwargs)


class _Stream:
    """One model on its way. ``run`` is read top to bottom."""

    def __init__(self, model: nn.Module, source: TensorFolder, target: Path, recipe: Any, example: Any,
                 batches: list[Any], progress: Progress | None) -> None:
        self.source, self.target, self.batches, self.progress = source, target, batches, progress
        check_free(target, is_checkpoint)
        self.partial = target.with_name(f".{target.name}.partial")
        self.floats = Floats(model, source)
        self.units: dict[str, nn.Module] = {}
        self.model = model
        self._find_units(example)
        self.inside = {f"{n}.{k}" if k else n for n, m in self.units.items() for k, _ in m.named_modules()}
        self.resident: str | None = None
        self.done: dict[str, dict[str, Any]] = {}
        self.model = self._prepared(model, recipe, example)
        self.state = prepared_state(self.model)
        self.certificate = Certificate()

    def run(self) -> Certificate:
        self._open_journal()
        for unit in self.done:
            self._become_frozen(unit)
        hooks = [m.register_forward_pre_hook(functools.partial(lambda unit, *_: self._enter(unit), name))
                 for name, m in self.units.items()]
        try:
            self._load_rest()
            left = {n: m for n, m in self.units.items() if n not in self.done}
            if self.batches and left:
                walk(self.model, self.batches, left, self._quantize)
            for unit in left:
                self._quantize(unit, [])        # those that no batch came to
        finally:
            for hook in hooks:
                hook.remove()
        self._finish()
        return self.certificate

    # ------------------------------------------------------------------ prepare

    def _find_units(self, example: Any) -> None:
        """All units but those whose weights somebody else reads too, which stay in memory until the end."""
        with _standing_in(self.model, self.floats), watching(self.model) as readings, evaluating(self.model), \
                torch.no_grad(), torch.random.fork_rng():
            run(self.model, example)
        for name, module in units_of(self.model).items():
            own = {name, *(f"{name}.{key}" for key, _ in module.named_modules() if key)}
            if not any(holder in own and reading.readers - own for (holder, _), reading in readings.items()):
                self.units[name] = module

    def _prepared(self, model: nn.Module, recipe: Any, example: Any) -> nn.Module:
        """``model``, prepared; it runs, on stand-ins for its weights, to show what it calls."""
        with _standing_in(model, self.floats):
            return prepare(model, recipe, example, inplace=True)

    # ------------------------------------------------------------------ one unit after another

    def _enter(self, unit: str) -> None:
        """Have the weights of a unit in memory, and those of no other one."""
        if self.resident == unit:
            return
        self._leave()
        if unit in self.done:
            self._read_codes(unit)
        else:
            self._read_floats(unit)
        self.resident = unit

    def _leave(self) -> None:
        if self.resident is not None:
            _empty(self.units[self.resident])
            self.resident = None
            _give_back()

    def _quantize(self, unit: str, arrivals: list[Arrival]) -> None:
        """Calibrate, freeze, compare and write one unit; it is resident, and frozen, afterwards."""
        if unit in self.done:
            return
        self._enter(unit)
        part = self.units[unit]
        part.eval().requires_grad_(False)
        static = any(isinstance(q, StaticQuantizer) for m in quantized_modules(part).values()
                     for q in m.activation_quantizers().values())
        alone = _Alone(unit, part, self.state)
        if arrivals and (static or self.state.recipe.calibration):
            calibrate(alone, [Arguments(a.args, a.kwargs) for a in arrivals])
        self.state.notes.update(prepared_state(alone).notes)
        before = self._result(part, arrivals)
        self._freeze(unit)
        after = self._result(part, arrivals)
        if len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after)):
            raise ParityError(f"the deployed {unit} differs from the prepared one, in floating point between its "
                              "quantized layers")
        if before:
            self.certificate.batches = 1
            self.certificate.samples = max(self.certificate.samples, before[0].shape[0] if before[0].dim() else 1)
        self._write(unit)
        if self.progress is not None:
            self.progress("quantize", len(self.done), len(self.units))

    @torch.no_grad()
    def _freeze(self, unit: str) -> None:
        """Freeze a unit, layer by layer, and compare the codes.

        Raises:
            ParityError: those of a layer have changed.
        """
        part = self.units[unit]
        for module in part.modules():
            if isinstance(module, NarrowFloat):
                module.freeze()
        for name, layer in quantized_modules(part).items():
            codes = None if layer.plan.weight is None else layer.quantized_weight().codes
            layer.freeze()
            if codes is not None:
                if not torch.equal(codes, layer.quantized_weight().codes):
                    raise ParityError(f"{_joined(unit, name)}: the codes of its weight are not those it had before")
                self.certificate.layers[_joined(unit, name)] = {"weight_codes": 0}
        drop_folded(self.model)
        self.certificate.sparsity.update(sparsity(_Alone(unit, part, self.state)))
        for layer in quantized_modules(part).values():
            layer._codes = None                 # unpacked again where it is needed

    def _result(self, part: nn.Module, arrivals: list[Arrival]) -> list[Tensor]:
        """What a unit makes of the first batch."""
        if not arrivals:
            return []
        with torch.no_grad(), evaluating(part):
            return outputs(call(part, arrivals[0]))

    # ------------------------------------------------------------------ weights in, codes out

    def _read_floats(self, unit: str) -> None:
        for key, module in self.units[unit].named_modules():
            self.floats.fill(_joined(unit, key), module)

    def _load_rest(self) -> None:
        """What is outside of all units stays in memory."""
        for name, module in self.model.named_modules():
            if name not in self.inside and not _is_quantizer(module):
                self.floats.fill(name, module)

    def _tensors(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of a frozen unit: everything but what is tied to others, which hold it."""
        state = {_joined(prefix, key): value for key, value in module.state_dict().items()}
        for key, quantized in quantized_modules(module).items():
            if quantized.plan.tied_to is not None:
                for buffer in ("weight_codes", "weight_scale", "weight_zero_point"):
                    state.pop(_joined(prefix, key, buffer), None)
        return {n: t for n, t in state.items() if n not in self.floats.parameters or self.floats.first(n) == n}

    def _write(self, unit: str) -> None:
        tensors = {n: t.detach().contiguous() for n, t in self._tensors(unit, self.units[unit]).items()}
        file = f"unit-{list(self.units).index(unit):05}.safetensors"
        plans = {n: p.to_dict() for n, p in self.state.plan.layers.items() if n == unit or n.startswith(f"{unit}.")}
        self.done[unit] = {
            "file": file, **write_tensors(self.partial / file, tensors), "plans": plans,
            "tensors": {name: entry(value, file) for name, value in tensors.items()},
            "notes": {n: t for n, t in self.state.notes.items() if n == unit or n.startswith(f"{unit}.")},
            "layers": {n: r for n, r in self.certificate.layers.items() if n == unit or n.startswith(f"{unit}.")},
            "sparsity": {n: r for n, r in self.certificate.sparsity.items() if n == unit or n.startswith(f"{unit}.")},
            "samples": self.certificate.samples,
        }
        self._write_journal()

    def _read_codes(self, unit: str) -> None:
        """The tensors of a unit that is done, from the partial work."""
        about = self.done[unit]
        values = read_tensors(self.partial / about["file"], about, about["tensors"])
        for key, module in self.units[unit].named_modules():
            for own in (module._parameters, module._buffers):
                for name in own:
                    full = _joined(unit, key, name)
                    if full in values:
                        value = values[full]
                        own[name] = nn.Parameter(value, requires_grad=False) if own is module._parameters else value
            self._read_ties(_joined(unit, key), module)

    def _read_ties(self, name: str, module: nn.Module) -> None:
        """What a module of a finished unit shares with others."""
        if isinstance(module, QuantizedModule) and module.plan.tied_to is not None:
            home = next(u for u in self.done if module.plan.tied_to == u or module.plan.tied_to.startswith(f"{u}."))
            about = self.done[home]
            values = read_tensors(self.partial / about["file"], about, about["tensors"])
            for buffer in ("weight_codes", "weight_scale", "weight_zero_point"):
                module._buffers[buffer] = values.get(f"{module.plan.tied_to}.{buffer}")
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.device == META:
                value = self.source.read([self.floats.stored(_joined(name, key))])
                module._parameters[key] = nn.Parameter(next(iter(value.values())), requires_grad=False)

    # ------------------------------------------------------------------ the journal

    def _open_journal(self) -> None:
        """Begin, or go on where an earlier call stopped."""
        self.identity = {"source": self.source.fingerprint(), "recipe": self.state.recipe.to_dict(),
                         "plan": hashlib.sha256(json.dumps(self.state.plan.to_dict(), sort_keys=True).encode())
                         .hexdigest(), "batches": _fingerprint(self.batches)}
        path = self.partial / JOURNAL
        try:
            if path.exists():
                journal = json.loads(path.read_text(encoding="utf-8"))
                if journal["identity"] != self.identity:
                    raise CheckpointError(f"{self.partial} is unfinished work on another model, recipe or other data: "
                                          "remove it to begin anew")
                self.done = journal["done"]
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
                self._write_journal()
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged: remove {self.partial} to begin anew") from None
        except OSError as error:
            raise CheckpointError(f"cannot write {self.partial}: {error.strerror or error}") from None

    def _write_journal(self) -> None:
        text = json.dumps({"identity": self.identity, "done": self.done}, sort_keys=True)
        draft = self.partial / f"{JOURNAL}.new"
        write_synced(draft, text.encode())
        os.replace(draft, self.partial / JOURNAL)

    def _become_frozen(self, unit: str) -> None:
        """Have the modules of a unit that an earlier call finished be what they were then, without their tensors."""
        about = self.done[unit]
        part = self.units[unit].eval().requires_grad_(False)
        for name, plan in about["plans"].items():
            module: QuantizedModule = self.model.get_submodule(name)  # type: ignore[assignment]
            layer = LayerPlan.from_dict(plan)
            self.state.plan.layers[name] = module.plan = layer
            for key, inner in layer.parts.items():
                module.get_submodule(key).plan = inner  # type: ignore[assignment]
        for module in quantized_modules(part).values():
            module.skeleton()
        for narrow in part.modules():
            if isinstance(narrow, NarrowFloat):
                narrow.skeleton()
        drop_folded(self.model)
        self._read_codes(unit)      # quantizers of activations keep theirs
        for module in quantized_modules(part).values():
            for quantizer in module.activation_quantizers().values():
                if hasattr(quantizer, "loaded"):
                    quantizer.loaded()
        _empty(part)
        self.state.notes.update(about["notes"])
        self.certificate.layers.update(about["layers"])
        self.certificate.sparsity.update(about["sparsity"])
        self.certificate.samples = max(self.certificate.samples, about["samples"])
        self.certificate.batches = int(bool(self.batches))

    def _finish(self) -> None:
        """Give the files their names, write the manifest, and put the folder in place."""
        self._leave()
        model = self.model
        for narrow in model.modules():
            if isinstance(narrow, NarrowFloat) and not narrow.frozen_narrow:
                narrow.freeze()
        for module in quantized_modules(model).values():
            if not module.frozen and (module.plan.weight is not None or module.activation_quantizers()):
                module.freeze()         # a function outside of all units
        share_codes(quantized_modules(model))
        drop_folded(model)
        model.eval().requires_grad_(False)
        rest = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()
                if not any(n.startswith(f"{u}.") for u in self.units)}
        parts = {unit: self.done[unit] for unit in self.units}
        if rest:
            parts[""] = {"file": "rest.safetensors", **write_tensors(self.partial / "rest.safetensors", rest),
                         "tensors": {name: entry(value, "") for name, value in rest.items()}}
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for name, about in zip(file_names(len(parts)), parts.values()):
            os.replace(self.partial / about["file"], self.partial / name)
            files[name] = {"bytes": about["bytes"], "sha256": about["sha256"]}
            tensors |= {key: {**said, "file": name} for key, said in about["tensors"].items()}
        aliases = {key: self._owner(key) for key in model.state_dict() if key not in tensors}
        model.__dict__["_qat_certificate"] = self.certificate.to_dict()
        write_synced(self.partial / MANIFEST, manifest_text(model, tensors, aliases, files))
        (self.partial / JOURNAL).unlink()
        put_in_place(self.partial, self.target)
        shutil.rmtree(self.partial, ignore_errors=True)     # an older checkpoint that was there

    def _owner(self, key: str) -> str:
        """The tensor that another name stands for."""
        if key in self.floats.parameters:
            return self.floats.first(key)
        module, _, buffer = key.rpartition(".")
        return f"{self.state.plan.layers[module].tied_to}.{buffer}"


def _stand_in(parameter: Tensor) -> nn.Parameter:
    """Something in the shape of a parameter, that costs next to no memory: a few random numbers, shifted by one from
    row to row (in stacks of matrices, whose kernels mind their strides, from matrix to matrix); ones for vectors."""
    shape = parameter.shape
    if len(shape) < 2:
        values = torch.ones(shape, dtype=parameter.dtype)
    else:
        strides = (1, 1) if len(shape) == 2 else (*(1 for _ in shape[:-2]), shape[-1], 1)
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        noise = torch.randn(count, generator=torch.Generator().manual_seed(0)) / parameter[0].numel() ** 0.5
        values = noise.to(parameter.dtype).as_strided(shape, strides)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


@contextmanager
def _standing_in(model: nn.Module, floats: Floats) -> Iterator[None]:
    """Stand-ins have the place of all parameters, inside the block."""
    stand_ins = {id(p): _stand_in(p) for p in floats.parameters.values()}
    _exchange(model, stand_ins)
    try:
        yield
    finally:
        _exchange(model, {id(stand_ins[id(p)]): p for p in floats.parameters.values()})
        _give_back()


def _exchange(model: nn.Module, others: Mapping[int, nn.Parameter]) -> None:
    """Put other parameters in the place of those with these ids; what was tied stays tied."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in others:
                module._parameters[key] = others[id(parameter)]


def _empty(part: nn.Module) -> None:
    """Take the storage of weights away."""
    for module in part.modules():
        if _is_quantizer(module):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to(META), requires_grad=False)
        if isinstance(module, QuantizedModule):
            for key in ("weight_codes", "weight_scale", "weight_zero_point"):
                if module._buffers.get(key) is not None:
                    module._buffers[key] = module._buffers[key].to(META)  # type: ignore[union-attr]
            module._kernel = module._codes = module._one_row = None


def _give_back() -> None:
    """Have the C library give freed memory back to the system, which it keeps in pieces below 32 MiB (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_quantizer(module: nn.Module) -> bool:
    return bool(getattr(module, "is_quantizer", False))


def _fingerprint(batches: Iterable[Any]) -> str:
    """A digest of all tensors in the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in outputs(batch):
            add_to_digest(digest, "", tensor)
    return digest.hexdigest()


def _joined(*names: str) -> str:
    return ".".join(n for n in names if n)
