"""How much memory there is: what control groups leave, and what commands take of it."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import psutil
import pytest

import kvgen
from kvgen import system
from kvgen.generation.kept import KeptCaches
from kvgen.loading import load as loading
from tests import gguf_files
from tests.families import make_model

V2 = {
    "kubepods/memory.max": "max\n",
    "kubepods/memory.current": "9000000\n",
    "kubepods/pod/memory.max": "4000000\n",
    "kubepods/pod/memory.current": "3000000\n",
    "kubepods/pod/memory.stat": "anon 5\ninactive_file 1500000\nactive_file 7\n",
}
V1 = {
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/memory.usage_in_bytes": "8000000\n",
    "memory/docker/memory.limit_in_bytes": "2000000\n",
    "memory/docker/memory.usage_in_bytes": "1500000\n",
    "memory/docker/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n",
}


@pytest.mark.parametrize(
    ("membership", "files", "total", "available"),
    [
        ("0::/kubepods/pod\n", V2, 4000000, 2500000),
        ("0::/kubepods/pod/without/files\n", V2, 4000000, 2500000),
        ("4:cpu,memory:/docker\n0::/\n", V1, 2000000, 800000),
        ("0::/kubepods/pod\n", V2 | {"kubepods/pod/memory.current": "7000000\n"}, 4000000, 0),
    ],
)
def test_a_container_has_what_its_groups_leave(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: Mapping[str, str],
    total: int,
    available: int,
) -> None:
    for name, text in {"membership": membership, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, "_GROUPS", tmp_path)
    monkeypatch.setattr(system, "_MEMBERSHIP", tmp_path / "membership")
    assert (system.total_memory(), system.available_memory()) == (total, available)


def test_without_groups_it_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_MEMBERSHIP", tmp_path / "nothing")
    assert system.total_memory() == psutil.virtual_memory().total
    assert 0 < system.available_memory() < system.total_memory()


@pytest.mark.slow
def test_a_long_prompt_takes_its_cache_and_little_more(smollm2_path: Path, tmp_path: Path) -> None:
    """New, written to a prompt cache, and resumed from it."""
    prompt, cache = tmp_path / "prompt.txt", tmp_path / "prompt.cache"
    prompt.write_text("the city of Nova Haven was a thriving metropolis with towering skyscrapers " * 400)

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-m", "kvgen", "generate", "-n", "2", "--json", "-q", *arguments]
        script = f"""
import json, resource, subprocess
done = subprocess.run({command!r}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
count = len(json.loads(done.stdout)["prompt_ids"])
print(json.dumps([count, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        count, most = json.loads(done.stdout)
        return int(most) - count * 46080  # a position's keys and values

    short = peak("-p", "Once upon a time,")
    for more in ([], ["--prompt-cache", str(cache)], ["--prompt-cache", str(cache)]):
        assert peak("-f", str(prompt), *more) - short < 60e6
    assert cache.stat().st_size > 150e6


def test_kernels_leave_none_of_the_file_in_memory(smollm2_path: Path) -> None:
    loaded = kvgen.load(smollm2_path, kernels="cpp")
    maps = [mapped for mapped in psutil.Process().memory_maps() if mapped.path == str(smollm2_path.resolve())]
    assert sum(mapped.rss for mapped in maps) < 1e6
    assert loaded.model.weight_bytes is not None


def test_the_vocabulary_is_read_before_the_weights(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes meanwhile is free again before the weights take theirs."""
    events = []

    def watch(name: str) -> None:
        function = getattr(loading, name)

        def watched(*arguments: Any) -> Any:
            events.append(name)
            time.sleep(0.05)
            result = function(*arguments)
            events.append(f"after {name}")
            return result

        monkeypatch.setattr(loading, name, watched)

    for name in ("read_tokenizer", "return_freed_memory", "load_native"):
        watch(name)
    kvgen.load(tiny_llama()[0], device="cpu")
    assert [event for event in events if event.startswith("after")] == [
        "after read_tokenizer",
        "after return_freed_memory",
        "after load_native",
    ]
    assert events.index("load_native") > events.index("after return_freed_memory")


needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc_trim"
)


@needs_glibc
def test_freed_memory_goes_back_to_the_system() -> None:
    c, size = ctypes.CDLL(None), 100_000  # below what the C library maps by itself
    c.malloc.restype = ctypes.c_void_p
    parts = [c.malloc(ctypes.c_size_t(size)) for _ in range(1000)]
    for part in parts:
        ctypes.memset(part, 1, size)
    for part in parts[:-1]:
        c.free(ctypes.c_void_p(part))
    before = psutil.Process().memory_info().rss
    system.return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 80e6
    c.free(ctypes.c_void_p(parts[-1]))


@needs_glibc
def test_the_memory_of_caches_that_go_is_not_kept() -> None:
    def cache() -> SimpleNamespace:  # of many parts that the C library does not map by themselves
        return SimpleNamespace(nbytes=10_000_000, parts=[b"x" * 100_000 for _ in range(100)])

    kept = KeptCaches(20, [cache() for _ in range(20)])
    before = psutil.Process().memory_info().rss
    for _ in range(19):
        kept.drop_first()
    assert before - psutil.Process().memory_info().rss > 100e6


def test_the_command_line_collects_garbage_rarely() -> None:
    script = "import atexit, gc, sys; atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count()))\n"
    script += "sys.argv = ['kvgen', '--version']\nfrom kvgen.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    threshold, frozen = map(int, done.stdout.split()[-2:])
    assert threshold == 50_000
    assert frozen > 5_000  # so that the end looks for no garbage either


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["Q8_0", "F16"])
def test_loading_takes_little_more_memory_than_the_weights(type_name: str, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    large = small | {"vocab_size": 50_000, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4}
    for name, options in {"small": small, "large": large}.items():
        kind = gguf.GGMLQuantizationType[type_name]
        gguf_files.write_gguf(tmp_path / f"{name}.gguf", "llama", make_model("llama", options), type_=kind)
    script = f"""
import kvgen, resource
for size in ("small", "large"):
    loaded = kvgen.load({str(tmp_path)!r} + f"/{{size}}.gguf", tokenizer="ids", kernels="cpp")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, loaded.model.weight_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, _, peak, result = map(int, done.stdout.split())
    assert peak - before < 1.25 * result


def test_caches_may_take_half_of_what_the_weights_leave(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda: 1_000_000)
    loaded = kvgen.load(tiny_llama()[0], device="cpu")
    assert loaded.cache_budget == (1_000_000 - loaded.model.weight_bytes) // 2
