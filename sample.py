"""Generate text from a checkpoint, which holds all that is needed, or from published weights.

    python sample.py --ckpt
    python sample.py --ckpt checkpoints/quickstart/best.pt --prompt "def " --temperature 0
    python sample.py --ckpt gpt2 --interactive
    python sample.py --ckpt --score book.txt
    python sample.py --list
"""

import codecs
import contextlib
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core import huggingface, pretrained
from core.inference import prepare_for_inference, stream, window_start
from core.listing import runs_table
from core.runs import load_model
from core.text import CHOICE, known_text, score_tokens
from core.tokenizer import Tokenizer
from lib.cli import UserError, json_line, number, plural, run_script, script_parser
from lib.device import DTYPES, choose_device, choose_dtype, dtype_name, out_of_memory_as
from lib.files import read_text
from model import GPT, GPT2_SIZES

MAX_ROWS = 16  # samples generated together; more would need more memory, and none depends on the others
# Flags without a meaning for --score and --list.
SAMPLING = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop",
            "seed")
SEPARATOR = "-" * 40


class Continuation:
    """One sample as its tokens arrive: `text` is its final part so far, `stop_reason` why it ended, or None.

    Bytes that are not a whole character yet are held back, and so is what may be the beginning of a
    stop string. Bytes that never become a character are U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.text = ""
        self.stop_reason: str | None = None  # "end_of_text", "stop" or "length"
        self.seconds = 0.0  # from the start to the end
        self._held, self._decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._start = time.perf_counter()

    def add(self, token: int) -> str:
        """Append a token; return the text that it makes final."""
        self.tokens.append(token)
        if token == self.tokenizer.end_of_text:
            return self.end("end_of_text")
        self._held += self._decoder.decode(self.tokenizer.bytes_of(token))
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that was complete first
            self._held = self._held[: min(found)[1]]
            self._decoder.reset()
            return self.end("stop")
        return self._release(max((n for stop in self.stops for n in range(1, min(len(stop), len(self._held) + 1))
                                  if self._held.endswith(stop[:n])), default=0))

    def end(self, stop_reason: str) -> str:
        """End the sample; return the text that was held back."""
        self.stop_reason, self.seconds = stop_reason, time.perf_counter() - self._start
        self._held += self._decoder.decode(b"", final=True)
        return self._release(0)

    def _release(self, n_held: int) -> str:
        piece, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        self.text += piece
        return piece


def continuations(model: GPT, tokenizer: Tokenizer, ids: Tensor, args: Namespace, seed: int,
                  show: Callable[[str], None]) -> Iterator[Continuation]:
    """Yield args.num_samples finished Continuations of the tokens ids, int64 (1, T).

    `show` gets the first one's text piece by piece, as it becomes final.
    """
    context = model.config.block_size
    seen = ids.size(1) - window_start(ids.size(1), context)
    if seen < ids.size(1):
        print(f"note: the prompt has {ids.size(1):,} tokens; the model sees the last {seen:,} (its context is "
              f"{context:,})", file=sys.stderr)
    for first in range(0, args.num_samples, MAX_ROWS):
        samples = [Continuation(tokenizer, args.stop) for _ in range(min(MAX_ROWS, args.num_samples - first))]
        running = list(enumerate(samples))
        steps = stream(model, ids, args.max_new_tokens, len(samples), seed + first, temperature=args.temperature,
                       top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty)
        for n, tokens in enumerate(steps, start=1):
            tokens = tokens.tolist()
            for i, sample in running:
                piece = sample.add(tokens[i])
                if n == args.max_new_tokens and not sample.stop_reason:
                    piece += sample.end("length")
                if first + i == 0:
                    show(piece)
            running = [(i, sample) for i, sample in running if not sample.stop_reason]
            if not running:
                break
        yield from samples


def write(text: str) -> None:
    """Print `text` immediately."""
    print(text, end="", flush=True)


def answer(model: GPT, tokenizer: Tokenizer, prompt: str, args: Namespace, seed: int, echo: str) -> None:
    """Print the continuations of `prompt`, each after the text `echo`; with args.json one object per line instead."""
    ids = torch.tensor([tokenizer.encode(prompt).tolist()], device=model.transformer.wte.weight.device)
    if not args.json:
        write(echo)
    samples = continuations(model, tokenizer, ids, args, seed, show=(lambda piece: None) if args.json else write)
    for i, sample in enumerate(samples):
        if args.json:
            print(json_line({"prompt": prompt, "text": sample.text, "tokens": sample.tokens, "seed": seed + i,
                             "seconds": round(sample.seconds, 6), "stop_reason": sample.stop_reason}), flush=True)
        elif i == 0:
            write("\n")
        else:
            write(f"{SEPARATOR}\n{echo}{sample.text}\n")


def interact(model: GPT, tokenizer: Tokenizer, args: Namespace) -> int:
    """Continue each line that is typed. Ctrl-C ends a text or clears the line, Ctrl-D quits.

    Return the exit code: 2 if a line that was not typed was refused.
    """
    with contextlib.suppress(ImportError):  # Windows has no readline, but a console that does the same
        import readline  # noqa: F401  gives input() line editing and a history
    if sys.stdin is None:
        raise UserError("--interactive reads prompts from standard input, which is closed")
    is_typed = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if is_typed:
        print("type a line to continue; Ctrl-C stops the text, Ctrl-D quits", file=sys.stderr)
    seed, code = args.seed, 0
    while True:
        try:
            prompt = input("> " if is_typed else "").removeprefix("\ufeff").removesuffix("\r")  # of a Windows file
            if prompt:
                seed += args.num_samples  # another text, even for the same prompt
                answer(model, tokenizer, checked_text(prompt, "the prompt"), args, seed - args.num_samples, echo="")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 0 if is_typed else 2
        except EOFError:
            if is_typed:
                print()
            return code
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print()


def checked_text(text: str, what: str) -> str:
    """`text`, from outside. UserError if it is empty, or if its bytes were not UTF-8 (Python makes them surrogates)."""
    if not text:
        raise UserError(f"{what} is empty: give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8 text at position {error.start}") from None
    return text


def read_prompt(argument: str) -> str:
    """The prompt's text: the argument itself, or the content of the file after `FILE:`."""
    path = argument.removeprefix("FILE:")
    return checked_text(argument if path == argument else read_text(path), "the prompt")


