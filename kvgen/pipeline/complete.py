"""From input rows to results, many side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kvgen.errors import KvgenError, UsageError, as_kvgen_error
from kvgen.generation.counts import total
from kvgen.generation.events import Completer
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk
from kvgen.pipeline.rows import InputRow
from kvgen.tokenizer.prompt import Encoder, PromptFormat


@dataclass(frozen=True)
class Result:
    """The output of a row. value: its line of JSON. reused, computed: positions over all passes; None if unknown."""

    row: InputRow
    value: dict[str, Any]
    tokens: int = 0
    reused: int | None = 0
    computed: int | None = 0

    @property
    def failed(self) -> bool:
        return "error" in self.value


@dataclass
class _InProgress:
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
    batch: Completer,
    tokenizer: Encoder,
    rows: Iterable[InputRow],
    defaults: Request,
    format: PromptFormat,
    admit: Callable[[], bool] = lambda: True,
    most_tokens: int | None = None,
) -> Iterator[Result]:
    """Yield the result of each row as soon as it is complete.

    defaults, most_tokens: as for `InputRow.request`. admit: as for `Batch.run`.
    """
    in_progress: dict[int, _InProgress] = {}

    def requests() -> Iterator[Request | KvgenError]:
        for number, row in enumerate(rows):
            request, failure = defaults, None
            try:
                if row.error is not None:
                    raise UsageError(row.error)
                request = row.request(defaults, most_tokens)
                request = replace(request, prompt=format.encode(tokenizer, row.prompt))
            except Exception as error:  # noqa: BLE001 (an invalid row must not stop the others)
                failure = as_kvgen_error(error)
            in_progress[number] = _InProgress(row, request)
            yield failure or request

    for number, event in batch.run(requests(), admit):
        if isinstance(event, KvgenError):
            row = in_progress.pop(number).row
            yield Result(row, {**row.labels(), "error": str(event)})
            continue
        in_progress[number].chunks.append(event)
        if event.finish_reason:
            yield in_progress.pop(number).result()
