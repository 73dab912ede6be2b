"""Quantized recurrent layers and cells: LSTM, GRU and Elman RNNs.

Their products are parts (see :mod:`qat.modules.composite`): ``ih_l0`` multiplies the inputs of all time steps at once,
``hh_l0`` the hidden state step by step, ``hr_l0`` projects it (``proj_size``). The gates between the products are
float32, in one expression for training and for deployment:

    LSTM    i, f, g, o = ih(x) + hh(h);    c' = sigmoid(f) * c + sigmoid(i) * tanh(g);    h' = sigmoid(o) * tanh(c')
    GRU     r, z = sigmoid(ih(x) + hh(h)); n = tanh(ih(x)_n + r * hh(h)_n);               h' = n + z * (h - n)
    RNN     h' = tanh(ih(x) + hh(h)), or relu

Training goes back through time in closed form: the weight is quantized once for a sequence, each step back makes one
product, and the gradient of the recurrent weight is one product over all steps at the end.

Papers: Hochreiter & Schmidhuber 1997; Cho et al. 2014; Elman 1990; Sak et al. 2014 (projections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from qat.kernels import ste, table
from qat.kernels.backends import FewCalls
from qat.modules.base import LayerPlan, register
from qat.modules.composite import Composite, Operand, Part, Source
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import DynamicQuantizer, Quantizer, StaticQuantizer

State = tuple[Tensor, ...]
Gradients = list[Tensor]


# ------------------------------------------------------------------------------------------ between the products


class Gates:
    """What happens in one time step between the products, in float32.

    Shapes: gates (rows, gates * hidden); each tensor of the state (rows, hidden).

    Attributes:
        sums: both products enter as their sum only, so they have one gradient.
    """

    sums: ClassVar[bool] = True

    @staticmethod
    def forward(x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        """The next state, and what :meth:`backward` needs.

        Args:
            x: the input product. ``h``: the recurrent product.
            state: (hidden,) or (hidden, cell).
        """
        raise NotImplementedError

    @staticmethod
    def backward(kept: State, g: Gradients, g_x: Tensor, g_h: Tensor) -> list[Tensor | None]:
        """The gradient of the state before (None: zero, but for the product); from that of the state after.

        Args:
            g_x, g_h: the gradients of both products are written here; one tensor for gates that only sum them.
        """
        raise NotImplementedError


class LSTMGates(Gates):
    """Four gates and a cell."""

    @staticmethod
    def forward(x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        gates = x + h
        opened = gates.sigmoid()
        i, f, _, o = opened.chunk(4, -1)
        new = gates.chunk(4, -1)[2].tanh()
        cell = f * state[1] + i * new
        shown = cell.tanh()
        return (o * shown, cell), (opened, new, shown, state[1])

    @staticmethod
    def backward(kept: State, g: Gradients, g_x: Tensor, g_h: Tensor) -> list[Tensor | None]:
        opened, new, shown, cell = kept
        i, f, _, o = opened.chunk(4, -1)
        g_cell = g[1] + g[0] * o * (1 - shown * shown)
        through = g_cell * i
        torch.cat([g_cell * new, g_cell * cell, through, g[0] * shown], -1, out=g_h)
        g_h.mul_(opened * (1 - opened)).chunk(4, -1)[2].copy_(through.mul_(1 - new * new))
        return [None, g_cell * f]


class GRUGates(Gates):
    """A reset gate, an update gate and a candidate."""

    sums = False

    @staticmethod
    def forward(x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        size = state[0].shape[-1]
        opened = (x[..., : 2 * size] + h[..., : 2 * size]).sigmoid()
        reset, update = opened.chunk(2, -1)
        recalled = h[..., 2 * size :]
        new = (x[..., 2 * size :] + reset * recalled).tanh()
        return (new + update * (state[0] - new),), (opened, new, recalled, state[0])

    @staticmethod
    def backward(kept: State, g: Gradients, g_x: Tensor, g_h: Tensor) -> list[Tensor | None]:
        opened, new, recalled, hidden = kept
        reset, update = opened.chunk(2, -1)
        g_new = g[0] * (1 - update) * (1 - new * new)
        g_opened = torch.cat([g_new * recalled, g[0] * (hidden - new)], -1).mul_(opened * (1 - opened))
        torch.cat([g_opened, g_new], -1, out=g_x)
        torch.cat([g_opened, g_new * reset], -1, out=g_h)
        return [g[0] * update]


class TanhGates(Gates):
    """Elman's network."""

    @staticmethod
    def forward(x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        new = (x + h).tanh()
        return (new,), (new,)

    @staticmethod
    def backward(kept: State, g: Gradients, g_x: Tensor, g_h: Tensor) -> list[Tensor | None]:
        torch.mul(g[0], 1 - kept[0] * kept[0], out=g_h)
        return [None]


class ReLUGates(Gates):
    """Elman's network with a ReLU."""

    @staticmethod
    def forward(x: Tensor, h: Tensor, state: State) -> tuple[State, State]:
        new = (x + h).relu()
        return (new,), (new,)

    @staticmethod
    def backward(kept: State, g: Gradients, g_x: Tensor, g_h: Tensor) -> list[Tensor | None]:
        torch.mul(g[0], kept[0] > 0, out=g_h)
        return [None]


# -------------------------------------------------------------------------------------- products, step by step


class Stepped:
    """A part that is used at every time step, with one operand for all of them.

    Attributes:
        part, operand: the part and its weight.
        dtype: what the state is rounded to in front of the product: the model's dtype.
        watched: the inputs of all steps, if somebody asked for them; else None.
        short: the product in the fewest calls, where there is a short way; None before the first step.
    """

    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        self.part, self.dtype = part, dtype
        self.operand: Operand = part.operand(dtype)
        self.watched: list[Tensor] | None = None
        self.short: FewCalls | bool | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, in) to float32 (rows, out); differentiable step by step."""
        x = x.to(self.dtype)
        if self.watched is not None:
            self.watched.append(x.detach())
        if not torch.is_grad_enabled() and x.shape[0]:
            if self.short is None:
                self.short = self._short_way(x)
            if isinstance(self.short, FewCalls):
                return self.short(x)
        return self.part(x, self.operand, torch.float32)

    def _short_way(self, x: Tensor) -> FewCalls | bool:
        """The product in the fewest calls, or False; the same bits."""
        part, quantizer, operand = self.part, self.part.input_quantizer, self.operand
        if (part.calibrating or operand.codes is None or operand.kernel is None or part._forward_hooks
                or part._forward_pre_hooks or quantizer is None or isinstance(quantizer, DynamicQuantizer)
                or not quantizer.only_places or not _has_range(quantizer) or x.dtype != torch.float32
                or x.device.type != "cpu" or operand.codes.spec.granularity == "per_group" or table.overridden()):
            return False
        if isinstance(quantizer, StaticQuantizer) and quantizer.observing:
            return False
        scale, zero_point, grid, _ = quantizer.placing(x)
        codes = ste.quantize(x, scale.detach(), zero_point, grid)
        if grid.floor is not None or grid.ceiling is not None or not FewCalls.serves(
                codes.codes, grid.spec, zero_point, operand.kernel):
            return False
        assert not isinstance(zero_point, Tensor)
        call = ste.Product(codes, operand.codes, whole_bias=part.plan.requantize)
        bias, steps = None if operand.bias is None else operand.bias.detach().float(), None
        if bias is not None and call.whole_bias:
            steps, bias = call.split(bias)
        return FewCalls(grid.spec, operand.kernel, call.multiplier_w(), bias, call.scale_x(), zero_point or 0, steps)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A static range stands still for the length of the sequence; then it takes all steps into account at once."""
        quantizer = self.part.input_quantizer
        moving = isinstance(quantizer, StaticQuantizer) and quantizer.observing
        if not moving or not (self.part.calibrating or _has_range(quantizer)):
            yield
            return
        assert quantizer is not None
        self.watched, quantizer.observing = [], False
        try:
            yield
        finally:
            quantizer.observing = True
        seen, self.watched = torch.cat(self.watched), None
        (quantizer.observe if self.part.calibrating else quantizer.follow)(seen)


