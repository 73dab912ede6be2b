"""Many runs: one command continues what was killed, and one table and plot show them all."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from qat.errors import CheckpointError, ConfigError
from qat.pipeline.command import _continued
from qat.reporting import Results, Row, read_sweep

CONF = Path(__file__).resolve().parents[2] / "conf"
SCORES = {"w8a8": 0.98, "w2a2": 0.94}


def write(folder: Path, number: int, recipe: str, seed: int, metric: str = "accuracy", scale: float = 1.0) -> Path:
    """A finished run folder, as far as a sweep looks into it."""
    run = folder / f"{number}_digits_{recipe}"
    (run / "stages").mkdir(parents=True)
    config = {"seed": seed, "data": {"seed": seed, "batch_size": 32}, "trainer": {"max_epochs": 3},
              "recipe": {"rules": [{"weight": {"format": recipe}}]}}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (run / "stages" / "float.json").write_text("{}")
    score, size = SCORES[recipe] * scale + seed / 1000, {"w8a8": 24692, "w2a2": 9000}[recipe]
    rows = [Row("float", 0.99 * scale, 1.0, None, 85496, 3.0), Row("control", 0.985 * scale, 1.0, None, 85496, 3.0),
            Row("ptq", 0.9 * scale, 0.9, 0.9, 90000, 4.0), Row("qat", score, 0.9, 1.0, 90000, 4.0),
            Row("deployed", score, 0.9, 1.0, size, 2.0)]
    (run / "results.csv").write_text(Results(metric, rows, True, 0.0, 360, 64, proportion=scale == 1.0).csv())
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (recipe, seed) in enumerate((r, s) for r in SCORES for s in range(3)):
        write(tmp_path, number, recipe, seed)
    for number in range(6, 11):  # 10 comes after 9
        write(tmp_path, number, "w8a8", number)
    (tmp_path / "10_digits_w8a8" / "results.csv").unlink()
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_runs_that_repeat_each_other_are_averaged(folder) -> None:
    sweep = read_sweep(folder)
    assert [job.name.split("_")[0] for job in sweep.jobs] == [str(i) for i in range(11)]
    assert [job.name for job in sweep.unfinished] == ["10_digits_w8a8"]
    headers, rows = sweep.cells()
    table = {row[0]: dict(zip(headers, row)) for row in rows}
    assert table.keys() == {"digits_w8a8", "digits_w2a2"}
    assert table["digits_w2a2"] == {
        "run": "digits_w2a2", "repeats": "3", "metric": "accuracy", "float": "99.00 ± 0.00%",
        "control": "98.50 ± 0.00%", "PTQ": "90.00 ± 0.00%", "QAT": "94.10 ± 0.10%", "deployed": "94.10 ± 0.10%",
        "gap": "-4.40 ± 0.10%", "bytes": "9,000", "of float": "0.11x", "latency": "2.00 ms",
    }  # fmt: skip
    assert table["digits_w8a8"]["repeats"] == "7"
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    console.print(sweep.render())
    assert "10_digits_w8a8 is not finished (done: float)" in console.export_text()


def test_other_settings_are_named_and_not_averaged(folder) -> None:
    path = folder / "0_digits_w8a8" / "config.yaml"
    path.write_text(path.read_text().replace("max_epochs: 3", "max_epochs: 9"))
    groups = read_sweep(folder).groups()
    assert [job.name for job in groups["digits_w8a8 trainer.max_epochs=9"]] == ["0_digits_w8a8"]
    assert len(groups["digits_w8a8 trainer.max_epochs=3"]) == 6


def test_csv_holds_everything_in_full_precision(folder) -> None:
    lines = list(csv.DictReader(io.StringIO(read_sweep(folder).csv())))
    assert len(lines) == 10 * 5
    [one] = [line for line in lines if line["job"] == "1_digits_w8a8" and line["model"] == "deployed"]
    assert float(one["score"]) == SCORES["w8a8"] + 1 / 1000
    assert (one["seed"], one["bytes"], one["bit_equal"]) == ("1", "24692", "True")


def test_the_plot_has_a_point_for_each_run_and_a_figure_for_each_metric(folder) -> None:
    write(folder, 11, "w2a2", 0, metric="bits per byte", scale=2.5)
    text = read_sweep(folder).html()
    figures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(figures) == 2
    assert len(figures[0].findall(".//circle/title")) == 10 * 2
    [deployed] = [c for c in figures[1].iter("circle") if c.find("title") is not None and c.get("fill") != "none"]
    assert deployed.find("title").text.endswith("2.35, 9,000 bytes")
    for figure in figures:
        _, _, width, height = map(float, figure.get("viewBox").split())
        centers = [(float(c.get("cx")), float(c.get("cy"))) for c in figure.iter("circle")]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in centers)
    headers, rows = read_sweep(folder).cells()
    assert dict(zip(headers, rows[-1]))["deployed"] == "2.35"


def test_a_folder_without_runs_and_a_damaged_one_are_said(tmp_path, folder) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no runs"):
        read_sweep(tmp_path / "empty")
    (folder / "0_digits_w8a8" / "results.csv").write_text("nonsense")
    with pytest.raises(CheckpointError, match="not a results table"):
        read_sweep(folder)


def multirun(folder: Path, task: list[str], hydra: list[str]) -> Path:
    text = OmegaConf.to_yaml({"hydra": {"overrides": {"task": task, "hydra": hydra}}, "seed": "${other}"})
    (folder / "multirun.yaml").write_text(text)
    return folder


def test_a_multirun_is_continued_as_it_was_asked_for(tmp_path) -> None:
    multirun(tmp_path, ["recipe=w8a8,w4a4", "seed=range(3)", "+trainer.limit_val_batches=1"],
             ["hydra.sweep.subdir=job${hydra.job.num}", "hydra.mode=MULTIRUN", "hydra.sweep.dir=elsewhere"])
    assert _continued([f"resume_sweep={tmp_path}", "debug=true"]) == [
        "-m", "recipe=w8a8,w4a4", "seed=range(3)", "+trainer.limit_val_batches=1",
        "hydra.sweep.subdir=job${hydra.job.num}", "debug=true", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    assert _continued(["recipe=w8a8", "-m"]) == ["recipe=w8a8", "-m"]


STOPPED = """
import json, os, sys
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from qat.pipeline.command import command

