"""metrics.jsonl: what a run has logged, a JSON object a line, written beside its TensorBoard events.

    {"step": 50, "tag": "train/loss", "value": 2.4716, "seconds": 1.31, "time": 1767225600.0}

seconds: of training so far, over all resumes, without evaluations, samples and saves. time: of the day (Unix).
Tags are TensorBoard's, and `config`, whose value is the run's configuration: at its start and whenever it changes.
"""

import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib.cli import UserError, plural, warn
from lib.files import read_text, reason, set_aside

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """The metrics.jsonl of a run that is training; until it is opened nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, 0.0  # seconds: of the last line when it was opened
        self._file, self._unwritten, self._is_refused = None, b"", False

    def open(self, step: int, config: dict[str, object]) -> None:
        """Drop the lines after `step`, which are repeated, and a last one cut by a kill; at step 0 set the file aside.

        Other lines stay as they are. UserError if the file cannot be read or written.
        """
        try:
            if step == 0 and self.path.is_file() and self.path.stat().st_size > 0:
                set_aside(self.path, "metrics_before.jsonl")
            self._file = open(self.path, "ab", buffering=0)
            end, last_config = self._end_of(step) if step else (0, None)
            self._file.truncate(end)  # in one go, and on a full disk too
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {reason(error)}") from None
        if config != last_config:
            self.write({"config": config}, step, self.seconds)

    def _end_of(self, step: int) -> tuple[int, object]:
        """(bytes up to the first line after `step`, the last configuration among them); sets `seconds`."""
        end, config = 0, None
        with open(self.path, "rb") as file:
            for line in file:
                entry = parse(line)
                if not line.endswith(b"\n") or (entry and entry["step"] > step):
                    break
                end += len(line)
                if entry:
                    self.seconds = entry["seconds"]
                    config = entry["value"] if entry["tag"] == "config" else config
        return end, config

    def write(self, values: dict[str, object], step: int, seconds: float) -> None:
        """Append a line for each {tag: value}; they survive a kill. What the disk refuses is tried again next time."""
        if not self._file:
            return
        for tag, value in values.items():
            entry = dict(step=step, tag=tag, value=value, seconds=round(seconds, 3), time=round(time.time(), 3))
            self._unwritten += (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._is_refused:
                warn(f"cannot write {self.path} at present: {error.strerror}")
            self._is_refused = True

    def close(self) -> None:
        self.write({}, 0, 0.0)
        if self._unwritten:
            n_lost = self._unwritten.count(b"\n")
            warn(f"{plural(n_lost, 'line')} could not be written to {self.path} and are lost")
        if self._file:
            self._file.close()


def parse(line: str | bytes) -> dict | None:
    """The entry in a line of metrics.jsonl; None if it is not one."""
    try:
        entry = json.loads(line)
        is_whole = type(entry["step"]) is int and isinstance(entry["tag"], str) and math.isfinite(entry["seconds"])
        for number in (entry["step"], entry["value"]):
            if isinstance(number, int):
                float(number)  # OverflowError: no plot could show it
        return entry if is_whole else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


@dataclass
class History:
    """What a run has logged: {tag: {step: (value, seconds)}}, and its last configuration where it is known."""

    name: str
    config: dict[str, object] | None = None
    points: dict[str, dict[int, tuple]] = field(default_factory=dict)

    def add(self, tag: str, step: int, value: object, seconds: float) -> None:
        self.points.setdefault(tag, {})[step] = value, seconds


def read_history(path: Path) -> History:
    """The history in a run's directory, a metrics.jsonl, or a file with what nanoGPT's train.py has printed.

    UserError if there is none, or a line is damaged; a last line that is still being written does not count.
    """
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise UserError(f"no {FILE_NAME} in {path}: give the directory of a run, such as runs/quickstart")
        path = path / FILE_NAME
    elif not path.exists():
        raise UserError(f"{path} does not exist: give the directory of a run, such as runs/quickstart")
    if path.name.startswith("events.out.tfevents"):
        raise UserError(f"{path} is TensorBoard's: give the run's directory, {path.parent}")
    text = read_text(path)
    return read_metrics(path, text) if path.suffix == ".jsonl" else read_nanogpt_log(path, text)


def read_metrics(path: Path, text: str) -> History:
    history = History(path.resolve().parent.name if path.name == FILE_NAME else path.stem)
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        entry = parse(line)
        kind = entry and {"config": dict, "samples": str}.get(entry["tag"], (int, float))
        if entry is None or not isinstance(entry["value"], kind):
            raise UserError(f"{path}, line {number} is damaged: delete it to use the others")
        if entry["tag"] == "config":
            history.config = entry["value"]
        else:
            history.add(entry["tag"], entry["step"], entry["value"], entry["seconds"])
    return history


def read_nanogpt_log(path: Path, text: str) -> History:
    """The losses that nanoGPT's train.py has printed at its evaluations.

    It prints the time of single iterations (of all with --log_interval=1), but those that begin with an
    evaluation include its time: they count as long as the one before.
    """
    history, seconds, next_step, per_step, evaluates = History(path.stem), 0.0, 0, 0.0, False
    count, number = r"(\d{1,15})", r"(\d+\.\d+|nan|inf)"
    pattern = rf"^(?:step {count}: train loss {number}, val loss {number}|iter {count}: loss .*, time {number}ms)"
    for step, train_loss, val_loss, iteration, milliseconds in re.findall(pattern, text, re.MULTILINE):
        if step:
            history.add("train/loss", int(step), float(train_loss), seconds)
            history.add("val/loss", int(step), float(val_loss), seconds)
            evaluates = True
        else:
            per_step = per_step if evaluates else float(milliseconds) / 1000
            seconds += (int(iteration) + 1 - next_step) * per_step
            next_step, evaluates = int(iteration) + 1, False
    if not history.points:
        raise UserError(f"{path} is neither a {FILE_NAME} nor what nanoGPT's train.py prints at its evaluations")
    return history
