"""Turn a text into a data set: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py shakespeare
    python prepare_data.py --input book.txt --name book --tokenizer gpt2
    python prepare_data.py --list
    python prepare_data.py --from_nanogpt ../nanoGPT/data/openwebtext --name openwebtext
"""

from pathlib import Path

from core.corpus import CORPORA, is_free_name, prepare_text
from core.listing import datasets_table
from core.nanogpt import take_over
from lib.cli import UserError, command_line, nearest, number, run_script, script_parser
from lib.files import read_text


def first_lines(text: str, n_lines: int) -> str:
    """`text` up to and including its n-th newline; all of it when it has fewer."""
    end = 0
    for _ in range(n_lines):
        end = text.find("\n", end) + 1
        if end == 0:
            return text
    return text[:end]


def unknown_corpus(name: str, data_dir: str) -> str:
    """What to do about a NAME that is not a built-in text."""
    if Path(name).is_file():
        line = command_line(["python", "prepare_data.py", "--input", name, "--name", Path(name).stem])
        return f"{name} is a file: {line}"
    if (Path(data_dir) / name / "meta.json").is_file():
        return f"{name} is prepared already: python train_gpt2.py configs/quickstart.py --dataset={name}"
    return (f"unknown corpus {name}{nearest(name, CORPORA)}; there are {', '.join(CORPORA)}, and --input FILE... "
            f"--name NAME for your own text")


def main(argv: list[str]) -> None:
    builtin = ", ".join(CORPORA)
    parser = script_parser("prepare_data.py", __doc__)
    parser.add_argument("corpus", nargs="?", metavar="NAME", help=f"one of {builtin}")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="your own UTF-8 text files, in order")
    parser.add_argument("--from_nanogpt", type=Path, metavar="DIRECTORY",
                        help="nanoGPT's train.bin, val.bin and, for characters, meta.pkl; linked, not copied")
    parser.add_argument("--name", help="the data set's name; required unless NAME is prepared with its defaults")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), help="default: NAME's own; char for --input")
    parser.add_argument("--val_fraction", type=number(float, above=0, below=1),
                        help="final fraction of the text, to validate on (default 0.1)")
    parser.add_argument("--max_lines", type=number(int, low=1), help="use only the first N lines")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set made from another text")
    parser.add_argument("--data_dir", default="data", help="default: data")
    parser.add_argument("--list", action="store_true", help="list the data sets, prepared and built-in, and exit")
    args = parser.parse_args(argv)
    if args.list and any(value for name, value in vars(args).items() if name not in ("list", "data_dir")):
        raise UserError("--list stands alone, or with --data_dir")
    if args.list:
        return print(datasets_table(args.data_dir))
    if [args.corpus, args.input, args.from_nanogpt].count(None) != 2:
        raise UserError(f"give a corpus ({builtin}), or --input FILE... or --from_nanogpt DIRECTORY with --name NAME")
    if args.corpus and args.corpus not in CORPORA:
        raise UserError(unknown_corpus(args.corpus, args.data_dir))
    changes_text = args.tokenizer or args.val_fraction or args.max_lines
    changed = args.input or args.from_nanogpt or changes_text
    name = args.name or (args.corpus if not changed else None)
    if not name or not (is_free_name(name) or (name == args.corpus and not changed)):
        raise UserError(f"a data set of your own, or a variant, needs --name NAME, a plain directory name other than "
                        f"{builtin} and downloads")
    if args.from_nanogpt:
        if changes_text:
            raise UserError("--from_nanogpt takes the files as they are: leave --tokenizer, --val_fraction and "
                            "--max_lines out")
        return print(take_over(args.from_nanogpt, name, args.data_dir, args.overwrite))
    load_text, tokenizer_kind = CORPORA.get(args.corpus, (None, "char"))
    text = "".join(map(read_text, args.input)) if args.input else load_text(args.data_dir)
    if args.max_lines:
        text = first_lines(text, args.max_lines)
    prepare_text(text, name, args.tokenizer or tokenizer_kind, args.data_dir, args.val_fraction or 0.1, args.overwrite)


if __name__ == "__main__":
    run_script(main)
