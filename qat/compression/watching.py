"""What networks compute on the way: hooks for hidden layers and attention maps, for as long as somebody watches."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from qat.errors import ConfigError, nearest
from qat.modules.base import QuantizedModule
from qat.modules.normalization import Absorbed, QuantizedBatchNorm
from qat.numerics.tensor import QuantizedTensor
from qat.tracing import uncompiled

Said = dict[str, Tensor]
"""What a network computed, by place: ``logits``, ``hidden/<layer>/<call>``, ``attention/<layer>/<call>``."""


@contextmanager
def watching(network: nn.Module, hidden: Sequence[str] = (), attention: Sequence[str] = ()) -> Iterator[Said]:
    """Collect what the named layers of ``network`` compute in the calls inside the block, with its gradient.

    Codes are dequantized. An activation function that quantizers absorbed is applied, so that a block of a quantized
    network shows what the same block of the float network shows. ``nn.MultiheadAttention`` is asked for the map of each
    head, and its caller gets what it asked for. Where layers are named, compiled networks run uncompiled. The hooks are
    gone after the block.

    Raises:
        ConfigError: a layer is not there, or its output is not what was asked for; the message names it.
    """
    said: Said = {}
    handles: list[Any] = []
    absorbing = _Absorbing()

    def keep(kind: str, name: str, value: Tensor) -> None:
        call = next(i for i in itertools.count() if f"{kind}/{name}/{i}" not in said)
        said[f"{kind}/{name}/{call}"] = value

    def layer(name: str) -> Callable[..., None]:
        return lambda module, args, output: keep("hidden", name, absorbing.value(output, name))

    def map_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: keep("attention", name, _map(output, name))

    try:
        if hidden:
            handles += absorbing.hooks(network)
        for name in hidden:
            handles.append(named_layer(network, name).register_forward_hook(layer(name)))
        for name in attention:
            module = named_layer(network, name)
            if isinstance(module, nn.MultiheadAttention):
                handles += _ask_for_maps(module, functools.partial(keep, "attention", name))
            else:
                handles.append(module.register_forward_hook(map_of(name)))
        with _layer_by_layer() if handles else nullcontext():
            yield said
    finally:
        for handle in handles:
            handle.remove()


class _Absorbing:
    """Follows values past activation functions that quantizers have taken over, in a prepared or deployed network.

    Such a function returns its input. Where the quantizer *behind* it clamps, the value still lacks the activation
    (``lacking``); where the quantizer *in front* of it clamps, a layer's output has it too early (``early``).
    """

    def __init__(self) -> None:
        self.lacking: dict[int, tuple[Any, Absorbed]] = {}  # with the value itself, so that its key stays its own
        self.early: dict[int, Any] = {}

    def hooks(self, network: nn.Module) -> list[Any]:
        handles = []
        for module in network.modules():
            if isinstance(module, Absorbed):
                handles.append(module.register_forward_hook(self._passed))
            elif isinstance(module, QuantizedModule | QuantizedBatchNorm):
                handles.append(module.register_forward_hook(self._made))
        return handles

    def _passed(self, module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, Absorbed)
        if self.early.pop(_key(output), None) is None and isinstance(output, Tensor):
            self.lacking[_key(output)] = output, module

    def _made(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, QuantizedBatchNorm):
            producer = module._producer[0] if module._producer else None
            clamps = producer is not None and bool(producer.plan.output_absorbs) and not producer.folds()
        else:
            assert isinstance(module, QuantizedModule)
            apart = bool(module._batch_norm) and not module.folds()
            clamps = bool(module.plan.output_absorbs) and not apart
        if clamps and isinstance(output, Tensor | QuantizedTensor):
            self.early[_key(output)] = output

    def value(self, output: Any, name: str) -> Tensor:
        """A layer's output as a float tensor of its own (later steps may overwrite the one that the network uses)."""
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, nn.utils.rnn.PackedSequence):
            output = output.data
        if not isinstance(output, Tensor | QuantizedTensor):
            raise ConfigError(f"distill.hidden: {name} returns a {type(output).__name__}, not a tensor.")
        if _key(output) in self.early:
            raise ConfigError(
                f"distill.hidden: the output of {name} is quantized with the activation function behind it inside; "
                "name that activation function, or the block that ends with it."
            )
        if isinstance(output, QuantizedTensor):
            return output.dequantize()
        value = output.clone()
        if _key(output) in self.lacking:
            absorbed = self.lacking[_key(output)][1]
            value = super(Absorbed, absorbed).forward(value)  # the function that was absorbed
        return value


