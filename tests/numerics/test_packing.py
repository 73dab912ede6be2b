"""Packed codes: golden bytes for every width, and the way back for every odd shape."""

from __future__ import annotations

import pytest
import torch

from qat.errors import CheckpointError
from qat.numerics import packing
from qat.numerics.formats import FORMATS, Format, get_format

GOLDEN: dict[str, tuple[list[int], list[int]]] = {
    # codes, then the bytes: fields code - lo, the first code in the lowest bits, filled up with zero bits
    "binary": ([1, -1, 1, 1, -1, -1, -1, 1, 1], [0b10001101, 0b1]),
    "ternary": ([-1, 0, 1, 0, -1], [0b01100100, 0b00]),
    "int2": ([-2, -1, 0, 1, 1], [0b11100100, 0b11]),
    "uint2": ([3, 2, 1, 0, 3], [0b00011011, 0b11]),
    "int2_midrise": ([1, 0, -1, -2], [0b00011011]),
    "int3": ([-4, -3, -2, -1, 0, 1, 2, 3, 3], [0b10001000, 0b11000110, 0b11111010, 0b111]),
    "uint3": ([7, 0, 5], [0b01000111, 0b1]),
    "int4": ([-8, 7, 0], [0xF0, 0x08]),
    "uint4": ([1, 2, 15, 0], [0x21, 0x0F]),
    "int5": ([-16, 15, 1], [0b11100000, 0b1000111]),
    "uint5": ([31, 0, 1], [0b00011111, 0b100]),
    "int6": ([-32, 31, 0], [0b11000000, 0b00001111, 0b10]),
    "uint6": ([63, 1], [0b01111111, 0b0000]),
    "int7": ([-64, 63, 0], [0b10000000, 0b00111111, 0b10000]),
    "uint7": ([127, 1], [0b11111111, 0b0]),
    "int8": ([-128, 0, 127], [0, 128, 255]),
    "uint8": ([0, 128, 255], [0, 128, 255]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    fmt, (codes, data) = get_format(name), GOLDEN[name]
    packed = packing.pack(torch.tensor(codes).to(fmt.dtype), fmt)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == data
    assert packing.unpack(torch.tensor(data, dtype=torch.uint8), fmt, (len(codes),)).tolist() == codes


def test_every_width_has_golden_bytes() -> None:
    assert {get_format(n).bits for n in GOLDEN} == {f.bits for f in FORMATS.values()}


def random_codes(fmt: Format, shape: tuple[int, ...]) -> torch.Tensor:
    if fmt.grid == "sign":
        return (torch.randint(0, 2, shape) * 2 - 1).to(fmt.dtype)
    return torch.randint(fmt.lo, fmt.hi + 1, shape).to(fmt.dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (7, 5), (2, 0, 3), (1, 9, 1), (3, 3, 3, 3), (17, 31)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_round_trip(fmt: Format, shape: tuple[int, ...]) -> None:
    codes = random_codes(fmt, shape)
    packed = packing.pack(codes, fmt)
    assert packed.shape == (-(-codes.numel() * fmt.bits // 8),)
    back = packing.unpack(packed, fmt, shape)
    assert back.dtype == fmt.dtype
    assert torch.equal(back, codes)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_not_contiguous_codes(fmt: Format) -> None:
    codes = random_codes(fmt, (5, 7)).t()
    assert torch.equal(packing.unpack(packing.pack(codes, fmt), fmt, (7, 5)), codes)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_wrong_lengths_and_types_are_refused(fmt: Format) -> None:
    packed = packing.pack(random_codes(fmt, (9,)), fmt)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed.to(torch.int32)):
        with pytest.raises(CheckpointError, match="9 codes"):
            packing.unpack(wrong, fmt, (9,))


def test_a_code_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="ternary"):
        packing.unpack(torch.tensor([0b11000000], dtype=torch.uint8), get_format("ternary"), (4,))
    # in the filling after the last code nothing is read
    assert packing.unpack(torch.tensor([0b11000000], dtype=torch.uint8), get_format("ternary"),
                          (3, )).tolist() == [-1] * 3
