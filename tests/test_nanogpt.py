"""nanoGPT's files, written here as its scripts write them: its checkpoints, data directories and meta.pkl."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_hf
import prepare_data
import sample
import train_gpt2
from core import nanogpt, pretrained
from core.corpus import prepare_text, pydoc_text, read_corpus
from lib.cli import UserError
from model import GPT

TEXT = pydoc_text(None)[:20_000] + "é☃😀"
ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, bias=False, vocab_size=len(set(TEXT)), dropout=0.1)


def random_weights(args):
    """A state_dict of nanoGPT's model: no biases unless args["bias"], one embedding under two names."""
    C, weights = args["n_embd"], {}
    generator = torch.Generator().manual_seed(0)

    def add(name, *shape, mean=0.0):
        weights[f"transformer.{name}"] = mean + 0.2 * torch.randn(shape, generator=generator)

    def add_layer(name, *shape, mean=0.0):
        add(f"{name}.weight", *shape, mean=mean)
        if args.get("bias", True):
            add(f"{name}.bias", shape[0])

    add("wte.weight", args["vocab_size"], C)
    add("wpe.weight", args["block_size"], C)
    for i in range(args["n_layer"]):
        for name, shape in (("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)), ("mlp.c_fc", (4 * C, C)),
                            ("mlp.c_proj", (C, 4 * C))):
            add_layer(f"h.{i}.{name}", *shape)
        add_layer(f"h.{i}.ln_1", C, mean=1)
        add_layer(f"h.{i}.ln_2", C, mean=1)
    add_layer("ln_f", C, mean=1)
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def expected_logits(weights, args, idx, approximate):
    """What nanoGPT's model computes, in float64 and from the weights' names alone."""
    w = {name: value.double() for name, value in weights.items()}
    T, n_head = idx.size(1), args["n_head"]

    def linear(x, name):
        return F.linear(x, w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias"))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"transformer.{name}.weight"] + w.get(f"transformer.{name}.bias", 0)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2)
                   for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1))
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate=approximate)
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


def write_checkpoint(path, prefix="", more=(), dataset="letters", edit=lambda content: None, **changes):
    """A checkpoint as train.py writes it; (its weights, its model_args)."""
    args = {name: value for name, value in (ARGS | changes).items() if value is not None}
    weights = random_weights(args)
    content = {
        "model": {prefix + name: value for name, value in (weights | dict(more)).items()},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}, "param_groups": []},
        "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": dataset, "out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }
    edit(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return weights, args


def vocabulary(text=TEXT):
    """What prepare.py puts in meta.pkl."""
    itos = dict(enumerate(sorted(set(text))))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {char: id for id, char in itos.items()}}


def write_data(directory, text=TEXT, protocol=None):
    """A data directory as prepare.py writes it, for characters."""
    directory.mkdir(parents=True, exist_ok=True)
    meta, cut = vocabulary(text), int(len(text) * 0.9)
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([meta["stoi"][char] for char in part], dtype=np.uint16).tofile(directory / f"{split}.bin")


@pytest.fixture
def checkout(tmp_path):
    """What training nanoGPT on `letters` leaves: out/ckpt.pt and data/letters/."""
    write_data(tmp_path / "nano/data/letters")
    write_checkpoint(tmp_path / "nano/out/ckpt.pt")
    return tmp_path / "nano"


# Checkpoints

