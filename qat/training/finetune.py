"""Anybody's LightningModule, unchanged, made quantization-aware by one line.

    module = qat.training.quantize(MyModule(...), "w4a8")
    trainer.fit(module, data)                                      # calibrates, trains, freezes; checkpoints as usual
    deployed, certificate = qat.training.deploy(module, data.val_dataloader())

    qat.training.quantize(MyModule).load_from_checkpoint(path)     # the recipe and the plan are in the checkpoint

The object stays what it is (its class gets a mixin in front), and so do its steps, its data and its optimizers. The
modules are swapped in ``configure_model``; a checkpoint holds what ``prepare`` decided, and decides it again.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, TypeVar, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils import _pytree as pytree
from torchmetrics import Metric

import qat
from qat.calibration import processes
from qat.calibration.ranges import activation_quantizers
from qat.compression.distillation import Distiller
from qat.compression.pruning import Pruning, attach
from qat.deploy import Certificate
from qat.errors import CheckpointError, ConfigError, PrepareError, nearest
from qat.modules.base import QuantizedModule, adopt, quantized_type
from qat.quantizers.quantizer import Quantizer
from qat.rewriter import check_whole, decisions, is_sharded, prepare_as
from qat.tracing import evaluating, run, trace_symbolically, uncompiled
from qat.training.callbacks import QuantizationSchedule, compute_in_float, peek, transferred
from qat.training.data import stream_seed
from qat.training.module import QuantizedTraining
from qat.training.optimizers import give_scales_their_groups
from qat.training.pruning import PruningSchedule
from qat.training.sharding import gather, without_methods
from qat.training.strategy import follow_strategy, will_shard

KEY = "qat"
"""Where a Lightning checkpoint holds what was decided."""
Module = TypeVar("Module")


@dataclass(frozen=True)
class Options:
    """What `quantize` was told."""

    recipe: qat.Recipe | None = None
    network: str | None = None
    example_inputs: Any = None
    inputs: Callable[[Any], Any] | None = None
    adapters: Mapping[str, Any] | None = None
    prune: Pruning | None = None
    scale_lr_factor: float = 0.1
    schedule: QuantizationSchedule = field(default_factory=QuantizationSchedule)


def quantize(
    module: Module,
    recipe: qat.Recipe | Mapping[str, Any] | str | None = None,
    *,
    network: str | None = None,
    example_inputs: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    prune: Pruning | Mapping[str, Any] | None = None,
    scale_lr_factor: float = 0.1,
    schedule: QuantizationSchedule | None = None,
) -> Module:
    """``module``, a LightningModule, made quantization-aware in place; or, from a class, a class of such modules.

    Under ``ModelParallelStrategy`` the network that is quantized is sharded behind the user's ``configure_model``,
    which must not shard it itself; trainable parameters beside it stay whole on each process.

    Args:
        module: an instance (changed and returned) or a class (unchanged; a subclass is returned, whose instances are
            quantized and whose ``load_from_checkpoint`` works).
        recipe: a `qat.Recipe`, its dict, or the name of a preset; None: the one that a checkpoint holds.
        network: dotted name of the part to quantize; ``""``: the module itself. None: the one child that holds all
            parameters, else the module itself. Names in the recipe, and ``qat.convert``, refer to this part.
        example_inputs: one batch of that network's inputs, for `qat.prepare`. None: the module's
            ``example_input_array``; else the structure is found symbolically or, where it cannot be, by running the
            step on a batch of the training data. (A checkpoint holds what was found, a bare state dict does not: give
            them where one is to be loaded into another instance.)
        inputs: ``inputs(batch)`` gives the network's inputs (a tensor, a tuple of arguments or a dict of keyword
            arguments) for calibration. None: they are what the module's own step hands to the network: its
            ``training_step``, or under manual optimization its ``validation_step``.
        adapters: options of `qat.add_adapters`, such as ``{"rank": 8}``: the weights are frozen, and low-rank
            corrections are trained inside the quantizers.
        prune: a `qat.Pruning`, or its options, such as ``{"method": "magnitude", "sparsity": 0.8}``: weights are masked
            while they are trained, on the schedule of :class:`~qat.training.PruningSchedule`. One among the trainer's
            callbacks takes precedence. Scores of movement pruning train at the rate of the group they are in, without
            weight decay.
        scale_lr_factor: learned scales train at this multiple of the learning rate of the group they are in, without
            weight decay.
        schedule: None: a `QuantizationSchedule` with its defaults. One among the trainer's callbacks takes precedence.

    Raises:
        ConfigError: not a LightningModule; one that is quantized already; a network that does not exist.
        RecipeError: a recipe that cannot be read.
        PruneError: options of pruning that mean nothing.
    """
    kind: Any = module if isinstance(module, type) else type(module)
    if not issubclass(kind, L.LightningModule):
        raise ConfigError(f"quantize makes a LightningModule quantization-aware, not a {kind.__name__}; for any other "
                          "module there is qat.prepare.")
    if issubclass(kind, QuantizationAware):
        raise ConfigError(f"{kind.__name__} is quantization-aware already.")
    if issubclass(kind, QuantizedTraining):
        raise ConfigError(f"{kind.__name__} takes a recipe itself: {kind.__name__}(network, recipe=...).")
    if isinstance(recipe, str):
        recipe = qat.Recipe.preset(recipe)
    elif isinstance(recipe, Mapping):
        recipe = qat.Recipe.from_dict(recipe)
    _check_adapters(adapters)
    if scale_lr_factor < 0:
        raise ConfigError(f"scale_lr_factor is a factor on the learning rate, not {scale_lr_factor}.")
    pruning = prune if isinstance(prune, Pruning) else Pruning.from_dict(prune)
    if pruning.method == "channels":
        raise ConfigError("prune: whole channels leave the float network, before it is quantized: use "
                          "qat.prune_channels.")
    options = Options(recipe, network, example_inputs, inputs, None if adapters is None else dict(adapters),
                      pruning if pruning.masks else None, float(scale_lr_factor), schedule or QuantizationSchedule())
    if isinstance(module, type):
        return cast(Module, _quantized_class(module, options))
    aware = adopt(QuantizationAware, cast(nn.Module, module))
    aware.__dict__["_qat_told"] = options
    if network is not None and kind.configure_model is L.LightningModule.configure_model:
        _part(aware, network)  # else the module may be made later
    return cast(Module, aware)


def _check_adapters(adapters: Mapping[str, Any] | None) -> None:
    known = [n for n in inspect.signature(qat.add_adapters).parameters if n not in ("model", "inplace")]
    for key in adapters or ():
        if key not in known:
            raise ConfigError(f"adapters has no option {key!r}{nearest(str(key), known)}; options are "
                              f"{', '.join(known)}.")


def _quantized_class(kind: Any, options: Options) -> type:
    def new(cls, *args, **kwargs):
        module = kind.__new__(cls)
        # each instance calibrates, and is frozen, for itself
        module.__dict__["_qat_told"] = replace(options, schedule=copy.deepcopy(options.schedule))
        return module

    aware: Any = type(adopt(QuantizationAware, kind.__new__(kind)))
    return type(aware.__name__, (aware,), {"__module__": kind.__module__, "__doc__": kind.__doc__, "__new__": new})


class QuantizationAware(L.LightningModule):
    """Mixin in front of a user's LightningModule; see `quantize`. It has no ``__init__``, so the user's stays."""

    # Everything of its own lies in __dict__ under names that begin with _qat, to be in nobody's way.

    def _qat_options(self) -> Options:
        # an instance that Lightning makes of type(module) was told nothing: its checkpoint decides
        return self.__dict__.setdefault("_qat_told", Options())

    @property
    def quantized_network(self) -> nn.Module:
        """The part that is quantized: the module itself or a part of it; prepared once ``configure_model`` has run."""
        if "_qat_network" not in self.__dict__:
            name = self._qat_options().network
            name = _find_network(self) if name is None else name
            compiled = isinstance(_part(self, name), OptimizedModule)  # torch.compile has wrapped the network itself
            self.__dict__["_qat_network"] = f"{name}._orig_mod" if compiled else name
        return _part(self, self.__dict__["_qat_network"])

    # ---------------------------------------------------------------------------------- swapping, and checkpoints

    def configure_model(self) -> None:
        """The user's own ``configure_model``; then, once, the modules are swapped, if there is a recipe, and sharded,
        if the strategy is ModelParallelStrategy."""
        super().configure_model()
        options = self._qat_options()
        network = self.quantized_network
        if options.recipe is None and will_shard(self):
            raise ConfigError("ModelParallelStrategy shards the network before a checkpoint can say how it is "
                              "quantized: give quantize the recipe of the checkpoint.")
        if options.recipe is not None and not qat.is_prepared(network):
            check_whole(network)
            self.__dict__["_qat_before"] = _shape_of(network)
            if options.adapters is not None:
                qat.add_adapters(network, **options.adapters, inplace=True)
            with _example(self, network) as example:
                qat.prepare(network, options.recipe, example, inplace=True)
            self._qat_attach(network)
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and qat.is_prepared(network) and any(
                not q.calibrated for q in activation_quantizers(network)):
            compute_in_float(network, True)  # in what Lightning runs before there are ranges, such as its summary
        follow_strategy(self, network)

    def _qat_attach(self, network: nn.Module) -> None:
        """Give the network its masks, if it is to be pruned, before there are optimizers and copies on processes."""
        pruning = self._qat_options().prune
        if pruning is not None:
            attach(network, pruning)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        network = self.quantized_network
        if qat.is_prepared(network):
            adapters = self._qat_options().adapters
            checkpoint[KEY] = {
                "network": self.__dict__["_qat_network"],
                "adapters": None if adapters is None else {k: _plain(v) for k, v in adapters.items()},
                **decisions(network),
            }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Swap as the checkpoint says, before its weights are loaded; a float checkpoint leaves things as they are."""
        self._qat_follow(checkpoint.get(KEY))
        super().on_load_checkpoint(checkpoint)

    def _qat_follow(self, stored: Any) -> None:
        options = self._qat_options()
        if stored is None:
            if options.recipe is None:
                raise ConfigError("This checkpoint holds no recipe: it is one of the float module. Give quantize a "
                                  "recipe to train it quantized.")
            return
        if not isinstance(stored, Mapping) or not isinstance(stored.get("network"), str):
            raise CheckpointError(f"This checkpoint is damaged: {KEY!r} is not what QuantizationAware stores.")
        wanted: dict[str, Any] = {key: stored.get(key) for key in ("network", "adapters", "recipe")}
        _check_adapters(wanted["adapters"])
        if options.recipe is not None:
            mine = {"network": self.__dict__.get("_qat_network", wanted["network"]),
                    "adapters": options.adapters and {k: _plain(v) for k, v in options.adapters.items()},
                    "recipe": options.recipe.to_dict()}
            for key, value in mine.items():
                if value != wanted[key]:
                    raise ConfigError(f"This checkpoint was made with {key} {wanted[key]}, not {value}; leave it out "
                                      "of quantize, and the checkpoint decides.")
        network = self.quantized_network if options.recipe is not None else _part(self, wanted["network"])
        if qat.is_prepared(network):
            if decisions(network)["plan"] == stored.get("plan"):
                prepare_as(network, stored)
                return
            if is_sharded(network):
                raise ConfigError("This checkpoint is of a network whose structure was found in another way, and this "
                                  "one is sharded already: give quantize the same example_inputs as then.")
            # The same recipe, but the structure was found in another way: back to the float modules, and again.
            network = self._qat_back()
        self.__dict__["_qat_network"] = wanted["network"]
        self.__dict__["_qat_told"] = replace(options, recipe=qat.Recipe.from_dict(wanted["recipe"]),
                                                adapters=wanted["adapters"])
        if wanted["adapters"] is not None:
            qat.add_adapters(network, **wanted["adapters"], inplace=True)
        prepare_as(network, stored)
        self._qat_attach(network)

    def _qat_back(self) -> nn.Module:
        """The float network again, in the place of the prepared one, with the same parameters."""
        before = self.__dict__.pop("_qat_before", None)
        if before is None:
            raise PrepareError("This network was prepared before this checkpoint was made, and in another way; load "
                               "the checkpoint into a fresh module.")
        twin, wanted = before
        for parameter in twin.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        parent, _, name = self.__dict__["_qat_network"].rpartition(".")
        if name:
            setattr(_part(self, parent), name, twin)
            return twin
        for key in ("_parameters", "_buffers", "_modules"):
            self.__dict__[key] = twin.__dict__[key]
        del self.__dict__["_qat"]
        return self

    # ------------------------------------------------------------------------------------------------ training

    def configure_callbacks(self) -> Any:
        """The user's, and the schedules, unless there are such already."""
        own = super().configure_callbacks()
        callbacks = [own] if isinstance(own, L.Callback) else list(own)
        trainer: Any = self.trainer
        given = (*trainer.callbacks, *callbacks)
        mine = self._qat_options().schedule
        schedule = next((c for c in given if isinstance(c, QuantizationSchedule)), mine)
        self.__dict__["_qat_schedule"] = schedule
        if schedule is mine and mine not in given:
            callbacks.append(mine)
        pruning = self._qat_options().prune
        if pruning is not None and not any(isinstance(c, PruningSchedule) for c in given):
            callbacks.append(PruningSchedule(pruning))
        return callbacks

    def on_train_start(self) -> None:
        """The user's. Lightning's tuners run without callbacks; then the ranges are found here."""
        trainer: Any = self.trainer
        schedule = self.__dict__["_qat_schedule"]
        if schedule not in trainer.callbacks:
            schedule.calibrate(trainer, self)
        super().on_train_start()

    def configure_optimizers(self) -> Any:
        """The user's optimizers, with groups of their own for learned scales."""
        loop = None if self._trainer is None else self._trainer.fit_loop
        fresh = loop is not None and loop._combined_loader is None
        configured = super().configure_optimizers()
        if loop is not None and fresh:
            # trainer.estimated_stepping_batches sets the training loader up before Lightning 2.6 restores the loader's
            # position, which would be lost. Without a loader it sets one up again, at the right time.
            loop._combined_loader = None
        give_scales_their_groups(self.quantized_network, configured, self._qat_options().scale_lr_factor)
        return configured

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As ever; but a step that runs for calibration logs nothing."""
        logged = self.__dict__.get("_qat_logged")
        if logged is None:
            super().log(name, value, *args, **kwargs)
        elif isinstance(value, Tensor):
            logged[name] = value.detach()

    # ----------------------------------------------------------------------------------------------- calibration

    @contextmanager
    def feeding(self, batches: Iterable[Any]) -> Iterator[list[Any]]:
        """The network's inputs in these batches; `qat.calibrate` and the like take them inside the block.

        Raises:
            ConfigError: the module's step never calls the network.
        """
        network, find = self.quantized_network, self._qat_options().inputs
        batches = list(batches)
        if find is not None:
            yield [find(batch) for batch in batches]
            return
        with processes.whole(network):
            found = [inputs for batch in batches for inputs in _handed_over(self, network, batch)]
        if found or not batches:
            yield found
        elif network is self:
            # It has no forward: it is its step. Called, it runs the step meanwhile.
            self.__dict__["forward"] = MethodType(_repeatable_step, self)
            try:
                yield [(batch, number) for number, batch in enumerate(batches)]
            finally:
                del self.__dict__["forward"]
        else:
            raise ConfigError(f"The step of {type(self).__name__} never calls {self.__dict__['_qat_network']!r} as a "
                              "module; give quantize inputs=, or network='' for the module itself.")


def deploy(module: L.LightningModule, batches: Iterable[Any], inplace: bool = False) -> tuple[nn.Module, Certificate]:
    """`qat.convert` for a trained module: its network, deployed, and the certificate.

    A network that ``ModelParallelStrategy`` has sharded is gathered first: call this on all processes then, and each
    gets the deployed network.

    Args:
        module: from `quantize`, trained; or a `QuantizedTraining`.
        batches: as its data loaders give them. A module without ``forward`` is compared in what its step returns and
            logs.
        inplace: freeze the module's own network.

    Raises:
        ConfigError: the module is not quantized; ``inplace`` for a sharded network that is the module itself.
    """
    if not isinstance(module, QuantizationAware | QuantizedTraining):
        raise ConfigError(f"{type(module).__name__} is not quantization-aware; say quantize(module, recipe) first.")
    with _gathered(module, inplace) as whole:
        moved = [transferred(whole, batch) for batch in batches]
        with whole.feeding(moved) as inputs:
            deployed, certificate = qat.convert(whole.quantized_network, inputs, inplace=inplace)
    deployed.__dict__.pop("forward", None)
    return deployed, certificate


@contextmanager
def _gathered(module: Any, keep: bool) -> Iterator[Any]:
    """The module, with a whole network in the place of a sharded one: inside the block, or to keep."""
    network = module.quantized_network
    if network is None or not is_sharded(network):
        yield module
    elif network is module:
        if keep:
            raise ConfigError(f"{type(module).__name__} is sharded as one and cannot be frozen in place: leave out "
                              "inplace.")
        copied: Any = gather(module)
        copied.__dict__["_trainer"] = module._trainer
        yield copied
        copied.__dict__["_trainer"] = None
    else:
        whole = gather(network)
        _exchange(module, network, whole)
        try:
            yield module
        finally:
            if not keep:
                _exchange(module, whole, network)


def _exchange(module: nn.Module, part: nn.Module, other: nn.Module) -> None:
    for parent in list(module.modules()):
        parent._modules.update({name: other for name, child in parent._modules.items() if child is part})


# ---------------------------------------------------------------------------------------------- finding the network


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in module.named_modules() if n]
        raise ConfigError(f"{type(module).__name__} has no part {name!r}{nearest(str(name), known)}.") from None


def _find_network(module: nn.Module) -> str:
    """The one child that holds all parameters, if it is a network and not a single layer or a list; else ``""``."""
    if any(p is not None for p in module._parameters.values()):
        return ""
    children = [(name, child) for name, child in module.named_children()
                if not isinstance(child, Metric | Distiller) and any(True for _ in child.parameters())]
    if len(children) != 1:
        return ""
    name, child = children[0]
    single = isinstance(child, nn.ModuleList | nn.ModuleDict) or quantized_type(child) is not None
    return "" if single else name


def _shape_of(network: nn.Module) -> tuple[nn.Module, dict[int, bool]]:
    """A copy of the modules of ``network`` around the same parameters and buffers, and what was trained."""
    tensors: dict[int, Any] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    wanted = {id(p): p.requires_grad for p in network.parameters()}
    return copy.deepcopy(network, tensors), wanted


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------ running the step


@contextmanager
def _example(module: QuantizationAware, network: nn.Module) -> Iterator[Any]:
    """One batch of the network's inputs, from where there is one; None: nowhere."""
    options = module._qat_options()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def moved(inputs: Any) -> Any:
        return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)

    if options.example_inputs is not None:
        yield moved(options.example_inputs)
        return
    array = module.example_input_array
    if array is not None:
        found = [moved(array)] if network is module else _calls(module, network, lambda: run(module, moved(array)))
        yield found[0] if found else None
        return
    trainer = module._trainer
    if trainer is None or not trainer.training or trace_symbolically(network) is not None:
        yield None
        return
    with isolate_rng(), closing(peek(trainer.fit_loop._data_source.dataloader())) as batches:
        batch = transferred(module, next(batches), device)
    with module.feeding([batch]) as inputs:
        yield inputs[0] if inputs else None


