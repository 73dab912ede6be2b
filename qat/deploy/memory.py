"""What a model needs in memory, before it is there: weights, scales, KV cache and activations at each precision.

Pure arithmetic on :class:`Weight` s and a :class:`Transformer`; :mod:`qat.deploy.shapes` finds both. All sizes are
bytes. What a precision costs is what this package stores:

- FP32 and BF16: every value at that width.
- 8 bits: each weight of two or more dimensions as codes, with one scale for each output channel; what is
  one-dimensional (norms, biases) stays floating point, in the type it has.
- below 8 bits: packed codes with one scale for each group of inputs; embeddings, the first and the last layer as at
  8 bits (``edges: int8``, and the rows of embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat.errors import ConfigError, nearest
from qat.numerics.packing import packed_size

PRECISIONS = {"FP32": 32, "BF16": 16, "INT8": 8, "INT4": 4, "INT2": 2, "1 bit": 1}
ROLES = ("matrix", "edge", "float")
SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ZERO_POINT_BYTES = 4
"""Zero points are int32, as ``weight_zero_point`` of a deployed layer."""
ATTENTION = ("fused", "eager")
DEVICES = tuple(size * 10**9 for size in (8, 16, 24, 48, 80, 141))
"""Memory of common accelerators, in bytes."""


@dataclass(frozen=True)
class Weight:
    """One stored tensor, or several of a kind.

    Attributes:
        name: for messages.
        count: values.
        inputs: length of a row, which is what one output channel sums over; ``count / inputs`` rows.
        role: ``matrix``; ``edge`` (an embedding, the first or the last layer); ``float``: never codes.
        value_bytes: of one value where it stays as it is.
        expert: one of several of which each token uses some.
        floating: whether the values are floating point; others (counters, positions) never change their type.
    """

    name: str
    count: int
    inputs: int
    role: str = "matrix"
    value_bytes: float = 4
    expert: bool = False
    floating: bool = True

    def cost(self, bits: int, work: Workload) -> tuple[int, int]:
        """(bytes of the values, bytes of their scales and zero points) at a precision of :data:`PRECISIONS`.

        >>> Weight("w", 1024 * 1024, 1024).cost(4, Workload())
        (524288, 32768)
        """
        if not self.floating:
            return math.ceil(self.count * self.value_bytes), 0
        if bits >= 16:
            return self.count * bits // 8, 0
        if self.role == "float":
            return math.ceil(self.count * self.value_bytes), 0
        rows = -(-self.count // self.inputs)
        size = work.group_size
        if self.role == "edge" or bits == 8:
            bits, size = 8, None
        groups = 1 if size is None else self.inputs // fitting_group(self.inputs, size)
        return packed_size(self.count, bits), rows * groups * work.scale_bytes


def fitting_group(inputs: int, size: int) -> int:
    """The group size that ``group_fallback: divisor`` arrives at: ``size``, or the largest power of two that divides.

    >>> fitting_group(1024, 128), fitting_group(96, 128), fitting_group(7, 128)
    (128, 32, 1)
    """
    return math.gcd(inputs, 1 << (size.bit_length() - 1)) if inputs % size else size


@dataclass(frozen=True)
class Workload:
    """What the model is asked to do, and how its codes are scaled.

    Attributes:
        context: positions of each sequence, those of the prompt and those generated.
        batch: sequences at once.
        kv_bits: of the KV cache: a width, ``same`` as the weights, 0 for no cache, or None: 32 at FP32, else 16.
        activation_bits: of activations; None: 32 at FP32, else 16.
        group_size: inputs that share a scale below 8 bits; None: one scale for each output channel.
        scale_dtype: of scales; deployed layers hold them in float32, other formats in float16 or bfloat16.
        zero_points: whether each scale comes with an int32 zero point (``symmetric: false``).
        attention: ``fused`` (no matrix of scores in memory) or ``eager``.

    Raises:
        ConfigError: a value that means nothing.
    """

    context: int = 2048
    batch: int = 1
    kv_bits: int | str | None = None
    activation_bits: int | None = None
    group_size: int | None = 128
    scale_dtype: str = "float32"
    zero_points: bool = False
    attention: str = "fused"

    def __post_init__(self) -> None:
        for key in ("context", "batch", "group_size"):
            value = getattr(self, key)
            if not (positive(value) or (key == "group_size" and value is None)):
                raise ConfigError(f"{key} must be a whole number of at least 1, not {value!r}.")
        if not (self.kv_bits in (None, "same") or (_whole(self.kv_bits) and 0 <= int(self.kv_bits) <= 32)):
            raise ConfigError(f"kv_bits must be 0 to 32, same (as the weights) or null, not {self.kv_bits!r}.")
        if self.activation_bits is not None and not (positive(self.activation_bits) and self.activation_bits <= 32):
            raise ConfigError(f"activation_bits must be 1 to 32 or null, not {self.activation_bits!r}.")
        for key, known in (("scale_dtype", tuple(SCALE_BYTES)), ("attention", ATTENTION)):
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise ConfigError(f"{key}: {value!r} is unknown{nearest(str(value), known)}; "
                                  f"choices are {', '.join(known)}.")
        if not isinstance(self.zero_points, bool):
            raise ConfigError(f"zero_points must be true or false, not {self.zero_points!r}.")

    @property
    def scale_bytes(self) -> int:
        """Of one scale with its zero point."""
        return SCALE_BYTES[self.scale_dtype] + ZERO_POINT_BYTES * self.zero_points

    def bits_of_cache(self, bits: int) -> int:
        """Width of the KV cache beside weights of ``bits``."""
        if self.kv_bits is None:
            return max(16, bits)
        return bits if self.kv_bits == "same" else int(self.kv_bits)


@dataclass(frozen=True)
class Transformer:
    """The numbers that KV cache and activations depend on.

    Attributes:
        layers: those that cache keys and values: the decoder's, where there is an encoder too.
        hidden: width of the residual stream.
        heads, kv_heads: of queries; of keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        intermediate: width inside a dense feed-forward layer.
        vocabulary: 0: unknown.
        gated: whether the feed-forward layer multiplies two projections.
        experts, active_experts: feed-forward layers to choose from, and those that a token uses; 0: not a mixture.
        expert_intermediate: width inside one of them.
        shared_intermediate: width of what every token uses beside them.
        dense_layers: how many layers have no mixture.
        encoder_layers: of an encoder beside the decoder.
        latent: values that latent attention caches for a position in place of keys and values; 0: it is not used.
        windows: for each layer the positions that it keeps at most; None: all; 0: it keeps none.
        caches: whether there is a KV cache at all.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    intermediate: int
    vocabulary: int = 0
    gated: bool = False
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    dense_layers: int = 0
    encoder_layers: int = 0
    latent: int = 0
    windows: tuple[int | None, ...] = ()
    caches: bool = True

    def cache(self, bits: int, work: Workload) -> int:
        """Bytes of the KV cache for ``work``.

            values    = batch * (sum over layers of min(context, window) * kept + cross)
            kept      = kv_heads * (head_dim + value_dim), or latent
            cross     = layers * context * kept, with an encoder
            below 16 bits: one scale for each position and head, of keys and of values (latent: one a position)
        """
        if not self.caches or not bits:
            return 0
        windows = self.windows or (None,) * self.layers
        positions = sum(work.context if w is None else min(w, work.context) for w in windows)
        positions += self.layers * work.context if self.encoder_layers else 0
        kept, scales = (self.latent, 1) if self.latent else (self.kv_heads * (self.head_dim + self.value_dim),
                                                             2 * self.kv_heads)
        values = work.batch * positions
        return packed_size(values * kept, bits) + (values * scales * work.scale_bytes if bits < 16 else 0)

    def activations(self, tokens: int, bits: int, work: Workload) -> int:
        """Bytes of activations that are alive at once in inference, at the widest moment of a forward.

            peak      = residual + max(attention, feed_forward, head)
            residual  = tokens * hidden
            attention = tokens * (hidden + 2 * heads * head_dim + kv_heads * (head_dim + value_dim))
                        + (eager) tokens * heads * context
            feed_forward = tokens * (hidden + (2 or, gated, 3) * width)    width: of all experts that a token uses
            head      = batch * (hidden + vocabulary)                      the logits of the last position

        In the sum for attention are its normalized input, queries, keys, values and the output; in the one for the
        feed-forward layer its normalized input, the projections and their activation.

        Args:
            tokens: positions computed at once: ``batch * context`` in prefill, ``batch`` in decode.
        """
        keys_values = self.kv_heads * (self.head_dim + self.value_dim)
        attention = tokens * (self.hidden + 2 * self.heads * max(self.head_dim, self.value_dim) + keys_values)
        if work.attention == "eager":
            attention += tokens * self.heads * work.context
        width = self.active_experts * self.expert_intermediate + self.shared_intermediate
        if not self.experts or self.dense_layers:
            width = max(width, self.intermediate)
        feed_forward = tokens * (self.hidden + (3 if self.gated else 2) * width)
        head = work.batch * (self.hidden + self.vocabulary)
        return math.ceil((tokens * self.hidden + max(attention, feed_forward, head)) * bits / 8)


