"""Tiny random checkpoints of every family, written by transformers: one row of configurations for each."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
THREE_HEADS = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3}
ONE_KV_HEAD = {"num_key_value_heads": 1}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
BOTH_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
BOTH_MIXERS = ["linear_attention", "full_attention", "linear_attention"]
JAMBA = {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 12}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 12, "mamba_n_groups": 2, "mamba_chunk_size": 16}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 2, "head_dim": 12}
NEMOTRON_EXPERTS = NEMOTRON | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}
FALCON_MULTIPLIERS = {
    "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.4,
    "attention_in_multiplier": 0.7,
    "attention_out_multiplier": 1.3,
    "key_multiplier": 0.6,
    "ssm_in_multiplier": 1.7,
    "ssm_out_multiplier": 0.8,
    "ssm_multipliers": [0.35, 0.5, 0.9, 1.4, 1.2],
    "mlp_multipliers": [0.9, 1.4],
}
GRANITE_SCALES = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OLMO3_YARN = {"rope_parameters": {"full_attention": YARN["rope_parameters"], "sliding_attention": PLAIN_ROPE}}
NTK_ALPHA = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}}


def growing(**more: Any) -> dict[str, Any]:
    """YaRN, and queries that grow every 16 positions."""
    rope = YARN["rope_parameters"] | {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}
    return {"rope_parameters": rope | more}


GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 96, "initializer_range": 0.2}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(pairs)
    return {
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": (1 + torch.rand(pairs, generator=generator)).tolist(),
            "long_factor": (2 + 4 * torch.rand(pairs, generator=generator)).tolist(),
            **more,
        },
    }


# model type -> configurations. No window is as long as the texts of the tests.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, THREE_HEADS | LLAMA3, ONE_KV_HEAD | YARN | {"head_dim": 20, "tie_word_embeddings": True}, LINEAR],
    "mistral": [{"sliding_window": 9}, THREE_HEADS | {"sliding_window": None}, ONE_KV_HEAD | {"head_dim": 12}],
    "qwen2": [
        {},
        ONE_KV_HEAD | YARN | {"tie_word_embeddings": True},
        THREE_HEADS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        LINEAR,
    ],
    "qwen3": [
        {"head_dim": 12},
        ONE_KV_HEAD | YARN | {"tie_word_embeddings": True, "head_dim": 6, "attention_bias": True},
        THREE_HEADS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "head_dim": 10},
    ],
    "gemma": [{"head_dim": 12}, ONE_KV_HEAD | {"head_dim": 6}, {"head_dim": 8, "tie_word_embeddings": False} | LINEAR],
    "gemma2": [
        {"head_dim": 12, "sliding_window": 9, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
        ONE_KV_HEAD | {"head_dim": 6, "sliding_window": 4, "final_logit_softcapping": 3.0},
        {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": None, "layer_types": BOTH_KINDS[::-1]},
        {"head_dim": 8, "sliding_window": 40, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ],
    "gemma3_text": [
        {"head_dim": 12, "sliding_window": 9, "layer_types": BOTH_KINDS, "query_pre_attn_scalar": 20},
        ONE_KV_HEAD | {"head_dim": 6, "sliding_window": 4, "num_hidden_layers": 7},
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": BOTH_KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0},
    ],
    "gpt2": [
        GPT2_SIZES,
        GPT2_SIZES | {"n_embd": 30, "n_head": 3, "n_inner": 40, "activation_function": "gelu"},
        GPT2_SIZES | {"tie_word_embeddings": False, "activation_function": "relu", "n_head": 1},
    ],
    "gpt_neox": [
        {"rotary_pct": 0.25},
        {"use_parallel_residual": False, "hidden_act": "gelu_new", "rotary_pct": 0.5},
        {"hidden_size": 30, "num_attention_heads": 3, "attention_bias": False, "rotary_pct": 1.0},
        {"tie_word_embeddings": True, "rope_parameters": LINEAR["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    ],
    "phi": [
        {"partial_rotary_factor": 0.5},
        ONE_KV_HEAD | {"qk_layernorm": True, "partial_rotary_factor": 0.25},
        THREE_HEADS | {"partial_rotary_factor": 0.4, "hidden_act": "gelu"},
        {"rope_parameters": LINEAR["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    ],
    "phi3": [
        {"sliding_window": 9},
        ONE_KV_HEAD | longrope(4),
        THREE_HEADS | {"tie_word_embeddings": True, "sliding_window": None},
        longrope(3, partial_rotary_factor=0.75, attention_factor=1.2) | {"sliding_window": 30},
    ],
    "olmo2": [{}, ONE_KV_HEAD | {"attention_bias": True}, THREE_HEADS | YARN | {"tie_word_embeddings": True}, LINEAR],
    "smollm3": [
        {"num_hidden_layers": 5},
        ONE_KV_HEAD | YARN | {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False},
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 2, "attention_bias": True},
    ],
    "granite": [
        GRANITE_SCALES,
        ONE_KV_HEAD | {"tie_word_embeddings": True, "mlp_bias": True, "attention_multiplier": 0.1},
        THREE_HEADS | YARN | {"attention_bias": True, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ],
    "starcoder2": [
        {"sliding_window": 9},
        ONE_KV_HEAD | {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False},
        THREE_HEADS | YARN | {"sliding_window": None},
    ],
    "stablelm": [
        {"partial_rotary_factor": 0.25},
        ONE_KV_HEAD | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
        THREE_HEADS | {"qk_layernorm": True, "partial_rotary_factor": 0.4, "tie_word_embeddings": True},
    ],
    "lfm2": [
        {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
        ONE_KV_HEAD
        | {
            "full_attn_idxs": [0, 3],
            "num_hidden_layers": 5,
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": 4,
            "conv_bias": True,
        },
        THREE_HEADS
        | YARN
        | {
            "layer_types": ["conv", "conv", "full_attention"],
            "tie_word_embeddings": False,
            "block_ffn_dim_multiplier": 1.3,
            "block_multiple_of": 7,
            "conv_L_cache": 2,
        },
        {"layer_types": ["conv"] * 3, "block_multiple_of": 8, "conv_L_cache": 5},  # nothing but convolutions
    ],
    "mamba2": [
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 12, "chunk_size": 16},
        {"num_heads": 3, "head_dim": 20, "n_groups": 1, "state_size": 7, "hidden_size": 30, "conv_kernel": 3}
        | {"use_bias": True, "tie_word_embeddings": True},
        {"num_heads": 6, "head_dim": 16, "n_groups": 3, "state_size": 16, "expand": 3, "use_conv_bias": False}
        | {"time_step_limit": (0.5, 0.9)},
    ],
    "granitemoehybrid": [
        MAMBA2 | {"num_local_experts": 4, "shared_intermediate_size": 28, "layer_types": BOTH_MIXERS} | GRANITE_SCALES,
        ONE_KV_HEAD
        | {"mamba_n_heads": 5, "mamba_d_state": 7, "mamba_n_groups": 1, "mamba_d_conv": 3, "hidden_size": 40}
        | {"num_local_experts": 0, "shared_intermediate_size": 20, "layer_types": BOTH_MIXERS[::-1]}
        | {"position_embedding_type": "rope", "mamba_conv_bias": False, "tie_word_embeddings": True}
        | {"attention_multiplier": 0.1, "attention_bias": True},
        THREE_HEADS
        | MAMBA2
        | {"mamba_n_heads": 6, "mamba_d_head": 10, "mamba_n_groups": 3, "mamba_proj_bias": True}
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "shared_intermediate_size": 10}
        | {"position_embedding_type": "nope", "time_step_limit": (0.3, 0.9)},  # nothing but Mamba 2
        YARN
        | MAMBA2
        | {"num_local_experts": 0, "shared_intermediate_size": 20, "layer_types": ["full_attention"] * 3}
        | {"position_embedding_type": "rope", "attention_multiplier": 0.3},
    ],
    "nemotron_h": [
        NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        ONE_KV_HEAD
        | NEMOTRON_EXPERTS
        | {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe", "mlp"], "time_step_min": 0.4}
        | {"n_groups": 4, "use_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 2.5}
        | {"tie_word_embeddings": True},
        THREE_HEADS
        | NEMOTRON_EXPERTS
        | {"hybrid_override_pattern": "M*EM-", "mamba_num_heads": 3, "mamba_head_dim": 20, "n_groups": 1}
        | {"n_group": 4, "topk_group": 2, "moe_latent_size": 14, "mlp_bias": True, "use_conv_bias": False},
        NEMOTRON | {"layers_block_type": ["full_attention", "mlp", "mlp"], "mlp_hidden_act": "gelu", "head_dim": 6},
    ],
    "falcon_h1": [
        MAMBA2 | {"mamba_d_ssm": 64} | FALCON_MULTIPLIERS,
        ONE_KV_HEAD
        | {"mamba_d_ssm": 40, "mamba_n_heads": 5, "mamba_d_state": 7, "mamba_d_conv": 3, "head_dim": 12}
        | {"mamba_rms_norm": True, "attention_bias": True, "mamba_proj_bias": True, "projectors_bias": True}
        | {"mlp_bias": True, "tie_word_embeddings": True}
        | FALCON_MULTIPLIERS,
        THREE_HEADS
        | YARN
        | {"mamba_d_ssm": None, "mamba_n_heads": 6, "mamba_d_state": 5, "mamba_n_groups": 3, "mamba_rms_norm": True}
        | {"mamba_norm_before_gate": False, "mamba_conv_bias": False, "time_step_limit": (0.3, 0.9)},
    ],
    "bamba": [
        MAMBA2 | {"attn_layer_indices": [1]},
        ONE_KV_HEAD
        | {"mamba_n_heads": 4, "mamba_d_state": 7, "mamba_n_groups": 1, "mamba_d_conv": 3, "head_dim": 12}
        | {"attn_layer_indices": [0, 2], "mamba_proj_bias": True, "tie_word_embeddings": True}
        | LINEAR,
        THREE_HEADS
        | {"mamba_n_heads": 6, "mamba_d_state": 5, "mamba_n_groups": 3, "mamba_conv_bias": False, "head_dim": 20}
        | {"attn_layer_indices": [2], "attention_bias": True, "mlp_bias": True, "time_step_limit": (0.3, 0.9)},
    ],
    "arcee": [
        {},
        ONE_KV_HEAD | YARN | {"tie_word_embeddings": True, "mlp_bias": True, "head_dim": 12},
        THREE_HEADS | LLAMA3 | {"attention_bias": True},
    ],
    "seed_oss": [
        {"head_dim": 12},
        ONE_KV_HEAD | {"head_dim": 6, "attention_out_bias": True, "tie_word_embeddings": True} | LINEAR,
        THREE_HEADS | {"head_dim": 10, "attention_bias": False, "mlp_bias": True},
    ],
    "nemotron": [
        {},
        ONE_KV_HEAD | {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": True},
        THREE_HEADS | {"mlp_bias": True, "rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.8}},
    ],
    "ernie4_5": [
        {"head_dim": 12},
        ONE_KV_HEAD | {"head_dim": 6, "use_bias": True, "tie_word_embeddings": False},
        THREE_HEADS | {"head_dim": 10} | LINEAR,
    ],
    "cohere": [
        {"logit_scale": 0.3},
        ONE_KV_HEAD | {"use_qk_norm": True, "tie_word_embeddings": False, "logit_scale": 2.0},
        THREE_HEADS | LINEAR | {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    ],
    "cohere2": [
        {"sliding_window": 9, "num_hidden_layers": 5, "logit_scale": 0.3},
        ONE_KV_HEAD | {"sliding_window": 4, "layer_types": BOTH_KINDS, "tie_word_embeddings": False},
        THREE_HEADS | {"sliding_window": 30, "attention_bias": True, "layer_types": BOTH_KINDS[::-1]},
    ],
    "glm4": [
        {"head_dim": 12},
        ONE_KV_HEAD | {"head_dim": 20, "attention_bias": False, "tie_word_embeddings": True},
        THREE_HEADS | {"head_dim": 10, "rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.4}},
    ],
    "olmo3": [
        {"sliding_window": 9, "num_hidden_layers": 5},
        ONE_KV_HEAD | {"attention_bias": True, "sliding_window": 4, "tie_word_embeddings": True},
        THREE_HEADS | OLMO3_YARN | {"sliding_window": 30, "layer_types": BOTH_KINDS},
    ],
    "exaone4": [
        {"sliding_window": 9, "num_hidden_layers": 5},
        ONE_KV_HEAD | {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
        THREE_HEADS | LLAMA3 | {"sliding_window": 7, "sliding_window_pattern": 2},
        {"sliding_window": 5, "layer_types": BOTH_KINDS, "head_dim": 12},
    ],
    "hunyuan_v1_dense": [
        {"head_dim": 12},
        ONE_KV_HEAD | NTK_ALPHA | {"head_dim": 20, "tie_word_embeddings": True, "attention_bias": True},
        THREE_HEADS | {"head_dim": 10} | LINEAR,
    ],
    "apertus": [
        {},
        ONE_KV_HEAD | LINEAR | {"tie_word_embeddings": True},
        THREE_HEADS | LLAMA3 | {"attention_bias": True},
    ],
    "ministral3": [
        {"head_dim": 12} | growing(mscale=1.0, mscale_all_dim=1.0),
        ONE_KV_HEAD | {"head_dim": 6, "tie_word_embeddings": True} | growing(mscale=1.0, mscale_all_dim=0.5),
        THREE_HEADS | {"head_dim": 10, "sliding_window": 9} | growing(llama_4_scaling_beta=1.5),
    ],
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CONFIGS |= {  # mixtures of experts
    "qwen3_moe": [
        EXPERTS | {"head_dim": 12, "norm_topk_prob": True},
        ONE_KV_HEAD | YARN | EXPERTS | {"head_dim": 6, "tie_word_embeddings": True, "mlp_only_layers": [1]},
        THREE_HEADS | EXPERTS | {"head_dim": 10, "num_experts_per_tok": 6, "decoder_sparse_step": 2},
        EXPERTS | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "num_experts_per_tok": 1},
    ],
    "mixtral": [
        {"num_local_experts": 4, "sliding_window": 9},
        ONE_KV_HEAD | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True, "head_dim": 12},
        THREE_HEADS | LINEAR | {"num_local_experts": 5, "num_experts_per_tok": 3},
    ],
    "olmoe": [
        {"num_experts": 6, "num_experts_per_tok": 2},
        ONE_KV_HEAD | LINEAR | {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True},
        THREE_HEADS | {"num_experts": 5, "num_experts_per_tok": 1, "tie_word_embeddings": True, "attention_bias": True},
    ],
    "qwen2_moe": [
        EXPERTS | {"shared_expert_intermediate_size": 28},
        ONE_KV_HEAD
        | EXPERTS
        | {"shared_expert_intermediate_size": 7, "norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [0]},
        THREE_HEADS
        | EXPERTS
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "tie_word_embeddings": True},
    ],
    "glm4_moe": [
        DEEPSEEK | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 0},
        ONE_KV_HEAD
        | DEEPSEEK
        | {"head_dim": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5}
        | {"rope_parameters": LINEAR["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        THREE_HEADS | DEEPSEEK | {"first_k_dense_replace": 0, "n_shared_experts": 2, "head_dim": 20},
    ],
    "dots1": [
        DEEPSEEK | {"head_dim": 12, "norm_topk_prob": True},
        ONE_KV_HEAD | DEEPSEEK | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
        THREE_HEADS
        | DEEPSEEK
        | {"sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True, "topk_group": 4},
    ],
    "ernie4_5_moe": [
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20, "head_dim": 12},
        ONE_KV_HEAD
        | {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 0}
        | {"moe_layer_start_index": 0, "moe_layer_interval": 2, "tie_word_embeddings": False, "head_dim": 8},
        THREE_HEADS
        | LINEAR
        | {"moe_num_experts": 4, "moe_k": 1, "moe_intermediate_size": 20, "use_bias": True, "moe_layer_end_index": 1}
        | {"tie_word_embeddings": False},
    ],
    "lfm2_moe": [
        EXPERTS
        | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "routed_scaling_factor": 2.5},
        ONE_KV_HEAD
        | EXPERTS
        | {"layer_types": ["full_attention", "conv", "conv"], "num_dense_layers": 0, "norm_topk_prob": False}
        | {"conv_L_cache": 4, "conv_bias": True, "num_experts_per_tok": 6, "tie_word_embeddings": False},
        THREE_HEADS
        | YARN
        | EXPERTS
        | {"layer_types": ["conv", "conv", "full_attention"], "num_dense_layers": 2, "use_expert_bias": False}
        | {"conv_L_cache": 2, "num_experts_per_tok": 1},
    ],
    "jamba": [
        JAMBA | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 4},
        ONE_KV_HEAD
        | JAMBA
        | {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 5, "mamba_d_state": 7}
        | {"mamba_d_conv": 3, "mamba_proj_bias": True, "tie_word_embeddings": True},
        THREE_HEADS
        | JAMBA
        | {"attn_layer_period": 4, "attn_layer_offset": 3, "expert_layer_period": 1, "expert_layer_offset": 0}
        | {"mamba_expand": 3, "mamba_conv_bias": False, "num_experts_per_tok": 4},  # nothing but Mamba
    ],
    "granitemoe": [
        GRANITE_SCALES | {"num_local_experts": 4},
        ONE_KV_HEAD | {"tie_word_embeddings": True, "num_local_experts": 5, "num_experts_per_tok": 1},
        THREE_HEADS | YARN | {"attention_bias": True, "num_local_experts": 3, "num_experts_per_tok": 3},
    ],
}
LATENT = DEEPSEEK | {
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}


def latent_yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    scales = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return {"rope_parameters": YARN["rope_parameters"] | scales}


EVEN = {"kv_lora_rank": 12, "qk_nope_head_dim": 8}  # transformers cannot rotate after an odd number of dimensions
ONE_EXPERT = {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
CONFIGS |= {  # latent attention
    "deepseek_v2": [
        LATENT | EVEN | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5},
        LATENT
        | EVEN
        | latent_yarn(0.7, 0.7)
        | {"q_lora_rank": None, "n_shared_experts": 2, "attention_bias": True, "tie_word_embeddings": True},
        LATENT
        | THREE_HEADS
        | EVEN
        | latent_yarn(1.0, 0.5)
        | ONE_EXPERT
        | {"mlp_bias": True, "first_k_dense_replace": 0, "v_head_dim": 4, "qk_rope_head_dim": 2},
    ],
    "deepseek_v3": [
        LATENT | {"routed_scaling_factor": 2.5, "num_mtp_layers": 0} | latent_yarn(1.0, 1.0),
        LATENT
        | {"q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
        | {"norm_topk_prob": False, "tie_word_embeddings": True, "num_mtp_layers": 0},
        LATENT
        | {"hidden_size": 30, "num_attention_heads": 1, "num_key_value_heads": 1, "num_mtp_layers": 0}
        | LINEAR
        | {"first_k_dense_replace": 0, "n_shared_experts": 2, "num_experts_per_tok": 1},
    ],
    "glm4_moe_lite": [
        LATENT | {"n_group": 1, "topk_group": 1},
        LATENT | THREE_HEADS | {"mlp_layer_types": ["sparse", "dense", "sparse"], "q_lora_rank": None},
        LATENT | {"attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": False} | latent_yarn(1.0, 0.5),
    ],
}
GEMMA4 = {
    "head_dim": 6,
    "global_head_dim": 10,
    "sliding_window": 9,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 6,
}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
}
GEMMA3N = {
    "head_dim": 12,
    "sliding_window": 9,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "vocab_size_per_layer_input": 90,
    "hidden_size_per_layer_input": 6,
    "laurel_rank": 7,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.9, 0.0, 0.3, 0.0, 0.5],
}
CONFIGS |= {  # inputs of each layer, keys shared between layers
    "gemma3n_text": [
        GEMMA3N,
        GEMMA3N
        | ONE_KV_HEAD
        | {"altup_num_inputs": 2, "altup_active_idx": 1, "altup_correct_scale": False, "num_kv_shared_layers": 3}
        | {"intermediate_size": [48, 20, 48, 36, 30], "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        THREE_HEADS
        | GEMMA3N
        | {"head_dim": 10, "num_kv_shared_layers": 0, "attention_bias": True, "activation_sparsity_pattern": None}
        | {"altup_num_inputs": 3, "sliding_window": 4, "vocab_size_per_layer_input": 96},
    ],
    "gemma4_text": [
        GEMMA4 | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
        GEMMA4
        | ONE_KV_HEAD
        | GEMMA4_EXPERTS
        | {"head_dim": 12, "global_head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False},
        GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 12, "num_kv_shared_layers": 3},
        THREE_HEADS
        | GEMMA4
        | GEMMA4_EXPERTS
        | {"global_head_dim": 6, "attention_bias": True, "hidden_size_per_layer_input": 5, "top_k_experts": 1}
        | {"num_experts": 1, "num_hidden_layers": 3, "layer_types": BOTH_KINDS},
    ],
}
BETWEEN_PAIRS = {"rope_parameters": YARN["rope_parameters"] | {"truncate": False}}
CONFIGS |= {  # attention sinks
    "gpt_oss": [
        BETWEEN_PAIRS | {"head_dim": 12, "num_local_experts": 4, "sliding_window": 9, "num_experts_per_tok": 2},
        ONE_KV_HEAD
        | YARN
        | {"head_dim": 6, "num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": 4, "swiglu_limit": 0.3}
        | {"tie_word_embeddings": True, "layer_types": BOTH_KINDS[::-1]},
        THREE_HEADS
        | LINEAR
        | {"head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 5, "sliding_window": 30}
        | {"attention_bias": False, "swiglu_limit": 0.5, "swiglu_alpha": 1.1, "intermediate_size": 25},
    ],
}
DELTA_NETS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
}
THREE_NETS = THREE_HEADS | DELTA_NETS | {"linear_num_key_heads": 3, "linear_num_value_heads": 3}
ONE_KEY_HEAD = ONE_KV_HEAD | DELTA_NETS | {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "head_dim": 8}
# At the first positions an output can be tiny; its norm then makes rounding large, unless eps is large too.
EVERY_FOURTH = {"layer_types": None, "num_hidden_layers": 5, "rms_norm_eps": 1e-3}
HALF_ROTATED = {"rope_parameters": LINEAR["rope_parameters"] | {"partial_rotary_factor": 0.5}}
CONFIGS |= {  # gated delta nets
    "qwen3_next": [
        DELTA_NETS | EXPERTS | {"shared_expert_intermediate_size": 28},
        ONE_KEY_HEAD
        | EXPERTS
        | EVERY_FOURTH
        | {"shared_expert_intermediate_size": 7, "attention_bias": True, "tie_word_embeddings": True}
        | {"mlp_only_layers": [1], "norm_topk_prob": False, "linear_conv_kernel_dim": 3},
        THREE_NETS
        | EXPERTS
        | {"shared_expert_intermediate_size": 28, "num_experts": 1, "num_experts_per_tok": 1, "head_dim": 40}
        | {"decoder_sparse_step": 2, "linear_key_head_dim": 9},
    ],
    "qwen3_5_text": [
        DELTA_NETS,
        ONE_KEY_HEAD | EVERY_FOURTH | {"attention_bias": True, "tie_word_embeddings": True},
        THREE_NETS | HALF_ROTATED | {"head_dim": 20, "linear_conv_kernel_dim": 2, "linear_key_head_dim": 9},
        DELTA_NETS | {"layer_types": ["linear_attention"] * 3},  # nothing but delta nets
    ],
    "qwen3_5_moe_text": [
        DELTA_NETS | EXPERTS | {"shared_expert_intermediate_size": 28},
        ONE_KEY_HEAD | EXPERTS | EVERY_FOURTH | {"shared_expert_intermediate_size": 7, "num_experts_per_tok": 6},
        THREE_NETS
        | EXPERTS
        | {"shared_expert_intermediate_size": 28, "num_experts": 1, "num_experts_per_tok": 1, "head_dim": 40}
        | {"tie_word_embeddings": True, "linear_conv_kernel_dim": 1},
    ],
}
CASES = [(kind, number) for kind, configs in CONFIGS.items() for number in range(len(configs))]


def make_checkpoint(kind: str, number: int, folder: Path) -> Any:
    """Write a random model of a family into `folder` and return it."""
    model = make_model(kind, CONFIGS[kind][number], seed=number)
    model.save_pretrained(folder)
    return model


def make_model(kind: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A random model of transformers. No parameter has a value that hides it."""
    sizes = SIZES if "n_embd" not in options else {}
    config = AutoConfig.for_model(kind, **deepcopy(sizes | options))  # it changes nested values
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # others refuse some widths
    model = AutoModelForCausalLM.from_config(config, **eager).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", ".expert_bias")):
            buffer.copy_(0.2 * torch.randn_like(buffer))
        elif name.endswith(".layer_scalar"):
            buffer.add_(0.2 * torch.randn_like(buffer))
    for name, parameter in model.named_parameters():
        # Norms start at 1 or 0 and biases at 0, which would test nothing.
        if parameter.ndim == 1 or "norm" in name or name.endswith(("_bias", "mamba.A_log")):
            start = parameter.data.mean() if "norm" in name or "ln_" in name else 0.0
            parameter.data = start + 0.2 * torch.randn_like(parameter)
        if name.endswith("linear_attn.A_log"):
            parameter.data -= 3.0  # a state that lasts
    return model
