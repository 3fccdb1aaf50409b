import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib.cli import UserError
from lib.download import Source, download, fetch_source

BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.strip("/")
        if name == "flaky" and len(self.server.requests) < 3:
            return self.send_error(503)
        if name == "silent":
            return self.server.closing.wait(60)
        if name == "missing":
            return self.send_error(404)
        if name == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            return self.end_headers()
        body = {"html": b"<!DOCTYPE html><title>Sign in</title>", "wrong": BODY[:-1] + b"!"}.get(name, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name == "cut" else body)

    def log_message(self, *args):
        pass


def visible(directory):
    return [path for path in directory.iterdir() if path.name != ".lock"]


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.closing = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_fetched_once(server, tmp_path):
    path = tmp_path / "a/b.bin"
    for _ in range(2):
        assert download(server.url + "/good", path, SHA256) == path
        assert path.read_bytes() == BODY
    assert len(server.requests) == 1 and visible(path.parent) == [path]


def test_a_transient_failure_is_tried_again(server, tmp_path):
    download(server.url + "/flaky", tmp_path / "f", SHA256, backoff=0.01)
    assert (tmp_path / "f").read_bytes() == BODY and len(server.requests) == 3


@pytest.mark.parametrize("name, tries, words", [
    ("missing", 1, "404"), ("loop", 31, "redirect"), ("html", 1, "HTML page"), ("wrong", 1, "wrong hash"),
    ("cut", 3, ""),
])
def test_a_wrong_file_never_appears_under_its_name(server, tmp_path, name, tries, words):
    with pytest.raises(UserError) as error:
        download(f"{server.url}/{name}", tmp_path / "f", SHA256, backoff=0.01)
    for word in (words, f"{server.url}/{name}", str(tmp_path / "f"), "by hand", SHA256):
        assert word in str(error.value)
    assert len(server.requests) == tries and visible(tmp_path) == []


def test_a_server_that_never_answers(server, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.download.TIMEOUTS", (1, 0.1))
    with pytest.raises(UserError, match="Timeout"):
        download(server.url + "/silent", tmp_path / "f", SHA256, backoff=0.01)
    assert len(server.requests) == 3 and visible(tmp_path) == []


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="by hand"):
        download("http://127.0.0.1:9/x", tmp_path / "f", SHA256, backoff=0.01)
    assert visible(tmp_path) == []


def test_existing_files_are_checked_and_kept(tmp_path):
    (tmp_path / "f").write_bytes(b"mine")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="sha256 differs"):
        download("http://127.0.0.1:9/x", tmp_path / "f", SHA256)
    with pytest.raises(UserError, match="is a directory"):
        download("http://127.0.0.1:9/x", tmp_path / "d", SHA256)
    assert (tmp_path / "f").read_bytes() == b"mine"


def test_a_source_has_its_place_under_the_data_directory(server, tmp_path):
    source = Source(server.url + "/good", "gpt2/some.file", SHA256)
    assert fetch_source(source, str(tmp_path)) == tmp_path / "downloads/gpt2/some.file"
    assert (tmp_path / "downloads/gpt2/some.file").read_bytes() == BODY
