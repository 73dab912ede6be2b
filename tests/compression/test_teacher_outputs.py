"""A table of what a teacher computes: found by index, and used only for what it was made from."""

import json
import stat

import datasets
import pytest
import torch
from torch import nn

import qat
from qat.compression.distillation import Distiller
from qat.compression.teacher_outputs import (
    Origin,
    Taught,
    TaughtExamples,
    TeacherOutputs,
    digest_of_examples,
    digest_of_model,
)
from qat.errors import CheckpointError, ConfigError
from qat.training.data import ResumableLoader, TensorExamples
from qat.training.models import ResidualNet

PLAN = {"hidden": ["blocks.0", "blocks.1"]}


def examples(count=21):
    generator = torch.Generator().manual_seed(3)
    return TensorExamples(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10)


def deployed_teacher():
    x = torch.randn(16, 1, 8, 8)
    net = qat.prepare(ResidualNet(width=6, stages=2), "w8a8", x)
    qat.calibrate(net, [x])
    return qat.convert(net, [x])[0]


def made(folder, data=None, teacher=None, batch_size=4):
    data, teacher = data or examples(), teacher or deployed_teacher()
    distiller = Distiller(PLAN, teacher, ResidualNet(width=4, stages=2), data.images[:1])
    origin = Origin(digest_of_model(teacher), digest_of_examples(data, batch_size), distiller.places())
    return TeacherOutputs.make(folder, distiller.ask, data, batch_size, origin), distiller, origin


def test_rows_are_found_by_index_in_any_order_and_equal_what_the_teacher_computes(tmp_path):
    data = examples()
    outputs, distiller, _ = made(tmp_path / "table", data)
    assert len(outputs) == len(data) == 21
    for indices in (torch.randperm(21), torch.tensor([20, 0, 0, 7]), torch.tensor([5]), torch.arange(0)):
        found = outputs.fetch(indices)
        assert list(found) == list(outputs.shapes)
        if len(indices):
            expected = distiller.ask(data.images[indices])
            assert found.keys() == expected.keys() == {"logits", "hidden/blocks.0/0", "hidden/blocks.1/0"}
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        else:
            assert found["hidden/blocks.0/0"].shape == (0, 6, 8, 8)
    table = datasets.Dataset.from_file(str(tmp_path / "table" / "outputs.arrow"))
    assert table.num_rows == 21
    assert set(table.column_names) == set(outputs.shapes)


def test_the_same_origin_gives_the_same_bytes_and_opens_again(tmp_path):
    teacher = deployed_teacher()
    _, _, one = made(tmp_path / "a", teacher=teacher)
    outputs, _, two = made(tmp_path / "b", teacher=teacher)
    assert one == two
    assert one.name() == two.name()
    for name in ("outputs.arrow", "about.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = TeacherOutputs.open(tmp_path / "a", one)
    assert torch.equal(again.fetch(torch.arange(21))["logits"], outputs.fetch(torch.arange(21))["logits"])
    made(tmp_path / "a", teacher=teacher)  # made at the same time by another process: the first one stays
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755, "others cannot read a cache that they share"


def test_digests_know_what_matters(tmp_path):
    teacher = deployed_teacher()
    digest = digest_of_model(teacher)
    qat.save(teacher, tmp_path / "saved")
    assert digest == digest_of_model(qat.load(tmp_path / "saved", ResidualNet(width=6, stages=2)))
    assert digest != digest_of_model(deployed_teacher())
    assert digest_of_model(nn.ReLU()) != digest_of_model(nn.GELU())
    one, two = nn.Conv2d(1, 1, 3, stride=1), nn.Conv2d(1, 1, 3, stride=2)
    two.load_state_dict(one.state_dict())
    assert digest_of_model(one) != digest_of_model(two)
    assert digest_of_model(one.bfloat16()) != digest_of_model(two)

    data = examples()
    digest = digest_of_examples(data, 4)
    assert digest == digest_of_examples(TensorExamples(data.images.clone(), data.labels + 1), 4)
    order = torch.arange(21).flip(0)
    assert digest != digest_of_examples(TensorExamples(data.images[order], data.labels[order]), 4)
    assert digest != digest_of_examples(TensorExamples(data.images[:20], data.labels[:20]), 4)
    changed = data.images.clone()
    changed[20, 0, 7, 7] += 1e-6
    assert digest != digest_of_examples(TensorExamples(changed, data.labels), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "0"}, "by another teacher"),
        ({"data": "0"}, "on other examples"),
        ({"places": ["logits"]}, "at other layers"),
    ],
)
def test_another_origin_is_refused(tmp_path, change, message):
    _, _, origin = made(tmp_path / "table")
    with pytest.raises(CheckpointError, match=message):
        TeacherOutputs.open(tmp_path / "table", origin._replace(**change))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no json", "other json", "no columns"])
