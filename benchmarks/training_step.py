"""One quantized training step against the float32 step: time and peak memory.

    python benchmarks/training_step.py            # both blocks, all variants; peers where installed
    python benchmarks/training_step.py mlp

Steps (forward, backward, SGD) run alternately in one process, medians; peak memory is the allocator's, each variant in
a process of its own. Targets: at most 0.75x with a bfloat16 backward, 1.0x with a float32 backward, 1.0x the memory.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable

import torch
from harness import allocator_peak, alternate, in_fresh_process, machine, table
from torch import nn

import qat


class MLPBlock(nn.Module):
    """Residual block: LayerNorm, Linear 512 -> 2048, GELU, Linear back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*[MLPBlock() for _ in range(4)]), torch.randn(512, 512)


def conv() -> tuple[nn.Module, torch.Tensor]:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(64, 64, 28, 28).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(50):  # until the batch norms know the data, or ranges are not those of training
            model(x)
    return model, x


BLOCKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"mlp": mlp, "conv": conv}


def integer(model: nn.Module, x: torch.Tensor, backward: str, preset: str = "w8a8") -> nn.Module:
    prepared = qat.prepare(model, qat.Recipe.preset(preset, backward_dtype=backward), example_inputs=x)
    return qat.calibrate(prepared, [x])


def torchao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


def quanto(model: nn.Module, x: torch.Tensor) -> nn.Module:
    from optimum.quanto import Calibration, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        model(x)
    return model


def brevitas(model: nn.Module, x: torch.Tensor) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    for name, module in list(model.named_modules()):
        options = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
        new: nn.Module | None = None
        if type(module) is nn.Linear:
            new = qnn.QuantLinear(module.in_features, module.out_features, module.bias is not None, **options)
        elif type(module) is nn.Conv2d:
            new = qnn.QuantConv2d(module.in_channels, module.out_channels, module.kernel_size, padding=module.padding,
                                  bias=module.bias is not None, **options)
        if new is not None:
            new.load_state_dict(module.state_dict(), strict=False)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new)
    return model.to(memory_format=torch.channels_last) if x.dim() == 4 else model


VARIANTS: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], nn.Module]]] = {
    "float32": ("torch", lambda model, x: model),
    "qat w8a8, bfloat16 backward": ("qat", lambda m, x: integer(m, x, "bfloat16")),
    "qat w8a8, float32 backward": ("qat", lambda m, x: integer(m, x, "float32")),
    "qat w8a8 dynamic, bfloat16 backward": ("qat", lambda m, x: integer(m, x, "bfloat16", "w8a8_dynamic")),
    "torchao int8 x int8": ("torchao", torchao),
    "quanto w8a8": ("optimum.quanto", quanto),
    "brevitas w8a8": ("brevitas", brevitas),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def step(block: str, variant: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model, x = BLOCKS[block]()
    x.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = VARIANTS[variant][1](model, x.detach())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


def main(blocks: list[str]) -> None:
    print(machine())
    for block in blocks:
        steps: dict[str, Callable[[], object]] = {}
        for variant, (package, _) in VARIANTS.items():
            if installed(package):
                try:
                    steps[variant] = step(block, variant)
                    for _ in range(2):
                        steps[variant]()
                except Exception as error:
                    print(f"{block}: {variant} failed: {type(error).__name__}: {str(error)[:100]}")
                    steps.pop(variant, None)
        times = alternate(steps, rounds=40, budget=60.0)
        peaks = {v: int(in_fresh_process(__file__, "--peak", block, v) or 0) for v in times}
        base, base_peak = times["float32"], peaks["float32"]
        table(f"{block}: training step", ["variant", "ms", "ratio", "peak MB", "ratio"],
              [[v, f"{t * 1e3:.2f}", f"{t / base:.2f}", f"{peaks[v] / 2**20:.1f}", f"{peaks[v] / base_peak:.2f}"]
               for v, t in times.items()])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(allocator_peak(step(sys.argv[2], sys.argv[3])))
    else:
        chosen = sys.argv[1:] or list(BLOCKS)
        unknown = [b for b in chosen if b not in BLOCKS]
        if unknown:
            sys.exit(f"unknown block {unknown[0]!r}: choose from {', '.join(BLOCKS)}")
        main(chosen)
