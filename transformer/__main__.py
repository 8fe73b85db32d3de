"""python -m transformer_checks.transformer train | generate | data: runs a command; reports a failure in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for a mistake in what was asked, 1 for a failure, 130 after Ctrl-C."""
    try:
        from .commands import Failure, run

        try:
            run(sys.argv[1:] if arguments is None else list(arguments))
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            return failure.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