@pytest.mark.parametrize("changes, approximate", [
    (dict(), "none"), (dict(bias=True, vocab_size=50304), "none"), (dict(vocab_size=50257), "none"),
    (dict(bias=None), "tanh"),  # before there was such an argument
], ids=["chars", "gpt2-padded", "gpt2", "old"])
def test_logits(tmp_path, checkout, changes, approximate):
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    weights, args = write_checkpoint(checkout / "out/ckpt.pt", prefix="_orig_mod.", more=mask, **changes)
    assert nanogpt.is_checkpoint(checkout / "out/ckpt.pt")
    found = nanogpt.find(checkout / "out/ckpt.pt", "no data")
    model = GPT(found.config).eval()
    model.load_state_dict(found.load_state())
    n = 50257 if args["vocab_size"] > 50000 else args["vocab_size"]
    idx = torch.randint(n, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(idx)[0]
    assert (logits - expected_logits(weights, args, idx, approximate)[..., :n]).abs().max() < 1e-5
    other = {"none": "tanh", "tanh": "none"}[approximate]
    assert (logits - expected_logits(weights, args, idx, other)[..., :n]).abs().max() > 1e-5  # the other GELU shows
    assert (found.tokenizer_kind, found.step, found.val_loss) == ("gpt2" if n == 50257 else "char", 7, 2.5)
    assert found.config.dropout == 0.1


def test_sampled_and_scored(tmp_path, checkout, monkeypatch, capsys):
    process = run("sample.py", "--ckpt", "nano/out/ckpt.pt", "--max_new_tokens", 30, "--json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "ckpt.pt: step 7, val loss 2.5000; characters of nano/out/../data/letters/meta.pkl" in process.stderr
    assert len(json.loads(process.stdout)["tokens"]) == 30
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:25], encoding="utf-8")
    sample.main(["--ckpt", "nano/out", "--score", "text.txt", "--json", "--device", "cpu"])
    weights, args = write_checkpoint(tmp_path / "same.pt")
    ids = torch.tensor([vocabulary()["stoi"][char] for char in TEXT[:25]])
    expected = F.cross_entropy(expected_logits(weights, args, ids[None, :-1], "none")[0], ids[1:])
    assert abs(json.loads(capsys.readouterr().out)["loss"] - expected) < 1e-5


