"""Compare cached with uncached decoding of every decoder architecture of the installed transformers library.

    python benchmarks/survey.py --results FILE             # all, each in a process of its own; run again to continue
    python benchmarks/survey.py --only moshi --cache auto  # one row, with the report of `kvgen compare`

Models are tiny and random. Besides the verdict of `kvgen compare` there is that of a loop around the library alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # like `python -m`, for `benchmarks.architectures`

import torch
import transformers
from transformers import DynamicCache, QuantizedCache, StaticCache

from benchmarks.architectures import ARCHITECTURES, tiny_model
from kvgen.comparison.comparison import PatternResult, compare_ids
from kvgen.comparison.engines.transformers import TransformersBackend
from kvgen.comparison.engines.transformers_cache import cache_names
from kvgen.comparison.rounding import LIMIT
from kvgen.comparison.verdict import Verdict

_PROMPT = (5, 17, 3, 40, 22, 61)
_STEPS = 24  # past the tiny models' windows of 8 and chunks of 16
_SECONDS, _BYTES = 180, 6 << 30  # limits of a row and of a process
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-5}  # relative; much of the library computes in float32 in either


@torch.no_grad()
def library_alone(net: Any, **cache: Any) -> str:
    """A verdict by the library alone: the logits of `generate` with its cache, and of each prefix without."""
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": 95}

    def decode(ids: torch.Tensor, steps: int, **more: Any) -> Any:
        mask = torch.ones_like(ids)  # otherwise tokens with the id of the padding would be masked
        return net.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, **options, **more)

    def uncached(length: int) -> torch.Tensor:
        return decode(made.sequences[:, :length], 1, use_cache=False).logits[0][0]

    if not is_causal(net):
        return "not comparable"
    if cache and not net._supports_default_dynamic_cache():
        return "fails: the library ignores the choice of a cache"
    made = decode(torch.tensor([_PROMPT]), _STEPS, **cache)
    stored = made.get("past_key_values")
    if cache and stored is None:
        return "fails: the library ignores the choice of a cache"
    layers = stored.layers if type(stored) in (DynamicCache, StaticCache, QuantizedCache) else []
    if layers and all(getattr(layer, "device", None) is None for layer in layers):
        return "fails: the model stores nothing in the cache"
    cached = torch.stack(made.logits, 1)[0]
    expected = torch.stack([uncached(len(_PROMPT) + step) for step in range(_STEPS)])
    if not close(uncached(len(_PROMPT)), expected[0], net.dtype):
        return "not comparable"
    return "equivalent" if close(cached, expected, net.dtype) else "different"


def is_causal(net: Any) -> bool:
    """Whether logits of a call that `generate` would make do not depend on later tokens, as far as it returns them."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        more = {"attention_mask": torch.ones_like(ids), "use_cache": False, "is_first_iteration": True}
        found: torch.Tensor = net(**net.prepare_inputs_for_generation(ids, **more)).logits[0]
        return found

    ids = torch.tensor([_PROMPT * 4])
    whole, lengths = logits(ids), (len(_PROMPT), 2 * len(_PROMPT))
    return len(whole) != ids.shape[1] or all(close(whole[n - 1], logits(ids[:, :n])[-1], net.dtype) for n in lengths)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits, (..., vocab), are equal within the rounding of `dtype`, in which the model computes; never if one
    is NaN."""
    largest = (a.double() - b.double()).norm(dim=-1).max() / b.double().norm(dim=-1).max()
    return bool(largest <= _ROUNDING[dtype])


def loop(model_type: str, cache: str) -> str:
    """`library_alone` in float64, or in float32 if the model cannot; in the library's words if it refuses."""
    words = ""
    for dtype in (torch.float64, torch.float32):
        net = tiny_model(model_type)
        net.set_experts_implementation("eager")  # others have no float64
        try:
            return library_alone(net.to(dtype), **cache_names()[cache])
        except Exception as error:  # noqa: BLE001 (a survey reports whatever a model raises)
            words = f"fails: {describe(error)}"
    return words


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def examine(model_type: str, cache: str) -> dict[str, Any]:
    """One row: what `kvgen compare` finds, and the loop."""
    backend = TransformersBackend(tiny_model(model_type), cache)
    reference, row = compare_ids(backend, _PROMPT, steps=_STEPS).rows
    wrong = [probe for probe in row.probes if probe.wrong]
    found = {
        "made": made_by(backend),
        "verdict": str(row.verdict),
        "words": row.reason,
        "steps": step_verdict(row),
        "difference": row.gap.max_abs if row.gap else None,
        "ratio": max([row.ratio or 0.0, *(probe.ratio or 0.0 for probe in wrong)]),
        "uses": [probe.name for probe in wrong],
        "causes": [finding.name for finding in (*reference.findings, *row.findings)],
        "evidence": [finding.evidence for finding in (*reference.findings, *row.findings)],
    }
    return found | {"loop": loop(model_type, cache)}


