"""Strangers' LightningModules, made quantization-aware by one line: whatever their attributes, data and optimizers."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import qat
from qat.errors import ConfigError, NotCalibratedError
from qat.modules.base import QuantizedModule
from qat.quantizers.quantizer import StaticQuantizer
from qat.training import QuantizationAware, QuantizationSchedule, QuantizedTraining, ResumableLoader, deploy, quantize
from qat.training.data import TensorExamples

RECIPE = qat.Recipe.preset("w4a8", edges="same")      # so that every layer has a learned scale
X, Y = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.arange(48) % 10


class Network(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(16 * width, 10)

    def forward(self, x):
        return self.head(self.dropout(self.relu(self.norm(self.conv(x))).flatten(1)))


class Wrapped(L.LightningModule):
    """The layout of most tutorials: self.model, a metric, a list of outputs, hyperparameters."""

    def __init__(self, width: int = 4, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Network(width)
        self.accuracy = MulticlassAccuracy(10)
        self.criterion = nn.CrossEntropyLoss()
        self.outputs: list[Any] = []
        self.steps = 0

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        torch.manual_seed(1000 * self.current_epoch + batch_idx)            # dropout repeats when a run is resumed
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy.update(logits, batch[1])
        self.outputs.append(logits)
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.criterion(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.seen = sum(len(o) for o in self.outputs)
        self.outputs.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Parts(L.LightningModule):
    """An encoder and a head, no forward, batches that are dicts, one shared step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def training_step(self, batch):
        loss = F.cross_entropy(self.head(self.encoder(batch["image"])), batch["label"])
        self.log("loss", loss)
        return {"loss": loss, "extra": 1}

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch)["loss"])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.encoder.parameters(), "lr": 0.01}, {"params": self.head.parameters()}],
                               lr=0.1, momentum=0.9, weight_decay=0.01)


class Itself(L.LightningModule):
    """The module is the network."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.one, self.two = nn.Linear(16, hidden), nn.Linear(hidden, 10)

    def forward(self, x, scale=1.0):
        return self.two(F.relu(self.one(x.flatten(1) * scale)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x, scale=0.5), y)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        weights = [p for n, p in self.named_parameters() if n.endswith("weight")]
        optimizer = torch.optim.Adam(weights, 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step)])]


class Manual(L.LightningModule):
    """Two networks, two optimizers, steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = nn.Linear(16, 10), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))

    def losses(self, batch):
        x = batch[0].flatten(1)
        return F.cross_entropy(self.left(x), batch[1]), F.cross_entropy(self.right(x), batch[1])

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), self.losses(batch)):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(self.losses(batch)))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.left.parameters(), 1e-2), torch.optim.AdamW(self.right.parameters(), 1e-3)


class Dicts(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"image": x, "label": y}


LAYOUTS: dict[type[L.LightningModule], str] = {Wrapped: "model", Parts: "", Itself: "", Manual: ""}
layouts = pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)


def loader(kind=Wrapped, scale=1.0, shuffle=False):
    return DataLoader((Dicts if kind is Parts else TensorDataset)(X * scale, Y), 8, shuffle=shuffle)


def resumable(seed=0):
    noise = lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g)  # noqa: E731
    return ResumableLoader(TensorExamples(X, Y), 8, shuffle=True, seed=seed, augment=noise)


