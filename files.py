"""Folders, locks, hashes, texts, and what they have in common: errors in one line."""

import hashlib
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError


def make_folder(path):
    """The folder `path`, made if it is not there. UserError where it cannot be made."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make the folder {path}: {getattr(error, 'strerror', error)}") from None
    return path


def lock_folder(path, if_taken=None):
    """An acquired lock on the folder `path` (made if it is not there), to release or to use in a `with`.

    It ends with its process, however that ends. While another process holds it: UserError with the
    message `if_taken`, or a wait where there is none.
    """
    lock = FileLock(make_folder(path) / ".lock")
    try:
        lock.acquire(timeout=-1 if if_taken is None else 0)
    except Timeout:
        raise UserError(if_taken) from None
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from None
    return lock


def sha256_of(path):
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path):
    """The UTF-8 text in the file `path`, line ends as they are. UserError for what is no text."""
    try:
        data = Path(path).read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a text file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
                        f"convert it first (iconv -f ENCODING -t utf-8)") from None
