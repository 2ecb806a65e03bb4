"""Tokenizers: text to token ids and back, chat templates, and streaming detokenization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from kvgen.tokenizer.choose import choose_tokenizer as choose_tokenizer
    from kvgen.tokenizer.choose import read_tokenizer as read_tokenizer
    from kvgen.tokenizer.tokenizer import Tokenizer as Tokenizer

# Chat messages and formats of prompts do without a tokenizer, and without torch, which reading one imports.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"choose": ["choose_tokenizer", "read_tokenizer"], "tokenizer": ["Tokenizer"]}
)
