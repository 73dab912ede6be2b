"""GGUF: the format's own reader gives the deployed weights, and transformers the deployed model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import qat
from qat.deploy.export import export
from qat.errors import CheckpointError, UnsupportedError
from qat.rewriter import quantized_modules

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from qat.deploy import gguf as writer  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 301, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases, long": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def deployed_model(kind: str, recipe: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)      # norms and biases too
    batch = {"input_ids": torch.randint(0, 300, (2, 9))}
    return qat.convert(zoo.prepared(model.to(dtype), recipe, [batch]), [batch])[0]


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def straight(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as transformers has them, from neighbouring channels."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("case", MODELS)
def test_transformers_loads_the_very_model(tmp_path: Path, case: str) -> None:
    pytest.importorskip("accelerate")
    kind, options = MODELS[case]
    deployed = deployed_model(kind, writer.recipe(), **options)
    export(deployed, tmp_path / "m.gguf", "gguf")
    config, loader = deployed.config, type(deployed)        # transformers reads no head_dim and no biases from the file
    if kind == "Mistral":                                   # and knows the file's architecture as llama only
        config, loader = transformers.LlamaConfig(**(SIZES | {"head_dim": 8})), transformers.LlamaForCausalLM
        assert gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 24     # the window
    loaded = loader.from_pretrained(tmp_path, gguf_file="m.gguf", config=config).eval()
    tokens = torch.randint(0, 300, (3, 7))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, deployed(tokens).logits)


def test_rotary_frequencies_of_llama_3(tmp_path: Path) -> None:
    deployed = deployed_model("Llama", writer.recipe(), rope_parameters=LLAMA3)
    export(deployed, tmp_path / "m.gguf", "gguf")
    divisors = values(read(tmp_path / "m.gguf")["rope_freqs.weight"])
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](deployed.config, torch.device("cpu"))
    torch.testing.assert_close(1.0 / 500000.0 ** (torch.arange(0, 8, 2) / 8) / divisors, expected)
    assert divisors.min() == 1.0 < divisors.max() <= 8.0


GROUP = {"granularity": "per_group", "group_size": 32, "scale_dtype": "float16"}
BLOCKS = {
    "Q8_0": {"format": "int8", **GROUP},
    "Q4_0": {"format": "int4", **GROUP},
    "Q8_0 channels": {"format": "int8", "scale_dtype": "float16"},
    "Q8_0 6 bits": {"format": "int6", "scale_dtype": "float16", "granularity": "per_tensor"},
    "Q4_0 mid-rise": {"format": "int3_midrise", **GROUP},
    "Q4_0 binary": {"format": "binary", "scale_dtype": "float16"},
    "TQ2_0": {"format": "ternary", "scale_dtype": "float16"},
    "TQ1_0": {"format": "ternary", "granularity": "per_group", "group_size": 256, "scale_dtype": "float16"},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_reader_gives_the_weights(tmp_path: Path, case: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1} if "TQ" in case else {}
    type_, spec = case.split()[0], BLOCKS[case]
    if "mid-rise" in case:
        spec = {**spec, "format": "int2_midrise"}
    rules = [{"weight": spec, "match": {"type": kind}} for kind in ("Linear", "Embedding")]
    deployed = deployed_model("Llama", {"rules": rules}, **sizes)
    options = {"ternary": type_} if "TQ" in type_ else {}
    export(deployed, tmp_path / "m.gguf", "gguf", **options)
    tensors, count = read(tmp_path / "m.gguf"), 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, module in quantized_modules(deployed).items():
        tensor = tensors[names.get_name(f"{name}.weight", try_suffixes=(".weight",))]
        weight = values(tensor)
        if name.endswith(("q_proj", "k_proj")):
            weight = straight(weight, 4 if "q_proj" in name else 2)
        assert tensor.tensor_type.name == type_
        assert torch.equal(weight, module.weight), name
        count += 1
    assert count == 2 + 7 * deployed.config.num_hidden_layers


def test_lowest_codes_go_in(tmp_path: Path) -> None:
    """int8 -128 and int4 -8 are numbers of the blocks like any other."""
    for bits, pack in ((8, writer._q8_0), (4, writer._q4_0)):
        lowest = -2 ** (bits - 1)
        levels = torch.arange(lowest, lowest + 32, dtype=torch.int8).view(1, 1, 32).clamp(max=-lowest - 1)
        d = torch.tensor([[[0.5]]], dtype=torch.float16).view(torch.uint8)
        kind = gguf.GGMLQuantizationType[f"Q{bits}_0"]
        assert torch.equal(torch.from_numpy(gguf.dequantize(pack(levels, d).reshape(1, -1).numpy(), kind)),
                           levels[0].float() * 0.5)


def test_narrow_floats_and_kept_layers(tmp_path: Path) -> None:
    recipe = {"rules": [{"match": {"type": "Linear"}, "weight": {"format": "int4", **GROUP}}]}
    for dtype in (torch.bfloat16, torch.float16):
        deployed = deployed_model("Llama", recipe, dtype)
        export(deployed, tmp_path / "m.gguf", "gguf")
        tensors = read(tmp_path / "m.gguf")
        assert torch.equal(values(tensors["token_embd.weight"]), deployed.model.embed_tokens.weight.float())
        assert tensors["token_embd.weight"].tensor_type.name == {"bfloat16": "BF16", "float16": "F16"}[str(dtype)[6:]]
        assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_same_bytes_twice_with_the_tokenizer(tmp_path: Path) -> None:
    source = zoo.language_model_folder(tmp_path / "float")
    deployed = deployed_model("Llama", writer.recipe("int8"), tie_word_embeddings=True)
    for name in ("a.gguf", "b.gguf", "b.gguf"):
        export(deployed, tmp_path / name, "gguf", source=source)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "a.gguf", "a.gguf.json", "b.gguf", "b.gguf.json",
                                                          "b.gguf.md", "float"]
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    vocabulary = transformers.AutoTokenizer.from_pretrained(source).get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 301
    assert all(tokens[number] == text for text, number in vocabulary.items())
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.model"]) == ("gpt-2", "gpt2")
    assert fields["tokenizer.ggml.merges"]
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2


def test_tokenizer_of_pieces(tmp_path: Path) -> None:
    """SentencePiece's kind: scores in the order of the merges, bytes as such."""
    source = zoo.language_model_folder(tmp_path / "float")
    data = json.loads((source / "tokenizer.json").read_bytes())
    texts = ["<unk>", *(f"<0x{i:02X}>" for i in range(4)), "a", "b", "c", "ab", "abc"]
    data["model"] = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [["a", "b"], ["ab", "c"]],
                     "vocab": {text: number for number, text in enumerate(texts)}}
    data["added_tokens"] = []
    (source / "tokenizer.json").write_text(json.dumps(data))
    export(deployed_model("Llama", writer.recipe()), tmp_path / "m.gguf", "gguf", source=source)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.scores"][5:10] == [-2.0, -2.0, -2.0, 0.0, -1.0]
    assert fields["tokenizer.ggml.token_type"][:6] == [2, 6, 6, 6, 6, 1]