def test_damage_is_refused(tmp_path, damage):
    _, _, origin = made(tmp_path / "table")
    path, about = tmp_path / "table" / "outputs.arrow", tmp_path / "table" / "about.json"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-20])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    elif damage == "no json":
        about.write_text("{")
    elif damage == "other json":
        about.write_text("[]")
    else:
        values = json.loads(about.read_text())
        del values["columns"]
        about.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="Remove the folder"):
        TeacherOutputs.open(tmp_path / "table", origin)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    data, calls = examples(), []
    distiller = Distiller(PLAN, ResidualNet(width=6, stages=2), ResidualNet(width=4, stages=2), data.images[:1])

    def ask(inputs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return distiller.ask(inputs)

    with pytest.raises(CheckpointError, match="No space left on device; nothing was changed"):
        TeacherOutputs.make(tmp_path / "table", ask, data, 4, Origin("t", "d", distiller.places()))
    assert not list(tmp_path.iterdir())


def test_what_has_no_row_for_each_example_or_changes_is_refused(tmp_path):
    data = examples()
    origin = Origin("t", "d", ["logits"])
    with pytest.raises(ConfigError, match=r"logits of the teacher is \(1, 10\) for 4 examples"):
        TeacherOutputs.make(tmp_path / "a", lambda x: {"logits": x.new_zeros(1, 10)}, data, 4, origin)
    widths = iter(range(3, 9))
    with pytest.raises(ConfigError, match="for some examples"):
        TeacherOutputs.make(tmp_path / "a", lambda x: {"logits": x.new_zeros(len(x), next(widths))}, data, 4, origin)

    class Noisy(TensorExamples):
        def fetch(self, indices):
            images, labels = super().fetch(indices)
            return images + torch.randn_like(images), labels

    with pytest.raises(ConfigError, match="differ each time"):
        digest_of_examples(Noisy(data.images, data.labels), 4)

    class Dicts(TensorExamples):
        def fetch(self, indices):
            return {"images": self.images[indices], "labels": self.labels[indices]}

    with pytest.raises(ConfigError, match=r"come as \(inputs, target\)"):
        digest_of_examples(Dicts(data.images, data.labels), 4)


def test_shuffled_batches_hold_their_rows(tmp_path):
    """Whatever the order of the epoch, row and example belong together; the target comes through unchanged."""
    data = examples()
    outputs, distiller, _ = made(tmp_path / "table", data)
    loader = ResumableLoader(TaughtExamples(data, outputs), 5, shuffle=True, seed=2)
    orders = []
    for _ in range(2):
        seen = []
        for images, taught in loader:
            assert isinstance(taught, Taught)
            expected = distiller.ask(images)
            for name, value in taught.told.items():
                torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
            seen.append(images)
        orders.append(torch.cat(seen))
    assert not torch.equal(*orders)
    with pytest.raises(CheckpointError, match="on 21 examples, but there are 20"):
        TaughtExamples(examples(20), outputs)
