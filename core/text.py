"""A model and a text: how it continues one, how well it predicts one, which characters it does not know."""

from collections.abc import Callable

import numpy as np
import torch

from core.dataset import TokenDataset
from core.evaluation import Evaluation, evaluate
from core.inference import stream
from core.tokenizer import Tokenizer, code_points
from lib.cli import UserError, describe, is_valid, plural
from model import GPT

MAX_SCORED_TOKENS = 8192  # in one forward pass of `score_tokens`
MAX_NAMED = 5  # different characters in a message
# How tokens are chosen: the type of each option of core.inference.stream, and its bounds (lib.cli.BOUNDS).
CHOICE = {
    "temperature": (float, dict(low=0)),
    "top_k": (int, dict(low=0, below=2**32)),
    "top_p": (float, dict(above=0, high=1)),
    "min_p": (float, dict(low=0, high=1)),
    "repetition_penalty": (float, dict(low=0.01, high=100)),
}


def continue_text(model: GPT, tokenizer: Tokenizer, prompt: str = "", max_new_tokens: int = 500, seed: int = 1337,
                  temperature: float = 0.8, top_k: int = 200, proceed: Callable[[], bool] = lambda: True,
                  **choice: float) -> str:
    """`prompt`, by default a line break, and its continuation; the same for the same weights and `seed`.

    `choice`: the other options in CHOICE. `proceed` is called after each token; False ends the text. UserError for a
    character outside the vocabulary, and for an option out of bounds.
    """
    choice |= {"temperature": temperature, "top_k": top_k}
    problems = [f"{name} must be {describe(kind, **bounds)}, not {choice[name]!r}"
                for name, (kind, bounds) in CHOICE.items() if name in choice
                and not (kind(choice[name]) == choice[name] and is_valid(kind(choice[name]), kind, **bounds))]
    if problems:
        raise UserError(*problems)
    ids = tokenizer.encode(prompt or tokenizer.start).tolist()
    start = torch.tensor([ids], device=model.transformer.wte.weight.device)
    for token in stream(model, start, max_new_tokens, seed=seed, **choice):
        ids.append(int(token))
        if not proceed():
            break
    return tokenizer.decode(ids)


def score_tokens(model: GPT, tokenizer: Tokenizer, tokens: np.ndarray, stride: int | None = None,
                 dtype: torch.dtype = torch.float32) -> Evaluation:
    """How well `model` predicts tokens, ids (n,), n >= 2, in windows of its context, one every `stride` tokens.

    Windows do not overlap by default. UserError for fewer tokens or a longer stride.
    """
    length = model.config.block_size
    if len(tokens) < 2:
        raise UserError(f"{plural(len(tokens), 'token')} cannot be scored: at least 2 are needed")
    if stride and stride > length:
        raise UserError(f"stride {stride} is over the model's context of {length} tokens and would skip some")
    dataset = TokenDataset(tokens, length, stride, tokenizer)
    batch_size = min(max(1, MAX_SCORED_TOKENS // length), len(dataset))
    return evaluate(model, dataset, batch_size, model.transformer.wte.weight.device, dtype)


def known_text(tokenizer: Tokenizer, text: str, skip_unknown: bool = False) -> tuple[str, int]:
    """(text, 0); if it has characters outside the vocabulary, (text without them, their number) with `skip_unknown`.

    UserError otherwise: how many, which, and where each of these is first.
    """
    positions = tokenizer.unknown(text)
    if not len(positions):
        return text, 0
    points = code_points(text)
    if skip_unknown:
        return np.delete(points, positions).tobytes().decode("utf-32-le"), len(positions)
    different, first, counts = np.unique(points[positions], return_index=True, return_counts=True)
    named = []
    for i in first.argsort()[:MAX_NAMED]:
        at = int(positions[first[i]])
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        times = f"{counts[i]:,} times, first in " if counts[i] > 1 else ""
        named.append(f"{text[at]!r} ({times}line {line:,}, column {column:,})")
    others = f" and {plural(len(different) - MAX_NAMED, 'other')}" if len(different) > MAX_NAMED else ""
    are = "is" if len(positions) == 1 else "are"
    raise UserError(f"{plural(len(positions), 'character')} {are} not among the {tokenizer.vocab_size:,} of the "
                    f"vocabulary: {', '.join(named)}{others}")
