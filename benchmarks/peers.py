"""One engine in one process: loads the model, then measures what it is told on stdin, a line of JSON each way.

    echo '{"what": "prefill", "tokens": 512}' | python benchmarks/peers.py kvgen FOLDER

FOLDER is one that speed.py made: the model in the form that each engine reads.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = os.cpu_count() or 1
VOCABULARY = 40_000  # ids below it are ordinary tokens
DECODED = 32
LONG_CONTEXT = 33_000


def random_ids(count: int) -> list[int]:
    return [random.randrange(1000, VOCABULARY) for _ in range(count)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Kvgen:
    def __init__(self, folder: Path, **options: str) -> None:
        import torch

        import kvgen

        self.torch = torch
        self.model = kvgen.load(folder / "model.gguf", **options).model

    def step(self, ids: list[int], cache: Any) -> Any:
        return self.model(self.torch.tensor([ids]), cache)[1]

    def prefill(self, ids: list[int]) -> float:
        return seconds(lambda: self.step(ids, None))

    def decode(self, ids: list[int]) -> float:
        return self.prefill_and_decode(ids)[1]

    def prefill_and_decode(self, ids: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        cache = self.step(ids, None)
        prefill, times = time.perf_counter() - start, []
        for token in random_ids(DECODED):
            ids = [*ids, token]
            sequence = self.torch.tensor([ids])
            start = time.perf_counter()
            _, cache = self.model(sequence, cache)
            times.append(time.perf_counter() - start)
        return prefill, statistics.median(times)

    def uncached(self, ids: list[int]) -> float:
        return self.prefill(ids)

    def log_probabilities(self, ids: list[int]) -> Any:
        return self.model.all_logits(self.torch.tensor([ids]))[0].log_softmax(-1).numpy()


class LlamaCpp:
    def __init__(self, folder: Path, **options: Any) -> None:
        from llama_cpp import Llama

        given = {"n_ctx": 4096, "n_batch": 512, "n_threads": THREADS, "n_threads_batch": THREADS, **options}
        self.open = lambda **more: Llama(str(folder / "model.gguf"), verbose=False, **given, **more)
        self.llama = self.open()

    def prefill(self, ids: list[int]) -> float:
        self.llama.reset()
        return seconds(lambda: self.llama.eval(ids))

    def decode(self, ids: list[int]) -> float:
        return self.prefill_and_decode(ids)[1]

    def prefill_and_decode(self, ids: list[int]) -> tuple[float, float]:
        prefill = self.prefill(ids)
        times = [seconds(lambda token=token: self.llama.eval([token])) for token in random_ids(DECODED)]
        return prefill, statistics.median(times)

    def log_probabilities(self, ids: list[int]) -> Any:
        import numpy as np

        llama = self.open(logits_all=True)
        llama.eval(ids)
        logits = np.asarray(llama.scores[: len(ids)], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def llama_cpp_at_length(folder: Path, *, flash: bool, quantized: bool = False) -> LlamaCpp:
    """With room for a long text. flash: flash attention. quantized: a cache of q8_0 instead of f16."""
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_Q8_0

    type_ = GGML_TYPE_Q8_0 if quantized else GGML_TYPE_F16
    return LlamaCpp(folder, n_ctx=LONG_CONTEXT, flash_attn=flash, type_k=type_, type_v=type_)


class IkLlamaCpp:
    def __init__(self, folder: Path) -> None:
        from ik_llama_cpp import IkLlama, _ctypes_api, _internals

        self.api, self.make_batch = _ctypes_api, _internals.make_batch_range
        self.llama = IkLlama(str(folder / "model.gguf"), n_threads=THREADS, verbose=False)

    def _eval(self, ids: list[int], at: int) -> None:
        context = self.llama._context
        for start in range(0, len(ids), context._n_ubatch):
            batch = self.make_batch(ids[start : start + context._n_ubatch], pos_start=at + start, logits_last=True)
            if context.decode(batch):
                raise RuntimeError("llama_decode failed")
            self.api.llama_batch_free(batch)

    def prefill(self, ids: list[int]) -> float:
        self.llama._context.kv_cache_clear()
        return seconds(lambda: self._eval(ids, 0))

    def decode(self, ids: list[int]) -> float:
        self.prefill(ids)
        tokens = enumerate(random_ids(DECODED), len(ids))
        return statistics.median([seconds(lambda n=n, token=token: self._eval([token], n)) for n, token in tokens])


class OpenVino:
    def __init__(self, folder: Path) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(
            str(folder / "model.gguf"), "CPU", INFERENCE_NUM_THREADS=THREADS, ENABLE_MMAP=True
        )

    def _metrics(self, ids: list[int], tokens: int) -> Any:
        config = self.genai.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, ignore_eos=True, apply_chat_template=False
        )
        array = self.numpy.array([ids], dtype=self.numpy.int64)
        tensors = (self.openvino.Tensor(part) for part in (array, self.numpy.ones_like(array)))
        return self.pipeline.generate(self.genai.TokenizedInputs(*tensors), config).perf_metrics

    def prefill(self, ids: list[int]) -> float:
        return self._metrics(ids, 1).get_ttft().mean / 1000

    def decode(self, ids: list[int]) -> float:
        return self._metrics(ids, DECODED).get_tpot().mean / 1000


class CTranslate2:
    def __init__(self, folder: Path) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder / "ctranslate2"), device="cpu", compute_type="int8", intra_threads=THREADS
        )
        self.vocabulary = json.loads((folder / "ctranslate2" / "vocabulary.json").read_text())

    def _generate(self, ids: list[int], tokens: int) -> float:
        prompt = [self.vocabulary[id_] for id_ in ids]
        return seconds(
            lambda: self.generator.generate_batch(
                [prompt], max_length=tokens, min_length=tokens, include_prompt_in_result=False
            )
        )

    def prefill(self, ids: list[int]) -> float:
        return self._generate(ids, 1)

    def decode(self, ids: list[int]) -> float:
        first = statistics.median(self._generate(ids, 1) for _ in range(3))
        return (self._generate(ids, 1 + DECODED) - first) / DECODED


class Transformers:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=getattr(torch, dtype))
        self.model.eval()

    def prefill(self, ids: list[int]) -> float:
        with self.torch.inference_mode():
            return seconds(lambda: self.model(self.torch.tensor([ids]), logits_to_keep=1))

    def decode(self, ids: list[int]) -> float:
        with self.torch.inference_mode():
            cache = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
            return statistics.median(
                seconds(lambda token=token: self.model(self.torch.tensor([[token]]), past_key_values=cache))
                for token in random_ids(DECODED)
            )

    def log_probabilities(self, ids: list[int]) -> Any:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()


class XTransformers:
    def __init__(self, folder: Path) -> None:
        import torch

        import kvgen

        self.torch = torch
        self.net = kvgen.load(folder / "x-transformers").model.module

    def _call(self, ids: list[int], cache: Any) -> Any:
        with self.torch.inference_mode():
            return self.net(self.torch.tensor([ids]), cache=cache, return_intermediates=True)[1]

    def prefill(self, ids: list[int]) -> float:
        return seconds(lambda: self._call(ids, None))

    def decode(self, ids: list[int]) -> float:
        cache, times = self._call(ids, None), []
        for token in random_ids(DECODED // 2):
            ids = [*ids, token]
            start = time.perf_counter()
            cache = self._call(ids, cache)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


ENGINES: dict[str, Callable[[Path], Any]] = {
    "kvgen": Kvgen,
    "kvgen int8": lambda folder: Kvgen(folder, activations="int8"),
    "llama.cpp": LlamaCpp,
    "ik_llama.cpp": IkLlamaCpp,
    "OpenVINO GenAI": OpenVino,
    "CTranslate2 int8": CTranslate2,
    "transformers bf16": lambda folder: Transformers(folder, "bfloat16"),
    "transformers fp32": lambda folder: Transformers(folder, "float32"),
    "x-transformers fp32": XTransformers,
    # The exact fp32 weights, in torch's own operations: what quality is measured against.
    "kvgen on torch": lambda folder: Kvgen(folder, kernels="off"),
    "kvgen, bf16 cache": lambda folder: Kvgen(folder, kv_dtype="bfloat16"),
    "kvgen, int8 cache": lambda folder: Kvgen(folder, kv_dtype="int8"),
    "llama.cpp, f16 cache": lambda folder: llama_cpp_at_length(folder, flash=False),
    "llama.cpp, f16 cache, flash attention": lambda folder: llama_cpp_at_length(folder, flash=True),
    "llama.cpp, q8_0 cache, flash attention": lambda folder: llama_cpp_at_length(folder, flash=True, quantized=True),
}


def peak_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def answer(engine: Any, order: dict[str, Any]) -> Any:
    what = order["what"]
    if what == "memory":
        return peak_memory()
    if what == "log_probabilities":
        import numpy as np

        np.save(order["file"], engine.log_probabilities(order["ids"]).astype(np.float32))
        return None
    return getattr(engine, what)(random_ids(order["tokens"]))


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    engine = ENGINES[sys.argv[1]](Path(sys.argv[2]))
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
