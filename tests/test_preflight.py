"""Refusals come all at once, and before anything is downloaded, made or built."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, run

import train_gpt2
from core import huggingface
from core.checkpoint import step_checkpoints
from core.config import read_values
from core.corpus import prepare_text, read_corpus, write_corpus
from core.preflight import check_run
from core.tokenizer import CharTokenizer
from lib.cli import UserError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40  # 28 characters
SHAPE = dict(n_layer=1, n_head=2, n_embd=8, block_size=16)


def tree(directory):
    """{path: content} of all there is below a directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory where nothing can be fetched."""
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.setattr("requests.head", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepared(here):
    """The current directory with a data set `fox`."""
    prepare_text(TEXT, "fox", "char", "data")
    return here


@pytest.fixture
def with_run(prepared):
    """The current directory with `fox` and a finished run of two steps, `first`."""
    assert train_gpt2.main(["--dataset=fox", "--run_name=first", "--max_iters=2", "--batch_size=2", "--device=cpu",
                            "--sample_tokens=0", *flags(SHAPE)]) == 0
    return prepared


def write_weights(directory, vocab_size=28, **changes):
    """config.json and a character tokenizer in Hugging Face's layout: what is read before a run starts."""
    config = dict(model_type="gpt2", n_layer=5, n_head=3, n_embd=48, n_positions=64, vocab_size=vocab_size) | changes
    vocabulary = {char: i for i, char in enumerate(CharTokenizer.from_text(TEXT).itos)}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))


def flags(fields):
    return [f"--{name}={value}" for name, value in fields.items()]


def refused(*argv):
    """The problems for which a command line is refused; nothing is made, and what is there stays as it is."""
    before = tree(Path.cwd())
    with pytest.raises(UserError) as error:
        train_gpt2.main(list(argv))
    assert tree(Path.cwd()) == before
    return error.value.problems


def assert_problems(problems, *words):
    """As many problems as words, each with its words, in any order."""
    assert len(problems) == len(words), problems
    for expected in words:
        assert any(expected in problem for problem in problems), (expected, problems)


def test_everything_at_once(tmp_path):
    process = run("train_gpt2.py", "--dataset=shakespere", "--device=tpu", "--n_head=3", "--lr=1", "--init_from=gpt3",
                  "--out_dir=a\nb", cwd=tmp_path)
    assert_refused(process, "error: 5 problems:\n", "unknown flag --lr", "gpt3 is neither one of gpt2", "'a\\nb'",
                   "unknown dataset shakespere", "device must be")
    assert process.stdout == "" and list(tmp_path.iterdir()) == []


# The data

def test_an_unknown_data_set(prepared):
    assert_problems(refused("--dataset=shakespere"),
                    "unknown dataset shakespere (did you mean shakespeare?): there are fox, pydoc, shakespeare, "
                    "shakespeare_char; prepare_data.py creates others")


@pytest.mark.parametrize("name", ["pydoc", "shakespeare", "shakespeare_char"])
def test_a_built_in_data_set_is_not_prepared_for_a_run_that_is_refused(here, name):
    assert_problems(refused(f"--dataset={name}", "--n_head=3"), "n_embd=128 is not divisible by n_head=3")
    assert check_run(*read_values([f"--dataset={name}", "--device=cpu"])).dataset == name
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("damage, words", [
    (lambda meta: meta.write_text("{"), "cannot read data/fox/meta.json"),
    (lambda meta: meta.write_text("{}"), "data/fox/meta.json is damaged"),
    (lambda meta: meta.write_text('{"format_version": 9}'), "has format 9"),
])
def test_a_damaged_data_set(prepared, damage, words):
    damage(prepared / "data/fox/meta.json")
    assert_problems(refused("--dataset=fox", "--device=tpu"), words, "device must be")


def test_data_too_short_for_a_window(prepared):
    n_tokens = len(read_corpus(prepared / "data/fox").train)
    assert_problems(refused("--dataset=fox", f"--block_size={n_tokens}", "--n_head=3"), "not divisible",
                    f"block_size={n_tokens} is too long for the data: fox has {n_tokens:,} training tokens")
    assert check_run(*read_values(["--dataset=fox", f"--block_size={n_tokens - 1}", "--device=cpu"]))


# The machine

@pytest.mark.parametrize("argv, words", [
    (["--device=tpu"], "device must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"),
    (["--device=cuda:99"], "device cuda:99 is not on this machine"),
    (["--device=cpu", "--dtype=float16"], "dtype=float16 needs a CUDA device, not cpu"),
])
def test_what_the_machine_does_not_have(here, argv, words):
    assert_problems(refused(*argv), words)


