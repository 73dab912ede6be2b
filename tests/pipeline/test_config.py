"""Every YAML composes and builds; wrong keys are refused with the nearest right one."""

import re
from pathlib import Path

import pytest
import yaml
import zoo
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import qat
from qat.errors import ConfigError, QuantizationError, RecipeError
from qat.pipeline import Run, run_config
from qat.pipeline.command import explain
from qat.pipeline.config import FOLDED, OF_THE_CALL, OF_THE_PLAN, STORED, read_recipe, stored_config
from qat.training.build import build
from qat.training.module import QuantizedTraining

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = sorted(p.parent.name + "=" + p.stem for p in CONF.glob("*/*.yaml"))


def composed(*overrides, name="config"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return zoo.language_model_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_composes_and_builds(choice, request):
    extra = ["data.dataset=nowhere", "data.num_classes=7"] if choice == "data=images" else []
    extra += ["data=cifar10"] if choice == "model=cnn" else []
    extra += ["target=onnxruntime"] if choice == "recipe=target" else []
    extra += ["recipe=target"] if choice == "target=llama_cpp" else []
    extra += ["distill.teacher=float"] if choice == "experiment=lm_student" else []
    if choice in ("data=tokens", "model=causal_lm") or choice.endswith("_causal_lm"):
        extra += [f"model.path={request.getfixturevalue('language_model')}"]
    config = run_config(composed(choice, *extra))
    run = Run(config, Path("unused"))
    assert run.extra_budget.keys() <= {"max_epochs", "max_steps"}
    assert isinstance(build(config["model"], "model"), nn.Module)
    module = QuantizedTraining(
        config["model"], recipe=config["recipe"], loss=config["loss"], optimizer=config["optimizer"],
        scheduler=config["scheduler"], metrics=config["metrics"],
    )  # fmt: skip
    module.configure_model()
    assert qat.is_prepared(module.network)


def test_the_language_model_is_taught_as_was_measured():
    config = run_config(composed("experiment=lm_taught", "recipe=w2a8"))
    assert (config["distill"]["teacher"], config["distill"]["temperature"], config["distill"]["weight"]) == (
        "float", 1.0, 0.5,
    )  # fmt: skip
    alone = run_config(composed("experiment=lm", "recipe=w2a8"))
    assert alone["distill"]["teacher"] is None
    assert {key for key in config if config[key] != alone[key]} == {"distill"}


def test_binary_weights_of_the_language_model_learn_faster_than_those_of_its_control():
    config, plain = (run_config(composed(f"experiment={name}", "recipe=w1a8")) for name in ("lm_one_bit", "lm_taught"))
    assert {key for key in config if config[key] != plain[key]} == {"recipe", "schedule"}
    assert config["schedule"]["control_learning_rate"] == plain["schedule"]["learning_rate"] == 0.3
    assert config["schedule"]["learning_rate"] > 0.3
    assert config["schedule"]["epochs"] == plain["schedule"]["epochs"]


def test_few_bits_learn_in_smaller_batches_than_their_control():
    """The control has the data's own batches and its own best rate, whatever the experiment does for few bits."""
    plain = run_config(composed("experiment=lm_taught", "recipe=w2a8"))
    for name in ("lm_few_bits", "lm_one_bit"):
        config = run_config(composed(f"experiment={name}", "recipe=w2a8"))
        assert config["schedule"]["steps_per_batch"] > 1
        assert config["data"] == plain["data"]
        assert config["schedule"]["control_learning_rate"] == plain["schedule"]["learning_rate"]
    assert plain["schedule"]["steps_per_batch"] == 1


def test_every_preset_has_a_recipe_config():
    presets = set()
    for path in (CONF / "recipe").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        presets.add(content.get("recipe", content)["preset"])
    assert presets == {*qat.recipe.PRESETS, "target"}


def test_the_keys_of_the_files_are_the_known_keys():
    of_evaluate = {"run", "deployed", "sweep", "runtimes", *OF_THE_PLAN}
    assert set(composed()) == set(STORED + FOLDED + OF_THE_CALL) - of_evaluate
    assert set(composed(name="evaluate")) == set(STORED + FOLDED + OF_THE_CALL)


def test_a_stored_config_stands_alone():
    config = run_config(composed("recipe=w4a4"))
    assert config["recipe"] == qat.Recipe.preset("w4a4").to_dict()
    assert not set(config) & set(OF_THE_CALL)


def test_recipes_from_a_file_a_preset_and_rules(tmp_path):
    whole = qat.Recipe.preset("w8a8")
    whole.save(tmp_path / "mine.yaml")
    assert read_recipe({"path": str(tmp_path / "mine.yaml"), "preset": "w4a4"}).to_dict() == whole.to_dict()
    assert read_recipe({"preset": "w8a8", "path": None}).to_dict() == whole.to_dict()
    assert read_recipe(whole.to_dict()).to_dict() == whole.to_dict()
    assert read_recipe({"preset": "w4a4", "edges": "same"}).to_dict()["edges"] == "same"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+typo=1"], "typo is not an option"),
        (["+sead=1"], "did you mean 'seed'"),
        (["+schedule.epoch=1"], "did you mean 'epochs'"),
        (["+schedule.phases.freeze_range_at=1"], "did you mean 'freeze_ranges_at'"),
        (["schedule.ladder=[{until:0.2,weigth:8}]"], "did you mean 'weight'"),
        (["schedule.ladder=[{until:0.9,weight:8}]"], r"0\.33 comes before"),
        (["+schedule.oscillation.damping=1"], "did you mean 'dampening'"),
        (["schedule.oscillation.freeze_above=0"], "positive frequency"),
        (["+early_stopping.patient=1"], "did you mean 'patience'"),
        (["+logger.tensorbord=1"], "did you mean 'tensorboard'"),
        (["+optimizer.momentum=1"], "no option 'momentum'"),
        (["+data.batchsize=1"], "did you mean 'batch_size'"),
        (["+trainer.max_epoch=1"], "did you mean 'max_epochs'"),
        (["+recipe.rulez=[]"], "rulez"),
        (["recipe.preset=w9a9"], "w9a9"),
        (["recipe.path=nowhere.yaml"], "no file nowhere.yaml"),
        (["~recipe"], "no recipe"),
        (["trainer.max_epochs=0"], "at least 1"),
        (["trainer.max_epochs=many"], "at least 1"),
        (["seed=-1"], "seed must be"),
        (["optimizer.lr=fast"], r"optimizer\.lr must be a number of at least 0, not 'fast'"),
        (["schedule.learning_rate=-1"], r"schedule\.learning_rate must be a number"),
        (["schedule.epochs=-1"], r"schedule\.epochs must be a number above 0"),
        (["schedule.calibration_batches=0"], r"schedule\.calibration_batches must be a whole number"),
        (["schedule.phases.reestimate_batches=-1"], r"schedule\.reestimate_batches is a number of batches"),
        (["schedule.phases.freeze_ranges_at=soon"], r"schedule\.freeze_ranges_at is a fraction"),
        (["checkpoint.every_n_steps=0"], r"checkpoint\.every_n_steps must be a whole number of at least 1"),
        (["trainer.accumulate_grad_batches=0"], r"trainer\.accumulate_grad_batches must be"),
        (["trainer.precision=16-mixed", "trainer.gradient_clip_val=1"], r"optimizer\.fused=false"),
        (["data=images", "data.dataset=photos", "data.num_classes=2", "data.size=0"], r"data\.size must be at least 1"),
        (["fold=5"], r"0\.\.4"),
        (["metrics=null"], "at least one"),
        (["model._target_=os.system"], "not allowed"),
        (["data._target_=torch.nn.ReLU", "~data.fold"], "no option"),
    ],
)
def test_mistakes_are_typed_and_named(overrides, message, tmp_path):
    with pytest.raises(QuantizationError, match=message):
        Run(run_config(composed(*overrides)), tmp_path)


