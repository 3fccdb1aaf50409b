"""A plan creates nothing, says what a run then takes, and refuses what the run would refuse."""

import re
import subprocess
import sys

import pytest
from helpers import ONE_THREAD, ROOT, assert_refused, run

import train_gpt2
from core.checkpoint import load_checkpoint
from core.corpus import CORPORA, prepare_text
from core.help import help_text
from core.plan import print_plan
from lib.cli import UserError
from lib.distributed import Processes

UNITS = {"MiB": 2**20, "GiB": 2**30}
TOLERANCE = 0.15
BABY = ["configs/nanogpt_char.py", "--eval_tokens=20000"]
GPT2 = ["--dataset=shakespeare", "--n_layer=12", "--n_head=12", "--n_embd=768", "--eval_tokens=5000"]
# Trains in this process, then prints its peak.
WITH_PEAK = ("import sys, train_gpt2; code = train_gpt2.main(sys.argv[1:]); "
             "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)")


def planned(cwd, *args, flag="--plan", **options):
    """The plan of a command line, which leaves `cwd` as it is."""
    before = {path: path.stat() for path in cwd.rglob("*")}
    process = run("train_gpt2.py", *args, flag, cwd=cwd, **options)
    assert process.returncode == 0 and not process.stderr, process.stdout + process.stderr
    after = {path: path.stat() for path in cwd.rglob("*")}
    assert {path: (s.st_size, s.st_mtime_ns) for path, s in before.items()} == {
        path: (s.st_size, s.st_mtime_ns) for path, s in after.items()}
    return process.stdout


def bytes_after(words, plan):
    """The bytes that a plan gives after `words`."""
    number, unit = re.search(re.escape(words) + r" ([\d,.]+) (MiB|GiB)", plan).groups()
    return float(number.replace(",", "")) * UNITS[unit]


def assert_peak(cwd, *args):
    """The expected peak is within TOLERANCE of that of a run with evaluations and saves; return the plan."""
    args = [ROOT / arg if str(arg).endswith(".py") else arg for arg in args]
    args += ["--device=cpu", "--max_iters=3", "--eval_interval=2", "--checkpoint_interval=1", "--sample_tokens=4"]
    plan = planned(cwd, *args)
    expected = bytes_after("expected", plan)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {WITH_PEAK}"
    process = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=ONE_THREAD, timeout=1200,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", process.stdout)[1]) * 1024
    print(f"expected {expected / 2**20:.0f} MiB, measured {peak / 2**20:.0f}, {expected / peak:.2f}: {args}")
    assert abs(expected / peak - 1) < TOLERANCE
    return plan


def prepare(cwd, name, downloads=None):
    """Prepare a built-in data set below `cwd`."""
    if downloads:
        (cwd / "data").mkdir()
        (cwd / "data/downloads").symlink_to(downloads)
    load_text, kind = CORPORA[name]
    prepare_text(load_text(cwd / "data"), name, kind, cwd / "data")


