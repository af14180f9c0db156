"""The command line. A verb is a file of this folder with one function of the verb's name, listed in `VERBS`.

Files of verbs import nothing heavy at the top, so that `--help` answers at once. Exit codes: 0 success; 1 an error, with one
message on standard error; 2 bad arguments; 130 interrupted.
"""

import logging
import os
import sys
import tempfile
import time
import traceback
from importlib import import_module
from typing import Annotated

import typer

from oribi.cli.help import SettingsCommand, keys_by_group
from oribi.cli.output import complain, lasting_output
from oribi.errors import EndedElsewhere, OribiError
from oribi.launch import is_launched
from oribi.quiet import ADVISER
from oribi.text import LastingStream, is_first_process, printable

VERBS = (
    "init", "convert", "inspect", "estimate", "train", "watch", "chat", "eval", "export", "verify", "doctor", "selftest", "demo",
    "help",
)  # fmt: skip
STOPPED = 130
CAUSE_SECONDS = 3.0  # until a process says an error that another is likely to say better
# these verbs take every setting as a flag, and the config checks their names
FREE_FLAGS = {
    verb: {"allow_extra_args": True, "ignore_unknown_options": True} for verb in ("train", "estimate")
}


def show_version(asked: bool) -> None:
    """Answer --version."""
    if asked:
        from oribi import __version__

        typer.echo(f"oribi {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """QLoRA fine-tuning of language models: fast, lean, and checked against references."""


def build_command() -> typer.Typer:
    """The command with all its verbs."""
    # boxes are for terminals; a standard output that is closed is None
    markup = "rich" if LastingStream(lambda: sys.stdout).isatty() else None
    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=markup,
        context_settings={"help_option_names": ["--help", "-h"]},
    )  # fmt: skip
    app.callback()(options)
    for verb in VERBS:
        module = import_module(f"oribi.cli.{verb}")
        if hasattr(module, "app"):
            module.app.rich_markup_mode = markup
            app.add_typer(module.app, name=verb)
        else:
            takes_keys = verb in FREE_FLAGS
            app.command(
                name=verb,
                context_settings=FREE_FLAGS.get(verb),
                cls=SettingsCommand if takes_keys else None,
                epilog=keys_by_group() if takes_keys else None,
            )(getattr(module, verb))
    return app


class ToStderr(logging.Handler):
    """Messages of oribi's modules as plain lines on standard error, wherever it currently leads."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(printable(f"oribi: {self.format(record)}"), err=True)


def set_up_logging() -> None:
    """Show oribi's own messages, and hide one of bitsandbytes'."""
    log = logging.getLogger("oribi")
    # of several processes, only the first speaks
    log.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    if not any(isinstance(handler, ToStderr) for handler in log.handlers):
        log.addHandler(ToStderr())
    logging.getLogger(ADVISER).setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; an expected error is one message without a traceback."""
    # the next file to be opened would take the number of a closed stream (`>&-`)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with lasting_output():
        set_up_logging()
        sys.exit(_run(_words(sys.argv[1:])))


def _words(given: list[str]) -> list[str]:
    """`oribi help`, `oribi help VERB` and `oribi version` as the options of these names."""
    if given[:1] == ["help"] and (len(given) == 1 or given[1] in VERBS):
        return [*given[1:], "--help"]
    return ["--version"] if given == ["version"] else given


def _run(words: list[str]) -> int | str | None:
    try:
        build_command()(words, prog_name="oribi")
    except OribiError as error:
        _let_the_cause_speak(error)
        complain(str(error))
    except SystemExit as ended:
        if ended.code != STOPPED:
            return ended.code
        typer.echo("stopped", err=True)  # typer exits with the code, but prints nothing
        return STOPPED
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        return STOPPED
    except OSError as error:  # a disk or a right that no verb foresaw
        complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        complain(_unexpected(error))
    else:
        return 0
    return 1


def _let_the_cause_speak(error: OribiError) -> None:
    """Of several processes that fail together, the launcher ends the others when the one that knows why has said it."""
    if isinstance(error, EndedElsewhere):
        time.sleep(2 * CAUSE_SECONDS)
    elif is_launched() and not is_first_process():  # most often the first fails alike
        time.sleep(CAUSE_SECONDS)


def _unexpected(error: Exception) -> str:
    """The message for an unexpected error; its traceback goes into a file."""
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for a message
        return f"{error}\nEnd other programs on the GPU, or let `oribi estimate` show what fits"
    what = f"this is a bug in oribi, or in a library that it calls: {type(error).__name__}: {error}"
    trace = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="oribi-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(trace)
    except OSError:
        return f"{trace}\n{what}"
    return f"{what}\nThe traceback is in {file.name}; please report it with the output of `oribi doctor`."
