"""kvgen: a text generator whose KV cache you can trust.

    >>> import kvgen
    >>> loaded = kvgen.load("smollm2")
    >>> kvgen.generate(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=13)
    ' the city of Nova Haven was a thriving metropolis, with towering'

`load` returns the model behind the contract `logits, cache = loaded.model(ids, cache)`, with `ids` always the
whole sequence. Names below are imported on first use, so `import kvgen` alone does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from kvgen.errors import (
    CacheError,
    CheckpointError,
    ContextError,
    KvgenError,
    ModelError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from kvgen.comparison import Comparison, compare
    from kvgen.contract import Backend, Model
    from kvgen.generation.batch import Batch
    from kvgen.generation.completion import Step
    from kvgen.generation.conversation import Conversation
    from kvgen.generation.drafts import Drafter, DraftModel, PromptLookup
    from kvgen.generation.scoring import Score, score
    from kvgen.generation.settings import Constraint, Request, Sampling
    from kvgen.generation.stream import generate, stream
    from kvgen.generation.text import Chunk
    from kvgen.loading.load import Loaded, load
    from kvgen.model.cache import KVCache
    from kvgen.tokenizer import Tokenizer
    from kvgen.tokenizer.chat import Message

__version__ = "0.1.0"

# Read when torch is imported. Its threads would spin for milliseconds where they wait, so that every process with torch
# would be a hundred times slower beside another one that is busy, and the kernels' own threads with it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = [
    "Backend",
    "Batch",
    "CacheError",
    "CheckpointError",
    "Chunk",
    "Comparison",
    "Constraint",
    "ContextError",
    "Conversation",
    "DraftModel",
    "Drafter",
    "KVCache",
    "KvgenError",
    "Loaded",
    "Message",
    "Model",
    "ModelError",
    "NotFoundError",
    "PromptLookup",
    "Request",
    "Sampling",
    "Score",
    "Step",
    "Tokenizer",
    "UnsupportedError",
    "UsageError",
    "compare",
    "generate",
    "load",
    "score",
    "stream",
]

_HOMES = {
    "Backend": "kvgen.contract",
    "Batch": "kvgen.generation.batch",
    "Chunk": "kvgen.generation.text",
    "Comparison": "kvgen.comparison",
    "Constraint": "kvgen.generation.settings",
    "Conversation": "kvgen.generation.conversation",
    "DraftModel": "kvgen.generation.drafts",
    "Drafter": "kvgen.generation.drafts",
    "KVCache": "kvgen.model.cache",
    "Loaded": "kvgen.loading.load",
    "Message": "kvgen.tokenizer.chat",
    "Model": "kvgen.contract",
    "PromptLookup": "kvgen.generation.drafts",
    "Request": "kvgen.generation.settings",
    "Sampling": "kvgen.generation.settings",
    "Score": "kvgen.generation.scoring",
    "Step": "kvgen.generation.completion",
    "Tokenizer": "kvgen.tokenizer",
    "compare": "kvgen.comparison",
    "generate": "kvgen.generation.stream",
    "load": "kvgen.loading.load",
    "score": "kvgen.generation.scoring",
    "stream": "kvgen.generation.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
