"""Every refusal that needs data, checkpoints or the machine: all at once, before anything is downloaded or made."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from core import pretrained
from core.checkpoint import refuse_to_overwrite
from core.config import SHAPE, Problems, TrainConfig, Values, build_config, check_value
from core.corpus import CORPORA, fingerprint_of, read_meta
from core.runs import is_restart, peek
from core.schema import STATE_FIELDS, check_same_data, check_same_model
from core.tokenizer import tokenizer_from_state
from lib.cli import UserError, nearest, plural
from lib.device import choose_device, choose_dtype, dtype_name, total_memory
from lib.distributed import ALONE, Processes
from lib.files import reason
from model import LARGE_VOCABULARY


@contextmanager
def collected(problems: Problems, where: str) -> Iterator[None]:
    """Append a UserError's problems, or a path error prefixed by `where`, to `problems` instead of raising."""
    try:
        yield
    except UserError as error:
        problems += error.problems
    except (OSError, ValueError) as error:
        problems.append(f"{where}: {reason(error)}")


def check_run(values: Values, problems: Problems, processes: Processes = ALONE, plans: bool = False) -> TrainConfig:
    """The config of `values` for `processes`, with its device, dtype and compilation chosen.

    The weights it starts from (its checkpoint's, or those of init_from) supply the shape fields that `values` omit.
    UserError with `problems` and every further one that can be found now; a run that is only planned may not fit in
    memory, and have the directory of another.
    """
    problems = list(problems)
    draft, _ = build_config(values)  # locates those weights; invalid fields have their defaults
    if draft.run_name and is_restart(draft.run_dir, processes.launch):
        values = values | {"resume": True}
        draft = dataclasses.replace(draft, resume=True)
    path = saved = weights = None
    with collected(problems, f"out_dir={draft.out_dir}"):
        if draft.run_name and draft.resume:  # an invalid run_name is reported below
            path, saved = peek(draft.run_dir)
        elif draft.run_name and not plans:
            refuse_to_overwrite(draft.run_dir)
    for name, directory in (("out_dir", draft.out_dir), ("log_dir", draft.log_dir), ("data_dir", draft.data_dir)):
        with collected(problems, f"{name}={directory}"):
            check_directory(name, Path(directory))
    with collected(problems, f"init_from={draft.init_from}"):
        if draft.init_from and not saved:
            weights = pretrained.find(draft.init_from, draft.data_dir)
    shape = vars(weights.config) if weights else saved["config"] if saved else {}
    names = STATE_FIELDS if saved else SHAPE
    shape = {name: shape[name] for name in names if name in shape and not check_value(name, shape[name])[1]}
    cfg, invalid = build_config(shape | values, unknown=SHAPE if draft.init_from and not shape else ())
    problems += invalid
    with collected(problems, "resume"):
        if saved:
            check_same_model(path, saved, cfg)
    if weights:
        problems += shape_conflicts(values, shape, draft.init_from)
    with collected(problems, f"data_dir={cfg.data_dir}"):
        check_data(cfg, path, saved, weights)
    problems += division_problems(cfg, processes.size)
    with collected(problems, f"device={cfg.device}"):
        cfg = dataclasses.replace(cfg, **choose_machine(cfg))
        if not plans:
            check_memory(cfg)
    if problems:
        raise UserError(*dict.fromkeys(problems))  # a damaged data set is found twice
    return cfg


def division_problems(cfg: TrainConfig, n_processes: int) -> Problems:
    """Why n_processes cannot share the work of a run, if they cannot."""
    problems, n = [], cfg.gradient_accumulation_steps
    if n % n_processes:
        divisors = [str(d) for d in range(1, min(n, 1024) + 1) if n % d == 0]
        problems.append(f"gradient_accumulation_steps={n} cannot be divided among {n_processes} processes: set it to a "
                        f"multiple of {n_processes}, or start {' or '.join(divisors)}")
    if n_processes > 1 and (cfg.device == "mps" or cfg.device.startswith("cuda:")):
        problems.append(f"device={cfg.device} is one device, and there are {n_processes} processes: use cuda or cpu")
    return problems


