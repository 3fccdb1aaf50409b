"""Directories, locks, hashes, text, and files that are written whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lib.cli import UserError

TEMPORARY_SUFFIX = ".tmp"


def reason(error: Exception) -> str:
    """The message of an OSError or ValueError about a path, without the path."""
    return getattr(error, "strerror", None) or str(error)


def make_directory(path: Path) -> Path:
    """Create the directory `path` if needed. UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot create the directory {path}: {reason(error)}") from None
    return path


@contextmanager
def lock_directory(path: Path, if_taken: str | None = None) -> Iterator[None]:
    """Hold a lock on the directory `path` (created if needed); it dies with its process.

    If another process holds it: UserError with the message `if_taken`, or wait if that is None.
    """
    lock = FileLock(make_directory(path) / ".lock")
    try:
        lock.acquire(timeout=-1 if if_taken is None else 0)
    except Timeout:
        raise UserError(if_taken) from None
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_write(*paths: Path) -> Iterator[list[Path]]:
    """Yield a temporary path for each of `paths`, to be written; afterwards rename them into place, in this order.

    The files reach the disk (fsync) before any is renamed. If the block raises, the temporaries are removed and
    `paths` stay unchanged. All must be in one directory. OSError if it cannot be written.
    """
    temporaries = [path.with_name(path.name + TEMPORARY_SUFFIX) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # directories can be opened there: makes the renames survive a power cut
        sync(paths[0].parent)


def sync(path: Path) -> None:
    """fsync a file's content, or a directory's renames."""
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directory: Path) -> None:
    """Delete temporary files that a killed process left in `directory`."""
    for path in directory.glob("*" + TEMPORARY_SUFFIX):
        path.unlink()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    """The UTF-8 text in the file `path`, line endings unchanged. UserError if it cannot be read as text."""
    try:
        data = Path(path).read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a text file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
                        f"convert it first (iconv -f ENCODING -t utf-8)") from None
