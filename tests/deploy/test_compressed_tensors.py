"""compressed-tensors: what transformers and the format's own library load is the deployed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file

import qat
from qat.deploy import checkpoint, compressed_tensors
from qat.deploy.export import export
from qat.errors import CheckpointError, UnsupportedError
from qat.numerics.formats import get_format

transformers = pytest.importorskip("transformers")

LINEAR, TABLE = {"type": "Linear"}, {"type": "Embedding"}


def rules(weight: Any, table: Any = None, activation: Any = None) -> dict[str, Any]:
    rule = {"match": LINEAR, "weight": weight} | ({"input": activation} if activation else {})
    return {"rules": [rule, *([{"match": TABLE, "weight": table}] if table else [])]}


def deployed_model(folder: Path, recipe: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    zoo.language_model_folder(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    batch = {"input_ids": torch.randint(0, 300, (2, 9))}
    return qat.convert(zoo.prepared(model, recipe, [batch]), [batch])[0]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


GROUPS = {"granularity": "per_group", "group_size": 8}
WEIGHT_ONLY = {
    "w4a16": ("w4a16", {}),                                    # mixed: int8 edges and table, tied
    "w8a16": ("w8a16", {"tie_word_embeddings": True}),
    "int4 channels, odd": (rules("int4"), {"intermediate_size": 53}),
    "int8 per tensor": (rules({"format": "int8", "granularity": "per_tensor"}), {}),
    "int3 groups": (rules({"format": "int3", **GROUPS}, "int4"), {"intermediate_size": 40}),
    "int5, odd": (rules("int5", "ternary"), {"intermediate_size": 37}),
    "mid-rise": (rules({"format": "int2_midrise", **GROUPS}, "int3_midrise"), {}),
    "binary": (rules("binary"), {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("case", WEIGHT_ONLY)
def test_transformers_loads_the_very_weights(tmp_path: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors")
    recipe, options = WEIGHT_ONLY[case]
    deployed = deployed_model(tmp_path / "float", recipe, **options)
    export(deployed, tmp_path / "out", "compressed-tensors", source=tmp_path / "float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 300, (3, 7))      # more rows than the kernel for few of them takes
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, deployed(tokens).logits)
    layers = [n for n, m in qat.rewriter.quantized_modules(deployed).items() if m.plan.weight]
    assert len(layers) >= 15
    for name in layers:
        assert torch.equal(loaded.get_submodule(name).weight, deployed.get_submodule(name).weight), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_their_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    name = str(dtype).removeprefix("torch.")
    deployed = deployed_model(tmp_path / "float", rules({"format": "int8", "scale_dtype": name}), dtype)
    export(deployed, tmp_path / "out", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 300, (3, 7))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, deployed(tokens).logits)
    assert loaded.model.norm.weight.dtype == dtype

    rounded = deployed_model(tmp_path / "other", rules("int8"), dtype)
    with pytest.raises(UnsupportedError, match=f"q_proj.*scale_dtype: {name}"):
        export(rounded, tmp_path / "rounded", "compressed-tensors")
    assert not (tmp_path / "rounded").exists()


INPUTS = {
    "dynamic": {"format": "int8", "dynamic": True},
    "static": {"format": "int8", "symmetric": True},
    "static with zero point": "int8",
}


@pytest.mark.parametrize("weight", ["int8", "int4"])
@pytest.mark.parametrize("case", INPUTS)
def test_integer_inputs(tmp_path: Path, case: str, weight: str) -> None:
    """The codes of the first layer's input are equal; later ones differ where float sums round elsewhere."""
    library = pytest.importorskip("compressed_tensors")
    deployed = deployed_model(tmp_path / "float", rules(weight, activation=INPUTS[case]))
    export(deployed, tmp_path / "out", "compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 300, (3, 7))
    seen = {}
    deployed.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        expected, actual = deployed(tokens).logits, loaded(tokens).logits
        first = loaded.model.layers[0].self_attn.q_proj
        values = library.quantization.lifecycle.forward.forward_quantize(
            first, seen["x"], "input", first.quantization_scheme.input_activations)
    quantizer = deployed.model.layers[0].self_attn.q_proj.input_quantizer
    assert torch.equal(values, quantizer.quantize(seen["x"]).dequantize())
    assert (expected.argmax(-1) == actual.argmax(-1)).float().mean() >= 0.95
    assert (expected - actual).abs().max() < 0.05 * expected.abs().max()
    assert torch.equal(first.weight, deployed.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (2, 64), (4, 45)])
