"""Tiny random checkpoints of every family, written by transformers: one row of configurations for each."""

from __future__ import annotations

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
    config = AutoConfig.for_model(kind, **sizes | options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms start at 1 or 0 and biases at 0, which would test nothing
            start = parameter.data.mean() if "norm" in name or "ln_" in name else 0.0
            parameter.data = start + 0.2 * torch.randn_like(parameter)
    return model
