"""One of several processes: runs every scenario and writes what it found; `test_processes.py` starts and judges them.

    python process.py <folder> [<scenario> ...]      with LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import qat
from qat.training import (
    Ladder,
    Oscillations,
    PruningSchedule,
    QuantizationSchedule,
    QuantizedTraining,
    ResumableLoader,
    WeightAverage,
    clip_grad_norm,
    deploy,
    gather,
    quantize,
    shard,
)
from qat.training.data import TensorExamples

OBSERVERS = ["minmax", "moving_average", "percentile", "mse", "entropy"]
PRESETS = ["w8a8", "w4a4", "w2a2", "w1a1", "w158a8"]
WORLD = 2


class Network(nn.Module):
    """Batch norm, a shared input, and outliers: all that processes could come to see differently."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.middle, self.head = nn.Linear(64, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.relu(self.norm(self.conv(x))).flatten(1))))


def network() -> nn.Module:
    torch.manual_seed(1)
    return Network()


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 1, 4, 4, generator=generator) * (1 + i) for i in range(count)]


def observing(observer: str, bits: str = "int8") -> dict[str, Any]:
    activation = {"format": bits} if bits == "binary" else {"format": bits, "observer": observer}
    return {"rules": [{"weight": {"format": "int8"}, "input": activation}]}


def recipes() -> dict[str, Any]:
    return {**{name: observing(name) for name in OBSERVERS}, "binary": observing("minmax", "binary"),
            "learned": {"rules": [{"weight": {"format": "int4", "learned": "lsq"},
                                   "input": {"format": "uint4", "learned": "lsq_plus", "symmetric": False}}]}}


def prepared(recipe: Any) -> nn.Module:
    return qat.prepare(network(), recipe, torch.zeros(1, 1, 4, 4))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors, on all processes if some are sharded."""
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.state_dict().items()}


def loader(rank: int, world: int, count: int = 48, batch_size: int = 4) -> ResumableLoader:
    """The global batches are the same for each number of processes."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 4, 4, generator=generator) * (1 + torch.arange(count)[:, None, None, None] / 20)
    images += (labels - 1.0)[:, None, None, None] * 2
    return ResumableLoader(TensorExamples(images, labels), batch_size, shuffle=True, rank=rank, world_size=world)


