"""Turn a text into a data set: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py shakespeare
    python prepare_data.py --input book.txt --name book --tokenizer gpt2
"""

import argparse
from pathlib import Path

from config import is_plain_name, nearest, number
from dataset import SPLITS, write_corpus
from download import BPE_MERGES, fetch_source
from errors import UserError, run_script
from files import read_text
from tokenizer import CharTokenizer, GPT2Tokenizer

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "tinyshakespeare.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
UINT16_IDS = 1 << 16


def shakespeare_text(data_dir):
    """TinyShakespeare (Karpathy 2015): 1,115,394 characters of the plays."""
    return read_texts([fetch_source(SHAKESPEARE, data_dir)])


def pydoc_text(data_dir):
    """The Python language reference that ships with CPython, about half a million characters; no download."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data (the language reference): install your "
                        "system's full Python, or use another data set") from None
    return "".join(topics[key] for key in sorted(topics))


# name: (text of the corpus, tokenizer)
CORPORA = {
    "pydoc": (pydoc_text, "char"),
    "shakespeare": (shakespeare_text, "gpt2"),
    "shakespeare_char": (shakespeare_text, "char"),
}


def make_tokenizer(kind, text, data_dir):
    """A "char" tokenizer for `text`, or GPT-2's ("gpt2"), whose merges are downloaded if they are not there."""
    if kind == "char":
        return CharTokenizer.from_text(text)
    return GPT2Tokenizer(read_texts([fetch_source(BPE_MERGES, data_dir)]))


def read_texts(paths):
    """The UTF-8 texts of `paths`, one after the other, nothing between them. UserError for what is no text."""
    return "".join(map(read_text, paths))


def first_lines(text, n_lines):
    """`text` up to and with its n-th newline; all of it when it has fewer."""
    end = 0
    for _ in range(n_lines):
        end = text.find("\n", end) + 1
        if end == 0:
            return text
    return text[:end]


def split_and_write(text, name, tokenizer, data_dir, val_fraction=0.1):
    """Split `text` by characters, encode it, write the data set and print its figures.

    `tokenizer` is "char" (a vocabulary is made from the whole text) or "gpt2". UserError for a text
    that is too short, or whose vocabulary does not fit uint16.
    """
    if not text:
        raise UserError(f"the text for {name} is empty")
    cut = int(len(text) * (1 - val_fraction))
    tokenizer = make_tokenizer(tokenizer, text, data_dir)
    if tokenizer.vocab_size > UINT16_IDS:
        raise UserError(f"the text for {name} has {tokenizer.vocab_size:,} different characters; the .bin format "
                        f"holds {UINT16_IDS:,}: use --tokenizer gpt2")
    ids = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    for split in SPLITS:
        if len(ids[split]) < 2:
            raise UserError(f"the {split} split of {name} has {len(ids[split])} tokens, training needs at least 2: "
                            f"use a longer text or another --val_fraction")
    folder = Path(data_dir) / name
    write_corpus(folder, tokenizer, ids)
    counts = ", ".join(f"{split} {len(ids[split]):,} tokens" for split in SPLITS)
    print(f"{folder}: {tokenizer.kind} tokenizer, {tokenizer.vocab_size:,} symbols; {counts}", flush=True)


def prepare(name, data_dir="data"):
    """Prepare one of CORPORA under `data_dir`."""
    text_of, tokenizer = CORPORA[name]
    split_and_write(text_of(data_dir), name, tokenizer, data_dir)


def main(argv):
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", metavar="NAME", help=f"one of {', '.join(CORPORA)}")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="your own UTF-8 text, files in order")
    parser.add_argument("--name", help="the data set's name, needed unless NAME is taken as it is")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), help="default: NAME's own; char for --input")
    parser.add_argument("--val_fraction", type=number(float, above=0, below=1),
                        help="share of the text, at its end (default 0.1)")
    parser.add_argument("--max_lines", type=number(int, low=1), help="use the first so many lines only")
    parser.add_argument("--data_dir", default="data", help="default: data")
    args = parser.parse_args(argv)
    if (args.corpus is None) == (args.input is None):
        raise UserError(f"name a corpus ({', '.join(CORPORA)}), or --input FILE... with --name NAME")
    if args.corpus and args.corpus not in CORPORA:
        raise UserError(f"unknown corpus {args.corpus}{nearest(args.corpus, CORPORA)}; there are "
                        f"{', '.join(CORPORA)}, and --input FILE... --name NAME for your own text")
    changed = args.input or args.tokenizer or args.val_fraction or args.max_lines
    name = args.name or (args.corpus if not changed else None)
    if not name or not is_plain_name(name) or (changed and name in CORPORA):
        raise UserError(f"a data set of your own needs --name NAME, a plain directory name other than "
                        f"{', '.join(CORPORA)}")
    text_of, tokenizer = CORPORA.get(args.corpus, (None, "char"))
    text = read_texts(args.input) if args.input else text_of(args.data_dir)
    if args.max_lines:
        text = first_lines(text, args.max_lines)
    split_and_write(text, name, args.tokenizer or tokenizer, args.data_dir, args.val_fraction or 0.1)


if __name__ == "__main__":
    run_script(main)