@dataclass(frozen=True)
class Contents:
    """What was found out about a model.

    Attributes:
        title: what was asked about.
        source: where the shapes come from, as a phrase.
        weights: all of them; shared ones once.
        transformer: None where it is unknown.
        stored: name, bytes of values, bytes of scales: what lies on the disk already; None where nothing does.
        estimated: whether the number of scales is an estimate (a count has no shapes).
        positions: the longest sequence that the model is made for; None: unknown.
        notes: sentences that a reader must know.
    """

    title: str
    source: str
    weights: tuple[Weight, ...]
    transformer: Transformer | None = None
    stored: tuple[str, int, int] | None = None
    estimated: bool = False
    positions: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Floating point values."""
        return sum(w.count for w in self.weights if w.floating)

    @property
    def active(self) -> int | None:
        """Parameters that one token uses, of a mixture of experts; None for others."""
        one = self.transformer
        if one is None or not one.experts or not one.active_experts:
            return None
        of_experts = sum(w.count for w in self.weights if w.expert)
        return self.parameters - of_experts + of_experts * one.active_experts // one.experts if of_experts else None


@dataclass(frozen=True)
class Need:
    """One line of the plan, in bytes; None: unknown."""

    precision: str
    weights: int
    scales: int
    cache: int | None
    prefill: int | None
    decode: int | None

    @property
    def total(self) -> int:
        """Weights, scales, cache and the greater of both peaks; what is unknown counts 0."""
        return self.weights + self.scales + (self.cache or 0) + max(self.prefill or 0, self.decode or 0)

    @property
    def complete(self) -> bool:
        """Whether nothing is unknown."""
        return None not in (self.cache, self.prefill, self.decode)

    def fits(self, devices: Iterable[int]) -> list[int]:
        """The devices, in bytes of memory, that hold the total."""
        return [size for size in sorted(devices) if self.total <= size]


@dataclass(frozen=True)
class MemoryPlan:
    """Needs at every precision: ``rows`` of ``contents`` under ``work``, against ``devices`` (bytes of memory)."""

    contents: Contents
    work: Workload
    devices: tuple[int, ...]
    rows: tuple[Need, ...]


def plan_memory(contents: Contents, work: Workload | None = None, devices: Sequence[int] = DEVICES) -> MemoryPlan:
    """What ``contents`` needs at each of :data:`PRECISIONS`, and as it is stored.

    >>> [row.weights // 10**9 for row in plan_memory(Contents("", "", (Weight("all", 175 * 10**9, 12288),))).rows]
    [700, 350, 175, 87, 43, 21]
    """
    work = work or Workload(context=min(2048, contents.positions or 2048))
    rows = []
    for name, bits in PRECISIONS.items():
        costs = [w.cost(bits, work) for w in contents.weights]
        rows.append(_need(name, bits, sum(c[0] for c in costs), sum(c[1] for c in costs), contents, work))
    if contents.stored is not None:
        name, values, scales = contents.stored
        rows.append(_need(name, 16, values, scales, contents, work))
    return MemoryPlan(contents, work, tuple(sorted(devices)), tuple(rows))


def _need(name: str, bits: int, weights: int, scales: int, contents: Contents, work: Workload) -> Need:
    one = contents.transformer
    if one is None:
        return Need(name, weights, scales, None, None, None)
    width = work.activation_bits or max(16, bits)
    return Need(name, weights, scales, one.cache(work.bits_of_cache(bits), work),
                one.activations(work.batch * work.context, width, work), one.activations(work.batch, width, work))


def positive(value: object) -> bool:
    """Whether ``value`` is a whole number of at least 1."""
    return _whole(value) and int(value) >= 1  # type: ignore[call-overload]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
