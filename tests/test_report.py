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


# The lines

class Steps:
    """A report to be driven by hand, on a run of a tiny model that has not taken a step."""

    def __init__(self, tmp_path, corpus, progress=None, **fields):
        base = dict(dataset="tiny", out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "log"), run_name="r",
                    device="cpu", dtype="float32", compile="false", n_layer=1, n_head=2, n_embd=8, block_size=16,
                    batch_size=4, max_iters=30, sample_tokens=5, learning_rate=1e-3, warmup_iters=0)
        self.cfg = resolve(TrainConfig(**base | fields), n_windows=50)
        self.run, self.progress = Run(self.cfg, corpus), progress or Progress()
        self.trainer = Trainer(self.cfg, corpus.tokenizer.vocab_size)
        self.report = Report(self.run, self.trainer, self.progress)

    def take(self, *losses):
        for loss in losses:
            self.progress.add(torch.tensor(loss))
            self.report.step_done()

    def events(self):
        self.report.__exit__(None, None, None)
        return scalars(self.cfg.log_dir + "/r")


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
        "model    layernorm, gelu, learned positions; 1 layers, 2 heads, 8 wide, context 16; "
        f"{n_params:,} parameters\n"
        "step     3 x 4 sequences = 192 tokens\n"
        "length   30 steps; 4.2 steps an epoch of 50 windows\n"
        f"device   CPU, {torch.get_num_threads()} threads; float32; not compiled\n")


def test_the_start_line_says_where_a_run_starts(steps, capsys):
    s = steps(Progress(step=30), resume=True)
    s.run.restored_from, s.run.changes = s.cfg.run_dir / "step_00000030.pt", [("seed", 1, 2), ("epochs", None, 3.0)]
    s.trainer.compile_error, s.trainer.forward = "no compiler", object()
    s.report.start()
    out, err = capsys.readouterr()
    assert out.startswith(f"resumed from {s.cfg.run_dir}/step_00000030.pt at step 30\n"
                          "changed since the checkpoint: seed 1 -> 2\n"
                          "changed since the checkpoint: epochs None -> 3.0\nrun  ")
    assert "; compiled\n" in out
    assert out.endswith("nothing to do: the run is finished; raise --max_iters, --epochs or --patience to continue\n")
    assert err == "warning: torch.compile failed, continuing without it: no compiler\n"


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
    s = steps(max_iters=40)
    monkeypatch.setattr(s.report.timer, "mean", lambda: 2.0)
    s.take(*[1.0] * 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["expected time: 1 min 00 s for the remaining steps, evaluations not included",
                     "epoch took 0 s", "epoch took 0 s"]


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
        assert capsys.readouterr().out == (f"step {step} | val loss {loss:.4f} | ppl {math.exp(loss):.2f} | "
                                           f"bits/byte {loss / 2:.4f} | {words}\n")
    s.progress.best_step = s.progress.best_val_loss = None
    s.report.evaluation(Evaluation(2.0, math.exp(2), 1.0))
    assert capsys.readouterr().out.endswith("| not saved\n")
    log = s.events()
    assert log["val/loss"] == {3: 2.5, 6: 2.75, 9: 2.0} and log["val/bits_per_byte"][3] == 1.25


def test_samples_are_texts_of_the_log(steps):
    s = steps(sample_tokens=30)
    s.progress.step = 4
    s.report.evaluation(Evaluation(2.0, math.exp(2), 1.0))
    s.report.__exit__(None, None, None)
    events = EventAccumulator(s.cfg.log_dir + "/r", size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = s.report.sample()
    assert len(text) == 1 + 30 and text == s.report.sample()
    assert event.step == 4 and event.tensor_proto.string_val[0].decode() == f"<pre>{html.escape(text)}</pre>"
    quiet = steps(sample_tokens=0)
    quiet.report.evaluation(Evaluation(2.0, math.exp(2), 1.0))


@pytest.mark.parametrize("progress, fields, words", [
    (Progress(step=7), {}, "stopped after step 7, saved {run}/step_00000007.pt\n"),
    (Progress(step=30, best_step=20, best_val_loss=1.5), {},
     "finished at step 30; best val loss 1.5000 at step 20\n\n{sample}\n\nnext:\n  python sample.py --ckpt "
     "{run}/best.pt\n  tensorboard --logdir {log}\n"),
    (Progress(step=20, best_step=10, best_val_loss=1.5, evals_without_better=2), dict(patience=2),
     "finished at step 20 (early: 2 evaluations without a better loss); best val loss 1.5000 at step 10\n\n"),
    (Progress(step=30), {}, "finished at step 30; never evaluated\n\n{sample}\n\nnext:\n  python sample.py --ckpt "
                            "{run}\n"),
])
def test_how_a_run_ended(steps, capsys, progress, fields, words):
    s = steps(progress, **fields)
    s.report.end()
    expected = words.format(run=s.cfg.run_dir, log=s.cfg.log_dir, sample=s.report.sample())
    assert capsys.readouterr().out.startswith(expected)


def test_paths_to_type_are_quoted(steps, capsys):
    s = steps(Progress(step=30, best_step=20, best_val_loss=1.5), run_name="my run")
    s.report.end()
    assert f"--ckpt '{s.cfg.run_dir}/best.pt'\n" in capsys.readouterr().out


# The log

def test_what_was_logged_after_the_checkpoint_is_dropped(steps):
    first = steps()
    first.take(4.0)
    for loss in (3.0, 2.0, 2.0):
        first.take(loss)
        first.report.training()
    assert first.events()["train/loss"] == {2: 3.5, 3: 2.0, 4: 2.0}
    second = steps(Progress(step=2))
    second.take(1.0)
    second.report.training()
    assert second.events()["train/loss"] == {2: 3.5, 3: 1.0}


def test_what_is_logged_is_on_the_disk_at_once(steps):
    s = steps()
    s.take(4.0)
    s.report.training()
    assert scalars(s.cfg.log_dir + "/r")["train/loss"] == {1: 4.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
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
    assert err == "warning: TensorBoard events are being lost: File too large\n"
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
