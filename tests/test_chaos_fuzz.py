"""Nonsense: whatever is fed in, the outcome is a value or a UserError that names the file or the field.

`python -m pytest -m chaos -n 0 -s` prints the numbers that the README's table gives.
"""

import collections
import contextlib
import io
import json
import math
import random
import shutil
import string

import pytest
import torch
from chaos_harness import FLAGS, SmallRun, in_parallel, read_log, start, wait
from helpers import ROOT

import prepare_data
import train_gpt2
from core.checkpoint import load_checkpoint, save_checkpoint, step_path
from core.config import FIELDS, build_config, check_value, read_values
from core.corpus import prepare_text, read_corpus
from core.preflight import check_run
from core.runs import load_model
from core.schema import SCHEMA
from core.tokenizer import GPT2Tokenizer
from lib.cli import UserError
from model import GPT, GPTConfig

pytestmark = pytest.mark.chaos

WORDS = ["0", "1", "-1", "3", "64", "1e-3", "1e999", "-0.0", "nan", "None", "none", "True", "false", "'x'", '"', "''",
         "[1]", "{}", "auto", "cuda:99", "mps", "float16", "rope", "pydoc", "tiny", "nosuch", "../up", "/", ".", "\0",
         "ä☃\U0001f600", "9" * 30, "9" * 5000, "a" * 300, "1 + 1", "(" * 300, "-" * 500 + "1", "lambda: 0",
         "__import__('os')", "b'x'", "1j"]
JUNK = [None, 0, -1, 10**30, 1.5, "", "x", [], {}, True, ["a", "b"], [[1]], {"kind": "char"}, {"kind": []}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data_dir):
    """A checkpoint of a finished small run."""
    run = SmallRun(tmp_path_factory.mktemp("saved"), data_dir)
    assert run.end() == 0
    return step_path(run.run_dir, 12)


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


