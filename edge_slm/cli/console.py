"""Shared by all subcommands: the group that reports errors, and the two streams.

Results go to stdout. Progress, statistics and errors go to stderr: a progress bar on a
terminal, otherwise a line every 10 seconds. An error is one line, `error[code]: problem (hint)`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import click

from edge_slm_runtime.errors import EdgeSlmError, RequestNotText, RequestTooLong
from edge_slm_runtime.files import LONGEST_LINE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from edge_slm.progress import StageProgress

EXIT_CODES = """\b
Exit codes:
    0  done
    1  any other failure, such as a full disk or a closed pipe
    2  wrong use of the command line
    3  a request or setting that cannot be honoured
    4  a bundle that is missing, altered or not a bundle
    5  an engine, a variant or an extra that is not there
    6  a checkpoint that cannot be converted
    7  a variant outside its budget
    8  training or batch data that cannot be used
    9  an output that exists already
   10  a teacher or judge that does not answer
   11  a benchmark that became worse (bench --compare)
   12  what does not fit into the memory
   13  a batch of which every line failed (any, with batch --strict)
  130  interrupted with Ctrl-C
"""

EXAMPLES = """\b
Examples:
  edge-slm demo
  edge-slm generate "a red fox in the snow" --task image --words 24
  edge-slm batch requests.csv --task image -o prompts.jsonl
"""
_EVERY = 10.0  # seconds between two lines of progress

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def examples(*commands: str) -> str:
    """The epilog of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  edge-slm {command}" for command in commands)


class Commands(click.Group):
    """A group whose failures are one line on stderr and a documented exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        _prepare_streams()
        click_main: Any = super().main  # its overloads have no *args
        if not extra.pop("standalone_mode", True):
            return click_main(*args, **extra, standalone_mode=False)
        try:
            code = click_main(*args, **extra, standalone_mode=False)
            sys.stdout.flush()
        except EdgeSlmError as error:
            fail(error.code, str(error), error.exit_code)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:  # click ≥ 8.2
            click.echo(error.ctx.get_help())
            sys.exit(2)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "edge-slm"
            problem = error.format_message().rstrip(".")
            fail("usage", f"{problem} (see '{where} --help')", error.exit_code)
        except click.ClickException as error:
            fail("usage", error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt) as error:
            hint = str(error.__cause__ or error)  # click raises its Abort from it
            fail("interrupted", f"stopped by Ctrl-C{f' ({hint})' if hint else ''}", 130)
        except BrokenPipeError:  # the reader of stdout has closed it
            _discard_stdout()
            sys.exit(1)
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:  # it was stdout: Python would fail once more at exit
                _discard_stdout()
            fail("os", f"{error.strerror or error}: {error.filename or 'input or output'}", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Output that never fails for want of a character or of a stream.

    What the encoding lacks is written as an escape. Without the streams (a closed one, a
    program without a terminal) their numbers would go to the next files that are opened.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# All control characters but tab and line feed, among them the escapes that move the cursor or
# set the title; halves of characters; what turns the direction of text around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Foreign text for a terminal: names and texts of a bundle must not control it."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def fail(code: str, message: str, exit_code: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    with suppress(OSError):  # stderr is closed
        click.echo(f"error[{code}]: {printable(' '.join(message.split()))}", err=True)
    sys.exit(exit_code)


def note(message: str) -> None:
    """One dim line on stderr (plain when stderr is no terminal)."""
    click.secho(printable(message), dim=True, err=True)


def warn(message: str) -> None:
    """One line on stderr."""
    click.echo(f"warning: {printable(message)}", err=True)


def say(text: str) -> None:
    """A line on stdout for people to read."""
    click.echo(printable(text))


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON that any output can have: characters are escaped which its encoding lacks, and
    those that a terminal obeys."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(data, ensure_ascii=not utf8, indent=indent)
    return re.sub(
        "[\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]",
        lambda found: f"\\u{ord(found[0]):04x}",
        text,
    )


def emit_json(data: Any) -> None:
    """The result of a command as JSON on stdout."""
    click.echo(json_text(data, indent=2))


def stdout_console() -> Console:
    """For tables: as wide as the terminal, or wide enough when written to a file."""
    console = _console()
    if not console.is_terminal:
        console.width = 160
    return console


def _console(**settings: Any) -> Console:
    """A console whose output is `printable`, but for the styles that are its own."""
    from rich.console import Console
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                text, style, control = segment
                yield segment if control else Segment(printable(text), style)

    return PrintableConsole(highlight=False, **settings)


@contextmanager
def progress_bar(visible: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr; if that is no terminal, a line when 10 seconds have passed."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class ProgressLines(Progress):
        """Lines instead of a bar."""

        said = time.monotonic()

        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            self._say(task_id)

        def advance(self, task_id: TaskID, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self._say(task_id)

        def _say(self, task_id: TaskID) -> None:
            if not visible or time.monotonic() - self.said < _EVERY:
                return
            self.said = time.monotonic()
            task = next(task for task in self.tasks if task.id == task_id)
            of = f"/{task.total:.0f}" if task.total else ""
            note(f"{task.description} {task.completed:.0f}{of}")

    console = _console(stderr=True)
    kind = Progress if console.is_terminal else ProgressLines
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with kind(*columns, console=console, disable=not (visible and console.is_terminal)) as progress:
        yield progress


@contextmanager
def reporter() -> Iterator[StageProgress]:
    """A bar per stage on a terminal, otherwise a line per stage and 10 seconds."""
    with progress_bar() as bar:
        stages: dict[str, TaskID] = {}
        lines: dict[str, float] = {}

        def report(stage: str, done: int, total: int, remark: str = "") -> None:
            if bar.disable:
                now = time.monotonic()
                if done >= total or now - lines.get(stage, -_EVERY) >= _EVERY:
                    lines[stage] = now
                    click.echo(f"{stage} {done}/{total} {remark}".rstrip(), err=True)
                return
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total)
            bar.update(
                stages[stage], completed=done, total=total, description=f"{stage} {remark}".rstrip()
            )

        yield report


def read_request(argument: str) -> str:
    """The request itself, or all of stdin for `-`. Raises RequestNotText, RequestTooLong."""
    if argument != "-":
        return argument
    content = sys.stdin.buffer.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        raise RequestTooLong(f"stdin holds more than {LONGEST_LINE >> 20} MiB", "shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestNotText(
            f"stdin is not valid UTF-8 at byte {error.start}", "convert it to UTF-8"
        ) from None


def human_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
