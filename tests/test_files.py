import codecs
import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, files_up_to

from lib.cli import UserError
from lib.files import (
    atomic_write,
    check_writable,
    lock_directory,
    make_directory,
    read_text,
    remove_temporaries,
    sha256_of,
)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_all(paths, data, fail=None):
    with atomic_write(*paths) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(data)
        if fail:
            raise fail


# Whole or not at all

@pytest.mark.parametrize("n_files", [1, 3])
def test_files_appear_only_when_complete(tmp_path, n_files):
    paths = [tmp_path / f"{i}.bin" for i in range(n_files)]
    paths[0].write_bytes(b"old")
    with atomic_write(*paths) as temporaries:
        assert len(temporaries) == n_files and {path.parent for path in temporaries} == {tmp_path}
        for temporary in temporaries:
            temporary.write_bytes(b"new")
        assert paths[0].read_bytes() == b"old" and not any(path.exists() for path in paths[1:])
    assert contents(tmp_path) == {path.name: b"new" for path in paths}


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_an_exception_leaves_what_was_there(tmp_path, failure):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    paths[1].write_bytes(b"old")
    with pytest.raises(type(failure)):
        write_all(paths, b"new", failure)
    assert contents(tmp_path) == {"b": b"old"}


def test_a_file_that_was_not_written_stops_all(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a", tmp_path / "b") as [first, _]:
        first.write_bytes(b"new")
    assert contents(tmp_path) == {"a": b"old"}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    write_all(paths, b"old")
    with files_up_to(10_000):
        with pytest.raises(OSError) as failed:
            write_all(paths, b"new" * 10_000)
        assert failed.value.errno == errno.EFBIG
        assert contents(tmp_path) == {"a": b"old", "b": b"old"}
        write_all(paths, b"new")
    assert contents(tmp_path) == {"a": b"new", "b": b"new"}


def test_everything_is_on_the_disk_before_any_name_changes(tmp_path, monkeypatch):
    paths, calls = [tmp_path / name for name in ("a", "b")], []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def watched_replace(old, new):
        calls.append(("replace", new.name))
        replace(old, new)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_all(paths, b"new")
    assert calls == [("fsync", "a.tmp"), ("fsync", "b.tmp"), ("replace", "a"), ("replace", "b"),
                     ("fsync", tmp_path.name)]


def test_what_a_killed_process_left_is_removed(tmp_path):
    script = ("import os, signal, sys\nfrom pathlib import Path\nfrom lib.files import atomic_write\n"
              "with atomic_write(Path('a'), Path('b')) as [a, b]:\n"
              "    a.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "a").write_bytes(b"old")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert contents(tmp_path) == {"a": b"old", "a.tmp": b"half"}
    (tmp_path / "d.tmp").mkdir()  # not ours
    remove_temporaries(tmp_path)
    (tmp_path / "d.tmp").rmdir()
    assert contents(tmp_path) == {"a": b"old"}


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("new", "old", "a/b/new"):
        check_writable(tmp_path / name)
    assert contents(tmp_path / "a/b") == {} and (tmp_path / "old").read_text() == "old"
    (tmp_path / "link").symlink_to("old")
    for path, words in ((tmp_path, "exists and is not a file: give another name"), (tmp_path / "link", "not a file"),
                        (Path("/dev/null"), "not a file"), (tmp_path / "old/x", "cannot create"),
                        (Path("/proc/x"), "cannot write /proc/x: "), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(UserError, match=words):
            check_writable(path)


# Locks

HOLDER = ("import sys, time\nfrom lib.files import lock_directory\n"
          "with lock_directory(__import__('pathlib').Path(sys.argv[1])):\n"
          "    print('locked', flush=True)\n    time.sleep(60)\n")


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock on `tmp_path`/d."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "d")], stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.communicate()


def take_lock(directory, *if_taken):
    with lock_directory(directory, *if_taken):
        pass


def test_a_lock_dies_with_its_process(tmp_path, holder):
    with pytest.raises(UserError, match=r"^in use: wait$"):
        take_lock(tmp_path / "d", "in use: wait")
    holder.kill()
    holder.wait()
    with lock_directory(tmp_path / "d", "in use: wait"), pytest.raises(UserError, match="in use"):
        take_lock(tmp_path / "d", "in use: wait")
    take_lock(tmp_path / "d", "in use: wait")


def test_a_lock_ends_with_its_block(tmp_path):
    """Another lock object in the same process is refused while it is held, and only then."""
    held = lock_directory(tmp_path)
    with held, pytest.raises(UserError):
        take_lock(tmp_path, "in use")
    take_lock(tmp_path, "in use")
    assert held  # not because the lock object is gone


def test_without_a_message_a_lock_is_waited_for(tmp_path, holder):
    threading.Timer(0.3, holder.kill).start()
    start = time.perf_counter()
    take_lock(tmp_path / "d")
    assert 0.2 < time.perf_counter() - start < 30


def test_directories_that_cannot_be_created(tmp_path):
    assert make_directory(tmp_path / "a/b") == make_directory(tmp_path / "a/b") == tmp_path / "a/b"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nosuch")
    for path, words in ((tmp_path / "file/d", "Not a directory"), (tmp_path / "file", "it is a file"),
                        (tmp_path / "link", "it is a link to nothing"),
                        (tmp_path / ("x" * 300), "File name too long"), (tmp_path / "a\0b", "null")):
        for make in (make_directory, take_lock):
            with pytest.raises(UserError) as refused:
                make(path)
            message = str(refused.value)
            assert message.startswith(f"cannot create the directory {path}: ") and words in message


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot write in"):
        take_lock(tmp_path, "in use")


# Reading

def test_text_is_read_unchanged(tmp_path):
    text = "a\r\nb\rc\n\ufeffé☃😀\0"
    for mark in (b"", codecs.BOM_UTF8):  # the byte order mark of some editors is no text
        (tmp_path / "t").write_bytes(mark + text.encode())
        assert read_text(tmp_path / "t") == text == read_text(str(tmp_path / "t"))


def test_non_text_is_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"abc\n caf\xe9 ole")
    with pytest.raises(UserError, match="the path of a text is empty"):
        read_text("")
    for path, words in ((tmp_path, "is a directory, not a text file"), (tmp_path / "nosuch", "No such file"),
                        (str(tmp_path) + "\0", "null"),
                        (tmp_path / "latin", "is not UTF-8 text: byte 0xe9 at offset 8; convert it first")):
        with pytest.raises(UserError) as refused:
            read_text(path)
        assert str(path) in str(refused.value) and words in str(refused.value)


def test_sha256(tmp_path):
    for data in (b"", b"x" * 3_000_000):
        (tmp_path / "f").write_bytes(data)
        assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_a_mapped_file_with_the_same_bytes_stays(tmp_path, monkeypatch):
    """Windows refuses to replace a file that a process has mapped."""
    path = tmp_path / "train.bin"
    path.write_bytes(b"same")
    before = path.stat().st_ino
    monkeypatch.setattr("lib.files.os.replace", refused)
    with atomic_write(path) as [temporary]:
        temporary.write_bytes(b"same")
    assert (path.read_bytes(), path.stat().st_ino) == (b"same", before)
    for other in (path, tmp_path / "new.bin"):
        with pytest.raises(PermissionError), atomic_write(other) as [temporary]:
            temporary.write_bytes(b"other")
    assert path.read_bytes() == b"same" and list(tmp_path.iterdir()) == [path]


def refused(source, target):
    raise PermissionError(13, "Access is denied")
