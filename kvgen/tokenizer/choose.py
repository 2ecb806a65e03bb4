"""Choose the tokenizer of a model: that of its checkpoint, or that of the user."""

from __future__ import annotations

from pathlib import Path

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import NotFoundError
from kvgen.tokenizer import gguf, hf
from kvgen.tokenizer.builtin import bytes_tokenizer, ids_tokenizer
from kvgen.tokenizer.tokenizer import Tokenizer


def read_tokenizer(raw: RawCheckpoint) -> Tokenizer:
    """Read the tokenizer of a checkpoint. Raises CheckpointError or UnsupportedError."""
    if raw.format == "gguf":
        return gguf.read(raw)
    return bytes_tokenizer() if raw.metadata.get("tokenizer") == "bytes" else hf.read(raw)


def choose_tokenizer(choice: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer that a user chose: `bytes`, `ids`, or the path of a tokenizer.json.

    Raises NotFoundError if there is no such file, CheckpointError if it is no tokenizer.
    """
    if choice == "bytes":
        return bytes_tokenizer()
    if choice == "ids":
        return ids_tokenizer(vocab_size)
    if not Path(choice).exists():
        raise NotFoundError(f"--tokenizer {choice}: no such file")
    return Tokenizer(hf.read_backend(Path(choice)), frozenset())
