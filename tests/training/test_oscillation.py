"""Oscillating weights: the dampening is the gradient of its loss, frozen weights stay, and resume is exact."""

import shutil

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import qat
from qat.errors import ConfigError
from qat.rewriter import quantized_modules
from qat.training import Oscillations, QuantizationSchedule, QuantizedTraining, ResumableLoader
from qat.training.data import TensorExamples

WEIGHTS = ["int4", {"format": "int3", "learned": "lsq"}, "int2_midrise", "ternary", "binary"]


def recipe(weight):
    return {"rules": [{"weight": weight, "input": "int8"}]}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


def loader(seed=0):
    generator = torch.Generator().manual_seed(7)
    images, labels = torch.randn(32, 1, 4, 4, generator=generator), torch.arange(32) % 10
    return ResumableLoader(TensorExamples(images, labels), 8, shuffle=True, seed=seed)


def module(weight, rate=0.05, seed=0, net=None):
    torch.manual_seed(seed)
    optimizer = {"_target_": "torch.optim.SGD", "lr": rate}
    return QuantizedTraining(net or network(), recipe(weight), torch.zeros(2, 1, 4, 4), optimizer=optimizer)


def trainer(tmp_path, *callbacks, **options):
    return L.Trainer(
        **{"max_epochs": 3} | options, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        callbacks=[QuantizationSchedule(calibration_batches=2), *callbacks], enable_progress_bar=False, logger=False,
        accelerator="cpu", enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip


class Gradients(L.Callback):
    """The gradients of the first two optimizer steps, after the callbacks in front have seen them."""

    def on_train_start(self, trainer, pl_module):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_dampening_is_the_gradient_of_its_loss(tmp_path, weight):
    """With a learning rate of 0 two runs see the same weights; their gradients differ by the pull."""
    bare, pulled = Gradients(), Gradients()
    plain = module(weight, rate=0.0)
    trainer(tmp_path, bare, max_steps=3).fit(plain, loader(), loader(1))
    twin = module(weight, rate=0.0)
    trainer(tmp_path, Oscillations(dampening=0.5), pulled, max_steps=3).fit(twin, loader(), loader(1))
    assert all(torch.equal(bare.seen[0][n], g) for n, g in pulled.seen[0].items()), "it begins at 0"
    strength, layers = 0.5 * 0.25, quantized_modules(plain.network)  # after 1 of 3 steps: (1 - cos(pi / 3)) / 2
    for name, layer in layers.items():
        matrix = layer.weight_matrix()
        with torch.no_grad():
            q = layer.quantized_weight()
            values, fmt = q.dequantize(), q.spec.fmt
        ends = (fmt.lo + (0.5 if fmt.grid == "midrise" else 0), fmt.hi + (0.5 if fmt.grid == "midrise" else 0))
        scale = q.scale.detach().reshape(-1, *[1] * (matrix.dim() - 1))
        clipped = torch.minimum(torch.maximum(matrix, ends[0] * scale), ends[1] * scale)
        inside = matrix if fmt.grid == "sign" else clipped
        [expected] = torch.autograd.grad(strength * (values - inside).square().sum(), [layer.weight])
        key = f"network.{name}.weight"
        torch.testing.assert_close(pulled.seen[1][key] - bare.seen[1][key], expected, rtol=1e-4, atol=1e-6)
        assert bool(expected.any())


def test_dampening_pulls_weights_to_the_middle_of_their_bins(tmp_path):
    def distance(callbacks):
        trained = module({"format": "int3", "learned": "lsq"}, rate=0.01)
        trainer(tmp_path, *callbacks, max_epochs=10).fit(trained, loader(), loader(1))
        layer = trained.network[5]
        with torch.no_grad():
            return float((layer.weight - layer.quantized_weight().dequantize()).abs().mean())

    assert distance([Oscillations(dampening=3.0)]) < 0.7 * distance([])


def test_only_gradients_of_this_optimizer_s_trained_weights_change(tmp_path):
    net = network()
    net[0].weight.requires_grad_(False)
    held, seen = net[0].weight.clone(), Gradients()
    trained = module("int4", net=net)
    trainer(tmp_path, Oscillations(0.5, 0.001), seen).fit(trained, loader(), loader(1))
    assert torch.equal(trained.network[0].weight, held)
    assert "network.0.weight" not in seen.seen[-1]


class Push(L.Callback):
    """An optimizer that sends one weight of the last layer to and fro across the border of two codes."""

    step = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        layer = pl_module.network[5]
        with torch.no_grad():
            scale = layer.quantized_weight().scale.reshape(-1)[2]
            layer.weight[2, 3] = scale * (1.4 if trainer.global_step % 2 else 1.6)


@pytest.mark.parametrize("steps_for_one", [1, 2])
def test_what_oscillates_is_frozen_and_stays(tmp_path, steps_for_one):
    class Codes(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            layer = pl_module.network[5]
            with torch.no_grad():
                self.seen.append((int(layer.quantized_weight().codes[2, 3]), float(layer.weight[2, 3].detach())))

    held, codes = Oscillations(freeze_above=0.2, momentum=0.3), Codes()
    trained = module({"format": "int4", "observer": "mse"}, rate=1e-4)
    run = trainer(tmp_path, Push(), held, codes, max_epochs=6, accumulate_grad_batches=steps_for_one)
    run.fit(trained, loader(), loader(1))
    assert held.frozen == 1
    assert bool(held.history["5"]["frozen"][2, 3])
    tail = codes.seen[-4:]
    assert len({code for code, _ in tail}) == 1
    assert tail[0][0] in (1, 2)
    scale = float(trained.network[5].weight_quantizer.scale[2])
    assert all(value == pytest.approx(code * scale, rel=1e-5) for code, value in tail)
    free = codes.seen[2 : 2 + 3 * steps_for_one]
    assert len({code for code, _ in free}) == 2, "it did not oscillate before"


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_resumes_to_the_same_bits(tmp_path, weight):
    def run(trained, checkpoint=None):
        saving = ModelCheckpoint(
            tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
        )
        held = Oscillations(dampening=0.01, freeze_above=0.02, momentum=0.2)
        trainer(tmp_path, held, saving).fit(trained, loader(), loader(1), ckpt_path=checkpoint, weights_only=True)
        return trained.network.state_dict(), held

    expected, held = run(module(weight, rate=0.2))
    assert held.frozen > 0
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (4, 6):  # an epoch is 4 steps
        resumed, again = run(module(weight, rate=0.2, seed=9), tmp_path / "kept" / f"step={step}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in expected.items()), step
        assert again.frozen == held.frozen
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


def test_held_weights_deploy_as_they_are(tmp_path):
    trained = module("int2_midrise", rate=0.2)
    held = Oscillations(freeze_above=0.02, momentum=0.2)
    trainer(tmp_path, held).fit(trained, loader(), loader(1))
    assert held.frozen > 0
    trained.network.eval()
    _, certificate = qat.convert(trained.network, [torch.randn(4, 1, 4, 4)])
    assert certificate.equal


def test_weights_that_something_else_computes(tmp_path):
    def parametrized():
        net = network()
        nn.utils.parametrizations.weight_norm(net[5])
        return net

    refused = module("int4", net=parametrized())
    with pytest.raises(ConfigError, match=r"computes cannot be held: 5.*dampening"):
        trainer(tmp_path, Oscillations(freeze_above=0.01)).fit(refused, loader(), loader(1))
    bare, pulled = Gradients(), Gradients()
    for seen, callbacks in ((bare, []), (pulled, [Oscillations(dampening=0.5)])):
        trained = module("int4", rate=0.0, net=parametrized())
        trainer(tmp_path, *callbacks, seen, max_steps=2).fit(trained, loader(), loader(1))
    key = "network.5.parametrizations.weight.original1"
    assert not torch.equal(bare.seen[1][key], pulled.seen[1][key])


@pytest.mark.parametrize("options", [{"dampening": -1.0}, {"freeze_above": 0.0}, {"momentum": 0.0}], ids=str)
def test_options_that_mean_nothing(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Oscillations(**options)