ran, name, conf = Path("ran.jsonl"), *sys.argv[1:3]

def job(config, console):
    first = not ran.exists()
    with ran.open("a") as file:
        print(json.dumps([config.seed, str(Path(HydraConfig.get().runtime.output_dir).parent)]), file=file)
    if first:
        raise KeyboardInterrupt

sys.argv = ["train.py", *sys.argv[3:]]
command(job, Path(conf), "config")()
"""
"""A multirun that stops in its first job. In a process of its own: Hydra closes streams of logging."""


@pytest.mark.parametrize("name", ["it's lr=0.1,wd=2", "back\\slash"])
def test_a_stopped_multirun_says_how_to_continue_it_wherever_it_is(tmp_path, name) -> None:
    """The command that is named runs both jobs in the same folder."""
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", STOPPED, name, str(CONF), *arguments], cwd=tmp_path, text=True,
                              capture_output=True, timeout=120)

    folder = "hydra.sweep.dir='" + name.replace("'", "\\'") + "'"
    stopped = run("-m", "seed=3,4", "allow_targets=[mine]", folder)
    assert stopped.returncode == 130, stopped.stderr
    words = shlex.split(stopped.stdout.split("Continue with: ")[1])
    assert words[:2] == ["python", "train.py"]
    assert words[3:] == ["allow_targets=[mine]"]
    went_on = run(*words[2:])
    assert went_on.returncode == 0, went_on.stderr
    seen = [json.loads(line) for line in (tmp_path / "ran.jsonl").read_text().splitlines()]
    assert seen == [[seed, str(tmp_path / name)] for seed in (3, 3, 4)]


def test_a_stored_command_line_grants_nothing(tmp_path) -> None:
    """It may come from somebody else: it cannot allow targets, and names no plugin of Hydra for itself."""
    multirun(tmp_path, ["allow_targets=[os]", "+hydra.launcher._target_=os.system", "hydra/launcher=evil", "seed=1"],
             ["++hydra.callbacks.x._target_=os.system", "hydra.searchpath=[file:///tmp]", "hydra.run.dir=/etc"])
    assert _continued([f"resume_sweep={tmp_path}"]) == ["-m", "seed=1", f"hydra.sweep.dir={tmp_path}"]


def test_what_cannot_be_continued_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no multirun"):
        _continued([f"resume_sweep={tmp_path}"])
    multirun(tmp_path, [], [])
    with pytest.raises(ConfigError, match=r"leave out seed=3\."):
        _continued([f"resume_sweep={tmp_path}", "seed=3"])
    (tmp_path / "multirun.yaml").write_text("hydra: [")
    with pytest.raises(ConfigError, match="is damaged"):
        _continued([f"resume_sweep={tmp_path}"])
