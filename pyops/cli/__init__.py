"""The command line, `python -m fastops` or `fastops`: info, demo, verify, bench, tune, cadc.

It needs typer and rich, the extra `fastops[cli]`; the library itself does not.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without typer and rich say how to get them, and exit with 2."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"fastops: {error.name} is missing: pip install typer rich (the extra fastops[cli])", file=sys.stderr)
        sys.exit(2)
    app(prog_name="fastops")
