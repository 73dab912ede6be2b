"""Masked weights: level 0 on every grid that has one, through training, resume, checkpoints and packing."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import qat
from qat.compression.pruning import attach, block_mask, set_sparsity
from qat.errors import ConfigError, PrepareError, PruneError
from qat.numerics import packing
from qat.pipeline.storage import load_weights, save_weights
from qat.rewriter import quantized_modules
from qat.training import (
    PruningSchedule,
    QuantizationSchedule,
    QuantizedTraining,
    ResumableLoader,
    deploy,
    quantize,
)
from qat.training.data import TensorExamples
from qat.training.module import parameter_groups

WITH_ZERO: list[tuple[str, Any, str | None]] = [
    ("int8", "int8", "int8"), ("per_tensor", {"format": "int8", "granularity": "per_tensor"}, "int8"),
    ("affine", {"format": "uint8", "symmetric": False}, "int8"), ("int3", "int3", "uint8"),
    ("lsq", {"format": "int4", "learned": "lsq", "observer": "mse"}, "int8"),
    ("searched", {"format": "int4", "observer": "mse"}, "int8"), ("ternary", "ternary", "int8"),
    ("groups", {"format": "int4", "granularity": "per_group", "group_size": 1}, None),
    ("weight only", "int5", None),
]  # fmt: skip


def pruned(model: str, weight: Any, activation: Any = "int8", **options: Any) -> tuple[nn.Module, Tensor]:
    x = zoo.inputs(model, 4)
    prepared = qat.prune(qat.prepare(zoo.build(model), zoo.every_layer(weight, activation), x), **options)
    return qat.calibrate(prepared, [x]).eval(), x


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight_quantizer.mask for n, m in quantized_modules(model).items()
            if m.weight_quantizer is not None and m.weight_quantizer.mask is not None}


@pytest.mark.parametrize("model", ["mlp", "conv", "transposed", "1d", "3d", "tied"])
@pytest.mark.parametrize(("weight", "activation"), [w[1:] for w in WITH_ZERO], ids=[w[0] for w in WITH_ZERO])
def test_pruned_weights_are_level_zero_everywhere(model: str, weight: Any, activation: Any, tmp_path: Any) -> None:
    """In the forward of training, in eval, after convert, in the packed bytes, and after a round trip through files."""
    prepared, x = pruned(model, weight, activation, sparsity=0.6)
    kept = masks(prepared)
    assert sum(int((~m).sum()) for m in {id(m): m for m in kept.values()}.values()) >= 1
    for name, mask in kept.items():
        levels = quantized_modules(prepared)[name].quantized_weight().levels()
        assert not levels[~mask].any(), name
    output = prepared(x)
    output.float().square().mean().backward()
    for name, module in quantized_modules(prepared).items():
        if name in kept and module.weight.grad is not None:
            gradient = module.weight.grad if not hasattr(module, "transposed") or not module.transposed else None
            assert gradient is None or not gradient[~kept[name]].any(), f"{name}: a pruned weight gets a gradient"
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    for name, mask in kept.items():
        module = quantized_modules(deployed)[name]
        codes = packing.unpack(module.weight_codes, module.plan.weight.fmt, module.weight_shape)
        zero = module.weight_zero_point
        zero = 0 if zero is None else zero.reshape(-1, *[1] * (codes.dim() - 1))
        assert not (codes.int() - zero)[~mask].any(), name
        if quantized_modules(deployed)[name].plan.tied_to is None:
            found = certificate.sparsity[name]
            assert found["zeros"] == int((codes.int() - zero == 0).sum()) >= int((~mask).sum())
            assert found["weights"] == mask.numel()
    qat.save(deployed, tmp_path / "out")
    loaded = qat.load(tmp_path / "out", zoo.build(model))
    assert torch.equal(loaded(x), output)
    assert qat.sparsity(loaded) == qat.sparsity(deployed) == certificate.sparsity
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["certificate"]["total_sparsity"] == certificate.total_sparsity > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype: torch.dtype) -> None:
    x = zoo.inputs("mlp", 3, dtype)
    prepared = qat.prune(qat.prepare(zoo.build("mlp", dtype), "w8a8", x), sparsity=0.5)
    prepared = qat.calibrate(prepared, [x]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        prepared(x).float().sum().backward()
    deployed, certificate = qat.convert(prepared, [x])
    assert deployed(x).dtype == dtype
    assert certificate.total_sparsity >= 0.5


@pytest.mark.parametrize("weight", ["binary", "int2_midrise"])
def test_grids_without_zero_are_refused_at_once_by_name(weight: str) -> None:
    prepared = qat.prepare(zoo.mlp(), zoo.every_layer(weight), torch.randn(2, 12))
    with pytest.raises(PruneError, match=rf"0: {weight} has no zero"):
        qat.prune(prepared)
    assert not masks(prepared)
    mixed = qat.prepare(zoo.mlp(), {"rules": [{"match": {"name": "2"}, "weight": weight, "input": "int8"},
                                              {"weight": "int8", "input": "int8"}]}, torch.randn(2, 12))
    with pytest.raises(PruneError, match="2: "):
        qat.prune(mixed)
    qat.prune(mixed, exclude=["2"])
    assert set(masks(mixed)) == {"0", "4"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_share_is_exact_and_the_least_go(scope: str, share: float) -> None:
    model = qat.prepare(zoo.conv_net(), "w8a8", torch.randn(1, 3, 8, 8))
    qat.prune(model, sparsity=share, scope=scope)
    found = masks(model)
    total = sum(m.numel() for m in found.values())
    gone = sum(int((~m).sum()) for m in found.values())
    each = sum(round(share * m.numel()) for m in found.values())
    assert gone == (round(share * total) if scope == "global" else each)
    for name, mask in found.items():
        weight = quantized_modules(model)[name].weight_matrix().abs()
        assert mask.any(), "global pruning has cut off a layer"
        if (~mask).any():
            assert weight[~mask].max() <= weight[mask].min() or scope == "global"
    if scope == "global" and 0 < share < 0.9:
        weights = torch.cat([quantized_modules(model)[n].weight_matrix().abs()[~m] for n, m in found.items()])
        border = torch.cat([quantized_modules(model)[n].weight_matrix().abs().flatten() for n in found])
        assert weights.max() <= border.sort().values[round(share * total)]


def test_almost_everything_goes_but_no_layer_whole() -> None:
    model = qat.prepare(zoo.mlp(), "w8a8", torch.randn(1, 12))
    for share in (0.95, 0.985, 0.999, 0.99999):
        found = masks(qat.prune(model, sparsity=share))
        kept = {name: int(m.sum()) for name, m in found.items()}
        total = sum(m.numel() for m in found.values())
        assert min(kept.values()) >= 1
        assert sum(kept.values()) <= total - round(share * total) + len(kept), kept


def test_ties_empty_and_constant_weights() -> None:
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    nn.init.constant_(linear[0].weight, 0.25)
    nn.init.constant_(linear[1].weight, 0.25)
    model = qat.prune(qat.prepare(linear, "w8a8", torch.randn(1, 4)), sparsity=0.5)
    assert sum(int((~m).sum()) for m in masks(model).values()) == 21
    one = qat.prune(qat.prepare(nn.Linear(3, 1), "w8a8", torch.randn(1, 3)), sparsity=0.9, scope="layer")
    assert int((~masks(one)[""]).sum()) == 3
    qat.calibrate(one, [torch.randn(2, 3)])
    assert qat.convert(one, [torch.randn(2, 3)])[1].total_sparsity == 1.0


@pytest.mark.parametrize(("method", "keep", "block"), [("nm_2_4", 2, 4), ("nm_4_8", 4, 8)])
def test_patterns_lie_along_the_input(method: str, keep: int, block: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2),
                        nn.Flatten(), nn.Linear(8 * 25, 16))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    model = qat.prune(qat.prepare(net, "w8a8", x), method)
    assert set(masks(model)) == {"2", "4", "6"}
    for mask in masks(model).values():
        blocks = mask.movedim(1, -1).reshape(-1, block)
        assert (blocks.sum(-1) == keep).all()
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert f"not pruned: 3 inputs are no blocks of {block}" in rows["0"]
    assert f"pruned: {method}" in rows["2"]
    _, certificate = qat.convert(qat.calibrate(model, [x]), [x])
    assert {n: s["pattern"] for n, s in certificate.sparsity.items()} == dict.fromkeys("246", f"{keep}:{block}") | {
        "0": None
    }


def test_half_done_patterns_lose_the_least_first() -> None:
    rank = torch.rand(6, 8, 3)
    steps = [~block_mask(rank, 2, 4, share) for share in (0.0, 0.4, 0.7, 1.0)]
    assert [int(s.sum()) for s in steps] == [0, round(0.4 * 72), round(0.7 * 72), 72]
    for less, more in itertools.pairwise(steps):
        assert not (less & ~more).any()


def test_unstructured_pruning_is_not_called_a_pattern() -> None:
    model, x = pruned("mlp", "int8", sparsity=0.5)
    assert all(s["pattern"] is None for s in qat.convert(model, [x])[1].sparsity.values())


def test_layers_are_pruned_one_call_after_another() -> None:
    x = torch.randn(4, 12)
    model = qat.prune(qat.prepare(zoo.mlp(), "w8a8", x), sparsity=0.8, exclude=["4"])
    first = {name: mask.clone() for name, mask in masks(model).items()}
    assert str(qat.coverage(model)).count("not pruned: excluded") == 1
    qat.prune(model, sparsity=0.5, scope="layer", exclude=["0", "2"])
    assert all(torch.equal(masks(model)[name], mask) for name, mask in first.items())
    reasons = [module.plan.reason for module in quantized_modules(model).values()]
    assert all("pruned: magnitude" in reason and "not pruned" not in reason for reason in reasons)
    assert [module["share"] >= 0.4 for module in qat.sparsity(model).values()] == [True, True, True]


def test_tied_weights_share_a_mask() -> None:
    model, x = pruned("tied", {"format": "int8", "learned": "lsq"}, sparsity=0.5)
    parts = quantized_modules(model)
    assert parts["head"].weight_quantizer.mask is parts["table"].weight_quantizer.mask is not None
    assert set(qat.sparsity(model)) == {"table", "body"}
    fresh = qat.prepare(zoo.Tied(), zoo.every_layer({"format": "int8", "learned": "lsq"}), x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))
    for name in ("head", "table"):
        kept = qat.prune(qat.prepare(zoo.Tied(), "w8a8", x), exclude=[name])
        assert set(masks(kept)) == {"body"}, "a shared weight stays dense by any of its names"
    untied = zoo.Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    alone = qat.prune(qat.prepare(untied, "w8a8", x))
    assert set(masks(alone)) == {"body", "head"}, "a table that is only looked up stays dense"


@pytest.mark.parametrize("model", ["tied", "conv"])
def test_masks_are_in_every_kind_of_checkpoint(model: str, tmp_path: Any) -> None:
    recipe = zoo.every_layer({"format": "int4", "learned": "lsq"}, "int8")
    x = zoo.inputs(model, 4)
    trained = qat.calibrate(qat.prune(qat.prepare(zoo.build(model), recipe, x), sparsity=0.5), [x]).eval()
    expected = trained(x)
    assert torch.equal(copy.deepcopy(trained)(x), expected)
    save_weights(trained, tmp_path / "weights.safetensors")
    fresh = qat.prepare(zoo.build(model), recipe, x).eval()
    load_weights(fresh, tmp_path / "weights.safetensors")
    assert torch.equal(fresh(x), expected)
    dense = qat.calibrate(qat.prepare(zoo.build(model), recipe, x), [x])
    fresh.load_state_dict(dense.state_dict())
    assert all(m.all() for m in masks(fresh).values()), "a checkpoint without masks is that of a dense model"
    trained.load_state_dict(zoo.build(model).state_dict(), strict=False)
    assert all(m.all() for m in masks(trained).values())


def test_calibration_sees_the_pruned_weights() -> None:
    model = qat.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "w8a8", torch.randn(1, 4))
    attach(model, qat.Pruning("magnitude"))
    model[0].weight_quantizer.mask.fill_(False)
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    qat.calibrate(model, [torch.randn(8, 4)])
    assert float(model[1].input_quantizer.observer.low) == float(model[1].input_quantizer.observer.high) == 0.5


def test_the_ternary_scale_is_the_mean_of_what_is_left() -> None:
    model = qat.prepare(nn.Linear(8, 1, bias=False), zoo.every_layer("ternary"), torch.randn(1, 8))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]]))
    qat.prune(model, scope="layer")
    assert float(model.quantized_weight().scale) == 1.0
    assert model.quantized_weight().codes.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methd": "magnitude"}, "did you mean 'method'"),
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"method": "magnitude", "sparsity": 1.0}, "below 1"),
        ({"method": "magnitude", "sparsity": "half"}, "below 1"),
        ({"method": "nm_2_4", "sparsity": 0.7}, "leave out prune.sparsity"),
        ({"method": "magnitude", "scope": "model"}, "global or layer"),
        ({"method": "magnitude", "begin": 0.7, "end": 0.2}, "begin <= end"),
        ({"method": "magnitude", "every_n_steps": 0}, "at least 1"),
        ({"method": "magnitude", "exclude": "head"}, "list of layer names"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        qat.Pruning.from_dict(options)


def test_wrong_models() -> None:
    x = torch.randn(2, 12)
    with pytest.raises(PrepareError, match="not prepared"):
        qat.prune(zoo.mlp())
    prepared = qat.calibrate(qat.prepare(zoo.mlp(), "w8a8", x), [x])
    with pytest.raises(PruneError, match="did you mean '4'"):
        qat.prune(prepared, exclude=["44"])
    with pytest.raises(PruneError, match="nothing to prune: 0: excluded"):
        qat.prune(prepared, exclude=["*"])
    with pytest.raises(PruneError, match="list of layer names"):
        qat.prune(prepared, exclude="4")
    with pytest.raises(PruneError, match="PruningSchedule"):
        qat.prune(prepared, "movement")
    with pytest.raises(PruneError, match="prune_channels"):
        qat.prune(prepared, "channels")
    with pytest.raises(PruneError, match="deployed"):
        qat.prune(qat.convert(prepared, [x])[0])
    with pytest.raises(PruneError, match="no blocks of 4"):
        qat.prune(qat.prepare(nn.Linear(6, 4), "w8a8", torch.randn(1, 6)), "nm_2_4")


# ---------------------------------------------------------------------------------------------------- in training


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.hidden, self.head = nn.Conv2d(8, 8, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.relu(self.norm(self.conv(x)))).flatten(1))


def loader() -> ResumableLoader:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(40, 1, 4, 4, generator=generator)
    return ResumableLoader(TensorExamples(images, torch.arange(40) % 10), 8, shuffle=True, seed=0)


def module(pruning: qat.Pruning | None, recipe: Any = "w8a8", seed: int = 0, **options: Any) -> QuantizedTraining:
    torch.manual_seed(seed)
    recipe = recipe if isinstance(recipe, dict) else qat.Recipe.preset(recipe).to_dict()
    return QuantizedTraining(Small(), recipe=recipe, prune=pruning and pruning.to_dict(),
                             optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-2}, **options)  # fmt: skip


def fit(network: QuantizedTraining, pruning: qat.Pruning, folder: Any, *callbacks: Any, checkpoint: Any = None,
        epochs: int = 3, **options: Any) -> QuantizedTraining:
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[QuantizationSchedule(2), PruningSchedule(pruning), *callbacks], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
        enable_checkpointing=bool(callbacks), num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(network, loader(), loader(), ckpt_path=checkpoint, weights_only=True)
    return network


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append({n: m.clone() for n, m in masks(pl_module.network).items()})


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w158a8"])
@pytest.mark.parametrize("method", ["magnitude", "movement", "nm_2_4"])
def test_sparsity_grows_on_the_cubic_and_stands_still_in_the_end(method: str, recipe: str, tmp_path: Any) -> None:
    pruning = qat.Pruning(method, begin=0.2, end=0.6, every_n_steps=2)
    watch = Watch()
    network = fit(module(pruning, recipe), pruning, tmp_path, watch).network
    total = sum(m.numel() for m in watch.seen[0].values())
    gone = [sum(int((~m).sum()) for m in seen.values()) for seen in watch.seen]
    assert len(gone) == 15
    assert gone[:3] == [0, 0, 0]
    shares = [0.5 * (1 - (1 - step / 6) ** 3) for step in (0, 2, 4, 6)]
    assert [gone[3], gone[5], gone[7], gone[9]] == [pytest.approx(s * total, abs=len(watch.seen[0])) for s in shares]
    assert gone[4] == gone[3]
    assert gone[6] == gone[5]
    for seen in watch.seen[9:]:
        assert all(torch.equal(seen[n], watch.seen[9][n]) for n in seen)
    x = torch.randn(4, 1, 4, 4)
    _, certificate = qat.convert(network, [x])
    assert certificate.equal
    assert all(certificate.sparsity[n]["zeros"] >= int((~m).sum()) for n, m in watch.seen[-1].items())
    if method == "nm_2_4":
        assert certificate.sparsity["hidden"]["pattern"] == "2:4"


@pytest.mark.parametrize("method", ["magnitude", "movement", "nm_4_8"])
def test_resumes_to_the_same_bits(method: str, tmp_path: Any) -> None:
    """From checkpoints before, at and after updates of the masks, also in a network that never saw a mask."""
    pruning = qat.Pruning(method, end=0.6, every_n_steps=3)

    def run(checkpoint: Any = None, seed: int = 0) -> dict[str, Tensor]:
        saving = ModelCheckpoint(tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1,
                                 enable_version_counter=False)  # fmt: skip
        return fit(module(pruning, "w4a4", seed), pruning, tmp_path, saving, checkpoint=checkpoint).state_dict()

    expected = run()
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (2, 3, 8, 9, 10):
        resumed = run(tmp_path / "kept" / f"step={step}.ckpt", seed=99)
        shutil.rmtree(tmp_path / "live")
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[k], resumed[k]) for k in expected), step


def test_movement_follows_the_gradient_and_brings_weights_back() -> None:
    model = qat.prepare(nn.Linear(4, 1, bias=False), "w8a16", torch.randn(1, 4))
    pruning = qat.Pruning("movement", 0.5)
    attach(model, pruning)
    quantizer = model.weight_quantizer
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, -1.0, -1.0]]))
        quantizer.mask[0, 0] = False
    model(torch.tensor([[1.0, -2.0, 3.0, -4.0]])).sum().backward()
    torch.testing.assert_close(quantizer.scores.grad, torch.tensor([[1.0, -2.0, -3.0, 4.0]]))
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.0, -2.0, 3.0, -4.0]]))
    with torch.no_grad():
        quantizer.scores -= quantizer.scores.grad  # weights 1 and 2 move away from zero
    set_sparsity(model, pruning, 0.5)
    assert quantizer.mask.tolist() == [[False, True, True, False]]
    set_sparsity(model, pruning, 0.25)
    assert quantizer.mask.tolist() == [[True, True, True, False]], "a pruned weight comes back by its score"
    roles = {g["role"]: g for g in parameter_groups(model)}
    assert roles["scores"]["params"] == [quantizer.scores]
    assert roles["scores"]["weight_decay"] == 0.0


def test_accumulated_gradients_and_frozen_layers(tmp_path: Any) -> None:
    pruning = qat.Pruning("magnitude", 0.5, end=0.5, every_n_steps=1)
    network = module(pruning)
    network.network.hidden.weight.requires_grad_(False)
    before = network.network.hidden.weight.clone()
    fit(network, pruning, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert qat.convert(network.network, [torch.randn(2, 1, 4, 4)])[1].total_sparsity >= 0.5
    assert torch.equal(network.network.hidden.weight, before)


def test_a_schedule_that_is_cut_short_is_said(tmp_path: Any) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    pruning = qat.Pruning("magnitude", end=1.0)
    with pytest.warns(UserWarning, match="before the pruning schedule ended at step 14"):
        fit(module(pruning), pruning, tmp_path, Stop())


def test_a_run_without_an_end_has_no_schedule(tmp_path: Any) -> None:
    pruning = qat.Pruning("magnitude")
    with pytest.raises(ConfigError, match="this run has no end: set max_steps"):
        fit(module(pruning), pruning, tmp_path, epochs=-1)


def test_the_schedule_wants_a_network_it_can_prune(tmp_path: Any) -> None:
    movement = qat.Pruning("movement")
    with pytest.raises(ConfigError, match="same prune="):
        fit(module(None), movement, tmp_path)
    with pytest.raises(ConfigError, match="has none"):
        PruningSchedule({"method": "channels"})
    with pytest.raises(PruneError, match="int2_midrise has no zero"):
        module(qat.Pruning("magnitude"), "w2a8").configure_model()
    magnitude = qat.Pruning("magnitude")
    network = fit(module(None), magnitude, tmp_path).network  # masks made late are fine where nothing is trained for it
    assert qat.convert(network, [torch.randn(2, 1, 4, 4)])[1].total_sparsity >= 0.5


class Users(L.LightningModule):
    """A module that knows nothing of pruning; with ``steps`` it steps so many times a batch, by itself."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        self.model, self.steps = Small(), steps
        self.automatic_optimization = not steps

    def training_step(self, batch: Any, index: int) -> Any:
        if self.automatic_optimization:
            return self.validation_step(batch, index)
        optimizer: Any = self.optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.validation_step(batch, index))
            optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def fit_users(folder: Any, pruning: Any, *callbacks: Any, steps: int = 0, seed: int = 0, checkpoint: Any = None) -> Any:
    torch.manual_seed(seed)
    users = quantize(Users(steps), "w4a4", prune=pruning, example_inputs=torch.zeros(1, 1, 4, 4))
    trainer = L.Trainer(max_epochs=3, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
                        num_sanity_val_steps=0, enable_checkpointing=bool(callbacks))  # fmt: skip
    trainer.fit(users, loader(), loader(), ckpt_path=checkpoint, weights_only=True)
    return users


