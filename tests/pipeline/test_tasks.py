"""Runs of the other tasks: a language model in steps, a recurrent classifier with two inputs, a regression."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

import qat
from qat.errors import ConfigError
from qat.pipeline import Run, run_config, stored_config
from qat.pipeline.evaluation import batch_size, measure, predictions
from qat.reporting import compare, read_csv
from qat.training import QuantizedTraining, TokenCrossEntropy

CONF = Path(__file__).resolve().parents[2] / "conf"
QUIET = ["logger.tensorboard=false", "trainer.accelerator=cpu"]
LM = [
    "experiment=lm", "model.width=16", "model.heads=2", "model.layers=1", "data.length=16", "data.batch_size=4",
    "data.eval_windows=6", "trainer.max_steps=8", "trainer.val_check_interval=4", "schedule.epochs=0.75",
    "checkpoint.every_n_steps=3", "schedule.calibration_batches=2",
]  # fmt: skip
RNN = ["experiment=rnn", "model.width=8", "model.hidden=8", "data.num_classes=3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with 40 small texts in ``texts``, and a table of lines with a class each in ``lines``."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"{i} " * 12 + "abc"[i % 3] * 30)
    lines = {"text": [f"{'xyz'[i % 3] * (1 + i % 7)} {i}" for i in range(60)], "label": [i % 3 for i in range(60)]}
    datasets.Dataset.from_dict(lines).save_to_disk(folder / "lines")
    return folder


def configured(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return run_config(compose("config", [*overrides, *QUIET]))


@pytest.fixture
def language_model(corpus, tmp_path):
    """A constructor of the same small run in a folder of this name."""
    def make(name, *overrides):
        config = configured(*LM, f"data.dataset={corpus / 'texts'}", *overrides)
        return Run(config, tmp_path / name, Console(quiet=True))

    return make


def test_a_language_model_runs_in_steps(language_model):
    run = language_model("run")
    results = run.execute()
    assert (results.metric, results.higher_is_better, results.proportion) == ("bits_per_byte", False, False)
    assert results.bit_equal is True
    assert results.examples == 6
    rows = {row.model: row for row in results.rows}
    assert 0 < rows["deployed"].score == rows["qat"].score < 9
    assert rows["deployed"].agreement_prepared == 1.0
    assert rows["deployed"].bytes < rows["float"].bytes
    for stage, steps in (("float", 8), ("control", 6), ("qat", 6)):
        said = json.loads((run.folder / "stages" / f"{stage}.json").read_text())
        assert said["steps"] == steps
        assert "epochs" not in said
        assert said["val_bits_per_byte"] > 0
        checkpoint = torch.load(run.folder / stage / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == steps - steps % 3
    assert {"float", "control", "qat"} <= run.fitting.curves()["val bits per byte"].keys()
    page = (run.folder / "report.html").read_text()
    assert "Bits per byte: lower is better." in page
    again = Run(stored_config(run.folder), run.folder, Console(quiet=True)).evaluate()
    assert compare(again, read_csv(run.folder / "results.csv")) == []


def test_killed_in_mid_epoch_it_ends_with_the_same_weights(language_model, monkeypatch):
    """Once in each training, between two checkpoints."""
    whole, broken = language_model("whole"), language_model("broken")
    whole.execute()
    step, met = QuantizedTraining.training_step, set()

    class Killed(Exception):
        pass

    def killed(self, batch, batch_idx):
        stage = (self.hparams["recipe"] is None, self.hparams["optimizer"]["lr"])
        if self.global_step == 5 and stage not in met:
            met.add(stage)
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(QuantizedTraining, "training_step", killed)
    for stage in ("float", "control", "qat"):
        with pytest.raises(Killed):
            language_model("broken").execute()
        assert not (broken.folder / "stages" / f"{stage}.json").exists()
        assert (broken.folder / stage / "checkpoints" / "last.ckpt").exists()
    language_model("broken").execute()
    for name in ("float/weights", "control/weights", "qat/weights", "deployed/model"):
        one, two = (run.folder / f"{name}.safetensors" for run in (whole, broken))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("recipe", ["w4a8", "w2a8"])
def test_fast_dev_run_of_a_language_model(language_model, recipe):
    results = language_model("fast", f"recipe={recipe}", "trainer.fast_dev_run=true").execute()
    assert results.bit_equal is True
    assert results.batch_size == 4


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_fast_dev_run_of_a_recurrent_classifier(corpus, tmp_path, cell):
    config = configured(*RNN, f"model.cell={cell}", f"data.dataset={corpus / 'lines'}", "trainer.fast_dev_run=true",
                        "recipe=w4a8", "data.batch_size=5")  # fmt: skip
    run = Run(config, tmp_path, Console(quiet=True))
    results = run.execute()
    assert (results.metric, results.higher_is_better, results.proportion) == ("accuracy", True, True)
    assert results.bit_equal is True
    assert results.batch_size == results.examples == 5
    coverage = {row["name"]: row for row in json.loads((tmp_path / "coverage.json").read_text())["rows"]}
    assert {coverage[name]["status"] for name in ("embedding", "head")} == {"quantized"}
    assert any(name.startswith("recurrent") for name in coverage)


def test_epochs_and_steps_may_both_limit_a_run(language_model):
    run = language_model("both", "trainer.max_epochs=4", "trainer.max_steps=10", "schedule.epochs=0.5")
    assert run.float_budget == {"max_epochs": 4, "max_steps": 10}
    assert run.extra_budget == {"max_epochs": 2, "max_steps": 5}
    assert language_model("short", "schedule.epochs=0.001").extra_budget == {"max_steps": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_steps=null"], "How long is the training"),
        (["trainer.max_steps=-1"], "How long is the training"),
        (["trainer.max_steps=0"], "max_steps must be a whole number"),
        (["trainer.max_steps=1.5"], "max_steps must be a whole number"),
        (["trainer.max_epochs=0"], "max_epochs must be a whole number"),
    ],
)
def test_a_run_needs_a_length(language_model, overrides, message):
    with pytest.raises(ConfigError, match=message):
        language_model("none", *overrides)


def test_best_weights_are_those_of_the_lowest_score(language_model):
    run = language_model("best", "checkpoint.monitor=val_bits_per_byte", "trainer.val_check_interval=2")
    run._float()
    best = torch.load(run.folder / "float" / "best" / "best.ckpt", weights_only=True)
    [state] = [v for k, v in best["callbacks"].items() if "val_bits_per_byte" in k]
    scores = [value for _, value in run.fitting.curves()["val bits per byte"]["float"]]
    assert float(state["best_model_score"]) == pytest.approx(min(scores))
    assert len(scores) == 4


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_predictions_lie_where_the_loss_says():
    target = torch.tensor([[1, 0, -100], [2, -100, 1]])
    tokens = nn.functional.one_hot(target.clamp(min=0), 3).float()
    assert predictions(tokens, target, TokenCrossEntropy()).tolist() == [1, 0, 2, 1]
    assert predictions(tokens.movedim(-1, 1), target, nn.CrossEntropyLoss()).tolist() == [1, 0, 2, 1]
    assert predictions(torch.eye(3), torch.arange(3), nn.NLLLoss()).tolist() == [0, 1, 2]
    assert predictions(torch.eye(3), torch.arange(3), nn.MultiMarginLoss()).tolist() == [0, 1, 2]
    assert predictions(torch.randn(4, 1), torch.randn(4, 1), nn.MSELoss()) is None
    assert predictions(torch.randn(4), torch.ones(4, dtype=torch.long), nn.BCEWithLogitsLoss()) is None


def test_batches_of_any_form_have_a_size():
    for inputs in (torch.zeros(5, 2), (torch.zeros(5, 2), torch.zeros(5)), {"x": torch.zeros(5), "y": torch.zeros(5)}):
        assert batch_size(inputs) == 5


def test_a_regression_has_a_score_and_no_agreement():
    network = nn.Linear(3, 1)
    prepared = qat.prepare(network, "w8a8", torch.zeros(1, 3))
    batches = [(torch.randn(7, 3), torch.randn(7, 1)) for _ in range(2)]
    qat.calibrate(prepared, [x for x, _ in batches])
    results = measure(
        {"float": network.eval(), "qat": prepared.eval()}, {"float": 1, "qat": 1}, batches,
        {"mean_error": {"_target_": "torchmetrics.MeanSquaredError"}}, nn.MSELoss(), torch.device("cpu"), 1,
    )  # fmt: skip
    assert (results.higher_is_better, results.proportion) == (False, False)
    assert [row.agreement_float for row in results.rows] == [None, None]
    expected = torch.cat([(network(x) - y) ** 2 for x, y in batches]).mean().item()
    assert results.rows[0].score == pytest.approx(expected)
    assert results.cells()[0][1] == "mean error"
    assert results.cells()[1][0][2] == ""
