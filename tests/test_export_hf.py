"""What is exported is opened by transformers: the same logits, the same ids, the same bits back."""

import os
import resource

import pytest
import torch
from helpers import assert_refused, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_hf
import sample
from core import huggingface
from core.checkpoint import save_checkpoint
from core.corpus import pydoc_text
from core.tokenizer import CharTokenizer, GPT2Tokenizer
from lib.cli import UserError
from model import GPT, GPTConfig

ODD = "é☃😀 \t\r\x85\u2028  <unk> I'm\n\n x'S"


@pytest.fixture(scope="module")
def text():
    return pydoc_text(None)[:20_000] + ODD


def write_checkpoint(path, tokenizer, **shape):
    """A checkpoint of a small random model, whose gains and biases are random too; the model."""
    torch.manual_seed(0)
    shape = dict(block_size=24, n_layer=2, n_head=2, n_embd=16) | shape
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {
        "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "scaler_state_dict": {},
        "config": vars(model.config), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.state(),
        "data_fingerprint": "", "epoch": 0, "step": 3, "val_loss": None, "best_val_loss": None, "best_step": None,
        "evals_without_better": 0, "pending_losses": []})
    return model


def assert_opened_by_transformers(out, model, tokenizer, text):
    """Logits within 1e-5, ids and text equal."""
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(text).tolist()
    assert their_tokenizer(text)["input_ids"] == ids and their_tokenizer.decode(ids) == text
    x = torch.tensor(ids[:72]).view(3, 24)
    with torch.no_grad():
        assert (theirs(x).logits - model(x)[0]).abs().max() < 1e-5
    return theirs


def assert_loads_back(directory, model, tokenizer):
    """All bits but the rows that pad the vocabulary; biases that the model does not have are zeros."""
    ours, our_tokenizer = huggingface.load(directory, "no data")
    assert our_tokenizer.state() == tokenizer.state()
    there = dict(model.named_parameters())
    for name, value in ours.named_parameters():
        value = value[: model.config.vocab_size] if name in huggingface.VOCABULARY_ROWS else value
        assert torch.equal(value, there[name][: len(value)] if name in there else torch.zeros_like(value)), name


@pytest.mark.parametrize("shape", [dict(), dict(bias=False, tie_weights=False)], ids=["plain", "no-bias-untied"])
def test_characters(tmp_path, text, shape):
    tokenizer = CharTokenizer.from_text(text)
    model = write_checkpoint(tmp_path / "m.pt", tokenizer, **shape)
    assert export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "a/out")]) is None
    theirs = assert_opened_by_transformers(tmp_path / "a/out", model, tokenizer, text)
    assert theirs.config.tie_word_embeddings == model.config.tie_weights
    assert_loads_back(tmp_path / "a/out", model, tokenizer)
    theirs.save_pretrained(tmp_path / "back")
    AutoTokenizer.from_pretrained(tmp_path / "a/out").save_pretrained(tmp_path / "back")
    assert_loads_back(tmp_path / "back", model, tokenizer)  # ours -> theirs -> ours
    with pytest.raises(Exception, match="UNK"):  # no other character is mistaken for one of these
        AutoTokenizer.from_pretrained(tmp_path / "back")("Ж")


def test_gpt2_bpe_as_a_process(tmp_path, text, downloads):
    tokenizer = GPT2Tokenizer((downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8"))
    model = write_checkpoint(tmp_path / "checkpoints/r/best.pt", tokenizer, n_layer=1)
    process = run("export_hf.py", "--ckpt", "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "checkpoints/r/best.pt -> out" in process.stdout
    theirs = assert_opened_by_transformers(tmp_path / "out", model, tokenizer, text)
    assert theirs.transformer.wte.weight.shape == (50257, 16) and theirs.config.eos_token_id == 50256
    assert_loads_back(tmp_path / "out", model, tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "merges.txt", "model.safetensors",
                                                    "tokenizer_config.json", "vocab.json"]


def test_sampling_from_an_exported_directory_is_sampling_from_the_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path / "m.pt", CharTokenizer("\nabc"))
    export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    texts = []
    for path in ("m.pt", "out"):
        capsys.readouterr()
        sample.main(["--ckpt", str(tmp_path / path), "--max_new_tokens", "50", "--device", "cpu"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == 52


def test_what_cannot_be_exported_is_named(tmp_path):
    tokenizer = CharTokenizer("abc")
    write_checkpoint(tmp_path / "m.pt", tokenizer, norm="rmsnorm", mlp="swiglu", pos="sinusoidal")
    args = ["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="norm=rmsnorm, mlp=swiglu, pos=sinusoidal have no counterpart") as error:
        export_hf.main(args)
    assert "only norm=layernorm, mlp=gelu, pos=learned can be exported" in str(error.value)
    write_checkpoint(tmp_path / "m.pt", tokenizer, pos="rope")
    with pytest.raises(UserError, match="pos=rope has no counterpart"):
        export_hf.main(args)
    assert os.listdir(tmp_path) == ["m.pt"]


def test_directories_that_cannot_be_written(tmp_path):
    write_checkpoint(tmp_path / "m.pt", CharTokenizer("abc"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, words in (("full", "already exists"), ("file", "already exists"), ("file/out", "file"),
                       ("x" * 300, "name too long")):
        with pytest.raises(UserError, match=words):
            export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match=r"nosuch.pt"):
        export_hf.main(["--ckpt", str(tmp_path / "nosuch.pt"), "--out", str(tmp_path / "out")])
    process = run("export_hf.py", "--ckpt", "m.pt", "--out", "out", cwd=tmp_path,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))  # bytes a file may have
    assert_refused(process, "cannot write out: ", "File too large")
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "m.pt"]
    (tmp_path / "out").mkdir()  # empty: it may be filled
    export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    assert load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"].shape == (3, 16)
    assert (tmp_path / "full/x").read_text() == (tmp_path / "file").read_text() == "mine"
