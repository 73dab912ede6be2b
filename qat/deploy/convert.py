"""``convert`` is freeze: packed codes take the place of float weights; a certificate proves that nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.compression.adapters import merge_adapters
from qat.compression.pruning import sparsity
from qat.errors import ConvertError, NotCalibratedError, ParityError
from qat.modules.base import QuantizedModule
from qat.modules.normalization import QuantizedBatchNorm
from qat.modules.precision import NarrowFloat
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import Quantizer, StaticQuantizer
from qat.rewriter import is_sharded, prepared_state, quantized_modules
from qat.tracing import evaluating, leaves, run


@dataclass
class Certificate:
    """Proof that a deployed model computes what the prepared one computed, on the caller's data.

    Attributes:
        batches, samples: how much data was compared.
        layers: module name -> greatest difference of its weight codes and of its input codes.
        max_output_difference: greatest absolute difference of any output of the model.
        prediction_agreement: share of equal ``argmax`` over the last dimension of the first output; 1.0 if it has none.
        equal: whether every output was equal bit for bit.
        sparsity: layer -> zeros found in its packed integers, see :func:`qat.sparsity`.
    """

    batches: int = 0
    samples: int = 0
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    max_output_difference: float = 0.0
    prediction_agreement: float = 1.0
    equal: bool = True
    sparsity: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def total_sparsity(self) -> float:
        """Share of the packed integers that are level 0; 0 for a model without any."""
        weights = sum(s["weights"] for s in self.sparsity.values())
        return sum(s["zeros"] for s in self.sparsity.values()) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": {n: dict(v) for n, v in self.layers.items()},
                "total_sparsity": self.total_sparsity, "sparsity": {n: dict(v) for n, v in self.sparsity.items()}}

    def __str__(self) -> str:
        worst = max((max(v.values(), default=0) for v in self.layers.values()), default=0)
        return (f"{len(self.layers)} layers, {self.samples} samples: greatest code difference {worst}, greatest output "
                f"difference {self.max_output_difference:g}, predictions equal {self.prediction_agreement:.2%}, "
                f"{'equal bit for bit' if self.equal else 'NOT EQUAL'}, {self.total_sparsity:.1%} of the weights are 0")


def convert(model: nn.Module, batches: Iterable[Any], inplace: bool = False) -> tuple[nn.Module, Certificate]:
    """Freeze a prepared model into real integer weights, and prove it.

    Args:
        model: a prepared, calibrated model.
        batches: data for the certificate: any iterable of inputs, at least one.
        inplace: freeze ``model`` itself instead of a copy; then the comparison runs on a copy made before.

    Returns:
        The deployed model, in eval, without gradients, and without a float copy of any quantized weight; and the
        :class:`Certificate`.

    Raises:
        NotCalibratedError: static ranges without data, all of them named.
        ConvertError: function calls were never observed; an unfrozen quantizer is left; no batch for the certificate.
        ParityError: the deployed model differs from the prepared one.
    """
    state = prepared_state(model)
    modules = quantized_modules(model)
    if any(m.frozen for m in modules.values()):
        raise ConvertError("this model is deployed already")
    if is_sharded(model):
        raise ConvertError("each process has a part of this model's weights only: convert qat.training.gather(model), "
                           "made on all processes, or use qat.training.deploy(module, batches)")
    missing = [q.name for m in modules.values() for q in m.activation_quantizers().values()
               if not q.calibrated and not _ready(q)]
    if missing:
        raise NotCalibratedError(f"no range yet for {', '.join(missing)}: run qat.calibrate(model, batches); a layer "
                                 "that the data never reaches needs a rule with keep: float32")
    climbing = [q.name for q in model.modules() if isinstance(q, Quantizer) and q.spec != q.own]
    if climbing:
        raise ConvertError(f"still on a higher rung of a ladder: {', '.join(climbing[:8])}; finish the training, or "
                           "call qat.set_rung(model, batches)")
    if state.functions is None:
        raise ConvertError("it is not known which matrix products this model calls as functions: give "
                           "qat.prepare(model, recipe, example_inputs=...), or run qat.calibrate(model, batches)")
    broken = [n for n, t in (*model.named_parameters(), *model.named_buffers())
              if t.is_floating_point() and _is_state(n) and not bool(torch.isfinite(t).all())]
    if broken:
        raise ConvertError(f"NaN or infinity in {', '.join(broken[:8])}: training has diverged; go back to an earlier "
                           "checkpoint")
    batches = list(batches)
    if not batches:
        raise ConvertError("the certificate needs at least one batch: convert(model, batches)")
    prepared, deployed = (copy.deepcopy(model), model) if inplace else (model, copy.deepcopy(model))
    freeze(deployed)
    certificate = certify(prepared, deployed, batches)
    deployed.__dict__["_qat_certificate"] = certificate.to_dict()
    return deployed, certificate


def _is_state(name: str) -> bool:
    """Whether a tensor is the model's own: quantizers start out with NaN for "not known yet"."""
    return not any(part.endswith("_quantizer") for part in name.split("."))