def _has_range(quantizer: Quantizer | None) -> bool:
    return not isinstance(quantizer, StaticQuantizer) or quantizer.calibrated or not quantizer.observer.empty


class Recorded(Stepped):
    """A stepped part whose backward is in closed form: one product for each step, one for the weight at the end.

    Attributes:
        records: for each step, in the order of time once the backward begins, what it needs: codes or values, mask,
            scale, zero point, input.
    """

    def __init__(self, stepped: Stepped, like: Tensor) -> None:
        self.part, self.operand, self.dtype = stepped.part, stepped.operand, stepped.dtype
        self.watched, self.short = stepped.watched, None
        self.records: list[tuple[Any, ...]] = []
        quantizer = self.part.input_quantizer
        self.placing = None if quantizer is None or isinstance(quantizer, DynamicQuantizer) else quantizer.placing(like)
        weight = self.operand.values if self.operand.codes is None else self.operand.codes.carrier
        scale, offset = (self.placing[0], self.placing[3]) if self.placing is not None else (None, None)
        self.leaves = [weight, self.operand.bias, scale, offset]
        self.learns = any(t is not None and t.requires_grad for t in (scale, offset))

    @staticmethod
    def possible(stepped: Stepped) -> bool:
        """Whether the closed form serves: a quantizer that only places values on a grid, and no hook that looks in."""
        part = stepped.part
        quantizer = part.input_quantizer
        if part.calibrating or part._forward_hooks or part._forward_pre_hooks or not _has_range(quantizer):
            return False
        return quantizer is None or quantizer.only_places

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.watched is not None:
            self.watched.append(x.detach())
        quantizer = self.part.input_quantizer
        if quantizer is None:
            self.records.append((x, None, None, None, None))
            return self.part(x, self.operand, torch.float32)
        scale, zero_point, grid, _ = self.placing or quantizer.placing(x)
        codes, inside = ste.quantize_marking(x, scale, zero_point, grid)
        placed = QuantizedTensor(codes, scale.detach(), zero_point, grid.spec, None, x.dtype)
        offsets = zero_point if isinstance(zero_point, Tensor) else None
        self.records.append((codes, inside, placed.scale, offsets, x if self.learns else None))
        if self.short is None and x.shape[0]:
            self.short = self._short_way(x)
        if isinstance(self.short, FewCalls) and x.shape[0]:
            return self.short.of_codes(codes)
        return self.part(placed, self.operand, torch.float32)

    # ------------------------------------------------------------------ backward

    def start(self) -> None:
        """Prepare to go back through time."""
        codes = self.operand.codes
        self.input_gradients: dict[int, Tensor] = {}
        if codes is None:
            assert self.operand.values is not None
            low = self.operand.values.dtype in (torch.float16, torch.bfloat16)
            self.backward_dtype = torch.bfloat16 if low else torch.float32
            self.values = self.operand.values.detach().to(self.backward_dtype)
            return
        nothing = QuantizedTensor(codes.codes, codes.scale, None, codes.spec, None, self.dtype)
        self.backward_dtype = self.part.backward_type(nothing)
        self.values = ste.weight_values(ste.Product(nothing, codes), self.backward_dtype)

    def back(self, step: int, g: Tensor) -> Tensor:
        """The gradient of one step's input, float32, from that of its output."""
        g_x = (g.to(self.backward_dtype) @ self.values).float()
        inside = self.records[step][1]
        if self.learns:
            self.input_gradients[step] = g_x
            return g_x.clone() if inside is None else g_x * inside
        return g_x if inside is None else g_x.mul_(inside)

    def finish(self, g: Tensor) -> list[Tensor | None]:
        """The gradients of weight, bias, scale and offset, from that of all outputs (rows, out)."""
        weight, bias, scale, offset = self.leaves
        g_weight = g_scale = g_offset = None
        if weight is not None and weight.requires_grad:
            g_weight = self._weight_gradient(g).to(weight.dtype)
        g_bias = g.sum(0).to(bias.dtype) if bias is not None and bias.requires_grad else None
        if self.learns:
            assert self.placing is not None
            assert scale is not None
            codes, inside, x = (torch.cat([r[i] for r in self.records]) if self.records[0][i] is not None else None
                                for i in (0, 1, 4))
            assert codes is not None
            assert x is not None
            g_input = torch.cat([self.input_gradients[i] for i in range(len(self.records))])
            g_scale, g_offset = ste.scale_gradient(g_input, inside, x, scale.detach(), codes, offset, self.placing[1],
                                                   self.placing[2])
        return [g_weight, g_bias, g_scale, g_offset]

    def _weight_gradient(self, g: Tensor) -> Tensor:
        dtype = self.backward_dtype
        quantizer = self.part.input_quantizer
        if quantizer is None or self.operand.codes is None:
            values = torch.cat([r[0] if quantizer is None else self._placed(r).dequantize() for r in self.records])
            return (g.to(dtype).t() @ values.to(dtype)).float()
        if self.placing is None:                # a range, and so a scale, for each step or row
            sizes = [r[0].shape[0] for r in self.records]
            g = torch.cat([part * r[2] for part, r in zip(g.split(sizes), self.records)])
            levels = torch.cat([self._placed(r).levels(dtype) for r in self.records])
        else:
            first = self.records[0]
            levels = self._placed((torch.cat([r[0] for r in self.records]), *first[1:])).levels(dtype)
        g_weight = (g.to(dtype).t() @ levels).float().mul_(quantizer.spec.fmt.unit)
        return g_weight if self.placing is None else g_weight.mul_(self.placing[0].detach())

    def _placed(self, record: tuple[Any, ...]) -> QuantizedTensor:
        quantizer = self.part.input_quantizer
        assert quantizer is not None
        fixed = self.placing[1] if self.placing is not None else None
        return QuantizedTensor(record[0], record[2], fixed if record[3] is None else record[3], quantizer.spec, None,
                               self.dtype)


