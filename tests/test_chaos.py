"""Crashes, signals, damage and nonsense by the hundred: `python -m pytest -m chaos`.

Each test prints the figure that the README's table gives.
"""

import contextlib
import io
import json
import math
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import string
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from chaos_child import run_sampling, run_training
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prepare_data
from checkpoint import load_checkpoint, load_newest, save_checkpoint, step_checkpoints, step_path
from config import FIELDS, config_from_argv, load_config
from dataset import read_corpus
from errors import UserError
from model import GPT, GPTConfig
from sample import load_model
from tokenizer import GPT2Tokenizer

pytestmark = pytest.mark.chaos
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["chaos_child"])
LOCK = threading.Lock()  # multiprocessing's processes must not be polled by two threads at once
BAD_END = re.compile(r"Traceback|\.py\", line")


FLAGS = dict(dataset="tiny", n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=6,
             gradient_accumulation_steps=2, max_iters=12, warmup_iters=2, dropout=0.1, log_interval=1, eval_interval=5,
             checkpoint_interval=4, sample_tokens=0, eval_tokens=200, run_name="r", dtype="float32", device="cpu",
             learning_rate=1e-2)
WINDOWS, SEQUENCES = math.ceil((10_800 - 1) / 16), 12


class Run:
    """A run of the same small training in its own folder."""

    def __init__(self, folder, data_dir, **flags):
        self.folder, self.run_dir, self.log = folder, folder / "checkpoints/r", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.argv = [f"--{name}={value}" for name, value in (FLAGS | dict(data_dir=data_dir) | flags).items()]

    def start(self, *more, fault=("none",), log=None):
        arguments = ([*self.argv, *more], self.folder, log or self.log, fault)
        process = PROCESSES.Process(target=run_training, args=arguments)
        with LOCK:
            process.start()
        return process

    def end(self, *more, fault=("none",)):
        """Run to its end; the exit code."""
        return wait(self.start(*more, fault=fault))

    def output(self):
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        assert not BAD_END.search(text), text
        return text

    def final(self):
        """The newest checkpoint's content and every logged scalar, [(tag, step, value)]."""
        content = load_checkpoint(step_checkpoints(self.run_dir)[-1])
        events = EventAccumulator(str(self.folder / "runs/r"), size_guidance={"scalars": 0})
        events.Reload()
        tags = ("train/loss", "train/lr", "train/grad_norm", "val/loss")
        return content, [(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]

    def strays(self):
        return [path for path in self.folder.rglob("*") if path.suffix in (".tmp", ".part") or ".writing" in path.name]


def exit_code(process):
    """The process's exit code, None while it runs."""
    with LOCK:
        return process.exitcode


def wait(process, seconds=100):
    """The exit code of a process that ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while (code := exit_code(process)) is None:
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.005)
    return code


def assert_same(result, expected):
    """The same weights, moments and logged values bit for bit, each step logged once."""
    (content, logged), (wanted, wanted_log) = result, expected
    for name, value in wanted["model_state_dict"].items():
        assert torch.equal(content["model_state_dict"][name], value), name
    for i, moments in wanted["optimizer_state_dict"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(content["optimizer_state_dict"]["state"][i][key], value), (i, key)
    assert content["step"] == wanted["step"] and content["best_val_loss"] == wanted["best_val_loss"]
    assert logged == wanted_log


def in_parallel(function, items):
    """[function(item)] by two threads, which wait for processes."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Start the server with a path to import from: Python 3.11 does not hand it sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def reference(tmp_path, data_dir):
    run = Run(tmp_path / "reference", data_dir)
    assert run.end() == 0, run.output()
    return run.final()


def test_a_kill_at_every_file_operation_of_a_save(tmp_path, data_dir):
    # The fewest tensors that a model can have: each is a few writes.
    flags = dict(max_iters=6, checkpoint_interval=2, eval_interval=3, norm="rmsnorm", bias=False, pos="sinusoidal")
    counted = Run(tmp_path / "counted", data_dir, **flags)
    assert counted.end(fault=("kill_at_operation", 4, 0)) == 0
    n_operations = int(re.search(r"operations: (\d+)", counted.output())[1])
    assert n_operations > 50
    reference = counted.final()

    def kill_and_resume(fatal):
        run = Run(tmp_path / f"kill{fatal}", data_dir, **flags)
        assert run.end(fault=("kill_at_operation", 4, fatal)) == -signal.SIGKILL
        step = load_newest(run.run_dir)[1]["step"]
        assert load_checkpoint(run.run_dir / "best.pt")["step"] == 3
        assert run.end("--resume") == 0, run.output()
        assert not run.strays() and "warning" not in run.output()
        assert_same(run.final(), reference)
        shutil.rmtree(run.folder)
        return step

    steps = in_parallel(kill_and_resume, range(1, n_operations + 1))
    assert steps == sorted(steps) and set(steps) == {2, 4}
    print(f"\nSIGKILL at every file operation of a save: {len(steps)} of {n_operations} resumed to the same bits")


def test_random_kills(tmp_path, data_dir):
    flags = dict(max_iters=120, checkpoint_interval=5, eval_interval=7)
    reference = Run(tmp_path / "reference", data_dir, **flags)
    started = time.monotonic()
    assert reference.end() == 0
    length = time.monotonic() - started
    expected = reference.final()

    def torture(number):
        rng, kills = random.Random(number), 0
        run = Run(tmp_path / f"run{number}", data_dir, **flags)
        for life in range(1000):
            resume = ["--resume"] if step_checkpoints(run.run_dir) or life else []
            log = run.folder / f"log{life}.txt"
            process = run.start(*resume, log=log)
            if kills < 10:
                deadline = time.monotonic() + rng.uniform(0, 0.7) * length
                while exit_code(process) is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                with LOCK:
                    process.kill()
            code = wait(process)
            output = log.read_text() if log.exists() else ""
            assert code in (0, -signal.SIGKILL) and not BAD_END.search(output), output
            kills += code == -signal.SIGKILL
            if code == 0:
                break
            _, content = load_newest(run.run_dir)
            assert last_step(output) - (content["step"] if content else 0) <= 5
        assert not run.strays()
        assert_same(run.final(), expected)
        shutil.rmtree(run.folder)
        return kills

    kills, number = [], 0
    while sum(kills) < 200 or len(kills) < 20:
        kills += in_parallel(torture, range(number, number + 4))
        number += 4
    print(f"\nrandom SIGKILLs: {sum(kills)} in {len(kills)} runs, all ended with the same bits")


def last_step(output):
    """The optimizer step of the last progress line, which counts within the epoch; 0 where there is none."""
    lines = re.findall(r"epoch (\d+)/\d+ \| step (\d+)/", output)
    return math.ceil((int(lines[-1][0]) - 1) * WINDOWS / SEQUENCES) + int(lines[-1][1]) if lines else 0


def test_resume_from_each_of_50_consecutive_steps(tmp_path, data_dir):
    flags = dict(max_iters=62, checkpoint_interval=1, keep_checkpoints=99, log_interval=3)
    reference = Run(tmp_path / "reference", data_dir, **flags)
    assert reference.end() == 0
    content, logged = expected = reference.final()
    assert "epoch 2/2" in reference.output()
    assert content["config"]["gradient_accumulation_steps"] == 2 and content["config"]["dropout"] > 0

    def resume(step):
        run = Run(tmp_path / f"from{step}", data_dir, **flags)
        run.run_dir.mkdir(parents=True)
        shutil.copy(step_path(reference.run_dir, step), run.run_dir)
        assert run.end("--resume") == 0, run.output()
        final, log = run.final()
        assert_same((final, log), (content, [entry for entry in logged if entry[1] > step]))
        shutil.rmtree(run.folder)
        return True

    results = in_parallel(resume, range(10, 60))
    assert len(expected[0]["model_state_dict"]) > 10
    print(f"\nresumed from consecutive steps: {sum(results)} of {len(results)} the same bits")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data_dir):
    """A checkpoint of a finished small run."""
    run = Run(tmp_path_factory.mktemp("saved"), data_dir)
    assert run.end() == 0
    return run.run_dir / "step_00000012.pt"