def _handed_over(module: QuantizationAware, network: nn.Module, batch: Any) -> list[Any]:
    """What the module's step hands to the network, call by call."""
    layers: list[Any] = [m for m in network.modules() if isinstance(m, QuantizedModule)]
    calibrating = [m.calibrating for m in layers]
    observing: list[tuple[Any, bool]] = [(q, q.observing) for q in network.modules() if isinstance(q, Quantizer)]
    uncalibrated = any(not q.calibrated for q, _ in observing)
    for quantizer, _ in observing:
        quantizer.observing = False
    for layer in layers:
        layer.calibrating = uncalibrated  # without ranges it computes in floating point
    try:
        return _calls(module, network, lambda: _step(module, batch))
    finally:
        for layer, was in zip(layers, calibrating):
            layer.calibrating = was
        for quantizer, on in observing:
            quantizer.observing = on


def _calls(module: nn.Module, network: nn.Module, call: Callable[[], Any]) -> list[Any]:
    """The inputs of ``network`` in all its calls during ``call()``, in eval and without gradients."""
    found: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and kwargs:
            bound = inspect.signature(network.forward).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
            if kwargs:
                raise ConfigError(f"{type(network).__name__} takes arguments that have no position beside others that "
                                  "have no name; give quantize inputs= and example_inputs=.")
        found.append(kwargs or args)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(module), torch.no_grad(), isolate_rng(), uncompiled():
            call()
    finally:
        handle.remove()
    return found