def test_device_and_number_format_are_chosen_once(here):
    cfg = check_run(*read_values(["--device=cpu", "--dtype=auto"]))
    assert (cfg.device, cfg.compile) == ("cpu", "false") and cfg.dtype in ("float32", "bfloat16")
    assert check_run(dataclasses.asdict(cfg), []) == cfg


@pytest.mark.parametrize("argv, words", [
    (["--batch_size=1000000"], "activations and logits of 1000000 x 128 tokens take more than "),
    (["--n_layer=9999", "--n_embd=65536", "--n_head=64"], "weights, gradients and moments take more than "),
    (["--gradient_accumulation_steps=1000000", "--batch_size=100000", "--block_size=1", "--n_embd=4", "--n_layer=1"],
     "indices of 100,000,000,000 sequences a step take more than "),
])
def test_what_cannot_fit_in_memory(here, argv, words):
    (problem,) = refused(*argv, "--device=cpu")
    assert words in problem and "of memory: lower " in problem
    assert check_run(*read_values(["--gradient_accumulation_steps=1000000", "--device=cpu"]))


# The run directory

def test_a_run_with_checkpoints_is_refused_before_its_data_are_prepared(with_run):
    problems = refused("--dataset=pydoc", "--run_name=first", "--device=cpu", "--n_head=3")
    assert_problems(problems, "checkpoints/first already holds checkpoints", "not divisible")
    assert "--resume continues from the newest (step_00000002.pt), --run_name=NAME starts another run" in problems[0]
    assert not (with_run / "data/pydoc").exists()


def test_a_run_directory_that_cannot_be_looked_at(here):
    assert_problems(refused("--run_name=" + "x" * 199, "--out_dir=" + "y" * 300, "--device=cpu"),
                    "File name too long")


def test_directories_that_are_files(here):
    (here / "file").write_text("")
    (here / "link").symlink_to("nosuch")
    assert_problems(refused("--out_dir=file", "--log_dir=file/runs", "--data_dir=link/a/b", "--device=cpu"),
                    "out_dir=file: file is not a directory", "log_dir=file/runs: ", "data_dir=link/a/b: ")


def test_resuming_with_a_built_in_data_set_that_is_not_prepared(with_run):
    assert_problems(refused("--run_name=first", "--resume", "--dataset=pydoc", "--device=cpu"),
                    "fox (fingerprint ")


def test_resuming_takes_the_shape_from_the_checkpoint(with_run):
    values, problems = read_values(["--dataset=fox", "--run_name=first", "--resume", "--max_iters=3", "--device=cpu"])
    cfg = check_run(values, problems)
    assert {name: getattr(cfg, name) for name in SHAPE} == SHAPE and cfg.max_iters == 3
    assert train_gpt2.main(["--dataset=fox", "--run_name=first", "--resume", "--max_iters=3", "--batch_size=2",
                            "--device=cpu", "--sample_tokens=0"]) == 0
    assert step_checkpoints(with_run / "checkpoints/first")[-1].name == "step_00000003.pt"


def test_resuming_another_model_or_optimizer(with_run):
    where = "in checkpoints/first/step_00000002.pt and"
    assert_problems(refused("--dataset=fox", "--run_name=first", "--resume", "--n_embd=16", "--optimizer=muon",
                            "--init_from=gpt2", "--device=tpu"),
                    f"n_embd is 8 {where} 16 now: resume with --n_embd=8, or start another run with --run_name=NAME",
                    f"optimizer is 'adamw' {where} 'muon' now", f"init_from is None {where} 'gpt2' now",
                    "device must be")


def test_resuming_with_other_data(with_run):
    prepare_text(TEXT[:400], "dog", "char", "data")
    assert_problems(refused("--dataset=dog", "--run_name=first", "--resume", "--device=tpu"), "device must be",
                    "the data set is not the one that checkpoints/first/step_00000002.pt was trained on: fox")


def test_resuming_without_a_checkpoint_starts_from_the_defaults(prepared):
    assert check_run(*read_values(["--dataset=fox", "--resume", "--device=cpu"])).n_layer == 4


