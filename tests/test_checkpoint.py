import os
import pickle
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import FixedBatch, files_up_to, flip_bit, whole_content

from core.checkpoint import (
    Progress,
    Run,
    load_checkpoint,
    load_newest,
    newest_first,
    save_checkpoint,
    step_checkpoints,
    step_path,
)
from core.config import TrainConfig, resolve
from core.corpus import read_corpus
from core.dataset import TokenDataset
from core.trainer import Diverged, Trainer
from lib.cli import UserError


def test_round_trip_leaves_one_file(tmp_path):
    path = tmp_path / "step_00000003.pt"
    for value in (3, 4):
        save_checkpoint(path, whole_content(3) | {"model_state_dict": {"w": torch.full((9,), float(value))}})
    assert load_checkpoint(path)["model_state_dict"]["w"][0] == 4 and list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, whole_content(1))
    with pytest.raises(TypeError):
        save_checkpoint(path, whole_content(2) | {"config": {"bad": threading.Lock()}})
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_only_whole_contents_are_saved(tmp_path):
    for wrong in ({"step": 3}, whole_content(1) | {"bad": 1}):
        with pytest.raises(AssertionError):
            save_checkpoint(tmp_path / "a.pt", wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: flip_bit(path, b"\x00\x00\x00\x40" * 50),  # 2.0 in float32: inside the weights
    lambda path: path.write_text("no checkpoint"),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"step": 3}, path),
])
def test_damage_falls_back_to_the_previous_checkpoint(tmp_path, capsys, damage):
    for step in (1, 2):
        save_checkpoint(step_path(tmp_path, step), whole_content(step))
    damage(step_path(tmp_path, 2))
    with pytest.raises(UserError, match=r"step_00000002\.pt"):
        load_checkpoint(step_path(tmp_path, 2))
    path, loaded = load_newest(tmp_path)
    assert (path, loaded["step"]) == (step_path(tmp_path, 1), 1)
    assert "warning" in capsys.readouterr().err
    step_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UserError, match="is intact"):
        load_newest(tmp_path)


def test_best_is_the_last_resort(tmp_path):
    assert load_newest(tmp_path) == (None, None)
    save_checkpoint(tmp_path / "best.pt", whole_content(1))
    step_path(tmp_path, 2).write_bytes(b"PK")
    assert load_newest(tmp_path)[0] == tmp_path / "best.pt"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(whole_content(1) | {"config": Evil()}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    torch.load("a.pt", weights_only=False)  # it would have worked
    assert (tmp_path / "evil").exists()


# Progress, and a run's directory

def test_progress_remembers_the_best_evaluation():
    cfg = resolve(TrainConfig(max_iters=6, patience=2), n_windows=9)
    progress = Progress()
    for loss in (2.0, 4.0):
        progress.add(torch.tensor(loss))
    assert progress.step == 2 and progress.take_losses() == [2.0, 4.0] and progress.pending_losses == []
    found = []
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.0), start=2):
        progress.step = step
        found.append((progress.evaluated(loss), progress.finished(cfg)))
    assert found == [(True, False), (True, False), (False, False), (False, True)]
    assert (progress.val_loss, progress.best_val_loss, progress.best_step) == (2.0, 2.0, 3)
    assert not Progress(step=5).finished(cfg) and Progress(step=6).finished(cfg)


@pytest.fixture
def corpus(data_dir):
    return read_corpus(data_dir / "tiny")


def config(tmp_path, **fields):
    base = dict(dataset="tiny", out_dir=str(tmp_path), run_name="r", device="cpu", dtype="float32", compile="false",
                n_layer=1, n_head=2, n_embd=8, block_size=16, batch_size=2, max_iters=9, warmup_iters=0)
    return resolve(TrainConfig(**base | fields), n_windows=100)


