import json
import shutil
import sys

import numpy as np
import pytest
from helpers import assert_refused, run

from core.corpus import pydoc_text, read_corpus
from lib.cli import run_script
from prepare_data import first_lines, main

OFFLINE = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.mark.parametrize("name, vocab_size, n_train, n_val", [
    ("shakespeare", 50257, 301_966, 36_059), ("shakespeare_char", 65, 1_003_854, 111_540),
])
def test_shakespeare(downloads, tmp_path, name, vocab_size, n_train, n_val):
    shutil.copytree(downloads, tmp_path / "data/downloads")
    process = run("prepare_data.py", name, cwd=tmp_path, env=OFFLINE)
    assert process.returncode == 0, process.stderr
    assert f"{n_train:,}" in process.stdout and f"{n_val:,}" in process.stdout
    corpus = read_corpus(tmp_path / "data" / name)
    text = (downloads / "tinyshakespeare.txt").read_bytes().decode()
    assert (corpus.tokenizer.vocab_size, len(corpus.train), len(corpus.val)) == (vocab_size, n_train, n_val)
    assert corpus.tokenizer.decode(corpus.train) == text[:1_003_854]
    assert corpus.tokenizer.decode(corpus.val) == text[1_003_854:]
    splits = json.loads((tmp_path / "data" / name / "meta.json").read_text(encoding="utf-8"))["splits"]
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == 1_115_394


def test_pydoc_needs_no_download(tmp_path):
    process = run("prepare_data.py", "pydoc", cwd=tmp_path, env=OFFLINE)
    assert process.returncode == 0, process.stderr
    corpus = read_corpus(tmp_path / "data/pydoc")
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == pydoc_text(None)


def test_own_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("Zeile eins\r\nZwei: ß\n".encode())
    (tmp_path / "b.txt").write_bytes(b"drei\nvier")
    process = run("prepare_data.py", "--input", "a.txt", "b.txt", "--name", "mine", "--val_fraction", "0.4",
                  "--max_lines", "3", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    corpus = read_corpus(tmp_path / "data/mine")
    text = "Zeile eins\r\nZwei: ß\ndrei\n"
    cut = int(len(text) * 0.6)
    assert corpus.tokenizer.decode(corpus.train) == text[:cut]
    assert corpus.tokenizer.decode(corpus.val) == text[cut:]


@pytest.mark.parametrize("text, n_lines, expected", [
    ("a\nb\nc", 2, "a\nb\n"), ("a\nb\nc", 3, "a\nb\nc"), ("a\nb\nc\n", 3, "a\nb\nc\n"), ("\n\n", 1, "\n"),
    ("a", 9, "a"),
])
def test_first_lines(text, n_lines, expected):
    assert first_lines(text, n_lines) == expected


def files(tmp_path):
    """Bad and good inputs in `tmp_path`."""
    (tmp_path / "good.txt").write_text("some text\n" * 9)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"abc\n caf\xe9 ole")
    many = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x13000)]))
    (tmp_path / "many.txt").write_text(many, encoding="utf-8")
    (tmp_path / "directory").mkdir()


@pytest.mark.parametrize("args, words", [
    ("", ["give a corpus"]),
    ("shakespear", ["unknown corpus", "did you mean shakespeare?"]),
    ("Shakespeare", ["unknown corpus", "did you mean shakespeare?"]),
    ("good.txt", ["good.txt is a file: python prepare_data.py --input good.txt --name good"]),
    ("pydoc --input good.txt", ["give a corpus"]), ("pydoc --name shakespeare", ["--name NAME", "shakespeare"]),
    ("--input nosuch.txt --name x", ["cannot read nosuch.txt"]),
    ("--input directory --name x", ["directory is a directory"]),
    ("--input empty.txt --name x", ["is empty"]),
    ("--input latin.txt --name x", ["latin.txt", "not UTF-8", "0xe9", "offset 8"]),
    ("--input one.txt --name x", ["train split", "0 tokens"]),
    ("--input good.txt --name x --val_fraction 0.001", ["val split"]),
    ("--input many.txt --name x", ["75,775", "65,536"]),
    ("--input good.txt", ["--name NAME"]),
    ("--input good.txt --name pydoc", ["--name NAME"]),
    ("--input good.txt --name ../x", ["--name NAME"]),
    ("pydoc --max_lines 10", ["--name NAME"]),
    ("--input good.txt --name x --val_fraction 1.5", ["val_fraction", "< 1"]),
    ("--input good.txt --name x --max_lines 0", ["max_lines", ">= 1"]),
])
def test_bad_input(tmp_path, monkeypatch, capsys, args, words):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *args.split()])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "data").exists()


def test_what_is_prepared_already_is_not_an_unknown_corpus(tmp_path):
    (tmp_path / "good.txt").write_text("some text\n" * 9)
    assert run("prepare_data.py", "--input", "good.txt", "--name", "tiny", cwd=tmp_path).returncode == 0
    assert_refused(run("prepare_data.py", "tiny", cwd=tmp_path),
                   "tiny is prepared already: python train_gpt2.py configs/quickstart.py --dataset=tiny")


def test_without_network(tmp_path):
    process = run("prepare_data.py", "shakespeare", cwd=tmp_path, env=OFFLINE)
    assert_refused(process, "cannot download https://raw.githubusercontent.com", "by hand",
                   "data/downloads/tinyshakespeare.txt", "(sha256 86c4e6aa9db7c042")
    assert list(tmp_path.glob("data/*")) == [tmp_path / "data/downloads"]
    assert [path.name for path in tmp_path.glob("data/downloads/*")] == [".lock"]
