import dataclasses
import functools
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ONE_THREAD,
    ROOT,
    assert_equal_state,
    assert_refused,
    files_up_to,
    run,
    scalars,
    started,
    tensors_in,
    trained,
)

import train_gpt2
from core.checkpoint import Progress, Run, load_checkpoint, step_checkpoints
from core.config import read_values, resolve
from core.corpus import prepare_text, pydoc_text, read_corpus
from core.dataset import TokenDataset
from core.preflight import check_run
from core.report import Report
from core.runs import load_model
from core.schema import SCHEMA
from core.trainer import Diverged, Trainer
from lib.cli import UserError
from model import GPT
from train_gpt2 import train, train_model, validate


@pytest.fixture(scope="module")
def finished(tiny_args, tmp_path_factory):
    """(directory, newest checkpoint, process) of a run that is finished; to be read, not to be changed."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *trained(directory, tiny_args)


@dataclasses.dataclass
class Ended:
    """How train_gpt2.main ended in this process."""

    code: int
    stdout: str
    stderr: str
    run_dir: Path

    @property
    def state(self):
        return load_checkpoint(step_checkpoints(self.run_dir)[-1])


@pytest.fixture
def train_here(tmp_path, tiny_args, monkeypatch, capsys):
    """A function that trains in `tmp_path`, by these flags after the tiny ones, in this process: a second less each."""
    monkeypatch.chdir(tmp_path)

    def train_with(*flags, name="tiny"):
        code = train_gpt2.main([*tiny_args, f"--run_name={name}", *flags])
        return Ended(code, *capsys.readouterr(), tmp_path / "checkpoints" / name)

    return train_with


EXACT = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--batch_size=24", "--warmup_iters=3", "--log_interval=4",
         "--lr_decay_iters=20"]


@pytest.mark.parametrize("family", [
    [], ["--norm=rmsnorm", "--mlp=swiglu", "--pos=sinusoidal", "--dtype=bfloat16", "--optimizer=muon",
         "--lr_schedule=wsd", "--decay_fraction=0.6"],
], ids=["gpt2", "modern-bfloat16-muon-wsd"])
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, tiny_args, train_here, family):
    """338 windows by 48: an epoch ends within step 8. Stopped at 6, before it, and 10, after it."""
    flags = [*EXACT, *family]
    straight = train_here(*flags, "--max_iters=17", "--eval_interval=5", name="straight")
    assert "epoch 1/3" in straight.stdout and "epoch 2/3" in straight.stdout and "epoch 3/3" in straight.stdout
    train_here(*flags, "--max_iters=6", "--eval_interval=4", name="parts")
    train_here(*flags, "--max_iters=10", "--eval_interval=3", "--resume", name="parts")
    parts, _ = trained(tmp_path, [*tiny_args, *flags], "--max_iters=17", "--eval_interval=5", "--resume", name="parts")
    assert_equal_state(straight.state, parts)
    logged = [scalars(tmp_path / "runs" / name) for name in ("straight", "parts")]
    assert sorted(logged[0]["train/loss"]) == [1, 4, 8, 12, 16, 17]
    # Each part also logs its own last loss.
    assert sorted(logged[1]["train/loss"]) == [1, 4, 6, 8, 10, 12, 16, 17]
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert logged[0][tag] == {step: logged[1][tag][step] for step in logged[0][tag]}
    assert logged[0]["val/loss"][17] == logged[1]["val/loss"][17]


def test_logging_evaluating_and_saving_change_no_weight(train_here):
    expected = train_here("--dropout=0.2", name="base").state
    for i, flags in enumerate((["--eval_interval=1", "--sample_tokens=3"], ["--checkpoint_interval=5"],
                               ["--log_interval=5", "--eval_tokens=100", "--keep_checkpoints=1"])):
        other = train_here("--dropout=0.2", *flags, name=f"other{i}")
        assert_equal_state(expected | {"pending_losses": other.state["pending_losses"]}, other.state)
    assert len(step_checkpoints(other.run_dir)) == 1
    seeded = train_here("--dropout=0.2", "--seed=1", name="seed").state
    assert not torch.equal(seeded["model_state_dict"]["lm_head.weight"], expected["model_state_dict"]["lm_head.weight"])


def test_a_run_reports_and_keeps_what_it_should(finished):
    directory, state, process = finished
    for words in ("data     tiny", "model    layernorm, gelu, learned", "CPU, 1 thread; float32; not compiled",
                  "epoch 1/1 | step 12/12 (100.0%) | loss ", "| eta 0 s",
                  "step 12 | val loss", "bits/byte", "next:\n  python sample.py --ckpt checkpoints/tiny/best.pt\n"
                  "  tensorboard --logdir runs\n"):
        assert words in process.stdout, process.stdout
    assert "Traceback" not in process.stderr
    names = sorted(path.name for path in (directory / "checkpoints/tiny").iterdir())
    assert names == [".lock", "best.pt", "step_00000006.pt", "step_00000012.pt"]
    assert state["config"]["n_embd"] == 32 and state["step"] == 12 and state["epoch"] == 0
    assert state["tokenizer"]["itos"] == sorted(state["tokenizer"]["stoi"]) and state["vocab_size"] > 20
    assert not any("_orig_mod" in name for name in state["model_state_dict"])
    best = load_checkpoint(directory / "checkpoints/tiny/best.pt")
    assert best["val_loss"] == best["best_val_loss"] == state["best_val_loss"]
    log = scalars(directory / "runs/tiny")
    assert set(log) == {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte",
                        "perf/tokens_per_sec"}
    assert sorted(log["train/loss"]) == [1, 3, 6, 9, 12] and sorted(log["val/loss"]) == [6, 12]
    assert abs(log["train/loss"][1] / math.log(state["vocab_size"]) - 1) < 0.03
    assert log["val/loss"][12] == pytest.approx(state["val_loss"], rel=1e-6)
    assert log["val/perplexity"][12] == pytest.approx(math.exp(state["val_loss"]), rel=1e-5)


def test_a_finished_run_is_not_overwritten_and_has_nothing_left_to_do(finished, train_here, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"checkpoints/tiny already holds checkpoints: --resume .* --run_name"):
        train_here()
    resumed = train_here("--resume")
    assert resumed.code == 0 and "finished at step 12" in resumed.stdout
    assert "nothing to do: the run is finished; raise --max_iters, --epochs or --patience" in resumed.stdout


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path, train_here):
    train_here("--log_interval=1", name="each")
    train_here("--log_interval=4", name="fourth")
    each, fourth = (scalars(tmp_path / "runs" / name)["train/loss"] for name in ("each", "fourth"))
    assert fourth[1] == each[1]
    assert fourth[4] == pytest.approx(np.mean([each[2], each[3], each[4]]), rel=1e-6)
    assert fourth[8] == pytest.approx(np.mean([each[k] for k in (5, 6, 7, 8)]), rel=1e-6)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_resuming_is_exact(tmp_path, tiny_args, train_here, signum, code):
    flags = ["--max_iters=4000", "--eval_interval=4000", "--checkpoint_interval=4000", "--dropout=0.1",
             "--lr_decay_iters=50"]
    args = [*tiny_args, *flags]
    process = started("train_gpt2.py", *args, cwd=tmp_path)
    for line in process.stdout:
        if "step 6/" in line:
            process.send_signal(signum)
            break
    _, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert f"resume with: python train_gpt2.py {shlex.join([*args, '--resume'])}\n" in err and "Traceback" not in err
    (saved,) = step_checkpoints(tmp_path / "checkpoints/tiny")
    step = load_checkpoint(saved)["step"]
    assert step >= 6
    resumed = train_here(*flags, "--resume", f"--max_iters={step + 3}")
    straight = train_here(*flags, f"--max_iters={step + 3}", name="straight")
    assert_equal_state(resumed.state, straight.state)


def test_a_second_signal_quits_immediately(tmp_path, tiny_args):
    args = [*tiny_args, "--max_iters=4000", "--eval_interval=4000", "--checkpoint_interval=1", "--log_interval=1",
            "--batch_size=3000"]
    process = started("train_gpt2.py", *args, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 18/"):  # the second step; each takes a second and 8.9 epochs
            process.send_signal(signal.SIGINT)
            break
    assert any("then saving and stopping" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err, err
    assert "stopped after step" not in out
    saved = step_checkpoints(tmp_path / "checkpoints/tiny")
    assert [load_checkpoint(path)["step"] for path in saved][-1] >= 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_out_of_memory_names_what_to_lower(tmp_path, tiny_args):
    process = run("train_gpt2.py", *tiny_args, "--batch_size=10000", "--n_embd=512", cwd=tmp_path,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))
    assert_refused(process, "out of memory with 10000 x 32 tokens", "lower batch_size", "gradient_accumulation_steps")


@pytest.mark.chaos
def test_resuming_takes_no_more_memory_than_starting(tmp_path, tiny_args):
    args = [*tiny_args, "--n_layer=6", "--n_embd=512", "--batch_size=1", "--max_iters=2", "--eval_tokens=40"]
    peaks = []
    for more in ([], ["--resume", "--max_iters=4"]):
        process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *args, *more], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, env=ONE_THREAD)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss / 1024)
    print(f"\npeak memory: {peaks[0]:.0f} MiB from the start, {peaks[1]:.0f} MiB resumed")
    assert peaks[1] <= 1.05 * peaks[0]


def test_resume_refuses_another_model_optimizer_or_other_data(train_here):
    train_here()
    with pytest.raises(UserError) as refused:
        train_here("--resume", "--n_layer=3", "--mlp=swiglu", "--optimizer=muon")
    for words in ("n_layer is 2 in", "and 3 now", "mlp is 'gelu'", "and 'swiglu' now", "optimizer is 'adamw' in",
                  "resume with --optimizer=adamw", "3 problems"):
        assert words in str(refused.value)
    with pytest.raises(UserError, match=r"the data set is not the one that .*: tiny .* then, pydoc .* now"):
        train_here("--resume", "--dataset=pydoc", "--data_dir=data")
    resumed = train_here("--resume", "--max_iters=14", "--learning_rate=5e-4")
    assert "changed since the checkpoint: learning_rate 0.001 -> 0.0005" in resumed.stdout
    assert "changed since the checkpoint: max_iters 12 -> 14" in resumed.stdout


def test_resume_falls_back_over_a_damaged_checkpoint(train_here):
    first = train_here()
    expected = first.state
    newest = first.run_dir / "step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    (first.run_dir / "best.pt").unlink()
    again = train_here("--resume")
    assert "step_00000012.pt is damaged" in again.stderr
    assert "resumed from checkpoints/tiny/step_00000006.pt" in again.stdout
    assert_equal_state(again.state, expected)
    assert "no checkpoint in checkpoints/new: starting at step 0" in train_here("--resume", name="new").stdout


@pytest.mark.parametrize("key", SCHEMA)
def test_resume_refuses_a_checkpoint_that_lacks_a_key(finished, train_here, tmp_path, key):
    run_dir = tmp_path / "checkpoints/tiny"
    run_dir.mkdir(parents=True)
    torch.save({name: value for name, value in finished[1].items() if name != key}, run_dir / "step_00000012.pt")
    with pytest.raises(UserError, match="no checkpoint in checkpoints/tiny is intact") as refused:
        train_here("--resume")
    assert (f"step_00000012.pt is not a whole checkpoint of this project: {key} missing or of the wrong type"
            in str(refused.value))


@pytest.mark.parametrize("family", [[], ["--norm=rmsnorm", "--mlp=swiglu", "--pos=sinusoidal", "--bias=false"]],
                         ids=["gpt2", "modern"])
def test_a_run_starts_from_the_weights_of_another(train_here, tiny_args, family):
    first = train_here(*family, "--max_iters=6", name="first").run_dir / "best.pt"
    weights = load_checkpoint(first)["model_state_dict"]
    no_shape = [flag for flag in tiny_args if flag.split("=")[0] not in ("--n_layer", "--n_head", "--n_embd",
                                                                         "--block_size")]
    args = [*no_shape, f"--init_from={first}", "--run_name=second", "--learning_rate=0", "--block_size=24"]
    assert train_gpt2.main([*args, "--max_iters=1"]) == 0
    second = load_checkpoint(step_checkpoints(first.parent.parent / "second")[-1])
    assert second["config"]["n_embd"] == 32 and second["config"]["block_size"] == 24
    for name, value in second["model_state_dict"].items():
        assert torch.equal(value, weights[name][: len(value)]), name  # learned positions are cut
    first.unlink()  # a run that resumes needs only its own checkpoints
    assert train_gpt2.main([*args, "--max_iters=2", "--resume"]) == 0


@pytest.mark.parametrize("change, words", [
    (lambda content: content["config"].pop("n_head"), "the config in .*best.pt lacks 'n_head'"),
    (lambda content: content["tokenizer"].pop("itos"), "the tokenizer in .*best.pt is damaged"),
    (lambda content: content.pop("step"), "best.pt is not a whole checkpoint of this project: step missing"),
    (lambda content: content["config"].update(n_head=3), "best.pt is not a whole checkpoint .* n_embd=32 is not divis"),
    (None, "checkpoint .*best.pt is damaged, or not a checkpoint"),
])
def test_weights_of_a_damaged_checkpoint_are_refused(finished, train_here, tmp_path, change, words):
    path = tmp_path / "best.pt"
    shutil.copy(finished[0] / "checkpoints/tiny/best.pt", path)
    if change:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=words):
        train_here(f"--init_from={path}", name="second")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("grad_clip", [0, 1])
def test_divergence_ends_with_3(train_here, grad_clip):
    ended = train_here("--learning_rate=1e38", f"--grad_clip={grad_clip}", "--eval_interval=1", "--log_interval=1",
                       "--checkpoint_interval=1")
    assert ended.code == 3, ended.stdout + ended.stderr
    assert "error: training diverged at step" in ended.stderr and "last good checkpoint: " in ended.stderr
    for path in ended.run_dir.glob("*.pt"):
        state = load_checkpoint(path)
        for part in ("model_state_dict", "optimizer_state_dict"):
            assert all(value.isfinite().all() for _, value in tensors_in(state[part])), path


def test_divergence_names_the_last_good_checkpoint(train_here):
    train_here()
    ended = train_here("--resume", "--max_iters=30", "--learning_rate=1e38", "--grad_clip=0")
    assert ended.code == 3 and "last good checkpoint: checkpoints/tiny/step_00000012.pt" in ended.stderr
    assert "try a lower learning_rate" in ended.stderr


def test_early_stop_keeps_the_best(train_here):
    ended = train_here("--max_iters=4000", "--eval_interval=10", "--patience=2", "--learning_rate=0.02")
    assert "early: 2 evaluations without a better loss" in ended.stdout
    best, state = load_checkpoint(ended.run_dir / "best.pt"), ended.state
    assert best["step"] == state["best_step"] == state["step"] - 20 and best["val_loss"] < state["val_loss"]


def test_a_best_model_that_could_not_be_saved_is_not_the_best(tmp_path, data_dir, tiny_args, capsys):
    cfg = check_run(*read_values([*tiny_args, f"--out_dir={tmp_path}", f"--log_dir={tmp_path}/runs"]))
    corpus = read_corpus(data_dir / "tiny")
    cfg = resolve(cfg, 9)
    trainer, progress = Trainer(cfg, corpus.tokenizer.vocab_size), Progress(step=3)
    data = TokenDataset(corpus.val[:100], cfg.block_size, tokenizer=corpus.tokenizer)
    with Run(cfg, corpus) as run:
        report = Report(run, trainer, progress)
        with files_up_to(10_000):
            validate(run, trainer, progress, data, report)
        assert progress.val_loss > 0 and (progress.best_val_loss, progress.best_step) == (None, None)
        out, err = capsys.readouterr()
        assert "best.pt: File too large" in err and out.endswith("| not saved\n")
        validate(run, trainer, progress, data, report)
        assert capsys.readouterr().out.endswith("| best so far\n")
    assert (progress.best_val_loss, progress.best_step) == (progress.val_loss, 3)
    assert load_checkpoint(cfg.run_dir / "best.pt")["best_val_loss"] == progress.val_loss


def test_a_data_set_is_prepared_first_and_the_default_run_needs_no_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(["--max_iters=1", "--n_layer=1", "--sample_tokens=5", "--device=cpu"]) == 0
    assert "data set pydoc is not prepared yet: preparing it" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/pydoc/best.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("environment, compiled", [({}, True), ({"CXX": "/nosuch/compiler"}, False)])
def test_compiling_keeps_names_and_falls_back_once(tmp_path, tiny_args, environment, compiled):
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = run("train_gpt2.py", *tiny_args, "--compile=true", "--n_layer=1", cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("warning: torch.compile failed") == (0 if compiled else 1), process.stderr
    assert ("; compiled" in process.stdout) == compiled
    state = load_checkpoint(tmp_path / "checkpoints/tiny/best.pt")["model_state_dict"]
    assert "transformer.wte.weight" in state and not any("_orig_mod" in name for name in state)


# From Python

def test_train_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(pydoc_text(None)[:3000], encoding="utf-8")
    (tmp_path / "mine.py").write_text("n_layer = 1\nn_embd = 32\nblock_size = 16\nbatch_size = 8\n"
                                      "learning_rate = 3e-3\nsample_tokens = 0\ndevice = 'cpu'\n")
    model, dataset = train_model(config_path="mine.py", data_path="input.txt", epochs=2, save_path="out/model.pt")
    assert isinstance(model, GPT) and model.config.vocab_size == dataset.tokenizer.vocab_size
    assert len(dataset) == math.ceil((2700 - 1) / 16)
    saved = load_checkpoint("out/model.pt")
    assert saved["step"] == math.ceil(2 * len(dataset) / 8)
    assert all(torch.equal(value, saved["model_state_dict"][name]) for name, value in model.state_dict().items())
    _, loaded, tokenizer, _ = load_model("out/model.pt")
    assert loaded.config == model.config and tokenizer.itos == dataset.tokenizer.itos


@pytest.mark.parametrize("config_data", ["mine", "other", "pydoc"])
def test_train_model_on_its_own_text_does_not_need_the_configs(tmp_path, monkeypatch, config_data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(pydoc_text(None)[:3000], encoding="utf-8")
    prepare_text("abcd" * 50, "other", "char", "data")
    (tmp_path / "mine.py").write_text(f"dataset = {config_data!r}")
    options = dict(config_path="mine.py", data_path="mine.txt", n_layer=1, n_embd=8, block_size=16, sample_tokens=0,
                   device="cpu", batch_size=4)
    train_model(max_iters=1, **options)
    model, dataset = train_model(max_iters=2, resume=True, **options)
    assert len(dataset.tokens) == 2700 and model.config.vocab_size > 20
    with pytest.raises(UserError, match="2 problems"):
        train_model(data_path="nosuch.txt", n_head=0, beta1=2.0)


def test_train_is_callable_without_a_script(data_dir, tmp_path):
    cfg = check_run(dict(dataset="tiny", data_dir=str(data_dir), out_dir=str(tmp_path / "checkpoints"),
                         log_dir=str(tmp_path / "runs"), n_layer=1, max_iters=2, sample_tokens=0, device="cpu",
                         run_name="tiny"), [])
    result = train(cfg)
    assert isinstance(result.model, GPT) and result.progress.step == 2 and result.signal is None


@pytest.mark.parametrize("changes, words", [
    (dict(save_path="."), "exists and is not a file: give another name"),
    (dict(save_path="input.txt/x.pt"), "cannot create the directory input.txt: it is a file"),
    (dict(save_path="/proc/x.pt"), "cannot write /proc/x.pt: "),
    (dict(learning_rat=1), r"unknown field learning_rat \(did you mean learning_rate\?\)"),
    (dict(dataset="mine"), "data_path=input.txt and dataset=mine: give one of them"),
    (dict(data_path=".txt"), ".txt cannot become a data set of its own name: rename it"),
    (dict(data_path="pydoc.txt"), "pydoc.txt cannot become a data set of its own name: rename it"),
    (dict(data_path="a\nb.txt"), "cannot become a data set of its own name: rename it"),
])
def test_train_model_refuses_before_it_trains(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    for name in ("input.txt", ".txt", "pydoc.txt", "a\nb.txt"):
        (tmp_path / name).write_text("to be or not to be\n" * 40)
    with pytest.raises(UserError, match=words):
        train_model(**dict(data_path="input.txt", device="cpu", block_size=8, max_iters=1, sample_tokens=0) | changes)
    assert not (tmp_path / "checkpoints").exists()
    assert {path.name for path in tmp_path.glob("data/*")} <= {"input"}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """train_model with a text and a small model, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("to be or not to be\n" * 40)
    return functools.partial(train_model, data_path="input.txt", device="cpu", block_size=8, max_iters=1, n_layer=1,
                             sample_tokens=0)


