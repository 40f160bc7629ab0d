"""How commands print: rich tables and bars on a terminal, aligned plain text and no bars elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

console = Console()


def say(text: str = "") -> None:
    """Print a line as it is: no markup, no colour, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print a table; `right` are the columns to align right."""
    if not console.is_terminal:
        say(plain_table(columns, rows, right))
        return
    table = Table(header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell, style="bold red" if cell.startswith("FAILED") else "") for cell in row])
    console.print(table)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """The same in aligned text, a line a row."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def progress() -> Progress:
    """A progress display on stderr; silent unless both stdout and stderr are terminals."""
    errors = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=errors, transient=True, disable=not (console.is_terminal and errors.is_terminal),
    )  # fmt: skip
