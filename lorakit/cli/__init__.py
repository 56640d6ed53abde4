"""The command line. One thin command a file; here they are put together, and here alone errors are caught."""

from __future__ import annotations

import sys
from typing import cast

import typer

from lorakit import __version__, compat
from lorakit.cli import convert, env, estimate, evaluate, export, generate, inspect_ranks, schema, train, validate
from lorakit.errors import LorakitError

CommandLineError = cast("type[typer.BadParameter]", compat.command_line_error())

app = typer.Typer(
    name="lorakit",
    help="Fine-tune language models with low-rank adapters whose capacity adapts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show Python's traceback of an error."),
) -> None:
    """Fine-tune language models with low-rank adapters whose capacity adapts."""


app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("inspect-ranks")(inspect_ranks.inspect_ranks)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("validate")(validate.validate)
app.command("estimate")(estimate.estimate)
app.command("schema")(schema.schema)
app.command("env")(env.env)


def main() -> None:
    """Run the command line; exit with 0 done, 2 wrong recipe or command line, 1 failed run, 130 interrupted."""
    # Accepted anywhere on the line, since that is where one adds it after an error.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except LorakitError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except CommandLineError as error:
        error.show()
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nobody is left to tell
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ImportError) and (known := compat.moved(error)):
            _fail(str(known), known.exit_code)
        lines = [f"{type(error).__name__}: {error}", "This should not have happened. `--debug` shows where it did."]
        _fail("\n  ".join([*lines, *compat.untested()]), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red").append(message, style="not bold default"))
    sys.exit(code)
