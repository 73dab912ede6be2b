"""Fully sharded training (FSDP2) of prepared networks: each process keeps a part of every master weight."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qat.calibration import processes
from qat.errors import ConfigError

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""What Lightning calls of a module, instead of the module."""
NOTES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", processes.HOLDS)
REGISTRY = "__composable_api_state_key"
"""Attributes, and how those begin, that sharding gives to modules."""


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
    average_gradients(alike, None if mesh is None else mesh.get_group())
    fully_shard(network, mesh=mesh, ignored_params=alike, **options)
    network.register_forward_hook(_let_go)
    return network


def average_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
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
    if not torch.is_grad_enabled() and not processes.held(network):
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
    return cast(Tensor, whole_tensor(DTensor.from_local(part, like.device_mesh, like.placements, run_check=False,
                                                  shape=like.shape, stride=like.stride())))


def whole_tensor(value: Any) -> Any:
    """A sharded tensor gathered, in the memory of the host; anything else as it is. For all processes to call."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
