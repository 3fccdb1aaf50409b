import shutil

import pytest
from conftest import ROOT, assert_refused, run

from checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """A folder with the scripts and one checkpoint, and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    process = run("train_gpt2.py", "--dataset=tiny", f"--data_dir={data_dir}", "--n_layer=1", "--n_embd=32",
                  "--max_iters=60", "--block_size=32", "--learning_rate=1e-2", "--warmup_iters=5", "--run_name=r",
                  "--sample_tokens=0", "--device=cpu", cwd=folder)
    assert process.returncode == 0, process.stderr
    shutil.move(folder / "checkpoints/r/best.pt", folder / "model.pt")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "runs")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    return folder


def sample(folder, *args):
    return run(folder / "sample.py", *args, cwd=folder)


def test_a_checkpoint_is_enough_and_greedy_is_deterministic(alone):
    args = ("--ckpt", "model.pt", "--temperature", "0", "--prompt", "The ", "--max_new_tokens", "80")
    first, second = sample(alone, *args), sample(alone, *args)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.startswith("The ") and len(first.stdout) == 4 + 80 + 1
    assert "step 60" in first.stderr


def test_seed_and_number_of_samples(alone):
    args = ("--ckpt", "model.pt", "--max_new_tokens", "40", "--seed", "7")
    three = sample(alone, *args, "--num_samples", "3").stdout.split("-" * 40 + "\n")
    one = sample(alone, *args).stdout
    assert len(set(three)) == 3 and three[0] == one
    assert sample(alone, *args[:-1], "8").stdout == three[1] != one


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
    (["--prompt", "snow ☃"], "'☃' at position 5"), (["--prompt", ""], "empty"), (["--prompt", "FILE:nosuch"], "nosuch"),
    (["--prompt", "FILE:."], "prompt file"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--top_k", "-1"], "--top_k"), (["--max_new_tokens", "0"], "--max_new_tokens"), (["--device", "tpu"], "tpu"),
    (["--ckpt", "nosuch.pt"], "nosuch.pt"), (["--ckpt", "model.py"], "model.py"), (["--promt", "x"], "--promt"),
])
def test_bad_input(alone, args, words):
    assert_refused(sample(alone, *(["--ckpt", "model.pt"] if "--ckpt" not in args else []), *args), words)


def test_weights_that_do_not_fit_are_refused(alone, tmp_path):
    import torch

    content = load_checkpoint(alone / "model.pt")
    content["config"]["n_embd"] = 64
    torch.save(content, tmp_path / "bad.pt")
    assert_refused(run("sample.py", "--ckpt", tmp_path / "bad.pt", cwd=tmp_path), "bad.pt do not fit")
