"""Two processes, really started: equal scales, ranges of all the data, errors for all, and no waiting for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import process
import pytest
import torch
from torch import nn

import qat
from qat.errors import ConfigError
from qat.training import shard


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[Any]]:
    """What each process found, by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(qat.__file__).parents[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "OMP_NUM_THREADS": "1",
              "WORLD_SIZE": str(process.WORLD),
              "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    running = []
    for rank in range(process.WORLD):
        with open(folder / f"log.{rank}", "w") as log:
            running.append(subprocess.Popen([sys.executable, process.__file__, str(folder)], stdout=log, stderr=log,
                                            env={**os.environ, **shared, "LOCAL_RANK": str(rank)}))
    try:
        for one in running:
            one.wait(timeout=500)
    finally:
        for one in running:
            one.kill()
            one.wait()
    for rank, one in enumerate(running):
        assert one.returncode == 0, (folder / f"log.{rank}").read_text()[-3000:]
    return {scenario.__name__: [torch.load(folder / f"{scenario.__name__}.{rank}.pt", weights_only=True)
                                for rank in range(process.WORLD)] for scenario in process.SCENARIOS}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith(but or "\0"):
            assert torch.equal(one[name].nan_to_num(), two[name].nan_to_num()), name


SUMS = ("observer.high",)  # of mean magnitudes: float64 sums in another order, and equal float32 scales


@pytest.mark.filterwarnings("ignore:1-bit activations")
@pytest.mark.parametrize("recipe", process.recipes())
def test_dealt_out_batches_give_the_ranges_of_one_process(found, recipe) -> None:
    one, two = (states[recipe] for states in found["dealt_out"])
    assert_same(one, two)
    alone = qat.calibrate(process.prepared(process.recipes()[recipe]), process.batches())
    assert_same(one, process.state(alone), SUMS if recipe == "binary" else ())


def test_a_process_without_batches_gets_ranges_and_coverage_too(found) -> None:
    (one, coverage), (two, same) = found["one_is_empty"]
    assert_same(one, two)
    alone = qat.calibrate(process.prepared(process.observing("percentile")), process.batches())
    assert_same(one, process.state(alone))
    assert coverage == same
    assert "unobserved" not in same


def test_an_error_in_one_process_is_raised_in_all_and_leaves_them_as_they_were(found) -> None:
    for rank, (said, before, after) in enumerate(found["errors"]):
        assert said["nobody"] == "CalibrationError: calibration needs at least one batch"
        assert said["nan"].startswith("CalibrationError: " + ("batch 0: " if rank else "process 1: batch 0: "))
        assert "conv.input: NaN or infinity" in said["nan"]
        assert "needs at least one batch" in said["norm"]
        assert said["alone"] == "no error"
        assert_same(before, after)


@pytest.mark.parametrize("observer", process.OBSERVERS)
def test_a_bad_batch_of_one_process_is_left_out(found, observer) -> None:
    one, two = (states[observer] for states in found["ignored"])
    assert_same(one, two)
    order = [process.batches()[1], process.batches()[0]]
    assert_same(one, process.state(qat.calibrate(process.prepared(process.observing(observer)), order)))


def test_batch_norm_is_estimated_over_the_batches_of_all(found) -> None:
    one, two = found["batch_norm"]
    assert_same(one, two)
    model = qat.calibrate(process.prepared("w8a8"), process.batches())
    qat.reestimate_batch_norm(model, process.batches())
    for name, value in process.state(model).items():
        torch.testing.assert_close(one[name], value, msg=name)
    assert one["norm.num_batches_tracked"] == len(process.batches())


@pytest.mark.parametrize("preset", process.PRESETS)
def test_training_keeps_the_processes_equal(found, preset) -> None:
    """After each epoch every tensor is equal on both: weights, scales, histograms, statistics, learned scales."""
    one, two = (states[preset] for states in found["training"])
    assert len(one["epochs"]) == 2
    for here, there in zip([*one["epochs"], one["end"]], [*two["epochs"], two["end"]], strict=True):
        assert_same(here, there)
    assert one["losses"] != two["losses"], "both processes saw the same data"
    half = len(one["losses"]) // 2
    assert sum(one["losses"][half:]) < sum(one["losses"][:half])
    assert one["equal"], "prepared and deployed differ"
    assert two["equal"]


@pytest.mark.filterwarnings("ignore:1-bit activations")
@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "binary"])
def test_ranges_in_training_do_not_depend_on_the_number_of_processes(found, name, tmp_path) -> None:
    one, two = (states[name] for states in found["ranges_in_training"])
    assert_same(one, two)
    alone = process.state(process.fit(tmp_path, process.recipes()[name], 0, 1, lr=0.0, batch_size=8)[0].network)
    first = "conv.input_quantizer."
    assert_same({k: v for k, v in one.items() if k.startswith(first)},
                {k: v for k, v in alone.items() if k.startswith(first)}, SUMS if name == "binary" else ())


def test_resumes_to_the_same_bits(found) -> None:
    """Accumulation, clipping, bfloat16 and DDP together; from mid-epoch and from an epoch's end."""
    (expected, again), (there, _) = found["resumed"]
    assert_same(expected, there)
    for end in again:
        assert_same(expected, end)


def test_synchronized_batch_norm_is_that_of_the_whole_batch_and_still_folds(found) -> None:
    one, two = found["synchronized"]
    assert one["kind"] == "BatchNorm2d" or one["kind"].startswith("Quantized")
    for here, there in zip(one["epochs"], two["epochs"], strict=True):
        assert_same(here, there)
    model = qat.calibrate(process.prepared("w8a8"), process.batches()).train()
    qat.freeze_ranges(model)
    model(process.batches()[0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(one["gradients"][name], parameter.grad, rtol=2e-3, atol=2e-3, msg=name)
    for name, value in process.state(model.norm).items():
        torch.testing.assert_close(one["norm"][name], value, msg=name)
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_what_would_wait_for_ever_or_drift_apart_is_refused_on_all(found) -> None:
    for counts, start in found["uneven"]:
        assert counts.startswith("ConfigError: One process has 3 training batches, another 6")
        assert start.startswith("NotCalibratedError: learned scales without a start would differ")


@pytest.mark.parametrize("name", ["w8a8", "learned"])
def test_fully_sharded_training_is_that_of_one_process(found, name) -> None:
    (one, refused), (two, _) = found["sharded"]
    assert refused.startswith("ConfigError: ModelParallelStrategy cannot train a quantized network")
    assert_same(one[name]["scales"], two[name]["scales"])
    assert 0.3 < one[name]["kept"] < 0.7
    model = qat.calibrate(process.prepared("w8a8" if name == "w8a8" else process.recipes()["learned"]),
                          process.batches()).train()
    qat.freeze_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in process.batches(3):
        optimizer.zero_grad()
        (sum(model(part).square().mean() for part in x.chunk(2)) / 2).backward()
        optimizer.step()
    whole = one[name]["state"]
    for key, value in process.state(model).items():
        torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-5, msg=key)
    fresh = process.prepared("w8a8" if name == "w8a8" else process.recipes()["learned"])
    fresh.load_state_dict(whole)
    _, certificate = qat.convert(fresh.eval(), process.batches())
    assert certificate.equal


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        shard(process.prepared("w8a8"))
