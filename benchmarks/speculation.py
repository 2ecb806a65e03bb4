"""What prompt lookup gains and loses, in turn with plain decoding: python benchmarks/speculation.py [--runs N]"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import kvgen

TEXTS = Path(__file__).parent / "texts"
CHATS = {
    "code edit": "Rewrite this Python code, and rename the function min_p to minimum_p. Print all of the code.\n"
    f"```python\n{(TEXTS / 'code.txt').read_text()}\n```",
    "quote": f"Repeat the following text word for word:\n\n{(TEXTS / 'quote.txt').read_text()}",
    "free, a question": "Explain how photosynthesis works.",
}
BEGINNINGS = {
    "free, a story": "Once upon a time, in a village by the sea,",
    "free, history": "The history of the steam engine begins",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    loaded = kvgen.load()
    prompts = {name: loaded.tokenizer.encode_chat([{"role": "user", "content": text}]) for name, text in CHATS.items()}
    prompts |= {name: loaded.tokenizer.encode(text) for name, text in BEGINNINGS.items()}
    sys.stdout.write(
        "| prompt | temperature | plain, s | lookup, s | ratio | accepted |\n|---|---:|---:|---:|---:|---:|\n"
    )
    for name, ids in prompts.items():
        for temperature in (0.0, 0.7):
            times: dict[bool, list[float]] = {False: [], True: []}
            tokens, steps = {}, []
            for run in range(runs + 1):
                for speculates in (False, True):
                    drafter = kvgen.PromptLookup() if speculates else None
                    sampling = kvgen.Sampling(temperature=temperature, seed=3)
                    start = time.perf_counter()
                    steps = [
                        chunk.step for chunk in kvgen.stream(loaded, ids, sampling, max_tokens=300, drafter=drafter)
                    ]
                    if run:
                        times[speculates].append(time.perf_counter() - start)
                    tokens[speculates] = [step.token for step in steps]
            assert tokens[False] == tokens[True]
            plain, lookup = (statistics.median(taken) for taken in times.values())
            drafted, accepted = sum(step.drafted for step in steps), sum(step.guessed for step in steps)
            seconds = f"{plain:.2f} | {lookup:.2f} | {plain / lookup:.2f}"
            sys.stdout.write(f"| {name} | {temperature} | {seconds} | {accepted} of {drafted} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