def trainer(tmp_path, epochs=2, callbacks=(), **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(max_epochs=epochs, enable_model_summary=False, default_root_dir=tmp_path,
                     callbacks=list(callbacks), **defaults | options)


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Lightning's advice about workers and short epochs is not what is tested."""
    with warnings.catch_warnings():
        for said in (".*num_workers.*", ".*log_every_n_steps.*", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", said)
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Each layout trained once, with Lightning's defaults: a sanity check, plain loaders; and its checkpoint."""
    made: dict[type, tuple[Any, Any]] = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            module = quantize(kind(), RECIPE)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit = trainer(folder)
                fit.fit(module, loader(kind, shuffle=True), loader(kind))
                fit.save_checkpoint(folder / "model.ckpt")
            made[kind] = module, folder / "model.ckpt"
        return made[kind]

    return make


@layouts
def test_one_line_trains_calibrates_and_freezes(fitted, kind):
    module, _ = fitted(kind)
    network = module.quantized_network
    assert network is module.get_submodule(LAYOUTS[kind])
    assert isinstance(module, kind)
    layers = [m for m in network.modules() if isinstance(m, QuantizedModule)]
    assert len(layers) == (3 if kind is Manual else 2)
    assert all(bool(q.range_frozen) for m in layers for q in m.modules()
               if isinstance(q, StaticQuantizer) and not q.is_weight)
    assert all(torch.isfinite(q.scale).all() for m in layers for q in m.modules() if isinstance(q, StaticQuantizer))


@layouts
def test_the_deployed_module_is_equal(fitted, kind, tmp_path):
    module, _ = fitted(kind)
    before = tensors(module)
    deployed, certificate = deploy(module, loader(kind))
    assert certificate.equal
    assert set(certificate.layers) == {n for n, m in module.quantized_network.named_modules()
                                       if isinstance(m, QuantizedModule)}
    assert_same(before, tensors(module))
    if kind in (Wrapped, Itself):
        x = X[:5]
        assert torch.equal(deployed(x), module.quantized_network.eval()(x))
        qat.save(deployed, tmp_path / "out")
        skeleton = Network() if kind is Wrapped else Itself()
        assert torch.equal(qat.load(tmp_path / "out", skeleton)(x), deployed(x))
    else:
        [scores] = trainer(tmp_path).test(module, loader(kind), verbose=False)
        [ours] = trainer(tmp_path).test(deployed, loader(kind), verbose=False)
        assert scores == ours


@layouts
def test_regression_1_reload(fitted, kind):
    """From the class, without a word about the recipe; and into an instance that was given the same one."""
    module, path = fitted(kind)
    loaded = quantize(kind).load_from_checkpoint(path, weights_only=True)
    assert isinstance(loaded, kind)
    assert_same(tensors(module), tensors(loaded))
    again = quantize(kind, RECIPE).load_from_checkpoint(path, weights_only=True)
    of_its_type = type(module).load_from_checkpoint(path, weights_only=True)
    for other in (loaded, again, of_its_type):
        one, two = qat.coverage(module.quantized_network), qat.coverage(other.quantized_network)
        assert [(r.name, r.weight, r.input, r.reason) for r in one.rows] == [
            (r.name, r.weight, r.input, r.reason) for r in two.rows
        ]
    if kind in (Wrapped, Itself):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(X), module.eval()(X))


@layouts
def test_regression_2_test_from_a_checkpoint_after_convert(fitted, kind, tmp_path):
    module, path = fitted(kind)
    deploy(module, loader(kind))
    scores = [trainer(tmp_path).test(m, loader(kind), ckpt_path=path, weights_only=True, verbose=False)
              for m in (module, quantize(kind()), quantize(kind(), RECIPE))]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0][0]


def test_regression_3_pruning(tmp_path):
    module = quantize(Wrapped(), "w8a8")
    target = [(m, "weight") for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=target, amount=0.5, use_global_unstructured=False)
    trainer(tmp_path, callbacks=[pruning]).fit(module, loader(), loader())
    deployed, _ = deploy(module, loader())
    assert (deployed.head.weight == 0).float().mean() >= 0.49
    with torch.no_grad():
        assert torch.equal(deployed(X), module.model.eval()(X))


