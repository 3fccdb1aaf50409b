"""Write a checkpoint as a directory that Hugging Face's transformers opens with from_pretrained, tokenizer included.

    python export_hf.py --ckpt checkpoints/shakespeare/best.pt --out exported
"""

import shlex
from pathlib import Path

from core.checkpoint import find_checkpoint, load_model
from core.huggingface import check_exportable, write_pretrained
from lib.cli import UserError, run_script, script_parser


def main(argv: list[str]) -> None:
    parser = script_parser("export_hf.py", __doc__)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help="a checkpoint or a run directory (default: the newest checkpoint under checkpoints/)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIRECTORY", help="a new or empty directory")
    args = parser.parse_args(argv)
    try:
        is_taken = args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {args.out}: {error.strerror}") from None
    if is_taken:
        raise UserError(f"{args.out} already exists and is not an empty directory: choose another --out")
    path = find_checkpoint(args.ckpt)
    model, tokenizer, _ = load_model(path)
    check_exportable(model.config, path)
    write_pretrained(args.out, model, tokenizer)
    print(f"{path} -> {args.out}: {model.n_params():,} parameters, {tokenizer.kind} tokenizer with "
          f"{tokenizer.vocab_size:,} symbols; open it with transformers' AutoModelForCausalLM and "
          f"AutoTokenizer.from_pretrained({str(args.out)!r}), or here with --init_from={shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run_script(main)
