"""The ladder of bit widths: targets stand beside the gaps they are for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from qat.recipe import PRESETS


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_targets_are_those_of_presets(accuracy: ModuleType) -> None:
    assert accuracy.TARGETS.keys() == accuracy.TASKS.keys()
    named = {recipe for table in (*accuracy.TARGETS.values(), *accuracy.LEAST.values()) for recipe in table}
    assert named <= set(PRESETS)


@pytest.mark.parametrize(
    ("task", "recipe", "control", "deployed", "says"),
    [
        ("lm", "w8a8", 1.87, 1.8705, "0.001 met"), ("lm", "w8a8", 1.87, 1.872, "0.001 missed"),
        ("lm", "w4a4", 1.87, 1.9, ""), ("digits", "w2a8", 0.98, 0.979, "0.2 met"),
        ("digits", "w2a8", 0.98, 0.97, "0.2 missed"), ("digits", "w1a1", 0.99, 0.93, "at least 92 met"),
        ("digits", "w1a1", 0.93, 0.91, "at least 92 missed"), ("rnn", "w4a8", 0.5, 0.51, "0.7 met"),
    ],
)  # fmt: skip
def test_a_gap_is_held_against_its_target(
    accuracy: ModuleType, task: str, recipe: str, control: float, deployed: float, says: str
) -> None:
    line: dict[str, Any] = {
        "task": task, "recipe": recipe, "float": control, "control": control, "ptq": control, "qat": deployed,
        "deployed": deployed, "higher_is_better": task != "lm", "size": 0.3, "seconds": 1.0, "equal": True,
    }  # fmt: skip
    table = accuracy.summary([line, line])
    [cell] = next(column for column in table.columns if column.header == "target").cells
    assert cell == says
    Console(quiet=True).print(table)


def test_an_experiment_takes_the_place_of_the_scheme_s(accuracy: ModuleType) -> None:
    plain = accuracy.configuration("lm", "w1a8", 0, 1, ["experiment=lm"])
    own = accuracy.configuration("lm", "w1a8", 0, 1, ["schedule.calibration_batches=2"])
    assert (plain["distill"]["teacher"], plain["recipe"].get("calibration")) == (None, None)
    assert own["distill"]["teacher"] == "float"
    assert [next(iter(one)) for one in own["recipe"]["calibration"]] == ["reconstruction"]
    assert (own["seed"], own["schedule"]["calibration_batches"]) == (1, 2)
    assert own["trainer"] == plain["trainer"]
    assert own["data"] == plain["data"]
    more = accuracy.configuration("lm_more_text", "w1a8", 0, 1, ["schedule.calibration_batches=2"])
    assert more["data"]["batch_size"] > own["data"]["batch_size"]
    assert {key for key in own if own[key] != more[key]} == {"data"}


def test_every_experiment_fits_every_scheme_of_its_task(accuracy: ModuleType) -> None:
    for task, experiments in accuracy.EXPERIMENTS.items():
        for recipe in (*experiments, *accuracy.TARGETS[task]):
            if recipe is not None:
                assert accuracy.configuration(task, recipe, 0, 0, [])["recipe"]


def test_a_line_that_a_kill_has_cut_off_is_run_again(accuracy: ModuleType, tmp_path: Path) -> None:
    journal = tmp_path / "cells.jsonl"
    assert accuracy.read_journal(journal) == []
    journal.write_text('{"seed": 0}\n{"seed"')
    assert accuracy.read_journal(journal) == [{"seed": 0}]
    assert journal.read_text() == '{"seed": 0}\n'
