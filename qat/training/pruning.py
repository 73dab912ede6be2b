"""The schedule of pruning in a quantized training run."""

from __future__ import annotations

import warnings
from typing import Any, cast

import lightning.pytorch as L
from torch import nn

from qat.compression.pruning import Pruning, attach, set_sparsity
from qat.errors import ConfigError
from qat.rewriter import is_prepared


class PruningSchedule(L.Callback):
    """Lets the sparsity grow with the training, on the cubic of :meth:`qat.Pruning.sparsity_at`.

    Masks are made anew at steps that depend on the step's number alone, from the weights (or scores) as they are then,
    and are saved with the network: a resumed run goes on with the same masks. From ``end`` on they stand still.

    Give the same ``pruning`` to :class:`~qat.training.QuantizedTraining` (``prune=``), which makes the masks before
    the optimizer; movement pruning depends on that, since its scores are parameters.

    Args:
        pruning: a :class:`qat.Pruning`, or a dict of its options.
    """

    def __init__(self, pruning: Pruning | dict[str, Any]) -> None:
        self.pruning = pruning if isinstance(pruning, Pruning) else Pruning.from_dict(pruning)
        if not self.pruning.masks:
            raise ConfigError(f"PruningSchedule moves masks; prune.method {self.pruning.method} has none.")
        self._first = self._last = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = _network(pl_module)
        layers = attach(network, self.pruning)  # adds nothing where configure_model has done it
        if self.pruning.method == "movement":
            optimized = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
            if not all(id(m.weight_quantizer.scores) in optimized for m in layers.values() if m.weight_quantizer):
                raise ConfigError("Movement pruning trains scores, which the optimizer does not have: give "
                                  "QuantizedTraining the same prune=.")
        steps = max(1, int(trainer.estimated_stepping_batches))
        self._last = min(steps - 1, int(self.pruning.end * steps))
        self._first = min(self._last, int(self.pruning.begin * steps))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == self._last or (step - self._first) % self.pruning.every_n_steps == 0
        if self._first <= step <= self._last and due:
            done = 1.0 if step == self._last else (step - self._first) / (self._last - self._first)
            progress = self.pruning.begin + done * (self.pruning.end - self.pruning.begin)
            share = self.pruning.sparsity if step == self._last else self.pruning.sparsity_at(progress)
            set_sparsity(_network(pl_module), self.pruning, share)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step <= self._last:
            warnings.warn(f"training stopped at step {trainer.global_step}, before the pruning schedule ended at step "
                          f"{self._last}: the model is less sparse than prune.sparsity says", stacklevel=2)


def _network(pl_module: L.LightningModule) -> nn.Module:
    network = getattr(pl_module, "network", None)
    if network is None or not is_prepared(network):
        raise ConfigError("PruningSchedule needs a prepared network: give QuantizedTraining a recipe.")
    return cast(nn.Module, network)
