"""Kinds of models that kvgen does not run, to name the reason when it refuses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = "a mixture of experts"
_STATE_SPACE = "a state-space or recurrent model"
_ENCODER_DECODER = "an encoder-decoder model"
_KINDS = {
    _EXPERTS: (
        "deepseek deepseek_v32 dbrx grok phimoe granitemoeshared llama4 llama4_text jetmoe arctic minimax minimax_m2 "
        "bailing_moe hunyuan_v1_moe kimi_k2 flex_olmo switch_transformers"
    ),
    _STATE_SPACE: "mamba falcon_mamba rwkv rwkv6 rwkv7 rwkv6qwen2 zamba zamba2 recurrent_gemma xlstm plamo2",
    _ENCODER_DECODER: (
        "t5 t5encoder mt5 umt5 bart mbart pegasus marian m2m_100 nllb whisper encoder-decoder longt5 led t5gemma "
        "bigbird_pegasus prophetnet"
    ),
    "an encoder, which does not generate": (
        "bert roberta distilbert albert deberta-v2 modernbert nomic-bert electra xlm-roberta"
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def refusal(name: str, metadata: Mapping[str, Any]) -> str | None:
    """Return the kind of an unsupported model, by its name or its metadata; None if it may be supported."""
    if name in _KIND_OF:
        return _KIND_OF[name]
    if metadata.get("is_encoder_decoder") is True:
        return _ENCODER_DECODER
    return None


def is_state_space(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a GGUF file says so."""
    return f"{name}.ssm.state_size" in metadata


def experts_field(metadata: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return which field says that a model is a mixture of experts, and its value; None if none does."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts", f"{prefix}expert_count"):
        count = metadata.get(key)
        if isinstance(count, int) and count > 1:
            return f"{key} is {count}"
    return None
