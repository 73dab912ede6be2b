"""Runs with a teacher: their own float model, another run, a deployed folder; what it computes kept on disk; resume."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

import qat
from qat.errors import CheckpointError, ConfigError
from qat.pipeline import Run, run_config, stored_config
from qat.training.module import QuantizedTraining

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = [
    "trainer.max_epochs=1", "trainer.limit_train_batches=6", "trainer.limit_val_batches=1", "schedule.epochs=1",
    "checkpoint.every_n_steps=2", "logger.tensorboard=false", "logger.csv=false", "model=mlp",
]  # fmt: skip


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return run_config(compose("config", [*SMALL, *overrides]))


def make(folder, *overrides):
    return Run(config(*overrides), folder, Console(quiet=True))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run with wider layers."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    make(folder, "model.hidden=[32,24]").execute()
    return folder


def weights(run, *stages):
    files = [run.folder / stage / "weights.safetensors" for stage in stages]
    return [path.read_bytes() for path in (*files, run.folder / "deployed" / "model.safetensors")]


def test_the_runs_own_float_model_teaches_the_quantized_one_alone(tmp_path, monkeypatch):
    seen = []
    original = QuantizedTraining._taught_loss

    def spy(self, *arguments):
        seen.append(self.hparams["recipe"] is not None)
        return original(self, *arguments)

    monkeypatch.setattr(QuantizedTraining, "_taught_loss", spy)
    alone = make(tmp_path / "alone", "recipe=w2a2")
    alone.execute()
    assert not seen
    taught = make(tmp_path / "taught", "recipe=w2a2", "distill=logits", "distill.temperature=3")
    assert taught.execute().bit_equal is True
    assert seen == [True] * 6
    *same, one, _ = weights(alone, "float", "control", "ptq", "qat")
    *equal, two, _ = weights(taught, "float", "control", "ptq", "qat")
    assert same == equal  # the comparison is fair: only the quantized training differs
    assert one != two
    assert not (taught.folder / "teacher.json").exists()
    both = make(tmp_path / "both", "recipe=w2a2", "distill=logits", "distill.temperature=3", "distill.control=true")
    both.execute()
    assert seen == [True] * 6 + [False] * 6 + [True] * 6
    alike, other, start, end, _ = weights(both, "float", "control", "ptq", "qat")
    assert [alike, start, end] == [same[0], same[2], two]
    assert other != same[1]


def test_a_deployed_teacher_of_another_width_from_disk(tmp_path, teacher, monkeypatch):
    """Hidden layers through projections, outputs kept on disk and shared; the student's files hold neither."""
    asked = []
    original = qat.Distiller.ask

    def ask(self, inputs):
        asked.append(len(inputs))
        return original(self, inputs)

    monkeypatch.setattr(qat.Distiller, "ask", ask)
    options = ["distill=logits", f"distill.teacher={teacher}/deployed", "distill.hidden=[2,4]",
               f"distill.cache={tmp_path}/kept", "model.hidden=[12,12]"]  # fmt: skip
    first = make(tmp_path / "first", *options)
    assert first.execute().bit_equal is True
    examples = len(first.data.train)
    assert sum(count for count in asked if count > 1) == examples  # once for three trainings; else one example to look
    before = len(asked)
    second = make(tmp_path / "second", *options)
    second.execute()
    assert all(count == 1 for count in asked[before:])
    assert weights(first, "float", "control", "qat") == weights(second, "float", "control", "qat")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    plain = make(tmp_path / "plain", "model.hidden=[12,12]")
    plain.execute()
    for stage in ("float", "control", "qat"):
        path = f"{stage}/weights.safetensors"
        ours, theirs = (run.folder / path for run in (first, plain))
        assert ours.stat().st_size == theirs.stat().st_size
        assert ours.read_bytes() != theirs.read_bytes()  # the control learns from a teacher from elsewhere as well
    last = torch.load(first.folder / "qat" / "checkpoints" / "last.ckpt", weights_only=True)
    extra = {name: tuple(value.shape) for name, value in last["state_dict"].items() if name.startswith("distiller")}
    assert extra == {"distiller.projections.2.weight": (32, 12), "distiller.projections.4.weight": (24, 12)}


@pytest.mark.parametrize("cache", ["false", "true"])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, teacher, cache):
    options = ["distill=logits", f"distill.teacher={teacher}", "distill.hidden=[2]", f"distill.cache={cache}",
               "model.hidden=[12,12]"]  # fmt: skip
    whole = make(tmp_path / "whole", *options)
    whole.execute()

    class Killed(Exception):
        pass

    for stage, step in (("float", 3), ("qat", 5)):
        broken = Run(config(*options), tmp_path / "broken", Console(quiet=True))
        original = broken._module

        def module(*arguments, stage=stage, step=step, original=original, **options):
            made = original(*arguments, **options)
            if (made.hparams["recipe"] is None) == (stage == "float"):
                made.on_before_zero_grad = lambda optimizer: kill(made, step)
            return made

        def kill(made, step):
            if made.trainer.global_step == step:
                raise Killed

        broken._module = module
        with pytest.raises(Killed):
            broken.execute()
    again = Run(stored_config(tmp_path / "broken"), tmp_path / "broken", Console(quiet=True))
    again.execute()
    assert weights(whole, "float", "control", "ptq", "qat") == weights(again, "float", "control", "ptq", "qat")