def encode(tokenizer: Tokenizer, text: str, what: str) -> np.ndarray:
    """The ids of `text`. UserError that names it `what` if it has a character outside the vocabulary."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def score(model: GPT, tokenizer: Tokenizer, args: Namespace, device: torch.device) -> None:
    """Print how well the model predicts the file args.score, in float32 unless args.dtype says otherwise."""
    text = read_text(args.score)
    try:
        text, n_skipped = known_text(tokenizer, text, args.skip_unknown)
    except UserError as error:
        raise UserError(f"{args.score}: {error}; --skip_unknown scores the rest") from None
    tokens = tokenizer.encode(text)
    dtype = torch.float32 if args.dtype == "auto" else choose_dtype(args.dtype, device)
    try:
        result = score_tokens(model.to(device), tokenizer, tokens, args.stride, dtype)
    except UserError as error:
        raise UserError(f"{args.score}: {error}") from None
    if not math.isfinite(result.loss):
        raise UserError(f"{args.score}: the loss is not finite, so the weights are unusable")
    length = model.config.block_size
    metrics = {"file": args.score, "tokens": len(tokens), "bytes": len(text.encode()), **vars(result),
               "context": length, "stride": args.stride or length, "dtype": dtype_name(dtype), "skipped": n_skipped}
    if args.json:
        print(json_line(metrics))
        return
    skipped = ""
    if n_skipped:
        skipped = f" | skipped {plural(n_skipped, 'character')} outside the vocabulary; tokens and bytes are the rest's"
    print("{file}: {tokens:,} tokens, {bytes:,} bytes | loss {loss:.4f} | ppl {perplexity:.2f} | bits/byte "
          "{bits_per_byte:.4f} | windows of {context} tokens, stride {stride}, {dtype}{0}".format(skipped, **metrics))


def load(name: str, data_dir: str) -> tuple[GPT, Tokenizer]:
    """(GPT on the CPU, tokenizer) of published weights, a Hugging Face directory, or the checkpoint meant by `name`."""
    if huggingface.is_model(name):
        return pretrained.load(huggingface.find(name, data_dir))
    path, model, tokenizer, content = load_model(name, data_dir)
    val_loss = "not measured" if content["val_loss"] is None else f"{content['val_loss']:.4f}"
    vocabulary = f"; characters of {content['vocabulary_path']}" if content.get("vocabulary_path") else ""
    print(f"{path}: step {content['step']}, val loss {val_loss}{vocabulary}", file=sys.stderr)
    return model, tokenizer


def choice(name: str) -> Callable[[str], object]:
    """The argparse `type` of an option that says how tokens are chosen."""
    kind, bounds = CHOICE[name]
    return number(kind, **bounds)


def add_sampling_flags(parser: ArgumentParser) -> None:
    """Add the flags in SAMPLING."""
    parser.add_argument("--num_samples", type=number(int, low=1, below=2**32), default=1, help="default 1")
    parser.add_argument("--max_new_tokens", type=number(int, low=1, below=2**32), default=500, help="default 500")
    parser.add_argument("--temperature", type=choice("temperature"), default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top_k", type=choice("top_k"), default=200,
                        help="keep the k most likely tokens; 0: off (default 200)")
    parser.add_argument("--top_p", type=choice("top_p"), default=1.0,
                        help="keep the smallest set of most likely tokens with this total probability; 1: off "
                             "(default 1)")
    parser.add_argument("--min_p", type=choice("min_p"), default=0.0,
                        help="keep tokens at least this fraction as likely as the most likely; 0: off (default 0)")
    parser.add_argument("--repetition_penalty", type=choice("repetition_penalty"), default=1.0,
                        help="above 1: penalize tokens already in the text (default 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="stop just before the given string, even if it spans several tokens; "
                             "repeatable (bash: $'\\n' is a line break)")
    parser.add_argument("--seed", type=number(int, low=0, below=2**32), default=1337,
                        help="of the first sample; those of SEED+1, SEED+2, ... follow, on a GPU equal up to "
                             "rounding (default 1337)")


def parse_args(argv: list[str]) -> Namespace:
    parser = script_parser("sample.py", __doc__)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help=f"a checkpoint, also nanoGPT's, a run directory, {', '.join(GPT2_SIZES)}, or a directory "
                             "in Hugging Face's layout (default: the newest checkpoint under checkpoints/)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", metavar="TEXT", help="text to continue, or FILE:path (default: a line break)")
    task.add_argument("--interactive", action="store_true", help="continue each line you type")
    task.add_argument("--score", metavar="FILE", help="print loss, perplexity and bits per byte of a text instead")
    task.add_argument("--list", action="store_true", help="list the runs under the directory --ckpt instead")
    parser.add_argument("--skip_unknown", action="store_true",
                        help="with --score: leave out characters outside the vocabulary, and their bytes")
    parser.add_argument("--stride", type=number(int, low=1), metavar="TOKENS",
                        help="with --score: tokens from one window's start to the next (default: the context length)")
    add_sampling_flags(parser)
    parser.add_argument("--data_dir", default="data",
                        help="where to look for published weights and nanoGPT's meta.pkl (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="dtype of the weights; auto: bfloat16 where that is fast, but float32 for --score")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample (or score)")
    args = parser.parse_args(argv)
    for name in ("stride", "skip_unknown"):
        if getattr(args, name) and args.score is None:
            parser.error(f"--{name} needs --score")
    names = (*SAMPLING, "json", "device", "dtype", "data_dir") if args.list else SAMPLING
    unused = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
    if unused and (args.list or args.score is not None):
        verb = "has" if len(unused) == 1 else "have"
        parser.error(f"{', '.join(unused)} {verb} no effect with {'--list' if args.list else '--score'}")
    return args


def main(argv: list[str]) -> int | None:
    args = parse_args(argv)
    if args.list:
        return print(runs_table(args.ckpt))
    with out_of_memory_as("out of memory: use fewer samples (--num_samples) or smaller weights (--dtype=bfloat16)"):
        device = choose_device(args.device)
        model, tokenizer = load(args.ckpt, args.data_dir)
        if args.score is not None:
            return score(model, tokenizer, args, device)
        for stop in args.stop:  # one that cannot be generated would never match
            encode(tokenizer, checked_text(stop, "a --stop string"), f"--stop {stop!r}")
        prompt = tokenizer.start if args.prompt is None else read_prompt(args.prompt)
        prepare_for_inference(model, device, choose_dtype(args.dtype, device))
        if args.interactive:
            return interact(model, tokenizer, args)
        answer(model, tokenizer, prompt, args, args.seed, echo=prompt)


if __name__ == "__main__":
    run_script(main)
