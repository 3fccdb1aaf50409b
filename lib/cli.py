"""What every script shares: errors a user can fix, exit codes, and parsers for bounded numbers."""

import argparse
import difflib
import errno
import io
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt), "high": ("<=", operator.le),
          "below": ("<", operator.lt)}
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
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a script and exit with the code it returns (None: 0). Text is UTF-8 on every system.

    A UserError becomes a line on stderr and exit code 2, Ctrl-C becomes 130. Any other exception is a
    bug and keeps its traceback.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # None if it was closed
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
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
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Keep Python's flush at exit from failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0  # the reader is gone (`| head`)
        if error.errno == errno.ENOSPC:
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
            code = 2
    sys.exit(code)


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `names`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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


def script_parser(script: str, doc: str, **options: object) -> argparse.ArgumentParser:
    """The argument parser of a script whose docstring is its help."""
    return argparse.ArgumentParser(prog=script, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter, **options)
