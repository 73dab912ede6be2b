"""Data that can be resumed to the batch: a loader whose position is part of the checkpoint, and data modules of images.

Lightning restarts a plain ``DataLoader`` at batch 0 when a run is resumed in mid-epoch. `ResumableLoader` has
``state_dict``/``load_state_dict``, which Lightning stores with the loops, and draws its permutation and augmentation
from ``(seed, epoch, position)`` alone, so that a resumed run sees exactly the batches that an unbroken one would see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor

from qat.errors import ConfigError, nearest

Batch = tuple[Any, Tensor]  # (inputs: a tensor, a tuple or a dict of tensors; target)
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}  # suffix -> name of the builder in `datasets`


def stream_seed(*parts: int) -> int:
    """One well-mixed 63-bit seed from a few non-negative integers, such as (seed, epoch, position).

    >>> stream_seed(0, 1) == stream_seed(0, 1), stream_seed(0, 1) == stream_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Examples(Protocol):
    """Examples that are fetched a batch at a time."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> Batch:
        """The inputs and the target at ``indices`` (batch,); the first dimension of each tensor is the batch."""
        ...


class TensorExamples:
    """Examples that are already tensors: images (n, c, h, w) float32 and labels (n,) int64."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> Batch:
        return self.images[indices], self.labels[indices]


class ResumableLoader:
    """Batches of ``examples`` in an order that depends on (seed, epoch) only, from a position that can be saved.

    Iterating goes on from the stored position and begins the next epoch when the present one is used up, so a loader
    that is stopped after some batches (``limit_train_batches``, a kill) and one that is restored behave alike.

    Args:
        examples: the data.
        batch_size: examples per batch and rank; the last batch is smaller unless ``drop_last``.
        shuffle: a new permutation each epoch; otherwise the order of ``examples``.
        seed: of the permutation and the augmentation.
        augment: ``augment(inputs, generator)``; the generator is seeded from (seed, epoch, position).
        rank, world_size: the share of this process in a distributed run; all ranks have the same number of batches.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
        if len(examples) == 0:
            raise ConfigError("The data set has no examples.")
        self.examples, self.batch_size, self.shuffle, self.drop_last = examples, batch_size, shuffle, drop_last
        self.seed, self.augment, self.rank, self.world_size = seed, augment, rank, world_size
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out
        if len(self) == 0:
            raise ConfigError(f"batch_size {batch_size} with drop_last leaves no batch of {len(examples)} examples.")

    def __len__(self) -> int:
        share = math.ceil(len(self.examples) / self.world_size)
        return share // self.batch_size if self.drop_last else math.ceil(share / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = self._order()
        while self.position < len(self):
            # Counted before the batch is handed out: the checkpoint that is written after this batch's step holds it.
            position, self.position = self.position, self.position + 1
            inputs, target = self.examples.fetch(order[position * self.batch_size : (position + 1) * self.batch_size])
            if self.augment is not None:
                generator = torch.Generator().manual_seed(stream_seed(self.seed, self.epoch, position, self.rank))
                inputs = self.augment(inputs, generator)
            yield inputs, target

    def _order(self) -> Tensor:
        count = len(self.examples)
        if self.shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(self.seed, self.epoch)))
        else:
            order = torch.arange(count)
        if self.world_size > 1:
            share = math.ceil(count / self.world_size)
            order = order.repeat(math.ceil(share * self.world_size / count))[: share * self.world_size]
        return order[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class ResumableData(L.LightningDataModule):
    """Base of the data modules: subclasses fill ``train``, ``val`` and ``test`` in `load`; loaders are made here.

    Args:
        batch_size: for training and evaluation.
        seed: of the shuffling and the augmentation; it does not change which example is in which split.
    """

    train: Examples
    val: Examples
    test: Examples

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self._loaded = False

    def load(self) -> None:
        """Fill ``train``, ``val`` and ``test``; called once."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if not self._loaded:
            self.load()
            self._loaded = True

    def _loader(self, examples: Examples, **options: Any) -> ResumableLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ResumableLoader(examples, self.batch_size, seed=self.seed, rank=rank, world_size=world_size, **options)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.val)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader(self.test)

    def calibration_dataloader(self) -> ResumableLoader:
        """Shuffled training examples without augmentation, the same ones in each call."""
        self.setup()
        return ResumableLoader(self.train, self.batch_size, shuffle=True, seed=self.seed)


