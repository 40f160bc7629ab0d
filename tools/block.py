"""Replace a generated block of a Markdown file by what stdin holds:  COMMAND | python tools/block.py FILE NAME

The block stands between the lines `<!-- begin: NAME -->` and `<!-- end: NAME -->`. Exits with 1 when FILE has no such
block, and with 1 under --check when the block differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def main() -> int:
    """Read the arguments and stdin; write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when the block differs")
    arguments = parser.parse_args()
    before = arguments.file.read_text()
    name = re.escape(arguments.name)
    pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
    if not pattern.search(before):
        print(f"{arguments.file}: no block named {arguments.name}", file=sys.stderr)
        return 1
    wanted = sys.stdin.read().strip("\n") + "\n"
    after = pattern.sub(lambda match: match[1] + wanted + match[2], before)
    if arguments.check:
        return int(after != before)
    arguments.file.write_text(after)
    return 0


sys.exit(main())