def _key(value: Any) -> int:
    """Equal for a tensor and its views; for codes, the object."""
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and value.numel() else id(value)


def _ask_for_maps(module: nn.MultiheadAttention, keep: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that make an attention layer compute the map of each head, (batch, heads, queries, keys)."""
    asked: list[tuple[bool, bool]] = []
    signature = inspect.signature(nn.MultiheadAttention.forward)

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        asked.append((values["need_weights"], values["average_attn_weights"]))
        values["need_weights"], values["average_attn_weights"] = True, False
        return bound.args[1:], bound.kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        wanted, average = asked.pop()
        result, maps = output
        keep(maps)
        if not wanted:
            return result, None
        return result, maps.mean(-3) if average else maps

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def _map(output: Any, name: str) -> Tensor:
    """The attention map in what a module returned."""
    found = output[1] if isinstance(output, tuple | list) and len(output) > 1 else output
    if isinstance(found, QuantizedTensor):
        found = found.dequantize()
    if not isinstance(found, Tensor) or found.ndim < 3:
        raise ConfigError(
            f"distill.attention: {name} returns no attention map of (..., heads, queries, keys). Name an "
            "nn.MultiheadAttention, a module that returns (output, map) or the softmax; models of the transformers "
            "library need attn_implementation='eager'."
        )
    return found.clone()


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """No compiled network and no fast path of nn.TransformerEncoder meanwhile: both pass the hooks of layers by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def bare(network: nn.Module) -> nn.Module:
    """The network itself, without what ``torch.compile`` or distributed training has wrapped around it."""
    while isinstance(network, OptimizedModule | nn.parallel.DistributedDataParallel):
        network = network._orig_mod if isinstance(network, OptimizedModule) else network.module
    return network


def named_layer(network: nn.Module, name: str) -> nn.Module:
    """The layer of that name; :class:`~qat.errors.ConfigError` with the nearest name if there is none."""
    found = dict(bare(network).named_modules(remove_duplicate=False))
    if name not in found or not name:
        raise ConfigError(f"distill: there is no layer {name!r}{nearest(name, found) or '.'}")
    return found[name]


def refuse_absorbing(network: nn.Module, name: str) -> None:
    """Refuse a layer whose output is quantized together with the activation function behind it."""
    module = named_layer(network, name)
    if isinstance(module, QuantizedBatchNorm) and module._producer:
        plan = module._producer[0].plan
    elif isinstance(module, QuantizedModule):
        plan = module.plan
    else:
        return
    if plan.output_absorbs and (isinstance(module, QuantizedBatchNorm) or not plan.batch_norm):
        raise ConfigError(f"distill.hidden: the output of {name} is quantized with the activation function behind it "
                          "inside; name that activation function, or the block that ends with it.")  # fmt: skip


def refuse_folded(teacher: nn.Module, name: str) -> None:
    """Refuse a layer of a quantized teacher that holds the batch norm behind it: the student's does not in training."""
    module = named_layer(teacher, name)
    if isinstance(module, QuantizedModule) and module.plan.batch_norm:
        raise ConfigError(f"distill.hidden: {name} of the teacher holds the batch norm behind it; name "
                          f"{module.plan.batch_norm} instead.")  # fmt: skip
