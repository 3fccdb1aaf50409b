"""Crashes, signals, damage, full disks, non-finite numbers and double starts: `python -m pytest -m chaos -n 0 -s`.

Each test prints the number that the README's table gives.
"""

import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile

import numpy as np
import pytest
from chaos_harness import SmallRun, assert_same, exit_code, in_parallel, last_step, read_log, send, wait
from helpers import assert_equal_state

from core.checkpoint import load_checkpoint, load_newest, newest_first, step_checkpoints, step_path
from lib.cli import UserError

pytestmark = pytest.mark.chaos


@pytest.fixture
def reference(tmp_path, data_dir):
    run = SmallRun(tmp_path / "reference", data_dir)
    assert run.end() == 0, run.output()
    return run.final()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data_dir):
    """A checkpoint of a finished small run."""
    run = SmallRun(tmp_path_factory.mktemp("saved"), data_dir)
    assert run.end() == 0
    return step_path(run.run_dir, 12)


@pytest.mark.parametrize("is_best", [False, True])
def test_a_kill_at_every_file_operation_of_a_save(tmp_path, data_dir, is_best):
    """is_best: the step has just been saved as best.pt, of which its file becomes a copy."""
    # The fewest tensors that a model can have: each is a few writes.
    flags = dict(max_iters=6, checkpoint_interval=2, keep_checkpoints=1, eval_interval=2 if is_best else 3,
                 norm="rmsnorm", bias=False, pos="sinusoidal")
    counted = SmallRun(tmp_path / "counted", data_dir, **flags)
    assert counted.end(fault=("kill_at_operation", 4, 0)) == 0
    operations = re.search(r"operations: (.*)", counted.output())[1].split()
    assert len(operations) > (5 if is_best else 50)
    # A power cut: the content reaches the disk before the name, and the name before the older checkpoint goes.
    order = " ".join(name for name in operations if name not in ("flush", "open", "close"))
    assert re.fullmatch(r"create (write )+fsync replace (unlink )?fsync unlink", order), order
    reference, best_step = counted.final(), 4 if is_best else 3

    def kill_and_resume(fatal):
        run = SmallRun(tmp_path / f"kill{fatal}", data_dir, **flags)
        assert run.end(fault=("kill_at_operation", 4, fatal)) == -signal.SIGKILL
        step = load_newest(run.run_dir)[1]["step"]
        assert load_checkpoint(run.run_dir / "best.pt")["step"] == best_step
        # With no save at step 4 to write over what the killed one left.
        assert run.end("--resume", "--checkpoint_interval=6") == 0, run.output()
        assert not run.strays() and "warning" not in run.output()
        assert_same(run.final(), reference)
        shutil.rmtree(run.directory)
        return step

    steps = in_parallel(kill_and_resume, range(1, len(operations) + 1))
    assert steps == sorted(steps) and set(steps) == {best_step, 4}
    print(f"\nSIGKILL at every file operation of a save: {len(steps)} of {len(operations)} resumed to the same bits")


def test_random_kills(tmp_path, data_dir):
    flags = dict(max_iters=120, checkpoint_interval=5, eval_interval=7)
    reference = SmallRun(tmp_path / "reference", data_dir, **flags)
    started = time.monotonic()
    assert reference.end() == 0
    length = time.monotonic() - started
    expected = reference.final()

    def torture(number):
        rng, kills = random.Random(number), 0
        run = SmallRun(tmp_path / f"run{number}", data_dir, **flags)
        for life in range(1000):
            resume = ["--resume"] if step_checkpoints(run.run_dir) or life else []
            log = run.directory / f"log{life}.txt"
            process = run.start(*resume, log=log)
            if kills < 10:
                deadline = time.monotonic() + rng.uniform(0, 0.7) * length
                while exit_code(process) is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                send(process, signal.SIGKILL)
            code = wait(process)
            output = read_log(log)
            assert code in (0, -signal.SIGKILL), output
            kills += code == -signal.SIGKILL
            if code == 0:
                break
            _, content = load_newest(run.run_dir)
            assert last_step(output) - (content["step"] if content else 0) <= 5
        assert not run.strays()
        assert_same(run.final(), expected)
        shutil.rmtree(run.directory)
        return kills

    kills, number = [], 0
    while sum(kills) < 200 or len(kills) < 20:
        kills += in_parallel(torture, range(number, number + 4))
        number += 4
    print(f"\nrandom SIGKILLs: {sum(kills)} in {len(kills)} runs, all ended with the same bits")


