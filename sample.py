"""Generate text from a checkpoint, which holds all that is needed, or from published weights.

    python sample.py --ckpt
    python sample.py --ckpt checkpoints/quickstart/best.pt --prompt "def " --temperature 0
    python sample.py --ckpt gpt2 --interactive
    python sample.py --ckpt --score book.txt
"""

import argparse
import codecs
import contextlib
import json
import math
import sys
import time

import torch

import huggingface
from checkpoint import find_checkpoint, load_checkpoint
from config import check_value, number
from dataset import TokenDataset
from device import DTYPES, choose_device, choose_dtype, out_of_memory_as
from errors import UserError, run_script
from evaluation import evaluate
from files import read_text
from inference import prepare_for_inference
from model import GPT, GPTConfig
from tokenizer import tokenizer_from_state

ROWS_AT_ONCE = 16  # samples generated together; more would take memory, and none depends on the others
SCORED_AT_ONCE = 8192  # tokens in one forward pass of --score
SEPARATOR = "-" * 40


class Continuation:
    """One sample as its tokens come: `text` is what is certain of it, `stop_reason` why it has ended, or None.

    Bytes that are not a whole character yet are held back, and so is what may be the beginning of a
    stop text. Bytes that never become a character are U+FFFD.
    """

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens, self.text, self.stop_reason = [], "", None
        self._held, self._decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._start = time.perf_counter()

    def add(self, token):
        """Take a token; return the text that it makes certain."""
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

    def end(self, stop_reason):
        """Take no more tokens; return the text that was held back."""
        self.stop_reason, self.seconds = stop_reason, time.perf_counter() - self._start
        self._held += self._decoder.decode(b"", final=True)
        return self._release(0)

    def _release(self, n_held):
        piece, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        self.text += piece
        return piece


def continuations(model, tokenizer, ids, args, seed, show):
    """Yield args.num_samples finished Continuations of the tokens ids, int64 (1, T).

    `show` gets the first one's pieces at once.
    """
    seen = ids.size(1) - model.window_start(ids.size(1))
    if seen < ids.size(1):
        print(f"note: of the prompt's {ids.size(1):,} tokens the model sees the last {seen:,} (its context is "
              f"{model.config.block_size:,})", file=sys.stderr)
    for first in range(0, args.num_samples, ROWS_AT_ONCE):
        samples = [Continuation(tokenizer, args.stop) for _ in range(min(ROWS_AT_ONCE, args.num_samples - first))]
        running = list(enumerate(samples, start=first))
        steps = model.stream(ids, args.max_new_tokens, len(samples), seed + first, args.repetition_penalty,
                             cuda_graph=ids.is_cuda, temperature=args.temperature, top_k=args.top_k,
                             top_p=args.top_p, min_p=args.min_p)
        for n, tokens in enumerate(steps, start=1):
            tokens = tokens.tolist()
            for i, sample in running:
                piece = sample.add(tokens[i - first])
                if n == args.max_new_tokens and not sample.stop_reason:
                    piece += sample.end("length")
                if i == 0:
                    show(piece)
            running = [(i, sample) for i, sample in running if not sample.stop_reason]
            if not running:
                break
        yield from samples


def write(text):
    """Show `text` at once."""
    print(text, end="", flush=True)


def answer(model, tokenizer, prompt, args, seed, echo):
    """Print the continuations of `prompt`, each after the text `echo`; with args.json an object a line instead."""
    ids = torch.tensor([tokenizer.encode(prompt).tolist()], device=model.transformer.wte.weight.device)
    if not args.json:
        write(echo)
    samples = continuations(model, tokenizer, ids, args, seed, show=(lambda piece: None) if args.json else write)
    for i, sample in enumerate(samples):
        if args.json:
            print(json.dumps({"prompt": prompt, "text": sample.text, "tokens": sample.tokens, "seed": seed + i,
                              "seconds": round(sample.seconds, 6), "stop_reason": sample.stop_reason}), flush=True)
        elif i == 0:
            write("\n")
        else:
            write(f"{SEPARATOR}\n{echo}{sample.text}\n")


