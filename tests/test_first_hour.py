"""What the README and the notes tell a newcomer to type, carried out on a copy of the repository."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ONE_THREAD, ROOT, assert_refused, scalars, section

from core.corpus import pydoc_text, read_corpus

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--max_iters=12",
         "--log_interval=3", "--eval_interval=6", "--eval_tokens=500", "--warmup_iters=2", "--sample_tokens=20",
         "--device=cpu"]
FRENCH = ("Le matin, la rivière était calme ; les pêcheurs préparaient leurs filets en parlant à voix basse. « Où "
          "vas-tu ? » demanda Zoé. L’été s’achevait déjà, et Noël semblait loin. Elle but un café, mangea une crêpe, "
          "puis s’assit près de la fenêtre : le cœur léger, elle écouta le bruit de l’eau.\n")
CHINESE = ("清晨，河水很平静，渔夫们一边低声说话，一边整理渔网。“你要去哪里？”小梅问。夏天快要过去了，"
           "山上的树叶开始变黄。她喝了一杯热茶，吃了两个包子，然后坐在窗边，听着水声，想起了远方的朋友。\n")


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository without data, checkpoints and tests."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("core", "lib", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def commands(text):
    """The command lines in the indented blocks of a Markdown text, as lists of words."""
    return [shlex.split(line, comments=True) for line in re.findall(r"^    (python .*)$", text, re.MULTILINE)]


def type_in(directory, words, *more):
    """Run a command line of the README, with further words; its standard output."""
    assert words[0] == "python"
    process = subprocess.run([sys.executable, *words[1:], *more], cwd=directory, env=ONE_THREAD, timeout=300,
                             capture_output=True, text=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    return process.stdout


def apply_diffs(directory, text):
    """Carry out the ```diff blocks of a Markdown text; each part between blank lines changes one place."""
    blocks = re.findall(r"^```diff\n# (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for name, block in blocks:
        path = directory / name
        code = path.read_text(encoding="utf-8")
        for part in block.strip("\n").split("\n\n"):
            lines = [line + "\n" for line in part.split("\n")]
            before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            assert code.count(before) == 1, f"{name} lacks {before!r}" if before else f"{part!r} says not where"
            code = code.replace(before, after)
        path.write_text(code, encoding="utf-8")


def own_text_lines():
    lines = re.findall(r"Your own text in three lines.*?\n\n((?:    .*\n)+)", README)
    prepare, train, sample = commands(lines[0])
    return prepare, train, sample


@pytest.mark.parametrize("text, tokenizer", [
    pytest.param(FRENCH, "gpt2", id="french-gpt2"), pytest.param(CHINESE, "char", id="chinese-char"),
    pytest.param(FRENCH, "char", id="french-char", marks=pytest.mark.slow),
    pytest.param(CHINESE, "gpt2", id="chinese-gpt2", marks=pytest.mark.slow),
])
def test_your_own_text_in_three_lines(copy, request, text, tokenizer):
    if tokenizer == "gpt2":
        (copy / "data").mkdir()
        (copy / "data/downloads").symlink_to(request.getfixturevalue("downloads"))
    text = text * 6
    (copy / "book.txt").write_text(text, encoding="utf-8", newline="")
    prepare, train, sample = own_text_lines()
    type_in(copy, prepare, "--tokenizer", tokenizer)
    corpus = read_corpus(copy / "data/book")
    assert corpus.tokenizer.decode([*corpus.train, *corpus.val]) == text
    assert "next:\n  python sample.py --ckpt checkpoints/book/best.pt" in type_in(copy, train, *SMALL)
    losses = scalars(copy / "runs/book")["val/loss"]
    assert losses[12] < losses[6]
    written = type_in(copy, sample, "--max_new_tokens=50", "--prompt", text[:2])
    assert written.startswith(text[:2]) and len(written) > 20
    assert tokenizer == "gpt2" or set(written) <= set(text)


