"""Rewrites that leave the function of a model alone: where there is room for them, and the proof of each.

Two rewrites are known here. The output channels of a layer, a norm or a batch norm can be multiplied by ``s`` where
every layer that reads them can divide its columns by it (a :class:`Scaling`); and what is written to a stream that
layers add to can be rotated where all its readers turn it back (:mod:`qat.calibration.rotation`).

Who reads whom is found by tracing a run, not by names. Whether scales pass through what lies in between (ReLU,
pooling, flattening, a product with a gate, attention with repeated heads) is not looked up in a table of functions but
tried: the producer's output is replaced by numbers of either sign and many magnitudes, its channels are multiplied by
powers of two that spell out the channel's number, and the inputs of the readers must come out multiplied by exactly
one of these, everywhere. So one finds also which channel of the producer each column belongs to. All layers are held
at fixed outputs meanwhile, so producers with different readers are tried in one run.

Nothing stays changed that was not verified: rewrites are applied in floating point and must give the outputs the model
had, up to rounding; those that do not are undone bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.ranges import activation_quantizers, calibrating
from qat.errors import CalibrationError
from qat.modules.adapted import Adapted
from qat.modules.attention import QuantizedMultiheadAttention
from qat.modules.base import QuantizedModule
from qat.modules.composite import Composite, Part
from qat.modules.parameters import SUFFIX
from qat.tracing import Call, Key, evaluating, is_leaf, leaves, run, trace_by_running

Convolution = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd
BatchNorm = nn.modules.batchnorm._BatchNorm

BASE = 7
"""Channel numbers are spelled in this base, with digits -3..3: the exponents of powers of two."""


@contextmanager
def floating(model: nn.Module) -> Iterator[None]:
    """A prepared model computes in floating point, in eval, without gradients, and observes nothing, in the block."""
    observing = [q for q in activation_quantizers(model) if q.observing]
    for quantizer in observing:
        quantizer.observing = False
    try:
        with calibrating(model), evaluating(model), torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for quantizer in observing:
            quantizer.observing = True


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


# ---------------------------------------------------------------------------------------------------- nodes


@dataclass(eq=False)
class Node:
    """A module whose output channels, or whose inputs, can be multiplied by changing its parameters.

    Attributes:
        kind: ``layer`` (linear, convolution, a projection of attention), ``norm``, ``batch_norm`` or ``embedding``.
        unit: a norm multiplies by ``unit + weight``: 0, or 1 where its weight is the difference to 1.
    """

    name: str
    module: Any
    kind: str
    unit: float = 0.0

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def quantized(self) -> bool:
        """Whether it has codes for its weight."""
        return isinstance(self.module, QuantizedModule) and self.module.plan.weight is not None

    @property
    def groups(self) -> int:
        return self.module.groups if isinstance(self.module, Convolution) else 1

    @property
    def taps(self) -> int:
        """Dimensions of a convolution's kernel; 0 for anything else."""
        return len(self.module.kernel_size) if isinstance(self.module, Convolution) else 0

    @property
    def channels(self) -> int:
        """How many output channels it has."""
        return self.module.weight.shape[1] if self.kind == "embedding" else self.matrix().shape[0]

    @property
    def inputs(self) -> int:
        """How many input channels a layer has."""
        return self.matrix().shape[1] * self.groups

    def axis(self, x: Tensor) -> int:
        """The dimension of an input or an output that holds the channels."""
        return 1 if self.kind == "batch_norm" else x.dim() - 1 - self.taps

    def matrix(self) -> Tensor:
        """The weight: (out, in // groups, *kernel) of a layer, (channels,) of a norm."""
        own = self.kind == "layer" and isinstance(self.module, QuantizedModule)
        return (self.module.weight_matrix() if own else self.module.weight).detach()

    def tensors(self) -> list[Tensor]:
        """What a rewrite may change."""
        found = [self.module.weight, self.bias]
        if self.kind == "batch_norm":
            found += [self.module.running_mean, self.module.running_var]
        return [t for t in found if t is not None]

    def write(self, matrix: Tensor) -> None:
        """Overwrite the weight."""
        if self.kind == "layer" and isinstance(self.module, QuantizedModule):
            self.module.write_weight(matrix)
        else:
            self.module.weight.copy_(matrix)

    def multiply_outputs(self, s: Tensor) -> None:
        """Output channel i is multiplied by ``s[i]``."""
        matrix = wide(self.matrix())
        s = s.to(matrix)
        gain = matrix + self.unit if self.kind == "norm" else matrix
        self.write(gain * s.reshape(-1, *[1] * (gain.dim() - 1)) - (self.unit if self.kind == "norm" else 0.0))
        if self.bias is not None:
            self.bias.copy_(wide(self.bias) * s)

    def multiply_inputs(self, factor: Tensor) -> None:
        """What a layer makes of input channel j is multiplied by ``factor[j]``."""
        self.write(columns_multiplied(wide(self.matrix()), factor, self.groups))

    def effective_input(self, x: Tensor) -> Tensor:
        """The input as the product sees it: an activation function that the quantizer absorbed is applied."""
        quantizer = getattr(self.module, "input_quantizer", None)
        return x if quantizer is None else quantizer.clamp(x)

    def effective_output(self, y: Tensor) -> Tensor:
        """An output, with an activation function behind that an output quantizer absorbed."""
        producer = getattr(self.module, "_producer", None)
        owner = producer[0] if producer else self.module
        quantizer = getattr(owner, "output_quantizer", None)
        if quantizer is None or (not producer and getattr(owner, "_batch_norm", None)):
            return y
        return quantizer.clamp(y)


