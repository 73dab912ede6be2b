"""Where memory plans take shapes from: counts, configurations of many families, headers, deployed directories."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qat
from qat.deploy.configurations import text_section
from qat.deploy.memory import Workload, plan_memory
from qat.deploy.shapes import from_count, from_module, read_contents, weights_of
from qat.errors import ConfigError
from tests.zoo import Tied, inputs

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 300,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3,
    "n_positions": 64, "vocab_size": 200, "n_inner": None, "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}  # fmt: skip
MIXTURE = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
SHARED = {
    **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 4,
    "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 40, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 20,
}  # fmt: skip
NESTED = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": LLAMA,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "patch_size": 14,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28},
}  # fmt: skip
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64,
    "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 120, "is_encoder_decoder": True,
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
BERT = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 500, "type_vocab_size": 2,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "mixture": MIXTURE, "shared": SHARED, "nested": NESTED, "t5": T5,
            "bert": BERT}


def written(folder: Path, config: object, name: str = "config.json") -> str:
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder / name)


def unknown(config: dict) -> dict:
    """The same numbers under a family that nobody knows."""
    return {**{k: unknown(v) if isinstance(v, dict) else v for k, v in config.items()}, "model_type": "nobody's"}


def of_precision(contents, name: str, **options):
    return {row.precision: row for row in plan_memory(contents, Workload(**options)).rows}[name]


# ------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("plan", "count"),
    [("175B", 175 * 10**9), ("1.5e9", 1_500_000_000), (1.5e9, 1_500_000_000), (7000000000, 7 * 10**9),
     ("350m", 35 * 10**7), ("1.76T", 1_760_000_000_000), ("22k", 22000), ("7_000_000", 7 * 10**6),
     ("0.5B", 5 * 10**8), (1, 1)],
)  # fmt: skip
def test_counts(plan, count) -> None:
    assert read_contents(plan).parameters == count


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("175X", "'X' is no unit of a count; units are K, M, B, T"),
        ("-7B", "positive whole number"), (-3, "positive whole number"), (0, "positive whole number"),
        ("1.5", "positive whole number"), (float("nan"), "positive"), (float("inf"), "positive"), ("1e400", "positive"),
        ("0.0001K", "positive whole"),
        (True, "give a count"), ([1], "give a count"), ("nowhere/config.json", "no such file or directory"),
        ("many", "no such file or directory"), ("", "no such file|holds no"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_said(plan, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_contents(plan)


def test_numbers_beside_a_count() -> None:
    alone = read_contents("1B")
    assert alone.transformer is None
    assert alone.estimated
    assert any("unknown" in note and "layers=" in note for note in alone.notes)
    given = read_contents("1B", {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "vocabulary": 50000})
    assert not given.estimated
    work = Workload(context=100)
    assert of_precision(given, "BF16", context=100).cache == 16 * 100 * 2 * (8 * 64) * 2
    words = 2 * 50000 * 2048
    assert of_precision(given, "INT4").weights == words + (10**9 - words) // 2
    assert of_precision(given, "INT8").weights == 10**9
    assert given.transformer is not None
    assert given.transformer.cache(16, work) == of_precision(given, "BF16", context=100).cache
    with pytest.raises(ConfigError, match="alone are"):
        from_count("1M", 10**6, {"hidden": 1000, "vocabulary": 1000})
    for wrong in (0, -1, 1.5, "x"):
        with pytest.raises(ConfigError, match="layers must be a whole number"):
            read_contents("1B", {"layers": wrong})


# ------------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_exactly_and_estimated_closely(family, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[family]
    path = written(tmp_path, config)
    exact = read_contents(path)
    assert exact.source.startswith("exact")
    real = getattr(transformers, config["architectures"][0])(
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config))
    assert exact.parameters == sum(p.numel() for p in real.parameters()) + sum(
        b.numel() for n, b in real.named_buffers() if n in real.state_dict() and b.is_floating_point())
    written(tmp_path, unknown(config))
    estimate = read_contents(path)
    assert estimate.source.startswith("estimate")
    assert "nobody's" in estimate.source
    if family == "nested":
        assert any("text model alone" in note for note in estimate.notes)
        text = read_contents(written(tmp_path, LLAMA))
        assert estimate.parameters == text.parameters
    else:
        assert estimate.parameters == pytest.approx(exact.parameters, rel=0.06)     # heads of tasks, qk norms
    assert estimate.transformer == exact.transformer
    assert (estimate.active is None) == (exact.active is None) == (family not in ("mixture", "shared"))


def test_what_the_families_say_is_understood(tmp_path) -> None:
    def found(config):
        return read_contents(written(tmp_path, unknown(config)))

    llama, gpt2, t5, bert = (found(c).transformer for c in (LLAMA, GPT2, T5, BERT))
    assert (llama.kv_heads, llama.head_dim, llama.gated, llama.vocabulary) == (2, 16, True, 300)
    assert found(LLAMA).positions == 128
    assert (gpt2.layers, gpt2.heads, gpt2.kv_heads, gpt2.intermediate, gpt2.gated) == (2, 3, 3, 192, False)
    assert (t5.layers, t5.encoder_layers, t5.head_dim, t5.gated) == (3, 2, 8, True)
    assert bert.caches is False
    assert found(NESTED).transformer == llama
    mixture = found(MIXTURE)
    expert = 3 * 64 * 160
    assert mixture.parameters - found(LLAMA).parameters == 3 * (3 * expert + 4 * 64)
    assert mixture.active == mixture.parameters - 3 * 2 * expert
    latent = found(SHARED).transformer
    assert (latent.latent, latent.head_dim, latent.value_dim, latent.dense_layers) == (32, 24, 20, 1)
    assert (latent.experts, latent.active_experts) == (8, 2)
    assert (latent.expert_intermediate, latent.shared_intermediate) == (32, 32)
    one = {"d_model": 64, "n_layers": 2, "n_heads": 4, "attn_config": {"kv_n_heads": 2}, "vocab_size": 9,
           "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96}, "model_type": "?"}
    nested = read_contents(written(tmp_path, one)).transformer
    assert (nested.kv_heads, nested.experts, nested.active_experts, nested.expert_intermediate) == (2, 4, 2, 96)
    assert found({**GPT2, "multi_query": True}).transformer.kv_heads == 1
    window = found({**LLAMA, "sliding_window": 50, "layer_types": ["sliding_attention", "full_attention",
                                                                   "linear_attention"]})
    assert window.transformer.windows == (50, None, 0)
    assert any("not counted" in note for note in window.notes)
    assert found({**LLAMA, "sliding_window": 50}).transformer.windows == (50,) * 3
    assert found({**LLAMA, "sliding_window": 50, "use_sliding_window": False}).transformer.windows == ()


def test_tied_tables_count_once(tmp_path) -> None:
    for change in (lambda c: c, unknown):
        apart, tied = (read_contents(written(tmp_path, change({**LLAMA, "tie_word_embeddings": tie})))
                       for tie in (False, True))
        assert apart.parameters - tied.parameters == 300 * 64
    model = Tied()
    assert sum(w.count for w in weights_of(model)) == sum(p.numel() for p in model.parameters())
    assert {w.name: w.role for w in weights_of(model)}["table.weight"] == "edge"


def test_given_numbers_go_before_those_of_the_file(tmp_path) -> None:
    contents = read_contents(written(tmp_path, LLAMA), {"layers": 30})
    assert contents.transformer.layers == 30
    assert contents.source.startswith("estimate")
    ten_times = contents.parameters - 2 * 300 * 64 - 64
    assert ten_times == 10 * (read_contents(str(tmp_path)).parameters - 2 * 300 * 64 - 64)


def test_nothing_is_run_that_a_configuration_names(tmp_path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {**unknown(LLAMA), "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
              "architectures": ["AutoModel", "logging", "EvilForCausalLM"]}
    assert read_contents(written(tmp_path, config)).source.startswith("estimate")
    known = read_contents(written(tmp_path, {**config, "model_type": "llama"}))
    assert known.source.startswith("exact")


def test_nothing_is_downloaded_and_no_kernel_is_asked_for(tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    before = hub.constants.HF_HUB_OFFLINE
    wish = {"_attn_implementation": "somebody/kernels", "attn_implementation": "flash_attention_2"}
    text = read_contents(written(tmp_path, {**LLAMA, **wish}))
    assert text.source.startswith("exact")
    assert text.parameters == read_contents(written(tmp_path, LLAMA)).parameters
    nested = {**NESTED, "text_config": {**LLAMA, **wish}}
    assert read_contents(written(tmp_path, nested)).source.startswith("exact")
    assert hub.constants.HF_HUB_OFFLINE is before


def test_numbers_complete_a_configuration(tmp_path) -> None:
    path = written(tmp_path, {"model_type": "nobody's", "vocab_size": 50})
    contents = read_contents(path, {"layers": 2, "hidden": 16, "heads": 2})
    assert contents.transformer.vocabulary == 50
    assert contents.parameters == 2 * 12 * 16**2 + 50 * 16 + 16 * (2 * 2 + 1)


def test_zeros_and_open_ends_mean_nothing_there(tmp_path) -> None:
    config = unknown({**LLAMA, "n_shared_experts": 0, "num_experts": 0, "max_position_embeddings": -1, "head_dim": None,
                      "q_lora_rank": 0})
    contents = read_contents(written(tmp_path, config))
    assert contents.positions is None
    assert contents.transformer.experts == 0


def test_a_configuration_that_the_family_refuses_is_estimated(tmp_path) -> None:
    pytest.importorskip("transformers")
    contents = read_contents(written(tmp_path, {**LLAMA, "hidden_act": "no such function", "rope_scaling": 3}))
    assert "transformers could not use it" in contents.source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[]", "holds a list, not an object"),
        ("\xff\xfe", "is damaged"),
        ({"model_type": "nobody's", "vocab_size": 3}, "neither how many layers nor how wide"),
        ({**unknown(LLAMA), "hidden_size": None}, "neither how many layers nor how wide"),
        ({**LLAMA, "num_hidden_layers": -3}, "num_hidden_layers .* not -3"),
        ({**unknown(LLAMA), "num_attention_heads": "four"}, "num_attention_heads .* not 'four'"),
        ({**unknown(LLAMA), "num_key_value_heads": 2.5}, "num_key_value_heads .* not 2.5"),
        ({**unknown(LLAMA), "num_attention_heads": 0}, "num_attention_heads .* not 0"),
    ],
)  # fmt: skip
def test_damaged_configurations(content, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_contents(written(tmp_path, content))


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixture", "t5"])
def test_headers_hold_the_real_tensors(family, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[family]
    model = getattr(transformers, config["architectures"][0])(
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if family == "llama" else "5GB")
    contents = read_contents(str(tmp_path))
    assert contents.source.startswith("exact: safetensors headers")
    assert (" files" in contents.source) == (family == "llama")
    count = sum(p.numel() for p in model.parameters())
    assert contents.parameters == count
    assert of_precision(contents, "stored (BF16)").weights == 2 * count
    assert contents.transformer is not None
    assert contents.transformer.vocabulary == config["vocab_size"]
    built = from_module(model, "", "", kept_bytes=2)
    roles = [{w.role: 0 for w in built.weights}, {w.role: 0 for w in contents.weights}]
    for counts, one in zip(roles, (built, contents)):
        for weight in one.weights:
            counts[weight.role] += weight.count
    if family in ("llama", "mixture"):
        assert roles[0] == roles[1]
        if family == "llama":
            assert of_precision(contents, "INT4") == of_precision(
                read_contents(written(tmp_path, config)), "INT4")
    assert of_precision(contents, "INT4").weights == pytest.approx(of_precision(built, "INT4").weights, rel=0.05)


def test_a_single_file_and_several_without_index(tmp_path) -> None:
    save_file({"a.0.weight": torch.zeros(4, 8), "a.0.bias": torch.zeros(4)}, tmp_path / "x.safetensors")
    save_file({"a.1.weight": torch.zeros(3, 4), "steps": torch.tensor(5)}, tmp_path / "y.safetensors")
    assert read_contents(str(tmp_path / "x.safetensors")).parameters == 36
    both = read_contents(str(tmp_path))
    assert both.parameters == 48
    assert of_precision(both, "FP32").weights == 48 * 4 + 8
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert read_contents(str(tmp_path)).parameters == 4     # the others are the same model in another layout


def test_transposed_weights_are_seen_by_their_bias(tmp_path) -> None:
    save_file({"h.0.w.weight": torch.zeros(8, 24), "h.0.w.bias": torch.zeros(24), "h.0.v.weight": torch.zeros(8, 24)},
              tmp_path / "model.safetensors")
    found = {w.name: w.inputs for w in read_contents(str(tmp_path)).weights}
    assert (found["h.0.w.weight"], found["h.0.v.weight"]) == (8, 24)


def test_packed_codes_are_reckoned_from_the_configuration(tmp_path) -> None:
    save_file({"layers.0.q.qweight": torch.zeros(8, 16, dtype=torch.int32), "n": torch.zeros(3)},
              tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="packed codes"):
        read_contents(str(tmp_path))
    written(tmp_path, {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    contents = read_contents(str(tmp_path))
    assert contents.parameters == read_contents(str(tmp_path / "config.json")).parameters
    assert contents.stored == ("stored (F32/I32)", 8 * 16 * 4 + 12, 0)
    assert any("packed codes" in note for note in contents.notes)


def test_masks_and_positions_are_no_packed_codes(tmp_path) -> None:
    save_file({"e.position_ids": torch.arange(9).view(1, 9), "h.0.mask": torch.ones(1, 1, 9, 9, dtype=torch.uint8),
               "h.0.w.weight": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    contents = read_contents(str(tmp_path))
    assert contents.parameters == 24
    assert of_precision(contents, "INT4").weights == of_precision(contents, "INT8").weights == 24 + 9 * 8 + 81


def test_damaged_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        read_contents(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_contents(str(tmp_path))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="there are no tensors"):
        read_contents(str(tmp_path))
    index = "model.safetensors.index.json"
    written(tmp_path, {"weight_map": {"a": "gone-1.safetensors"}}, index)
    with pytest.raises(ConfigError, match=r"names gone-1\.safetensors, which is not there"):
        read_contents(str(tmp_path))
    for wrong in ({"weight_map": {"a": "../model.safetensors"}}, {"weight_map": 3}, {}):
        written(tmp_path, wrong, index)
        with pytest.raises(ConfigError, match="is damaged: weight_map"):
            read_contents(str(tmp_path))
    written(tmp_path, "{", "manifest.json")
    with pytest.raises(ConfigError, match="damaged: it is not JSON"):
        read_contents(str(tmp_path))


# ------------------------------------------------------------------------------------------------- against the package


class Decoder(nn.Module):
    """Two blocks, a table of its own at each end, a norm and biases: each kind of tensor that a plan knows."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 96))
                                    for _ in range(2))
        self.head = nn.Linear(96, 200, bias=False)

    def forward(self, x):
        x = self.words(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(),
                         nn.ConvTranspose2d(24, 8, 2), nn.Flatten(), nn.Linear(8 * 25, 5))


