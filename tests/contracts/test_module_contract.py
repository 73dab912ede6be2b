"""The contract that every module type in the registry passes. A new type is one entry in ``CASES``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qat
from qat.deploy.convert import freeze
from qat.modules.attention_interface import AttentionContext, AttentionScores
from qat.modules.base import REGISTRY, QuantizedModule
from qat.modules.composite import Composite
from qat.numerics import packing


@dataclass
class Case:
    """How to build a module of one type, and a batch of inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


CASES: dict[type[nn.Module], Case] = {
    nn.Linear: Case(lambda: nn.Linear(6, 5), lambda: (torch.randn(4, 6),)),
    nn.Embedding: Case(lambda: nn.Embedding(9, 4, padding_idx=2), lambda: (torch.arange(9).reshape(3, 3),)),
    nn.Conv1d: Case(lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: (torch.randn(2, 4, 7),)),
    nn.Conv2d: Case(lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), lambda: (torch.randn(2, 3, 7, 5),)),
    nn.Conv3d: Case(lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: (torch.randn(2, 2, 4, 3, 5),)),
    nn.ConvTranspose1d: Case(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: (torch.randn(2, 4, 5),)),
    nn.ConvTranspose2d: Case(lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
                             lambda: (torch.randn(2, 4, 5, 3),)),
    nn.ConvTranspose3d: Case(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, output_padding=1),
                             lambda: (torch.randn(1, 2, 2, 3, 2),)),
    qat.Add: Case(qat.Add, lambda: (torch.randn(3, 4), torch.randn(3, 4))),
    qat.MatMul: Case(qat.MatMul, lambda: (torch.randn(3, 4, 6), torch.randn(3, 6, 5))),
    qat.Concat: Case(lambda: qat.Concat(1), lambda: (torch.randn(3, 4), torch.randn(3, 2))),
    nn.LSTM: Case(lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True),
                  lambda: (torch.randn(3, 5, 6),)),
    nn.GRU: Case(lambda: nn.GRU(6, 4, bidirectional=True, batch_first=True),
                 lambda: (torch.randn(3, 5, 6),)),
    nn.RNN: Case(lambda: nn.RNN(6, 4, num_layers=2, batch_first=True), lambda: (torch.randn(3, 5, 6),)),
    nn.LSTMCell: Case(lambda: nn.LSTMCell(6, 4), lambda: (torch.randn(3, 6), (torch.randn(3, 4), torch.randn(3, 4)))),
    nn.GRUCell: Case(lambda: nn.GRUCell(6, 4), lambda: (torch.randn(3, 6), torch.randn(3, 4))),
    nn.MultiheadAttention: Case(lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True),
                                lambda: (torch.randn(3, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8))),
    AttentionScores: Case(lambda: AttentionScores(2, 8), lambda: (torch.randn(3, 2, 5, 4), torch.randn(3, 2, 6, 4))),
    AttentionContext: Case(lambda: AttentionContext(2, 8),
                           lambda: (torch.randn(3, 2, 5, 6).softmax(-1), torch.randn(3, 6, 8))),
    nn.RNNCell: Case(lambda: nn.RNNCell(6, 4), lambda: (torch.randn(3, 6), torch.randn(3, 4))),
}


def tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def joined(result: Any) -> Tensor:
    """All that a module returned as one tensor: recurrent layers return their states too."""
    return result if isinstance(result, Tensor) else torch.cat([t.reshape(-1) for t in tensors(result)])


def as_dtype(x: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, x)


def products(module: QuantizedModule) -> list[tuple[QuantizedModule, str]]:
    """Each module inside that has a quantized weight, and the weight's name in the state dict."""
    if isinstance(module, Composite):
        return [(p, p.source.weight) for p in module.parts.values()]
    return [] if module.plan.weight is None else [(module, "weight")]


def test_every_registered_type_has_a_case() -> None:
    assert set(CASES) == set(REGISTRY)


RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": "int8", "input": "int8"},
    "dynamic": {"weight": "int8", "input": {"format": "int8", "dynamic": True}},
    "learned": {"weight": {"format": "int4", "learned": "lsq"}, "input": {"format": "int8", "learned": "lsq"}},
    "weight only": {"weight": "int4"},
    "output": {"weight": "int8", "input": "int8", "output": "int8"},
}


@pytest.mark.parametrize("scheme", RECIPES)
@pytest.mark.parametrize("kind", CASES, ids=lambda k: k.__name__)
class TestContract:
    def recipe(self, kind: type[nn.Module], scheme: str) -> dict[str, Any]:
        rule = {"match": {"type": kind.__name__}, **RECIPES[scheme]}
        if scheme == "weight only" and issubclass(kind, qat.Add | qat.Concat | qat.MatMul):
            rule["input"] = "int8"                  # they have no weight
        return {"rules": [rule]}

    def prepared(self, kind: type[nn.Module], scheme: str) -> tuple[Any, Any, tuple[Any, ...]]:
        model, x = CASES[kind].build(), CASES[kind].inputs()
        result = qat.prepare(model, self.recipe(kind, scheme), example_inputs=x)
        return model, qat.calibrate(result, [x]), x

    def test_the_module_stays_what_it_was(self, kind: type[nn.Module], scheme: str) -> None:
        model = CASES[kind].build().eval()
        for parameter in list(model.parameters())[-1:]:
            parameter.requires_grad_(False)
        seen: list[str] = []
        model.register_forward_hook(lambda m, a, y: seen.append("after"))
        model.register_forward_pre_hook(lambda m, a: seen.append("before"))
        parameters = dict(model.named_parameters())
        wanted = {n: p.requires_grad for n, p in parameters.items()}
        result = qat.prepare(model, self.recipe(kind, scheme), inplace=True)
        assert result is model
        assert isinstance(result, QuantizedModule)
        assert isinstance(result, kind)
        assert not result.training
        for name, parameter in parameters.items():
            assert result.get_parameter(name) is parameter
            assert parameter.requires_grad == wanted[name]
        x = CASES[kind].inputs()
        qat.calibrate(result, [x])
        seen.clear()
        result(*x)
        assert seen == ["before", "after"]
        assert all(not q.training for q in result.modules())

    def test_a_copy_leaves_the_float_model_alone(self, kind: type[nn.Module], scheme: str) -> None:
        model = CASES[kind].build()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        result = qat.prepare(model, self.recipe(kind, scheme))
        assert type(model) is kind
        assert result is not model
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert set(model.state_dict()) == set(before)

    def test_forward_shapes_and_values_are_near_the_float_ones(self, kind: type[nn.Module], scheme: str) -> None:
        model, result, x = self.prepared(kind, scheme)
        y, expected = result(*x), model(*x)
        assert type(y) is type(expected)
        assert [t.shape for t in tensors(y)] == [t.shape for t in tensors(expected)]
        assert [t.dtype for t in tensors(y)] == [t.dtype for t in tensors(expected)]
        y, expected = joined(y), joined(expected)
        error = float((y - expected).detach().abs().max() / expected.detach().abs().max())
        assert error < (0.35 if scheme in ("learned", "weight only") else 0.05)
        if kind is not nn.Embedding or scheme != "output":
            assert error > 0, "nothing was quantized"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_dtype_is_kept(self, kind: type[nn.Module], scheme: str, dtype: torch.dtype) -> None:
        model = CASES[kind].build().to(dtype)
        x = as_dtype(CASES[kind].inputs(), dtype)
        result = qat.calibrate(qat.prepare(model, self.recipe(kind, scheme)), [x])
        assert all(p.dtype == dtype for n, p in result.named_parameters() if "quantizer" not in n)
        assert all(b.dtype == torch.float32 for n, b in result.named_buffers() if n.endswith("scale"))
        with torch.no_grad():
            assert all(t.dtype == dtype for t in tensors(result.eval()(*x)))
        assert all(t.dtype == dtype for t in tensors(result(*x)))
        deployed, _ = qat.convert(result, [x])
        assert all(t.dtype == dtype for t in tensors(deployed(*x)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_dtype_may_change_after_prepare(self, kind: type[nn.Module], scheme: str, dtype: torch.dtype) -> None:
        _, result, x = self.prepared(kind, scheme)
        result.to(dtype)
        x = as_dtype(x, dtype)
        y = joined(result.eval()(*x))
        with torch.no_grad():
            assert torch.equal(joined(result(*x)), y)
        assert y.dtype == dtype
        deployed, _ = qat.convert(result, [x])
        assert torch.equal(joined(deployed(*x)), y)
        assert all(b.dtype == torch.float32 for n, b in deployed.named_buffers() if n.endswith("scale"))

    def test_every_trained_parameter_gets_a_gradient(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        result.train()
        for t in tensors(x):
            t.requires_grad_(t.is_floating_point())
        y = joined(result(*x))
        (y * torch.randn(y.shape)).sum().backward()
        for name, parameter in result.named_parameters():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), name
        for t in tensors(x):
            assert not t.is_floating_point() or bool(t.grad.any())

    def test_the_output_may_be_changed_in_place(self, kind: type[nn.Module], scheme: str) -> None:
        """As by an activation function with ``inplace=True``: values and gradients are those of the plain function."""
        _, result, x = self.prepared(kind, scheme)
        learning = [t.requires_grad_() for t in tensors(x) if t.is_floating_point()] + list(result.parameters())
        found = []
        for activation in (nn.functional.relu, nn.functional.relu_):
            for t in learning:
                t.grad = None
            y = activation(tensors(result.train()(*x))[0])
            (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
            found.append([y.detach(), *(t.grad for t in learning if t.grad is not None)])
        for plain, changed in zip(*found, strict=True):
            assert torch.equal(plain, changed)

    def test_a_float_checkpoint_loads(self, kind: type[nn.Module], scheme: str) -> None:
        model, result, x = self.prepared(kind, scheme)
        assert set(model.state_dict()) <= set(result.state_dict())
        other = CASES[kind].build()
        result.load_state_dict(other.state_dict(), strict=True)
        for name, value in other.state_dict().items():
            assert torch.equal(result.state_dict()[name], value)
        fresh = qat.calibrate(qat.prepare(other, self.recipe(kind, scheme)), [x])
        if scheme in ("dynamic", "weight only"):
            same = torch.equal(joined(result.eval()(*x)), joined(fresh.eval()(*x)))
            assert same, "something of the old weight is left"

    def test_state_dict_round_trip(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        result.eval()
        expected = joined(result(*x))
        fresh = qat.prepare(CASES[kind].build(), self.recipe(kind, scheme)).eval()
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k,
                v in result.state_dict().items()}
        fresh.load_state_dict(result.state_dict(), strict=True)
        assert torch.equal(joined(fresh(*x)), expected)

    def test_deepcopy(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        expected = joined(result.eval()(*x))
        twin = copy.deepcopy(result)
        assert torch.equal(joined(twin(*x)), expected)
        assert not {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
            id(t) for t in result.state_dict(keep_vars=True).values()}
        deployed, _ = qat.convert(result, [x])
        deployed(*x)
        assert torch.equal(joined(copy.deepcopy(deployed)(*x)), expected)

    def test_freeze_changes_no_output_and_drops_the_float_weight(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        expected = joined(result.eval()(*x))
        frozen = copy.deepcopy(result)
        freeze(frozen)
        assert torch.equal(joined(frozen(*x)), expected)
        for (before, weight), (after, _) in zip(products(result), products(frozen), strict=True):
            assert after.frozen
            assert weight not in frozen.state_dict()
            floats = [t for n, t in frozen.state_dict().items() if t.is_floating_point() and "bias" not in n]
            assert all(t.numel() < before.weight.numel() for t in floats)
            assert after.weight_codes.dtype == torch.uint8
            assert after.weight_codes.numel() == packing.packed_size(before.weight.numel(), after.plan.weight.bits)
            # the weight can still be read: dequantized, in the float module's shape
            if "." not in weight:                   # else it is a child's, which is asked for by nobody else
                assert getattr(frozen, weight).shape == getattr(result, weight).shape
            assert after.weight.shape == before.weight.shape
            step = float(after.weight_scale.max())
            error = float((after.weight - before.weight.detach()).abs().max())
            assert error <= step * (0.50001 if scheme != "learned" else 4)
            with pytest.raises(qat.QuantizationError, match="frozen already"):
                after.freeze()

    def test_a_frozen_module_passes_the_same_gradient(self, kind: type[nn.Module], scheme: str) -> None:
        """To its inputs, even where it ran in inference mode before, as in a validation."""
        _, result, x = self.prepared(kind, scheme)
        frozen = copy.deepcopy(result.eval())
        freeze(frozen)
        with torch.inference_mode():
            frozen(*x)
        gradients = []
        for module in (result, frozen):
            leaves = pytree.tree_map(lambda t: t.clone().requires_grad_(t.is_floating_point()), x)
            wanted = [t for t in pytree.tree_leaves(leaves) if t.requires_grad]
            outputs = [t for t in pytree.tree_leaves(module(*leaves)) if isinstance(t, Tensor) and t.requires_grad]
            gradients.append(torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs])
                             if wanted else [])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b)

    def test_strides_of_the_input_do_not_matter(self, kind: type[nn.Module], scheme: str) -> None:
        """The first half of a wider tensor, every second value of one, and dimensions in another order."""
        _, result, x = self.prepared(kind, scheme)
        result.eval()
        frozen = copy.deepcopy(result)
        freeze(frozen)
        layouts: list[Callable[[Tensor], Tensor]] = [
            lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]], lambda t: torch.stack([t, t], -1)[..., 1],
            lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)]
        for args in (x, pytree.tree_map(lambda t: t[:1], x)):
            for layout in layouts:
                strided = pytree.tree_map(layout, args)
                for module in (result, frozen):
                    with torch.no_grad():
                        expected, got = (pytree.tree_leaves(module(*a)) for a in (args, strided))
                    for a, b in zip(expected, got):
                        torch.testing.assert_close(a, b)

    def test_repr_says_how_it_is_quantized(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        for model in (result, qat.convert(result, [x])[0]):
            text = repr(model)
            assert text.startswith(f"Quantized{kind.__name__}(")
            for plan in (model.plan, *model.plan.parts.values()):
                for role in ("weight", "input", "output"):
                    assert getattr(plan, role) is None or f"{role}={getattr(plan, role)}" in text

    def test_a_deployed_model_moves_and_keeps_its_scales(self, kind: type[nn.Module], scheme: str) -> None:
        _, result, x = self.prepared(kind, scheme)
        deployed, _ = qat.convert(result, [x])
        expected = joined(deployed(*x))
        assert torch.equal(joined(deployed.to("cpu")(*x)), expected)
        assert not any(p.requires_grad for p in deployed.parameters())
        assert all(b.dtype == torch.float32 for n, b in deployed.half().named_buffers() if n.endswith("scale"))

    def test_no_rows_pass_through(self, kind: type[nn.Module], scheme: str) -> None:
        model, result, x = self.prepared(kind, scheme)
        empty = pytree.tree_map(lambda t: t[:0], x)
        for training in (True, False):
            result.train(training)
            y = result(*empty)
            assert [t.shape for t in tensors(y)] == [t.shape for t in tensors(model(*empty))]
            y = joined(y)
            if y.requires_grad:
                y.sum().backward()