def test_saving_prunes_to_the_newest_and_keeps_the_best(tmp_path, corpus):
    cfg = config(tmp_path, keep_checkpoints=2)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        assert run.save(trainer, Progress(step=9), "best.pt")
        for step in (9, 10, 100, 99_999_999):
            assert run.save(trainer, Progress(step=step))
    assert step_checkpoints(cfg.run_dir) == [step_path(cfg.run_dir, 100), step_path(cfg.run_dir, 99_999_999)]
    assert {path.name for path in cfg.run_dir.iterdir()} == {
        ".lock", "best.pt", "step_00000100.pt", "step_99999999.pt"}


def test_a_step_that_is_also_the_best_is_serialized_once(tmp_path, corpus, monkeypatch):
    writes = []
    monkeypatch.setattr(torch, "save", lambda *args, save=torch.save: writes.append(args) or save(*args))
    cfg = config(tmp_path)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    progress, best, step = Progress(step=3), cfg.run_dir / "best.pt", step_path(cfg.run_dir, 3)
    with Run(cfg, corpus) as run:
        assert run.save(trainer, progress, "best.pt") and run.newest == best
        assert run.save(trainer, progress) and run.newest == step
        assert len(writes) == 1 and best.read_bytes() == step.read_bytes() and not best.samefile(step)
        progress.step = 4
        assert run.save(trainer, progress, "best.pt")
        best.unlink()
        assert run.save(trainer, progress) and len(writes) == 3
    assert [load_checkpoint(step_path(cfg.run_dir, n))["step"] for n in (3, 4)] == [3, 4]
    assert {path.name for path in cfg.run_dir.iterdir()} == {".lock", step.name, "step_00000004.pt"}


def test_restoring_recovers_the_whole_progress(tmp_path, corpus):
    cfg = config(tmp_path)
    trainers = [Trainer(config(tmp_path, seed=seed), corpus.tokenizer.vocab_size) for seed in (0, 1)]
    x, y = TokenDataset(corpus.train, cfg.block_size).windows(range(2))
    progress = Progress(step=6, val_loss=2.5, best_val_loss=2.25, best_step=4, evals_without_better=1)
    progress.add(trainers[0].step(FixedBatch((x, y), 6)))
    with Run(cfg, corpus) as run:
        assert run.restore(trainers[1]) is None
        run.save(trainers[0], progress)
    later = config(tmp_path, resume=True, max_iters=20, data_dir="elsewhere")
    with Run(later, corpus) as run:
        restored = run.restore(trainers[1])
    assert restored == progress and run.newest == step_path(cfg.run_dir, 7)
    assert run.changes == [("max_iters", 9, 20), ("lr_decay_iters", 9, 20)]
    first, second = (trainer.state_dict() for trainer in trainers)
    assert str(first["model_state_dict"]) == str(second["model_state_dict"])
    assert str(first["optimizer_state_dict"]["state"]) == str(second["optimizer_state_dict"]["state"])


@pytest.mark.parametrize("change, words", [
    (lambda c: c["model_state_dict"].pop("lm_head.weight"), "does not fit its own config: Error(s) in loading state_"),
    (lambda c: c["model_state_dict"].update({"lm_head.weight": torch.zeros(2, 2)}), "does not fit its own config: E"),
    (lambda c: c["optimizer_state_dict"].clear(), "does not fit its own config: optimizer_state_dict is damaged"),
    (lambda c: c["optimizer_state_dict"]["param_groups"].pop(), "does not fit its own config: param_groups"),
    (lambda c: c["optimizer_state_dict"].update(param_groups=[1, 2]), "does not fit its own config: optimizer_state"),
    (lambda c: c["optimizer_state_dict"].update(state=3), "does not fit its own config: optimizer_state_dict is dam"),
    (lambda c: c["optimizer_state_dict"].update(state={}), "does not fit its own config: moments in optimizer_state"),
    (lambda c: c["optimizer_state_dict"]["state"][0].update(exp_avg=torch.zeros(3)), "does not fit its own config: mo"),
    (lambda c: c["tokenizer"]["itos"].reverse() or c["tokenizer"].pop("stoi"), "does not fit its own config: its tok"),
    (lambda c: c["model_state_dict"]["lm_head.weight"].fill_(torch.inf), "is not a whole checkpoint of this project:"),
])
def test_resume_refuses_inconsistent_parts(tmp_path, corpus, capsys, change, words):
    cfg = config(tmp_path)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    trainer.step(FixedBatch(TokenDataset(corpus.train, cfg.block_size).windows(range(2)), 0))
    with Run(cfg, corpus) as run:
        run.save(trainer, Progress(step=1))
        path = step_path(cfg.run_dir, 1)
        damaged = torch.load(path, weights_only=True)
        change(damaged)
        torch.save(damaged, path)
        with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
            run.restore(Trainer(cfg, corpus.tokenizer.vocab_size))
        assert f"{path} {words}" in capsys.readouterr().err


