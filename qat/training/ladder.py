"""The ladder of bit widths in one run: each width starts from what the next wider one has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch

import qat
from qat.errors import ConfigError, SpecError, nearest
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import widened
from qat.training.callbacks import QuantizationSchedule, position, prepared_network, total_steps, training_inputs
from qat.training.data import stream_seed
from qat.training.oscillation import Oscillations


class Ladder(L.Callback):
    """Train on higher rungs first: wider weights, wider activations, or both (see :func:`qat.set_rung`).

    No module is swapped and no tensor of the state changes its shape: quantizers work on a wider grid for a while. What
    rung holds at a step is a function of the step alone; whether it has been entered, so that its ranges were found, is
    saved. So a resumed run goes on in the same state, to the same bits.

    Put it in front of :class:`QuantizationSchedule`, whose ranges freeze after the last rung.

    Args:
        rungs: in order, each ``{until: fraction of the run's optimizer steps, weight: bits, input: bits}``; a width
            that is left out is the recipe's own. After the last one everything has its own width.
        batches: batches of training data for the ranges of each rung.

    Raises:
        ConfigError: unknown keys, fractions that do not rise, widths that no grid has.
    """

    def __init__(self, rungs: Sequence[Mapping[str, Any]], batches: int = 8) -> None:
        reached = 0.0
        for number, rung in enumerate(rungs):
            where = f"schedule.ladder[{number}]"
            if not isinstance(rung, Mapping):
                raise ConfigError(f"{where} is a mapping such as {{until: 0.3, weight: 8, input: 8}}, not {rung!r}.")
            for key in rung:
                if key not in ("until", "weight", "input"):
                    raise ConfigError(f"{where}.{key} is not an option{nearest(key, ('until', 'weight', 'input'))}.")
            until = rung.get("until")
            if not isinstance(until, int | float) or not reached < until < 1:
                raise ConfigError(f"{where}.until must be a fraction between {reached:g} and 1, not {until!r}.")
            reached = until
            for key in ("weight", "input"):
                if (bits := rung.get(key)) is not None:
                    try:
                        widened(TensorSpec("binary"), bits, key == "weight", False)
                    except SpecError as error:
                        raise ConfigError(f"{where}.{key}: {error}.") from None
        if batches < 1:
            raise ConfigError(f"The ranges of a rung need at least one batch, not {batches}.")
        self.rungs = [dict(rung) for rung in rungs]
        self.batches = batches
        self.rung: int | None = None  # not entered yet

    def state_dict(self) -> dict[str, Any]:
        return {"rung": self.rung}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rung = state_dict["rung"]

    def bits(self, rung: int) -> dict[str, int | None]:
        """The widths of a rung; beyond the last one: None, their own."""
        widths = self.rungs[rung] if rung < len(self.rungs) else {}
        return {key: widths.get(key) for key in ("weight", "input")}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total_steps(trainer, "A ladder")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, QuantizationSchedule):
                self.check_beside(callback)
        self._restore(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Step down to the rung of this step, if it is another one.

        Here and not when training starts: there, a resumed loader stands before this step's batch, here behind it as
        in an unbroken run. For loaders that shuffle by the global generator it is seeded from the step.
        """
        behind, total = position(trainer)
        progress = behind / total
        rung = sum(progress >= rung["until"] for rung in self.rungs)
        if rung != self.rung:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_seed(trainer.global_step))
                with training_inputs(trainer, pl_module, self.batches) as inputs:
                    qat.set_rung(prepared_network(pl_module), inputs, **self.bits(rung))
            self.rung = rung

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A network that was built anew, and loaded from a checkpoint of a rung, works at that rung again."""
        if self.rung is not None:
            qat.set_rung(prepared_network(pl_module), None, **self.bits(self.rung))

    on_validation_start = _restore
    on_test_start = _restore
    on_predict_start = _restore

    def check_beside(self, schedule: QuantizationSchedule) -> None:
        """Refuse a schedule that freezes ranges while the widths still change."""
        end = self.rungs[-1]["until"] if self.rungs else 0.0
        if schedule.freeze_ranges_at < end:
            raise ConfigError(
                f"schedule.phases.freeze_ranges_at {schedule.freeze_ranges_at:g} comes before the end of the ladder's "
                f"last rung, {end:g}: ranges that are frozen cannot follow a new width."
            )


def phases(schedule: Mapping[str, Any]) -> list[L.Callback]:
    """The callbacks that a ``schedule`` section asks for, for a network that arrives calibrated.

    Raises:
        ConfigError: options that mean nothing, or not beside each other.
    """
    following = QuantizationSchedule(calibration_batches=0, **schedule["phases"])
    callbacks: list[L.Callback] = [following]
    if rungs := schedule.get("ladder"):
        if not isinstance(rungs, list | tuple):
            raise ConfigError(f"schedule.ladder is a list of rungs such as {{until: 0.3, weight: 8}}, not {rungs!r}.")
        ladder = Ladder(rungs, schedule["calibration_batches"])
        ladder.check_beside(following)
        callbacks.insert(0, ladder)  # in front: ranges that are observed and frozen are those of the rung that holds
    oscillations = Oscillations(**schedule.get("oscillation") or {})
    if oscillations.active:
        callbacks.append(oscillations)
    return callbacks
