"""Tables of what there is: data sets and runs, prepared, missing or damaged."""

import os
import re
import shutil
import time

import pytest
from helpers import assert_refused, flip_bit, run, trained, whole_content

from core.checkpoint import save_checkpoint, step_path
from core.listing import age, datasets_table, runs_table, table
from lib.cli import UserError


def cells(line):
    return re.split(r"  +", line.strip())


def test_columns_line_up():
    assert table([("name", "n", "note"), ("a", "1,000", "x"), ("longer", "1", "")]) == (
        "name        n  note\na       1,000  x\nlonger      1")


def test_datasets(tmp_path, data_dir):
    shutil.copytree(data_dir / "tiny", tmp_path / "data/tiny")
    shutil.copytree(data_dir / "tiny", tmp_path / "data/cut")
    os.truncate(tmp_path / "data/cut/val.bin", 100)
    shutil.copytree(data_dir / "tiny", tmp_path / "data/headless")
    (tmp_path / "data/headless/meta.json").unlink()
    (tmp_path / "data/downloads").mkdir()
    before = sorted(tmp_path.rglob("*"))
    process = run("prepare_data.py", "--list", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    header, *rows = map(cells, process.stdout.splitlines())
    assert header == ["name", "tokenizer", "symbols", "train tokens", "val tokens", "MB", "state"]
    rows = {name: rest for name, *rest in rows}
    assert list(rows) == ["pydoc", "shakespeare", "shakespeare_char", "cut", "headless", "tiny"]
    assert rows["tiny"] == ["char", "76", "10,800", "1,200", "0.03", "prepared"]
    assert rows["shakespeare"] == ["gpt2", *"----", "not prepared: python prepare_data.py shakespeare"]
    assert "val.bin has 100 bytes" in rows["cut"][-1] and "no meta.json" in rows["headless"][-1]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    assert_refused(run("prepare_data.py", "pydoc", "--list", cwd=tmp_path), "--list stands alone")
    assert len(datasets_table(tmp_path / "nosuch").splitlines()) == 4


def test_runs(tmp_path, tiny_args):
    trained(tmp_path, tiny_args, "--max_iters=1", "--eval_interval=9", name="old")
    content, _ = trained(tmp_path, tiny_args)
    runs = tmp_path / "checkpoints"
    for path in (runs / "old").glob("*.pt"):
        os.utime(path, (time.time() - 7300,) * 2)
    step_path(runs / "tiny", 13).write_bytes(b"PK")
    (runs / "lost").mkdir()
    (runs / "lost/best.pt").write_bytes(b"PK")
    (runs / "empty").mkdir()
    os.utime(runs / "lost/best.pt", (0, 0))
    process = run("sample.py", "--list", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    header, newest, old, lost = map(cells, process.stdout.splitlines())
    assert header == ["run", "step", "best val loss", "data", "written"]
    best = f"{content['best_val_loss']:.4f} at {content['best_step']}"
    assert newest[:-1] == ["tiny", "12 of 12", best, "tiny", "just now"]
    assert newest[-1].startswith("checkpoint checkpoints/tiny/step_00000013.pt is damaged")
    assert old[:2] == ["old", "1 of 1"] and old[3:] == ["tiny", "2 hours ago"]
    assert lost[:4] == ["lost", "-", "-", "-"] and "lost/best.pt is damaged" in lost[-1]
    assert_refused(run("sample.py", "--list", "--ckpt", "data", cwd=tmp_path), "no runs in data: train first")
    one = run("sample.py", "--list", "--ckpt", "checkpoints/old", cwd=tmp_path)
    assert cells(one.stdout.splitlines()[1])[:2] == old[:2], one.stderr


def test_weights_are_not_read(tmp_path):
    (tmp_path / "r").mkdir()
    save_checkpoint(step_path(tmp_path / "r", 1), whole_content(1))
    flip_bit(step_path(tmp_path / "r", 1), b"\x00\x00\x80\x3f" * 50)  # 1.0: in the weights
    assert cells(runs_table(tmp_path).splitlines()[1])[:3] == ["r", "1", "-"]


def test_a_run_that_prunes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    for step in (1, 2):
        save_checkpoint(step_path(tmp_path / "r", step), whole_content(step))
    monkeypatch.setattr("core.listing.newest_first", lambda run_dir: [step_path(run_dir, step) for step in (3, 2, 1)])
    assert cells(runs_table(tmp_path).splitlines()[1])[:2] == ["r", "2"]
    monkeypatch.setattr("core.listing.newest_first", lambda run_dir: [])
    with pytest.raises(UserError, match="no runs"):
        runs_table(tmp_path)


@pytest.mark.parametrize("seconds, words", [
    (0, "just now"), (59, "just now"), (-5, "just now"), (60, "1 minute ago"), (7199, "1 hour ago"),
    (49 * 3600, "2 days ago"),
])
def test_ages_in_words(monkeypatch, seconds, words):
    monkeypatch.setattr("core.listing.time.time", lambda: 1e9)
    assert age(1e9 - seconds) == words