@pytest.mark.parametrize(("recipe", "precision"), [("w4a16", "INT4"), ("w2a16", "INT2"), ("w1a16", "1 bit"),
                                                   ("w8a16", "INT8"), ("bf16", "BF16")])
@pytest.mark.parametrize("make", [Decoder, Tied, convolutions])
def test_the_plan_is_what_a_deployed_model_takes(make, recipe, precision, tmp_path) -> None:
    torch.manual_seed(0)
    model = make()
    x = {Tied: lambda: inputs("tied", 4), Decoder: lambda: torch.randint(0, 200, (2, 7)),
         convolutions: lambda: torch.randn(2, 3, 8, 8)}[make]()
    deployed, _ = qat.convert(qat.calibrate(qat.prepare(model, recipe, example_inputs=x), [x]), [x])
    qat.save(deployed, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    sizes = {n: math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for n, t in manifest["tensors"].items()}
    scales = sum(size for n, size in sizes.items() if n.endswith("weight_scale"))
    row = of_precision(from_module(model, "", ""), precision)
    assert (row.weights, row.scales) == (sum(sizes.values()) - scales, scales)
    file = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert row.weights + row.scales == file - header
    if make is Decoder and precision in ("INT8", "INT4"):
        assert row.weights + row.scales == pytest.approx(file, rel=0.05)
    if precision != "BF16":
        again = read_contents(str(tmp_path))
        assert of_precision(again, "deployed").weights == row.weights
        assert of_precision(again, "deployed").scales == row.scales
        assert of_precision(again, precision) == row
        assert again.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_of_a_configuration_is_what_the_deployed_language_model_takes(tied, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**LLAMA, "torch_dtype": "float32", "tie_word_embeddings": tied, "hidden_size": 128, "vocab_size": 1000}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict({**config, "use_cache": False})).eval()
    x = {"input_ids": torch.randint(0, 300, (2, 5))}
    deployed, _ = qat.convert(qat.calibrate(qat.prepare(model, "w4a16", example_inputs=x), [x]), [x])
    qat.save(deployed, tmp_path / "deployed")
    row = of_precision(read_contents(written(tmp_path, config)), "INT4")
    file = (tmp_path / "deployed" / "model.safetensors").stat().st_size
    assert row.weights + row.scales == pytest.approx(file, rel=0.03)
    stored = of_precision(read_contents(str(tmp_path / "deployed")), "deployed")
    assert (stored.weights, stored.scales) == (row.weights, row.scales)
    model.save_pretrained(tmp_path / "float")
    of_headers = of_precision(read_contents(str(tmp_path / "float")), "INT4")
    assert of_headers == row


def test_shapes_of_a_module_need_no_values() -> None:
    with torch.device("meta"):
        model = Decoder()
    assert plan_memory(from_module(model, "", "")).rows == plan_memory(from_module(Decoder(), "", "")).rows


def test_a_module_without_a_quantized_form_is_said() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(5, 6))

    assert "Own: without a quantized form" in " ".join(from_module(Own(), "", "").notes)


def test_without_transformers_a_configuration_is_estimated(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    contents = read_contents(written(tmp_path, LLAMA))
    assert "transformers is not installed" in contents.source
    assert contents.parameters > 0
    assert text_section({"vision_config": {"x": 1}}) is None
