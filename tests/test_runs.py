"""Checkpoints found, opened and named from outside their run."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import flip_bit, whole_content

from core.checkpoint import save_checkpoint, step_path
from core.config import TrainConfig, resolve
from core.runs import find_checkpoint, free_run_name, load_model, peek
from core.tokenizer import CharTokenizer
from core.trainer import Trainer
from lib.cli import UserError


def test_peek_skips_unreadable_files_without_verifying(tmp_path):
    assert peek(tmp_path) == (None, None)
    for step in (1, 2, 3):
        save_checkpoint(step_path(tmp_path, step), whole_content(step))
    torch.save({"config": []}, step_path(tmp_path, 2))
    step_path(tmp_path, 3).write_bytes(b"PK")
    flip_bit(step_path(tmp_path, 1), b"\x00\x00\x80\x3f" * 50)  # 1.0: in the weights
    path, saved = peek(tmp_path)
    assert (path, saved["step"]) == (step_path(tmp_path, 1), 1)


def test_peek_names_what_is_wrong_if_none_is_left(tmp_path):
    torch.save({"config": []}, step_path(tmp_path, 2))
    (tmp_path / "best.pt").write_bytes(b"PK")
    with pytest.raises(UserError) as refused:
        peek(tmp_path)
    for words in ("step_00000002.pt is not a whole checkpoint", "best.pt is damaged", "no checkpoint in"):
        assert words in str(refused.value)


def test_a_checkpoint_pruned_while_it_is_looked_for(tmp_path, monkeypatch):
    """A run that saves and prunes between the listing of its files and their reading."""
    def save_next(step):
        save_checkpoint(step_path(tmp_path / "r", step), model_content()[0] | {"step": step})
        step_path(tmp_path / "r", step - 1).unlink(missing_ok=True)

    (tmp_path / "r").mkdir()
    save_next(1)
    stat, zip_file = Path.stat, zipfile.ZipFile

    def pruned_before(function, first):
        saved = iter(range(first, first + 2))  # it happens twice

        def call(path, *args, **kwargs):
            if Path(path).suffix == ".pt" and (step := next(saved, None)):
                save_next(step)
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "stat", pruned_before(stat, 2))
    assert find_checkpoint(tmp_path) == step_path(tmp_path / "r", 3)
    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr("zipfile.ZipFile", pruned_before(zip_file, 4))
    for name in (tmp_path, tmp_path / "r"):
        assert load_model(name)[0] == step_path(tmp_path / "r", 5)
    with pytest.raises(UserError, match=r"step_00000004\.pt is neither a file nor a run directory"):
        load_model(step_path(tmp_path / "r", 4))


def test_a_link_to_nothing_is_no_checkpoint(tmp_path):
    (tmp_path / "dangling.pt").symlink_to("nosuch")
    with pytest.raises(UserError, match="has no checkpoints"):
        find_checkpoint(tmp_path)


def test_the_next_free_name(tmp_path):
    def name(**fields):
        return free_run_name(TrainConfig(out_dir=str(tmp_path), run_name="r", **fields))

    assert name() == name(resume=True) == "r"
    (tmp_path / "r").mkdir()
    assert name() == "r"
    (tmp_path / "r/best.pt").write_bytes(b"even a damaged one")
    assert (name(), name(resume=True)) == ("r-2", "r")
    (tmp_path / "r-2").mkdir()
    step_path(tmp_path / "r-2", 3).write_bytes(b"")
    assert (name(), name(resume=True)) == ("r-3", "r-2")
    (tmp_path / "r/best.pt").unlink()  # a gap
    (tmp_path / "r-x").mkdir()
    assert (name(), name(resume=True)) == ("r-3", "r-2")


def test_find_checkpoint(tmp_path):
    for name in ("", "empty", "nosuch"):
        with pytest.raises(UserError):
            find_checkpoint(tmp_path / name)
    # As a copied run, whose files are written in any order.
    for time, (name, step) in enumerate((("b/best.pt", 4), ("a/step_00000009.pt", 9), ("a/best.pt", 7),
                                         ("a/step_00000008.pt", 8), ("b/step_00000002.pt", 2))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_checkpoint(tmp_path / name, whole_content(step))
        os.utime(tmp_path / name, (time, time))
    assert find_checkpoint(tmp_path / "a") == tmp_path / "a/step_00000009.pt"
    assert find_checkpoint(tmp_path / "b") == find_checkpoint(tmp_path) == tmp_path / "b/best.pt"
    save_checkpoint(tmp_path / "a/copy.pt", whole_content(1))  # save_path of train_model
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "a") == tmp_path / "a/copy.pt"
    (tmp_path / "a/copy.pt").unlink()
    assert find_checkpoint(tmp_path / "a/best.pt") == tmp_path / "a/best.pt"
    (tmp_path / "b/dangling.pt").symlink_to("nosuch")
    assert find_checkpoint(tmp_path / "b") == tmp_path / "b/best.pt"


def model_content(**shape):
    """The content of a whole checkpoint of a small model on three characters; the model."""
    cfg = resolve(TrainConfig(device="cpu", dtype="float32", compile="false", max_iters=5, run_name="r",
                              **dict(n_layer=1, n_head=2, n_embd=8, block_size=4) | shape), n_windows=9)
    trainer = Trainer(cfg, 3)
    state = {"config": vars(cfg), "tokenizer": CharTokenizer("abc").state()}
    return whole_content(4) | trainer.state_dict() | state, trainer.model


@pytest.mark.parametrize("shape", [{}, dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False, tie_weights=False)])
def test_a_model_comes_back(tmp_path, shape):
    saved, model = model_content(dropout=0.25, **shape)
    save_checkpoint(tmp_path / "a.pt", saved)
    path, loaded, tokenizer, found = load_model(tmp_path / "a.pt")
    assert path == tmp_path / "a.pt" and loaded.config == model.config and tokenizer.itos == list("abc")
    assert found["step"] == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_checkpoint_older_than_qk_norm_comes_back(tmp_path):
    saved, model = model_content()
    saved["config"] = {name: value for name, value in saved["config"].items() if name != "qk_norm"}
    save_checkpoint(tmp_path / "a.pt", saved)
    assert load_model(tmp_path / "a.pt")[1].config == model.config


@pytest.mark.parametrize("change, words", [
    (lambda c: c["config"].update(n_layer=0, mlp="silu"), "n_layer must be an int >= 1 and < 10000, not 0"),
    (lambda c: c["config"].update(mlp="silu"), "mlp must be one of gelu, gelu_erf, swiglu, relu2, not 'silu'"),
    (lambda c: c["config"].pop("pos"), "do not fit its config: 'pos'"),
    (lambda c: c["config"].update(n_layer=2), "do not fit its config: Error(s) in loading state_dict for GPT: Missing"),
    (lambda c: c["config"].update(n_head=3), "n_embd=8 is not divisible by n_head=3"),
    (lambda c: c["model_state_dict"].clear(), "do not fit its config"),
    (lambda c: c["model_state_dict"].update({"lm_head.weight": 3}), "does not hold tensors only"),
    (lambda c: c["model_state_dict"]["transformer.ln_f.weight"].fill_(torch.nan), "weights or moments are not finite"),
    (lambda c: c["tokenizer"].update(kind="word"), "'word'"),
    (lambda c: c["tokenizer"].pop("itos"), "tokenizer"),
    (lambda c: c["tokenizer"].update(CharTokenizer("ab").state()), "vocab_size is 3, but the tokenizer has 2 symbols"),
    (lambda c: c.update(tokenizer=CharTokenizer("abcd").state(), vocab_size=4), "do not fit its config"),
])
def test_parts_that_do_not_fit_are_refused(tmp_path, change, words):
    saved, _ = model_content()
    saved["config"] = dict(saved["config"])
    change(saved)
    save_checkpoint(tmp_path / "a.pt", saved)
    with pytest.raises(UserError) as refused:
        load_model(tmp_path / "a.pt")
    assert words in str(refused.value) and str(tmp_path / "a.pt") in str(refused.value)
