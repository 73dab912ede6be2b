"""Digits, folds x seeds: how far the quantized model is from a float control with the same extra training.

    python benchmarks/digits.py recipe=w8a8,w4a4 folds=5 seeds=3 [out=runs/benchmark_digits] [any option of train.py]

Each cell (recipe, fold, seed) is a whole run of train.py; the float training is shared between recipes. Finished cells
are lines of ``cells.jsonl`` and are not run again. The gap is control minus deployed, paired over folds x seeds, with
the 95 % interval of its mean (Student's t).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import statistics
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from qat.pipeline import Run, run_config

CONF = Path(__file__).resolve().parents[1] / "conf"
MODELS = ("float", "control", "ptq", "qat", "deployed")


def cell(recipe: str, fold: int, seed: int, overrides: list[str], out: Path) -> dict[str, object]:
    """Run one cell and return its line of ``cells.jsonl``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [f"recipe={recipe}", f"fold={fold}", f"seed={seed}", *overrides])
    config = run_config(composed)
    run = Run(config, out / recipe / f"fold{fold}_seed{seed}_{digest(config)}", Console(quiet=True))
    of_float = {key: value for key, value in config.items() if key not in ("recipe", "schedule")}
    shared = out / "float" / f"fold{fold}_seed{seed}_{digest(of_float)}"
    finished = run.folder / "stages" / "float.json"
    if shared.exists() and not finished.exists():
        shutil.copytree(shared / "float", run.folder / "float", dirs_exist_ok=True)
        finished.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "float.json", finished)
    results = run.execute()
    if not shared.exists():
        partial = shared.with_name(f".{shared.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run.folder / "float", partial / "float")
        shutil.copy(finished, partial / "float.json")
        partial.rename(shared)
    scores = {row.model: row.score for row in results.rows}
    return {"recipe": recipe, "fold": fold, "seed": seed, "overrides": overrides, **scores, "equal": results.bit_equal}


def digest(config: dict[str, object]) -> str:
    """Eight characters that tell configurations apart."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def summary(lines: list[dict[str, object]]) -> Table:
    """Mean accuracies by recipe, and the mean paired gap with half its 95 % interval."""
    table = Table("recipe", "cells", *MODELS, "gap, points", "bit-equal", box=SIMPLE_HEAD)
    for recipe in dict.fromkeys(str(line["recipe"]) for line in lines):
        mine = [line for line in lines if line["recipe"] == recipe]
        means = [f"{100 * statistics.mean(float(line[model]) for line in mine):.2f}" for model in MODELS]
        gaps = [100 * (float(line["control"]) - float(line["deployed"])) for line in mine]
        half = math.nan
        if len(gaps) > 1:
            half = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        gap = statistics.mean(gaps)
        equal = f"{sum(bool(line['equal']) for line in mine)}/{len(mine)}"
        table.add_row(recipe, str(len(mine)), *means, f"{gap:+.2f} ± {half:.2f}", equal)
    return table


def main() -> None:
    options = {"recipe": "w8a8,w4a4", "folds": "5", "seeds": "3", "out": "runs/benchmark_digits"}
    overrides = ["logger.csv=false", "logger.tensorboard=false"]
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console, out = Console(), Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "cells.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    lines = []
    for seed in range(int(options["seeds"])):
        for fold in range(int(options["folds"])):
            for recipe in options["recipe"].split(","):
                key = {"recipe": recipe, "fold": fold, "seed": seed, "overrides": overrides}
                line = next((old for old in known if key.items() <= old.items()), None)
                if line is None:
                    line = cell(recipe, fold, seed, overrides, out)
                    with open(journal, "a") as file:
                        file.write(json.dumps(line) + "\n")
                lines.append(line)
                scores = "  ".join(f"{model} {100 * line[model]:.2f}" for model in MODELS)
                console.print(f"{recipe} fold {fold} seed {seed}: {scores}", highlight=False, soft_wrap=True)
    console.print(summary(lines))


if __name__ == "__main__":
    main()
