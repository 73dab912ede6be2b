"""A whole run: float -> control -> ptq -> qat -> deploy -> table, each stage complete on disk before the next begins.

``mode=ptq`` calibrates and trains no more: float -> ptq -> deploy -> table. For a pretrained model it is quantize ->
table: weights are read, quantized and written unit by unit, so it need not fit in memory in floating point.

The run folder::

    config.yaml          the resolved configuration (the recipe written out)
    stages/<name>.json   a stage is finished when this file is there
    <stage>/             weights.safetensors; checkpoints/last.ckpt while it trains; csv/, tensorboard/
    deployed/            model.safetensors, manifest.json
    exported/<format>/   what ``export`` names, each with its manifest and model card
    teacher.json         digest of a teacher from elsewhere; teacher/: what the teacher computes (distill.cache)
    results.csv  report.html

With ``target`` the recipe was fitted before (``config.yaml`` has the fitted one, and what was changed), and the network
is held against the target before anything is trained.

Running again in the same folder skips the finished stages and continues the present one from its last checkpoint, to
the same bits as a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import nn

import qat
from qat.compression.channels import pruned_shapes
from qat.compression.pruning import Pruning, attach
from qat.deploy.checkpoint import read_manifest
from qat.deploy.export import FORMATS, check_target, export, load_format, own_target
from qat.deploy.streaming import missing, stream, visiting, without_weights
from qat.errors import ConfigError, OverflowBoundError, QuantizationError, UnsupportedError
from qat.pipeline.checks import check_fit, check_measures, check_vocabulary
from qat.pipeline.evaluation import (
    channel_shapes,
    first_example,
    fits_in_memory,
    float_source,
    load_model,
    measure,
    move,
    predictions,
    stored_bytes,
    weights_file,
)
from qat.pipeline.fitting import Fitting
from qat.pipeline.storage import load_weights, read_json, save_weights, write_text
from qat.pipeline.teacher import OWN, check_cache, check_distillation, load_teacher, options, remember_teacher, taught
from qat.reporting import Results, read_csv, report
from qat.rewriter import Row
from qat.runtimes import RuntimeTable, compare_runtimes
from qat.training.build import build
from qat.training.data import ResumableData, stream_seed
from qat.training.ladder import phases
from qat.training.module import QuantizedTraining
from qat.training.pretrained import rename_weights
from qat.training.pruning import PruningSchedule


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Without what exporters of torch and ONNX log of their own progress, and warn of one another."""
    levels = {name: logging.getLogger(name).level for name in ("onnxscript", "onnx_ir", "torch.onnx", "gguf")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # torch 2.13's exporter makes what torch 2.13 deprecates; a user can do nothing about it
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class NotExported(QuantizationError):
    """Some of the formats that a run is exported to cannot hold its model."""


class Run:
    """The stages of one run in one folder.

    Args:
        config: plain, resolved and checked (see ``qat.pipeline.config``).
        folder: the run folder; created on first use.
        console: where to print; silent consoles (``quiet=True``) are fine.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
        self.config, self.folder, self.console = config, folder, console or Console()
        self.pretrained = config["pretrained"]
        training = config["mode"] == "qat"
        self.stages = (("float", "control", "ptq", "qat", "deploy", "table") if training else
                       ("quantize", "table") if self.pretrained else ("float", "ptq", "deploy", "table"))
        """What runs, in this order."""
        if config["export"]:
            self.stages = (*self.stages, "export")
        self.models = (("float", "control", "ptq", "qat", "deployed") if training else
                       ("float", "deployed") if self.pretrained else ("float", "ptq", "deployed"))
        """What the table compares."""
        self.prepared = "qat" if training else "ptq"
        self.recipe = qat.Recipe.from_dict(config["recipe"])
        self.schedule, self.distill = dict(config["schedule"]), dict(config["distill"])
        self.pruning = Pruning.from_dict(config["prune"])
        self.target: str | None = config["target"]["name"]
        self.data: ResumableData = build(config["data"], "data")
        if not isinstance(self.data, L.LightningDataModule) or not hasattr(self.data, "calibration_dataloader"):
            raise ConfigError("data must build a LightningDataModule with a calibration_dataloader() method.")
        self.fitting = Fitting(config, folder, self.data, self.console)
        self.fast = self.fitting.fast
        self.float_budget, self.extra_budget = (self.fitting.budget(s) for s in (1.0, self.schedule["epochs"]))
        self.parts = self.fitting.parts(self.schedule.get("steps_per_batch", 1))
        cuda = config["trainer"].get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")

    def execute(self) -> Results:
        """Run what is not finished yet; returns the table.

        Raises:
            qat.QuantizationError: everything that a user can put right.
            KeyboardInterrupt: run again in the same folder to continue.
        """
        if "ptq" in self.stages and not (self.folder / "stages" / "ptq.json").exists():
            # A recipe that does not fit the network is an error now, and not after an hour of float training.
            if self.pretrained:
                with without_weights():
                    network = build(self.config["model"], "model")
                self._rename(network)
                network = load_model(self.config, self.folder, "float", None)
            else:
                network = build(self.config["model"], "model")
            check_measures(self.config, check_fit(network, self._example), self._first[1])
            prepared = qat.prepare(self._cut(network)[0], self.recipe, self._example, inplace=True)
            if self.pruning.masks:
                attach(prepared, self.pruning)
            if self.target is not None:
                check_target(prepared, self.target)
        teacher = None
        if self.distill["teacher"] is not None and not (self.folder / "stages" / "qat.json").exists():
            student = self._cut(build(self.config["model"], "model"))[0]
            teacher = check_distillation(self.config, self.folder, student, self._example)
            if self.distill["cache"]:
                check_cache(self.data.train_dataloader())
        path = self.folder / "config.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
        if not path.exists():
            write_text(path, text)
            for change in self.config["target"]["changes"]:
                self.console.print(f"[dim]target {self.target}[/] {escape(change)}", highlight=False, soft_wrap=True)
        elif path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self.folder} holds a run with another configuration. Continue it with resume={self.folder}, or "
                "name another folder."
            )
        if teacher is not None:
            remember_teacher(self.folder, teacher)
        for number, name in enumerate(self.stages, 1):
            done = self.folder / "stages" / f"{name}.json"
            head = f"[bold]{number}/{len(self.stages)} {name}[/]"
            if done.exists():
                self.console.print(f"{head} finished before", highlight=False)
                continue
            start = time.perf_counter()
            try:
                said = getattr(self, f"_{name}")()
            except NotExported as error:        # the run is complete all the same; continuing it tries again
                self.console.print(f"{head} {escape(str(error))}", highlight=False, soft_wrap=True)
                continue
            seconds = time.perf_counter() - start
            write_text(done, json.dumps({**said, "seconds": round(seconds, 1)}, indent=1))
            words = "  ".join(f"{key} {value}" for key, value in said.items())
            self.console.print(f"{head} {words}  [dim]{seconds:.1f} s[/]", highlight=False)
        results = self._results
        self.console.print(results.render())
        return results

    # -- stages ------------------------------------------------------------------------------------------------------

    def _quantize(self) -> dict[str, Any]:
        """From a folder of float weights to a deployed folder, unit by unit."""
        with without_weights():
            network = build(self.config["model"], "model")
        batches = list(self._inputs(self.schedule["calibration_batches"]))
        check_vocabulary(network, batches)
        self._rename(network)
        shown = self.console.is_terminal and not self.console.quiet
        with Progress(*Progress.get_default_columns(), console=self.console, transient=True, disable=not shown) as bar:
            task = bar.add_task("quantize", total=None)
            fits = {} if self.target is None else {"ready": functools.partial(check_target, target=self.target)}
            certificate = stream(network, float_source(self.config, self.folder), self.folder / "deployed", self.recipe,
                                 self._example, batches, lambda _, done, of: bar.update(task, completed=done, total=of),
                                 **fits)
        manifest = read_manifest(self.folder / "deployed")
        coverage = manifest["coverage"]
        columns = [field.name for field in dataclasses.fields(Row)]         # the manifest has them by the alphabet
        rows = [{name: row[name] for name in columns} for row in coverage["rows"]]
        self._describe(certificate, {"rows": rows, **{k: v for k, v in coverage.items() if k != "rows"}})
        return {"units": len(manifest["files"]), "batches": len(batches), "equal": certificate.equal}

    def _rename(self, network: nn.Module) -> None:
        """Have the float weights by the names that the network has for them."""
        source = float_source(self.config, self.folder)
        if hasattr(network, "from_pretrained") and missing(network, source):
            rename_weights(network, source, self.folder / "renamed")

    def _describe(self, certificate: qat.Certificate, coverage: Mapping[str, Any]) -> None:
        """What the run folder says of the deployed model beside it."""
        write_text(self.folder / "deployed" / "config.yaml", (self.folder / "config.yaml").read_text(encoding="utf-8"))
        write_text(self.folder / "certificate.json", json.dumps(certificate.to_dict(), indent=1))
        write_text(self.folder / "coverage.json", json.dumps(coverage, indent=1))

    def _float(self) -> dict[str, Any]:
        if self.pretrained:
            return {"weights": self.pretrained}
        torch.manual_seed(stream_seed(self.config["seed"]))
        module = self._module(None, 1.0)
        module.configure_model()
        return self._fit("float", module, self.float_budget)

    def _control(self) -> dict[str, Any]:
        """More float training with the very budget of the quantized training: length, batches, and learning rate.

        ``schedule.control_learning_rate`` is for quantized networks that need another rate than float ones: the control
        then has the one that is best for it, instead of looking worse than it is.

        A teacher from elsewhere teaches the control too (and the float model before it). A run's own float model does
        if ``distill.control`` says so: its probabilities are less noisy than labels, so float gains by them as well.
        """
        rate = self.schedule.get("control_learning_rate")
        rate = self.schedule["learning_rate"] if rate is None else rate
        module = self._module(None, rate, learns=self.distill.get("control", False))
        module.configure_model()
        cast(nn.Module, module.network).load_state_dict(self._load("float").state_dict())
        return self._fit("control", module, self.extra_budget)

    def _ptq(self) -> dict[str, Any]:
        network, parameters = self._cut(self._load("float"))
        write_text(self.folder / "ptq" / "pruned_shapes.json", json.dumps(pruned_shapes(network)))
        network = qat.prepare(network, self.recipe, self._example).to(self.device)
        qat.calibrate(network, self._inputs(self.schedule["calibration_batches"]))
        save_weights(network, weights_file(self.folder, "ptq"))
        return {"batches": self.schedule["calibration_batches"]} | parameters

    def _cut(self, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The float network without its least important channels, where they are pruned, and the parameters left."""
        if self.pruning.method != "channels":
            return network, {}
        options = self.pruning
        network, report = qat.prune_channels(network.eval(), self._example, options.sparsity, options.multiple_of,
                                             options.exclude, inplace=True)
        return network, {"parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}"}

    def _qat(self) -> dict[str, Any]:
        decay = self.schedule.get("weight_decay", 1.0)
        module = self._module(dict(self.config["recipe"]), self.schedule["learning_rate"], decay, learns=True)
        module.configure_model()
        load_weights(cast(nn.Module, module.network), weights_file(self.folder, "ptq"))
        pruning = [PruningSchedule(self.pruning)] if self.pruning.masks else []
        return self._fit("qat", module, self.extra_budget, *phases(self.schedule), *pruning, parts=self.parts)

    def _deploy(self) -> dict[str, Any]:
        prepared = self._load(self.prepared).to(self.device)
        if self.pruning.masks:
            attach(prepared, self.pruning)  # the masks came with the weights; so coverage says what was pruned
        deployed, certificate = qat.convert(prepared, self._inputs(self.schedule["calibration_batches"]))
        qat.save(deployed, self.folder / "deployed")
        self._describe(certificate, qat.coverage(prepared).to_dict())
        found = {"zeros": f"{certificate.total_sparsity:.1%}"} if self.pruning.masks else {}
        return {"equal": certificate.to_dict()["equal"]} | found

    def _table(self) -> dict[str, Any]:
        results = self._results = self.evaluate()
        write_text(self.folder / "results.csv", results.csv())

        coverage, certificate = (read_json(self.folder / name) for name in ("coverage.json", "certificate.json"))
        page = report(
            self.folder.resolve().name, results, coverage, certificate, self.fitting.curves(),
            (self.folder / "config.yaml").read_text(encoding="utf-8"),
        )  # fmt: skip
        write_text(self.folder / "report.html", page)
        return {}

    def _export(self) -> dict[str, Any]:
        """The deployed model in other formats; what one of them cannot hold does not keep the others from it.

        Raises:
            NotExported: some of them have failed, and why.
        """
        deployed = self._load("deployed")
        self.data.setup()
        example, _ = next(iter(self.data.calibration_dataloader()))
        found: dict[str, Any] = {}
        failed: list[str] = []
        for name in self.config["export"]:
            suffix, folder = FORMATS[name].suffix, self.folder / "exported" / name
            try:
                with quiet_exporters():
                    made = export(deployed, folder if suffix is None else folder / f"model{suffix}", name, example,
                                  own_target(name, self.target), metrics=self._measured(), **self._source(name))
                found[name] = f"{sum(made.files.values()):,} bytes"
            except (UnsupportedError, OverflowBoundError) as error:
                failed.append(f"{name}: {error}")
        if failed:
            words = ", ".join(f"{name} {size}" for name, size in found.items()) or "nothing"
            raise NotExported("\n    ".join([f"wrote {words}", *(f"not {reason}" for reason in failed)]))
        return found

    def _source(self, format: str) -> dict[str, Any]:
        """The option that has the tokenizer of a pretrained model go along, where a format takes it."""
        takes = "source" in inspect.signature(load_format(format).write).parameters
        return {"source": self.pretrained} if takes and self.pretrained else {}

    def _measured(self) -> dict[str, Any]:
        """What a model card says of this run's table; times are left out, since they differ each time."""
        results = self._results
        rows: dict[str, Any] = {f"{results.title()}, {row.model}": row.score for row in results.rows}
        deployed = next(row for row in results.rows if row.model == "deployed")
        if deployed.agreement_float is not None:
            rows["predictions equal to those of the float model"] = f"{deployed.agreement_float:.2%}"
        return {**rows, "test examples": results.examples}

    @functools.cached_property
    def _results(self) -> Results:
        return read_csv(self.folder / "results.csv")

    def evaluate(self, models: Iterable[str] | None = None) -> Results:
        """Measure these models of the run (None: all) again, from what is on disk."""
        wanted = self.models if models is None else tuple(models)
        with contextlib.ExitStack() as stack:
            networks = {}
            for name in wanted:
                if name == "float" and self.pretrained and not fits_in_memory(stored_bytes(self._weights(name))):
                    with without_weights():
                        network = build(self.config["model"], "model").eval()
                    networks[name] = stack.enter_context(visiting(network, float_source(self.config, self.folder)))
                else:
                    networks[name] = self._load(name)
            return self.measure({name: (network, self._weights(name)) for name, network in networks.items()})

    def _weights(self, model: str) -> Path:
        """The file or folder of a model's weights."""
        return (float_source(self.config, self.folder) if model == "float" and self.pretrained
                else weights_file(self.folder, model))

    def measure(self, models: Mapping[str, tuple[nn.Module, Path]]) -> Results:
        """Measure models, each with the file or folder of its weights, on the test set of this run."""
        self.data.setup("test")
        return measure(
            {name: network for name, (network, _) in models.items()},
            {name: stored_bytes(path) for name, (_, path) in models.items()},
            itertools.islice(self.data.test_dataloader(), 1 if self.fast else None),
            self.config["metrics"],
            build(self.config["loss"], "loss"),
            self.device,
            repeats=3 if self.fast else 30,
            prepared=self.prepared,
        )

    def compare_runtimes(self, deployed: nn.Module, names: Iterable[str], folder: Path | None) -> RuntimeTable:
        """Run a deployed model in these runtimes on the test set of this run.

        Args:
            folder: where the exported files are kept; None: nowhere.
        """
        self.data.setup("test")
        name, metric = next(iter(self.config["metrics"].items()))
        loss = build(self.config["loss"], "loss")
        return compare_runtimes(
            deployed.cpu(),
            itertools.islice(self.data.test_dataloader(), 1 if self.fast else None),
            names,
            metric=build(metric, f"metrics.{name}"),
            metric_name=name,
            predict=functools.partial(predictions, loss=loss),
            folder=folder,
            repeats=3 if self.fast else 30,
        )

    def _load(self, model: str) -> nn.Module:
        return load_model(self.config, self.folder, model, self._example)

    @functools.cached_property
    def _first(self) -> tuple[Any, Any]:
        """The inputs and the target of one example."""
        self.data.setup()
        inputs, target = next(iter(self.data.calibration_dataloader()))
        return first_example(inputs), first_example(target)

    @property
    def _example(self) -> Any:
        """The inputs of one example."""
        return self._first[0]

    def _module(
        self, recipe: Mapping[str, Any] | None, learning_rate: float, weight_decay: float = 1.0, learns: bool = False
    ) -> QuantizedTraining:
        """What trains a network; learning rate and weight decay are multiples of the optimizer's.

        ``learns``: whether the run's own float model teaches it, where that is the teacher.
        """
        config, teacher = self.config, self.distill["teacher"]
        distilled = teacher is not None and (teacher != OWN or learns)
        optimizer = dict(config["optimizer"], lr=config["optimizer"]["lr"] * learning_rate)
        if "weight_decay" in optimizer:
            optimizer["weight_decay"] *= weight_decay
        return QuantizedTraining(
            config["model"],
            recipe=recipe,
            example_inputs=self._example if recipe is not None or distilled else None,
            distill=options(self.distill) if distilled else None,
            teacher=load_teacher(config, self.folder, self._example) if distilled else None,
            loss=config["loss"],
            optimizer=optimizer,
            scheduler=config["scheduler"],
            metrics=config["metrics"],
            prune=None if recipe is None else config["prune"],
            pruned_shapes=None if recipe is None else channel_shapes(self.folder),
            scale_lr_factor=self.schedule["scale_learning_rate"],
            offset_lr_factor=1.0 if recipe is None else self.schedule.get("offset_learning_rate", 1.0),
            seed=config["seed"],
            compile=config["compile"],
        )

    def _fit(self, stage: str, module: QuantizedTraining, budget: Mapping[str, int], *callbacks: L.Callback,
             parts: int = 1) -> dict[str, Any]:
        """Train; where ``distill.cache`` asks for it, on batches that hold what the teacher computes."""
        kept = None
        if module.distiller is not None and self.distill["cache"]:
            kept = taught(self.data, module.distiller, self.distill["cache"], self.folder, self.device)
        return self.fitting.fit(stage, module, budget, *callbacks, parts=parts, during=kept)

    def _inputs(self, count: int) -> Iterable[Any]:
        """The inputs of ``count`` batches of training data, the same ones each time."""
        for inputs, _ in itertools.islice(self.data.calibration_dataloader(), 1 if self.fast else count):
            yield move(inputs, self.device)