class ClassificationData(ResumableData):
    """Base of the data modules of images.

    Args:
        num_classes: labels must lie in 0..num_classes-1.
        batch_size, seed: see `ResumableData`.
        augment: random shifts of up to ``augment`` pixels (0: none), and horizontal flips where ``flip``.
    """

    def __init__(
        self, num_classes: int, batch_size: int = 32, seed: int = 0, augment: int = 0, flip: bool = False
    ) -> None:
        super().__init__(batch_size, seed)
        self.num_classes = num_classes
        self.shift, self.flip = augment, flip

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.train, shuffle=True, augment=self.augment if self.shift or self.flip else None)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each image by up to ``self.shift`` pixels (zeros move in), flip half of them; (n, c, h, w) -> same."""
        count, channels, height, width = images.shape
        if self.shift:
            s = self.shift
            padded = torch.nn.functional.pad(images, (s, s, s, s))
            top, left = torch.randint(0, 2 * s + 1, (2, count, 1), generator=generator)
            example, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
            rows, columns = top + torch.arange(height), left + torch.arange(width)
            # Indexed in all four dimensions, so that the result has ordinary strides: a permuted one of one channel
            # would pass for channels_last, and every convolution after it would take that for its layout.
            images = padded[example, channel, rows[:, None, :, None], columns[:, None, None, :]]
        if self.flip:
            flipped = torch.rand(count, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return images


class DigitsDataModule(ClassificationData):
    """scikit-learn's 1,797 handwritten digits (bundled, no download), upsampled from 8x8 to ``size`` x ``size``.

    The split into five stratified folds is fixed; ``fold`` is the test set, a tenth of the rest the validation set.
    Images: (n, 1, size, size) float32, normalized.
    """

    FOLDS = 5

    def __init__(
        self,
        fold: int = 0,
        size: int = 16,
        num_classes: int = 10,
        batch_size: int = 32,
        seed: int = 0,
        augment: int = 0,
    ) -> None:
        if fold not in range(self.FOLDS):
            raise ConfigError(f"fold must be 0..{self.FOLDS - 1}, not {fold!r}.")
        super().__init__(num_classes, batch_size, seed, augment)
        self.fold, self.size = fold, size

    def load(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

        digits = load_digits()
        small = torch.from_numpy(digits.images).float()[:, None] / 16
        images = torch.nn.functional.interpolate(small, (self.size, self.size), mode="bilinear", align_corners=False)
        images = (images - 0.3) / 0.35
        labels = torch.from_numpy(digits.target).long()
        folds = StratifiedKFold(self.FOLDS, shuffle=True, random_state=0).split(labels, labels)
        rest, test = list(folds)[self.fold]
        [(train, val)] = StratifiedShuffleSplit(1, test_size=0.1, random_state=0).split(rest, labels[rest])
        self.train, self.val, self.test = (
            TensorExamples(images[index], labels[index]) for index in (rest[train], rest[val], test)
        )


class ImageExamples:
    """Rows of a `datasets` table as images: decoded, resized, normalized; kept decoded in memory where ``cache``."""

    def __init__(
        self, table: Any, image: str, label: str, size: int, channels: int, mean: Sequence[float], std: Sequence[float],
        workers: int, cache: bool,
    ) -> None:  # fmt: skip
        self.table, self.image, self.label, self.size = table, image, label, size
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.mean, self.std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (mean, std))
        self.workers = workers
        self.pixels: Tensor | None = None  # (n, c, size, size) uint8, filled on first use
        self.labels: Tensor | None = None
        self.cache = cache

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, indices: Tensor) -> Batch:
        if self.cache and self.pixels is None:
            self.pixels, self.labels = self._decode(torch.arange(len(self)))
        if self.pixels is not None and self.labels is not None:
            pixels, labels = self.pixels[indices], self.labels[indices]
        else:
            pixels, labels = self._decode(indices)
        return (pixels.float() / 255 - self.mean) / self.std, labels

    def _decode(self, indices: Tensor) -> Batch:
        rows = self.table[indices.tolist()]
        pixels = torch.empty(len(indices), len(self.mode), self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(self.workers) as pool:  # Pillow decodes and resizes without the interpreter lock
            for i, image in enumerate(pool.map(self._pixels, rows[self.image])):
                pixels[i] = image
        return pixels, torch.tensor(rows[self.label], dtype=torch.long)

    def _pixels(self, image: Any) -> Tensor:
        """A Pillow image as (channels, size, size) uint8."""
        array = np.array(image.convert(self.mode).resize((self.size, self.size)), dtype=np.uint8)
        return torch.from_numpy(array.reshape(self.size, self.size, -1)).permute(2, 0, 1)


class ImageDataModule(ClassificationData):
    """Any image-classification set that `datasets` can read: by hub name, or a local file or folder.

    Args:
        dataset: a hub name (``uoft-cs/cifar10``), a ``.parquet``/``.arrow`` file, a folder of such files, a folder that
            ``save_to_disk`` wrote, or a folder with one sub-folder of images per class.
        num_classes: labels must lie in 0..num_classes-1.
        config_name: the hub data set's configuration, where it has several.
        image_column, label_column: names of the columns.
        train_split: the split to train on. ``val_split``, ``test_split``: None holds out ``val_fraction`` /
            ``test_fraction`` of the training split (fixed, stratified only by chance).
        size, channels: images become (channels, size, size); 1 is grey, 3 is RGB.
        mean, std: of each channel, for pixels in 0..1.
        cache: keep the decoded images in memory (uint8); otherwise ``workers`` threads decode each batch anew.
        cache_dir: where `datasets` keeps its files; None is its own default.

    Raises:
        ConfigError: on setup: a data set, split or column that is not there; labels that are missing or out of range.
    """

    def __init__(
        self,
        dataset: str,
        num_classes: int,
        config_name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        size: int = 32,
        channels: int = 3,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        augment: int = 0,
        flip: bool = False,
        batch_size: int = 128,
        seed: int = 0,
        workers: int = 2,
        cache: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(num_classes, batch_size, seed, augment, flip)
        if channels not in (1, 3):
            raise ConfigError(f"channels must be 1 (grey) or 3 (RGB), not {channels}.")
        if size < 1:
            raise ConfigError(f"data.size must be at least 1, not {size}.")
        if len(mean) != channels or len(std) != channels:
            raise ConfigError(f"mean and std need one number for each of the {channels} channels.")
        if not dataset:
            raise ConfigError("Name a data set: data.dataset=<hub name, file or folder>.")
        self.dataset, self.config_name, self.cache_dir = dataset, config_name, cache_dir
        self.image_column, self.label_column = image_column, label_column
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.image_options: dict[str, Any] = {
            "size": size, "channels": channels, "mean": mean, "std": std, "workers": workers, "cache": cache,
        }  # fmt: skip

    def load(self) -> None:
        splits = read_splits(self.dataset, self.config_name, self.train_split, "imagefolder", self.cache_dir)
        train = named_split(splits, self.train_split, self.dataset)
        if self.test_split is None:
            train, test = self._hold_out(train, self.test_fraction)
        else:
            test = named_split(splits, self.test_split, self.dataset)
        if self.val_split is None:
            train, val = self._hold_out(train, self.val_fraction)
        else:
            val = named_split(splits, self.val_split, self.dataset)
        self.train, self.val, self.test = (self._examples(table) for table in (train, val, test))

    def _hold_out(self, table: Any, fraction: float) -> tuple[Any, Any]:
        if not 0 < fraction < 1 or len(table) < 2:
            raise ConfigError(f"Cannot hold out a fraction of {fraction} of {len(table)} examples.")
        parts = table.train_test_split(test_size=fraction, seed=0)
        return parts["train"], parts["test"]

    def _examples(self, table: Any) -> ImageExamples:
        need_column(table, self.image_column, "image_column", self.dataset)
        class_numbers(table, self.label_column, self.num_classes, self.dataset)
        import datasets

        if not isinstance(table.features[self.image_column], datasets.Image):
            table = table.cast_column(self.image_column, datasets.Image())
        return ImageExamples(table, self.image_column, self.label_column, **self.image_options)


def read_splits(
    dataset: str, config_name: str | None, unnamed: str, folder_format: str, cache_dir: str | None
) -> dict[str, Any]:
    """The `datasets` tables of a set, by split.

    Args:
        dataset: a hub name, a parquet or arrow file, a folder of such files, a folder that ``save_to_disk`` wrote, or
            any other folder, which the builder ``folder_format`` then reads.
        unnamed: name for the only table of a set without splits.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    import datasets

    path = Path(dataset).expanduser()
    if not path.exists() and (path.is_absolute() or path.suffix in FILE_FORMATS or dataset.startswith(".")):
        raise ConfigError(f"There is no file or folder {dataset}.")
    options: dict[str, Any] = {"cache_dir": cache_dir}
    try:
        if not path.exists():
            loaded = datasets.load_dataset(dataset, config_name, **options)
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset(_file_format(path), data_files=str(path), **options)
        elif files := [f for f in sorted(path.rglob("*")) if f.suffix in FILE_FORMATS]:
            # train-00000.parquet, test/0.parquet, ...: `datasets` finds the splits by these names
            loaded = datasets.load_dataset(_file_format(files[0]), data_dir=str(path), **options)
        else:
            loaded = datasets.load_dataset(folder_format, data_dir=str(path), **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"The data set {dataset!r} cannot be read: {error}") from error
    return dict(loaded) if isinstance(loaded, dict) else {unnamed: loaded}