def test_token_models_and_students_without_all_their_channels(tmp_path):
    """Where classes come last; and where a layer is narrower than its teacher's because it was pruned."""
    run = make(
        tmp_path / "tokens", "experiment=lm", "model=byte_transformer", "model.layers=1", "model.width=24",
        "data.eval_windows=8", "data.batch_size=4", "trainer.max_steps=2", "trainer.val_check_interval=null",
        "distill=logits", "distill.hidden=[blocks.0]", "distill.cache=false",
    )  # fmt: skip
    assert run.execute().bit_equal is True
    run = make(tmp_path / "channels", "model=digits_cnn", "model.width=4", "prune=channels", "distill=hidden")
    assert run.execute().bit_equal is True
    last = torch.load(run.folder / "qat" / "checkpoints" / "last.ckpt", weights_only=True)
    projections = [v.shape for n, v in last["state_dict"].items() if n.startswith("distiller.projections")]
    assert any(inputs < outputs for outputs, inputs in projections)


@pytest.mark.parametrize("stage", ["", "control", "qat", "ptq"])
def test_every_stage_of_a_run_can_teach(tmp_path, teacher, stage):
    run = make(tmp_path / "run", "distill=logits", f"distill.teacher={teacher}/{stage}")
    images = run._example
    found = run._module(None, 1.0)
    found.configure_model()
    expected = Run(stored_config(teacher), teacher, Console(quiet=True))._load(stage or "float")
    with torch.no_grad():
        assert torch.equal(found.distiller.ask(images)["logits"], expected(images))


def test_a_deployed_folder_from_elsewhere_needs_an_architecture(tmp_path, teacher):
    net = Run(stored_config(teacher), teacher, Console(quiet=True))._load("deployed")
    qat.save(net, tmp_path / "elsewhere" / "model")
    options = ["distill=logits", f"distill.teacher={tmp_path}/elsewhere/model"]
    with pytest.raises(ConfigError, match=r"describe it in distill\.teacher_model"):
        config(*options)
    described = config(*options, "distill.teacher_model={_target_:qat.training.models.MLP,hidden:[32,24]}")
    assert Run(described, tmp_path / "run", Console(quiet=True))._module(None, 1.0)._teacher[0] is not None
    wrong = config(*options, "distill.teacher_model={_target_:qat.training.models.MLP,hidden:[32]}")
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        Run(wrong, tmp_path / "run", Console(quiet=True)).execute()
    with pytest.raises(ConfigError, match="not allowed"):
        config(*options, "distill.teacher_model={_target_:os.system}")


def test_paths_are_stored_whole_and_nobody_means_nobody(tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    stored = config("distill=logits", "distill.teacher=teacher/deployed", "distill.cache=kept")["distill"]
    assert stored["teacher"] == str(teacher / "deployed")
    assert stored["cache"] == str(teacher.parent / "kept")
    assert config("distill=logits", "distill.teacher=null")["distill"] == config()["distill"] == {"teacher": None}


def test_a_changed_teacher_is_refused(tmp_path, teacher):
    run = make(tmp_path / "run", "distill=logits", f"distill.teacher={teacher}/deployed")
    run._module = None  # stop before the first training
    with pytest.raises(TypeError):
        run.execute()
    assert len(json.loads((tmp_path / "run" / "teacher.json").read_text())["sha256"]) == 64
    (tmp_path / "run" / "teacher.json").write_text(json.dumps({"sha256": "0"}))
    with pytest.raises(ConfigError, match="not the one any more that the run began with"):
        run.execute()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.teacher=nowhere"], "there is no such folder"),
        (["distill.teacher=3"], "must be float or the folder"),
        (["distill.control=maybe"], "must be true or false"),
        (["distill.teacher={conf}/model"], "neither a run folder"),
        (["distill.teacher={conf}"], "does not describe a run"),
        (["+distill.temprature=1"], "did you mean 'temperature'"),
        (["distill.weight=2"], r"distill\.weight must be a number"),
        (["distill.cache=3"], r"distill\.cache must be"),
        (["distill.hidden=[7]"], "there is no layer '7'"),
        (["distill.attention=auto"], r"has no nn\.MultiheadAttention"),
        (["distill.cache=true", "data.augment=1"], "augmentation changes the examples"),
        (["distill.teacher={teacher}", "distill.teacher_model={{_target_:qat.training.models.MLP}}"],
         r"leave out distill\.teacher_model"),
        (["distill.teacher={teacher}", "model.num_classes=11", "metrics.accuracy.num_classes=11"],
         "must have the same classes"),
    ],
)  # fmt: skip
def test_mistakes_are_known_before_training(tmp_path, teacher, overrides, message):
    overrides = [text.format(conf=CONF, teacher=teacher) for text in overrides]
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "run", "distill=logits", *overrides).execute()
    assert not (tmp_path / "run").exists()