@dataclass
class Sweep:
    """One direction of one layer, over a whole batch of sequences.

    Attributes:
        gates: the arithmetic between the products.
        sizes: how many sequences take part in each time step, in the order of time; never growing.
        reverse: from the last time step to the first.
        hidden: the recurrent product.
        projection: the product that projects the hidden state, or None.
        dtype: of the output.
        kept: what the gates keep of each step for the backward; None: nothing.
    """

    gates: type[Gates]
    sizes: Sequence[int]
    reverse: bool
    hidden: Stepped
    projection: Stepped | None
    dtype: torch.dtype
    kept: list[State] | None = None

    @property
    def steps(self) -> list[int]:
        """The time steps in the order in which they are made."""
        return list(range(len(self.sizes)))[:: -1 if self.reverse else 1]

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The outputs (rows, hidden) of all steps in the order of time, and the last state (batch, hidden) each.

        Sequences that have ended, or not begun, keep their state.

        Args:
            x: float32 (rows, gates * hidden), the input product of all steps, one below the other.
            state: float32.
        """
        inputs = x.split(list(self.sizes))
        outputs: list[Tensor] = [x] * len(inputs)
        everyone = state[0].shape[0]
        for step in self.steps:
            size = self.sizes[step]
            live = state if size == everyone else tuple(s[:size] for s in state)
            new, kept = self.gates.forward(inputs[step], self.hidden(live[0]), live)
            if self.projection is not None:
                new = (self.projection(new[0]), *new[1:])
            outputs[step] = new[0].to(self.dtype)
            if self.kept is not None:
                self.kept.append(kept)
            state = new if size == everyone else tuple(torch.cat([n, s[size:]]) for n, s in zip(new, state))
        return torch.cat(outputs), state

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The same, differentiable in the cheapest way."""
        stepped = [self.hidden, *([] if self.projection is None else [self.projection])]
        with self.hidden.held():
            if self.projection is None:
                return self._run(stepped, x, state)
            with self.projection.held():
                return self._run(stepped, x, state)

    def _run(self, stepped: list[Stepped], x: Tensor, state: State) -> tuple[Tensor, State]:
        if not torch.is_grad_enabled() or not all(Recorded.possible(s) for s in stepped):
            return self.forward(x, state)
        recorded = [Recorded(s, like) for s, like in zip(stepped, (state[0], state[-1]))]
        leaves = [t for r in recorded for t in r.leaves]
        sweep = Sweep(self.gates, self.sizes, self.reverse, recorded[0], recorded[1] if self.projection else None,
                      self.dtype, [])
        output, *state_after = _ThroughTime.apply(sweep, len(state), x, *state, *leaves)
        return output, tuple(state_after)


