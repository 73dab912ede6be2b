"""What a teacher computes on every example of a data set, computed once and kept on disk as a `datasets` table.

A folder holds ``outputs.arrow`` (one row for each example, in the order of the examples; one column for each place that
is compared; ``datasets.Dataset.from_file`` reads it) and ``about.json``: digests of the teacher, of the examples in
their order and of the table, and the shapes of the columns. A table is used only for the teacher and the examples that
it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qat.compression.watching import Said
from qat.errors import CheckpointError, ConfigError
from qat.numerics.tensor import add_to_digest
from qat.tracing import leaves

TABLE, ABOUT = "outputs.arrow", "about.json"
FORMAT, VERSION = "qat teacher outputs", 1


class Examples(Protocol):
    """Examples that are fetched a batch at a time, as (inputs, target)."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> Any: ...


class Taught(NamedTuple):
    """The target of a batch, and what the teacher computes on its inputs; stands where the target would."""

    target: Any
    told: Said


class Origin(NamedTuple):
    """What a table was made from: digests of the teacher and of the examples, and the places that were asked for."""

    teacher: str
    data: str
    places: list[str]

    def name(self) -> str:
        """A name for the table's folder: equal for equal origins."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]


class TaughtExamples:
    """``examples`` whose targets are `Taught`: each example's row of ``outputs`` comes along, found by its index.

    Raises:
        CheckpointError: another number of examples than rows.
    """

    def __init__(self, examples: Examples, outputs: TeacherOutputs) -> None:
        if len(examples) != len(outputs):
            raise CheckpointError(
                f"{outputs.folder} holds what the teacher computes on {len(outputs)} examples, but there are "
                f"{len(examples)}."
            )
        self.examples, self.outputs = examples, outputs

    def __len__(self) -> int:
        return len(self.examples)

    def fetch(self, indices: Tensor) -> Any:
        inputs, target = _pair(self.examples.fetch(indices))
        return inputs, Taught(target, self.outputs.fetch(indices))


class TeacherOutputs:
    """A table on disk: row i holds what the teacher computes on example i, in float32."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        import datasets

        self.folder = folder
        self.shapes: dict[str, list[int]] = dict(about["columns"])
        self.table = datasets.Dataset.from_file(str(folder / TABLE)).with_format("numpy")

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, indices: Tensor) -> Said:
        """The rows at ``indices`` (batch,), by place: (batch, ...) float32."""
        count = len(indices)
        if not count:
            return {name: torch.empty(0, *shape) for name, shape in self.shapes.items()}
        rows = self.table[indices.tolist()]
        return {
            name: torch.from_numpy(np.array(rows[name], dtype=np.float32).reshape(count, *shape))
            for name, shape in self.shapes.items()
        }

    @classmethod
    def open(cls, folder: Path, origin: Origin) -> TeacherOutputs:
        """The table in ``folder``, which must have been made from ``origin``.

        Raises:
            CheckpointError: it is damaged, or belongs to another teacher, other examples or other layers.
        """
        remedy = "Remove the folder to compute it anew."
        try:
            about = json.loads((folder / ABOUT).read_bytes())
            if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
                raise CheckpointError(f"{folder / ABOUT} does not describe the outputs of a teacher. {remedy}")
            differences = {"teacher": "by another teacher", "data": "on other examples", "places": "at other layers"}
            for key, difference in differences.items():
                if about.get(key) != getattr(origin, key):
                    raise CheckpointError(f"{folder} holds outputs that were computed {difference}. {remedy}")
            if _digest_of_file(folder / TABLE) != about["sha256"]:
                raise CheckpointError(f"{folder / TABLE} is damaged or was changed. {remedy}")
            return cls(folder, about)
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}. {remedy}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}. {remedy}") from error

    @classmethod
    def make(
        cls,
        folder: Path,
        ask: Callable[[Any], Said],
        examples: Examples,
        batch_size: int,
        origin: Origin,
    ) -> TeacherOutputs:
        """Compute the table and write it to ``folder``, complete or not at all.

        Args:
            ask: what the teacher computes on a batch of inputs (`Distiller.ask`), each value (batch, ...).

        Raises:
            CheckpointError: the disk is full or read-only.
            ConfigError: an output has not one row for each example.
        """
        temporary: str | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
            os.chmod(temporary, 0o755)  # several people may share a cache
            shapes = _write_table(Path(temporary) / TABLE, ask, examples, batch_size)
            sha256 = _digest_of_file(Path(temporary) / TABLE)
            about = {"format": FORMAT, "version": VERSION, **origin._asdict(), "columns": shapes, "sha256": sha256}
            with open(Path(temporary) / ABOUT, "w", encoding="utf-8") as file:
                json.dump(about, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.rename(temporary, folder)
            except OSError:
                if not (folder / ABOUT).exists():  # else another process was faster, and what it wrote is as good
                    raise
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; nothing was changed") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(folder, origin)


def _write_table(path: Path, ask: Callable[[Any], Said], examples: Examples, batch_size: int) -> dict[str, list[int]]:
    """Write the rows batch by batch; the shape of a row of each column."""
    import pyarrow as pa

    shapes: dict[str, list[int]] = {}
    with open(path, "wb") as file:
        writer: Any = None
        for inputs, count in _batches(examples, batch_size):
            columns = []
            for name, value in (told := ask(inputs)).items():
                if value.ndim == 0 or len(value) != count:
                    raise ConfigError(
                        f"distill.cache: {name} of the teacher is {tuple(value.shape)} for {count} examples; only what "
                        "has a row for each example can be kept. Set distill.cache=false."
                    )
                if shapes.setdefault(name, list(value.shape[1:])) != list(value.shape[1:]):
                    raise ConfigError(
                        f"distill.cache: {name} of the teacher is {tuple(value.shape[1:])} for some examples and "
                        f"{tuple(shapes[name])} for others; only fixed shapes can be kept. Set distill.cache=false."
                    )
                flat = value.float().cpu().reshape(count, -1).numpy()
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1]))
            batch = pa.record_batch(columns, names=list(told))
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    return shapes


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 over the types, options and tensors of a model, in order."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        options = re.sub(r"0x[0-9a-f]+", "", module.extra_repr())  # addresses of functions differ between processes
        digest.update(f"{name}:{type(module).__qualname__}({options})\n".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            add_to_digest(digest, name, value)
    return digest.hexdigest()


def digest_of_examples(examples: Examples, batch_size: int) -> str:
    """SHA-256 over the inputs of all examples, in order; the targets, which no teacher sees, do not count.

    Raises:
        ConfigError: fetched twice, the first batch differs: what is random cannot be looked up.
    """
    digest = hashlib.sha256(str(len(examples)).encode())
    for number, (inputs, _) in enumerate(_batches(examples, batch_size)):
        if number == 0:
            once, twice = hashlib.sha256(), hashlib.sha256()
            again, _ = next(_batches(examples, batch_size))
            for one, values in ((once, inputs), (twice, again)):
                _add_inputs(one, values)
            if once.digest() != twice.digest():
                raise ConfigError("distill.cache: the examples differ each time they are fetched (augmentation?), so "
                                  "what the teacher computes cannot be kept. Set distill.cache=false.")  # fmt: skip
        _add_inputs(digest, inputs)
    return digest.hexdigest()


def _add_inputs(digest: Any, inputs: Any) -> None:
    for value in leaves(inputs):
        if isinstance(value, Tensor):
            add_to_digest(digest, "", value)
        else:
            digest.update(f"={value!r}\n".encode())


def _batches(examples: Examples, batch_size: int) -> Iterator[tuple[Any, int]]:
    """The inputs of all examples in their order, and how many there are in each batch."""
    for indices in torch.arange(len(examples)).split(batch_size):
        yield _pair(examples.fetch(indices))[0], len(indices)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ConfigError("distill.cache needs examples that come as (inputs, target). Set distill.cache=false.")
    return batch[0], batch[1]


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
