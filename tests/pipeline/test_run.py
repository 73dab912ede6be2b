"""Runs inside one process: what the stages leave, and the options that change how a stage trains."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

import qat
from qat.errors import CheckpointError, ConfigError
from qat.pipeline import Run, run_config, stored_config
from qat.pipeline.fitting import process_strategy
from qat.reporting import read_csv

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = [
    "trainer.max_epochs=2", "trainer.limit_train_batches=6", "trainer.log_every_n_steps=2", "schedule.epochs=1",
    "checkpoint.every_n_steps=4", "logger.tensorboard=false",
]  # fmt: skip


def make(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Run(run_config(compose("config", [*SMALL, *overrides])), folder, Console(quiet=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("run"), "model=mlp", "recipe=w4a8")
    return run, run.execute()


def test_the_table_is_what_is_on_disk(done):
    run, results = done
    assert read_csv(run.folder / "results.csv") == results
    again = Run(stored_config(run.folder), run.folder, Console(quiet=True)).evaluate(("qat", "deployed"))
    for before, after in zip(results.rows[-2:], again.rows, strict=True):
        assert (before.score, before.agreement_prepared, before.bytes) == (
            after.score,
            after.agreement_prepared,
            after.bytes,
        )
    assert again.bit_equal is True
    assert again.rows[0].agreement_float is None


def test_a_finished_run_does_nothing_again(done):
    run, results = done
    times = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    assert Run(stored_config(run.folder), run.folder, Console(quiet=True)).execute() == results
    assert times == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}


def test_the_control_has_the_budget_of_the_quantized_training(done):
    run, _ = done
    control, quantized = (
        torch.load(run.folder / stage / "checkpoints" / "last.ckpt", weights_only=True) for stage in ("control", "qat")
    )
    assert control["global_step"] == quantized["global_step"] == 12
    for name in ("optimizer", "scheduler", "loss", "seed"):
        assert control["hyper_parameters"][name] == quantized["hyper_parameters"][name]
    for stage in ("control", "qat"):
        assert json.loads((run.folder / "stages" / f"{stage}.json").read_text())["epochs"] == 2
    curves = run.fitting.curves()
    assert {"float", "control", "qat"} <= curves["val accuracy"].keys()


def test_a_missing_stage_is_named(done, tmp_path):
    run, _ = done
    with pytest.raises(CheckpointError, match=r"float/weights\.safetensors is missing"):
        Run(run.config, tmp_path, Console(quiet=True)).evaluate()


def test_best_weights_and_early_stopping(tmp_path):
    run = make(
        tmp_path, "trainer.max_epochs=6", "checkpoint.monitor=val_accuracy", "early_stopping.monitor=val_accuracy",
        "early_stopping.mode=max", "early_stopping.patience=1", "early_stopping.min_delta=2",
    )  # fmt: skip
    run._float()
    best = torch.load(tmp_path / "float" / "best" / "best.ckpt", weights_only=True)
    assert best["epoch"] < 5
    network = run._load("float")
    for name, value in network.state_dict().items():
        assert torch.equal(value, best["state_dict"][f"network.{name}"])


@pytest.mark.parametrize("overrides", [
    ["trainer.max_epochs=null", "trainer.max_steps=4"], ["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=3"],
], ids=["part of an epoch", "fewer epochs"])
def test_a_stage_shorter_than_the_interval_of_validation_has_best_weights_too(tmp_path, overrides):
    run = make(tmp_path, "checkpoint.monitor=val_accuracy", *overrides)
    assert run._float()["val_accuracy"] > 0
    best = torch.load(tmp_path / "float" / "best" / "best.ckpt", weights_only=True)
    for name, value in run._load("float").state_dict().items():
        assert torch.equal(value, best["state_dict"][f"network.{name}"])


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_best_weights_without_any_validation_are_an_error(tmp_path):
    run = make(tmp_path, "checkpoint.monitor=val_accuracy", "trainer.max_epochs=null", "trainer.max_steps=4",
               "trainer.limit_val_batches=0")
    with pytest.raises(ConfigError, match=r"no validation has measured val_accuracy in stage float"):
        run._float()


def test_layers_without_batch_norm_and_dynamic_ranges_are_equal_too(tmp_path):
    results = make(tmp_path, "model=mlp", "recipe=w8a8_dynamic", "trainer.fast_dev_run=true").execute()
    assert results.bit_equal is True
    deployed = qat.load(tmp_path / "deployed", torch.nn.Sequential(*make(tmp_path, "model=mlp")._load("float")))
    assert not any(parameter.is_floating_point() and parameter.ndim == 2 for parameter in deployed.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"devices": 1}, "auto"),
        ({"devices": [0]}, "auto"),
        ({"devices": "auto", "accelerator": "cpu"}, "auto"),
        ({"devices": 2}, "ddp_spawn"),
        ({"devices": "2"}, "ddp_spawn"),
        ({"devices": [0, 1]}, "ddp_spawn"),
        ({"devices": "0, 1"}, "ddp_spawn"),
        ({"devices": 2, "strategy": "ddp_fork"}, "ddp_fork"),
    ],
)
def test_several_devices_share_each_training(options, expected):
    assert process_strategy(options) == expected


def test_strategies_that_would_run_every_stage_again_are_refused(tmp_path):
    for override in ("+trainer.strategy=ddp", "+trainer.strategy=fsdp", "+trainer.num_nodes=2"):
        with pytest.raises(ConfigError, match="trainer of your own"):
            make(tmp_path, override)


def test_weight_average_and_compile_are_options_of_a_run(tmp_path):
    run = make(tmp_path, "weight_average.decay=0.9", "compile={backend: aot_eager}", "model=mlp")
    module = run._module(None, 1.0)
    assert module.hparams["compile"] == {"backend": "aot_eager"}
    run = make(tmp_path, "weight_average.decay=0.9", "model=mlp")
    run._float()
    stored = torch.load(tmp_path / "float" / "checkpoints" / "last.ckpt", weights_only=True)
    network = run._load("float")
    for name, value in network.state_dict().items():
        assert torch.equal(value, stored["weight_average"]["average"][f"network.{name}"]), name
    for wrong in ("weight_average.decay=2", "weight_average.decay=yes", "compile=yes", "compile={mod: x}"):
        with pytest.raises(ConfigError, match=r"weight_average\.decay|compile"):
            make(tmp_path, wrong)


def test_smaller_batches_make_more_steps_of_the_same_data(tmp_path):
    """Only the quantized training has them; where its length is a number of epochs, these stay."""
    size, steps = 64, {}
    for length in ({"max_steps": 8, "max_epochs": "null"}, {"max_epochs": 2}, {"limit_train_batches": 4}):
        folder = tmp_path / str(len(steps))
        run = make(folder, "model=mlp", "recipe=w2a8", "schedule.steps_per_batch=4", "schedule.epochs=0.5",
                   f"data.batch_size={size}",
                   *(f"trainer.{name}={value}" for name, value in ({"limit_train_batches": 1.0} | length).items()))
        run.execute()
        assert run.data.batch_size == size
        steps[len(steps)] = {
            stage: torch.load(folder / stage / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
            for stage in ("float", "control", "qat")
        }
    assert steps[0] == {"float": 8, "control": 4, "qat": 16}
    images = len(run.data.train)
    assert steps[1] == {"float": 2 * (images // size), "control": images // size, "qat": images // 16}
    assert steps[2]["qat"] == 4 * steps[2]["control"] == 4 * 4
    for wrong in ("0", "2.5", "many", "null", "true", "3"):
        with pytest.raises(ConfigError, match=r"schedule\.steps_per_batch"):
            make(tmp_path / "wrong", f"schedule.steps_per_batch={wrong}")


def test_a_run_on_the_ladder(tmp_path):
    """It goes down to the recipe's own bits, deploys them, and trains with weight decay and rates of its schedule."""
    run = make(tmp_path, "model=mlp", "recipe=w2a2", "schedule=ladder", "schedule.oscillation.dampening=0.01",
               "schedule.offset_learning_rate=3.0", "schedule.control_learning_rate=0.3")
    assert run.execute().bit_equal
    control, quantized = (
        torch.load(tmp_path / stage / "checkpoints" / "last.ckpt", weights_only=True) for stage in ("control", "qat")
    )
    assert quantized["callbacks"]["Ladder"] == {"rung": 3}
    assert "Oscillations" in quantized["callbacks"]
    decays = [c["hyper_parameters"]["optimizer"]["weight_decay"] for c in (control, quantized)]
    assert decays == [0.01, 0.0025]
    for stage, factor in ((control, 1.0), (quantized, 3.0)):
        rates = {g["role"]: g["initial_lr"] for g in stage["optimizer_states"][0]["param_groups"]}
        assert rates["offsets"] == pytest.approx(factor * rates["weights"])
        assert rates["weights"] == pytest.approx(6e-3 * (0.3 if stage is control else 0.5))
    plan = json.loads((tmp_path / "deployed" / "manifest.json").read_text())["plan"]["layers"]
    assert {layer["weight"]["format"] for layer in plan.values()} == {"int8", "int2_midrise"}
