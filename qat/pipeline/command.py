"""The command line: Hydra composes, a task runs, and what a user can put right is said in one clean paragraph."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from torch import nn
from yaml import YAMLError

import qat
from qat.deploy.checkpoint import MANIFEST
from qat.deploy.configurations import NAMED_BY_USER
from qat.deploy.memory import Contents, MemoryPlan, Workload, plan_memory
from qat.deploy.shapes import from_module, read_contents
from qat.errors import ConfigError, QuantizationError, nearest
from qat.pipeline.config import FOLDED, OF_THE_CALL, OF_THE_PLAN, STORED, check_keys, run_config, stored_config
from qat.pipeline.evaluation import load_model
from qat.pipeline.host import keep_freed_memory
from qat.pipeline.run import Run, quiet_exporters
from qat.pipeline.storage import claim, write_text
from qat.reporting import compare, read_csv, read_devices, read_sweep, render_memory, render_runtimes
from qat.training.build import allow_targets, build, plain

OVERRIDES = ("weight", "input", "rules", "edges", "backward_dtype", "calibration")  # of Recipe.preset
Task = Callable[[DictConfig, Console], None]


def command(task: Task, config_folder: Path, config_name: str) -> Callable[[], None]:
    """``main()`` for a script: compose ``config_name`` with the command line's overrides, and call ``task``.

    Errors that a user can put right end the process with one paragraph and status 1; ``debug=true`` (or
    HYDRA_FULL_ERROR=1) shows the traceback. Ctrl-C ends it with status 130.
    """

    def main() -> None:
        full = os.environ.get("HYDRA_FULL_ERROR") == "1" or "debug=true" in (a.lower() for a in sys.argv[1:])
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them its own way
        OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
        keep_freed_memory()
        console = Console()
        if not full:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # else "GPU available" with each stage
        started, failures, given, sweep = False, 0, sys.argv, None

        def say(error: Exception) -> None:
            text = escape(explain(error, config_folder, config_name))
            Console(stderr=True).print(f"[bold red]Error:[/] {text}", highlight=False, soft_wrap=True)

        def job(config: DictConfig) -> None:
            """One job; in a multirun the next one goes on after an error."""
            nonlocal started, failures, sweep
            started = True
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sweep = Path(HydraConfig.get().sweep.dir)
            try:
                task(config, console)
            except (QuantizationError, OmegaConfBaseException, OSError) as error:
                if full:
                    raise
                failures += 1
                say(error)

        try:
            sys.argv = [given[0], *_continued(given[1:])]
            hydra.main(str(config_folder), config_name, version_base="1.3")(job)()
        except KeyboardInterrupt:
            console.print("\nStopped.", style="bold")
            if sweep is not None:  # Hydra forgets its configuration behind a job
                console.print(f"Continue with: {_again('resume_sweep', sweep)}", style="bold", soft_wrap=True)
            sys.exit(130)
        except Exception as error:
            if full or started:  # once a job has begun, what it does not expect is a fault of ours: show all of it
                raise
            say(error)
            sys.exit(1)
        finally:
            sys.argv = given
        if failures:
            sys.exit(1)

    return main


def train(config: DictConfig, console: Console) -> None:
    """The task of train.py: make or continue the run of the output folder."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        check_keys(config, STORED + FOLDED + OF_THE_CALL, "")
        if config.resume is None:
            values = run_config(config)
        else:
            others = [o for o in HydraConfig.get().overrides.task if o.split("=")[0] not in OF_THE_CALL]
            if others:
                raise ConfigError(f"resume= continues a run as it was configured; leave out {', '.join(others)}.")
            allow_targets(*(config.allow_targets or ()))
            values = stored_config(folder)
        with claim(folder):
            run = Run(values, folder, console)
            console.print(f"[dim]run folder[/] {_shown(folder)}", highlight=False, soft_wrap=True)
            try:
                run.execute()
            except KeyboardInterrupt:
                console.print(f"\nContinue with: {_again('resume', folder)}", style="bold", soft_wrap=True)
                raise
            console.print(f"[dim]report[/] {_shown(folder / 'report.html')}", highlight=False, soft_wrap=True)
    finally:
        _forget_if_unused(folder)


