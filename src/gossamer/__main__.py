"""`python -m gossamer` is the command `gossamer`."""

from .cli import app

app(prog_name="gossamer")
