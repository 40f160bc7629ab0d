"""`python -m fastops`."""

from .cli import main

main()
