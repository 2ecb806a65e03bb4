"""From rows to their results, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kvgen.errors import KvgenError, UsageError, of_item
from kvgen.generation.batch import Batch
from kvgen.generation.counts import total
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk
from kvgen.pipeline.rows import InputRow
from kvgen.tokenizer import Tokenizer
from kvgen.tokenizer.prompt import PromptFormat


@dataclass(frozen=True)
class Result:
    """What became of a row. reused, computed: positions, over all passes; None if the cache does not say."""

    row: InputRow
    value: dict[str, Any]
    tokens: int = 0
    reused: int | None = 0
    computed: int | None = 0

    @property
    def failed(self) -> bool:
        return "error" in self.value


@dataclass
class _Open:
    row: InputRow
    request: Request
    chunks: list[Chunk] = field(default_factory=list)

    def result(self) -> Result:
        steps = [chunk.step for chunk in self.chunks]
        value = {
            **self.row.labels(),
            "completion": "".join(chunk.text for chunk in self.chunks),
            "finish_reason": self.chunks[-1].finish_reason,
            "prompt_tokens": len(self.request.prompt),
            "completion_tokens": len(steps),
            "seed": self.request.sampling.seed,
        }
        reused, computed = total(step.reused for step in steps), total(step.computed for step in steps)
        return Result(self.row, value, len(steps), reused, computed)


def complete_rows(
    batch: Batch,
    tokenizer: Tokenizer,
    rows: Iterable[InputRow],
    defaults: Request,
    format: PromptFormat,
    admit: Callable[[], bool] = lambda: True,
    most_tokens: int | None = None,
) -> Iterator[Result]:
    """The result of each row as soon as it is there.

    defaults: for what a row does not set. admit: see `Batch.run`. most_tokens: that a row may ask for; None for any.
    """
    under_way: dict[int, _Open] = {}

    def requests() -> Iterator[Request | KvgenError]:
        for number, row in enumerate(rows):
            request = defaults
            error: KvgenError | None = None if row.error is None else UsageError(row.error)
            if error is None:
                try:
                    asked = row.request(defaults, most_tokens)
                    request = replace(asked, prompt=format.encode(tokenizer, row.prompt))
                except Exception as found:  # noqa: BLE001 (whatever it is, it is this row's)
                    error = of_item(found)
            under_way[number] = _Open(row, request)
            yield error or request

    for number, event in batch.run(requests(), admit):
        if isinstance(event, KvgenError):
            row = under_way.pop(number).row
            yield Result(row, {**row.labels(), "error": str(event)})
            continue
        under_way[number].chunks.append(event)
        if event.finish_reason:
            yield under_way.pop(number).result()
