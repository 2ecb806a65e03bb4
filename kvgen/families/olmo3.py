"""OLMo 3: OLMo 2 with a window in three layers of four, in which positions are not scaled."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of, flagged_biases, head_dim, hf_config, sliding_windows
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.olmo2 import NORMS, POST_NORM_NAMES
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Rotary

_PERIOD, _BASE = 4, 500_000.0  # transformers' defaults


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    windows = sliding_windows(raw, lambda layer: (layer + 1) % _PERIOD != 0)
    whole, local = _read_rotaries(raw)
    return hf_config(
        raw,
        names=POST_NORM_NAMES,
        norms=NORMS,
        attention={"qk_norm": "all"},
        windows=windows,
        rotaries=[whole if window is None else local for window in windows],
        biases=flagged_biases(raw),
    )


def _read_rotaries(raw: RawCheckpoint) -> tuple[Rotary, Rotary]:
    """Return the rotary of layers without and with a window; transformers 5 nests them, older versions have one."""
    fields = fields_of(raw)
    nested = fields.section("rope_parameters")
    plain = {"rope_theta": fields.get("rope_theta"), "max_position_embeddings": fields.get("max_position_embeddings")}
    if nested is None:
        whole, local = fields, Fields(plain, fields.path)
    else:
        whole, local = (
            Fields({**plain, "rope_parameters": nested.get(kind)}, fields.path)
            for kind in ("full_attention", "sliding_attention")
        )
    size = head_dim(raw)
    return rotary_from_hf(whole, size, default_base=_BASE), rotary_from_hf(local, size, default_base=_BASE)


FAMILY = Family("olmo3", "", read_config, POST_NORM_NAMES)
