"""What is exported is opened by transformers: the same logits, the same ids, the same bits back."""

import json
import os
import re
import resource

import pytest
import torch
from helpers import assert_refused, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import export_hf
import sample
from core import pretrained
from core.checkpoint import save_checkpoint
from core.corpus import pydoc_text
from core.huggingface import VOCABULARY_ROWS
from core.tokenizer import CharTokenizer, GPT2Tokenizer
from lib.cli import UserError
from model import GPT, GPTConfig

ODD = "é☃😀 \t\r\x85\u2028  <unk> I'm\n\n x'S"


@pytest.fixture(scope="module")
def text():
    return pydoc_text(None)[:20_000] + ODD


LLAMA = dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False)


def write_checkpoint(path, tokenizer, gain=0.0, **shape):
    """A checkpoint of a small random model, whose gains (about `gain`) and biases are random too; the model."""
    torch.manual_seed(0)
    shape = dict(block_size=24, n_layer=2, n_head=2, n_embd=16) | shape
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, gain if p.dim() == 1 else 0.0, 0.1)
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
    n = model.config.block_size
    x = torch.tensor(ids[: 3 * n]).view(3, n)
    with torch.no_grad():
        assert (theirs(x).logits - model(x)[0]).abs().max() < 1e-5
    assert set(their_tokenizer(text[:9])) == {"input_ids", "attention_mask"}  # what generate() takes
    return theirs


def assert_loads_back(directory, model, tokenizer):
    """All bits but the rows that pad the vocabulary; biases that the model does not have are zeros."""
    ours, our_tokenizer = pretrained.load(pretrained.find(directory, "no data"))
    assert our_tokenizer.state() == tokenizer.state()
    there = dict(model.named_parameters())
    for name, value in ours.named_parameters():
        value = value[: model.config.vocab_size] if name in VOCABULARY_ROWS else value
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
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # all readable by others, or none
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer_config.json",
        "vocab.json"]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("layout, qk_norm", [("Llama", False), ("Qwen3", True)])
def test_the_modern_family_is_a_llama_or_a_qwen3(tmp_path, text, layout, qk_norm, tie, capsys):
    tokenizer = CharTokenizer.from_text(text)
    shape = LLAMA | dict(tie_weights=tie, qk_norm=qk_norm, block_size=256, n_embd=48, n_head=4)
    model = write_checkpoint(tmp_path / "m.pt", tokenizer, gain=2.0, **shape)
    export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    assert f"{layout}'s layout" in (out := capsys.readouterr().out) and "--init_from" not in out
    theirs = assert_opened_by_transformers(tmp_path / "out", model, tokenizer, text)
    assert type(theirs).__name__ == f"{layout}ForCausalLM" and theirs.config.tie_word_embeddings == tie
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    prompt = "é☃\n a"
    ids = fast(prompt, return_tensors="pt")["input_ids"]
    sample.main(["--ckpt", str(tmp_path / "m.pt"), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "200",
                 "--device", "cpu", "--dtype", "float32", "--json"])
    ours = json.loads(capsys.readouterr().out)
    generated = theirs.generate(ids, do_sample=False, max_new_tokens=200)[0, ids.size(1) :]
    assert generated.tolist() == ours["tokens"] and fast.decode(generated) == ours["text"]
    assert len(set(ours["tokens"])) > 3  # not one token over and over
    with pytest.raises(UserError, match=f"model_type={layout.lower()} is not supported"):
        pretrained.find(tmp_path / "out", "no data")


def test_a_llama_with_gpt2_tokens(tmp_path, text, downloads):
    tokenizer = GPT2Tokenizer((downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8"))
    model = write_checkpoint(tmp_path / "m.pt", tokenizer, gain=1.0, n_layer=1, **LLAMA)
    export_hf.main(["--ckpt", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")])
    theirs = assert_opened_by_transformers(tmp_path / "out", model, tokenizer, text)
    assert theirs.model.embed_tokens.weight.shape == (50257, 16)  # without padding
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 50256


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
    with pytest.raises(UserError, match="fits none of Hugging Face's layouts") as error:
        export_hf.main(args)
    assert str(error.value).endswith(
        "GPT-2's lacks norm=rmsnorm, mlp=swiglu, pos=sinusoidal (it has norm=layernorm, mlp=gelu or gelu_erf, "
        "pos=learned, qk_norm=False); Llama's lacks pos=sinusoidal, bias=True (it has norm=rmsnorm, mlp=swiglu, "
        "pos=rope, bias=False)")
    for changes, words in ((dict(norm="layernorm"), "norm=layernorm"), (dict(bias=True), "bias=True"),
                           (dict(mlp="relu2"), "mlp=relu2"), (dict(mlp="gelu"), "mlp=gelu")):
        write_checkpoint(tmp_path / "m.pt", tokenizer, **LLAMA | changes)
        with pytest.raises(UserError, match=re.escape(f"Llama's lacks {words} (it has")):
            export_hf.main(args)
    write_checkpoint(tmp_path / "m.pt", tokenizer, qk_norm=True)
    with pytest.raises(UserError, match=re.escape("GPT-2's lacks qk_norm=True (it has")):
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
