"""The typer application: one command a file."""

from __future__ import annotations

import sys

import typer

from .bench import bench
from .cadc import app as cadc
from .demo import demo
from .info import info
from .tune import tune
from .verify import verify

app = typer.Typer(
    help="Operators for fast model inference: what is here, what it does to a model, is it right, how fast is it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
for command in (info, demo, verify, bench, tune):
    app.command()(command)
app.add_typer(cadc, name="cadc")
