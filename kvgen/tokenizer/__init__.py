"""Text to ids and back: vocabularies, chat templates and the streaming detokenizer."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.tokenizer import gguf, hf
from kvgen.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "read_tokenizer"]


def read_tokenizer(raw: RawCheckpoint) -> Tokenizer:
    """The tokenizer that comes with a checkpoint. Raises CheckpointError or UnsupportedError."""
    return gguf.read(raw) if raw.format == "gguf" else hf.read(raw)