LINEAR = {"type": "Linear"}
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "float32 scales": ("Llama", {"rules": [{"match": LINEAR, "weight": "int8"}]}, {}, "q_proj.*scale_dtype: float16"),
    "small groups": ("Llama", {"rules": [{"match": LINEAR, "weight": {**BLOCKS["Q4_0"], "group_size": 16}}]}, {},
                     "q_proj.*groups of 16.*32"),
    "odd inputs": ("Llama", {"rules": [{"match": LINEAR, "weight": BLOCKS["Q8_0 channels"]}]},
                   {"intermediate_size": 53}, "down_proj.*53 inputs"),
    "zero points": ("Llama", {"rules": [{"match": LINEAR, "weight": {"format": "int8", "symmetric": False}}]}, {},
                    "q_proj.*zero point"),
    "inputs": ("Llama", {"rules": [{"match": LINEAR, "weight": "int8", "input": "int8"}]}, {}, "q_proj.*input"),
    "architecture": ("Gemma2", "w8a16", {"head_dim": 8}, "gemma2.*llama"),
    "activation": ("Llama", writer.recipe(), {"hidden_act": "gelu"}, "gelu"),
    "rope": ("Llama", writer.recipe(), {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                            "original_max_position_embeddings": 64}}, "yarn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_leave_nothing(tmp_path: Path, case: str) -> None:
    kind, recipe, options, message = REFUSED[case]
    deployed = deployed_model(kind, recipe, **options)
    with pytest.raises(UnsupportedError, match=message):
        export(deployed, tmp_path / "m.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_dequantizing_and_wrong_words(tmp_path: Path) -> None:
    deployed = deployed_model("Llama", "w4a16")
    with pytest.raises(UnsupportedError, match=r"dequantize=\['model.embed_tokens'\]"):
        export(deployed, tmp_path / "m.gguf", "gguf")
    export(deployed, tmp_path / "m.gguf", "gguf", dequantize=True)
    assert torch.equal(values(read(tmp_path / "m.gguf")["token_embd.weight"]), deployed.model.embed_tokens.weight)
    with pytest.raises(UnsupportedError, match="did you mean 'TQ2_0'"):
        export(deployed, tmp_path / "m.gguf", "gguf", ternary="TQ2")
    with pytest.raises(UnsupportedError, match="did you mean 'llama_cpp'"):
        export(deployed, tmp_path / "m.gguf", "gguf", target="ollama")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        export(deployed, tmp_path / "n.gguf", "gguf", dequantize=True, source=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "m.gguf", "m.gguf.json"]
