"""metrics.jsonl: written, resumed, read; and what nanoGPT prints, read."""

import json
import math

import pytest
from helpers import files_up_to

from core.metrics import MetricsFile, read_history
from lib.cli import UserError

CONFIG = {"learning_rate": 1e-3, "seed": 1}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "r").mkdir()
    return tmp_path / "r/metrics.jsonl"


def logged(path):
    return [entry_of(line) for line in path.read_text().splitlines()]


def entry_of(line):
    entry = json.loads(line)
    return entry["step"], entry["tag"], entry["value"]


def write(path, after, *steps, config=CONFIG):
    metrics = MetricsFile(path)
    metrics.open(after, config)
    for step in steps:
        metrics.write({"train/loss": step / 2, "samples": f"ä\n{step}"}, step, metrics.seconds + step)
    metrics.close()
    return metrics


def test_a_resumed_run_repeats_and_drops_nothing(path):
    write(path, 0, 1, 2, 3)
    whole = logged(path)
    assert whole[:3] == [(0, "config", CONFIG), (1, "train/loss", 0.5), (1, "samples", "ä\n1")] and len(whole) == 7
    assert write(path, 1, 2, 3).seconds == 1.0
    assert logged(path) == whole
    assert read_history(path).points["train/loss"] == {1: (0.5, 1.0), 2: (1.0, 3.0), 3: (1.5, 4.0)}


def test_a_run_of_the_same_name_sets_the_file_aside(path, capsys):
    for n in (3, 2, 1):
        write(path, 0, *range(1, n + 1))
    assert [len(logged(path.with_name(name))) for name in ("metrics_before.jsonl", "metrics_before-2.jsonl")] == [7, 5]
    assert len(logged(path)) == 3 and "metrics.jsonl is now metrics_before.jsonl" in capsys.readouterr().err


def test_lines_that_are_lost_are_counted(path, capsys):
    metrics = MetricsFile(path)
    metrics.open(0, CONFIG)
    with files_up_to(path.stat().st_size + 10):
        metrics.write({"train/loss": 1.0, "val/loss": 2.0}, 1, 1.0)
        metrics.close()
    assert f"2 lines could not be written to {path} and are lost" in capsys.readouterr().err


@pytest.mark.parametrize("line", [
    '{"step": 1, "tag": "val/loss", "value": 1' + "0" * 400 + ', "seconds": 1}',
    '{"step": 1' + "0" * 400 + ', "tag": "val/loss", "value": 1, "seconds": 1}',
    '{"step": 1, "tag": "val/loss", "value": 1, "seconds": 1e999}',
])
def test_numbers_that_no_plot_could_show_are_damage(path, line):
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_history(path)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_cut_by_a_kill_is_dropped(path, cut):
    write(path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-cut])
    assert list(read_history(path).points["train/loss"]) == [1]
    write(path, 1, 2)
    assert logged(path) == [*map(entry_of, lines)]


def test_lines_of_others_stay(path):
    write(path, 0, 1, 2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "# mine\n", '{"step": "x"}\n', *lines[2:]]))
    write(path, 1)
    assert path.read_text() == "".join([*lines[:2], "# mine\n", '{"step": "x"}\n', lines[2]])


def test_a_configuration_that_changes_is_logged(path):
    write(path, 0, 1, 2)
    write(path, 1, 2)
    write(path, 2, 3, config=CONFIG | {"learning_rate": 3e-4})
    assert [entry for entry in logged(path) if entry[1] == "config"] == [
        (0, "config", CONFIG), (2, "config", {"learning_rate": 3e-4, "seed": 1})]
    assert read_history(path.parent).config["learning_rate"] == 3e-4


def test_what_the_disk_refuses_is_written_later(path, capsys):
    metrics = MetricsFile(path)
    metrics.open(0, CONFIG)
    size = path.stat().st_size
    with files_up_to(size + 130):  # less than two lines
        for step in (1, 2, 3):
            metrics.write({"train/loss": 1.0}, step, 0.0)
        assert path.stat().st_size == size + 130
    assert capsys.readouterr().err == f"warning: cannot write {path} at present: File too large\n"
    metrics.write({"train/loss": 1.0}, 4, 0.0)
    assert [entry[0] for entry in logged(path)] == [0, 1, 2, 3, 4]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        MetricsFile(tmp_path / "metrics.jsonl").open(0, CONFIG)


def test_a_run_that_writes_reads_as_what_is_whole(path):
    write(path, 0, 1)
    path.write_text(path.read_text() + '{"step": 2, "tag": "train/lo')
    assert list(read_history(path).points["train/loss"]) == [1]


@pytest.mark.parametrize("line", ["{", "7", "[]", "null", '{"step": 3}', '{"step": 1.5, "tag": "a", "value": 1}', "",
                                  '{"step": 3, "tag": "val/loss", "value": "x", "seconds": 1}',
                                  '{"step": 3, "tag": "config", "value": "x", "seconds": 1}',
                                  '{"step": 3, "tag": "samples", "value": 7, "seconds": 1}',
                                  '{"step": 3, "tag": "val/loss", "value": 2, "seconds": null}', "[" * 99_999])
def test_a_damaged_line_is_named(path, line):
    write(path, 0, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 4 is damaged: delete it"):
        read_history(path.parent)


def test_what_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "text.log").write_text("hello")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, words in (("", "no metrics.jsonl in"), ("none", "does not exist"), ("bytes", "is not UTF-8"),
                        ("text.log", "is neither a metrics.jsonl nor what nanoGPT's train.py prints")):
        with pytest.raises(UserError, match=words):
            read_history(tmp_path / name)


def test_what_nanogpt_prints(tmp_path):
    (tmp_path / "nano.log").write_text("""number of parameters: 0.80M
step 0: train loss 4.1676, val loss 4.1649
iter 0: loss 4.1828, time 7819.71ms, mfu -100.00%
iter 1: loss 4.1373, time 100.00ms, mfu -100.00%
step 2: train loss 3.5000, val loss 3.6000
saving checkpoint to out-shakespeare-char
iter 2: loss 3.4000, time 9000.00ms, mfu 0.01%
iter 3: loss 3.4000, time 200.00ms, mfu 0.01%
step 4: train loss 3.0000, val loss 3.1000
""")
    history = read_history(tmp_path / "nano.log")
    assert history.name == "nano" and history.config is None
    # The first iteration, timed with an evaluation, is not counted; the one of step 2 takes as long as the one before.
    assert {step: (value, round(seconds, 6)) for step, (value, seconds) in history.points["val/loss"].items()} == {
        0: (4.1649, 0.0), 2: (3.6, 0.1), 4: (3.1, 0.4)}
    assert [value for value, _ in history.points["train/loss"].values()] == [4.1676, 3.5, 3.0]


def test_a_damaged_log_of_nanogpt(tmp_path):
    log = tmp_path / "n.log"
    log.write_text("step 0: train loss 4.2, val loss 4.3\niter 0: loss 4.2, time 1.2.3ms\n"
                   "step 5: train loss ., val loss 1\n"
                   "step " + "9" * 5000 + ": train loss 1.0, val loss 1.0\nstep 9: train loss nan, val loss nan\n")
    losses = read_history(log).points["val/loss"]
    assert losses[0] == (4.3, 0.0) and list(losses) == [0, 9] and math.isnan(losses[9][0])
