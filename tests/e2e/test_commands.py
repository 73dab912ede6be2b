"""train.py and evaluate.py as a user runs them, in processes of their own."""

import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.reporting import read_csv

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["trainer.max_epochs=2", "schedule.epochs=1", "logger.tensorboard=false", "data.augment=1"]


def start(folder, script, *arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "GOMP_SPINCOUNT": "5000", "COLUMNS": "200"},
        # a parent in the background may ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(folder, script, *arguments):
    """(exit status, output)."""
    process = start(folder, script, *arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run that was never interrupted: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = run(folder, "train", *SHORT, "checkpoint.every_n_steps=7")
    assert status == 0, output
    [made] = (folder / "runs").iterdir()
    return made, output


def test_a_run_leaves_everything_and_prints_one_table(finished):
    folder, output = finished
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_digits_w8a8", folder.name)
    for name in ("config.yaml", "results.csv", "report.html", "deployed/model.safetensors", "deployed/manifest.json"):
        assert (folder / name).stat().st_size > 0, name
    for model in ("float", "control", "ptq", "qat"):
        assert (folder / model / "weights.safetensors").stat().st_size > 0
    results = read_csv(folder / "results.csv")
    assert [row.model for row in results.rows] == ["float", "control", "ptq", "qat", "deployed"]
    assert results.bit_equal is True
    rows = {row.model: row for row in results.rows}
    assert rows["deployed"].score == rows["qat"].score > 0.8
    assert rows["deployed"].agreement_prepared == 1.0
    assert rows["deployed"].bytes < rows["float"].bytes
    assert output.count("test examples  ") == 1
    assert "bit for bit" in output
    assert not list(folder.rglob("*.tmp"))


def test_evaluate_reproduces_the_table(finished):
    folder, _ = finished
    status, output = run(folder, "evaluate", f"run={folder}")
    assert status == 0, output
    assert "Every figure equals" in output
    status, output = run(folder, "evaluate", f"deployed={folder / 'deployed'}")
    assert status == 0, output
    assert "Every figure equals" in output


def test_evaluate_notices_a_changed_table(finished, tmp_path):
    folder, _ = finished
    table = folder / "results.csv"
    before = table.read_text()
    try:
        table.write_text(re.sub(r"(?m)^deployed,[^,]*", "deployed,0.123", before))
        status, output = run(tmp_path, "evaluate", f"deployed={folder / 'deployed'}")
    finally:
        table.write_text(before)
    assert status == 1
    assert "deployed: accuracy is" in output
    assert "Traceback" not in output


def test_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(finished, tmp_path):
    """``kill -9`` in mid-epoch of the float and of the quantized training."""
    expected, _ = finished
    process = start(tmp_path, "train", *SHORT, "checkpoint.every_n_steps=7", "hydra.run.dir=broken")
    folder = tmp_path / "broken"
    for stage in ("float", "qat"):
        deadline = time.monotonic() + 120
        while not (folder / stage / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "stages" / f"{stage}.json").exists()
        process = start(tmp_path, "train", "resume=broken")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "float finished before" in output
    for name in ("float/weights", "qat/weights", "deployed/model"):
        one, two = (path / f"{name}.safetensors" for path in (expected, folder))
        assert one.read_bytes() == two.read_bytes(), name
    assert json.loads((folder / "stages" / "qat.json").read_text())["epochs"] == 2


def test_ctrl_c_says_how_to_resume(tmp_path):
    process = start(tmp_path, "train", "trainer.max_epochs=500", "hydra.run.dir=stopped")
    while not (tmp_path / "stopped" / "float" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "python train.py resume=stopped" in output
    assert "Traceback" not in output


def test_fast_dev_run_and_multirun(tmp_path):
    status, output = run(tmp_path, "train", "-m", "recipe=w8a8,w4a4", "trainer.fast_dev_run=true", "seed=1", "fold=2")
    assert status == 0, output
    [sweep] = (tmp_path / "runs").iterdir()
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"0_digits_w8a8", "1_digits_w4a4"}
    assert all((path / "results.csv").exists() for path in sweep.iterdir() if path.is_dir())
    # as if killed in the second run, before its table
    killed = sweep / "1_digits_w4a4"
    for name in ("results.csv", "report.html", "stages/table.json", "stages/deploy.json"):
        (killed / name).unlink()
    finished = (sweep / "0_digits_w8a8" / "results.csv").stat().st_mtime_ns
    status, output = run(tmp_path, "evaluate", f"sweep={sweep}")
    assert status == 0, output
    assert "1_digits_w4a4 is not finished (done: float, control, ptq, qat)" in output
    status, output = run(tmp_path, "train", f"resume_sweep={sweep}")
    assert status == 0, output
    assert output.count("finished before") == 6 + 4
    assert (sweep / "0_digits_w8a8" / "results.csv").stat().st_mtime_ns == finished
    assert (killed / "results.csv").exists()
    status, output = run(tmp_path, "evaluate", f"sweep={sweep}")
    assert status == 0, output
    assert "not finished" not in output
    assert (sweep / "sweep.csv").read_text().count("deployed") == 2
    assert "<svg" in (sweep / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_epoch=3"], "did you mean 'trainer.max_epochs'"),
        (["recipe=w9a8"], "did you mean 'w8a8'"),
        (["+typo=1"], "typo is not an option"),
        (["resume=nowhere"], "there is no run"),
        (["data=images"], "must be given"),
    ],
)
def test_mistakes_are_one_paragraph(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    # Hydra closes all handlers of logging; absl's would close the stream of another test, which is pytest's own
    monkeypatch.setattr(logging, "_handlerList", [])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    output = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message in output
    assert output.startswith("Error: ")
    assert len(output.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))
