"""What a run will take, before it starts (train_gpt2.py --plan): memory, disk, steps, FLOP and, if measured, time."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from core.config import ResolvedConfig, TrainConfig, read_values, resolve
from core.corpus import CORPORA, read_meta
from core.dataset import TokenDataset
from core.preflight import check_memory, check_run
from core.report import duration, limits, out_of_memory_message
from core.runs import peek
from core.trial import Memory, measure, memory_of_libraries, trace
from lib.cli import UserError, plural
from lib.device import device_name, dtype_name, out_of_memory_as, peak_flops, total_memory
from lib.distributed import ALONE, Processes
from lib.memory import peak_memory
from model import GPT, GPTConfig

FLAGS = ("--plan", "--plan=measure")
MFU = 0.4  # of the card's peak: what a compiled GPT of 100M parameters or more reaches
# From here on a trace takes minutes: what cannot fit by a rough count is refused instead.
MAX_LAYERS, MAX_TOKENS = 200, 2**21


def wants_plan(argv: Sequence[str]) -> bool:
    return any(word.split("=")[0] == "--plan" for word in argv)


def print_plan(argv: Sequence[str], processes: Processes = ALONE) -> int:
    """Print the plan of a command line with one of FLAGS; return the exit code, 0. Nothing is created or downloaded.

    UserError for what a run would be refused for, except for memory and a run directory with checkpoints; for
    characters not prepared yet; for another value of --plan.
    """
    at = argv.index("--plan") if "--plan" in argv else len(argv)
    if argv[at + 1 : at + 2] == ["measure"]:  # as other flags, with a space
        argv = [*argv[:at], "--plan=measure", *argv[at + 2 :]]
    asked = [word for word in argv if wants_plan([word])]
    values, problems = read_values([word for word in argv if word not in asked])
    problems += [f"{word}: --plan stands alone, or is --plan=measure" for word in asked if word not in FLAGS]
    cfg = processes.lead(lambda: check_run(values, problems, processes, plans=True))
    if cfg.n_layer > MAX_LAYERS or cfg.batch_size * cfg.block_size > MAX_TOKENS:
        check_memory(cfg)
    vocab_size, n_tokens = processes.lead(lambda: data_sizes(cfg))
    run = resolve(cfg, len(TokenDataset(np.broadcast_to(np.uint16(0), n_tokens["train"]), cfg.block_size, cfg.stride))
                  if n_tokens else 1)
    has_length = bool(n_tokens or (cfg.max_iters and not cfg.epochs))
    path, saved = peek(cfg.run_dir) if cfg.resume else (None, None)
    n_steps = max(0, run.max_iters - (saved["step"] if saved else 0))
    libraries, device = memory_of_libraries(run, vocab_size), torch.device(cfg.device)
    memory, model = trace(run, vocab_size, processes.size)
    data = data_bytes(run, n_tokens) if n_tokens and device.type == "cpu" else 0
    expected, available = libraries + data + memory.peak, total_memory(device)
    fits = not available or expected <= available
    print(f"plan     {cfg.run_name} on {device_name(device)}; {cfg.dtype}; "
          f"{plural(processes.size, 'process', 'processes')}; nothing is started\n{lines_on_memory(memory, model)}\n"
          f"         {'' if device.type == 'cuda' else 'Python and '}libraries {size(libraries)}, data {size(data)}\n"
          f"peak     expected {size(expected)} a process; "
          f"{cfg.device} has {size(available) if available else 'an unknown amount'}"
          f"{'' if fits else f'. DOES NOT FIT: {out_of_memory_message(cfg)}'}\n{line_on_disk(run, memory)}\n"
          f"{line_on_step(cfg, model, processes.size)}", flush=True)
    print(line_on_length(run, model, n_steps, path) if has_length else f"length   known once {cfg.dataset} is prepared")
    if asked[-1] == "--plan=measure":
        print(measured(run, processes, vocab_size, libraries, expected, n_steps if has_length else 0) if fits else
              "not measured: it does not fit")
    elif has_length:
        print(line_on_time(run, model, n_steps, processes.size))
    return 0


def data_sizes(cfg: TrainConfig) -> tuple[int, dict[str, int] | None]:
    """(vocabulary size, {split: tokens}) of cfg.dataset, None for GPT-2's tokens that are not prepared yet.

    UserError for characters that are not prepared.
    """
    directory = Path(cfg.data_dir) / cfg.dataset
    if (directory / "meta.json").exists():
        meta = read_meta(directory)
        return meta["vocab_size"], {split: sizes["tokens"] for split, sizes in meta["splits"].items()}
    if CORPORA[cfg.dataset][1] == "gpt2":
        return GPTConfig.vocab_size, None
    raise UserError(f"--plan needs the size of {cfg.dataset}'s vocabulary: prepare it first with "
                    f"python prepare_data.py {cfg.dataset} --data_dir={cfg.data_dir}")


def data_bytes(cfg: ResolvedConfig, n_tokens: dict[str, int]) -> int:
    """Bytes of the mapped tokens, all of which are read once, and of the order of up to two epochs' windows."""
    return 2 * sum(n_tokens.values()) + 8 * cfg.n_windows * min(2, cfg.epoch_of(cfg.max_iters - 1) + 1)


