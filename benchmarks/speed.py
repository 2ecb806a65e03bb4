"""kvgen against its peers: same model, same tokens, same threads, in one run, alternating; medians.

    make bench

Engines that are not installed are left out. Nothing else may run on the machine. The result goes into
docs/performance.md, between its marks, and docs/images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kvgen.hub.names import resolve

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
PACKAGES = {
    "kvgen": "torch",
    "kvgen int8": "torch",
    "llama.cpp": "llama-cpp-python",
    "OpenVINO GenAI": "openvino-genai",
    "CTranslate2 int8": "ctranslate2",
    "transformers bf16": "transformers",
    "transformers fp32": "transformers",
    "x-transformers fp32": "x-transformers",
}
CONTEXTS, PROMPTS, LENGTHS = (16, 512, 2048), (128, 512, 2048), (16, 64, 256, 1024)
SLOW = 10.0
MEASURED = ("kvgen", "kvgen int8", "llama.cpp", "transformers bf16")  # against exact weights
TEXT, TEXT_TOKENS = ROOT / "benchmarks" / "texts" / "quality.txt", 1500
FIRST_TOKEN = {
    "kvgen": ["-m", "kvgen", "generate", "-q", "-n", "1", "-t", "0", "-p", "Once upon a time,", "-m"],
    "llama.cpp": [
        "-c",
        "import sys; from llama_cpp import Llama; m = Llama(sys.argv[1], verbose=False); "
        "print(m('Once upon a time,', max_tokens=1)['choices'][0]['text'])",
    ],
    "OpenVINO GenAI": [
        "-c",
        "import sys, openvino_genai as g; p = g.LLMPipeline(sys.argv[1], 'CPU'); "
        "print(p.generate('Once upon a time,', max_new_tokens=1))",
    ],
}


class Engine:
    """A process that has one engine loaded, and measures when told to."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "peers.py"), name, str(folder)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **order}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.name} ended while it was asked for {what}")
        return json.loads(reply)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def prepare(folder: Path, names: Sequence[str]) -> None:
    """The default model in the form that each engine reads."""
    (folder / "model.gguf").symlink_to(resolve())
    if "x-transformers fp32" in names:
        command = [sys.executable, "-m", "kvgen", "convert", str(resolve()), str(folder / "x-transformers")]
        subprocess.run([*command, "--to", "x-transformers", "-q"], check=True)
    if "CTranslate2 int8" in names:
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
        del source.config.quantization_config
        plain = type(source)(source.config)
        plain.load_state_dict(source.state_dict())
        plain.save_pretrained(folder / "hf")
        AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder / "hf")
        TransformersConverter(str(folder / "hf")).convert(str(folder / "ctranslate2"), quantization="int8")


def alternate(engines: Sequence[Engine], what: str, tokens: int, runs: int) -> dict[str, float]:
    """Median seconds of each engine, one run each in turn; a first round is not counted.

    But an engine that takes longer than SLOW seconds is asked once.
    """
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for run in range(runs + 1):
        for engine in engines:
            if any(taken > SLOW for taken in times[engine.name]):
                continue
            taken = engine.ask(what, tokens=tokens)
            if run or taken > SLOW:
                times[engine.name].append(taken)
    say(f"{what} {tokens}: " + ", ".join(f"{name} {statistics.median(t) * 1e3:.2f} ms" for name, t in times.items()))
    return {name: statistics.median(taken) for name, taken in times.items()}


def first_token(names: Sequence[str], runs: int) -> dict[str, float]:
    """Median seconds of whole processes from their start to the first token."""
    times: dict[str, list[float]] = {name: [] for name in names if name in FIRST_TOKEN}
    for run in range(runs + 1):
        for name, taken in times.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *FIRST_TOKEN[name], str(resolve())],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if run:
                taken.append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def quality(names: Sequence[str], folder: Path) -> dict[str, tuple[float, float]]:
    """Mean KL divergence from the exact fp32 weights in nats, and the share of the same most likely token."""
    import kvgen

    ids = kvgen.load(kernels="off").tokenizer.encode(TEXT.read_text())[:TEXT_TOKENS]
    found = {}
    expected: Any = None
    for name in (
        "kvgen on torch",
        *(name for name in names if name in ("kvgen", "kvgen int8", "llama.cpp", "transformers bf16")),
    ):
        engine, file = Engine(name, folder), folder / "log-probabilities.npy"
        engine.ask("log_probabilities", ids=ids, file=str(file))
        engine.close()
        actual = np.load(file).astype(np.float64)
        if expected is None:
            expected = actual
            continue
        divergence = (np.exp(expected) * (expected - actual)).sum(-1).mean()
        found[name] = (float(divergence), float((expected.argmax(-1) == actual.argmax(-1)).mean()))
        say(f"KL of {name}: {found[name][0]:.2e}, top-1 {100 * found[name][1]:.1f} %")
    return found


