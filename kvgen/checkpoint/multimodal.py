"""The text part of a multimodal Hugging Face checkpoint: its config and the tensors of its language model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from kvgen.checkpoint.raw import RawCheckpoint
from kvgen.errors import CheckpointError

_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
)
_PREFIX = re.compile(r"^(?:language_model\.(?=model\.|lm_head\.)|(model\.)language_model\.)")
_SHARED = ("eos_token_id", "tie_word_embeddings")  # the whole model's take precedence, as in transformers
_LEFT_OUT = {"vision_config": "images", "audio_config": "audio"}


def text_name(name: str) -> str:
    """Return the name of a language model's tensor in a checkpoint of it alone."""
    return _PREFIX.sub(r"\1", name)


def text_part(raw: RawCheckpoint) -> RawCheckpoint:
    """Return a checkpoint as that of the text model in its `text_config`, with a note; others unchanged.

    Tensors of image and audio parts are left out, `language_model.` is taken out of the names of the others.
    """
    config = raw.metadata.get("text_config")
    whole = raw.metadata.get("model_type")
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        return raw
    if raw.metadata.get("is_encoder_decoder") is True:
        return raw
    shared = {name: raw.metadata[name] for name in _SHARED if raw.metadata.get(name) is not None}
    kept = [name for name in raw.tensors if not _OTHER_PARTS.match(name)]
    names = {text_name(name): name for name in kept}
    if len(names) < len(kept):
        raise CheckpointError(f"{raw.path}: has the same tensor of the language model under two names")
    left_out = [words for name, words in _LEFT_OUT.items() if raw.metadata.get(name)] or ["other parts"]
    return replace(
        raw,
        metadata={**config, **shared},
        tensors={name: raw.tensors[stored] for name, stored in names.items()},
        note=f"this is the text part of a {whole!r:.80} checkpoint; {' and '.join(left_out)} are left out",
    )