@layouts
def test_regression_4_validation_moves_no_range(kind, tmp_path):
    class Watch(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.before = tensors(pl_module)

        def on_validation_end(self, trainer, pl_module):
            assert_same(self.before, tensors(pl_module))

    never = QuantizationSchedule(calibration_batches=2, freeze_ranges_at=2.0)
    module = quantize(kind(), "w8a8", schedule=never)
    trainer(tmp_path, callbacks=[Watch()]).fit(module, loader(kind), loader(kind, scale=1000.0))


@pytest.mark.parametrize("kind", [Wrapped, Itself])
def test_regression_5_state_dict_into_a_fresh_module(fitted, kind):
    module, _ = fitted(kind)
    fresh = quantize(kind(), RECIPE)
    fresh.configure_model()
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(module.eval()(X), fresh.eval()(X))


@pytest.mark.parametrize("adapters", [None, {"rank": 2, "also_train": ("head.bias",)}], ids=["full", "adapters"])
def test_resumes_to_the_same_bits(tmp_path, adapters):
    """Mid-epoch too, though the user's configure_optimizers asks for the number of steps."""

    def fit(seed, checkpoint=None):
        torch.manual_seed(seed)
        module = quantize(Wrapped(), RECIPE, adapters=adapters)
        if seed:                                    # only the base of an adapted model must be the same
            module.model.load_state_dict(base)
        saving = ModelCheckpoint(tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1,
                                 enable_version_counter=False)
        trainer(tmp_path, callbacks=[saving], enable_checkpointing=True).fit(
            module, resumable(), resumable(1), ckpt_path=checkpoint, weights_only=True)
        return tensors(module)

    torch.manual_seed(0)
    base = Network().state_dict()
    expected = fit(0)
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (1, 4, 6, 9, 12):                   # an epoch is 6 steps; ranges freeze at 4, batch norms at 9.6
        assert_same(expected, fit(7, tmp_path / "kept" / f"step={step}.ckpt"))
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


def test_calibration_leaves_no_trace_in_the_module(tmp_path):
    """Metrics, lists of outputs, counters, logged values and random numbers are as if it had not happened."""

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.seen = (pl_module.steps, len(pl_module.outputs), pl_module.accuracy.update_count,
                             dict(trainer.callback_metrics), torch.rand(1), batch[0].clone())

    looks = []
    for batches in (0, 3):
        torch.manual_seed(5)
        module = quantize(Wrapped(), "w8a8_dynamic" if not batches else "w8a8",
                          schedule=QuantizationSchedule(calibration_batches=batches))
        look = Look()
        trainer(tmp_path, epochs=1, callbacks=[look], num_sanity_val_steps=0).fit(module, loader(shuffle=True),
                                                                                  loader())
        looks.append(look.seen)
        assert module.seen == 48
    assert looks[0][:4] == looks[1][:4] == (0, 0, 0, {})
    assert torch.equal(looks[0][4], looks[1][4])
    assert torch.equal(looks[0][5], looks[1][5])


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_ranges_are_those_of_the_training_batches(tmp_path, sanity):
    class Ranges(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.scale = pl_module.quantized_network.conv.input_quantizer.scale.clone()

    ranges = Ranges()
    module = quantize(Wrapped(), "w8a8", schedule=QuantizationSchedule(calibration_batches=2))
    trainer(tmp_path, epochs=1, callbacks=[ranges], num_sanity_val_steps=sanity).fit(module, loader(),
                                                                                     loader(scale=50.0))
    expected = qat.calibrate(qat.prepare(Network(), "w8a8"), [X[:8], X[8:16]]).conv.input_quantizer.scale
    assert torch.equal(ranges.scale, expected)


def test_inputs_function_and_nested_loaders(tmp_path):
    class Pairs(Wrapped):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch["a"][0]), batch["a"][1]) + self.model(batch["b"][0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val", self.model(batch[0]).mean())

    data = {"a": loader(), "b": loader(scale=3.0)}
    for find in (None, lambda batch: batch["b"][0]):
        module = quantize(Pairs(), "w8a8", inputs=find, schedule=QuantizationSchedule(1, observe=False))
        trainer(tmp_path, epochs=1).fit(module, data, loader())
        expected = [X[:8] * 3.0] if find else [X[:8], X[:8] * 3.0]
        fresh = qat.calibrate(qat.prepare(Network(), "w8a8"), expected)
        assert torch.equal(module.model.conv.input_quantizer.scale, fresh.conv.input_quantizer.scale)


def test_an_iterator_as_training_data_is_refused(tmp_path):
    class Once:
        def __iter__(self):
            return self

        def __next__(self):
            return [X[:8], Y[:8]]

    module = quantize(Wrapped(), "w8a8")
    with pytest.raises(ConfigError, match="is an iterator"):
        trainer(tmp_path, max_steps=2, num_sanity_val_steps=0, limit_val_batches=0).fit(module, Once())


# ------------------------------------------------------------------------------------------------------- optimizers


def groups(optimizer):
    return [(g.get("role"), round(g["lr"], 9), g.get("weight_decay"), len(g["params"])) for g in optimizer.param_groups]


def fitted_optimizers(module, tmp_path, kind):
    run = trainer(tmp_path, epochs=1)
    before: dict[str, Any] = {}

    class Before(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before["groups"] = [groups(o) for o in trainer.optimizers]
            before["scales"] = {n: p.detach().clone() for n, p in pl_module.named_parameters() if "log_scale" in n}

    run.callbacks.append(Before())
    run.fit(module, loader(kind), loader(kind))
    return before


def test_scales_in_groups_of_a_one_cycle_schedule(tmp_path):
    module = quantize(Wrapped(), qat.Recipe.preset("w4a4", edges="same"), scale_lr_factor=0.5)
    before = fitted_optimizers(module, tmp_path, Wrapped)
    [[plain, scales]] = before["groups"]
    assert plain[0] is None
    assert plain[2] == 0.1
    assert scales[0] == "scales"
    assert scales[2] == 0.0
    assert scales[1] == pytest.approx(plain[1] * 0.5)
    optimizer, scheduler = module.optimizers().optimizer, module.lr_schedulers()
    assert optimizer.param_groups[1]["max_lr"] == pytest.approx(0.5 * optimizer.param_groups[0]["max_lr"])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * optimizer.param_groups[0]["lr"], rel=1e-3)
    assert len(scheduler.base_lrs) == 2


def test_scales_join_the_groups_of_their_layers_and_are_trained(tmp_path):
    """SGD with two groups; Adam on a list of weights chosen by name, under a schedule by group; two optimizers."""
    before = fitted_optimizers(quantize(Parts(), RECIPE), tmp_path, Parts)
    [found] = before["groups"]
    assert [(role, decay) for role, _, decay, _ in found] == [(None, 0.01), (None, 0.01), ("scales", 0.0),
                                                              ("scales", 0.0)]
    assert [rate for _, rate, _, _ in found] == pytest.approx([0.01, 0.1, 0.001, 0.01])
    for kind, shape in ((Itself, [[None, "scales"]]), (Manual, [[None, "scales"], [None, "scales"]])):
        module = quantize(kind(), RECIPE)
        before = fitted_optimizers(module, tmp_path, kind)
        assert [[g[0] for g in optimizer] for optimizer in before["groups"]] == shape
        after = {n: p for n, p in module.named_parameters() if "log_scale" in n}
        assert before["scales"].keys() == after.keys()
        assert len(after) == (3 if kind is Manual else 2)
        assert all(not torch.equal(after[n], s) for n, s in before["scales"].items()), "a scale was not trained"
    assert sum(len(g["params"]) for o in module.optimizers() for g in o.param_groups) == len(list(module.parameters()))


def test_named_parameters_lbfgs_and_groups_of_scales_alone():
    from qat.training.optimizers import give_scales_their_groups

    def prepared():
        return qat.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
                           qat.Recipe.preset("w4a4", edges="same"))

    network = prepared()
    scales = [p for n, p in network.named_parameters() if "log_scale" in n]
    named = torch.optim.AdamW(network.named_parameters(), 0.1)
    give_scales_their_groups(network, named, 0.1)
    assert named.param_groups[1]["param_names"] == [n for n, _ in network.named_parameters() if "log_scale" in n]
    assert all("log_scale" not in n for n in named.param_groups[0]["param_names"])

    others = [p for n, p in network.named_parameters() if "log_scale" not in n]
    mine = torch.optim.AdamW([{"params": others}, {"params": scales, "lr": 0.3}], 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(mine, min_lr=[0.01, 0.02])
    warm = torch.optim.lr_scheduler.SequentialLR(mine, [torch.optim.lr_scheduler.LinearLR(mine),
                                                        torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)], [3])
    give_scales_their_groups(network, ([mine], [{"scheduler": plateau}, warm]), 0.1)
    assert [g["weight_decay"] for g in mine.param_groups] == [0.01, 0.0]
    assert mine.param_groups[1]["initial_lr"] == pytest.approx(0.03)
    assert plateau.min_lrs == pytest.approx([0.01, 0.002])
    for _ in range(5):
        mine.step()
        warm.step()
    assert mine.param_groups[1]["lr"] == pytest.approx(0.3 * mine.param_groups[0]["lr"])

    lbfgs = torch.optim.LBFGS(others)
    give_scales_their_groups(network, lbfgs, 0.1)
    assert len(lbfgs.param_groups) == 1
    assert len(lbfgs.param_groups[0]["params"]) == len(list(network.parameters()))

    missing = torch.optim.SGD([{"params": network[0].parameters()}, {"params": [network[2].bias]}], 0.1)
    give_scales_their_groups(network, missing, 0.1)
    assert [len(g["params"]) for g in missing.param_groups] == [2, 1, 2, 2]


def test_scales_never_join_an_optimizer_of_matrices():
    """Muon makes each step of a matrix orthogonal; scales, of whatever shape, go where the biases are."""
    from qat.training.optimizers import give_scales_their_groups

    network = qat.prepare(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), qat.Recipe.from_dict(
        {"rules": [{"match": {"type": "Linear"}, "weight": {"format": "int4", "granularity": "per_group",
                                                            "group_size": 4, "learned": "lsq"}}]}))
    for named in (False, True):
        parameters = list(network.named_parameters())
        matrices = [(n, p) if named else p for n, p in parameters if p.ndim == 2]       # scales of groups among them
        biases = [p for n, p in parameters if n.endswith("bias")]
        muon, adam = torch.optim.Muon(matrices, 0.1), torch.optim.AdamW(biases, 0.01)
        give_scales_their_groups(network, [muon, adam], 0.1)
        assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 8), (2, 4)]
        assert muon.param_groups[0].get("param_names", ["0.weight", "2.weight"]) == ["0.weight", "2.weight"]
        assert [(g.get("role"), len(g["params"])) for g in adam.param_groups] == [(None, 2), ("scales", 2)]
    with pytest.raises(ConfigError, match="matrices only"):
        give_scales_their_groups(network, torch.optim.Muon(matrices, 0.1), 0.1)


