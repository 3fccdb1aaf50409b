"""The README describes what exists."""

import ast
import re

import pytest
from helpers import ROOT, section

README = (ROOT / "README.md").read_text(encoding="utf-8")
STORY = ["train_gpt2.py", "model.py", *(f"core/{name}.py" for name in (
    "config", "corpus", "dataset", "trainer", "optim", "evaluation", "checkpoint"))]


def test_every_config_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)\.py` \|", section(README, "## Configs and their results"), re.MULTILINE))
    assert rows == {path.stem for path in ROOT.glob("configs/*.py")}


def test_every_module_is_named():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("core/*.py"), *ROOT.glob("lib/*.py")):
        assert f"`{path.relative_to(ROOT)}`" in README or path.name == "__init__.py"


def test_the_story_path_is_named_in_order():
    story = re.search(r"read these nine files in this order.*?\. A new", README, re.DOTALL)[0]
    assert re.findall(r"`([\w/]+\.py)`", story) == STORY


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|notes|core|lib)/\w+\.(?:py|md)", README))))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()


def printed_by(tree):
    """The texts in a module's code, with … for what is inserted into them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_in_the_troubleshooting_note_exist():
    code = "\n".join(text for path in (*ROOT.glob("*.py"), *ROOT.glob("core/*.py"), *ROOT.glob("lib/*.py"))
                     for text in printed_by(ast.parse(path.read_text(encoding="utf-8"))))
    note = (ROOT / "notes/10_troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", note, re.MULTILINE)
    assert len(messages) > 25
    for message in messages:
        pieces = [re.escape(piece) for piece in message.split("…")]
        assert max(map(len, pieces)) > 5 and re.search(".*?".join(pieces), code), message
