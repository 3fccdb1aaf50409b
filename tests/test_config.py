import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_refused, run

from core.config import MAX_STEPS, TrainConfig, build_config, check_value, read_values, resolve
from lib.cli import UserError


def config_from_argv(argv):
    """(config, all problems) of a command line."""
    values, problems = read_values(argv)
    cfg, more = build_config(values)
    return cfg, problems + more


def test_all_problems_are_reported_together(tmp_path):
    config = tmp_path / "bad.py"
    config.write_text("lerning_rate = 1e-3\nn_head = 5\nbatch_size = 'many'\nnorm = 'batchnorm'\n")
    process = run("train_gpt2.py", config, "--n_embd=128", "--max_iter=3", "--beta1", "1.5", "--dataset=shakespere",
                  "--device=tpu", cwd=tmp_path)
    assert_refused(process, "lerning_rate (did you mean learning_rate?)", "bad.py:1",
                   "--max_iter (did you mean max_iters?)",
                   "n_embd=128 is not divisible by n_head=5", "batch_size must be an int", "not 'many'",
                   "norm must be one of layernorm, rmsnorm", "beta1 must be", "shakespere (did you mean shakespeare?)",
                   "device must be", "8 problems")
    assert list(tmp_path.iterdir()) == [config]


def test_flags_in_both_forms_override_the_file(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text('\ufeff"""A docstring."""\nn_layer = 3\nmax_iters = 40  # steps\nmin_lr = 4e-5\n', "utf-8")
    cfg, problems = config_from_argv([str(config), "--n_layer=7", "--dropout", "0.5", "--resume", "--bias=False",
                                      "--epochs=none"])
    assert problems == []
    assert (cfg.n_layer, cfg.dropout, cfg.resume, cfg.bias, cfg.epochs) == (7, 0.5, True, False, None)
    assert (cfg.max_iters, cfg.min_lr, cfg.run_name) == (40, 4e-5, "mine")


@pytest.mark.parametrize("line", [
    "import os", "batch_size = __import__('os').getpid()", "seed = open('x', 'w')", "n_layer += 1", "a, b = 1, 2",
    "batch_size = [1][0]", "max_iters = 2 ** 9", "dataset = 'a' * 9", "seed = n_layer", "batch_size: int = 3", "x = (",
    "seed = -'a'", "run_name = lambda: 0", "n_head = {[]: 1}", "n_layer = 4\nn_layer = 4",
])
def test_a_config_file_is_read_not_run(tmp_path, line):
    config = tmp_path / "c.py"
    config.write_text(line)
    cfg, problems = config_from_argv([str(config)])
    assert len(problems) == 1 and "c.py" in problems[0]
    assert cfg == TrainConfig(run_name="c")  # 4 layers are the default
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("name, value, good", [
    ("n_layer", 3, 3), ("n_layer", 3.0, None), ("n_layer", "3", None), ("n_layer", True, None), ("n_layer", [3], None),
    ("n_layer", 0, None), ("learning_rate", 1, 1.0), ("learning_rate", float("nan"), None), ("bias", True, True),
    ("learning_rate", float("inf"), None), ("bias", 1, None), ("bias", "true", None), ("compile", True, "true"),
    ("compile", "maybe", None), ("dropout", 1.0, None), ("dataset", 3, None), ("seed", 2**32, None),
    ("n_layer", None, None), ("n_layer", np.int32(3), 3), ("n_layer", np.float64(3), None), ("bias", np.bool_(1), True),
    ("learning_rate", np.float64(0.5), 0.5), ("learning_rate", np.float32("inf"), None), ("n_layer", Path("3"), None),
    ("out_dir", Path("a/b"), "a/b"),
])
def test_values_are_checked_for_type_and_range(name, value, good):
    result, problem = check_value(name, value)
    assert result == good and type(result) is type(good)
    assert (problem is None) == (good is not None)
    if problem:
        assert problem.startswith(f"{name} must be")


@pytest.mark.parametrize("flag, field, value", [
    ("--n_layer=3", "n_layer", 3), ("--learning_rate=1e-3", "learning_rate", 1e-3), ("--stride=none", "stride", None),
    ("--stride=8", "stride", 8), ("--compile=AUTO", "compile", "auto"), ("--compile=True", "compile", "true"),
    ("--bias=false", "bias", False), ("--bias", "bias", True), ("--dataset=pydoc", "dataset", "pydoc"),
    ("--n_layer=3.5", "n_layer", None), ("--n_layer=none", "n_layer", None), ("--bias=1", "bias", None),
    ("--learning_rate=nan", "learning_rate", None), ("--seed=x", "seed", None), ("--n_layer=", "n_layer", None),
])
def test_flags_are_parsed_by_their_field(flag, field, value):
    cfg, problems = config_from_argv([flag])
    if value is None and field != "stride":
        assert len(problems) == 1 and problems[0].startswith(f"{field} must be")
    else:
        assert problems == [] and getattr(cfg, field) == value


def test_a_switch_consumes_only_true_or_false():
    cfg, problems = config_from_argv(["--resume", "configs/nosuch.py", "--bias", "false"])
    assert cfg.resume is True and cfg.bias is False
    assert problems == ["cannot read config file configs/nosuch.py: No such file or directory"]


@pytest.mark.parametrize("flags, words", [
    (["--pos=rope", "--n_embd=12", "--n_head=4"], "even head size"),
    (["--stride=500"], "stride=500 exceeds block_size"),
    (["--min_lr=1"], "min_lr=1.0 exceeds learning_rate"),
    (["--run_name=../up"], "plain directory name"),
    (["--dataset=.."], "plain directory name"),
    (["--out_dir=a", "--log_dir=b/../a"], "out_dir and log_dir are both a: choose two directories"),
    (["--n_layer"], "--n_layer needs a value"),
    (["a.py", "b.py"], "unexpected argument 'b.py'"),
    (["a.py", "-max_iters=20"], "unexpected argument '-max_iters=20': flags begin with two dashes"),
    ([""], "cannot read config file"),
    (["quickstart"], "cannot read config file quickstart: No such file or directory (did you mean "
                     f"{Path('configs', 'quickstart.py')}?)"),
])
def test_impossible_combinations(flags, words):
    _, problems = config_from_argv(flags)
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize("fields, max_iters", [
    (dict(max_iters=7), 7), (dict(epochs=3.0), 8), (dict(epochs=0.5), 2), (dict(max_iters=5, epochs=3.0), 5),
    (dict(max_iters=50, epochs=3.0), 8), ({}, 3),
])
def test_run_length(fields, max_iters):
    cfg = resolve(TrainConfig(batch_size=2, gradient_accumulation_steps=2, **fields), n_windows=10)
    assert cfg.max_iters == cfg.lr_decay_iters == max_iters
    assert (cfg.min_lr, cfg.stride, cfg.n_windows) == (1e-4, 128, 10)


def test_resolving_keeps_explicit_values():
    given = dict(stride=7, max_iters=9, lr_decay_iters=5, min_lr=0.0, epochs=None, n_layer=3, run_name="x")
    cfg = resolve(TrainConfig(**given), n_windows=1000)
    assert {name: getattr(cfg, name) for name in given} == given


def test_a_run_of_too_many_steps_is_refused():
    with pytest.raises(UserError, match="at most 99,999,999"):
        resolve(TrainConfig(epochs=1e308), n_windows=999)
    assert resolve(TrainConfig(epochs=1e308, max_iters=7), n_windows=999).max_iters == 7
    assert resolve(TrainConfig(epochs=1.0, batch_size=1), n_windows=MAX_STEPS - 1).max_iters == MAX_STEPS - 1
    with pytest.raises(UserError, match=r"epochs=1 means 100,000,000 steps; a run can have at most 99,999,999"):
        resolve(TrainConfig(batch_size=1), n_windows=MAX_STEPS)


def test_missing_config_file(tmp_path):
    assert_refused(run("train_gpt2.py", "configs/nosuch.py", cwd=tmp_path), "configs/nosuch.py", "No such file")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    cfg, problems = config_from_argv([str(path)])
    assert problems == [] and cfg.run_name == path.stem


def test_help_lists_every_field_in_its_group(tmp_path):
    process = run("train_gpt2.py", "--help", cwd=tmp_path, env={"COLUMNS": "400"})
    assert process.returncode == 0
    *_, groups = re.split(r"override it\.\n\n", process.stdout)
    printed = {heading.splitlines()[0].rstrip(":"): heading for heading in groups.split("\n\n")}
    source = (ROOT / "core/config.py").read_text(encoding="utf-8").split("class TrainConfig")[1].split("@property")[0]
    for title, body in re.findall(r"^    # (.+)\n((?:    [^#].*\n)+)", source, re.MULTILINE):
        names = re.findall(r"^    (\w+): ", body, re.MULTILINE)
        assert re.findall(r"^  --(\w+)", printed.pop(title), re.MULTILINE) == names
    assert list(printed) == ["instead of training"]
    for field in fields(TrainConfig):
        choices = field.metadata["limits"].get("choices")
        [line] = re.findall(rf"^  --{field.name} .*$", re.sub(r"\n {9,}", "  ", process.stdout), re.MULTILINE)
        assert line.endswith(f"  {field.metadata['help']} (default {str(field.default).lower()})")
        assert not choices or line.startswith(f"  --{field.name} {{{','.join(choices)}}}")
