"""What can be said of systems and versions that are not at hand."""

import re
import subprocess
import sys
import tomllib

from helpers import ONE_THREAD, ROOT

from lib.cli import OLDEST_PYTHON

WORKFLOW = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
# Makes this system look like Windows to Python code that asks for these modules and names.
AS_ON_WINDOWS = """
import asyncio, os, signal, sys  # asyncio asks POSIX systems for what is deleted here
for name in ("fcntl", "pty", "readline", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
for name in ("fork", "sysconf", "mkfifo"):
    delattr(os, name)
"""


def test_the_workflow_does_what_ci_does():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    steps = [line for line in script if re.match("pip|ruff|python -m", line)]
    assert len(steps) == 5 and re.findall(r"run: (.*)", WORKFLOW) == steps
    versions = re.search(r"python: \[(.*)\]", WORKFLOW)[1].replace('"', "").split(", ")
    assert versions[0] == ".".join(map(str, OLDEST_PYTHON)) and "secrets" not in WORKFLOW.split("jobs:")[1]


def test_the_oldest_python_is_named_alike():
    oldest = ".".join(map(str, OLDEST_PYTHON))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"Python {oldest} to 3.14" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_run_where_posix_names_are_missing(tmp_path, tiny_args):
    """Train, resume, sample and plan without the modules, signals and functions that Windows lacks."""
    def run_as_on_windows(script, *args):
        code = f"{AS_ON_WINDOWS}\nimport runpy\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
        process = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True,
                                 env=ONE_THREAD | {"PYTHONPATH": str(ROOT)}, timeout=120)
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert "peak     expected" in run_as_on_windows("train_gpt2.py", *tiny_args, "--plan")
    run_as_on_windows("train_gpt2.py", *tiny_args, "--max_iters=6")
    assert "finished at step 12" in run_as_on_windows("train_gpt2.py", *tiny_args, "--resume")
    assert len(run_as_on_windows("sample.py", "--max_new_tokens=20")) > 20
