"""The ladder of bit widths: how far each scheme is from a float control with the same extra training.

    python benchmarks/accuracy.py                                       # digits, every scheme, 5 folds x 3 seeds: hours
    python benchmarks/accuracy.py task=lm recipe=w4a8,w2a8              # the byte language model; lm_more_text: harder
    python benchmarks/accuracy.py task=lm recipe=w1a8 experiment=lm     # by another experiment than the scheme's own
    python benchmarks/accuracy.py recipe=w8a8,w4a4 folds=5 seeds=3 [out=<folder>] [any option of train.py]

Each cell (recipe, fold, seed) is a whole run of train.py; float training and control are shared between the recipes
that have them in common. Finished cells are lines of ``cells.jsonl`` and are not run again. The gap is control against
deployed, paired over folds x seeds, with half the 95 % interval of its mean (Student's t). Beside it stands the
target, and whether the mean meets it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from qat.pipeline import Run, run_config
from qat.pipeline.host import keep_freed_memory

CONF = Path(__file__).resolve().parents[1] / "conf"
MODELS = ("float", "control", "ptq", "qat", "deployed")
LADDER = ("w8a8", "w8a4", "w4a8", "w4a4", "w3a8", "w2a8", "w2a2", "w158a8", "w1a8", "w1a1", "w4a16", "w3a16", "w2a16",
          "w1a16")
TASKS: dict[str, list[str]] = {"digits": [], "lm": ["data.batch_size=4"], "lm_more_text": [], "rnn": []}
"""``lm`` has as much text as makes a float model of the score for which the targets were set, or a little better."""
EXPERIMENTS: dict[str, dict[str | None, str]] = {
    "lm": {"w8a8": "lm", "w8a8_dynamic": "lm", "w1a8": "lm_one_bit", "w1a16": "lm_one_bit", None: "lm_few_bits"},
    "rnn": {None: "rnn"},
}
EXPERIMENTS["lm_more_text"] = EXPERIMENTS["lm"]
"""The experiment by which each scheme is trained; None: every other scheme. Digits need none."""
SHARED = {"float": ("recipe", "schedule", "prune", "distill"), "control": ("recipe", "prune", "distill")}
"""What a stage does not depend on; on ``distill`` it does where the teacher teaches it."""
TARGETS: dict[str, dict[str, float]] = {
    "digits": {"w8a8": 0.1, "w4a4": 0.2, "w2a8": 0.2, "w1a8": 0.5, "w2a2": 1.0},
    "lm": {"w8a8": 0.001, "w8a8_dynamic": 0.001, "w4a8": 0.004, "w3a8": 0.012, "w2a8": 0.035, "w1a8": 0.1},
    "rnn": {"w8a8": 0.3, "w8a8_dynamic": 0.3, "w4a8": 0.7, "w2a8": 2.0},
}
TARGETS["lm_more_text"] = TARGETS["lm"]
"""The greatest gap to the control that counts as met: points, or bits per byte."""
LEAST = {"digits": {"w1a1": 92.0}}
"""Targets that are a score of the deployed model, and no gap."""


def cell(task: str, recipe: str, fold: int, seed: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """Run one cell and return its line of ``cells.jsonl``."""
    config = configuration(task, recipe, fold, seed, overrides)
    run = Run(config, out / task / recipe / f"fold{fold}_seed{seed}_{digest(config)}", Console(quiet=True))
    shared = {stage: out / task / stage / f"fold{fold}_seed{seed}_{digest(config, unlike(stage, config))}"
              for stage in SHARED}
    for stage, folder in shared.items():
        finished = run.folder / "stages" / f"{stage}.json"
        if folder.exists() and not finished.exists():
            shutil.copytree(folder / stage, run.folder / stage, dirs_exist_ok=True)
            finished.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{stage}.json", finished)
    results = run.execute()
    for stage, folder in shared.items():
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(run.folder / stage, partial / stage)
            shutil.copy(run.folder / "stages" / f"{stage}.json", partial / f"{stage}.json")
            partial.rename(folder)
    rows = {row.model: row for row in results.rows}
    seconds = json.loads((run.folder / "stages" / "qat.json").read_text())["seconds"]
    return {"task": task, "recipe": recipe, "fold": fold, "seed": seed, "overrides": overrides,
            **{model: rows[model].score for model in MODELS}, "metric": results.metric,
            "higher_is_better": results.higher_is_better, "size": rows["deployed"].bytes / rows["float"].bytes,
            "seconds": seconds, "equal": results.bit_equal}


def configuration(task: str, recipe: str, fold: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The configuration of one cell; an experiment among the overrides takes the place of the scheme's own."""
    words = [f"recipe={recipe}", f"fold={fold}", f"seed={seed}", *TASKS[task], *overrides]
    if task in EXPERIMENTS and not any(override.startswith("experiment=") for override in overrides):
        words.insert(0, f"experiment={EXPERIMENTS[task].get(recipe, EXPERIMENTS[task][None])}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return run_config(compose("config", words))


def unlike(stage: str, config: dict[str, Any]) -> set[str]:
    """The sections in which runs may differ that have this stage in common."""
    distill = config["distill"]
    taught = distill["teacher"] not in (None, "float") or (stage == "control" and distill.get("control", False))
    return set(SHARED[stage]) - ({"distill"} if taught else set())


def digest(config: dict[str, Any], without: Iterable[str] = ()) -> str:
    """Eight characters that tell configurations apart."""
    kept = {key: value for key, value in config.items() if key not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def summary(lines: list[dict[str, Any]]) -> Table:
    """Mean scores by recipe, and the mean paired gap (how much worse than the control) with its interval."""
    share = lines[0]["higher_is_better"]
    table = Table("recipe", "cells", *MODELS, "gap", "target", "size", "QAT, s", "bit-equal", box=SIMPLE_HEAD)
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        mine = [line for line in lines if line["recipe"] == recipe]
        means = [f"{statistics.mean(line[m] for line in mine) * (100 if share else 1):.{2 if share else 4}f}"
                 for m in MODELS]
        gaps = [100 * (line["control"] - line["deployed"]) if share else line["deployed"] - line["control"]
                for line in mine]
        half = math.nan
        if len(gaps) > 1:
            half = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        digits = 2 if share else 4
        table.add_row(recipe, str(len(mine)), *means, f"{statistics.mean(gaps):+.{digits}f} ± {half:.{digits}f}",
                      target(lines[0]["task"], recipe, statistics.mean(gaps),
                             100 * statistics.mean(line["deployed"] for line in mine)),
                      f"{statistics.mean(line['size'] for line in mine):.3f}",
                      f"{statistics.mean(line['seconds'] for line in mine):.0f}",
                      f"{sum(bool(line['equal']) for line in mine)}/{len(mine)}")
    return table


def target(task: str, recipe: str, gap: float, score: float) -> str:
    """The target of a recipe and whether it is met; nothing where there is none.

    >>> target("lm", "w8a8", 0.0013, 187.0), target("digits", "w1a1", 2.8, 96.6)
    ('0.001 missed', 'at least 92 met')
    """
    if recipe in LEAST.get(task, {}):
        least = LEAST[task][recipe]
        return f"at least {least:g} {'met' if score >= least else 'missed'}"
    if recipe not in TARGETS[task]:
        return ""
    greatest = TARGETS[task][recipe]
    return f"{greatest:g} {'met' if gap <= greatest else 'missed'}"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The finished cells; a last line that a kill has cut off is removed, and its cell runs again."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    options = {"task": "digits", "recipe": ",".join(LADDER), "folds": "", "seeds": "3",
               "out": "runs/benchmark_accuracy"}
    overrides = ["logger.csv=false", "logger.tensorboard=false"]
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    task = options["task"]
    if task not in TASKS:
        sys.exit(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console, out = Console(width=160), Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "cells.jsonl"
    known = read_journal(journal)
    lines = []
    for seed in range(int(options["seeds"])):
        for fold in range(int(options["folds"] or (5 if task == "digits" else 1))):
            for recipe in options["recipe"].split(","):
                key = {"task": task, "recipe": recipe, "fold": fold, "seed": seed, "overrides": overrides}
                line = next((old for old in known if key.items() <= old.items()), None)
                if line is None:
                    line = cell(task, recipe, fold, seed, overrides, out)
                    with open(journal, "a") as file:
                        file.write(json.dumps(line) + "\n")
                lines.append(line)
                scores = "  ".join(f"{model} {line[model]:.4f}" for model in MODELS)
                console.print(f"{task} {recipe} fold {fold} seed {seed}: {scores}", highlight=False, soft_wrap=True)
    console.print(summary(lines))


if __name__ == "__main__":
    main()
