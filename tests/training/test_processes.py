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
from qat.training import QuantizedTraining, deploy, shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, list[Any]]:
    """What each process found, by scenario."""
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


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """But for the order of the sum in a norm of gradients."""
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


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
    one, two = (ends[name] for ends in found["sharded"])
    assert_same(one["scales"], two["scales"])
    assert_same(one["state"], two["state"])
    assert one["norms"] == two["norms"]
    assert 0.3 < one["kept"] < 0.7
    assert found["sharded"][0]["other"] == ["norm.weight", "norm.bias"], "float64 beside float32"
    assert one["refused"].startswith("ConvertError: each process has a part of this model's weights only")
    model = qat.calibrate(process.prepared("w8a8" if name == "w8a8" else process.recipes()["learned"]),
                          process.batches()).train()
    qat.freeze_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms = []
    for x in process.batches(3):
        optimizer.zero_grad()
        (sum(model(part).square().mean() for part in x.chunk(2)) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.6)))
        optimizer.step()
    assert min(norms) < 0.6 < max(norms), "the clipping is to be seen at work and at rest"
    torch.testing.assert_close(one["norms"], norms, rtol=1e-4, atol=0)
    whole = one["state"]
    for key, value in process.state(model).items():
        torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-5, msg=key)
    fresh = process.prepared("w8a8" if name == "w8a8" else process.recipes()["learned"])
    fresh.load_state_dict(whole)
    _, certificate = qat.convert(fresh.eval(), process.batches())
    assert certificate.equal


@pytest.mark.parametrize("name", ["w8a8", "learned"])
def test_model_parallel_strategy_trains_what_ddp_trains(found, name) -> None:
    """With half of the weights on each process; scales are equal on both at every step, bit for bit."""
    one, two = (ends[0][name] for ends in found["strategy"])
    assert len(one["scales"]) == len(one["losses"]) == 12
    for here, there in zip([*one["scales"], *one["epochs"], one["end"]], [*two["scales"], *two["epochs"], two["end"]],
                           strict=True):
        assert_same(here, there)
    moved = [key for key in one["scales"][0] if not torch.equal(one["scales"][0][key], one["scales"][-1][key])]
    assert any(key.startswith("conv.input_quantizer") for key in moved), "no range has moved"
    for mine, theirs in zip(one["kept"], two["kept"], strict=True):
        assert 0.3 < mine < 0.7
        assert mine + theirs == pytest.approx(1.0)
    assert one["after"] == one["kept"][0]
    assert one["losses"] != two["losses"], "both processes saw the same data"
    assert sum(one["losses"][6:]) < sum(one["losses"][:6])
    assert_same(one["end"], one["ddp"])
    assert_same(one["codes"], two["codes"])
    assert one["equal"], "prepared and deployed differ"
    assert two["equal"]


def test_model_parallel_strategy_synchronizes_batch_norm(found) -> None:
    (ends, synchronized, ddp), (_, there, _) = found["strategy"]
    assert_same(synchronized, there)
    assert_same(synchronized, ddp)
    own = ends["w8a8"]["end"]["network.norm.running_var"]
    assert not torch.equal(synchronized["network.norm.running_var"], own)


def test_model_parallel_strategy_resumes_to_the_same_bits(found) -> None:
    """From one file and from many, with accumulation, clipping and bfloat16; and DDP goes on where it stopped."""
    (ends, expected, by_ddp), (there, *_) = found["strategy_resumed"]
    assert_close(expected, by_ddp)
    for in_parts, count in (("False", 2), ("True", 1)):
        end, again = ends[in_parts]
        assert_close(end, expected)
        assert_same(end, there[in_parts][0])
        assert len(again) == count
        for resumed in again:
            assert_same(end, resumed)


def test_checkpoints_of_model_parallel_strategy_load_in_one_process(found, folder) -> None:
    """The file as it is, the folder when Lightning has made one file of it; and the network deploys."""
    file, parts = folder / "strategy_False" / "step=6.ckpt", folder / "strategy_True" / "step=6.ckpt"
    assert file.is_file()
    assert parts.is_dir()
    merged = folder / "merged.ckpt"
    subprocess.run([sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(parts),
                    "--output_file", str(merged)], check=True, capture_output=True)
    for path, kind in ((file, "False"), (merged, "True")):
        module = QuantizedTraining.load_from_checkpoint(path, network=process.network(), weights_only=True)
        end = {key: value for key, value in found["strategy_resumed"][0][0][kind][0].items() if ".norm." not in key}
        assert_same({key: module.state_dict()[key] for key in end}, end)  # batch norm is re-estimated behind the file
        _, certificate = deploy(module.eval(), process.loader(0, 1))
        assert certificate.equal


@pytest.mark.parametrize("name", ["average", "ladder", "pruning"])
def test_callbacks_that_need_whole_weights_do_with_parts_what_they_do_under_ddp(found, name) -> None:
    """An average of weights, oscillations dampened and frozen, a ladder, learned masks; and each resumes."""
    one, two = (ends[name] for ends in found["strategy_with_callbacks"])
    assert_same(one["end"], two["end"])
    assert_same(one["end"], one["ddp"])
    assert_same(one["end"], one["again"])
    plain = found["strategy_resumed"][0][1]
    assert not torch.equal(one["end"]["network.middle.weight"], plain["network.middle.weight"])
    assert one["equal"]
    assert (one["sparsity"] >= 0.5) == (name == "pruning")


@pytest.mark.parametrize("name", ["Own.body", "Own.", "Alternating.body"])
def test_model_parallel_strategy_trains_a_module_made_quantization_aware(found, name) -> None:
    """A part of it, itself by its steps alone, and manual optimization: as DDP does, from the weights of process 0."""
    one, two = (ends[0][name] for ends in found["strategy_of_own_modules"])
    assert_same(one["end"], two["end"])
    assert_close(one["end"], one["ddp"])
    assert_same(one["codes"], two["codes"])
    assert 0.3 < one["kept"] < 0.7
    assert one["equal"]


def test_model_parallel_strategy_resumes_an_optimizer_without_state(found) -> None:
    ends, again = found["strategy_of_own_modules"][0]
    assert_same(ends["Own.body"]["end"], again)


def test_parameters_that_functions_read_can_be_sharded(found) -> None:
    for shared, alone in found["sharded_parameters"]:
        assert shared["kept"] < 0.6
        assert shared["equal"]
        assert_close(shared["state"], alone["state"])
    (one, _), (two, _) = found["sharded_parameters"]
    assert_same(one["state"], two["state"])


def test_what_cannot_be_sharded_is_refused_on_all(found) -> None:
    for said in found["strategy_refused"]:
        assert said["flat"].startswith("ConfigError: FSDPStrategy cannot train a quantized network")
        assert "Use ModelParallelStrategy(" in said["flat"]
        assert said["tensor"].startswith("ConfigError: A quantized network cannot be split by tensor parallelism")
        assert "tensor_parallel_size=1" in said["tensor"]
        assert said["itself"].startswith("PrepareError: the model is sharded already")
        assert said["manual"].startswith("ConfigError: QuantizedAlternating is itself the network")
        assert said["no recipe"].startswith("ConfigError: ModelParallelStrategy shards the network before")
        assert "keeps 'rows' in another shape" in said["rows"]
        assert "save_distributed_checkpoint=True" in said["rows"]
        assert said["ddp afterwards"].startswith("ConfigError: The network of this module was sharded by")


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        shard(process.prepared("w8a8"))
