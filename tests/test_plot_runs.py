"""plot_runs.py, on real runs."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import assert_refused, run, scalars

import plot_runs
import train_gpt2
from core.metrics import read_history
from lib.cli import UserError

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_args):
    """A directory with three seeds of one setting and a run of another."""
    directory = tmp_path_factory.mktemp("runs")
    args = [*tiny_args, f"--out_dir={directory}/checkpoints", f"--log_dir={directory}/runs"]
    for seed in (1, 2, 3):
        assert train_gpt2.main([*args, f"--seed={seed}", f"--run_name=tiny-{seed}"]) == 0
    assert train_gpt2.main([*args, "--learning_rate=0.01", "--run_name=_fast$x$"]) == 0
    return directory / "runs"


def drawn(*paths):
    """[{(color, line style): [(x, y)]}] of steps and of seconds, and the legend's entries."""
    figure = figures.Figure()
    plot_runs.draw_losses(figure, [read_history(path) for path in paths])
    curves = [{(line.get_color(), line.get_linestyle()): list(zip(*line.get_data())) for line in ax.lines
               if len(line.get_xdata())} for ax in figure.axes]
    bands = [[band.get_paths()[0].get_extents().extents for band in ax.collections] for ax in figure.axes]
    return *curves, bands, [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_curves_are_the_logged_losses(runs):
    over_steps, over_seconds, bands, legend = drawn(runs / "tiny-1", runs / "_fast$x$")
    assert legend == ["tiny-1", "_fast$x$", "training", "validation"] and bands == [[], []]
    for name, color in (("tiny-1", plot_runs.COLORS[0]), ("_fast$x$", plot_runs.COLORS[1])):
        log, history = scalars(runs / name), read_history(runs / name)
        for tag, style in (("train/loss", "--"), ("val/loss", "-")):
            assert dict(over_steps[color, style]) == pytest.approx(log[tag])
            seconds = [x for x, _ in over_seconds[color, style]]
            assert seconds == sorted(seconds) and seconds == [s for _, s in history.points[tag].values()]
            assert [y for _, y in over_seconds[color, style]] == [y for _, y in over_steps[color, style]]


def test_seeds_of_a_setting_are_a_mean_with_its_band(runs, tmp_path):
    shutil.copytree(runs / "tiny-3", tmp_path / "tiny-short")  # as if it had come as far as step 6
    path = tmp_path / "tiny-short/metrics.jsonl"
    path.write_text("".join(line for line in path.open() if json.loads(line)["step"] <= 6))
    seeds = [runs / f"tiny-{seed}" for seed in (1, 2, 3)]
    for paths, last_step in ((seeds, 12), ([*seeds[:2], tmp_path / "tiny-short"], 6)):
        over_steps, over_seconds, bands, legend = drawn(*paths, runs / "_fast$x$")
        assert legend[:2] == ["tiny (3 seeds)", "_fast$x$"]
        logs = [scalars(path)["val/loss"] for path in seeds]
        curve = dict(over_steps[plot_runs.COLORS[0], "-"])
        assert list(curve) == [step for step in logs[0] if step <= last_step]
        assert curve == pytest.approx({step: sum(log[step] for log in logs) / 3 for step in curve})
        values = [log[step] for log in logs for step in curve]
        assert bands[0][1][[1, 3]] == pytest.approx([min(values), max(values)])  # validation is drawn second
        histories = [read_history(path).points["val/loss"] for path in seeds]
        assert over_seconds[plot_runs.COLORS[0], "-"][0][0] == pytest.approx(sum(h[6][1] for h in histories) / 3)


def test_runs_of_one_seed_stay_apart(runs, tmp_path):
    """As of a code that was changed in between."""
    shutil.copytree(runs / "tiny-1", tmp_path / "changed")
    assert drawn(runs / "tiny-1", tmp_path / "changed")[3][:2] == ["tiny-1", "changed"]
    for name in ("a", "b"):  # edited by hand
        shutil.copytree(runs / "tiny-1", tmp_path / name)
        path = tmp_path / name / "metrics.jsonl"
        path.write_text(path.read_text().replace('"seed"', '"sead"'))
    assert drawn(tmp_path / "a", tmp_path / "b")[3][:2] == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        plot_runs.main([str(runs / "tiny-1"), f"{runs}/../runs/tiny-1", f"--out={tmp_path}/x.png"])


def test_settings_of_one_name_stay_apart(runs, tmp_path):
    for n in (1, 2):
        shutil.copytree(runs / f"tiny-{n}", tmp_path / f"{n}/same")
    settings = plot_runs.settings_of([read_history(path) for path in (tmp_path / "1/same", runs / "_fast$x$")])
    assert list(settings) == ["same", "_fast$x$"]
    (tmp_path / "2/same/metrics.jsonl").write_text("".join(  # no configuration: its setting is not known
        line for line in (tmp_path / "2/same/metrics.jsonl").open() if '"config"' not in line))
    settings = plot_runs.settings_of([read_history(tmp_path / f"{n}/same") for n in (1, 2)])
    assert list(settings) == ["same", "same'"]


@pytest.mark.parametrize("suffix, more", [("svg", ()), ("png", ()), ("svg", ("--samples",)), ("png", ("--samples",))])
def test_pictures_are_small_and_the_same_again(runs, tmp_path, suffix, more):
    names = ["tiny-1"] if more else ["tiny-1", "tiny-2", "tiny-3", "_fast$x$"]
    args = [str(runs / name) for name in names]
    process = run("plot_runs.py", *args, f"--out=a.{suffix}", *more, cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", f"wrote a.{suffix}\n")
    plot_runs.main([*args, f"--out={tmp_path}/b.{suffix}", *more])
    a, b = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert a == b and 1000 < len(a) < 60_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]
    if suffix == "svg":
        texts = "".join(ElementTree.fromstring(a).itertext())
        words = ["step 6", "step 12"] if more else ["tiny (3 seeds)", "_fast$x$", "training", "validation",
                                                     "optimizer step", "seconds of training"]
        assert all(word in texts for word in words)


def luminance(color):
    """Of '#rrggbb' (WCAG 2.1)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(weight * (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4)
               for weight, part in zip((0.2126, 0.7152, 0.0722), parts))


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117", "#000000"])
def test_colors_are_readable_on_light_and_dark(background):
    for color in (*plot_runs.COLORS, plot_runs.INK):
        low, high = sorted(map(luminance, (background, color)))
        assert (high + 0.05) / (low + 0.05) >= 3, color
    assert plot_runs.STYLE["savefig.transparent"]


def test_how_samples_begin(runs):
    history = read_history(runs / "tiny-1")
    history.points["samples"] = {step: (f"\n{step}\t$a$\n\x00\n" + "word " * 40, 0.0) for step in range(10, 110, 10)}
    history.points["val/loss"] = {10: (2.375001, 0.0)}
    figure = figures.Figure()
    plot_runs.draw_samples(figure, history)
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "step 10\nloss 2.38"
    assert [re.match(r"step (\d+)", text)[1] for text in texts[::2]] == ["10", "30", "50", "60", "80", "100"]
    lines = texts[1].split("\n")
    assert lines[:2] == ["10\u00a0\u00a0$a$", "\ufffd"] and len(lines) == 4 and all(len(line) <= 80 for line in lines)
    del history.points["samples"]
    with pytest.raises(UserError, match="has logged no samples"):
        plot_runs.draw_samples(figure, history)


def test_what_cannot_be_plotted_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_text("")
    (tmp_path / "new/events.out.tfevents.1").write_bytes(b"\xff")
    assert_refused(run("plot_runs.py", "none", cwd=tmp_path), "error: none does not exist: give the directory of a run")
    for args, words in (((".",), "no metrics.jsonl in ."), (("new",), "new has no losses yet"),
                        (("new/events.out.tfevents.1",), "is TensorBoard's: give the run's directory, new"),
                        ((runs / "tiny-1", "--out=a.pdf"), "--out a.pdf must end in .png or .svg"),
                        ((runs / "tiny-1", "--out=new"), "must end in .png or .svg"),
                        ((runs / "tiny-1", "--out=new/metrics.jsonl/a.png"), "cannot create the directory"),
                        ((runs / "tiny-1", runs / "tiny-2", "--samples"), "--samples shows one run"),
                        (("new", "--samples"), "new has logged no samples")):
        with pytest.raises(UserError) as refused:
            plot_runs.main(list(map(str, args)))
        assert words in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_characters_that_the_font_lacks(tmp_path, capsys):
    """In a PNG they are boxes; in an SVG the viewer's fonts draw them."""
    (tmp_path / "run").mkdir()
    entry = dict(step=1, tag="samples", value="a 中文 中", seconds=1.0, time=1.0)
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(entry) + "\n")
    for suffix, expected in (("png", "warning: the font lacks 2 characters, drawn as boxes"), ("svg", "wrote")):
        plot_runs.main([str(tmp_path / "run"), "--samples", "--out", str(tmp_path / f"a.{suffix}")])
        assert capsys.readouterr().err.startswith(expected)
    assert "中文" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_missing_matplotlib_is_named(runs, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    process = run("plot_runs.py", runs / "tiny-1", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert_refused(process)
    assert process.stderr == "error: plots need matplotlib: pip install matplotlib\n"