class _ThroughTime(torch.autograd.Function):
    """Backpropagation through time of one sweep (Werbos 1990)."""

    @staticmethod
    def forward(ctx, sweep, count, x, *rest):
        output, state = sweep.forward(x, rest[:count])
        parts = [sweep.hidden, *([sweep.projection] if sweep.projection is not None else [])]
        # what was kept goes into the graph's saved tensors, which are freed as soon as this node's backward has run
        lists = [sweep.kept, *(p.records for p in parts)]
        flat = [t for kept in lists for step in kept for t in step]
        ctx.save_for_backward(*(p.operand.values for p in parts), *flat)
        ctx.widths = [len(kept[0]) for kept in lists]
        sweep.kept = None
        for part in parts:
            part.records, part.watched = [], None
        ctx.sweep, ctx.parts, ctx.count = sweep, parts, count
        return (output, *state)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_output, *g_state):
        sweep, parts, lists = ctx.sweep, ctx.parts, []
        saved = list(ctx.saved_tensors[len(parts) :])       # before them, weights in floating point, seen unchanged
        for width in ctx.widths:
            taken, saved = saved[: width * len(sweep.sizes)], saved[width * len(sweep.sizes) :]
            lists.append([tuple(taken[i : i + width]) for i in range(0, len(taken), width)])
        for part, records in zip(parts, lists[1:]):
            part.records = records[::-1] if sweep.reverse else records
            part.start()
        sizes = list(sweep.sizes)
        outputs = g_output.float().split(sizes)
        g_h = outputs[0].new_empty(sum(sizes), parts[0].values.shape[0])
        g_x = g_h if sweep.gates.sums else torch.empty_like(g_h)
        slots_h, slots_x = g_h.split(sizes), g_x.split(sizes)
        g_projected: list[Tensor] = [g_h] * len(sizes)
        g = [s.float() for s in g_state]
        everyone = g[0].shape[0]
        for kept, step in zip(reversed(lists[0]), reversed(sweep.steps)):
            size = sizes[step]
            live = g if size == everyone else [s[:size] for s in g]
            live = [live[0] + outputs[step], *live[1:]]
            if len(parts) > 1:
                g_projected[step] = live[0]
                live[0] = parts[1].back(step, live[0])
            before = sweep.gates.backward(kept, live, slots_x[step], slots_h[step])
            through = parts[0].back(step, slots_h[step])
            before[0] = through if before[0] is None else through.add_(before[0])
            g = before if size == everyone else [torch.cat([b, s[size:]]) for b, s in zip(before, g)]
        gradients = parts[0].finish(g_h) + (parts[1].finish(torch.cat(g_projected)) if len(parts) > 1 else [])
        for part in parts:
            part.records = []
        return (None, None, g_x, *g, *gradients)


