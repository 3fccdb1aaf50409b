"""Time training steps, text generation and tokenization, alone or side by side with another model class.

    python bench.py configs/nanogpt_char_cpu.py
    python bench.py gpt2 --batch_size=32 --json
    python bench.py configs/nanogpt_char_cpu.py --peer ../nanoGPT/model.py
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import closing, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from config import MOST_STEPS, build_config, load_config, nearest, number, read_command_line
from dataset import SPLITS, write_corpus
from device import autocast, device_name, out_of_memory_as, peak_flops
from errors import UserError, run_script
from inference import prepare_for_inference
from model import GPT2_SIZES
from tokenizer import CharTokenizer
from train_gpt2 import (
    Diverged,
    Trainer,
    check,
    mark,
    out_of_memory_message,
    seconds_between,
    weights_shape,
)

PHASES = ("data", "forward", "backward", "optimizer")
GPT2_VOCABULARY = 50257
RANDOM_TOKENS = 2_000_000
SECONDS_A_TURN = 0.3  # long enough that a short step finds its own weights in the caches again
UNUSED_FIELDS = ("max_iters", "epochs", "resume", "data_dir", "out_dir", "log_dir")  # of no weight for a step's time
REPEATS = 5  # of decoding and of tokenizing, after one that is not counted

HELP = f"""
{__doc__}
What is timed is training's own step, on the config's data. A GPT-2 size ({", ".join(GPT2_SIZES)}) trains on
random tokens unless --dataset names a data set. Every flag of train_gpt2.py works (see its --help), but max_iters,
epochs, resume, out_dir and log_dir change nothing here: no file is kept.

