"""Tiny, randomly initialized models of transformers, one or more of each family, each with a batch of inputs.

They are narrow and shallow, but wide enough (64 and more) that the share of quantized parameters means something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

W, V = 64, 300
"""Width and vocabulary."""
DECODER: dict[str, Any] = {
    "vocab_size": V, "hidden_size": W, "intermediate_size": 2 * W, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2}
ENCODER: dict[str, Any] = {
    "vocab_size": V, "hidden_size": W, "intermediate_size": 2 * W, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 1}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": W, "num_experts": 4, "num_experts_per_tok": 2,
                           "num_local_experts": 4}
SSM: dict[str, Any] = {"vocab_size": V, "hidden_size": W, "num_hidden_layers": 2, "state_size": 8}


def _tokens(length: int = 24) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {"input_ids": torch.randint(3, V, (2, length), generator=generator)}


def _pixels(size: int = 32, key: str = "pixel_values") -> dict[str, Any]:
    return {key: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))}


def _translation() -> dict[str, Any]:
    return {**_tokens(), "decoder_input_ids": _tokens(12)["input_ids"]}


def _waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600, generator=torch.Generator().manual_seed(7))}


def _whisper() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(7)),
            "decoder_input_ids": _tokens(8)["input_ids"]}


Batch = Callable[[], dict[str, Any]]
WAVES: dict[str, Any] = {
    "conv_dim": [W, W], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "hidden_size": W, "intermediate_size": 2 * W,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": W, "intermediate_size": 2 * W,
                          "num_hidden_layers": 2, "num_attention_heads": 4}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], Batch]] = {
    # decoders
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, _tokens),
    "qwen2 tied": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}, _tokens),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER, _tokens),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER, _tokens),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, _tokens),
    "phi": ("PhiForCausalLM", "PhiConfig", {**DECODER, "num_key_value_heads": 4}, _tokens),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": V, "n_embd": W, "n_layer": 2, "n_head": 4, "n_positions": 40}, _tokens),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, _tokens),
    "opt": ("OPTForCausalLM", "OPTConfig", {
        "vocab_size": V, "hidden_size": W, "ffn_dim": 2 * W, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 40, "word_embed_proj_dim": W}, _tokens),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": V, "hidden_size": W, "n_layer": 2, "n_head": 4},
              _tokens),
    "falcon": ("FalconForCausalLM", "FalconConfig", {
        "vocab_size": V, "hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4}, _tokens),
    # mixtures of experts
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, **EXPERTS}, _tokens),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **EXPERTS}, _tokens),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**DECODER, **EXPERTS}, _tokens),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **DECODER, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "head_dim": 8, "first_k_dense_replace": 1}, _tokens),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**DECODER, **EXPERTS}, _tokens),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig", {
        "vocab_size": V, "d_model": W, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": W, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": W}}, _tokens),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {
        **DECODER, **EXPERTS, "intermediate_size_mlp": 2 * W}, _tokens),
    # encoders
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER, _tokens),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER, _tokens),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {
        "vocab_size": V, "dim": W, "hidden_dim": 2 * W, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
        _tokens),
    "deberta_v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
        "position_biased_input": False}, _tokens),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": W}, _tokens),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": W}, _tokens),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {
        "vocab_size": V, "d_model": W, "n_layer": 2, "n_head": 4, "d_inner": 2 * W}, _tokens),
    # encoders and decoders
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": V, "d_model": W, "d_kv": 16, "d_ff": 2 * W, "num_layers": 2, "num_heads": 4}, _translation),
    "bart": ("BartForConditionalGeneration", "BartConfig", {
        "vocab_size": V, "d_model": W, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * W, "decoder_ffn_dim": 2 * W,
        "max_position_embeddings": 40}, _translation),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
        "vocab_size": V, "d_model": W, "d_kv": 16, "d_ff": 2 * W, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "num_experts": 4, "expert_capacity": 64}, _translation),
    # speech
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "vocab_size": V, "d_model": W, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * W, "decoder_ffn_dim": 2 * W, "num_mel_bins": 16,
        "max_source_positions": 30, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1}, _whisper),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVES, _waveform),
    "hubert": ("HubertModel", "HubertConfig", WAVES, _waveform),
    "wavlm": ("WavLMModel", "WavLMConfig", WAVES, _waveform),
    # vision
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, _pixels),
    "dinov2": ("Dinov2Model", "Dinov2Config", VISION, _pixels),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {
        "hidden_sizes": [32, W], "depths": [1, 2], "num_stages": 2, "image_size": 32}, _pixels),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {
        "embedding_size": 16, "hidden_sizes": [32, W], "depths": [1, 1], "layer_type": "basic"}, _pixels),
    "swin": ("SwinForImageClassification", "SwinConfig", {
        "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _pixels),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {
        "hidden_sizes": [32, 32, W, W], "depths": [1, 1, 1, 1], "decoder_hidden_size": W},
        lambda: _pixels(64)),
    "bit": ("BitModel", "BitConfig", {
        "embedding_size": 16, "hidden_sizes": [32, W], "depths": [1, 1], "num_groups": 8}, _pixels),
    "clip": ("CLIPModel", "CLIPConfig", {
        "text_config": {**ENCODER, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": W},
        lambda: {**_tokens(), **_pixels()}),
    # state spaces and recurrences
    "mamba": ("MambaForCausalLM", "MambaConfig", SSM, _tokens),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**SSM, "num_heads": 8, "head_dim": 16, "n_groups": 1,
                                                     "chunk_size": 8}, _tokens),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {
        "vocab_size": V, "hidden_size": W, "num_hidden_layers": 2, "attention_hidden_size": W,
        "intermediate_size": 2 * W}, _tokens),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**DECODER, "layer_types": ["conv", "full_attention"]}, _tokens),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        **DECODER, **EXPERTS, "shared_expert_intermediate_size": W, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"]}, _tokens),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", {
        **DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_chunk_size": 8}, _tokens),
    "jamba": ("JambaForCausalLM", "JambaConfig", {
        **DECODER, **EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}, _tokens),
}
"""Name -> model class, configuration class and its arguments, and a batch."""

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "dbrx", "llama4", "qwen3_next", "jamba")


def build(name: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model called ``name`` in eval, and a batch for it as a dict of keyword arguments."""
    import transformers

    kind, configuration, arguments, batch = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**{**arguments, **more})
    model = getattr(transformers, kind)(config).eval()
    model.config.use_cache = False
    return model, batch()
