"""Files from the network, checked by their hash before they get their name."""

import hashlib
import os
import re
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm

from errors import UserError
from files import lock_folder, sha256_of

TIMEOUTS = (10, 30)  # seconds to connect, and between two pieces of data
ATTEMPTS = 3
# vocab.bpe alone defines GPT-2's ids (encoder.json follows from it); the hash is the one tiktoken pins.
BPE_MERGES = ("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe", "gpt2/vocab.bpe",
              "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


def download(url, path, digest, backoff=1.0):
    """Make sure that `path` holds the file with this `digest`, fetching it from `url` if it is not there.

    `digest`: a hex sha256, or None for the one that the server tells, as Hugging Face's hub does; then
    a file that is there already is taken as it is. Transient failures are tried again after `backoff`,
    2 * `backoff`, … seconds. UserError, with the URL and the way by hand, when the file cannot be had or
    is not the right one.
    """
    path = Path(path)
    by_hand = (f"Fetch {url} by hand and put it at {path}{f' (sha256 {digest})' if digest else ''}"
               f", or train without any download: python train_gpt2.py configs/quickstart.py")
    if path.is_dir():
        raise UserError(f"{path} is a folder where a file should be; remove it. {by_hand}")
    if path.exists():
        if digest and sha256_of(path) != digest:
            raise UserError(f"{path} is not the expected file (its sha256 differs); remove it. {by_hand}")
        return path
    with lock_folder(path.parent):
        if path.exists():  # another process has just fetched it
            return path
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            problem, transient = fetch(url, path, digest)
            if not problem:
                return path
            if not transient:
                break
    raise UserError(f"cannot download {url}: {problem}. {by_hand}")


def fetch(url, path, digest):
    """One try. Return (None, False) when `path` is in place, else (what went wrong, worth another try?)."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        digest = digest or digest_by_server(url)
        with open(temporary, "wb") as file, requests.get(url, stream=True, timeout=TIMEOUTS) as response:
            response.raise_for_status()
            size = int(response.headers.get("content-length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                for piece in response.iter_content(1 << 16):
                    file.write(piece)
                    bar.update(len(piece))
        if digest_of(temporary, digest) != digest:
            return describe_wrong_file(temporary, size), False
        os.replace(temporary, path)
        return None, False
    except requests.HTTPError as error:
        status = error.response.status_code
        return f"the server answered {status} {error.response.reason}", status >= 500 or status in (408, 429)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        return f"{type(error).__name__}: {error}", True
    except (requests.RequestException, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}", False
    finally:
        temporary.unlink(missing_ok=True)


def digest_by_server(url):
    """The hash that Hugging Face's hub tells of a file. ValueError where there is none.

    Large files: their sha256, in X-Linked-Etag of the first answer, which leads to another host. Small
    ones: the sha1 of their git blob, in ETag.
    """
    for _ in range(5):
        response = requests.head(url, timeout=TIMEOUTS, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
        there = urljoin(url, response.headers.get("Location", ""))
        if "X-Linked-Etag" in response.headers or there == url or urlsplit(there)[:2] != urlsplit(url)[:2]:
            break
        url = there
    tag = tag.removeprefix("W/").strip('"')
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", tag):
        raise ValueError("the server tells no hash of the file (X-Linked-Etag, ETag)")
    return tag


def digest_of(path, like):
    """A file's hash in hex, of the kind of `like`: a sha256 (64 digits) or its git blob's sha1 (40)."""
    if len(like) == 64:
        return sha256_of(path)
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe_wrong_file(path, size):
    """Why the downloaded file at `path` cannot be the right one, in a few words."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "the server sent an HTML page instead of the file"
    got = os.path.getsize(path)
    if size and got < size:
        return f"the transfer was cut after {got:,} of {size:,} bytes"
    return f"the file has a wrong hash ({got:,} bytes)"


def fetch_source(source, data_dir):
    """Path of a (url, file, sha256) source under `data_dir`/downloads, downloaded if it is not there."""
    url, name, sha256 = source
    return download(url, Path(data_dir) / "downloads" / name, sha256)