def attempt(function):
    """("fine", output) or ("refused", output and message), the latter after a UserError; others are raised."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            function()
        except UserError as error:
            return "refused", f"{output.getvalue()}{error}"
    return "fine", output.getvalue()


def outcome(function, *names):
    """"fine", or "refused" if the function refuses with one of `names`."""
    result, said = attempt(function)
    assert result == "fine" or any(name in said for name in names), said
    return result


def config_problems(argv):
    values, problems = read_values(argv)
    return problems + build_config(values)[1]


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
        problems = config_problems([str(path)])
        assert all("fuzzed.py" in problem or any(name in problem for name in FIELDS) for problem in problems), problems
        yield "refused" if problems else "fine"


def fuzz_flags(rng, n):
    for _ in range(n):
        argv = []
        for _ in range(rng.randint(1, 6)):
            name = rng.choice([*FIELDS, "", "n_layers", "help me", "".join(rng.choices(string.printable, k=5))])
            argv += [f"--{name}={rng.choice(WORDS)}"] if rng.random() < 0.6 else [f"--{name}", rng.choice(WORDS)]
        problems = config_problems(argv)
        assert all(any(word.lstrip("-").split("=")[0] in problem for word in argv)
                   or any(name in problem for name in FIELDS) for problem in problems), (argv, problems)
        yield "refused" if problems else "fine"


def fuzz_runs(rng, tmp_path, n, saved, data_dir):
    """Values of any type, for runs new and resumed, with sound and damaged checkpoints, data sets and weights."""
    runs, damaged, weights = saved.parent.parent, tmp_path / "damaged/r", tmp_path / "weights"
    for directory in (damaged, weights, tmp_path / "corpora/tiny"):
        directory.mkdir(parents=True)
    (damaged / saved.name).write_bytes(saved.read_bytes()[:-100])
    (weights / "config.json").write_text("{}")
    (tmp_path / "corpora/tiny/meta.json").write_text("{}")
    places = {"out_dir": [runs, damaged.parent, tmp_path / "new", saved, "\0"], "init_from": [weights, runs, tmp_path],
              "data_dir": [data_dir, tmp_path / "corpora", saved], "resume": [True, False], "run_name": ["r", "s"]}
    for _ in range(n):
        values = FLAGS | {"data_dir": str(data_dir), "out_dir": str(rng.choice(places["out_dir"])),
                          "resume": rng.random() < 0.5}
        for name in rng.sample(list(FIELDS), k=rng.randint(0, 3)):
            place = rng.choice(places.get(name, WORDS))
            values[name] = rng.choice([*JUNK, place if isinstance(place, bool) else str(place)])
        wrong = [name for name, value in values.items() if check_value(name, value)[1]]
        try:
            check_run(values, ["told before"])
            raise AssertionError("the problems so far were dropped")
        except UserError as error:
            names = (*FIELDS, str(runs), str(tmp_path), "is neither one of gpt2")
            assert all(any(name in problem for name in names) for problem in error.problems[1:]), error
            assert all(any(name in problem for problem in error.problems) for name in wrong), error
            assert error.problems[0] == "told before"
            yield "refused" if error.problems[1:] else "fine"


def fuzz_texts(rng, tmp_path, n):
    path = tmp_path / "fuzzed.txt"
    for _ in range(n):
        size = rng.choice((0, 1, 2, 5, 30, 300))
        path.write_bytes(rng.randbytes(size) if rng.random() < 0.3 else
                         "".join(rng.choices("ab \n\r\täß你\U0001f600\x00\ufeff", k=size)).encode())
        argv = ["--input", str(path), "--name", rng.choice(("fuzzed", "fuzzed", "../x", "")), "--data_dir",
                str(tmp_path / "data"), "--val_fraction", rng.choice(("0.1", "0.5", "0.999")), "--max_lines",
                rng.choice(("1", "2", "99"))]
        result = outcome(lambda argv=argv: prepare_data.main(argv), "fuzzed", "--name")
        if result == "fine":
            read_corpus(tmp_path / "data/fuzzed")
        yield result


def fuzz_corpora(rng, tmp_path, n):
    source = tmp_path / "source"
    prepare_text("To be, or not to be. " * 20, "source", "char", tmp_path)
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


def fuzz_checkpoints(rng, path, n, saved, junk, use):
    """`use` each damaged copy of `saved`, written to `path`; junk: {part to change, "" for the whole: values}."""
    data = saved.read_bytes()
    content = load_checkpoint(saved)
    for _ in range(n):
        if rng.random() < 0.7:
            path.write_bytes(mutate(rng, data))
        else:
            changed = dict(content)
            place = rng.choice(list(junk))
            if place:
                changed[place] = dict(changed[place])
            target = changed[place] if place else changed
            target[rng.choice(list(target))] = rng.choice(junk[place])
            save_checkpoint(path, changed)
        yield outcome(use, str(path))


def resumed(directory, data_dir, *more):
    """(a run in `directory`, a function that resumes it in this process)."""
    run = SmallRun(directory, data_dir, out_dir=directory / "checkpoints", log_dir=directory / "runs")
    run.run_dir.mkdir(parents=True)
    return run, lambda: train_gpt2.main([*run.argv, *more, "--resume"])


def test_invalid_input_ends_in_a_user_error(tmp_path, saved, data_dir):
    rng = random.Random(0)
    path, tensors = tmp_path / "fuzzed.pt", [*JUNK, torch.zeros(2)]
    parts = {"config": tensors, "tokenizer": tensors, "model_state_dict": tensors}
    results = {
        "configs": list(fuzz_configs(rng, tmp_path, 3500)),
        "flags": list(fuzz_flags(rng, 3000)),
        "runs": list(fuzz_runs(rng, tmp_path, 1500, saved, data_dir)),
        "texts": list(fuzz_texts(rng, tmp_path, 800)),
        "data sets": list(fuzz_corpora(rng, tmp_path, 1600)),
        "checkpoints": list(fuzz_checkpoints(rng, path, 1600, saved, {"": tensors} | parts, lambda: load_model(path))),
    }
    for kind, outcomes in results.items():
        assert set(outcomes) == {"fine", "refused"}, kind
    total = sum(map(len, results.values()))
    assert total >= 12_000
    counts = [f"{kind} {found.count('refused')} refused of {len(found)}" for kind, found in results.items()]
    print(f"\nfuzzed inputs: {total:,} without a traceback; {', '.join(counts)}")


def garble(rng, content):
    """`content` (nested dicts and lists) with something in it, anywhere, dropped or changed."""
    parent, key, value = {"": content}, "", content
    while key == "" or (isinstance(value, (dict, list)) and len(value) and rng.random() < 0.8):
        parent = value
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        value = parent[key]
    changes = [*JUNK, torch.zeros(2), torch.tensor(1.0)]
    if isinstance(value, torch.Tensor):
        changes = [value.double(), value.half(), value.to(torch.int64), value[None], value.flatten()[:-1],
                   value * math.nan, value + math.inf, -value - 1, value.to_sparse(), rng.choice(changes)]
    elif type(value) in (int, float):
        changes = [-value - 1, value + 1, value * 1000, 10**12, float(value), math.nan, math.inf, rng.choice(changes)]
    elif isinstance(value, dict) and value:
        changes = [dict(list(value.items())[:-1]), value | {"more": 1}, list(value), rng.choice(changes)]
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(changes)


def test_damaged_checkpoints_resume_or_are_refused(tmp_path, data_dir):
    """Whatever is in the newest one, the run ends with as many whole checkpoints, or says which file is damaged."""
    rng = random.Random(0)
    first = SmallRun(tmp_path / "first", data_dir, norm="rmsnorm", bias=False, pos="rope")  # few tensors
    assert first.end() == 0
    saved = step_path(first.run_dir, 12)
    older, best = saved.with_name("step_00000008.pt"), saved.with_name("best.pt")

    def try_one():
        run, resume = resumed(tmp_path / "run", data_dir, "--max_iters=13", "--keep_checkpoints=3")
        path, codes = run.run_dir / saved.name, []
        for other in rng.choice([(), (older,), (older, best)]):
            shutil.copy(other, run.run_dir)
        if rng.random() < 0.3:
            path.write_bytes(mutate(rng, saved.read_bytes()))
        else:
            content = load_checkpoint(saved)
            garble(rng, content)
            torch.save(content, path)
        before = whole_checkpoints(run)
        result, said = attempt(lambda: codes.append(resume()))
        after = whole_checkpoints(run)
        assert "Traceback" not in said and codes in ([], [0]), said
        assert path.name in before or str(path) in said, said
        if result == "fine":
            assert after["step_00000013.pt"] == 13, said
        else:
            assert "is intact" in said or str(path) in said, said
        assert len(after) >= len(before), (before, said)
        shutil.rmtree(run.directory)
        return result, path.name in before

    outcomes = collections.Counter(try_one() for _ in range(2000))
    assert min(outcomes[result, whole] for result, whole in (("fine", True), ("fine", False), ("refused", False))) > 50
    print(f"\nresumed from damaged checkpoints: 2,000 without a traceback; {dict(outcomes)}")


def whole_checkpoints(run):
    """{name: step} of a run's checkpoints that load."""
    found = {}
    for path in run.run_dir.glob("*.pt"):
        with contextlib.suppress(UserError):
            found[path.name] = load_checkpoint(path)["step"]
    return found