# ------------------------------------------------------------------------------------------------------- the object


def test_the_module_stays_what_it_was():
    plain = Wrapped(width=3)
    same = quantize(plain, "w8a8")
    assert same is plain
    assert isinstance(same, Wrapped)
    assert type(same).__name__ == "QuantizedWrapped"
    assert same.hparams == {"width": 3, "lr": 0.01}
    assert not qat.is_prepared(same.model), "the swap is for configure_model"
    for twin in (copy.deepcopy(same), pickle.loads(pickle.dumps(same))):
        assert isinstance(twin, QuantizationAware)
        twin.configure_model()
        assert qat.is_prepared(twin.model)
    assert not qat.is_prepared(same.model)
    assert type(Wrapped()) is Wrapped


def test_a_class_makes_quantized_instances(tmp_path):
    kind = quantize(Wrapped, "w8a8")
    one, two = kind(width=2), kind()
    assert one._qat_options().schedule is not two._qat_options().schedule
    one.configure_model()
    assert one.hparams.width == 2
    assert qat.is_prepared(one.model)
    twin = pickle.loads(pickle.dumps(one))
    assert torch.equal(twin.model.conv.weight, one.model.conv.weight)
    assert isinstance(twin, QuantizationAware)


def test_structure_is_found_in_the_training_data_where_tracing_fails(tmp_path):
    """The batch norm of a module that is only its steps is folded; and a checkpoint from before keeps its own plan."""
    module = quantize(Parts(), "w8a8")
    fit = trainer(tmp_path, epochs=1)
    fit.fit(module, loader(Parts), loader(Parts))
    assert module.encoder[0].plan.batch_norm == "encoder.1"
    fit.save_checkpoint(tmp_path / "model.ckpt")
    other = quantize(Parts(), "w8a8")
    other.configure_model()                                     # no data, no forward: nothing is known
    assert other.encoder[0].plan.batch_norm is None
    again = quantize(Parts, "w8a8").load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.encoder[0].plan.batch_norm == "encoder.1"
    scores = [trainer(tmp_path).test(m, loader(Parts), ckpt_path=path, weights_only=True, verbose=False)
              for m, path in ((module, None), (other, tmp_path / "model.ckpt"))]
    assert scores[0] == scores[1]
    assert other.encoder[0].plan.batch_norm == "encoder.1"


