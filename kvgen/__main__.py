"""Run the command line: `python -m kvgen`, and the entry point of `kvgen`."""

import os
import signal


def main() -> None:
    # A KeyboardInterrupt while a C extension is imported can be lost, so exit at once until torch is imported.
    # `kvgen.cli.interrupts` then restores the exception.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

    from kvgen.cli import app

    app(prog_name="kvgen")


if __name__ == "__main__":
    main()
