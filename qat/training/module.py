"""One LightningModule for quantized training of any network and any loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection

from qat.compression.channels import take_shapes
from qat.compression.distillation import Distillation, Distiller
from qat.compression.pruning import Pruning, attach
from qat.compression.teacher_outputs import Taught
from qat.errors import ConfigError
from qat.tracing import uncompiled
from qat.training.build import build, plain
from qat.training.callbacks import total_steps
from qat.training.data import stream_seed
from qat.training.strategy import follow_strategy

CROSS_ENTROPY = {"_target_": "torch.nn.CrossEntropyLoss"}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3}


class WarmupCosine(LRScheduler):
    """Linear warm-up over ``warmup`` of the run, then a cosine from each group's own rate to ``floor`` times it.

    (torch's OneCycleLR overwrites the rates of the parameter groups; this keeps their ratios.)
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.0
    ) -> None:
        self.total_steps, self.warmup, self.floor = max(total_steps, 1), warmup, floor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        rise = self.warmup * self.total_steps
        if self.last_epoch < rise:
            factor = (self.last_epoch + 1) / (rise + 1)
        else:
            progress = min((self.last_epoch - rise) / max(self.total_steps - rise, 1), 1.0)
            factor = self.floor + (1 - self.floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        return [base * factor for base in self.base_lrs]


class QuantizedTraining(L.LightningModule):
    """Trains ``network`` in floating point (``recipe=None``) or quantized.

    The modules are swapped in `configure_model`, from the recipe that is stored with the hyperparameters. So Lightning
    rebuilds the prepared network before it loads weights, in ``fit``, in ``test(ckpt_path=...)`` and in
    ``load_from_checkpoint`` alike, and every checkpoint loads with ``weights_only=True``. There, too, the network is
    sharded, quantized or not, if the trainer's strategy is ``ModelParallelStrategy``.

    Args:
        network: a config with a ``_target_`` (stored in the checkpoint), or an ``nn.Module`` (not stored: pass it again
            to ``load_from_checkpoint(path, network=...)``). It is copied, not changed, when a recipe is given.
        recipe: ``Recipe.to_dict()``, or None for floating point.
        example_inputs: one batch of inputs, with which ``qat.prepare`` looks at the network's structure. Only their
            shapes and dtypes are kept (and stored).
        loss: config of a module that maps (output, target) to a scalar.
        optimizer: config of a torch optimizer without ``params``.
        scheduler: config of a scheduler without ``optimizer``, stepped after each step; the value ``"total_steps"``
            stands for the number of optimizer steps of the run.
        metrics: configs of torchmetrics by name, each updated with (output, target).
        prune: ``qat.Pruning(...).to_dict()``: the quantized network gets masks (and scores) from the start, which
            :class:`~qat.training.PruningSchedule` then moves; or None.
        pruned_shapes: what :func:`~qat.compression.channels.pruned_shapes` said of a network without all its channels,
            when ``network`` is the config of the whole one.
        scale_lr_factor: learned quantizer scales train at this multiple of the learning rate.
        offset_lr_factor: and biases and the parameters of norms at this one. They stay in floating point, so they can
            make up for what narrow weights have lost, sooner the faster they learn.
        target_key: key of the target where batches are dicts; the other entries are the network's keyword arguments.
        compile: options of ``torch.compile`` for the network, or None: not compiled. While ranges are observed the
            network runs uncompiled. What it compiles to is no part of the network: copies, checkpoints and ``convert``
            see the same modules as ever.
        seed: each training step reseeds the global generator from (seed, epoch, batch): dropout repeats on resume.
        distill: options of `qat.Distillation`, or None. ``train_loss`` is then the combined one, and its parts are
            logged too; validation and testing measure ``loss`` alone.
        teacher: whom the network learns from. It is in no checkpoint: pass it again where training goes on; to validate
            or test it is not needed.

    Batches: (inputs, target), inputs being a tensor, a tuple of arguments or a dict of keyword arguments; or one dict.
    """

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        recipe: Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        loss: Mapping[str, Any] = CROSS_ENTROPY,
        optimizer: Mapping[str, Any] = ADAMW,
        scheduler: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        prune: Mapping[str, Any] | None = None,
        pruned_shapes: Mapping[str, Any] | None = None,
        scale_lr_factor: float = 0.1,
        offset_lr_factor: float = 1.0,
        target_key: str = "labels",
        seed: int = 0,
        compile: Mapping[str, Any] | None = None,
        distill: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if distill is not None:
            distill = Distillation.from_dict(plain(distill, "distill")).to_dict()
        elif teacher is not None:
            raise ConfigError("A teacher needs a distillation: give distill=, such as {'temperature': 2.0}.")
        options: dict[str, Any] = {
            "recipe": recipe, "example_inputs": shapes(example_inputs),
            "loss": loss, "optimizer": optimizer, "scheduler": scheduler, "metrics": metrics or {},
            "prune": prune, "pruned_shapes": pruned_shapes or {}, "scale_lr_factor": scale_lr_factor,
            "offset_lr_factor": offset_lr_factor, "target_key": target_key, "seed": seed, "compile": compile,
            "distill": distill,
        }  # fmt: skip
        if not isinstance(network, nn.Module):
            options["network"] = network
        self.save_hyperparameters({key: plain(value, key) for key, value in options.items()}, logger=False)
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        self.loss: nn.Module = build(self.hparams["loss"], "loss")
        collection = MetricCollection(
            {name: build(config, f"metrics.{name}") for name, config in self.hparams["metrics"].items()}
        )
        self.val_metrics, self.test_metrics = collection.clone(prefix="val_"), collection.clone(prefix="test_")
        self.distiller: Distiller | None = None
        # In a tuple, because an attribute that is a module becomes a submodule: trained, and in every state dict.
        self._teacher: tuple[nn.Module | None] = (teacher,)
        self._configured = False

    def configure_model(self) -> None:
        """Build the network and swap its modules, and shard it if the strategy is ModelParallelStrategy; once."""
        if not self._configured:
            self._build()
            self._configured = True
        follow_strategy(self, cast(nn.Module, self.network))

    def _build(self) -> None:
        network = self.network if self.network is not None else build(self.hparams["network"], "network")
        if not isinstance(network, nn.Module):
            raise ConfigError(f"network builds a {type(network).__name__}, not an nn.Module.")
        network = take_shapes(network, self.hparams["pruned_shapes"])
        [teacher] = self._teacher
        if teacher is not None:
            # Before the swap: the float network can be run on example inputs, a prepared one has no ranges yet.
            example_inputs = zeros(self.hparams["example_inputs"])
            self.distiller = Distiller(
                self.hparams["distill"], teacher, network, example_inputs, seed=self.hparams["seed"]
            )
            self._teacher = (None,)  # the distiller has it, and may release it
        if self.hparams["recipe"] is not None:
            import qat

            network = qat.prepare(
                network, qat.Recipe.from_dict(self.hparams["recipe"]), zeros(self.hparams["example_inputs"])
            )
            pruning = Pruning.from_dict(self.hparams["prune"])
            if pruning.masks:
                attach(network, pruning)
            if self.distiller is not None:
                self.distiller.check(network)
        if self.hparams["compile"] is not None:
            network.compile(**self.hparams["compile"])
        self.network = network

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Without a teacher, the projections of a distillation have no place and no use."""
        if self.distiller is None:
            state = checkpoint["state_dict"]
            for name in [name for name in state if name.startswith("distiller.")]:
                del state[name]

    @property
    def quantized_network(self) -> nn.Module | None:
        """The network; prepared, if there is a recipe, once ``configure_model`` has run."""
        return self.network

    @contextlib.contextmanager
    def feeding(self, batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
        """The network's inputs in these batches, for `qat.calibrate` and the like."""
        yield (self.split(batch)[0] for batch in batches)

    def split(self, batch: Any) -> tuple[Any, Any]:
        """A batch as (inputs, target)."""
        if isinstance(batch, Mapping):
            key = self.hparams["target_key"]
            if key not in batch:
                raise ConfigError(f"The batch has no {key!r}; it has {', '.join(map(str, batch))}. Set target_key.")
            return {name: value for name, value in batch.items() if name != key}, batch[key]
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError("A batch must be (inputs, target) or a dict that holds the target.")
        return batch[0], batch[1].target if isinstance(batch[1], Taught) else batch[1]

    def forward(self, inputs: Any) -> Any:
        """The network's output; ``.logits`` of it where it has some (models of the transformers library)."""
        return call_network(cast(nn.Module, self.network), inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = self.split(batch)
        with uncompiled() if self.observing() else contextlib.nullcontext():
            if self.hparams["distill"] is None:
                loss: Tensor = self.loss(self(inputs), target)
            else:
                loss = self._taught_loss(inputs, target, batch)
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def observing(self) -> bool:
        """Whether a compiled network must run uncompiled now, because some quantizer follows what it sees."""
        return self.hparams["compile"] is not None and any(getattr(m, "observing", False) for m in self.modules())

    def _taught_loss(self, inputs: Any, target: Any, batch: Any) -> Tensor:
        """The loss against the labels and the teacher."""
        if self.distiller is None:
            raise ConfigError(
                "This module learns from a teacher, which no checkpoint holds: pass teacher= to train it, or "
                "distill=None to train it on the labels alone."
            )
        with self.distiller.watching(cast(nn.Module, self.network)) as said:
            output = self(inputs)
        known = isinstance(batch, tuple | list) and isinstance(batch[1], Taught)
        told = batch[1].told if known else self.distiller.ask(inputs)
        torchs = type(self.loss) is nn.CrossEntropyLoss and isinstance(output, Tensor) and output.ndim > 1
        dim = getattr(self.loss, "class_dim", 1 if torchs else None)
        parts = self.distiller.losses(output, said, told, target, getattr(self.loss, "ignore_index", None), dim)
        task: Tensor = self.loss(output, target)
        self.log_dict({f"train_{name}_loss": part for name, part in {"task": task, **parts}.items()}, on_epoch=False)
        return self.distiller.combine(task, parts)

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection) -> None:
        inputs, target = self.split(batch)
        output = self(inputs)
        # averaged over the processes: early stopping and the choice of the best must agree on all of them
        self.log(f"{stage}_loss", self.loss(output, target), on_epoch=True, batch_size=len(target), sync_dist=True)
        metrics.update(output, target)
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(target))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(stream_seed(self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As ever; and of fused optimizers under ``bf16-mixed`` too, where Lightning refuses although no gradient is
        scaled there."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            how = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, how)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        learners = cast(nn.Module, self.network)
        if self.distiller is not None:
            learners = nn.ModuleList([learners, self.distiller])
        optimizer = build(self.hparams["optimizer"], "optimizer", params=parameter_groups(learners))
        factors = {"scales": self.hparams["scale_lr_factor"], "offsets": self.hparams["offset_lr_factor"]}
        for group in optimizer.param_groups:
            group["lr"] *= factors.get(group["role"], 1.0)
        if self.hparams["scheduler"] is None:
            return optimizer
        config = dict(self.hparams["scheduler"])
        if "total_steps" in config.values():
            steps = total_steps(self.trainer, "The scheduler")
            config = {k: steps if v == "total_steps" else v for k, v in config.items()}
            # The question makes Lightning 2.6 set up the training loader before it restores the loader's position,
            # which would be lost. Without a loader it sets one up again, at the right time.
            self.trainer.fit_loop._combined_loader = None
        scheduler = build(config, "scheduler", optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def call_network(network: nn.Module, inputs: Any) -> Any:
    """``network(inputs)``: a tuple holds arguments, a dict keyword arguments. Returns the output's logits, if any."""
    if isinstance(inputs, Mapping):
        output = network(**inputs)
    else:
        output = network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)
    return getattr(output, "logits", output)


def shapes(inputs: Any) -> Any:
    """Inputs with each tensor replaced by ``{"shape": [...], "dtype": "float32"}``, which a checkpoint can hold.

    >>> shapes((torch.zeros(2, 3), {"mask": torch.ones(2, dtype=torch.bool)}))
    [{'shape': [2, 3], 'dtype': 'float32'}, {'mask': {'shape': [2], 'dtype': 'bool'}}]
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {name: shapes(value) for name, value in inputs.items()}
    return [shapes(value) for value in inputs] if isinstance(inputs, tuple | list) else inputs


def zeros(described: Any) -> Any:
    """Inputs of zeros as `shapes` described them.

    >>> zeros(shapes((torch.ones(1, 2), 5)))
    (tensor([[0., 0.]]), 5)
    """
    if isinstance(described, Mapping):
        if described.keys() == {"shape", "dtype"}:
            return torch.zeros(described["shape"], dtype=getattr(torch, described["dtype"]))
        return {name: zeros(value) for name, value in described.items()}
    return tuple(zeros(value) for value in described) if isinstance(described, list | tuple) else described


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in up to four groups, named by ``role``.

    "weights" have the optimizer's weight decay; "offsets" (biases and the parameters of norms: everything with less
    than two dimensions), "scales" (learned quantizer scales) and "scores" (of movement pruning) have none.
    """
    of_quantizers = {
        id(p) for m in network.modules() if getattr(m, "is_quantizer", False) for p in m.parameters()
    }  # fmt: skip
    roles: dict[str, list[nn.Parameter]] = {"weights": [], "offsets": [], "scales": [], "scores": []}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("weight_quantizer.scores"):
            roles["scores"].append(parameter)
        elif id(parameter) in of_quantizers or ".log_scale" in f".{name}":
            roles["scales"].append(parameter)
        else:
            roles["weights" if parameter.ndim > 1 else "offsets"].append(parameter)
    return [
        {"params": parameters, "role": role} | ({} if role == "weights" else {"weight_decay": 0.0})
        for role, parameters in roles.items()
        if parameters
    ]