class EachEpoch(L.Callback):
    """What each epoch leaves, and the loss of each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.states.append(state(pl_module.network))


def fit(folder: Path, recipe: Any, rank: int, world: int, lr: float = 5e-3, checkpoint: Path | None = None,
        callbacks: tuple[Any, ...] = (), batch_size: int = 4, prune: Any = None,
        **options: Any) -> tuple[QuantizedTraining, EachEpoch]:
    torch.manual_seed(0)
    module = QuantizedTraining(network(), recipe, torch.zeros(1, 1, 4, 4), prune=prune,
                               optimizer={"_target_": "torch.optim.AdamW", "lr": lr, "weight_decay": 0.0})
    seen = EachEpoch()
    schedule = QuantizationSchedule(calibration_batches=3, freeze_ranges_at=0.7, reestimate_batches=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_epochs=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, callbacks=[schedule, seen, *callbacks],
        **{"enable_checkpointing": False, "strategy": "ddp" if world > 1 else "auto", "num_sanity_val_steps": 0}
        | options,
    )  # fmt: skip
    trainer.fit(module, loader(rank, world, batch_size=batch_size), loader(rank, world), ckpt_path=checkpoint,
                weights_only=True)
    return module, seen


def caught(action: Any) -> str:
    try:
        action()
    except qat.QuantizationError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---------------------------------------------------------------------------------------------------- the scenarios


def dealt_out(rank: int, folder: Path) -> Any:
    """Batches dealt out: three for one process, two for the other."""
    return {name: state(qat.calibrate(prepared(recipe), batches()[rank::WORLD])) for name, recipe in recipes().items()}


def one_is_empty(rank: int, folder: Path) -> Any:
    model = qat.calibrate(prepared(observing("percentile")), batches() if rank == 0 else [])
    return state(model), str(qat.coverage(model))


def errors(rank: int, folder: Path) -> Any:
    model = prepared(observing("minmax"))
    qat.calibrate(model, batches()[:1])
    before = state(model)
    bad = [torch.full((2, 1, 4, 4), torch.nan)]
    said = {
        "nobody": caught(lambda: qat.calibrate(model, [])),
        "nan": caught(lambda: qat.calibrate(model, bad if rank else batches())),
        "norm": caught(lambda: qat.reestimate_batch_norm(model, [])),
        "alone": caught(lambda: qat.calibrate(prepared("w8a8"), batches()[: rank + 1], merge=None)),
    }
    return said, before, state(model)


def ignored(rank: int, folder: Path) -> Any:
    """A bad batch is left out by the process that has it, and the others never know."""
    bad = batches()[1].clone()
    bad[0, 0, 0, 0] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: state(qat.calibrate(prepared(observing(name)), [bad, batches()[0]] if rank else batches()[1:2],
                                          ignore_nonfinite=True)) for name in OBSERVERS}


def batch_norm(rank: int, folder: Path) -> Any:
    model = qat.calibrate(prepared("w8a8"), batches())
    qat.reestimate_batch_norm(model, batches()[rank::WORLD])
    return state(model)


def training(rank: int, folder: Path) -> Any:
    found = {}
    for preset in PRESETS:
        module, seen = fit(folder, qat.Recipe.preset(preset).to_dict(), rank, WORLD, lr=2e-2)
        deployed, certificate = qat.convert(module.network.eval(), batches())
        with torch.no_grad():
            equal = torch.equal(deployed(batches()[0]), module.network(batches()[0]))
        found[preset] = {"epochs": seen.states, "end": state(module.network), "losses": seen.losses,
                         "equal": equal and certificate.equal}
    return found


def ranges_in_training(rank: int, folder: Path) -> Any:
    """With weights that stand still the first layer sees the same values, however many processes share them."""
    return {name: state(fit(folder, recipes()[name], rank, WORLD, lr=0.0)[0].network)
            for name in ("minmax", "moving_average", "percentile", "binary")}


def resumed(rank: int, folder: Path) -> Any:
    """Killed in mid-epoch and at an epoch's end, with accumulation, clipping and bfloat16."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed",
               "enable_checkpointing": True}
    saving = ModelCheckpoint(folder / "resume", "{step}", save_top_k=-1, every_n_train_steps=1,
                             enable_version_counter=False)
    recipe = qat.Recipe.preset("w4a4").to_dict()
    expected = state(fit(folder, recipe, rank, WORLD, callbacks=(saving,), **options)[0].network)
    return expected, [
        state(fit(folder, recipe, rank, WORLD, checkpoint=folder / "resume" / f"step={step}.ckpt",
                  callbacks=(ModelCheckpoint(folder / f"again{step}"),), **options)[0].network)
        for step in (1, 3, 4)
    ]


def synchronized(rank: int, folder: Path) -> Any:
    """Synchronized batch norm: the gradients of the whole batch, in a prepared network that still folds."""
    module, seen = fit(folder, qat.Recipe.preset("w8a8").to_dict(), rank, WORLD, sync_batchnorm=True)
    kind = type(module.network.norm).__name__
    model = qat.calibrate(prepared("w8a8"), batches()).train()
    qat.freeze_ranges(model)
    model.norm.synchronized = True
    x = batches()[0].chunk(WORLD)[rank]
    model(x).square().sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {"kind": kind, "epochs": seen.states, "norm": state(model.norm),
            "gradients": {name: p.grad for name, p in model.named_parameters()}}


def uneven(rank: int, folder: Path) -> Any:
    counts = caught(lambda: fit(folder, qat.Recipe.preset("w8a8").to_dict(), rank, WORLD, batch_size=4 + 4 * rank))

    def without_start() -> None:
        model = prepared("w4a4")
        from qat.calibration import start_merging
        start_merging(model)

    return counts, caught(without_start)


