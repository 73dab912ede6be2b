"""From a composed Hydra configuration to the plain, complete and checked one that a run is made of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import qat
from qat.compression.distillation import Distillation
from qat.deploy.checkpoint import MANIFEST
from qat.deploy.configurations import NAMED_BY_USER
from qat.deploy.export import load_format
from qat.errors import ConfigError, nearest
from qat.pipeline.evaluation import MODELS
from qat.training.averaging import check_decay
from qat.training.build import allow_targets, build, check, check_arguments, plain
from qat.training.callbacks import QuantizationSchedule
from qat.training.ladder import phases
from qat.training.oscillation import Oscillations

# What describes the run, and is stored with it ...
STORED = (
    "mode", "seed", "fold", "model", "pretrained", "data", "recipe", "schedule", "prune", "distill", "loss", "metrics",
    "optimizer", "scheduler", "trainer", "checkpoint", "early_stopping", "logger", "weight_average", "compile",
    "target", "export",
)  # fmt: skip
# ... what becomes part of the recipe ...
FOLDED = ("calibration",)
# ... and what describes one call of the command; first what plan= takes.
OF_THE_PLAN = (
    "plan", "device", "context", "batch", "kv_bits", "activation_bits", "group_size", "scale_dtype", "zero_points",
    "attention", *NAMED_BY_USER,
)  # fmt: skip
OF_THE_CALL = ("resume", "resume_sweep", "debug", "allow_targets", "run", "deployed", "sweep", "runtimes",
               *OF_THE_PLAN)
MODES = ("qat", "ptq")
OF_THE_TEACHER = ("teacher", "teacher_model", "cache", "control")
"""Keys of ``distill`` that say who teaches whom; the others are those of `qat.Distillation`."""
BEST = "target"
"""``recipe=target``: the preset that the target names, fitted to it."""
OWN = "float"
"""``distill.teacher=float``: the run's own float model."""


