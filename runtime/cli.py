"""The command line: which commands there are, and how each of them may fail.

Results go to standard output, progress to standard error. Exit codes: 0; 2, with one line on standard error, for
whatever a user got wrong; 130 when interrupted; 1 when the reader of the output is gone.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .commands import adapters, bench, demo, doctor, export, generate, serve, subjects, tune
from .commands.output import note, say
from .core import StylemuseError, UnreadWarning, unknown

# typer brings its own click since 0.26 and uses the installed one before; both call it ClickException.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    help="Draw in many styles at once: StyleDrop on masked generative transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("tune")(tune.tune)
app.add_typer(adapters.app, name="adapters")
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("subjects")(subjects.subjects)
app.command("doctor")(doctor.doctor)
app.command(
    "bench", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(bench.bench)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"stylemuse {version('stylemuse')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default, and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # libraries warn their callers, and that is us
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UnreadWarning)
            warnings.showwarning = _warn
            code = typer.main.get_command(app).main(given, prog_name="stylemuse", standalone_mode=False)
        if sys.stdout is not None:  # it is None where it was closed before we began
            sys.stdout.flush()
    except StylemuseError as error:
        return _refuse(str(error))
    except _UsageError as error:
        return _refuse(_usage(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        _drop_output()
        return 1 if isinstance(error, BrokenPipeError) else _refuse(f"{error.filename or 'output'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in _MEMORY)):
            raise
        return _refuse("out of memory; draw fewer or smaller pictures at once")
    return code if isinstance(code, int) else 0


_MEMORY = ("out of memory", "allocate memory")
"""What torch's errors say, on a GPU and on a CPU."""


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    note(str(message))


def _refuse(message: str) -> int:
    note(message)
    return 2


def _usage(error: Any) -> str:
    """typer's message, and where it doesn't say what is allowed, that too."""
    message = error.format_message().rstrip(".")
    command: Any = getattr(getattr(error, "ctx", None), "command", None)
    if type(error).__name__ == "NoSuchOption" and command is not None:
        names = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
        return unknown("option", error.option_name, [*names, "--help"], len(names) + 1)
    if hasattr(command, "commands") and (given := re.fullmatch(r"No such command '(.*)'", message)):
        return unknown("command", given[1], command.commands)
    if hasattr(command, "commands"):
        return f"{message}; allowed: {', '.join(command.commands)}"
    if message.startswith("Got unexpected extra argument"):
        return f"{message}; a text of several words needs quotes"
    return str(message)


def _drop_output() -> None:
    """Send what is left in standard output's buffer nowhere, or the interpreter complains when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # standard output isn't a file here
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