data: waiting for a batch and sending it to the device. optimizer: all that follows the last backward pass: clipping,
the update, the check for finite values. MFU: FLOP of the step (6 a parameter and token, and attention's) a second,
against the device's bf16 peak by its data sheet, or on a CPU against the fastest 2048 x 2048 matrix product in the
step's number format, measured here; n/a for a card without a known peak. Figures are medians (lower to upper quartile).
"""


def spread(values):
    """{"median", "low", "high"} of some numbers: the median and the quartiles."""
    low, median, high = np.percentile(list(values), (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}


def rates(amount, seconds):
    """The spread of amount / seconds over some repeats' seconds: its median belongs to theirs; None for none."""
    if not seconds:
        return None
    of = spread(seconds)
    return {"median": amount / of["median"], "low": amount / of["high"], "high": amount / of["low"]}


def synchronize(device):
    """Wait until `device` has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class Contender:
    """A model and the training step that is timed, `step(x, y)` on the windows (x, y) of `batches`.

    Subclasses set model, dtype, compiled, n_params, flops_per_token, and call the model's forward through `timed`.
    """

    def __init__(self, device, batches):
        self.device, self.batches = device, iter(batches)
        self.marks = []  # (phase that ended, when), from one step's start to its end
        self.turns = []  # for each turn, its steps: {phase: seconds}
        self.decode_seconds = []
        self.peak_memory = None

    def mark(self, phase):
        if self.device.type == "mps":
            synchronize(self.device)
        self.marks.append((phase, mark(self.device)))

    def timed(self, forward):
        """`forward(x, y) -> (logits, loss)` that marks its start, its end, and its backward pass's end."""
        def backward_starts(gradient):
            # The autograd engine calls this when the whole backward pass is done.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.mark("backward"))

        def call(x, y):
            self.mark("data")
            logits, loss = forward(x, y)
            self.mark("forward")
            loss.register_hook(backward_starts)
            return logits, loss

        return call

    def run_steps(self, n):
        """Do n training steps; {phase: seconds} of each."""
        synchronize(self.device)
        steps = []
        for _ in range(n):
            self.marks = []
            self.mark(None)
            x, y = next(self.batches)
            self.step(x, y)
            self.mark("optimizer")
            steps.append(self.marks)
        return [seconds_of_phases(marks) for marks in steps]

    def decode(self, n_tokens):
        """Seconds to generate n_tokens tokens out of one."""
        synchronize(self.device)
        start = time.perf_counter()
        self.generate(torch.zeros((1, 1), dtype=torch.int64, device=self.device), n_tokens)
        synchronize(self.device)
        return time.perf_counter() - start


class Ours(Contender):
    """A Trainer's model and step."""

    def __init__(self, run):
        super().__init__(run.device, run.batches())
        self.run, self.model, self.dtype, self.compiled = run, run.model, run.dtype, run.forward is not run.model
        self.n_params, self.flops_per_token = run.model.n_params(), run.model.flops_per_token()
        run.forward = self.timed(run.forward)

    def step(self, x, y):
        self.run.optimizer_step(x, y)

    @functools.cached_property
    def decoder(self):
        """The model as sample.py generates with it."""
        return prepare_for_inference(copy.deepcopy(self.model), self.device, self.dtype)

    def generate(self, idx, n_tokens):
        self.decoder.generate(idx, n_tokens, temperature=0.8, top_k=200, cuda_graph=self.device.type == "cuda")


class Peer(Contender):
    """A model class with nanoGPT's constructor, trained as nanoGPT's script does, on the batches that we train on."""

    def __init__(self, module, path, run, compiled):
        super().__init__(run.device, run.batches())
        self.cfg = cfg = run.cfg
        self.dtype, self.compiled = run.dtype if run.device.type == "cuda" else torch.float32, compiled
        shape = {name: getattr(cfg, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
        torch.manual_seed(cfg.seed)
        try:
            self.model = module.GPT(module.GPTConfig(vocab_size=run.model.config.padded_vocab_size, **shape))
            self.model.to(run.device)
            self.optimizer = self.model.configure_optimizers(
                cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), run.device.type)
        except (TypeError, AttributeError) as error:
            raise UserError(f"the peer {path} is not built as nanoGPT's GPT is: {error}") from None
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.dtype == torch.float16)
        self.n_params = sum(p.numel() for name, p in self.model.named_parameters() if "wpe" not in name)
        self.flops_per_token = run.model.flops_per_token() + 6 * (self.n_params - run.model.n_params())
        self.forward = self.timed(torch.compile(self.model) if compiled else self.model)

    def step(self, x, y):
        cfg, on_cuda = self.cfg, self.device.type == "cuda"
        for x_micro, y_micro in zip(x.split(cfg.batch_size), y.split(cfg.batch_size)):
            x_micro, y_micro = (t.to(self.device, non_blocking=on_cuda) for t in (x_micro, y_micro))
            with autocast(self.device, self.dtype):
                loss = self.forward(x_micro, y_micro)[1] / cfg.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
        if cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def generate(self, idx, n_tokens):
        self.model.eval()
        with autocast(self.device, self.dtype):
            self.model.generate(idx, n_tokens, temperature=0.8, top_k=200)
        self.model.train()


def load_peer(path):
    """The module in the file `path`, which is executed. UserError if it is none, or has no GPT and GPTConfig."""
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


def seconds_of_phases(marks):
    """{phase: seconds} of one step's marks."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for (_, start), (phase, end) in itertools.pairwise(marks):
        seconds[phase] += seconds_between(start, end)
    return seconds


def warm_up(contender, n_steps, held=0):
    """Do n_steps steps that do not count. They show the peak memory, without the `held` bytes of others."""
    on_cuda = contender.device.type == "cuda"
    contender.run_steps(1)  # it may compile
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    contender.seconds_a_step = sum(contender.run_steps(n_steps - 1)[-1].values())
    if on_cuda:
        contender.peak_memory = torch.cuda.max_memory_allocated() - held
    elif isinstance(contender, Ours):  # the peer comes later into the same process
        contender.peak_memory = peak_rss()
    return contender


def peak_rss():
    """Peak resident memory of this process in bytes, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(contenders, n_steps, decode_tokens):
    """Let the contenders take turns (A B A B) until each has done n_steps steps; then each decodes in turn."""
    slowest = max(contender.seconds_a_step for contender in contenders)
    a_turn = min(max(1, int(SECONDS_A_TURN / slowest)), math.ceil(n_steps / REPEATS))
    for done in range(0, n_steps, a_turn):
        for contender in contenders:
            contender.turns.append(contender.run_steps(min(a_turn, n_steps - done)))
    decoders = [c for c in contenders if decode_tokens and hasattr(c.model, "generate")]
    for repeat in range(REPEATS + 1):
        for contender in decoders:
            seconds = contender.decode(decode_tokens)
            if repeat:
                contender.decode_seconds.append(seconds)


@functools.cache
def matrix_product_flops(dtype, size=2048, seconds=1.0):
    """FLOP/s of the fastest of the (size, size) matrix products that fit into `seconds`, on the CPU."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    fastest, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ b
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def peak_of(device, dtype):
    """FLOP/s that `device` could reach: a CPU's is measured in `dtype`, a card's is known or None."""
    return matrix_product_flops(dtype) if device.type == "cpu" else peak_flops(device)


def tokenization_seconds(corpus, n_tokens=1_000_000):
    """(bytes of a text, seconds of each time it is encoded) for the corpus's tokenizer."""
    text = corpus.tokenizer.decode(corpus.train[:n_tokens])
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        corpus.tokenizer.encode(text)
        seconds.append(time.perf_counter() - start)
    return len(text.encode("utf-8", errors="surrogatepass")), seconds[1:]


def figures(contender, cfg, decode_tokens):
    """What was measured of a contender, as --json gives it."""
    steps = [step for turn in contender.turns for step in turn]
    seconds = [sum(step.values()) for step in steps]
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    per_second = rates(tokens, seconds)
    peak = peak_of(contender.device, contender.dtype)
    return {
        "dtype": str(contender.dtype).removeprefix("torch."), "compiled": contender.compiled,
        "parameters": contender.n_params, "ms_per_step": spread(1000 * s for s in seconds),
        "tokens_per_second": per_second,
        "mfu": peak and per_second["median"] * contender.flops_per_token / peak, "peak_flops": peak,
        "peak_memory_bytes": contender.peak_memory,
        "share": {phase: sum(step[phase] for step in steps) / sum(seconds) for phase in PHASES},
        "decode_tokens_per_second": rates(decode_tokens, contender.decode_seconds),
    }


def speedups(ours, peer):
    """How many times faster ours is: the peer's seconds / ours, turn by turn."""
    def step_seconds(turn):
        return statistics.median(sum(step.values()) for step in turn)

    steps = [step_seconds(b) / step_seconds(a) for a, b in zip(ours.turns, peer.turns)]
    decoding = [b / a for a, b in zip(ours.decode_seconds, peer.decode_seconds)]
    return {"step": spread(steps), "decode": spread(decoding) if decoding else None}


def bench(cfg, problems, args, random_data):
    """Measure; everything as --json gives it. UserError with the config's `problems` and those found here."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(cfg, max_iters=MOST_STEPS - 1, epochs=None, resume=False,
                                  out_dir=f"{folder}/checkpoints", log_dir=f"{folder}/runs")
        if random_data:
            cfg = dataclasses.replace(cfg, dataset="random", data_dir=folder)
            write_random_corpus(Path(folder) / "random", cfg)
        check(cfg, problems)
        with closing(Trainer(cfg)) as run:
            return measurements(run, args, random_data)


def measurements(run, args, random_data):
    """Measure a run's step, beside the peer's if there is one."""
    cfg = run.cfg
    contenders = [warm_up(Ours(run), args.warmup)]
    if args.peer:
        held = torch.cuda.memory_allocated() if run.device.type == "cuda" else 0
        contenders.append(warm_up(Peer(args.peer_module, args.peer, run, args.peer_compile), args.warmup, held))
    measure(contenders, args.steps, args.decode_tokens)
    n_bytes, seconds = (0, []) if random_data else tokenization_seconds(run.corpus)
    return {
        "device": device_name(run.device), "torch": torch.__version__,
        "config": {name: value for name, value in vars(cfg).items() if name not in UNUSED_FIELDS},
        "vocab_size": run.corpus.tokenizer.vocab_size,
        "tokens_per_step": run.sequences * cfg.block_size,
        "steps": args.steps, "warmup": args.warmup, "decode_tokens": args.decode_tokens, "peer": args.peer,
        "runs": {name: figures(contender, cfg, args.decode_tokens)
                 for name, contender in zip(("ours", "peer"), contenders)},
        "memory_is": "torch.cuda.max_memory_allocated" if run.device.type == "cuda" else "peak RSS of the process",
        "speedup": speedups(*contenders) if args.peer else None,
        "tokenize_mb_per_second": rates(n_bytes / 1e6, seconds),
    }


def write_random_corpus(folder, cfg):
    """A data set of random tokens in `folder`, with as many symbols as GPT-2's vocabulary has."""
    random = np.random.default_rng(cfg.seed)
    n_tokens = {"train": max(RANDOM_TOKENS, cfg.block_size + 1), "val": 2}
    tokenizer = CharTokenizer(map(chr, range(0x10000, 0x10000 + GPT2_VOCABULARY)))  # any symbols will do
    write_corpus(folder, tokenizer, {split: random.integers(GPT2_VOCABULARY, size=n_tokens[split]) for split in SPLITS})


def with_spread(values, digits=0):
    """A spread as the table shows it: 'median (low to high)', or 'n/a'."""
    if values is None:
        return "n/a"
    median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def rows_of(run, memory_is):
    """One contender's (label, figure) rows."""
    mfu, peak, memory = run["mfu"], run["peak_flops"], run["peak_memory_bytes"]
    yield "number format", run["dtype"] + (", compiled" if run["compiled"] else ", not compiled")
    yield "parameters", f"{run['parameters']:,}"
    yield "ms/step", with_spread(run["ms_per_step"], 1)
    yield "tokens/s", with_spread(run["tokens_per_second"])
    yield "MFU", f"{mfu:.1%} of {peak / 1e12:,.3g} TFLOP/s" if peak else "n/a"
    yield memory_is, f"{memory / 2**20:,.0f} MiB" if memory is not None else "n/a"
    for phase in PHASES:
        yield f"time in {phase}", f"{run['share'][phase]:.1%}"
    yield "decode tokens/s", with_spread(run["decode_tokens_per_second"])


def table(result):
    """The result as aligned text."""
    cfg = result["config"]
    rows = [("", *result["runs"])]
    columns = [list(rows_of(run, result["memory_is"])) for run in result["runs"].values()]
    rows += [(cells[0][0], *(figure for _, figure in cells)) for cells in zip(*columns)]
    rows.append(("tokenize MB/s", with_spread(result["tokenize_mb_per_second"], 1)))
    if speedup := result["speedup"]:
        rows.append(("step, peer's time / ours", with_spread(speedup["step"], 2)))
        rows.append(("decoding, peer's time / ours", with_spread(speedup["decode"], 2)))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([
        f"{cfg['run_name']}: {cfg['n_layer']} layers, {cfg['n_head']} heads, {cfg['n_embd']} wide, "
        f"{result['vocab_size']:,} symbols; {cfg['gradient_accumulation_steps']} x {cfg['batch_size']} sequences of "
        f"{cfg['block_size']} = {result['tokens_per_step']:,} tokens a step",
        f"{result['device']}, torch {result['torch']}; medians (quartiles) of {result['steps']} steps after "
        f"{result['warmup']}, decoding {result['decode_tokens']} tokens", "", *lines])


def read_config(argv):
    """(TrainConfig, problems, whether the data are random tokens) of `[CONFIG.py | gpt2…] [--field=value …]`."""
    name, values, problems = read_command_line(argv)
    if name not in GPT2_SIZES:
        if name and not Path(name).exists() and not name.endswith(".py"):
            raise UserError(f"{name} is neither a config file nor one of {', '.join(GPT2_SIZES)}"
                            f"{nearest(name, GPT2_SIZES)}")
        cfg, more = load_config(name, values, weights_shape)
        return cfg, problems + more, False
    cfg, more = build_config(GPT2_SIZES[name] | {"block_size": 1024, "run_name": name} | values)
    return cfg, problems + more, "dataset" not in values


def main(argv):
    parser = argparse.ArgumentParser(
        prog="bench.py", usage=f"python bench.py [CONFIG.py | {' | '.join(GPT2_SIZES)}] [--field=value ...]",
        description=HELP, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number(int, low=1), default=20, help="steps that are timed (default 20)")
    parser.add_argument("--warmup", type=number(int, low=2), default=3, help="steps before, not timed (default 3)")
    parser.add_argument("--decode_tokens", type=number(int, low=0), default=100,
                        help="length of the texts generated, each from one token; 0: none (default 100)")
    parser.add_argument("--peer", metavar="PATH/model.py",
                        help="a file with GPT and GPTConfig as in nanoGPT's model.py: it is executed, and timed by "
                             "turns with ours in the same process, as nanoGPT trains (float32 off CUDA)")
    parser.add_argument("--peer_compile", action="store_true", help="torch.compile the peer too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args, rest = parser.parse_known_args(argv)
    cfg, problems, random_data = read_config(rest)
    if args.peer_compile and not args.peer:
        raise UserError("--peer_compile needs --peer PATH/model.py")
    with redirect_stdout(sys.stderr):  # what is said on the way is no part of the result
        args.peer_module = load_peer(args.peer) if args.peer else None
        try:
            with out_of_memory_as(out_of_memory_message(cfg)):
                result = bench(cfg, problems, args, random_data)
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
    print(json.dumps(result) if args.json else table(result))
    return 0


if __name__ == "__main__":
    run_script(main)
