"""What kvgen keeps of its speed beside a busy process, and what that one keeps.

    python benchmarks/neighbour.py [--seconds 4] [--runs 5] [--kernels off]

Decoding with the default model, and a loop in Python that counts: each alone, both at once, and two kvgen at once;
medians. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LENGTH = 256  # tokens after which a text is begun anew


class Process:
    """Another process that works for some seconds when told to, and then says how much it did in each."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--be", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def ask(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def be_kvgen(kernels: str) -> None:
    import kvgen

    loaded, greedy = kvgen.load(kernels=kernels), kvgen.Sampling(temperature=0)
    for line in sys.stdin:
        end, start, tokens = time.perf_counter() + float(line), time.perf_counter(), 0
        while time.perf_counter() < end:
            for _ in kvgen.stream(loaded, "Once upon a time,", greedy, max_tokens=LENGTH):
                tokens += 1
                if time.perf_counter() >= end:
                    break
        print_now(tokens / (time.perf_counter() - start))


def be_loop() -> None:
    for line in sys.stdin:
        start, count = time.perf_counter(), 0
        end = start + float(line)
        while time.perf_counter() < end:
            count += sum(range(1000))
        print_now(count / (time.perf_counter() - start))


def print_now(speed: float) -> None:
    sys.stdout.write(f"{speed}\n")
    sys.stdout.flush()


def together(processes: list[Process], seconds: float) -> list[float]:
    for process in processes:
        process.tell(seconds)
    return [process.ask() for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be:
        return be_loop() if options.be == "loop" else be_kvgen(options.be)
    first, second, loop = (Process(kind) for kind in (options.kernels, options.kernels, "loop"))
    together([first, second], 1)  # not counted: the first steps of each
    kept: dict[str, list[float]] = {}
    speeds: list[float] = []
    for _ in range(options.runs):
        (alone,), (counted,) = together([first], options.seconds), together([loop], options.seconds)
        beside, counting = together([first, loop], options.seconds)
        pair = together([first, second], options.seconds)
        speeds.append(alone)
        for what, share in (
            ("kvgen beside a loop", beside / alone),
            ("the loop beside kvgen", counting / counted),
            ("one of two kvgen", min(pair) / alone),
            ("the other one", max(pair) / alone),
        ):
            kept.setdefault(what, []).append(share)
    sys.stdout.write(
        f"kvgen alone: {statistics.median(speeds):.0f} tokens/s\n\n| | keeps | least of {options.runs} |\n"
    )
    sys.stdout.write("|---|---:|---:|\n")
    for what, shares in kept.items():
        sys.stdout.write(f"| {what} | {statistics.median(shares):.2f} | {min(shares):.2f} |\n")
    for process in (first, second, loop):
        process.close()


if __name__ == "__main__":
    main()
