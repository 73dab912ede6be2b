"""A few rows against a weight of few bits: weighted sums of the weight's columns.

    sums[m, g, :] = sum over the inputs k of run g of  x[m, k] * w[:, k]

The weight is kept by input: row k of a table of bytes holds column k of the weight, 2, 4 or 8 bits an integer, and
torch's quantized embedding bags (FBGEMM) sum up its rows with the weights x, in float32, unpacking in registers. So
nothing but the packed bytes is read: half a byte a weight at 4 bits, where a float product reads four. The time grows
with the rows; for many rows unpacking once pays, see :mod:`qat.kernels.weight_only`.

Where x holds integers and no partial sum reaches 2**24, float32 is exact and the sums are accumulators.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

RUN = 1024
"""Inputs in a run where the caller asks for no size: a piece of work for a thread, and sums that stay exact."""

ALONE = 1 << 20
"""Multiply-accumulates up to which one thread is faster than two: handing work over takes 20 to 50 microseconds."""


class Columns:
    """Integers (out, in) of a small range, by input.

    Args:
        integers: (out, in), of a type of up to 16 bits, with ``max - min`` up to 255 (510 if all are odd).

    Attributes:
        table: uint8 (in, bytes of a column + scale and offset, which FBGEMM wants in each row).
        width: bits of an integer: 2, 4 or 8.
    """

    def __init__(self, integers: Tensor) -> None:
        self.out, self.inputs = integers.shape
        low, high = (int(v) for v in integers.aminmax())
        step = 2 if bool((integers & 1).all()) else 1       # mid-rise and sign grids are odd
        self.width = next(w for w in (2, 4, 8) if (high - low) // step < 1 << w)
        each = 8 // self.width
        fields = integers.t().to(torch.int16, memory_format=torch.contiguous_format).sub_(low)
        if step == 2:
            fields >>= 1
        fields = torch.nn.functional.pad(fields.to(torch.uint8), (0, -self.out % each)).view(self.inputs, -1, each)
        end = torch.tensor([step, low], dtype=torch.float32 if self.width == 8 else torch.float16).view(torch.uint8)
        self.table = torch.empty(self.inputs, fields.shape[1] + len(end), dtype=torch.uint8)
        body = self.table[:, : fields.shape[1]]
        body.copy_(fields[..., 0])
        for i in range(1, each):
            body |= fields[..., i] << (i * self.width)
        self.table[:, fields.shape[1] :] = end

    @staticmethod
    @cache
    def available() -> bool:
        """Whether torch has FBGEMM's vectorized kernels here; elsewhere its loops are slower than a float product."""
        return ("fbgemm" in torch.backends.quantized.supported_engines
                and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))

    def sums(self, x: Tensor, run: int = RUN) -> Tensor:
        """float32 (rows, runs, out) of ``x`` float32 (rows, in); the last run may be shorter."""
        rows = x.shape[0]
        runs = -(-self.inputs // run)
        indices, offsets = _bags(rows, self.inputs, run)
        flat = x.detach().reshape(-1)
        threads = 1 if rows * self.inputs * self.out <= ALONE else min(torch.get_num_threads(), rows * runs)
        if threads == 1:
            y = self._summed(indices, offsets, flat)
        else:
            cuts = [rows * runs * i // threads for i in range(threads + 1)]
            places = [(cut // runs) * self.inputs + (cut % runs) * run for cut in cuts]
            parts = [(indices[a:b], offsets[i:j] - a, flat[a:b])
                     for a, b, i, j in zip(places, places[1:], cuts, cuts[1:])]
            others = [_workers(threads - 1).submit(self._summed, *part) for part in parts[1:]]
            y = torch.cat([self._summed(*parts[0]), *(other.result() for other in others)])
        y = y.view(rows, runs, -1)
        return y if y.shape[-1] == self.out else y[..., : self.out].contiguous()

    def _summed(self, indices: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        ops: Any = torch.ops.quantized
        bag = {2: ops.embedding_bag_2bit_rowwise_offsets, 4: ops.embedding_bag_4bit_rowwise_offsets,
               8: ops.embedding_bag_byte_rowwise_offsets}[self.width]
        return bag(self.table, indices, offsets, False, 0, False, x, None, False)


@lru_cache(maxsize=256)
def _bags(rows: int, inputs: int, run: int) -> tuple[Tensor, Tensor]:
    """Which rows of the table are summed, one after another, and where each sum begins; both int32."""
    with torch.inference_mode(False):
        offsets = (torch.arange(0, rows * inputs, inputs, dtype=torch.int32)[:, None]
                   + torch.arange(0, inputs, run, dtype=torch.int32)).reshape(-1)
        return torch.arange(inputs, dtype=torch.int32).repeat(rows), offsets


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads beside the caller's: the kernels run on one each, and let go of the interpreter."""
    return ThreadPoolExecutor(count, "qat-columns")


# a forked process has none of its parent's threads
os.register_at_fork(after_in_child=_workers.cache_clear)
