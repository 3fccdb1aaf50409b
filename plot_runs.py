"""Plot the losses of runs over steps and over seconds: training dashed, validation solid.

    python plot_runs.py runs/quickstart
    python plot_runs.py runs/mine runs/ours --out loss.svg
    python plot_runs.py runs/mine-1 runs/mine-2 runs/mine-3 runs/ours
    python plot_runs.py runs/mine nanogpt.log
    python plot_runs.py runs/mine --samples --out samples.svg

Runs whose configurations differ in nothing but the seed are one setting: their mean, in a band from the lowest
to the highest, up to the last step that all have reached. Seconds are of training, without evaluations, samples
and saves.
A run is given by its directory, its metrics.jsonl, or a file with what nanoGPT's train.py has printed.
"""

import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.metrics import History, read_history
from lib.cli import UserError, plural, run_script, script_parser, warn
from lib.files import atomic_write, check_writable, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readable on white and on black: a contrast of at least 3 with both.
COLORS = ("#3b82f6", "#e2680c", "#16a34a", "#a855f7", "#ef4444", "#0d9488", "#b7791f", "#db4b97")
INK = "#7d8590"
STYLE = {
    "savefig.transparent": True, "font.size": 9, "legend.frameon": False, "text.parse_math": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.25,
    "svg.fonttype": "none", "svg.hashsalt": "",  # small files, the same for the same runs
}
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # with what is not to be written there
ROWS, LINES, COLUMNS = 6, 4, 80  # of a picture of samples
CURVES = (("train/loss", "training", "--", 0.9), ("val/loss", "validation", "-", 1.8))


def settings_of(histories: Sequence[History]) -> dict[str, list[History]]:
    """The histories by setting, whose name is what its runs' names begin with."""
    groups: list[list[History]] = []
    for history in histories:
        same = (group for group in groups if None not in (history.config, group[0].config)
                and {**history.config, "seed": 0} == {**group[0].config, "seed": 0}
                and history.config.get("seed") not in [other.config.get("seed") for other in group])
        group = next(same, None)
        if group is None:
            groups.append(group := [])
        group.append(history)
    settings = {}
    for group in groups:
        names = [history.name for history in group]
        name = (len(group) > 1 and os.path.commonprefix(names).rstrip("-_. ")) or names[0]  # noqa: RUF071
        name += f" ({len(group)} seeds)" if len(group) > 1 else ""
        while name in settings:
            name += "'"
        settings[name] = group
    return settings


def draw_curve(axes: Sequence["Axes"], group: list[History], color: str, tag: str, style: str, width: float) -> None:
    """Draw the group's mean of `tag` over steps and over the mean of the seconds, and between lowest and highest."""
    points = [history.points.get(tag, {}) for history in group]
    steps = sorted(set.intersection(*map(set, points)))
    values = [[run[step][0] for run in points] for step in steps]
    seconds = [sum(run[step][1] for run in points) / len(group) for step in steps]
    for ax, x in zip(axes, (steps, seconds)):
        ax.plot(x, [sum(v) / len(v) for v in values], style, color=color, linewidth=width,
                marker="." if len(x) == 1 else "")
        if len(group) > 1:
            ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.25, linewidth=0)


def draw_losses(figure: "Figure", histories: Sequence[History]) -> None:
    settings = settings_of(histories)
    figure.set_size_inches(9, 3.6 + 0.2 * len(settings))
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes[1].set(xlabel="seconds of training")
    figure_lines = []
    for number, (name, group) in enumerate(settings.items()):
        color = COLORS[number % len(COLORS)]
        for tag, _, style, width in CURVES:
            draw_curve(axes, group, color, tag, style, width)
        figure_lines.append((axes[0].plot([], [], color=color)[0], name))
    figure_lines += [(axes[0].plot([], [], style, color=INK, linewidth=width)[0], what)
                     for _, what, style, width in CURVES]
    figure.legend(*zip(*figure_lines), loc="outside lower center", ncols=max(2, min(4, len(figure_lines))))


def excerpt(text: str) -> list[str]:
    """The first lines of a sample, as printable characters."""
    lines = [part for line in text.strip().expandtabs(4).splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]
    return ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines[:LINES]]


def draw_samples(figure: "Figure", history: History) -> None:
    samples = sorted(history.points.get("samples", {}).items())
    if not samples:
        raise UserError(f"{history.name} has logged no samples: train with --sample_tokens=200")
    n_rows = min(ROWS, len(samples))
    rows = [samples[round(i * (len(samples) - 1) / max(1, n_rows - 1))] for i in range(n_rows)]  # first and last too
    figure.set_size_inches(8.4, 0.75 * n_rows)
    for i, (step, (text, _)) in enumerate(rows):
        loss, _ = history.points.get("val/loss", {}).get(step, (None, None))
        about = f"step {step:,}" + (f"\nloss {loss:.2f}" if loss is not None else "")
        top = 1 - (i + 0.1) / n_rows
        figure.text(0.01, top, about, va="top", color=COLORS[0])
        lines = "\n".join(excerpt(text)).replace(" ", "\u00a0")  # SVG joins spaces
        figure.text(0.13, top, lines, va="top", family="monospace", fontsize=8)


def save(figure: "Figure", out: Path) -> None:
    try:
        with atomic_write(out) as [temporary], warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure.savefig(temporary, format=out.suffix[1:], dpi=120, metadata=FORMATS[out.suffix])
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from None
    messages = {str(warning.message) for warning in caught}
    missing = {message for message in messages if message.startswith("Glyph ")}
    if missing and out.suffix == ".png":  # whoever opens an SVG draws it with fonts of their own
        warn(f"the font lacks {plural(len(missing), 'character')}, drawn as boxes: with --out FILE.svg the viewer's "
             f"fonts are used")
    for message in messages - missing:
        warn(message)


def main(argv: list[str]) -> None:
    parser = script_parser("plot_runs.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), metavar="FILE",
                        help="the picture, FILE.png or FILE.svg (default loss.png); it is replaced")
    parser.add_argument("--samples", action="store_true",
                        help=f"plot the start of one run's samples instead: {ROWS}, from first to last")
    args = parser.parse_args(argv)
    if args.out.suffix not in FORMATS:
        raise UserError(f"--out {args.out} must end in .png or .svg")
    if args.samples and len(args.runs) > 1:
        raise UserError("--samples shows one run: give one")
    if len({path.resolve() for path in args.runs}) < len(args.runs):
        raise UserError("a run is given twice")
    histories = [read_history(path) for path in args.runs]
    for path, history in zip(args.runs, histories):
        if not args.samples and not any(tag in history.points for tag, *_ in CURVES):
            raise UserError(f"{path} has no losses yet")
    check_writable(args.out)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout=None if args.samples else "constrained")
        if args.samples:
            draw_samples(figure, histories[0])
        else:
            draw_losses(figure, histories)
        save(figure, args.out)
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
