"""The README tells of what is there."""

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)\.py` \|", README.split("## Configs")[1], re.MULTILINE))
    assert rows == {path.stem for path in ROOT.glob("configs/*.py")}


def test_every_module_is_named():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|notes)/\w+\.(?:py|md)", README))))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()
