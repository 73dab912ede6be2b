"""From a composed Hydra configuration to the plain, complete and checked one that a run is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import qat
from qat.errors import ConfigError, nearest
from qat.training.build import allow_targets, check, check_arguments, plain
from qat.training.callbacks import QuantizationSchedule
from qat.training.ladder import phases
from qat.training.oscillation import Oscillations

# What describes the run, and is stored with it ...
STORED = (
    "seed", "fold", "model", "data", "recipe", "schedule", "loss", "metrics", "optimizer", "scheduler", "trainer",
    "checkpoint", "early_stopping", "logger",
)  # fmt: skip
# ... and what describes one call of the command.
OF_THE_CALL = ("resume", "debug", "allow_targets", "run", "deployed")


def check_keys(section: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse unknown keys, naming the nearest known one."""
    for key in section:
        if key not in known:
            raise ConfigError(f"{where}{key} is not an option{nearest(key, known) or '.'}")


def run_config(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The stored part of ``config`` as plain containers, with the recipe written out in full.

    Raises:
        ConfigError: unknown keys anywhere, or no recipe.
        RecipeError: a recipe that cannot be read.
    """
    values = plain(config)
    check_keys(values, STORED + OF_THE_CALL, "")
    check_keys(
        values["schedule"],
        ("epochs", "learning_rate", "weight_decay", "scale_learning_rate", "calibration_batches", "phases", "ladder",
         "oscillation"),
        "schedule.",
    )  # fmt: skip
    check_arguments(QuantizationSchedule, list(values["schedule"]["phases"]), "schedule.phases")
    check_arguments(Oscillations, list(values["schedule"].get("oscillation") or {}), "schedule.oscillation")
    phases(values["schedule"])
    check_keys(values["checkpoint"], ("every_n_steps", "monitor", "mode"), "checkpoint.")
    check_keys(values["early_stopping"], ("monitor", "patience", "mode", "min_delta"), "early_stopping.")
    check_keys(values["logger"], ("csv", "tensorboard"), "logger.")
    if not values["metrics"]:
        raise ConfigError("metrics needs at least one torchmetrics config: the first one is the score of the table.")
    for name in ("seed", "fold"):
        if not isinstance(values[name], int) or values[name] < 0:
            raise ConfigError(f"{name} must be a whole number of at least 0, not {values[name]!r}.")
    allow_targets(*(values.get("allow_targets") or ()))
    check(values["model"], "model")
    check(values["data"], "data")
    check(values["loss"], "loss")
    check(values["optimizer"], "optimizer", "params")
    if values["scheduler"]:
        check(values["scheduler"], "scheduler", "optimizer")
    for name, metric in values["metrics"].items():
        check(metric, f"metrics.{name}")
    return {key: values[key] for key in STORED} | {"recipe": read_recipe(values["recipe"]).to_dict()}


def read_recipe(section: Mapping[str, Any] | None) -> qat.Recipe:
    """The recipe that the ``recipe`` section names: a file (``path``), a preset with overrides, or a whole recipe."""
    options = {key: value for key, value in (section or {}).items() if value is not None}
    if path := options.pop("path", None):
        if not Path(path).is_file():
            raise ConfigError(f"recipe.path: there is no file {path}.")
        return qat.Recipe.load(path)
    if not options:
        raise ConfigError("There is no recipe, so there is nothing to quantize. Choose one, such as recipe=w8a8.")
    if preset := options.pop("preset", None):
        return qat.Recipe.preset(preset, **options)
    return qat.Recipe.from_dict(options)


def stored_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in ``folder``.

    Raises:
        ConfigError: there is no run, or its configuration has unknown or missing keys.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml.")
    values = plain(OmegaConf.load(path))
    check_keys(values, STORED, f"{path}: ")
    if missing := [key for key in STORED if key not in values]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}.")
    return values
