"""Several processes: one result, one voice, one end."""

import re
import shutil
import signal
import time

import pytest
import torch
from chaos_harness import SmallRun, assert_same, exit_code, last_step, read_log, send, wait
from helpers import assert_equal_state, assert_refused, run
from launch import LaunchedRun, end_of
from torch.distributed import HashStore

from core.checkpoint import load_checkpoint, step_checkpoints
from core.corpus import prepare_text
from core.runs import is_restart
from lib import distributed
from lib.cli import UserError
from lib.distributed import ALONE, FIXED_POINT, RANGE, GradientSum
from train_gpt2 import train_model

EXACT = dict(exact_sum=True, gradient_accumulation_steps=12, batch_size=2)
DIVIDED = dict(gradient_accumulation_steps=4, batch_size=3)


def train(run, n_processes, *more):
    """Train to the end as n_processes started by hand; (newest checkpoint, logged scalars)."""
    codes = [wait(process) for process in run.start_ranks(n_processes, *more)]
    assert codes == [0] * n_processes, "\n".join(read_log(run.log_of(rank)) for rank in range(n_processes))
    return run.final()


@pytest.mark.parametrize("n_processes", [2, 4])
def test_more_processes_come_to_the_same_losses(tmp_path, data_dir, n_processes):
    flags = DIVIDED | dict(max_iters=20, eval_interval=10)
    one, several = (SmallRun(tmp_path / name, data_dir, **flags) for name in ("one", "several"))
    assert one.end() == 0
    expected_log, found_log = one.final()[1], train(several, n_processes)[1]
    assert [(tag, step) for tag, step, _ in found_log] == [(tag, step) for tag, step, _ in expected_log]
    for (tag, step, value), (_, _, wanted) in zip(found_log, expected_log):
        if tag != "train/grad_norm":
            assert value == pytest.approx(wanted, abs=1e-6), (tag, step)
    for rank in range(1, n_processes):
        assert read_log(several.log_of(rank)) == ""  # one voice
    assert several.log_of(0).read_text().count("finished at step 20") == 1
    assert f"; {n_processes} processes\n" in several.log_of(0).read_text()


@pytest.mark.parametrize("optimizer, dtype", [("muon", "bfloat16"), ("adamw", "float32")])
def test_exact_sums_do_not_depend_on_the_number_of_processes(tmp_path, data_dir, optimizer, dtype):
    flags = EXACT | dict(optimizer=optimizer, dtype=dtype)
    alone = SmallRun(tmp_path / "alone", data_dir, **flags)
    assert alone.end() == 0
    assert_same(train(SmallRun(tmp_path / "three", data_dir, **flags), 3), alone.final())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sixty_steps_of_one_to_four_processes_have_the_same_bits(tmp_path, data_dir, optimizer, dtype):
    flags = EXACT | dict(optimizer=optimizer, dtype=dtype, max_iters=60)
    alone = SmallRun(tmp_path / "alone", data_dir, **flags)
    assert alone.end() == 0
    for n in (2, 3, 4):
        assert_same(train(SmallRun(tmp_path / str(n), data_dir, **flags), n), alone.final())


def test_a_run_continues_with_another_number_of_processes(tmp_path, data_dir):
    alone = SmallRun(tmp_path / "alone", data_dir, **EXACT)
    assert alone.end() == 0
    run = SmallRun(tmp_path / "elastic", data_dir, **EXACT)
    decay = "--lr_decay_iters=12"
    train(run, 2, "--max_iters=5", decay)
    assert run.end("--resume", "--max_iters=9", decay) == 0
    assert "changed since" in run.output() and "process" not in run.output()
    assert_equal_state(train(run, 3, "--resume")[0], alone.final()[0])


