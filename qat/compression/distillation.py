"""Distillation: a student learns from what a teacher computes as well as from labels.

The losses are pure functions of tensors. `Distillation` says which of them count, and how much; a `Distiller` holds the
teacher, watches both networks at the layers that the distillation names, and compares. Teacher and student may each be
a float, prepared or deployed model, of one architecture or of two.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.calibration.ranges import set_observing
from qat.compression.watching import Said, bare, named_layer, refuse_absorbing, refuse_folded, watching
from qat.errors import ConfigError, nearest
from qat.numerics.tensor import QuantizedTensor
from qat.rewriter import check_open

LEAST_PROBABILITY = 1e-6
"""A student's attention below this counts as this: dropout and narrow codes make exact zeros, whose log is infinite."""

# ---------------------------------------------------------------------------------------------------- losses


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 2.0,
    divergence: str = "kl",
    dim: int = -1,
    ignored: Tensor | None = None,
) -> Tensor:
    """How far the student's logits are from the teacher's, averaged over positions; computed in float32.

    - ``kl``: ``T**2 * KL(softmax(teacher / T) || softmax(student / T))`` over ``dim`` (Hinton et al., 2015). The factor
      keeps the gradient's size when T changes.
    - ``binary``: the same for each logit by itself, as the sigmoid of a yes or no; summed over ``dim``.
    - ``mse``: the mean squared difference over ``dim``, for outputs that are no logits; T has no influence.

    Args:
        student, teacher: the same shape.
        ignored: bool, that shape without ``dim``: positions that do not count (padding).

    Returns:
        A scalar; 0 (with a gradient of 0) where no position counts.
    """
    s, t = student.float(), teacher.float()
    if divergence == "mse":
        distance = (s - t).square().mean(dim)
    elif divergence == "binary":
        s, t = s / temperature, t / temperature
        p, log = t.sigmoid(), nn.functional.logsigmoid
        distance = (p * (log(t) - log(s)) + (1 - p) * (log(-t) - log(-s))).sum(dim) * temperature**2
    else:
        log_p, log_q = ((x / temperature).log_softmax(dim) for x in (t, s))
        # A class that the teacher rules out (a logit of minus infinity) contributes nothing: 0 log 0 = 0.
        distance = (log_p.exp() * (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)).sum(dim) * temperature**2
    if ignored is None:
        return distance.sum() / max(distance.numel(), 1)
    return distance.masked_fill(ignored, 0.0).sum() / (~ignored).sum().clamp(min=1)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((student - teacher)**2) / mean(teacher**2)``: the error of a hidden layer relative to its size, a scalar.

    Relative, so that layers of all sizes count alike, and one weight serves them (FitNets, Romero et al., 2015). Where
    the teacher is zero everywhere, the mean square itself.
    """
    s, t = student.float(), teacher.float()
    size = t.square().sum()
    return (s - t).square().sum() / torch.where(size > 0, size, max(t.numel(), 1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of attention maps, averaged over rows: (..., heads, queries, keys), rows summing to 1.

    Where the numbers of heads differ, the mean over the heads is compared (compare MobileBERT, Sun et al., 2020).
    """
    s, t = student.float(), teacher.float()
    if s.shape[-3] != t.shape[-3]:
        s, t = s.mean(-3), t.mean(-3)
    rows = torch.special.xlogy(t, t) - t * s.clamp(min=LEAST_PROBABILITY).log()
    return rows.sum() / max(math.prod(rows.shape[:-1]), 1)


# ---------------------------------------------------------------------------------------------------- what counts

DIVERGENCES = ("kl", "binary", "mse")
Pairs = Mapping[str, str] | Sequence[str]