def test_a_second_call_takes_the_next_name(notebook, tmp_path):
    def runs():
        return {path.name for path in tmp_path.glob("checkpoints/*")}

    notebook()
    notebook()
    assert runs() == {"input", "input-2"}
    notebook(resume=True, max_iters=2)
    assert [path.name for path in step_checkpoints(tmp_path / "checkpoints/input-2")][-1] == "step_00000002.pt"
    assert [path.name for path in step_checkpoints(tmp_path / "checkpoints/input")] == ["step_00000001.pt"]
    (tmp_path / "mine.py").write_text("dataset = 'pydoc'\n")
    notebook(config_path=tmp_path / "mine.py", data_path=None, dataset="input")
    notebook(config_path="mine.py", data_path=None, dataset="input")
    assert runs() == {"input", "input-2", "mine", "mine-2"}
    with pytest.raises(UserError, match="mine already holds checkpoints"):
        notebook(run_name="mine")
    with pytest.raises(UserError, match=r"^beta1 must be .*, not 2\.0$"):  # and nothing about the name
        notebook(config_path="mine.py", data_path=None, dataset="input", beta1=2.0)


def test_another_text_of_the_same_name_is_refused(notebook, tmp_path):
    notebook()
    (tmp_path / "input.txt").write_text("the rest is silence\n" * 40)
    with pytest.raises(UserError, match="data/input was made from another text"):
        notebook()
    assert "r" in read_corpus(tmp_path / "data/input").tokenizer.stoi


