"""Text as windows and as lines: what is held out, what a batch holds, and what is refused."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from qat.errors import ConfigError
from qat.training.text import (
    LineDataModule,
    Sequences,
    TextDataModule,
    Windows,
    as_tokens,
    file_table,
    hold_out,
    standard_library,
    standard_library_lines,
)

DOCUMENTS = [(f"document {i}: " + chr(ord("a") + i % 26) * (40 + i)).encode() for i in range(40)]


@pytest.mark.parametrize(("size", "windows"), [(9, 1), (16, 1), (17, 2), (41, 5)])
def test_windows_lie_side_by_side_and_targets_follow(size, windows):
    text = bytes(range(size))
    examples = Windows(as_tokens([text]), 8)
    assert len(examples) == windows
    inputs, target = examples.fetch(torch.arange(windows))
    assert inputs.dtype == target.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(8 * windows))
    assert torch.equal(target, inputs + 1)


def test_a_limit_spreads_windows_over_the_whole_text():
    examples = Windows(as_tokens([bytes(1001)]), 10, limit=4)
    assert examples.starts.tolist() == [0, 250, 500, 750]
    assert len(Windows(as_tokens([bytes(1001)]), 10, limit=500)) == 100
    with pytest.raises(ConfigError, match="a window needs 11"):
        Windows(as_tokens([bytes(10)]), 10)


def write_documents(folder, documents=DOCUMENTS, suffix=".txt"):
    for i, document in enumerate(documents):
        path = folder / f"part{i % 3}" / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document)
    return folder


def held(data):
    """Which documents are in which split, by their number."""
    def inside(examples):
        text = bytes(examples.text.tolist())
        return {i for i, document in enumerate(DOCUMENTS) if document in text.split(b"\0")}

    return [inside(part) for part in (data.train, data.val, data.test)]


def text_module(path, **options):
    data = TextDataModule(str(path), length=16, val_fraction=0.1, test_fraction=0.1, cache_dir=None, **options)
    data.setup()
    return data


def test_whole_documents_are_held_out_by_their_contents(tmp_path):
    parts = held(text_module(write_documents(tmp_path / "a")))
    assert set().union(*parts) == set(range(40))
    assert [len(part) for part in parts] == [32, 4, 4]
    # other names, another order, another seed: the same split
    renamed = write_documents(tmp_path / "b", DOCUMENTS[::-1], ".md")
    assert held(text_module(renamed, pattern="*.md", seed=5)) == parts


def test_parquet_and_save_to_disk_hold_the_same(tmp_path):
    folder = text_module(write_documents(tmp_path / "files"))
    table = datasets.Dataset.from_dict({"body": [d.decode() for d in DOCUMENTS]})
    table.to_parquet(tmp_path / "all.parquet")
    table.save_to_disk(tmp_path / "disk")
    for name in ("all.parquet", "disk"):
        data = TextDataModule(
            str(tmp_path / name), text_column="body", length=16, val_fraction=0.1, test_fraction=0.1,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        data.setup()
        assert held(data) == held(folder)


def test_named_splits_are_kept(tmp_path):
    parts = {"train": DOCUMENTS[:10], "validation": DOCUMENTS[10:20], "test": DOCUMENTS[20:]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": documents}) for name, documents in parts.items()}
    ).save_to_disk(tmp_path / "set")
    data = text_module(tmp_path / "set", val_split="validation", test_split="test")
    assert held(data) == [set(range(10)), set(range(10, 20)), set(range(20, 40))]


def test_a_single_file_holds_out_its_end(tmp_path):
    (tmp_path / "book.py").write_bytes(bytes(range(1, 201)) * 5)
    data = text_module(tmp_path / "book.py")
    text = b"".join(bytes(part.text.tolist()) for part in (data.train, data.val, data.test))
    assert text == bytes(range(1, 201)) * 5
    assert len(data.test.text) == 100


def test_batches_resume_and_ranks_have_equally_many(tmp_path):
    data = text_module(write_documents(tmp_path / "a"), batch_size=4)
    whole = list(data.train_dataloader())
    loader = data.train_dataloader()
    for _ in zip(range(3), loader):
        pass
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    for (inputs, target), (expected, following) in zip(again, whole[3:], strict=True):
        assert torch.equal(inputs, expected)
        assert torch.equal(target, following)
    counts = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        counts.append([[len(target) for _, target in loader] for loader in (data.train_dataloader(),
                                                                            data.val_dataloader())])  # fmt: skip
    assert counts[0] == counts[1]


def test_sequences_are_padded_and_cut():
    examples = Sequences([b"abc", b"", b"abcdefgh"], np.array([2, 0, 1]), 5)
    (tokens, lengths), labels = examples.fetch(torch.arange(3))
    assert tokens.dtype == torch.int64
    assert [bytes(row.tolist()) for row in tokens] == [b"abc\0\0", b"\0" * 5, b"abcde"]
    assert lengths.tolist() == [3, 0, 5]
    assert labels.tolist() == [2, 0, 1]


def test_lines_of_a_table(tmp_path):
    rows = {"line": [f"line {i % 30}" for i in range(90)], "kind": [i % 3 for i in range(90)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "lines.parquet")
    data = LineDataModule(
        str(tmp_path / "lines.parquet"), 3, text_column="line", label_column="kind", length=8,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.setup()
    texts = [{bytes(row.tolist()) for row in part.tokens} for part in (data.train, data.val, data.test)]
    assert sum(map(len, texts)) == 30  # equal lines are in one split
    assert min(map(len, texts)) > 0
    assert sum(len(part) for part in (data.train, data.val, data.test)) == 90


def test_the_standard_library_is_one_table():
    table = standard_library()
    assert {"path", "text"} == set(table.column_names)
    paths = set(table["path"])
    assert {"json/decoder.py", "dataclasses.py"} <= paths
    assert not any("site-packages" in path for path in paths)


def test_lines_of_the_standard_library(monkeypatch, tmp_path):
    files = {
        "alpha.py": b"import os as operating\n    only_alpha = 1\nshort\nshared_line = 3\nalpha_more = 4\n",
        "beta/one.py": b"only_beta = 2\nshared_line = 3\n",
        "beta/two.py": b"only_beta = 2\nbeta_more = 22\nbeta_most = 222\n",
        "gamma.py": b"only_gamma = 5\n",
        "test/quotes.py": b"only_alpha = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in files]
    monkeypatch.setattr("qat.training.text.standard_library", lambda column: file_table(tmp_path, paths, column))
    table = standard_library_lines(2, 2, "text", "label")
    assert table.features["label"].names == ["alpha", "beta"]
    lines = list(zip(table["text"], table["label"]))
    assert len(lines) == 4  # at most two of each
    for line, label in lines:
        assert line in ((b"import os as operating", b"only_alpha = 1", b"alpha_more = 4"),
                        (b"only_beta = 2", b"beta_more = 22", b"beta_most = 222"))[label]  # fmt: skip
    with pytest.raises(ConfigError, match="has 3 modules"):
        standard_library_lines(4, 2, "text", "label")


def test_hold_out_refuses_an_empty_side():
    assert hold_out([b"x", b"y"], 0.5, "two") in (([0], [1]), ([1], [0]))
    for contents, fraction in (([b"x"] * 4, 0.5), ([b"x"], 0.5), ([], 0.5), ([b"x", b"y"], 0.0), ([b"x", b"y"], 1.0)):
        with pytest.raises(ConfigError, match="Cannot hold out"):
            hold_out(contents, fraction, "texts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "*.rst"}, "none that match \\*.rst"),
        ({"length": 0}, "length must be at least 1"),
        ({"eval_windows": 0}, "eval_windows must be"),
        ({"length": 10_000}, "a window needs 10001"),
        ({"train_split": "tran", "val_split": "train"}, "did you mean 'tran'"),
        ({"test_fraction": 0.0}, "Cannot hold out"),
        ({"dataset": "./missing"}, "no file or folder"),
    ],
)
def test_errors_of_texts_are_typed(tmp_path, options, message):
    write_documents(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        TextDataModule(**{"dataset": str(tmp_path / "set"), "length": 16} | options).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "lin"}, "did you mean 'line'"),
        ({"text_column": "kind"}, "row 0 of column 'kind' is 0, not text"),
        ({"label_column": "line"}, "not class numbers"),
        ({"num_classes": 2}, "has label 2, but data.num_classes is 2"),
        ({"num_classes": 0}, "num_classes must be"),
        ({"test_split": "test"}, "no split 'test'"),
    ],
)
def test_errors_of_lines_are_typed(tmp_path, options, message):
    rows = {"line": [f"line {i}" for i in range(9)], "kind": [i % 3 for i in range(9)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "lines.parquet")
    good = {"dataset": str(tmp_path / "lines.parquet"), "num_classes": 3, "text_column": "line",
            "label_column": "kind", "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        LineDataModule(**good | options).setup()
