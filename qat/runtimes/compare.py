"""One deployed model in many runtimes: what each computes, how fast, and which integer operators really ran."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.deploy.convert import outputs
from qat.deploy.export import check_deployed
from qat.errors import QuantizationError, UnsupportedError
from qat.modules.functional import QuantizedAdd, QuantizedConcat
from qat.rewriter import coverage, quantized_modules
from qat.runtimes.base import Operator, Read, Session, is_integer
from qat.runtimes.registry import check_name, get
from qat.runtimes.timing import alternating_times
from qat.runtimes.watch import Difference, Watched, differences, watch
from qat.tracing import call, evaluating

EIGHT_BITS = 255
"""Steps that an 8-bit grid has between the least and the greatest value."""


@dataclasses.dataclass
class RuntimeRow:
    """One runtime, on all data. What could not be found out is None, or empty.

    Attributes:
        runtime, version: its name, and the version of its package.
        error: why it did not run; nothing else is set then.
        notes: what was said while the file was written.
        metric: the caller's metric.
        agreement: share of the predictions that equal those of the deployed model in torch.
        output_difference: the greatest absolute difference of an output from torch's.
        output_steps: the same in steps, see :attr:`RuntimeTable.step`.
        code_difference: the greatest difference of a code at any quantizer of activations from torch's.
        differing_codes: the share of these codes that differ. ``compared_codes``: how many there were.
        code_layers: layer -> greatest difference and number of differing codes, of layers where some differ.
        codes_beside: the greatest difference, in steps, between the outputs of the file and those of the graph that the
            codes were read from; more than 0: the runtime fuses that graph in another way, and these are its codes.
        uncompared: layers whose quantizers could not be matched with those of torch.
        latency_ms: median of one batch, with the conversion of inputs and outputs.
        bytes: size of the file or folder.
        operators: what ran.
        layers: how many layers are quantized by the recipe (products, look-ups, sums).
        integer_layers: how many of them ran on integers.
        in_float: those of the others that ran in floating point -> the operator.
        unseen: those of which the runtime does not say what ran.
    """

    runtime: str
    version: str = ""
    error: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    metric: float | None = None
    agreement: float | None = None
    output_difference: float | None = None
    output_steps: float | None = None
    code_difference: int | None = None
    differing_codes: float | None = None
    compared_codes: int = 0
    code_layers: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    codes_beside: float = 0.0
    uncompared: list[str] = dataclasses.field(default_factory=list)
    latency_ms: float | None = None
    bytes: int | None = None
    operators: list[Operator] = dataclasses.field(default_factory=list)
    layers: int = 0
    integer_layers: int = 0
    in_float: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RuntimeTable:
    """Runtimes side by side.

    Attributes:
        metric: the name of the metric; None: there was none.
        step: what one step of ``output_steps`` is worth: the scale of the output's own grid where the model quantizes
            its output; else 1/255 of the range that the outputs in torch have on this data, an 8-bit grid over them.
        own_step: whether that is the output's own scale.
        examples: how many were compared. ``batch``: examples in the batch that was timed. ``threads``: of each runtime.
        code_batches: how many batches the codes are of.
        kept: layers with products that the recipe keeps in floating point -> why.
    """

    rows: list[RuntimeRow]
    metric: str | None
    step: float
    own_step: bool
    examples: int
    batch: int
    threads: int
    code_batches: int
    kept: dict[str, str]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows as text, of the runtimes that ran."""
        columns: dict[str, Callable[[RuntimeRow], str]] = {"runtime": lambda r: r.runtime}
        if self.metric is not None:
            columns[self.metric.replace("_", " ")] = lambda r: _shown(r.metric, ".5g")
        columns |= {
            "as torch": lambda r: _shown(r.agreement, ".2%"),
            "code diff": lambda r: _shown(r.code_difference, "d"),
            "codes off": lambda r: _shown(r.differing_codes, ".3%"),
            "output diff": lambda r: _shown(r.output_steps, ".3g"),
            "latency ms": lambda r: _shown(r.latency_ms, ".2f"),
            "bytes": lambda r: _shown(r.bytes, ","),
            "integer layers": lambda r: f"{r.integer_layers}/{r.layers}",
        }
        return list(columns), [[column(r) for column in columns.values()] for r in self.rows if r.error is None]

    def legend(self) -> list[str]:
        """What the columns are."""
        return [
            f"{self.examples} examples, batches of {self.batch}, {self.threads} threads; latency: median, alternating.",
            "as torch: share of equal predictions. code diff, codes off: greatest difference at any quantizer of "
            f"activations from torch's codes, and share that differs ({self.code_batches} batches).",
            f"output diff: in steps of {self.step:.3g}, "
            + ("the scale of the output's own grid." if self.own_step else "1/255 of the outputs' range."),
        ]

    def findings(self) -> list[tuple[str, bool]]:
        """What ran in each runtime, and what did not run as the recipe says: sentences, and whether they are bad."""
        said: list[tuple[str, bool]] = []
        for r in self.rows:
            if r.error is not None:
                said.append((f"{r.runtime} did not run: {r.error}", True))
                continue
            said.append((f"{r.runtime} {r.version}: {_counted(r.operators)}", False))
            said += [(f"{r.runtime}: {note}", True) for note in r.notes]
            if r.in_float:
                said.append((f"{r.runtime} runs in floating point what is quantized: "
                             + ", ".join(f"{layer}: {what}" for layer, what in r.in_float.items()), True))
            if r.unseen:
                said.append((f"{r.runtime} does not say what ran of: {', '.join(r.unseen)}", True))
            if r.code_layers:
                worst = sorted(r.code_layers.items(), key=lambda item: item[1][1], reverse=True)
                said.append((f"{r.runtime}: codes differ at " + ", ".join(
                    f"{layer or 'the model'} ({count}, by up to {most})" for layer, (most, count) in worst[:8])
                    + (f" and {len(worst) - 8} more" if len(worst) > 8 else ""), True))
            if r.codes_beside:
                said.append((f"{r.runtime}: its codes were read from a graph that it fuses in another way, whose "
                             f"outputs differ by up to {r.codes_beside:.3g} steps from those of the file", True))
            if r.uncompared:
                said.append((f"{r.runtime}: quantizers that could not be matched with torch's: "
                             + ", ".join(layer or "the model" for layer in r.uncompared), True))
        if self.kept:
            said.append(("kept in floating point by the recipe: "
                         + "; ".join(f"{name} ({reason})" for name, reason in self.kept.items()), False))
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        headers, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(headers, *rows)]
        lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                 for line in (headers, *rows)]
        return "\n".join([*lines, *self.legend(), *(text for text, _ in self.findings())])


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _counted(rows: Sequence[Operator]) -> str:
    """Operators with how often they ran, whatever the layer."""
    counts: dict[str, int] = {}
    for row in rows:
        kind = str(dataclasses.replace(row, layer="", count=1))
        counts[kind] = counts.get(kind, 0) + row.count
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no operator is known"


