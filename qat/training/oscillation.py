"""Weights that oscillate between two codes: dampen them, or freeze them (Nagel et al. 2022).

With a straight-through gradient, a weight near the boundary of two codes jumps between them at every few steps, at any
learning rate; batch-norm statistics and neighbours then chase a moving target. It matters at 4 bits and below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from qat.calibration import processes
from qat.errors import ConfigError
from qat.modules.base import QuantizedModule
from qat.numerics.tensor import QuantizedTensor
from qat.rewriter import quantized_modules
from qat.training.callbacks import prepared_network, total_steps
from qat.training.sharding import placed


class Oscillations(L.Callback):
    """Dampen oscillating weights by a pull to the middle of their bins, or freeze those that oscillate most.

    Dampening adds ``strength * sum (w - dequantized(w))^2`` over all weights inside their grids to the loss; here its
    gradient is added to the weights' before the optimizer's step, which is the same and needs no other loss.

    Freezing follows how often each weight jumps back to where it came from, as an exponential moving average. Where it
    exceeds the threshold, the weight is held in the middle of the bin of its average code for the rest of the run.

    Both grow along a cosine: the strength from 0, the threshold down from ``4 * freeze_above``. Their state is saved,
    so a resumed run ends with the same bits.

    Args:
        dampening: the strength at the end of the run; 0: none.
        freeze_above: the threshold at the end of the run, in oscillations per step; None: nothing is frozen.
        momentum: of the moving averages.

    Raises:
        ConfigError: negative values; when training starts: weights to be frozen that a parametrization computes.
    """

    def __init__(self, dampening: float = 0.0, freeze_above: float | None = None, momentum: float = 0.01) -> None:
        if dampening < 0:
            raise ConfigError(f"schedule.oscillation.dampening must be 0 or more, not {dampening}.")
        if freeze_above is not None and freeze_above <= 0:
            raise ConfigError(f"schedule.oscillation.freeze_above is a positive frequency or null, not {freeze_above}.")
        if not 0 < momentum <= 1:
            raise ConfigError(f"schedule.oscillation.momentum lies between 0 and 1, not {momentum}.")
        self.dampening, self.freeze_above, self.momentum = dampening, freeze_above, momentum
        self.history: dict[str, dict[str, Any]] = {}
        self.total_steps = 0
        self._seen_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    @property
    def active(self) -> bool:
        """Whether anything is to be done at all."""
        return bool(self.dampening) or self.freeze_above is not None

    @property
    def frozen(self) -> int:
        """How many weights are held."""
        return sum(int(state["frozen"].sum()) for state in self.history.values())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.total_steps, self._seen_step = total_steps(trainer, "Oscillations"), trainer.global_step
        network = prepared_network(pl_module)
        computed = [n for n, m in _trained(network) if not isinstance(m._parameters.get("weight"), nn.Parameter)]
        if self.freeze_above is not None and computed:
            raise ConfigError(
                f"Weights that a parametrization computes cannot be held: {', '.join(computed[:8])}. Leave out "
                "schedule.oscillation.freeze_above, or use dampening."
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        strength = self.dampening * (1 - self._remaining(trainer.global_step))
        if not strength:
            return
        network = prepared_network(pl_module)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        own = {name: p for name, p in network.named_parameters() if id(p) in trained}
        with processes.whole(network):  # a sharded parameter is another object in there
            optimized = {id(p): own[name] for name, p in network.named_parameters() if name in own}
            for _, module in _trained(network):
                leaves = [p for p in module.parameters() if id(p) in optimized]
                if not leaves:
                    continue
                with torch.enable_grad():
                    weight = module.weight_matrix()
                pull = (2 * strength * _distance(weight.detach(), _codes(module))).to(weight.dtype)
                for leaf, gradient in zip(leaves, torch.autograd.grad(weight, leaves, pull, allow_unused=True)):
                    total = optimized[id(leaf)].grad
                    if gradient is not None and total is not None:
                        total.add_(placed(gradient, total))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.freeze_above is None or trainer.global_step == self._seen_step:
            return  # gradients are still being accumulated
        self._seen_step = trainer.global_step
        threshold = self.freeze_above * (1 + 3 * self._remaining(trainer.global_step))
        network = prepared_network(pl_module)
        weights = {name: module._parameters.get("weight") for name, module in quantized_modules(network).items()}
        with processes.whole(network):
            held = {name: self._follow(name, module, threshold) for name, module in _trained(network)}
        for name, value in held.items():
            weight = weights[name]
            if value is not None and weight is not None:
                weight.detach().copy_(placed(value, weight))

    def _remaining(self, step: int) -> float:
        """From 1 at the beginning to 0 at the end of the run, along a cosine."""
        return 0.5 * (1 + math.cos(math.pi * min(step / max(self.total_steps, 1), 1.0)))

    @torch.no_grad()
    def _follow(self, name: str, module: QuantizedModule, threshold: float) -> Tensor | None:
        """Count the jumps of one weight's codes and freeze what oscillates; returns the weight with frozen values put
        back, None where nothing can be frozen yet."""
        weight = _codes(module)
        codes, fmt = weight.codes, weight.spec.fmt
        state = self.history.get(name)
        if state is None or state["format"] != fmt.name:  # the first step, or the first on another rung of a ladder
            self.history[name] = {
                "format": fmt.name, "codes": codes.clone(), "average": codes.float(),
                "direction": torch.zeros_like(codes, dtype=torch.int8), "frequency": torch.zeros_like(codes.float()),
                "frozen": torch.zeros_like(codes, dtype=torch.bool),
            }  # fmt: skip
            return None
        state |= {key: value.to(codes.device) for key, value in state.items() if isinstance(value, Tensor)}
        frozen = state["frozen"]
        jump = (codes.short() - state["codes"].short()).sign().to(torch.int8)
        back = (jump != 0) & (jump == -state["direction"])
        state["direction"] = torch.where(jump != 0, jump, state["direction"])
        state["frequency"].lerp_(back.float(), self.momentum)
        state["average"].lerp_(codes.float(), self.momentum)
        new = (state["frequency"] > threshold) & ~frozen
        middle = state["average"].round().clamp(fmt.lo, fmt.hi)
        if fmt.grid == "sign":
            middle = torch.where(state["average"] >= 0, 1.0, -1.0)
        # a frozen weight keeps the code it was frozen with, whatever the optimizer has done to it
        state["codes"] = torch.where(frozen, state["codes"], torch.where(new, middle.to(codes.dtype), codes))
        state["frozen"] = frozen | new
        held = QuantizedTensor(state["codes"], weight.scale, weight.zero_point, weight.spec).dequantize(torch.float32)
        matrix = module.weight_matrix()
        return module.weight_from_matrix(torch.where(state["frozen"], held.to(matrix.dtype), matrix))


def _trained(network: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """The modules whose quantized weight is trained, each shared weight once."""
    for name, module in quantized_modules(network).items():
        if module.weight_quantizer is not None and module.plan.tied_to is None and module.weight.requires_grad:
            yield name, module


@torch.no_grad()
def _codes(module: QuantizedModule) -> QuantizedTensor:
    return module.quantized_weight()


def _distance(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """How far each weight lies from the value of its code, float32; 0 where it lies beyond the ends of its grid."""
    fmt, codes = quantized.spec.fmt, quantized.codes
    distance = weight.float() - quantized.dequantize(torch.float32)
    if fmt.grid == "sign":
        return distance  # two values and nothing between them: all weights are on their way to one
    beyond = ((codes == fmt.hi) & (distance > 0)) | ((codes == fmt.lo) & (distance < 0))
    return distance.masked_fill_(beyond, 0.0)
