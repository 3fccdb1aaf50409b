"""Files from the network, checked by sha256 before they get their name."""

import os
import time
from pathlib import Path

import requests
from tqdm import tqdm

from errors import UserError
from files import lock_folder, sha256_of

TIMEOUTS = (10, 30)  # seconds to connect, and between two pieces of data
ATTEMPTS = 3


def download(url, path, sha256, backoff=1.0):
    """Make sure that `path` holds the file with this `sha256`, fetching it from `url` if it is not there.

    Transient failures are tried again after `backoff`, 2 * `backoff`, … seconds. UserError, with the
    URL and the way by hand, when the file cannot be had or is not the right one.
    """
    path = Path(path)
    by_hand = (f"Fetch {url} by hand and put it at {path}"
               f" (sha256 {sha256}), or train without any download: python train_gpt2.py configs/quickstart.py")
    if path.is_dir():
        raise UserError(f"{path} is a folder where a file should be; remove it. {by_hand}")
    if path.exists():
        if sha256_of(path) != sha256:
            raise UserError(f"{path} is not the expected file (its sha256 differs); remove it. {by_hand}")
        return path
    with lock_folder(path.parent):
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


def fetch(url, path, sha256):
    """One try. Return (None, False) when `path` is in place, else (what went wrong, worth another try?)."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file, requests.get(url, stream=True, timeout=TIMEOUTS) as response:
            if response.status_code != 200:
                transient = response.status_code >= 500 or response.status_code in (408, 429)
                return f"the server answered {response.status_code} {response.reason}", transient
            size = int(response.headers.get("content-length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                for piece in response.iter_content(1 << 16):
                    file.write(piece)
                    bar.update(len(piece))
        if sha256_of(temporary) != sha256:
            return describe_wrong_file(temporary, size), False
        os.replace(temporary, path)
        return None, False
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        return f"{type(error).__name__}: {error}", True
    except (requests.RequestException, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}", False
    finally:
        temporary.unlink(missing_ok=True)


def describe_wrong_file(path, size):
    """Why the downloaded file at `path` cannot be the right one, in a few words."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "the server sent an HTML page instead of the file"
    got = os.path.getsize(path)
    if size and got < size:
        return f"the transfer was cut after {got:,} of {size:,} bytes"
    return f"the file has a wrong sha256 ({got:,} bytes)"
