"""Lightning's ``ModelParallelStrategy`` for quantized networks: sharding, checkpoints, clipping, evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qat.calibration import processes
from qat.errors import ConfigError, UnsupportedError
from qat.modules.base import adopt
from qat.rewriter import is_sharded
from qat.training.sharding import STEPS, average_gradients, clip_grad_norm, placed, shard, whole_tensor

FOLDER_MARK = "meta.pt"
"""The file by which a folder is known as a checkpoint of Lightning's."""
TENSOR_PARALLEL = ("A quantized network cannot be split by tensor parallelism: its quantizers need whole weights. Use "
                   "ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1).")


def follow_strategy(module: L.LightningModule, network: nn.Module) -> None:
    """Shard ``network``, a part of ``module`` or itself, as the strategy of the module's trainer says, once.

    To be called in ``configure_model``, on all processes. Parameters and buffers get the values of process 0 first.
    Trainable parameters outside of ``network`` stay whole, and their gradients are averaged.

    Raises:
        ConfigError: on all processes: FSDPStrategy; tensor parallelism; a module sharded by somebody else, or sharded
            before and now trained in another way; manual optimization of a network that is the module itself.
    """
    trainer = module._trainer
    strategy: Any = None if trainer is None else trainer.strategy
    check_strategy(strategy)
    if not isinstance(strategy, ModelParallelStrategy):
        if trainer is not None and is_sharded(network):
            raise ConfigError(f"The network of this module was sharded by ModelParallelStrategy, and "
                              f"{type(strategy).__name__} cannot use it: load a checkpoint into a fresh module.")
        return
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ConfigError(TENSOR_PARALLEL)
    mixed: Any = trainer.precision_plugin  # type: ignore[union-attr]
    adopt(_Sharding, cast(Any, strategy))
    adopt(_Clipping, mixed)
    if is_sharded(network):
        return
    if network is module and not module.automatic_optimization:
        raise ConfigError(f"{type(module).__name__} is itself the network that is quantized, and its step would run "
                          "backward while its weights are gathered: name the part to quantize (network=), or use "
                          "strategy='ddp'.")
    processes.copy_first([*module.parameters(), *module.buffers()])
    mesh = strategy.device_mesh["data_parallel"]
    inside = set(network.parameters())
    average_gradients([p for p in module.parameters() if p not in inside], mesh.get_group())
    shard(network, mesh)
    if network is module:
        for name in STEPS:
            register_fsdp_forward_method(module, name)


def will_shard(module: L.LightningModule) -> bool:
    """Whether the strategy of the module's trainer is one that shards."""
    return module._trainer is not None and isinstance(module._trainer.strategy, ModelParallelStrategy)


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that cannot train a quantized network.

    Raises:
        ConfigError: what to use instead.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            "FSDPStrategy cannot train a quantized network: it flattens parameters that quantizers read whole. Use "
            "ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1), which shards them one by "
            "one (FSDP2), or strategy='ddp'."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in (1, "auto"):
        raise ConfigError(TENSOR_PARALLEL)


class _Sharding(ModelParallelStrategy):
    """`ModelParallelStrategy` for a module with one sharded network.

    Evaluation gathers the weights once, so that no process waits for a batch of another. Checkpoints are restored in
    the order of all other strategies: the module's hook first, then weights, then optimizers; and those of one file
    are the ones that one process writes, so that each can go on with those of the other.
    """

    _evaluating: contextlib.ExitStack

    def _network(self) -> nn.Module:
        module: Any = self.lightning_module
        network: nn.Module = module.quantized_network
        return network

    def _start(self) -> None:
        self._evaluating = contextlib.ExitStack()
        self._evaluating.enter_context(processes.whole(self._network()))

    def _end(self) -> None:
        self._evaluating.close()

    on_validation_start = on_test_start = on_predict_start = _start
    on_validation_end = on_test_end = on_predict_end = _end

    # What is saved in several files is read here into tensors of its own, and put in place by the methods below.

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not (path / FOLDER_MARK).is_file():
            return Strategy.load_checkpoint(self, path, weights_only=weights_only)
        checkpoint: dict[str, Any] = torch.load(path / FOLDER_MARK, map_location="cpu", weights_only=weights_only)
        assert self.model is not None
        like = self.model.state_dict()
        stored: dict[str, Any] = {}
        for key, kind in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
            name = key.removeprefix("state_dict.")
            if name != key and isinstance(kind, TensorStorageMetadata):
                own = like.get(name)
                if isinstance(own, DTensor) and own.shape == kind.size:
                    stored[name] = torch.empty_like(own)
                else:
                    stored[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
        dcp.load({"state_dict": stored}, checkpoint_id=path)
        checkpoint["state_dict"], checkpoint["optimizer_states"] = stored, []
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            checkpoint["optimizer_states"] += state.values()
        return checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with processes.parts(self._network()):
            return super().lightning_module_state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        with processes.parts(self._network()):
            like = self.model.state_dict()
            state = {name: placed(value, like.get(name)) for name, value in checkpoint["state_dict"].items()}
            self.model.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        with processes.parts(self._network()):
            if self._save_distributed_checkpoint:
                return super().optimizer_state(optimizer)
            state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
            kept = {}
            for index, parameter in enumerate(_optimized(optimizer)):
                for name, value in state["state"].get(index, {}).items():
                    if isinstance(value, DTensor) and value.shape != parameter.shape:
                        raise UnsupportedError(
                            f"{type(optimizer).__name__} keeps {name!r} in another shape than that of its parameter, "
                            "which one file cannot hold: use ModelParallelStrategy(save_distributed_checkpoint=True).")
                whole = {name: whole_tensor(value) for name, value in state["state"].get(index, {}).items()}
                if whole and self.is_global_zero:
                    kept[index] = whole
            return {**state, "state": kept} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        with processes.parts(self._network()):
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                if any(isinstance(name, str) for group in state["param_groups"] for name in group["params"]):
                    set_optimizer_state_dict(self.model, optimizer, state, options=StateDictOptions(cpu_offload=True))
                    continue
                own = {index: {name: placed(value, parameter) for name, value in state["state"][index].items()}
                       for index, parameter in enumerate(_optimized(optimizer)) if index in state["state"]}
                optimizer.load_state_dict({**state, "state": own})


class _Clipping(Precision):
    """A precision plugin that clips sharded gradients beside whole ones."""

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        for parameter in self.main_params(optimizer):  # one by one: torch takes lists of one kind only
            torch.nn.utils.clip_grad_value_(parameter, clip_val)


def _optimized(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """An optimizer's parameters in the order in which its state dict numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]
