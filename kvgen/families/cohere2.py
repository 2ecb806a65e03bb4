"""Command R7B and Command A: Command R with a window in three layers of four, and no rotation in the fourth."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, head_dim, hf_config, sliding_windows
from kvgen.families.cohere import PARALLEL, logit_scale
from kvgen.families.family import Family
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig

_PERIOD = 4


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    period = _PERIOD if raw.format == "gguf" else fields.count("sliding_window_pattern", _PERIOD)
    windows = sliding_windows(raw, lambda layer: (layer + 1) % period != 0)
    mechanisms: dict[str, Any] = {**PARALLEL, "windows": windows}
    if raw.format == "gguf":
        rotary = rotary_from_gguf(raw, fields, head_dim(raw))
        rotaries = [None if window is None else rotary for window in windows]
        return gguf_config(raw, **mechanisms, rotaries=rotaries, logit_scale=fields.number("logit_scale"))
    raw = raw.with_metadata({"head_dim": None})  # transformers ignores it
    rotary = rotary_from_hf(fields_of(raw), head_dim(raw))
    return hf_config(
        raw,
        **mechanisms,
        rotaries=[None if window is None else rotary for window in windows],
        eps="layer_norm_eps",
        tied_head=True,
        logit_scale=logit_scale(raw),
        biases=flagged_biases(raw),
    )


FAMILY = Family(
    "cohere2", "cohere2", read_config, HF_NAMES, hf_transforms=gguf_transforms, gguf_transforms=gguf_transforms
)
