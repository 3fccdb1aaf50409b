"""Downloads, checked by sha256 before they are renamed into place."""

import re
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

import requests
from tqdm import tqdm

from lib.cli import UserError
from lib.files import atomic_write, lock_directory, sha256_of

TIMEOUTS = (10, 30)  # seconds to connect, and between chunks
ATTEMPTS = 3
DOWNLOADS = "downloads"  # the directory's name under data_dir


class Source(NamedTuple):
    """A file on the network: where it is, its name under the downloads directory, its hex sha256."""

    url: str
    name: str
    sha256: str


def download(url: str, path: Path, sha256: str | None, backoff: float = 1.0) -> Path:
    """Make sure that `path` holds the file with this `sha256`, fetching it from `url` if it is missing.

    `sha256`: in hex, or None for the one the server reports, as Hugging Face's hub does; then a file
    that exists is used unchecked. Transient failures are retried after `backoff`, 2 * `backoff`, … seconds.
    UserError, with the URL and how to do it by hand, when the file cannot be fetched or is the wrong one.
    """
    by_hand = f"Fetch {url} by hand and put it at {path}{f' (sha256 {sha256})' if sha256 else ''}"
    if path.is_dir():
        raise UserError(f"{path} is a directory where a file should be; remove it. {by_hand}")
    if path.exists():
        if sha256 and sha256_of(path) != sha256:
            raise UserError(f"{path} is not the expected file (its sha256 differs); remove it. {by_hand}")
        return path
    with lock_directory(path.parent):
        if path.exists():  # another process has just fetched it
            return path
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            problem, transient = fetch(url, path, sha256)
            if not problem:
                return path
            if not transient:
                break
    raise UserError(f"cannot download {url}: {problem}. {by_hand}")


def fetch(url: str, path: Path, sha256: str | None) -> tuple[str | None, bool]:
    """One attempt: (None, False) when `path` is in place, else (what went wrong, whether to try again)."""
    try:
        sha256 = sha256 or sha256_by_server(url)
        with atomic_write(path) as [temporary]:
            size = fetch_into(temporary, url, path.name)
            if sha256_of(temporary) != sha256:
                raise ValueError(describe_wrong_file(temporary, size))
        return None, False
    except requests.HTTPError as error:
        status = error.response.status_code
        return f"the server answered {status} {error.response.reason}", status >= 500 or status in (408, 429)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        return f"{type(error).__name__}: {error}", True
    except (requests.RequestException, OSError) as error:
        return f"{type(error).__name__}: {error}", False
    except ValueError as error:
        return str(error), False


def fetch_into(file_path: Path, url: str, name: str) -> int | None:
    """Write what `url` serves into a file, with a progress bar for `name`; the size the server announced."""
    with open(file_path, "wb") as file, requests.get(url, stream=True, timeout=TIMEOUTS) as response:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0)) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:
            for piece in response.iter_content(1 << 16):
                file.write(piece)
                bar.update(len(piece))
    return size


def sha256_by_server(url: str) -> str:
    """The sha256 that Hugging Face's hub reports for a file, before it redirects. ValueError where it reports none."""
    for _ in range(5):
        response = requests.head(url, timeout=TIMEOUTS, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        tag = response.headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
        url = urljoin(url, response.headers.get("Location", ""))
    raise ValueError("the server reports no hash of the file (X-Linked-Etag)")


def describe_wrong_file(path: Path, size: int | None) -> str:
    """Why the file fetched to `path` is wrong, in a few words; `size`: what the server announced."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "the server sent an HTML page instead of the file"
    got = path.stat().st_size
    if size and got < size:
        return f"the transfer was cut after {got:,} of {size:,} bytes"
    return f"the file has a wrong hash ({got:,} bytes)"


def fetch_source(source: Source, data_dir: str) -> Path:
    """Path of a source's file under `data_dir`/downloads, fetched if it is missing."""
    return download(source.url, Path(data_dir) / DOWNLOADS / source.name, source.sha256)