def named_split(splits: Mapping[str, Any], name: str, dataset: str) -> Any:
    """One of ``splits``; ConfigError with the nearest name if it is not there."""
    if name not in splits:
        raise ConfigError(f"{dataset} has no split {name!r}{nearest(name, splits)}; it has {', '.join(splits)}.")
    return splits[name]


def need_column(table: Any, column: str, role: str, dataset: str) -> None:
    """ConfigError where the table lacks the column that the option ``role`` names, or has no rows."""
    if column not in table.column_names:
        raise ConfigError(
            f"{dataset} has no column {column!r}{nearest(column, table.column_names)}; it has "
            f"{', '.join(table.column_names)}. Set data.{role}."
        )
    if len(table) == 0:
        raise ConfigError(f"{dataset}: a split has no examples.")


def class_numbers(table: Any, column: str, num_classes: int, dataset: str) -> np.ndarray:
    """The labels of a table as integers in 0..num_classes-1; ConfigError where they are not, or are missing."""
    need_column(table, column, "label_column", dataset)
    labels = np.array([-1 if v is None else v for v in table[column]])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"{dataset}: column {column!r} holds {labels.dtype}, not class numbers.")
    if labels.min() < 0:
        raise ConfigError(f"{dataset}: {int((labels < 0).sum())} examples have no label; use a labelled split.")
    if labels.max() >= num_classes:
        raise ConfigError(f"{dataset} has label {labels.max()}, but data.num_classes is {num_classes}.")
    return labels


def _file_format(path: Path) -> str:
    if path.suffix not in FILE_FORMATS:
        raise ConfigError(f"{path}: cannot read {path.suffix or 'this kind of'} files; use parquet, arrow or a folder.")
    return FILE_FORMATS[path.suffix]
