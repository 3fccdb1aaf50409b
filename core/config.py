"""Every knob of a training run: its type, default, range and one line of help.

Values come from three places, later ones winning: the defaults below, a config file of plain
assignments, `--field=value` on the command line. All problems are collected and reported together.
"""

import ast
import math
import os
import typing
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from lib.cli import UserError, describe, is_plain_name, is_valid, nearest, parse_text, read_flags
from model import KINDS

MAX_STEPS = 10**8  # checkpoint names have eight digits

Values = dict[str, object]  # unchecked {field: value} from a file or a command line
Problems = list[str]


def knob(default: object, help: str, **limits: object) -> typing.Any:  # noqa: ANN401  (a dataclass field's type)
    """A dataclass field with its help line and the values it may take: `choices`, or bounds (lib.cli.BOUNDS)."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run as requested. Lengths are in tokens, intervals in optimizer steps.

    None means derived from the data or other fields: `resolve` fills those in.
    """

    # data
    dataset: str = knob("pydoc", "pydoc, shakespeare, shakespeare_char, or one made by prepare_data.py")
    data_dir: str = knob("data", "directory of the data sets")
    stride: int | None = knob(None, "tokens between the starts of training windows; none: block_size", low=1)
    # model
    init_from: str | None = knob(None, "start from these weights and take their shape: gpt2, gpt2-medium, gpt2-large, "
                                       "gpt2-xl, a directory in Hugging Face's layout or a checkpoint, also nanoGPT's; "
                                       "none: random weights")
    n_layer: int = knob(4, "transformer blocks", low=1, below=10_000)
    n_head: int = knob(4, "attention heads", low=1, below=2**16)
    n_embd: int = knob(128, "width of the residual stream", low=1, below=2**17)
    block_size: int = knob(128, "context length", low=1, below=2**24)
    dropout: float = knob(0.0, "dropout probability", low=0, below=1)
    bias: bool = knob(True, "biases in linear layers and LayerNorm")
    norm: str = knob("layernorm", "normalization", choices=KINDS["norm"])
    mlp: str = knob("gelu", "feed-forward network", choices=KINDS["mlp"])
    pos: str = knob("learned", "positions", choices=KINDS["pos"])
    tie_weights: bool = knob(True, "share the token embedding with the output layer")
    qk_norm: bool = knob(False, "RMS-normalize each head's queries and keys")
    # length of the run
    max_iters: int | None = knob(None, "stop after this many optimizer steps", low=1, below=MAX_STEPS)
    epochs: float | None = knob(None, "stop after this many passes over the training windows (with max_iters: "
                                      "whichever ends first; with neither: one)", above=0)
    batch_size: int = knob(16, "sequences in one forward pass", low=1, below=2**20)
    gradient_accumulation_steps: int = knob(1, "forward passes in a step, divided among processes", low=1, below=2**20)
    # optimizer
    optimizer: str = knob("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest",
                          choices=("adamw", "muon"))
    learning_rate: float = knob(1e-3, "peak learning rate", low=0)
    min_lr: float | None = knob(None, "learning rate at the end of the decay; none: learning_rate / 10", low=0)
    warmup_iters: int = knob(100, "steps of linear warmup", low=0)
    lr_schedule: str = knob("cosine", "shape of the decay; wsd: constant, then linear",
                            choices=("cosine", "linear", "wsd"))
    lr_decay_iters: int | None = knob(None, "step at which the decay reaches min_lr; none: the run's last", low=1)
    decay_fraction: float = knob(0.2, "final fraction of lr_decay_iters over which wsd decays", above=0, below=1)
    weight_decay: float = knob(0.1, "weight decay, on matrices only", low=0)
    beta1: float = knob(0.9, "AdamW's first decay rate, Muon's momentum", low=0, below=1)
    beta2: float = knob(0.99, "AdamW's second decay rate", low=0, below=1)
    grad_clip: float = knob(1.0, "clip the gradient norm to this; 0: off", low=0)
    # evaluation, logging, checkpoints
    eval_interval: int = knob(250, "steps between evaluations", low=1)
    eval_tokens: int | None = knob(None, "evaluate on the first N validation tokens; none: all of them", low=2)
    patience: int = knob(0, "stop after N evaluations without a better loss; 0: never", low=0)
    sample_tokens: int = knob(200, "length of the sample written at each evaluation; 0: none", low=0, below=2**20)
    log_interval: int = knob(50, "steps between progress lines", low=1)
    checkpoint_interval: int = knob(250, "steps between checkpoints", low=1)
    keep_checkpoints: int = knob(2, "newest checkpoints to keep, in addition to the best", low=1)
    # run
    run_name: str | None = knob(None, "name under out_dir and log_dir; none: the config file's stem, or the data set")
    out_dir: str = knob("checkpoints", "directory for checkpoints")
    log_dir: str = knob("runs", "directory for TensorBoard events")
    resume: bool = knob(False, "continue from the run's newest checkpoint")
    seed: int = knob(1337, "seed for initialization, data order and dropout", low=0, below=2**32)
    # machine
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = knob("auto", "dtype of the forward pass",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = knob("auto", "torch.compile the model; auto: on CUDA", choices=("auto", "true", "false"))
    exact_sum: bool = knob(False, "sum gradients in fixed point: the same bits with any number of processes")
    activation_checkpointing: bool = knob(False, "compute each block's activations again in the backward pass instead "
                                                 "of keeping them: less memory, a third more time")

    @property
    def sequences(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def run_dir(self) -> Path:
        """The run's checkpoint directory."""
        return Path(self.out_dir) / self.run_name


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A TrainConfig with every length and rate filled in."""

    stride: int
    max_iters: int
    lr_decay_iters: int
    min_lr: float
    n_windows: int  # training windows in an epoch

    def epoch_of(self, step: int) -> int:
        """The epoch in which step `step` begins; both count from 0."""
        return step * self.sequences // self.n_windows


def steps_of_epochs(epochs: float, cfg: TrainConfig, n_windows: int) -> int:
    """Optimizer steps in `epochs` passes over n_windows windows, at most MAX_STEPS."""
    return math.ceil(min(epochs * n_windows / cfg.sequences, MAX_STEPS))


def resolve(cfg: TrainConfig, n_windows: int) -> ResolvedConfig:
    """Complete `cfg` for an epoch of `n_windows` training windows. UserError for a run of too many steps."""
    epochs = cfg.epochs if cfg.epochs or cfg.max_iters else 1
    limits = [cfg.max_iters, epochs and steps_of_epochs(epochs, cfg, n_windows)]
    max_iters = min(limit for limit in limits if limit)
    if max_iters >= MAX_STEPS:
        raise UserError(f"epochs={epochs} means {max_iters:,} steps; a run can have at most {MAX_STEPS - 1:,}")
    return ResolvedConfig(**asdict(cfg) | dict(
        max_iters=max_iters, stride=cfg.stride or cfg.block_size, n_windows=n_windows,
        lr_decay_iters=cfg.lr_decay_iters or max_iters,
        min_lr=cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr,
    ))


FIELDS = {f.name: f for f in fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)
# Fields fixed by the weights a run starts from.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "norm", "mlp", "pos", "tie_weights", "qk_norm")
# Conditions across fields: the fields, the test, the message when it fails.
CROSS_CHECKS = [
    (("n_embd", "n_head"), lambda c: c.n_embd % c.n_head == 0,
     "n_embd={n_embd} is not divisible by n_head={n_head}"),
    (("n_embd", "n_head", "pos"), lambda c: c.pos != "rope" or (c.n_embd // c.n_head) % 2 == 0,
     "pos=rope needs an even head size: n_embd={n_embd} / n_head={n_head} is odd"),
    (("n_embd", "pos"), lambda c: c.pos != "sinusoidal" or c.n_embd % 2 == 0,
     "pos=sinusoidal needs an even n_embd, not {n_embd}"),
    (("stride", "block_size"), lambda c: (c.stride or 1) <= c.block_size,
     "stride={stride} exceeds block_size={block_size}: tokens between the windows would never be trained on"),
    (("min_lr", "learning_rate"), lambda c: (c.min_lr or 0) <= c.learning_rate,
     "min_lr={min_lr} exceeds learning_rate={learning_rate}"),
    (("run_name",), lambda c: c.run_name is None or is_plain_name(c.run_name),
     "run_name={run_name!r} must be a plain directory name"),
    (("dataset",), lambda c: is_plain_name(c.dataset), "dataset={dataset!r} must be a plain directory name"),
    (("data_dir", "out_dir", "log_dir"), lambda c: (c.data_dir + c.out_dir + c.log_dir).isprintable(),
     "data_dir={data_dir!r}, out_dir={out_dir!r} and log_dir={log_dir!r} must be printable paths"),
    (("out_dir", "log_dir"), lambda c: os.path.abspath(c.out_dir) != os.path.abspath(c.log_dir),
     "out_dir and log_dir are both {out_dir}: choose two directories"),
    (("init_from",), lambda c: c.init_from is None or (c.init_from.isprintable() and c.init_from),
     "init_from={init_from!r} must be a name or a printable path"),
]


def kind_of(name: str) -> tuple[type, bool]:
    """(type, whether None is allowed) of a field."""
    kind, *none = typing.get_args(TYPES[name]) or (TYPES[name],)
    return kind, bool(none)


def check_value(name: str, value: object) -> tuple[object, str | None]:
    """(value as the field's type, None), or (None, the problem)."""
    kind, optional = kind_of(name)
    limits = FIELDS[name].metadata["limits"]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None and optional:
        return None, None
    if kind is str and type(value) is bool:
        value = str(value).lower()  # compile = True in a config file
    if kind is float and type(value) is int:
        value = float(value)
    if is_valid(value, kind, **limits):
        return value, None
    return None, f"{name} must be {describe(kind, **limits)}{' or none' if optional else ''}, not {value!r}"


def parse_flag(name: str, text: str) -> object:
    """`text` parsed as the field's type, or unchanged if it cannot be."""
    kind, optional = kind_of(name)
    if optional and text.lower() == "none":
        return None
    return text.lower() if "choices" in FIELDS[name].metadata["limits"] else parse_text(kind, text)


def read_config_file(path: str | Path) -> tuple[Values, Problems]:
    """The values in a config file: `name = value` lines, which are never executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        named = Path("configs", Path(path).stem + ".py")
        hint = f" (did you mean {named}?)" if os.path.exists(named) and not os.path.exists(path) else ""
        return {}, [f"cannot read config file {path}: {error.strerror}{hint}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {}, [f"{path} is not a config file of `name = value` lines: {error}"]
    values, problems = {}, []
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            problems.append(f"{where}: a config file has `name = value` lines only")
            continue
        name = statement.targets[0].id
        if name not in FIELDS:
            problems.append(f"{where}: unknown field {name}{nearest(name, FIELDS)}")
            continue
        if name in values:
            problems.append(f"{where}: {name} is set a second time")
        try:
            values[name] = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError):
            problems.append(f"{where}: {name} must be a plain value: a number, a string, True, False or None")
    return values, problems


def read_command_line(argv: Sequence[str]) -> tuple[str | None, Values, Problems]:
    """(config file or None, values, problems) of `[CONFIG.py] [--field=value …]`."""
    paths, texts, problems = read_flags(argv, FIELDS, [name for name in FIELDS if kind_of(name)[0] is bool])
    problems += [f"unexpected argument {path!r}: flags begin with two dashes" for path in paths if path.startswith("-")]
    paths = [path for path in paths if not path.startswith("-")]
    problems += [f"unexpected argument {path!r}: the config file is already {paths[0]}" for path in paths[1:]]
    return (paths or [None])[0], {name: parse_flag(name, text) for name, text in texts.items()}, problems


def read_values(argv: Sequence[str]) -> tuple[Values, Problems]:
    """The command line's values, overriding those of its config file."""
    path, values, problems = read_command_line(argv)
    all_values, more = file_values(path, values)
    if all_values.get("run_name") is None:
        all_values["run_name"] = default_run_name(path, all_values)
    return all_values, problems + more


def file_values(path: str | Path | None, overrides: Values) -> tuple[Values, Problems]:
    """A config file's values, updated by `overrides`."""
    values, problems = ({}, []) if path is None else read_config_file(path)
    problems += [f"unknown field {name}{nearest(name, FIELDS)}" for name in overrides if name not in FIELDS]
    return values | {name: value for name, value in overrides.items() if name in FIELDS}, problems


def default_run_name(path: str | Path | None, values: Values) -> object:
    """The config file's stem, or the data set's name."""
    return values.get("dataset", TrainConfig.dataset) if path is None else Path(path).stem


def build_config(values: Values, unknown: Collection[str] = ()) -> tuple[TrainConfig, Problems]:
    """The TrainConfig of `values`; invalid fields keep their default, and checks of `unknown` fields are skipped."""
    checked = {name: check_value(name, value) for name, value in values.items()}
    problems = [problem for _, problem in checked.values() if problem]
    cfg = TrainConfig(**{name: value for name, (value, problem) in checked.items() if not problem})
    unknown = {*unknown, *(name for name, (_, problem) in checked.items() if problem)}
    problems += [message.format(**asdict(cfg)) for names, holds, message in CROSS_CHECKS
                 if not unknown & set(names) and not holds(cfg)]
    return cfg, problems