def test_a_recipe_that_does_not_fit_is_known_before_training(tmp_path):
    rules = "recipe.rules=[{match:{name:'decoder*'},weight:{format:int8}}]"
    with pytest.raises(RecipeError, match="decoder"):
        Run(run_config(composed(f"+{rules}")), tmp_path / "run").execute()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    Run(run_config(composed()), tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(ConfigError, match="another configuration"):
        Run(run_config(composed()), tmp_path).execute()


@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
def test_a_monitor_that_nothing_logs_is_refused_before_training(section):
    with pytest.raises(ConfigError, match=rf"{section}.monitor: 'val_acuracy' .*did you mean 'val_accuracy'"):
        run_config(composed(f"{section}.monitor=val_acuracy"))


def test_a_model_that_cannot_take_the_data_is_refused_before_training(tmp_path):
    run = Run(run_config(composed("model=mlp", "model.inputs=64")), tmp_path)
    with pytest.raises(ConfigError, match=r"MLP cannot take the inputs .*\[1, 1, 16, 16\].*Set the options of model="):
        run.execute()
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    (["loss._target_=torch.nn.MSELoss", "model=mlp"], r"loss: MSELoss cannot compare .*\[1, 10\].*\[1\]"),
    (["metrics.accuracy.num_classes=4"], r"metrics\.accuracy: MulticlassAccuracy cannot compare"),
])
def test_a_loss_or_metric_that_does_not_fit_is_refused_before_training(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Run(run_config(composed(*overrides)), tmp_path / "run").execute()
    assert not (tmp_path / "run").exists()


def test_an_override_that_cannot_be_merged_says_why():
    with pytest.raises(ConfigCompositionException) as caught:
        composed("distill=hidden", "distill.hidden={a: b}")
    assert "Cannot merge DictConfig with ListConfig" in explain(caught.value, CONF, "config")


@pytest.mark.parametrize("content", ["model: [\n", "- 1\n", "\xff\xfe"])
def test_a_damaged_configuration_is_said_to_be(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        stored_config(tmp_path)


@pytest.mark.parametrize(("key", "advice"), [
    ("recipe.weight.format", r"a plus sign adds it: \+recipe.weight.format=<value>"),
    ("recipe.wieght", "did you mean 'recipe.weight'"), ("sed", "did you mean 'seed'"),
])
def test_the_advice_for_an_option_that_is_not_there(key, advice):
    with pytest.raises(ConfigCompositionException) as caught:
        composed(f"{key}=1")
    assert re.search(advice, explain(caught.value, CONF, "config"))


def test_a_value_that_follows_one_that_is_missing():
    with pytest.raises(OmegaConfBaseException) as caught:
        run_config(composed("model=cnn"))
    assert "give model.channels=<value>" in explain(caught.value, CONF, "config")


@pytest.mark.parametrize("order", [("recipe=w1a1", "schedule=ladder"), ("schedule=ladder", "recipe=w1a1")])
def test_a_schedule_on_the_command_line_replaces_the_recipe_s(order):
    assert run_config(composed("recipe=w1a1"))["schedule"]["ladder"] == []
    two_steps = run_config(composed("recipe=w1a1", "schedule=two_steps"))
    assert two_steps["schedule"]["ladder"] == [{"until": 0.4, "weight": 8}]
    assert [rung["weight"] for rung in run_config(composed(*order))["schedule"]["ladder"]] == [8, 4, 2]


def test_weight_decay_falls_with_the_bits():
    """The whole at 4 bits and more, half at 3, a quarter at 2 (Esser et al. 2020), none at 1."""
    found = {name: run_config(composed(f"recipe={name}"))["schedule"]["weight_decay"] for name in qat.recipe.PRESETS}
    expected = {"w4a4": 1.0, "w8a4": 1.0, "w3a8": 0.5, "w3a16": 0.5, "w2a2": 0.25, "w158a8": 0.25, "w1a8": 0, "w1a1": 0}
    assert expected.items() <= found.items()
