"""Sums of columns are exact on integers, as precise as a float product on floats, and the same on any thread."""

from __future__ import annotations

import os

import pytest
import torch

from qat.kernels import columns, table, weight_only
from qat.kernels.backends import COLUMNS
from qat.kernels.columns import Columns, added_up
from qat.kernels.contract import Activation, Weight
from qat.numerics import affine, packing
from qat.numerics.formats import FORMATS, TensorSpec
from qat.numerics.tensor import PackedTensor, QuantizedTensor

pytestmark = pytest.mark.skipif(not Columns.available(), reason="needs FBGEMM's kernels")


def drawn(low: int, high: int, step: int, *shape: int) -> torch.Tensor:
    return (torch.randint(0, (high - low) // step + 1, shape) * step + low).to(torch.int16)


@pytest.mark.parametrize(("low", "high", "step", "width"), [
    (-8, 7, 1, 4), (-2, 1, 1, 2), (-1, 1, 1, 2), (-1, 1, 2, 2), (-3, 3, 2, 2), (-15, 15, 2, 4), (-128, 127, 1, 8),
    (0, 255, 1, 8), (-16, 15, 1, 8), (0, 1, 1, 2), (5, 5, 1, 2)])
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (3, 5), (7, 130), (64, 33), (130, 7), (65, 2050)])
def test_sums_of_integers_are_exact(low: int, high: int, step: int, width: int, out: int, inputs: int) -> None:
    integers = drawn(low, high, step, out, inputs)
    integers[0, 0], integers[-1, -1] = low, high
    made = Columns(integers)
    assert made.width == (width if integers.numel() > 1 else 2)
    for rows, run in ((1, columns.RUN), (3, 4), (2, inputs)):
        x = torch.randint(-127, 128, (rows, inputs))
        expected = torch.stack([part @ w.t() for part, w in zip(x.split(run, 1), integers.long().split(run, 1))], 1)
        assert torch.equal(made.sums(x.float(), lambda sums, part: added_up(sums), run).long(), expected.sum(1))
        got = made.sums(x.float(), lambda sums, part: sums[:, -1], run)
        assert torch.equal(got.long(), expected[:, -1])


