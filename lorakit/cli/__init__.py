"""The command line: one thin command per file. They are put together here, the only place that
catches errors."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, NoReturn, cast

import typer

from lorakit import __version__, compat, process
from lorakit.cli import (
    common,
    compare,
    convert,
    env,
    estimate,
    evaluate,
    export,
    generate,
    import_adapter,
    init,
    inspect_ranks,
    predict,
    preview,
    report,
    schema,
    streams,
    train,
    validate,
)
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.training.interrupt import Stops

CommandLineError = cast("type[typer.BadParameter]", compat.command_line_error())

app = typer.Typer(
    name="lorakit",
    help="Fine-tune language models with low-rank adapters whose capacity adapts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        common.say(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show Python's traceback of an error."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log details too."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Log only warnings and errors."),
) -> None:
    """Fine-tune language models with low-rank adapters whose capacity adapts."""
    from lorakit.kernels import levels

    process.take_over()
    # a level that the machine lacks is an error in every command, reported before it does anything
    levels.used()


app.command("init")(init.init)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("import")(import_adapter.import_adapter)
app.command("inspect-ranks")(inspect_ranks.inspect_ranks)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("validate")(validate.validate)
app.command("preview")(preview.preview)
app.command("estimate")(estimate.estimate)
app.command("schema")(schema.schema)
app.command("env")(env.env)


ANYWHERE = (("--debug",), ("--verbose", "-v"), ("--quiet", "-q"))
UNICODE_FILES = "To name every file, set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8."


def main(stops: Stops | None = None) -> None:
    """Run the command line. Exit codes: 0 success, 2 wrong recipe or command line, 1 failed run,
    130 interrupted.

    `stops`: a signal handler that is already installed; without it, one is installed here.
    """
    from lorakit.training.interrupt import Stopped
    from lorakit.training.interrupt import Stops as New

    debug, verbose, quiet, arguments = _anywhere(sys.argv[1:])
    streams.prepare()
    with New() if stops is None else nullcontext(stops) as heeded:
        try:
            common.say_so_much(verbose, quiet)
            code = app(arguments, prog_name="lorakit", standalone_mode=False)
            sys.stdout.flush()
        except (Stopped, typer.Abort, KeyboardInterrupt) as stopped:
            _stop(str(stopped) or "stopped")
        except LorakitError as error:
            if debug:
                raise
            message = str(error)
            spelled = (message + "".join(arguments)).isascii()
            if not spelled and not streams.names_files_in_unicode():
                message += f"\n  {UNICODE_FILES}"  # a file that can not be named fails in many ways
            _fail(message, error.exit_code)
        except CommandLineError as error:
            error.show()
            _say_how_keys_are_set(getattr(error, "option_name", None))
            sys.exit(2)
        except Exception as error:
            # an operation that the signal interrupted, which then failed with an error of its own
            if heeded.number is not None:
                _stop(str(Stopped(heeded.number)))
            if debug:
                raise
            if isinstance(error, UnicodeEncodeError) and not streams.names_files_in_unicode():
                # Of a path: what is written to the streams or to files never fails so.
                what = (
                    f"the locale ({sys.getfilesystemencoding()}) can not name the file"
                    f" `{error.object}`"
                )
                _fail(f"{what}\n  {UNICODE_FILES}", 2)
            if isinstance(error, ImportError) and (known := compat.moved(error)):
                _fail(str(known), known.exit_code)
            lines = [
                f"{type(error).__name__}: {error}",
                "This should not have happened. `--debug` shows where it did.",
            ]
            _fail("\n  ".join([*lines, *compat.untested()]), 1)
        sys.exit(code if isinstance(code, int) else 0)


def _anywhere(typed: list[str]) -> tuple[bool, bool, bool, list[str]]:
    """(debug, verbose, quiet, the other arguments): these options are accepted anywhere on the
    line, since users append them to a command that they have seen fail, or talk. The value of
    another option (`--prompt -q`), and all that follows `--`, stays as it is."""
    names = set(sum(ANYWHERE, ()))
    valued = _options_with_values(typed) if names.intersection(typed) else set()
    there, others = set[str](), list[str]()
    for place, one in enumerate(typed):
        if one == "--":
            others += typed[place:]
            break
        if one in names and (place == 0 or typed[place - 1] not in valued):
            there.add(one)
        else:
            others.append(one)
    debug, verbose, quiet = (not there.isdisjoint(spelled) for spelled in ANYWHERE)
    return debug, verbose, quiet, others


def _options_with_values(typed: list[str]) -> set[str]:
    """The options of the command on the line that take a value."""
    commands = typer.main.get_group(app).commands
    named = next((commands[one] for one in typed if one in commands), None)
    options = [] if named is None else named.params
    return {
        name for option in options if not getattr(option, "is_flag", True) for name in option.opts
    }


def _say_how_keys_are_set(option: str | None) -> None:
    """Explain overrides after an unknown option, which may be meant as a recipe key, as in other
    tools."""
    from lorakit.recipes.elsewhere import keys_called

    if option is not None and option.startswith("--"):
        name = option.strip("-").replace("-", "_")
        meant = next((found.nearest for found in keys_called(name)), None) or "train.max_steps"
        sys.stderr.write(f"Keys of a recipe are set without dashes, as {meant}=…\n")


def _stop(message: str) -> NoReturn:
    """Exit with one line, as fast as possible: nothing is imported for it."""
    sys.stderr.write(f"{message}\n")
    sys.exit(130)


def _fail(message: str, code: int) -> NoReturn:
    from rich.text import Text

    common.console(stderr=True, soft_wrap=True).print(
        Text("error: ", style="bold red").append(message, style="not bold default")
    )
    sys.exit(code)
