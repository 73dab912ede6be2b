"""QuantizedTraining with a teacher: exact resume, checkpoints without the teacher, rows that come with the batches."""

import copy
import shutil

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import qat
from qat.compression.teacher_outputs import Origin, TaughtExamples, TeacherOutputs
from qat.errors import ConfigError
from qat.training import QuantizationSchedule, QuantizedTraining, ResumableLoader
from qat.training.data import TensorExamples

COSINE = {"_target_": "qat.training.WarmupCosine", "total_steps": "total_steps"}
ACCURACY = {"accuracy": {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10}}
EXAMPLE = torch.zeros(1, 1, 4, 4)
PLAN = {"weight": 0.7, "temperature": 3.0, "hidden": {"relu": "relu"}, "hidden_weight": 0.5}


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(16 * width, 10)

    def forward(self, x):
        return self.head(self.dropout(self.relu(self.norm(self.conv(x))).flatten(1)))


def examples(count=44):
    generator = torch.Generator().manual_seed(7)
    return TensorExamples(torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 10)


def loader(seed=0, data=None):
    return ResumableLoader(data or examples(), 8, shuffle=True, seed=seed)


def teacher(deployed=True):
    torch.manual_seed(42)
    net, x = Net(6), examples().images
    net(x)
    if not deployed:
        return net.eval()
    made = qat.prepare(net.eval(), "w8a8", x)
    qat.calibrate(made, [x])
    return qat.convert(made, [x])[0]


def module(preset="w8a8", seed=0, plan=PLAN, teacher_net=None, **options):
    torch.manual_seed(seed)
    recipe = qat.Recipe.preset(preset).to_dict() if preset else None
    return QuantizedTraining(Net(), recipe=recipe, example_inputs=EXAMPLE, scheduler=COSINE, metrics=ACCURACY,
                             distill=plan, teacher=teacher_net, **options)  # fmt: skip


