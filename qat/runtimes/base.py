"""What a runtime is to this package: something that opens an exported file, runs it, and says which operators it ran.

A new runtime is one file with a :class:`Runtime` and a :class:`Session`, and one line in ``RUNTIMES``
(:mod:`qat.runtimes`). The comparison asks nothing else of it::

    session = runtime.deploy(deployed, path, example_inputs)      # export, then open
    outputs = session(inputs)                                     # torch tensors in, torch tensors out
    rows = session.operators()                                    # what multiplies matrices there, and in which types

Sessions use as many threads as torch (``torch.get_num_threads()``), so that times can be compared.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qat.deploy.export import export, verify
from qat.errors import UnsupportedError

INTEGERS = frozenset({"u1", "u2", "u3", "u4", "u5", "u6", "u8", "u16", "s2", "s4", "s8", "s16", "s32"})
"""Types of operands that are integers; other runtimes' block formats (``q4_0``) are integers with scales, see
:attr:`Operator.integer`."""


@dataclass(frozen=True)
class Operator:
    """One operator of a runtime's own graph that reads a layer's weight, or computes with quantized activations.

    Attributes:
        layer: the dotted name of the layer, as :func:`qat.coverage` has it; "" where the runtime does not tell.
        operator: what it is called there, as it ran: ``QLinearConv``, ``brgemm_avx512_core_vnni``, ``onednn``.
        operands: the type of the activation, then of the weight or of the other activation, **as they enter the
            arithmetic**: ``u8``, ``s8``, ``s4``, ``f32``, ``bf16``. A weight that is stored in integers and unpacked
            before the product has the type in which it is stored, if no float copy of the whole of it is kept.
        result: the type of what it hands on; "" if unknown.
        count: how often it is in the graph (a layer that runs once for each time step).
        sums: whether it is a sum or a concatenation, and no product or look-up.
    """

    layer: str
    operator: str
    operands: tuple[str, ...]
    result: str = ""
    count: int = 1
    sums: bool = False

    @property
    def integer(self) -> bool:
        """Whether all operands are integers.

        >>> Operator("0", "QGemm", ("u8", "s8"), "u8").integer, Operator("0", "Gemm", ("f32", "f32")).integer
        (True, False)
        """
        return all(is_integer(kind) for kind in self.operands)

    def __str__(self) -> str:
        return (f"{self.operator}({' x '.join(self.operands)}{' -> ' + self.result if self.result else ''})"
                f"{f' x{self.count}' if self.count > 1 else ''}")


def is_integer(kind: str) -> bool:
    """Whether a type of an operand is an integer, or a block format of integers (``q8_0``, ``tq2_0``, ``iq4_nl``)."""
    return kind in INTEGERS or kind.startswith(("q", "tq", "iq"))


@dataclass(frozen=True)
class Codes:
    """What one quantizer made, in the order of the computation.

    Attributes:
        layer: the layer in whose forward the quantizer ran.
        codes: the shape of the tensor that was quantized, or with its leading dimensions flattened. Where a file holds
            codes of int8 as uint8, 128 higher, they are given as the file has them.
        unsigned: whether the smallest code of their type is 0.
    """

    layer: str
    codes: Tensor
    unsigned: bool


@dataclass(frozen=True)
class Read:
    """What was read at the quantizers of a runtime.

    Attributes:
        codes: in the order of the computation.
        outputs: of the computation that the codes were read from. Where the file has no outputs for codes, that is
            another graph than the file's, which the runtime may fuse in another way.
    """

    codes: Sequence[Codes]
    outputs: Sequence[Tensor]


class Session(ABC):
    """One opened file.

    Attributes:
        batch: the only number of samples that it takes; None: any. The comparison fills smaller batches up, and cuts
            larger ones.
    """

    batch: int | None = None

    @abstractmethod
    def __call__(self, inputs: Any) -> list[Tensor]:
        """All outputs, in the order of the model's own, as float32 (or integer) CPU tensors.

        Args:
            inputs: what the model takes: a tensor, a tuple of arguments, or a dict of keywords.
        """

    @abstractmethod
    def operators(self) -> Sequence[Operator]:
        """What ran, from the runtime's own graph, profile or kernel table; never from what was exported.

        Products of matrices, look-ups of embeddings, and sums and concatenations of quantized tensors; not the
        quantizers, and not what is floating point in the recipe too, unless it has the name of a layer. A runtime that
        knows what ran only afterwards is asked after it has been called.
        """

    def codes(self, inputs: Any) -> Read | None:
        """The codes at every static or dynamic quantizer of activations for these inputs; None: not to be had."""
        return None

    def close(self) -> None:  # noqa: B027  most have nothing to give back
        """Give back what the session holds beside memory."""


class Runtime(ABC):
    """How to make and open files for one runtime.

    Attributes:
        name: in ``RUNTIMES``, in tables and on the command line.
        format: of :func:`qat.export`.
        target: the name of :mod:`qat.targets` that the file is written for, or None.
        suffix: of the file; "" for formats that are folders.
        options: those of the export format.
        package: the module to import; extra: what ``pip install '.[extra]'`` brings it, None where torch suffices.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    target: ClassVar[str | None] = None
    suffix: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    package: ClassVar[str] = "torch"
    extra: ClassVar[str | None] = None

    def check(self) -> None:
        """Raises:
            UnsupportedError: the runtime is not installed; the extra that brings it is named.
        """
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            raise UnsupportedError(f"runtime {self.name} needs the extra {self.extra}: pip install '.[{self.extra}]' "
                                   f"({error})") from None

    def export(self, deployed: nn.Module, path: Path, example_inputs: Any) -> None:
        """Write the file or folder ``path``.

        Args:
            example_inputs: one batch, of at least two samples where the model's batch may vary.

        Raises:
            UnsupportedError: something that the format or the target cannot hold, by name.
            CheckpointError: it cannot be written.
        """
        export(deployed, path, self.format, example_inputs, self.target, **self.options)

    def open(self, path: Path) -> Session:
        """Hold what :meth:`export` wrote against its manifest, and open it.

        Raises:
            CheckpointError: there is no such file; it is truncated, altered or damaged, or no file of this format; the
                path is in the message.
            UnsupportedError: the runtime has no kernel for what is in it.
        """
        verify(path)
        return self.start(path)

    @abstractmethod
    def start(self, path: Path) -> Session:
        """Open a file that has been checked; errors as in :meth:`open`."""

    def deploy(self, deployed: nn.Module, path: Path, example_inputs: Any) -> Session:
        """Export, and open what was written."""
        self.check()
        self.export(deployed, path, example_inputs)
        return self.open(path)
