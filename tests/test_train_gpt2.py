import copy
import functools
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

from checkpoint import load_checkpoint, step_checkpoints
from config import TrainConfig, load_config
from model import GPT
from prepare_data import pydoc_text
from train_gpt2 import Diverged, Trainer, set_lengths, train, train_model

CPU = torch.device("cpu")


def scalars(folder):
    """{tag: {step: value}} of a TensorBoard log."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def trained(tmp_path, args, *more, name="tiny", code=0):
    """Train as a process in `tmp_path`; (the newest checkpoint's content, the process)."""
    process = run("train_gpt2.py", *args, f"--run_name={name}", *more, cwd=tmp_path)
    assert process.returncode == code, process.stdout + process.stderr
    return load_checkpoint(step_checkpoints(tmp_path / "checkpoints" / name)[-1]), process


def started(tmp_path, args):
    """A process that trains in `tmp_path`, its output still to be read."""
    return subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *args], cwd=tmp_path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def tensors_in(tree, path=()):
    """(path, tensor) of every tensor in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from tensors_in(value, (*path, key))
        elif isinstance(value, torch.Tensor):
            yield (*path, key), value


def assert_equal_state(a, b):
    """Weights, moments and losses not yet logged are the same bit for bit."""
    assert a["step"] == b["step"] and a["pending_losses"] == b["pending_losses"]
    assert a["model_state_dict"].keys() == b["model_state_dict"].keys()
    for name, value in a["model_state_dict"].items():
        assert torch.equal(value, b["model_state_dict"][name]), name
    moments = [dict(tensors_in(state["optimizer_state_dict"])) for state in (a, b)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 0
    for name, value in moments[0].items():
        assert torch.equal(value, moments[1][name]), name


# Length

@pytest.mark.parametrize("fields, max_iters", [
    (dict(max_iters=7), 7), (dict(epochs=3.0), 8), (dict(epochs=0.5), 2), (dict(max_iters=5, epochs=3.0), 5),
    (dict(max_iters=50, epochs=3.0), 8), ({}, 3),
])
def test_run_length(fields, max_iters):
    cfg = set_lengths(TrainConfig(batch_size=2, gradient_accumulation_steps=2, **fields), n_windows=10)
    assert cfg.max_iters == cfg.lr_decay_iters == max_iters
    assert (cfg.min_lr, cfg.stride) == (1e-4, 128)


# One step

def trainer(data_dir, tmp_path, **fields):
    base = dict(dataset="tiny", data_dir=str(data_dir), out_dir=str(tmp_path / "checkpoints"), device="cpu",
                log_dir=str(tmp_path / "runs"), n_layer=2, n_head=2, n_embd=32, block_size=32, dtype="float32",
                warmup_iters=0, max_iters=20, sample_tokens=0)
    cfg, problems = load_config(None, base | fields)
    assert problems == []
    return Trainer(cfg)


def test_accumulation_is_one_large_batch_padded_windows_too(data_dir, tmp_path):
    runs = [trainer(data_dir, tmp_path, batch_size=b, gradient_accumulation_steps=a, grad_clip=0, run_name=f"{b}x{a}")
            for b, a in ((8, 1), (2, 4), (1, 8))]
    data = runs[0].train_data
    x, y = data.__getitems__([0, 1, 2, 3, 4, 5, 6, len(data) - 1])
    assert (y == -1).any()
    with torch.no_grad():
        expected = runs[0].model(x, y)[1].item()
    for r in runs:
        r.optimizer_step(x, y)
        assert r.progress.pending_losses[0].item() == pytest.approx(expected, rel=1e-5)
        assert r.grad_norm.item() == pytest.approx(runs[0].grad_norm.item(), rel=1e-4)
        for p, q in zip(r.model.parameters(), runs[0].model.parameters()):
            assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_step_has_the_gradients_of_a_plain_loop(data_dir, tmp_path, dtype, tolerance):
    r = trainer(data_dir, tmp_path, batch_size=3, gradient_accumulation_steps=2, grad_clip=0, dtype=dtype,
                beta1=0.0, run_name=dtype)
    x, y = r.train_data.__getitems__([0, 1, 2, 3, 4, len(r.train_data) - 1])
    plain = copy.deepcopy(r.model)
    nats, n_targets = 0, 0
    for tokens, targets in zip(x, y):  # float32, one window at a time, one log-probability at a time
        log_p = torch.log_softmax(plain(tokens[None])[0][0], dim=-1)
        for t, target in enumerate(targets.tolist()):
            if target >= 0:
                nats, n_targets = nats - log_p[t, target], n_targets + 1
    (nats / n_targets).backward()
    r.optimizer_step(x, y)
    assert r.progress.pending_losses[0].item() == pytest.approx(nats.item() / n_targets, rel=tolerance)
    for p, q in zip(r.model.parameters(), plain.parameters()):
        gradient = r.optimizer.state[p]["exp_avg"]  # with beta1 = 0 the first moment is the gradient
        assert (gradient - q.grad).norm() < tolerance * q.grad.norm()


def test_gradients_are_clipped_and_the_norm_is_before_clipping(data_dir, tmp_path):
    r = trainer(data_dir, tmp_path, grad_clip=0.01, beta1=0.5, run_name="clip")
    r.optimizer_step(*r.train_data.__getitems__(range(4)))
    assert r.grad_norm > 0.1
    # After the first step AdamW's first moment is (1 - beta1) * gradient.
    moments = [state["exp_avg"] for state in r.optimizer.state.values()]
    assert math.sqrt(sum((2 * m).square().sum().item() for m in moments)) == pytest.approx(0.01, rel=1e-3)


def test_only_copies_to_cuda_are_not_waited_for(data_dir, tmp_path, monkeypatch):
    r, to, asked = trainer(data_dir, tmp_path), torch.Tensor.to, []

    def spy(tensor, *args, **kwargs):
        if tensor.dtype == torch.int64:  # windows
            asked.append(kwargs.get("non_blocking", False))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    r.optimizer_step(*r.train_data.__getitems__(range(4)))
    assert asked and not any(asked)


def test_everything_is_compiled_before_the_first_step(data_dir, tmp_path, monkeypatch):
    """Training and evaluation, in one batch shape each; the backend here is none."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    r = trainer(data_dir, tmp_path, compile="true", batch_size=4, gradient_accumulation_steps=2, eval_tokens=300)
    assert r.forward is not r.model and r.model.training
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        r.optimizer_step(*r.train_data.__getitems__(range(8)))
        r.evaluate()
    assert counters["stats"]["unique_graphs"] == graphs == 2 and not counters["graph_break"]


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_out_of_memory_is_not_the_compilers_failure(data_dir, tmp_path, monkeypatch, capsys, words):
    def fail(*args):
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    with pytest.raises(RuntimeError, match=words[:20]):
        trainer(data_dir, tmp_path, compile="true")
    assert "torch.compile failed" not in capsys.readouterr().err


