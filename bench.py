"""Time training steps, text generation and tokenization, alone or side by side with another model class.

    python bench.py configs/nanogpt_char_cpu.py
    python bench.py gpt2 --batch_size=32 --json
    python bench.py configs/nanogpt_char_cpu.py --peer ../nanoGPT/model.py
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from core.config import (
    MAX_STEPS,
    Problems,
    ResolvedConfig,
    Values,
    default_run_name,
    file_values,
    read_command_line,
    resolve,
)
from core.corpus import SPLITS, Corpus, open_corpus, write_corpus
from core.dataset import Batch, TokenDataset, batches
from core.inference import generate, make_cache, prepare_for_inference
from core.preflight import check_length, check_run
from core.report import out_of_memory_message
from core.tokenizer import CharTokenizer
from core.trainer import Diverged, Trainer
from lib.cli import UserError, json_line, nearest, number, plural, run_script
from lib.device import (
    Mark,
    autocast,
    device_name,
    dtype_name,
    mark,
    out_of_memory_as,
    peak_flops,
    seconds_between,
    send,
    synchronize,
)
from model import GPT2_SIZES

Spread = dict[str, float]  # median, low and high: the quartiles
PHASES = ("data", "forward", "backward", "optimizer")
GPT2_VOCABULARY = 50257
RANDOM_TOKENS = 2_000_000
SECONDS_A_TURN = 0.3  # long enough that a short step finds its own weights in the caches again
UNUSED_FIELDS = ("max_iters", "epochs", "resume", "data_dir", "out_dir", "log_dir")  # no matter for a step's time
REPEATS = 5  # of decoding and of tokenizing, after one that is not counted

HELP = f"""
{__doc__}
This times training's own step, on the config's data. A GPT-2 size ({", ".join(GPT2_SIZES)}) trains on
random tokens unless --dataset names a data set. Every flag of train_gpt2.py works (see its --help), but max_iters,
epochs, resume, out_dir and log_dir change nothing here: no file is kept.