def test_a_network_that_configure_model_makes(tmp_path):
    class Late(Wrapped):
        def configure_model(self):
            if not isinstance(self.model, Network):
                self.model = Network()

        def __init__(self):
            super().__init__()
            self.model = None

    module = quantize(Late(), "w8a8", network="model")
    fit = trainer(tmp_path, epochs=1)
    fit.fit(module, loader(), loader())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = quantize(Late).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_same(tensors(module), tensors(loaded))


class Example(Wrapped):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 4, 4)


def test_example_input_array(tmp_path):
    module = quantize(Example(), "w8a8")
    module.configure_model()
    assert not qat.coverage(module.model).unobserved


def test_the_summary_runs_an_example_before_there_are_ranges(tmp_path):
    module = quantize(Example(), "w4a8")
    L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
              default_root_dir=tmp_path).fit(module, loader(), loader())
    assert deploy(module, loader())[1].equal

    class Broken(Example):
        def on_fit_start(self):
            raise RuntimeError("mine")

    module = quantize(Broken(), "w4a8")
    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path).fit(module, loader(), loader())
    with pytest.raises(NotCalibratedError):                     # and not a float model that passes for a quantized one
        trainer(tmp_path).validate(module, loader(), verbose=False)


class Branching(Network):
    """Cannot be traced symbolically."""

    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