@pytest.mark.parametrize("patience", [0, 3])
def test_metrics_of_a_run_killed_10_times(tmp_path, data_dir, patience):
    """With `patience` the run ends early. No evaluation, so neither end, is at the end of a log interval."""
    flags = dict(max_iters=88, checkpoint_interval=5, eval_interval=6, log_interval=17, sample_tokens=5,
                 patience=patience, learning_rate=0.5 if patience else 1e-2, lr_schedule="wsd", decay_fraction=0.01)
    reference = SmallRun(tmp_path / "reference", data_dir, **flags)
    assert reference.end() == 0, reference.output()
    content, expected = reference.final()[0], reference.metrics()
    assert content["step"] % 17 and (content["step"], "train/loss") in [entry[:2] for entry in expected]
    assert ("early: 3 evaluations" in reference.output()) == bool(patience)
    assert {"config", "samples", "train/grad_norm", "val/bits_per_byte"} <= {tag for _, tag, _ in expected}

    def torture(number):
        rng = random.Random(number)
        run, path = SmallRun(tmp_path / f"run{number}", data_dir, **flags), f"run{number}/runs/r/metrics.jsonl"
        kills = 0
        for life in range(10):
            log = run.directory / f"log{life}.txt"
            process = run.start("--resume", log=log)
            goal = rng.randrange(content["step"])
            while (last_step(read_log(log)) < goal or not (tmp_path / path).exists()) and exit_code(process) is None:
                time.sleep(0.002)
            time.sleep(rng.random() / 50)
            send(process, signal.SIGKILL)
            code = wait(process)
            assert code in (0, -signal.SIGKILL), read_log(log)
            kills += code != 0
        assert run.end("--resume") == 0, run.output()
        assert run.metrics() == expected
        assert_equal_state(run.final()[0], content)
        return kills

    kills = in_parallel(torture, range(10))
    print(f"\nmetrics.jsonl of 10 runs, {sum(kills)} SIGKILLs: each the {len(expected)} lines of an undisturbed run")


def test_resume_from_each_of_50_consecutive_steps(tmp_path, data_dir):
    flags = dict(max_iters=62, checkpoint_interval=1, keep_checkpoints=99, log_interval=3)
    reference = SmallRun(tmp_path / "reference", data_dir, **flags)
    assert reference.end() == 0
    content, logged = reference.final()
    assert "epoch 2/2" in reference.output()
    assert content["config"]["gradient_accumulation_steps"] == 2 and content["config"]["dropout"] > 0
    assert len(content["model_state_dict"]) > 10

    def resume(step):
        run = SmallRun(tmp_path / f"from{step}", data_dir, **flags)
        run.run_dir.mkdir(parents=True)
        shutil.copy(step_path(reference.run_dir, step), run.run_dir)
        assert run.end("--resume") == 0, run.output()
        assert_same(run.final(), (content, [entry for entry in logged if entry[1] > step]))
        shutil.rmtree(run.directory)
        return True

    results = in_parallel(resume, range(10, 60))
    print(f"\nresumed from consecutive steps: {sum(results)} of {len(results)} the same bits")


def test_cut_and_flipped_checkpoints(saved, tmp_path):
    data = saved.read_bytes()
    copy = tmp_path / saved.name

    def detected(damaged):
        copy.write_bytes(damaged)
        try:
            load_checkpoint(copy)
        except UserError as error:
            return str(copy) in str(error)
        return False

    assert not detected(data)
    lengths = np.linspace(0, len(data) - 1, 256).astype(int)
    cuts = sum(detected(data[:length]) for length in lengths)
    with zipfile.ZipFile(saved) as archive:
        ranges = []
        for info in archive.infolist():
            if "/data/" in info.filename:
                header = data[info.header_offset : info.header_offset + 30]
                start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") \
                    + int.from_bytes(header[28:30], "little")
                ranges.append((start, start + info.file_size))
    rng, flips = random.Random(0), 0
    for _ in range(1000):
        start, end = rng.choices(ranges, weights=[end - start for start, end in ranges])[0]
        damaged = bytearray(data)
        damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        flips += detected(bytes(damaged))
    assert (cuts, flips) == (256, 1000)
    print(f"\ndamaged checkpoints detected: {cuts} of 256 cuts, {flips} of 1,000 flipped bits")