def check_keys(section: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse unknown keys, naming the nearest known one."""
    for key in section:
        if key not in known:
            raise ConfigError(f"{where}{key} is not an option{nearest(key, known) or '.'}")


def check_number(section: Mapping[str, Any], key: str, where: str, least: float, whole: bool = False,
                 above: bool = False, optional: bool = False) -> None:
    """Refuse what is not a (whole) number of at least, or ``above``, this size.

    Raises:
        ConfigError: naming the option.
    """
    value: Any = section.get(key)
    if value is None and (optional or key not in section):
        return
    number = not isinstance(value, bool) and isinstance(value, int if whole else int | float)
    if not number or not (value > least if above else value >= least):
        raise ConfigError(f"{where}.{key} must be a {'whole ' if whole else ''}number "
                          f"{'above' if above else 'of at least'} {least:g}, not {value!r}.")


def run_config(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The stored part of ``config`` as plain containers, with the recipe written out in full.

    Raises:
        ConfigError: unknown keys anywhere, or no recipe.
        RecipeError: a recipe that cannot be read.
    """
    values = plain(config)
    check_keys(values, STORED + FOLDED + OF_THE_CALL, "")
    if values["mode"] not in MODES:
        raise ConfigError(f"mode: {values['mode']!r} is unknown{nearest(str(values['mode']), MODES) or '.'} "
                          f"Choices: {', '.join(MODES)}.")
    pretrained = values["pretrained"]
    if pretrained is not None:
        if not isinstance(pretrained, str) or not Path(pretrained).is_dir():
            raise ConfigError(f"pretrained: there is no folder {pretrained!r}.")
        values["pretrained"] = str(Path(pretrained).resolve())
    check_keys(
        values["schedule"],
        ("epochs", "learning_rate", "control_learning_rate", "weight_decay", "scale_learning_rate",
         "offset_learning_rate", "steps_per_batch", "calibration_batches", "phases", "ladder", "oscillation"),
        "schedule.",
    )  # fmt: skip
    for name in ("learning_rate", "control_learning_rate", "weight_decay", "scale_learning_rate",
                 "offset_learning_rate"):
        check_number(values["schedule"], name, "schedule", 0, optional=name == "control_learning_rate")
    check_number(values["schedule"], "epochs", "schedule", 0, above=True)
    check_number(values["schedule"], "calibration_batches", "schedule", 1, whole=True)
    check_number(values["checkpoint"], "every_n_steps", "checkpoint", 1, whole=True)
    check_number(values["trainer"], "accumulate_grad_batches", "trainer", 1, whole=True, optional=True)
    if isinstance(values["optimizer"], dict):
        check_number(values["optimizer"], "lr", "optimizer", 0)
    check_arguments(QuantizationSchedule, list(values["schedule"]["phases"]), "schedule.phases")
    pruning = qat.Pruning.from_dict(values["prune"])
    if values["mode"] == "ptq" and (pruning.masks or (values["distill"] or {}).get("teacher") is not None):
        raise ConfigError("mode=ptq trains nothing after quantizing, which distill= and prune= need (all but "
                          "prune=channels): leave them out, or take mode=qat.")
    if values["mode"] == "ptq" and pretrained is not None and pruning.method == "channels":
        raise ConfigError("prune=channels looks at a whole model, and mode=ptq with pretrained= never has it: leave it "
                          "out.")
    if pruning.masks and values["checkpoint"]["monitor"]:
        raise ConfigError("checkpoint.monitor keeps the best weights, which may be from before the pruning was done: "
                          "with prune= leave it out.")
    check_arguments(Oscillations, list(values["schedule"].get("oscillation") or {}), "schedule.oscillation")
    phases(values["schedule"])
    check_keys(values["checkpoint"], ("every_n_steps", "monitor", "mode"), "checkpoint.")
    check_keys(values["early_stopping"], ("monitor", "patience", "mode", "min_delta"), "early_stopping.")
    check_keys(values["logger"], ("csv", "tensorboard"), "logger.")
    check_keys(values["weight_average"], ("decay",), "weight_average.")
    if values["weight_average"]["decay"] is not None:
        check_decay(values["weight_average"]["decay"])
    if values["compile"] is not None:
        if not isinstance(values["compile"], dict):
            raise ConfigError("compile holds options of torch.compile, such as compile={mode: default}; null: none.")
        check_arguments(torch.compile, list(values["compile"]), "compile")
    if not values["metrics"]:
        raise ConfigError("metrics needs at least one torchmetrics config: the first one is the score of the table.")
    logged = ["train_loss", "val_loss", *(f"val_{name}" for name in values["metrics"])]
    for section in ("checkpoint", "early_stopping"):
        monitor = values[section]["monitor"]
        if monitor is not None and monitor not in logged:
            raise ConfigError(f"{section}.monitor: {monitor!r} is not logged{nearest(str(monitor), logged) or '.'} "
                              f"Logged are {', '.join(logged)}.")
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
    target = (values["target"] or {}).get("name")
    check_keys(values["target"] or {}, ("name",), "target.")
    recipe, changes = fitted_recipe(values["recipe"], target, values.get("calibration"), values["model"])
    written_out = {
        "recipe": recipe.to_dict(), "prune": pruning.to_dict(), "distill": distill_config(values["distill"]),
        "target": {"name": target, "changes": changes}, "export": export_formats(values["export"]),
    }  # fmt: skip
    return {key: values[key] for key in STORED} | written_out


def read_recipe(section: Mapping[str, Any] | None, calibration: Any = None) -> qat.Recipe:
    """The recipe that the ``recipe`` section names: a file (``path``), a preset with overrides, or a whole recipe.

    Args:
        calibration: algorithms in the place of those of the recipe; None: those of the recipe.
    """
    recipe = _named_recipe(section)
    return recipe if calibration is None else dataclasses.replace(recipe, calibration=calibration)


def fitted_recipe(section: Mapping[str, Any] | None, target: str | None, calibration: Any,
                  model: Mapping[str, Any]) -> tuple[qat.Recipe, list[str]]:
    """The recipe of a run, as its target can run it, and what was changed and why.

    Args:
        target: a name of :mod:`qat.targets`; None: the recipe is as it is written.
        model: the config of the network; files of some targets hold scales in its floating point type.

    Raises:
        ConfigError: ``recipe=target`` without a target.
        UnsupportedError: an unknown target, the nearest is named; a scheme that has no counterpart there.
    """
    section = dict(section or {})
    if section.get("preset") == BEST and section.get("path") is None:
        if target is None:
            raise ConfigError("recipe=target is what a target runs best: say which, such as target=onnxruntime.")
        section["preset"] = qat.targets.get(target).recipe
    recipe = read_recipe(section, calibration)
    if target is None:
        return recipe, []
    return qat.targets.adjust(recipe, target, _dtype(model) if qat.targets.get(target).scale_dtype == "model"
                              else "float32")


def _dtype(model: Mapping[str, Any]) -> str:
    """The commonest floating point type of a network's parameters."""
    with qat.without_weights():
        network = build(model, "model")
    kinds = Counter(str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.is_floating_point())
    return kinds.most_common(1)[0][0] if kinds else "float32"


def export_formats(wanted: Any) -> list[str]:
    """``export:`` as a list; formats whose extra is missing are an error now, not after the training.

    Raises:
        ConfigError: it is neither null, nor a name, nor a list of names, each once.
        UnsupportedError: an unknown format, the nearest is named; its extra is missing.
    """
    formats = [] if wanted is None else [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(formats, list) or len({str(name) for name in formats}) < len(formats):
        raise ConfigError(f"export is a list of formats, each once, such as [onnx,gguf], not {wanted!r}.")
    for name in formats:
        load_format(name)
    return formats


def _named_recipe(section: Mapping[str, Any] | None) -> qat.Recipe:
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


def read_config(path: Path) -> DictConfig:
    """The configuration in a YAML file, as it is written.

    Raises:
        ConfigError: it holds none, or is damaged.
    """
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} is damaged: it is no mapping.")
    return loaded


def stored_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in ``folder``.

    Raises:
        ConfigError: there is no run, or its configuration has unknown or missing keys.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml.")
    values: dict[str, Any] = plain(read_config(path))
    check_keys(values, STORED, f"{path}: ")
    if missing := [key for key in STORED if key not in values]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}.")
    return values