def argmax(output: Tensor, target: Any) -> Tensor | None:
    """The class of each row: the greatest of the last dimension; None where there is none."""
    return output.argmax(-1) if output.dim() > 1 and output.shape[-1] > 1 and output.is_floating_point() else None


@dataclasses.dataclass
class _Runner:
    """A runtime while it is compared."""

    row: RuntimeRow
    session: Session
    metric: Any
    equal: int = 0
    asked: int = 0
    difference: float = 0.0
    beside: float = 0.0
    codes: dict[str, Difference] = dataclasses.field(default_factory=dict)
    uncompared: dict[str, None] = dataclasses.field(default_factory=dict)


def compare_runtimes(
    deployed: nn.Module,
    batches: Iterable[Any],
    runtimes: Iterable[str] = ("torch", "onnxruntime"),
    *,
    metric: Any = None,
    metric_name: str = "metric",
    predict: Callable[[Tensor, Any], Tensor | None] = argmax,
    folder: Path | None = None,
    repeats: int = 20,
    code_batches: int = 4,
) -> RuntimeTable:
    """Export a deployed model for each runtime, run the same data through all, and compare them with torch.

    Args:
        deployed: from :func:`qat.convert` or :func:`qat.load`, on the CPU.
        batches: inputs (a tensor, a tuple of arguments or a dict of keywords each); with a metric (inputs, target).
        runtimes: names of ``qat.runtimes.RUNTIMES``.
        metric: a torchmetrics metric, updated with the first output and the target.
        predict: the predictions in an output, given the target (None without a metric); None: there are none.
        folder: where to keep the exported files; None: nowhere.
        repeats: timed calls of each runtime.
        code_batches: on how many batches the codes at the quantizers are compared.

    Raises:
        UnsupportedError: an unknown runtime; no batch; none of the runtimes ran (the reasons are named).
        CheckpointError: the model is not deployed.
    """
    names = list(dict.fromkeys(runtimes))
    for name in names:
        check_name(name)
    check_deployed(deployed)
    left = iter(batches)
    start = next(left, None)
    if start is None:
        raise UnsupportedError("a comparison of runtimes needs at least one batch")

    def parted(batch: Any) -> tuple[Any, Any]:
        return (batch[0], batch[1]) if metric is not None else (batch, None)

    first = parted(start)[0]
    with tempfile.TemporaryDirectory() as temporary:
        rows: list[RuntimeRow] = []
        runners: list[_Runner] = []
        for name in names:
            row = RuntimeRow(name)
            rows.append(row)
            try:
                runner = _started(row, deployed, folder or Path(temporary), first, metric)
            except QuantizationError as error:
                row.error = str(error)
                continue
            runners.append(runner)
        try:
            table = _compared(deployed, _again(start, left), parted, runners, rows, predict, code_batches)
            table.metric = None if metric is None else metric_name
            living = [r for r in runners if r.row.error is None]
            if not living:
                reasons = " ".join(f"{r.runtime}: {r.error}." for r in rows)
                raise UnsupportedError(f"none of the runtimes ran. {reasons}")
            times = alternating_times({r.row.runtime: functools.partial(_call, r.session, first) for r in living},
                                      repeats, torch.device("cpu"))
            for r in living:
                r.row.latency_ms = times[r.row.runtime]
                _say_what_ran(r, deployed)
        finally:
            for runner in runners:
                runner.session.close()
    return table