def test_a_run_directory_belongs_to_one_process_and_is_cleaned(tmp_path, corpus):
    cfg = config(tmp_path)
    cfg.run_dir.mkdir()
    (cfg.run_dir / "step_00000001.pt.tmp").write_bytes(b"half")
    with Run(cfg, corpus) as run:
        assert [path.name for path in cfg.run_dir.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process is training in"), Run(cfg, corpus):
            pass
        run.save(Trainer(cfg, corpus.tokenizer.vocab_size), Progress(step=1))
    with pytest.raises(UserError, match=r"already holds checkpoints: --resume .*step_00000001\.pt.*--run_name"):
        Run(cfg, corpus).__enter__()
    with Run(config(tmp_path, resume=True), corpus):  # what was refused holds no lock
        pass


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, corpus, capsys):
    cfg = config(tmp_path, keep_checkpoints=1)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        assert run.save(trainer, Progress(step=1))
        whole = step_path(cfg.run_dir, 1).read_bytes()
        with files_up_to(len(whole) // 2):
            assert not run.save(trainer, Progress(step=2))
            with pytest.raises(UserError, match=r"could not be saved .*--resume continues from step_00000001\.pt"):
                run.save(trainer, Progress(step=2), required=True)
        assert sorted(path.name for path in cfg.run_dir.iterdir()) == [".lock", "step_00000001.pt"]
        assert step_path(cfg.run_dir, 1).read_bytes() == whole
        assert run.save(trainer, Progress(step=2))
    assert capsys.readouterr().err.count("step_00000002.pt: File too large\n") == 2
    assert step_checkpoints(cfg.run_dir) == [step_path(cfg.run_dir, 2)]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, corpus, capsys, monkeypatch):
    cfg = config(tmp_path, keep_checkpoints=1)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        assert run.save(trainer, Progress(step=1))
        monkeypatch.setattr(Path, "unlink", lambda path, **_: path.suffix == ".tmp" or os.rmdir(path))  # fails
        assert run.save(trainer, Progress(step=2), required=True)
    assert "warning: cannot delete " in (err := capsys.readouterr().err) and "step_00000001.pt" in err
    assert load_checkpoint(step_path(cfg.run_dir, 2))["step"] == 2


def test_non_finite_state_is_never_saved(tmp_path, corpus):
    cfg = config(tmp_path)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    trainer.step(FixedBatch(TokenDataset(corpus.train, cfg.block_size).windows(range(2)), 0))
    weight = trainer.model.lm_head.weight
    for values in (weight.data, *trainer.optimizer.state[weight].values()):
        good = values.clone()
        values.view(-1)[-1] = float("nan")
        with Run(cfg, corpus) as run, pytest.raises(Diverged, match="diverged at step 3: weights or moments not"):
            run.save(trainer, Progress(step=3))
        values.copy_(good)
    assert [path.name for path in cfg.run_dir.iterdir()] == [".lock"]


# What --resume changes, and what it keeps

@pytest.fixture
def saved_run(tmp_path, corpus):
    """A function that takes steps with these fields of the config and saves each, those in `best` as best.pt too."""
    def save(n_steps, best=(), **fields):
        cfg = config(tmp_path, keep_checkpoints=9, **fields)
        trainer, progress = Trainer(cfg, corpus.tokenizer.vocab_size), Progress()
        data = TokenDataset(corpus.train, cfg.block_size)
        with Run(cfg, corpus) as run:
            for step in range(n_steps):
                progress.add(trainer.step(FixedBatch(data.windows([step, step + 1]), step)))
                progress.take_losses()
                if progress.step in best:
                    progress.evaluated(9.0 - step)
                    assert run.save(trainer, progress, "best.pt")
                assert run.save(trainer, progress)
        return trainer, cfg.run_dir

    return save


