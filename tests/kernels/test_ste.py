"""The closed-form straight-through estimator against one that autograd derives from floating point.

The formulation here is the usual one, written independently of the package: ``x + (dequantized - x).detach()``
where the value lies inside the grid, constant outside; then an ordinary float product of the two fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import UnsupportedError
from qat.kernels import activations, ste
from qat.kernels.contract import Geometry
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.quantizers.quantizer import make_quantizer


def fake(x: Tensor, scale: Tensor, zero_point: Tensor | int, lo: int, hi: int) -> Tensor:
    """Quantize-dequantize with the straight-through gradient inside; ``scale`` must broadcast against ``x``."""
    free = (x.detach() / scale).round() + zero_point
    value = (free.clamp(lo, hi) - zero_point) * scale
    inside = ((free >= lo) & (free <= hi)).to(x.dtype)
    return x * inside + (value - x * inside).detach()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.detach().abs().max() + 1e-6))


def spread(scale: Tensor, spec: TensorSpec, like: Tensor) -> Tensor:
    """The scale of each element."""
    if spec.granularity == "per_group":
        assert spec.group_size is not None
        return scale.repeat_interleave(spec.group_size, 1).reshape(like.shape)
    return scale.reshape(-1, *[1] * (like.dim() - 1)) if spec.granularity == "per_channel" else scale


ACTIVATIONS = [TensorSpec("int8", "per_tensor", symmetric=True), TensorSpec("uint8", "per_tensor", symmetric=False),
               TensorSpec("int4", "per_token", symmetric=True, dynamic=True),
               TensorSpec("uint8", "per_token", symmetric=False, dynamic=True)]
WEIGHTS = [TensorSpec("int8", "per_tensor", symmetric=True), TensorSpec("int4", "per_channel", symmetric=True),
           TensorSpec("int4", "per_channel", symmetric=False), TensorSpec("int4", "per_group", 3, symmetric=True)]


def compare(x: Tensor, w: Tensor, spec_x: TensorSpec, spec_w: TensorSpec, gained: bool, geometry: Geometry | None,
            float_product: Callable[[Tensor, Tensor], Tensor]) -> None:
    lo_x, hi_x = x.detach().min() * 0.5, x.detach().max() * 0.5           # clips: the masks matter
    scale_x, zero_x = affine.choose_qparams(*affine.reduce_range(x.detach(), spec_x), spec_x) if spec_x.dynamic else \
        affine.choose_qparams(lo_x, hi_x, spec_x)
    low_w, high_w = affine.reduce_range(w.detach(), spec_w)
    scale_w, zero_w = affine.choose_qparams(low_w * 0.6, high_w * 0.6, spec_w)
    out = w.shape[0]
    gain = torch.randn(out, requires_grad=True) if gained else None
    bias = torch.randn(out, requires_grad=True)
    point_x = int(zero_x) if zero_x is not None and zero_x.dim() == 0 else zero_x

    qx = ste.quantize(x, scale_x, point_x, ste.Grid(spec_x))
    qw = ste.quantize(w, scale_w, zero_w, ste.Grid(spec_w))
    y = ste.product(ste.Product(qx, qw, gain=gain, geometry=geometry), bias, torch.float32)
    wanted = [t for t in (x, w, gain, bias) if t is not None]
    g = torch.randn(y.shape)
    got = torch.autograd.grad(y, wanted, g)

    fmt_x, fmt_w = spec_x.fmt, spec_w.fmt
    fx = fake(x, scale_x, 0 if zero_x is None else zero_x, fmt_x.lo, fmt_x.hi)
    fw = fake(w, spread(scale_w, spec_w, w), 0 if zero_w is None else spread(zero_w, spec_w, w), fmt_w.lo, fmt_w.hi)
    along = (-1,) if geometry is None else (-1, *(1,) * geometry.dims)
    expected = float_product(fx, fw)
    if gain is not None:
        expected = expected * gain.reshape(along)
    expected = expected + bias.reshape(along)
    close(y, expected)
    for a, b in zip(got, torch.autograd.grad(expected, wanted, g)):
        assert bool(b.any())
        close(a, b)
    assert bool((got[0] == 0).any()) or spec_x.dynamic, "nothing was clipped: the mask is not tested"


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("spec_w", WEIGHTS, ids=str)
@pytest.mark.parametrize("spec_x", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (1, 12)], ids=str)
def test_linear(shape: tuple[int, ...], spec_x: TensorSpec, spec_w: TensorSpec, gained: bool) -> None:
    compare(torch.randn(shape, requires_grad=True), torch.randn(5, 12, requires_grad=True), spec_x, spec_w, gained,
            None,
            lambda a, b: a @ b.t())


RIGHT = [TensorSpec("int8", "per_tensor", symmetric=True), TensorSpec("uint8", "per_tensor", symmetric=False),
         TensorSpec("int4", "per_token", symmetric=True, dynamic=True),
         TensorSpec("uint8", "per_token", symmetric=False, dynamic=True), TensorSpec("int8", "per_column",
                                                                                    symmetric=False)]


@pytest.mark.parametrize("factor", [1.0, 0.125])
@pytest.mark.parametrize("spec_b", RIGHT, ids=str)
@pytest.mark.parametrize("spec_a", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("a_shape", "b_shape"), [((4, 6), (6, 5)), ((2, 3, 4, 6), (2, 3, 6, 5)), ((3, 4, 6), (6, 5)),
                                                  ((4, 6), (2, 6, 5)), ((2, 1, 1, 6), (3, 6, 1))], ids=str)
def test_matmul(a_shape: tuple[int, ...], b_shape: tuple[int, ...], spec_a: TensorSpec, spec_b: TensorSpec,
                factor: float) -> None:
    a, b = torch.randn(a_shape, requires_grad=True), torch.randn(b_shape, requires_grad=True)

    def put(x: Tensor, spec: TensorSpec) -> tuple[Any, Tensor]:
        low, high = affine.reduce_range(x.detach(), spec)
        shrink = 1.0 if spec.dynamic else 0.6                                # clips: the masks matter
        scale, zero = affine.choose_qparams(low * shrink, high * shrink, spec)
        point = int(zero) if zero is not None and zero.dim() == 0 else zero
        values = fake(x, scale, 0 if zero is None else zero, spec.fmt.lo, spec.fmt.hi)
        return ste.quantize(x, scale, point, ste.Grid(spec)), values

    qa, fa = put(a, spec_a)
    turned = spec_b.granularity == "per_token"
    qb, fb = put(b.transpose(-1, -2) if turned else b, spec_b)
    if turned:
        qb, fb = ste.transposed(qb), fb.transpose(-1, -2)
    y = activations.matmul(activations.Matmul(qa, qb, factor), torch.float32)
    expected = fa @ fb * factor
    close(y, expected)
    with torch.no_grad():
        assert torch.equal(activations.matmul(activations.Matmul(qa, qb, factor), torch.float32), y)
    g = torch.randn(y.shape)
    gradients = torch.autograd.grad(expected, (a, b), g)
    low = activations.matmul(activations.Matmul(qa, qb, factor, torch.bfloat16), torch.float32)
    for got, wanted in zip(torch.autograd.grad(y, (a, b), g, retain_graph=True), gradients):
        assert bool(wanted.any())
        close(got, wanted)
    for got, wanted in zip(torch.autograd.grad(low, (a, b), g), gradients):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


def test_a_scale_inside_the_sum_is_refused() -> None:
    rows = ste.quantize(torch.randn(4, 4), torch.ones(4, 1), None, ste.Grid(ACTIVATIONS[2]))
    one = ste.quantize(torch.randn(4, 4), torch.tensor(0.1), None, ste.Grid(ACTIVATIONS[0]))
    assert activations.matmul(activations.Matmul(rows, one), torch.float32).shape == (4, 4)
    with pytest.raises(UnsupportedError, match="right operand"):
        activations.Matmul(one, rows)
    with pytest.raises(UnsupportedError, match="left operand"):
        activations.Matmul(ste.transposed(rows), one)


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], Geometry]] = [
    ((2, 4, 9), (6, 2, 3), Geometry((2,), (1,), (1,), 2)),
    ((3, 3, 6, 5), (4, 3, 3, 3), Geometry((1, 1), (1, 1), (1, 1))),
    ((2, 6, 7, 7), (6, 1, 3, 3), Geometry((2, 1), (0, 2), (1, 2), 6)),
    ((2, 2, 4, 3, 4), (4, 2, 2, 1, 2), Geometry((1, 1, 2), (1, 0, 0), (1, 1, 1))),
]


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("spec_w", WEIGHTS[:3], ids=str)
@pytest.mark.parametrize("spec_x", [*ACTIVATIONS[:2], TensorSpec("int8", "per_sample", symmetric=True, dynamic=True),
                                    TensorSpec("uint8", "per_sample", symmetric=False, dynamic=True)], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CONVOLUTIONS, ids=str)
def test_convolution(x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Geometry, spec_x: TensorSpec,
                     spec_w: TensorSpec, gained: bool) -> None:
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[geometry.dims]
    compare(torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True), spec_x, spec_w, gained,
            geometry, lambda a, b: convolve(a, b, None, geometry.stride, geometry.padding, geometry.dilation,
                                            geometry.groups))


@pytest.mark.parametrize("name", ["binary", "int2_midrise", "ternary"])
def test_grids_without_the_usual_zero(name: str) -> None:
    """``dL/dx`` and ``dL/dw`` are those of the dequantized product."""
    spec = TensorSpec(name, "per_tensor", symmetric=True)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    scale = torch.tensor(0.7)
    qx, qw = ste.quantize(x, scale, None, ste.Grid(spec)), ste.quantize(w, scale, None, ste.Grid(spec, clipped=False))
    y = ste.product(ste.Product(qx, qw), None, torch.float32)
    values_x, values_w = qx.dequantize().detach(), qw.dequantize().detach()
    close(y, values_x @ values_w.t())
    g = torch.randn(y.shape)
    g_x, g_w = torch.autograd.grad(y, (x, w), g)
    if name == "binary":
        inside = x.detach().abs() <= 0.7 * ste.SIGN_WINDOW
    else:
        low, high = (-1.4, 1.4) if name == "int2_midrise" else (-1.05, 1.05)
        inside = (x.detach() >= low) & (x.detach() < high)
    assert 0 < int(inside.sum()) < inside.numel()
    close(g_x, (g @ values_w) * inside)
    close(g_w, g.t() @ values_x)


@pytest.mark.parametrize(("floor", "ceiling"), [(0.0, None), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["uint8", "int8"])
def test_an_absorbed_relu_masks_the_gradient(name: str, floor: float, ceiling: float | None) -> None:
    spec = TensorSpec(name, "per_tensor", symmetric=True)
    x = torch.linspace(-2, 3, 41, requires_grad=True)
    scale = torch.tensor(0.02)
    value = ste.quantize(x, scale, None, ste.Grid(spec, floor, ceiling)).dequantize()
    (g,) = torch.autograd.grad(value.sum(), x)
    y = torch.linspace(-2, 3, 41, requires_grad=True)
    expected = fake(y.clamp(floor, ceiling), scale, 0, spec.fmt.lo, spec.fmt.hi)
    close(value, expected)
    (wanted,) = torch.autograd.grad(expected.sum(), y)
    at_the_edge = (x.detach() == 0) | (x.detach() == (ceiling or 0))
    assert torch.equal(g[~at_the_edge], wanted[~at_the_edge])
    assert 0 < int(g.sum()) < 41


# ------------------------------------------------------------------------------------------------ learned scales


@pytest.mark.parametrize(("name", "granularity"), [("int8", "per_tensor"), ("uint4", "per_tensor"),
                                                   ("int4", "per_channel"), ("int2_midrise", "per_channel"),
                                                   ("binary", "per_channel"), ("ternary", "per_tensor")])
def test_lsq_scale_gradient(name: str, granularity: str) -> None:
    """``d value / d scale = level - x / scale`` inside, the bounding level outside (Esser et al. 2020)."""
    spec = TensorSpec(name, granularity, symmetric=True)
    fmt = spec.fmt
    x = torch.randn(6, 10)
    one = torch.tensor(0.008 if name == "int8" else 0.11)
    scale = (torch.rand(6) * 0.2 + 0.05 if granularity == "per_channel" else one).requires_grad_()
    value = ste.quantize(x, scale, None, ste.Grid(spec, learned="lsq", scale_gradient=0.37)).dequantize()
    g = torch.randn(x.shape)
    (got,) = torch.autograd.grad(value, scale, g)
    s = scale.detach().reshape(-1, 1) if granularity == "per_channel" else scale.detach()
    if fmt.grid == "sign":
        slope = torch.where(x >= 0, 1.0, -1.0)
    else:
        ratio = x / s
        code = ratio.floor() if fmt.grid == "midrise" else ratio.round()
        inside = (code >= fmt.lo) & (code <= fmt.hi)
        code = code.clamp(fmt.lo, fmt.hi)
        level = code + 0.5 if fmt.grid == "midrise" else code
        slope = torch.where(inside, level - ratio, level)
        assert 0 < int(inside.sum()) < inside.numel()
    close(got, 0.37 * (g * slope).sum(1 if granularity == "per_channel" else None))


def test_lsq_scale_gradient_by_finite_differences_where_values_are_clipped() -> None:
    """Outside the grid the value is ``level * scale``, which is smooth: no straight-through formula is needed."""
    spec, x = TensorSpec("int4", "per_tensor", symmetric=True), torch.tensor([-9.0, 8.0, 30.0])
    scale = torch.tensor(0.5, requires_grad=True)

    def total(s: Tensor) -> Tensor:
        return ste.quantize(x, s, None, ste.Grid(spec, learned="lsq")).dequantize().square().sum()

    (got,) = torch.autograd.grad(total(scale), scale)
    numeric = (total(torch.tensor(0.501)) - total(torch.tensor(0.499))) / 0.002
    torch.testing.assert_close(got, numeric, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("scale", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("name", ["uint4", "int4"])
def test_lsq_scale_gradient_of_what_an_absorbed_clamp_cuts(name: str, scale: float) -> None:
    """A ReLU6 in front gives 6, which lies inside of a wide grid and beyond a narrow one."""
    spec, x, g = TensorSpec(name, "per_tensor", symmetric=True), torch.randn(300) * 6, torch.randn(300)
    learned = torch.tensor(scale, requires_grad=True)
    value = ste.quantize(x, learned, None, ste.Grid(spec, 0.0, 6.0, learned="lsq")).dequantize()
    (got,) = torch.autograd.grad(value, learned, g)
    ratio = x.clamp(0.0, 6.0) / scale
    slope = torch.where(ratio.round() <= spec.fmt.hi, ratio.round() - ratio, spec.fmt.hi)
    assert int((x > 6.0).sum()) > 20
    close(got, (g * slope).sum())


def test_lsq_gradient_scale_of_a_quantizer() -> None:
    weight = torch.randn(4, 9)
    quantizer = make_quantizer(TensorSpec("int4", learned="lsq"), weight.shape)
    value = quantizer(weight)
    value.sum().backward()
    scale = quantizer.log_scale.detach().exp()
    ratio = weight / scale[:, None]
    code = ratio.round().clamp(-8, 7)
    slope = torch.where((ratio.round() >= -8) & (ratio.round() <= 7), code - ratio, code).sum(1)
    close(quantizer.log_scale.grad, slope / (9 * 8) ** 0.5 * scale)


def test_lsq_plus_gradients() -> None:
    """``value = (code - lo) * scale + offset``: to the scale LSQ's slope, to the offset 1 outside (Bhalgat)."""
    spec = TensorSpec("uint4", "per_tensor", symmetric=False)
    x = torch.randn(200)
    scale, offset = torch.tensor(0.1, requires_grad=True), torch.tensor(-0.6, requires_grad=True)
    point = int((0 - offset.detach() / scale.detach()).round())
    value = ste.quantize(x, scale, point, ste.Grid(spec, learned="lsq_plus"), offset).dequantize()
    g = torch.randn(200)
    g_scale, g_offset = torch.autograd.grad(value, (scale, offset), g)
    free = (x / 0.1).round() + point
    inside = (free >= 0) & (free <= 15)
    code = free.clamp(0, 15)
    assert 0 < int(inside.sum()) < 200
    close(g_scale, (g * (code - torch.where(inside, (x + 0.6) / 0.1, 0.0))).sum())
    close(g_offset, g[~inside].sum())
    value = ste.quantize(x, scale.detach(), point, ste.Grid(spec, learned="lsq_plus"), offset).dequantize()
    close(torch.autograd.grad(value, offset, g)[0], g_offset)       # where nothing else learns