def test_checkpoints_missing_a_key_or_with_a_wrong_type_are_refused(tmp_path, saved, data_dir):
    """Each is refused by its name and the key's, whoever reads it; a run that has an older one resumes from that."""
    content = load_checkpoint(saved)
    n_cases = 0
    for key, kind in SCHEMA.items():
        run, resume = resumed(tmp_path / key, data_dir)
        path, older = run.run_dir / saved.name, run.run_dir / "step_00000008.pt"
        without = {name: value for name, value in content.items() if name != key}
        wrong = [value for value in (*JUNK, [None], torch.zeros(2))
                 if not isinstance(value, kind) or (key == "pending_losses" and value)]
        for changed in (without, *(content | {key: value} for value in wrong)):
            torch.save(changed, path)
            for use in (lambda path=path: load_model(path), resume):
                result, said = attempt(use)
                assert result == "refused" and str(path) in said and key in said, said
            n_cases += 1
        shutil.copy(saved.with_name(older.name), older)
        result, said = attempt(resume)
        assert result == "fine" and f"resumed from {older} at step 8" in said and str(path) in said, said
        assert load_checkpoint(path)["step"] == 12
    print(f"\ncheckpoints with a key missing or of the wrong type: {n_cases} of {n_cases} refused by name")


def test_fuzzed_command_lines_as_processes(tmp_path, data_dir):
    """Among them, those that are no mistake train a step."""
    def run_one(number):
        rng = random.Random(number)
        run = SmallRun(tmp_path / f"run{number}", data_dir, max_iters=1)
        code = run.end(f"--{rng.choice(list(FIELDS))}={rng.choice([w for w in WORDS if chr(0) not in w])}")
        assert code in (0, 2), run.output()
        assert code == 0 or "error: " in run.output()
        shutil.rmtree(run.directory)
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
        code, output = wait(start("sample", argv, tmp_path, log)), read_log(log)
        assert code in (0, 2), (argv, output)
        assert code == 0 or "error: " in output, (argv, output)
        return code

    codes = in_parallel(run_one, range(200))
    assert min(codes.count(0), codes.count(2)) > 20
    print(f"\nfuzzed sampling: {codes.count(0)} answered and {codes.count(2)} refused of {len(codes)}, no traceback")