def restore(corpus, cfg):
    """(trainer, progress, run) restored with a config."""
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        return trainer, run.restore(trainer), run


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path, corpus, saved_run):
    _, run_dir = saved_run(4, best=(3,))
    names = [path.name for path in newest_first(run_dir)]
    assert names == ["step_00000004.pt", "step_00000003.pt", "best.pt", "step_00000002.pt", "step_00000001.pt"]
    step_path(run_dir, 4).write_bytes(b"")
    step_path(run_dir, 3).unlink()
    _, progress, run = restore(corpus, config(tmp_path, resume=True))
    assert progress.step == 3 and run.newest == run_dir / "best.pt"
    (run_dir / "best.pt").write_bytes(b"damaged")
    assert newest_first(run_dir)[-1] == run_dir / "best.pt"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_was_saved_after_a_fallback_is_not_pruned(tmp_path, corpus, saved_run, capsys, keep):
    _, run_dir = saved_run(6)
    for step in (4, 5, 6):
        step_path(run_dir, step).write_bytes(f"damaged {step}".encode())
    cfg = config(tmp_path, resume=True, keep_checkpoints=keep)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        progress = run.restore(trainer)
        assert progress.step == 3
        progress.step = 5
        assert run.save(trainer, progress)
    assert [int(path.stem[-8:]) for path in step_checkpoints(run_dir)] == [1, 2, 3, 5][-keep:]
    assert load_checkpoint(step_path(run_dir, 5))["step"] == 5
    err = capsys.readouterr().err
    for step in (4, 5, 6):
        assert (run_dir / f"step_0000000{step}.pt.damaged").read_bytes() == f"damaged {step}".encode()
        assert f"step_0000000{step}.pt is now step_0000000{step}.pt.damaged\n" in err


def test_what_is_set_aside_replaces_nothing(tmp_path, corpus, saved_run):
    _, run_dir = saved_run(3)
    for name in (step_path(run_dir, 3), run_dir / "step_00000003.pt.damaged"):
        name.write_bytes(name.name.encode())
    restore(corpus, config(tmp_path, resume=True))
    assert (run_dir / "step_00000003.pt.damaged").read_bytes() == b"step_00000003.pt.damaged"
    assert (run_dir / "step_00000003-2.pt.damaged").read_bytes() == b"step_00000003.pt"


def test_what_cannot_be_read_is_not_damaged(tmp_path, corpus, saved_run, monkeypatch):
    _, run_dir = saved_run(3)
    (run_dir / "step_00000009.pt").mkdir()  # no checkpoint
    (run_dir / "step_00000010.pt").symlink_to("nosuch")
    zip_file = zipfile.ZipFile

    def refuse(path):
        if path == step_path(run_dir, 3):
            raise PermissionError(13, "Permission denied")
        return zip_file(path)

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(UserError, match=r"cannot read checkpoint .*step_00000003\.pt: Permission denied"):
        restore(corpus, config(tmp_path, resume=True))
    monkeypatch.undo()
    assert restore(corpus, config(tmp_path, resume=True))[1].step == 3
    assert not list(run_dir.glob("*.damaged"))


def test_a_run_directory_that_was_deleted_is_made_again(tmp_path, corpus):
    cfg = config(tmp_path)
    with Run(cfg, corpus) as run:
        shutil.rmtree(cfg.run_dir)
        assert run.save(Trainer(cfg, corpus.tokenizer.vocab_size), Progress(step=1), required=True)
    assert step_checkpoints(cfg.run_dir) == [step_path(cfg.run_dir, 1)]