def test_a_plan_agrees_with_what_a_run_leaves(tmp_path, tiny_args, monkeypatch, capsys):
    plan = planned(tmp_path, *tiny_args, flag="--plan=measure")
    assert float(re.search(r"measured (\S+) s a step, [\d,]+ tok/s; \d+ s for 12 steps", plan)[1]) > 0
    assert abs(int(re.search(r"(\d+)% of the expected", plan)[1]) / 100 - 1) < TOLERANCE
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(tiny_args) == 0
    (path,) = tmp_path.glob("checkpoints/tiny/step_00000012.pt")
    weights = load_checkpoint(path)["model_state_dict"]
    del weights["lm_head.weight"]  # the embedding's
    n = sum(tensor.numel() for tensor in weights.values())
    assert f"model    {n:,} parameters, {n - 32 * 32:,} without" in plan
    assert bytes_after("weights", plan) == bytes_after("gradients", plan) == pytest.approx(4 * n, abs=2**16)
    assert bytes_after("moments", plan) == pytest.approx(8 * n, abs=2**16)
    assert bytes_after("disk    ", plan) == pytest.approx(path.stat().st_size, abs=2**16)
    assert "2 x float32 (2, 1, 2, 32, 16)" in plan and "12 steps = 1,536 tokens" in plan
    capsys.readouterr()
    assert train_gpt2.main([*tiny_args, "--plan"]) == 0  # its directory has checkpoints by now
    assert capsys.readouterr().out.splitlines()[1:3] == plan.splitlines()[1:3]
    assert "time     unknown" not in plan
    assert train_gpt2.main([*tiny_args, "--max_iters=20", "--resume", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "length   8 steps left of 20 after checkpoints/tiny/step_00000012.pt = 1,024 tokens" in plan
    assert "\ntime     unknown; --plan=measure measures it\n" in plan
    assert train_gpt2.main([*tiny_args, "--plan", "measure"]) == 0
    assert " s a step, " in capsys.readouterr().out


def test_the_first_run(tmp_path):
    prepare(tmp_path, "pydoc")
    plan = assert_peak(tmp_path, "configs/quickstart.py", "--eval_tokens=2048", "--dtype=float32")
    size = next(tmp_path.glob("checkpoints/quickstart/step_*.pt")).stat().st_size
    assert bytes_after("disk    ", plan) == pytest.approx(size, rel=0.005)
    assert bytes_after("a checkpoint, at most", plan) == pytest.approx(4 * size, rel=0.005)
    assert "3 steps = 6,144 tokens" in plan and "1,079,552 parameters" in plan


def test_what_does_not_fit_is_planned_and_not_measured(tmp_path, tiny_args, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main([*tiny_args, "--batch_size=65536", "--n_embd=1024", "--plan=measure"]) == 0
    plan = capsys.readouterr().out
    assert "DOES NOT FIT: out of memory with 65536 x 32 tokens in a forward pass: lower batch_size" in plan
    assert "not measured: it does not fit" in plan and list(tmp_path.iterdir()) == []


def test_processes_share_the_micro_batches_and_exchange_gradients(tmp_path, tiny_args, capsys, monkeypatch):
    plans, args = [], [*tiny_args, "--n_embd=256", "--gradient_accumulation_steps=6", "--plan"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Processes, "lead", lambda self, action: action())
    for n, more in ((1, []), (2, []), (2, ["--exact_sum"])):
        assert print_plan([*args, *more], Processes(size=n)) == 0
        plans.append(capsys.readouterr().out)
    one, two, exact = plans
    assert "2 processes" in two and "exchanges" not in one
    words = "each process exchanges gradients of"
    assert bytes_after(words, two) == bytes_after("weights", two)
    assert bytes_after(words, exact) == pytest.approx(2 * bytes_after("weights", two), abs=2**17)
    assert bytes_after("activations", two) == bytes_after("activations", one)


def test_gpt2_data_that_are_not_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(["--dataset=shakespeare", "--device=cpu", "--n_embd=16", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "length   known once shakespeare is prepared" in plan
    assert bytes_after("disk    ", plan) == pytest.approx(3 * bytes_after("weights", plan), rel=0.05)
    assert train_gpt2.main(["--dataset=shakespeare", "--device=cpu", "--n_embd=16", "--max_iters=9", "--plan"]) == 0
    assert "9 steps = 18,432 tokens" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args, words", [
    (["--plan=soon"], ["--plan=soon: --plan stands alone, or is --plan=measure"]),
    (["--plan=soon", "--n_head=3", "--lr=1"], ["3 problems", "--plan=soon", "not divisible", "unknown flag --lr"]),
    (["--plan=measure", "--device=tpu"], ["device must be"]),
    (["--plan=", "--device=cpu"], ["--plan=: --plan stands alone"]),
    (["--dataset=shakespeare_char", "--plan"], ["needs the size of shakespeare_char's vocabulary"]),
    (["--plan", "--n_layer=9999", "--n_embd=65536", "--n_head=64", "--device=cpu"], ["take more than", "n_layer"]),
    (["--plan", "--batch_size=1000000", "--device=cpu"], ["take more than", "lower batch_size"]),
])
def test_what_is_refused(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        train_gpt2.main(args)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_value_ends_the_script(tmp_path):
    assert_refused(run("train_gpt2.py", "--plan=soon", cwd=tmp_path), "--plan=soon: --plan stands alone")
    assert "--plan=measure" in help_text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_baby_gpt(tmp_path, downloads, dtype):
    prepare(tmp_path, "shakespeare_char", downloads)
    assert_peak(tmp_path, *BABY, f"--dtype={dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("block_size, batch_size", [(256, 1), (256, 8), (1024, 1)])
def test_the_peak_of_124m(tmp_path, downloads, block_size, batch_size):
    prepare(tmp_path, "shakespeare", downloads)
    assert_peak(tmp_path, *GPT2, f"--block_size={block_size}", f"--batch_size={batch_size}", "--dtype=float32")
