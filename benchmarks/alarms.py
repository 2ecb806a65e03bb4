"""`kvgen compare`, as it is by default, on 60 models whose caches are right: it must find each equivalent.

    python benchmarks/alarms.py --gemma GEMMA.gguf   # a table, and the number of alarms
    python benchmarks/alarms.py --only x-transformers

57 models are tiny and random, with different architectures or settings; what the libraries themselves get right is told
by other means: docs/survey.md has a loop around transformers, `tests/test_xtransformers.py` one around x-transformers,
`tests/test_llama_cpp.py` another library's logits. Three are real: the default model, Gemma 3 270M in GGUF, and the
default model converted to x-transformers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # like `python -m`, for `benchmarks.architectures` and `tests`

import torch
import transformers

import kvgen
from benchmarks.architectures import tiny_model
from kvgen.backends.xtransformers import XTransformersBackend
from kvgen.comparison import Comparison
from kvgen.comparison.comparison import compare_ids
from kvgen.comparison.engines.transformers import TransformersBackend
from kvgen.comparison.verdict import Verdict
from kvgen.contract import Backend
from kvgen.loading.convert import convert_to_xtransformers
from tests.families import CONFIGS, make_model
from tests.gguf_files import CONFIGS as GGUF_CONFIGS
from tests.gguf_files import write_gguf
from tests.test_xtransformers import make_net

_PROMPT = (5, 17, 3, 40, 22, 61, 9, 33)
_TEXT = "Once upon a time,"

_TRANSFORMERS = """
    llama mistral gemma2 lfm2 qwen3_next gpt2 bloom opt mixtral deepseek_v3 gemma3_text qwen3 phi3 gptj cohere2 olmoe
    granite bamba mamba2 gpt_oss starcoder2 falcon bart kimi_linear
"""
_NATIVE = """
    qwen2 smollm3 stablelm gpt_neox phi arcee seed_oss nemotron ernie4_5 cohere glm4 olmo3 exaone4 apertus
    hunyuan_v1_dense dots1 falcon_h1
"""
_X_TRANSFORMERS = (
    *("absolute", "rotary", "alibi", "relative bias", "grouped queries", "qk norm", "hyper-connections"),
    "learned sinks",
)
_LLAMA_CPP = "llama qwen3 gemma2 gemma3_text gpt2 olmo2 starcoder2 mixtral"

Case = tuple[str, str, Callable[[], Comparison]]  # the engine, the model, and the comparison


def _tiny(model: Backend) -> Comparison:
    return compare_ids(model, _PROMPT)


def _real(loaded: kvgen.Loaded) -> Comparison:
    return kvgen.compare(loaded, _TEXT)


def _native(folder: Path, kind: str) -> Comparison:
    make_model(kind, CONFIGS[kind][0]).save_pretrained(folder / kind)
    return _tiny(kvgen.load(folder / kind, tokenizer="ids", kernels="off").model)  # which are exact: nothing to judge


def _llama_cpp(folder: Path, kind: str) -> Comparison:
    path = folder / f"{kind}.gguf"
    write_gguf(path, kind, make_model(kind, next(known for name, known in GGUF_CONFIGS if name == kind)))
    return _tiny(kvgen.load_engine("llama.cpp", path, kvgen.EngineOptions(tokenizer="ids")).model)


def _converted(folder: Path) -> Comparison:
    loaded: Any = kvgen.load(kernels="off")
    convert_to_xtransformers(loaded.model.decoder, loaded.tokenizer, folder / "default")
    return _real(kvgen.load(folder / "default"))


def cases(folder: Path, gemma: Path) -> Iterator[Case]:
    for name in _TRANSFORMERS.split():
        yield "transformers", name, lambda name=name: _tiny(TransformersBackend(tiny_model(name)))
    for name in _NATIVE.split():
        yield "kvgen", name, lambda name=name: _native(folder, name)
    for name in _X_TRANSFORMERS:
        yield "x-transformers", name, lambda name=name: _tiny(XTransformersBackend(make_net(name)))
    for name in _LLAMA_CPP.split():
        yield "llama.cpp", name, lambda name=name: _llama_cpp(folder, name)
    yield "kvgen", "the default model", lambda: _real(kvgen.load())
    yield "kvgen", "Gemma 3 270M, GGUF", lambda: _real(kvgen.load(gemma))
    yield "x-transformers", "the default model, converted", lambda: _converted(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", type=Path, default=Path("gemma.gguf"), help="Gemma 3 270M in GGUF")
    parser.add_argument("--only", action="append", metavar="ENGINE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| engine | model | verdict | noise floors | seconds of CPU |\n|---|---|---|---|---|")  # noqa: T201
    alarms = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        for engine, name, compare in cases(Path(folder), options.gemma):
            if options.only and engine not in options.only:
                continue
            began = time.process_time()
            _, row = compare().rows
            used = time.process_time() - began
            ratio = max([row.ratio or 0.0, *(probe.ratio or 0.0 for probe in row.probes)])
            found = ", ".join([str(row.verdict), row.reason, *(finding.name for finding in row.findings)]).strip(", ")
            print(f"| {engine} | {name} | {found} | {ratio:.2f} | {used:.1f} |", flush=True)  # noqa: T201
            compared, alarms = compared + 1, alarms + (row.verdict is not Verdict.EQUIVALENT)
    print(f"\n{alarms} alarms on {compared} models")  # noqa: T201
    sys.exit(bool(alarms))


if __name__ == "__main__":
    main()
