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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 1024
"""Inputs in a run where the caller asks for no size: short enough for sums of integers to stay exact."""

SHARE = 1 << 23
"""Weights that are worth a thread of their own: handing work over takes 20 to 50 microseconds."""

SERIAL = 1 << 15
"""Values that torch's operations work on without asking for threads, which each of ours would ask for."""

Reduce = Callable[[Tensor, slice], Tensor]


class Columns:
    """Integers (out, in) of a small range, by input, cut into one table for each thread along ``out``.

    Args:
        integers: (out, in), of a type of up to 16 bits, with ``max - min`` up to 255 (510 if all are odd).

    Attributes:
        tables: uint8 (in, bytes of its part of a column + scale and offset, which FBGEMM wants in each row).
        ranges: which outputs each table holds.
        width: bits of an integer: 2, 4 or 8.
    """

    def __init__(self, integers: Tensor) -> None:
        self.out, self.inputs = integers.shape
        low, high = (int(v) for v in integers.aminmax())
        step = 2 if bool((integers & 1).all()) else 1       # mid-rise and sign grids are odd
        self.width = next(w for w in (2, 4, 8) if (high - low) // step < 1 << w)
        end = torch.tensor([step, low], dtype=torch.float32 if self.width == 8 else torch.float16).view(torch.uint8)
        threads = max(1, min(torch.get_num_threads(), integers.numel() // SHARE))
        size = -(-self.out // threads)
        size += -size % 64                                  # whole vectors
        self.ranges = [slice(start, min(self.out, start + size)) for start in range(0, self.out, size)]
        self.tables = [self._table(integers[part], low, step, end) for part in self.ranges]

    def _table(self, integers: Tensor, low: int, step: int, end: Tensor) -> Tensor:
        each = 8 // self.width
        fields = integers.t().to(torch.int16, memory_format=torch.contiguous_format, copy=True).sub_(low)
        if step == 2:
            fields >>= 1
        fields = F.pad(fields.to(torch.uint8), (0, -fields.shape[1] % each)).view(self.inputs, -1, each)
        table = torch.empty(self.inputs, fields.shape[1] + len(end), dtype=torch.uint8)
        body = table[:, : fields.shape[1]]
        body.copy_(fields[..., 0])
        for i in range(1, each):
            body |= fields[..., i] << (i * self.width)
        table[:, fields.shape[1] :] = end
        return table

    @staticmethod
    @cache
    def available() -> bool:
        """Whether torch has FBGEMM's vectorized kernels here; elsewhere its loops are slower than a float product."""
        return ("fbgemm" in torch.backends.quantized.supported_engines
                and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))

    def sums(self, x: Tensor, reduce: Reduce, run: int = RUN) -> Tensor:
        """float32 (rows, out): the sums of ``x`` float32 (rows, in), reduced.

        Args:
            reduce: turns sums (rows, runs, some outputs), a tensor of its own, and the range of these outputs into
                (rows, some outputs). It is called for a few outputs at a time, in any thread.
            run: inputs in a run; the last one may be shorter.
        """
        indices, offsets = _bags(len(x), self.inputs, run)
        values = x.detach().reshape(-1).contiguous()       # of one row, or one input, the view may have strides

        def share(table: Tensor, part: slice) -> Tensor:
            bag: Any = getattr(torch.ops.quantized, BAGS[self.width])
            with torch.no_grad():
                y = bag(table, indices, offsets, False, 0, False, values, None, False)
                y = y.view(len(x), -1, y.shape[-1])[..., : part.stop - part.start]
                if len(self.tables) == 1:
                    return reduce(y, part)
                size = max(64, SERIAL // (len(x) * y.shape[1]))
                reduced = [reduce(piece, slice(start, start + piece.shape[-1]))
                           for start, piece in zip(range(part.start, part.stop, size), y.split(size, -1))]
                return reduced[0] if len(reduced) == 1 else torch.cat(reduced, 1)

        if len(self.tables) == 1:
            return share(self.tables[0], self.ranges[0])
        others = [_workers(len(self.tables) - 1).submit(share, table, part)
                  for table, part in zip(self.tables[1:], self.ranges[1:])]
        return torch.cat([share(self.tables[0], self.ranges[0]), *(other.result() for other in others)], 1)


def added_up(sums: Tensor) -> Tensor:
    """(rows, ...) of ``sums`` float32 (rows, runs, ...), which is overwritten: the second half of the runs is added to
    the first until one is left. Elementwise, so that neither strides nor threads change the order."""
    count = sums.shape[1]
    while count > 1:
        half = (count + 1) // 2
        sums[:, : count - half] += sums[:, half:count]
        count = half
    return sums[:, 0]


BAGS = {2: "embedding_bag_2bit_rowwise_offsets", 4: "embedding_bag_4bit_rowwise_offsets",
        8: "embedding_bag_byte_rowwise_offsets"}
"""torch's operators by the bits of an integer."""


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
