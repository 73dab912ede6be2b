"""Formats and specs: what the grids hold, and what is refused."""

from __future__ import annotations

import pytest
import torch

import qat
from qat.errors import SpecError
from qat.numerics import affine
from qat.numerics.formats import FORMATS, Format, TensorSpec, get_format


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_a_grid_holds_at_most_two_to_the_bits_values(fmt: Format) -> None:
    codes = torch.tensor([-1, 1] if fmt.grid == "sign" else list(range(fmt.lo, fmt.hi + 1))).to(fmt.dtype)
    levels = fmt.levels(codes).int()
    assert len(set(levels.tolist())) == fmt.values <= 2**fmt.bits
    assert int(levels.abs().max() if fmt.signed else levels.max()) == fmt.level_bound
    assert (0 in levels.tolist()) == fmt.has_zero
    assert levels.tolist() == sorted(levels.tolist())


@pytest.mark.parametrize(("name", "values"), [
    ("int2", [-2, -1, 0, 1]), ("uint2", [0, 1, 2, 3]), ("int2_midrise", [-1.5, -0.5, 0.5, 1.5]),
    ("ternary", [-1, 0, 1]), ("binary", [-1, 1]), ("int3_midrise", [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])])
def test_the_values_of_small_grids(name: str, values: list[float]) -> None:
    spec = TensorSpec(name)
    x = torch.linspace(-10, 10, 2001)
    zero_point = None
    seen = affine.dequantize(affine.quantize(x, torch.ones(()), zero_point, spec), torch.ones(()), zero_point, spec)
    assert sorted(set(seen.tolist())) == values


def test_unsigned_of_a_format() -> None:
    assert get_format("int5").unsigned().name == "uint5"
    for name in ("uint4", "binary", "ternary", "int2_midrise"):
        assert get_format(name).unsigned().name == name


@pytest.mark.parametrize("data", [
    {"format": "int9"}, {"format": "int0"}, {"format": ""}, {"format": None}, {"format": 8}, {"format": ["int8"]}, {},
    {"format": "int8", "granularity": "per_row"}, {"format": "int8", "granularity": "per_group"},
    {"format": "int8", "granularity": "per_group", "group_size": 0},
    {"format": "int8", "granularity": "per_group", "group_size": -4},
    {"format": "int8", "granularity": "per_group", "group_size": "32"}, {"format": "int8", "group_size": 32},
    {"format": "int8", "observer": "min_max"}, {"format": "int8", "observer": {}},
    {"format": "int8", "learned": "lsq2"},
    {"format": "int8", "scale_dtype": "float8"}, {"format": "int8", "scale_dtype": ["float16"]},
    {"format": "int8", "percentile": 40}, {"format": "int8", "percentile": float("nan")},
    {"format": "int8", "percentile": "most"}, {"format": "binary", "symmetric": False},
    {"format": "ternary", "symmetric": False}, {"format": "int8", "symmetric": "yes"}, {"format": "int8", "dynamic": 1},
    {"format": "int8", "dynamic": True, "learned": "lsq"}, {"format": "int8", "dynamic": True, "observer": "mse"},
    {"format": "int8", "granularity": "per_token"}, {"format": "uint8", "learned": "pact", "symmetric": True},
    {"format": "int8", "learned": "lsq_plus", "symmetric": True}, {"format": "int8", "group_fallback": "skip"}, 8, None,
    ["int8"]], ids=str)
def test_impossible_specs_are_refused(data: object) -> None:
    with pytest.raises(SpecError):
        TensorSpec.from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "hint"), [("fromat", "format"), ("granularty", "granularity"), ("bits", "keys are")])
def test_unknown_keys_name_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        TensorSpec.from_dict({"format": "int8", key: 1})


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="'int4'"):
        get_format("Int4")


@pytest.mark.parametrize("spec", [
    TensorSpec("int8", "per_token", dynamic=True), TensorSpec("int8", dynamic=True),
    TensorSpec("uint8", learned="pact"),
    TensorSpec("int8", learned="lsq_plus"), TensorSpec("uint8"), TensorSpec("uint4", symmetric=True),
    TensorSpec("int4", learned="lsq", symmetric=False)], ids=str)
def test_specs_that_no_weight_can_have(spec: TensorSpec) -> None:
    with pytest.raises(SpecError):
        spec.for_weight()


@pytest.mark.parametrize("spec", [
    TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_group", 4), TensorSpec("int8", learned="pact")], ids=str)
def test_specs_that_no_activation_can_have(spec: TensorSpec) -> None:
    with pytest.raises(SpecError):
        spec.for_activation()


@pytest.mark.parametrize("spec", [
    TensorSpec("int4", "per_group", 32, scale_dtype="float16"), TensorSpec("uint8", dynamic=True, symmetric=False),
    TensorSpec("int8", observer="percentile", percentile=99.0), TensorSpec("int2_midrise", learned="lsq")], ids=str)
def test_specs_survive_the_way_to_a_dict_and_back(spec: TensorSpec) -> None:
    assert TensorSpec.from_dict(spec.to_dict()) == spec
    assert "granularity" not in TensorSpec("int8").to_dict()


def test_public_names() -> None:
    assert qat.TensorSpec is TensorSpec
    assert issubclass(SpecError, qat.QuantizationError)
