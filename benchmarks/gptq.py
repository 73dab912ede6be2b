"""GPTQ on one linear layer, int4 in groups of 128, against every library with GPTQ on a CPU that is installed.

    python benchmarks/gptq.py                 # 4096 x 4096
    python benchmarks/gptq.py 1024 2048 5     # outputs, inputs, rounds

All get the same weight and the same Hessian and run alternately in one process, seconds are the least of several
rounds: from the Hessian to the rounded weight, with activation ordering (``ordered``) and without. Errors are
``tr(E H E^T) / tr(W H W^T)``. The row ``as published`` is Frantar et al.'s algorithm written down plainly. Target: no
longer than the fastest library.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable

import torch
from harness import machine, table
from torch import Tensor, nn

from qat.calibration.gptq import gptq, output_error, ranges
from qat.numerics import affine
from qat.numerics.formats import TensorSpec

GROUP, DAMP, BLOCK = 128, 0.01, 128
SPEC = TensorSpec("int4", "per_group", GROUP).for_weight()

Method = Callable[[Tensor, Tensor, bool], Tensor]
"""(weight, hessian, ordered) -> the weight with values of codes."""


def ours(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    codes, scale, zero_point = gptq(weight, hessian, SPEC, damp=DAMP, order=ordered)
    return affine.dequantize(codes, scale, zero_point, SPEC)


def nearest(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    scale, zero_point = ranges(weight, SPEC)
    return affine.dequantize(affine.quantize(weight, scale, zero_point, SPEC), scale, zero_point, SPEC)


def published(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    """The inverse of the Hessian, its Cholesky factor, and blocks of columns whose errors are passed on lazily."""
    inputs = len(hessian)
    turn = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(inputs)
    scale, _ = ranges(weight, SPEC)
    w, h = weight[:, turn], hessian[turn][:, turn]
    h.diagonal().add_(DAMP * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for low in range(0, inputs, BLOCK):
        high = min(low + BLOCK, inputs)
        block, local = w[:, low:high].clone(), inverse[low:high, low:high]
        errors = torch.zeros_like(block)
        for i in range(high - low):
            if not ordered and (low + i) % GROUP == 0:
                scale[:, (low + i) // GROUP] = ranges(block[:, i : i + GROUP], SPEC)[0][:, 0]
            step = scale[:, int(turn[low + i]) // GROUP]
            value = (block[:, i] / step).round().clamp(SPEC.fmt.lo, SPEC.fmt.hi) * step
            errors[:, i] = (block[:, i] - value) / local[i, i]
            block[:, i:] -= errors[:, i : i + 1] * local[i, i:]
            w[:, low + i] = value
        w[:, high:] -= errors @ inverse[low:high, high:]
    return w[:, turn.argsort()]


def llmcompressor(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP,
                            actorder="static" if ordered else None)
    scale, _ = ranges(weight, SPEC)
    values, *_ = quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None],
                                 torch.zeros_like(scale[None]), None, args, BLOCK, DAMP)
    return values[0]


def gptqmodel(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=ordered, act_group_aware=False,
                            static_groups=ordered, damp_percent=DAMP)
    task = GPTQ(layer, config)
    task.H, task.nsamples, task._hessian_total_samples = hessian.clone(), 1024, 1024
    task.quantizer.configure(perchannel=True)
    return task.quantize(blocksize=BLOCK)[0]


def neural_compressor(weight: Tensor, hessian: Tensor, ordered: bool) -> Tensor:
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    task = GPTQ(layer, weight)
    task.H = hessian.clone()
    task.quantizer.configure({"bits": 4, "sym": True, "perchannel": True, "mse": False, "dtype": "int",
                              "double_quant_sym": True, "use_double_quant": False})
    *_, values = task.fasterquant(weight.clone(), BLOCK, DAMP, GROUP, act_order=ordered, static_groups=ordered)
    return values


METHODS: dict[str, Method] = {"nearest": nearest, "ours": ours, "as published": published}
LIBRARIES: dict[str, Method] = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel,
                                "neural_compressor": neural_compressor}


def main(outputs: int = 4096, inputs: int = 4096, rounds: int = 3) -> None:
    torch.manual_seed(0)
    methods = METHODS | {n: f for n, f in LIBRARIES.items() if importlib.util.find_spec(n)}
    weight = torch.randn(outputs, inputs) * 0.02
    x = torch.randn(2 * inputs, inputs // 4) @ torch.randn(inputs // 4, inputs) + torch.randn(2 * inputs, inputs)
    x *= torch.rand(inputs).add(0.1)
    hessian = x.t() @ x / len(x)
    whole = float(output_error(weight, hessian))
    for ordered in (True, False):
        seconds: dict[str, list[float]] = {}
        errors: dict[str, str] = {}
        for _ in range(rounds):
            for name, method in list(methods.items()):
                start = time.perf_counter()
                try:
                    with torch.no_grad():
                        values = method(weight, hessian, ordered)
                except Exception as error:     # a library of another version: said, not hidden
                    print(f"{name}: {type(error).__name__}: {error}")
                    del methods[name]
                    continue
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                if name not in errors:
                    errors[name] = f"{float(output_error(weight - values.float(), hessian)) / whole:.5f}"
        least = {name: min(times) for name, times in seconds.items()}
        table(f"GPTQ, {outputs} x {inputs}, int4, groups of {GROUP}, {'ordered' if ordered else 'in order of inputs'}"
              f" ({machine()})", ["", "seconds", "to ours", "output error"],
              [[name, f"{s:.2f}", f"{s / least['ours']:.2f}", errors[name]] for name, s in least.items()])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