def step_verdict(row: PatternResult) -> str:
    """The verdict on single steps, which the loop can judge as well."""
    if row.verdict in (Verdict.UNSUPPORTED, Verdict.NOT_COMPARABLE):
        return str(row.verdict)
    return "different" if row.verdict is not Verdict.EQUIVALENT and (row.ratio or 0.0) > LIMIT else "equivalent"


def usable() -> list[str]:
    """Caches that work here, some of which need a GPU or a package; without `dynamic`, which `auto` makes."""
    net = tiny_model("llama")
    return [name for name in cache_names() if name != "dynamic" and not TransformersBackend(net, name).cannot_cache]


def made_by(backend: TransformersBackend) -> str:
    """The class of the cache that the library made."""
    if backend.cannot_cache:
        return ""
    _, cache = backend(torch.tensor([_PROMPT]))
    return ", ".join(type(stored).__name__ for stored in cache.state.values())


def agrees(row: dict[str, Any]) -> str:
    """Whether the loop comes to the same verdict on single steps: yes, no, or - where there is none."""
    loop = "unsupported" if row["loop"].startswith("fails") else row["loop"]
    return "yes" if loop == row["steps"] else "no"


def _child(model_type: str, caches: Sequence[str], pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (for the life of the process)
    for cache in caches:
        began = time.process_time()
        try:
            found = examine(model_type, cache)
        except Exception as error:  # noqa: BLE001
            found = {"verdict": "not run", "words": describe(error)}
        pipe.send(found | {"seconds": round(time.process_time() - began, 1)})


def run(model_type: str, caches: Sequence[str]) -> list[dict[str, Any]]:
    """Examine in a process with limits of time and memory: one for an architecture, since importing takes seconds."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, caches, writer))
    process.start()
    writer.close()
    rows: list[dict[str, Any]] = []
    try:
        while len(rows) < len(caches) and reader.poll(_SECONDS):
            rows.append({"model": model_type, "cache": caches[len(rows)], **reader.recv()})
        stopped = {"verdict": "too slow", "words": f"over {_SECONDS} s"}
    except EOFError:
        stopped = {"verdict": "died", "words": f"over {_BYTES >> 30} GiB, or a crash"}
    process.kill()
    process.join()
    if len(rows) == len(caches):
        return rows
    rows.append({"model": model_type, "cache": caches[len(rows)], **stopped})
    return rows + (run(model_type, rest) if (rest := caches[len(rows) :]) else [])


def survey(names: Iterable[str], caches: Sequence[str], results: Path, workers: int) -> None:
    """Run what is not in `results` yet, and add it."""
    done = {(row["model"], row["cache"]) for row in read(results)}
    missing = [(name, [cache for cache in caches if (name, cache) not in done]) for name in names]
    with ThreadPoolExecutor(workers) as pool, results.open("a") as file:
        for rows in pool.map(lambda job: run(*job), [job for job in missing if job[1]]):
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(row["model"], row["cache"], row["verdict"], row.get("loop", ""), flush=True)  # noqa: T201
            file.flush()


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, metavar="MODEL_TYPE")
    parser.add_argument("--cache", action="append", choices=list(cache_names()))
    parser.add_argument("--results", type=Path, help="JSON lines to add to, and to continue from")
    parser.add_argument("--page", type=Path, help="write the results as a page")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    caches = options.cache or usable()
    names = options.only or ARCHITECTURES
    if options.results is None:
        for name, cache in itertools.product(names, caches):
            print(json.dumps({"model": name, "cache": cache, **examine(name, cache)}, indent=1))  # noqa: T201
        return
    survey(names, caches, options.results, options.workers)
    if options.page is not None:
        from benchmarks.survey_page import page

        options.page.write_text(page(read(options.results)))


if __name__ == "__main__":
    main()
