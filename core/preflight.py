"""Every refusal that needs data, checkpoints or the machine: all at once, before anything is downloaded or made."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core import huggingface
from core.checkpoint import STATE_FIELDS, check_same_data, peek, refuse_to_overwrite, then_and_now
from core.config import SHAPE, Problems, TrainConfig, Values, build_config, check_value
from core.corpus import CORPORA, fingerprint_of, read_meta
from lib.cli import UserError, nearest
from lib.device import choose_device, choose_dtype, dtype_name
from lib.files import reason


@contextmanager
def collected(problems: Problems, where: str) -> Iterator[None]:
    """Append a UserError's problems, or a path error prefixed by `where`, to `problems` instead of raising."""
    try:
        yield
    except UserError as error:
        problems += error.problems
    except (OSError, ValueError) as error:
        problems.append(f"{where}: {reason(error)}")


def check_run(values: Values, problems: Problems) -> TrainConfig:
    """The config of `values`, with its device, dtype and compilation chosen.

    The weights it starts from (its checkpoint's, or those of init_from) supply the shape fields that `values` omit.
    UserError with `problems` and every further one that can be found now.
    """
    problems = list(problems)
    draft, _ = build_config(values)  # locates those weights; invalid fields have their defaults
    path = saved = weights = None
    with collected(problems, f"out_dir={draft.out_dir}"):
        if draft.run_name and draft.resume:  # an invalid run_name is reported below
            path, saved = peek(draft.run_dir)
        elif draft.run_name:
            refuse_to_overwrite(draft.run_dir)
    for name, directory in (("out_dir", draft.out_dir), ("log_dir", draft.log_dir), ("data_dir", draft.data_dir)):
        with collected(problems, f"{name}={directory}"):
            check_directory(name, Path(directory))
    with collected(problems, f"init_from={draft.init_from}"):
        if draft.init_from and not saved:
            weights = huggingface.find(draft.init_from, draft.data_dir)
    shape = vars(weights.config) if weights else saved["config"] if saved else {}
    names = STATE_FIELDS if saved else SHAPE
    shape = {name: shape[name] for name in names if name in shape and not check_value(name, shape[name])[1]}
    cfg, invalid = build_config(shape | values, unknown=SHAPE if draft.init_from and not shape else ())
    problems += invalid
    if saved:
        problems += state_changes(saved["config"], cfg, path)
    if weights:
        problems += shape_conflicts(values, shape, draft.init_from)
    with collected(problems, f"data_dir={cfg.data_dir}"):
        check_data(cfg, path, saved, weights)
    machine = {}
    with collected(problems, f"device={cfg.device}"):
        machine = choose_machine(cfg)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return dataclasses.replace(cfg, **machine)


def check_directory(name: str, directory: Path) -> None:
    """UserError if `directory` neither is a directory nor can become one."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{name}={directory}: {existing} is not a directory")


def choose_machine(cfg: TrainConfig) -> dict[str, str]:
    """Device, dtype and whether to compile. UserError for what this machine does not have."""
    device = choose_device(cfg.device)
    wanted = {"auto": str(device.type == "cuda").lower()}.get(cfg.compile, cfg.compile)
    return {"device": str(device), "dtype": dtype_name(choose_dtype(cfg.dtype, device)), "compile": wanted}


def state_changes(saved: dict, cfg: TrainConfig, path: Path) -> Problems:
    """Fields in which `cfg` contradicts the weights and moments saved in `path`."""
    return [f"{name} is {then!r} in {path} and {now!r} now: resume with --{name}={then}, or start another run with "
            f"--run_name=NAME" for name, then, now in then_and_now(saved, cfg) if name in STATE_FIELDS]


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
               weights: huggingface.Pretrained | None) -> None:
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
        raise UserError(vocabulary_message(cfg, weights))


def check_length(cfg: TrainConfig, n_tokens: int) -> None:
    """UserError if a training split of `n_tokens` tokens does not fill one window."""
    if n_tokens <= cfg.block_size:
        raise UserError(f"block_size={cfg.block_size} is too long for the data: {cfg.dataset} has {n_tokens} training "
                        f"tokens, and a window needs {cfg.block_size + 1}")


def vocabulary_message(cfg: TrainConfig, weights: huggingface.Pretrained) -> str:
    """The message when cfg.dataset's vocabulary differs from the weights'."""
    hint = "; shakespeare has it, and so does any data set prepared with prepare_data.py --tokenizer gpt2"
    return (f"dataset={cfg.dataset} does not have the vocabulary of init_from={cfg.init_from} "
            f"({weights.tokenizer_kind}, {weights.config.vocab_size:,} symbols): choose another data set"
            f"{hint if weights.tokenizer_kind == 'gpt2' else ''}")
