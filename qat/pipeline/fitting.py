"""The trainings of a run: how long they are, Lightning's trainer with its callbacks and logs, and how they continue."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

from qat.errors import ConfigError
from qat.pipeline.evaluation import weights_file
from qat.pipeline.storage import AtomicCheckpointIO, save_weights
from qat.training.averaging import WeightAverage
from qat.training.build import check_arguments
from qat.training.module import QuantizedTraining


class Fitting:
    """Trains, stage by stage, on the data of a run.

    Args:
        config: the run's: plain, resolved and checked.
        folder: the run's; a stage writes below its own name there.
        data: a Lightning data module.
        console: where to show progress.

    Raises:
        ConfigError: options of the trainer that do not exist, or do not go with a run.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path, data: L.LightningDataModule, console: Console) -> None:
        self.config, self.folder, self.data, self.console = config, folder, data, console
        options = config["trainer"]
        check_arguments(L.Trainer, list(options), "trainer")
        self.strategy = process_strategy(options)
        if str(options.get("precision")) in ("16", "16-mixed") and options.get("gradient_clip_val") and (
                config["optimizer"].get("fused")):
            raise ConfigError("trainer.gradient_clip_val: a fused optimizer unscales gradients of 16-mixed too late "
                              "to clip them. Set optimizer.fused=false, or trainer.precision=bf16-mixed.")
        self.fast = bool(options.get("fast_dev_run"))

    def budget(self, share: float) -> dict[str, int]:
        """This share of the float training's length, as options of the trainer: epochs, steps, or what ends first.

        Raises:
            ConfigError: a length that is not a whole number of at least 1, or none at all.
        """
        budget = {}
        for name in ("max_epochs", "max_steps"):
            value = self.config["trainer"].get(name)
            if value in (None, -1):  # Lightning's words for "no limit"
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"trainer.{name} must be a whole number of at least 1, not {value!r}.")
            budget[name] = max(1, round(share * value))
        if not budget:
            raise ConfigError("How long is the training? Set trainer.max_epochs or trainer.max_steps to at least 1.")
        return budget

    def parts(self, steps: Any) -> int:
        """How many parts each of the data's batches has if it makes this many steps.

        Raises:
            ConfigError: no whole number, or data whose batches cannot be divided by it.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"schedule.steps_per_batch must be a whole number of at least 1, not {steps!r}.")
        if steps == 1:
            return 1
        size = getattr(self.data, "batch_size", None)
        if not isinstance(size, int):
            raise ConfigError(f"schedule.steps_per_batch: {type(self.data).__name__} has no batch_size to divide; set "
                              "it to 1.")
        if size % steps:
            raise ConfigError(f"schedule.steps_per_batch={steps} does not divide data.batch_size={size}.")
        return steps

    def fit(self, stage: str, module: QuantizedTraining, budget: Mapping[str, int], *callbacks: L.Callback,
            parts: int = 1, during: contextlib.AbstractContextManager[Any] | None = None) -> dict[str, Any]:
        """Train, continuing from the stage's last checkpoint if there is one, and save the weights.

        Args:
            stage: the name of its folder.
            budget: its length, see :meth:`budget`.
            parts: as many batches hold the data of one that ``budget`` and the options of the trainer speak of.
            during: a context to train in.

        Returns:
            The length, and what the last validation measured.

        Raises:
            ConfigError: options that the trainer refuses; weights that are best by what nothing measured.
            CheckpointError: the last checkpoint is damaged.
            KeyboardInterrupt: what is trained so far is in the last checkpoint.
        """
        folder, monitor = self.folder / stage, self.config["checkpoint"]["monitor"]
        if "max_steps" in budget:
            budget = {**budget, "max_steps": budget["max_steps"] * parts}
        with self._batches_in(parts):
            trainer = self._trainer(folder, budget, parts, callbacks)
            last = folder / "checkpoints" / "last.ckpt"
            try:
                with during or contextlib.nullcontext(), warnings.catch_warnings():
                    # Lightning 2.6.6 makes a LeafSpec, which torch 2.13 deprecates; a user can do nothing about it.
                    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
                    trainer.fit(module, datamodule=self.data, ckpt_path=last if last.exists() else None,
                                weights_only=True)
            except SystemExit as stop:  # Lightning leaves this way on Ctrl-C
                if trainer.interrupted:
                    raise KeyboardInterrupt from stop
                raise
        if monitor and not self.fast:
            best = folder / "best" / "best.ckpt"
            if not best.exists():
                raise ConfigError(f"checkpoint.monitor: no validation has measured {monitor} in stage {stage}, so "
                                  "there are no best weights. Lower trainer.val_check_interval, or leave out "
                                  "checkpoint.monitor.")
            module.load_state_dict(AtomicCheckpointIO().load_checkpoint(best, weights_only=True)["state_dict"])
        save_weights(cast(nn.Module, module.network), weights_file(self.folder, stage))
        logged = trainer.callback_metrics.items()
        length = {name.removeprefix("max_"): value for name, value in budget.items()}
        return length | {k: round(float(v), 4) for k, v in logged if k.startswith("val_")}

    @contextlib.contextmanager
    def _batches_in(self, parts: int) -> Iterator[None]:
        """Each of the data's batches in this many."""
        if parts == 1:
            yield
            return
        data: Any = self.data
        whole, data.batch_size = data.batch_size, data.batch_size // parts
        try:
            yield
        finally:
            data.batch_size = whole

    def _trainer(self, folder: Path, budget: Mapping[str, int], parts: int, callbacks: Iterable[L.Callback]
                 ) -> L.Trainer:
        """Lightning's trainer of the stage in ``folder``."""
        config, loggers = self.config, self._loggers(folder)
        options = dict(
            config["trainer"], max_epochs=budget.get("max_epochs"), max_steps=budget.get("max_steps", -1),
            strategy=self.strategy,
        )  # fmt: skip
        for name in ("limit_train_batches", "val_check_interval"):  # a number of batches, or a share of an epoch
            if isinstance(options.get(name), int):
                options[name] *= parts
        self._validate_at_the_end(options, budget)
        progress = (
            bool(options.pop("enable_progress_bar", True)) and self.console.is_terminal and not self.console.quiet
        )
        saving, stopping, decay = config["checkpoint"], config["early_stopping"], config["weight_average"]["decay"]
        keep_last = ModelCheckpoint(
            folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=saving["every_n_steps"],
            enable_version_counter=False,
        )  # fmt: skip
        keep_best = saving["monitor"] and ModelCheckpoint(
            folder / "best", "best", monitor=saving["monitor"], mode=saving["mode"], enable_version_counter=False
        )
        try:
            return L.Trainer(
                **options,
                callbacks=[
                    *([WeightAverage(decay)] if decay is not None else []),
                    *callbacks,
                    *([RichProgressBar(refresh_rate=5, leave=False)] if progress else []),
                    *([EarlyStopping(**stopping)] if stopping["monitor"] else []),
                    *([LearningRateMonitor("step")] if loggers and not self.fast else []),
                    keep_last,
                    *([keep_best] if keep_best else []),
                ],
                logger=loggers,
                enable_progress_bar=progress,
                enable_model_summary=False,
                default_root_dir=folder,
                plugins=[AtomicCheckpointIO()],
            )
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigError(f"trainer: {error}") from error

    def _validate_at_the_end(self, options: dict[str, Any], budget: Mapping[str, int]) -> None:
        """Have a stage that is shorter than the trainer's interval of validation be validated at its end."""
        epochs, interval = options.get("check_val_every_n_epoch"), options.get("val_check_interval")
        if "max_steps" in budget:
            batches = budget["max_steps"] * (options.get("accumulate_grad_batches") or 1)
            if isinstance(interval, int):
                options["val_check_interval"] = min(interval, batches)
            elif interval is None and epochs == 1 and self.strategy == "auto":
                self.data.setup("fit")
                whole, limit = sized_len(self.data.train_dataloader()), options.get("limit_train_batches")
                if whole is not None and isinstance(limit, int | float):
                    whole = min(whole, int(whole * limit) if isinstance(limit, float) else limit)
                if whole is not None and batches < whole:
                    options["val_check_interval"] = batches
        if isinstance(epochs, int) and "max_epochs" in budget:
            options["check_val_every_n_epoch"] = min(epochs, budget["max_epochs"])

    def _loggers(self, folder: Path) -> list[Logger]:
        wanted = self.config["logger"]
        loggers: list[Logger] = []
        if wanted["csv"]:
            loggers.append(CSVLogger(folder, name="csv"))
        if wanted["tensorboard"]:
            if importlib.util.find_spec("tensorboard") is None:
                self.console.print("TensorBoard is not installed: no TensorBoard log (pip install tensorboard).")
            else:
                loggers.append(TensorBoardLogger(folder, name="tensorboard"))
        return loggers

    def curves(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """The logged values by quantity and stage; where a resumed run logged a step twice, the later value counts."""
        curves: dict[str, dict[str, dict[float, float]]] = {}
        for stage in ("float", "control", "qat"):
            files = (self.folder / stage / "csv").glob("version_*/metrics.csv")
            for path in sorted(files, key=lambda p: int(p.parent.name.removeprefix("version_"))):
                with open(path, newline="", encoding="utf-8") as file:
                    lines = list(csv.DictReader(file))
                for step, name, value in ((row["step"], *item) for row in lines for item in row.items()):
                    # One learning rate stands for all: the groups of parameters differ by a constant factor.
                    if value and name not in ("step", "epoch") and not name.endswith(("/pg2", "/pg3")):
                        title = "learning rate" if name.startswith("lr-") else name.replace("_", " ")
                        curves.setdefault(title, {}).setdefault(stage, {})[float(step)] = float(value)
        return {
            title: {stage: sorted(points.items()) for stage, points in stages.items()}
            for title, stages in curves.items()
        }


def process_strategy(options: Mapping[str, Any]) -> str:
    """Lightning's strategy for ``trainer`` options: processes that live as long as one training, or none.

    A run is one process; only its trainings are shared. (Strategies that start the whole command again for each device
    would run every stage several times in one folder.)

    Raises:
        ConfigError: another strategy, or several nodes.
    """
    strategy, devices = options.get("strategy") or "auto", options.get("devices", 1)
    if strategy not in ("auto", "ddp_spawn", "ddp_fork"):
        raise ConfigError(
            f"trainer.strategy is {strategy!r}; a run shares its trainings with ddp_spawn (trainer.devices=2 chooses "
            "it). For other strategies use QuantizedTraining under a trainer of your own."
        )
    if options.get("num_nodes", 1) != 1:
        raise ConfigError("trainer.num_nodes: a run trains on one machine; use a trainer of your own for several.")
    if strategy != "auto":
        return str(strategy)
    if devices in ("auto", -1, "-1"):
        accelerated = options.get("accelerator") in ("auto", "gpu", "cuda")
        count = torch.cuda.device_count() if accelerated and torch.cuda.is_available() else 1
    elif isinstance(devices, str):
        count = int(devices) if devices.isdigit() else len([d for d in devices.split(",") if d.strip()])
    else:
        count = len(devices) if isinstance(devices, list | tuple) else int(devices)
    return "ddp_spawn" if count > 1 else "auto"