def follow(directory, text, names):
    """Carry out the diffs and training commands of a Markdown text; {run: its validation losses}, its plots."""
    refused = [words for words in commands(text) if words[-1].startswith(("--mlp", "--pos", "--dataset"))]
    for words in refused:  # not yet
        process = subprocess.run([sys.executable, *words[1:]], cwd=directory, env=ONE_THREAD, capture_output=True,
                                 text=True, timeout=60)
        assert_refused(process, words[-1].split("=")[1])
    apply_diffs(directory, text)
    runs = [words for words in commands(text) if words[1] == "train_gpt2.py"]
    assert [re.search(r"--run_name=(\w+)", " ".join(words))[1] for words in runs] == names and refused
    for name, words in zip(names, runs):
        if name in ("ramp", "lion"):  # weights and moments of a new kind are saved, and found again
            type_in(directory, words, *SMALL, "--max_iters=6")
        type_in(directory, words, *SMALL, "--resume")
    if (ROOT / "plot_runs.py").exists():
        for words in (words for words in commands(text) if words[1] == "plot_runs.py"):
            type_in(directory, words)
            assert (directory / words[-1]).stat().st_size > 1000
    losses = {name: scalars(directory / "runs" / name)["val/loss"] for name in names}
    assert all(values[12] < values[6] for values in losses.values())
    assert len({tuple(values.values()) for values in losses.values()}) == len(names)  # each trains something else


def best_of(directory, name):
    """The content of a run's best.pt; core.checkpoint would refuse what only the copy knows."""
    return torch.load(directory / "checkpoints" / name / "best.pt", weights_only=True)


def test_make_it_yours(copy):
    follow(copy, section(README, "## Make it yours"), ["ours", "mine"])
    assert best_of(copy, "mine")["config"]["mlp"] == "mine"
    assert len(type_in(copy, ["python", "sample.py", "--ckpt", "checkpoints/mine", "--max_new_tokens=40"])) > 40


@pytest.mark.slow
def test_make_more_of_it_yours(copy):
    apply_diffs(copy, section(README, "## Make it yours"))
    for name in ("ours", "mine"):
        mlp = "mine" if name == "mine" else "swiglu"
        type_in(copy, ["python", "train_gpt2.py", *SMALL, f"--run_name={name}", f"--mlp={mlp}"])
    follow(copy, (ROOT / "notes/11_make_it_yours.md").read_text(encoding="utf-8"), ["ramp", "lion", "stdlib"])
    assert best_of(copy, "lion")["config"]["optimizer"] == "lion"
    weights = best_of(copy, "ramp")["model_state_dict"]
    assert weights["transformer.h.0.mlp.c_fc.weight"].any() and weights["slopes"].any()  # it is trained
    sample = ["python", "sample.py", "--ckpt", "checkpoints/ramp", "--max_new_tokens=40", "--num_samples=2"]
    assert len(type_in(copy, sample)) > 80
    table = type_in(copy, ["python", "sample.py", "--list"])
    assert re.findall(r"^\w+", table, re.MULTILINE)[1:] == ["stdlib", "lion", "ramp", "mine", "ours"]


def test_the_notebook(copy):
    note = (ROOT / "notes/09_notebook.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```python\n(.*?)^```", note, re.MULTILINE | re.DOTALL)
    assert len(cells) == 5
    (copy / "mine.txt").write_text(pydoc_text(None)[:20_000], encoding="utf-8", newline="")
    small = {name[2:]: value for name, value in (flag.split("=") for flag in SMALL)} | {"max_iters": None}
    config = (copy / "configs/quickstart.py").read_text(encoding="utf-8")
    config = re.sub(rf"^({'|'.join(small)}) = .*\n", "", config, flags=re.MULTILINE)
    config += "".join(f"{name} = {value if value is None or value.isdecimal() else repr(value)}\n"
                      for name, value in small.items())
    (copy / "configs/quickstart.py").write_text(config, encoding="utf-8")
    code = [cell.replace("max_iters=200", "max_iters=8").replace("max_iters=300", "max_iters=12") for cell in cells]
    script = "\nprint('-- cell')\n".join(code)
    output = type_in(copy, ["python", "-c", script])
    prepared, trained, resumed, written, scored = output.split("-- cell\n")
    assert prepared.startswith("data/mine: char tokenizer")
    assert "finished at step 8" in trained and "resumed from" in resumed and "finished at step 12" in resumed
    assert written.startswith("The ") and len(written) == 4 + 200 + 1
    assert re.fullmatch(r"loss \d\.\d{3}, perplexity \d+\.\d, \d\.\d{3} bits per byte\n", scored)
