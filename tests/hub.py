"""Tiny Hugging Face models with random weights, and inputs for them. Import it after ``importorskip("transformers")``.

Weights are a few times larger than at birth, so that attention is not even and differences show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 4}
SEQ2SEQ = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
           "forced_eos_token_id": None}


def text(length: int = 9, padded: int = 2) -> dict[str, torch.Tensor]:
    """Two texts; the first is padded on its left."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padded] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, length)), "attention_mask": mask}


def pair() -> dict[str, torch.Tensor]:
    return {**text(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5))}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5))}


def llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **options}))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "llama": (llama, text),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)), text),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)), text),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)), text),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0)), pair),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)), pair),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), image),
    "whisper": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=32, suppress_tokens=None,
        begin_suppress_tokens=None)), speech),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)), text),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=12)), text),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)), text),
    "gpt_oss": (lambda: hf.GptOssForCausalLM(hf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)), text),
    "deepseek": (lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1,
        first_k_dense_replace=1)), text),
}
ONLY_EAGER = ("gemma2", "gpt_oss")
"""Soft caps and sinks: torch's own attention has none."""


def build(name: str, implementation: str = "eager") -> Any:
    """A model of the zoo in eval."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    return MODELS[name][1]()
