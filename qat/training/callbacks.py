"""The schedule of a quantized training run. Callbacks change states; they never swap modules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed as dist
from torch import nn

import qat
from qat.calibration import merge_batch_norm, merge_ranges, processes, start_merging
from qat.calibration.ranges import activation_quantizers
from qat.errors import ConfigError
from qat.modules.normalization import QuantizedBatchNorm
from qat.rewriter import prepared_state, quantized_modules
from qat.training.averaging import WeightAverage
from qat.training.strategy import check_strategy


class QuantizationSchedule(L.Callback):
    """Calibrate, observe and train, freeze the ranges, freeze batch norm; re-estimate batch norm after the last step.

    What holds at a step is a function of the step alone (and of whether calibration has happened, which is saved), so
    a resumed run continues in the same state. Validation and testing never move a range: observing is off meanwhile.

    It works with `QuantizedTraining`, and with any LightningModule that `quantize` made quantization-aware.

    With several processes ranges and batch-norm statistics are merged after each step, so that all processes have the
    same scales at every step, bit for bit, and fold the same gains. ``Trainer(sync_batchnorm=True)`` works too.

    The strategy is ``"ddp"`` or, where master weights, gradients and the optimizer's state are to be shared out,
    ``ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1)`` (FSDP2): the prepared network is
    sharded as one unit (:func:`~qat.training.shard`), and one trains with it what one trains with DDP. Checkpoints
    that it saves with ``save_distributed_checkpoint=False`` are those of one process: ``load_from_checkpoint`` takes
    them, and so does any other strategy to go on. Those of many files: ``python -m
    lightning.fabric.utilities.consolidate_checkpoint <folder>`` makes one file of each. After training,
    :func:`~qat.training.deploy` on all processes gathers the weights.

    For an average of the weights there is :class:`~qat.training.WeightAverage`; Lightning's own are refused.

    Args:
        calibration_batches: batches of training data that set the static ranges before the first step (and before the
            sanity check); a network that arrives calibrated keeps its ranges. They come from the data module's
            ``calibration_dataloader()``, if it has one. Several processes deal them out among themselves.
        observe: let the observers of static ranges follow the activations until the ranges are frozen.
        freeze_ranges_at: fraction of the run's optimizer steps; 1 or more: never.
        freeze_batch_norm_at: the same for batch-norm statistics.
        reestimate_batches: batches for new batch-norm statistics at the end of ``fit``; 0: none. Helps at 4 bits and
            below, where weights that oscillate between two codes corrupt the moving averages (Nagel et al., 2022).
    """

    def __init__(
        self,
        calibration_batches: int = 8,
        observe: bool = True,
        freeze_ranges_at: float = 1 / 3,
        freeze_batch_norm_at: float = 0.8,
        reestimate_batches: int = 0,
    ) -> None:
        for name, value in (("freeze_ranges_at", freeze_ranges_at), ("freeze_batch_norm_at", freeze_batch_norm_at)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"schedule.{name} is a fraction of the run, not {value!r}.")
        for name, value in (("calibration_batches", calibration_batches), ("reestimate_batches", reestimate_batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"schedule.{name} is a number of batches, not {value!r}.")
        self.calibration_batches, self.reestimate_batches = calibration_batches, reestimate_batches
        self.observe = observe
        self.freeze_ranges_at, self.freeze_batch_norm_at = freeze_ranges_at, freeze_batch_norm_at
        self.calibrated = False
        self._observing = self._ranges_frozen = self._batch_norm_frozen = False

    def state_dict(self) -> dict[str, Any]:
        return {"calibrated": self.calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calibrated = state_dict["calibrated"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        check_strategy(strategy)
        _check_averages(trainer)
        if isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm):
            strategy._layer_sync = SynchronizedBatchNorm()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layer_sync = _unapplied(trainer)
        if layer_sync is not None:
            layer_sync.apply(pl_module)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The first validation comes before the first training step, and needs ranges too.
        loop = trainer.fit_loop
        fresh = loop._combined_loader is None
        loop.setup_data()
        self.calibrate(trainer, pl_module)
        if fresh:
            loop._combined_loader = None  # training sets it up at its own time, as without a sanity check

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._observing = self._ranges_frozen = self._batch_norm_frozen = False
        self.calibrate(trainer, pl_module)
        network = prepared_network(pl_module)
        if processes.several_processes():
            start_merging(network)
        self._enter(network, trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        network = getattr(pl_module, "quantized_network", None)
        if network is not None and qat.is_prepared(network):
            compute_in_float(network, False)

    def calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the ranges that are missing."""
        network = prepared_network(pl_module)
        compute_in_float(network, False)
        if processes.several_processes():
            _check_batch_counts(trainer)
        missing = any(not q.calibrated for q in activation_quantizers(network))
        unseen = prepared_state(network).functions is None and not self.calibrated
        if self.calibration_batches and (missing or unseen):
            with training_inputs(trainer, pl_module, self.calibration_batches) as inputs:
                qat.calibrate(network, inputs, merge="batches" if _dealt(trainer) else "parts")
        self.calibrated = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(prepared_network(pl_module), trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if processes.several_processes():
            network = prepared_network(pl_module)
            if self._observing:
                merge_ranges(network)
            merge_batch_norm(network)

    def _enter(self, network: nn.Module, trainer: L.Trainer) -> None:
        """Bring the network into the state of this step."""
        progress = _progress(trainer)
        if progress >= self.freeze_ranges_at and not self._ranges_frozen:
            qat.set_observing(network, False)
            qat.freeze_ranges(network)
            self._observing, self._ranges_frozen = False, True
        if not self._ranges_frozen and self.observe and not self._observing:
            qat.set_observing(network, True)
            self._observing = True
        if progress >= self.freeze_batch_norm_at and not self._batch_norm_frozen:
            qat.freeze_batch_norm(network)
            self._batch_norm_frozen = True

    def _pause(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._observing:
            qat.set_observing(prepared_network(pl_module), False)
            self._observing = False  # the next training batch turns it on again

    on_validation_start = _pause
    on_test_start = _pause
    on_train_end = _pause

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layer_sync = _unapplied(trainer)
        if layer_sync is not None:
            layer_sync.revert(pl_module)
        # After fit and not after training: a run resumed from its very last checkpoint has no step left to do.
        if self.reestimate_batches:
            for average in (c for c in trainer.callbacks if isinstance(c, WeightAverage)):  # type: ignore[attr-defined]
                average.apply(pl_module)  # the statistics are those of the weights that will be deployed
            with training_inputs(trainer, pl_module, self.reestimate_batches) as inputs:
                qat.reestimate_batch_norm(prepared_network(pl_module), inputs)


class SynchronizedBatchNorm(LayerSync):
    """What ``Trainer(sync_batchnorm=True)`` does to a prepared network: its batch norms stay and are still folded.

    `QuantizationSchedule` puts it in the place of Lightning's plugin, which would exchange the modules.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        return self._synchronize(model, True)

    def revert(self, model: nn.Module) -> nn.Module:
        return self._synchronize(model, False)

    @staticmethod
    def _synchronize(model: nn.Module, on: bool) -> nn.Module:
        for module in model.modules():
            if isinstance(module, QuantizedBatchNorm):
                module.synchronized = on
        return model


def _unapplied(trainer: L.Trainer) -> SynchronizedBatchNorm | None:
    """The plugin of ``sync_batchnorm=True`` where Lightning leaves it alone, which is under ModelParallelStrategy."""
    found = getattr(trainer.strategy, "_layer_sync", None)
    sharding = isinstance(trainer.strategy, ModelParallelStrategy)
    return found if sharding and isinstance(found, SynchronizedBatchNorm) else None


def _check_averages(trainer: L.Trainer) -> None:
    """Refuse Lightning's own averages of weights, which know a prepared network's parameters, but not its ranges.

    Raises:
        ConfigError: what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} cannot average a quantized network: it copies the module before there are "
                "ranges, and writes over zero points. Use qat.training.WeightAverage(decay=0.999) in its place."
            )


