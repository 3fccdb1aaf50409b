"""Tables of data sets and runs. Nothing is verified, so they are instant."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from core.checkpoint import load_checkpoint, newest_first
from core.corpus import CORPORA, SPLITS, read_meta, read_split
from lib.cli import UserError, plural

AGES = (("day", 24 * 3600), ("hour", 3600), ("minute", 60))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, in columns; numbers stand below each other, on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(
        cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def datasets_table(data_dir: str) -> str:
    """The data sets under data_dir, and the built-in ones that are not prepared yet."""
    found = {path.parent.name for path in Path(data_dir).glob("*/*") if path.name in ("meta.json", "train.bin")}
    rows = [dataset_row(Path(data_dir) / name) if name in found else
            (name, CORPORA[name][1], *"----", f"not prepared: python prepare_data.py {name}")
            for name in (*CORPORA, *sorted(found - CORPORA.keys()))]
    return table([("name", "tokenizer", "symbols", "train tokens", "val tokens", "MB", "state"), *rows])


def dataset_row(directory: Path) -> tuple[str, ...]:
    try:
        meta = read_meta(directory)
        n_tokens = [len(read_split(directory / f"{split}.bin", meta["splits"][split], meta["vocab_size"], verify=False))
                    for split in SPLITS]
    except UserError as error:
        return directory.name, *"-----", str(error)
    size = sum((directory / name).stat().st_size for name in (*(f"{split}.bin" for split in SPLITS), "meta.json"))
    return (directory.name, str(meta["tokenizer"].get("kind")), f"{meta['vocab_size']:,}",
            *(f"{n:,}" for n in n_tokens), f"{size / 1e6:.2f}", "prepared")


def runs_table(out_dir: str | Path) -> str:
    """The runs under out_dir, the one written last first. UserError if there are none."""
    if Path(out_dir).is_file():
        raise UserError(f"{out_dir} is a file: give --ckpt the directory of a run or of several")
    files = (*Path(out_dir).glob("*/*.pt"), *Path(out_dir).glob("*.pt"))  # out_dir may be a run itself
    directories = {path.parent for path in files if path.is_file()}
    rows = [row for _, row in sorted(filter(None, map(run_row, directories)), reverse=True)]
    if not rows:
        raise UserError(f"no runs in {out_dir}: train first (python train_gpt2.py configs/quickstart.py), or give "
                        f"--ckpt DIRECTORY")
    return table([("run", "step", "best val loss", "data", "written", ""), *rows])


def run_row(run_dir: Path) -> tuple[float, tuple[str, ...]] | None:
    """(time of its newest checkpoint, cells) of a run; None if it is gone."""
    newest, written, damaged = None, 0.0, []
    for path in newest_first(run_dir):
        with suppress(FileNotFoundError):  # a run that is training has pruned it
            written = max(written, path.stat().st_mtime)
            try:
                newest = newest or load_checkpoint(path, verify=False)
            except UserError as error:
                path.stat()  # if it is gone, it is not damaged
                damaged += error.problems
    note = "; ".join(damaged)
    if not newest:
        return (written, (run_dir.name, "-", "-", "-", age(written), note)) if damaged else None
    best = "-" if newest["best_step"] is None else f"{newest['best_val_loss']:.4f} at {newest['best_step']:,}"
    cfg = newest["config"]
    steps = f"{newest['step']:,} of {cfg['max_iters']:,}" if cfg.get("max_iters") else f"{newest['step']:,}"
    return written, (run_dir.name, steps, best, str(cfg.get("dataset", "-")), age(written), note)


def age(written: float) -> str:
    """How long ago a time.time() was: '3 hours ago'."""
    seconds = time.time() - written
    return next((f"{plural(int(seconds // size), unit)} ago" for unit, size in AGES if seconds >= size), "just now")