def test_exported_and_opened_by_transformers(tmp_path, checkout):
    export_hf.main(["--ckpt", str(checkout / "out/ckpt.pt"), "--out", str(tmp_path / "exported")])
    theirs, tokenizer = (kind.from_pretrained(tmp_path / "exported") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(TEXT[-24:], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [vocabulary()["stoi"][char] for char in TEXT[-24:]]
    weights, args = write_checkpoint(tmp_path / "same.pt")
    with torch.no_grad():
        assert (theirs(ids).logits - expected_logits(weights, args, ids, "none")).abs().max() < 1e-5
    again, _ = pretrained.load(pretrained.find(tmp_path / "exported", "no data"))
    assert again.config.mlp == "gelu_erf"  # the activation travels back


def test_trained_on(tmp_path, checkout, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    take_over()
    args = ["--init_from=nano/out/ckpt.pt", "--dataset=mine", "--batch_size=4", "--eval_interval=2", "--device=cpu",
            "--sample_tokens=0", "--dtype=float32", "--learning_rate=0", "--run_name=r"]
    assert train_gpt2.main([*args, "--max_iters=2"]) == 0
    out = capsys.readouterr().out
    assert "weights from nano/out/ckpt.pt" in out and "gelu_erf" in out
    state = torch.load("checkpoints/r/best.pt", weights_only=True)["model_state_dict"]
    weights, _ = write_checkpoint(tmp_path / "same.pt")
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    shutil.rmtree(checkout)  # a run that resumes needs only its own checkpoints, and the links hold the data
    assert train_gpt2.main([*args, "--max_iters=3", "--resume"]) == 0
    write_checkpoint(checkout / "out/ckpt.pt", dataset="other")
    write_data(checkout / "data/other", TEXT.replace("a", "ä"))
    args[-1] = "--run_name=other"
    with pytest.raises(UserError, match="dataset=mine does not have the vocabulary of init_from=nano/out/ckpt"):
        train_gpt2.main(args)
    write_data(checkout / "data/other")
    with pytest.raises(UserError, match=r"n_layer=3 does not fit the weights of .*, which have n_layer=2"):
        train_gpt2.main([*args, "--n_layer=3"])
    assert train_gpt2.main([*args, "--max_iters=1", "--block_size=16"]) == 0
    state = torch.load("checkpoints/other/best.pt", weights_only=True)["model_state_dict"]
    assert torch.equal(state["transformer.wpe.weight"], weights["transformer.wpe.weight"][:16])


@pytest.mark.parametrize("edit, words", [
    (lambda c: c["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
    (lambda c: c["model"].update(x=torch.ones(2)), "x has no place in nanoGPT's model"),
    (lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(17)}), "is not a tensor of shape [16]"),
    (lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(16, dtype=torch.int32)}), "is not a tensor of"),
    (lambda c: c["model"].update({"transformer.ln_f.weight": 3}), "is not a tensor of shape [16]"),
    (lambda c: c["model"].update({"transformer.ln_f.weight": torch.full((16,), torch.nan)}), "not finite"),
    (lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"] + 1}), "lm_head.weight differs"),
    (lambda c: c["model_args"].update(rope=True), "rope is not among nanoGPT's"),
    (lambda c: c["model_args"].update(n_head=3), "n_embd=16 is not divisible by n_head=3"),
    (lambda c: c["model_args"].update(n_layer="2"), "n_layer must be an int"),
    (lambda c: c["model_args"].pop("n_layer"), "n_layer is missing"),
    (lambda c: c["model_args"].update(vocab_size=None), "vocab_size must be an int"),
    (lambda c: c["model_args"].update(vocab_size=60), "wte.weight is not a tensor of shape [60, 16]"),
])
def test_what_does_not_fit_is_refused_by_name(checkout, edit, words):
    path = checkout / "out/ckpt.pt"
    write_checkpoint(path, edit=edit)
    assert nanogpt.is_checkpoint(path)
    with pytest.raises(UserError) as error:
        pretrained.load(pretrained.find(path, "no data"))
    assert words in str(error.value) and str(path) in str(error.value)


def test_other_files_are_not_nanogpts(tmp_path, checkout):
    whole = (checkout / "out/ckpt.pt").read_bytes()
    (tmp_path / "text.pt").write_text("x")
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name in ("text.pt", "half.pt", "other.pt", "nosuch.pt", "nano", "a\0b"):
        assert not nanogpt.is_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=r"text.pt is damaged, or not a checkpoint"):
        pretrained.find(tmp_path / "text.pt", "data")
    damaged = bytearray(whole)
    damaged[whole.index(random_weights(ARGS)["transformer.wte.weight"].numpy().tobytes()) + 8] ^= 1
    (checkout / "out/ckpt.pt").write_bytes(damaged)
    with pytest.raises(UserError, match=r"ckpt.pt is damaged \(record "):
        sample.main(["--ckpt", str(checkout / "out/ckpt.pt")])


# Vocabularies

def test_the_characters_are_looked_for_in_four_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a/out/ckpt.pt"
    write_checkpoint(path)
    with pytest.raises(UserError) as error:
        nanogpt.find(path, "data")
    for place in (f"{path.parent}/meta.pkl", f"{path.parent}/../data/letters/meta.pkl", "data/letters/meta.pkl",
                  "data/letters/meta.json"):
        assert f"{place} does not exist" in str(error.value)
    assert f"{path} was trained on {ARGS['vocab_size']} characters" in str(error.value)
    prepare_text(TEXT, "letters", "char", "data")
    assert nanogpt.find(path, "data").vocabulary_path.name == "meta.json"
    for directory in (tmp_path / "data/letters", tmp_path / "a/data/letters", path.parent):
        write_data(directory)
        found = nanogpt.find(path, "data")
        assert found.vocabulary_path.resolve() == directory / "meta.pkl"
        assert found.load_tokenizer().vocabulary() == vocabulary()["stoi"]
    (path.parent / "meta.pkl").write_bytes(pickle.dumps(vocabulary("abc")))
    (tmp_path / "a/data/letters/meta.pkl").write_bytes(b"x")
    assert nanogpt.find(path, "data").vocabulary_path == Path("data/letters/meta.pkl")
    write_checkpoint(path, dataset=None)
    with pytest.raises(UserError, match=r"meta.pkl has 3 symbols$"):
        nanogpt.find(path, "data")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, protocol):
    write_data(tmp_path, protocol=protocol)
    assert nanogpt.read_characters(tmp_path / "meta.pkl").vocabulary() == vocabulary()["stoi"]


