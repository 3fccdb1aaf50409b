"""The layout: scripts on top, then core/, model.py and lib/; each imports only from those below it."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, run

SCRIPTS = ("train_gpt2", "prepare_data", "sample", "export_hf", "bench", "plot_runs")
STORY = ["train_gpt2.py", "model.py", *(f"core/{name}.py" for name in (
    "config", "corpus", "dataset", "optim", "trainer", "evaluation", "checkpoint"))]
MODULES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
           for pattern in ("*.py", "core/**/*.py", "lib/**/*.py") for path in sorted(ROOT.glob(pattern))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LAYERS = ("lib", "model", "core", "scripts")  # from the lowest


def layer_of(module):
    top = module.split(".")[0]
    return LAYERS.index(top if top in LAYERS else "scripts")


def imports_of(name, tree):
    """The modules that a module imports, wherever in its code; ours by their full names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else node.module for member in members}
    return found


IMPORTS = {name: imports_of(name, tree) for name, tree in TREES.items()}
OURS = {name: found & MODULES.keys() for name, found in IMPORTS.items()}


def test_the_modules_are_those_of_the_design():
    assert {name for name in MODULES if layer_of(name) == LAYERS.index("scripts")} == {*SCRIPTS}
    assert {path.removesuffix(".py").replace("/", ".") for path in STORY} <= MODULES.keys()
    assert OURS["train_gpt2"] >= {"core.config", "core.trainer", "lib.cli", "model"}  # imports are found


def test_imports_go_downwards():
    upwards = [f"{name} imports {other}" for name, found in OURS.items() for other in found
               if layer_of(other) > layer_of(name)]
    assert upwards == []


def test_no_script_is_imported_and_none_imports_a_test():
    for name, found in IMPORTS.items():
        tops = {module.split(".")[0] for module in found}
        assert not tops & {*SCRIPTS, "tests", "helpers", "conftest"}, name


def test_there_are_no_cycles():
    tuple(TopologicalSorter(OURS).static_order())  # CycleError names one


def test_the_model_needs_torch_and_its_kernels_only():
    tops = {module.split(".")[0] for module in IMPORTS["model"]} - sys.stdlib_module_names
    assert tops == {"torch", "lib"} and OURS["model"] == {"lib.kernels"}


def test_tests_import_no_test():
    for path in sorted((ROOT / "tests").glob("*.py")):
        found = imports_of(path.name, ast.parse(path.read_text(encoding="utf-8")))
        assert not [module for module in found if module.startswith("test_")], path.name


def test_the_story_path_is_short():
    assert sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in STORY) <= 1700


@pytest.mark.parametrize("kinds, max_lines", [((ast.FunctionDef, ast.AsyncFunctionDef), 45), (ast.ClassDef, 150)])
def test_functions_and_classes_are_short(kinds, max_lines):
    lengths = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1
               for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)}
    assert {name: lines for name, lines in lengths.items() if lines > max_lines} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(tmp_path, script):
    process = run(f"{script}.py", "--help", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert f"{script}.py" in process.stdout and list(tmp_path.iterdir()) == []
