"""The LightningModule and the schedule, on real fits: reload, resume, validation, and clashes with other tools."""

import copy
import json
import shutil

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

import qat
from qat.errors import ConfigError
from qat.training import DigitsDataModule, QuantizationSchedule, QuantizedTraining, ResumableLoader
from qat.training.data import TensorExamples
from qat.training.module import WarmupCosine, parameter_groups

NETWORK = {"_target_": "qat.training.models.ResidualNet", "width": 4, "stages": 2}
ACCURACY = {"accuracy": {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10}}
COSINE = {"_target_": "qat.training.WarmupCosine", "total_steps": "total_steps"}


class Small(nn.Module):
    """Batch norm, dropout and a shared input: everything that has a state or draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.dropout(self.relu(self.norm(self.conv(x))).flatten(1)))


def recipe(name="w8a8"):
    return qat.Recipe.preset(name).to_dict()


def loader(count=44, batch_size=8, seed=0):
    generator = torch.Generator().manual_seed(7)
    images, labels = torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 10
    noise = lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g)  # noqa: E731
    return ResumableLoader(TensorExamples(images, labels), batch_size, shuffle=True, seed=seed, augment=noise)


def module(recipe=None, seed=0, **options):
    torch.manual_seed(seed)
    return QuantizedTraining(Small(), recipe=recipe, scheduler=COSINE, metrics=ACCURACY, **options)


def trainer(tmp_path, epochs=3, callbacks=(), **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(
        max_epochs=epochs, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        callbacks=list(callbacks), **defaults | options,
    )  # fmt: skip


def schedule():
    return QuantizationSchedule(calibration_batches=2, reestimate_batches=2)


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "w8a8"])
def test_resumes_to_the_same_bits(tmp_path, quantized):
    """From checkpoints in mid-epoch, at the end of an epoch, before and after ranges and norms freeze."""

    def run(network, checkpoint=None):
        saving = ModelCheckpoint(
            tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
        )
        callbacks = [saving, schedule()] if quantized else [saving]
        trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(
            network, loader(), loader(seed=1), ckpt_path=checkpoint, weights_only=True
        )
        return network.state_dict()

    spec = recipe() if quantized else None
    expected = run(module(spec))
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (1, 5, 6, 7, 12, 16, 18):  # an epoch is 6 steps
        assert_same(expected, run(module(spec, seed=99), tmp_path / "kept" / f"step={step}.ckpt"))
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


def test_reload_of_a_swapped_model(tmp_path):
    """Lightning regression 1: the checkpoint rebuilds the prepared network from its own hyperparameters."""
    data = DigitsDataModule(batch_size=128)
    trained = QuantizedTraining(NETWORK, recipe=recipe(), metrics=ACCURACY)
    fit = trainer(tmp_path, epochs=1, callbacks=[schedule()])
    fit.fit(trained, datamodule=data)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = QuantizedTraining.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert qat.is_prepared(loaded.network)
    json.dumps(dict(loaded.hparams))
    images = data.test.images[:32]
    with torch.no_grad():
        assert torch.equal(trained.eval()(images), loaded.eval()(images))


def test_test_from_a_checkpoint_after_convert(tmp_path):
    """Lightning regression 2: convert leaves the prepared network alone, so its checkpoint still loads for testing."""
    data = DigitsDataModule(batch_size=128)
    trained = QuantizedTraining(NETWORK, recipe=recipe(), metrics=ACCURACY)
    fit = trainer(tmp_path, epochs=1, callbacks=[schedule()])
    fit.fit(trained, datamodule=data)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    batches = [data.test.images[:64]]
    deployed, _ = qat.convert(trained.network.eval(), batches)
    test = trainer(tmp_path, callbacks=[schedule()])
    [scores] = test.test(trained, data, ckpt_path=tmp_path / "model.ckpt", weights_only=True, verbose=False)
    with torch.no_grad():
        accuracy = (deployed.eval()(data.test.images).argmax(1) == data.test.labels).float().mean()
    assert "test_accuracy" in scores
    assert 0 <= accuracy <= 1
    assert qat.is_prepared(trained.network)


def test_pruning_a_prepared_model(tmp_path):
    """Lightning regression 3: pruning works on a prepared network, and the zeros arrive in the deployed model."""
    data = DigitsDataModule(batch_size=256)
    trained = QuantizedTraining(NETWORK, recipe=recipe(), metrics=ACCURACY)
    trained.configure_model()
    target = [(m, "weight") for m in trained.network.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=target, amount=0.5, use_global_unstructured=False)
    trainer(tmp_path, epochs=1, callbacks=[pruning, schedule()]).fit(trained, datamodule=data)
    deployed, _ = qat.convert(trained.network.eval(), [data.test.images[:64]])
    with torch.no_grad():
        assert torch.equal(deployed.eval()(data.test.images), trained.network.eval()(data.test.images))


def test_validation_moves_no_range(tmp_path):
    """Lightning regression 4: validation data a thousand times as large leaves every buffer as it was."""

    class Watch(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.before = tensors(pl_module)

        def on_validation_end(self, trainer, pl_module):
            after = tensors(pl_module)
            assert_same(self.before, after)

    large = loader(seed=1)
    large.augment = lambda images, generator: images * 1000
    never = QuantizationSchedule(calibration_batches=1, freeze_ranges_at=2.0)
    trained = module(recipe())
    trainer(tmp_path, callbacks=[never, Watch()]).fit(trained, loader(), large)


def test_weights_are_as_prepared_after_a_disabled_schedule(tmp_path):
    """Lightning regression 5: outputs do not change when the state dict goes into a freshly prepared network."""
    trained = module(recipe())
    trainer(tmp_path, callbacks=[schedule()]).fit(trained, loader(), loader(seed=1))
    fresh = module(recipe(), seed=5)
    fresh.configure_model()
    fresh.load_state_dict(trained.state_dict())
    images = torch.randn(16, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(trained.eval()(images), fresh.eval()(images))


def test_schedule_follows_the_steps(tmp_path, monkeypatch):
    calls = []
    for name in ("calibrate", "set_observing", "freeze_ranges", "freeze_batch_norm", "reestimate_batch_norm"):
        original = getattr(qat, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            calls.append((_name, run.global_step))
            return _original(*args, **kwargs)

        monkeypatch.setattr(qat, name, spy)
    run = trainer(tmp_path, callbacks=[schedule()])
    run.fit(module(recipe()), loader(), loader(seed=1))  # 18 steps
    order = [(name, step) for name, step in calls if name != "set_observing"]
    assert order == [("calibrate", 0), ("freeze_ranges", 6), ("freeze_batch_norm", 15), ("reestimate_batch_norm", 18)]


def test_calibration_does_not_eat_training_batches(tmp_path):
    class Count(L.Callback):
        seen = 0

        def on_train_batch_start(self, *_):
            self.seen += 1

    count = Count()
    trainer(tmp_path, epochs=1, callbacks=[schedule(), count]).fit(module(recipe()), loader(), loader(seed=1))
    assert count.seen == 6


def test_parameter_groups():
    network = Small()
    network.quantizer = nn.Module()
    network.quantizer.is_quantizer = True
    network.quantizer.bound = nn.Parameter(torch.ones(1))
    network.log_scale = nn.Parameter(torch.ones(3, 1))
    frozen = network.conv.bias.requires_grad_(False)
    groups = {group["role"]: group for group in parameter_groups(network)}
    assert [tuple(p.shape) for p in groups["weights"]["params"]] == [(4, 1, 3, 3), (10, 64)]
    assert "weight_decay" not in groups["weights"]
    assert {id(p) for p in groups["scales"]["params"]} == {id(network.quantizer.bound), id(network.log_scale)}
    assert groups["scales"]["weight_decay"] == groups["offsets"]["weight_decay"] == 0
    assert len(groups["offsets"]["params"]) == 3
    assert all(p is not frozen for group in groups.values() for p in group["params"])


def test_scales_and_offsets_learn_at_their_own_rates(tmp_path):
    trained = module(scale_lr_factor=0.01, offset_lr_factor=3.0)
    trained.network.log_scale = nn.Parameter(torch.ones(3))
    run = trainer(tmp_path, epochs=1)
    run.fit(trained, loader(), loader(seed=1))
    rates = {group["role"]: group["initial_lr"] for group in run.optimizers[0].param_groups}
    assert rates["scales"] == pytest.approx(rates["weights"] * 0.01)
    assert rates["offsets"] == pytest.approx(rates["weights"] * 3.0)


def test_warmup_cosine_keeps_the_ratio_of_the_groups():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    scheduler = WarmupCosine(optimizer, total_steps=20, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(b == pytest.approx(a / 10) for a, b in rates)
    peak = max(range(20), key=lambda i: rates[i][0])
    assert peak == 4
    assert rates[0][0] == pytest.approx(0.2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_batches_of_dicts_and_outputs_with_logits(tmp_path):
    class Output(dict):
        logits: torch.Tensor

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 10)

        def forward(self, values, scale):
            output = Output()
            output.logits = self.head(values) * scale
            return output

    class Batches:
        def __len__(self):
            return 4

        def __iter__(self):
            for _ in range(4):
                yield {"values": torch.randn(3, 4), "scale": torch.ones(1), "labels": torch.tensor([1, 2, 3])}

    trained = QuantizedTraining(Keyword(), metrics=ACCURACY)
    run = trainer(tmp_path, epochs=1, log_every_n_steps=1)
    run.fit(trained, Batches(), Batches())
    assert "val_accuracy" in run.callback_metrics
    with pytest.raises(ConfigError, match="no 'labels'"):
        trained.split({"values": 1})
    with pytest.raises(ConfigError, match="must be"):
        trained.split(torch.zeros(3))


def test_a_given_network_is_copied_not_changed():
    network = Small()
    before = copy.deepcopy(network.state_dict())
    trained = QuantizedTraining(network, recipe=recipe())
    trained.configure_model()
    assert qat.is_prepared(trained.network)
    assert not qat.is_prepared(network)
    assert_same(before, network.state_dict())


def test_misuse_is_typed(tmp_path):
    with pytest.raises(ConfigError, match="needs a prepared network"):
        trainer(tmp_path, callbacks=[QuantizationSchedule()]).fit(module(), loader(), loader(seed=1))
    with pytest.raises(ConfigError, match=r"not an nn\.Module"):
        QuantizedTraining({"_target_": "torch.nn.init.calculate_gain", "nonlinearity": "relu"}).configure_model()
    with pytest.raises(ConfigError, match="fraction of the run"):
        QuantizationSchedule(freeze_ranges_at=-0.1)
    with pytest.raises(ConfigError, match="holds plain values only"):
        QuantizedTraining(Small(), optimizer={"_target_": "torch.optim.SGD", "lr": torch.tensor(0.1)})