class Executed:
    """Calls os.mkdir when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", [
    lambda path: pickle.dumps(vocabulary() | {"x": Executed(path)}, 4),
    lambda path: pickle.dumps(Executed(path), 2), lambda path: pickle.dumps(Executed(path), 0),
    lambda path: f"(V{path}\nios\nmkdir\n.".encode(), lambda path: pickle.dumps(vocabulary() | {"n": np.int64(3)}),
    lambda path: pickle.dumps({1, 2}), lambda path: pickle.dumps(b"bytes"), lambda path: b"", lambda path: b"\x80\x04.",
    lambda path: b"\x80\x04]r\xff\xff\xff\0.", lambda path: b"\x80\x04}]K\x01s.", lambda path: b"\x82\x01.",
    lambda path: pickle.dumps("abc")[:-4], lambda path: b"\x80\x04" + b"]" * (2**24 + 1),
])
def test_pickles_of_more_than_plain_data_are_not_opened(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content(tmp_path / "executed"))
    with pytest.raises(UserError, match=r"meta.pkl is not a pickle of plain dicts, strings and numbers"):
        nanogpt.read_characters(tmp_path / "meta.pkl")
    assert os.listdir(tmp_path) == ["meta.pkl"]


@pytest.mark.parametrize("meta", [
    3, [], {}, {"vocab_size": 3}, vocabulary() | {"vocab_size": 3}, vocabulary() | {"stoi": {"a": 0}},
    vocabulary() | {"itos": 3}, vocabulary() | {"itos": {1: "a"}}, vocabulary() | {"itos": {0: "ab"}},
    dict(vocab_size=1, itos={0: "\ud800"}, stoi={"\ud800": 0}),
    vocabulary() | {"itos": [["a"]]}, vocabulary() | {"itos": [3]}, vocabulary() | {"itos": {0: "a", 1: "a"}},
])
def test_what_is_no_vocabulary_of_characters(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r"meta.pkl holds no vocabulary of characters"):
        nanogpt.read_characters(tmp_path / "meta.pkl")


# Data directories

def take_over(*more, name="mine"):
    prepare_data.main(["--from_nanogpt", "nano/data/letters", "--name", name, *more])


def test_a_data_directory_is_taken_over_without_copying(tmp_path, checkout, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = checkout / "data/letters"
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    take_over()
    out = capsys.readouterr().out
    assert "char tokenizer, " in out and f"begins {TEXT[:16]!r}" in out
    assert all((tmp_path / f"data/mine/{split}.bin").samefile(theirs / f"{split}.bin") for split in ("train", "val"))
    corpus, cut = read_corpus(tmp_path / "data/mine"), int(len(TEXT) * 0.9)
    assert corpus.tokenizer.decode(corpus.train) == TEXT[:cut] and corpus.tokenizer.decode(corpus.val) == TEXT[cut:]
    splits = json.loads((tmp_path / "data/mine/meta.json").read_text(encoding="utf-8"))["splits"]
    assert splits["val"]["bytes"] == len(TEXT[cut:].encode()) > splits["val"]["tokens"]
    take_over()
    assert "the same as before" in capsys.readouterr().out
    assert sorted(os.listdir("data/mine")) == [".lock", "meta.json", "train.bin", "val.bin"]
    (tmp_path / "t.txt").write_text("other text\n" * 9)
    args = ["--input", "t.txt", "--name", "mine"]
    with pytest.raises(UserError, match="data/mine was made from another text"):
        prepare_data.main(args)
    prepare_data.main([*args, "--overwrite"])
    with pytest.raises(UserError, match="data/mine was made from another text"):
        take_over()
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before
    take_over("--overwrite")
    assert read_corpus(tmp_path / "data/mine").fingerprint == corpus.fingerprint


@pytest.fixture
def no_hard_links(monkeypatch):
    """As between two file systems."""
    def refuse(*args, **options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


def test_symbolic_links_where_there_are_no_hard_ones(tmp_path, checkout, no_hard_links, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/train.bin.tmp").write_text("of a process that was killed")
    take_over()
    assert (tmp_path / "data/mine/train.bin").readlink() == checkout / "data/letters/train.bin"
    assert read_corpus(tmp_path / "data/mine").tokenizer.vocabulary() == vocabulary()["stoi"]


def test_links_to_our_own_files_are_not_turned_on_themselves(tmp_path, checkout, no_hard_links, monkeypatch):
    monkeypatch.chdir(tmp_path)
    take_over(name="ours")
    for split in ("train", "val"):  # nanoGPT reads our files, where they lie
        (tmp_path / f"data/ours/{split}.bin").unlink()
        shutil.copy(checkout / f"data/letters/{split}.bin", tmp_path / f"data/ours/{split}.bin")
        (checkout / f"data/letters/{split}.bin").unlink()
        (checkout / f"data/letters/{split}.bin").symlink_to(tmp_path / f"data/ours/{split}.bin")
    take_over(name="ours")
    assert len(read_corpus(tmp_path / "data/ours").train) > 0 and not (tmp_path / "data/ours/train.bin").is_symlink()


def test_a_data_set_of_ours_is_not_taken_for_nanogpts(tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is a data set of this project.*--dataset=tiny"):
        prepare_data.main(["--from_nanogpt", str(data_dir / "tiny"), "--name", "copy"])
    assert not (tmp_path / "data/copy").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_directory_that_is_the_data_set_only_gets_meta_json(tmp_path, checkout, no_hard_links, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    if link:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/letters").symlink_to(checkout / "data/letters")
    take_over(*([] if link else ["--data_dir", "nano/data"]), name="letters")
    assert sorted(path.name for path in (checkout / "data/letters").iterdir()) == [
        ".lock", "meta.json", "meta.pkl", "train.bin", "val.bin"]
    assert not (checkout / "data/letters/train.bin").is_symlink()  # which would be one to itself
    assert read_corpus(checkout / "data/letters").tokenizer.vocabulary() == vocabulary()["stoi"]


def test_gpt2_ids(tmp_path, downloads):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/downloads").symlink_to(downloads)
    (tmp_path / "nano").mkdir()
    for split, ids in (("train", [464, 4875, 0, 50256]), ("val", [40, 716])):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / f"nano/{split}.bin")
    process = run("prepare_data.py", "--from_nanogpt", "nano", "--name", "mine", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "gpt2 tokenizer (there is no meta.pkl), 50,257 symbols" in process.stdout
    corpus = read_corpus(tmp_path / "data/mine")
    assert corpus.tokenizer.decode(corpus.val) == "I am" and corpus.train.tolist() == [464, 4875, 0, 50256]
    np.array([1, 50257], dtype=np.uint16).tofile(tmp_path / "nano/val.bin")
    with pytest.raises(UserError, match=r"val.bin holds id 50,257, outside the gpt2 vocabulary of 50,257 symbols"):
        nanogpt.take_over(tmp_path / "nano", "x", str(tmp_path / "data"))
    assert not (tmp_path / "data/x").exists()


@pytest.mark.parametrize("harm, words", [
    (lambda d: (d / "val.bin").unlink(), "is not a data directory of nanoGPT: nano/data/letters/val.bin missing"),
    (lambda d: shutil.rmtree(d), "train.bin and nano/data/letters/val.bin missing"),
    (lambda d: (d / "val.bin").write_bytes(bytes(5)), "nano/data/letters/val.bin has 5 bytes"),
    (lambda d: (d / "val.bin").write_bytes(b"ab"), "nano/data/letters/val.bin has 2 bytes"),
    (lambda d: (d / "train.bin").write_bytes(b"\0\0\xff\xff"), "holds id 65,535, outside the char vocabulary of"),
    (lambda d: (d / "meta.pkl").write_bytes(b"x"), "meta.pkl is not a pickle of plain dicts"),
])
def test_data_directories_that_are_refused(tmp_path, checkout, monkeypatch, harm, words):
    monkeypatch.chdir(tmp_path)
    harm(checkout / "data/letters")
    with pytest.raises(UserError) as error:
        take_over()
    assert words in str(error.value) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("args, words", [
    ("--from_nanogpt nano", "--name NAME"), ("--from_nanogpt nano --name pydoc", "--name NAME"),
    ("--from_nanogpt nano --input x --name y", "give a corpus"), ("pydoc --from_nanogpt nano", "give a corpus"),
    ("--from_nanogpt nano --name y --tokenizer gpt2", "leave --tokenizer"),
])
def test_flags_that_do_not_go_together(args, words):
    with pytest.raises(UserError, match=words):
        prepare_data.main(args.split())


def test_nanogpt_reads_our_files(data_dir):
    """As train.py does: raw uint16 in the machine's order, windows at random positions, targets one token on."""
    ids = np.memmap(data_dir / "tiny/train.bin", dtype=np.uint16, mode="r")
    starts = torch.randint(len(ids) - 32, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    x, y = (torch.stack([torch.from_numpy(ids[i + shift : i + shift + 32].astype(np.int64)) for i in starts])
            for shift in (0, 1))
    assert torch.equal(x[:, 1:], y[:, :-1])
    itos = json.loads((data_dir / "tiny/meta.json").read_text(encoding="utf-8"))["tokenizer"]["itos"]
    text = pydoc_text(None)[: len(ids) + 1]
    for windows, shift in ((x, 0), (y, 1)):
        assert ["".join(itos[id] for id in row) for row in windows.tolist()] == [
            text[i + shift : i + shift + 32] for i in starts]
