"""``evaluate.py plan=``: what a user sees."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

import qat
from qat.deploy.memory import DEVICES
from qat.deploy.shapes import weights_of
from qat.errors import ConfigError
from qat.pipeline import evaluate, run_config
from qat.reporting import read_devices
from qat.reporting.memory import size
from qat.training.build import build

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def printed(*overrides: str, width: int = 80) -> str:
    out = io.StringIO()
    evaluate(composed("evaluate", *overrides), Console(file=out, width=width))
    return out.getvalue()


def table(text: str) -> dict[str, list[str]]:
    """The cells of each line of the table."""
    lines = text.split("\n\n")[1].splitlines()
    split = {cells[0]: cells[1:] for line in lines if (cells := re.split(r"\s{2,}", line.strip()))}
    return {name: cells for name, cells in split.items() if len(cells) == 7}


def test_175_billion_parameters() -> None:
    text = printed("plan=175B")
    rows = table(text)
    assert [rows[p][0] for p in ("FP32", "BF16", "INT8")] == ["700 GB", "350 GB", "175 GB"]
    assert [rows[p][1] for p in ("FP32", "INT8", "INT4")] == ["0 B", "~42.72 MB", "~5.469 GB"]
    assert rows["INT4"][2:] == ["?", "?", "?", "> 92.97 GB", "141 GB"]
    assert rows["FP32"][-1] == "5x141 GB"
    for words in ("GB = 1e9 bytes", "a count of parameters alone", "KV cache and activations are unknown"):
        assert words in " ".join(text.split())


@pytest.mark.parametrize("overrides", [
    ("plan=175B", "layers=96", "hidden=12288", "heads=96", "vocabulary=50257", "device=[40GB,80GiB]"),
    ("plan=999T",), ("plan=7",), ("plan=1.5e9", "layers=1000", "hidden=9999", "context=1000000", "batch=99"),
])  # fmt: skip
def test_the_table_fits_eighty_columns(overrides) -> None:
    text = printed(*overrides)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert table(text).keys() == {"precision", "FP32", "BF16", "INT8", "INT4", "INT2", "1 bit"}


def test_options_reach_the_figures() -> None:
    given = ("plan=1B", "layers=10", "hidden=1000", "heads=10", "kv_heads=5", "context=1000")
    rows = table(printed(*given))
    assert rows["FP32"][2] == size(10 * 1000 * 2 * 500 * 4)
    assert rows["INT4"][2] == size(10 * 1000 * 2 * 500 * 2)
    assert table(printed(*given, "batch=3"))["INT4"][2] == size(3 * 10 * 1000 * 2 * 500 * 2)
    assert table(printed(*given, "kv_bits=8"))["INT4"][2] == size(10 * 1000 * 2 * 5 * (100 + 4))
    assert table(printed(*given, "kv_bits=same"))["INT2"][2] == size(10 * 1000 * 2 * 5 * (25 + 4))
    assert table(printed(*given, "kv_bits=0"))["INT2"][2] == "0 B"
    plain, eager, wide = (table(printed(*given, *more))["INT4"][3] for more in ((), ("attention=eager",),
                                                                              ("activation_bits=32",)))
    assert len({plain, eager, wide}) == 3
    rows = table(printed("plan=128B", "hidden=1280", "group_size=64", "scale_dtype=float16", "zero_points=true"))
    assert rows["INT4"][1] == size(128 * 10**9 // 64 * (2 + 4))
    rows = table(printed("plan=175B", "device=200GB"))
    assert (rows["INT8"][-1], rows["BF16"][-1]) == ("200 GB", "2x200 GB")


def test_a_directory_and_what_lies_in_it(tmp_path) -> None:
    config = {"model_type": "nobody's", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 100, "num_local_experts": 4, "num_experts_per_tok": 1,
              "rms_norm_eps": 1e-6, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = " ".join(printed(f"plan={tmp_path}", "context=1024", width=200).split())
    assert "estimate from config.json (transformers does not know model_type" in text
    assert "of which a token uses" in text
    assert "more than the 512 positions" in text
    assert "Batch 1 of 512 positions" in printed(f"plan={tmp_path}", width=200)


def run_of(folder: Path, *overrides: str) -> dict:
    values = run_config(composed("config", *overrides))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return values


def test_a_run_and_its_deployed_model(tmp_path) -> None:
    model = build(run_of(tmp_path)["model"], "model")
    text = printed(f"plan={tmp_path}", width=200)
    assert f"exact: the model of the run. {sum(w.count for w in weights_of(model) if w.floating):,} parameters" in text
    assert "KV cache and activations are unknown" in text
    assert "deployed" not in table(text)
    x = torch.randn(4, 1, 16, 16)
    deployed, _ = qat.convert(qat.calibrate(qat.prepare(model, "w4a16", example_inputs=x), [x]), [x])
    qat.save(deployed, tmp_path / "deployed")
    row = table(printed(f"plan={tmp_path}", width=200))["deployed"]
    file = (tmp_path / "deployed" / "model.safetensors").read_bytes()
    data = len(file) - 8 - int.from_bytes(file[:8], "little")
    units = {"B": 1, "kB": 1000}
    assert sum(float(cell.split()[0]) * units[cell.split()[1]] for cell in row[:2]) == pytest.approx(data, rel=1e-3)
    assert table(printed(f"plan={tmp_path / 'deployed'}", width=200))["deployed"] == row


def test_a_run_of_a_language_model_has_a_cache(tmp_path) -> None:
    model = run_of(tmp_path, "experiment=lm")["model"]
    row = table(printed(f"plan={tmp_path}", "context=100", width=200))["FP32"]
    assert row[2] == size(model["layers"] * 100 * 2 * model["width"] * 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan=175X"], "'X' is no unit of a count"),
        (["plan=-5"], "positive whole number"),
        (["plan=nowhere/at/all"], "no such file or directory"),
        (["plan=1B", "layers=-2"], "layers must be a whole number of at least 1, not -2"),
        (["plan=1B", "context=0"], "context must be"),
        (["plan=1B", "batch=two"], "batch must be"),
        (["plan=1B", "device=24XB"], "device=24XB: give memory sizes such as 24GB"),
        (["plan=1B", "device=-24GB"], "device=-24GB"),
        (["plan=1B", "device=[]"], "names no memory size"),
        (["plan=1B", "sweep=x"], "Say what to evaluate"),
        ([], "plan=<directory, config.json or parameter count>"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(overrides, message) -> None:
    with pytest.raises(ConfigError) as caught:
        printed(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_of_devices() -> None:
    assert read_devices(None) == DEVICES
    assert read_devices(["24GB", "1.5 tib", 80]) == (24 * 10**9, 3 * 2**39, 80 * 10**9)
    assert read_devices("512MB") == (512 * 10**6,)


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (9999, "9.999 kB"),
                                             (999_999, "1000 kB"), (123456789, "123.5 MB"), (9 * 10**12, "9000 GB"),
                                             (10**13, "10 TB")])  # fmt: skip
def test_sizes_have_four_digits(value, text) -> None:
    assert size(value) == text