@pytest.mark.parametrize("method", ["magnitude", "movement", "nm_2_4"])
def test_anybodys_module_is_pruned_by_one_option(method: str, tmp_path: Any) -> None:
    options = {"method": method, "every_n_steps": 2, "end": 0.8}

    def run(seed: int = 0, checkpoint: Any = None) -> Any:
        saving = ModelCheckpoint(tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1,
                                 enable_version_counter=False)  # fmt: skip
        return fit_users(tmp_path, options, saving, seed=seed, checkpoint=checkpoint)

    whole = run()
    (tmp_path / "live").rename(tmp_path / "kept")
    _, certificate = deploy(whole, loader())
    assert certificate.equal
    assert certificate.total_sparsity >= (0.3 if method == "nm_2_4" else 0.5)
    roles = {g.get("role"): g for g in whole.optimizers().param_groups}
    assert ("scores" in roles) == (method == "movement")
    if method == "movement":
        assert {k: roles["scores"][k] for k in ("lr", "weight_decay")} == {"lr": 1e-2, "weight_decay": 0.0}
        assert all(bool(p.any()) for p in roles["scores"]["params"]), "the optimizer does not train the scores"
    for step in (1, 5, 12, 14):
        again = run(9, tmp_path / "kept" / f"step={step}.ckpt")
        shutil.rmtree(tmp_path / "live")
        expected, resumed = whole.state_dict(), again.state_dict()
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[k], resumed[k]) for k in expected), step
    loaded = quantize(Users).load_from_checkpoint(tmp_path / "kept" / "step=15.ckpt", weights_only=True)
    assert deploy(loaded, loader())[1].total_sparsity == certificate.total_sparsity


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("end", [0.3, 1.0])
def test_the_schedule_arrives_under_manual_optimization(end: float, steps: int, tmp_path: Any) -> None:
    """Several optimizer steps a batch may jump over any one of them."""
    pruning = qat.Pruning("magnitude", 0.6, end=end, every_n_steps=4)
    assert deploy(fit_users(tmp_path, pruning, steps=steps), loader())[1].total_sparsity >= 0.6


def test_a_callback_of_the_users_own_comes_first(tmp_path: Any) -> None:
    users = fit_users(tmp_path, {"method": "magnitude", "sparsity": 0.5}, PruningSchedule({"method": "magnitude",
                                                                                         "sparsity": 0.8}))
    assert [c.pruning.sparsity for c in users.trainer.callbacks if isinstance(c, PruningSchedule)] == [0.8]
    assert deploy(users, loader())[1].total_sparsity > 0.79
    with pytest.raises(ConfigError, match=r"qat\.prune_channels"):
        quantize(Users(), "w8a8", prune={"method": "channels"})
    with pytest.raises(PruneError, match="did you mean 'sparsity'"):
        quantize(Users(), "w8a8", prune={"sparsty": 0.5})
    with pytest.raises(ConfigError, match="PruningSchedule needs a prepared network"):
        L.Trainer(max_epochs=1, callbacks=[PruningSchedule({"method": "magnitude"})], logger=False, accelerator="cpu",
                  enable_progress_bar=False, enable_checkpointing=False).fit(Users(), loader(), loader())