def measure(names: Sequence[str], folder: Path, runs: int) -> dict[str, Any]:
    prepare(folder, names)
    report: dict[str, Any] = {"first token": first_token(names, runs), "quality": quality(names, folder)}
    engines = [Engine(name, folder) for name in names]
    report["decode"] = {tokens: alternate(engines, "decode", tokens, runs) for tokens in CONTEXTS}
    report["prefill"] = {tokens: alternate(engines, "prefill", tokens, runs) for tokens in PROMPTS}
    own = [engine for engine in engines if engine.name == "kvgen"]
    report["cached"] = {tokens: alternate(own, "decode", tokens, runs)["kvgen"] for tokens in LENGTHS}
    report["uncached"] = {tokens: alternate(own, "uncached", tokens + 1, 3)["kvgen"] for tokens in LENGTHS}
    report["memory"] = {engine.name: engine.ask("memory") for engine in engines}
    for engine in engines:
        engine.close()
    return report


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    has = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {flag}" in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name} ({', '.join(has)}), {os.cpu_count()} cores, {memory:.0f} GB, Python {platform.python_version()}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(report: dict[str, Any], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        cells = [f"{name} ({PACKAGES[name]} {version(PACKAGES[name])})"]
        cells += [f"{1 / report['decode'][tokens][name]:.0f}" for tokens in CONTEXTS]
        cells += [f"{tokens / report['prefill'][tokens][name]:,.0f}" for tokens in PROMPTS]
        cells += [f"{report['first token'][name]:.2f}" if name in report["first token"] else ""]
        cells += [f"{report['memory'][name]:.0f}"]
        kl = report["quality"].get(name)
        cells += [f"{kl[0]:.1e}", f"{100 * kl[1]:.1f} %"] if kl else ["", ""]
        rows.append(cells)
    titles = ["", *(f"decode at {n:,}" for n in CONTEXTS), *(f"prefill {n:,}" for n in PROMPTS)]
    growth = [
        [
            f"{n:,}",
            f"{1000 * report['cached'][n]:.2f}",
            f"{1000 * report['uncached'][n]:.1f}",
            f"{report['uncached'][n] / report['cached'][n]:.0f}",
        ]
        for n in LENGTHS
    ]
    ratios = []
    for title, kind, sizes in (("decode", "decode", CONTEXTS), ("prefill", "prefill", PROMPTS)):
        for size in sizes:
            taken = report[kind][size]
            for peer in names[1:]:
                ratios.append((title, size, peer, taken[peer] / taken["kvgen"]))
    peers = names[1:]
    ratio_rows = [
        [
            f"{title} {size:,}",
            *(f"{next(r for t, s, p, r in ratios if (t, s, p) == (title, size, peer)):.2f}" for peer in peers),
        ]
        for title, sizes in (("decode", CONTEXTS), ("prefill", PROMPTS))
        for size in sizes
    ]
    return "\n\n".join(
        (
            f"{time.strftime('%Y-%m-%d')}, {machine()}.",
            table([*titles, "first token, s", "peak MB", "KL, nats", "top-1"], rows),
            "kvgen's speed divided by each peer's:",
            table(["", *peers], ratio_rows),
            "Milliseconds per token after a context of this length, with the cache and without:",
            table(["length", "cached", "uncached", "ratio"], growth),
        )
    )


def draw(report: dict[str, Any], names: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    IMAGES.mkdir(exist_ok=True)
    for kind, sizes, label in (("decode", CONTEXTS, "context"), ("prefill", PROMPTS, "prompt")):
        axes = Figure(figsize=(8, 3.5), layout="constrained").add_subplot()
        for name in names:
            rates = [(1 if kind == "decode" else size) / report[kind][size][name] for size in sizes]
            axes.plot(sizes, rates, marker="o", label=name, linewidth=3 if name == "kvgen" else 1)
        axes.set(xscale="log", xlabel=f"{label}, tokens", ylabel=f"{kind}, tokens a second", ylim=(0, None))
        axes.legend(fontsize="small")
        axes.figure.savefig(IMAGES / f"{kind}.svg", metadata={"Date": None})
    axes = Figure(figsize=(8, 3.5), layout="constrained").add_subplot()
    for way in ("uncached", "cached"):
        axes.plot(LENGTHS, [1000 * report[way][size] for size in LENGTHS], marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens before it", ylabel="ms for a token")
    axes.legend()
    axes.figure.savefig(IMAGES / "cached.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--engines", nargs="*", choices=list(PACKAGES), help="those that are installed, if not given")
    parser.add_argument("--report", type=Path, help="write the measurements there as JSON, and leave the page alone")
    options = parser.parse_args()
    names = [name for name in options.engines or PACKAGES if installed(PACKAGES[name])]
    folder = Path(tempfile.mkdtemp(prefix="kvgen-bench-"))
    try:
        report = measure(names, folder, options.runs)
    finally:
        shutil.rmtree(folder)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1))
        sys.stdout.write(write(report, names) + "\n")
        return
    draw(report, names)
    page = PAGE.read_text()
    measured = f"<!-- measured -->\n\n{write(report, names)}\n\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- measured -->.*<!-- end -->", lambda _: measured, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