def test_what_cannot_be_set_aside_is_left_and_prunes_nothing(tmp_path, corpus, saved_run, capsys, monkeypatch):
    _, run_dir = saved_run(3)
    step_path(run_dir, 3).write_bytes(b"damaged")
    monkeypatch.setattr(Path, "rename", lambda path, target: os.rmdir(path))  # fails
    cfg = config(tmp_path, resume=True, keep_checkpoints=1)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        progress = run.restore(trainer)
        assert run.save(trainer, progress)
    assert "cannot rename " in capsys.readouterr().err
    assert step_checkpoints(run_dir) == [step_path(run_dir, 2), step_path(run_dir, 3)]


@pytest.mark.parametrize("name", ["best.pt", "best_00000003.pt", "step_00000001.pt"])
def test_a_directory_with_any_checkpoint_is_not_started_over(tmp_path, corpus, saved_run, name):
    _, run_dir = saved_run(1)
    step_path(run_dir, 1).rename(run_dir / name)
    with pytest.raises(UserError, match=f"already holds checkpoints: --resume continues from the newest .{name}"):
        Run(config(tmp_path), corpus).__enter__()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_changed_hyperparameters_are_in_force_and_recorded(tmp_path, corpus, saved_run, optimizer):
    before, _ = saved_run(2, optimizer=optimizer)
    changes = dict(weight_decay=0.3, beta1=0.5, beta2=0.7)
    cfg = config(tmp_path, resume=True, optimizer=optimizer, keep_checkpoints=9, **changes)
    trainer, _, run = restore(corpus, cfg)
    assert {name for name, _, _ in run.changes} == changes.keys()
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert {group["betas"] for group in groups if "betas" in group} == {(0.5, 0.7)}
    assert {group["momentum"] for group in groups if "momentum" in group} <= {0.5}
    for p, q in zip(before.parameters, trainer.parameters):
        for name, value in before.optimizer.state[p].items():
            assert torch.equal(value, trainer.optimizer.state[q][name])
    # A step does what the same step of an optimizer with these settings does.
    moment = "momentum_buffer" if optimizer == "muon" else "exp_avg"
    weight = trainer.model.transformer.h[0].attn.c_attn.weight
    old = trainer.optimizer.state[weight][moment].clone()
    trainer.cfg = cfg
    trainer.optimizer.zero_grad()
    for p in trainer.parameters:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    assert torch.allclose(trainer.optimizer.state[weight][moment], 0.5 * old)
    with Run(cfg, corpus) as run:
        run.save(trainer, Progress(step=3))
    saved = load_checkpoint(step_path(cfg.run_dir, 3))
    assert saved["config"] | changes == saved["config"]
    state = saved["optimizer_state_dict"]
    assert {group["weight_decay"] for group in (state.get("adamw") or state)["param_groups"]} == {0.3, 0.0}


def test_the_best_starts_again_when_losses_are_measured_otherwise(tmp_path, corpus, saved_run, capsys):
    _, run_dir = saved_run(4, best=(2, 3))
    n_val = len(corpus.val)
    for eval_tokens in (None, n_val, n_val + 5):  # all of them
        _, progress, _ = restore(corpus, config(tmp_path, resume=True, eval_tokens=eval_tokens))
        assert (progress.best_val_loss, progress.best_step) == (7.0, 3)
    assert (run_dir / "best.pt").exists()
    capsys.readouterr()
    _, progress, _ = restore(corpus, config(tmp_path, resume=True, eval_tokens=100))
    assert (progress.best_val_loss, progress.best_step, progress.evals_without_better) == (None, None, 0)
    err = capsys.readouterr().err
    assert f"losses over {n_val:,} and 100 validation tokens do not compare: the best loss starts over" in err
    assert load_checkpoint(run_dir / "best.pt")["best_val_loss"] == 7.0  # as long as there is no other
    for _ in range(2):  # each keeps the one before
        cfg = config(tmp_path, resume=True, eval_tokens=100, keep_checkpoints=9)
        trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
        with Run(cfg, corpus) as run:
            progress = run.restore(trainer)
            assert progress.evaluated(99.0) and run.save(trainer, progress, "best.pt")
            progress.best_val_loss = 98.0
            assert run.save(trainer, progress, "best.pt")
    assert capsys.readouterr().err.count("best.pt is now best_before_00000004") == 2
    names = ["best_before_00000004.pt", "best_before_00000004-2.pt", "best.pt"]
    assert [load_checkpoint(run_dir / name)["best_val_loss"] for name in names] == [7.0, 98.0, 98.0]
    assert {run_dir / name for name in names} <= set(newest_first(run_dir))


