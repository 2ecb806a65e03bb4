"""The results of `survey.py` as a page."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

import torch
import transformers

from benchmarks.survey import agrees

Row = dict[str, Any]
_INTRO = """# Survey of transformers

Cached and uncached decoding of tiny random models of every architecture in the library's mapping of causal language
models (`MODEL_FOR_CAUSAL_LM_MAPPING`), with each cache that `generate` has: `auto` is what the library chooses itself,
which is its `DynamicCache` or a cache of the model's own.

Written by `benchmarks/survey.py` on {date} with transformers {transformers}, torch {torch} and Python {python}, in
float32 on a CPU. Each row is judged twice: by `kvgen compare`, and by a loop around the library alone
(`library_alone` in that file), which compares the logits of `generate` with those that it computes without a cache, in
float64 where the model allows it. The loop sees single steps only. **The two agree on {agreed} of {judged} rows.**
Rows that a cache lacks in the table below have not been run. `dynamic` is what `auto` makes; `offloaded` and
`offloaded_static` need a GPU, `quantized-hqq` and `quantized-quanto` their packages.

`python benchmarks/survey.py --only MODEL --cache CACHE` repeats one row and prints all that was found.
"""
_FOUND = """## What is behind the differences

Read in the library's source, or tried by changing it (2026-11-27, transformers 5.23.0):

| model | |
|---|---|
| falcon_mamba, jamba, mamba, zamba | several new tokens at once start the scan from zeros, not from the cached state |
| nemotron_h, zamba2 | a prompt limits time steps to `time_step_min`, a single step does not; equal without the limit |
| moshi | the cache has the layers of a sliding window, and the mask without a cache has no window |
| prophetnet | `get_predict_relative_pos_embeddings` permutes (0, 2, 1, 4, 3) what its index expects as \
(1, 0, 4, 2, 3): biases of later positions reach earlier ones. Permuted so, cached decoding of one text is right |
| recurrent_gemma | the recurrent state is an attribute of the module, shared by all caches |
| rwkv | `shifted`, (rows, size), is added to (rows, 1, size): each row gets the state of every row |
| minimax | `MiniMaxCache` cannot be cropped, and its `reset` keeps the states of linear layers |
| reformer | a call with a cache computes the last token only; attention in chunks differs past the first chunk |
| xlnet | tokens of a call see all others of it, those cached have not seen what came later |
| xlm | takes no cache: `generate` computes the whole text at each step |
| axk2, deepseek_v32, glm_moe_dsa, hy_v4 (static) | scores of the indexer tie at 0, all of them at a padding token, \
whose embedding is zeros; of equal scores `topk` chooses others in a longer buffer. Equal with ties broken by position |
| gpt_neo (static) | the causal mask is cut out by the length of the keys, which is that of the whole buffer |
| cpmant | its mask lets every position see the whole text |
"""


def page(rows: Sequence[Row]) -> str:
    built = [row for row in rows if "steps" in row]
    by_verdict: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_verdict[row["verdict"]].append(row)
    parts = [
        _INTRO.format(
            date=date.today(),
            transformers=transformers.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            agreed=sum(agrees(row) == "yes" for row in built),
            judged=len(built),
        ),
        _counts(rows),
        _section("Different from uncached decoding", _differences(by_verdict.pop("different", []))),
        _FOUND,
        _section("Not comparable", _reasons(by_verdict.pop("not comparable", []))),
        _section("Lossy by design", _differences(by_verdict.pop("lossy", []))),
        _section("Equivalent", _names(by_verdict.pop("equivalent", []))),
    ]
    parts += [_section(verdict.capitalize(), _refusals(found)) for verdict, found in sorted(by_verdict.items())]
    parts.append(_section("Where the loop disagrees", _differences([row for row in built if agrees(row) == "no"])))
    return "\n".join(filter(None, parts))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) if lines else ""


def _counts(rows: Sequence[Row]) -> str:
    verdicts = sorted({row["verdict"] for row in rows})
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    cells = (
        [
            cache,
            *(str(sum(row["cache"] == cache and row["verdict"] == verdict for row in rows)) for verdict in verdicts),
        ]
        for cache in caches
    )
    return _table(["cache", *verdicts], cells) + "\n"


def _differences(rows: Sequence[Row]) -> str:
    """Difference: the largest of a logit in single steps. Noise floors: of the worst use."""
    head = (
        "model",
        "cache",
        "single steps",
        "also wrong",
        "largest difference",
        "noise floors",
        "cause",
        "loop",
        "agree",
    )
    return _table(
        head,
        (
            (
                row["model"],
                f"{row['cache']} ({row['made']})" if row["made"] else row["cache"],
                row["steps"],
                ", ".join(row["uses"]),
                "" if row["difference"] is None else f"{row['difference']:.2g}",
                f"{row['ratio']:.2g}",
                ", ".join(row["causes"]),
                row["loop"],
                agrees(row),
            )
            for row in rows
        ),
    )


def _reasons(rows: Sequence[Row]) -> str:
    head = ("model", "cache", "cause", "evidence", "loop", "agree")
    cells = (
        (row["model"], row["cache"], ", ".join(row["causes"]), "; ".join(row["evidence"]), row["loop"], agrees(row))
        for row in rows
    )
    return _table(head, cells)


def _names(rows: Sequence[Row]) -> str:
    by_cache: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_cache[row["cache"]].append(row["model"])
    return "\n\n".join(f"`{cache}`: {', '.join(sorted(names))}." for cache, names in by_cache.items())


def _refusals(rows: Sequence[Row]) -> str:
    """In the library's words."""
    by_words: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        by_words[row["cache"], row["words"].removeprefix("transformers: ")].append(row["model"])
    return _table(
        ("cache", "words", "models"),
        ((cache, words, ", ".join(models)) for (cache, words), models in by_words.items()),
    )
