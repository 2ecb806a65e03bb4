"""kvgen for one kind of processor against peers that are compiled for the same instructions, alternating; medians.

    python benchmarks/processors.py avx2 --model FILE.gguf --llama-cpp FOLDER

llama-cpp-python loads llama.cpp from FOLDER: build its vendor/llama.cpp there for the same instructions, with
`-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON`, and `-DGGML_AVX_VNNI=ON` for avx-vnni.
ik_llama.cpp is its wheel, which is for AVX2. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from speed import CONTEXTS, PROMPTS, Engine, alternate, table

from kvgen.hub.names import resolve

TORCH_ON_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def engines(folder: Path, variant: str, llama_cpp: Path | None, names: list[str]) -> list[Engine]:
    peer = {} if llama_cpp is None else {"LLAMA_CPP_LIB_PATH": str(llama_cpp), "LD_LIBRARY_PATH": str(llama_cpp)}
    environments = {"llama.cpp": peer, "kvgen on torch": {} if "512" in variant else TORCH_ON_AVX2}
    return [Engine(name, folder, **environments.get(name, {"KVGEN_CPU": variant})) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="as in $KVGEN_CPU")
    parser.add_argument("--model", help="a GGUF file; by default the default model")
    parser.add_argument("--llama-cpp", type=Path, help="the folder of libllama")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--engines", default="kvgen,kvgen int8,kvgen on torch,llama.cpp,ik_llama.cpp")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)))
    options = parser.parse_args()
    modules = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}
    names = [name for name in options.engines.split(",") if find_spec(modules.get(name, "torch"))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(resolve(options.model))
        running = engines(Path(folder), options.variant, options.llama_cpp, names)
        columns: dict[str, dict[str, float]] = {}
        for what, lengths in (("decode", options.contexts), ("prefill", options.prompts)):
            for length in map(int, filter(None, lengths.split(","))):
                taken = alternate(running, what, length, options.runs)
                done = 1 if what == "decode" else length
                columns[f"{what} {length:,}"] = {name: done / seconds for name, seconds in taken.items()}
        for engine in running:
            engine.close()
    rows = [[name, *(f"{column[name]:,.0f}" for column in columns.values())] for name in names]
    sys.stdout.write(table([f"{options.variant}, tokens/s", *columns], rows) + "\n")


if __name__ == "__main__":
    main()
