"""Law 4 where language models decode: few rows and many, narrow weights, after save and load; what stays resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import qat
from qat.deploy.convert import resident_bytes
from qat.kernels import table, weight_only
from qat.kernels.columns import Columns

ROWS = (1, 2, 7, 16, 33, 300)
PER_TOKEN = {"format": "int8", "dynamic": True, "granularity": "per_token"}
GROUPS: dict[str, Any] = {"granularity": "per_group", "group_size": 13}
WEIGHTS: list[Any] = [
    {"format": "int4"}, {"format": "int4", **GROUPS}, {"format": "int4", "symmetric": False, **GROUPS},
    {"format": "int4", "scale_dtype": "bfloat16", **GROUPS}, {"format": "int3", **GROUPS},
    {"format": "int2_midrise", **GROUPS}, {"format": "binary", **GROUPS}, {"format": "ternary"},
    {"format": "int3", "symmetric": False}, {"format": "int4_midrise"}, {"format": "int8"},
    {"format": "uint8", "symmetric": False}, {"format": "int6", "granularity": "per_tensor"},
]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(39, 26), nn.SiLU(), nn.Linear(26, 65, bias=False), nn.Linear(65, 13)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, PER_TOKEN, {"format": "int8"},
                                        {"format": "uint8", "dynamic": True, "symmetric": False}],
                         ids=["float", "per_token", "static", "per_token affine"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_any_number_of_rows(weight: Any, activation: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [torch.randn(n, 39).to(dtype) for n in ROWS]
    batches += [torch.randn(1, 3, 39).to(dtype), torch.randn(39).to(dtype), torch.randn(39, 5).to(dtype).t()]
    before, after = zoo.assert_parity(net(dtype), zoo.every_layer(weight, activation), *batches)
    qat.save(after, tmp_path / "model")
    loaded = qat.load(tmp_path / "model", net(dtype)).eval()
    for x in batches:
        with torch.inference_mode():
            assert torch.equal(loaded(x), before(x))
    with torch.autocast("cpu", torch.bfloat16):
        for x in batches[:4]:
            assert torch.equal(before(x), after(x))


@pytest.mark.parametrize(("out", "served"), [(48, True), (40, False)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_bfloat16_rows_on_int4_groups_have_a_kernel_of_their_own(out: int, served: bool, bias: bool, size: int,
                                                                   tmp_path: Path) -> None:
    """And it is the prepared model's kernel too, and close to the dequantized product."""
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(2 * size, out, bias=bias)).to(torch.bfloat16)
    spec = {"format": "int4", "granularity": "per_group", "group_size": size, "scale_dtype": "bfloat16"}
    batches = [torch.randn(n, 2 * size).to(torch.bfloat16) for n in ROWS]
    before, after = zoo.assert_parity(layer(), zoo.every_layer(spec, None), *batches)
    qat.save(after, tmp_path / "model")
    loaded = qat.load(tmp_path / "model", layer()).eval()
    for x in batches:
        assert weight_only.FewInt4Rows.serves(x, after[0].quantized_weight()) == served
        assert torch.equal(loaded(x), before(x))
        exact = nn.functional.linear(x.double(), after[0].quantized_weight().dequantize().double(),
                                     None if after[0].bias is None else after[0].bias.double())
        assert float((after(x).double() - exact).norm()) <= 0.01 * float(exact.norm())
    x = batches[0].clone().requires_grad_()
    before(x).float().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("weight", WEIGHTS[:6], ids=str)
def test_integers_do_not_depend_on_the_backend(weight: Any) -> None:
    before, after = zoo.assert_parity(net(), zoo.every_layer(weight, PER_TOKEN), torch.randn(5, 39))
    for rows in (1, 3, 6):
        x = torch.randn(rows, 39)
        expected = after(x)
        with table.use("reference"):
            assert torch.equal(after(x), expected)
            assert torch.equal(before(x), expected)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("weight", [WEIGHTS[1], WEIGHTS[2], WEIGHTS[10]], ids=str)
def test_gradients_of_weight_only_layers(weight: Any, rows: int) -> None:
    """Those of the dequantized weight: for the input of prepared and deployed layers, weight and bias."""
    x = torch.randn(rows, 39, requires_grad=True)
    before = zoo.prepared(nn.Sequential(nn.Linear(39, 20)), zoo.every_layer(weight, None), [x.detach()])
    after, _ = qat.convert(before, [x.detach()])
    layer, g = before[0], torch.randn(rows, 20)
    (y := before(x)).backward(g)
    values = layer.quantized_weight().dequantize().detach()
    torch.testing.assert_close(y, x @ values.t() + layer.bias)
    torch.testing.assert_close(x.grad, g @ values)
    torch.testing.assert_close(layer.weight.grad, g.t() @ x.detach())
    torch.testing.assert_close(layer.bias.grad, g.sum(0))
    expected, x.grad = x.grad, None
    after(x).backward(g)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("preset", ["w4a16", "w8a16"])
def test_compiled_weight_only_layers_equal_eager_ones(preset: str, rows: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(rows, 39)
    before, after = zoo.assert_parity(net(), preset, x)
    with torch.no_grad():
        for candidate in (before, after):
            assert torch.equal(torch.compile(candidate, backend="aot_eager", fullgraph=True)(x), after(x))


@pytest.mark.skipif(not Columns.available(), reason="needs FBGEMM's kernels")
@pytest.mark.parametrize(("weight", "activation", "rows", "at_most"), [
    # bytes a weight once these numbers of rows have come by: packed, by input, and for many integer rows by oneDNN
    ({"format": "int4"}, None, [1], 1.0), ({"format": "int4"}, None, [1, 16, 300], 1.0),
    ({"format": "int4"}, None, [300], 0.5), ({"format": "int4"}, PER_TOKEN, [1], 1.5),
    ({"format": "int4"}, PER_TOKEN, [1, 300], 2.5), ({"format": "int8"}, None, [1, 300], 2.0),
    ({"format": "binary"}, None, [1, 300], 0.375), ({"format": "int3"}, None, [1], 1.875),
    ({"format": "int4", "granularity": "per_group", "group_size": 128}, PER_TOKEN, [1], 1.0),
    ({"format": "int4", "granularity": "per_group", "group_size": 128}, PER_TOKEN, [1, 300], 2.0)], ids=str)
def test_what_a_deployed_layer_holds(weight: Any, activation: Any, rows: list[int], at_most: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    after, _ = qat.convert(zoo.prepared(model, zoo.every_layer(weight, activation), [torch.randn(1, 1024)]),
                           [torch.randn(rows[0], 1024)])
    for n in rows:
        after(torch.randn(n, 1024))
    # scales, zero points, and FBGEMM's scale and offset of each column
    assert resident_bytes(after) / 2**20 < at_most + 0.11
    assert resident_bytes(after) / 2**20 >= at_most


def test_an_embedding_holds_its_packed_codes_alone() -> None:
    model = nn.Sequential(nn.Embedding(500, 64))
    recipe = {"rules": [{"weight": {"format": "int4"}}]}
    tokens = torch.randint(0, 500, (2, 7))
    before = zoo.prepared(model, recipe, [tokens])
    after, _ = qat.convert(before, [tokens])
    assert torch.equal(before(tokens), after(tokens))
    assert resident_bytes(after) == 500 * 32 + 500 * 4
