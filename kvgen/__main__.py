"""`python -m kvgen`, and the entry point of the `kvgen` command."""

import os
import signal
import types


def main() -> None:
    # A KeyboardInterrupt inside the import of a C extension can be lost, so until torch is there an interruption
    # ends the process at once. `kvgen.cli.interrupts` makes it an exception then.
    signal.signal(signal.SIGINT, _exit_interrupted)

    from kvgen.cli import app

    app(prog_name="kvgen")


def _exit_interrupted(number: int, frame: types.FrameType | None) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