def kept(model: nn.Module) -> float:
    """The share of the parameters that this process has, without those of quantizers."""
    named = [(n, p) for n, p in model.named_parameters() if "quantizer" not in n]
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for _, p in named) / sum(
        p.numel() for _, p in named)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """What quantizers have, as it is on this process."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "quantizer" in name}


def sharded(rank: int, folder: Path) -> Any:
    """FSDP2: the gradients and steps of one process with the whole batch, for learned scales too; and parity."""
    found = {}
    for name, recipe in {"w8a8": "w8a8", "learned": recipes()["learned"]}.items():
        model = qat.calibrate(shard(prepared(recipe)), batches()[rank::WORLD]).train()
        qat.freeze_batch_norm(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        norms = []
        for x in batches(3):
            optimizer.zero_grad()
            model(x.chunk(WORLD)[rank]).square().mean().backward()
            norms.append(float(clip_grad_norm(model.parameters(), 0.6)))
            optimizer.step()
        found[name] = {"state": state(gather(model)), "scales": scales(model), "kept": kept(model), "norms": norms,
                       "refused": caught(partial(qat.convert, model, batches()))}
    model = prepared("w8a8")
    model.norm.double()
    shard(model)
    found["other"] = [n for n, p in model.named_parameters() if not isinstance(p, DTensor) and "quantizer" not in n]
    return found


class Reads(nn.Module):
    """Functions read its own parameter, one of a module inside, and the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.experts = nn.Parameter(torch.randn(8, 8) * 0.3), nn.Linear(8, 8), nn.Module()
        self.experts.stacked = nn.Parameter(torch.randn(2, 8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x) @ self.table) + F.linear(x, self.layer.weight)
        return x @ self.experts.stacked[0] + x @ self.experts.stacked[1].T


