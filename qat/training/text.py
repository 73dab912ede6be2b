"""Text as bytes: windows of it for a language model, padded lines of it for a classifier.

Without a ``dataset`` the text is the source code of the standard library of the Python that runs this: tens of
megabytes that are on every machine. What is held out depends on the contents alone (their digests), not on names, paths
or order, so the split is the same everywhere, and equal documents are never on both sides of it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qat.errors import ConfigError
from qat.training.data import (
    FILE_FORMATS,
    Batch,
    ResumableData,
    class_numbers,
    named_split,
    need_column,
    read_splits,
)

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATOR = b"\0"  # between documents; text does not contain it
FEW = 20  # documents; below it the end of the text is held out, not whole documents


class Windows:
    """Windows of ``length`` tokens, side by side, each with the tokens that follow as its target.

    Inputs and targets: (batch, length) int64; ``target[:, i]`` is the token after ``inputs[:, i]``.

    Args:
        text: the whole text as tokens, (tokens,) of an integer type.
        limit: at most so many windows, spread evenly over the text; None: all of them.
        name: of the split, for the error.
    """

    def __init__(self, text: Tensor, length: int, limit: int | None = None, name: str = "the text") -> None:
        windows = (len(text) - 1) // length
        if windows < 1:
            raise ConfigError(
                f"data: {name} has {len(text)} tokens, and a window needs {length + 1}. Give more text, or a smaller "
                "data.length."
            )
        self.text, self.length = text, length
        count = windows if limit is None else min(limit, windows)
        self.starts = torch.arange(count) * windows // count * length

    def __len__(self) -> int:
        return len(self.starts)

    def fetch(self, indices: Tensor) -> Batch:
        taken = self.text[self.starts[indices, None] + torch.arange(self.length + 1)].long()
        return taken[:, :-1], taken[:, 1:]


def as_tokens(documents: Sequence[bytes]) -> Tensor:
    """Bytes as tokens 0..255, uint8, with a zero byte between documents."""
    return torch.frombuffer(bytearray(SEPARATOR.join(documents)), dtype=torch.uint8)


class TextDataModule(ResumableData):
    """Any text as windows of bytes, for a language model; test and validation are documents that training never sees.

    Where there are fewer than 20 documents (a single file, say), the end of the text is held out instead.

    Args:
        dataset: None: the sources of Python's standard library. Else a parquet or arrow file, a folder of such files,
            a folder that ``save_to_disk`` wrote, or a hub name, each row's ``text_column`` being a document; any other
            file (one document, as it is), or a folder of files that match ``pattern`` (a document each).
        config_name: the hub data set's configuration, where it has several.
        pattern: which files of a folder are text, in sub-folders too.
        train_split: the split to train on. ``val_split``, ``test_split``: None holds out ``val_fraction`` /
            ``test_fraction`` of the training documents.
        length: bytes of a window.
        eval_windows: at most so many windows of the validation and of the test documents, evenly spread; None: all.
        batch_size: windows per batch.
        cache_dir: where `datasets` keeps its files; None is its own default.

    Raises:
        ConfigError: on setup: a data set, split or column that is not there; less text than one window needs.
    """

    def __init__(
        self,
        dataset: str | None = None,
        config_name: str | None = None,
        text_column: str = "text",
        pattern: str = "*.txt",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        length: int = 128,
        eval_windows: int | None = 1024,
        batch_size: int = 32,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("length", length), ("eval_windows", eval_windows)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {value}.")
        self.dataset, self.config_name, self.cache_dir = dataset, config_name, cache_dir
        self.text_column, self.pattern = text_column, pattern
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.length, self.eval_windows = length, eval_windows

    def load(self) -> None:
        splits = self._splits()
        where = self.dataset or "the standard library"

        def split(name: str) -> list[bytes]:
            table = named_split(splits, name, where)
            need_column(table, self.text_column, "text_column", where)
            return as_bytes(table, self.text_column, where)

        train = split(self.train_split)
        if self.test_split is None:
            train, test = hold_out_documents(train, self.test_fraction, where)
        else:
            test = split(self.test_split)
        if self.val_split is None:
            train, val = hold_out_documents(train, self.val_fraction, where)
        else:
            val = split(self.val_split)
        for name, documents in (("train", train), ("val", val), ("test", test)):
            limit = None if name == "train" else self.eval_windows
            setattr(self, name, Windows(self.tokens(documents), self.length, limit, f"{name} of {where}"))

    def tokens(self, documents: Sequence[bytes]) -> Tensor:
        """The text that windows are taken from."""
        return as_tokens(documents)

    def _splits(self) -> dict[str, Dataset]:
        if self.dataset is None:
            return {self.train_split: standard_library(self.text_column)}
        path = Path(self.dataset).expanduser()
        if path.is_file() and path.suffix not in FILE_FORMATS:
            return {self.train_split: file_table(path.parent, [path], self.text_column)}
        ours = path.is_dir() and not (path / "dataset_dict.json").exists() and not (path / "state.json").exists()
        if not ours or any(f.suffix in FILE_FORMATS for f in path.rglob("*")):
            return read_splits(self.dataset, self.config_name, self.train_split, "text", self.cache_dir)
        files = sorted(f for f in path.rglob(self.pattern) if f.is_file())
        if not files:
            raise ConfigError(f"{self.dataset} has no parquet or arrow files, and none that match {self.pattern}. "
                              "Set data.pattern.")  # fmt: skip
        return {self.train_split: file_table(path, files, self.text_column)}


class Sequences:
    """Byte sequences of several lengths with a class each.

    Inputs: tokens (batch, length) int64, padded with 0 on the right, and lengths (batch,) int64. Target: (batch,)
    int64. What is longer than ``length`` bytes is cut.
    """

    def __init__(self, texts: Sequence[bytes], labels: np.ndarray, length: int) -> None:
        self.tokens = torch.zeros(len(texts), length, dtype=torch.uint8)
        for row, text in zip(self.tokens, texts):
            cut = text[:length]
            if cut:
                row[: len(cut)] = torch.frombuffer(bytearray(cut), dtype=torch.uint8)
        self.lengths = torch.tensor([min(len(text), length) for text in texts])
        self.labels = torch.as_tensor(labels, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> Batch:
        return (self.tokens[indices].long(), self.lengths[indices]), self.labels[indices]


class LineDataModule(ResumableData):
    """Short texts with a class each, as padded bytes and their lengths.

    Without a ``dataset``: a source line tells which module of the standard library it comes from. The classes are the
    ``num_classes`` modules (a package counts as one) with the most lines, at most ``lines_per_class`` of each; a line
    has at least 8 bytes without its indentation, and occurs in one module only.

    Args:
        dataset: a hub name, a parquet or arrow file, a folder of such files, or one that ``save_to_disk`` wrote.
        num_classes: labels must lie in 0..num_classes-1.
        text_column, label_column: names of the columns.
        train_split: the split to train on. ``val_split``, ``test_split``: None holds out ``val_fraction`` /
            ``test_fraction`` of the training split; equal texts stay together.
        length: bytes that are kept of each text.

    Raises:
        ConfigError: on setup: a data set, split or column that is not there; labels that are missing or out of range.
    """

    def __init__(
        self,
        dataset: str | None = None,
        num_classes: int = 16,
        config_name: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        length: int = 64,
        lines_per_class: int = 2000,
        batch_size: int = 64,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("length", length), ("num_classes", num_classes), ("lines_per_class", lines_per_class)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {value}.")
        self.dataset, self.num_classes, self.config_name, self.cache_dir = dataset, num_classes, config_name, cache_dir
        self.text_column, self.label_column = text_column, label_column
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.length, self.lines_per_class = length, lines_per_class

    def load(self) -> None:
        where = self.dataset or "the standard library"
        if self.dataset is None:
            table = standard_library_lines(self.num_classes, self.lines_per_class, self.text_column, self.label_column)
            splits = {self.train_split: table}
        else:
            splits = read_splits(self.dataset, self.config_name, self.train_split, "text", self.cache_dir)

        def split(name: str) -> tuple[list[bytes], np.ndarray]:
            table = named_split(splits, name, where)
            need_column(table, self.text_column, "text_column", where)
            labels = class_numbers(table, self.label_column, self.num_classes, where)
            return as_bytes(table, self.text_column, where), labels

        def part(texts: list[bytes], labels: np.ndarray, chosen: list[int]) -> tuple[list[bytes], np.ndarray]:
            return [texts[i] for i in chosen], labels[chosen]

        train = split(self.train_split)
        held: dict[str, tuple[list[bytes], np.ndarray]] = {}
        for name, named, fraction in (
            ("test", self.test_split, self.test_fraction),
            ("val", self.val_split, self.val_fraction),
        ):
            if named is not None:
                held[name] = split(named)
            else:
                rest, out = hold_out(train[0], fraction, where)
                train, held[name] = part(*train, rest), part(*train, out)
        self.train, self.val, self.test = (
            Sequences(texts, labels, self.length) for texts, labels in (train, held["val"], held["test"])
        )


def digest(content: bytes) -> bytes:
    """What the split goes by: spread evenly, the same on every machine."""
    return hashlib.blake2b(content, digest_size=16).digest()


def hold_out(contents: Sequence[bytes], fraction: float, where: str) -> tuple[list[int], list[int]]:
    """The indices that stay and those that are held out, each in order; equal contents are on one side.

    >>> hold_out([b"a", b"b", b"c", b"a"], 0.4, "letters")
    ([1, 2], [0, 3])

    Raises:
        ConfigError: one side would be empty.
    """
    digests = [digest(content) for content in contents]
    order = sorted(range(len(contents)), key=digests.__getitem__)
    cut = max(1, round(fraction * len(contents)))
    while 0 < cut < len(order) and digests[order[cut]] == digests[order[cut - 1]]:
        cut += 1
    if not 0 < fraction < 1 or cut >= len(order):
        raise ConfigError(f"Cannot hold out a fraction of {fraction} of the {len(contents)} texts of {where}.")
    return sorted(order[cut:]), sorted(order[:cut])


def hold_out_documents(documents: list[bytes], fraction: float, where: str) -> tuple[list[bytes], list[bytes]]:
    """Whole documents, or the end of the text where there are few."""
    if len(documents) >= FEW:
        rest, held = hold_out(documents, fraction, where)
        return [documents[i] for i in rest], [documents[i] for i in held]
    text = SEPARATOR.join(documents)
    cut = len(text) - round(fraction * len(text))
    if not 0 < fraction < 1:
        raise ConfigError(f"Cannot hold out a fraction of {fraction} of {where}.")
    return [text[:cut]], [text[cut:]]


def as_bytes(table: Dataset, column: str, where: str) -> list[bytes]:
    """A column of strings (as UTF-8) or binary values.

    Raises:
        ConfigError: a row without text, or a column of something else.
    """
    texts: list[bytes] = []
    for value in (value for rows in table.iter(1000) for value in rows[column]):
        if isinstance(value, str):
            value = value.encode("utf-8", errors="surrogatepass")
        if not isinstance(value, bytes):
            raise ConfigError(f"{where}: row {len(texts)} of column {column!r} is {value!r:.40}, not text.")
        texts.append(value)
    return texts


def file_table(root: Path, files: Iterable[Path], column: str) -> Dataset:
    """A `datasets` table of the non-empty files: ``path`` below ``root``, and their bytes in ``column``."""
    import datasets

    read = [(str(f.relative_to(root)), content) for f in files if (content := f.read_bytes())]
    features = datasets.Features({"path": datasets.Value("string"), column: datasets.Value("large_binary")})
    return datasets.Dataset.from_dict({"path": [p for p, _ in read], column: [c for _, c in read]}, features)


def standard_library(column: str = "text") -> Dataset:
    """The sources of Python's standard library as a table: ``path``, and their bytes in ``column``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = sorted(f for f in root.rglob("*.py") if not installed.intersection(f.relative_to(root).parts))
    if not files:
        raise ConfigError(f"There are no sources of the standard library in {root}. Name a text: data.dataset=<path>.")
    return file_table(root, files, column)


