"""Generate text from a checkpoint, which holds all that is needed: weights, shape and tokenizer.

    python sample.py --ckpt
    python sample.py --ckpt checkpoints/quickstart/best.pt --prompt "def " --temperature 0
"""

import argparse
import sys

import torch

from checkpoint import find_checkpoint, load_checkpoint
from config import check_value, number
from device import choose_device
from errors import UserError, run_script
from model import GPT, GPTConfig
from tokenizer import tokenizer_from_state


def read_prompt(argument):
    """The prompt's text: the argument itself, or the content of the file after `FILE:`."""
    if not argument.startswith("FILE:"):
        text = argument
    else:
        path = argument.removeprefix("FILE:")
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except OSError as error:
            raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt file {path} is not UTF-8 at offset {error.start}") from None
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    return text


def load_model(path, device):
    """(GPT in eval mode on `device`, tokenizer) from the checkpoint file at `path`. UserError if it is not whole."""
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
    return model.to(device).eval(), tokenizer


def main(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help="a checkpoint or a run directory (default: the most recently written under checkpoints/)")
    parser.add_argument("--prompt", help="text to continue, or FILE:path (default: a line break)")
    parser.add_argument("--num_samples", type=number(int, low=1), default=1, help="default 1")
    parser.add_argument("--max_new_tokens", type=number(int, low=1), default=500, help="default 500")
    parser.add_argument("--temperature", type=number(float, low=0), default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, low=0), default=200, help="0: off (default 200)")
    parser.add_argument("--seed", type=number(int, low=0, below=2**32), default=1337, help="default 1337")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    model, tokenizer = load_model(find_checkpoint(args.ckpt), device)
    prompt = tokenizer.start if args.prompt is None else read_prompt(args.prompt)
    start = torch.tensor([tokenizer.encode(prompt).tolist()], device=device)
    for i in range(args.num_samples):
        tokens = model.generate(start, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                                seed=args.seed + i)
        print(tokenizer.decode(tokens[0].tolist()), flush=True)
        if i + 1 < args.num_samples:
            print("-" * 40)


if __name__ == "__main__":
    run_script(main)
