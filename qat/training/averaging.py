"""Exponential moving average of the weights: evaluated, checkpointed and deployed in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from qat.calibration import processes
from qat.errors import CheckpointError, ConfigError
from qat.rewriter import is_sharded
from qat.training.sharding import gathered, local, part_of, placed


def check_decay(decay: Any) -> float:
    """``decay`` if it lies between 0 and 1, else a ConfigError."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 < decay < 1.0:
        raise ConfigError(f"weight_average.decay lies between 0 and 1, such as 0.999; it is {decay!r}.")
    return float(decay)


class WeightAverage(L.Callback):
    """Keep an exponential moving average of the float master weights (Polyak and Juditsky 1992; Tarvainen 2017).

    After optimizer step ``n`` (0, 1, ...) each trainable parameter, learned scales included, and the running statistics
    of batch norms enter with ``average = d * average + (1 - d) * value``, ``d = min(decay, (1 + n) / (10 + n))``, in
    float32: the average forgets its start quickly and then has the length that ``decay`` asks for. Quantizer ranges are
    no part of it: they follow the activations of the weights that are trained.

    Validation and testing see the average. So does a checkpoint: its ``state_dict`` holds the average, and what
    resuming needs beside it lies with this callback. After ``fit`` the network holds the average, and that is what is
    deployed. Batch norm is re-estimated for it (``QuantizationSchedule.reestimate_batches``).

    Args:
        decay: between 0 and 1; 0.999 averages over about the last 1000 steps.

    Raises:
        ConfigError: a decay that is not between 0 and 1.
        CheckpointError: a checkpoint that was trained without an average, or of other parameters.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = check_decay(decay)
        self.steps = 0
        self._average: dict[str, Tensor] = {}  # in float32
        self._trained: dict[str, Tensor] | None = None  # what the average stands in for at present

    # -- the average -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._average:
            with _averaged(pl_module) as values:
                self._average = {name: value.float().clone() for name, value in values.items()}
            self.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.steps:  # gradients are still being accumulated
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with _averaged(pl_module) as values:
            for name, value in values.items():
                average = self._average[name]
                if bool(torch.isfinite(average).all()):  # a learned scale may get its start in the first step
                    average.lerp_(value.float(), 1 - decay)
                else:
                    average.copy_(value)
        self.steps = trainer.global_step

    # -- in the place of the weights ---------------------------------------------------------------------------------

    def apply(self, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights, until `restore`; does nothing the second time."""
        if self._average and self._trained is None:
            with _averaged(pl_module) as values:
                self._trained = {name: value.clone() for name, value in values.items()}
                _write(values, self._average)

    def restore(self, pl_module: L.LightningModule) -> None:
        """The weights that are being trained, again."""
        if self._trained is not None:
            with _averaged(pl_module) as values:
                _write(values, self._trained)
            self._trained = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # a validation of its own after fit leaves the average in place
            self.restore(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply(pl_module)  # a run resumed from its very last checkpoint had no step left to do

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._average:
            return
        with _averaged(pl_module) as values:
            named = dict(pl_module.named_parameters())
            trained = self._trained or values
            average = {name: gathered(value, named.get(name)) for name, value in self._average.items()}
            checkpoint["weight_average"] = {
                "steps": self.steps,
                "average": average,
                "trained": {name: gathered(trained[name], named.get(name)) for name in average},
            }
        checkpoint["state_dict"] = {
            name: placed(average[name].to(value.dtype), value) if name in average else value
            for name, value in checkpoint["state_dict"].items()
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # its state dict is the average already
        kept = checkpoint.get("weight_average")
        with _averaged(pl_module) as values:
            if kept is None or kept["average"].keys() != values.keys():
                why = "was trained without one" if kept is None else "holds one of other parameters"
                raise CheckpointError(f"The weight average cannot go on: the checkpoint {why}. Leave WeightAverage "
                                      "out, or start anew.")
            self.steps, self._trained = kept["steps"], None
            named = dict(pl_module.named_parameters())
            average, trained = ({name: part_of(kept[kind][name].to(value.device), named.get(name))
                                 for name, value in values.items()} for kind in ("average", "trained"))
            self._average = average
            _write(values, trained)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average, self._trained, self.steps = {}, None, 0


@contextmanager
def _averaged(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What is averaged, by name, to be read and written: trainable parameters, and the running statistics of norms.

    Of sharded parameters it is this process's own part.
    """
    with ExitStack() as stack, torch.no_grad():
        for unit in filter(is_sharded, list(module.modules())):
            stack.enter_context(processes.parts(unit))
        found = {name: local(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
        for name, part in module.named_modules():
            if getattr(part, "running_mean", None) is not None:
                found |= {f"{name}.{kind}": getattr(part, kind) for kind in ("running_mean", "running_var")}
        yield found


def _write(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, target in into.items():
        target.copy_(values[name])