def size(n: int) -> str:
    """Bytes in words: '12.3 MiB', '1.50 GiB'."""
    return f"{n / 2**20:,.1f} MiB" if n < 2**30 else f"{n / 2**30:,.2f} GiB"


def n_parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def lines_on_memory(memory: Memory, model: GPT) -> str:
    keys, weights = memory.keys, size(memory.weights)
    return (f"model    {n_parameters(model):,} parameters, {model.n_params():,} without position embeddings\n"
            f"memory   weights {weights}, gradients {weights}, moments {size(memory.moments)}\n"
            f"         activations {size(memory.activations)} kept for backward, logits and loss "
            f"{size(memory.logits)}\n"
            f"         a sample's keys and values {size(2 * keys.nbytes)}: 2 x {dtype_name(keys.dtype)} "
            f"{tuple(keys.shape)}")


def line_on_disk(cfg: ResolvedConfig, memory: Memory) -> str:
    out_dir = Path(cfg.out_dir).absolute()
    free = shutil.disk_usage(next(path for path in (out_dir, *out_dir.parents) if path.exists())).free
    needed = memory.checkpoint * (cfg.keep_checkpoints + 2)
    return (f"disk     {size(memory.checkpoint)} a checkpoint, at most {size(needed)}: {cfg.keep_checkpoints} kept, "
            f"best.pt and one being written; {size(free)} free{'. NOT ENOUGH' if needed > free else ''}")


def line_on_step(cfg: TrainConfig, model: GPT, n_processes: int) -> str:
    """The line on a step's tokens and FLOP, and on what processes exchange."""
    tokens = cfg.sequences * cfg.block_size
    exchange = f"; each process exchanges gradients of {size((8 if cfg.exact_sum else 4) * n_parameters(model))}"
    return (f"step     {cfg.gradient_accumulation_steps} x {plural(cfg.batch_size, 'sequence')} = "
            f"{plural(tokens, 'token')}, {tokens * model.flops_per_token():.3g} FLOP"
            f"{exchange if n_processes > 1 else ''}")


def line_on_length(cfg: ResolvedConfig, model: GPT, n_steps: int, checkpoint: Path | None) -> str:
    """The line on the n_steps steps that are left after `checkpoint`, if there is one."""
    tokens = n_steps * cfg.sequences * cfg.block_size
    of_all = f" left of {cfg.max_iters:,} after {checkpoint}" if checkpoint else ""
    return (f"length   {plural(n_steps, 'step')}{of_all}{limits(cfg)} = {plural(tokens, 'token')}, "
            f"{tokens * model.flops_per_token():.3g} FLOP")


def line_on_time(cfg: ResolvedConfig, model: GPT, n_steps: int, n_processes: int) -> str:
    """The line on the time of n_steps steps, as far as it can be known without trying."""
    peak = peak_flops(torch.device(cfg.device))
    if not peak:
        return "time     unknown; --plan=measure measures it"
    flop = n_steps * cfg.sequences * cfg.block_size * model.flops_per_token()
    return (f"time     {duration(flop / (peak * n_processes * MFU))} at an assumed {MFU:.0%} of {peak / 1e12:.0f} "
            f"TFLOP/s a card, evaluations not included")


def measured(cfg: ResolvedConfig, processes: Processes, vocab_size: int, libraries: int, expected: int,
             n_steps: int) -> str:
    """The lines on speed, also that of n_steps, and memory of a trial with `cfg`. UserError if memory runs out."""
    device = torch.device(cfg.device)
    # On a CPU the trace, which no run does, has taken some memory, too.
    traced = (peak_memory(device) or 0) - libraries if device.type == "cpu" else 0
    with out_of_memory_as(out_of_memory_message(cfg)):
        seconds = measure(cfg, vocab_size, processes)
    peak = (peak_memory(device) or 0) - traced
    length = f"; {duration(n_steps * seconds)} for {plural(n_steps, 'step')}" if n_steps else ""
    return (f"measured {seconds:.3g} s a step, {cfg.sequences * cfg.block_size / seconds:,.0f} tok/s{length}, "
            f"evaluations not included\n         peak {size(peak)}, {peak / expected:.0%} of the expected peak")