def distill_config(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ``distill`` section, checked, complete, with absolute paths; ``{"teacher": None}`` where nobody teaches.

    Raises:
        ConfigError: an unknown key, a wrong value, a teacher that is not there.
    """
    options = dict(section or {})
    if options.get("teacher") is None:
        return {"teacher": None}
    teacher, cache = options["teacher"], options.get("cache", False)
    if not isinstance(teacher, str):
        raise ConfigError(f"distill.teacher must be float or the folder of a run or a deployed model, not {teacher!r}.")
    if teacher != OWN:
        teacher_place(Path(teacher), options.get("teacher_model"))
        teacher = str(Path(teacher).resolve())
    if not isinstance(cache, bool | str):
        raise ConfigError(f"distill.cache must be true, false or a folder, not {cache!r}.")
    control = options.get("control", False)
    if not isinstance(control, bool):
        raise ConfigError(f"distill.control must be true or false, not {control!r}.")
    rest = Distillation.from_dict({k: v for k, v in options.items() if k not in OF_THE_TEACHER}).to_dict()
    return {
        "teacher": teacher,
        "teacher_model": options.get("teacher_model"),
        "cache": str(Path(cache).resolve()) if isinstance(cache, str) else cache,
        "control": control,
        **rest,
    }


def teacher_place(folder: Path, architecture: Mapping[str, Any] | None) -> tuple[Path, str, Mapping[str, Any]]:
    """Where a teacher's weights are, as (run folder or deployed folder, which model, config of the architecture)."""
    where = f"distill.teacher={folder}"
    if not folder.is_dir():
        raise ConfigError(f"{where}: there is no such folder. Name a run folder, a deployed folder, or float.")
    if (folder / MANIFEST).is_file():
        homes, model, root = [folder, folder.resolve().parent], "deployed", folder
    elif (folder / "weights.safetensors").is_file():
        homes, model, root = [folder.resolve().parent], folder.resolve().name, folder.resolve().parent
        if model not in MODELS:
            raise ConfigError(f"{where}: {model} is no stage of a run; the stages are {', '.join(MODELS)}.")
    elif (folder / "config.yaml").is_file():
        homes, model, root = [folder], OWN, folder
    else:
        raise ConfigError(f"{where} is neither a run folder (config.yaml) nor a deployed folder ({MANIFEST}).")
    home = next((h for h in homes if (h / "config.yaml").is_file()), None)
    if model == "deployed":
        if architecture is not None:
            check(architecture, "distill.teacher_model")
            return root, model, {"model": plain(architecture)}
        if home is None:
            raise ConfigError(f"{where} lies in no run folder, so its architecture is not known: describe it in "
                              "distill.teacher_model, a config with a `_target_`.")  # fmt: skip
    elif architecture is not None:
        raise ConfigError(f"{where} has an architecture of its own: leave out distill.teacher_model.")
    elif home is None:
        raise ConfigError(f"{where}: there is no config.yaml beside it, so it belongs to no run.")
    assert home is not None
    loaded = read_config(home / "config.yaml")
    if not {"model", "recipe"} <= loaded.keys():
        raise ConfigError(f"{where}: {home / 'config.yaml'} does not describe a run.")
    return root, model, {key: plain(loaded[key], key) for key in ("model", "recipe", "pretrained") if key in loaded}
