"""Every backend gives the accumulators, and the rescaled outputs, of the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qat.errors import OverflowBoundError, QuantizationError, UnsupportedError
from qat.kernels import table
from qat.kernels.backends import Backend
from qat.kernels.columns import Columns
from qat.kernels.contract import Activation, Geometry, Weight, check_int32

REFERENCE = table.BACKENDS["reference"]
OTHERS = [b for b in table.BACKENDS.values() if b is not REFERENCE]


def activation(shape: tuple[int, ...], dtype: torch.dtype, zero_point: Any) -> Activation:
    limits = torch.iinfo(dtype)
    values = torch.randint(limits.min, limits.max + 1, shape).to(dtype)
    if values.numel() > 1:
        values.view(-1)[0], values.view(-1)[-1] = limits.min, limits.max
    if zero_point == "rows":
        zero_point = torch.randint(limits.min, limits.max + 1, (shape[0], *(1,) * (len(shape) - 1)), dtype=torch.int32)
    elif zero_point == "tensor":
        zero_point = torch.tensor(limits.max - 5, dtype=torch.int32)
    elif isinstance(zero_point, int):
        zero_point = max(limits.min, min(limits.max, zero_point))
    plain = zero_point is None
    return Activation(values, zero_point, max(-limits.min, limits.max) if plain else 255)


def weight(*shape: int, bound: int = 127) -> Weight:
    return Weight(torch.randint(-bound, bound + 1, shape).to(torch.int8), bound)


ZERO_POINTS: list[Any] = [None, 0, 7, -128, "tensor", "rows"]
LINEAR = [(1, 1, 1), (1, 7, 3), (2, 1, 5), (5, 33, 7), (17, 8, 8), (64, 64, 16), (3, 5, 1), (0, 4, 3), (9, 130, 11)]


@pytest.mark.parametrize("backend", OTHERS, ids=lambda b: b.name)
@pytest.mark.parametrize(("rows", "inputs", "out"), LINEAR)
def test_linear_accumulators(backend: Backend, rows: int, inputs: int, out: int) -> None:
    tried = 0
    for dtype, zero_point in itertools.product((torch.int8, torch.uint8), ZERO_POINTS):
        x = activation((rows, inputs), dtype, zero_point)
        w = weight(out, inputs, bound=7 if backend.name == "columns" else 127)
        if not backend.supports_linear(x, w):
            continue
        tried += 1
        expected = REFERENCE.linear_accumulators(x, w)
        assert torch.equal(backend.linear_accumulators(x, w).to(torch.int64), expected)
        multiplier, bias = torch.randn(out) * 0.01, torch.randn(out)
        multiplier[0] = 0.0
        for m, b in ((multiplier, bias), (multiplier, None), (torch.tensor(-0.3), bias)):
            y = backend.linear(x, w, m, b)
            assert y.dtype == torch.float32
            by_hand = expected.float() * m
            assert torch.equal(y, by_hand if b is None else by_hand + b)
    assert tried or (backend.name != "float" and (rows == 0 or inputs == 1 or not table.BACKENDS["onednn"].available()
                                                  or not Columns.available()))


def laid_out(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of ``x``, or of its first row, in tensors of all kinds of strides."""
    wide = torch.zeros(*x.shape, 3, dtype=x.dtype)
    wide[..., 1] = x
    ones = [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
    return {"every third value": wide[..., 1], "transposed": x.mT.contiguous().mT, "expanded": x[:1].expand(x.shape),
            "rows with a gap": torch.cat([x, x], -1)[..., : x.shape[-1]], "any along one": x.as_strided(x.shape, ones)}


@pytest.mark.parametrize("backend", table.BACKENDS.values(), ids=lambda b: b.name)
@pytest.mark.parametrize(("rows", "inputs", "out"), [(1, 33, 7), (5, 65, 15), (9, 17, 1), (2, 129, 2)])
def test_linear_of_any_strides(backend: Backend, rows: int, inputs: int, out: int) -> None:
    """torch's own kernels ignore some of them, and read what lies beside the tensor."""
    x = torch.randint(-128, 128, (rows, inputs)).to(torch.int8)
    levels = torch.randint(-7, 8, (out, inputs)).to(torch.int8)
    pairs = [*((v, levels) for v in laid_out(x).values()), *((x, v) for v in laid_out(levels).values())]
    for values, right in pairs:
        for activation_ in (Activation(values, 3, 255), Activation(values.view(torch.uint8), None, 255)):
            if not backend.supports_linear(activation_, Weight(right, 7)):
                continue
            expected = activation_.levels(torch.float64) @ right.double().t()
            for vector in laid_out(torch.randn(1, out)).values():
                multiplier, bias = vector[0] * 0.01, vector[0]
                y = backend.linear(activation_, Weight(right, 7), multiplier, bias)
                assert torch.equal(y, expected.float() * multiplier + bias)


@pytest.mark.parametrize("backend", [b for b in table.BACKENDS.values() if b.name in ("reference", "int_mm", "float")],
                         ids=lambda b: b.name)
@pytest.mark.parametrize(("rows", "inputs", "out"), [(1, 65, 7), (5, 33, 1), (9, 17, 8), (1, 8, 1)])
def test_matmul_of_any_strides(backend: Backend, rows: int, inputs: int, out: int) -> None:
    a = torch.randint(-128, 128, (2, rows, inputs)).to(torch.int8)
    b = torch.randint(-128, 128, (2, inputs, out)).to(torch.int8)
    for left, right in [*((v, b) for v in laid_out(a).values()), *((a, v) for v in laid_out(b).values())]:
        operands = Activation(left, 3, 255), Activation(right, None, 128)
        if backend.supports_matmul(*operands):
            acc = backend.matmul_accumulators(*operands)
            assert torch.equal(acc.to(torch.int64), (left.long() - 3) @ right.long())


@pytest.mark.parametrize("backend", OTHERS, ids=lambda b: b.name)
def test_convolutions_of_any_strides(backend: Backend) -> None:
    x, levels = (torch.randint(-127, 128, shape).to(torch.int8) for shape in ((2, 3, 7, 9), (5, 3, 3, 3)))
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    for values, right in [*((v, levels) for v in laid_out(x).values()), *((x, v) for v in laid_out(levels).values())]:
        operands = Activation(values, None, 128), Weight(right, 127)
        if backend.supports_convolution(*operands, geometry):
            bias = torch.randn(5, 3)[:, 1]
            y = backend.convolution(*operands, geometry, torch.tensor(0.01), bias)
            assert torch.equal(y, F.conv2d(values.double(), right.double(), padding=1).float() * 0.01
                               + bias.view(-1, 1, 1))


def test_the_reference_is_integer_arithmetic() -> None:
    x, w = activation((3, 4), torch.uint8, 9), weight(2, 4)
    for m, n in itertools.product(range(3), range(2)):
        total = sum((int(x.values[m, k]) - 9) * int(w.levels[n, k]) for k in range(4))
        assert int(REFERENCE.linear_accumulators(x, w)[m, n]) == total


MATMULS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    # (..., m, k), (..., k, n)
    ((1, 1), (1, 1)), ((3, 1), (1, 4)), ((5, 33), (33, 7)), ((2, 3, 5, 9), (2, 3, 9, 4)), ((2, 1, 17, 8), (3, 8, 16)),
    ((4, 6, 5), (5, 3)), ((6, 5), (4, 5, 3)), ((1, 1, 64), (1, 64, 1)), ((2, 0, 4), (2, 4, 3)), ((2, 3, 4), (2, 4, 0)),
    ((2, 3, 0), (2, 0, 5)), ((0, 3, 4), (0, 4, 5)), ((0, 3, 4), (4, 5)), ((2, 40, 300), (2, 300, 20)),
]


