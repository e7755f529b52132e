"""The command line. What a command needs is imported when it runs, so that `gossamer --help` stays instant."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

FAILED, INTERRUPTED = 2, 130


class _Group(TyperGroup):
    """Turns an error that a user can mend into one red line; --debug may stand anywhere and lets it through."""

    debug = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.debug = "--debug" in args
        ctx.obj = list(args)  # for the command that resumes this one
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as e:
            if self.debug or not _is_expected(e):
                raise
            text = f"[bold red]Error:[/] [red]{escape(_line(e))}[/]"
            Console(stderr=True, soft_wrap=True).print(text, highlight=False)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("\nInterrupted.")
            raise typer.Exit(INTERRUPTED) from None


def _is_expected(error: Exception) -> bool:
    # These are RuntimeErrors by name, so that an error costs no import of torch.
    ours = {"WorkError", "FitError", "KernelError", "OutOfMemoryError"}
    return isinstance(error, ValueError | KeyError | OSError) or any(c.__name__ in ours for c in type(error).__mro__)


def _line(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return f"{str(error).splitlines()[0]}; fix: another --device, a smaller --dtype, or fewer --samples"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no {error.filename}; fix: check the path"
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


app = typer.Typer(
    cls=_Group,
    name="gossamer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model sparse, store it small, load it back to the bit and run it.",
)


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass


from . import index, inspect, shrink, speed, use  # noqa: E402, F401  (each adds its commands to `app`)

app.add_typer(index.app, name="index")