def test_a_call_that_failed_holds_no_lock(notebook):
    with pytest.raises(Diverged) as kept:  # as a notebook keeps it
        notebook(max_iters=9, learning_rate=1e38, warmup_iters=0, run_name="r")
    notebook(run_name="r", resume=True)
    assert kept.value.__traceback__ is not None


def test_values_as_notebooks_have_them(notebook, tmp_path):
    model, _ = notebook(data_path=Path("input.txt"), out_dir=tmp_path / "out", learning_rate=np.float64(1e-3),
                           n_embd=np.int64(8), n_head=np.int32(2), bias=np.bool_(False), dropout=np.float32(0.25),
                           save_path=Path("model.pt"))
    assert (model.config.n_embd, model.config.bias, model.config.dropout) == (8, False, 0.25)
    content = load_checkpoint(tmp_path / "model.pt")
    assert content["config"]["out_dir"] == str(tmp_path / "out") and type(content["config"]["n_embd"]) is int
    with pytest.raises(UserError) as refused:
        notebook(bogus=1, n_head=np.float64(2))
    assert str(refused.value) == ("2 problems:\n  - unknown field bogus\n  - n_head must be an int >= 1 and < 65536, "
                                  "not 2.0")


# Signals and outputs

def test_a_signal_between_micro_batches_drops_the_step(tmp_path, tiny_args, train_here):
    flags = ["--gradient_accumulation_steps=1000000", "--checkpoint_interval=1", "--log_interval=1"]
    process = started("train_gpt2.py", *tiny_args, *flags, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("device"):
            break
    time.sleep(0.5)  # now, or soon, in the middle of the first step, which would take an hour
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped before the first step was done: nothing to save" in err
    assert list((tmp_path / "checkpoints/tiny").glob("*.pt")) == []
    # With steps before it, they are what is saved.
    straight = train_here("--max_iters=2", "--lr_decay_iters=12", "--eval_interval=99", name="straight")
    flags = ["--lr_decay_iters=12", "--eval_interval=99", "--max_iters=3", "--sample_tokens=0"]
    step, seen = Trainer.step, []

    def interrupted(trainer, batch, proceed):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            trainer.cfg = dataclasses.replace(trainer.cfg, batch_size=2, gradient_accumulation_steps=2)
            batch.micro_batches = np.split(batch.micro_batches[0], 2)
        seen.append(step(trainer, batch, proceed))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        stopped = train_here(*flags, name="stopped")
    assert stopped.code == 143 and len(seen) == 3 and seen[2] is None
    assert "stopped after step 2, saved checkpoints/stopped/step_00000002.pt" in stopped.stderr
    assert_equal_state(stopped.state, straight.state | {"pending_losses": stopped.state["pending_losses"]})


def test_a_signal_ends_a_long_sample(tmp_path, tiny_args):
    process = started("train_gpt2.py", *tiny_args, "--eval_interval=2", "--sample_tokens=1000000", "--log_interval=1",
                      cwd=tmp_path)
    for line in process.stdout:
        if "step 2/" in line:  # next come an evaluation and its sample
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped after step 2, saved checkpoints/tiny/step_00000002.pt" in err


def test_a_signal_that_stopped_train_model_is_then_the_callers(notebook, tmp_path):
    step = Trainer.step

    def interrupted(trainer, batch, proceed):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batch, proceed)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        notebook(max_iters=50, save_path="model.pt")
    assert load_checkpoint(tmp_path / "model.pt")["step"] == 3


