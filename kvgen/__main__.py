"""`python -m kvgen`, and the entry point of the `kvgen` command."""

import sys


def main() -> None:
    try:
        from kvgen.cli import app

        app(prog_name="kvgen")
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


if __name__ == "__main__":
    main()
