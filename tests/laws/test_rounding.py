"""Laws 1 to 3: one rounding, zero on the grid, the error bound. Over format, granularity, odd shape and dtype."""

from __future__ import annotations

import ast
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.numerics import affine
from qat.numerics.formats import FORMATS, Format, TensorSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES: list[tuple[int, ...]] = [(1, 1), (1, 12), (5, 4), (3, 7, 4), (2, 3, 2, 2), (4, 0)]


def specs() -> list[TensorSpec]:
    """Every format at every granularity and symmetry that it can have."""
    found = []
    for name, fmt in FORMATS.items():
        symmetries = [True, False] if fmt.has_zero and name != "ternary" else [True]
        for granularity, symmetric in itertools.product(("per_tensor", "per_channel", "per_group", "per_token",
                                                         "per_sample"), symmetries):
            dynamic = granularity in ("per_token", "per_sample")
            found.append(TensorSpec(name, granularity, 4 if granularity == "per_group" else None, symmetric=symmetric,
                                    dynamic=dynamic))
    return found


def qparams(x: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    return affine.choose_qparams(*affine.reduce_range(x, spec), spec)


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return spec.granularity != "per_group" or math.prod(shape[1:]) % 4 == 0


# ------------------------------------------------------------------------------------------------ law 1


def test_ties_go_to_the_even_code() -> None:
    spec, x = TensorSpec("int8"), torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert affine.quantize(x, torch.ones(()), None, spec).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    # the ratio is rounded, and then the zero point is added: an odd zero point moves no tie
    assert affine.quantize(x, torch.ones(()), 3, spec).tolist() == [-1, 1, 1, 3, 3, 5, 5, 7]


def test_it_is_a_division_and_not_a_multiplication_by_the_reciprocal() -> None:
    spec, apart = TensorSpec("int8", "per_channel"), 0
    scale = torch.rand(40) + 0.01
    x = (torch.arange(-128, 127).float() + 0.5) * scale.unsqueeze(1)      # at the ties, where the two differ
    codes = affine.quantize(x, scale, None, spec)
    for row, each, got in zip(x, scale, codes):
        ratio = [float(Fraction(v) / Fraction(float(each))) for v in row.tolist()]      # rounded once, as the division
        rounded = torch.tensor(ratio).round()
        apart += int((rounded != (row * (1.0 / each)).round()).sum())
        assert torch.equal(got.float(), rounded.clamp(-128, 127))
    assert apart > 100, "these inputs do not tell them apart"


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
       st.floats(2.0**-100, 2.0**100, width=32), st.integers(0, 255))
