import html
import math
import re

import pytest
import torch
from helpers import files_up_to, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import core.report
import train_gpt2
from core.checkpoint import Progress, Run, step_checkpoints
from core.config import TrainConfig, resolve
from core.corpus import read_corpus
from core.evaluation import Evaluation
from core.metrics import read_history
from core.report import Report, StepTimer, duration, position
from core.trainer import Trainer


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3599.4, "59 min 59 s"),
    (3599.6, "1 h 00 min"), (7800, "2 h 10 min"), (100 * 3600, "100 h 00 min"),
])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_pause_is_not_measured(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(core.report.time, "perf_counter", lambda: clock[0])
    timer = StepTimer()
    assert timer.mean() == 0
    clock[0], timer.steps = 16.0, 3
    with timer.paused():
        clock[0] = 99.0
    assert timer.mean() == 2.0
    timer.restart()
    clock[0], timer.steps = 100.0, 2
    assert timer.mean() == 0.5


def test_training_time_adds_up_over_restarts_pauses_and_resumes(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(core.report.time, "perf_counter", lambda: clock[0])
    timer = StepTimer(100.0)
    clock[0] = 12.0
    with timer.paused():
        clock[0] = 50.0
        assert timer.seconds() == 2.0 and timer.total() == 102.0
        timer.restart()
        assert timer.seconds() == 0.0 and timer.total() == 102.0
        clock[0] = 60.0
    clock[0] = 63.0
    assert timer.seconds() == 3.0 and timer.total() == 105.0


# The lines

class Steps:
    """A report to be driven by hand, on a run of a tiny model that has not taken a step."""

    def __init__(self, tmp_path, corpus, progress=None, **fields):
        base = dict(dataset="tiny", out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "log"), run_name="r",
                    device="cpu", dtype="float32", compile="false", n_layer=1, n_head=2, n_embd=8, block_size=16,
                    batch_size=4, max_iters=30, sample_tokens=5, learning_rate=1e-3, warmup_iters=0)
        self.cfg = resolve(TrainConfig(**base | fields), n_windows=50)
        self.run, self.progress, self.log = Run(self.cfg, corpus), progress or Progress(), tmp_path / "log/r"
        self.trainer = Trainer(self.cfg, corpus.tokenizer.vocab_size)
        self.report = Report(self.run, self.trainer, self.progress)

    def take(self, *losses):
        for loss in losses:
            self.progress.add(torch.tensor(loss))
            self.report.step_done()

    def events(self):
        self.report.__exit__(None, None, None)
        return scalars(self.log)


@pytest.fixture
def steps(tmp_path, data_dir):
    """A function that makes Steps with these fields of its config."""
    corpus = read_corpus(data_dir / "tiny")
    return lambda *args, **fields: Steps(tmp_path, corpus, *args, **fields)


def test_the_table_at_the_start(steps, capsys):
    s = steps(gradient_accumulation_steps=3)
    s.report.start()
    n_params = sum(p.numel() for p in s.trainer.model.parameters()) - 16 * 8
    assert capsys.readouterr().out == (
        f"run      r: checkpoints in {s.cfg.out_dir}/r, events in {s.cfg.log_dir}/r\n"
        "data     tiny: 10,800 training and 1,200 validation tokens, 76 symbols\n"
        "model    layernorm, gelu, learned positions; 1 layer, 2 heads, 8 wide, context 16; "
        f"{n_params:,} parameters\n"
        "step     3 x 4 sequences = 192 tokens\n"
        "length   30 steps; 4.2 steps an epoch of 50 windows\n"
        "device   CPU, 1 thread; float32; not compiled\n")


def test_the_start_line_says_where_a_run_starts(steps, capsys):
    s = steps(Progress(step=30), resume=True)
    s.run.newest, s.run.changes = s.cfg.run_dir / "step_00000030.pt", [("seed", 1, 2), ("epochs", None, 3.0)]
    s.trainer.compile_error, s.trainer.forward = "no compiler", object()
    s.report.start()
    out, err = capsys.readouterr()
    assert out.startswith(f"resumed from {s.cfg.run_dir}/step_00000030.pt at step 30\n"
                          "changed since the checkpoint: seed 1 -> 2\n"
                          "changed since the checkpoint: epochs None -> 3.0\nrun  ")
    assert "; compiled\n" in out
    assert out.endswith("nothing to do: the run is finished; raise --max_iters, --epochs or --patience to continue\n")
    assert err == "warning: torch.compile failed, continuing without it: no compiler\n"


@pytest.mark.parametrize("changes, fields, words", [
    ([("batch_size", 2, 4)], {}, "a step has 4 sequences and had 2: epochs are counted as if it had always been 4\n"),
    ([("gradient_accumulation_steps", 3, 1)], {}, "a step has 4 sequences and had 12: epochs are counted"),
    ([("batch_size", 2, 4), ("gradient_accumulation_steps", 2, 1)], {}, None),
    ([], dict(warmup_iters=30),
     "warmup_iters=30 lasts the whole run: the learning rate ends at 9.68e-04 and never reaches its peak"),
    ([], dict(warmup_iters=29), None),
])
def test_what_surprises_is_said_at_the_start(steps, capsys, changes, fields, words):
    s = steps(Progress(step=10), resume=True, max_iters=30, **fields)
    s.run.newest, s.run.changes = s.cfg.run_dir / "step_00000010.pt", changes
    s.report.start()
    out = capsys.readouterr().out
    assert words in out if words else "epochs are counted" not in out and "only rises" not in out


def test_a_resume_without_a_checkpoint_says_so(steps, capsys):
    s = steps(resume=True)
    s.report.start()
    assert capsys.readouterr().out.startswith(f"no checkpoint in {s.cfg.run_dir}: starting at step 0\n")


def test_progress_lines_have_the_mean_loss_and_their_position(steps, capsys):
    s = steps(max_iters=20)
    s.take(3.0)
    s.report.training()
    s.trainer.grad_norm = torch.tensor(2.5)
    s.take(1.0, 2.0, 6.0)
    s.report.training()
    lines = capsys.readouterr().out.splitlines()
    # 50 windows by 4: 13 steps begin in the first epoch, of the second 7 are in the run.
    assert lines[0].startswith("epoch 1/2 | step 1/13 (7.7%) | loss 3.0000 | ppl 20.09 | lr 1.00e-03 | tok/s ")
    assert lines[1].startswith("epoch 1/2 | step 4/13 (30.8%) | loss 3.0000 | ppl 20.09 | lr 9.51e-04 | tok/s ")
    assert re.search(r"tok/s [\d,]+ \| eta \d+ s$", lines[1])
    log = s.events()
    assert set(log) == {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_sec"}
    assert log["train/loss"] == {1: 3.0, 4: 3.0} and log["train/grad_norm"] == {1: 0.0, 4: 2.5}


def test_time_is_estimated_once_and_epochs_are_timed(steps, capsys, monkeypatch):
    for log_interval, epochs in ((12, ["epoch took 0 s"] * 2), (13, [])):  # an epoch has 12.5 steps
        s = steps(max_iters=40, log_interval=log_interval)
        monkeypatch.setattr(s.report.timer, "mean", lambda: 2.0)
        s.take(*[1.0] * 30)
        lines = capsys.readouterr().out.splitlines()
        assert lines == ["expected time: 1 min 00 s for the remaining steps, evaluations not included", *epochs]
        s.report.__exit__(None, None, None)


def test_speed_in_tokens_and_mfu(steps, monkeypatch, capsys):
    s = steps(gradient_accumulation_steps=2)
    monkeypatch.setattr(s.report.timer, "mean", lambda: 0.25)
    monkeypatch.setattr(core.report, "peak_flops", lambda device: 1e9)
    s.take(1.0)
    s.report.training()
    assert f"| tok/s {8 * 16 * 4} | eta 7 s\n" in capsys.readouterr().out
    log = s.events()
    assert log["perf/tokens_per_sec"] == {1: 512.0}
    assert log["perf/mfu"][1] == pytest.approx(512 * s.trainer.model.flops_per_token() / 1e9, rel=1e-6)


def test_evaluations_name_the_best(steps, capsys):
    s = steps()
    for step, loss, words in ((3, 2.5, "best so far"), (6, 2.75, "best 2.5000 at 3"), (9, 2.25, "best so far")):
        s.progress.step = step
        s.progress.evaluated(loss)
        s.report.evaluation(Evaluation(loss, math.exp(loss), loss / 2))
        s.report.log_evaluation(Evaluation(loss, math.exp(loss), loss / 2))
        assert capsys.readouterr().out == (f"step {step} | val loss {loss:.4f} | ppl {math.exp(loss):.2f} | "
                                           f"bits/byte {loss / 2:.4f} | {words}\n")
    s.progress.best_step = s.progress.best_val_loss = None
    s.report.evaluation(Evaluation(2.0, math.exp(2), 1.0))
    assert capsys.readouterr().out.endswith("| not saved\n")
    s.report.log_evaluation(Evaluation(2.0, math.exp(2), 1.0))
    log = s.events()
    assert log["val/loss"] == {3: 2.5, 6: 2.75, 9: 2.0} and log["val/bits_per_byte"][3] == 1.25


def test_samples_are_texts_of_the_log(steps):
    s = steps(sample_tokens=30)
    s.progress.step = 4
    s.report.log_evaluation(Evaluation(2.0, math.exp(2), 1.0))
    s.report.__exit__(None, None, None)
    events = EventAccumulator(s.cfg.log_dir + "/r", size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = s.report.sample()
    assert len(text) == 1 + 30 and text == s.report.sample()
    assert event.step == 4 and event.tensor_proto.string_val[0].decode() == f"<pre>{html.escape(text)}</pre>"
    quiet = steps(sample_tokens=0)
    quiet.report.log_evaluation(Evaluation(2.0, math.exp(2), 1.0))


@pytest.mark.parametrize("progress, fields, words", [
    (Progress(step=30, best_step=20, best_val_loss=1.5), {},
     "finished at step 30; best val loss 1.5000 at step 20\n\n{sample}\n\nnext:\n  python sample.py --ckpt "
     "{run}/best.pt\n  tensorboard --logdir {log}\n"),
    (Progress(step=20, best_step=10, best_val_loss=1.5, evals_without_better=2), dict(patience=2),
     "finished at step 20 (early: 2 evaluations without a better loss); best val loss 1.5000 at step 10\n\n"),
    (Progress(step=30), {}, "finished at step 30; never evaluated\n\n{sample}\n\nnext:\n  python sample.py --ckpt "
                            "{run}\n"),
    (Progress(step=30), dict(sample_tokens=0), "finished at step 30; never evaluated\n\nnext:\n  python"),
    (Progress(step=30, val_loss=2.0), dict(sample_tokens=0),
     "finished at step 30; not evaluated since eval_tokens was changed\n\nnext:\n  python"),
])
def test_how_a_run_ended(steps, capsys, progress, fields, words):
    s = steps(progress, **fields)
    s.cfg.run_dir.mkdir(parents=True, exist_ok=True)
    (s.cfg.run_dir / "best.pt").touch()
    s.report.end()
    expected = words.format(run=s.cfg.run_dir, log=s.cfg.log_dir, sample=s.report.sample())
    assert capsys.readouterr().out.startswith(expected)


def test_a_best_that_is_gone_is_not_recommended(steps, capsys):
    s = steps(Progress(step=30, best_step=20, best_val_loss=1.5), sample_tokens=0)
    s.report.end()
    assert f"sample.py --ckpt {s.cfg.run_dir}\n" in capsys.readouterr().out


def test_how_a_run_was_stopped_is_told_on_stderr(steps, capsys):
    s = steps(Progress())
    s.report.end()
    assert capsys.readouterr() == ("", "stopped before the first step was done: nothing to save\n")
    s.progress.step = 7
    s.run.newest = s.cfg.run_dir / "step_00000007.pt"
    s.report.end()
    assert capsys.readouterr() == ("", f"stopped after step 7, saved {s.cfg.run_dir}/step_00000007.pt\n")


def test_an_evaluation_that_ends_the_run_shows_and_logs_the_last_loss(steps, capsys):
    s = steps(patience=2)
    s.progress.evaluated(2.0)
    for loss, lines in ((3.0, 1), (5.0, 2)):  # of them the second is the last
        s.take(1.0, loss)
        s.progress.evaluated(2.5)
        with s.report.timer.paused():
            s.report.evaluation(Evaluation(2.5, math.exp(2.5), 1.0))
        out = capsys.readouterr().out
        assert out.count("\n") == lines and out.splitlines()[-1].startswith(f"step {s.progress.step} | val loss 2.5")
    assert "| step 4/13 (30.8%) | loss 2.5000 |" in out
    assert s.events()["train/loss"] == {4: 2.5}


@pytest.mark.parametrize("fields, words", [
    (dict(max_iters=30), "length   30 steps; 12.5"), (dict(epochs=2.0), "length   25 steps (epochs=2); 12.5"),
    (dict(max_iters=30, epochs=2.0), "length   25 steps (epochs=2); 12.5"),
    (dict(max_iters=10, epochs=2.5), "length   10 steps (epochs=2.5 would be 32; max_iters ends the run); 12.5"),
])
def test_the_table_says_what_ends_the_run(steps, capsys, fields, words):
    steps(**dict(max_iters=None) | fields).report.start()
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("changes, fields, words", [
    ([("max_iters", 10, 30), ("lr_decay_iters", 10, 30)], {},
     "learning rate 1.22e-04 at step 10 and 7.75e-04 at step 11: to keep the former schedule, resume with "
     "--lr_decay_iters=10\n"),
    ([("learning_rate", 2e-3, 1e-3), ("min_lr", 2e-4, 1e-4)], {},
     "--learning_rate=0.002 --min_lr=0.0002\n"),
    ([("max_iters", 10, 30)], dict(lr_decay_iters=10), None), ([("seed", 1, 2)], {}, None),
])
def test_a_jump_of_the_learning_rate_is_announced(steps, capsys, changes, fields, words):
    s = steps(Progress(step=10), resume=True, **fields)
    s.run.newest, s.run.changes = s.cfg.run_dir / "step_00000010.pt", changes
    s.report.start()
    out = capsys.readouterr().out
    assert words in out if words else "learning rate" not in out


@pytest.mark.parametrize("n_threads, cpu_seconds, words", [
    (2, 0.7, "2 threads get 1.4 cores: alongside other programs, OMP_NUM_THREADS=1 may"),
    (2, 0.8, None), (1, 0.3, None),
    (8, 0.4, "8 threads get 3.2 cores: alongside other programs, OMP_NUM_THREADS=3 may"),
])
def test_threads_that_share_cores_are_warned_of(steps, capsys, monkeypatch, n_threads, cpu_seconds, words):
    clock = [0.0]
    monkeypatch.setattr(core.report.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(core.report.time, "process_time", lambda: clock[0] * cpu_seconds * n_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    s, warnings = steps(max_iters=40), []
    for n_steps, seconds in ((1, 9.0), (4, 0.1), (5, 1.0), (5, 1.0)):
        s.take(*[1.0] * n_steps)
        clock[0] += seconds
        with s.report.timer.paused():
            clock[0] += 5
        s.report.training()
        warnings.append(capsys.readouterr().err)
    assert warnings[0] == warnings[1] == warnings[3] == ""  # it comes once, not from too short a time
    assert warnings[2].startswith(f"warning: {words}") if words else warnings[2] == ""


def test_a_long_step_is_announced_once(steps, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(core.report.time, "perf_counter", lambda: clock[0])
    s = steps(gradient_accumulation_steps=1000)
    for seconds in range(1, 14):
        clock[0] = float(seconds)
        s.report.micro_batch_done(seconds)
    assert capsys.readouterr().out == "a step has 1,000 forward passes and takes about 16 min 40 s\n"


def test_an_epoch_that_was_resumed_is_not_timed_as_a_whole(steps, capsys, monkeypatch):
    for first, lines in ((0, ["epoch took 0 s"] * 2), (5, ["rest of the epoch took 0 s", "epoch took 0 s"]),
                         (13, ["epoch took 0 s"])):
        s = steps(Progress(step=first), max_iters=40, log_interval=10)
        monkeypatch.setattr(s.report.timer, "mean", lambda: 2.0)
        s.take(*[1.0] * (30 - first))
        assert [line for line in capsys.readouterr().out.splitlines() if "epoch" in line] == lines
        s.report.__exit__(None, None, None)


def test_paths_to_type_are_quoted(steps, capsys):
    s = steps(Progress(step=30, best_step=20, best_val_loss=1.5), run_name="my run")
    s.cfg.run_dir.mkdir(parents=True)
    (s.cfg.run_dir / "best.pt").touch()
    s.report.end()
    assert f"--ckpt '{s.cfg.run_dir}/best.pt'\n" in capsys.readouterr().out


# The log

def test_what_was_logged_after_the_checkpoint_is_dropped(steps):
    first = steps()
    first.report.timer = StepTimer(100.0)
    first.take(4.0)
    for loss in (3.0, 2.0, 2.0):
        first.take(loss)
        first.report.training()
    assert first.events()["train/loss"] == {2: 3.5, 3: 2.0, 4: 2.0}
    second = steps(Progress(step=2))
    second.take(1.0)
    second.report.training()
    assert second.events()["train/loss"] == {2: 3.5, 3: 1.0}
    history = read_history(first.log)
    assert {step: value for step, (value, _) in history.points["train/loss"].items()} == {2: 3.5, 3: 1.0}
    (_, before), (_, after) = history.points["train/loss"].values()
    assert 100 <= before <= after


def test_what_is_logged_is_on_the_disk_at_once(steps):
    s = steps()
    s.take(4.0)
    s.report.training()
    assert scalars(s.cfg.log_dir + "/r")["train/loss"] == {1: 4.0}


def test_a_full_disk_loses_events_but_not_the_run(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset=tiny", f"--data_dir={data_dir}", "--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=4",
            "--block_size=8", "--batch_size=1", "--max_iters=400", "--eval_interval=400", "--eval_tokens=50",
            "--log_interval=1", "--sample_tokens=5", "--run_name=r", "--dtype=float32"]
    assert train_gpt2.main([*argv, "--max_iters=1", "--run_name=size"]) == 0
    (checkpoint,) = step_checkpoints(tmp_path / "checkpoints/size")
    capsys.readouterr()
    with files_up_to(checkpoint.stat().st_size + 10_000):
        assert train_gpt2.main(argv) == 0
    out, err = capsys.readouterr()
    *warnings, lost = sorted(err.splitlines(), key=lambda line: "lines" in line)
    assert sorted(warnings) == ["warning: TensorBoard events are being lost: File too large",
                                "warning: cannot write runs/r/metrics.jsonl at present: File too large"]
    assert re.fullmatch(r"warning: [\d,]+ lines could not be written to runs/r/metrics.jsonl and are lost", lost)
    assert out.count("| loss ") == 400 and "finished at step 400" in out
    assert [path.name for path in step_checkpoints(tmp_path / "checkpoints/r")][-1] == "step_00000400.pt"
    assert 10 < len(scalars(tmp_path / "runs/r")["train/loss"]) < 400


@pytest.mark.parametrize("n_windows, sequences, max_iters", [(10, 4, 23), (10, 5, 7), (3, 8, 9), (7, 7, 5), (1, 1, 4)])
def test_the_position_of_a_step_counts_the_steps_that_begin_in_its_epoch(n_windows, sequences, max_iters):
    cfg = resolve(TrainConfig(batch_size=sequences, max_iters=max_iters), n_windows)
    epochs = [sum(1 for end in range(n_windows, step * sequences + 1, n_windows)) for step in range(max_iters)]
    for step, epoch in enumerate(epochs):
        assert cfg.epoch_of(step) == epoch
        assert position(step, cfg) == (epoch, epochs[: step + 1].count(epoch), epochs.count(epoch))
