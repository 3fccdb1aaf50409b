import argparse
import errno
import json
import os
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from lib.cli import (
    UserError,
    command_line,
    describe,
    first_line,
    is_plain_name,
    is_valid,
    json_line,
    nearest,
    number,
    parse_text,
    plural,
    read_flags,
    reader_is_gone,
    run_script,
    warn,
)


def run_main(body, *argv, stdout=subprocess.PIPE, shell=None, options="", **env):
    """Run a script whose main(argv) has this body, in `shell`'s command line if given; the finished process."""
    script = f"import sys\nfrom lib.cli import *\n\ndef main(argv):\n    {body}\n\nrun_script(main{options})\n"
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
    ("raise OSError(errno.ENAMETOOLONG, 'too long', 'aaa')", 2, "error: too long: aaa\n"),
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


def test_no_file_takes_the_place_of_a_closed_stream():
    process = run_main("print(open('/dev/null').fileno() > 2, file=sys.stderr)", shell='"$@" <&- >&-')
    assert process.stderr == b"True\n"


def test_closed_stdout_is_not_an_error():
    process = run_main("print('x'); return 4", shell='"$@" >&-')
    assert (process.returncode, process.stderr) == (4, b"")


MANY_LINES = "[print('line', n) for n in range(10**5)]; print('done', file=sys.stderr); return 4"


@pytest.mark.parametrize("shell, error", [
    ('{ "$@"; echo $? >&2; } | head -n 1', "Broken pipe"), ('"$@" > /dev/full; echo $? >&2', "No space left on device"),
])
def test_a_script_can_outlive_its_output(shell, error):
    process = run_main(MANY_LINES, shell=shell, options=", outlives_output=True")
    assert process.stdout in (b"", b"line 0\n")
    assert process.stderr.decode() == f"warning: standard output is lost ({error}); continuing without it\ndone\n4\n"


@pytest.mark.parametrize("shell", [
    '{ "$@" 2>&1; echo $? > code; } | head -n 1', '"$@" > /dev/full 2>&1; echo $? > code',
    '"$@" >&- 2>&-; echo $? > code',
])
def test_a_script_can_outlive_both_its_outputs(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = run_main(MANY_LINES, shell=shell, options=", outlives_output=True")
    assert (process.stdout in (b"", b"line 0\n"), process.stderr) == (True, b"")
    assert (tmp_path / "code").read_text() == "4\n"


def test_user_errors_list_their_problems(capsys):
    assert str(UserError("a")) == "a" and str(UserError("a", "b")) == "2 problems:\n  - a\n  - b"
    assert UserError("a", "b").problems == ("a", "b")
    assert first_line(ValueError("a\nb")) == "a" and first_line(ValueError()) == "ValueError"
    assert first_line(RuntimeError("Error(s) in x:\n\ty is missing\nz")) == "Error(s) in x: y is missing"
    warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


@pytest.mark.parametrize("argv, expected", [
    (["a.py", "--n=3", "--on", "--m", "4"], (["a.py"], {"n": "3", "on": "true", "m": "4"}, [])),
    (["--on", "b.py", "--on", "false", "--n", "1", "--n=2"], (["b.py"], {"on": "false", "n": "2"}, [])),
    (["--n", "--m="], ([], {"m": ""}, ["--n needs a value"])),
    (["--k=1", "--onn", "x"], ([], {}, ["unknown flag --k", "unknown flag --onn (did you mean on?)"])),
    ([""], ([""], {}, [])),
])
def test_flags_in_both_forms(argv, expected):
    assert read_flags(argv, ["n", "m", "on"], ["on"]) == expected


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


def test_plurals():
    assert [plural(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert [plural(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]


@pytest.mark.parametrize("text, line", [("日\n☃é", '["日\\n☃é"]'), ("é\udcff", '["\\u00e9\\udcff"]')])
def test_json_keeps_characters_that_utf8_has(text, line):
    assert json_line([text]) == line and json.loads(line) == [text]


def test_a_command_line_is_quoted_for_its_shell(monkeypatch):
    words = ["sample.py", "--ckpt", "a b\\c"]
    assert shlex.split(command_line(words)) == words
    monkeypatch.setattr("lib.cli.os.name", "nt")
    line = command_line(words)
    monkeypatch.undo()
    assert line == 'sample.py --ckpt "a b\\c"'  # cmd.exe knows no single quotes


@pytest.mark.parametrize("error, system, gone", [
    (OSError(errno.EPIPE, ""), "posix", True), (OSError(errno.EINVAL, ""), "posix", False),
    (OSError(errno.EINVAL, ""), "nt", True), (OSError(errno.EINVAL, "", "a?b"), "nt", False),
])
def test_a_reader_that_is_gone(monkeypatch, error, system, gone):
    monkeypatch.setattr("lib.cli.os.name", system)
    is_gone = reader_is_gone(error)
    monkeypatch.undo()
    assert is_gone is gone


def test_text_is_utf8_whatever_the_system_says():
    process = run_main("print('日'); warn('日 \\udcff')", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert (process.stdout, process.stderr) == ("日\n".encode(), "warning: 日 \\udcff\n".encode())


def test_an_old_python_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("lib.cli.OLDEST_PYTHON", (9, 1))
    with pytest.raises(SystemExit) as stop:
        run_script(lambda argv: None)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: Python 9.1 or newer is needed, this is 3.")


def test_training_alone_needs_no_torch_distributed():
    """As in a torch that is built without it: the module is there, its names are not."""
    code = ("import torch.distributed as dist\n"
            "for name in ('Work', 'Store', 'TCPStore', 'ReduceOp'): delattr(dist, name)\n"
            "import train_gpt2; from lib.cli import run_script; run_script(train_gpt2.main)")
    process = subprocess.run([sys.executable, "-c", code, "--plan=no"], cwd=ROOT, capture_output=True, text=True,
                             timeout=120)
    assert process.returncode == 2 and "--plan stands alone" in process.stderr, process.stderr
