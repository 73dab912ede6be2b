"""Codes of 1 to 8 bits packed into bytes, and back.

Codes are laid out flat in row-major order as unsigned fields ``code - lo`` (sign grid: ``(code + 1) / 2``), the first
code in the lowest bits: eight 1-bit codes in a byte, two 4-bit codes, eight 3-bit codes in three bytes. The last byte
is filled up with zero bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.errors import CheckpointError
from qat.numerics.formats import Format


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_size(9, 1), packed_size(3, 4), packed_size(5, 3)
    (2, 2, 2)
    """
    return -(-count * bits // 8)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """The codes as bytes: uint8 of shape ``(packed_size(codes.numel(), fmt.bits),)``.

    >>> from qat.numerics.formats import get_format
    >>> pack(torch.tensor([1, -1, -1, 1], dtype=torch.int8), get_format("binary")).tolist()
    [9]
    """
    flat = codes.reshape(-1).view(torch.uint8)      # arithmetic on bytes wraps around, which is what is wanted
    fields = (flat + 1) >> 1 if fmt.grid == "sign" else flat - (fmt.lo & 255)
    if fmt.bits == 8:
        return fields
    if 8 % fmt.bits == 0:
        each = 8 // fmt.bits
        fields = _padded(fields, each).view(-1, each)
        packed = fields[:, 0].clone()
        for i in range(1, each):
            packed |= fields[:, i] << (i * fmt.bits)
        return packed
    width = torch.arange(fmt.bits, dtype=torch.uint8, device=codes.device)
    stream = ((_padded(fields, 8).unsqueeze(-1) >> width) & 1).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)[: packed_size(codes.numel(), fmt.bits)].contiguous()


def unpack(packed: Tensor, fmt: Format, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The codes that :func:`pack` packed: ``fmt.dtype`` in ``shape``.

    Raises:
        CheckpointError: if the bytes do not hold exactly this many codes, or a code that the format lacks.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, fmt.bits):
        raise CheckpointError(f"{count} codes of {fmt.bits} bits take {packed_size(count, fmt.bits)} bytes, "
                              f"not {packed.numel()} of {packed.dtype}")
    fields = _fields(packed.reshape(-1), fmt.bits)[:count]
    if fmt.grid == "sign":
        codes = fields.view(torch.int8).mul_(2).sub_(1)
    elif not fmt.signed:
        codes = fields
    else:                       # in int8, where fields of 8 bits come round to where they belong
        codes = fields.view(torch.int8).add_(fmt.lo)
    if (fmt.values < 1 << fmt.bits and count and not torch.compiler.is_compiling()      # a graph looks at no values
            and int(codes.max()) > fmt.hi):
        raise CheckpointError(f"a packed code is outside of {fmt}: {fmt.lo}..{fmt.hi}")
    return codes.reshape(shape)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """The fields of packed bytes, and those of the bits that fill up the last one: a new uint8 tensor, flat."""
    if bits == 8:
        return packed.clone()
    each, mask = (8 // bits, (1 << bits) - 1) if 8 % bits == 0 else (8, (1 << bits) - 1)
    words = packed
    if 8 % bits:                # eight fields lie in as many bytes as each has bits
        bytes_ = _padded(packed, bits).view(-1, bits)
        words = bytes_[:, 0].to(torch.int32 if bits == 3 else torch.int64)
        for i in range(1, bits):
            words |= bytes_[:, i].to(words.dtype) << (8 * i)
    fields = packed.new_empty(len(words), each)
    for i in range(each):
        fields[:, i] = (words >> (i * bits)) & mask
    return fields.view(-1)


def _padded(fields: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(fields, (0, -fields.numel() % multiple))
