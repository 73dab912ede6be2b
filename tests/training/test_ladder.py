"""The ladder of bit widths on real fits: who works with how many bits when, exact resume, and what is refused."""

import shutil

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.errors import ConfigError
from qat.rewriter import quantized_modules
from qat.training import Ladder, QuantizationSchedule, QuantizedTraining, ResumableLoader
from qat.training.data import TensorExamples
from qat.training.ladder import phases

RUNGS = [{"until": 0.2, "weight": 8, "input": 8}, {"until": 0.5, "weight": 4}]
COSINE = {"_target_": "qat.training.WarmupCosine", "total_steps": "total_steps"}


class Small(nn.Module):
    """The first and the last layer are edges; the widths of the two in the middle are those of the recipe."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv, self.relu2, self.dropout = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)
        self.hidden, self.relu3, self.head = nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu2(self.conv(self.relu(self.norm(self.stem(x)))))
        return self.head(self.relu3(self.hidden(self.dropout(x.flatten(1)))))


def loader(seed=0, count=44):
    generator = torch.Generator().manual_seed(7)
    images, labels = torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 10
    return ResumableLoader(TensorExamples(images, labels), 8, shuffle=True, seed=seed)


def module(preset, seed=0):
    torch.manual_seed(seed)
    return QuantizedTraining(Small(), qat.Recipe.preset(preset).to_dict(), torch.zeros(1, 1, 4, 4), scheduler=COSINE)


def trainer(tmp_path, *callbacks, **options):
    return L.Trainer(
        max_epochs=3, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, logger=False,
        callbacks=list(callbacks), enable_progress_bar=False, accelerator="cpu",
        **{"enable_checkpointing": False} | options,
    )  # fmt: skip


def schedule():
    return QuantizationSchedule(calibration_batches=2, freeze_ranges_at=0.6, reestimate_batches=2)


def widths(network):
    layer = quantized_modules(network)["conv"]
    return layer.weight_quantizer.spec.format, layer.input_quantizer.spec.format


def test_the_widths_follow_the_steps(tmp_path):
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.setdefault(widths(pl_module.network), trainer.global_step)

        def on_validation_end(self, trainer, pl_module):
            assert widths(pl_module.network) == list(seen)[-1], "validation looks at another rung"

    trained = module("w1a1")
    trainer(tmp_path, Ladder(RUNGS), schedule(), Watch()).fit(trained, loader(), loader(1))  # 18 steps
    assert seen == {("int8", "uint8"): 1, ("int4", "binary"): 5, ("binary", "binary"): 10}
    deployed, certificate = qat.convert(trained.network, [torch.randn(5, 1, 4, 4)])
    assert certificate.equal
    assert {m.plan.weight.bits for m in quantized_modules(deployed).values()} == {8, 1}


@pytest.mark.parametrize("preset", ["w1a1", "w2a2"])
def test_resumes_to_the_same_bits(tmp_path, preset):
    """From checkpoints on every rung, at the steps between two rungs, in mid-epoch and at the end of an epoch."""

    def run(network, checkpoint=None):
        saving = ModelCheckpoint(
            tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
        )
        trainer(tmp_path, saving, Ladder(RUNGS, 2), schedule(), enable_checkpointing=True).fit(
            network, loader(), loader(1), ckpt_path=checkpoint, weights_only=True
        )
        return network.state_dict()

    expected = run(module(preset))
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (2, 4, 9, 12):  # rungs change after steps 4 and 9; an epoch is 6 steps
        resumed = run(module(preset, seed=99), tmp_path / "kept" / f"step={step}.ckpt")
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in expected.items()), step
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


def test_a_checkpoint_of_a_rung_is_tested_on_that_rung(tmp_path):
    class Middle(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                network = pl_module.network.eval()
                with torch.no_grad():
                    self.expected = network(torch.ones(2, 1, 4, 4))
                network.train()

    middle, trained = Middle(), module("w2a2")
    trainer(tmp_path, Ladder(RUNGS), schedule(), middle).fit(trained, loader(), loader(1))
    fresh = module("w2a2", seed=5)
    trainer(tmp_path, Ladder(RUNGS), schedule()).test(
        fresh, loader(1), ckpt_path=tmp_path / "middle.ckpt", weights_only=True, verbose=False
    )
    assert widths(fresh.network) == ("int4_midrise", "uint2")
    with torch.no_grad():
        assert torch.equal(fresh.network.eval()(torch.ones(2, 1, 4, 4)), middle.expected)


def test_an_ordinary_loader_that_shuffles(tmp_path):
    """Finding a rung's ranges draws from a generator of its own: what training draws is what it draws without."""
    data = TensorDataset(torch.randn(40, 1, 4, 4), torch.arange(40) % 10)

    class Draws(L.Callback):
        def __init__(self):
            self.drawn = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.drawn.append(batch[1].tolist())

    plain, climbing = Draws(), Draws()
    for draws, callbacks in ((plain, []), (climbing, [Ladder(RUNGS)])):
        torch.manual_seed(3)
        ordered = DataLoader(data, 8, shuffle=True)
        trained = module("w4a4")
        trainer(tmp_path, *callbacks, schedule(), draws).fit(trained, ordered, loader(1))
    assert plain.drawn == climbing.drawn


@pytest.mark.parametrize(("rungs", "says"), [
    ([{"until": 0.5, "weights": 8}], "did you mean 'weight'"), ([{"weight": 8}], "until must be"),
    ([{"until": 1.0}], "until must be"), ([{"until": 0.5}, {"until": 0.5}], r"ladder\[1\].until"),
    ([{"until": 0.5, "weight": 16}], "1 to 8 bits"), ([{"until": 0.5, "input": 0}], "1 to 8 bits"),
    ([8], "is a mapping"),
])  # fmt: skip
def test_ladders_that_mean_nothing(rungs, says):
    with pytest.raises(ConfigError, match=says):
        Ladder(rungs)
    with pytest.raises(ConfigError, match="at least one batch"):
        Ladder([], batches=0)


def test_ranges_that_freeze_before_the_last_rung_are_refused(tmp_path):
    early = QuantizationSchedule(freeze_ranges_at=0.3)
    with pytest.raises(ConfigError, match=r"freeze_ranges_at 0\.3 comes before the end of .* last rung, 0\.5"):
        trainer(tmp_path, Ladder(RUNGS), early).fit(module("w4a4"), loader(), loader(1))
    section = {"phases": {"freeze_ranges_at": 0.3}, "ladder": RUNGS, "calibration_batches": 2}
    with pytest.raises(ConfigError, match="comes before"):
        phases(section)
    with pytest.raises(ConfigError, match="list of rungs"):
        phases(section | {"ladder": {"until": 0.5}})
