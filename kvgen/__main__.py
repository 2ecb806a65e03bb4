"""Run the command line: `python -m kvgen`, and the entry point of `kvgen`."""

import atexit
import gc
import os
import signal

_COLLECTED = 50_000  # new objects after which garbage is collected; by default 700


def main() -> None:
    # Importing torch and reading a vocabulary make a million objects that stay. Looking for garbage among them again
    # and again takes an eighth of the time until the first token.
    gc.set_threshold(_COLLECTED)
    atexit.register(gc.freeze)  # nor at the end, when all memory goes back anyway: half a second with torch

    # A KeyboardInterrupt while a C extension is imported can be lost, so exit at once until torch is imported.
    # `kvgen.cli.interrupts` then restores the exception.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

    from kvgen.cli import app

    app(prog_name="kvgen")


if __name__ == "__main__":
    main()