def evaluate(config: DictConfig, console: Console) -> None:
    """The task of evaluate.py: measure a run folder or a deployed folder again, and compare with the stored table, or
    run it in other runtimes; or show the runs of a sweep, or what a model needs in memory."""
    check_keys(config, STORED + FOLDED + OF_THE_CALL, "")
    allow_targets(*(config.allow_targets or ()))
    if sum(value is not None for value in (config.run, config.deployed, config.sweep, config.plan)) != 1:
        raise ConfigError(
            "Say what to evaluate: run=<run folder>, deployed=<deployed folder>, sweep=<folder of run folders> or "
            "plan=<directory, config.json or parameter count>."
        )
    if config.runtimes is not None and config.run is None and config.deployed is None:
        raise ConfigError("runtimes= compares one model: give run=<run folder> or deployed=<deployed folder>.")
    if config.plan is not None:
        console.print(render_memory(_memory(plain({key: config[key] for key in OF_THE_PLAN}))))
        return
    folder = Path(config.run or config.deployed or config.sweep)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    if config.runtimes is not None:
        _runtimes(config, folder, console)
        return
    if config.sweep is not None:
        _aggregate(folder, console)
        return
    if config.run is not None:
        results = Run(stored_config(folder), folder, console).evaluate()
        table = folder / "results.csv"
    else:
        run, deployed = _deployed(config, folder, console)
        results = run.measure({"deployed": (deployed, folder)})
        table = folder.resolve().parent / "results.csv"
    console.print(results.render())
    if not table.exists():
        console.print("There is no stored table to compare with.")
        return
    differences = compare(results, read_csv(table))
    if differences:
        raise QuantizationError(f"The figures differ from {_shown(table)}. " + " ".join(differences))
    console.print(
        f"Every figure equals the one in {_shown(table)} (latency is not compared).", style="green", soft_wrap=True
    )


def _memory(options: dict[str, Any]) -> MemoryPlan:
    """What ``plan=`` and its options ask for."""
    plan, numbers = options.pop("plan"), {key: options.pop(key) for key in NAMED_BY_USER}
    devices = read_devices(options.pop("device"))
    folder = Path(plan) if isinstance(plan, str) else None
    if folder is not None and (folder / "config.yaml").is_file() and not (folder / MANIFEST).is_file():
        contents = _contents_of_run(folder, numbers)
    else:
        contents = read_contents(plan, numbers)
    if options["context"] is None:
        options["context"] = min(2048, contents.positions or 2048)
    return plan_memory(contents, Workload(**options), devices)


def _contents_of_run(folder: Path, numbers: dict[str, Any]) -> Contents:
    """The network of a run, built without weights, and what the run has deployed."""
    described = stored_config(folder)["model"]
    with qat.without_weights():
        model = build(described, "model")
    known = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else described
    contents = from_module(model, str(folder), "exact: the model of the run", known, numbers)
    if (folder / "deployed" / MANIFEST).is_file():
        contents = dataclasses.replace(contents, stored=read_contents(str(folder / "deployed")).stored)
    return contents


def _runtimes(config: DictConfig, folder: Path, console: Console) -> None:
    """The deployed model of a run, or of a folder, in other runtimes; the table is stored in the run folder."""
    given = plain({"runtimes": config.runtimes})["runtimes"]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"runtimes is a list of names such as [torch,onnxruntime], not {given!r}.")
    kept: Path | None
    if config.run is not None:
        run, kept = Run(stored_config(folder), folder, console), folder
        deployed = load_model(run.config, folder, "deployed", None)
    else:
        run, deployed = _deployed(config, folder, console)
        kept = folder.resolve().parent if (folder.resolve().parent / "results.csv").exists() else None
    with quiet_exporters():
        table = run.compare_runtimes(deployed, names, None if kept is None else kept / "runtimes")
    console.print(render_runtimes(table))
    if kept is not None:
        write_text(kept / "runtimes.json", json.dumps(table.to_dict(), indent=1))
        console.print(f"[dim]written[/] {_shown(kept / 'runtimes.json')}, and the exported files in "
                      f"{_shown(kept / 'runtimes')}", highlight=False, soft_wrap=True)


def _deployed(config: DictConfig, folder: Path, console: Console) -> tuple[Run, nn.Module]:
    """A deployed folder: the run that it is measured as, and its model."""
    values = stored_config(folder) if (folder / "config.yaml").exists() else run_config(config)
    return Run(values, folder, console), qat.load(folder, build(values["model"], "model")).eval()


def _aggregate(folder: Path, console: Console) -> None:
    """One table of all runs of a multirun, and the same with a plot as files in its folder."""
    sweep = read_sweep(folder)
    write_text(folder / "sweep.csv", sweep.csv())
    write_text(folder / "sweep.html", sweep.html())
    console.print(sweep.render())
    for name in ("sweep.csv", "sweep.html"):
        console.print(f"[dim]written[/] {_shown(folder / name)}", highlight=False, soft_wrap=True)


