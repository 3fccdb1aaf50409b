"""Text to token ids and back: a character vocabulary, and GPT-2's byte-level BPE.

A tokenizer's `state()` is plain text and numbers, stored whole in a data set's meta.json and in
every checkpoint, so that neither needs another file to be read.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from lib.cli import UserError, plural

UNKNOWN = -1
END_OF_TEXT = "<|endoftext|>"


def code_points(text: str) -> np.ndarray:
    """Unicode code points of `text`, uint32 (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One id per character, in code point order when built by `from_text`."""

    kind = "char"

    def __init__(self, itos: Iterable[str]) -> None:
        """`itos`: the characters, by id. ValueError if they are not distinct single characters."""
        self.itos = list(itos)
        self.stoi = {char: id for id, char in enumerate(self.itos)}
        if not self.itos or len(self.stoi) < len(self.itos) or any(len(char) != 1 for char in self.itos):
            raise ValueError("a character vocabulary is a list of distinct single characters")
        self.vocab_size = len(self.itos)
        self.start = "\n" if "\n" in self.stoi else self.itos[0]  # the default prompt
        self.end_of_text = None  # no such token
        self.token_bytes = np.array([len(self.bytes_of(id)) for id in range(self.vocab_size)])
        self._points = code_points("".join(self.itos))
        self._ids = np.full(0x110000, UNKNOWN, dtype=np.int32)
        self._ids[self._points] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        return cls(map(chr, np.flatnonzero(np.bincount(code_points(text)))))

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (len(text),). UserError names the first unknown character and its position."""
        ids = self._ids[code_points(text)]
        unknown = ids == UNKNOWN
        if unknown.any():
            position = int(unknown.argmax())
            raise UserError(f"character {text[position]!r} at position {position} is not among the "
                            f"{plural(self.vocab_size, 'character')} of the vocabulary")
        return ids

    def unknown(self, text: str) -> np.ndarray:
        """Positions of the characters of `text` that are not in the vocabulary, int64 (n,)."""
        return np.flatnonzero(self._ids[code_points(text)] == UNKNOWN)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self._points[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le", errors="surrogatepass")

    def bytes_of(self, id: int) -> bytes:
        """The UTF-8 bytes of one id."""
        return self.itos[id].encode("utf-8", errors="surrogatepass")

    def vocabulary(self) -> dict[str, int]:
        """{character: id}."""
        return self.stoi

    def state(self) -> dict:
        return {"kind": self.kind, "itos": self.itos, "stoi": self.stoi}


class GPT2Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019) by tiktoken, built from the text of `vocab.bpe`."""

    kind = "gpt2"
    start = "\n"

    def __init__(self, merges: str) -> None:
        """`merges`: the text of vocab.bpe, one merge per line after a version line."""
        self.merges = merges
        ranks = ranks_from_merges(merges)
        self.vocab_size = len(ranks) + 1
        self.end_of_text = len(ranks)
        self._bpe = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                      special_tokens={END_OF_TEXT: len(ranks)})
        self.token_bytes = np.array([len(token) for token in ranks] + [len(END_OF_TEXT)])

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 (tokens,). Names of special tokens are encoded as plain text."""
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def unknown(self, text: str) -> np.ndarray:
        """No positions: any text is made of known bytes."""
        return np.zeros(0, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._bpe.decode([int(id) for id in ids])

    def bytes_of(self, id: int) -> bytes:
        """The bytes of one id, which may be part of a character."""
        return self._bpe.decode_single_token_bytes(id)

    def vocabulary(self) -> dict[str, int]:
        """{token: id}, the tokens spelled as in vocab.bpe: GPT-2's encoder.json."""
        return {spell(self.bytes_of(id)): id for id in range(self.end_of_text)} | {END_OF_TEXT: self.end_of_text}

    def state(self) -> dict:
        return {"kind": self.kind, "merges": self.merges}


Tokenizer = CharTokenizer | GPT2Tokenizer


def spellings() -> dict[int, str]:
    """{byte: the character that spells it in vocab.bpe}, in the order of GPT-2's ids.

    A printable Latin-1 byte stands for itself, the others for U+0100 onwards (`bytes_to_unicode` in
    OpenAI's encoder.py).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SPELLED = spellings()


def spell(token: bytes) -> str:
    """Bytes in vocab.bpe's spelling."""
    return "".join(SPELLED[byte] for byte in token)


def ranks_from_merges(merges: str) -> dict[bytes, int]:
    """{token bytes: id} of GPT-2's `vocab.bpe`: the 256 bytes in GPT-2's order, then one token per merge."""
    byte_of = {char: byte for byte, char in SPELLED.items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(SPELLED)}
    for line in merges.splitlines()[1:]:
        ranks[bytes(byte_of[char] for char in line.replace(" ", ""))] = len(ranks)
    return ranks


def tokenizer_from_state(state: dict, where: object) -> Tokenizer:
    """The tokenizer whose `state()` was found in the file `where`. UserError if it is damaged."""
    try:
        if state["kind"] == CharTokenizer.kind:
            tokenizer = CharTokenizer(state["itos"])
            if state.get("stoi", tokenizer.stoi) != tokenizer.stoi:
                raise ValueError("itos and stoi differ")
            return tokenizer
        if state["kind"] == GPT2Tokenizer.kind:
            return GPT2Tokenizer(state["merges"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"the tokenizer in {where} is damaged: {error!r}") from None
    raise UserError(f"the tokenizer in {where} is of an unknown kind: {state['kind']!r}")
