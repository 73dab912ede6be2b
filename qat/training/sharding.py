"""Fully sharded training (FSDP2) of prepared networks: each process keeps a part of every master weight."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from qat.errors import ConfigError


def shard(network: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Shard the parameters of a prepared network, equal on all of them, over the processes, in place; returns it.

    The network is one unit: its parameters are gathered for a forward or a backward and sharded again behind it, and
    gradients and the optimizer's state stay sharded. A unit for each layer would be smaller, but batch norms are folded
    into, and tied weights quantized in, layers that lie elsewhere. Scales are a few numbers (FSDP2 takes no scalars):
    every process keeps all of them, and averages their gradients.

    Shard before the optimizer is made; calibrate before or after. Call it on all processes. The whole weights are in
    ``torch.distributed.checkpoint.state_dict.get_model_state_dict(network, options=StateDictOptions(
    full_state_dict=True))``: load them into a network prepared alike, and convert that.

    Args:
        mesh: a ``DeviceMesh`` of one dimension; None: all processes.
        options: of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        ConfigError: there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("sharding needs several processes: call torch.distributed.init_process_group first.")
    scales = {p for m in network.modules() if getattr(m, "is_quantizer", False) for p in m.parameters()}
    group = None if mesh is None else mesh.get_group()
    size = dist.get_world_size(group)

    def average(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= size

    for scale in scales:
        if scale.requires_grad:
            scale.register_post_accumulate_grad_hook(average)
    fully_shard(network, mesh=mesh, ignored_params=scales, **options)
    return network