def test_codes_are_those_of_the_formula_in_exact_arithmetic(x: float, scale: float, zero_point: int) -> None:
    ratio = torch.tensor(x, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    if not math.isfinite(float(ratio)):
        return
    expected = max(0, min(255, round(float(ratio)) + zero_point))         # Python rounds half to even
    got = affine.quantize(torch.tensor(x), torch.tensor(scale), zero_point, TensorSpec("uint8"))
    assert int(got) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_cast_to_float32_first(dtype: torch.dtype) -> None:
    x, scale, spec = torch.randn(4096).to(dtype), torch.tensor(0.0123), TensorSpec("int8")
    codes = affine.quantize(x, scale, None, spec)
    assert torch.equal(codes, affine.quantize(x.float(), scale, None, spec))
    careless = (x / scale).round().clamp(-128, 127).to(torch.int8)        # stays in the narrow dtype
    assert int((codes != careless).sum()) > 40, "this input does not show the trap"


def test_scales_are_float32_whatever_the_tensor_is() -> None:
    for dtype in DTYPES:
        scale, zero_point = qparams(torch.randn(3, 4).to(dtype), TensorSpec("uint8", "per_channel", symmetric=False))
        assert scale.dtype == torch.float32
        assert zero_point is not None
        assert zero_point.dtype == torch.int32


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scale_dtype_is_rounded_to_before_it_is_used(name: str) -> None:
    spec = TensorSpec("int4", "per_channel", scale_dtype=name)
    for factor in (1.0, 1e-9, 1e9):
        scale, _ = qparams(torch.randn(64, 8) * factor, spec)
        assert torch.equal(scale, scale.to(getattr(torch, name)).float())
        assert bool((torch.isfinite(scale) & (scale > 0)).all())


def test_power_of_two_scales_cover_the_range() -> None:
    x = torch.randn(64, 8) * torch.logspace(-20, 20, 64).unsqueeze(1)
    free, _ = qparams(x, TensorSpec("int8", "per_channel"))
    scale, _ = qparams(x, TensorSpec("int8", "per_channel", power_of_two=True))
    assert torch.equal(torch.frexp(scale)[0], torch.full((64,), 0.5))
    assert bool(((scale >= free) & (scale < 2 * free)).all())
    exact, _ = affine.choose_qparams(torch.tensor(-4 * 127.5), torch.tensor(0.0), TensorSpec("int8", power_of_two=True))
    assert float(exact) == 4.0


def test_rounding_lives_in_one_file() -> None:
    root = Path(affine.__file__).parents[1]
    rounders = set()
    for path in root.rglob("*.py"):
        if path.parts[-2] in ("reporting", "pipeline", "training"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("round", "round_", "rint",
                    "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"):
                rounders.add(path.name)
    others = {"quantizer.py",       # the zero point of lsq_plus
              "equivalence.py",     # numbers of channels, powers of two
              "onnx_lowering.py", "executorch_file.py"}     # int32 biases, which runtimes want
    assert rounders - others == {"affine.py"}       # codes


# ------------------------------------------------------------------------------------------------ law 2


@pytest.mark.parametrize("spec", specs(), ids=lambda s: f"{s}-{'sym' if s.symmetric else 'affine'}")
def test_real_zero_is_on_the_grid_and_ranges_are_finite(spec: TensorSpec) -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        if not fits(shape, spec):
            continue
        for x in (torch.randn(shape), torch.rand(shape) + 1.0, -torch.rand(shape) - 3.0, torch.zeros(shape),
                  torch.full(shape, 1e-38), torch.randn(shape) * 6e4):
            scale, zero_point = qparams(x.to(dtype), spec)
            assert scale.shape == affine.scale_shape(shape, spec)
            assert bool((torch.isfinite(scale) & (scale > 0)).all())
            if zero_point is not None:
                assert bool(((zero_point >= spec.fmt.lo) & (zero_point <= spec.fmt.hi)).all())
            zero = torch.zeros(shape, dtype=dtype)
            codes = affine.quantize(zero, scale, zero_point, spec)
            values = affine.dequantize(codes, scale, zero_point, spec)
            if spec.fmt.has_zero:
                assert not bool(values.any())
                assert not bool(affine.levels(codes, zero_point, spec).any())
            else:
                assert bool((values != 0).all())


def test_a_one_sided_range_is_widened_to_hold_zero() -> None:
    scale, zero_point = affine.choose_qparams(torch.tensor(1.0), torch.tensor(3.0),
                                              TensorSpec("uint8", symmetric=False))
    assert zero_point is not None
    assert (float(scale), int(zero_point)) == (float(torch.tensor(3.0) / 255), 0)


def test_binary_zero_is_plus_one() -> None:
    codes = affine.quantize(torch.tensor([0.0, -0.0, 1e-45, -1e-45]), torch.ones(()), None, TensorSpec("binary"))
    assert codes.tolist() == [1, 1, 1, -1]


# ------------------------------------------------------------------------------------------------ law 3


def bound(fmt: Format) -> float:
    """Greatest error inside the range, in scales. The sign grid has no inside; a mid-rise step is one scale too."""
    return 0.5 if fmt.grid != "sign" else math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", specs(), ids=lambda s: f"{s}-{'sym' if s.symmetric else 'affine'}")
def test_quantizing_twice_changes_nothing_and_the_error_is_bounded(spec: TensorSpec, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if not fits(shape, spec):
            continue
        x = (torch.randn(shape) * 3).to(dtype)
        scale, zero_point = qparams(x, spec)
        codes = affine.quantize(x, scale, zero_point, spec)
        assert codes.dtype == spec.fmt.dtype
        assert codes.shape == x.shape
        values = affine.dequantize(codes, scale, zero_point, spec)
        assert values.dtype == torch.float32
        assert torch.equal(affine.quantize(values, scale, zero_point, spec), codes)
        free = affine.rounded(x, scale, zero_point, spec).reshape(shape)
        inside = (free >= spec.fmt.lo) & (free <= spec.fmt.hi)
        step = affine.blocks(torch.ones(shape), spec) * affine.aligned(scale, affine.blocks(x, spec), spec)
        error = (values - x.float()).abs() / step.reshape(shape)
        assert bool((error[inside] <= bound(spec.fmt) * (1 + 1e-5)).all())


def test_the_bound_is_not_vacuous() -> None:
    spec = TensorSpec("int4", symmetric=True)
    x = torch.linspace(-7, 7, 1001)
    scale, _ = qparams(x, spec)
    error = (affine.dequantize(affine.quantize(x, scale, None, spec), scale, None, spec) - x).abs() / scale
    assert 0.49 < float(error.max()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("spec", [s for s in specs() if s.granularity in ("per_channel", "per_group", "per_token")],
                         ids=lambda s: f"{s}-{'sym' if s.symmetric else 'affine'}")
def test_granular_scales_are_those_of_each_slice_alone(spec: TensorSpec) -> None:
    """Each channel, group or token is quantized as a tensor of its own would be."""
    x = torch.randn(5, 8)
    alone = spec.replace(granularity="per_tensor", group_size=None, dynamic=False)
    codes = affine.quantize(x, *qparams(x, spec), spec)
    size = 4 if spec.granularity == "per_group" else 8
    for row, start in itertools.product(range(5), range(0, 8, size)):
        part = x[row, start : start + size]
        assert torch.equal(codes[row, start : start + size], affine.quantize(part, *qparams(part, alone), alone))


@pytest.mark.parametrize("granularity", ["per_token", "per_column", "per_channel", "per_tensor"])
def test_one_long_row_is_quantized_like_any_other(granularity: str) -> None:
    """Long tensors are quantized in pieces, along a dimension that a vector has none of to spare."""
    count = 2 * affine.PIECE + 5
    spec = TensorSpec("int8", granularity, dynamic=granularity == "per_token")
    x, scale = torch.randn(count) * 9, torch.rand(affine.scale_shape((count,), spec)) + 0.1
    expected = (x / scale).round().clamp(-128, 127)
    assert torch.equal(affine.quantize(x, scale, None, spec).float(), expected)
    assert torch.equal(affine.quantize_marking(x, scale, None, spec)[1].bool(), (x / scale).round() == expected)
    multiplier = torch.rand(count)
    codes = affine.requantize(x, multiplier, None, None, TensorSpec("int8", "per_tensor"), -128, 127)
    assert torch.equal(codes.float(), (x * multiplier).round().clamp(-128, 127))


def test_memory_format_survives() -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    codes = affine.quantize(x, torch.ones(()), 0, TensorSpec("uint8"))
    assert codes.is_contiguous(memory_format=torch.channels_last)