def standard_library_lines(num_classes: int, lines_per_class: int, text: str, label: str) -> Dataset:
    """A table of source lines (column ``text``) and the module each comes from (``label``, with the names)."""
    import datasets

    home: dict[bytes, str | None] = {}  # line -> its module, None for a line of several modules
    for rows in standard_library("content").iter(100):
        for path, content in zip(rows["path"], rows["content"]):
            module = Path(path).parts[0].removesuffix(".py")
            if module == "test":  # it quotes all others
                continue
            for line in {stripped for part in content.splitlines() if len(stripped := part.strip()) >= 8}:
                home[line] = module if home.get(line, module) == module else None
    lines: dict[str, list[bytes]] = {}
    for line, only in home.items():
        if only is not None:
            lines.setdefault(only, []).append(line)
    classes = sorted(sorted(lines, key=lambda name: (-len(lines[name]), name))[:num_classes])
    if len(classes) < num_classes:
        raise ConfigError(f"The standard library has {len(classes)} modules; data.num_classes is {num_classes}.")
    chosen = [(line, k) for k, name in enumerate(classes) for line in sorted(lines[name], key=digest)[:lines_per_class]]
    features = datasets.Features({text: datasets.Value("binary"), label: datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict({text: [line for line, _ in chosen], label: [k for _, k in chosen]}, features)