def test_tables_for_threads_hold_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    integers, x = drawn(-8, 7, 1, 300, 70), torch.randn(3, 70)
    def total(made: Columns) -> torch.Tensor:
        return made.sums(x, lambda sums, part: added_up(sums) * (1.0 + part.start + torch.arange(sums.shape[-1])), 32)

    one = Columns(integers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(columns, "SHARE", 1)
    three = Columns(integers)
    assert len(one.tables) == 1
    assert [r.stop - r.start for r in three.ranges] == [128, 128, 44]
    assert torch.equal(total(one), total(three))
    monkeypatch.setattr(columns, "SERIAL", 1)         # and however few outputs are reduced at a time
    assert torch.equal(total(one), total(three))
    child = os.fork()
    if child == 0:                                    # a forked process has threads of its own
        os._exit(0 if torch.equal(total(three), total(one)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_order_of_group_sums_does_not_depend_on_strides() -> None:
    x = torch.randn(2, 13, 96)
    expected = added_up(x.clone())
    wide = torch.empty(2, 13, 200)
    wide[..., 5:101] = x
    assert torch.equal(added_up(wide[..., 5:101]), expected)
    torch.testing.assert_close(expected, x.sum(1))


@pytest.mark.parametrize("shape", [(1, 33), (9, 1), (5, 33)])
def test_values_of_any_strides(shape: tuple[int, int]) -> None:
    """FBGEMM reads its weights one after another; flattened, one row or one column of a larger tensor has strides."""
    integers, wide = drawn(-8, 7, 1, 5, shape[1]), torch.randn(*shape, 4)
    made, x = Columns(integers), wide[..., 1]
    expected = (x.double() @ integers.double().t()).float()
    for values in (x, x.t().contiguous().t()):
        got = made.sums(values, lambda sums, part: added_up(sums))
        torch.testing.assert_close(got, expected)
    w = QuantizedTensor(integers.to(torch.int8), torch.ones(5), None, TensorSpec("int4", "per_channel"))
    torch.testing.assert_close(weight_only.product(x, w, None), expected)


@pytest.mark.parametrize("bound", [4, 7, 15])
def test_accumulators_beyond_float32(bound: int) -> None:
    """20,001 equal levels sum to more than 2**24; each run stays below, and the total is carried in float64."""
    w = Weight(torch.full((3, 20_001), -bound, dtype=torch.int8), bound)
    w.narrow = True
    x = Activation(torch.full((2, 20_001), 255, dtype=torch.uint8), 3, 255)
    assert COLUMNS.supports_linear(x, w)
    assert torch.equal(COLUMNS.linear_accumulators(x, w).long(), torch.full((2, 3), -bound * 252 * 20_001))
    assert not COLUMNS.supports_runs(20_001, x, w)


def test_wide_weights_are_left_to_others() -> None:
    x = Activation(torch.zeros(1, 8, dtype=torch.int8), None, 128)
    assert not COLUMNS.supports_linear(x, Weight(torch.zeros(4, 8, dtype=torch.int8), 127))
    lasting = Weight(torch.zeros(4, 8, dtype=torch.int8), 7, lasting=True)
    assert COLUMNS.supports_linear(x, lasting)
    assert table.choose("linear", x, lasting) is not COLUMNS        # one int8 product is faster


SPECS = [TensorSpec(name, **more, symmetric=symmetric).for_weight()
         for name in FORMATS for more in ({}, {"granularity": "per_tensor"},
                                          {"granularity": "per_group", "group_size": 11})
         for symmetric in ((False,) if not FORMATS[name].signed else (None, False)
                           if FORMATS[name].has_zero and name != "ternary" else (None,))]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}{'' if s.symmetric else ' affine'}")
def test_weight_only_products(spec: TensorSpec) -> None:
    """Both ways against float64; from packed codes as from unpacked ones, bit for bit."""
    w, bias = torch.randn(19, 33), torch.randn(19)
    low, high = affine.reduce_range(w, spec)
    scale, zero_point = affine.choose_qparams(low, high, spec)
    codes = QuantizedTensor(affine.quantize(w, scale, zero_point, spec), scale, zero_point, spec)
    packed = PackedTensor(packing.pack(codes.codes, spec.fmt), (19, 33), scale, zero_point, spec)
    assert torch.equal(packed.codes, codes.codes)
    assert torch.equal(packed.rows(slice(8, 15)).dequantize(), codes.dequantize()[8:15])
    assert torch.equal(packed.rows(slice(3, 99)).codes, codes.codes[3:])
    values = codes.dequantize().double()
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float64, 2e-5)):
        for rows in (1, 16, 17):
            x = torch.randn(rows, 33).to(dtype)
            y = weight_only.product(x, codes, bias.to(dtype))
            assert y.dtype == dtype
            assert torch.equal(y, weight_only.product(x, packed, bias.to(dtype), Weight.of(packed, lasting=True)))
            expected = x.double() @ values.t() + bias
            assert float((y.double() - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_float32_activations_keep_their_precision() -> None:
    """The error against float64 is that of a float32 product, far from that of bfloat16 activations."""
    spec = TensorSpec("int4", "per_group", 128).for_weight()
    codes = QuantizedTensor(torch.randint(-8, 8, (256, 2048), dtype=torch.int8), torch.rand(256, 16), None, spec)
    x, values = torch.randn(3, 2048), codes.dequantize()
    exact = x.double() @ values.double().t()
    error = (weight_only.product(x, codes, None) - exact).abs().mean()
    assert error < 4 * (x @ values.t() - exact).abs().mean()
    assert error < 1e-3 * (x.bfloat16() @ values.bfloat16().t() - exact).abs().mean()


def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("int4", "per_group", 8).for_weight()
    codes = QuantizedTensor(torch.randint(-8, 8, (50, 24), dtype=torch.int8), torch.rand(50, 3), None, spec)
    x, bias = torch.randn(40, 24), torch.randn(50)
    whole = weight_only.product(x, codes, bias)
    monkeypatch.setattr(weight_only, "BLOCK", 24 * 16)
    torch.testing.assert_close(weight_only.product(x, codes, bias), whole)