@pytest.mark.parametrize("poison, optimizer", [("weights", "adamw"), ("gradient", "adamw"), ("gradient", "muon")])
def test_bad_numbers_never_reach_the_weights_or_the_disk(data_dir, tmp_path, poison, optimizer):
    r = trainer(data_dir, tmp_path, run_name="bad", optimizer=optimizer)
    batch = r.train_data.__getitems__(range(4))
    r.optimizer_step(*batch)
    before = {name: value.clone() for name, value in r.model.state_dict().items()}
    weight = r.model.transformer.h[0].mlp.c_fc.weight
    if poison == "gradient":
        weight.register_hook(lambda gradient: gradient * math.inf)
    else:
        before["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.inf
        weight.data[0, 0] = math.inf
    with pytest.raises(Diverged, match=r"step 2.*learning rate 0\.00099"):
        r.optimizer_step(*batch)
    assert all(torch.equal(value, before[name]) for name, value in r.model.state_dict().items())
    with pytest.raises(Diverged):
        r.save()
    assert list(r.run_dir.glob("*.pt*")) == []


# Whole runs, as processes

EXACT = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--batch_size=24", "--warmup_iters=3", "--log_interval=4",
         "--lr_decay_iters=20"]


@pytest.mark.parametrize("family", [
    [], ["--norm=rmsnorm", "--mlp=swiglu", "--pos=sinusoidal", "--dtype=bfloat16", "--optimizer=muon",
         "--lr_schedule=wsd", "--decay_fraction=0.6"],
], ids=["gpt2", "modern-bfloat16-muon-wsd"])
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, tiny_args, family):
    """338 windows by 48: an epoch ends within step 8. Stopped at 6, before it, and 10, after it."""
    args = [*tiny_args, *EXACT, *family]
    straight, process = trained(tmp_path, args, "--max_iters=17", "--eval_interval=5", name="straight")
    assert "epoch 1/3" in process.stdout and "epoch 2/3" in process.stdout and "epoch 3/3" in process.stdout
    trained(tmp_path, args, "--max_iters=6", "--eval_interval=4", name="parts")
    trained(tmp_path, args, "--max_iters=10", "--eval_interval=3", "--resume", name="parts")
    parts, _ = trained(tmp_path, args, "--max_iters=17", "--eval_interval=5", "--resume", name="parts")
    assert_equal_state(straight, parts)
    logged = [scalars(tmp_path / "runs" / name) for name in ("straight", "parts")]
    assert sorted(logged[0]["train/loss"]) == [1, 4, 8, 12, 16]
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert logged[0][tag] == logged[1][tag]
    assert logged[0]["val/loss"][17] == logged[1]["val/loss"][17]


