"""A tiny random model of any decoder architecture of the installed transformers library."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types of the library's mapping of causal language models."""

# Sizes of a tiny model, and the fields of configs that are set to each if a config has them.
_SIZES: dict[int | float, str] = {
    96: "vocab_size encoder_hash_byte_group_vocab vocab_size_per_layer_input shape_vocab_size "
    "pronunciation_vocab_size audio_vocab_size",
    512: "max_position_embeddings n_positions context_length max_seq_len max_target_positions n_ctx",
    32: "hidden_size d_model n_embd emb_dim lru_width d_inner output_embedding_size input_embedding_size "
    "embedding_size word_embed_proj_dim hidden_size_per_layer_input attention_hidden_size backbone_hidden_size "
    "hidden_size_global",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim feed_forward_size dim_ff dff ffn_hidden_size "
    "prefix_dense_intermediate_size dense_intermediate_size intermediate_size_mlp",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size",
    3: "num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers num_decoder_layers "
    "num_encoder_layers",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts linear_num_value_heads linear_num_heads swa_num_attention_heads o_groups zero_expert_num "
    "mamba_num_heads indexer_n_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k mamba_n_groups linear_num_key_heads "
    "swa_num_key_value_heads n_mamba_heads n_groups top_k_experts type_vocab_size num_codebooks max_window_layers",
    8: "head_dim sliding_window window_size kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_d_head mamba_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim dim_head attention_head_size index_head_dim rotary_dim "
    "sliding_window_size attention_window_size local_attention attention_chunk_size laurel_rank swa_head_dim "
    "kv_channels o_lora_rank hc_lowrank adapter_rank gated_norm_rank index_topk index_n_heads d_rel indexer_head_dim",
    16: "mamba_chunk_size chunk_size block_size moe_latent_size keep_window_size local_attention_window_len",
    1: "first_k_dense_replace n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "eos_token_id",
    0: "bos_token_id pad_token_id num_nextn_predict_layers",
    0.2: "initializer_range init_std",
}
_TINY = {name: size for size, names in _SIZES.items() for name in names.split()}

_LATENT = {"num_key_value_heads": 4}  # every head has keys of its own
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = {"initializer_range": 0.1}  # with more, delta nets divide by small numbers, which enlarges rounding
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QSA = {"indexer_kv_heads": 1, "indexer_budget": 16, "indexer_compress_ratio": 4}
_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
)  # causal only if told so
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _ENCODERS},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "dots3_note_text"), _LATENT),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _LATENT | _HYBRID),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _HYBRID | _DELTA),
    **{name: {"text_config": _HYBRID | _DELTA} for name in ("qwen3_5", "qwen3_5_moe")},
    "dots3_note": {"text_config": _LATENT},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QSA | _HYBRID},
    "qwen4_exp_text": _QSA | _HYBRID,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "xlm": {"pad_token_id": 2},  # apart from the mask, at which it predicts
    "xlstm": {"head_dim": None, "hidden_size": 128},  # it rounds dimensions of heads up to 64
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
}


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The config of a tiny model without dropout; `settings` on top."""
    return _shrunk(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}) | settings)


def _shrunk(kind: type[Any], own: dict[str, Any]) -> PreTrainedConfig:
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    settings = {name: _TINY[name] for name in fields if name in _TINY}
    settings |= {name: 0.0 for name, default in fields.items() if isinstance(default, float) and _is_dropout(name)}
    if kind.sub_configs:
        default = kind()
        parts = {name: type(getattr(default, name, None)) for name in kind.sub_configs}
        settings |= {name: _shrunk(part, own.get(name, {})) for name, part in parts.items() if _is_config(part)}
    settings |= {name: value for name, value in own.items() if name not in kind.sub_configs}
    config: PreTrainedConfig = kind(**settings)
    return config


def _is_config(kind: type[Any]) -> bool:
    return issubclass(kind, PreTrainedConfig) and dataclasses.is_dataclass(kind)


def _is_dropout(name: str) -> bool:
    return any(part in name for part in ("dropout", "pdrop", "layerdrop", "jitter")) or name.endswith("_prob")


def tiny_model(model_type: str, seed: int = 0, attention: str | None = None, **settings: Any) -> Any:
    """A random model in float32. attention: an implementation of the library; None: its own choice."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **settings)
    options = {} if attention is None else {"attn_implementation": attention}
    if model_type.startswith("musicgen"):  # the model of the mapping takes the config of the decoder alone
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config.decoder, **options).eval()
    return AutoModelForCausalLM.from_config(config, **options).eval()
