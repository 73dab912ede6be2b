"""The schedule of pruning in a quantized training run."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L

from qat.compression.pruning import Pruning, attach, set_sparsity
from qat.errors import ConfigError
from qat.training.callbacks import position, prepared_network, total_steps


class PruningSchedule(L.Callback):
    """Lets the sparsity grow with the training, on the cubic of :meth:`qat.Pruning.sparsity_at`.

    Masks are made anew at steps that depend on the step's number alone, from the weights (or scores) as they are then,
    and are saved with the network: a resumed run goes on with the same masks. From ``end`` on they stand still. Under
    manual optimization, where a batch may take any number of optimizer steps, fractions are of the batches.

    Give the same ``pruning`` to :class:`~qat.training.QuantizedTraining` (``prune=``), which makes the masks before
    the optimizer; movement pruning depends on that, since its scores are parameters. ``qat.training.quantize(...,
    prune=...)`` does so too, and needs no callback: it brings one.

    Args:
        pruning: a :class:`qat.Pruning`, or a dict of its options.
    """

    def __init__(self, pruning: Pruning | dict[str, Any]) -> None:
        self.pruning = pruning if isinstance(pruning, Pruning) else Pruning.from_dict(pruning)
        if not self.pruning.masks:
            raise ConfigError(f"PruningSchedule moves masks; prune.method {self.pruning.method} has none.")
        self._updated: int | None = None  # the optimizer steps before the last update
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        return {"updated": self._updated, "finished": self._finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated, self._finished = state_dict["updated"], state_dict["finished"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._updated, self._finished = None, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total_steps(trainer, "The pruning schedule")
        layers = attach(prepared_network(pl_module, "PruningSchedule"), self.pruning)  # nothing where it was done
        if self.pruning.method == "movement":
            optimized = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
            if not all(id(m.weight_quantizer.scores) in optimized for m in layers.values() if m.weight_quantizer):
                raise ConfigError("Movement pruning trains scores, which the optimizer does not have: give "
                                  "QuantizedTraining, or quantize, the same prune=.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, first, last = self._place(trainer)
        waiting = self._updated is not None and trainer.global_step - self._updated < self.pruning.every_n_steps
        if self._finished or step < first or (waiting and step < last):
            return
        self._updated, self._finished = trainer.global_step, step >= last
        share = self.pruning.sparsity
        if not self._finished:
            done = (step - first) / (last - first)
            share = self.pruning.sparsity_at(self.pruning.begin + done * (self.pruning.end - self.pruning.begin))
        set_sparsity(prepared_network(pl_module, "PruningSchedule"), self.pruning, share)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._finished:
            step, _, last = self._place(trainer)
            warnings.warn(f"training stopped at step {step:g}, before the pruning schedule ended at step {last}: the "
                          "model is less sparse than prune.sparsity says", stacklevel=2)

    def _place(self, trainer: L.Trainer) -> tuple[float, int, int]:
        """The step that comes, and those at which the sparsity begins to grow and is reached."""
        step, total = position(trainer)
        last = max(0, min(int(total) - 1, int(self.pruning.end * total)))
        return step, min(last, int(self.pruning.begin * total)), last