def test_a_checkpoint_with_an_impossible_shape_is_refused(with_run):
    path = with_run / "checkpoints/first/step_00000002.pt"
    content = torch.load(path, weights_only=True)
    content["config"] |= {"n_layer": "two", "n_embd": 4.5, "optimizer": "sgd"}
    path.with_name("best.pt").unlink()
    torch.save(content, path)
    problems = refused("--dataset=fox", "--run_name=first", "--resume", "--device=cpu")
    assert_problems(problems, "config: n_layer must be an int >= 1 and < 10000, not 'two'; config: n_embd must be",
                    "no checkpoint in checkpoints/first is intact")


# Weights to start from

def test_weights_decide_the_shape_that_is_left_open(prepared):
    write_weights(prepared / "w")
    cfg = check_run(*read_values(["--dataset=fox", "--init_from=w", "--stride=40", "--block_size=40", "--device=cpu"]))
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.stride) == (5, 3, 48, 40, 40)
    assert check_run(*read_values(["--dataset=fox", "--init_from=w", "--device=cpu"])).block_size == 64
    assert check_run(*read_values(["--dataset=fox", "--n_layer=7", "--device=cpu"])).n_layer == 7


def test_a_shape_that_contradicts_the_weights_is_refused(prepared):
    write_weights(prepared / "w")
    assert_problems(refused("--dataset=fox", "--init_from=w", "--n_layer=5", "--n_head=a", "--n_embd=51",
                            "--block_size=65", "--mlp=swiglu", "--device=tpu"),
                    "n_head must be", "n_embd=51 does not fit the weights of init_from=w, which have n_embd=48: leave",
                    "block_size=65 does not fit", "mlp=swiglu does not fit", "device must be")


def test_weights_with_another_vocabulary(prepared):
    write_weights(prepared / "w", vocab_size=29)
    assert_problems(refused("--dataset=fox", "--init_from=w", "--device=cpu"),
                    "dataset=fox does not have the vocabulary of init_from=w (char, 29 symbols)")
    assert_problems(refused("--dataset=shakespeare", "--init_from=w", "--device=cpu"), "does not have the vocabulary")
    assert_problems(refused("--dataset=fox", "--init_from=gpt2", "--device=cpu"),
                    "(gpt2, 50,257 symbols): choose another data set; shakespeare has it")


def test_published_weights_are_not_fetched_by_the_check(here):
    cfg = check_run(*read_values(["--dataset=shakespeare", "--init_from=gpt2", "--device=cpu"]))
    assert (cfg.n_layer, cfg.n_embd, cfg.block_size) == (12, 768, 1024)
    assert list(here.iterdir()) == []


def test_missing_weights_are_refused(prepared):
    problems = refused("--dataset=fox", "--init_from=gpt3", "--n_head=5", "--beta1=2", "--device=cpu")
    # Nothing about 5 heads in the default width: the weights' width is not known.
    assert_problems(problems, "gpt3 is neither one of gpt2", "beta1 must be")


def test_weights_that_are_not_supported(prepared):
    write_weights(prepared / "w", model_type="llama")
    assert_problems(refused("--dataset=fox", "--init_from=w", "--device=tpu"),
                    "model_type=llama is not supported", "device must be")


# What can be known only after the check is refused before the model is built

def test_ids_that_do_not_fit_are_refused_by_the_run(prepared):
    tokenizer = CharTokenizer.from_text(TEXT)
    tokenizer.token_bytes = np.ones(99, dtype=int)
    ids = {split: np.array([1, 98] * 400) for split in ("train", "val")}
    write_corpus(prepared / "data/fox", tokenizer, ids, overwrite=True)
    with pytest.raises(UserError, match="holds id 98, outside the vocabulary of 28"):
        train_gpt2.main(["--dataset=fox", "--device=cpu"])
    assert not (prepared / "checkpoints").exists() and not (prepared / "runs").exists()


def test_weights_of_other_characters_are_refused(prepared):
    write_weights(prepared / "w")
    path = prepared / "w/tokenizer.json"
    path.write_text(path.read_text().replace('"q"', '"Q"'))
    assert huggingface.find("w", "data").tokenizer_kind == "char"
    for plan in ([], ["--plan"]):
        with pytest.raises(UserError, match=r"not have the vocabulary of init_from=w .*only one of them has 'Q', 'q'"):
            train_gpt2.main(["--dataset=fox", "--init_from=w", "--device=cpu", *plan])
    assert not (prepared / "checkpoints").exists()


def test_the_directory_of_a_run_is_not_taken_for_weights(with_run):
    assert_problems(refused("--dataset=fox", "--init_from=checkpoints/first", "--device=cpu"),
                    "checkpoints/first is the directory of a run: give one of its checkpoints, such as checkpoints/fir")