# ------------------------------------------------------------------------------------------------------ layers


class QuantizedRecurrent(Composite):
    """Mixin for ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: everything they have in common."""

    gated: ClassVar[type[Gates]]

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    batch_first: bool
    dropout: float
    _flat_weights: list[Any]

    @classmethod
    def sources(cls, module: nn.Module) -> dict[str, Source]:
        found = {}
        names: Any = module._all_weights
        for layer in names:
            for weight in layer:
                if weight.startswith("weight_"):
                    bias = weight.replace("weight_", "bias_")
                    found[weight.removeprefix("weight_")] = Source(weight, bias if bias in layer else None)
        return found

    @classmethod
    def edge(cls, names: Sequence[str], first: bool) -> Sequence[str]:
        """First: what reads the model's input. Last: what makes the output."""
        if first:
            return [n for n in names if n.startswith("ih_l0")]
        last = names[-1].removesuffix("_reverse")
        return [n for n in names if n.removesuffix("_reverse") == last]

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> Any:
        adopted = super().swap(module, name, plan)
        # torch keeps the weights a second time, for its own kernels: they would stay alive, and would not be copied
        adopted._flat_weights_names, adopted._flat_weights, adopted._flat_weight_refs = [], [], []
        return adopted

    def flatten_parameters(self) -> None:
        """Nothing: the weights are not handed to torch's kernels."""

    def _gates(self) -> type[Gates]:
        return self.gated

    @torch.compiler.disable
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """As the float module: input (time, batch, in), (batch, time, in) with ``batch_first``, (time, in), or packed.

        Raises:
            RuntimeError, ValueError: for the shapes and dtypes that the float module refuses.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x: Any = input if packed is None else packed.data
        kind = type(self).__name__.removeprefix("Quantized")
        single = packed is None and x.dim() == 2
        if packed is None:
            if x.dim() not in (2, 3):
                raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {x.dim()}D tensor instead")
            if single:
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1)
            if x.shape[0] == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
            sizes = [x.shape[1]] * x.shape[0]
        else:
            sizes = packed.batch_sizes.tolist()
        self._check_input(x)
        states = self._states(x, hx, sizes[0], single, packed)
        dtype = self._dtype(x)
        rows = x.reshape(-1, x.shape[-1])
        last: list[State] = []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            if layer and self.dropout:
                rows = F.dropout(rows, self.dropout, self.training)
            outputs = []
            for suffix in directions:
                output, state = self._sweep(rows, f"l{layer}{suffix}", states[len(last)], sizes, dtype)
                outputs.append(output)
                last.append(state)
            rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        hidden = tuple(torch.stack([s[i] for s in last]).to(dtype) for i in range(len(last[0])))
        if packed is not None:
            y: Any = PackedSequence(self.finished(rows), packed.batch_sizes, packed.sorted_indices,
                                    packed.unsorted_indices)
            if packed.unsorted_indices is not None:
                hidden = tuple(h.index_select(1, packed.unsorted_indices) for h in hidden)
        else:
            y = rows.reshape(x.shape[0], x.shape[1], rows.shape[-1])
            y = y.squeeze(1) if single else y.transpose(0, 1) if self.batch_first else y
            y = self.finished(y)
            hidden = tuple(h.squeeze(1) for h in hidden) if single else hidden
        return y, hidden if len(hidden) > 1 else hidden[0]

    def _sweep(self, rows: Tensor, where: str, state: State, sizes: list[int], dtype: torch.dtype
               ) -> tuple[Tensor, State]:
        part: Callable[[str], Part] = self.get_submodule   # type: ignore[assignment]
        projection = Stepped(part(f"hr_{where}"), rows.dtype) if self.proj_size else None
        sweep = Sweep(self._gates(), sizes, where.endswith("_reverse"), Stepped(part(f"hh_{where}"), rows.dtype),
                      projection, dtype)
        return sweep.run(part(f"ih_{where}")(rows, None, torch.float32), state)

    def _check_input(self, x: Tensor) -> None:
        if x.dtype != self.float_dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"RNN input dtype ({x.dtype}) does not match weight dtype ({self.float_dtype}). Convert "
                             f"input: input.to({self.float_dtype}), or convert model: model.to({x.dtype})")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got "
                               f"{x.shape[-1]}")

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The output's dtype: under autocast on a CPU torch runs LSTMs in the lower precision, other kinds not."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and (device != "cpu" or len(self._widths()) > 1):
            return torch.get_autocast_dtype(device)
        return x.dtype

    def _widths(self) -> tuple[int, ...]:
        """The width of each tensor of the state."""
        return (self.hidden_size,)

    def _states(self, x: Tensor, hx: Any, batch: int, single: bool, packed: PackedSequence | None) -> list[State]:
        """The initial state of each layer and direction, float32; zeros where none is given.

        A state that is not given is held in no more memory than it needs, and is not part of the graph.
        """
        layers, widths = self.num_layers * (2 if self.bidirectional else 1), self._widths()
        if hx is None:
            return [tuple(x.new_zeros(batch, w, dtype=torch.float32) for w in widths)] * layers
        given = list(hx) if isinstance(hx, tuple | list) else [hx]
        if len(given) != len(widths):
            raise RuntimeError(f"{self.name or type(self).__name__}: hx has {len(given)} tensors, expected "
                               f"{len(widths)}: {'(h_0, c_0)' if len(widths) > 1 else 'h_0'}")
        for i, (h, width) in enumerate(zip(given, widths)):
            if h.dim() != (2 if single else 3):
                raise RuntimeError(f"For {'unbatched 2' if single else 'batched 3'}-D input, hx should also be "
                                   f"{2 if single else 3}-D but got {h.dim()}-D tensor")
            h = h.unsqueeze(1) if single else h
            if tuple(h.shape) != (layers, batch, width):
                raise RuntimeError(f"Expected hidden{f'[{i}]' if len(widths) > 1 else ''} size "
                                   f"{(layers, batch, width)}, got {list(h.shape)}")
            if packed is not None and packed.sorted_indices is not None:
                h = h.index_select(1, packed.sorted_indices)
            given[i] = h.float()
        return list(zip(*(h.unbind(0) for h in given)))


@register
class QuantizedLSTM(QuantizedRecurrent, nn.LSTM):
    """``nn.LSTM`` on integers."""

    replaces = nn.LSTM
    gated = LSTMGates

    def _widths(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)


@register
class QuantizedGRU(QuantizedRecurrent, nn.GRU):
    """``nn.GRU`` on integers."""

    replaces = nn.GRU
    gated = GRUGates


@register
class QuantizedRNN(QuantizedRecurrent, nn.RNN):
    """``nn.RNN`` on integers."""

    replaces = nn.RNN

    def _gates(self) -> type[Gates]:
        return TanhGates if self.mode == "RNN_TANH" else ReLUGates


# ------------------------------------------------------------------------------------------------------- cells


class QuantizedRecurrentCell(Composite):
    """Mixin for ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``: one time step."""

    gated: ClassVar[type[Gates]]
    states: ClassVar[int] = 1

    hidden_size: int
    bias: bool
    ih: Part
    hh: Part

    @classmethod
    def sources(cls, module: nn.Module) -> dict[str, Source]:
        bias: Any = module.bias
        return {key: Source(f"weight_{key}", f"bias_{key}" if bias else None) for key in ("ih", "hh")}

    def _gates(self) -> type[Gates]:
        return self.gated

    @torch.compiler.disable
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the float module: input (batch, in) or (in,); ``hx`` (batch, hidden) each, or without batch."""
        x = input
        kind = type(self).__name__.removeprefix("Quantized")
        if x.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {x.dim()}D instead")
        given = hx if isinstance(hx, tuple | list) else () if hx is None else (hx,)
        for i, h in enumerate(given):
            if h.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected hx{f'[{i}]' if self.states > 1 else ''} to be 1D or 2D, got "
                                 f"{h.dim()}D instead")
        single = x.dim() == 1
        x = x.unsqueeze(0) if single else x
        state = tuple((h.unsqueeze(0) if single else h).float() for h in given) or tuple(
            x.new_zeros(x.shape[0], self.hidden_size, dtype=torch.float32) for _ in range(self.states))
        if len(state) != self.states or any(h.shape != (x.shape[0], self.hidden_size) for h in state):
            raise RuntimeError(f"{kind}: expected {self.states} hidden tensors of shape "
                               f"{(x.shape[0], self.hidden_size)}, got {[tuple(h.shape) for h in state]}")
        device = x.device.type
        low = torch.is_autocast_enabled(device) and device != "cpu"
        dtype = torch.get_autocast_dtype(device) if low else x.dtype
        sweep = Sweep(self._gates(), [x.shape[0]], False, Stepped(self.hh, x.dtype), None, dtype)
        output, after = sweep.run(self.ih(x, None, torch.float32), state)
        hidden = (self.finished(output), *(h.to(dtype) for h in after[1:]))
        hidden = tuple(h.squeeze(0) for h in hidden) if single else hidden
        return hidden if self.states > 1 else hidden[0]


@register
class QuantizedLSTMCell(QuantizedRecurrentCell, nn.LSTMCell):
    """``nn.LSTMCell`` on integers."""

    replaces = nn.LSTMCell
    gated = LSTMGates
    states = 2


@register
class QuantizedGRUCell(QuantizedRecurrentCell, nn.GRUCell):
    """``nn.GRUCell`` on integers."""

    replaces = nn.GRUCell
    gated = GRUGates


@register
class QuantizedRNNCell(QuantizedRecurrentCell, nn.RNNCell):
    """``nn.RNNCell`` on integers."""

    replaces = nn.RNNCell

    def _gates(self) -> type[Gates]:
        return TanhGates if self.nonlinearity == "tanh" else ReLUGates
