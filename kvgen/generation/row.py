"""A request in progress: a row of a batch with its text."""

from __future__ import annotations

from dataclasses import dataclass

from kvgen.errors import KvgenError, as_kvgen_error
from kvgen.generation.loop import Row
from kvgen.generation.step import Step
from kvgen.generation.text import Chunk, CompletionText
from kvgen.model.causal_lm import PREFILL_CHUNK


@dataclass(eq=False, kw_only=True)
class RequestRow(Row):
    """A request in progress. new: prompt positions to compute. nbytes: maximum size of its cache."""

    number: int
    text: CompletionText
    new: int
    nbytes: int
    ended: bool = False

    @property
    def is_long(self) -> bool:
        """Whether its prompt takes several passes."""
        return self.use_cache and self.new > PREFILL_CHUNK

    def released(self, step: Step | KvgenError) -> Chunk | KvgenError:
        """Return the text that a step releases, or the error."""
        if isinstance(step, KvgenError):
            return step
        try:
            return self.text.add(step)
        except Exception as error:  # noqa: BLE001 (a tokenizer may raise anything; the other rows continue)
            return as_kvgen_error(error)
