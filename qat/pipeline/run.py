"""A whole run: float -> control -> ptq -> qat -> deploy -> table, each stage complete on disk before the next begins.

The run folder::

    config.yaml          the resolved configuration (the recipe written out)
    stages/<name>.json   a stage is finished when this file is there
    <stage>/             weights.safetensors; checkpoints/last.ckpt while it trains; csv/, tensorboard/
    deployed/            model.safetensors, manifest.json
    results.csv  report.html

Running again in the same folder skips the finished stages and continues the present one from its last checkpoint, to
the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import itertools
import json
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

import qat
from qat.errors import ConfigError
from qat.pipeline.evaluation import MODELS, first_example, load_model, measure, move, weights_file
from qat.pipeline.storage import AtomicCheckpointIO, load_weights, save_weights, write_text
from qat.reporting import Results, read_csv, report
from qat.training.build import build, check_arguments
from qat.training.data import ClassificationData, stream_seed
from qat.training.ladder import phases
from qat.training.module import QuantizedTraining


class Run:
    """The stages of one run in one folder.

    Args:
        config: plain, resolved and checked (see ``qat.pipeline.config``).
        folder: the run folder; created on first use.
        console: where to print; silent consoles (``quiet=True``) are fine.
    """

    STAGES = ("float", "control", "ptq", "qat", "deploy", "table")

    def __init__(self, config: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
        self.config, self.folder, self.console = config, folder, console or Console()
        self.recipe = qat.Recipe.from_dict(config["recipe"])
        self.schedule = dict(config["schedule"])
        self.data: ClassificationData = build(config["data"], "data")
        if not isinstance(self.data, L.LightningDataModule) or not hasattr(self.data, "calibration_dataloader"):
            raise ConfigError("data must build a LightningDataModule with a calibration_dataloader() method.")
        options = config["trainer"]
        check_arguments(L.Trainer, list(options), "trainer")
        if not isinstance(options["max_epochs"], int) or options["max_epochs"] < 1:
            raise ConfigError(
                f"trainer.max_epochs must be a whole number of at least 1, not {options['max_epochs']!r}."
            )
        self.fast = bool(options.get("fast_dev_run"))
        self.extra_epochs = max(1, round(self.schedule["epochs"] * options["max_epochs"]))
        cuda = options.get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")

    def execute(self) -> Results:
        """Run what is not finished yet; returns the table.

        Raises:
            qat.QuantizationError: everything that a user can put right.
            KeyboardInterrupt: run again in the same folder to continue.
        """
        if not (self.folder / "stages" / "ptq.json").exists():
            # A recipe that does not fit the network is an error now, and not after an hour of float training.
            qat.prepare(build(self.config["model"], "model"), self.recipe, self._example, inplace=True)
        path = self.folder / "config.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
        if not path.exists():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self.folder} holds a run with another configuration. Continue it with resume={self.folder}."
            )
        for number, name in enumerate(self.STAGES, 1):
            done = self.folder / "stages" / f"{name}.json"
            head = f"[bold]{number}/{len(self.STAGES)} {name}[/]"
            if done.exists():
                self.console.print(f"{head} finished before", highlight=False)
                continue
            start = time.perf_counter()
            said = getattr(self, f"_{name}")()
            write_text(done, json.dumps(said, indent=1))
            words = "  ".join(f"{key} {value}" for key, value in said.items())
            self.console.print(f"{head} {words}  [dim]{time.perf_counter() - start:.1f} s[/]", highlight=False)
        results = self._results
        self.console.print(results.render())
        return results

    # -- stages ------------------------------------------------------------------------------------------------------

    def _float(self) -> dict[str, Any]:
        torch.manual_seed(stream_seed(self.config["seed"]))
        module = self._module(None, 1.0)
        module.configure_model()
        return self._fit("float", module, self.config["trainer"]["max_epochs"])

    def _control(self) -> dict[str, Any]:
        """More float training with the very budget of the quantized training: epochs, learning rate, batches."""
        module = self._module(None, self.schedule["learning_rate"])
        module.configure_model()
        load_weights(cast(nn.Module, module.network), weights_file(self.folder, "float"))
        return self._fit("control", module, self.extra_epochs)

    def _ptq(self) -> dict[str, Any]:
        network = qat.prepare(self._load("float"), self.recipe, self._example).to(self.device)
        qat.calibrate(network, self._inputs(self.schedule["calibration_batches"]))
        save_weights(network, weights_file(self.folder, "ptq"))
        return {"batches": self.schedule["calibration_batches"]}

    def _qat(self) -> dict[str, Any]:
        decay = self.schedule.get("weight_decay", 1.0)
        module = self._module(dict(self.config["recipe"]), self.schedule["learning_rate"], decay)
        module.configure_model()
        load_weights(cast(nn.Module, module.network), weights_file(self.folder, "ptq"))
        return self._fit("qat", module, self.extra_epochs, *phases(self.schedule))

    def _deploy(self) -> dict[str, Any]:
        prepared = self._load("qat").to(self.device)
        deployed, certificate = qat.convert(prepared, self._inputs(self.schedule["calibration_batches"]))
        qat.save(deployed, self.folder / "deployed")
        write_text(self.folder / "deployed" / "config.yaml", (self.folder / "config.yaml").read_text(encoding="utf-8"))
        write_text(self.folder / "certificate.json", json.dumps(certificate.to_dict(), indent=1))
        write_text(self.folder / "coverage.json", json.dumps(qat.coverage(prepared).to_dict(), indent=1))
        return {"equal": certificate.to_dict()["equal"]}

    def _table(self) -> dict[str, Any]:
        results = self._results = self.evaluate()
        write_text(self.folder / "results.csv", results.csv())

        def stored(name: str) -> Any:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))

        page = report(
            self.folder.resolve().name, results, stored("coverage.json"), stored("certificate.json"), self._curves(),
            (self.folder / "config.yaml").read_text(encoding="utf-8"),
        )  # fmt: skip
        write_text(self.folder / "report.html", page)
        return {}

    @functools.cached_property
    def _results(self) -> Results:
        return read_csv(self.folder / "results.csv")

    def evaluate(self, models: Iterable[str] = MODELS) -> Results:
        """Measure these models of the run again, from what is on disk."""
        return self.measure({name: (self._load(name), weights_file(self.folder, name)) for name in models})

    def measure(self, models: Mapping[str, tuple[nn.Module, Path]]) -> Results:
        """Measure models, each with the file of its weights, on the test set of this run."""
        self.data.setup("test")
        return measure(
            {name: network for name, (network, _) in models.items()},
            {name: path.stat().st_size for name, (_, path) in models.items()},
            itertools.islice(self.data.test_dataloader(), 1 if self.fast else None),
            self.config["metrics"],
            self.device,
            repeats=3 if self.fast else 30,
        )

    def _load(self, model: str) -> nn.Module:
        return load_model(self.config, self.folder, model, self._example)

    @functools.cached_property
    def _example(self) -> Any:
        """The inputs of one example."""
        self.data.setup()
        return first_example(next(iter(self.data.calibration_dataloader()))[0])

    # -- training ----------------------------------------------------------------------------------------------------

    def _module(
        self, recipe: Mapping[str, Any] | None, learning_rate: float, weight_decay: float = 1.0
    ) -> QuantizedTraining:
        """What trains a network; learning rate and weight decay are multiples of the optimizer's."""
        config = self.config
        optimizer = dict(config["optimizer"], lr=config["optimizer"]["lr"] * learning_rate)
        if "weight_decay" in optimizer:
            optimizer["weight_decay"] *= weight_decay
        return QuantizedTraining(
            config["model"],
            recipe=recipe,
            example_inputs=None if recipe is None else self._example,
            loss=config["loss"],
            optimizer=optimizer,
            scheduler=config["scheduler"],
            metrics=config["metrics"],
            scale_lr_factor=self.schedule["scale_learning_rate"],
            seed=config["seed"],
        )

    def _fit(self, stage: str, module: QuantizedTraining, epochs: int, *callbacks: L.Callback) -> dict[str, Any]:
        """Train, continuing from the stage's last checkpoint if there is one, and save the weights."""
        folder, config = self.folder / stage, self.config
        options = dict(config["trainer"], max_epochs=epochs)
        progress = (
            bool(options.pop("enable_progress_bar", True)) and self.console.is_terminal and not self.console.quiet
        )
        saving, stopping = config["checkpoint"], config["early_stopping"]
        keep_last = ModelCheckpoint(
            folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=saving["every_n_steps"],
            enable_version_counter=False,
        )  # fmt: skip
        keep_best = saving["monitor"] and ModelCheckpoint(
            folder / "best", "best", monitor=saving["monitor"], mode=saving["mode"], enable_version_counter=False
        )
        loggers = self._loggers(folder)
        try:
            trainer = L.Trainer(
                **options,
                callbacks=[
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
        last = folder / "checkpoints" / "last.ckpt"
        try:
            with warnings.catch_warnings():
                # Lightning 2.6.6 makes a LeafSpec, which torch 2.13 deprecates; a user can do nothing about it.
                warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
                trainer.fit(module, datamodule=self.data, ckpt_path=last if last.exists() else None, weights_only=True)
        except SystemExit as stop:  # Lightning leaves this way on Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from stop
            raise
        if keep_best and not self.fast:
            best = torch.load(keep_best.best_model_path, map_location="cpu", weights_only=True)
            module.load_state_dict(best["state_dict"])
        save_weights(cast(nn.Module, module.network), weights_file(self.folder, stage))
        logged = trainer.callback_metrics.items()
        return {"epochs": epochs} | {k: round(float(v), 4) for k, v in logged if k.startswith("val_")}

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

    def _inputs(self, count: int) -> Iterable[Any]:
        """The inputs of ``count`` batches of training data, the same ones each time."""
        for inputs, _ in itertools.islice(self.data.calibration_dataloader(), 1 if self.fast else count):
            yield move(inputs, self.device)

    def _curves(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
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
