"""Write a checkpoint as a directory that Hugging Face's transformers opens with from_pretrained, tokenizer included.

    python export_hf.py --ckpt checkpoints/shakespeare/best.pt --out exported

The GPT-2 family becomes a GPT2LMHeadModel; RMSNorm, SwiGLU and rotary positions without biases a LlamaForCausalLM,
with normalized queries and keys a Qwen3ForCausalLM.
"""

from pathlib import Path

from core.export import layout_of, write_pretrained
from core.runs import load_model
from lib.cli import UserError, command_line, plural, run_script, script_parser


def main(argv: list[str]) -> None:
    parser = script_parser("export_hf.py", __doc__)
    parser.add_argument("--ckpt", nargs="?", const="checkpoints", default="checkpoints", metavar="PATH",
                        help="a checkpoint, also nanoGPT's, or a run (default: the newest one under checkpoints/)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIRECTORY", help="a new or empty directory")
    parser.add_argument("--data_dir", default="data",
                        help="where the vocabulary of a checkpoint of nanoGPT may be (default: data)")
    args = parser.parse_args(argv)
    try:
        is_taken = args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {args.out}: {error.strerror}") from None
    if is_taken:
        raise UserError(f"{args.out} already exists and is not an empty directory: choose another --out")
    path, model, tokenizer, _ = load_model(args.ckpt, args.data_dir)
    layout = layout_of(model.config, path)
    write_pretrained(args.out, model, tokenizer, layout)
    here = f", or here with --init_from={command_line([str(args.out)])}" if layout == "GPT-2" else ""
    print(f"{path} -> {args.out}: {layout}'s layout, {model.n_params():,} parameters, {tokenizer.kind} tokenizer with "
          f"{plural(tokenizer.vocab_size, 'symbol')}; open it with transformers' AutoModelForCausalLM and "
          f"AutoTokenizer.from_pretrained({str(args.out)!r}){here}")


if __name__ == "__main__":
    run_script(main)