@pytest.mark.parametrize("twice", [False, True])
def test_a_stop_that_one_process_hears_of_stops_all(tmp_path, data_dir, twice):
    alone = SmallRun(tmp_path / "alone", data_dir, **EXACT)
    assert alone.end() == 0
    run = SmallRun(tmp_path / "stopped", data_dir, **EXACT)
    processes = run.start_ranks(2, "--max_iters=100000", "--lr_decay_iters=12")
    while last_step(read_log(run.log_of(0))) < 3:
        assert exit_code(processes[0]) is None, read_log(run.log_of(0))
        time.sleep(0.005)
    for process in (processes[1], *(processes if twice else ())):  # torchrun passes on what all have received, too
        send(process, signal.SIGTERM)
    assert [wait(process) for process in processes] == [143, 143]
    step = int(re.search(r"stopped after step (\d+), saved (\S+)", read_log(run.log_of(0)))[1])
    assert "resume with: torchrun [as before] train_gpt2.py --" in read_log(run.log_of(0))
    assert read_log(run.log_of(1)) == ""
    assert [load_checkpoint(path)["step"] for path in step_checkpoints(run.run_dir)][-1] == step
    if step < 12:
        assert_same(train(run, 2, "--resume"), alone.final())


def ended_early(run, n_processes, *more, code=2, only=None):
    """Start n_processes that end with `code` soon; what each has printed."""
    processes = run.start_ranks(n_processes, *more, only=only)
    assert [wait(process, 30) for process in processes] == [code] * n_processes, run.log_of(0).read_text()
    return [read_log(run.log_of(rank)) for rank in range(n_processes)]


def test_work_that_cannot_be_divided_is_refused(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, gradient_accumulation_steps=6)
    first, *others = ended_early(run, 4)
    assert first == ("error: gradient_accumulation_steps=6 cannot be divided among 4 processes: set it to a multiple "
                     "of 4, or start 1 or 2 or 3 or 6\n")
    assert others == [""] * 3 and not run.run_dir.exists()


