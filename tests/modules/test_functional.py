"""``qat.MatMul``: two operands, a quantizer each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.kernels import table


class Products(nn.Module):
    """Attention by hand: projections, and both products as modules."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.scores, self.context = qat.MatMul(), qat.MatMul()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.context(self.scores(q, k.transpose(-1, -2)).softmax(-1), v)


SCHEMES: dict[str, dict[str, Any]] = {
    "static": {"input": "int8"},
    "symmetric": {"input": {"format": "int8", "symmetric": True}},
    "dynamic": {"input": {"format": "int8", "dynamic": True}},
    "dynamic affine": {"input": {"format": "uint8", "dynamic": True, "symmetric": False}},
    "dynamic per tensor": {"input": {"format": "int8", "dynamic": True, "granularity": "per_tensor"}},
    "learned": {"input": {"format": "int4", "learned": "lsq"}},
    "midrise": {"input": "int4_midrise"},
    "binary": {"input": "binary"},
    "output": {"input": "int8", "output": "int8"},
}
SHAPES = [((4, 6), (6, 5)), ((2, 4, 6), (2, 6, 5)), ((3, 1, 4, 6), (2, 6, 5)), ((2, 4, 6), (6, 5)), ((6,), (6, 5)),
          ((4, 6), (6,)), ((6,), (6,)), ((2, 3, 6), (6,)), ((6,), (2, 6, 3)), ((1, 1), (1, 1)), ((0, 4, 6), (0, 6, 5))]


@pytest.mark.filterwarnings("ignore:1-bit activations that never change sign")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES, ids=str)
def test_shapes_and_parity(a_shape: tuple[int, ...], b_shape: tuple[int, ...], scheme: str) -> None:
    if 0 in a_shape:
        batches = [(torch.randn(2, *a_shape[1:]), torch.randn(2, *b_shape[1:]))]
    else:
        batches = [(torch.randn(a_shape), torch.randn(b_shape))]
    rule = {"match": {"type": "MatMul"}, **SCHEMES[scheme]}
    model = qat.calibrate(qat.prepare(qat.MatMul(), {"rules": [rule]}), batches).eval()
    deployed, certificate = qat.convert(model, batches)
    assert certificate.equal
    assert certificate.layers[""]["input_codes"] == 0
    a, b = torch.randn(a_shape, requires_grad=True), torch.randn(b_shape, requires_grad=True)
    y = model(a, b)
    assert y.shape == (a @ b).shape
    assert torch.equal(deployed(a, b), y)
    if y.numel():
        y.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.shape == a.shape
        assert b.grad.shape == b.shape


def test_each_operand_has_a_range_of_its_own() -> None:
    a, b = torch.randn(50, 16), 100 * torch.randn(16, 40)
    model = qat.calibrate(qat.prepare(qat.MatMul(), zoo.every_layer()), [(a, b)]).eval()
    assert float(model.right_quantizer.scale) > 30 * float(model.input_quantizer.scale)
    assert float((model(a, b) - a @ b).abs().max()) < 0.02 * float((a @ b).abs().max())
    # the formula by hand
    codes = [q.codes(x).long() - int(q.zero_point) for q, x in ((model.input_quantizer, a), (model.right_quantizer, b))]
    scale = model.input_quantizer.scale * model.right_quantizer.scale
    assert torch.equal(model(a, b), (codes[0] @ codes[1]).float() * scale)


@pytest.mark.parametrize("match", [{"type": "MatMul"}, {"name": "scores"}], ids=str)
@pytest.mark.parametrize("keep", ["float32", "bfloat16"])
def test_a_rule_keeps_a_product_in_floating_point(match: dict[str, str], keep: str) -> None:
    model, x = Products(), torch.randn(2, 5, 8)
    recipe = {"rules": [{"match": match, "keep": keep}, {"weight": "int8", "input": "int8"}]}
    prepared = qat.calibrate(qat.prepare(model, recipe, x), [x]).eval()
    rows = {row.name: row for row in qat.coverage(prepared).rows}
    assert rows["scores"].status == "kept"
    assert keep in rows["scores"].reason
    assert rows["context"].status == ("kept" if "type" in match else "quantized")
    a, b = torch.randn(2, 5, 8), torch.randn(2, 8, 5)
    dtype = getattr(torch, keep)
    assert torch.equal(prepared.scores(a, b), (a.to(dtype) @ b.to(dtype)).float())
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    assert torch.equal(deployed(x), prepared(x))


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic", "w4a8", "w2a8", "w1a8", "w4a4", "w8a16"])
def test_attention_by_hand(preset: str) -> None:
    x = torch.randn(3, 7, 8)
    model = Products()
    before, after = zoo.assert_parity(model, preset, x, torch.randn(1, 5, 8), torch.randn(0, 4, 8))
    rows = {r.name: r.status for r in qat.coverage(before).rows}
    assert preset == "w8a16" or rows["scores"] == rows["context"] == "quantized"
    for backend in ("reference", "float"):
        with table.use(backend):
            assert torch.equal(after(x), before(x))


def test_codes_are_passed_on_to_products() -> None:
    """A layer in front with an output spec sends codes, which enter the product as they are."""
    model, x = Products(), torch.randn(3, 7, 8)
    rules = [{"match": {"name": "value"}, "weight": "int8", "input": "int8", "output": "int8"},
             {"weight": "int8", "input": "int8"}]
    before, _ = zoo.assert_parity(model, {"rules": rules}, x)
    assert before.value.plan.emits_codes
    y = before.train()(x)
    y.square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in before.named_parameters() if "key.bias" not in n)


def test_save_and_load(tmp_path: Any) -> None:
    x = torch.randn(3, 7, 8)
    deployed, _ = qat.convert(zoo.prepared(Products(), "w8a8", [x]), [x])
    qat.save(deployed, tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", Products())(x), deployed(x))


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic"])
def test_compiled_equals_eager(preset: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 7, 8)
    prepared = zoo.prepared(Products(), preset, [x])
    deployed, _ = qat.convert(prepared, [x])
    with torch.no_grad():
        expected = deployed(x)
        assert torch.equal(torch.compile(deployed, backend="aot_eager")(x), expected)
