"""Coverage-guided fuzzing of what strangers can hand to kvgen: python fuzz/fuzz.py [--inputs N] [--target NAME]

For each input: no exception but a KvgenError, no more than 5 seconds, no more memory than 4 times its size (and 64 MB
for all inputs of a target together, which an interpreter takes anyway). What breaks that is left in crash-*; what
libFuzzer says, in fuzz-NAME.log.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvgen"]):
    from targets import TARGETS, refuses_or_reads

SECONDS = 5.0
SLACK = 64 << 20


def fuzz(name: str, inputs: int, report: str) -> None:
    """Run one target, in a process of its own: libFuzzer ends the process."""
    log = os.open(f"fuzz-{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 2)
    target, seeds = TARGETS[name]
    counts = {"inputs": 0, "read": 0}
    slowest = 0.0
    for seed in seeds:
        refuses_or_reads(target, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(data: bytes) -> None:
        nonlocal slowest
        start = time.perf_counter()
        counts["read"] += refuses_or_reads(target, data)
        seconds = time.perf_counter() - start
        counts["inputs"], slowest = counts["inputs"] + 1, max(slowest, seconds)
        if seconds > SECONDS:
            raise RuntimeError(f"{seconds:.1f} seconds")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > 4 * len(data) + SLACK:
            raise RuntimeError(f"{grown >> 20} MB for {len(data)} bytes")
        if counts["inputs"] % 500 == 0 or counts["inputs"] >= inputs:
            Path(report).write_text(f"{counts['inputs']} {counts['read']} {slowest:.2f} {grown >> 20}")

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        arguments = [sys.argv[0], f"-runs={inputs}", "-max_len=4096", "-print_final_stats=0", "-verbosity=0", corpus]
        atheris.Setup(arguments, one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    failed = False
    sys.stdout.write("| target | inputs | read | refused | slowest, s | grown, MB |\n|---|---:|---:|---:|---:|---:|\n")
    for name in options.target or TARGETS:
        with tempfile.NamedTemporaryFile("r") as report:
            process = multiprocessing.get_context("fork").Process(target=fuzz, args=(name, options.inputs, report.name))
            process.start()
            process.join()
            inputs, read, slowest, grown = (report.read() or "0 0 0 0").split()
        failed |= process.exitcode != 0 or int(inputs) < options.inputs
        refused = int(inputs) - int(read)
        verdict = "" if process.exitcode == 0 else " FAILED, see crash-*"
        sys.stdout.write(f"| {name}{verdict} | {inputs} | {read} | {refused} | {slowest} | {grown} |\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
