"""Loaders that resume, and the data modules on local files."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qat.errors import ConfigError
from qat.training.data import DigitsDataModule, ImageDataModule, ResumableLoader, TensorExamples


def examples(count):
    return TensorExamples(
        torch.arange(count).float().reshape(count, 1, 1, 1).expand(count, 1, 4, 4), torch.arange(count)
    )


def labels(loader, batches):
    """The labels of the next ``batches`` batches, over the ends of epochs."""
    seen = []
    while len(seen) < batches:
        for _, label in loader:
            seen.append(label.tolist())
            if len(seen) == batches:
                break
    return seen


@pytest.mark.parametrize("count", [1, 7, 32, 33])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_holds_every_example_once(count, shuffle):
    loader = ResumableLoader(examples(count), 8, shuffle=shuffle, seed=3)
    for _ in range(3):
        batches = [label for _, label in loader]
        assert len(batches) == len(loader)
        assert torch.cat(batches).sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 9])
def test_resumes_at_the_batch(stop):
    def make():
        noise = lambda images, generator: images + torch.randn(images.shape, generator=generator)  # noqa: E731
        return ResumableLoader(examples(30), 8, shuffle=True, seed=1, augment=noise)

    def run(loader, batches):
        out = []
        while len(out) < batches:
            for images, label in loader:
                out.append((images, label))
                if len(out) == batches:
                    break
        return out

    whole = run(make(), 12)
    first = make()
    run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    for (images, label), (expected_images, expected_label) in zip(run(second, 12 - stop), whole[stop:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(label, expected_label)


def test_epochs_and_seeds_differ():
    def order(seed):
        return labels(ResumableLoader(examples(64), 8, shuffle=True, seed=seed), 16)

    first = order(0)
    assert first == order(0) != order(1)
    assert first[:8] != first[8:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_examples(world_size):
    loaders = [
        ResumableLoader(examples(31), 4, shuffle=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    seen = [torch.cat([label for _, label in loader]) for loader in loaders]
    assert set(torch.cat(seen).tolist()) == set(range(31))
    assert len({len(s) for s in seen}) == 1


def test_bad_loaders():
    with pytest.raises(ConfigError, match="at least 1"):
        ResumableLoader(examples(3), 0)
    with pytest.raises(ConfigError, match="no examples"):
        ResumableLoader(examples(0), 2)
    with pytest.raises(ConfigError, match="leaves no batch"):
        ResumableLoader(examples(3), 4, drop_last=True)


def test_digits_folds_are_disjoint_and_stratified():
    tests = []
    for fold in range(5):
        data = DigitsDataModule(fold)
        data.setup()
        assert data.test.images.shape[1:] == (1, 16, 16)
        tests.append(data.test.images)
        parts = [part.images for part in (data.train, data.val, data.test)]
        assert sum(map(len, parts)) == 1797
        counts = torch.bincount(data.test.labels)
        assert counts.min() >= 33
        assert counts.max() <= 38
    assert len(torch.cat(tests)) == 1797
    with pytest.raises(ConfigError, match=r"0\.\.4"):
        DigitsDataModule(5)


def test_augmentation_repeats_and_has_ordinary_strides():
    data = DigitsDataModule(augment=2, batch_size=16)
    data.flip = True
    data.setup()
    one, two = (next(iter(data.train_dataloader()))[0] for _ in range(2))
    assert torch.equal(one, two)
    assert one.stride() == (256, 256, 16, 1)
    images = torch.arange(2 * 3 * 5 * 5).float().reshape(2, 3, 5, 5) + 1
    data.flip = False
    moved = data.augment(images, torch.Generator().manual_seed(0))
    for before, after in zip(images, moved):
        kept = after[after > 0]
        assert set(kept.tolist()) <= set(before.flatten().tolist())
        assert len(kept) >= 3 * 3 * 3


def pictures(count, classes=3, size=10):
    """Pictures whose mean brightness tells their class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 60, (size, size, 3)) + 60 * (i % classes)
        yield Image.fromarray(pixels.astype(np.uint8)), i % classes


def table(count, image="picture", label="kind"):
    images, kinds = zip(*pictures(count))
    features = datasets.Features({image: datasets.Image(), label: datasets.Value("int64")})
    return datasets.Dataset.from_dict({image: list(images), label: list(kinds)}, features)


@pytest.fixture(params=["file", "folder of files", "save_to_disk", "imagefolder", "arrow file"])
def local_set(request, tmp_path):
    """The same pictures in each local form that `datasets` reads, as (path, options)."""
    options = {"image_column": "picture", "label_column": "kind", "test_split": None}
    where = tmp_path / "set"
    if request.param == "file":
        where.mkdir()
        table(60).to_parquet(where / "all.parquet")
        return where / "all.parquet", options
    if request.param == "arrow file":
        table(60).save_to_disk(where)
        return next(where.glob("*.arrow")), options
    if request.param == "folder of files":
        where.mkdir()
        table(45).to_parquet(where / "train.parquet")
        table(15).to_parquet(where / "test.parquet")
        return where, options | {"test_split": "test"}
    if request.param == "save_to_disk":
        datasets.DatasetDict({"train": table(45), "test": table(15)}).save_to_disk(where)
        return where, options | {"test_split": "test"}
    for i, (image, kind) in enumerate(pictures(60)):
        folder = where / ("test" if i % 4 == 0 else "train") / f"class{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    return where, {"test_split": "test"}


@pytest.mark.parametrize(("channels", "cache"), [(3, True), (1, False)])
def test_local_image_sets(local_set, tmp_path, channels, cache):
    path, options = local_set
    data = ImageDataModule(
        str(path), 3, **options, size=8, channels=channels, mean=[0.5] * channels, std=[0.25] * channels,
        batch_size=16, cache=cache, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.setup()
    assert len(data.train) + len(data.val) + len(data.test) == 60
    images, kinds = next(iter(data.test_dataloader()))
    assert images.shape[1:] == (channels, 8, 8)
    assert images.dtype == torch.float32
    assert kinds.dtype == torch.int64
    brightness = torch.stack([images[kinds == k].mean() for k in range(3)])
    assert (brightness.diff() > 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "pictur"}, "did you mean 'picture'"),
        ({"label_column": "label"}, "no column 'label'"),
        ({"test_split": "tst"}, "no split 'tst'"),
        ({"num_classes": 2}, "has label 2, but data.num_classes is 2"),
        ({"dataset": "missing/file.parquet"}, "no file or folder"),
        ({"dataset": ""}, "Name a data set"),
        ({"channels": 2}, "channels must be"),
        ({"mean": [0.5]}, "one number for each"),
    ],
)
def test_errors_are_typed(tmp_path, options, message):
    table(12).to_parquet(tmp_path / "all.parquet")
    good = {
        "dataset": str(tmp_path / "all.parquet"), "num_classes": 3, "image_column": "picture", "label_column": "kind",
        "test_split": None, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        ImageDataModule(**good | options).setup()


@pytest.mark.parametrize("missing", [-1, None])
def test_a_set_without_labels(tmp_path, missing):
    images, _ = zip(*pictures(4))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": list(images), "label": [0, missing, 1, missing]}, features).to_parquet(
        tmp_path / "all.parquet"
    )
    with pytest.raises(ConfigError, match="2 examples have no label"):
        ImageDataModule(
            str(tmp_path / "all.parquet"), 2, val_split="train", test_split="train", cache_dir=str(tmp_path)
        ).setup()


def test_a_hub_set_that_cannot_be_reached(monkeypatch):
    def offline(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match="nobody/nothing' cannot be read"):
        ImageDataModule("nobody/nothing", 2).setup()
