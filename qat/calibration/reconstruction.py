"""Block-wise reconstruction: the weights and scales of one block after another are trained to give its float output.

Between layer by layer, which sees no further than one product, and training the whole model, which takes labels and
time. (Li et al. 2021, BRECQ, arXiv 2102.05426; Chen et al. 2024, EfficientQAT, arXiv 2407.11062, its phase Block-AP.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.rounding import hold_codes, layer_stops, shared_weights, weight_parameter
from qat.calibration.walk import Arrival, walk
from qat.modules.base import QuantizedModule
from qat.numerics import affine
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import LearnedQuantizer, StaticQuantizer
from qat.tracing import leaves

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STANDARD = (*CONTAINERS, nn.Module)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a prepared model: modules that together hold each layer with a quantized weight once.

    A block is a module with a forward of its own and two layers or more, that is
    - a member of an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` (the outermost ones count, but not one
      that holds most of the model's layers while two or more such members are inside of it), or
    - somewhere else in the model, with at most half of its layers, and with less than two such members inside.

    Each layer outside of these is a block of its own.
    """
    layers = set(layer_stops(model).values())
    found: dict[str, nn.Module] = {}

    def search(name: str, module: nn.Module, parent: nn.Module) -> None:
        inner = layers.intersection(module.modules())
        if not inner or module in found.values():
            return
        small, members = 2 * len(inner) <= len(layers), _members(module, layers)
        whole = len(inner) > 1 and not _plain(module) and module is not model and (
            (small or members < 2) if isinstance(parent, CONTAINERS) else (small and members < 2))
        if module in layers or whole:
            found[name] = module
            return
        for key, child in module.named_children():
            search(f"{name}.{key}" if name else key, child, module)

    search("", model, model)
    return found


def _plain(module: nn.Module) -> bool:
    """Whether a module is a container and nothing more."""
    return isinstance(module, CONTAINERS) and "forward" not in {k for c in type(module).__mro__ if c not in STANDARD
                                                                for k in vars(c)}


def _members(module: nn.Module, layers: set[QuantizedModule]) -> int:
    """How many members of containers with a forward of their own and several layers are inside of a module."""
    if module in layers:
        return 0
    return sum(1 if isinstance(module, CONTAINERS) and not _plain(c) and len(layers.intersection(c.modules())) > 1
               else _members(c, layers) for c in module.children())


def outputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All floating point tensors that a block returns, in whatever structure; its arguments stay as they are."""
    args, kwargs = copy.deepcopy((args, kwargs))        # caches grow, and activation functions may work in place
    found = []
    for leaf in leaves(block(*args, **kwargs)):
        value = leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.float())
    return found


@dataclass
class Example:
    """One batch of a block: its arguments, and what the float block makes of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    power: float = field(init=False)

    def __post_init__(self) -> None:
        self.power = max(float(affine.TINY), sum(float(t.square().sum()) for t in self.targets))

    def error(self, block: nn.Module) -> Tensor:
        """The squared error of the block's output, relative to the output's square."""
        made = outputs(block, self.args, self.kwargs)
        return torch.stack([(y - t).square().sum() for y, t in zip(made, self.targets)]).sum() / self.power

    def fits(self, block: nn.Module) -> bool:
        """Whether the block returns tensors of the targets' shapes."""
        return [t.shape for t in outputs(block, self.args, self.kwargs)] == [t.shape for t in self.targets]


def _example(block: nn.Module, twin: nn.Module, arrival: Arrival) -> Example:
    """The batch with the float model's output on the float model's input, or, where that is another one, on its own."""
    if arrival.beside is not None:
        example = Example(arrival.args, arrival.kwargs, outputs(twin, arrival.beside.args, arrival.beside.kwargs))
        if example.fits(block):
            return example
    return Example(arrival.args, arrival.kwargs, outputs(twin, arrival.args, arrival.kwargs))


def block_error(block: nn.Module, examples: Sequence[Example]) -> float:
    """The relative output error of a block over all examples."""
    with torch.no_grad():
        return sum(float(e.error(block)) for e in examples) / len(examples)


# ------------------------------------------------------------------------------------------------ training a block


@dataclass
class Trained:
    """What is trained in a block.

    Attributes:
        products: layers and parts whose weights are.
        weights: parameter -> the step of the grid that it is put on, on average: the unit of its learning rate.
        scales: logarithms of scales.
    """

    products: list[QuantizedModule] = field(default_factory=list)
    weights: dict[nn.Parameter, float] = field(default_factory=dict)
    scales: list[nn.Parameter] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.weights, *dict.fromkeys(self.scales)]


def _trained(block: nn.Module, shared: set[str], notes: dict[str, str]) -> Trained:
    """What can be trained; a note for each product whose weight cannot."""
    trained, modules = Trained(), [m for m in block.modules() if isinstance(m, QuantizedModule)]
    for module in modules:
        for quantizer in module.activation_quantizers().values():
            if isinstance(quantizer, LearnedQuantizer) and quantizer.calibrated:
                trained.scales.append(quantizer.log_scale)
        own = module.weight_quantizer
        if own is None:
            continue
        if module.name in shared:
            notes[module.name] = "reconstruction: weight as it was, it is shared"
            continue
        parameter = weight_parameter(module)
        if parameter is None:
            notes[module.name] = "reconstruction: weight as it was, it is computed from others"
            continue
        assert isinstance(own, StaticQuantizer)
        trained.products.append(module)
        trained.weights.setdefault(parameter, float(own.present()[0].detach().mean()))
        if isinstance(own, LearnedQuantizer) and not own.frozen:
            trained.scales.append(own.log_scale)
    return trained


