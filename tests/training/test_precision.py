"""Mixed precision, accumulation, clipping, weight averages, compiled networks: training works, and parity holds."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, ConfigError
from qat.tracing import uncompiled
from qat.training import QuantizationSchedule, QuantizedTraining, ResumableLoader, WeightAverage
from qat.training.data import TensorExamples


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.dropout, self.middle, self.head = nn.Dropout(0.1), nn.Linear(64, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.dropout(self.relu(self.norm(self.conv(x))).flatten(1)))))


def loader(count: int = 44, seed: int = 0) -> ResumableLoader:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 4, 4, generator=generator) + (labels - 1.0)[:, None, None, None] * 2
    return ResumableLoader(TensorExamples(images, labels), 8, shuffle=True, seed=seed)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(float(outputs["loss"]))


ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-2}


def fit(folder, preset: str | None = "w4a4", checkpoint=None, callbacks: tuple[Any, ...] = (), epochs: int = 3,
        compile: Any = None, seed: int = 0, optimizer: Any = ADAMW,
        **options: Any) -> tuple[QuantizedTraining, list[float]]:
    torch.manual_seed(seed)
    recipe = None if preset is None else qat.Recipe.preset(preset).to_dict()
    module = QuantizedTraining(Network(), recipe, torch.zeros(1, 1, 4, 4), compile=compile,
                               optimizer=optimizer)
    losses = Losses()
    schedule = [] if preset is None else [QuantizationSchedule(calibration_batches=2, reestimate_batches=2)]
    L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder, callbacks=[*schedule, losses, *callbacks],
        **{"enable_checkpointing": False} | options,
    ).fit(module, loader(), loader(seed=1), ckpt_path=checkpoint, weights_only=True)  # fmt: skip
    return module, losses.seen


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_learned_and_equal(module: QuantizedTraining, losses: list[float]) -> None:
    """Loss goes down; prepared and deployed are equal, in float32 and under the autocast of the training."""
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    x = loader().examples.images
    prepared = module.network.eval()
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    for narrow in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow), uncompiled():
            assert torch.equal(deployed(x), prepared(x))


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulated": {"accumulate_grad_batches": 2, "epochs": 6},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "epochs": 6},
    "all": {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 1.0, "epochs": 8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_trains_and_deploys_equal(tmp_path, options) -> None:
    assert_learned_and_equal(*fit(tmp_path, **options))


def test_fused_optimizers_are_clipped_under_bf16(tmp_path) -> None:
    """No gradient is scaled there, so nothing is in the way: one step of 1e-3 at most, and most of that length."""
    sgd = {"_target_": "torch.optim.SGD", "lr": 1.0, "fused": True}
    still, moved = (dict(fit(tmp_path / str(clip), None, optimizer=sgd, precision="bf16-mixed", max_steps=1,
                             gradient_clip_val=clip, gradient_clip_algorithm="value")[0].network.named_parameters())
                    for clip in (1e-12, 1e-3))
    steps = torch.cat([(moved[name] - still[name]).detach().flatten().abs() for name in still])
    assert steps.max() == pytest.approx(1e-3, rel=1e-3)


def test_master_weights_and_scales_stay_float32_under_mixed_precision(tmp_path) -> None:
    module, _ = fit(tmp_path, precision="bf16-mixed", epochs=1)
    assert {p.dtype for p in module.network.parameters()} == {torch.float32}
    module, _ = fit(tmp_path, precision="bf16-true", epochs=1)
    dtypes = {name: p.dtype for name, p in module.network.named_parameters()}
    assert {d for n, d in dtypes.items() if "quantizer" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "quantizer" not in n} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- weight averages


class Watch(L.Callback):
    """The average, computed a second time and differently; and what validation sees."""

    def __init__(self, decay: float) -> None:
        self.decay, self.steps, self.average, self.validated = decay, 0, None, None

    def on_train_start(self, trainer, pl_module) -> None:
        self.average = {n: p.detach().double().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step > self.steps:
            d = min(self.decay, (1 + self.steps) / (10 + self.steps))
            for n, p in pl_module.named_parameters():
                self.average[n] = d * self.average[n] + (1 - d) * p.detach().double()
            self.steps = trainer.global_step

    def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
        self.validated = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


@pytest.mark.parametrize("preset", [None, "w4a4", "w2a2"])
def test_the_average_is_validated_and_deployed(tmp_path, preset) -> None:
    watch = Watch(0.9)
    module, losses = fit(tmp_path, preset, callbacks=(WeightAverage(0.9), watch), accumulate_grad_batches=2, epochs=6)
    assert watch.steps == 18
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), watch.average[name], rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(parameter, watch.validated[name]), name
    if preset is not None:
        assert_learned_and_equal(module, losses)


def test_training_is_that_without_an_average(tmp_path) -> None:
    """The average never leaks into what is trained, through any number of validations."""
    average = WeightAverage(0.9)
    plain, losses = fit(tmp_path)
    averaged, same = fit(tmp_path, callbacks=(average,), val_check_interval=2)
    assert losses == same
    average.restore(averaged)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(averaged.named_parameters())[name]), name


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # the test leaves other callbacks out on purpose
def test_a_checkpoint_holds_the_average(tmp_path) -> None:
    saving = ModelCheckpoint(tmp_path / "best", "last", enable_version_counter=False)
    average = WeightAverage(0.9)
    module, _ = fit(tmp_path, callbacks=(average, saving), enable_checkpointing=True)
    stored = torch.load(tmp_path / "best" / "last.ckpt", weights_only=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(stored["state_dict"][name], parameter), name
        assert torch.equal(stored["weight_average"]["trained"][name], average._trained[name]), name
    loaded = QuantizedTraining.load_from_checkpoint(tmp_path / "best" / "last.ckpt", network=Network(),
                                                    weights_only=True)
    x = loader().examples.images
    with torch.no_grad():
        fresh = copy.deepcopy(module.network).eval()
        assert fresh(x).shape == loaded.network.eval()(x).shape
    tester = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                       callbacks=[WeightAverage(0.9)])
    tester.test(loaded, loader(), ckpt_path=tmp_path / "best" / "last.ckpt", weights_only=True, verbose=False)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(stored["state_dict"][name], parameter), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_wrong_averages_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        WeightAverage(1.0)
    saving = ModelCheckpoint(tmp_path / "plain", "last", enable_version_counter=False)
    fit(tmp_path, callbacks=(saving,), enable_checkpointing=True, epochs=1)
    with pytest.raises(CheckpointError, match="trained without one"):
        fit(tmp_path, callbacks=(WeightAverage(), saving), enable_checkpointing=True,
            checkpoint=tmp_path / "plain" / "last.ckpt")


# ---------------------------------------------------------------------------------------------------- exact resume


def test_resumes_to_the_same_bits_with_everything_on(tmp_path) -> None:
    """bfloat16, accumulation, clipping and an average, from mid-epoch, an epoch's end and the very last step."""

    def run(seed: int, checkpoint=None) -> dict[str, Tensor]:
        saving = ModelCheckpoint(tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1,
                                 enable_version_counter=False)
        module, _ = fit(tmp_path, checkpoint=checkpoint, callbacks=(WeightAverage(0.9), saving), seed=seed,
                        precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.5,
                        enable_checkpointing=True)
        return state(module)

    expected = run(0)
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (1, 2, 3, 5, 9):  # 6 batches and 3 steps in an epoch
        assert_same(expected, run(99, tmp_path / "kept" / f"step={step}.ckpt"))
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- compiled networks


# torch's own compiler instantiates autograd functions, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_a_compiled_network_trains_as_the_eager_one(tmp_path, preset) -> None:
    """Through calibration, observing, freezing and validation; and the deployed model equals the prepared one."""
    torch._dynamo.reset()
    eager, expected = fit(tmp_path, preset)
    compiled, losses = fit(tmp_path, preset, compile={"backend": "aot_eager"})
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != [0.0] * len(losses)
    assert compiled.network._compiled_call_impl is not None
    assert compiled.network.state_dict().keys() == eager.network.state_dict().keys()
    assert_learned_and_equal(compiled, losses)
