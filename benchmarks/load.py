"""How long a checkpoint takes to load, and how much memory beyond what stays.

    python benchmarks/load.py                     # the default model, and a random one of a billion parameters
    python benchmarks/load.py --model DIR --dtype bfloat16

Every measurement is a process of its own. Seconds are from the end of the imports to a model that is ready. Peak is the
highest resident memory (VmHWM), resident what is left when the model is ready (VmRSS); both hold Python and torch,
whose share is printed too. The billion parameters are written once, to the system's folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 5
CHILD = """
import json, sys, time
from pathlib import Path
import torch, kvgen
from kvgen import load
def memory(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) / 1e3
before = memory("VmRSS")
start = time.perf_counter()
loaded = load(sys.argv[1], dtype=sys.argv[2], tokenizer=None if sys.argv[3] == "own" else sys.argv[3])
seconds = time.perf_counter() - start
weights = loaded.model.weight_bytes / 1e6
print(json.dumps(dict(seconds=seconds, before=before, peak=memory("VmHWM"), resident=memory("VmRSS"), weights=weights)))
"""
BILLION = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def write_billion(folder: Path) -> Path:
    """A random checkpoint in bfloat16, in shards, as they come from the hub."""
    import torch
    from safetensors.torch import save_file

    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    dim, ffn, vocab = BILLION["hidden_size"], BILLION["intermediate_size"], BILLION["vocab_size"]
    kv_dim = dim * BILLION["num_key_value_heads"] // BILLION["num_attention_heads"]
    shapes = {"input_layernorm": (dim,), "post_attention_layernorm": (dim,), "self_attn.q_proj": (dim, dim)}
    shapes |= {"self_attn.k_proj": (kv_dim, dim), "self_attn.v_proj": (kv_dim, dim), "self_attn.o_proj": (dim, dim)}
    shapes |= {"mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn)}
    groups = [{"model.embed_tokens": (vocab, dim), "model.norm": (dim,), "lm_head": (vocab, dim)}]
    groups += [
        {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}
        for i in range(BILLION["num_hidden_layers"])
    ]
    weight_map = {}
    for start in range(0, len(groups), 7):
        file = f"model-{start // 7}.safetensors"
        merged = {name: shape for group in groups[start : start + 7] for name, shape in group.items()}
        tensors = {f"{name}.weight": torch.randn(shape).mul_(0.02).bfloat16() for name, shape in merged.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(BILLION))
    (folder / "done").touch()
    return folder


def measure(model: str, dtype: str, tokenizer: str, runs: int) -> None:
    results = []
    for _ in range(runs + 1):  # the first fills the page cache
        output = subprocess.run(
            [sys.executable, "-c", CHILD, model, dtype, tokenizer], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        results.append(json.loads(output))
    median = {key: statistics.median(result[key] for result in results[1:]) for key in results[0]}
    own_peak, own_resident = (median[key] - median["before"] for key in ("peak", "resident"))
    sys.stdout.write(
        f"{Path(model).name} {dtype}: {median['seconds']:.2f} s, weights {median['weights']:.0f} MB, "
        f"resident {median['resident']:.0f} MB, peak {median['peak']:.0f} MB, before {median['before']:.0f} MB; "
        f"peak / resident {median['peak'] / median['resident']:.2f}, of the load {own_peak / own_resident:.2f}\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    if options.model:
        measure(options.model, options.dtype, "own", options.runs)
        return
    billion = str(write_billion(Path(tempfile.gettempdir()) / "kvgen-billion"))
    for dtype in ("float32", "bfloat16"):
        measure("smollm2", dtype, "own", options.runs)
        measure(billion, dtype, "ids", options.runs)


if __name__ == "__main__":
    main()
