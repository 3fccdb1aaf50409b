"""What a checkpoint holds, every key, type and range; and what it must have in common with a run that resumes it."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from core.config import FIELDS, MAX_STEPS, SHAPE, TrainConfig, build_config
from core.optim import MOMENTS, MuonAndAdamW
from core.tokenizer import tokenizer_from_state
from lib.cli import UserError, plural

SCHEMA = {
    "model_state_dict": dict, "optimizer_state_dict": dict, "scaler_state_dict": dict, "config": dict,
    "vocab_size": int, "tokenizer": dict, "data_fingerprint": str, "epoch": int,
    # Progress
    "step": int, "val_loss": (float, NoneType), "best_val_loss": (float, NoneType), "best_step": (int, NoneType),
    "evals_without_better": int, "pending_losses": list,
}
# Fields that weights and moments depend on: a resumed run must keep them.
STATE_FIELDS = (*SHAPE, "optimizer", "init_from")
# Fields that a resumed run may change silently.
SILENT_FIELDS = {"resume", "data_dir", "out_dir", "log_dir", "run_name"}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")  # or empty


def problems_in(content: object, where: object, verify: bool) -> list[str]:
    """Why `content`, loaded from the file `where`, is not a whole checkpoint; empty if it is.

    What takes time is left out unless `verify`: building the tokenizer, reading weights and moments. That these fit
    the config shows when they are loaded into a model and its optimizer.
    """
    content = content if isinstance(content, dict) else {}
    wrong = [key for key, kind in SCHEMA.items() if not has_type(content.get(key, ...), kind)]
    if wrong:
        return [f"{', '.join(wrong)} missing or of the wrong type"]
    problems = [f"{name} is {content[name]!r:.60}" for name in impossible_progress(content)]
    scaler = content["scaler_state_dict"]
    if scaler and (scaler.keys() != {*SCALER} or not all(is_number(value) and value >= 0 for value in scaler.values())):
        problems.append("scaler_state_dict is not a gradient scaler's")
    problems += [f"config: {problem}" for problem in
                 build_config({name: value for name, value in content["config"].items() if name in FIELDS})[1]]
    if not all(isinstance(value, Tensor) for value in content["model_state_dict"].values()):
        problems.append("model_state_dict does not hold tensors only")
    problems += [f"{key} holds tensors that are not dense float32" for key in SCHEMA
                 if not all(is_plain(value) for value in tensors_in(content[key]))]
    if verify and not problems:
        try:
            vocab_size = tokenizer_from_state(content["tokenizer"], where).vocab_size
            if vocab_size != content["vocab_size"]:
                problems.append(f"vocab_size is {content['vocab_size']}, but the tokenizer has {vocab_size} symbols")
        except UserError as error:
            problems += error.problems
        if not all(bool(value.isfinite().all()) for value in tensors_in(content)):
            problems.append("weights or moments are not finite")
    return problems


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is float32, dense and contiguous, in memory: kernels rely on it."""
    return (value.dtype == torch.float32 and value.layout == torch.strided and value.device.type == "cpu"
            and value.is_contiguous())


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float."""
    return has_type(value, (int, float)) and math.isfinite(value)


def impossible_progress(content: dict) -> Iterator[str]:
    """The keys whose values no run can have."""
    step, best_step, losses = content["step"], content["best_step"], content["pending_losses"]
    if not 0 < step < MAX_STEPS:
        yield "step"
    yield from (key for key in ("epoch", "evals_without_better") if not 0 <= content[key] < MAX_STEPS)
    yield from (key for key in ("val_loss", "best_val_loss") if not (content[key] is None or is_number(content[key])))
    if (best_step is None) != (content["best_val_loss"] is None) or not 0 < (best_step or 1) <= max(1, step):
        yield "best_step"
    if len(losses) > max(0, step) or not all(type(loss) is float and math.isfinite(loss) for loss in losses):
        yield "pending_losses"


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors in nested dicts and lists."""
    if isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(value)
    elif isinstance(tree, Tensor):
        yield tree


def check_moments(optimizer: torch.optim.Optimizer | MuonAndAdamW, saved: dict, n_steps: int, may_lack: bool) -> None:
    """ValueError if `saved`, a state_dict, is not that of `optimizer` after at most n_steps updates.

    It may have no moments, or of no update, if they `may_lack`: a gradient scaler that looks for its scale skips
    updates, at first perhaps all.
    """
    try:
        if isinstance(optimizer, MuonAndAdamW):
            check_moments(optimizer.muon, saved["muon"], n_steps, may_lack)
            return check_moments(optimizer.adamw, saved["adamw"], n_steps, may_lack)
        found = {i: {name: value.shape for name, value in moments.items() if name != "step"}
                 for i, moments in saved["state"].items()}
        counts = [float(moments.get("step", 1)) for moments in saved["state"].values()]
        groups = [group["params"] for group in saved["param_groups"]]
    except (AttributeError, KeyError, RuntimeError, TypeError):
        raise ValueError("optimizer_state_dict is damaged") from None
    parameters = enumerate(p for group in optimizer.param_groups for p in group["params"])
    expected = {i: dict.fromkeys(MOMENTS[type(optimizer)], p.shape) for i, p in parameters}
    if found != expected and (found or not may_lack):
        raise ValueError("moments in optimizer_state_dict are missing or of another shape")
    if not all((not may_lack) <= count <= n_steps for count in counts):
        raise ValueError(f"moments in optimizer_state_dict are not of {plural(n_steps, 'update')}")
    if any(bool((moments["exp_avg_sq"] < 0).any()) for moments in saved["state"].values() if "exp_avg_sq" in moments):
        raise ValueError("second moments in optimizer_state_dict are negative")
    if groups != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
        raise ValueError("param_groups in optimizer_state_dict are of other parameters")


def then_and_now(saved: dict, cfg: TrainConfig) -> list[tuple[str, object, object]]:
    """(field, saved value, current value) of each field in which `cfg` differs from a checkpoint's config."""
    then = dataclasses.asdict(TrainConfig()) | saved  # fields it lacks are newer: they had their defaults
    return [(name, then[name], getattr(cfg, name)) for name in FIELDS if then[name] != getattr(cfg, name)]


def check_same_model(path: Path, saved: dict, cfg: TrainConfig) -> None:
    """UserError if `cfg` contradicts the weights and moments of the checkpoint `saved` in `path`."""
    problems = [f"{name} is {then!r} in {path} and {now!r} now: resume with --{name}={then}, or start another run with "
                f"--run_name=NAME" for name, then, now in then_and_now(saved["config"], cfg) if name in STATE_FIELDS]
    if problems:
        raise UserError(*problems)


def check_same_data(path: Path, saved: dict, dataset: str, fingerprint: str) -> None:
    """UserError if the checkpoint `saved` in `path` was trained on other data than `dataset` with this fingerprint."""
    if saved["data_fingerprint"] != fingerprint:
        raise UserError(f"the data set is not the one that {path} was trained on: {saved['config'].get('dataset')} "
                        f"(fingerprint {saved['data_fingerprint'][:12]}) then, {dataset} ({fingerprint[:12]}) now: "
                        f"resume with the same data, or start another run with --run_name=NAME")