def test_a_damaged_best_is_no_best(tmp_path, corpus, saved_run, capsys):
    _, run_dir = saved_run(4, best=(2, 3))
    for _ in range(2):  # whole, then missing: as when only the newest step has been copied
        _, progress, _ = restore(corpus, config(tmp_path, resume=True))
        assert progress.best_step == 3
        (run_dir / "best.pt").unlink(missing_ok=True)
    (run_dir / "best.pt").write_bytes(step_path(run_dir, 3).read_bytes()[:-200])
    cfg = config(tmp_path, resume=True)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        progress = run.restore(trainer)
        assert progress.best_step is None and "best.pt is damaged: the best loss starts over" in capsys.readouterr().err
        assert progress.evaluated(9.0) and run.save(trainer, progress, "best.pt")
    assert load_checkpoint(run_dir / "best.pt")["best_step"] == 4 and (run_dir / "best.pt.damaged").exists()
    assert run.newest is None or run.newest == step_path(run_dir, 4)


def test_a_newer_best_that_is_damaged_is_set_aside(tmp_path, corpus, saved_run):
    """Its step can still be read: else it would pass for the newest checkpoint ever after."""
    trainer, run_dir = saved_run(4, best=(4,))
    weights = trainer.model.state_dict()["transformer.wte.weight"].numpy().tobytes()
    for path in (step_path(run_dir, 4), run_dir / "best.pt"):
        flip_bit(path, weights[:64])
    assert newest_first(run_dir)[:2] == [step_path(run_dir, 4), run_dir / "best.pt"]
    _, progress, run = restore(corpus, config(tmp_path, resume=True))
    assert progress.step == 3 and run.newest == step_path(run_dir, 3) == newest_first(run_dir)[0]
    assert (run_dir / "step_00000004.pt.damaged").exists() and (run_dir / "best.pt.damaged").exists()


def as_from_cuda(content):
    """The content of a checkpoint as a card would have written it: other kernels, and a scaler in float16."""
    for group in content["optimizer_state_dict"]["param_groups"]:
        group |= dict(fused=False, foreach=True, capturable=True)
    content["scaler_state_dict"] = torch.amp.GradScaler("cpu").state_dict()


@pytest.mark.parametrize("change, dtype", [
    (as_from_cuda, "float32"), (as_from_cuda, "float16"), (lambda content: None, "float16"),
    (lambda content: content.update(scaler_state_dict={}), "bfloat16"),
])
def test_checkpoints_of_other_devices_and_dtypes_resume(tmp_path, corpus, saved_run, change, dtype):
    _, run_dir = saved_run(2)
    content = load_checkpoint(step_path(run_dir, 2))
    change(content)
    torch.save(content, step_path(run_dir, 2))
    trainer, progress, _ = restore(corpus, config(tmp_path, resume=True, dtype=dtype))
    assert progress.step == 2 and trainer.optimizer.param_groups[0]["fused"] is True
    data = TokenDataset(corpus.train, 16)
    for step in (2, 3, 4):
        assert trainer.step(FixedBatch(data.windows([0, 1]), step)).isfinite()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_scaler_that_has_skipped_every_update_resumes(tmp_path, corpus, optimizer):
    """As at the start of training in float16: no moments yet, or of no update."""
    cfg = config(tmp_path, dtype="float16", optimizer=optimizer)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    trainer.step(FixedBatch(TokenDataset(corpus.train, 16).windows([0, 1]), 0))
    with Run(cfg, corpus) as run:
        assert run.save(trainer, Progress(step=1))
    restored, progress, _ = restore(corpus, config(tmp_path, resume=True, dtype="float16", optimizer=optimizer))
    assert progress.step == 1 and restored.scaler.get_scale() == trainer.scaler.get_scale() == 2**15
