"""``target=`` and ``export=``: the recipe is fitted before training, and the files at the end hold what was trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from hydra import compose, initialize_config_dir
from rich.console import Console

import qat
from qat.deploy.export import verify
from qat.errors import ConfigError, QuantizationError, UnsupportedError
from qat.pipeline import Run, run_config, stored_config
from qat.rewriter import quantized_modules
from qat.targets import TARGETS, adjust

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "schedule.epochs=1", "logger.tensorboard=false",
         "logger.csv=false", "model=mlp"]
TUNED = ["data.length=16", "data.eval_windows=6", "data.batch_size=2", "schedule.calibration_batches=3",
         "logger.tensorboard=false", "logger.csv=false", "trainer.max_steps=3", "trainer.val_check_interval=2",
         "optimizer.lr=1e-2", "experiment=qat_causal_lm"]


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return run_config(compose("config", list(overrides)))


def run(folder: Path, values: dict[str, Any]) -> tuple[Run, str]:
    """A run that has ended, and what it printed."""
    said = io.StringIO()
    made = Run(values, folder, Console(file=said, width=200))
    made.execute()
    return made, said.getvalue()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    zoo.language_model_folder(folder / "model", num_hidden_layers=1, tie_word_embeddings=True)
    (folder / "text.txt").write_text("".join(f"{i} quick foxes and {i * 7 % 13} lazy dogs jump.\n" for i in range(200)))
    return [f"model.path={folder / 'model'}", f"data.path={folder / 'text.txt'}"]


def test_every_target_has_a_file() -> None:
    choices = {p.stem: yaml.safe_load(p.read_text()) for p in (CONF / "target").glob("*.yaml")}
    assert choices == {"none": {"name": None}, **{name: {"name": name} for name in TARGETS}}


def test_the_fitted_recipe_is_what_is_stored_and_what_was_changed_beside_it(tmp_path: Path) -> None:
    values = config(*SMALL, "target=tensorrt", "recipe=w4a8")
    fitted, changes = adjust(qat.Recipe.preset("w4a8"), "tensorrt")
    assert qat.Recipe.from_dict(values["recipe"]) == fitted != qat.Recipe.preset("w4a8")
    assert values["target"] == {"name": "tensorrt", "changes": changes}
    made, said = run(tmp_path / "run", values)
    assert all(change in said.replace("\n", " ") for change in changes)
    assert len(changes) >= 4
    again = stored_config(made.folder)
    assert again == values, "continuing and evaluating fit nothing again"
    _, said = run(made.folder, again)
    assert "because" not in said
    with pytest.raises(ConfigError, match="another configuration"):
        run(made.folder, config(*SMALL, "target=onnxruntime", "recipe=w4a8"))


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_runs_best(target: str) -> None:
    values = config("recipe=target", f"target={target}", "+recipe.backward_dtype=float32")
    best = qat.targets.default_recipe(target)
    assert qat.Recipe.from_dict(values["recipe"]).rules == best.rules
    assert values["recipe"]["backward_dtype"] == "float32"
    assert config(f"target={target}", "recipe=target")["recipe"] == adjust(
        qat.Recipe.preset(TARGETS[target].recipe), target)[0].to_dict()


@pytest.mark.parametrize(("overrides", "error", "message"), [
    (["recipe=target"], ConfigError, "target=onnxruntime"),
    (["target.name=tensorr"], UnsupportedError, "did you mean 'tensorrt'"),
    (["+target.nme=x"], ConfigError, "did you mean 'name'"),
    (["target=tensorrt", "recipe=w1a8"], UnsupportedError, "binary weights cannot run on tensorrt"),
    (["target=llama_cpp", "recipe=w8a8"], UnsupportedError, "recipe=target"),
    (["export=onx"], UnsupportedError, "did you mean 'onnx'"),
    (["export=[onnx,onnx]"], ConfigError, "each once"),
    (["export={onnx: 1}"], ConfigError, "list of formats"),
])
def test_what_cannot_be_is_said_at_once(overrides: list[str], error: type[QuantizationError], message: str) -> None:
    with pytest.raises(error, match=message):
        config(*overrides)


@pytest.mark.parametrize(("overrides", "error", "message"), [
    (["target=llama_cpp", "recipe=target"], UnsupportedError, "runs models of transformers, and MLP is none"),
    (["target=vllm", "recipe=target", "model=digits_cnn"], UnsupportedError, "models of transformers"),
    (["target=tensorrt", "recipe=w4a16", "model.hidden=[96, 40]"], UnsupportedError,
     r"3: its weight \(int4 per_group\(32\)\).*groups of 64 instead of 32"),
])
def test_layers_are_held_against_the_target_before_training(tmp_path: Path, overrides: list[str],
                                                            error: type[QuantizationError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "run", config(*SMALL, *overrides))
    assert not (tmp_path / "run").exists()


def test_exports_of_a_run(tmp_path: Path) -> None:
    """What a format cannot hold is said, and the run is complete all the same; continuing it tries again."""
    pytest.importorskip("gguf")
    pytest.importorskip("onnxscript")
    made, said = run(tmp_path / "run", config(*SMALL, "export=[onnx,gguf]", "target=onnxruntime", "recipe=target"))
    assert "not gguf: MLP (model_type None) cannot be written" in said.replace("\n", " ")
    folder = made.folder / "exported"
    assert [p.name for p in folder.iterdir()] == ["onnx"]
    before = {p.name: p.read_bytes() for p in (folder / "onnx").iterdir()}
    assert set(before) == {"model.onnx", "model.onnx.json", "README.md"}
    assert verify(folder / "onnx" / "model.onnx")["target"] == "onnxruntime"
    score = next(r.score for r in made._results.rows if r.model == "deployed")
    assert f"| accuracy, deployed | {score:.6g} |" in before["README.md"].decode()
    assert (made.folder / "report.html").exists()
    assert not (made.folder / "stages" / "export.json").exists()
    _, said = run(made.folder, stored_config(made.folder))
    assert said.count("finished before") == 6
    assert "not gguf" in said
    assert before == {p.name: p.read_bytes() for p in (folder / "onnx").iterdir()}


def test_a_model_trained_for_llama_cpp_is_its_file_bit_for_bit(language_model: list[str], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    made, said = run(tmp_path / "run", config(*TUNED, *language_model, "target=llama_cpp", "recipe=w4a16",
                                              "export=gguf"))
    assert "scales in float16" in said
    assert json.loads((made.folder / "stages" / "export.json").read_text())["gguf"]
    deployed = made._load("deployed")
    path = made.folder / "exported" / "gguf" / "model.gguf"
    assert verify(path)["options"] == {"source": "model"}
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    layers = {n: m for n, m in quantized_modules(deployed).items() if m.plan.weight is not None}
    assert len(layers) == 9
    for name, module in layers.items():
        if name == "lm_head":                       # tied: llama.cpp reads the table
            assert module.plan.tied_to == "model.embed_tokens"
            continue
        tensor = tensors[names.get_name(f"{name}.weight", try_suffixes=(".weight",))]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj", "k_proj")):
            heads = 4 if "q_proj" in name else 2
            weight = weight.view(heads, -1, 2, 32).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(weight, module.weight), name
        assert tensor.tensor_type.name == ("Q8_0" if "embed" in name else "Q4_0")


@pytest.mark.parametrize(("recipe", "dtype"), [("target", "bfloat16"), ("w4a16", "float32")])
def test_a_model_trained_for_vllm_is_its_folder_bit_for_bit(language_model: list[str], tmp_path: Path, recipe: str,
                                                            dtype: str) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    made, said = run(tmp_path / "run", config(*TUNED, *language_model, "target=vllm", f"recipe={recipe}",
                                              f"model.dtype={dtype}", "export=compressed-tensors"))
    assert ("scales in bfloat16" in said) == (dtype == "bfloat16")
    deployed = made._load("deployed")
    folder = made.folder / "exported" / "compressed-tensors"
    assert verify(folder)["target"] == "vllm"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 300, (3, 7))
    with torch.no_grad():
        assert torch.isfinite(loaded(tokens).logits).all()      # it decompresses when it first runs
    layers = [n for n, m in quantized_modules(deployed).items() if m.plan.weight is not None]
    assert len(layers) == 7        # the head is the table
    for name in layers:
        assert torch.equal(loaded.get_submodule(name).weight.float(), deployed.get_submodule(name).weight.float()), name
    assert torch.equal(loaded.model.embed_tokens.weight, deployed.model.embed_tokens.weight)


def test_streaming_holds_the_layers_against_the_target_first(language_model: list[str], tmp_path: Path) -> None:
    values = config(*TUNED[:-1], "experiment=ptq_causal_lm", *language_model, "target=vllm", "recipe=w4a16")
    assert values["mode"] == "ptq"
    values["recipe"]["rules"] = [{"match": {"type": "Linear"}, "weight": {
        "format": "int4", "granularity": "per_group", "group_size": 16}}]
    with pytest.raises(UnsupportedError, match=r"q_proj: its weight.*groups of 32 instead of 16"):
        run(tmp_path / "run", values)
    assert not (tmp_path / "run" / "deployed").exists()
