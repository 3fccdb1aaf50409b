import json

import numpy as np
import pytest
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from core.tokenizer import CharTokenizer, GPT2Tokenizer, ranks_from_merges, tokenizer_from_state
from lib.cli import UserError

TEXT = "To be, or not to be:\n\tthat is the question. Ünïcödé 你好 \U0001f600\U0001f600 é\u0301 \x00 12345  end \n\n"
MERGES = "#version: 0.2\nĠ t\nh e\nĠt he\n"


def test_char_ids_are_those_of_a_plain_loop():
    tokenizer = CharTokenizer.from_text(TEXT)
    chars = sorted(set(TEXT))
    assert tokenizer.itos == chars and tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(TEXT).tolist() == [chars.index(char) for char in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("").tolist() == [] and tokenizer.decode([]) == ""


def test_char_tokenizer_names_the_first_unknown_character():
    tokenizer = CharTokenizer.from_text("abc\U0001f600")
    with pytest.raises(UserError, match="'é' at position 5 "):
        tokenizer.encode("abca\U0001f600é, z")


def test_token_bytes_add_up_to_the_text():
    for tokenizer in (CharTokenizer.from_text(TEXT), GPT2Tokenizer(MERGES)):
        assert tokenizer.token_bytes[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())


def test_bpe_merges_in_order():
    tokenizer = GPT2Tokenizer(MERGES)
    assert tokenizer.vocab_size == 256 + 3 + 1
    ids = tokenizer.encode("on the table").tolist()
    assert [tokenizer.decode([id]) for id in ids] == ["o", "n", " the", " t", "a", "b", "l", "e"]
    assert ids[2] == 258
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    assert len(tokenizer.encode("<|endoftext|>")) > 1  # text, not the special token


def test_state_survives_json():
    for tokenizer in (CharTokenizer.from_text(TEXT), GPT2Tokenizer(MERGES)):
        again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())), "f")
        assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
        assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


@pytest.mark.parametrize("state", [
    {}, {"kind": "word"}, {"kind": "char"}, {"kind": "char", "itos": 3}, {"kind": "char", "itos": []},
    {"kind": "char", "itos": ["ab"]}, {"kind": "char", "itos": ["a", "a"]}, {"kind": "gpt2", "merges": "x\n☃ ☃\n"},
    {"kind": "gpt2"}, {"kind": "gpt2", "merges": 3},
])
def test_damaged_state_is_refused(state):
    with pytest.raises(UserError, match=r"some\.pt"):
        tokenizer_from_state(state, "some.pt")


def test_gpt2_ranks_equal_tiktokens(downloads, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    expected = data_gym_to_mergeable_bpe_ranks(str(downloads / "gpt2/vocab.bpe"), str(downloads / "gpt2/encoder.json"))
    assert ranks_from_merges((downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8")) == expected


def test_gpt2_ids_equal_hugging_faces(downloads):
    from transformers import GPT2TokenizerFast

    vocab = json.loads((downloads / "gpt2/encoder.json").read_text(encoding="utf-8"))
    lines = (downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    oracle = GPT2TokenizerFast(vocab=vocab, merges=[tuple(line.split()) for line in lines])
    tokenizer = GPT2Tokenizer((downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8"))
    text = TEXT + (downloads / "tinyshakespeare.txt").read_text(encoding="utf-8")[:50_000] + "we'll they'RE   x"
    assert tokenizer.vocab_size == 50257
    assert tokenizer.vocabulary() == vocab
    assert tokenizer.encode(text).tolist() == oracle.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