def joined(owner: str, part: str) -> str:
    """The dotted name of a part."""
    return f"{owner}.{part}" if owner else part


def columns_multiplied(matrix: Tensor, factor: Tensor, groups: int = 1) -> Tensor:
    """(out, in // groups, ...) with what belongs to input channel j multiplied by ``factor[j]``, (in,)."""
    grouped = matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1], -1)
    return (grouped * factor.to(matrix).reshape(groups, 1, -1, 1)).reshape(matrix.shape)


def row_ranges(matrix: Tensor) -> Tensor:
    """Greatest magnitude for each output channel."""
    return matrix.abs().flatten(1).amax(1)


def column_ranges(matrix: Tensor, groups: int = 1) -> Tensor:
    """Greatest magnitude for each input channel."""
    return matrix.abs().reshape(groups, matrix.shape[0] // groups, matrix.shape[1], -1).amax((1, 3)).flatten()


# ---------------------------------------------------------------------------------------------------- rewrites


class Edits:
    """What tensors were before they changed."""

    def __init__(self) -> None:
        self.saved: list[tuple[Tensor, Tensor]] = []

    def keep(self, *tensors: Tensor) -> None:
        self.saved += [(t, t.detach().clone()) for t in tensors]

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        with torch.no_grad():
            for tensor, value in reversed(self.saved):
                tensor.copy_(value)
        self.saved.clear()


@dataclass(eq=False)
class Rewrite:
    """A change of parameters that is meant to leave the function alone.

    Attributes:
        layers: what it concerns, for notes.
        touched: the tensors that ``apply`` changes.
        apply: makes the change.
        watched: layers whose outputs must stay what they were too, each to its own magnitude.
    """

    layers: tuple[str, ...]
    touched: Sequence[Tensor]
    apply: Callable[[], None]
    watched: tuple[str, ...] = ()


@dataclass(eq=False)
class Scaling:
    """Channels that a producer may multiply by any ``s``, since every reader of them can divide by it.

    Attributes:
        start, stop: which channels of the producer; those beyond are left alone.
        readers: layer -> for each of its input channels the producer's channel, or -1.
    """

    producer: Node
    start: int
    stop: int
    readers: dict[str, Tensor]
    nodes: Mapping[str, Node] = field(repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.producer.name, *self.readers)

    def gather(self, values: Mapping[str, Tensor], reduce: str = "amax") -> Tensor:
        """One number for each channel of the producer, from one for each input channel of its readers; 0 if none."""
        to = torch.cat([self.readers[name] for name in values])
        flat = torch.cat(list(values.values()))
        read, to = (to >= 0).to(flat.device), to.to(flat.device)
        result = flat.new_zeros(self.producer.channels)
        return result.scatter_reduce_(0, to[read], flat[read], reduce, include_self=False)

    def spread(self, name: str, s: Tensor) -> Tensor:
        """One number for each input channel of a reader, 1 where it reads something else."""
        to = self.readers[name].to(s.device)
        return torch.where(to >= 0, s[to.clamp(min=0)], torch.ones_like(s[:1]))

    def rewrite(self, s: Tensor) -> Rewrite:
        """Outputs of the producer are multiplied by ``s`` (channels,), inputs of its readers divided."""
        readers = [self.nodes[n] for n in self.readers]

        def apply() -> None:
            self.producer.multiply_outputs(s)
            for reader in readers:
                reader.multiply_inputs(1.0 / self.spread(reader.name, s))

        return Rewrite(self.layers, [t for n in (self.producer, *readers) for t in n.tensors()], apply)


@dataclass(eq=False)
class _Candidate:
    """Channels that may make a :class:`Scaling`."""

    producer: Node
    start: int
    stop: int
    readers: list[str]
    numbers: dict[str, Tensor] = field(default_factory=dict)
    failed: bool = False


# ---------------------------------------------------------------------------------------------------- structure


class Structure:
    """What a run of a prepared model shows: its nodes, who reads them, and what it returned.

    Attributes:
        nodes: by name, those that were called exactly once.
        reasons: layer -> why its inputs cannot be rescaled.

    Raises:
        CalibrationError: no batch, or none with finite outputs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        if not batches:
            raise CalibrationError("calibration needs at least one batch")
        self.model = model
        self.modules = dict(model.named_modules())
        self.reasons: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}
        self.made: dict[str, Tensor] = {}
        self.called: dict[str, int] = {}
        with floating(model):
            self.batch = next((b for b in batches if all_finite(float_tensors(run(model, b)))), None)
            if self.batch is None:
                raise CalibrationError("no batch gives finite outputs; check the data and the model")
            self.trace = trace_by_running(model, self.batch)
            self.reading: dict[Key, list[Call]] = {}
            for call in self.trace.calls:
                for key in dict.fromkeys(call.inputs):
                    self.reading.setdefault(key, []).append(call)
            self._find_nodes()
        slots: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    slots.setdefault(id(parameter), set()).add(name)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for call in self.trace.functions:
            if call.owner not in self.nodes:
                for used in call.parameters:
                    slots[id(parameters[used.removesuffix(SUFFIX)])].add(
                        f"a call of {str(call.function).lstrip('~')} in {call.owner or 'the model'}")
        self.slots = slots

    def _run(self) -> Any:
        """What the model returns for the batch; the same each time, even if it draws random numbers."""
        torch.manual_seed(0)
        return run(self.model, self.batch)

    # ---------------------------------------------------------------- nodes

    def _find_nodes(self) -> None:
        """All modules that could be nodes, and what they made of the batch."""
        candidates: dict[str, Node] = {}
        inside: set[str] = set()                # what bypasses its children's forward, but for parts
        for name, module in self.modules.items():
            if name.rpartition(".")[0] in inside:
                inside.add(name)
            if isinstance(module, nn.MultiheadAttention | Composite):
                inside.add(name)
            kind = self._kind(module)
            if kind and (name not in inside or isinstance(module, Part)):
                candidates[name] = Node(name, module, kind)
        self.arguments: dict[str, tuple[Any, ...]] = {}     # of norms
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                if getattr(module, "is_quantizer", False):
                    continue

                def seen(module: nn.Module, args: Any, kwargs: Any, result: Any, name: str = name) -> None:
                    self.called[name] = self.called.get(name, 0) + 1
                    if name in candidates and isinstance(result, Tensor) and result.is_floating_point():
                        self.made[name] = result.clone()
                        if candidates[name].kind == "norm":
                            self.arguments[name] = tuple(a.clone() if isinstance(a, Tensor) else a
                                                         for a in (*args, *kwargs.values()))

                hooks.callback(module.register_forward_hook(seen, with_kwargs=True).remove)
            self.reference = [t.clone() for t in float_tensors(self._run())]
        for name, node in candidates.items():
            if self.called.get(name) != 1 or name not in self.made:
                continue
            if node.kind == "norm" and not _recognise_norm(node, self.arguments[name], self.made[name]):
                continue
            self.nodes[name] = node
        self.unreached = {n: m for n, m in candidates.items() if not self.called.get(n)}

    @staticmethod
    def _kind(module: nn.Module) -> str | None:
        holder, attribute = module, "weight"
        if isinstance(module, Part):
            holder, attribute = module.source.holder(module.owner), module.source.attribute
        weight = holder._parameters.get(attribute)
        if weight is None or isinstance(holder, Adapted) or nn.utils.parametrize.is_parametrized(holder):
            return None                         # computed from others, by a hook or a parametrization
        if isinstance(module, Part):
            return "layer" if isinstance(module.owner, QuantizedMultiheadAttention) else None
        if isinstance(module, nn.Linear | Convolution):
            return None if isinstance(module, Transposed) and not isinstance(module, QuantizedModule) else "layer"
        if isinstance(module, nn.Embedding):
            return "embedding" if module.max_norm is None else None
        if isinstance(module, BatchNorm):
            return "batch_norm" if module.running_mean is not None else None
        own = [p for p in module._parameters.values() if p is not None]
        flat = all(p.shape == weight.shape and p.dim() == 1 for p in own)
        known = set(module._parameters) <= {"weight", "bias"}
        return "norm" if flat and known and is_leaf(module) and not isinstance(module, nn.PReLU) else None

    def takes_off_mean(self, name: str) -> bool:
        """Whether a norm makes the same of ``x`` and of ``x + 1``."""
        module, arguments = self.modules[name], self.arguments[name]
        x = arguments[0]
        with floating(self.model):
            lifted = module(x + x.abs().mean().to(x), *arguments[1:])
        return agree(self.made[name], lifted, 1e-3)

    def shared(self, node: Node) -> str | None:
        """Who else reads a parameter of this node, if anybody."""
        for path in ("weight", "bias"):
            holder, attribute = node.module, path
            if isinstance(node.module, Part):
                source = node.module.source.weight if path == "weight" else node.module.source.bias
                if source is None:
                    continue
                holder = node.module.owner.get_submodule(source.rpartition(".")[0])
                attribute = source.rpartition(".")[2]
            parameter = holder._parameters.get(attribute)
            if parameter is None:
                continue
            others = [n for n in self.slots.get(id(parameter), ()) if self.modules.get(n) is not holder]
            if others:
                return sorted(others)[0]
        return None

    # ---------------------------------------------------------------- who reads whom

    def outputs(self, node: Node) -> list[Key]:
        """The keys of what a node made; of a projection of attention: what the attention made."""
        if isinstance(node.module, Part):
            return self.trace.of(node.name.rpartition(".")[0])[0].outputs[:1]
        return self.trace.of(node.name)[0].outputs[:1]

    def reach(self, node: Node) -> tuple[list[str], str]:
        """The layers that what a node makes comes to, and why not all of its readers are such layers ("" if so)."""
        owner, _, part = node.name.rpartition(".")
        if isinstance(node.module, Part) and part != "out":
            behind = joined(owner, "out")
            return ([behind], "") if behind in self.nodes else ([], f"{behind} is not called once")
        readers: dict[str, None] = {}
        obstacle = ""
        waiting, seen = self.outputs(node), set()
        while waiting:
            key = waiting.pop()
            if key in seen:
                continue
            seen.add(key)
            if key in self.trace.returned:
                obstacle = obstacle or "the model returns it"
            for call in self.reading.get(key, ()):
                if call.module is None and call.owner in self.nodes:
                    continue                    # inside of a norm that is written in functions
                found, reason = self.readers_at(call, key)
                obstacle = obstacle or reason
                readers |= dict.fromkeys(found)
                if not (found or reason):
                    waiting += call.outputs
        for name in () if obstacle else readers:
            for other, candidate in self.unreached.items():
                if (candidate.kind == "layer" and candidate.inputs == self.nodes[name].inputs
                        and self._caller(other) == self._caller(name)):
                    obstacle = f"{other} may read it too, but no call of it was seen"
        return list(readers), obstacle or ("" if readers else "no layer reads it")

    def readers_at(self, call: Call, key: Key) -> tuple[list[str], str]:
        """The layers that read a tensor at this call; none where it goes on; or why nobody can tell."""
        name = call.module
        if name is None:
            function = str(call.function)
            products = not function.startswith("~")
            return [], f"a call of {function} in {call.owner or 'the model'} reads it" if (
                products and call.parameters) else ""
        module = self.modules[name]
        if isinstance(module, QuantizedMultiheadAttention):
            found = [joined(name, p) for p, k in zip("qkv", call.inputs) if k == key]
            fine = bool(found) and all(f in self.nodes for f in found)
            return (found, "") if fine else ([], f"{name} reads it")
        if name in self.nodes:
            kind = self.nodes[name].kind
            return ([name], "") if kind == "layer" else ([], f"{name} reads it")
        heavy = any(p.dim() > 1 for p in module.parameters()) or isinstance(module, Composite | nn.RNNBase | BatchNorm)
        return [], f"{name} reads it{self.often(name)}" if heavy else ""

    def often(self, name: str) -> str:
        """What to add where a module is no node because it is called more than once."""
        count = self.called.get(name, 0)
        return f", which is called {count} times" if count > 1 else ""

    def _caller(self, name: str) -> str:
        """The module around ``name`` whose forward calls it."""
        while name:
            name = name.rpartition(".")[0]
            if self.called.get(name):
                return name
        return ""

    # ---------------------------------------------------------------- scalings

    def scalings(self, progress: Callable[[int, int], None] | None = None) -> list[Scaling]:
        """Every place where channels can be rescaled, each tried and verified; :attr:`reasons` says where not."""
        open_: list[_Candidate] = []
        for node in self.nodes.values():
            if node.kind == "embedding":
                continue
            readers, obstacle = self.reach(node)
            if not obstacle:
                wrong = [(n, self.shared(self.nodes[n])) for n in (node.name, *readers)]
                obstacle = next((f"the weight of {n} is shared with {other}" for n, other in wrong if other), "")
            if obstacle:
                self._blame(node, readers, obstacle)
            else:
                open_.append(_Candidate(node, 0, node.channels, readers))
        self._try(open_)
        failed = [c for c in open_ if c.failed]
        pieces = [_Candidate(c.producer, a, b, c.readers) for c in failed for a, b in self._pieces(c.producer)]
        self._try(pieces)
        found = [c for c in (*open_, *pieces) if not c.failed]
        split = {id(c.producer) for c in pieces if not c.failed}
        for c in failed:
            if id(c.producer) not in split:
                self._blame(c.producer, c.readers, "scales do not pass through what lies in between")
        made = [Scaling(c.producer, c.start, c.stop, c.numbers, self.nodes) for c in found]
        # powers of two: right rewrites change no bit, wrong ones change a lot
        trial = {id(s): 2.0 ** torch.randint(-2, 3, (s.producer.channels,), generator=_generator()) for s in made}
        rewrites = [s.rewrite(self._masked(s, trial[id(s)])) for s in made]
        edits = Edits()
        refused = self.settle(rewrites, edits)
        edits.undo()
        for scaling, rewrite in zip(made, rewrites):
            if rewrite in refused:
                self._blame(scaling.producer, list(scaling.readers), "rescaling changes what the model returns")
        result = [s for s, r in zip(made, rewrites) if r not in refused]
        for scaling in result:
            for name in scaling.readers:
                self.reasons.pop(name, None)
        return result

    @staticmethod
    def _masked(scaling: Scaling, s: Tensor) -> Tensor:
        """``s``, 1 for channels that are left alone."""
        inside = torch.arange(len(s))
        return torch.where((inside >= scaling.start) & (inside < scaling.stop), s, torch.ones_like(s))

    def _blame(self, node: Node, readers: Iterable[str], reason: str) -> None:
        for name in readers:
            self.reasons.setdefault(name, f"{node.name} in front: {reason}")

    def _pieces(self, node: Node) -> list[tuple[int, int]]:
        """Rows of a stacked layer that may be something of their own (the values of q, k, v; one half of a gate)."""
        count = node.channels
        found: dict[tuple[int, int], None] = {}
        for call in self.reading.get(self.outputs(node)[0], ()) if not isinstance(node.module, Part) else ():
            sizes = [self.trace.shapes[k][-1] for k in call.outputs if self.trace.shapes[k]]
            if len(sizes) > 1 and sum(sizes) == count:
                ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
                found |= dict.fromkeys(zip([0, *ends], ends))
        for parts in (2, 3):
            if count % parts == 0 and count > parts:
                found |= dict.fromkeys((i * count // parts, (i + 1) * count // parts) for i in range(parts))
        return list(found)

    # ---------------------------------------------------------------- trying

    def _try(self, candidates: Sequence[_Candidate]) -> None:
        """Find out for each candidate which channel its readers' columns follow, or that they follow none."""
        rounds: list[list[_Candidate]] = []
        for candidate in candidates:
            mine = set(candidate.readers)
            free = next((r for r in rounds if all(mine.isdisjoint(o.readers) for o in r)), None)
            if free is None:
                rounds.append([candidate])
            else:
                free.append(candidate)
        with floating(self.model):
            for group in rounds:
                self._probe(group)

    def _probe(self, group: Sequence[_Candidate]) -> None:
        """One round: producers that share no reader."""
        numbers: dict[tuple[str, str], Tensor] = {}
        digits = 1
        while (BASE**digits - 1) // 2 < max(c.producer.channels for c in group):
            digits += 1
        for sign in (1.0, -1.0):                # so that a ReLU silences nothing in both
            values = {c.producer.name: sign * _magnitudes(self.made[c.producer.name]) for c in group}
            before = self._inputs(group, values)
            spelled: dict[tuple[str, str], Tensor] = {}
            for place in range(digits):
                exponents = {c.producer.name: self._masked_digits(c, place) for c in group}
                scaled = {n: v * _along(2.0 ** exponents[n].to(v), v, self.nodes[n].axis(v)) for n, v in values.items()}
                after = self._inputs(group, scaled)
                for c in group:
                    for reader in c.readers:
                        digit = _exponents(before.get(reader), after.get(reader))
                        if digit is None:
                            c.failed = True
                            continue
                        at = (c.producer.name, reader)
                        spelled[at] = spelled.get(at, torch.zeros_like(digit)) + digit * BASE**place
            for at, number in spelled.items():
                silent = before[at[1]].abs().amax(0) == 0
                number = torch.where(silent, 0, number.round().long())
                if at not in numbers:
                    numbers[at] = number
                else:
                    old = numbers[at]
                    clash = (old != number) & (old != 0) & ~silent
                    if bool(clash.any()):
                        next(c for c in group if c.producer.name == at[0]).failed = True
                    numbers[at] = torch.where(old == 0, number, old)
        for c in group:
            if c.failed:
                continue
            c.numbers = {reader: numbers[c.producer.name, reader].cpu() - 1 for reader in c.readers}
            together = torch.cat(list(c.numbers.values()))
            read = together[together >= 0]
            c.failed = (not len(read) or int(together.min()) < -1 or int(read.min()) < c.start
                        or int(read.max()) >= c.stop)
            c.numbers = {r: n for r, n in c.numbers.items() if bool((n >= 0).any())}

    @staticmethod
    def _masked_digits(candidate: _Candidate, place: int) -> Tensor:
        """The digit at this place of each channel's number (from 1 on), 0 for channels left alone."""
        number = torch.arange(1, candidate.producer.channels + 1)
        for _ in range(place):
            number = (number + BASE // 2) // BASE
        digit = (number + BASE // 2) % BASE - BASE // 2
        inside = torch.arange(len(digit))
        return torch.where((inside >= candidate.start) & (inside < candidate.stop), digit, 0)

    def _inputs(self, group: Sequence[_Candidate], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the readers get while every node is held: (positions, channels) each."""
        seen: dict[str, Tensor] = {}
        wanted = {r for c in group for r in c.readers}
        with ExitStack() as stack:
            for name, node in self.nodes.items():
                value = node.effective_output(values.get(name, self.made[name]))
                stack.enter_context(_held(node.module, value.to(self.made[name].dtype)))
                if name in wanted:
                    def look(module: nn.Module, args: Any, kwargs: Any, node: Node = node) -> None:
                        x = node.effective_input((*args, *kwargs.values())[0])
                        seen[node.name] = wide(x).movedim(node.axis(x), -1).reshape(-1, node.inputs)

                    stack.callback(node.module.register_forward_pre_hook(look, with_kwargs=True).remove)
            self._run()
        return seen

    # ---------------------------------------------------------------- proof

    def settle(self, rewrites: Sequence[Rewrite], edits: Edits) -> list[Rewrite]:
        """Apply rewrites; keep those under which the model returns what it did.

        Where all together do not hold, the halves are tried, and so on: each one that does not hold is undone.

        Args:
            edits: gets what was there before all that is kept.

        Returns:
            The rewrites that do not hold.
        """
        if not rewrites:
            return []
        own = Edits()
        try:
            with torch.no_grad():
                for rewrite in rewrites:
                    own.keep(*rewrite.touched)
                    rewrite.apply()
            watched = dict.fromkeys(n for r in rewrites for n in r.watched)
            fine = self._holds(watched)
        except BaseException:
            own.undo()
            raise
        if fine:
            edits.saved += own.saved
            return []
        own.undo()
        if len(rewrites) == 1:
            return list(rewrites)
        middle = len(rewrites) // 2
        return self.settle(rewrites[:middle], edits) + self.settle(rewrites[middle:], edits)

    def _holds(self, watched: Iterable[str]) -> bool:
        """Whether the model returns what it did, and these layers make what they made."""
        made: dict[str, Tensor] = {}
        with ExitStack() as hooks, floating(self.model):
            for name in watched:
                def look(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
                    made[name] = result.clone()

                hooks.callback(self.nodes[name].module.register_forward_hook(look).remove)
            after = float_tensors(self._run())
        before = [*self.reference, *(self.made[n] for n in made)]
        return len(after) == len(self.reference) and all(map(agree, before, [*after, *made.values()]))


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors differ by no more than this (narrow types: than their rounding) relative to the greatest."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    x, y = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
    tolerance = max(tolerance, 0.0 if a.dtype == torch.float64 else 16 * torch.finfo(a.dtype).eps)
    return bool(torch.isfinite(b).equal(torch.isfinite(a))) and float((x - y).abs().max()) <= tolerance * float(
        x.abs().max())


def float_tensors(values: Any) -> list[Tensor]:
    """The floating point tensors among what a model returned."""
    return [t for t in leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool((torch.isfinite(t) | (t == -torch.inf)).all()) for t in tensors)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _magnitudes(like: Tensor) -> Tensor:
    """Numbers from 0.01 to 100, in the shape of ``like``: what saturates anywhere does so for some of them."""
    return (10.0 ** (4.0 * torch.rand(like.shape, generator=_generator()) - 2.0)).to(like)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """``values`` (channels,) so that they broadcast along a dimension of ``x``."""
    return values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _exponents(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """The k of each channel for which ``after == before * 2 ** k`` everywhere; None if there is none for some."""
    if before is None or after is None or before.shape != after.shape or not before.numel():
        return None
    size, scaled = before.abs().amax(0), after.abs().amax(0)
    silent = (size == 0) & (scaled == 0)
    k = torch.where(silent, 0.0, (scaled / size.clamp(min=1e-30)).clamp(1e-6, 1e6).log2().round())
    error = (after - before * 2.0**k).abs().amax(0)
    fine = torch.isfinite(error) & (error <= 1e-3 * scaled) & (k.abs() <= BASE // 2)
    return k if bool((fine | silent).all()) else None


@contextmanager
def _held(module: nn.Module, value: Tensor) -> Iterator[None]:
    """``module`` returns ``value``, whatever it is called with."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: value.clone()     # somebody may overwrite it
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _recognise_norm(node: Node, arguments: tuple[Any, ...], made: Tensor) -> bool:
    """Whether a module multiplies its output by its weight, or by 1 + its weight; sets ``unit``."""
    module, edits = node.module, Edits()
    if not arguments or made.shape[-1:] != module.weight.shape:
        return False
    edits.keep(*node.tensors())
    weight, bias = edits.saved[0][1], node.bias

    def result(gain: Tensor, offset: Tensor | None) -> Tensor:
        module.weight.copy_(gain)
        if bias is not None and offset is not None:
            bias.copy_(offset)
        return module.forward(*arguments)

    try:
        zero = None if bias is None else torch.zeros_like(bias)
        offset = None if bias is None else bias.detach().clone()
        for unit in (0.0, 1.0):
            if bool(result(torch.full_like(weight, -unit), zero).any()):
                continue
            node.unit = unit
            doubled = result((weight + unit) * 2 - unit, None if offset is None else offset * 2)
            return bool((made != 0).any()) and agree(made * 2, doubled)
        return False
    except Exception:  # a module that wants to be called in another way is none that we know
        return False
    finally:
        edits.undo()