def _again(first: Any, left: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from left


def _started(row: RuntimeRow, deployed: nn.Module, folder: Path, first: Any, metric: Any) -> _Runner:
    runtime = get(row.runtime)
    path = folder / f"{row.runtime}{runtime.suffix}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        session = runtime.deploy(deployed, path, first)
    row.notes = list(dict.fromkeys(str(w.message) for w in said if w.category is UserWarning))
    row.version = _version(runtime.package)
    row.bytes = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    return _Runner(row, session, None if metric is None else metric.clone())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compared(deployed: nn.Module, batches: Iterable[Any], parted: Callable[[Any], tuple[Any, Any]],
              runners: Sequence[_Runner], rows: list[RuntimeRow], predict: Callable[[Tensor, Any], Tensor | None],
              code_batches: int) -> RuntimeTable:
    """All batches through all runtimes; the table without times and operators."""
    examples, size, lowest, highest, own, number = 0, 0, float("inf"), float("-inf"), None, 0
    for number, batch in enumerate(batches):
        inputs, target = parted(batch)
        if number < code_batches:
            watched = watch(deployed, inputs)
            expected = watched.outputs
            own = watched.output_scale() if number == 0 else own
        else:
            watched = None
            with evaluating(deployed), torch.no_grad():
                expected = outputs(call(deployed, inputs))
        count = _samples(inputs)
        examples, size = examples + count, size or count
        if expected[0].numel():
            lowest, highest = min(lowest, float(expected[0].min())), max(highest, float(expected[0].max()))
        wanted = predict(expected[0], target)
        for r in runners:
            if r.row.error is not None:
                continue
            try:
                _one_batch(r, deployed, inputs, target, expected, wanted, predict, watched)
            except QuantizationError as error:
                r.row.error = str(error)
    step = own if own is not None else (highest - lowest) / EIGHT_BITS
    for r in runners:
        if r.row.error is None:
            _summed_up(r, step)
    return RuntimeTable(rows, None, step, own is not None, examples, size, torch.get_num_threads(),
                        min(code_batches, number + 1), _kept(deployed))


def _one_batch(r: _Runner, deployed: nn.Module, inputs: Any, target: Any, expected: Sequence[Tensor],
               wanted: Tensor | None, predict: Callable[[Tensor, Any], Tensor | None], watched: Watched | None) -> None:
    made = _call(r.session, inputs)
    if [t.shape for t in made] != [t.shape for t in expected]:
        raise UnsupportedError(f"{r.row.runtime} returns tensors of shapes {[tuple(t.shape) for t in made]}, and the "
                               f"model {[tuple(t.shape) for t in expected]}")
    for one, other in zip(made, expected):
        r.difference = max(r.difference, _gap(one, other))
    if r.metric is not None:
        r.metric.update(made[0], target)
    if wanted is not None:
        got = predict(made[0], target)
        assert got is not None
        r.equal, r.asked = r.equal + int((got == wanted).sum()), r.asked + wanted.numel()
    if watched is not None and r.session.batch in (None, _samples(inputs)):
        theirs = r.session.codes(inputs)
        if theirs is not None:
            _take_codes(r, deployed, inputs, watched, theirs)
            r.beside = max([r.beside, *(_gap(a, b) for a, b in zip(made, theirs.outputs))])


def _gap(one: Tensor, other: Tensor) -> float:
    """The greatest difference; infinite values and NaN are equal to themselves."""
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one.double() - other.double()).abs())
    return float(gap.max()) if gap.numel() else 0.0


