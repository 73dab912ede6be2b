"""The memory plan for people: one line for each precision, in decimal units."""

from __future__ import annotations

import re

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qat.deploy.memory import DEVICES, MemoryPlan, Need
from qat.errors import ConfigError

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def size(value: int) -> str:
    """Bytes with four digits, in the decimal unit that leaves 1 to 999; terabytes only from 10 on, so that models stay
    comparable.

    >>> size(700 * 10**9), size(21_875_000_000), size(1_234_567), size(12), size(2500 * 10**9)
    ('700 GB', '21.88 GB', '1.235 MB', '12 B', '2500 GB')
    """
    unit = next((u for u, many in UNITS.items() if value >= many * (10 if u == "TB" else 1)), "B")
    number = value / UNITS[unit]
    text = f"{number:.{max(0, 4 - len(str(int(number))))}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def read_devices(value: object) -> tuple[int, ...]:
    """Memory sizes from what a user writes: ``24GB``, ``80GiB``, ``24`` (GB), a list of them; None: the usual ones.

    Raises:
        ConfigError: not a size.
    """
    if value is None:
        return DEVICES
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError("device=[] names no memory size; leave it out, or give one such as 24GB.")
        return tuple(bytes_ for one in value for bytes_ in read_devices(one))
    units = {u.lower(): many for u, many in {**UNITS, **BINARY}.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if found is None or isinstance(value, bool) or (found[2].lower() or "gb") not in units or float(found[1]) <= 0:
        raise ConfigError(f"device={value}: give memory sizes such as 24GB or [24GB,80GiB].")
    return (round(float(found[1]) * units[found[2].lower() or "gb"]),)


def cells(plan: MemoryPlan) -> tuple[list[str], list[list[str]]]:
    """Headers and rows as text."""
    about = "~" if plan.contents.estimated else ""
    headers = ["precision", "weights", "scales", "KV cache", "prefill", "decode", "total", "fits on"]
    stored = None if plan.contents.stored is None else plan.contents.stored[0]

    def row(need: Need) -> list[str]:
        guess = about if need.scales and need.precision != stored else ""
        return [need.precision, size(need.weights), f"{guess}{size(need.scales)}",
                *("?" if value is None else size(value) for value in (need.cache, need.prefill, need.decode)),
                f"{'' if need.complete else '> '}{size(need.total)}", _fits(need, plan.devices)]

    return headers, [row(need) for need in plan.rows]


def _fits(need: Need, devices: tuple[int, ...]) -> str:
    """The smallest device that holds it, or how many of the largest do together."""
    many = -(-need.total // devices[-1])
    return size(need.fits(devices)[0]) if many == 1 else f"{many}x{size(devices[-1])}" if many < 1000 else "none"


def render_memory(plan: MemoryPlan) -> RenderableType:
    """For ``rich.print``: the table, within 80 columns, and what it rests on."""
    contents, work = plan.contents, plan.work
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    headers, rows = cells(plan)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for need, row in zip(plan.rows, rows):
        row[-1] = f"[{'green' if need.fits(plan.devices) else 'red'}]{row[-1]}[/]"
        table.add_row(*row)
    active = "" if contents.active is None else f", of which a token uses {contents.active:,}"
    groups = "for each output channel" if work.group_size is None else f"for each {work.group_size} inputs"
    lines = [f"Shapes: {contents.source}. {contents.parameters:,} parameters{active}.",
             f"GB = 1e9 bytes. Scales: {work.scale_dtype}{' with int32 zero points' if work.zero_points else ''}, one "
             f"for each output channel at 8 bits, {groups} below; there embeddings, first and last layer have 8 bits."]
    if contents.transformer is not None:
        cache = {None: "16 bits (32 at FP32)", "same": "as wide as the weights", 0: "none"}.get(
            work.kv_bits, f"{work.kv_bits} bits")
        values = "16 bits (32 at FP32)" if work.activation_bits is None else f"{work.activation_bits} bits"
        lines.append(f"Batch {work.batch} of {work.context:,} positions, {work.attention} attention. KV cache: {cache}."
                     f" Prefill, decode: peak of activations, {values}; total: with the greater of both.")
    lines += contents.notes
    if contents.positions and work.context > contents.positions:
        lines.append(f"context={work.context} is more than the {contents.positions:,} positions that the model is made "
                     "for.")
    if not plan.rows[0].complete:
        lines.append("> total and devices: weights and scales alone.")
    lines.append(f"Fits on: the smallest of {', '.join(map(size, plan.devices))} that holds the total, or how many of "
                 "the largest; what the runtime itself needs is not counted.")
    return Group(Text(f"Memory of {contents.title}\n", style="italic"), table,
                 Padding(Text("\n".join(lines), style="dim"), (1, 0)))

