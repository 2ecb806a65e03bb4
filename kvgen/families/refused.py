"""Kinds of models that kvgen does not run, to name the reason when it refuses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = "a mixture of experts"
_STATE_SPACE = "a state-space or recurrent model"
_ENCODER_DECODER = "an encoder-decoder model"
_KINDS = {
    _EXPERTS: (
        "mixtral qwen2_moe qwen2moe qwen3_moe qwen3moe qwen3_next qwen3next deepseek deepseek_v2 deepseek2 deepseek_v3 "
        "deepseek_v32 dbrx grok gpt_oss gpt-oss olmoe phimoe granitemoe granitemoeshared granitemoehybrid llama4 "
        "llama4_text jetmoe arctic minimax minimax_m2 ernie4_5_moe glm4_moe glm4moe bailing_moe hunyuan_v1_moe dots1 "
        "kimi_k2 flex_olmo lfm2_moe switch_transformers"
    ),
    _STATE_SPACE: (
        "mamba mamba2 falcon_mamba rwkv rwkv6 rwkv7 rwkv6qwen2 jamba bamba zamba zamba2 recurrent_gemma xlstm "
        "nemotron_h falcon_h1 plamo2"
    ),
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
    for key in ("num_local_experts", "num_experts", "n_routed_experts", f"{name}.expert_count"):
        count = metadata.get(key)
        if isinstance(count, int) and count > 1:
            return f"{_EXPERTS} ({key} is {count})"
    return _STATE_SPACE if f"{name}.ssm.state_size" in metadata else None