def _take_codes(r: _Runner, deployed: nn.Module, inputs: Any, watched: Watched, read: Read) -> None:
    theirs = read.codes
    found, unknown = differences(watched.codes(), theirs)
    if unknown:         # a layer took a short way, whose codes nobody sees: the same model without it
        found, unknown = differences(watch(deployed, inputs, "reference").codes(), theirs)
    for layer, gap in found.items():
        total = r.codes.setdefault(layer, Difference())
        total.greatest = max(total.greatest, gap.greatest)
        total.differing, total.codes = total.differing + gap.differing, total.codes + gap.codes
    r.uncompared |= dict.fromkeys(unknown)


def _summed_up(r: _Runner, step: float) -> None:
    row = r.row
    row.metric = None if r.metric is None else float(r.metric.compute())
    row.agreement = r.equal / r.asked if r.asked else None
    row.output_difference = r.difference
    row.output_steps = r.difference / step if step > 0 else None
    row.codes_beside = r.beside / step if step > 0 else 0.0
    row.uncompared = list(r.uncompared)
    row.compared_codes = sum(d.codes for d in r.codes.values())
    if row.compared_codes:
        row.code_difference = max(d.greatest for d in r.codes.values())
        row.differing_codes = sum(d.differing for d in r.codes.values()) / row.compared_codes
        row.code_layers = {layer: (d.greatest, d.differing) for layer, d in r.codes.items() if d.differing}


def _call(session: Session, inputs: Any) -> list[Tensor]:
    """Outputs for a batch of any size, from a session that may take one size only."""
    size, wanted = _samples(inputs), session.batch
    if wanted is None or size == wanted:
        return session(inputs)
    pieces: list[list[Tensor]] = []
    for start in range(0, size, wanted):
        count = min(wanted, size - start)
        rows = torch.arange(start, start + wanted).clamp(max=size - 1)      # the last sample fills up
        pieces.append([y[:count] for y in session(pytree.tree_map(
            lambda t, rows=rows: t[rows] if isinstance(t, Tensor) and t.dim() and len(t) == size else t, inputs))])
    return [torch.cat(parts) for parts in zip(*pieces)]


def _samples(inputs: Any) -> int:
    """Samples in a batch."""
    return next((len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1)


# --------------------------------------------------------------------------------------- what ran, layer by layer


def _say_what_ran(r: _Runner, deployed: nn.Module) -> None:
    """The operators of a runtime against what the recipe says of each layer."""
    expected = _quantized(deployed)
    summing = {n for n, m in quantized_modules(deployed).items() if isinstance(m, QuantizedAdd | QuantizedConcat)}
    row = r.row
    row.operators = [o for o in r.session.operators() if not o.sums or o.layer in summing]
    row.layers = len(expected)
    for layer, needed in expected.items():
        ran = [o for o in row.operators if o.layer == layer and o.sums == (layer in summing)]
        if not ran:
            row.unseen.append(layer)
            continue
        wrong = [o for o in ran if not _as_planned(o, *needed)]
        if wrong:
            row.in_float[layer] = ", ".join(map(str, wrong))
    row.integer_layers = row.layers - len(row.unseen) - len(row.in_float)


def _as_planned(operator: Operator, activation: bool, weight: bool) -> bool:
    """Whether the operands that are quantized by the recipe enter as integers."""
    if len(operator.operands) == 1:
        return operator.integer
    return all(is_integer(kind) for kind, needed in zip(operator.operands, (activation, weight)) if needed)


def _quantized(deployed: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Layers that multiply, look up or add -> whether their activations, and their weights or other operands, are
    quantized."""
    found = {}
    for name, module in quantized_modules(deployed).items():
        plan = module.plan
        if plan.parts or not (plan.weight or plan.input):
            continue
        found[name] = (plan.input is not None, plan.weight is not None or plan.input is not None)
    return found


def _kept(deployed: nn.Module) -> dict[str, str]:
    """Layers with products that stay in floating point, and why."""
    return {row.name: row.reason for row in coverage(deployed).rows if row.status == "kept" and row.macs}