def trainer(tmp_path, epochs=2, callbacks=(), **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(
        max_epochs=epochs, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        callbacks=list(callbacks), **defaults | options,
    )  # fmt: skip


def schedule():
    return QuantizationSchedule(calibration_batches=2, reestimate_batches=2)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def table(folder, ask, data):
    outputs = TeacherOutputs.make(folder, ask, data, 8, Origin("t", "d", ["logits", "hidden/relu"]))
    return TaughtExamples(data, outputs)


@pytest.mark.parametrize("cached", [False, True])
def test_resumes_to_the_same_bits(tmp_path, cached):
    """Projections and optimizer included, from mid-epoch, with a live teacher and with one on disk."""
    data = examples()

    def run(student, checkpoint=None):
        student.configure_model()
        taught = data
        if cached:
            folder = tmp_path / f"table{len(list(tmp_path.glob('table*')))}"
            taught = table(folder, student.distiller.ask, data)
            student.distiller.release()
        saving = ModelCheckpoint(
            tmp_path / "live", "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
        )
        trainer(tmp_path, callbacks=[saving, schedule()], enable_checkpointing=True).fit(
            student, loader(data=taught), loader(1), ckpt_path=checkpoint, weights_only=True
        )
        return student.state_dict()

    expected = run(module(teacher_net=teacher()))
    assert any(name.startswith("distiller.projections") for name in expected)
    (tmp_path / "live").rename(tmp_path / "kept")
    for step in (1, 6, 9):  # an epoch is 6 steps
        path = tmp_path / "kept" / f"step={step}.ckpt"
        assert_same(expected, run(module(seed=99, teacher_net=teacher()), path))
        shutil.rmtree(tmp_path / "live", ignore_errors=True)


def test_a_checkpoint_holds_no_teacher_and_needs_none_to_be_measured(tmp_path):
    guide = teacher(deployed=False)
    before = copy.deepcopy(guide.state_dict())
    student = module(teacher_net=guide)
    fit = trainer(tmp_path, callbacks=[schedule()])
    fit.fit(student, loader(), loader(1))
    fit.save_checkpoint(tmp_path / "model.ckpt")
    assert_same(before, guide.state_dict())
    assert not guide.training
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    plain = module(plan=None)
    plain.configure_model()
    assert set(saved["state_dict"]) - set(plain.state_dict()) == {"distiller.projections.relu.weight"}
    trained = [group["params"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert sum(map(len, trained)) == len(list(student.parameters()))
    loaded = QuantizedTraining.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, network=Net())
    images = examples().images
    with torch.no_grad():
        assert torch.equal(student.eval()(images), loaded.eval()(images))
    loaded.train()
    [scores] = trainer(tmp_path, callbacks=[schedule()]).test(
        module(), loader(1), ckpt_path=tmp_path / "model.ckpt", weights_only=True, verbose=False
    )
    assert scores["test_loss"] == pytest.approx(fit.callback_metrics["val_loss"].item(), rel=0.2)
    with pytest.raises(ConfigError, match="which no checkpoint holds: pass teacher="):
        trainer(tmp_path, callbacks=[schedule()]).fit(loaded, loader(), loader(1))
    again = QuantizedTraining.load_from_checkpoint(
        tmp_path / "model.ckpt", weights_only=True, network=Net(), teacher=guide
    )
    assert_same(student.state_dict(), again.state_dict())
    deployed, _ = qat.convert(student.network, [images])
    with torch.no_grad():
        assert torch.equal(deployed(images), student.network(images))
    assert not [name for name in deployed.state_dict() if "distiller" in name or "projection" in name]


def test_rows_from_disk_teach_what_the_live_teacher_teaches(tmp_path):
    data = examples()
    live, kept = module("w4a4", teacher_net=teacher()), module("w4a4", teacher_net=teacher())
    kept.configure_model()
    taught = table(tmp_path / "table", kept.distiller.ask, data)
    kept.distiller.release()
    for student, source in ((live, data), (kept, taught)):
        trainer(tmp_path, epochs=1, callbacks=[schedule()]).fit(student, loader(data=source), loader(1))
    for name, value in live.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_the_loss_is_the_one_that_is_written_down():
    student = module(None, teacher_net=teacher())
    student.configure_model()
    logged = {}
    student.log = lambda name, value, **_: logged.update({name: value})
    student.log_dict = lambda values, **_: logged.update(values)
    images, labels = examples().fetch(torch.arange(8))
    student.eval()  # no dropout: the forward can be repeated
    loss = student.training_step((images, labels), 0)
    task = nn.functional.cross_entropy(student(images), labels)
    expected = 0.3 * task + 0.7 * logged["train_logits_loss"] + 0.5 * logged["train_hidden_loss"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["train_task_loss"], task)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_student_learns_what_only_the_teacher_knows(tmp_path):
    """Labels say nothing here (weight 1), and are all wrong: the student still comes to agree with its teacher."""
    data = examples(128)
    guide = teacher(deployed=False)
    with torch.no_grad():
        answers = guide(data.images).argmax(1)
    data.labels = (answers + 1) % 10
    options = {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 2e-2}}
    student = module("w8a8", plan={"weight": 1.0}, teacher_net=guide, **options)
    trainer(tmp_path, epochs=6, callbacks=[schedule()]).fit(student, loader(data=data), loader(1))
    with torch.no_grad():
        agreement = (student.network.eval()(data.images).argmax(1) == answers).float().mean()
    assert agreement > 0.6


def test_misuse_is_typed():
    with pytest.raises(ConfigError, match="needs a distillation"):
        module(plan=None, teacher_net=teacher())
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        module(plan={"temprature": 2})
    wrong = module(plan={"hidden": ["rellu"]}, teacher_net=teacher())
    with pytest.raises(ConfigError, match="did you mean 'relu'"):
        wrong.configure_model()
    shared = Net()
    with pytest.raises(ConfigError, match="shares weights"):
        QuantizedTraining(shared, example_inputs=EXAMPLE, distill={}, teacher=shared).configure_model()
