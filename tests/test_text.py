"""A model and a text, as a notebook calls them: what is out of bounds is refused, not computed."""

import pytest
from helpers import make_model

from core.text import CHOICE, continue_text, score_tokens
from core.tokenizer import CharTokenizer
from lib.cli import UserError

TOKENIZER = CharTokenizer("".join(map(chr, range(50, 100))))


@pytest.mark.parametrize("option, words", [
    (dict(temperature=-1), "temperature must be a finite float >= 0, not -1"),
    (dict(top_k=-1), "top_k must be an int >= 0"), (dict(top_k=2.5), "top_k must be an int"),
    (dict(top_p=0), "top_p must be a finite float > 0 and <= 1, not 0"),
    (dict(min_p=1.5), "min_p must be"), (dict(repetition_penalty=0), "repetition_penalty must be"),
])
def test_options_out_of_bounds(option, words):
    with pytest.raises(UserError) as refused:
        continue_text(make_model(), TOKENIZER, "abc", **option)
    assert words in str(refused.value)


def test_options_within_bounds():
    bounds = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert bounds.keys() == CHOICE.keys()
    assert len(continue_text(make_model(), TOKENIZER, "abc", max_new_tokens=5, **bounds)) == 8


def test_texts_that_cannot_be_scored():
    model, tokens = make_model(), TOKENIZER.encode("abc")
    for n, stride, words in ((1, None, "1 token cannot be scored: at least 2"), (0, None, "0 tokens"),
                             (3, 17, "stride 17 is over the model's context of 16 tokens")):
        with pytest.raises(UserError, match=words):
            score_tokens(model, TOKENIZER, tokens[:n], stride)
