import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_refused, run

from core.checkpoint import load_checkpoint
from core.corpus import pydoc_text
from core.tokenizer import CharTokenizer, GPT2Tokenizer
from lib.cli import UserError
from sample import Continuation, main

BYTES = GPT2Tokenizer("#version: 0.2\n")  # GPT-2's tokenizer without merges: one token per byte
UNBUFFERED_IS_UNSET = os.environ | {"PYTHONUNBUFFERED": ""}
ID_OF_BYTE = {BYTES.bytes_of(id)[0]: id for id in range(256)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """A directory with the scripts, what they import, one checkpoint, and nothing else."""
    directory = tmp_path_factory.mktemp("alone")
    process = run("train_gpt2.py", "--dataset=tiny", f"--data_dir={data_dir}", "--n_layer=1", "--n_embd=32",
                  "--max_iters=60", "--block_size=32", "--learning_rate=1e-2", "--warmup_iters=5", "--run_name=r",
                  "--sample_tokens=0", "--device=cpu", "--dtype=float32", cwd=directory)
    assert process.returncode == 0, process.stderr
    shutil.move(directory / "checkpoints/r/best.pt", directory / "model.pt")
    shutil.rmtree(directory / "checkpoints")
    shutil.rmtree(directory / "runs")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, directory)
    for package in ("core", "lib"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def sample(directory, *args):
    return run(directory / "sample.py", *args, cwd=directory)


def test_a_checkpoint_is_enough_and_greedy_is_deterministic(alone):
    args = ("--ckpt", "model.pt", "--temperature", "0", "--prompt", "The ", "--max_new_tokens", "80")
    first, second = sample(alone, *args), sample(alone, *args)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.startswith("The ") and len(first.stdout) == 4 + 80 + 1
    assert "step 60" in first.stderr


def objects(process):
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_seed_and_number_of_samples(alone):
    args = ("--ckpt", "model.pt", "--max_new_tokens", "40", "--seed", "7")
    three = sample(alone, *args, "--num_samples", "3").stdout.split("-" * 40 + "\n")
    one = sample(alone, *args).stdout
    assert len(set(three)) == 3 and three[0] == one
    assert sample(alone, *args[:-1], "8").stdout == three[1] != one
    many = objects(sample(alone, *args, "--num_samples", "18", "--json"))  # more than are generated at once
    assert ["\n" + each["text"] + "\n" for each in many[:3]] == three
    assert objects(sample(alone, *args[:-1], "24", "--json"))[0]["text"] == many[17]["text"]


def test_json(alone):
    args = ("--ckpt", "model.pt", "--json", "--prompt", "The ", "--num_samples", "2", "--max_new_tokens", "50")
    tokenizer = CharTokenizer(load_checkpoint(alone / "model.pt")["tokenizer"]["itos"])
    whole = objects(sample(alone, *args))
    for i, each in enumerate(whole):
        assert set(each) == {"prompt", "text", "tokens", "seed", "seconds", "stop_reason"}
        assert each["text"] == tokenizer.decode(each["tokens"]) and len(each["text"]) == 50
        assert (each["prompt"], each["seed"], each["stop_reason"]) == ("The ", 1337 + i, "length")
        assert each["seconds"] > 0
    stop = whole[0]["text"][9:12]  # three characters are three tokens
    cut = objects(sample(alone, *args, "--stop", stop, "--stop", "xqxqx"))
    assert cut[0]["stop_reason"] == "stop" and cut[0]["text"] == whole[0]["text"].split(stop)[0]
    assert cut[1]["text"] == whole[1]["text"].split(stop)[0]
    assert sample(alone, *args[:2], *args[3:], "--stop", stop).stdout.startswith(f"The {cut[0]['text']}\n----")


def test_json_writes_characters_as_they_are(alone, tmp_path):
    content = load_checkpoint(alone / "model.pt")
    itos = list(content["tokenizer"]["itos"])
    itos[itos.index("e")] = "é"  # the most frequent letter
    torch.save(content | {"tokenizer": CharTokenizer(itos).state()}, tmp_path / "model.pt")
    process = run("sample.py", "--ckpt", "model.pt", "--json", "--prompt", "é", cwd=tmp_path, encoding="utf-8")
    [result] = objects(process)
    assert "é" in result["text"] and process.stdout.count("é") == result["text"].count("é") + 1


def pieces(tokenizer, tokens, stops):
    """What is shown of some tokens, piece by piece, and the finished Continuation."""
    continuation, shown = Continuation(tokenizer, stops), []
    for token in tokens:
        shown.append(continuation.add(token))
        if continuation.stop_reason:
            return shown, continuation
    return [*shown, continuation.end("length")], continuation


def test_characters_are_shown_when_they_are_whole():
    shown, continuation = pieces(BYTES, BYTES.encode("aé☃🙂b"), [])
    assert shown == ["a", "", "é", "", "", "☃", "", "", "", "🙂", "b", ""]
    assert continuation.text == "aé☃🙂b" and continuation.stop_reason == "length"
    shown, continuation = pieces(BYTES, [*BYTES.encode("a🙂")][:-1], [])
    assert shown[-1] == continuation.text[1:] == "\ufffd"  # never finished: not left out
    shown, continuation = pieces(BYTES, [*BYTES.encode("ab"), BYTES.end_of_text, *BYTES.encode("c")], [])
    assert continuation.text == "ab" and continuation.stop_reason == "end_of_text"
    merged = GPT2Tokenizer("#version: 0.2\nb â\n")  # a token of "b" and the first byte of "☃"
    _, continuation = pieces(merged, [*merged.encode("a"), 256, 0], ["b"])
    assert continuation.text == "a" and len(continuation.tokens) == 2


def test_stop_texts_against_a_search_in_the_whole_text():
    choose = random.Random(0)
    seen = set()
    for _ in range(2000):
        whole = "".join(choose.choice("ab☃") for _ in range(12)).encode()[: choose.randint(8, 40)]
        text = whole.decode(errors="replace")
        stops = ["".join(choose.choices("ab☃", k=choose.randint(1, 4))) for _ in range(choose.randint(0, 3))]
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
        first = min((ends[0] - len(stop) for stop in stops if text[: ends[0]].endswith(stop)), default=0) if ends else \
            len(text)
        shown, continuation = pieces(BYTES, [ID_OF_BYTE[byte] for byte in whole], stops)
        assert "".join(shown) == continuation.text == text[:first]
        assert continuation.stop_reason == ("stop" if ends else "length")
        seen.add(continuation.stop_reason)
    assert seen == {"stop", "length"}


def test_text_streams_and_ctrl_c_stops_it(alone):
    process = subprocess.Popen([sys.executable, "sample.py", "--ckpt", "model.pt", "--max_new_tokens", "60000"],
                               cwd=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=UNBUFFERED_IS_UNSET)
    assert len(os.read(process.stdout.fileno(), 10_000)) < 60_000  # as much as there is
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors


def test_nothing_compiled_is_loaded_while_text_streams(alone):
    """What Cython has compiled loses a Ctrl-C while it is loaded."""
    code = ("import sys, sample; before = {*sys.modules}; sample.main(['--ckpt=model.pt', '--max_new_tokens=9']); "
            "files = [str(getattr(sys.modules[name], '__file__', '')) for name in {*sys.modules} - before]; "
            "print([file for file in files if file.endswith(('.so', '.pyd'))], file=sys.stderr)")
    process = subprocess.run([sys.executable, "-c", code], cwd=alone, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stderr.splitlines()[-1] == "[]", process.stderr


def converse(directory, *turns):
    """Run --interactive in a terminal: for each (what to wait for, what to type); (exit code, output)."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(directory)
        os.execv(sys.executable, [sys.executable, "sample.py", "--ckpt", "model.pt", "--interactive", "--seed", "7",
                                  "--max_new_tokens", "60000"])
    output, last = b"", b""
    for awaited, typed in (*turns, (None, b"")):
        since = b""
        while awaited is None or awaited not in since:
            if last and not select.select([terminal], [], [], 5)[0]:
                os.write(terminal, last)  # what is typed just before readline waits may be lost
            try:
                read = os.read(terminal, 1000)
            except OSError:  # the terminal is closed
                read = b""
            if not read:
                break
            output, since = output + read, since + read
        os.write(terminal, typed)
        last = typed
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode()


def test_interactive_in_a_terminal(alone):
    code, output = converse(
        alone, (b"> ", "snow ☃\n".encode()), (b"> ", b"half a li\x03"), (b"> ", b"The \n"),
        (b"e", b"\x03"), (b"> ", b"\x1b[A\n"), (b"e", b"\x03"), (b"> ", b"\x04"))
    assert code == 0 and "Traceback" not in output
    assert "error: character '☃' at position 5" in output


def test_interactive_lines_from_a_pipe(alone):
    """Each answer comes whole before the next line is asked for."""
    args = ["--ckpt", "model.pt", "--max_new_tokens", "9"]
    process = subprocess.Popen([sys.executable, "sample.py", *args, "--interactive"], cwd=alone, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=UNBUFFERED_IS_UNSET)
    answers = []
    for line in ("The ", "A", "The "):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        answer = b""
        while len(answer) < 10 and select.select([process.stdout], [], [], 60)[0]:
            answer += os.read(process.stdout.fileno(), 10 - len(answer))
        answers.append(answer.decode())
    output, errors = process.communicate("\n☃\n\udcff\n".encode(errors="surrogateescape"), timeout=60)
    assert process.returncode == 2 and output == b"" and errors.count(b"error: ") == 2
    windows = run("sample.py", *args, "--interactive", cwd=alone, input="\ufeffThe \r\nA\r\n")
    assert windows.returncode == 0 and windows.stdout == answers[0] + answers[1], windows.stderr
    for seed, line, answer in zip((1337, 1338, 1339), ("The ", "A", "The "), answers):
        assert sample(alone, *args, "--prompt", line, "--seed", seed).stdout == line + answer


def test_score_is_the_evaluation(alone, tmp_path):
    text = pydoc_text(None)[:12_000]
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9) :], newline="")
    args = ("--ckpt", "model.pt", "--score", tmp_path / "val.txt")
    [result] = objects(sample(alone, *args, "--json"))
    state = load_checkpoint(alone / "model.pt")
    assert result["loss"] == pytest.approx(state["val_loss"], rel=1e-6)
    assert (result["tokens"], result["context"], result["stride"], result["dtype"]) == (1200, 32, 32, "float32")
    [overlapping] = objects(sample(alone, *args, "--json", "--stride", "4"))
    assert overlapping["stride"] == 4 and overlapping["loss"] != result["loss"]
    assert f"loss {state['val_loss']:.4f}" in sample(alone, *args).stdout
    (tmp_path / "short.txt").write_text("A")
    assert_refused(sample(alone, *args[:3], tmp_path / "short.txt"), "at least 2")
    assert_refused(sample(alone, *args, "--stride", "33"), "val.txt: stride 33 is over", "32 tokens")
    assert_refused(sample(alone, *args[:3], "nosuch.txt"), "nosuch.txt")
    (tmp_path / "odd.txt").write_text("A☃")
    assert_refused(sample(alone, *args[:3], tmp_path / "odd.txt"), "odd.txt: 1 character is not among the",
                   "of the vocabulary: '☃' (line 1, column 2); --skip_unknown")


def test_score_counts_places_and_skips_unknown_characters(alone, tmp_path):
    known = pydoc_text(None)[:400]
    odd = known[:150] + "☃" + known[150:390] + "é☃日本語中" + known[390:]
    (tmp_path / "known.txt").write_text(known, encoding="utf-8", newline="")
    (tmp_path / "odd.txt").write_text(odd, encoding="utf-8", newline="")
    line, column = known[:150].count("\n") + 1, len(known[:150].split("\n")[-1]) + 1
    assert line > 1 and column > 1
    assert_refused(sample(alone, "--ckpt", "model.pt", "--score", tmp_path / "odd.txt"), "odd.txt: 7 characters are",
                   f"'☃' (2 times, first in line {line}, column {column}), 'é' (line ", "'語' (",
                   " and 1 other; --skip_unknown scores the rest")
    args = ("--ckpt", "model.pt", "--skip_unknown", "--json", "--score")
    [expected] = objects(sample(alone, *args, tmp_path / "known.txt"))
    [result] = objects(sample(alone, *args, tmp_path / "odd.txt"))
    assert (expected["skipped"], result["skipped"]) == (0, 7) and result["bytes"] == len(known.encode())
    assert result | dict(file="", skipped=0) == expected | dict(file="")
    report = sample(alone, *args[:3], "--score", tmp_path / "odd.txt").stdout
    assert "| skipped 7 characters outside the vocabulary; tokens and bytes are the rest's" in report
    (tmp_path / "all_odd.txt").write_text("☃☃☃", encoding="utf-8")
    assert_refused(sample(alone, *args, tmp_path / "all_odd.txt"), "all_odd.txt: 0 tokens cannot be scored")


def test_a_long_prompt_is_noted(alone):
    process = sample(alone, "--ckpt", "model.pt", "--prompt", "a" * 50, "--max_new_tokens", "1")
    assert process.returncode == 0 and "the last 18" in process.stderr


def test_prompt_from_a_file(alone, tmp_path):
    (tmp_path / "p.txt").write_text("A line\nand a half")
    process = sample(alone, "--ckpt", "model.pt", "--prompt", f"FILE:{tmp_path / 'p.txt'}", "--max_new_tokens", "3")
    assert process.stdout.startswith("A line\nand a half")


def test_bare_ckpt_takes_the_newest(alone, tmp_path):
    assert_refused(run("sample.py", "--ckpt", cwd=tmp_path), "checkpoints", "train first")
    (tmp_path / "checkpoints/r").mkdir(parents=True)
    shutil.copy(alone / "model.pt", tmp_path / "checkpoints/r/step_00000060.pt")
    for args in (("--ckpt",), ("--ckpt", "checkpoints/r"), ()):
        process = run("sample.py", *args, "--max_new_tokens", "3", cwd=tmp_path)
        assert process.returncode == 0 and "checkpoints/r/step_00000060.pt" in process.stderr


@pytest.mark.parametrize("args, words", [
    (["--temperature", "-1"], ">= 0"), (["--temperature", "nan"], ">= 0"), (["--top_k", "-1"], ">= 0"),
    (["--top_p", "0"], "> 0 and <= 1"), (["--top_p", "1.5"], "> 0 and <= 1"), (["--min_p", "nan"], ">= 0 and <= 1"),
    (["--min_p", "2"], ">= 0 and <= 1"), (["--repetition_penalty", "0"], ">= 0.01"),
    (["--num_samples", "0"], ">= 1"), (["--max_new_tokens", "0"], ">= 1"), (["--seed", "-1"], ">= 0"),
    (["--dtype", "int8"], "bfloat16"), (["--stride", "3"], "--score"),
    (["--skip_unknown"], "--skip_unknown needs --score"), (["--list", "--score", "x"], "not allowed with"),
    (["--list", "--seed", "1", "--json"], "--seed, --json have no effect with --list"),
    (["--prompt", "a", "--interactive"], "--interactive"),
    (["--promt", "x"], "--promt"),
    (["--temperature", "0", "--stop", "a", "--score", "x"], "--temperature, --stop have no effect with --score"),
])
def test_impossible_flags_are_refused_with_their_range(args, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2 and args[0] in (error := capsys.readouterr().err) and words in error


@pytest.mark.parametrize("args, words", [
    (["--prompt", "snow ☃"], "'☃' at position 5"), (["--prompt", ""], "empty"), (["--prompt", "FILE:nosuch"], "nosuch"),
    (["--prompt", "FILE:."], "is a directory"), (["--prompt", "\udcff"], "UTF-8"), (["--stop", ""], "--stop"),
    (["--stop", "☃"], "--stop '☃'"), (["--score", ""], "path of a text is empty"),
    (["--prompt", "FILE:"], "path of a text is empty"),
    (["--device", "tpu"], "tpu"), (["--dtype", "float16", "--device", "cpu"], "float16"),
    (["--ckpt", "nosuch.pt"], "nosuch.pt"), (["--ckpt", "model.py"], "model.py"),
])
def test_bad_input(alone, args, words, monkeypatch):
    monkeypatch.chdir(alone)
    with pytest.raises(UserError, match=re.escape(words)):
        main([*(["--ckpt", "model.pt"] if "--ckpt" not in args else []), *args])


def test_bad_input_to_the_process(alone):
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "sample.py", "--ckpt", "model.pt"], cwd=alone, stdout=full,
                                 stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 2 and "error: cannot write the output: No space left" in process.stderr
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr
    assert_refused(sample(alone, "--ckpt", "model.pt", "--prompt", "\udcff"), "UTF-8")
    assert_refused(sample(alone, "--ckpt", "model.pt", "--top_p", "2"), "--top_p", "<= 1")


def test_weights_that_do_not_fit_are_refused(alone, tmp_path):
    content = load_checkpoint(alone / "model.pt")
    content["config"]["n_embd"] = 64
    torch.save(content, tmp_path / "bad.pt")
    assert_refused(run("sample.py", "--ckpt", tmp_path / "bad.pt", cwd=tmp_path), "bad.pt do not fit")