data: waiting for a batch and sending it to the device. optimizer: everything after the last backward pass: clipping,
the update, the check for finite values. MFU: FLOP/s of the step (6 per parameter and token, plus attention's) over
the device's bf16 peak from its data sheet, or on a CPU over the fastest 2048 x 2048 matrix product in the step's
dtype, measured on the spot; n/a for a card without a known peak. Bandwidth in decoding: bytes of weights, keys and
values read for each token over the speed at which the device sums a large tensor. Results are medians (lower to upper
quartile).
"""


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles of some numbers."""
    low, median, high = np.percentile(list(values), (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}


def rates(amount: float, seconds: list[float]) -> Spread | None:
    """The spread of amount / seconds over repeats that took `seconds`; None for none."""
    if not seconds:
        return None
    times = spread(seconds)
    return {"median": amount / times["median"], "low": amount / times["high"], "high": amount / times["low"]}


class Contender:
    """A model and the training step that is timed, `step(batch)` for each of `batches`.

    Subclasses set model, dtype, compiled, generates, n_params, flops_per_token, and call forward through `timed`.
    """

    def __init__(self, device: torch.device, batches: Iterable[Batch]) -> None:
        self.device, self.batches = device, iter(batches)
        self.marks: list[tuple[str | None, Mark]] = []  # (phase that ended, when), from one step's start to its end
        self.turns: list[list[dict[str, float]]] = []  # for each turn, its steps: {phase: seconds}
        self.decode_seconds: list[float] = []
        self.peak_memory: int | None = None  # bytes

    def mark(self, phase: str | None) -> None:
        if self.device.type == "mps":
            synchronize(self.device)
        self.marks.append((phase, mark(self.device)))

    def timed(self, forward: Callable) -> Callable:
        """`forward(x, y) -> (logits, loss)` that marks its start, its end, and the end of its backward pass."""
        def backward_starts(gradient: Tensor) -> None:
            # The autograd engine calls this when the whole backward pass is done.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.mark("backward"))

        def call(x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
            self.mark("data")
            logits, loss = forward(x, y)
            self.mark("forward")
            loss.register_hook(backward_starts)
            return logits, loss

        return call

    def run_steps(self, n: int) -> list[dict[str, float]]:
        """Do n training steps; {phase: seconds} of each."""
        synchronize(self.device)
        steps = []
        for _ in range(n):
            self.marks = []
            self.mark(None)
            self.step(next(self.batches))
            self.mark("optimizer")
            steps.append(self.marks)
        return [seconds_of_phases(marks) for marks in steps]

    def decode(self, n_tokens: int) -> float:
        """Seconds to generate n_tokens tokens from one."""
        synchronize(self.device)
        start = time.perf_counter()
        self.generate(torch.zeros((1, 1), dtype=torch.int64, device=self.device), n_tokens)
        synchronize(self.device)
        return time.perf_counter() - start

    def bytes_per_token(self, n_tokens: int) -> int | None:
        """What decoding one of the first n_tokens tokens reads at least: weights, and keys and values up to it."""
        return None


class Ours(Contender):
    """A Trainer's model and step."""

    def __init__(self, trainer: Trainer, batches: Iterable[Batch]) -> None:
        super().__init__(trainer.device, batches)
        self.trainer, self.model, self.dtype = trainer, trainer.model, trainer.dtype
        self.compiled, self.generates = trainer.forward is not trainer.model, True
        self.n_params, self.flops_per_token = trainer.model.n_params(), trainer.model.flops_per_token()
        trainer.forward = self.timed(trainer.forward)

    def step(self, batch: Batch) -> None:
        self.trainer.step(batch)

    @functools.cached_property
    def decoder(self) -> torch.nn.Module:
        """The model as sample.py generates with it."""
        return prepare_for_inference(copy.deepcopy(self.model), self.device, self.dtype)

    def generate(self, idx: Tensor, n_tokens: int) -> None:
        generate(self.decoder, idx, n_tokens, temperature=0.8, top_k=200)

    def bytes_per_token(self, n_tokens: int) -> int:
        config, cache = self.model.config, make_cache(self.decoder, rows=1)
        of_embedding = 0 if config.tie_weights else self.model.transformer.wte.weight.numel()
        n_positions = config.block_size if self.device.type == "cuda" else min(n_tokens, config.block_size) / 2
        of_position = 2 * config.n_layer * config.n_embd * cache.keys.element_size()
        return int((self.n_params - of_embedding) * self.dtype.itemsize + n_positions * of_position)


class Peer(Contender):
    """A model class with nanoGPT's constructor, trained as nanoGPT's script does, on the batches that we train on."""

    def __init__(self, module: ModuleType, path: str, trainer: Trainer, batches: Iterable[Batch],
                 compiled: bool) -> None:
        super().__init__(trainer.device, batches)
        self.cfg = cfg = trainer.cfg
        self.dtype, self.compiled = trainer.dtype if trainer.device.type == "cuda" else torch.float32, compiled
        shape = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
        torch.manual_seed(cfg.seed)
        try:
            self.model = module.GPT(module.GPTConfig(vocab_size=trainer.model.config.padded_vocab_size, **shape))
            self.model.to(trainer.device)
            self.optimizer = self.model.configure_optimizers(
                cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), trainer.device.type)
        except (TypeError, AttributeError) as error:
            raise UserError(f"the peer {path} is not built as nanoGPT's GPT is: {error}") from None
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=self.dtype == torch.float16)
        self.n_params = sum(p.numel() for name, p in self.model.named_parameters() if "wpe" not in name)
        self.flops_per_token = trainer.model.flops_per_token() + 6 * (self.n_params - trainer.model.n_params())
        self.forward = self.timed(torch.compile(self.model) if compiled else self.model)
        self.generates = hasattr(self.model, "generate")

    def step(self, batch: Batch) -> None:
        cfg = self.cfg
        for _, (x, y) in batch.part():
            x, y = send(x, self.device), send(y, self.device)
            with autocast(self.device, self.dtype):
                loss = self.forward(x, y)[1] / cfg.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
        if cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def generate(self, idx: Tensor, n_tokens: int) -> None:
        self.model.eval()
        with autocast(self.device, self.dtype):
            self.model.generate(idx, n_tokens, temperature=0.8, top_k=200)
        self.model.train()


def load_peer(path: str) -> ModuleType:
    """The module in the file `path`, which is executed. UserError if there is none, or it lacks GPT or GPTConfig."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no peer file {path}: --peer takes the path of a model.py")
    spec = importlib.util.spec_from_file_location("bench_peer", path)
    if spec is None:
        raise UserError(f"the peer {path} is not a Python file")
    module = sys.modules["bench_peer"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it may raise anything
        raise UserError(f"the peer {path} cannot be imported: {type(error).__name__}: {error}") from None
    if missing := [name for name in ("GPT", "GPTConfig") if not hasattr(module, name)]:
        raise UserError(f"the peer {path} has no {' and no '.join(missing)}: it must be built as nanoGPT's model.py is")
    return module


def seconds_of_phases(marks: list[tuple[str | None, Mark]]) -> dict[str, float]:
    """{phase: seconds} of one step's marks."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for (_, start), (phase, end) in itertools.pairwise(marks):
        seconds[phase] += seconds_between(start, end)
    return seconds


def warm_up(contender: Contender, n_steps: int, held: int = 0) -> Contender:
    """Do n_steps steps that do not count. They show the peak memory, without the `held` bytes of others."""
    on_cuda = contender.device.type == "cuda"
    contender.run_steps(1)  # it may compile
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    contender.seconds_a_step = sum(contender.run_steps(n_steps - 1)[-1].values())
    if on_cuda:
        contender.peak_memory = torch.cuda.max_memory_allocated() - held
    elif isinstance(contender, Ours):  # the peer enters the same process later
        contender.peak_memory = peak_rss()
    return contender


def peak_rss() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(contenders: list[Contender], n_steps: int, decode_tokens: int) -> None:
    """Let the contenders take turns (A B A B) until each has done n_steps steps; then each decodes in turn."""
    slowest = max(contender.seconds_a_step for contender in contenders)
    a_turn = min(max(1, int(SECONDS_A_TURN / slowest)), math.ceil(n_steps / REPEATS))
    for done in range(0, n_steps, a_turn):
        for contender in contenders:
            contender.turns.append(contender.run_steps(min(a_turn, n_steps - done)))
    decoders = [c for c in contenders if decode_tokens and c.generates]
    for repeat in range(REPEATS + 1):
        for contender in decoders:
            seconds = contender.decode(decode_tokens)
            if repeat:
                contender.decode_seconds.append(seconds)


@functools.cache
def matrix_product_flops(dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of the (size, size) matrix products that fit into `seconds`, on the CPU."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    fastest, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ b
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


@functools.cache
def memory_bandwidth(device: torch.device, n_bytes: int = 2**29) -> float:
    """Bytes per second at which `device` reads memory: the fastest of a few sums of n_bytes bytes."""
    x, seconds = torch.ones(n_bytes // 4, device=device), []
    for _ in range(REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return n_bytes / min(seconds)


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that `device` could reach: a CPU's is measured in `dtype`, a card's known or None."""
    return matrix_product_flops(dtype) if device.type == "cpu" else peak_flops(device)


def tokenization_seconds(corpus: Corpus, n_tokens: int = 1_000_000) -> tuple[int, list[float]]:
    """(bytes of a text, seconds of each time the corpus's tokenizer encodes it)."""
    text = corpus.tokenizer.decode(corpus.train[:n_tokens])
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        corpus.tokenizer.encode(text)
        seconds.append(time.perf_counter() - start)
    return len(text.encode("utf-8", errors="surrogatepass")), seconds[1:]


def metrics(contender: Contender, cfg: ResolvedConfig, decode_tokens: int) -> dict:
    """What was measured of a contender, as --json gives it."""
    steps = [step for turn in contender.turns for step in turn]
    seconds = [sum(step.values()) for step in steps]
    per_second = rates(cfg.sequences * cfg.block_size, seconds)
    peak = peak_of(contender.device, contender.dtype)
    decoding = rates(decode_tokens, contender.decode_seconds)
    bytes_per_token = contender.bytes_per_token(decode_tokens) if decoding else None
    bandwidth = memory_bandwidth(contender.device) if bytes_per_token else None
    return {
        "dtype": dtype_name(contender.dtype), "compiled": contender.compiled,
        "parameters": contender.n_params, "ms_per_step": spread(1000 * s for s in seconds),
        "tokens_per_second": per_second,
        "mfu": peak and per_second["median"] * contender.flops_per_token / peak, "peak_flops": peak,
        "peak_memory_bytes": contender.peak_memory,
        "share": {phase: sum(step[phase] for step in steps) / sum(seconds) for phase in PHASES},
        "decode_tokens_per_second": decoding, "memory_bandwidth": bandwidth,
        "decode_bandwidth_share": bandwidth and decoding["median"] * bytes_per_token / bandwidth,
    }


def speedups(ours: Contender, peer: Contender) -> dict[str, Spread | None]:
    """How many times faster ours is: the peer's seconds / ours, turn by turn."""
    def step_seconds(turn: list[dict[str, float]]) -> float:
        return statistics.median(sum(step.values()) for step in turn)

    steps = [step_seconds(b) / step_seconds(a) for a, b in zip(ours.turns, peer.turns)]
    decoding = [b / a for a, b in zip(ours.decode_seconds, peer.decode_seconds)]
    return {"step": spread(steps), "decode": spread(decoding) if decoding else None}


def bench(values: Values, problems: Problems, args: argparse.Namespace, random_data: bool) -> dict:
    """Measure; everything as --json gives it. UserError with `problems` and those found here."""
    with tempfile.TemporaryDirectory() as directory:
        values = values | dict(max_iters=MAX_STEPS - 1, epochs=None, resume=False, out_dir=directory)
        if random_data:
            values |= dict(dataset="random", data_dir=directory)
            write_random_corpus(Path(directory) / "random")
        cfg = check_run(values, problems)
        corpus = open_corpus(cfg.dataset, cfg.data_dir)
        check_length(cfg, len(corpus.train))
        train_data = TokenDataset(corpus.train, cfg.block_size, cfg.stride)
        cfg = resolve(cfg, len(train_data))
        with out_of_memory_as(out_of_memory_message(cfg)):
            trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
            return measurements(trainer, corpus, train_data, args, random_data)


def measurements(trainer: Trainer, corpus: Corpus, train_data: TokenDataset, args: argparse.Namespace,
                 random_data: bool) -> dict:
    """Measure the trainer's step, alongside the peer's if there is one."""
    cfg, device = trainer.cfg, trainer.device
    contenders = [warm_up(Ours(trainer, batches(train_data, cfg, 0)), args.warmup)]
    if args.peer:
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        peer = Peer(args.peer_module, args.peer, trainer, batches(train_data, cfg, 0), args.peer_compile)
        contenders.append(warm_up(peer, args.warmup, held))
    measure(contenders, args.steps, args.decode_tokens)
    n_bytes, seconds = (0, []) if random_data else tokenization_seconds(corpus)
    return {
        "device": device_name(device), "torch": torch.__version__,
        "config": {name: value for name, value in vars(cfg).items() if name not in UNUSED_FIELDS},
        "vocab_size": corpus.tokenizer.vocab_size,
        "tokens_per_step": cfg.sequences * cfg.block_size,
        "steps": args.steps, "warmup": args.warmup, "decode_tokens": args.decode_tokens, "peer": args.peer,
        "runs": {name: metrics(contender, cfg, args.decode_tokens)
                 for name, contender in zip(("ours", "peer"), contenders)},
        "memory_is": "torch.cuda.max_memory_allocated" if device.type == "cuda" else "peak RSS of the process",
        "speedup": speedups(*contenders) if args.peer else None,
        "tokenize_mb_per_second": rates(n_bytes / 1e6, seconds),
    }


def write_random_corpus(directory: Path) -> None:
    """A data set of random tokens, with as many symbols as GPT-2's vocabulary has."""
    random = np.random.default_rng(0)
    tokenizer = CharTokenizer(map(chr, range(0x10000, 0x10000 + GPT2_VOCABULARY)))  # any symbols will do
    n_tokens = {"train": RANDOM_TOKENS, "val": 2}
    write_corpus(directory, tokenizer, {split: random.integers(GPT2_VOCABULARY, size=n_tokens[split])
                                        for split in SPLITS})


def with_spread(values: Spread | None, digits: int = 0) -> str:
    """A spread as the table shows it: 'median (low to high)', or 'n/a'."""
    if values is None:
        return "n/a"
    median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def rows_of(run: dict, memory_is: str) -> Iterator[tuple[str, str]]:
    """One contender's (label, value) rows."""
    mfu, peak, memory = run["mfu"], run["peak_flops"], run["peak_memory_bytes"]
    yield "dtype", run["dtype"] + (", compiled" if run["compiled"] else ", not compiled")
    yield "parameters", f"{run['parameters']:,}"
    yield "ms/step", with_spread(run["ms_per_step"], 1)
    yield "tokens/s", with_spread(run["tokens_per_second"])
    yield "MFU", f"{mfu:.1%} of {peak / 1e12:,.3g} TFLOP/s" if peak else "n/a"
    yield memory_is, f"{memory / 2**20:,.0f} MiB" if memory is not None else "n/a"
    for phase in PHASES:
        yield f"time in {phase}", f"{run['share'][phase]:.1%}"
    yield "decode tokens/s", with_spread(run["decode_tokens_per_second"])
    share, bandwidth = run["decode_bandwidth_share"], run["memory_bandwidth"]
    yield "bandwidth in decoding", f"{share:.1%} of {bandwidth / 1e9:,.3g} GB/s" if share else "n/a"


def table(result: dict) -> str:
    """The result as aligned text."""
    cfg = result["config"]
    rows = [("", *result["runs"])]
    columns = [list(rows_of(run, result["memory_is"])) for run in result["runs"].values()]
    rows += [(cells[0][0], *(value for _, value in cells)) for cells in zip(*columns)]
    rows.append(("tokenize MB/s", with_spread(result["tokenize_mb_per_second"], 1)))
    if speedup := result["speedup"]:
        rows.append(("step, peer's time / ours", with_spread(speedup["step"], 2)))
        rows.append(("decoding, peer's time / ours", with_spread(speedup["decode"], 2)))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([
        f"{cfg['run_name']}: {plural(cfg['n_layer'], 'layer')}, {plural(cfg['n_head'], 'head')}, {cfg['n_embd']} wide, "
        f"{plural(result['vocab_size'], 'symbol')}; {cfg['gradient_accumulation_steps']} x "
        f"{plural(cfg['batch_size'], 'sequence')} of {cfg['block_size']} = "
        f"{plural(result['tokens_per_step'], 'token')} a step",
        f"{result['device']}, torch {result['torch']}; medians (quartiles) of {plural(result['steps'], 'step')} after "
        f"{result['warmup']}, decoding {plural(result['decode_tokens'], 'token')}", "", *lines])


def read_run(argv: list[str]) -> tuple[Values, Problems, bool]:
    """(values, problems, whether to train on random tokens) of `[CONFIG.py | gpt2…] [--field=value …]`."""
    name, values, problems = read_command_line(argv)
    if name not in GPT2_SIZES:
        if name and not Path(name).exists() and not name.endswith(".py"):
            raise UserError(f"{name} is neither a config file nor one of {', '.join(GPT2_SIZES)}"
                            f"{nearest(name, GPT2_SIZES)}")
        values, more = file_values(name, values)
        return {"run_name": default_run_name(name, values)} | values, problems + more, False
    return GPT2_SIZES[name] | {"block_size": 1024, "run_name": name} | values, problems, "dataset" not in values


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", usage=f"python bench.py [CONFIG.py | {' | '.join(GPT2_SIZES)}] [--field=value ...]",
        description=HELP, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number(int, low=1), default=20, help="steps that are timed (default 20)")
    parser.add_argument("--warmup", type=number(int, low=2), default=3,
                        help="steps before, not timed, at least 2 (default 3)")
    parser.add_argument("--decode_tokens", type=number(int, low=0), default=100,
                        help="length of the texts generated from one token; 0: none (default 100)")
    parser.add_argument("--peer", metavar="PATH/model.py",
                        help="a file with GPT and GPTConfig as in nanoGPT's model.py: it is executed, and timed "
                             "alternately with ours in the same process, trained as nanoGPT does (float32 off CUDA)")
    parser.add_argument("--peer_compile", action="store_true", help="torch.compile the peer too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args, rest = parser.parse_known_args(argv)
    values, problems, random_data = read_run(rest)
    if args.peer_compile and not args.peer:
        raise UserError("--peer_compile needs --peer PATH/model.py")
    with redirect_stdout(sys.stderr):  # what is printed on the way is not part of the result
        args.peer_module = load_peer(args.peer) if args.peer else None
        try:
            result = bench(values, problems, args, random_data)
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
    print(json_line(result) if args.json else table(result))
    return 0


if __name__ == "__main__":
    run_script(main)
