"""Every knob of a training run: its type, default, range and one line of help.

A config comes from three places, later ones winning: the defaults below, a config file of plain
assignments, `--field=value` on the command line. All problems are collected and reported together.
"""

import argparse
import ast
import difflib
import math
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

MOST_STEPS = 10**8  # checkpoint names have eight digits


def knob(default, help, *, low=None, above=None, high=None, below=None, choices=None):
    """A dataclass field with its help line and the values it may take: low <= value <= high, above < value < below."""
    limits = {"low": low, "above": above, "high": high, "below": below, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Lengths are in tokens, intervals in optimizer steps."""

    # data
    dataset: str = knob("pydoc", "pydoc, shakespeare, shakespeare_char, or one made by prepare_data.py")
    data_dir: str = knob("data", "where data sets lie")
    stride: int | None = knob(None, "tokens from one training window's start to the next; none: block_size", low=1)
    # model
    init_from: str | None = knob(None, "start from these weights, whose shape is taken: gpt2, gpt2-medium, gpt2-large, "
                                       "gpt2-xl or a folder in Hugging Face's layout; none: random ones")
    n_layer: int = knob(4, "transformer blocks", low=1, below=10_000)
    n_head: int = knob(4, "attention heads", low=1, below=2**16)
    n_embd: int = knob(128, "width of the residual stream", low=1, below=2**17)
    block_size: int = knob(128, "context length", low=1, below=2**24)
    dropout: float = knob(0.0, "dropout probability", low=0, below=1)
    bias: bool = knob(True, "biases in linear layers and LayerNorm")
    norm: str = knob("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    mlp: str = knob("gelu", "feed-forward network", choices=("gelu", "swiglu", "relu2"))
    pos: str = knob("learned", "positions", choices=("learned", "sinusoidal", "rope"))
    tie_weights: bool = knob(True, "share the token embedding with the output layer")
    # length of the run
    max_iters: int | None = knob(None, "stop after this many optimizer steps", low=1, below=MOST_STEPS)
    epochs: float | None = knob(None, "stop after this many passes over the training windows (with max_iters: "
                                      "whichever ends first; with neither: one)", above=0)
    batch_size: int = knob(16, "sequences in one forward pass", low=1, below=2**20)
    gradient_accumulation_steps: int = knob(1, "forward passes in one optimizer step", low=1, below=2**20)
    # optimizer
    optimizer: str = knob("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest",
                          choices=("adamw", "muon"))
    learning_rate: float = knob(1e-3, "peak learning rate", low=0)
    min_lr: float | None = knob(None, "learning rate at the end of the decay; none: learning_rate / 10", low=0)
    warmup_iters: int = knob(100, "steps of linear warmup", low=0)
    lr_schedule: str = knob("cosine", "the decay's form; wsd: constant, then linear",
                            choices=("cosine", "linear", "wsd"))
    lr_decay_iters: int | None = knob(None, "step at which the decay reaches min_lr; none: the run's last", low=1)
    decay_fraction: float = knob(0.2, "part of lr_decay_iters in which wsd decays, its last", above=0, below=1)
    weight_decay: float = knob(0.1, "weight decay, on matrices only", low=0)
    beta1: float = knob(0.9, "AdamW's first decay rate, Muon's momentum", low=0, below=1)
    beta2: float = knob(0.99, "AdamW's second decay rate", low=0, below=1)
    grad_clip: float = knob(1.0, "largest gradient norm; 0: no clipping", low=0)
    # evaluation, logging, checkpoints
    eval_interval: int = knob(250, "steps from one evaluation to the next", low=1)
    eval_tokens: int | None = knob(None, "evaluate on the first so many validation tokens; none: on all", low=2)
    patience: int = knob(0, "stop after so many evaluations without a better loss; 0: never", low=0)
    sample_tokens: int = knob(200, "length of the sample written at each evaluation; 0: none", low=0, below=2**20)
    log_interval: int = knob(50, "steps from one progress line to the next", low=1)
    checkpoint_interval: int = knob(250, "steps from one checkpoint to the next", low=1)
    keep_checkpoints: int = knob(2, "newest checkpoints kept, beside the best", low=1)
    # run
    run_name: str | None = knob(None, "name under out_dir and log_dir; none: the config file's stem")
    out_dir: str = knob("checkpoints", "where runs keep their checkpoints")
    log_dir: str = knob("runs", "where runs keep their TensorBoard events")
    resume: bool = knob(False, "go on from the run's newest checkpoint")
    seed: int = knob(1337, "seed of initialisation, data order and dropout", low=0, below=2**32)
    # machine
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = knob("auto", "number format of the forward pass",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = knob("auto", "torch.compile the model; auto: on CUDA", choices=("auto", "true", "false"))


FIELDS = {f.name: f for f in fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)
# What the weights of init_from decide.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "norm", "mlp", "pos", "tie_weights")
# Conditions on several fields: the fields, the test, what is wrong when it fails.
CROSS_CHECKS = [
    (("n_embd", "n_head"), lambda c: c.n_embd % c.n_head == 0,
     "n_embd={n_embd} is not divisible by n_head={n_head}"),
    (("n_embd", "n_head", "pos"), lambda c: c.pos != "rope" or (c.n_embd // c.n_head) % 2 == 0,
     "pos=rope needs an even head size: n_embd={n_embd} / n_head={n_head} is odd"),
    (("n_embd", "pos"), lambda c: c.pos != "sinusoidal" or c.n_embd % 2 == 0,
     "pos=sinusoidal needs an even n_embd, not {n_embd}"),
    (("stride", "block_size"), lambda c: (c.stride or 1) <= c.block_size,
     "stride={stride} is over block_size={block_size}: tokens between the windows would never be trained on"),
    (("min_lr", "learning_rate"), lambda c: (c.min_lr or 0) <= c.learning_rate,
     "min_lr={min_lr} is over learning_rate={learning_rate}"),
    (("run_name",), lambda c: c.run_name is None or is_plain_name(c.run_name),
     "run_name={run_name!r} must be a plain directory name"),
    (("dataset",), lambda c: is_plain_name(c.dataset), "dataset={dataset!r} must be a plain directory name"),
    (("data_dir", "out_dir", "log_dir"), lambda c: (c.data_dir + c.out_dir + c.log_dir).isprintable(),
     "data_dir={data_dir!r}, out_dir={out_dir!r} and log_dir={log_dir!r} must be printable paths"),
    (("init_from",), lambda c: c.init_from is None or (c.init_from.isprintable() and c.init_from),
     "init_from={init_from!r} must be a name or a printable path"),
]


def is_plain_name(name):
    """Whether `name` can be one directory's name: no separators, not hidden, printable, not too long."""
    return name == Path(name).name and not name.startswith(".") and name.isprintable() and 0 < len(name.encode()) < 200


def nearest(name, names):
    """' (did you mean X?)' for the closest of `names`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def kind_of(name):
    """(type, whether None is allowed) of a field."""
    kind, *none = typing.get_args(TYPES[name]) or (TYPES[name],)
    return kind, bool(none)


def check_value(name, value):
    """Return (value in the field's type, None) or (None, what is wrong)."""
    kind, optional = kind_of(name)
    limits = FIELDS[name].metadata
    if value is None and optional:
        return None, None
    if kind is str and type(value) is bool:
        value = str(value).lower()  # compile = True in a config file
    if kind is float and type(value) is int:
        value = float(value)
    if fits(value, kind, limits):
        return value, None
    return None, f"{name} must be {describe(kind, limits)}{' or none' if optional else ''}, not {value!r}"


def fits(value, kind, limits):
    """Whether `value` is of type `kind`, finite, and within the limits."""
    return type(value) is kind and (kind is not float or math.isfinite(value)) and all((
        kind is not int or abs(value) <= 2**32,
        limits["low"] is None or value >= limits["low"],
        limits["above"] is None or value > limits["above"],
        limits["high"] is None or value <= limits["high"],
        limits["below"] is None or value < limits["below"],
        limits["choices"] is None or value in limits["choices"],
    ))


def parse_text(kind, text):
    """The int, float or bool that `text` spells, or `text` itself where it spells none."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        return text


def parse_flag(name, text):
    """The value that `text` means for a field, or `text` itself where it means none."""
    kind, optional = kind_of(name)
    if optional and text.lower() == "none":
        return None
    return text.lower() if FIELDS[name].metadata["choices"] else parse_text(kind, text)


def describe(kind, limits):
    """What a field takes, in words: 'an int >= 1', 'one of gelu, swiglu'."""
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    words = {int: "an int", float: "a finite float", str: "text", bool: "true or false"}[kind]
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    bounds = [f"{sign} {limits[key]}" for key, sign in signs.items() if limits[key] is not None]
    return " ".join([words, " and ".join(bounds)]).strip()


def number(kind, **bounds):
    """An argparse `type` for an int or float within bounds (those of `knob`)."""
    limits = dict.fromkeys(("low", "above", "high", "below", "choices")) | bounds

    def parse(text):
        value = parse_text(kind, text)
        if not fits(value, kind, limits):
            raise argparse.ArgumentTypeError(f"must be {describe(kind, limits)}, not {text!r}")
        return value

    return parse


def read_config_file(path):
    """Return (values, problems) of a config file: `name = value` lines, which are never executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"cannot read config file {path}: {error.strerror}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {}, [f"{path} is not a config file of `name = value` lines: {error}"]
    values, problems = {}, []
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            problems.append(f"{where}: only `name = value` lines are understood")
            continue
        name = statement.targets[0].id
        if name not in FIELDS:
            problems.append(f"{where}: unknown field {name}{nearest(name, FIELDS)}")
            continue
        try:
            values[name] = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError):
            problems.append(f"{where}: {name} must be given as a plain value: a number, text, True, False or None")
    return values, problems


def read_command_line(argv):
    """Return (config file or None, values, problems) of `[CONFIG.py] [--field=value …]`."""
    path, values, problems = None, {}, []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            if path is not None:
                problems.append(f"unexpected argument {token!r}: a config file was named already ({path})")
            path = path or token
            continue
        name, equals, value = token[2:].partition("=")
        if name not in FIELDS:
            problems.append(f"unknown flag --{name}{nearest(name, FIELDS)}")
        is_switch = kind_of(name)[0] is bool if name in FIELDS else False
        follows = tokens and (tokens[0].lower() in ("true", "false") if is_switch else not tokens[0].startswith("--"))
        if not equals and follows:
            equals, value = True, tokens.pop(0)
        elif not equals and is_switch:
            equals, value = True, "true"
        if name in FIELDS and equals:
            values[name] = parse_flag(name, value)
        elif name in FIELDS:
            problems.append(f"--{name} needs a value")
    return path, values, problems


def build_config(values, unsure=()):
    """Return (TrainConfig, problems) from {field: value}; a field with a problem keeps its default.

    Conditions on fields that are `unsure` are not looked at.
    """
    good, problems = {}, []
    for name, value in values.items():
        good[name], problem = check_value(name, value)
        if problem:
            del good[name]
            problems.append(problem)
    bad = set(values) - set(good) | set(unsure)
    cfg = TrainConfig(**good)
    for names, holds, message in CROSS_CHECKS:
        if not bad & set(names) and not holds(cfg):
            problems.append(message.format(**asdict(cfg)))
    return cfg, problems


def conflicts(values, shape, init_from):
    """Problems of the given {field: value} with the shape of the weights, {field: value}: a shorter context fits."""
    problems = []
    for name, of_weights in shape.items():
        value, wrong_type = check_value(name, values.get(name, of_weights))
        if not wrong_type and (value > of_weights if name == "block_size" else value != of_weights):
            problems.append(f"{name}={value} does not fit the weights of init_from={init_from}, which have "
                            f"{name}={of_weights}: leave {name} out")
    return problems


def load_config(path=None, overrides=None, shape_of=None):
    """Return (TrainConfig, problems) from a config file (or None) and {field: value} on top of it.

    `shape_of(cfg) -> ({field of SHAPE: value}, problems)` finds the shape of the weights that a cfg with
    init_from starts from; it fills the fields that are not given.
    """
    values, problems = read_config_file(path) if path else ({}, [])
    values |= overrides or {}
    if values.get("run_name") is None:
        values["run_name"] = Path(path).stem if path else values.get("dataset", TrainConfig.dataset)
    cfg, more = build_config(values, unsure=SHAPE if values.get("init_from") else ())
    if cfg.init_from and shape_of:
        shape, unfit = shape_of(cfg)
        cfg, more = build_config(shape | values, unsure=() if shape else SHAPE)
        more += conflicts(values, shape, cfg.init_from) + unfit
    return cfg, problems + more


def config_from_argv(argv, shape_of=None):
    """Return (TrainConfig, problems) from a command line; `shape_of` as in load_config."""
    path, values, problems = read_command_line(argv)
    cfg, more = load_config(path, values, shape_of)
    return cfg, problems + more


def help_text():
    """Every field with its type, default and help, as `--help` prints it."""
    lines = ["usage: python train_gpt2.py [CONFIG.py] [--field=value ...] [--resume]", "",
             "Train a GPT. A config file sets fields by plain assignments; flags win over it.", ""]
    for name, f in FIELDS.items():
        kind = TYPES[name].__name__ if isinstance(TYPES[name], type) else str(TYPES[name]).replace(" | None", "")
        choices = f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
        default = "none" if f.default is None else f.default
        lines.append(f"  --{name:<28} {f.metadata['help']}{choices} ({kind}, default {default})")
    return "\n".join(lines)