def check_directory(name: str, directory: Path) -> None:
    """UserError if `directory` neither is a directory nor can become one."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{name}={directory}: {existing} is not a directory")


def choose_machine(cfg: TrainConfig) -> dict[str, str]:
    """Device, dtype and whether to compile. UserError for what this machine does not have."""
    device = choose_device(cfg.device)
    wanted = {"auto": str(device.type == "cuda").lower()}.get(cfg.compile, cfg.compile)
    return {"device": str(device), "dtype": dtype_name(choose_dtype(cfg.dtype, device)), "compile": wanted}


def check_memory(cfg: TrainConfig) -> None:
    """UserError if a training step cannot fit in the device's memory, by about half of what it really takes."""
    available = total_memory(torch.device(cfg.device))
    n_tokens, vocab_size = cfg.batch_size * cfg.block_size, known_vocab_size(cfg)
    # Kept for each layer's backward pass: q, k, v, attention's and c_fc's outputs, the residual stream twice.
    activations = n_tokens * cfg.n_layer * 10 * cfg.n_embd * (4 if cfg.dtype == "float32" else 2)
    logits = n_tokens * vocab_size * 12 if vocab_size < LARGE_VOCABULARY else 0  # float32, softmax and gradient
    for what, needed, lower in (
        ("weights, gradients and moments", cfg.n_layer * 12 * cfg.n_embd**2 * 12, "n_layer or n_embd"),
        (f"activations and logits of {cfg.batch_size} x {cfg.block_size} tokens", activations + logits,
         "batch_size (and raise gradient_accumulation_steps by the same factor) or block_size"),
        (f"indices of {cfg.sequences:,} sequences a step", 32 * cfg.sequences, "gradient_accumulation_steps"),
    ):
        if available and needed > available:
            raise UserError(f"{what} take more than {needed >> 30:,} GiB, and {cfg.device} has {available >> 30:,} GiB "
                            f"of memory: lower {lower}")


def known_vocab_size(cfg: TrainConfig) -> int:
    """The size of cfg.dataset's vocabulary, 0 as long as it is not prepared."""
    directory = Path(cfg.data_dir) / cfg.dataset
    return read_meta(directory)["vocab_size"] if (directory / "meta.json").exists() else 0


def shape_conflicts(values: Values, shape: dict, init_from: str) -> Problems:
    """The `values` that contradict the weights' shape; a shorter context is allowed."""
    problems = []
    for name, of_weights in shape.items():
        value, invalid = check_value(name, values.get(name, of_weights))
        if not invalid and (value > of_weights if name == "block_size" else value != of_weights):
            problems.append(f"{name}={value} does not fit the weights of init_from={init_from}, which have "
                            f"{name}={of_weights}: leave {name} out")
    return problems


def check_data(cfg: TrainConfig, path: Path | None, saved: dict | None,
               weights: pretrained.Pretrained | None) -> None:
    """UserError if cfg.dataset is unknown or damaged, or does not fit cfg, the checkpoint or the weights."""
    directory = Path(cfg.data_dir) / cfg.dataset
    if (directory / "meta.json").exists():
        meta = read_meta(directory)
        kind, vocab_size = meta["tokenizer"].get("kind"), meta["vocab_size"]
        check_length(cfg, meta["splits"]["train"]["tokens"])
        if saved:
            check_same_data(path, saved, cfg.dataset, fingerprint_of(meta))
    elif cfg.dataset in CORPORA:
        kind, vocab_size = CORPORA[cfg.dataset][1], None  # known once it is prepared
        if saved and saved["config"].get("dataset") != cfg.dataset:
            check_same_data(path, saved, cfg.dataset, "not prepared")
    else:
        known = sorted({*CORPORA, *(meta.parent.name for meta in Path(cfg.data_dir).glob("*/meta.json"))})
        raise UserError(f"unknown dataset {cfg.dataset}{nearest(cfg.dataset, known)}: there are {', '.join(known)}; "
                        f"prepare_data.py creates others")
    if weights and (kind != weights.tokenizer_kind or vocab_size not in (None, weights.config.vocab_size)):
        raise UserError(pretrained.vocabulary_message(cfg, weights))
    if weights and kind == "char" and vocab_size:  # GPT-2's may have to be downloaded first
        tokenizer = tokenizer_from_state(meta["tokenizer"], directory / "meta.json")
        pretrained.check_vocabulary(cfg, weights, tokenizer)


def check_length(cfg: TrainConfig, n_tokens: int) -> None:
    """UserError if a training split of `n_tokens` tokens does not fill one window."""
    if n_tokens <= cfg.block_size:
        raise UserError(f"block_size={cfg.block_size} is too long for the data: {cfg.dataset} has "
                        f"{plural(n_tokens, 'training token')}, and a window needs {cfg.block_size + 1}")