@pytest.mark.parametrize("network", [Network, Branching])
@pytest.mark.parametrize("owner", ["module", "data"])
def test_batches_come_through_the_transfer_hooks(tmp_path, hook, network, owner):
    """Structure, ranges and the certificate are those of what the steps see, not of what the loader gives."""
    scaled = lambda _, batch, index: (batch[0].float() / 255, batch[1])  # noqa: E731
    pixels = DataLoader(TensorDataset((X.sigmoid() * 255).to(torch.uint8), Y), 8)

    class Pixels(Wrapped):
        def __init__(self):
            super().__init__()
            self.model = network()

    class Data(L.LightningDataModule):
        train_dataloader = val_dataloader = lambda _: pixels

    setattr(Pixels if owner == "module" else Data, hook, scaled)
    module = quantize(Pixels(), "w8a8", schedule=QuantizationSchedule(observe=False))
    trainer(tmp_path, epochs=1).fit(module, datamodule=Data())
    assert module.model.conv.input_quantizer.scale <= 1 / 127
    _, certificate = deploy(module, pixels)
    assert certificate.equal
    assert certificate.samples == len(X)


@pytest.mark.parametrize("several", [list, dict])
def test_structure_is_found_in_several_loaders(tmp_path, several):
    class Twice(Wrapped):
        def __init__(self):
            super().__init__()
            self.model = Branching()

        def training_step(self, batch, batch_idx):
            return sum(F.cross_entropy(self(x), y) for x, y in (batch.values() if several is dict else batch))

    loaders = [loader(), loader()] if several is list else {"one": loader(), "two": loader()}
    module = quantize(Twice(), "w8a8")
    trainer(tmp_path, epochs=1).fit(module, loaders)
    assert not qat.coverage(module.model).unobserved


def test_finding_the_structure_takes_no_batch_from_training(tmp_path):
    class Seen(Wrapped):
        def __init__(self):
            super().__init__()
            self.model = Branching()

        def on_train_batch_start(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[1]]

    module, data = quantize(Seen(), "w8a8"), ResumableLoader(TensorExamples(X, Y), 8)
    trainer(tmp_path, epochs=1).fit(module, data)
    assert torch.equal(torch.cat(module.seen), Y)


def test_random_numbers_of_a_step_do_not_part_prepared_and_deployed(tmp_path):
    """A module that is its steps, and whose validation draws: both models get the same draws, every batch its own."""

    class Generator(Manual):
        def losses(self, batch):
            self.drawn = torch.randn(len(batch[0]), 16)
            return super().losses((self.drawn, batch[1]))

    module = quantize(Generator(), "w8a8", network="")
    trainer(tmp_path).fit(module, loader(), loader())
    assert deploy(module, loader())[1].equal
    with module.feeding(list(loader())[:2]) as inputs:
        one, two, again = (module.forward(*inputs[i])["logged"]["val_loss"] for i in (0, 1, 0))
    assert one == again != two


def test_a_network_that_the_user_has_compiled(tmp_path):
    class Compiled(Wrapped):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")

    module = quantize(Compiled(), "w8a8")
    fit = trainer(tmp_path, epochs=1)
    fit.fit(module, loader(), loader())
    fit.save_checkpoint(tmp_path / "model.ckpt")
    assert deploy(module, loader())[1].equal
    loaded = quantize(Compiled).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_same(tensors(module), tensors(loaded))
    assert torch.equal(module.eval()(X), loaded.eval()(X))


