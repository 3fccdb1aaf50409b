"""What every script shares: errors a user can fix, exit codes, and parsers for bounded numbers."""

import argparse
import difflib
import errno
import functools
import io
import json
import math
import operator
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TextIO

BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt), "high": ("<=", operator.le),
          "below": ("<", operator.lt)}
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
OLDEST_PYTHON = (3, 11)
MAX_INT = 2**32  # in size; larger numbers are typing mistakes


class UserError(Exception):
    """Problems the user can fix. Each is a line that says what is wrong, where, and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, with the next one after a heading; its type where it has none."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.rstrip().endswith(":") else first


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class LastingStream:
    """A text stream that outlives its reader: what can no longer be written is dropped, with one warning."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable, *args: object) -> None:
        try:
            action(*args)
        except OSError as error:  # the reader is gone, the disk is full, the terminal has hung up
            discard_writes(self._stream)
            warn(f"{self._name} is lost ({error.strerror}); continuing without it")


def reader_is_gone(error: OSError) -> bool:
    """Whether `error` is that of writing to a pipe whose reader has ended."""
    return error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL and error.filename is None)


def discard_writes(stream: TextIO) -> None:
    """Let all that is written to `stream` from now on, including what it has buffered, disappear."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def run_script(main: Callable[[list[str]], int | None], outlives_output: bool = False) -> None:
    """Run `main(argv)` as a script and exit with the code it returns (None: 0). Text is UTF-8 on every system.

    A UserError or a file name that is too long becomes a line on stderr and exit code 2, Ctrl-C becomes 130.
    Output that cannot be written ends the script, silently if its reader is gone (`| head`), unless it
    `outlives_output`. Any other exception is a bug and keeps its traceback.
    """
    # No file may be opened under the number of a closed stdin, stdout or stderr.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it was closed
            stream.reconfigure(encoding="utf-8", errors=stream.errors if stream is sys.stderr else "surrogateescape")
    if outlives_output:
        sys.stdout = sys.stdout and LastingStream(sys.stdout, "standard output")
        sys.stderr = sys.stderr and LastingStream(sys.stderr, "standard error")
    try:
        if sys.version_info < OLDEST_PYTHON:
            raise UserError(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, this is {sys.version[:6]}")
        if empty := [word for word in sys.argv[1:] if re.fullmatch(r"--\w+=--", word)]:
            raise UserError(f"{empty[0]}: a value cannot be '--'")  # argparse before Python 3.13 drops it
        code = main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        code = 2
        if error.errno == errno.ENAMETOOLONG:  # only the user gives such names
            print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
        elif error.errno in NO_ROOM:
            discard_writes(sys.stdout)  # Python's flush at exit would fail again
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        elif reader_is_gone(error):  # `| head`
            discard_writes(sys.stdout)
            code = 0
        else:
            raise
    sys.exit(code)


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `names`, or '' when none is close."""
    by_lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


def command_line(words: Sequence[str]) -> str:
    """Words as they are typed in the system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def plural(n: int, noun: str, nouns: str | None = None) -> str:
    """'1 step', '2,000 steps'; `nouns` where an s does not make the plural."""
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}"


def json_line(content: object) -> str:
    """`content` as one line of JSON, with characters as they are, or all of them escaped where UTF-8 lacks one."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a surrogate, as in file names that are not UTF-8
        return json.dumps(content)
    return line


def is_plain_name(name: str) -> bool:
    """Whether `name` can name one directory: no separators, not hidden, printable, not too long."""
    return name == Path(name).name and not name.startswith(".") and name.isprintable() and 0 < len(name.encode()) < 200


def parse_text(kind: type, text: str) -> object:
    """`text` parsed as int, float or bool, or unchanged if it cannot be."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        return text


def is_valid(value: object, kind: type, choices: tuple[str, ...] | None = None, **bounds: float) -> bool:
    """Whether `value` is of type `kind`, finite, one of `choices` and within `bounds` (keys of BOUNDS)."""
    return (type(value) is kind and (kind is not float or math.isfinite(value))
            and (kind is not int or abs(value) <= MAX_INT) and (choices is None or value in choices)
            and all(BOUNDS[key][1](value, limit) for key, limit in bounds.items()))


def describe(kind: type, choices: tuple[str, ...] | None = None, **bounds: float) -> str:
    """The valid values in words: 'a finite float >= 0', 'one of gelu, swiglu'."""
    if choices:
        return "one of " + ", ".join(choices)
    words = {int: "an int", float: "a finite float", str: "a string", bool: "true or false"}[kind]
    if kind is int and not {"high", "below"} & bounds.keys():
        bounds["high"] = MAX_INT
    limits = [f"{BOUNDS[key][0]} {limit}" for key, limit in bounds.items()]
    return " ".join([words, " and ".join(limits)]).strip()


def number(kind: type, **bounds: float) -> Callable[[str], object]:
    """An argparse `type` for an int or float within `bounds` (keys of BOUNDS)."""
    def parse(text: str) -> object:
        value = parse_text(kind, text)
        if not is_valid(value, kind, **bounds):
            raise argparse.ArgumentTypeError(f"must be {describe(kind, **bounds)}, not {text!r}")
        return value

    return parse


def read_flags(argv: Sequence[str], names: Collection[str],
               switches: Collection[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """(arguments, {name: text}, problems) of a command line with flags `--name=text` or `--name text`.

    The `names` that are `switches` may stand alone, for "true". Of a repeated flag the last one counts.
    """
    arguments, texts, problems = [], {}, []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            arguments.append(token)
            continue
        name, equals, text = token[2:].partition("=")
        if name not in names:
            problems.append(f"unknown flag --{name}{nearest(name, names)}")
        is_switch = name in switches
        follows = tokens and (tokens[0].lower() in ("true", "false") if is_switch else not tokens[0].startswith("--"))
        if not equals and follows:
            equals, text = True, tokens.pop(0)
        elif not equals and is_switch:
            equals, text = True, "true"
        if name in names and equals:
            texts[name] = text
        elif name in names:
            problems.append(f"--{name} needs a value")
    return arguments, texts, problems


def script_parser(script: str, doc: str, **options: object) -> argparse.ArgumentParser:
    """The argument parser of a script whose docstring is its help."""
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    return argparse.ArgumentParser(prog=script, description=doc, allow_abbrev=False, formatter_class=formatter,
                                   **options)