@dataclass(frozen=True)
class Distillation:
    """What a student learns from its teacher.

        loss = (1 - weight) * loss against the labels + weight * logits_loss
               + hidden_weight * mean of hidden_loss over pairs + attention_weight * mean of attention_loss over pairs

    Attributes:
        weight: 0 to 1; 1 learns without labels, 0 leaves the logits out.
        temperature: of both softmaxes; 2 to 4 is usual.
        divergence: ``kl``, ``binary`` or ``mse``; see `logits_loss`.
        class_dim: the logits' dimension of classes. None: the one that the loss names, or else that the target lacks.
        hidden: layers whose outputs are compared: ``{student's name: teacher's name}``, or a list of names that both
            have. Name what computes the same thing in both: blocks, norms and activation functions. Where the widths
            differ, a learned projection (a linear map without bias, not part of the student) comes in between.
        attention: layers whose attention maps are compared, likewise: an ``nn.MultiheadAttention``, a module that
            returns (output, map), or one that returns the map (an ``nn.Softmax``). ``auto``: every
            ``nn.MultiheadAttention`` of the student; student layer i of n learns from layer (i + 1) m / n - 1 of m.

    Raises:
        ConfigError: a value that makes no sense, named by its key.
    """

    weight: float = 0.9
    temperature: float = 2.0
    divergence: str = "kl"
    class_dim: int | None = None
    hidden: Pairs = field(default_factory=dict)
    hidden_weight: float = 1.0
    attention: Pairs | str = field(default_factory=dict)
    attention_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least, most in (("weight", 0, 1), ("temperature", 0, math.inf), ("hidden_weight", 0, math.inf),
                                  ("attention_weight", 0, math.inf)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"distill.{name} must be a number of {least} to {most}, not {value!r}.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"distill.temperature must be positive and finite, not {self.temperature!r}.")
        if self.divergence not in DIVERGENCES:
            raise ConfigError(
                f"distill.divergence must be one of {', '.join(DIVERGENCES)}, not {self.divergence!r}"
                f"{nearest(str(self.divergence), DIVERGENCES)}."
            )
        if self.class_dim is not None and type(self.class_dim) is not int:
            raise ConfigError(f"distill.class_dim must be a whole number or null, not {self.class_dim!r}.")
        object.__setattr__(self, "hidden", _pairs(self.hidden, "hidden"))
        if self.attention != "auto":
            object.__setattr__(self, "attention", _pairs(self.attention, "attention"))
        if not (self.weight or (self.hidden and self.hidden_weight) or (self.attention and self.attention_weight)):
            raise ConfigError(
                "distill has nothing to learn from: raise distill.weight, or name layers in distill.hidden or "
                "distill.attention."
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Distillation:
        """The distillation that plain ``options`` describe; ConfigError for unknown keys."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ConfigError(f"distill.{key} is not an option{nearest(key, known) or '.'}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``from_dict(to_dict())`` is equal."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def combine(self, task: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The loss to descend: ``task`` (the loss against the labels) and the parts that `Distiller.losses` found."""
        weights = {"logits": self.weight, "hidden": self.hidden_weight, "attention": self.attention_weight}
        total = (1 - self.weight) * task if self.weight < 1 else torch.zeros_like(task)
        return total + sum(weights[name] * part for name, part in parts.items())


def _pairs(value: Any, key: str) -> dict[str, str]:
    value = {} if value is None else value
    named = {name: name for name in value} if isinstance(value, list | tuple) else value
    # A command line makes numbers of the names that nn.Sequential gives.
    if not isinstance(named, Mapping) or not all(n != "" and type(n) in (str, int) for p in named.items() for n in p):
        raise ConfigError(f"distill.{key} must name layers, {{student's: teacher's}} or [of both], not {value!r}.")
    return {str(mine): str(theirs) for mine, theirs in named.items()}


# ---------------------------------------------------------------------------------------------------- the driver


class Projection(nn.Module):
    """A linear map of one dimension of a tensor, without bias: (..., in at ``dim``, ...) -> (..., out, ...).

    ``weight``: (out, in).
    """

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.weight, self.dim = nn.Parameter(weight), dim

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.dim, -1).to(self.weight.dtype)
        return nn.functional.linear(moved, self.weight).movedim(-1, self.dim)


class Distiller(nn.Module):
    """A teacher, and what a student is taught.

    In a training step of your own::

        self.distiller = qat.Distiller({"temperature": 3.0}, teacher, student)      # in __init__
        ...
        output, parts = self.distiller(student, inputs, target)
        loss = self.distiller.combine(cross_entropy(output, target), parts)

    The teacher computes in eval and without gradients. It is no submodule: it is in no ``parameters()`` and no
    ``state_dict()``, ``train()`` does not reach it; ``to()`` moves it along. The parameters of this module are the
    projections alone: give them to the optimizer together with the student's.

    Args:
        distillation: a `Distillation`, or its options as a dict.
        teacher: float, prepared or deployed, in any dtype: what it is asked is cast to that. It is put in eval mode and
            its parameters require no gradients any more.
        student: of the student's architecture, float or prepared; only looked at.
        example_inputs: one batch, to see how wide layers are and whether the two fit. Needed for ``hidden`` layers; the
            student runs on it once (as a copy), so it must be float or calibrated.
        seed: of the projections' first values.

    Raises:
        ConfigError: layers that are not there, shapes that do not fit, a teacher that shares weights with the student,
            or whose named layers TorchScript has compiled.
    """

    def __init__(
        self,
        distillation: Distillation | Mapping[str, Any],
        teacher: nn.Module,
        student: nn.Module,
        example_inputs: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(distillation, Distillation):
            distillation = Distillation.from_dict(distillation)
        if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
            raise ConfigError("distill: the teacher shares weights with the student and would change with it: copy it.")
        self.distillation = distillation
        self.hidden: dict[str, str] = dict(distillation.hidden) if distillation.hidden_weight else {}  # type: ignore[arg-type]
        self.attention: dict[str, str] = {}
        if distillation.attention == "auto" and distillation.attention_weight:
            self.attention = _pair_attention(student, teacher)
        elif distillation.attention_weight:
            self.attention = dict(distillation.attention)  # type: ignore[arg-type]
        if self.hidden or self.attention:
            check_open(bare(teacher), ConfigError)
        teacher.eval()
        for parameter in teacher.parameters():  # one by one: a module of TorchScript cannot be told as a whole
            parameter.requires_grad_(False)
        set_observing(teacher, False)
        anchor = next(itertools.chain(student.parameters(), student.buffers()), None)
        if anchor is not None:
            teacher.to(anchor.device)
        # In a tuple, because nn.Module makes a submodule of every module that is an attribute.
        self._teacher: tuple[nn.Module, ...] = (teacher,)
        self.projections = nn.ModuleDict()
        self.check(student)
        for name in self.hidden.values():
            refuse_folded(teacher, name)
        self.check_teacher()
        if example_inputs is not None:
            self._look(student, example_inputs, seed)
        elif self.hidden:
            raise ConfigError("distill.hidden needs example_inputs, to see how wide the layers are.")

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher; None once it was released."""
        return self._teacher[0] if self._teacher else None

    def release(self) -> None:
        """Forget the teacher: from now on what it says comes with the batches."""
        self._teacher = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        for teacher in self._teacher:
            teacher._apply(fn)
        return self

    def check(self, student: nn.Module) -> None:
        """Refuse a student without the named layers, or in which they do not show what they compute (ConfigError)."""
        for name in (*self.hidden, *self.attention):
            named_layer(student, name)
        for name in self.hidden:
            refuse_absorbing(student, name)

    def check_teacher(self) -> None:
        """The same for the teacher."""
        for teacher in self._teacher:
            for name in (*self.hidden.values(), *self.attention.values()):
                named_layer(teacher, name)
            for name in self.hidden.values():
                refuse_absorbing(teacher, name)

    def _look(self, student: nn.Module, example: Any, seed: int) -> None:
        """Run both on one batch: make the projections, refuse what does not fit."""
        copied = copy.deepcopy(student).eval()  # a copy: looking must not move a range of a network that observes
        told = self.ask(example)
        with torch.no_grad(), watching(copied, [*self.hidden], [*self.attention]) as said:
            output = logits(_call(copied, example))
        generator = torch.Generator().manual_seed(seed)
        anchor = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0))
        for name, other in self.hidden.items():
            [(mine, theirs), *_] = _calls(said, told, "hidden", name, other)
            differing = [d for d, (a, b) in enumerate(zip(mine.shape, theirs.shape)) if a != b]
            if mine.ndim != theirs.ndim or len(differing) > 1 or differing == [0]:
                raise ConfigError(
                    f"distill.hidden: {name} of the student is {tuple(mine.shape)} and {other} of the teacher "
                    f"{tuple(theirs.shape)}: a projection bridges one dimension only. Name layers of the same size."
                )
            if differing:
                [dim] = differing
                outputs, inputs = theirs.shape[dim], mine.shape[dim]
                weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(max(inputs, 1))
                self.projections[_project(name)] = Projection(weight.to(anchor), dim)
        for name, other in self.attention.items():
            for mine, theirs in _calls(said, told, "attention", name, other):
                for whose, found in (("student", mine), ("teacher", theirs)):
                    if bool((found < 0).any()) or bool((found > 1.01).any()):
                        raise ConfigError(f"distill.attention: {name if whose == 'student' else other} of the {whose} "
                                          "returns no attention map: its values are not between 0 and 1.")  # fmt: skip
        if self.distillation.weight:
            mine = _tensor(output, "student")
            known = mine.ndim <= 2 or self.distillation.class_dim is not None  # else the first target will show it
            self._compare(mine, told["logits"], class_dim(mine, None, self.distillation.class_dim) if known else None)

    def _compare(self, mine: Tensor, theirs: Tensor, dim: int | None) -> None:
        """Refuse logits that cannot be compared."""
        if mine.shape != theirs.shape:
            raise ConfigError(
                f"distill: the student's output is {tuple(mine.shape)}, the teacher's {tuple(theirs.shape)}. They must "
                "have the same classes; set distill.weight=0 to learn from hidden layers alone."
            )
        if dim is not None and self.distillation.divergence == "kl" and mine.shape[dim] == 1:
            raise ConfigError("distill: a softmax over one class teaches nothing. Set distill.divergence to binary (a "
                              "yes or no) or mse (a number).")  # fmt: skip

    def places(self) -> list[str]:
        """What `ask` answers, without the numbers of calls."""
        layers = {"hidden": self.hidden, "attention": self.attention}
        named = [f"{kind}/{name}" for kind, pairs in layers.items() for name in dict.fromkeys(pairs.values())]
        return ["logits", *named] if self.distillation.weight else named

    def ask(self, inputs: Any) -> Said:
        """What the teacher computes: its logits (where they count), and what the named layers show. No gradients.

        Raises:
            ConfigError: the teacher was released.
        """
        teacher = self.teacher
        if teacher is None:
            raise ConfigError("This distillation has no teacher any more, and the batch does not say what it computes.")
        hidden, attention = ([*dict.fromkeys(pairs.values())] for pairs in (self.hidden, self.attention))
        with torch.no_grad(), watching(teacher, hidden, attention) as said, _in_its_dtype(teacher, inputs) as given:
            output = logits(_call(teacher, given))
        if self.distillation.weight:
            said["logits"] = _tensor(output, "teacher")
        return said

    def watching(self, student: nn.Module) -> Any:
        """A context that collects what the student's named layers compute: ``with distiller.watching(net) as said:``"""
        return watching(student, [*self.hidden], [*self.attention])

    def losses(
        self,
        output: Any,
        said: Said,
        told: Said,
        target: Any = None,
        ignore_index: int | None = None,
        dim: int | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the loss by name (``logits``, ``hidden``, ``attention``), unweighted.

        Args:
            output: the student's output.
            said, told: what student and teacher computed on the same inputs (`watching`, `ask`).
            target: the labels. They show which dimension of the logits holds the classes, and what is ignored.
            ignore_index: positions whose label is this do not count, as in ``nn.CrossEntropyLoss``.
            dim: the dimension of classes, where that is known; ``Distillation.class_dim`` comes first.

        Raises:
            ConfigError: shapes that do not fit, layers called a different number of times.
        """
        parts: dict[str, Tensor] = {}
        if self.distillation.weight:
            mine, theirs = _tensor(output, "student"), told["logits"]
            given = self.distillation.class_dim
            dim = class_dim(mine, target, dim if given is None else given)
            self._compare(mine, theirs, dim)
            ignored = None
            if ignore_index is not None and isinstance(target, Tensor) and not target.is_floating_point():
                positions = list(mine.shape)
                del positions[dim]
                ignored = target == ignore_index if list(target.shape) == positions else None
            parts["logits"] = logits_loss(
                mine, theirs, self.distillation.temperature, self.distillation.divergence, dim, ignored
            )
        if self.hidden:
            found = [
                hidden_loss(self.projections[_project(name)](a) if _project(name) in self.projections else a, b)
                for name, other in self.hidden.items()
                for a, b in _calls(said, told, "hidden", name, other)
            ]
            parts["hidden"] = torch.stack(found).mean()
        if self.attention:
            found = [
                attention_loss(a, b)
                for name, other in self.attention.items()
                for a, b in _calls(said, told, "attention", name, other)
            ]
            parts["attention"] = torch.stack(found).mean()
        return parts

    def forward(
        self,
        student: nn.Module,
        inputs: Any,
        target: Any = None,
        told: Said | None = None,
        ignore_index: int | None = -100,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the student and the teacher on ``inputs``; the student's logits and the parts of the loss.

        Args:
            inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
            told: what the teacher computes, where that is known already.
        """
        with self.watching(student) as said:
            output = logits(_call(student, inputs))
        told = self.ask(inputs) if told is None else told
        return output, self.losses(output, said, told, target, ignore_index)

    def combine(self, task: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Distillation.combine`."""
        return self.distillation.combine(task, parts)


def _call(network: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


@contextmanager
def _in_its_dtype(network: nn.Module, inputs: Any) -> Iterator[Any]:
    """The inputs in the dtype that all float parameters of ``network`` have. Inside the block, narrow ones are not
    autocast to another narrow one."""
    parameters = [p for p in network.parameters() if p.is_floating_point()]
    if len({p.dtype for p in parameters}) != 1:
        yield inputs
        return
    dtype, kind = parameters[0].dtype, parameters[0].device.type
    given = pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
    with nullcontext() if dtype == torch.float32 else torch.autocast(kind, enabled=False):
        yield given


def logits(output: Any) -> Any:
    """``output.logits`` where there are some (models of the transformers library); else the output."""
    return getattr(output, "logits", output)


def class_dim(logits: Tensor, target: Any = None, given: int | None = None) -> int:
    """The dimension of ``logits`` that holds the classes: the one that the target lacks.

    >>> class_dim(torch.zeros(4, 7, 10), torch.zeros(4, 7, dtype=torch.long))
    2
    >>> class_dim(torch.zeros(4, 10, 7), torch.zeros(4, 7, dtype=torch.long))
    1

    Raises:
        ConfigError: the target leaves it open (``distill.class_dim`` says it), or the logits have no such dimension.
    """
    if given is not None:
        if not -logits.ndim <= given < logits.ndim:
            raise ConfigError(f"distill.class_dim is {given}, but the output is {tuple(logits.shape)}.")
        return given % logits.ndim
    if logits.ndim <= 2:
        return logits.ndim - 1
    shape = list(logits.shape)
    lacking = [
        dim for dim in (1, logits.ndim - 1)
        if isinstance(target, Tensor) and list(target.shape) == shape[:dim] + shape[dim + 1 :]
    ]  # fmt: skip
    if len(lacking) == 1:
        return lacking[0]
    raise ConfigError(
        f"Which dimension of the output {tuple(shape)} holds the classes? The target does not show it: set "
        "distill.class_dim (1: torch's cross-entropy; -1: the last one)."
    )


def _tensor(output: Any, whose: str) -> Tensor:
    if isinstance(output, QuantizedTensor):
        output = output.dequantize()
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim == 0:
        found = f"a {type(output).__name__}"
        if isinstance(output, Tensor):
            found += f" of {output.dtype} and shape {tuple(output.shape)}"
        raise ConfigError(f"distill: the {whose} returns {found}, not a tensor of logits or an object that has them as "
                          ".logits. Set distill.weight=0 to learn from hidden layers alone.")  # fmt: skip
    return output


def _calls(said: Said, told: Said, kind: str, mine: str, theirs: str) -> list[tuple[Tensor, Tensor]]:
    """What one pair of layers computed, call by call."""

    def of(computed: Said, name: str) -> list[Tensor]:
        names = (f"{kind}/{name}/{i}" for i in itertools.count())
        return [computed[name] for name in itertools.takewhile(computed.__contains__, names)]

    one, two = of(said, mine), of(told, theirs)
    if not one or len(one) != len(two):
        raise ConfigError(
            f"distill.{kind}: {mine} ran {len(one)} times in the student and {theirs} {len(two)} times in the teacher."
        )
    if kind == "attention":
        for a, b in zip(one, two):
            if a.ndim != b.ndim or a.shape[-2:] != b.shape[-2:]:
                raise ConfigError(f"distill.attention: the map of {mine} is {tuple(a.shape)}, that of {theirs} "
                                  f"{tuple(b.shape)}.")  # fmt: skip
    return list(zip(one, two))


def _pair_attention(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    names = [[n for n, m in bare(network).named_modules() if isinstance(m, nn.MultiheadAttention)]
             for network in (student, teacher)]  # fmt: skip
    for whose, found in zip(("student", "teacher"), names):
        if not found:
            raise ConfigError(f"distill.attention=auto: the {whose} has no nn.MultiheadAttention. Name the layers, "
                              "{student's: teacher's}.")  # fmt: skip
    mine, theirs = names
    return {name: theirs[max((i + 1) * len(theirs) // len(mine) - 1, 0)] for i, name in enumerate(mine)}


def _project(name: str) -> str:
    return name.replace(".", "/")