def interact(model, tokenizer, args):
    """Continue each line that is typed. Ctrl-C ends a text or clears the line, Ctrl-D ends the loop."""
    with contextlib.suppress(ImportError):  # Windows has no readline, but a console that does the same
        import readline  # noqa: F401  input() then edits lines and remembers them
    if sys.stdin is None:
        raise UserError("--interactive reads prompts from the standard input, which is closed")
    is_typed = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if is_typed:
        print("a line is continued; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
    seed = args.seed
    while True:
        try:
            prompt = input("> " if is_typed else "")
            if prompt:
                seed += args.num_samples  # another text, even for the same prompt
                answer(model, tokenizer, checked_text(prompt, "the prompt"), args, seed - args.num_samples, echo="")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            if is_typed:
                print()
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print()


def checked_text(text, what):
    """`text`, from outside. UserError if it is empty, or if its bytes were no UTF-8 (Python makes them surrogates)."""
    if not text:
        raise UserError(f"{what} is empty: give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8 text at position {error.start}") from None
    return text


def read_prompt(argument):
    """The prompt's text: the argument itself, or the content of the file after `FILE:`."""
    path = argument.removeprefix("FILE:")
    return checked_text(argument if path == argument else read_text(path), "the prompt")


def encoded(tokenizer, text, what):
    """The ids of `text`. UserError that says `what` it is if it has a character outside the vocabulary."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def score(model, tokenizer, args, device):
    """Print how well the model predicts the file args.score, in float32 unless args.dtype says otherwise."""
    text = read_text(args.score)
    tokens = encoded(tokenizer, text, args.score)
    length = model.config.block_size
    stride = args.stride or length
    if len(tokens) < 2:
        raise UserError(f"{args.score} has {len(tokens)} tokens; a score takes at least 2")
    if stride > length:
        raise UserError(f"--stride {stride} is over the model's context of {length}: tokens would be left out")
    dtype = torch.float32 if args.dtype == "auto" else choose_dtype(args.dtype, device)
    dataset = TokenDataset(tokens, length, stride, tokenizer)
    result = evaluate(model.to(device), dataset, max(1, SCORED_AT_ONCE // length), device, dtype)
    if not math.isfinite(result.loss):
        raise UserError(f"{args.score}: the loss is not finite; the weights are of no use")
    figures = {"file": args.score, "tokens": len(tokens), "bytes": len(text.encode()), **vars(result),
               "context": length, "stride": stride, "dtype": str(dtype).removeprefix("torch.")}
    if args.json:
        print(json.dumps(figures))
    else:
        print("{file}: {tokens:,} tokens, {bytes:,} bytes | loss {loss:.4f} | ppl {perplexity:.2f} | bits/byte "
              "{bits_per_byte:.4f} | windows of {context} tokens, stride {stride}, {dtype}".format(**figures))


def load_model(path):
    """(GPT on the CPU, tokenizer) from the checkpoint file at `path`. UserError if it is not whole."""
    content = load_checkpoint(path)
    tokenizer = tokenizer_from_state(content["tokenizer"], path)
    checks = [check_value(name, content["config"].get(name)) for name in GPTConfig.shape_fields()]
    if problems := [f"{path}: {problem}" for _, problem in checks if problem]:
        raise UserError(*problems)
    try:
        model = GPT(GPTConfig.of(content["config"], tokenizer.vocab_size))
        model.load_state_dict(content["model_state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the weights in {path} do not fit its config: {str(error).splitlines()[0]}") from None
    val_loss = "not measured" if content["val_loss"] is None else f"{content['val_loss']:.4f}"
    print(f"{path}: step {content['step']}, val loss {val_loss}", file=sys.stderr)
    return model, tokenizer


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help=f"a checkpoint, a run directory, {', '.join(huggingface.PUBLISHED)}, or a folder in "
                             "Hugging Face's layout (default: the most recently written checkpoint under checkpoints/)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", metavar="TEXT", help="text to continue, or FILE:path (default: a line break)")
    task.add_argument("--interactive", action="store_true", help="continue the lines you type")
    task.add_argument("--score", metavar="FILE", help="print loss, perplexity and bits per byte of a text instead")
    parser.add_argument("--stride", type=number(int, low=1), metavar="TOKENS",
                        help="with --score: tokens from one window's start to the next (default: the context)")
    parser.add_argument("--num_samples", type=number(int, low=1, below=2**32), default=1, help="default 1")
    parser.add_argument("--max_new_tokens", type=number(int, low=1, below=2**32), default=500, help="default 500")
    parser.add_argument("--temperature", type=number(float, low=0), default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, low=0, below=2**32), default=200,
                        help="keep the k likeliest tokens; 0: off (default 200)")
    parser.add_argument("--top_p", type=number(float, above=0, high=1), default=1.0,
                        help="keep the fewest likeliest with this probability together; 1: off (default 1)")
    parser.add_argument("--min_p", type=number(float, low=0, high=1), default=0.0,
                        help="keep tokens this many times as likely as the likeliest; 0: off (default 0)")
    parser.add_argument("--repetition_penalty", type=number(float, low=0.01, high=100), default=1.0,
                        help="over 1: what was there becomes less likely (default 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text; may be given several times (bash: $'\\n' is a line break)")
    parser.add_argument("--seed", type=number(int, low=0, below=2**32), default=1337,
                        help="sample i is what --seed SEED+i gives alone (default 1337)")
    parser.add_argument("--data_dir", default="data", help="where published weights are kept (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="number format of the weights; auto: bfloat16 where the device is good at it, but float32 "
                             "for --score")
    parser.add_argument("--json", action="store_true", help="one JSON object a sample (or score)")
    args = parser.parse_args(argv)
    if args.stride and args.score is None:
        parser.error("--stride needs --score")
    return args


def main(argv):
    args = parse_args(argv)
    with out_of_memory_as("out of memory: ask for fewer samples (--num_samples), or for smaller weights "
                          "(--dtype=bfloat16)"):
        run(args, choose_device(args.device))


def run(args, device):
    """Do what the flags say."""
    if huggingface.is_model(args.ckpt):
        model, tokenizer = huggingface.load(args.ckpt, args.data_dir)
    else:
        model, tokenizer = load_model(find_checkpoint(args.ckpt))
    if args.score is not None:
        return score(model, tokenizer, args, device)
    for stop in args.stop:  # one that cannot be written would never stop
        encoded(tokenizer, checked_text(stop, "a --stop text"), f"--stop {stop!r}")
    prompt = tokenizer.start if args.prompt is None else read_prompt(args.prompt)
    prepare_for_inference(model, device, choose_dtype(args.dtype, device))
    if args.interactive:
        interact(model, tokenizer, args)
    else:
        answer(model, tokenizer, prompt, args, args.seed, echo=prompt)


if __name__ == "__main__":
    run_script(main)