def _ready(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, StaticQuantizer) and not quantizer.observer.empty


def freeze(model: nn.Module) -> None:
    """Freeze every quantized module of ``model``, in place; see :func:`convert` for the proof."""
    model.eval()
    for part in model.modules():
        if isinstance(part, NarrowFloat):
            part.freeze()
    merge_adapters(model, inplace=True)
    modules = quantized_modules(model)
    for module in modules.values():
        with torch.no_grad():
            module.freeze()
    share_codes(modules)
    drop_folded(model)
    model.requires_grad_(False)
    left = [n for n, m in model.named_modules() if isinstance(m, StaticQuantizer)]
    if left:
        raise ConvertError(f"convert left unfrozen quantizers: {', '.join(left)}")


def resident_bytes(model: nn.Module) -> int:
    """Bytes that a model holds: parameters, buffers, unpacked codes, and what its kernels have packed until now.

    What is shared is counted once; a checkpoint is smaller, as it holds packed codes alone.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = list(model.modules())
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.is_mkldnn:         # packed by oneDNN, whose storage torch does not see
                sizes[id(value)] = value.numel() * value.element_size()
            else:
                storage = value.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, nn.Module) or type(value).__module__.startswith("qat."):
            left += getattr(value, "__dict__", {}).values()
    return sum(sizes.values())


def share_codes(modules: dict[str, QuantizedModule]) -> None:
    """Modules with a tied weight hold the same code buffers."""
    for module in modules.values():
        if module.plan.tied_to is not None:
            owner = modules[module.plan.tied_to]
            for key in ("weight_codes", "weight_scale", "weight_zero_point"):
                module._buffers[key] = owner._buffers[key]


def drop_folded(model: nn.Module) -> None:
    """Replace batch norms that are folded into frozen layers, and do nothing any more, by identities.

    Absorbed activation functions do nothing either, but stay: they hold nothing, and say which function a quantizer
    computes in their place (distillation looks at such layers).
    """
    folded = {m.plan.batch_norm for m in quantized_modules(model).values() if m.plan.batch_norm and m.frozen}
    names = {id(m): n for n, m in model.named_modules()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, QuantizedBatchNorm) and names[id(child)] in folded:
                identity: nn.Module = nn.Identity()
                identity.training = child.training
                parent._modules[key] = identity


class _Tap:
    """Collects the codes that enter each quantized module."""

    def __init__(self, model: nn.Module) -> None:
        self.codes: dict[str, list[Tensor]] = {}
        self.handles = [module.register_forward_pre_hook(self.hook(name))
                        for name, module in quantized_modules(model).items()]

    def hook(self, name: str):
        def tap(module: QuantizedModule, args: tuple[Any, ...]) -> None:
            for position, x in enumerate(args):
                quantizer = module.quantizer_of(position)
                if isinstance(x, QuantizedTensor):
                    self.codes.setdefault(name, []).append(x.codes)
                elif isinstance(x, Tensor) and x.is_floating_point() and quantizer is not None:
                    self.codes.setdefault(name, []).append(quantizer.codes(x))
        return tap

    def take(self) -> dict[str, list[Tensor]]:
        taken, self.codes = self.codes, {}
        return taken

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def certify(prepared: nn.Module, deployed: nn.Module, batches: Iterable[Any]) -> Certificate:
    """Compare two models on the same data, in eval, without gradients.

    Raises:
        ParityError: any code or any output differs; the message names the first layer.
    """
    certificate = Certificate(sparsity=sparsity(deployed))
    frozen = quantized_modules(deployed)
    watching = [(q, q.observing) for q in prepared.modules() if isinstance(q, Quantizer)]
    for q, _ in watching:
        q.observing = False  # ranges stand still while they are compared
    taps = _Tap(prepared), _Tap(deployed)
    agree = asked = compared = 0
    with evaluating(prepared), evaluating(deployed), _requiring_no_gradient(prepared), torch.no_grad():
        for name, module in quantized_modules(prepared).items():
            record = certificate.layers.setdefault(name, {})
            if module.plan.weight is not None:
                trained, shipped = module.quantized_weight(), frozen[name].quantized_weight()
                record["weight_codes"] = _difference(trained.codes, shipped.codes)
                gain, _ = module.folded()
                if not torch.equal(trained.scale if gain is None else trained.scale * gain, shipped.scale):
                    raise ParityError(f"{name}: the deployed weight differs from the prepared one in its scales")
        try:
            for batch in batches:
                expected, actual = run(prepared, batch), run(deployed, batch)
                theirs, ours = taps[0].take(), taps[1].take()
                if {n: len(c) for n, c in theirs.items()} != {n: len(c) for n, c in ours.items()}:
                    raise ParityError("the deployed model calls its layers in another way than the prepared one: "
                                      f"{ {n: len(c) for n, c in theirs.items()} } against "
                                      f"{ {n: len(c) for n, c in ours.items()} }")
                for name, old in theirs.items():
                    record, new = certificate.layers[name], ours[name]
                    record["input_codes"] = max(record.get("input_codes", 0),
                                                *(_difference(a, b) for a, b in zip(old, new, strict=True)))
                a, b = outputs(expected), outputs(actual)
                certificate.batches += 1
                compared += sum(t.numel() for t in a)
                certificate.samples += a[0].shape[0] if a and a[0].dim() else 1
                for one, other in zip(a, b, strict=True):
                    if not torch.equal(one, other) and not _same_with_nan(one, other):
                        certificate.equal = False
                        gap = (one.double() - other.double()).abs().max() if one.shape == other.shape else torch.inf
                        certificate.max_output_difference = max(certificate.max_output_difference, float(gap))
                if a and a[0].dim() > 1 and a[0].shape[-1] > 0:
                    agree += int((a[0].argmax(-1) == b[0].argmax(-1)).sum())
                    asked += a[0][..., 0].numel()
        finally:
            for tap in taps:
                tap.close()
            for q, observing in watching:
                q.observing = observing
    if not compared:
        raise ConvertError("the certificate compared nothing: give batches with samples, and a model that returns "
                           "tensors")
    if asked:
        certificate.prediction_agreement = agree / asked
    wrong = [n for n, record in certificate.layers.items() if max(record.values(), default=0) > 0]
    if wrong or not certificate.equal:
        where = f"first at {wrong[0]}" if wrong else (
            "in floating point between the quantized layers (where a function reads the weight of a layer, prepare "
            "sees it only with example_inputs)")
        raise ParityError(f"the deployed model differs from the prepared one, {where}: {certificate}")
    return certificate


@contextmanager
def _requiring_no_gradient(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` requires a gradient inside the block, as none of a deployed model does.

    torch chooses kernels by it, even under ``no_grad``: a matrix product that stays float has other last bits then,
    where its input is strided (nn.MultiheadAttention with ``batch_first``).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def outputs(result: Any) -> list[Tensor]:
    """All tensors in what a model returned, codes as values."""
    found = leaves(result.to_tuple() if hasattr(result, "to_tuple") else result)
    return [t.dequantize() if isinstance(t, QuantizedTensor) else t for t in found
            if isinstance(t, Tensor | QuantizedTensor)]


def _same_with_nan(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan() & b.isnan() if a.shape == b.shape and a.is_floating_point() else torch.zeros((), dtype=torch.bool)
    return bool(nan.any()) and torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


def _difference(a: Tensor, b: Tensor) -> int:
    if a.shape != b.shape:
        return 2**31
    return int((a.int() - b.int()).abs().max()) if a.numel() else 0