def test_packing_is_that_of_the_library(bits: int, shape: tuple[int, int]) -> None:
    fmt = get_format(f"int{bits}")
    levels = torch.randint(fmt.lo, fmt.hi + 1, shape, dtype=torch.int8)
    packed = compressed_tensors.pack_rows(levels, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (shape[0], -(-shape[1] * bits // 32))
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(packed, helpers.pack_to_int32(levels, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, torch.Size(shape)), levels)


def test_golden_words() -> None:
    levels = torch.tensor([[-8, 7, 0, 1, -1, 2, 3, 4, 5]], dtype=torch.int8)
    assert compressed_tensors.pack_rows(levels, 4).tolist() == [[0xCBA798F0 - 2 ** 32, 0xD]]


def test_file_holds_the_codes_and_no_float_copy(tmp_path: Path) -> None:
    deployed = deployed_model(tmp_path / "float", "w4a16", tie_word_embeddings=True)
    export(deployed, tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, value in tensors.items() if value.is_floating_point() and value.numel() > 1024} == set()
    assert torch.equal(tensors["model.embed_tokens.weight"], deployed.model.embed_tokens.quantized_weight().codes)
    settings = json.loads((tmp_path / "out" / "config.json").read_bytes())
    groups = settings["quantization_config"]["config_groups"].values()
    assert settings["tie_word_embeddings"] is False      # two copies of the codes: loaders tie float weights only
    assert {g["weights"]["num_bits"] for g in groups} == {4, 8}
    assert [g["targets"] for g in groups].count(["Linear"]) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lm_head: shares its weight" in card
    assert "equal bit for bit" in card
    assert "from_pretrained" in card


def test_kept_layers_are_ignored_by_name(tmp_path: Path) -> None:
    recipe = {"rules": [{"match": {"name": "*.down_proj"}, "keep": "float32"}, *rules("int4")["rules"]]}
    deployed = deployed_model(tmp_path / "float", recipe)
    export(deployed, tmp_path / "out", "compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    assert settings["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert "LlamaRMSNorm" in (tmp_path / "out" / "README.md").read_text()


def test_same_bytes_twice_and_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = deployed_model(tmp_path / "float", "w4a16")
    export(deployed, tmp_path / "a", "compressed-tensors", source=tmp_path / "float")
    export(deployed, tmp_path / "b", "compressed-tensors", source=tmp_path / "float")
    export(deployed, tmp_path / "b", "compressed-tensors", source=tmp_path / "float")    # replaces its own
    assert files(tmp_path / "a") == files(tmp_path / "b")
    monkeypatch.setattr(checkpoint, "SHARD", 20_000)
    export(deployed, tmp_path / "c", "compressed-tensors")
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_bytes())
    together = {}
    for name in set(index["weight_map"].values()):
        together |= load_file(tmp_path / "c" / name)
    whole = load_file(tmp_path / "a" / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 1
    assert together.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)


def test_targets_and_dequantizing(tmp_path: Path) -> None:
    """vLLM has no integer embeddings and 4 or 8 bits: nothing becomes float unless asked for."""
    deployed = deployed_model(tmp_path / "float", rules("int3", "int3"), tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match=r"embed_tokens.*dequantize=\['model.embed_tokens'\]"):
        export(deployed, tmp_path / "out", "compressed-tensors", target="vllm")
    export(deployed, tmp_path / "out", "compressed-tensors", target="vllm", dequantize=["*embed*"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], deployed.model.embed_tokens.weight)
    assert tensors["lm_head.weight_packed"].shape == (300, 4)       # 4 bits
    assert "model.embed_tokens was trained as int3" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UnsupportedError, match="did you mean 'vllm'"):
        export(deployed, tmp_path / "out", "compressed-tensors", target="vlm")


REFUSED = {
    "zero points": (rules({"format": "int8", "symmetric": False}), "q_proj.*zero point"),
    "outputs": ({"rules": [{"match": LINEAR, "weight": "int8", "input": "int8", "output": "int8"}]}, "q_proj.*output"),
    "attention": ("w8a8", "AttentionScores.*type: Linear"),
    "unsigned inputs": (rules("int8", activation="uint8"), "q_proj.*uint8.*int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_leave_nothing(tmp_path: Path, case: str) -> None:
    recipe, message = REFUSED[case]
    deployed = deployed_model(tmp_path / "float", recipe)
    with pytest.raises(UnsupportedError, match=message):
        export(deployed, tmp_path / "out", "compressed-tensors")
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_other_models_and_other_folders(tmp_path: Path) -> None:
    mlp = qat.convert(zoo.prepared(zoo.mlp(), "w8a16", [torch.randn(2, 12)]), [torch.randn(2, 12)])[0]
    with pytest.raises(UnsupportedError, match="not a model of transformers"):
        export(mlp, tmp_path / "out", "compressed-tensors")
    deployed = deployed_model(tmp_path / "float", "w8a16")
    with pytest.raises(CheckpointError, match="something else"):
        export(deployed, tmp_path / "float", "compressed-tensors")
    with pytest.raises(CheckpointError, match="source="):
        export(deployed, tmp_path / "out", "compressed-tensors", source=tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float"]
