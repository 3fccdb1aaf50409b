"""Each key of a checkpoint, and what it must have in common with the run that resumes from it."""

import copy

import pytest
import torch
from helpers import whole_content

from core.checkpoint import load_checkpoint, load_newest, save_checkpoint, step_path
from core.config import TrainConfig
from core.optim import Muon, MuonAndAdamW
from core.schema import SCALER, SCHEMA, check_moments, then_and_now
from core.tokenizer import CharTokenizer
from lib.cli import UserError
from lib.distributed import ALONE

MISSING = object()
# A value of another type for each key of the schema: None where that is allowed is no such value.
WRONG = {key: [MISSING, "text" if kind is not str else 3, *([] if isinstance(kind, tuple) else [None])]
         for key, kind in SCHEMA.items()} | {"pending_losses": [MISSING, None, 3, "text", [1.0, "text"], [1]]}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_each_key_of_the_schema_is_refused_by_name(tmp_path, capsys, key, value):
    save_checkpoint(step_path(tmp_path, 1), whole_content(1))
    wrong = whole_content(2) | {key: value}
    if value is MISSING:
        del wrong[key]
    path = step_path(tmp_path, 2)
    torch.save(wrong, path)
    message = f"{path} is not a whole checkpoint of this project: {key} missing or of the wrong type"
    if key == "pending_losses" and type(value) is list:
        message = f"{path} is not a whole checkpoint of this project: pending_losses is {value!r}"
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    assert str(refused.value) == message
    assert load_newest(tmp_path)[0] == step_path(tmp_path, 1)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("key, values", [
    ("step", [0, -5, 10**8, 10**30, True]), ("epoch", [-1, 10**30]), ("evals_without_better", [-1]),
    ("val_loss", [float("nan"), float("-inf")]), ("best_val_loss", [float("nan"), 2.0]), ("best_step", [1, 0, 10**9]),
    ("pending_losses", [[float("inf")], [1.0, 2.0, 3.0]]), ("vocab_size", [4, 10**30]),
    ("scaler_state_dict", [{"scale": 2.0}, dict.fromkeys(SCALER, "x"), dict.fromkeys(SCALER, float("nan"))]),
    ("tokenizer", [{}, {"kind": "word"}, CharTokenizer("ab").state()]),
    ("config", [{"n_layer": "two"}, {"seed": torch.zeros(2)}, {"n_embd": 4, "n_head": 3}]),
    ("model_state_dict", [{"w": 3}, {"w": torch.zeros(2, dtype=torch.int64)}, {"w": torch.ones(2).to_sparse()},
                          {"w": torch.zeros(1).expand(9)}, {"w": torch.zeros(2, 3).T},
                          {"w": torch.ones(2, device="meta")},
                          {"w": torch.tensor([1.0, torch.inf])}]),
    ("optimizer_state_dict", [{"state": {0: {"exp_avg": torch.tensor([torch.nan])}}},
                              {"state": [{"exp_avg": torch.zeros(2, dtype=torch.float64)}]}]),
])
def test_impossible_values_are_refused_by_name(tmp_path, key, values):
    path = step_path(tmp_path, 2)
    names = {"model_state_dict": (key, "weights"), "optimizer_state_dict": (key, "moments"),
             "best_val_loss": ("best_",)}.get(key, (key,))
    for value in values:
        torch.save(whole_content(2) | {key: value}, path)
        with pytest.raises(UserError) as refused:
            load_checkpoint(path)
        message = str(refused.value)
        assert message.startswith(f"{path} is not a whole checkpoint"), message
        assert any(name in message for name in names), message


def test_values_that_a_run_may_have_are_accepted(tmp_path):
    for changes in (dict(best_val_loss=2.0, best_step=1, val_loss=3.0), dict(pending_losses=[1.0, 2.0]),
                    dict(config={"a_newer_field": "x"}), dict(scaler_state_dict=dict.fromkeys(SCALER, 1))):
        save_checkpoint(step_path(tmp_path, 2), whole_content(2) | changes)
        assert load_checkpoint(step_path(tmp_path, 2))["step"] == 2


def test_a_file_holds_the_step_that_its_name_says(tmp_path):
    save_checkpoint(step_path(tmp_path, 3), whole_content(2))
    with pytest.raises(UserError, match=r"step_00000003\.pt is not a whole checkpoint of this project: step is 2"):
        load_checkpoint(step_path(tmp_path, 3))
    step_path(tmp_path, 3).rename(tmp_path / "mine.pt")
    assert load_checkpoint(tmp_path / "mine.pt")["step"] == 2


def parameters():
    return [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,))]


def optimizer_after(n_steps, kind):
    """An AdamW, or Muon and AdamW, that has taken so many steps."""
    matrix, vector = parameters()
    adamw = torch.optim.AdamW([{"params": [vector] if kind == "muon" else [matrix, vector]}])
    optimizer = MuonAndAdamW(Muon([matrix], torch.float32, True, ALONE), adamw) if kind == "muon" else adamw
    for _ in range(n_steps):
        matrix.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_must_be_those_of_the_optimizer(kind):
    def state(n_steps=3):
        saved = copy.deepcopy(optimizer_after(n_steps, kind).state_dict())
        return saved, saved["adamw"] if kind == "muon" else saved

    def check(saved, **options):
        check_moments(optimizer_after(0, kind), saved, **dict(n_steps=3, may_lack=False) | options)

    check(state()[0])
    check(state(2)[0])  # a gradient scaler skips updates
    check(state(0)[0], may_lack=True)
    for damage in (
        lambda s: s["state"].pop(0), lambda s: s["state"].clear(), lambda s: s.update(param_groups=[]),
        lambda s: s["state"].update({9: s["state"][0]}), lambda s: s["state"][0].pop("exp_avg"),
        lambda s: s["state"][0].update(exp_avg=torch.zeros(2)), lambda s: s["state"][0].update(exp_avg=3),
        lambda s: s["state"][0]["exp_avg_sq"].sub_(9),
        lambda s: s["state"][0].update(step=torch.tensor(-5.0)), lambda s: s["state"][0].update(step=torch.tensor(4.0)),
        lambda s: s["state"][0].update(step=torch.ones(2)), lambda s: s.update(state=[]), lambda s: s.pop("state"),
        lambda s: s["state"][0].update(more=torch.zeros(2)), lambda s: s["param_groups"][0].update(params=[5, 6]),
    ):
        saved, part = state()
        damage(part)
        with pytest.raises(ValueError):
            check(saved)


def test_all_problems_are_named_at_once(tmp_path):
    torch.save({"step": 3, "config": []}, tmp_path / "a.pt")
    with pytest.raises(UserError) as refused:
        load_checkpoint(tmp_path / "a.pt")
    assert ", ".join(key for key in SCHEMA if key != "step") in str(refused.value)


def test_missing_config_fields_have_their_defaults():
    cfg = TrainConfig(n_layer=7, seed=3)
    saved = {"seed": 3, "gone_field": 5, "learning_rate": 2.0}
    assert then_and_now(saved, cfg) == [("n_layer", 4, 7), ("learning_rate", 2.0, 1e-3)]
