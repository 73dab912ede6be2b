"""``evaluate.py runtimes=`` on a tiny run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from qat.errors import ConfigError
from qat.pipeline import Run, evaluate, run_config

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "schedule.epochs=1", "mode=ptq",
         "logger.tensorboard=false", "logger.csv=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        Run(run_config(compose("config", SMALL)), made, Console(quiet=True)).execute()
    return made


def evaluated(*overrides: str) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        evaluate(compose("evaluate", [*overrides]), console)
    return console.export_text()


def test_a_run_is_compared_and_the_table_stored(folder: Path) -> None:
    said = evaluated(f"run={folder}", "runtimes=[torch,onnxruntime]")
    assert "…" not in said, "the table is wider than a terminal"
    stored = json.loads((folder / "runtimes.json").read_text())
    torch_row, other = stored["rows"]
    assert torch_row["metric"] == other["metric"]
    assert other["agreement"] == 1.0
    assert other["integer_layers"] == other["layers"] == 10
    assert other["code_difference"] == 0
    assert (folder / "runtimes" / "onnxruntime.onnx").stat().st_size == other["bytes"]
    results = (folder / "results.csv").read_text()
    assert str(torch_row["metric"])[:8] in results
    (folder / "runtimes.json").unlink()
    said = evaluated(f"deployed={folder / 'deployed'}", "runtimes=onnxruntime")
    assert "10/10" in said
    assert (folder / "runtimes.json").exists()


def test_wrong_words(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a list of names"):
        evaluated(f"run={folder}", "runtimes=3")
    with pytest.raises(ConfigError, match="compares one model"):
        evaluated("plan=1B", "runtimes=[torch]")
