import os
import pickle
import threading

import pytest
import torch
from helpers import files_up_to

from core.checkpoint import (
    SCHEMA,
    Progress,
    Run,
    find_checkpoint,
    load_checkpoint,
    load_model,
    load_newest,
    peek,
    save_checkpoint,
    step_checkpoints,
    step_path,
    then_and_now,
)
from core.config import TrainConfig, resolve
from core.corpus import read_corpus
from core.dataset import TokenDataset
from core.tokenizer import CharTokenizer
from core.trainer import Diverged, Trainer
from lib.cli import UserError


def content(step):
    return {"model_state_dict": {"w": torch.full((1000,), float(step))}, "optimizer_state_dict": {},
            "scaler_state_dict": {}, "config": {}, "vocab_size": 3, "tokenizer": {}, "data_fingerprint": "", "epoch": 0,
            "step": step, "val_loss": None, "best_val_loss": None, "best_step": None, "evals_without_better": 0,
            "pending_losses": []}


def flip_bit(path, needle):
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


def test_round_trip_leaves_one_file(tmp_path):
    path = tmp_path / "step_00000003.pt"
    save_checkpoint(path, content(3))
    save_checkpoint(path, content(4))
    assert load_checkpoint(path)["step"] == 4 and list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, content(1))
    with pytest.raises(TypeError):
        save_checkpoint(path, content(2) | {"config": {"bad": threading.Lock()}})
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_only_whole_contents_are_saved(tmp_path):
    for wrong in ({"step": 3}, content(1) | {"bad": 1}):
        with pytest.raises(AssertionError):
            save_checkpoint(tmp_path / "a.pt", wrong)
    assert list(tmp_path.iterdir()) == []


MISSING = object()
# A value of another type for each key of the schema: None where that is allowed is no such value.
WRONG = {key: [MISSING, "text" if kind is not str else 3, *([] if isinstance(kind, tuple) else [None])]
         for key, kind in SCHEMA.items()} | {"pending_losses": [MISSING, None, 3, "text", [1.0, "text"], [1]]}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_each_key_of_the_schema_is_refused_by_name(tmp_path, capsys, key, value):
    save_checkpoint(step_path(tmp_path, 1), content(1))
    wrong = content(2) | {key: value}
    if value is MISSING:
        del wrong[key]
    path = step_path(tmp_path, 2)
    torch.save(wrong, path)
    message = f"{path} is not a checkpoint of this project: {key} missing or of the wrong type"
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    assert str(refused.value) == message
    assert load_newest(tmp_path)[0] == step_path(tmp_path, 1)
    assert message in capsys.readouterr().err


def test_all_problems_are_named_at_once(tmp_path):
    torch.save({"step": 3, "config": []}, tmp_path / "a.pt")
    with pytest.raises(UserError) as refused:
        load_checkpoint(tmp_path / "a.pt")
    assert ", ".join(key for key in SCHEMA if key != "step") in str(refused.value)


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
        save_checkpoint(step_path(tmp_path, step), content(step))
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
    save_checkpoint(tmp_path / "best.pt", content(1))
    step_path(tmp_path, 2).write_bytes(b"PK")
    assert load_newest(tmp_path)[0] == tmp_path / "best.pt"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(1) | {"config": Evil()}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    torch.load("a.pt", weights_only=False)  # it would have worked
    assert (tmp_path / "evil").exists()


def test_peek_skips_unreadable_files_without_verifying(tmp_path):
    assert peek(tmp_path) == (None, None)
    for step in (1, 2, 3):
        save_checkpoint(step_path(tmp_path, step), content(step))
    torch.save({"config": []}, step_path(tmp_path, 2))
    step_path(tmp_path, 3).write_bytes(b"PK")
    flip_bit(step_path(tmp_path, 1), b"\x00\x00\x80\x3f" * 50)  # 1.0: in the weights
    path, saved = peek(tmp_path)
    assert (path, saved["step"]) == (step_path(tmp_path, 1), 1)


