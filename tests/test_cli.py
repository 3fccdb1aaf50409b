import argparse
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from lib.cli import UserError, describe, is_plain_name, is_valid, nearest, number, parse_text, warn


def run_main(body, *argv, stdout=subprocess.PIPE, shell=None, **env):
    """Run a script whose main(argv) has this body, in `shell`'s command line if given; the finished process."""
    script = f"import sys\nfrom lib.cli import *\n\ndef main(argv):\n    {body}\n\nrun_script(main)\n"
    command = [sys.executable, "-c", script, *argv]
    if shell:
        command = ["sh", "-c", shell, "sh", *command]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, input="é\n".encode(), timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | env)


@pytest.mark.parametrize("body, code, message", [
    ("return None", 0, ""),
    ("return 3", 3, ""),
    ("sys.exit(5)", 5, ""),
    ("raise UserError('no file x: make one')", 2, "error: no file x: make one\n"),
    ("raise UserError('a is 3', 'b is 4')", 2, "error: 2 problems:\n  - a is 3\n  - b is 4\n"),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ("warn('careful')", 0, "warning: careful\n"),
])
def test_how_a_script_ends(body, code, message):
    process = run_main(body)
    assert (process.returncode, process.stderr.decode()) == (code, message)


@pytest.mark.parametrize("body, name", [("1 / 0", "ZeroDivisionError"), ("open('/nosuch')", "FileNotFoundError")])
def test_a_bug_keeps_its_traceback(body, name):
    process = run_main(body)
    assert process.returncode == 1 and b"Traceback" in process.stderr and name.encode() in process.stderr


def test_main_gets_the_arguments():
    assert run_main("print(argv)", "a", "--b=c", "--", "--d").stdout == b"['a', '--b=c', '--', '--d']\n"


def test_an_empty_value_that_argparse_would_drop_is_refused():
    process = run_main("print(argv)", "--name=--")
    assert (process.returncode, process.stderr) == (2, b"error: --name=--: a value cannot be '--'\n")


def test_text_is_utf_8_whatever_the_locale():
    process = run_main("print(sys.stdin.readline() + '\\xdf\\udcff')", LC_ALL="C", PYTHONUTF8="0",
                       PYTHONIOENCODING="ascii")
    assert (process.returncode, process.stdout, process.stderr) == (0, "é\nß".encode() + b"\xff\n", b"")


def test_a_closed_pipe_is_not_an_error():
    process = run_main("[print('line', n) for n in range(10**5)]", shell='"$@" | head -n 1; true')
    assert process.stdout == b"line 0\n" and process.stderr == b""
    process = run_main("[print('line', n) for n in range(10**5)]", shell='{ "$@"; echo $? >&2; } | head -n 1')
    assert process.stderr == b"0\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("body", ["print('x')", "[print('line', n) for n in range(10**5)]"])
def test_a_full_disk_under_the_output(body):
    with open("/dev/full", "wb") as full:
        process = run_main(body, stdout=full)
    assert process.returncode == 2
    assert process.stderr == b"error: cannot write the output: No space left on device\n"


def test_closed_stdout_is_not_an_error():
    process = run_main("print('x'); return 4", shell='"$@" >&-')
    assert (process.returncode, process.stderr) == (4, b"")


def test_user_errors_list_their_problems(capsys):
    assert str(UserError("a")) == "a" and str(UserError("a", "b")) == "2 problems:\n  - a\n  - b"
    assert UserError("a", "b").problems == ("a", "b")
    warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


@pytest.mark.parametrize("name, words", [
    ("lerning_rate", " (did you mean learning_rate?)"), ("learning_rate", " (did you mean learning_rate?)"),
    ("n_hed", " (did you mean n_head?)"), ("quux", ""), ("", ""),
])
def test_the_nearest_name(name, words):
    assert nearest(name, ["learning_rate", "n_head", "n_layer"]) == words
    assert nearest(name, []) == ""


@pytest.mark.parametrize("name, plain", [
    ("tiny", True), ("my run 2", True), ("a.b", True), ("größe", True), ("", False), (".", False), ("..", False),
    (".hidden", False), ("a/b", False), ("/a", False), ("a/", False), ("a\nb", False), ("a\0", False),
    ("x" * 199, True), ("x" * 200, False), ("ß" * 100, False),
])
def test_plain_names(name, plain):
    assert is_plain_name(name) == plain


@pytest.mark.parametrize("kind, text, value", [
    (int, "3", 3), (int, "-3", -3), (int, "3.0", "3.0"), (int, "", ""), (float, "1e-3", 1e-3), (float, "3", 3.0),
    (float, "x", "x"), (bool, "True", True), (bool, "false", False), (bool, "1", "1"), (str, "3", "3"),
])
def test_text_is_parsed_or_left_unchanged(kind, text, value):
    assert parse_text(kind, text) == value and type(parse_text(kind, text)) is type(value)


@pytest.mark.parametrize("value, kind, limits, valid", [
    (1, int, dict(low=1), True), (0, int, dict(low=1), False), (5, int, dict(high=5), True),
    (6, int, dict(high=5), False), (5, int, dict(below=5), False), (0.0, float, dict(above=0), False),
    (1e-9, float, dict(above=0, below=1), True), (1.0, float, dict(above=0, below=1), False),
    (True, int, {}, False), (1, float, {}, False), (1.0, int, {}, False), ("1", int, dict(low=0), False),
    (float("nan"), float, {}, False), (float("-inf"), float, {}, False), (2**32, int, {}, True),
    (2**32 + 1, int, {}, False), (-(2**32) - 1, int, {}, False), ("a", str, dict(choices=("a", "b")), True),
    ("c", str, dict(choices=("a", "b")), False), (None, str, {}, False),
])
def test_values_within_bounds(value, kind, limits, valid):
    assert is_valid(value, kind, **limits) == valid


@pytest.mark.parametrize("kind, limits, words", [
    (int, {}, "an int <= 4294967296"), (int, dict(low=1), "an int >= 1 and <= 4294967296"),
    (int, dict(low=1, below=9), "an int >= 1 and < 9"),
    (float, dict(above=0, below=1), "a finite float > 0 and < 1"),
    (float, dict(low=0, high=2), "a finite float >= 0 and <= 2"), (str, {}, "a string"), (bool, {}, "true or false"),
    (str, dict(choices=("gelu", "swiglu")), "one of gelu, swiglu"),
])
def test_bounds_in_words(kind, limits, words):
    assert describe(kind, **limits) == words


def test_numbers_on_a_command_line():
    assert number(int, low=0)("0") == 0 and number(float, above=0)("1e-9") == 1e-9
    for kind, limits, text in ((int, dict(low=0), "-1"), (int, {}, "1.5"), (float, {}, "nan"), (float, {}, "x")):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            number(kind, **limits)(text)
        assert str(refused.value) == f"must be {describe(kind, **limits)}, not {text!r}"