def sharded_parameters(rank: int, folder: Path) -> Any:
    """FSDP2 of parameters that functions read: the steps of one process with the whole batch, and parity."""
    found = []
    for parts in (WORLD, 1):
        torch.manual_seed(5)
        batches = [torch.randn(6, 8) for _ in range(4)]
        model = qat.prepare(Reads(), "w4a8", batches[0])
        if parts > 1:
            qat.calibrate(shard(model), batches[rank::parts])
        else:
            qat.calibrate(model, batches, merge=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for x in batches:
            optimizer.zero_grad()
            model.train()(x.chunk(parts)[rank if parts > 1 else 0]).square().mean().backward()
            optimizer.step()
        share, whole = kept(model), gather(model)
        found.append({"state": state(whole), "kept": share, "equal": qat.convert(whole, batches)[1].equal})
    return found


class EachStep(EachEpoch):
    """And the scales of each step, and how much of the weights is here then."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[dict[str, Tensor]] = []
        self.kept: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        network = pl_module.quantized_network
        self.scales.append(scales(network))
        self.kept.append(kept(network))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.states.append(state(pl_module))


def by_strategy(in_parts: bool = False, tensor: int = 1) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=WORLD // tensor, tensor_parallel_size=tensor,
                                 save_distributed_checkpoint=in_parts)


def strategy(rank: int, folder: Path) -> Any:
    """Lightning's ModelParallelStrategy, against DDP; batch norm of all, too."""
    found = {}
    for name, recipe in {"w8a8": qat.Recipe.preset("w8a8").to_dict(), "learned": recipes()["learned"]}.items():
        options = {"num_sanity_val_steps": 1, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
        seen = EachStep()
        module, _ = fit(folder, recipe, rank, WORLD, 2e-2, callbacks=(seen,), strategy=by_strategy(), **options)
        other, _ = fit(folder, recipe, rank, WORLD, 2e-2, **options)
        deployed, certificate = deploy(module, loader(rank, WORLD))
        whole = gather(module.network).eval()
        with torch.no_grad():
            equal = torch.equal(deployed(batches()[0]), whole(batches()[0]))
        found[name] = {"scales": seen.scales, "epochs": seen.states, "kept": seen.kept, "losses": seen.losses,
                       "end": state(module), "ddp": state(other), "equal": equal and certificate.equal,
                       "codes": state(deployed), "after": kept(module.network)}
    module, _ = fit(folder, recipe, rank, WORLD, strategy=by_strategy(), sync_batchnorm=True)
    other, _ = fit(folder, recipe, rank, WORLD, sync_batchnorm=True)
    return found, state(module), state(other)


def strategy_resumed(rank: int, folder: Path) -> Any:
    """Killed in mid-epoch and at an epoch's end; checkpoints in one file and in one for each process."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed",
               "enable_checkpointing": True}
    recipe = qat.Recipe.preset("w4a4").to_dict()
    found = {}
    for in_parts, steps in ((False, (1, 3)), (True, (1,))):
        place = folder / f"strategy_{in_parts}"
        saving = ModelCheckpoint(place, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
        expected, _ = fit(folder, recipe, rank, WORLD, callbacks=(saving,), strategy=by_strategy(in_parts), **options)
        found[str(in_parts)] = state(expected), [
            state(fit(folder, recipe, rank, WORLD, checkpoint=place / f"step={step}.ckpt", strategy=by_strategy(),
                      callbacks=(ModelCheckpoint(folder / f"strategy_again_{in_parts}{step}"),), **options)[0])
            for step in steps
        ]
    expected, _ = fit(folder, recipe, rank, WORLD, **options)
    by_ddp, _ = fit(folder, recipe, rank, WORLD, checkpoint=folder / "strategy_False" / "step=1.ckpt", **options)
    return found, state(expected), state(by_ddp)


def strategy_with_callbacks(rank: int, folder: Path) -> Any:
    """Callbacks that read and write whole weights, each with a killed run: what they do is what they do under DDP."""
    movement = {"method": "movement", "sparsity": 0.5, "end": 0.6, "every_n_steps": 2, "scope": "layer"}

    def following() -> dict[str, tuple[Any, ...]]:
        return {
            "average": (WeightAverage(0.9), Oscillations(dampening=0.5, freeze_above=0.02, momentum=0.3)),
            "ladder": (Ladder([{"until": 0.3, "weight": 8, "input": 8}], batches=2),),
            "pruning": (PruningSchedule(movement),),
        }

    found = {}
    recipe = qat.Recipe.preset("w4a4").to_dict()
    for name in following():
        options = {"prune": movement if name == "pruning" else None, "lr": 2e-2}
        saving = ModelCheckpoint(folder / name, "{step}", save_top_k=-1, every_n_train_steps=5)
        module, _ = fit(folder, recipe, rank, WORLD, callbacks=(*following()[name], saving), enable_checkpointing=True,
                        strategy=by_strategy(name == "average"), **options)
        other, _ = fit(folder, recipe, rank, WORLD, callbacks=following()[name], **options)
        saving = ModelCheckpoint(folder / f"{name}_again")
        again, _ = fit(folder, recipe, rank, WORLD, callbacks=(*following()[name], saving), enable_checkpointing=True,
                       strategy=by_strategy(), checkpoint=folder / name / "step=5.ckpt", **options)
        _, certificate = deploy(module, loader(rank, WORLD))
        found[name] = {"end": state(module), "ddp": state(other), "again": state(again), "equal": certificate.equal,
                       "sparsity": certificate.total_sparsity}
    return found


class Own(L.LightningModule):
    """Somebody's module: a network, and a head and a scalar beside it that are not quantized with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 13), nn.ReLU(), nn.Linear(13, 7))
        self.head, self.heat = nn.Linear(7, 3), nn.Parameter(torch.tensor(1.5))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.heat

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.logits(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Alternating(Own):
    """Its own steps of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.2)
        optimizer.step()
        return loss


class Rows(torch.optim.SGD):
    """Keeps something about the rows of a weight."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter.ndim == 2:
                self.state[parameter]["rows"] = parameter.grad.abs().amax(1)
        return loss


class ByRows(Own):
    def configure_optimizers(self) -> Any:
        return Rows(self.parameters(), lr=0.05)


class ShardsItself(Own):
    def configure_model(self) -> None:
        fully_shard(self.body)


def fit_own(kind: Any, rank: int, folder: Path, strategy: Any = None, recipe: Any = "w4a8", network: str = "body",
            checkpoint: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(rank)  # DDP starts with the weights of process 0, and so does sharding
    module = quantize(kind(), recipe, network=network, schedule=QuantizationSchedule(calibration_batches=3))
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy or by_strategy(), max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        use_distributed_sampler=False, **{"enable_checkpointing": False} | options,
    )  # fmt: skip
    trainer.fit(module, loader(rank, WORLD), loader(rank, WORLD, count=24 * (1 + rank)), ckpt_path=checkpoint)
    return module


def strategy_of_own_modules(rank: int, folder: Path) -> Any:
    """A part of a module, the module itself by its steps alone, and manual optimization; resumed without any state.

    One process has more batches to validate with than the other.
    """
    found = {}
    for kind, network in ((Own, "body"), (Own, ""), (Alternating, "body")):
        module = fit_own(kind, rank, folder, network=network)
        deployed, certificate = deploy(module, loader(rank, WORLD))
        other = fit_own(kind, rank, folder, "ddp", network=network)
        found[f"{kind.__name__}.{network}"] = {
            "end": state(module), "ddp": state(other), "equal": certificate.equal, "codes": state(deployed),
            "kept": kept(module.quantized_network),
        }
    saving = ModelCheckpoint(folder / "own", "{step}", save_top_k=-1, every_n_train_steps=2)
    fit_own(Own, rank, folder, callbacks=[saving], enable_checkpointing=True)
    again = fit_own(Own, rank, folder, checkpoint=folder / "own" / "step=2.ckpt", callbacks=[ModelCheckpoint(
        folder / "own_again")], enable_checkpointing=True)
    return found, state(again)


def strategy_refused(rank: int, folder: Path) -> Any:
    by_ddp = L.Trainer(accelerator="cpu", devices=WORLD, strategy="ddp", max_epochs=1, logger=False,
                       default_root_dir=folder, enable_checkpointing=False)
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy())  # L.Trainer takes it with GPUs only
    recipe = qat.Recipe.preset("w8a8").to_dict()
    return {
        "flat": caught(lambda: QuantizationSchedule().setup(trainer, L.LightningModule(), "fit")),
        "tensor": caught(lambda: fit(folder, recipe, rank, WORLD, strategy=by_strategy(tensor=WORLD))),
        "itself": caught(lambda: fit_own(ShardsItself, rank, folder)),
        "manual": caught(lambda: fit_own(Alternating, rank, folder, network="")),
        "no recipe": caught(lambda: fit_own(Own, rank, folder, recipe=None)),
        "rows": caught(lambda: fit_own(ByRows, rank, folder, enable_checkpointing=True)),
        "ddp afterwards": caught(lambda: by_ddp.validate(fit_own(Own, rank, folder), loader(rank, WORLD))),
    }


SCENARIOS = (dealt_out, one_is_empty, errors, ignored, batch_norm, training, ranges_in_training, resumed, synchronized,
             uneven, sharded, sharded_parameters, strategy, strategy_resumed, strategy_with_callbacks,
             strategy_of_own_modules, strategy_refused)


if __name__ == "__main__":
    warnings.simplefilter("error")  # but for what Lightning says of every tiny run, and qat of untrained networks
    for known in (".*LeafSpec", ".*does not have many workers", ".*logging interval", "1-bit activations",
                  "Checkpoint directory .* exists", "Be aware that when using `ckpt_path`", "the ranges of this model"):
        warnings.filterwarnings("ignore", known)
    torch.set_num_threads(1)
    here, place = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=place, world_size=WORLD, init_method=f"file://{here}/meeting")
    for scenario in SCENARIOS:
        if len(sys.argv) > 2 and scenario.__name__ not in sys.argv[2:]:
            continue  # all of them, unless some are named
        torch.save(scenario(place, here), here / f"{scenario.__name__}.{place}.pt")
    dist.destroy_process_group()
