"""Whole runs with pruning: the stages, the certificate, the smaller files, and mistakes that are known at once."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

import qat
from qat.errors import ConfigError, PruneError
from qat.pipeline import Run, run_config, stored_config
from qat.training.build import build

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = [
    "trainer.max_epochs=2", "trainer.limit_train_batches=6", "schedule.epochs=1", "checkpoint.every_n_steps=4",
    "logger.tensorboard=false", "logger.csv=false", "model.width=4", "model.stages=2",
]  # fmt: skip


def make(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Run(run_config(compose("config", [*SMALL, *overrides])), folder, Console(quiet=True))


@pytest.mark.parametrize("method", ["magnitude", "movement", "nm_2_4"])
def test_masks_survive_every_stage(method, tmp_path):
    results = make(tmp_path, f"prune={method}").execute()
    assert results.bit_equal is True
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["total_sparsity"] >= 0.45
    deployed = qat.load(tmp_path / "deployed", build(stored_config(tmp_path)["model"], "model"))
    assert qat.sparsity(deployed) == certificate["sparsity"]
    if method == "nm_2_4":
        patterns = {n: s["pattern"] for n, s in certificate["sparsity"].items()}
        assert patterns.pop("stem.0") is None
        assert set(patterns.values()) <= {"2:4"}
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    assert any(f"pruned: {method}" in row["reason"] for row in rows)
    assert "total sparsity" in (tmp_path / "report.html").read_text()


def test_channels_leave_and_the_files_shrink(tmp_path):
    whole = make(tmp_path / "whole", "model.width=16").execute()
    run = make(tmp_path / "cut", "model.width=16", "prune=channels")
    cut = run.execute()
    assert cut.bit_equal is True
    before, after = (next(r.bytes for r in results.rows if r.model == "deployed") for results in (whole, cut))
    assert before > 1.7 * after
    again = Run(stored_config(run.folder), run.folder, Console(quiet=True)).evaluate(("qat", "deployed"))
    assert [r.score for r in again.rows] == [r.score for r in cut.rows[-2:]]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["prune=magnitude", "recipe=w2a8"], PruneError, r"blocks\.0\.body\.0\.0: int2_midrise has no zero"),
        (["prune=magnitude", "prune.exclude=[hed]"], PruneError, "did you mean 'head'"),
        (["prune=channels", "prune.exclude=[hed]"], PruneError, "did you mean 'head'"),
        (["+prune.sparsty=0.5"], PruneError, "did you mean 'sparsity'"),
        (["prune=magnitude", "checkpoint.monitor=val_accuracy"], ConfigError, "before the pruning was done"),
    ],
)
def test_mistakes_are_known_before_training(overrides, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path / "run", *overrides).execute()
    assert not (tmp_path / "run").exists()