def test_cut_and_flipped_checkpoints(saved, tmp_path):
    data = saved.read_bytes()
    copy = tmp_path / "step_00000001.pt"

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
        run = Run(tmp_path / f"full{limit}", data_dir)
        assert run.end(fault=("fill_disk", 8, limit)) == 0, run.output()
        assert "warning: cannot save checkpoints/r/step_00000008.pt: File too large" in run.output()
        assert [path.name for path in step_checkpoints(run.run_dir)] == ["step_00000004.pt", "step_00000012.pt"]
        assert not run.strays()
        assert_same(run.final(), reference)
        shutil.rmtree(run.folder)
        return True

    results = in_parallel(fill, np.linspace(0, size - 500, 50).astype(int).tolist())
    run = Run(tmp_path / "last", data_dir)
    assert run.end(fault=("fill_disk", 12, size // 2)) == 2
    assert "the last checkpoint could not be saved" in run.output()
    assert load_newest(run.run_dir)[1]["step"] == 8
    assert run.end("--resume") == 0
    assert_same(run.final(), reference)
    print(f"\nfull disk: older checkpoints whole, no stray file at {sum(results)} of 50 points")


def test_sigterm_loses_no_completed_step(tmp_path, data_dir):
    flags = dict(max_iters=100_000, checkpoint_interval=100_000, eval_interval=100_000, lr_decay_iters=100)

    def terminate(number):
        rng = random.Random(number)
        run = Run(tmp_path / f"run{number}", data_dir, **flags)
        process = run.start()
        while "step 1/" not in run.output():
            time.sleep(0.01)
            assert exit_code(process) is None, run.output()
        time.sleep(rng.uniform(0, 0.3))
        with LOCK:
            process.terminate()
        assert wait(process) == 143, run.output()
        step = load_newest(run.run_dir)[1]["step"]
        assert step == last_step(run.output())
        assert f"stopped after step {step}, saved" in run.output() and "--resume" in run.output()
        shutil.rmtree(run.folder)
        return step

    steps = in_parallel(terminate, range(100))
    assert len(set(steps)) > 5
    print(f"\nSIGTERM: no completed step lost in {len(steps)} of 100")


def test_bad_numbers_stop_the_run_and_stay_off_the_disk(tmp_path, data_dir):
    values = {"nan": math.nan, "inf": math.inf}

    def infect(case):
        what, step, name = case
        run = Run(tmp_path / f"{what}{step}{name}", data_dir, checkpoint_interval=1, eval_interval=3)
        assert run.end(fault=("poison", what, step, values[name])) == 3, run.output()
        # A poisoned weight shows when it is to be saved, a loss or gradient at once.
        assert f"diverged at step {step}:" in run.output() and "learning rate" in run.output()
        saved = step_checkpoints(run.run_dir)
        assert (str(saved[-1].relative_to(run.folder)) if saved else "none") in run.output()
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


def test_double_starts(tmp_path, data_dir, reference):
    def start_two(number):
        run = Run(tmp_path / f"run{number}", data_dir)
        logs = [run.folder / f"log{i}.txt" for i in range(2)]
        processes = [run.start(log=log) for log in logs]
        codes = [wait(process) for process in processes]
        assert sorted(codes) == [0, 2]
        refused = logs[codes.index(2)].read_text()
        assert "another process is training in" in refused or "already holds checkpoints" in refused
        assert_same(run.final(), reference)
        shutil.rmtree(run.folder)
        return "another process" in refused

    results = in_parallel(start_two, range(50))
    assert any(results)
    print(f"\ndouble starts: exactly one trained in {len(results)} of 50")


# Nonsense. Whatever is fed in, the outcome is a value or a UserError that names the file or the field.

WORDS = ["0", "1", "-1", "3", "64", "1e-3", "1e999", "-0.0", "nan", "None", "none", "True", "false", "'x'", '"', "''",
         "[1]", "{}", "auto", "cuda:99", "mps", "float16", "rope", "pydoc", "tiny", "nosuch", "../up", "/", ".", "\0",
         "ä☃\U0001f600", "9" * 30, "9" * 5000, "a" * 300, "1 + 1", "(" * 300, "-" * 500 + "1", "lambda: 0",
         "__import__('os')", "b'x'", "1j"]
JUNK = [None, 0, -1, 10**30, 1.5, "", "x", [], {}, True, ["a", "b"], [[1]], {"kind": "char"}, {"kind": []}]


def mutate(rng, data):
    """`data` (bytes) with a few bytes flipped, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i : i + rng.choice((1, 2, 8, 100))]
        elif kind == 2:
            data[i:i] = data[i : i + rng.choice((1, 5, 50))]
        else:
            data[i:i] = rng.choice(WORDS).encode()
    return bytes(data)


def outcome(function, *names):
    """"fine", or "refused" after a UserError that holds one of `names`; anything else is raised."""
    try:
        function()
    except UserError as error:
        assert any(name in str(error) for name in names), str(error)
        return "refused"
    return "fine"


def fuzz_configs(rng, tmp_path, n):
    texts = [path.read_bytes() for path in ROOT.glob("configs/*.py")]
    path = tmp_path / "fuzzed.py"
    for _ in range(n):
        if rng.random() < 0.5:
            path.write_bytes(mutate(rng, rng.choice(texts)))
        else:
            names = [rng.choice([*FIELDS, "x", "n_layers"]) for _ in range(rng.randint(1, 5))]
            lines = [f"{name} = {rng.choice(WORDS)}" for name in names]
            path.write_text("\n".join(lines), encoding="utf-8")
        _, problems = load_config(str(path))
        assert all("fuzzed.py" in problem or any(name in problem for name in FIELDS) for problem in problems), problems
        yield "refused" if problems else "fine"


def fuzz_flags(rng, tmp_path, n):
    for _ in range(n):
        argv = []
        for _ in range(rng.randint(1, 6)):
            name = rng.choice([*FIELDS, "", "n_layers", "help me", "".join(rng.choices(string.printable, k=5))])
            argv += [f"--{name}={rng.choice(WORDS)}"] if rng.random() < 0.6 else [f"--{name}", rng.choice(WORDS)]
        _, problems = config_from_argv(argv)
        assert all(any(word.lstrip("-").split("=")[0] in problem for word in argv)
                   or any(name in problem for name in FIELDS) for problem in problems), (argv, problems)
        yield "refused" if problems else "fine"


def fuzz_texts(rng, tmp_path, n):
    path = tmp_path / "fuzzed.txt"
    for _ in range(n):
        size = rng.choice((0, 1, 2, 5, 30, 300))
        path.write_bytes(rng.randbytes(size) if rng.random() < 0.3 else
                         "".join(rng.choices("ab \n\r\täß你\U0001f600\x00\ufeff", k=size)).encode())
        argv = ["--input", str(path), "--name", rng.choice(("fuzzed", "fuzzed", "../x", "")), "--data_dir",
                str(tmp_path / "data"), "--val_fraction", rng.choice(("0.1", "0.5", "0.999")), "--max_lines",
                rng.choice(("1", "2", "99"))]
        with contextlib.redirect_stdout(io.StringIO()):
            result = outcome(lambda argv=argv: prepare_data.main(argv), "fuzzed", "--name")
        if result == "fine":
            read_corpus(tmp_path / "data/fuzzed")
        yield result


def fuzz_corpora(rng, tmp_path, n):
    source = tmp_path / "source"
    prepare_data.split_and_write("To be, or not to be. " * 20, "source", "char", tmp_path)
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.name != ".lock"}
    meta = json.loads(files["meta.json"])
    for _ in range(n):
        for name, data in files.items():
            (source / name).write_bytes(data)
        name = rng.choice(["meta.json", "meta.json", "train.bin", "val.bin"])
        if name == "meta.json" and rng.random() < 0.5:
            changed = json.loads(files[name])
            place = rng.choice([changed, changed["splits"], changed["splits"]["val"], changed["tokenizer"]])
            place[rng.choice(list(place))] = rng.choice(JUNK)
            (source / name).write_text(json.dumps(changed))
        else:
            (source / name).write_bytes(mutate(rng, files[name]))
        result = outcome(lambda: read_corpus(source), *files)
        if result == "fine":  # white space, or a field that nothing depends on
            assert read_corpus(source).tokenizer.itos == meta["tokenizer"]["itos"]
        yield result


def fuzz_checkpoints(rng, tmp_path, n, saved):
    data = saved.read_bytes()
    content = load_checkpoint(saved)
    path = tmp_path / "fuzzed.pt"
    for _ in range(n):
        if rng.random() < 0.7:
            path.write_bytes(mutate(rng, data))
        else:
            changed = dict(content)
            place = rng.choice(["", "config", "tokenizer", "model_state_dict"])
            if place:
                changed[place] = dict(changed[place])
            target = changed[place] if place else changed
            target[rng.choice(list(target))] = rng.choice([*JUNK, torch.zeros(2)])
            save_checkpoint(path, changed)
        with contextlib.redirect_stderr(io.StringIO()):
            result = outcome(lambda: load_model(path), "fuzzed.pt")
        yield result


def test_nonsense(tmp_path, saved):
    rng = random.Random(0)
    results = {
        "configs": list(fuzz_configs(rng, tmp_path, 3000)),
        "flags": list(fuzz_flags(rng, tmp_path, 3000)),
        "texts": list(fuzz_texts(rng, tmp_path, 800)),
        "data sets": list(fuzz_corpora(rng, tmp_path, 1600)),
        "checkpoints": list(fuzz_checkpoints(rng, tmp_path, 1600, saved)),
    }
    for kind, outcomes in results.items():
        assert "refused" in outcomes, kind
    total = sum(map(len, results.values()))
    assert total >= 10_000
    counts = [f"{kind} {found.count('refused')} refused of {len(found)}" for kind, found in results.items()]
    print(f"\nfuzzed inputs: {total:,} without a traceback; {', '.join(counts)}")


def test_fuzzed_command_lines_as_processes(tmp_path, data_dir):
    """Among them, those that are no mistake train a step."""
    def run_one(number):
        rng = random.Random(number)
        run = Run(tmp_path / f"run{number}", data_dir, max_iters=1)
        code = run.end(f"--{rng.choice(list(FIELDS))}={rng.choice([w for w in WORDS if chr(0) not in w])}")
        assert code in (0, 2), run.output()
        assert code == 0 or "error: " in run.output()
        shutil.rmtree(run.folder)
        return code

    codes = in_parallel(run_one, range(200))
    assert set(codes) == {0, 2}


NUMBERS = ["0", "1", "-1", "0.5", "2", "3", "1e-9", "1e-300", "1e30", "1e999", "nan", "-0.0", "9" * 30, "", "x", "1_0",
           "٣"]
TEXTS = ["", " ", "To be", "\n", "ä☃\U0001f600", "\u202e\u200d\ufeff", "\udcff", "e\u0301" * 3, "\x1b[2J", "\x7f\x01",
         "a" * 500, "FILE:", "FILE:nosuch", "FILE:/", "FILE:text", "FILE:bytes", "FILE:\udcff", "<|endoftext|>", "--",
         "-1", "--prompt"]
SAMPLE_FLAGS = {
    "--prompt": TEXTS, "--stop": TEXTS, "--score": ["text", "bytes", "nosuch", "", "/"], "--interactive": None,
    "--json": None, "--ckpt": ["char.pt", "bytes.pt", "nosuch", "text", ".", ""], "--device": ["cpu", "cuda:7", ""],
    "--dtype": ["float32", "bfloat16", "x"], **dict.fromkeys(
        ("--num_samples", "--temperature", "--top_k", "--top_p", "--min_p", "--repetition_penalty", "--seed",
         "--stride"), NUMBERS)}


def test_fuzzed_sampling_as_processes(tmp_path, saved):
    """By characters and by bytes; prompts of any Unicode, of none, longer than the context."""
    content = load_checkpoint(saved)
    shutil.copy(saved, tmp_path / "char.pt")
    tokenizer = GPT2Tokenizer("#version: 0.2\n")
    model = GPT(GPTConfig.of(content["config"], tokenizer.vocab_size))
    save_checkpoint(tmp_path / "bytes.pt", content | {
        "tokenizer": tokenizer.state(), "vocab_size": tokenizer.vocab_size, "model_state_dict": model.state_dict()})
    (tmp_path / "text").write_text("To be, or not to be: that is the question. " * 9)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))

    def run_one(number):
        rng = random.Random(number)
        argv = ["--ckpt", rng.choice(("char.pt", "bytes.pt")), "--max_new_tokens", "20"]
        for flag in rng.sample(list(SAMPLE_FLAGS), k=rng.randint(0, 3)):
            argv += [flag] if SAMPLE_FLAGS[flag] is None else [f"{flag}={rng.choice(SAMPLE_FLAGS[flag])}"]
        log = tmp_path / f"log{number}.txt"
        process = PROCESSES.Process(target=run_sampling, args=(argv, tmp_path, log))
        with LOCK:
            process.start()
        code = wait(process)
        output = log.read_text(encoding="utf-8", errors="replace")
        assert code in (0, 2) and not BAD_END.search(output), (argv, output)
        assert code == 0 or "error: " in output, (argv, output)
        return code

    codes = in_parallel(run_one, range(200))
    assert min(codes.count(0), codes.count(2)) > 20
    print(f"\nfuzzed sampling: {codes.count(0)} answered and {codes.count(2)} refused of {len(codes)}, no traceback")
