"""Rotations folded into weights: the residual stream (R1) and the values of attention (R2).

In a rotated basis no channel stands out, so a grid with one scale for a token loses little (Ashkboos et al. 2024,
QuaRot; Liu et al. 2024, SpinQuant, without its learning).

    R1    what writes to a residual stream writes ``y Q``, what reads it reads ``x Q^T``; norms stand in between, so
          their gains are folded into the layers behind them first. RMSNorm commutes with every rotation Q; LayerNorm
          with those that leave the vector of ones where it is.
    R2    within each head, the values are rotated and the projection behind attention turns them back.

Streams are found by tracing who is added to whom; each rotation must leave what the model returns, and what every
reader of the stream makes, as it was up to rounding, or it is undone bit for bit and a note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.calibration.equivalence import (
    Edits,
    Node,
    Rewrite,
    Scaling,
    Structure,
    columns_multiplied,
    joined,
    wide,
)
from qat.errors import RecipeError
from qat.modules.attention import QuantizedMultiheadAttention
from qat.modules.composite import Part
from qat.tracing import Call, Key

# ---------------------------------------------------------------------------------------------------- matrices


def hadamard_matrix(n: int) -> Tensor | None:
    """A Hadamard matrix: (n, n) of +1 and -1, float64, ``H @ H.T == n * I``, its first column ones.

    Sylvester's doubling of 1, 2 and the orders that Paley's two constructions give for prime fields; None for orders
    that these do not reach.

    >>> [n for n in range(1, 65) if hadamard_matrix(n) is not None]
    [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64]
    """
    doublings, core = 0, None
    while core is None:
        core = _paley(n)
        if core is None:
            if n % 2 or n < 4:
                return None
            n, doublings = n // 2, doublings + 1
    for _ in range(doublings):
        core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
    return core * core[:, :1]


def _paley(n: int) -> Tensor | None:
    """Orders 1, 2, q + 1 for primes q = 3 (mod 4), and 2 (q + 1) for primes q = 1 (mod 4)."""
    if n in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:n, :n]
    if n % 4:
        return None
    if _prime(n - 1):
        q, signs = n - 1, 1.0
    elif _prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        q, signs = n // 2 - 1, -1.0
    else:
        return None
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    place = torch.arange(q)
    jacobsthal = character[(place[:, None] - place[None, :]) % q]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1.0, -signs, jacobsthal
    one = torch.eye(q + 1, dtype=torch.float64)
    if signs > 0:
        return one + conference
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(conference, plus) + torch.kron(one, minus)


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def rotation(n: int, generator: torch.Generator, keeps_ones: bool = False) -> tuple[Tensor, str]:
    """A random orthogonal matrix (n, n), float64, and what it is.

    ``diag(signs) H / sqrt(n)`` with random signs, where there is a Hadamard matrix H; else what a QR decomposition
    makes of random numbers.

    Args:
        keeps_ones: the vector of ones is mapped to itself, so the matrix commutes with taking off the mean:
            ``H diag(signs) H^T / n`` with the sign of the first column, which is ones, +1.
    """
    matrix = hadamard_matrix(n)
    if matrix is None:
        numbers = torch.randn(n, n, generator=generator, dtype=torch.float64)
        if not keeps_ones or n < 2:
            q, r = torch.linalg.qr(numbers)
            return q * r.diagonal().sign(), "a random orthogonal matrix"
        numbers[:, 0] = 1.0
        basis, _ = torch.linalg.qr(numbers)
        inner, r = torch.linalg.qr(torch.randn(n - 1, n - 1, generator=generator, dtype=torch.float64))
        turned = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner * r.diagonal().sign())
        return basis @ turned @ basis.T, "a random orthogonal matrix"
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    if keeps_ones:
        signs[0] = 1.0
        return (matrix * signs) @ matrix.T / n, "a randomized Hadamard matrix"
    return signs[:, None] * matrix / n**0.5, "a randomized Hadamard matrix"


# ---------------------------------------------------------------------------------------------------- R1


@dataclass
class Stream:
    """Tensors of one width that are added up, and who writes and reads them.

    Attributes:
        writers: layers and embeddings. ``parameters``: names of parameters that are added as they are.
        norms: norm -> the layers that read it. ``readers``: layers that read the stream itself.
        keeps_ones: somebody takes off the mean.
        obstacle: why it cannot be rotated, or "".
    """

    width: int
    writers: dict[str, None] = field(default_factory=dict)
    parameters: dict[str, None] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)
    keys: set[Key] = field(default_factory=set)
    keeps_ones: bool = False
    obstacle: str = ""

    def refuse(self, reason: str) -> None:
        self.obstacle = self.obstacle or reason

    @property
    def behind(self) -> list[str]:
        """All layers that read the stream, with a norm between or without."""
        return list(dict.fromkeys([*(r for found in self.norms.values() for r in found), *self.readers]))


MOVES = ("transpose", "permute", "movedim", "flatten", "view", "reshape", "swapaxes", "unflatten", "T", "mT", "__get__")
"""Functions behind which channels may be along another dimension than they were."""


def streams(structure: Structure) -> list[Stream]:
    """The residual streams: whatever norms read, followed both ways through sums."""
    found: list[Stream] = []
    for name, node in structure.nodes.items():
        if node.kind != "norm":
            continue
        key = structure.trace.of(name)[0].inputs[0]
        if not any(key in stream.keys for stream in found):
            stream = _follow(structure, key, node.channels)
            # what reads a norm of queries or keys is another width: nothing is added up there
            if all(r in structure.nodes and structure.nodes[r].inputs == stream.width for r in stream.behind):
                found.append(stream)
    return found


def _follow(structure: Structure, start: Key, width: int) -> Stream:
    stream = Stream(width)
    waiting = [start]
    while waiting:
        key = waiting.pop()
        if key not in stream.keys:
            stream.keys.add(key)
            waiting += _sources(structure, stream, key) + _targets(structure, stream, key)
    for name in stream.norms:
        readers, obstacle = structure.reach(structure.nodes[name])
        if obstacle:
            stream.refuse(f"{name}: {obstacle}")
        stream.norms[name] = readers
    if not (stream.writers or stream.parameters):
        stream.refuse("nothing that could be rotated writes to it")
    return stream


def _sources(structure: Structure, stream: Stream, key: Key) -> list[Key]:
    """What a tensor of the stream was made of; writers are noted."""
    trace = structure.trace
    call = trace.producer(key)
    while call is not None and call.module is None and call.owner in structure.nodes:
        call = next(iter(trace.of(call.owner)), None)           # inside of a norm that is written in functions
    if call is None:
        if key not in _parameter_keys(structure, stream):
            stream.refuse("it comes from outside of the model")
        return []
    if call.module is not None:
        module = structure.modules[call.module]
        if isinstance(module, QuantizedMultiheadAttention):
            stream.writers[joined(call.module, "out")] = None
            return []
        if call.module in structure.nodes:
            kind = structure.nodes[call.module].kind
            if kind in ("norm", "batch_norm"):
                stream.refuse(f"{call.module} writes to it")
            else:
                stream.writers[call.module] = None
            return []
        if any(True for _ in module.parameters()):
            stream.refuse(f"{call.module} writes to it{structure.often(call.module)}")
            return []
        _note_means(module, stream)
    elif not str(call.function).startswith("~"):
        stream.refuse(f"a call of {call.function} in {call.owner or 'the model'} writes to it")
        return []
    found = [k for k in call.inputs if trace.shapes.get(k, ())[-1:] == (stream.width,)]
    found = found or (call.inputs[:1] if _name(call) in MOVES else [])
    if not found:
        stream.refuse(f"{call.module or _name(call)} in {call.owner or 'the model'} writes to it")
    return found


def _targets(structure: Structure, stream: Stream, key: Key) -> list[Key]:
    """What is made of a tensor of the stream; norms and readers are noted."""
    onward: list[Key] = []
    if key in structure.trace.returned:
        stream.refuse("the model returns it")
    for call in structure.reading.get(key, ()):
        if call.module is None and call.owner in structure.nodes:
            continue
        if call.module is not None and structure.nodes.get(call.module) is not None \
                and structure.nodes[call.module].kind == "norm":
            stream.norms.setdefault(call.module, [])
            stream.keeps_ones |= structure.takes_off_mean(call.module)
            continue
        found, obstacle = structure.readers_at(call, key)
        if obstacle:
            stream.refuse(obstacle)
        elif found:
            stream.readers |= dict.fromkeys(found)
        elif call.module is None or not isinstance(structure.modules[call.module], nn.MultiheadAttention):
            if call.module is not None:
                _note_means(structure.modules[call.module], stream)
            onward += [k for k in call.outputs if structure.trace.shapes.get(k, ())[-1:] == (stream.width,)]
    return onward


def _note_means(module: nn.Module, stream: Stream) -> None:
    stream.keeps_ones |= isinstance(module, nn.LayerNorm)       # one without a gain


def _name(call: Call) -> str:
    return str(call.function).lstrip("~")


def _parameter_keys(structure: Structure, stream: Stream) -> set[Key]:
    """The keys of parameters that somebody adds to the stream; the parameters are noted."""
    found: set[Key] = set()
    parameters = dict(structure.model.named_parameters(remove_duplicate=False))
    for key in stream.keys:
        for call in structure.reading.get(key, ()):
            for name in call.parameters if call.module is None else ():
                shape = tuple(parameters[name].shape)
                if shape[-1:] == (stream.width,) and structure.trace.shapes.get(key) == shape \
                        and structure.trace.producer(key) is None:
                    stream.parameters[name] = None
                    found.add(key)
    return found


def _rotate_stream(structure: Structure, stream: Stream, q: Tensor) -> Rewrite | str:
    """The rewrite; or why there is none."""
    nodes, parameters = structure.nodes, dict(structure.model.named_parameters(remove_duplicate=False))
    missing = [n for n in (*stream.writers, *stream.behind) if n not in nodes]
    if missing:
        return f"{missing[0]} is not called once, or is of no kind that can be rotated"
    turned_back = {n: nodes[n] for n in stream.behind}
    wrong = next((n for n in turned_back if nodes[n].groups > 1 or nodes[n].inputs != stream.width), None) \
        or next((n for n in stream.writers if nodes[n].channels != stream.width), None)
    if wrong:
        return f"{wrong} has another width"
    twins: set[str] = set()             # embedding and head of one weight: E Q serves both
    for name in (*stream.writers, *turned_back, *stream.norms):
        other = structure.shared(nodes[name])
        if other is None:
            continue
        pair = {name, other}
        if pair & set(stream.writers) and pair & set(turned_back) and any(
                nodes[n].kind == "embedding" for n in pair if n in nodes):
            twins |= pair
            continue
        return f"the weight of {name} is shared with {other}"
    for name in stream.parameters:
        if len(structure.slots[id(parameters[name])]) > 2:
            return f"{name} is used by several modules"
    gains: dict[str, Tensor] = {}               # folded into the columns behind
    offsets: dict[str, Tensor] = {}             # folded into the biases behind
    for name, readers in stream.norms.items():
        norm = nodes[name]
        gain = wide(norm.matrix()) + norm.unit
        offset = None if norm.bias is None or not bool(norm.bias.any()) else wide(norm.bias)
        uniform = bool((gain == gain[0]).all())         # then it commutes with the rotation
        if offset is None and uniform:
            continue
        tied = next((r for r in readers if r in twins), None)
        if tied and not uniform:
            return f"the gain of {name} cannot be folded into {tied}, which shares its weight with an embedding"
        several = next((r for r in readers if r in stream.readers
                        or sum(r in others for others in stream.norms.values()) > 1), None)
        if several:
            return f"{several} reads more than {name}"
        if not uniform:
            gains[name] = gain
        if offset is not None and not tied and all(nodes[r].bias is not None for r in readers):
            offsets[name] = offset
        elif offset is not None and not uniform and bool(((gain == 0) & (offset != 0)).any()):
            return f"the bias of {name} goes with gains of zero, and not all layers behind have a bias to fold it into"

    def apply() -> None:
        for name, readers in stream.norms.items():
            norm = nodes[name]
            for reader in (nodes[r] for r in readers):
                if name in offsets and reader.bias is not None:
                    sums = reader.matrix().double().reshape(reader.channels, stream.width, -1).sum(2)
                    reader.bias.copy_(reader.bias.double() + sums @ offsets[name].double())
                if name in gains:
                    reader.write(columns_multiplied(wide(reader.matrix()), gains[name]))
            if norm.bias is not None:           # what is not folded is rotated: g x + b = g (x + b / g)
                own = norm.bias.double() * (name not in offsets)
                if name in gains:
                    own = torch.where(own == 0, own, own / gains[name])
                norm.bias.copy_(own @ q.to(own.device))
            if name in gains:
                norm.module.weight.fill_(1.0 - norm.unit)
        for name in stream.writers:
            _turn_outputs(nodes[name], q)
        for name, node in turned_back.items():
            if name not in twins:
                _turn_inputs(node, q)
        for name in stream.parameters:
            parameters[name].copy_(parameters[name].double() @ q.to(parameters[name].device))

    names = tuple(dict.fromkeys([*stream.writers, *turned_back]))
    touched = [t for n in (*names, *stream.norms) for t in nodes[n].tensors()]
    watched = tuple(n for n in turned_back if n not in stream.writers)
    return Rewrite(names, [*touched, *(parameters[n] for n in stream.parameters)], apply, watched)


def _turn_outputs(node: Node, q: Tensor) -> None:
    """What the node makes is multiplied by ``q`` from the right: y Q."""
    matrix = node.matrix()
    q = q.to(matrix.device)
    if node.kind == "embedding":
        node.write(matrix.double() @ q)
        return
    node.write((q.T @ matrix.double().flatten(1)).reshape(matrix.shape))
    if node.bias is not None:
        node.bias.copy_(node.bias.double() @ q)


def _turn_inputs(node: Node, q: Tensor) -> None:
    """The layer reads ``x Q`` and makes what it made of ``x``."""
    matrix = node.matrix()
    node.write(torch.einsum("oit,ij->ojt", matrix.double().flatten(2) if matrix.dim() > 2 else
                            matrix.double().unsqueeze(2), q.to(matrix.device)).reshape(matrix.shape))


# ---------------------------------------------------------------------------------------------------- R2


def _heads(structure: Structure, scaling: Scaling) -> list[int]:
    """Sizes that the heads of these values may have, the largest first: how the tensor is cut on its way."""
    width = scaling.stop - scaling.start
    module = scaling.producer.module
    if isinstance(module, Part):
        return [module.owner.head_dim]  # type: ignore[list-item]
    found: set[int] = set()
    waiting, seen = structure.outputs(scaling.producer), set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        for call in structure.reading.get(key, ()):
            if call.module is None and call.owner not in structure.nodes:
                if _name(call) in ("view", "reshape", "unflatten", "rearrange"):
                    found |= {structure.trace.shapes[k][-1] for k in call.outputs if structure.trace.shapes[k]}
                waiting += call.outputs
    return sorted((d for d in found if 1 < d < width or (d == width > 1)), reverse=True)


def _rotate_heads(scaling: Scaling, head: int, q: Tensor) -> Rewrite | None:
    """Each head of the producer's channels times ``q``, and back in its readers; None if heads do not lie in a row."""
    producer, (a, b) = scaling.producer, (scaling.start, scaling.stop)
    if producer.kind != "layer" or producer.taps or (b - a) % head:
        return None
    for name, columns in scaling.readers.items():
        node = scaling.nodes[name]
        if node.taps or len(columns) % head or bool((columns < 0).any()):
            return None
        blocks = columns.reshape(-1, head)
        if bool(((blocks[:, :1] - a) % head != 0).any()) or bool((blocks != blocks[:, :1] + torch.arange(head)).any()):
            return None

    def apply() -> None:
        matrix = producer.matrix().double()
        turn = q.to(matrix.device)
        rows = matrix[a:b].reshape(-1, head, matrix.shape[1])
        producer.write(torch.cat([matrix[:a], (turn.T @ rows).reshape(b - a, -1), matrix[b:]]))
        if producer.bias is not None:
            producer.bias[a:b] = (producer.bias[a:b].double().reshape(-1, head) @ turn).flatten().to(producer.bias)
        for name in scaling.readers:
            reader = scaling.nodes[name]
            matrix = reader.matrix().double()
            reader.write((matrix.reshape(len(matrix), -1, head) @ turn).reshape(matrix.shape))

    nodes = [producer, *(scaling.nodes[n] for n in scaling.readers)]
    return Rewrite(scaling.layers, [t for n in nodes for t in n.tensors()], apply, tuple(scaling.readers))