def test_a_distiller_beside_the_network_is_no_part_of_it(tmp_path):
    """Its projections are trained and saved with the module, but neither quantized nor deployed."""

    class Taught(Wrapped):
        def __init__(self):
            super().__init__()
            self.distiller = qat.Distiller({"hidden": ["conv"]}, Network(6), self.model, X[:2])

        def training_step(self, batch, batch_idx):
            output, parts = self.distiller(self.model, *batch)
            return self.distiller.combine(self.criterion(output, batch[1]), parts)

    torch.manual_seed(0)
    module = quantize(Taught(), "w8a8")
    before = module.distiller.projections["conv"].weight.clone()
    trainer(tmp_path).fit(module, loader(), loader())
    assert module.quantized_network is module.model
    assert not any(isinstance(m, QuantizedModule) for m in module.distiller.modules())
    assert not torch.equal(module.distiller.projections["conv"].weight, before)
    assert [name for name in module.state_dict() if "distiller" in name] == ["distiller.projections.conv.weight"]
    assert deploy(module, loader())[1].equal


def test_the_tuner_tries_the_quantized_network(tmp_path):
    """Lightning's tuner runs without callbacks, the schedule among them; afterwards all is as before."""

    class Tuned(Wrapped):
        def __init__(self, lr=1e-2):
            super().__init__()
            self.lr = lr

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), self.lr)

    module = quantize(Tuned(), "w8a8")
    fit = trainer(tmp_path, epochs=1, enable_checkpointing=True)
    found = Tuner(fit).lr_find(module, loader(), num_training=6, early_stop_threshold=None)
    assert len(found.results["loss"]) == 6
    assert not module.model.conv.input_quantizer.calibrated
    fit.fit(module, loader(), loader())
    assert deploy(module, loader())[1].equal


def test_adapters(tmp_path):
    """The base stays, adapters and scales are trained, and the checkpoint brings all of it back."""
    torch.manual_seed(0)
    plain = Wrapped()
    base = tensors(plain.model)
    module = quantize(plain, "w4a8", adapters={"rank": 2, "match": "*", "also_train": ("head.bias",)})
    fit = trainer(tmp_path)
    fit.fit(module, loader(), loader())
    state = module.model.state_dict()
    assert torch.equal(state["conv.weight"], base["conv.weight"])
    assert not torch.equal(state["head.bias"], base["head.bias"])
    assert state["conv.adapter_up"].any()
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = quantize(Wrapped).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_same(tensors(module), tensors(loaded))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in module.named_parameters() if p.requires_grad
    }
    deployed, certificate = deploy(loaded, loader())
    assert certificate.equal
    assert not [n for n in deployed.state_dict() if "adapter" in n]


def test_a_float_checkpoint_is_where_it_starts(tmp_path):
    torch.manual_seed(1)
    plain = Wrapped()
    fit = trainer(tmp_path, epochs=1)
    fit.fit(plain, loader(), loader())
    fit.save_checkpoint(tmp_path / "float.ckpt")
    module = quantize(Wrapped, "w8a8").load_from_checkpoint(tmp_path / "float.ckpt", weights_only=True)
    assert torch.equal(module.model.conv.weight, plain.model.conv.weight)
    trainer(tmp_path, epochs=1).fit(module, loader(), loader())
    with pytest.raises(ConfigError, match="holds no recipe"):
        quantize(Wrapped).load_from_checkpoint(tmp_path / "float.ckpt", weights_only=True)


