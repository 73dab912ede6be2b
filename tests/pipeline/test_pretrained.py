"""Hugging Face language models from a folder, through the same runs: mode=ptq unit by unit, mode=qat by training."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from hydra import compose, initialize_config_dir
from rich.console import Console

import qat
from qat.errors import ConfigError
from qat.pipeline import Run, evaluation, run_config, stored_config
from qat.pipeline import run as pipeline
from qat.reporting import read_csv
from qat.training import TokenDataModule, causal_lm

transformers = pytest.importorskip("transformers")
CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ["data.length=16", "data.eval_windows=6", "data.batch_size=2", "schedule.calibration_batches=3",
         "logger.tensorboard=false", "logger.csv=false"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return zoo.language_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} quick foxes and {i * 7 % 13} lazy dogs jump over the brown fence.\n"
                            for i in range(200)))
    return path


def make(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Run(run_config(compose("config", [*SMALL, *overrides])), folder, Console(quiet=True))


@pytest.fixture(scope="module")
def quantized(model, text, tmp_path_factory):
    run = make(tmp_path_factory.mktemp("run") / "run", "experiment=ptq_causal_lm", f"model.path={model}",
               f"data.path={text}", "recipe=w8a8_dynamic")
    return run, run.execute()


def test_a_folder_goes_in_and_a_deployed_folder_comes_out(quantized, model):
    run, results = quantized
    rows = {row.model: row for row in results.rows}
    assert list(rows) == ["float", "deployed"]
    assert rows["deployed"].score == pytest.approx(rows["float"].score, rel=0.02)
    assert 0 < rows["deployed"].divergence < 0.01
    assert rows["float"].divergence == pytest.approx(0, abs=1e-6)
    assert rows["deployed"].agreement_float > 0.8
    assert rows["deployed"].bytes < 0.5 * rows["float"].bytes
    assert rows["deployed"].decode_ms > 0
    assert results.tokens == 32
    assert "decode" in results.cells()[0]
    assert read_csv(run.folder / "results.csv") == results
    for name in ("report.html", "certificate.json", "coverage.json", "deployed/config.yaml"):
        assert (run.folder / name).exists()
    deployed = qat.load(run.folder / "deployed", transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(model)))
    made = deployed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_it_is_the_model_that_would_be_quantized_in_memory(quantized, model):
    run, _ = quantized
    whole = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(20).view(2, 10)
    expected, _ = qat.convert(qat.prepare(whole, "w8a8_dynamic", {"input_ids": ids, "use_cache": False}),
                              [{"input_ids": ids, "use_cache": False}])
    assert torch.equal(evaluation.load_model(run.config, run.folder, "deployed", None)(ids).logits,
                       expected(ids, use_cache=False).logits)


def test_a_model_that_does_not_fit_is_measured_unit_by_unit(quantized, monkeypatch):
    run, results = quantized
    monkeypatch.setattr(pipeline, "fits_in_memory", lambda size: False)
    again = Run(stored_config(run.folder), run.folder, Console(quiet=True)).evaluate()
    for before, after in zip(results.rows, again.rows, strict=True):
        assert (before.score, before.divergence) == (after.score, after.divergence)
    assert again.rows[0].latency_ms is None
    assert again.cells()[1][0][-2:] == ["", ""]


def test_an_interrupted_run_goes_on_at_the_unit_where_it_stopped(model, text, tmp_path, monkeypatch, quantized):
    options = ("experiment=ptq_causal_lm", f"model.path={model}", f"data.path={text}", "recipe=w8a8_dynamic")
    counted, whole = [], pipeline.stream

    def interrupted(*args):
        *rest, progress = args

        def count(name, done, of):
            counted.append(done)
            progress(name, done, of)
            if len(counted) == 2:
                raise KeyboardInterrupt
        return whole(*rest, count)

    monkeypatch.setattr(pipeline, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", *options).execute()
    run = make(tmp_path / "run", *options)
    run.execute()
    assert counted == [1, 2, 3, 4]
    first, _ = quantized
    for file in (first.folder / "deployed").glob("*.safetensors"):
        assert file.read_bytes() == (run.folder / "deployed" / file.name).read_bytes()


def test_the_same_model_is_fine_tuned_while_quantized(model, text, tmp_path):
    run = make(tmp_path / "run", "experiment=qat_causal_lm", f"model.path={model}", f"data.path={text}", "recipe=w4a8",
               "trainer.max_steps=4", "trainer.val_check_interval=2", "optimizer.lr=1e-3")
    results = run.execute()
    rows = {row.model: row for row in results.rows}
    assert list(rows) == ["float", "control", "ptq", "qat", "deployed"]
    assert results.bit_equal
    assert rows["control"].score < rows["float"].score
    assert not (run.folder / "float" / "weights.safetensors").exists()
    assert json.loads((run.folder / "stages" / "float.json").read_text())["weights"] == str(model.resolve())


def test_calibration_on_the_command_line_becomes_part_of_the_recipe():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = run_config(compose("config", ["recipe=w4a16", "calibration=[{gptq: {damp: 0.02}}, smoothquant]"]))
    assert config["recipe"]["calibration"] == ["smoothquant", {"gptq": {"damp": 0.02}}]
    assert "calibration" not in config
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(qat.errors.RecipeError, match="'gptq'"):
        run_config(compose("config", ["calibration=gtpq"]))


@pytest.mark.parametrize(("overrides", "says"), [
    (["model.path=nowhere", "pretrained=null"], r"nowhere is not the folder"),
    (["model.path=nowhere"], r"no folder 'nowhere'"),
    (["data.tokenizer=nowhere"], r"nowhere holds no tokenizer"),
    (["data.tokenizer=null", "data.path=null", "model.path={small}"], r"model knows tokens below 64"),
    (["model.dtype=int9"], "int9"),
    (["mode=ptqq"], "did you mean 'ptq'"),
    (["prune=magnitude"], "prune"),
    (["distill=logits"], "distill"),
    (["data.length=100000"], "smaller data.length"),
])
def test_what_a_user_can_put_right_is_said(model, text, tmp_path, overrides, says):
    if "model.path={small}" in overrides:
        overrides[-1] = f"model.path={zoo.language_model_folder(tmp_path / 'small', vocab_size=64)}"
    with pytest.raises(ConfigError, match=says):
        make(tmp_path / "run", "experiment=ptq_causal_lm", f"model.path={model}", f"data.path={text}", *overrides
             ).execute()


def test_tokens_are_those_of_the_tokenizer_with_an_end_after_each_document(model, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox " * 40)
    data = TokenDataModule(str(tmp_path / "a.txt"), str(model), length=8, batch_size=2)
    data.setup()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs, targets = next(iter(data.calibration_dataloader()))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert tokenizer.decode(inputs[0]) in "the quick brown fox " * 40
    assert int(data.test.text[-1]) == tokenizer.eos_token_id


def test_a_causal_lm_has_the_dtype_of_its_config_or_the_one_asked_for(model):
    assert next(causal_lm(str(model)).parameters()).dtype == torch.float32
    assert next(causal_lm(str(model), "bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_a_mixture_of_experts_whose_file_names_are_not_its_own(mode, text, tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, num_local_experts=3, num_experts_per_tok=2)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    run = make(tmp_path / "run", f"experiment={mode}_causal_lm", f"model.path={tmp_path / 'model'}",
               f"data.path={text}", "data.tokenizer=null", "recipe=w8a8_dynamic", "trainer.max_steps=2",
               "trainer.val_check_interval=1")
    rows = {row.model: row for row in run.execute().rows}
    assert rows["deployed"].bytes < 0.4 * rows["float"].bytes
    assert rows["deployed"].score == pytest.approx(rows["float"].score, rel=0.05)
    assert run.evaluate(["float"]).rows[0].score == rows["float"].score