def test_watching_changes_no_weight(tmp_path, tiny_args):
    args = [*tiny_args, "--dropout=0.2"]
    expected, _ = trained(tmp_path, args, name="base")
    for i, flags in enumerate((["--eval_interval=1", "--sample_tokens=3"], ["--checkpoint_interval=5"],
                               ["--log_interval=5", "--eval_tokens=100", "--keep_checkpoints=1"])):
        state, _ = trained(tmp_path, args, *flags, name=f"other{i}")
        expected["pending_losses"] = state["pending_losses"]
        assert_equal_state(expected, state)
    assert len(step_checkpoints(tmp_path / "checkpoints/other2")) == 1
    other, _ = trained(tmp_path, args, "--seed=1", name="seed")
    assert not torch.equal(other["model_state_dict"]["lm_head.weight"], expected["model_state_dict"]["lm_head.weight"])


def test_a_run_tells_and_keeps_what_it_should(tmp_path, tiny_args):
    state, process = trained(tmp_path, tiny_args)
    for words in ("data     tiny", "model    layernorm, gelu, learned", "CPU, 1 threads; float32; not compiled",
                  "epoch 1/1 | step 12/12 (100.0%) | loss ", "| eta 0 s",
                  "step 12 | val loss", "bits/byte", "next:\n  python sample.py --ckpt checkpoints/tiny/best.pt\n"
                  "  tensorboard --logdir runs\n"):
        assert words in process.stdout, process.stdout
    assert "Traceback" not in process.stderr
    names = sorted(path.name for path in (tmp_path / "checkpoints/tiny").iterdir())
    assert names == [".lock", "best.pt", "step_00000006.pt", "step_00000012.pt"]
    assert state["config"]["n_embd"] == 32 and state["step"] == 12 and state["epoch"] == 0
    assert state["tokenizer"]["itos"] == sorted(state["tokenizer"]["stoi"]) and state["vocab_size"] > 20
    assert not any("_orig_mod" in name for name in state["model_state_dict"])
    best = load_checkpoint(tmp_path / "checkpoints/tiny/best.pt")
    assert best["val_loss"] == best["best_val_loss"] == state["best_val_loss"]
    log = scalars(tmp_path / "runs/tiny")
    assert set(log) == {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte",
                        "perf/tokens_per_sec"}
    assert sorted(log["train/loss"]) == [1, 3, 6, 9, 12] and sorted(log["val/loss"]) == [6, 12]
    assert abs(log["train/loss"][1] / math.log(state["vocab_size"]) - 1) < 0.03
    assert log["val/loss"][12] == pytest.approx(state["val_loss"], rel=1e-6)
    assert log["val/perplexity"][12] == pytest.approx(math.exp(state["val_loss"]), rel=1e-5)
    again = run("train_gpt2.py", *tiny_args, cwd=tmp_path)
    assert_refused(again, "checkpoints/tiny already holds checkpoints", "--resume", "--run_name")
    finished = run("train_gpt2.py", *tiny_args, "--resume", cwd=tmp_path)
    assert finished.returncode == 0 and "finished at step 12" in finished.stdout


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path, tiny_args):
    _, _ = trained(tmp_path, tiny_args, "--log_interval=1", name="each")
    _, _ = trained(tmp_path, tiny_args, "--log_interval=4", name="fourth")
    each, fourth = (scalars(tmp_path / "runs" / name)["train/loss"] for name in ("each", "fourth"))
    assert fourth[1] == each[1]
    assert fourth[4] == pytest.approx(np.mean([each[2], each[3], each[4]]), rel=1e-6)
    assert fourth[8] == pytest.approx(np.mean([each[k] for k in (5, 6, 7, 8)]), rel=1e-6)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resuming_is_exact(tmp_path, tiny_args, signum, code):
    args = [*tiny_args, "--max_iters=4000", "--eval_interval=4000", "--checkpoint_interval=4000", "--dropout=0.1",
            "--lr_decay_iters=50"]
    process = started(tmp_path, args)
    for line in process.stdout:
        if "step 6/" in line:
            process.send_signal(signum)
            break
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert "--resume" in out and "Traceback" not in err
    (saved,) = step_checkpoints(tmp_path / "checkpoints/tiny")
    step = load_checkpoint(saved)["step"]
    assert step >= 6
    resumed, _ = trained(tmp_path, args, "--resume", f"--max_iters={step + 3}")
    straight, _ = trained(tmp_path, args, f"--max_iters={step + 3}", name="straight")
    assert_equal_state(resumed, straight)