def _step(module: QuantizationAware, batch: Any) -> Any:
    """What the module's step returns and logs for a batch. The module keeps nothing of it: a double runs it."""
    double = _double(module)
    name = "training_step" if double.automatic_optimization else "validation_step"
    if not is_overridden(name, double, L.LightningModule):
        raise ConfigError(f"{type(module).__name__} has no {name} to calibrate with; give quantize inputs=.")
    step = getattr(double, name)
    takes = inspect.signature(step).parameters
    if "dataloader_iter" in takes:
        raise ConfigError(f"{type(module).__name__}.{name} fetches its batches itself; give quantize inputs=.")
    extra = {key: 0 for key in ("batch_idx", "dataloader_idx") if key in takes}
    if not extra and len(takes) > 1:
        extra_args = itertools.repeat(0, len([p for p in takes.values() if p.default is p.empty]) - 1)
        return {"returned": step(batch, *extra_args), "logged": double.__dict__["_qat_logged"]}
    return {"returned": step(batch, **extra), "logged": double.__dict__["_qat_logged"]}


def _repeatable_step(module: QuantizationAware, batch: Any, number: int) -> Any:
    """The step as a function of its batch alone, whatever it draws: batch ``number`` has random numbers of its own."""
    with isolate_rng():
        torch.manual_seed(stream_seed(number))
        return _step(module, batch)


def _double(module: QuantizationAware) -> Any:
    """The same module for one step: the same parts, but its own attributes, containers, buffers and metrics."""
    double = object.__new__(type(module))
    for key, value in module.__dict__.items():
        double.__dict__[key] = copy.copy(value) if type(value) in (list, dict, set, deque) else value
    double.__dict__.pop("forward", None)
    # steps that gather weights, or are compiled with the module, are bound to it
    if is_sharded(module) or getattr(module, "_compiler_ctx", None) is not None:
        without_methods(double)
    double.__dict__["_qat_logged"] = {}
    double._buffers.update({k: None if b is None else b.clone() for k, b in module._buffers.items()})
    for name, child in module._modules.items():
        parts = [] if child is None else list(child.modules())
        if any(isinstance(p, Metric) for p in parts) and not any(isinstance(p, QuantizedModule) for p in parts):
            double._modules[name] = copy.deepcopy(child)
    return double