def test_find_checkpoint(tmp_path):
    for name in ("", "empty", "nosuch"):
        with pytest.raises(UserError):
            find_checkpoint(tmp_path / name)
    for time, name in enumerate(("a/best.pt", "b/step_00000002.pt", "b/best.pt", "a/step_00000009.pt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_checkpoint(tmp_path / name, content(1))
        os.utime(tmp_path / name, (time, time))
    assert find_checkpoint(tmp_path) == tmp_path / "a/step_00000009.pt"
    assert find_checkpoint(tmp_path / "b") == tmp_path / "b/best.pt"
    assert find_checkpoint(tmp_path / "a/best.pt") == tmp_path / "a/best.pt"
    (tmp_path / "b/dangling.pt").symlink_to("nosuch")
    assert find_checkpoint(tmp_path / "b") == tmp_path / "b/best.pt"


# A model of a checkpoint

def model_content(**shape):
    """The content of a whole checkpoint of a small model on three characters; the model."""
    cfg = resolve(TrainConfig(device="cpu", dtype="float32", compile="false", max_iters=5, run_name="r",
                              **dict(n_layer=1, n_head=2, n_embd=8, block_size=4) | shape), n_windows=9)
    trainer = Trainer(cfg, 3)
    state = {"config": vars(cfg), "tokenizer": CharTokenizer("abc").state()}
    return content(4) | trainer.state_dict() | state, trainer.model


@pytest.mark.parametrize("shape", [{}, dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False, tie_weights=False)])
def test_a_model_comes_back(tmp_path, shape):
    saved, model = model_content(dropout=0.25, **shape)
    save_checkpoint(tmp_path / "a.pt", saved)
    loaded, tokenizer, found = load_model(tmp_path / "a.pt")
    assert loaded.config == model.config and tokenizer.itos == list("abc") and found["step"] == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("change, words", [
    (lambda c: c["config"].update(n_layer=0, mlp="silu"), "n_layer must be an int >= 1 and < 10000, not 0"),
    (lambda c: c["config"].update(n_layer=0, mlp="silu"), "mlp must be one of gelu, swiglu, relu2, not 'silu'"),
    (lambda c: c["config"].pop("pos"), "pos must be one of"),
    (lambda c: c["config"].update(n_layer=2), "do not fit its config"),
    (lambda c: c["config"].update(n_head=3), "do not fit its config"),
    (lambda c: c["model_state_dict"].clear(), "do not fit its config"),
    (lambda c: c["model_state_dict"].update({"lm_head.weight": 3}), "do not fit its config"),
    (lambda c: c["model_state_dict"]["transformer.ln_f.weight"].fill_(torch.nan), "not all finite"),
    (lambda c: c["tokenizer"].update(kind="word"), "'word'"),
    (lambda c: c["tokenizer"].pop("itos"), "tokenizer"),
    (lambda c: c["tokenizer"].update(CharTokenizer("ab").state()), "do not fit its config"),
])
def test_parts_that_do_not_fit_are_refused(tmp_path, change, words):
    saved, _ = model_content()
    saved["config"] = dict(saved["config"])
    change(saved)
    save_checkpoint(tmp_path / "a.pt", saved)
    with pytest.raises(UserError) as refused:
        load_model(tmp_path / "a.pt")
    assert words in str(refused.value) and str(tmp_path / "a.pt") in str(refused.value)


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


def test_restoring_recovers_the_whole_progress(tmp_path, corpus):
    cfg = config(tmp_path)
    trainers = [Trainer(config(tmp_path, seed=seed), corpus.tokenizer.vocab_size) for seed in (0, 1)]
    x, y = TokenDataset(corpus.train, cfg.block_size).windows(range(2))
    progress = Progress(step=6, val_loss=2.5, best_val_loss=2.25, best_step=4, evals_without_better=1)
    progress.add(trainers[0].step((x, y), 6))
    with Run(cfg, corpus) as run:
        assert run.restore(trainers[1]) is None
        run.save(trainers[0], progress)
    later = config(tmp_path, resume=True, max_iters=20, data_dir="elsewhere")
    with Run(later, corpus) as run:
        restored = run.restore(trainers[1])
    assert restored == progress and run.restored_from == step_path(cfg.run_dir, 7)
    assert run.changes == [("max_iters", 9, 20), ("lr_decay_iters", 9, 20)]
    for part in ("model_state_dict", "optimizer_state_dict"):
        first, second = (str(trainer.state_dict()[part]) for trainer in trainers)
        assert first == second


@pytest.mark.parametrize("change", [
    lambda c: c["model_state_dict"].pop("lm_head.weight"),
    lambda c: c["model_state_dict"].update({"lm_head.weight": torch.zeros(2, 2)}),
    lambda c: c["optimizer_state_dict"].clear(),
    lambda c: c["optimizer_state_dict"]["param_groups"].pop(),
    lambda c: c["optimizer_state_dict"].update(param_groups=[1, 2]),
    lambda c: c["optimizer_state_dict"].update(state=3),
])
def test_resume_refuses_inconsistent_parts(tmp_path, corpus, change):
    cfg = config(tmp_path)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    trainer.step(TokenDataset(corpus.train, cfg.block_size).windows(range(2)), 0)
    with Run(cfg, corpus) as run:
        run.save(trainer, Progress(step=1))
        path = step_path(cfg.run_dir, 1)
        damaged = torch.load(path, weights_only=True)
        change(damaged)
        torch.save(damaged, path)
        with pytest.raises(UserError, match=r"weights or moments in .*step_00000001\.pt do not fit its config"):
            run.restore(Trainer(cfg, corpus.tokenizer.vocab_size))


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
            with pytest.raises(UserError, match=r"last checkpoint could not be saved .*--resume"):
                run.save(trainer, Progress(step=2), required=True)
        assert sorted(path.name for path in cfg.run_dir.iterdir()) == [".lock", "step_00000001.pt"]
        assert step_path(cfg.run_dir, 1).read_bytes() == whole
        assert run.save(trainer, Progress(step=2))
    assert capsys.readouterr().err.count("step_00000002.pt: File too large; older checkpoints are kept") == 2
    assert step_checkpoints(cfg.run_dir) == [step_path(cfg.run_dir, 2)]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, corpus, capsys):
    cfg = config(tmp_path, keep_checkpoints=1)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    with Run(cfg, corpus) as run:
        step_path(cfg.run_dir, 1).mkdir()
        assert run.save(trainer, Progress(step=2), required=True)
    assert "warning: cannot delete " in (err := capsys.readouterr().err) and "step_00000001.pt" in err
    assert load_checkpoint(step_path(cfg.run_dir, 2))["step"] == 2


def test_non_finite_state_is_never_saved(tmp_path, corpus):
    cfg = config(tmp_path)
    trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
    trainer.step(TokenDataset(corpus.train, cfg.block_size).windows(range(2)), 0)
    weight = trainer.model.lm_head.weight
    for values in (weight.data, *trainer.optimizer.state[weight].values()):
        good = values.clone()
        values.view(-1)[-1] = float("nan")
        with Run(cfg, corpus) as run, pytest.raises(Diverged, match="diverged at step 3: weights or moments not"):
            run.save(trainer, Progress(step=3))
        values.copy_(good)
    assert [path.name for path in cfg.run_dir.iterdir()] == [".lock"]


def test_missing_config_fields_have_their_defaults():
    cfg = TrainConfig(n_layer=7, seed=3)
    saved = {"seed": 3, "gone_field": 5, "learning_rate": 2.0}
    assert then_and_now(saved, cfg) == [("n_layer", 4, 7), ("learning_rate", 2.0, 1e-3)]