def test_a_second_signal_stops_at_once(tmp_path, tiny_args):
    args = [*tiny_args, "--max_iters=4000", "--eval_interval=4000", "--checkpoint_interval=1", "--log_interval=1",
            "--gradient_accumulation_steps=300"]
    process = started(tmp_path, args)
    for line in process.stdout:
        if line.startswith("epoch 4/"):  # the second step: each takes 3.6 epochs
            process.send_signal(signal.SIGINT)
            break
    assert any("stopping after this step" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert "stopped after step" not in out
    saved = step_checkpoints(tmp_path / "checkpoints/tiny")
    assert [load_checkpoint(path)["step"] for path in saved][-1] >= 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_out_of_memory_names_what_to_lower(tmp_path, tiny_args):
    process = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt2.py"), *tiny_args, "--batch_size=300000"], cwd=tmp_path, text=True,
        capture_output=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))
    assert_refused(process, "out of memory with 300000 x 32 tokens", "lower batch_size", "gradient_accumulation_steps")


@pytest.mark.chaos
def test_resuming_takes_no_more_memory_than_starting(tmp_path, tiny_args):
    args = [*tiny_args, "--n_layer=6", "--n_embd=512", "--batch_size=1", "--max_iters=2", "--eval_tokens=40"]
    peaks = []
    for more in ([], ["--resume", "--max_iters=4"]):
        process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *args, *more], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss / 1024)
    print(f"\npeak memory: {peaks[0]:.0f} MiB from the start, {peaks[1]:.0f} MiB resumed")
    assert peaks[1] <= 1.05 * peaks[0]