def compute_in_float(network: nn.Module, on: bool) -> None:
    """Whether a prepared network computes in floating point, as it must where there are no ranges yet."""
    for module in quantized_modules(network).values():
        module.calibrating = on


def _check_batch_counts(trainer: L.Trainer) -> None:
    """Processes with different numbers of batches would wait for each other for ever: say so instead.

    Raises:
        ConfigError: on all of them.
    """
    count = torch.tensor([float(trainer.num_training_batches)], dtype=torch.float64)
    least, greatest = (processes.reduced(count, op).item() for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if least != greatest:
        raise ConfigError(
            f"One process has {least:g} training batches, another {greatest:g}: all need the same number. Use a "
            "DistributedSampler, or limit_train_batches."
        )


def prepared_network(pl_module: L.LightningModule, callback: str = "QuantizationSchedule") -> nn.Module:
    """The prepared network of a module; :class:`~qat.errors.ConfigError` if it has none."""
    network = getattr(pl_module, "quantized_network", None)
    if network is None or not qat.is_prepared(network):
        raise ConfigError(
            f"{callback} needs a prepared network: say qat.training.quantize(module, recipe), or give "
            "QuantizedTraining a recipe."
        )
    return network


def position(trainer: L.Trainer) -> tuple[float, float]:
    """The optimizer steps behind us and those of the whole run, infinite where it has no end.

    Under manual optimization a batch may take any number of optimizer steps, so batches are counted, or steps if
    ``max_steps`` ends the run before.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step, trainer.estimated_stepping_batches
    batches = trainer.num_training_batches * (trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf)
    counts = [(trainer.fit_loop.epoch_loop.total_batch_idx + 1, batches)]
    if trainer.max_steps > 0:
        counts.append((trainer.global_step, trainer.max_steps))
    return max(counts, key=lambda count: (count[0] / count[1], -count[1]))


def total_steps(trainer: L.Trainer, needed_by: str) -> int:
    """The optimizer steps of the whole run.

    Raises:
        ConfigError: it has no end.
    """
    _, total = position(trainer)
    if total == math.inf:
        raise ConfigError(f"{needed_by} must know how long the training is, and this run has no end: set max_steps, or "
                          "max_epochs where the data has a length.")
    return int(total)


def _progress(trainer: L.Trainer) -> float:
    """The fraction of the run that is behind us; 0 where the run has no end."""
    behind, total = position(trainer)
    return behind / total


@contextmanager
def training_inputs(trainer: L.Trainer, pl_module: L.LightningModule, count: int) -> Iterator[Iterable[Any]]:
    """The network's inputs in ``count`` training batches; training loaders and random numbers stay where they are."""
    feeding: Any = pl_module.feeding
    with (
        trainer.precision_plugin.forward_context(),
        isolate_rng(),
        feeding(_batches(trainer, pl_module, count)) as inputs,
    ):
        yield inputs


def _dealt(trainer: L.Trainer) -> bool:
    """Whether several processes deal out the same batches, instead of each having a part of each batch."""
    return hasattr(trainer.datamodule, "calibration_dataloader")  # type: ignore[attr-defined]


def _batches(trainer: L.Trainer, pl_module: L.LightningModule, count: int) -> Iterator[Any]:
    """The batches of this process: of the data module's ``calibration_dataloader``, or of the training loader."""
    first, step = 0, 1
    if _dealt(trainer):
        loaders: Any = trainer.datamodule.calibration_dataloader()  # type: ignore[attr-defined]
        first, step = trainer.global_rank, trainer.world_size
    else:
        training = trainer.fit_loop._combined_loader
        if training is None:
            raise ConfigError("There are no training batches to calibrate with: limit_train_batches is 0.")
        loaders = CombinedLoader(training.iterables, training._mode)
    with closing(peek(loaders)) as batches:
        for batch in itertools.islice(batches, first, count, step):
            yield transferred(pl_module, batch)


def peek(loaders: Any) -> Generator[Any]:
    """Batches of training loaders, in whatever form Lightning takes them, which stay where they are.

    Raises:
        ConfigError: they can be read once only.
    """
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    for part in combined.flattened:
        if isinstance(part, Iterator):
            raise ConfigError(
                "The training data is an iterator: what calibration takes from it would be missing in training. Give "
                "the data module a calibration_dataloader()."
            )
    positions = [(part, part.state_dict()) for part in combined.flattened if hasattr(part, "state_dict")]
    try:
        for batch, _, _ in combined:
            yield batch
    finally:
        for part, position in positions:
            part.load_state_dict(position)


def transferred(pl_module: L.LightningModule, batch: Any, device: torch.device | None = None) -> Any:
    """A loader's batch as a step gets it: through the transfer hooks of the module, or of its data module."""
    module: Any = pl_module
    if module._trainer is not None:
        batch = module._trainer.precision_plugin.convert_input(batch)
    return module._apply_batch_transfer_handler(module._on_before_batch_transfer(batch), device or module.device)