@contextmanager
def learning_scales(block: nn.Module, shared: set[str]) -> Iterator[None]:
    """The scales of weights are learned inside the block of code, where their grid allows it; then they stand still.

    Ranges that somebody has placed already stay as they are.
    """
    held: list[tuple[QuantizedModule, StaticQuantizer, LearnedQuantizer]] = []
    for module in [m for m in block.modules() if isinstance(m, QuantizedModule)]:
        static = module.weight_quantizer
        if (type(static) is not StaticQuantizer or static.frozen or module.name in shared or static.scores is not None
                or static.spec.symmetric is False or static.spec.power_of_two or static.spec.scale_dtype != "float32"):
            continue
        learned = LearnedQuantizer(static.spec.replace(learned="lsq"), static.shape).to(static.scale.device)
        learned.name, learned.mask = static.name, static.mask
        learned.place(static.present()[0])
        learned.frozen = False
        learned.train(static.training)
        held.append((module, static, learned))
        module.weight_quantizer = learned
    try:
        yield
    finally:
        for module, static, learned in held:
            module.weight_quantizer = static
            static.place(learned.present()[0].detach())


@contextmanager
def _differentiating(block: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only ``wanted`` requires gradients inside the block of code, and is float32; all flags come back afterwards."""
    flags = [(p, p.requires_grad, p.grad) for p in {*block.parameters(), *wanted}]
    dtypes = [(p, p.dtype) for p in wanted]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False).grad = None
        for parameter in wanted:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.grad = None
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
        for parameter, required, gradient in flags:
            parameter.requires_grad_(required).grad = gradient


def train_block(block: nn.Module, trained: Trained, examples: Sequence[Example], steps: int, learning_rate: float,
                scale_learning_rate: float) -> tuple[float, float]:
    """Train a block in eval (no dropout, no statistics) through its integer forward; the better of start and end stays.

    Adam, with rates that fall to zero along a cosine; one example for each step, in an order of their own.

    Returns:
        The block's relative output error before and after.
    """
    before = block_error(block, examples)
    if not trained.parameters:
        return before, before
    start = [p.detach().clone() for p in trained.parameters]
    generator, order = torch.Generator().manual_seed(0), list[int]()
    with _differentiating(block, trained.parameters):
        groups = [{"params": [p], "lr": learning_rate * unit} for p, unit in trained.weights.items()]
        scales = list(dict.fromkeys(trained.scales))
        groups += [{"params": scales, "lr": scale_learning_rate}] if scales else []
        optimizer = torch.optim.Adam(groups)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
        for _ in range(steps):
            order = order or torch.randperm(len(examples), generator=generator).tolist()
            loss = examples[order.pop()].error(block)
            if not loss.requires_grad:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    after = block_error(block, examples)
    if after < before:
        return before, after
    with torch.no_grad():
        for parameter, value in zip(trained.parameters, start):
            parameter.copy_(value)
    return before, before


# --------------------------------------------------------------------------------------------------------- driver


def reconstruct(model: nn.Module, batches: Sequence[Any], progress: Callable[[str, int, int], None] | None = None,
                *, reference: nn.Module, steps: int, learning_rate: float,
                scale_learning_rate: float) -> Mapping[str, str]:
    """Reconstruct every block (see :func:`blocks`) of a prepared model, in the order in which they run.

    A block's inputs are those that the reconstructed blocks before make; its output is to meet the float model's. What
    is trained are the weights, from where they are, and the scales: those of weights unless they are placed already,
    and those of activations that are learned. Afterwards the float weights lie on their grids.

    Memory: the inputs and outputs of one block for all batches, and the float copy.

    Args:
        model: prepared, with ranges; changed in place.
        reference: :func:`~qat.calibration.rounding.float_reference` of it before any rounding.
        steps: for each block.
        learning_rate: of weights, in steps of their grid.
        scale_learning_rate: of the logarithms of scales.

    Returns:
        A note for each product with a quantized weight.
    """
    stops, shared, notes, done = blocks(model), shared_weights(model), dict[str, str](), 0

    def work(name: str, arrivals: list[Arrival]) -> None:
        nonlocal done
        block, twin = stops[name], reference.get_submodule(name)
        with torch.no_grad():
            examples = [_example(block, twin, arrival) for arrival in arrivals]
        with learning_scales(block, shared):
            trained = _trained(block, shared, notes)
            before, after = train_block(block, trained, examples, steps, learning_rate, scale_learning_rate)
            codes = {p: p.quantized_weight().codes.detach() for p in trained.products}
        for product, chosen in codes.items():
            quantizer = product.weight_quantizer
            assert isinstance(quantizer, StaticQuantizer)
            quantizer.freeze_range()
            scale, zero_point = quantizer.present()
            trouble = hold_codes(product, chosen, scale.detach(), zero_point)
            notes[product.name] = (f"reconstruction of {name or 'the model'}: output error {before:.3g} -> {after:.3g}"
                                   + (f"; {trouble}" if trouble else ""))
        done += 1
        if progress is not None:
            progress("reconstruction", done, len(stops))

    missing = walk(model, batches, stops, work, beside=reference)
    for name in missing:
        for module in stops[name].modules():
            if isinstance(module, QuantizedModule) and module.weight_quantizer is not None:
                notes[module.name] = "reconstruction: weight as it was, no batch came here"
    return notes