# ---------------------------------------------------------------------------------------------------- the driver


def hadamard(model: nn.Module, batches: Sequence[Any], progress: Callable[[str, int, int], None] | None = None,
             seed: int = 0, stream: bool = True, heads: bool = True) -> dict[str, str]:
    """Rotate the residual streams (R1) and the values of attention (R2) of a prepared model, in place.

    A model that cannot be rotated stays as it is, bit for bit.

    Args:
        seed: of the random signs.
        stream, heads: whether to rotate the one and the other.

    Raises:
        RecipeError: ``seed`` is no whole number.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RecipeError(f"calibration hadamard: seed is a whole number, not {seed!r}")
    generator = torch.Generator().manual_seed(seed)
    structure = Structure(model, batches)
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    found = streams(structure) if stream else []
    for place, one in enumerate(found):
        q, kind = rotation(one.width, generator, one.keeps_ones)
        rewrite = one.obstacle or _rotate_stream(structure, one, q)
        if isinstance(rewrite, Rewrite) and structure.settle([rewrite], Edits()):
            rewrite = "rotating it changes what the model returns"
        if isinstance(rewrite, Rewrite):
            done |= dict.fromkeys(rewrite.layers, f"a stream of {one.width} channels rotated by {kind}")
        else:
            for name in one.behind:
                left.setdefault(name, f"its stream is not rotated ({rewrite})")
        if progress is not None:
            progress("hadamard", place + 1, len(found))
    if stream and not found:
        left = {n: "no residual stream was found" for n, node in structure.nodes.items() if node.kind == "layer"}
    if heads and done:
        structure = Structure(model, batches)           # what layers make is another thing now
    turned: dict[str, str] = {}
    for scaling in structure.scalings() if heads else ():
        for head in _heads(structure, scaling):
            q, kind = rotation(head, generator)
            turn = _rotate_heads(scaling, head, q)
            if turn is not None and not structure.settle([turn], Edits()):
                turned |= dict.fromkeys(turn.layers, f"heads of {head} values rotated by {kind}")
                break
    said = {n: [t for t in (done.get(n) or left.get(n), turned.get(n)) if t] for n in (left | done | turned)}
    return {n: f"hadamard: {', '.join(texts)}" for n, texts in said.items()}