def operand(shape: tuple[int, ...], dtype: torch.dtype, zero_point: Any, summed: int) -> Activation:
    """Random integers; ``summed``: the dimension along which a zero point does not vary."""
    x = activation((max(1, math.prod(shape)),), dtype, None if zero_point == "along" else zero_point)
    values = x.values[: math.prod(shape)].reshape(shape)
    if zero_point == "along":
        size = [1 if d == summed % len(shape) else n for d, n in enumerate(shape)]
        return Activation(values, torch.randint(-100, 100, size, dtype=torch.int32), 255)
    return Activation(values, x.zero_point, x.bound)


@pytest.mark.parametrize("backend", OTHERS, ids=lambda b: b.name)
@pytest.mark.parametrize(("a_shape", "b_shape"), MATMULS, ids=str)
def test_matmul_accumulators(backend: Backend, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    points: list[Any] = [None, 7, -128, "tensor", "along"]
    for (dtype_a, dtype_b), zero_a, zero_b in itertools.product(
            itertools.product((torch.int8, torch.uint8), repeat=2), points, points):
        a, b = operand(a_shape, dtype_a, zero_a, -1), operand(b_shape, dtype_b, zero_b, -2)
        if not backend.supports_matmul(a, b):
            assert backend.name in ("onednn", "columns") or not table.BACKENDS["onednn"].available() or a_shape[-1] < 2
            continue
        expected = REFERENCE.matmul_accumulators(a, b)
        assert expected.shape == (*torch.broadcast_shapes(a_shape[:-2], b_shape[:-2]), a_shape[-2], b_shape[-1])
        assert torch.equal(backend.matmul_accumulators(a, b).to(torch.int64), expected)
        for size in ((), (b_shape[-1],), (*b_shape[:-2], 1, b_shape[-1])):
            multiplier = torch.randn(size) * 0.01
            y = backend.matmul(a, b, multiplier)
            assert y.dtype == torch.float32
            assert torch.equal(y, expected.float() * multiplier)


def test_matmul_of_views_and_of_large_matrices() -> None:
    """Heads are views of one tensor; large outputs are rescaled in pieces."""
    heads = torch.randint(-128, 128, (3, 130, 4, 32)).to(torch.int8).transpose(1, 2)
    for a, b in ((heads, heads.transpose(-1, -2)), (torch.randint(0, 256, (3, 4, 600, 130)).to(torch.uint8), heads)):
        left, right = Activation(a, None, 255), Activation(b, None, 128)
        expected = REFERENCE.matmul_accumulators(left, right)
        for backend in (table.choose_matmul(left, right), table.BACKENDS["float"]):
            assert torch.equal(backend.matmul_accumulators(left, right).to(torch.int64), expected)
            assert torch.equal(backend.matmul(left, right, torch.tensor(0.3)), expected.float() * 0.3)


def test_the_float_carrier_widens_a_matmul_only_where_its_levels_ask_for_it() -> None:
    flat = Activation(torch.ones(1, 600, dtype=torch.uint8), None, 255)
    full = Activation(torch.full((1, 600), 255, dtype=torch.uint8), None, 255)
    right = Activation(torch.full((600, 1), -128, dtype=torch.int8), None, 255)
    assert table.BACKENDS["float"].matmul_accumulators(flat, right).dtype == torch.float32
    wide = table.BACKENDS["float"].matmul_accumulators(full, right)
    assert wide.dtype == torch.float64
    assert int(wide) == -600 * 255 * 128


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], Geometry]] = [
    # (batch, in, *spatial), (out, in // groups, *kernel)
    ((2, 3, 9), (4, 3, 3), Geometry((1,), (1,), (1,))),
    ((1, 4, 7), (6, 2, 2), Geometry((3,), (0,), (2,), 2)),
    ((2, 3, 7, 5), (4, 3, 3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((1, 8, 6, 6), (8, 1, 3, 3), Geometry((2, 1), (1, 0), (1, 2), 8)),
    ((3, 4, 5, 6), (6, 2, 1, 4), Geometry((1, 3), (2, 5), (1, 1), 2)),
    ((2, 1, 1, 1), (1, 1, 1, 1), Geometry((1, 1), (0, 0), (1, 1))),
    ((1, 1, 1, 1), (2, 1, 3, 3), Geometry((2, 2), (1, 1), (1, 1))),
    ((2, 5, 4, 4), (1, 5, 1, 1), Geometry((1, 1), (3, 0), (1, 1))),
    ((0, 3, 5, 5), (4, 3, 3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((1, 16, 12, 12), (32, 16, 3, 3), Geometry((2, 2), (1, 1), (1, 1))),
    ((2, 2, 3, 4, 3), (4, 2, 2, 2, 3), Geometry((1, 2, 1), (1, 0, 1), (1, 1, 1))),
    ((1, 6, 3, 3, 3), (6, 1, 1, 3, 1), Geometry((1, 1, 1), (0, 2, 0), (1, 2, 1), 6)),
]


@pytest.mark.parametrize("backend", OTHERS, ids=lambda b: b.name)
@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CONVOLUTIONS, ids=str)
def test_convolution_accumulators(backend: Backend, x_shape: tuple[int, ...], w_shape: tuple[int, ...],
                                  geometry: Geometry) -> None:
    tried = 0
    along_out = (-1, *(1,) * geometry.dims)
    for dtype, zero_point in itertools.product((torch.int8, torch.uint8), ZERO_POINTS):
        x, w = activation(x_shape, dtype, zero_point), weight(*w_shape)
        if not backend.supports_convolution(x, w, geometry):
            continue
        tried += 1
        expected = REFERENCE.convolution_accumulators(x, w, geometry)
        assert expected.shape[2:] == geometry.output_size(x.values.shape, w.levels.shape)
        assert torch.equal(backend.convolution_accumulators(x, w, geometry).to(torch.int64), expected)
        multiplier, bias = torch.randn(w_shape[0]) * 0.01, torch.randn(w_shape[0])
        y = backend.convolution(x, w, geometry, multiplier, bias)
        assert torch.equal(y, expected.float() * multiplier.reshape(along_out) + bias.reshape(along_out))
        assert torch.equal(backend.convolution(x, w, geometry, multiplier[0], None), expected.float() * multiplier[0])
    assert tried or backend.name != "float"


@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CONVOLUTIONS, ids=str)
def test_the_reference_convolution_is_torch_in_double(x_shape: tuple[int, ...], w_shape: tuple[int, ...],
                                                      geometry: Geometry) -> None:
    x, w = activation(x_shape, torch.uint8, 100), weight(*w_shape)
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[geometry.dims]
    expected = convolve(x.values.double() - 100, w.levels.double(), None, geometry.stride, geometry.padding,
                        geometry.dilation, geometry.groups)
    assert torch.equal(REFERENCE.convolution_accumulators(x, w, geometry).double(), expected)


@pytest.mark.parametrize("inputs", [518, 519, 1032, 1033, 1100, 9000])
@pytest.mark.parametrize("backend", OTHERS, ids=lambda b: b.name)
def test_sums_at_the_edge_of_float32_are_exact(backend: Backend, inputs: int) -> None:
    """All levels at their greatest magnitude, one odd: a float32 sum beyond 2**24 would lose it."""
    for dtype, top in ((torch.uint8, 255), (torch.int8, -128)):
        values = torch.full((2, inputs), top).to(dtype)
        values[0, -1] = 1
        w = Weight(torch.full((3, inputs), -127, dtype=torch.int8), 127)
        w.levels[1] = 127
        w.levels[2, ::2] = 127
        x = Activation(values, None, 255 if dtype == torch.uint8 else 128)
        if backend.supports_linear(x, w):
            expected = REFERENCE.linear_accumulators(x, w)
            assert int(expected.abs().max()) > 2**24 or inputs <= 1033
            assert torch.equal(backend.linear_accumulators(x, w).to(torch.int64), expected)
            multiplier = torch.tensor([0.37, 1.0, -3.0])
            assert torch.equal(backend.linear(x, w, multiplier, None), expected.float() * multiplier)


def test_wide_convolutions_are_exact_too() -> None:
    x = Activation(torch.full((1, 130, 4, 4), 255, dtype=torch.uint8), None, 255)
    x.values[0, 0, 0, 0] = 2
    w = Weight(torch.full((2, 130, 3, 3), 127, dtype=torch.int8), 127)
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    expected = REFERENCE.convolution_accumulators(x, w, geometry)
    assert int(expected.max()) > 2**24
    for backend in OTHERS:
        if backend.supports_convolution(x, w, geometry):
            assert torch.equal(backend.convolution_accumulators(x, w, geometry).to(torch.int64), expected)
            y = backend.convolution(x, w, geometry, torch.tensor([0.1, -7.0]), torch.tensor([0.3, 0.0]))
            assert torch.equal(y,
                               expected.float() * torch.tensor([[[0.1]], [[-7.0]]]) + torch.tensor([[[0.3]], [[0.0]]]))


@pytest.mark.parametrize("backend", [b for b in OTHERS if b.name != "float"], ids=lambda b: b.name)
def test_sums_that_may_pass_int32_are_refused_and_run_elsewhere(backend: Backend) -> None:
    inputs = 2**31 // (255 * 127) + 8
    x = Activation(torch.full((1, inputs), 255, dtype=torch.uint8), None, 255)
    w = Weight(torch.full((1, inputs), 127, dtype=torch.int8), 127)
    assert not backend.supports_linear(x, w)
    y = table.linear(x, w, torch.ones(()), None)
    assert float(y) == float(torch.tensor(255 * 127 * inputs).float())
    assert 255 * 127 * inputs > 2**31


def test_overflow_bound() -> None:
    check_int32(2**31 - 1, "head")
    with pytest.raises(OverflowBoundError, match="head"):
        check_int32(2**31, "head")
    w = Weight(torch.tensor([[1, -2, 3], [0, 0, 0]], dtype=torch.int8), 127)
    small = Activation(torch.zeros(1, 3, dtype=torch.uint8), None, 255)
    assert w.accumulator_bound(small) >= 6 * 255


def test_affine_weights_of_eight_bits_have_levels_beyond_int8() -> None:
    w = Weight(torch.tensor([[-255, 255, 3]], dtype=torch.int16), 255)
    x = activation((4, 3), torch.uint8, 128)
    expected = (x.values.long() - 128) @ w.levels.long().t()
    assert torch.equal(table.choose("linear", x, w).linear_accumulators(x, w).long(), expected)
    assert not table.BACKENDS["onednn"].supports_linear(x, w)


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_can_be_read() -> None:
    lines = table.describe().splitlines()
    assert len(lines) == len(table.TABLE)
    for entry, line in zip(table.TABLE, lines):
        assert entry.op in line
        assert entry.backend in line
        assert entry.backend in table.BACKENDS


def test_the_table_can_be_overridden() -> None:
    x, w = activation((4, 6), torch.uint8, 3), weight(5, 6)
    chosen = table.choose("linear", x, w)
    with table.use("reference"):
        assert table.choose("linear", x, w) is REFERENCE
        with table.use("float"):
            assert table.choose("linear", x, w).name == "float"
        assert table.choose("linear", x, w) is REFERENCE
    assert table.choose("linear", x, w) is chosen
    with pytest.raises(RuntimeError), table.use("reference"):
        raise RuntimeError
    assert table.choose("linear", x, w) is chosen, "an error inside the block must not leave the override behind"


def test_an_entry_in_front_wins() -> None:
    x, w = activation((4, 6), torch.uint8, 3), weight(5, 6)
    entry = table.Entry("linear", "cpu", "reference", "for this test")
    table.TABLE.insert(0, entry)
    try:
        assert table.choose("linear", x, w) is REFERENCE
    finally:
        table.TABLE.remove(entry)
    assert table.choose("linear", x, w) is not REFERENCE


def test_unknown_and_unsuitable_backends() -> None:
    with pytest.raises(UnsupportedError, match="'onednn'"), table.use("onedn"):
        pass
    wide = Weight(torch.full((1, 3), 255, dtype=torch.int16), 255)
    with table.use("int_mm"), pytest.raises(QuantizationError, match="int_mm does not support this linear"):
        table.linear(activation((2, 3), torch.uint8, None), wide, torch.ones(()), None)