def test_a_hangup_sent_twice_saves(tmp_path, tiny_args):
    process = started("train_gpt2.py", *tiny_args, "--max_iters=4000", "--eval_interval=4000", "--batch_size=1000",
                      "--log_interval=1", cwd=tmp_path)
    for line in process.stdout:
        if "| loss " in line:
            process.send_signal(signal.SIGHUP)
            break
    for line in process.stderr:
        if "then saving and stopping" in line:
            process.send_signal(signal.SIGHUP)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 129 and "stopped after step" in err, err


def test_an_ignored_hangup_stays_ignored(tmp_path, tiny_args):
    """As under nohup."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *tiny_args, "--log_interval=1"],
                               cwd=tmp_path, env=ONE_THREAD, text=True, stdout=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for line in process.stdout:
        if "| loss " in line:
            process.send_signal(signal.SIGHUP)
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "finished at step 12" in out


@pytest.mark.parametrize("redirection, words", [
    ("| head -n 3", "warning: standard output is lost (Broken pipe); continuing without it"),
    ("> /dev/full", "warning: standard output is lost (No space left on device); continuing without it"),
    (">&-", ""), ("2>&1 | head -n 3", ""),
])
def test_a_run_outlives_its_output(tmp_path, tiny_args, redirection, words):
    command = shlex.join([sys.executable, str(ROOT / "train_gpt2.py"), *tiny_args, "--log_interval=1"])
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirection}; echo code $? >&2"],
                             cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=100)
    assert process.stderr.endswith("code 0\n"), process.stderr
    assert words in process.stderr and "Traceback" not in process.stdout + process.stderr
    assert [path.name for path in step_checkpoints(tmp_path / "checkpoints/tiny")][-1] == "step_00000012.pt"


def test_ctrl_c_behind_a_pipe_saves_and_tells_how_to_resume(tmp_path, tiny_args):
    """Ctrl-C reaches the whole process group: the reader of the output dies first."""
    args = [*tiny_args, "--max_iters=4000", "--eval_interval=4000", "--log_interval=1", "--batch_size=64"]
    command = shlex.join([sys.executable, str(ROOT / "train_gpt2.py"), *args])
    process = subprocess.Popen(["bash", "-c", f"{command} | tee log; echo code ${{PIPESTATUS[0]}} >&2"], cwd=tmp_path,
                               env=ONE_THREAD, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if "| loss " in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    (saved,) = step_checkpoints(tmp_path / "checkpoints/tiny")
    step = load_checkpoint(saved)["step"]
    assert f"stopped after step {step}, saved checkpoints/tiny/{saved.name}\n" in err
    assert f"resume with: python train_gpt2.py {shlex.join([*args, '--resume'])}\n" in err and "Traceback" not in err