def _continued(arguments: list[str]) -> list[str]:
    """The command line of the multirun that ``resume_sweep=<folder>`` continues; any other as it is.

    Its jobs find their own folders again: finished ones are skipped stage by stage, a killed one goes on. From the
    stored command line come only what sets the runs and the names of their folders: no permission, no plugin of Hydra.

    Raises:
        ConfigError: no multirun in the folder; arguments that would change it.
    """
    folders = [a.partition("=")[2] for a in arguments if a.split("=")[0] == "resume_sweep"]
    if not folders or folders[-1] in ("", "null"):
        return arguments
    others = [a for a in arguments if a.split("=")[0] not in ("resume_sweep", "debug", "allow_targets", "-m")]
    if others:
        raise ConfigError(f"resume_sweep= continues a multirun as it was configured; leave out {', '.join(others)}.")
    stored = Path(folders[-1]) / "multirun.yaml"
    if not stored.is_file():
        raise ConfigError(f"resume_sweep={folders[-1]}: there is no multirun (a folder with a multirun.yaml).")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(stored), resolve=False)
        overrides = content["hydra"]["overrides"]
        lines = [str(line) for line in (*overrides["task"], *overrides["hydra"])]
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{stored} is damaged: {error}") from error
    kept = [line for line in lines if (key := line.split("=")[0].lstrip("+~")) not in OF_THE_CALL
            and (not key.startswith("hydra") or key.startswith(("hydra.sweep.subdir", "hydra.job.name")))]
    given = [a for a in arguments if a.split("=")[0] in ("debug", "allow_targets")]
    folder = folders[-1]
    if re.search(r"[^\w ./-]", folder):  # what Hydra's grammar would read as more than a name
        folder = "'" + folder.replace("'", "\\'") + "'"
    return ["-m", *kept, *given, f"hydra.sweep.dir={folder}"]


def explain(error: Exception, config_folder: Path, config_name: str) -> str:
    """One paragraph for a user: what is wrong, and the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(error.options)
        return f"{group}={choice}: there is no such choice{nearest(choice, error.options) or '.'} Choices: {choices}."
    if found := re.match(r"ConfigError raised while resolving interpolation: (.*)", str(error)):
        return found[1]
    if found := re.match(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", str(error)):
        return f"{found[2]} follows {found[1]}, which is not set here: give {found[2]}=<value>."
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        if found := re.search(r"Missing mandatory value: (\S+)", str(error)):
            return f"{found[1]} must be given: {found[1]}=<value>."
        found = re.search(r"(?:Could not override|Key) '([^']+)'", str(error))
        if found and found[1].split(".")[:2] in [["recipe", key] for key in OVERRIDES]:
            return f"{found[1]} is not set by this recipe; a plus sign adds it: +{found[1]}=<value>."
        if found:
            keys = sorted({*_known_keys(config_folder, config_name), *(f"recipe.{key}" for key in OVERRIDES)})
            return f"There is no option {found[1]!r}{nearest(found[1], keys) or '.'} (--help lists all options.)"
        if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
            return f"{str(error).strip()}: {str(error.__cause__).strip().splitlines()[0]}."
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}."
    return str(error).strip()


def _known_keys(config_folder: Path, config_name: str) -> Iterator[str]:
    """The dotted name of every option, with the choices of config groups that the command line makes."""
    groups = [p.name for p in config_folder.iterdir() if p.is_dir()]
    yield from groups
    choices = [
        argument
        for argument in sys.argv[1:]
        if (name := argument.split("=")[0]) in groups
        and (config_folder / name / f"{argument.split('=')[1]}.yaml").exists()
    ]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder), version_base="1.3"):
        composed = hydra.compose(config_name, choices)

    def walk(node: Any, prefix: str) -> Iterator[str]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield f"{prefix}{key}"
                yield from walk(value, f"{prefix}{key}.")

    yield from walk(OmegaConf.to_container(composed, resolve=False), "")


def _run_folder(resume: str | None, job: str) -> str:
    """Hydra's output folder: that of the resumed run, or a new one named by the time and the job."""
    if resume is None:
        return f"runs/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{job}"
    if not (Path(resume) / "config.yaml").is_file():
        raise ConfigError(f"resume={resume}: there is no run (a folder with a config.yaml).")
    return resume


def _forget_if_unused(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began."""
    if folder.is_dir() and not (folder / "config.yaml").exists():
        (folder / ".lock").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _again(option: str, folder: Path) -> str:
    """The command that continues what is in ``folder``, for a shell, with the permissions that this one was given."""
    given = [a for a in sys.argv[1:] if a.split("=")[0] == "allow_targets"]
    return escape(shlex.join(["python", "train.py", f"{option}={_shown(folder)}", *given]))


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
