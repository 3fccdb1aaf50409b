import json

import numpy as np
import pytest
from helpers import files_up_to

from core.corpus import SPLITS, open_corpus, prepare_text, read_corpus, write_corpus
from core.tokenizer import CharTokenizer
from lib.cli import UserError


@pytest.fixture
def corpus_dir(tmp_path):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    texts = {"train": "abc def é" * 5, "val": "hgf é"}
    write_corpus(tmp_path / "c", tokenizer, {split: tokenizer.encode(text) for split, text in texts.items()})
    return tmp_path / "c"


def test_files_are_raw_uint16(corpus_dir):
    corpus = read_corpus(corpus_dir)
    for split, text in (("train", "abc def é" * 5), ("val", "hgf é")):
        ids = np.fromfile(corpus_dir / f"{split}.bin", dtype="<u2")
        assert np.array_equal(ids, getattr(corpus, split))
        assert corpus.tokenizer.decode(ids) == text
        meta = json.loads((corpus_dir / "meta.json").read_text())["splits"][split]
        assert (meta["tokens"], meta["bytes"]) == (len(text), len(text.encode()))
    assert sorted(path.name for path in corpus_dir.iterdir()) == [".lock", "meta.json", "train.bin", "val.bin"]


def test_different_data_have_different_fingerprints(corpus_dir, tmp_path):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    ids = {split: tokenizer.encode("abc" * 9) for split in SPLITS}
    write_corpus(tmp_path / "d", tokenizer, ids)
    write_corpus(tmp_path / "e", CharTokenizer.from_text("abcdefghié"), ids)
    prints = {read_corpus(directory).fingerprint for directory in (corpus_dir, tmp_path / "d", tmp_path / "e")}
    assert len(prints) == 3
    write_corpus(tmp_path / "d2", tokenizer, ids)
    assert read_corpus(tmp_path / "d2").fingerprint in prints


def damage_meta(change):
    def damage(directory):
        meta = json.loads((directory / "meta.json").read_text())
        change(meta)
        meta.pop("sha256")  # data sets prepared before it was introduced have none
        (directory / "meta.json").write_text(json.dumps(meta))
    return damage


def flip_byte(directory):
    data = bytearray((directory / "train.bin").read_bytes())
    data[6] ^= 1
    (directory / "train.bin").write_bytes(data)


def write_ids_over_the_vocabulary(directory):
    tokenizer = CharTokenizer.from_text("abcdefgh é")
    tokenizer.token_bytes = np.ones(99, dtype=int)
    write_corpus(directory, tokenizer, {"train": np.array([1, 98]), "val": np.array([1, 2])}, overwrite=True)


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "train.bin").write_bytes(b"\0" * 20), "train.bin has 20 bytes"),
    (flip_byte, "sha256"),
    (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    (lambda f: (f / "meta.json").unlink(), "no meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff"), "meta.json"),
    (lambda f: (f / "meta.json").write_text("[]"), "meta.json"),
    (damage_meta(lambda m: m.pop("splits")), "splits"),
    (damage_meta(lambda m: m.update(format_version=9)), "format 9"),
    (damage_meta(lambda m: m.update(vocab_size=11)), "vocab_size says 11"),
    (damage_meta(lambda m: m["splits"]["val"].update(tokens="5")), "splits.val"),
    (damage_meta(lambda m: m["tokenizer"].update(kind="word")), "word"),
    (damage_meta(lambda m: m["splits"].pop("val")), "it lacks 'val'"),
    (write_ids_over_the_vocabulary, "id 98"),
])
def test_damaged_data_is_refused(corpus_dir, damage, words):
    damage(corpus_dir)
    with pytest.raises(UserError, match=words):
        read_corpus(corpus_dir)


def test_a_built_in_data_set_is_prepared_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("core.corpus.CORPORA", {"abc": (lambda data_dir: "abcab" * 10, "char")})
    for line in ("data set abc is not prepared yet: preparing it\n", ""):
        corpus = open_corpus("abc", str(tmp_path))
        assert corpus.tokenizer.decode(corpus.train) == "abcab" * 9 and corpus.tokenizer.decode(corpus.val) == "abcab"
        assert capsys.readouterr().out.startswith(line)
    with pytest.raises(UserError, match="other is not a prepared data set"):
        open_corpus("other", str(tmp_path))


def test_a_failed_write_leaves_the_old_data_set(corpus_dir):
    before = {path.name: path.read_bytes() for path in corpus_dir.iterdir()}
    tokenizer = CharTokenizer.from_text("xyz")
    with pytest.raises(KeyError):
        write_corpus(corpus_dir, tokenizer, {"train": tokenizer.encode("xyz")}, overwrite=True)  # no val
    (corpus_dir / "meta.json.tmp").mkdir()
    with pytest.raises(UserError, match=r"cannot write the data set .*c: "):
        write_corpus(corpus_dir, tokenizer, dict.fromkeys(SPLITS, tokenizer.encode("xyz")), overwrite=True)
    (corpus_dir / "meta.json.tmp").rmdir()
    with files_up_to(1000), pytest.raises(UserError, match=r"cannot write the data set .*c: File too large"):
        write_corpus(corpus_dir, tokenizer, dict.fromkeys(SPLITS, tokenizer.encode("xyz" * 999)), overwrite=True)
    assert {path.name: path.read_bytes() for path in corpus_dir.iterdir()} == before


def test_a_file_in_the_way_of_a_data_set_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot create the directory .*taken"):
        prepare_text("abc" * 20, "taken", "char", str(tmp_path))


@pytest.mark.parametrize("change", [
    lambda meta: meta["tokenizer"]["itos"].reverse() or meta["tokenizer"].pop("stoi"),
    lambda meta: meta["splits"]["val"].update(bytes=7), lambda meta: meta.update(more=1),
])
def test_meta_json_has_not_been_changed(corpus_dir, change):
    path = corpus_dir / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json is damaged: its content does not match its sha256; prepare"):
        read_corpus(corpus_dir)


def test_other_data_are_replaced_only_on_request(tmp_path, capsys):
    def prepare(text, **options):
        prepare_text(text, "c", "char", str(tmp_path), **options)
        return capsys.readouterr().out

    def files():
        return {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    assert prepare("abc" * 30).endswith("val 9 tokens\n")
    first = files()
    assert prepare("abc" * 30).endswith("; the same as before\n") and files() == first
    for text, fraction in (("abd" * 30, 0.1), ("abc" * 31, 0.1), ("abc" * 30, 0.2)):
        with pytest.raises(UserError, match=r"c was made from another text: choose .* --overwrite \(runs"):
            prepare(text, val_fraction=fraction)
    assert files() == first
    (tmp_path / "c/train.bin").write_bytes(b"of another program")
    with pytest.raises(UserError, match="was made from another text"):
        prepare("abc" * 30)
    assert prepare("abc" * 30, overwrite=True).endswith("; replaces other data\n") and files() == first
    (tmp_path / "c/meta.json").write_text("{")  # what is left says whether it is the same
    assert prepare("abc" * 30).endswith("; the same as before\n") and files() == first
    (tmp_path / "c/meta.json").unlink()  # another program's data
    with pytest.raises(UserError, match="was made from another text"):
        prepare("xxyz" * 30)
    assert prepare("xxyz" * 30, overwrite=True).endswith("; replaces other data\n")
    assert read_corpus(tmp_path / "c").tokenizer.itos == list("xyz")
