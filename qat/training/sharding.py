"""Fully sharded training (FSDP2) of prepared networks: each process keeps a part of every master weight."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from qat.calibration import processes
from qat.errors import ConfigError, UnsupportedError
from qat.modules.base import adopt

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""What Lightning calls of a module, instead of the module."""
NOTES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "_qat_whole")
REGISTRY = "__composable_api_state_key"
"""Attributes, and how those begin, that sharding gives to modules."""
FOLDER_MARK = "meta.pt"
"""The file by which a folder is known as a checkpoint of Lightning's."""


def shard(network: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Shard the parameters of a prepared network, equal on all of them, over the processes, in place; returns it.

    This is for loops of one's own; under Lightning ``strategy=ModelParallelStrategy(...)`` does it
    (:class:`~qat.training.QuantizationSchedule`).

    The network is one unit: its parameters are gathered for a forward or a backward and sharded again behind it, and
    gradients and the optimizer's state stay sharded. A unit for each layer would be smaller, but batch norms are folded
    into, and tied weights quantized in, layers that lie elsewhere. Scales are a few numbers (FSDP2 takes no scalars):
    every process keeps all of them, and averages their gradients; so it does with trainable parameters of another
    dtype than most, which FSDP2 does not mix.

    Shard before the optimizer is made; calibrate before or after. Call it on all processes, and clip gradients with
    `clip_grad_norm`. `gather` gives a copy with whole weights: convert that.

    Args:
        mesh: a ``DeviceMesh`` of one dimension; None: all processes.
        options: of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        ConfigError: there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("sharding needs several processes: call torch.distributed.init_process_group first.")
    scales = {p for m in network.modules() if getattr(m, "is_quantizer", False) for p in m.parameters()}
    others = [p for p in network.parameters() if p not in scales]
    sizes: Counter[torch.dtype] = Counter()
    for parameter in others:
        if parameter.requires_grad:
            sizes[parameter.dtype] += parameter.numel()
    common = sizes.most_common(1)[0][0] if sizes else None
    alike = scales | {p for p in others if p.ndim == 0 or (p.requires_grad and p.dtype != common)}
    _average_gradients(alike, None if mesh is None else mesh.get_group())
    fully_shard(network, mesh=mesh, ignored_params=alike, **options)
    network.register_forward_hook(_let_go)
    return network


def _average_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Parameters that every process keeps whole get the gradients of all of them."""
    size = dist.get_world_size(group)

    def average(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= size

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def _let_go(network: Any, inputs: Any, output: Any) -> None:
    """FSDP2 keeps the weights of a root whole until a backward, which never comes behind a forward without gradients:
    what is written to its parameters meanwhile would be lost."""
    if not torch.is_grad_enabled() and not network.__dict__.get("_qat_whole"):
        network.reshard()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where some parameters are sharded and some whole; returns the total norm.

    The norm is that of the whole gradients, and equal on all processes, bit for bit.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64)  # of what is sharded, of what is whole
    for gradient in gradients:
        squares[0 if isinstance(gradient, DTensor) else 1] += local(gradient).double().square().sum().cpu()
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        squares[:1] = processes.reduced(squares[:1], dist.ReduceOp.SUM)
    norm = squares.sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).item()
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm


# ------------------------------------------------------------------------------------------------ whole weights again


def gather(network: nn.Module) -> nn.Module:
    """A copy of a sharded network with whole parameters, which knows nothing of other processes; the network stays.

    To be called on all processes: each gets a copy. A network that is not sharded is copied too.
    """
    with processes.parts(network), torch.no_grad():
        memo: dict[int, Any] = {}
        units: list[tuple[nn.Module, Any]] = []
        for module in network.modules():
            for parameter in module._parameters.values():
                if isinstance(parameter, DTensor) and id(parameter) not in memo:
                    whole = nn.Parameter(parameter.full_tensor().detach().clone(), parameter.requires_grad)
                    memo[id(parameter)] = whole
            for key, value in module.__dict__.items():
                if key.endswith("_hooks") and isinstance(value, dict):
                    memo[id(value)] = OrderedDict((k, v) for k, v in value.items() if not _of_sharding(v))
                elif key.startswith(REGISTRY):
                    memo[id(value)] = None
            if isinstance(module, FSDPModule):
                units.append((module, type(module)))
        try:
            for module, kind in units:
                module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
            copied = copy.deepcopy(network, memo)
        finally:
            for module, kind in units:
                module.__class__ = kind
    for module in copied.modules():
        for key in list(module.__dict__):
            if key in NOTES or key.startswith(REGISTRY):
                del module.__dict__[key]
    without_methods(copied)
    return copied


def _of_sharding(hook: Any) -> bool:
    """Whether a hook is one of FSDP2's, or beside them."""
    hook = getattr(hook, "hook", hook)
    return hook is _let_go or str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def without_methods(module: nn.Module) -> None:
    """Steps that were made to gather weights are those of the class again."""
    for name in STEPS:
        module.__dict__.pop(name, None)


# -------------------------------------------------------------------------------------------------- under Lightning


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
        if trainer is not None and processes.is_sharded(network):
            raise ConfigError(f"The network of this module was sharded by ModelParallelStrategy, and "
                              f"{type(strategy).__name__} cannot use it: load a checkpoint into a fresh module.")
        return
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ConfigError(TENSOR_PARALLEL)
    mixed: Any = trainer.precision_plugin  # type: ignore[union-attr]
    adopt(_Sharding, cast(Any, strategy))
    adopt(_Clipping, mixed)
    if processes.is_sharded(network):
        return
    if network is module and not module.automatic_optimization:
        raise ConfigError(f"{type(module).__name__} is itself the network that is quantized, and its step would run "
                          "backward while its weights are gathered: name the part to quantize (network=), or use "
                          "strategy='ddp'.")
    processes.copy_first([*module.parameters(), *module.buffers()])
    mesh = strategy.device_mesh["data_parallel"]
    inside = set(network.parameters())
    _average_gradients([p for p in module.parameters() if p not in inside], mesh.get_group())
    shard(network, mesh)
    if network is module:
        for name in STEPS:
            register_fsdp_forward_method(module, name)


def will_shard(module: L.LightningModule) -> bool:
    """Whether the strategy of the module's trainer is one that shards."""
    return module._trainer is not None and isinstance(module._trainer.strategy, ModelParallelStrategy)


TENSOR_PARALLEL = ("A quantized network cannot be split by tensor parallelism: its quantizers need whole weights. Use "
                   "ModelParallelStrategy(data_parallel_size=<all devices>, tensor_parallel_size=1).")


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
                whole = {name: _whole(value) for name, value in state["state"].get(index, {}).items()}
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


def placed(value: Any, like: Any) -> Any:
    """A whole tensor that is the same on all processes, sharded as ``like`` is; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and (
            value.shape == like.shape):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


def local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in its memory; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor that is to be sharded as ``like`` is."""
    return local(placed(value, like))


def gathered(part: Tensor, like: Any) -> Tensor:
    """A copy of the whole tensor of which each process has a part, as it has of ``like``; all processes call this."""
    if not isinstance(like, DTensor):
        return part.clone()
    return cast(Tensor, _whole(DTensor.from_local(part, like.device_mesh, like.placements, run_check=False,
                                                  shape=like.shape, stride=like.stride())))


def _whole(value: Any) -> Any:
    """A sharded tensor gathered, in the memory of the host; anything else as it is. For all processes to call."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
