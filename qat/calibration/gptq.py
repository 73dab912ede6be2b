"""GPTQ: weights rounded one input after another, each making up for the errors of those before it.

Over the calibration data, rounding changes a layer's outputs by ``tr(E H E^T)``: E is what it changes in the weight
matrix, and H the mean of ``x x^T`` over its inputs x. With ``H = L L^T`` (Cholesky) that is, for each output,

    sum over inputs j of  L_jj^2 (v_j - q_j)^2          v_j = w_j + sum over i > j of (w_i - q_i) L_ij / L_jj

and v_j depends only on the inputs behind j. So the inputs are rounded from the last to the first, each v_j to the
nearest code. These are the codes of Frantar et al. (2022, arXiv 2210.17323), who write them with the inverse of H and
its Cholesky factor; the form without an inverse is the LDLQ of Chee et al. (2023), and Babai's nearest plane. It takes
a quarter of the work before the first code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.walk import Arrival, walk
from qat.errors import CalibrationError, RecipeError
from qat.modules.base import QuantizedModule
from qat.modules.composite import Composite, Part
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.observers import make_observer
from qat.quantizers.quantizer import Quantizer, StaticQuantizer
from qat.rewriter import quantized_modules

LEAF = 32
"""Inputs that are rounded one by one before their errors go on to the others in one matrix product."""
CHUNK = 1 << 24
"""Values of input rows that are held at once, at most (but always one sample of a batch)."""
HESSIANS = 1 << 28
"""Values of Hessians that are held at once, at most (but always one): the parts of a composite take turns."""


# ------------------------------------------------------------------------------------------------ on tensors


def gptq(weight: Tensor, hessian: Tensor, spec: TensorSpec, scale: Tensor | None = None,
         zero_point: Tensor | int | None = None, mask: Tensor | None = None, damp: float = 0.01, order: bool = True
         ) -> tuple[Tensor, Tensor, Tensor | int | None]:
    """The codes of a weight matrix that change the products with its inputs least, found one input after another.

    Args:
        weight: (out, in), any floating dtype; for a grouped convolution (groups * out, in).
        hessian: (in, in), or (groups, in, in): the mean of ``x x^T`` over the inputs, see :class:`Hessian`.
        spec: of the weight, completed by ``for_weight``.
        scale, zero_point: of the codes, in the shape of :func:`qat.numerics.affine.scale_shape`. None: found here, as
            the spec's observer finds them: from the weight, or, for groups of inputs that come in their own order, when
            a group's turn comes, from what the errors before it have made of the weight.
        mask: bool, in the shape of ``weight``: False where it is pruned: level 0.
        damp: what is added to the diagonal of the Hessian, as a share of its mean. Ten times as much, and again, where
            that is too little to make it positive definite.
        order: inputs with the greatest values first (their errors are made up for by all others); False: the first
            input first.

    Returns:
        The codes (out, in); scale and zero point.

    Raises:
        CalibrationError: NaN or infinity in the Hessian; no damping makes it positive definite.
    """
    hessian = hessian if hessian.dim() == 3 else hessian.unsqueeze(0)
    groups, inputs = hessian.shape[:2]
    matrix = weight.float() if mask is None else torch.where(mask, weight.float(), 0.0)
    size = spec.group_size if spec.granularity == "per_group" else inputs
    assert size is not None
    search = scale is None and spec.granularity == "per_group" and not order
    if search:
        scale, zero_point = _empty(matrix, spec)
    elif scale is None:
        scale, zero_point = ranges(matrix, spec)
    assert scale is not None
    # the input at each place; places are worked on from the last to the first
    importance = hessian.diagonal(dim1=1, dim2=2)
    turn = (importance.argsort(dim=1, stable=True) if order
            else torch.arange(inputs - 1, -1, -1, device=weight.device).expand(groups, -1))
    lower = _factor(_taken(_taken(hessian, turn).transpose(1, 2), turn), damp)
    lower = lower.div_(lower.diagonal(dim1=1, dim2=2).clone().unsqueeze(1))
    given = _taken(matrix.reshape(groups, -1, inputs).transpose(1, 2), turn)            # groups, places, outputs
    kept = None if mask is None else _taken(mask.reshape(groups, -1, inputs).transpose(1, 2), turn)
    work = given.clone()                    # v in front of a place's turn, its error w - q behind it
    codes = torch.empty_like(given, dtype=spec.fmt.dtype)
    line = spec.replace(granularity="per_channel" if scale.dim() else "per_tensor", group_size=None)

    def by_group(value: Any) -> Any:
        """(groups * outputs, groups of inputs) to (groups, groups of inputs, outputs); anything else as it is."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.reshape(groups, -1, value.shape[1]).transpose(1, 2).contiguous()

    steps, offsets = by_group(scale), by_group(zero_point)

    def placing(low: int, high: int) -> list[tuple[Tensor, Tensor | int | None]]:
        """Scale and zero point at each place: (), or (groups * outputs,)."""
        def spread(value: Any) -> Sequence[Any]:
            if not isinstance(value, Tensor) or value.dim() < 3:
                return [value] * (high - low)
            return _taken(value, turn[:, low:high] // size).transpose(0, 1).flatten(1).unbind()
        return list(zip(spread(steps), spread(offsets)))

    def place_group(low: int, high: int) -> None:
        """Find the range of a group whose turn has come, from the values that its inputs would take without a grid."""
        number = int(turn[0, low]) // size
        wanted = given[:, low:high] + torch.linalg.solve_triangular(
            lower[:, low:high, low:high].transpose(1, 2), work[:, low:high] - given[:, low:high], upper=True,
            unitriangular=True)
        wanted = wanted if kept is None else torch.where(kept[:, low:high], wanted, 0.0)
        found, offset = ranges(wanted.transpose(1, 2).reshape(-1, size), spec)
        steps[:, number] = found.view(groups, -1)
        if offset is not None:
            offsets[:, number] = offset.view(groups, -1)

    def round_one_by_one(low: int, high: int) -> None:
        for place, (step, offset) in reversed(list(zip(range(low, high), placing(low, high)))):
            value = work[:, place : place + 1]
            if place + 1 < high:
                value = value.baddbmm(lower[:, place + 1 : high, place : place + 1].transpose(1, 2),
                                      work[:, place + 1 : high])
            if kept is not None:
                value = torch.where(kept[:, place : place + 1], value, 0.0)
            chosen = affine.quantize(value.reshape(-1), step, offset, line)
            codes[:, place] = chosen.view(groups, -1)
            torch.sub(given[:, place], affine.dequantize(chosen, step, offset, line).view(groups, -1),
                      out=work[:, place])

    def round_all(low: int, high: int) -> None:
        """Work on the places from ``low`` to ``high``: in halves, so that errors travel in large products."""
        count = high - low
        if search and count == size:
            place_group(low, high)
        unit = size if search and count > size else LEAF
        if count <= unit:
            round_one_by_one(low, high)
            return
        middle = low + max(1, count // unit // 2) * unit
        round_all(middle, high)
        work[:, low:middle].baddbmm_(lower[:, middle:high, low:middle].transpose(1, 2), work[:, middle:high])
        round_all(low, middle)

    round_all(0, inputs)
    if search:
        scale = steps.transpose(1, 2).reshape(scale.shape)
        zero_point = None if offsets is None else offsets.transpose(1, 2).reshape(scale.shape)
    codes = _taken(codes, turn.argsort(dim=1))
    return codes.transpose(1, 2).reshape(weight.shape), scale, zero_point


def ranges(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that the spec's observer finds for a weight (out, in)."""
    observer = make_observer(spec, weight.shape).to(weight.device)
    observer.observe(weight)
    return observer.qparams()


def _empty(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    shape = affine.scale_shape(weight.shape, spec)
    zero_point = torch.zeros(shape, dtype=torch.int32, device=weight.device) if spec.symmetric is False else None
    return torch.ones(shape, device=weight.device), zero_point


def _taken(stack: Tensor, turn: Tensor) -> Tensor:
    """The rows of each matrix (groups, rows, columns), in this order (groups, rows); a copy."""
    # contiguous first: picking rows is a matter of copying lines then, and not of single values
    taken = [matrix.contiguous().index_select(0, rows) for matrix, rows in zip(stack, turn)]
    return torch.stack(taken) if len(taken) > 1 else taken[0].unsqueeze(0)


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """The lower Cholesky factor of each damped Hessian (groups, in, in), which is overwritten."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not bool(torch.isfinite(hessian.sum())):
        raise CalibrationError("NaN or infinity in the inputs; remove it from the calibration data")
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)         # inputs that are all zero: nothing to make up for
    bare = diagonal.clone()
    for _ in range(9):
        diagonal.copy_(bare + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            return lower
        damp = max(10.0 * damp, 1e-6)
    raise CalibrationError("no damping makes the Hessian of its inputs positive definite; look at the calibration data")


def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    """``tr(E H E^T)``, (): what changing the weight matrix by E (groups * out, in) does to the outputs, squared, for
    one input on average."""
    hessian = hessian if hessian.dim() == 3 else hessian.unsqueeze(0)
    change = change.reshape(hessian.shape[0], -1, hessian.shape[1])
    return (change @ hessian).mul_(change).sum()


class Hessian:
    """The mean of ``x x^T`` over input rows x, (groups, in, in) float32, gathered in pieces.

    Attributes:
        rows: how many there were.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor | None = None
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take rows (groups, rows, in) into account."""
        if not rows.shape[1]:
            return
        self.rows += rows.shape[1]
        self._waiting.append(rows.float())
        # few rows wait for more: each product reads and writes the whole sum
        if sum(r.numel() for r in self._waiting) > CHUNK or sum(r.shape[1] for r in self._waiting) > 4 * rows.shape[2]:
            self._gather()

    def _gather(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, 1)
        self._waiting = []
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        self._sum.baddbmm_(rows.transpose(1, 2), rows)

    def mean(self) -> Tensor:
        """The Hessian of all rows so far; there must be one."""
        self._gather()
        assert self._sum is not None
        return self._sum / self.rows


# ------------------------------------------------------------------------------------------------ on models


def round_weights(model: nn.Module, batches: Sequence[Any], progress: Any = None, damp: float = 0.01,
                  order: bool = True) -> dict[str, str]:
    """Give the weights of a prepared model with ranges the values of the codes that :func:`gptq` chooses, in place.

    Each layer's inputs are those that the layers before it, rounded already, make of the batches, on the grid of its
    input quantizer. The parts of a composite see its other parts rounded to nearest. What cannot be rounded so stays
    rounded to nearest: embeddings (their Hessian is diagonal, so nothing makes up for anything), weights that they
    share, layers that no batch came to.

    Args:
        progress: called with ``"gptq"``, the weights done, and their number.
        damp, order: see :func:`gptq`.

    Returns:
        A note for each weight: the relative error of the layer's output, ``tr(E H E^T) / tr(W H W^T)``, of rounding to
        nearest and of what it has now (on some hundred outputs, evenly spaced, where there are more).

    Raises:
        RecipeError: an option that means nothing.
        CalibrationError: NaN or infinity in the inputs of a layer; it is named.
    """
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < math.inf:
        raise RecipeError(f"calibration gptq: damp is a share of the Hessian's diagonal such as 0.01, not {damp!r}")
    if not isinstance(order, bool):
        raise RecipeError(f"calibration gptq: order is true or false, not {order!r}")
    modules = {n: m for n, m in quantized_modules(model).items() if isinstance(m.weight_quantizer, StaticQuantizer)}
    notes = {name: f"rounded to nearest: {why}" for name, why in _excluded(modules).items()}
    wanted = {n: m for n, m in modules.items() if n not in notes}
    stops: dict[str, Any] = {}
    homes: dict[str, dict[str, QuantizedModule]] = {}
    names = {id(m): n for n, m in quantized_modules(model).items()}
    for name, module in wanted.items():
        stop = module.owner if isinstance(module, Part) else module
        stops[names[id(stop)]] = stop
        homes.setdefault(names[id(stop)], {})[name] = module
    done, few = 0, []

    @torch.no_grad()
    def work(stop: str, arrivals: list[Arrival]) -> None:
        nonlocal done
        for products in _turns(homes[stop]):
            for name, hessian in _hessians(stops[stop], products, arrivals).items():
                module = products[name]
                notes[name] = _round(module, hessian, damp, order)
                if 0 < hessian.rows < module.weight_matrix()[0].numel():
                    few.append(f"{name} ({hessian.rows} rows of {module.weight_matrix()[0].numel()} inputs)")
                done += 1
                if progress is not None:
                    progress("gptq", done, len(wanted))

    for name in walk(model, batches, stops, work) if stops else ():
        notes |= dict.fromkeys(homes[name], UNREACHED)
    if few:
        shown = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
        warnings.warn(f"gptq: fewer rows than inputs, so their Hessians are singular and the damping carries them: "
                      f"{shown}; calibrate with more data", stacklevel=3)
    return notes


UNREACHED = "rounded to nearest: no batch came to it"


def _excluded(modules: Mapping[str, QuantizedModule]) -> dict[str, str]:
    """What is left out, and why."""
    found: dict[str, str] = {}
    tables = {id(m.weight_quantizer): n for n, m in modules.items() if isinstance(m, nn.Embedding)}
    owners: dict[int, str] = {}
    for name, module in modules.items():
        quantizer = id(module.weight_quantizer)
        if isinstance(module, nn.Embedding):
            found[name] = "for the rows of a table nothing is nearer"
        elif quantizer in tables:
            found[name] = f"its weight is that of the embedding {tables[quantizer]}"
        elif owners.setdefault(quantizer, name) != name:
            found[name] = f"its weight is that of {owners[quantizer]}"
        elif not _stored(module):
            found[name] = "its weight is computed at each call"
        elif not module.shows_rows:
            found[name] = f"a {module.plan.kind} does not show its inputs as rows"
    return found


def _stored(module: QuantizedModule) -> bool:
    """Whether the weight is a parameter, or a parametrization that may take a value for it."""
    holder, attribute = ((module.source.holder(module.owner), module.source.attribute) if isinstance(module, Part)
                         else (module, "weight"))
    return attribute in holder._parameters or nn.utils.parametrize.is_parametrized(holder, attribute)


def _turns(products: Mapping[str, QuantizedModule]) -> Iterator[dict[str, QuantizedModule]]:
    """As many at a time as their Hessians fit into memory."""
    held: dict[str, QuantizedModule] = {}
    values = 0
    for name, module in products.items():
        more = module.weight_matrix()[0].numel() ** 2
        if held and values + more > HESSIANS:
            yield held
            held, values = {}, 0
        held[name] = module
        values += more
    yield held


def _hessians(stop: QuantizedModule, products: Mapping[str, QuantizedModule], arrivals: Sequence[Arrival]
              ) -> dict[str, Hessian]:
    """The Hessian of each product inside ``stop``, which is itself the only one unless it is a composite."""
    hessians = {name: Hessian() for name in products}
    with _listening(products, hessians):
        for arrival in arrivals:
            if isinstance(stop, Composite):
                stop(*arrival.args, **arrival.kwargs)
            else:
                (name,) = products
                _gather(stop, hessians[name], [*arrival.args, *arrival.kwargs.values()][0])
    return hessians


@contextmanager
def _listening(products: Mapping[str, QuantizedModule], hessians: Mapping[str, Hessian]) -> Iterator[None]:
    """Parts add what they are called with to their Hessians, inside the block."""
    def listen(hessian: Hessian) -> Any:
        return lambda part, args, kwargs: _gather(part, hessian, [*args, *kwargs.values()][0])

    handles = [m.register_forward_pre_hook(listen(hessians[n]), with_kwargs=True)
               for n, m in products.items() if isinstance(m, Part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(module: QuantizedModule, hessian: Hessian, x: Tensor | QuantizedTensor) -> None:
    """Add the rows of one input, a few samples at a time where they are many."""
    taps = module.weight_matrix()[0, 0].numel()         # how often a convolution repeats each value
    split = isinstance(x, Tensor) and x.dim() > len(module.channels("input")) and _splits(module.input_quantizer)
    if isinstance(x, QuantizedTensor) or not split or x.numel() * taps <= CHUNK:
        hessian.add(module.input_rows(x))
        return
    for piece in x.split(max(1, CHUNK // (x[0].numel() * taps))):
        hessian.add(module.input_rows(piece))


def _splits(quantizer: Quantizer | None) -> bool:
    """Whether a batch has the same codes in pieces: not if its range is that of the whole batch."""
    return quantizer is None or not quantizer.spec.dynamic or quantizer.spec.granularity != "per_tensor"


def _round(module: QuantizedModule, hessian: Hessian, damp: float, order: bool) -> str:
    """Give one weight its new values; the note about it."""
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, StaticQuantizer)
    if not hessian.rows:
        return UNREACHED
    original = module.weight_matrix().detach().clone()
    matrix = quantizer.masked(original).flatten(1).float()
    mask = None if quantizer.mask is None else quantizer.mask.flatten(1)
    nearest, mean, spec = quantizer.quantize(original), hessian.mean(), quantizer.spec
    search = spec.granularity == "per_group" and not (order or quantizer.frozen)
    scale, zero_point = (None, None) if search else (nearest.scale, nearest.zero_point)
    try:
        codes, scale, zero_point = gptq(matrix, mean, spec, scale, zero_point, mask, damp, order)
    except CalibrationError as error:
        raise CalibrationError(f"{module.name}: {error}") from None
    some = slice(None, None, max(1, len(matrix) // len(mean) // 256))       # outputs of each group, evenly spaced

    def on_outputs(change: Tensor) -> float:
        return float(output_error(change.reshape(len(mean), -1, change.shape[1])[:, some].flatten(0, 1), mean))

    before = on_outputs(matrix - nearest.dequantize(torch.float32).flatten(1))
    after = on_outputs(matrix - affine.dequantize(codes, scale, zero_point, spec))
    whole = on_outputs(matrix) or 1.0
    if after > before:
        return f"rounded to nearest: output error {before / whole:.3g}, gptq's would be {after / whole:.3g}"
    held = quantizer.frozen
    at_work = quantizer.present() if held else quantizer.place(
        scale, zero_point if isinstance(zero_point, Tensor) else None)
    if _write(module, affine.dequantize(codes, *at_work, spec).reshape(original.shape).to(original.dtype), codes):
        return f"gptq: output error {before / whole:.3g} -> {after / whole:.3g}"
    if not held:
        quantizer.restart()
        quantizer.quantize(original)
    return "rounded to nearest: its weight is computed from others and does not take the values of codes"


def _write(module: QuantizedModule, values: Tensor, codes: Tensor) -> bool:
    """Whether the weight takes these values, so that it has these codes; if not, it stays what it was."""
    original = module.weight_matrix().detach().clone()
    try:
        module.write_weight(values)
    except CalibrationError:
        return False
    if torch.equal(module.quantized_weight().codes.flatten(1), codes):
        return True
    module.write_weight(original)
    return False