def test_training_goes_on_with_the_ranges_and_scales_there_are(fitted, tmp_path):
    _, path = fitted(Wrapped)
    module = quantize(Wrapped).load_from_checkpoint(path, weights_only=True)
    before = tensors(module)

    class Start(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                assert_same(before, tensors(pl_module))
                self.passed = True

    start = Start()
    trainer(tmp_path, epochs=1, callbacks=[start]).fit(module, loader(scale=9.0), loader())
    assert start.passed


def test_user_callbacks_and_a_schedule_of_the_trainer_come_first(tmp_path):
    class Own(Wrapped):
        def configure_callbacks(self):
            return ModelCheckpoint(tmp_path / "own")

    mine = QuantizationSchedule(calibration_batches=1)
    for given in ([], [mine]):
        module = quantize(Own(), "w8a8")
        run = trainer(tmp_path, epochs=1, callbacks=given, enable_checkpointing=True)
        run.fit(module, loader(), loader())
        found = [c for c in run.callbacks if isinstance(c, QuantizationSchedule)]
        assert found == (given or [module._qat_options().schedule])
        assert any(isinstance(c, ModelCheckpoint) and c.dirpath.endswith("own") for c in run.callbacks)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(tmp_path, precision):
    module = quantize(Wrapped(), RECIPE)
    trainer(tmp_path, epochs=1, precision=precision).fit(module, loader(), loader())
    scales = [v for n, v in module.state_dict().items() if n.endswith("scale")]
    assert scales
    assert all(s.dtype == torch.float32 for s in scales)
    _, certificate = deploy(module, [(X[:8].to(module.dtype), Y[:8])])
    assert certificate.equal


def test_manual_optimization_freezes_by_batches(tmp_path, monkeypatch):
    frozen = []
    original = qat.freeze_ranges
    monkeypatch.setattr(qat, "freeze_ranges", lambda network: (frozen.append(run.fit_loop.epoch_loop.total_batch_idx),
                                                               original(network)))
    run = trainer(tmp_path, epochs=2)
    run.fit(quantize(Manual(), "w8a8", schedule=QuantizationSchedule(freeze_ranges_at=0.5)), loader(), loader())
    assert frozen == [5]                            # 12 batches of two optimizer steps each; the sixth is behind


def test_a_run_without_an_end(tmp_path):
    module = quantize(Wrapped(), "w8a8")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    trainer(tmp_path, epochs=-1, max_time={"seconds": 1}).fit(module, loader(), loader())
    assert not bool(module.model.conv.input_quantizer.range_frozen)


def test_misuse_is_typed(fitted, tmp_path):
    for call, said in (
        (lambda: quantize(nn.Linear(2, 2), "w8a8"), "not a Linear"),
        (lambda: quantize(quantize(Wrapped(), "w8a8"), "w8a8"), "quantization-aware already"),
        (lambda: quantize(QuantizedTraining(Network()), "w8a8"), "takes a recipe itself"),
        (lambda: quantize(Wrapped(), "w8a8", network="modle"), "no part 'modle', did you mean 'model'"),
        (lambda: quantize(Wrapped(), "w8a8", adapters={"rnk": 2}), "no option 'rnk', did you mean 'rank'"),
        (lambda: quantize(Wrapped(), "w8a8", scale_lr_factor=-1), "scale_lr_factor"),
        (lambda: deploy(Wrapped(), []), "quantize"),
        (lambda: quantize(Wrapped, "w8a8").load_from_checkpoint(fitted(Wrapped)[1], weights_only=True),
         "made with recipe"),
        (lambda: quantize(Wrapped, RECIPE, adapters={"rank": 1}).load_from_checkpoint(fitted(Wrapped)[1],
                                                                                      weights_only=True),
         "made with adapters None"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    for damaged in ([], {"network": None}, {"network": "model", "adapters": {"rnk": 1}}, {"network": "model"}):
        with pytest.raises(qat.QuantizationError):
            quantize(Wrapped()).on_load_checkpoint({"qat": damaged})
    with pytest.raises(qat.errors.RecipeError, match="matches nothing"):
        quantize(Wrapped(), {"rules": [{"match": {"name": "nothing"}, "weight": "int8"}]}).configure_model()
    with pytest.raises(ConfigError, match=r"say qat\.training\.quantize"):
        trainer(tmp_path, callbacks=[QuantizationSchedule()]).fit(Wrapped(), loader(), loader())
    for average in (StochasticWeightAveraging(1e-2), EMAWeightAveraging()):
        with pytest.raises(ConfigError, match=r"qat\.training\.WeightAverage"):
            trainer(tmp_path, callbacks=[average]).fit(quantize(Wrapped(), "w8a8"), loader(), loader())
    with pytest.raises(ConfigError, match="no training batches to calibrate with"):
        trainer(tmp_path, limit_train_batches=0).fit(quantize(Itself(), "w8a8"), loader(), loader())
    with pytest.raises(NotCalibratedError, match="conv"):
        trainer(tmp_path).validate(quantize(Wrapped(), "w8a8"), loader(), verbose=False)

    class Inside(Wrapped):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model.head(batch[0].flatten(1).repeat(1, 4)), batch[1])

    with pytest.raises(ConfigError, match="never calls 'model' as a module"):
        trainer(tmp_path).fit(quantize(Inside(), "w8a8"), loader(), loader())
