"""Directories, locks, hashes, text, and files that are written whole or not at all."""

import codecs
import errno
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lib.cli import UserError, warn

TEMPORARY_SUFFIX = ".tmp"


def reason(error: Exception) -> str:
    """The message of an OSError or ValueError about a path, without the path."""
    return getattr(error, "strerror", None) or str(error)


def make_directory(path: Path) -> Path:
    """Create the directory `path` if needed. UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        what = "a link to nothing" if path.is_symlink() else "a file"
        raise UserError(f"cannot create the directory {path}: it is {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot create the directory {path}: {reason(error)}") from None
    return path


def check_writable(path: Path) -> None:
    """UserError if the file `path` cannot be written; its directory is created if needed."""
    make_directory(path.parent)
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path} exists and is not a file: give another name")
        tempfile.TemporaryFile(dir=path.parent).close()
        if len(os.fsencode(temporary_of(path).name)) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from None


def temporary_of(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


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
    temporaries = [temporary_of(path) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, path in zip(temporaries, paths):
            put_in_place(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # directories can be opened there: makes the renames survive a power cut
        sync(paths[0].parent)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, but keep a file with the same bytes that may not be replaced.

    (Windows replaces no file that a process has mapped, as training maps its data.)
    """
    try:
        os.replace(temporary, path)
    except PermissionError:
        if not path.is_file() or sha256_of(path) != sha256_of(temporary):
            raise


def link_file(source: Path, path: Path) -> None:
    """Put a hard link to the file `source` at `path`, or else a symbolic one, atomically. OSError if neither can be."""
    source = source.resolve()
    if path.exists() and path.samefile(source):
        return
    with atomic_write(path) as [temporary]:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        try:
            os.link(source, temporary)
        except OSError:
            temporary.symlink_to(source)


def copy_file(source: Path, path: Path) -> None:
    """Copy the file `source` to `path`, atomically. OSError if that fails."""
    with atomic_write(path) as [temporary]:
        shutil.copyfile(source, temporary)


def set_aside(path: Path, name: str) -> None:
    """Rename a file to `name`, or that and a number if it is taken, and say so; a warning if that fails."""
    stem, suffix = name.split(".", 1)
    numbered = (f"{stem}-{n}.{suffix}" for n in itertools.count(2))
    free = next(name for name in itertools.chain([name], numbered) if not os.path.lexists(path.with_name(name)))
    try:
        path.rename(path.with_name(free))
        warn(f"{path} is now {free}")
    except OSError as error:
        warn(f"cannot rename {path} to {free}: {error.strerror}")


def sync(path: Path) -> None:
    """fsync a file's content, or a directory's renames."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows flushes what can be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directory: Path) -> None:
    """Delete temporary files that a killed process left in `directory`."""
    for path in directory.glob("*" + TEMPORARY_SUFFIX):
        if path.is_file():
            path.unlink()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    """The UTF-8 text in the file `path`, line endings unchanged, without a byte order mark.

    UserError if it cannot be read as text.
    """
    if not str(path):
        raise UserError("the path of a text is empty: give a file")
    try:
        data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a text file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
                        f"convert it first (iconv -f ENCODING -t utf-8)") from None
