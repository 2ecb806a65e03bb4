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
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
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
    "granitemoe": [
        {
            "num_local_experts": 4,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        ONE_KV_HEAD | {"tie_word_embeddings": True, "num_local_experts": 5, "num_experts_per_tok": 1},
        THREE_HEADS | YARN | {"attention_bias": True, "num_local_experts": 3, "num_experts_per_tok": 3},
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
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn_like(buffer))
    for name, parameter in model.named_parameters():
        # Norms start at 1 or 0 and biases at 0, which would test nothing.
        if parameter.ndim == 1 or "norm" in name or "correction_bias" in name:
            start = parameter.data.mean() if "norm" in name or "ln_" in name else 0.0
            parameter.data = start + 0.2 * torch.randn_like(parameter)
    return model