def test_a_full_disk(tmp_path, data_dir, reference, saved):
    size = saved.stat().st_size

    def fill(limit):
        run = SmallRun(tmp_path / f"full{limit}", data_dir)
        assert run.end(fault=("fill_disk", 8, limit)) == 0, run.output()
        assert "warning: cannot save checkpoints/r/step_00000008.pt: File too large" in run.output()
        assert [path.name for path in step_checkpoints(run.run_dir)] == ["step_00000004.pt", "step_00000012.pt"]
        assert not run.strays()
        assert_same(run.final(), reference)
        shutil.rmtree(run.directory)
        return True

    results = in_parallel(fill, np.linspace(0, size - 500, 50).astype(int).tolist())
    run = SmallRun(tmp_path / "last", data_dir)
    assert run.end(fault=("fill_disk", 12, size // 2)) == 2
    assert "the last checkpoint could not be saved" in run.output()
    assert "--resume continues from best.pt" in run.output()
    assert load_newest(run.run_dir)[1]["step"] == 12
    (run.run_dir / "best.pt").unlink()
    assert load_newest(run.run_dir)[1]["step"] == 8
    assert run.end("--resume") == 0
    assert_same(run.final(), reference)
    print(f"\nfull disk: older checkpoints whole, no stray file at {sum(results)} of 50 points")


def test_sigterm_loses_no_completed_step(tmp_path, data_dir):
    flags = dict(max_iters=100_000, checkpoint_interval=100_000, eval_interval=100_000, lr_decay_iters=100)

    def terminate(number):
        rng = random.Random(number)
        run = SmallRun(tmp_path / f"run{number}", data_dir, **flags)
        process = run.start()
        while "step 1/" not in run.output():
            time.sleep(0.01)
            assert exit_code(process) is None, run.output()
        time.sleep(rng.uniform(0, 0.3))
        send(process, signal.SIGTERM)
        assert wait(process) == 143, run.output()
        step = load_newest(run.run_dir)[1]["step"]
        assert step == last_step(run.output())
        assert f"stopped after step {step}, saved" in run.output() and "--resume" in run.output()
        shutil.rmtree(run.directory)
        return step

    steps = in_parallel(terminate, range(100))
    assert len(set(steps)) > 5
    print(f"\nSIGTERM: no completed step lost in {len(steps)} of 100")


def test_non_finite_values_stop_the_run_and_never_reach_the_disk(tmp_path, data_dir):
    values = {"nan": math.nan, "inf": math.inf}

    def infect(case):
        what, step, name = case
        run = SmallRun(tmp_path / f"{what}{step}{name}", data_dir, checkpoint_interval=1, eval_interval=3)
        assert run.end(fault=("poison", what, step, values[name])) == 3, run.output()
        # A poisoned weight shows when it is to be evaluated or saved, a loss or gradient at once.
        assert f"diverged at step {step}:" in run.output() and "learning rate" in run.output()
        assert ("loss or gradient" in run.output()) == (what != "weight")
        saved = step_checkpoints(run.run_dir)
        assert (str(saved[-1].relative_to(run.directory)) if saved else "none") in run.output()
        for path in run.run_dir.glob("*.pt"):
            content = load_checkpoint(path)
            assert content["step"] < step
            moments = [v for state in content["optimizer_state_dict"]["state"].values() for v in state.values()]
            assert all(value.isfinite().all() for value in (*content["model_state_dict"].values(), *moments))
        return True

    kinds = (("loss", "nan"), ("loss", "inf"), ("gradient", "nan"), ("weight", "inf"))
    cases = [(what, step, name) for what, name in kinds for step in (1, 2, 6, 9, 12)]
    results = in_parallel(infect, cases)
    print(f"\nnon-finite values: nothing on the disk, exit 3 at {sum(results)} of 20 points")


def test_only_one_of_two_simultaneous_runs_trains(tmp_path, data_dir, reference):
    def start_two(number):
        run = SmallRun(tmp_path / f"run{number}", data_dir)
        logs = [run.directory / f"log{i}.txt" for i in range(2)]
        processes = [run.start(log=log) for log in logs]
        codes = [wait(process) for process in processes]
        assert sorted(codes) == [0, 2]
        refused = read_log(logs[codes.index(2)])
        assert "another process is training in" in refused or "already holds checkpoints" in refused
        assert_same(run.final(), reference)
        shutil.rmtree(run.directory)
        return "another process" in refused

    results = in_parallel(start_two, range(50))
    assert any(results)
    print(f"\ndouble starts: exactly one trained in {len(results)} of 50")


def test_ctrl_c_and_readers_that_are_gone(tmp_path, data_dir, reference):
    """`| tee log` and Ctrl-C, which both get; `| head -n 3`; a full disk under stdout; a closed stdout."""
    def through(number, command, **flags):
        """(a run, its process, that of the command that reads its output from a pipe)"""
        run = SmallRun(tmp_path / f"run{number}", data_dir, **flags)
        os.mkfifo(run.directory / "pipe")
        reader = subprocess.Popen(f"exec {command} < pipe > out.txt", shell=True, cwd=run.directory,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        return run, run.start(fault=("redirect_stdout", "pipe")), reader

    def interrupt(number):
        rng = random.Random(number)
        run, process, reader = through(number, "tee", max_iters=100_000, checkpoint_interval=100_000,
                                       eval_interval=100_000, lr_decay_iters=100)
        while "step 1/" not in read_log(run.directory / "out.txt"):
            time.sleep(0.01)
            assert exit_code(process) is None, run.output()
        time.sleep(rng.uniform(0, 0.3))
        for signal_one in rng.sample([lambda: reader.send_signal(signal.SIGINT),
                                      lambda: send(process, signal.SIGINT)], 2):
            signal_one()
        assert wait(process) == 130 and reader.wait(timeout=60) == -signal.SIGINT
        step = load_newest(run.run_dir)[1]["step"]
        assert f"stopped after step {step}, saved" in run.output() and "--resume" in run.output(), run.output()
        assert step >= last_step(read_log(run.directory / "out.txt"))
        shutil.rmtree(run.directory)
        return step

    steps = in_parallel(interrupt, range(50))
    assert len(set(steps)) > 5
    for number, stdout in enumerate(["head", "/dev/full", None] * 3, start=50):
        if stdout == "head":
            run, process, reader = through(number, "head -n 3")
        else:
            run = SmallRun(tmp_path / f"run{number}", data_dir)
            process = run.start(fault=("redirect_stdout", stdout))
        assert wait(process) == 0, run.output()
        assert stdout is None or "warning: standard output is lost" in run.output()
        if stdout == "head":
            assert reader.wait(timeout=60) == 0 and len((run.directory / "out.txt").read_text().splitlines()) == 3
        assert_same(run.final(), reference)
    print(f"\nCtrl-C behind a pipe: saved after {len(steps)} of 50; head, full and closed stdout: 9 of 9 the same bits")


def damage(rng, path):
    """Cut, flip, empty or replace a file."""
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        middle = rng.randrange(len(data) // 4, len(data) // 2)  # records come first, the directory last
        data[middle : middle + 64] = bytes(byte ^ 0x55 for byte in data[middle : middle + 64])
    path.write_bytes([data, data, b"", b"nonsense" * 99][kind])


def test_damage_resume_stop_resume(tmp_path, data_dir):
    """A run never goes behind the newest step that is whole."""
    def sequence(number):
        rng = random.Random(number)
        run = SmallRun(tmp_path / f"run{number}", data_dir, max_iters=100_000, keep_checkpoints=rng.randint(1, 3),
                       checkpoint_interval=rng.randint(1, 3), eval_interval=rng.randint(1, 4), lr_decay_iters=100)
        reached = 0
        for life in range(4):
            log = run.directory / f"log{life}.txt"
            process = run.start("--resume", log=log)
            while last_step(read_log(log)) < reached + rng.randint(2, 5):
                time.sleep(0.005)
                assert exit_code(process) is None, read_log(log)
            send(process, signal.SIGTERM)
            assert wait(process) == 143, read_log(log)
            assert (f" at step {reached}\n" if reached else "no checkpoint in ") in read_log(log), read_log(log)
            saved = re.search(r"stopped after step (\d+), saved (\S+)", read_log(log))
            assert load_checkpoint(run.directory / saved[2])["step"] == int(saved[1]) > reached
            for path in newest_first(run.run_dir)[: rng.randint(0, 3)]:
                if len(whole(run)) > 1:
                    damage(rng, path)
            reached = max(load_checkpoint(path)["step"] for path in whole(run))
        shutil.rmtree(run.directory)
        return life

    def whole(run):
        found = []
        for path in newest_first(run.run_dir):
            with contextlib.suppress(UserError):
                load_checkpoint(path)
                found.append(path)
        return found

    lives = in_parallel(sequence, range(100))
    print(f"\ndamaged, resumed, stopped, resumed: {len(lives)} of 100 sequences of 4 never went back")
