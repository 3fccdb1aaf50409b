import os
import pickle
import threading

import pytest
import torch

from checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
    step_checkpoints,
    step_path,
)
from errors import UserError


def content(step):
    return {"model_state_dict": {"w": torch.full((1000,), float(step))}, "optimizer_state_dict": {}, "config": {},
            "vocab_size": 3, "tokenizer": {}, "step": step, "val_loss": None}


def flip_bit(path, needle):
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


def test_round_trip_leaves_one_file(tmp_path):
    path = tmp_path / "run/step_00000003.pt"
    save_checkpoint(path, content(3))
    save_checkpoint(path, content(4))
    assert load_checkpoint(path)["step"] == 4 and list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, content(1))
    with pytest.raises(TypeError):
        save_checkpoint(path, content(2) | {"bad": threading.Lock()})
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: flip_bit(path, b"\x00\x00\x00\x40" * 50),  # 2.0 in float32: inside the weights
    lambda path: path.write_text("no checkpoint"),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"step": 3}, path),
])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, capsys, damage):
    for step in (1, 2):
        save_checkpoint(step_path(tmp_path, step), content(step))
    damage(step_path(tmp_path, 2))
    with pytest.raises(UserError, match=r"step_00000002\.pt"):
        load_checkpoint(step_path(tmp_path, 2))
    path, loaded = load_newest(tmp_path)
    assert (path, loaded["step"]) == (step_path(tmp_path, 1), 1)
    assert "warning" in capsys.readouterr().err
    step_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UserError, match="is whole"):
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


def test_pruning_keeps_the_newest(tmp_path):
    for step in (9, 10, 100, 99_999_999):
        save_checkpoint(step_path(tmp_path, step), content(step))
    save_checkpoint(tmp_path / "best.pt", content(9))
    prune_checkpoints(tmp_path, 2)
    assert step_checkpoints(tmp_path) == [step_path(tmp_path, 100), step_path(tmp_path, 99_999_999)]
    assert (tmp_path / "best.pt").exists()


def test_find_checkpoint(tmp_path):
    for name in ("", "empty", "nosuch"):
        with pytest.raises(UserError):
            find_checkpoint(tmp_path / name)
    for time, name in enumerate(("a/best.pt", "b/step_00000002.pt", "b/best.pt", "a/step_00000009.pt")):
        save_checkpoint(tmp_path / name, content(1))
        os.utime(tmp_path / name, (time, time))
    assert find_checkpoint(tmp_path) == tmp_path / "a/step_00000009.pt"
    assert find_checkpoint(tmp_path / "b") == tmp_path / "b/best.pt"
    assert find_checkpoint(tmp_path / "a/best.pt") == tmp_path / "a/best.pt"