def test_pact_gradient_is_that_of_the_upper_clip() -> None:
    """``alpha = scale * 15``; ``dL/dalpha`` sums the gradient of the clipped values (Choi et al. 2018)."""
    spec = TensorSpec("uint4", "per_tensor")
    x = torch.randn(200)
    scale = torch.tensor(0.05, requires_grad=True)
    value = ste.quantize(x, scale, 0, ste.Grid(spec, learned="pact")).dequantize()
    g = torch.randn(200)
    (got,) = torch.autograd.grad(value, scale, g)
    above = (x / 0.05).round() > 15
    assert int(above.sum()) > 10
    close(got, 15 * g[above].sum())


# ------------------------------------------------------------------------------------------------ gradient dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_models_get_gradients_of_their_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    w = torch.randn(3, 8).to(dtype).requires_grad_()
    spec = TensorSpec("int8", "per_tensor", symmetric=True)
    call = ste.Product(ste.quantize(x, torch.tensor(0.03), None, ste.Grid(spec)),
                       ste.quantize(w, torch.tensor(0.03), None, ste.Grid(spec)), backward_dtype=torch.bfloat16)
    y = ste.product(call, None, dtype)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == dtype


def test_bfloat16_backward_is_near_the_float32_one() -> None:
    spec = TensorSpec("int8", "per_tensor", symmetric=True)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        x, w = torch.randn(16, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
        call = ste.Product(ste.quantize(x, torch.tensor(0.03), None, ste.Grid(spec)),
                           ste.quantize(w, torch.tensor(0.03), None, ste.Grid(spec)), backward_dtype=dtype)
        y = ste.product(call, None, torch.float32)
        results.append((y, *torch.autograd.grad(y, (x, w), torch.randn(y.shape))))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1:], results[1][1:]):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_the_carrier_owns_no_memory() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    codes = ste.quantize(x, torch.tensor(0.03), None,
                         ste.Grid(TensorSpec("int8", symmetric=True, granularity="per_tensor")))
    assert codes.carrier is not None
    assert codes.carrier.untyped_storage().nbytes() <= 8
    assert codes.carrier.shape == x.shape
    with torch.no_grad():
        assert ste.quantize(x, torch.tensor(0.03), None, ste.Grid(codes.spec)).carrier is None