def test_one_process_with_other_flags_is_refused(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    first, second = ended_early(run, 2, only={1: (["--seed=2"], {})})
    assert first == "error: process 1: its flags or config differ from the first process's: make them equal\n"
    assert second == "" and not run.run_dir.exists()


def test_one_process_with_other_data_is_refused(tmp_path, data_dir):
    """As on a second machine with its own disk."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine, text in zip(machines, ("to be or not to be " * 99, "that is the question " * 99)):
        prepare_text(text, "tiny", "char", machine / "data")
    run = SmallRun(machines[0], "data", **DIVIDED)
    first, second = ended_early(run, 2, only={1: ((), dict(directory=machines[1]))})
    assert "error: process 1: data/tiny is not the first process's data: copy them\n" in first
    assert second == "" and not run.run_dir.exists()
    bins = [machine / "data/tiny/train.bin" for machine in machines]
    shutil.copytree(machines[0] / "data", machines[1] / "data", dirs_exist_ok=True)
    bins[1].write_bytes(bins[0].read_bytes()[::-1])  # each machine's first process verifies its data
    assert "process 1: data/tiny/train.bin does not match its sha256" in ended_early(
        run, 2, only={1: ((), dict(directory=machines[1], local_rank=0))})[0]
    shutil.rmtree(machines[1] / "data")
    assert "process 1: data/tiny is not a prepared data set" in ended_early(
        run, 2, only={1: ((), dict(directory=machines[1]))})[0]


def test_a_process_without_a_gpu_is_refused(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    first, second = ended_early(run, 2, only={rank: ((), dict(fault=("pretend_cuda", not rank))) for rank in (0, 1)})
    assert first == ("error: process 1: device cuda:1 is not on this machine (cuda devices: 0): use --device=auto\n")
    assert second == "" and not run.run_dir.exists()


@pytest.mark.parametrize("flags, words", [
    ({"data_dir": "nowhere", "dataset": "nothing"}, "unknown dataset nothing"),
    ({"out_dir": "log0.txt"}, "log0.txt is not a directory"), ({"run_name": "y\0"}, "run_name"),
    ({"learning_rate": "nan"}, "learning_rate must be a finite float"),
    ({"epochs": 1e12, "max_iters": "none"}, "a run can have at most"),
    ({"device": "cuda:0"}, "device=cuda:0 is one device"),
])
def test_what_the_first_process_refuses_ends_all(tmp_path, data_dir, flags, words):
    run = SmallRun(tmp_path, **dict(data_dir=data_dir) | DIVIDED | flags)
    first, second = ended_early(run, 2)
    assert words in first and "Traceback" not in first and second == ""


def test_two_runs_in_one_directory(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    processes = run.start_ranks(2, "--max_iters=100000")
    while not step_checkpoints(run.run_dir):
        assert exit_code(processes[0]) is None, read_log(run.log_of(0))
        time.sleep(0.005)
    other = SmallRun(tmp_path, data_dir, **DIVIDED)
    other.log_of = lambda rank: tmp_path / f"other{rank}.txt"
    first, second = ended_early(other, 2, "--resume")
    assert "another process is training in" in first and second == ""
    assert all(exit_code(process) is None for process in processes)
    send(processes[0], signal.SIGINT)
    assert [wait(process) for process in processes] == [130, 130]


def test_what_does_not_fit_in_memory_or_diverges_ends_all(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    first, second = ended_early(run, 2, code=3, only={1: ((), dict(fault=("poison", "gradient", 2, float("nan"))))})
    assert "training diverged at step" in first and "last good checkpoint" in first and second == ""
    assert not step_checkpoints(run.run_dir)


def test_a_full_disk_ends_all(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    first, second = ended_early(run, 2, only={0: ((), dict(fault=("fill_disk", 12, 5000)))})
    assert "the last checkpoint could not be saved" in first and second == ""
    assert [load_checkpoint(path)["step"] for path in step_checkpoints(run.run_dir)] == [4, 8]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_or_a_kill_ends_the_others(tmp_path, data_dir, failing):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    processes = run.start_ranks(2, "--max_iters=100000", only={failing: ((), dict(fault=("fail", 7)))})
    assert [wait(process, 30) for process in processes] == [1, 1]
    texts = [run.log_of(rank).read_text() for rank in (0, 1)]
    assert "ZeroDivisionError: a bug" in texts[failing] and "Traceback" not in texts[1 - failing]
    assert f"process {1 - failing} ends: it has lost contact with another one" in texts[1 - failing]


def test_torchrun_restarts_resume_and_refusals_stay_refusals(tmp_path, data_dir):
    flags = dict(max_iters=12, checkpoint_interval=2, keep_checkpoints=99)
    run = LaunchedRun(tmp_path / "run", data_dir, **flags)
    alone = LaunchedRun(tmp_path / "alone", data_dir, **flags)
    assert alone.end() == 0
    launcher = run.launch(2, fault=(1, "fail", 5 * 2), options=["--max-restarts=3"])
    assert end_of(launcher, {}, 100) == 0, run.text()
    assert re.search(r"resumed from \S+ at step 4\n", run.text())
    assert_same(run.final(), alone.final())
    before = sorted(run.run_dir.iterdir())
    run.log.unlink()
    assert end_of(run.launch(2, "--max_iters=99", options=["--max-restarts=1"]), {}, 100) == 1
    assert run.text().count("already holds checkpoints: --resume continues") == 2
    assert sorted(run.run_dir.iterdir()) == before


def gradients_of(parameters, n_micro_batches, order, exact, scale=1.0, weight=1.0):
    """(loss, gradients) of a GradientSum of micro-batches in an order, and the same in float64."""
    grad_sum = GradientSum(parameters, ALONE, exact, n_micro_batches)
    grad_sum.start(torch.tensor(scale))
    inputs = torch.randn(n_micro_batches, *parameters[0].shape, generator=torch.Generator().manual_seed(1)) * weight
    for n, number in enumerate(order):
        loss = (parameters[0] * inputs[number]).sum() + parameters[1].square().sum() * 1e-3
        grad_sum.backward(loss * scale, n == n_micro_batches - 1)
    expected = [inputs.double().sum(0), parameters[1].detach().double() * 2e-3 * n_micro_batches]
    return grad_sum.finish(), [p.grad for p in parameters], expected


@pytest.fixture
def parameters(monkeypatch):
    """Three parameters in buckets of their own; no loss depends on the last one."""
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 40)
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), (11,))]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradient_sums(parameters, exact, scale):
    loss, found, expected = gradients_of(parameters, 5, range(5), exact, scale)
    assert loss.isfinite() and found[2].count_nonzero() == 0
    for gradient, wanted in zip(found, expected):
        assert torch.allclose(gradient.double() / scale, wanted, rtol=1e-6, atol=1e-7)


def test_exact_sums_do_not_depend_on_order_and_others_do(parameters):
    def of(order, exact):
        loss, gradients, _ = gradients_of(parameters, 40, order, exact, weight=0.1)
        return torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)]).clone()

    forwards, backwards = range(40), range(39, -1, -1)
    assert torch.equal(of(forwards, True), of(backwards, True))
    assert not torch.equal(of(forwards, False), of(backwards, False))
    assert torch.allclose(of(forwards, True), of(forwards, False), atol=1e-4)


@pytest.mark.parametrize("weight", [RANGE, float("nan"), float("inf")])
def test_exact_sums_that_overflow_are_nan(parameters, weight):
    _, gradients, _ = gradients_of(parameters, 4, range(4), True, weight=RANGE / 40)
    assert all(gradient.isfinite().all() for gradient in gradients)
    _, gradients, _ = gradients_of(parameters, 4, range(4), True, weight=weight)
    assert gradients[0].isnan().all()
    assert 1 / FIXED_POINT < 1e-13


def test_train_model_is_for_one_process(monkeypatch):
    for name, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR="here", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="train_model trains in one process"):
        train_model(dataset="pydoc")


def test_an_environment_without_torchrun_is_refused(tmp_path):
    assert_refused(run("train_gpt2.py", cwd=tmp_path, env={"WORLD_SIZE": "2", "RANK": "0"}),
                   "WORLD_SIZE=2 is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun")


@pytest.mark.parametrize("env", [dict(WORLD_SIZE="two"), dict(WORLD_SIZE="2", RANK="2"), dict(WORLD_SIZE="0")])
def test_an_impossible_environment_is_refused(tmp_path, env):
    rest = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    process = run("train_gpt2.py", cwd=tmp_path, env=rest | env)
    assert_refused(process, "do not fit: start with torchrun, or unset them")


def test_events_that_cannot_be_written_end_all_with_one_message(tmp_path, data_dir):
    run = SmallRun(tmp_path, data_dir, **DIVIDED, log_dir="logs")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/r").write_text("")
    first, second = ended_early(run, 2)
    assert first.endswith("error: cannot create the directory logs/r: it is a file\n") and second == ""


def test_who_waits_for_others_can_be_stopped(tmp_path, data_dir, monkeypatch):
    run = SmallRun(tmp_path, data_dir, **DIVIDED)
    (process, other) = run.start_ranks(2, only={1: (["--help"], dict(fault=("sleep", 100)))})
    while "waiting" not in read_log(run.log_of(0)):
        assert exit_code(process) is None
        time.sleep(0.01)
    send(process, signal.SIGINT)
    assert wait(process, 10) == 130
    send(other, signal.SIGKILL)
    wait(other)


def test_a_launch_is_known_by_its_store_alone(tmp_path):
    stores = [HashStore(), HashStore()]
    names = [distributed.launch_of(store) for store in (*stores, *stores)]
    assert names[:2] == names[2:] and names[0] != names[1]
    (tmp_path / ".launch").write_text(names[0])
    assert is_restart(tmp_path, names[0]) and not is_restart(tmp_path, names[1]) and not is_restart(tmp_path, None)