def test_resume_refuses_another_model_optimizer_or_other_data(tmp_path, tiny_args):
    trained(tmp_path, tiny_args)
    process = run("train_gpt2.py", *tiny_args, "--resume", "--n_layer=3", "--mlp=swiglu", "--optimizer=muon",
                  cwd=tmp_path)
    assert_refused(process, "n_layer is 2 in", "and 3 now", "mlp is 'gelu'", "and 'swiglu' now",
                   "optimizer is 'adamw' in", "resume with --optimizer=adamw")
    process = run("train_gpt2.py", *tiny_args, "--resume", "--dataset=pydoc", "--data_dir=data", cwd=tmp_path)
    assert_refused(process, "the data set is not the one of", "tiny then", "pydoc now")
    _, process = trained(tmp_path, tiny_args, "--resume", "--max_iters=14", "--learning_rate=5e-4")
    assert "changed since the checkpoint: learning_rate 0.001 -> 0.0005" in process.stdout
    assert "changed since the checkpoint: max_iters 12 -> 14" in process.stdout


def test_resume_falls_back_over_a_damaged_checkpoint(tmp_path, tiny_args):
    expected, _ = trained(tmp_path, tiny_args)
    newest = tmp_path / "checkpoints/tiny/step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    again, process = trained(tmp_path, tiny_args, "--resume")
    assert "step_00000012.pt is damaged" in process.stderr
    assert "resumed from checkpoints/tiny/step_00000006.pt" in process.stdout
    assert_equal_state(again, expected)
    _, process = trained(tmp_path, tiny_args, "--resume", name="new")
    assert "no checkpoint in checkpoints/new: starting at step 0" in process.stdout


def test_divergence_ends_with_3(tmp_path, tiny_args):
    process = run("train_gpt2.py", *tiny_args, "--learning_rate=1e38", "--grad_clip=0", cwd=tmp_path)
    assert process.returncode == 3, process.stdout + process.stderr
    assert "diverged at step" in process.stderr and "Traceback" not in process.stderr
    for path in (tmp_path / "checkpoints/tiny").glob("*.pt"):
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model_state_dict"].values())


def test_early_stop_keeps_the_best(tmp_path, tiny_args):
    state, process = trained(tmp_path, tiny_args, "--max_iters=4000", "--eval_interval=10", "--patience=2",
                             "--learning_rate=0.02")
    assert "early: 2 evaluations without a better loss" in process.stdout
    best = load_checkpoint(tmp_path / "checkpoints/tiny/best.pt")
    assert best["step"] == state["best_step"] == state["step"] - 20 and best["val_loss"] < state["val_loss"]


def test_a_data_set_is_prepared_first_and_the_default_run_needs_no_config(tmp_path):
    process = run("train_gpt2.py", "--max_iters=1", "--n_layer=1", "--sample_tokens=5", "--device=cpu", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "data set pydoc is not prepared yet: preparing it" in process.stdout
    assert (tmp_path / "checkpoints/pydoc/best.pt").exists()


def test_data_too_short_for_a_window(tmp_path, tiny_args):
    assert_refused(run("train_gpt2.py", *tiny_args, "--block_size=10800", "--n_head=3", cwd=tmp_path),
                   "block_size=10800 is over the data's length", "10800 training tokens", "not divisible")


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
    assert run("sample.py", "--ckpt", "out/model.pt", "--max_new_tokens", "5", cwd=tmp_path).returncode == 0


def test_train_is_callable_without_a_script(data_dir, tmp_path):
    cfg, _ = load_config(None, dict(dataset="tiny", data_dir=str(data_dir), out_dir=str(tmp_path / "checkpoints"),
                                    log_dir=str(tmp_path / "runs"), n_layer=1, max_iters=2, sample_tokens=0,
                                    device="cpu"))
    assert train(cfg).progress.step == 2
