"""Several processes that are killed, fail and are stopped: `python -m pytest -m chaos -n 0 -s`."""

import os
import random
import re
import signal
import time

import pytest
from chaos_harness import SmallRun, assert_same, exit_code, in_parallel, last_step, read_log, send, wait
from helpers import assert_equal_state
from launch import LaunchedRun, end_of, ranks_of

from core.checkpoint import load_newest, step_checkpoints

pytestmark = pytest.mark.chaos
ENDLESS, DECAY = "--max_iters=100000", "--lr_decay_iters=20"


@pytest.mark.parametrize("what", ["kill a rank", "fail", "full disk", "stop the launcher", "stop a rank"])
def test_all_processes_end_and_nothing_is_lost(tmp_path, data_dir, what):
    def end_early(number):
        rng = random.Random(f"{what} {number}")
        n = rng.choice((2, 4))
        run = LaunchedRun(tmp_path / f"run{number}", data_dir, max_iters=20, lr_decay_iters=20, checkpoint_interval=2,
                          keep_checkpoints=99)
        fault = {"fail": (rng.randrange(n), "fail", rng.randrange(7, 20) * 4 // n),
                 "full disk": (0, "fill_disk", 20, 5000)}.get(what)
        launcher = run.launch(n, *([] if fault else [ENDLESS]), fault=fault)
        run.await_step(launcher, 4)
        ranks = ranks_of(launcher)
        time.sleep(rng.random() / 10)
        if what == "kill a rank":
            os.kill(ranks[rng.randrange(n)], signal.SIGKILL)
        elif what == "stop the launcher":
            launcher.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
        elif what == "stop a rank":
            os.kill(ranks[rng.randrange(n)], signal.SIGTERM)
        start = time.monotonic()
        # torchrun's own process may abort after its report, in a thread of its store.
        assert end_of(launcher, ranks) in (1, -signal.SIGABRT), run.text()
        seconds = time.monotonic() - start
        steps = [int(path.stem[-8:]) for path in step_checkpoints(run.run_dir)]
        assert [step for step in steps if step % 2 == 0] == list(range(2, steps[-1] + 1, 2))  # each, and none lost
        newest = load_newest(run.run_dir)[1]["step"]  # perhaps of best.pt
        assert newest >= steps[-1]
        messages = {"kill a rank": "it has lost contact with another one", "fail": "ZeroDivisionError: a bug",
                    "full disk": "the last checkpoint could not be saved"}
        assert messages.get(what, f"stopped after step {steps[-1]}, saved") in run.text()
        if "stop" in what:
            assert run.text().count("resume with: torchrun") == 1
        # The same bits as one process that nothing has disturbed.
        end = newest + 3
        assert run.end("--resume", f"--max_iters={end}") == 0
        alone = LaunchedRun(tmp_path / f"alone{number}", data_dir, lr_decay_iters=20, checkpoint_interval=1000)
        assert alone.end(f"--max_iters={end}") == 0
        assert_equal_state(run.final()[0], alone.final()[0])
        return seconds

    seconds = in_parallel(end_early, range(10))
    print(f"\n{what}: {len(seconds)} of 10 ended, the slowest after {max(seconds):.1f} s; resumed with the same bits")


def test_kills_and_other_numbers_of_processes_change_no_bit(tmp_path, data_dir):
    flags = dict(exact_sum=True, gradient_accumulation_steps=4, batch_size=3, max_iters=60, checkpoint_interval=3)
    alone = SmallRun(tmp_path / "alone", data_dir, **flags)
    assert alone.end() == 0

    def kill_and_continue(number):
        rng = random.Random(number)
        run = SmallRun(tmp_path / f"run{number}", data_dir, **flags)
        reached = 0
        for n, more in ((4, []), (1, ["--resume"]), (2, ["--resume"])):
            processes = run.start_ranks(n, *more)
            goal = reached + rng.randrange(4, 12)
            while (reached := last_step(read_log(run.log_of(0)))) < goal:
                assert exit_code(processes[0]) is None, read_log(run.log_of(0))
                time.sleep(0.002)
            time.sleep(rng.random() / 50)
            victim = processes[rng.randrange(n)]
            send(victim, signal.SIGKILL)
            codes = [wait(process, 30) for process in processes]
            assert codes == [-signal.SIGKILL if process is victim else 1 for process in processes]
        processes = run.start_ranks(4, "--resume")
        assert [wait(process) for process in processes] == [0] * 4, read_log(run.log_of(0))
        assert_same(run.final(), alone.final())
        assert run.metrics() == alone.metrics()
        return len(re.findall(r"resumed from", run.log_of(0).read_text()))

    resumes = in_parallel(kill_and_continue, range(20))
    print(f"\n4, 1, 2 and 4 processes, killed three times: {len(resumes)} of 20 runs with the same bits, "
          f"{sum(resumes)} resumes")
