"""What `train_gpt2.py --help` prints: every field of a run, in groups."""

from core.config import FIELDS, kind_of
from lib.cli import script_parser

# The first field of each group, in the order of core/config.py.
GROUPS = {"dataset": "data", "init_from": "model", "max_iters": "length of the run", "optimizer": "optimizer",
          "eval_interval": "evaluation, logging, checkpoints", "run_name": "run", "device": "machine"}
USAGE = "python train_gpt2.py [CONFIG.py] [--field=value ...] [--resume] [--plan[=measure]]"


def help_text() -> str:
    """Every field with its choices or type, help and default."""
    parser = script_parser("train_gpt2.py", "Train a GPT. A config file sets fields by plain assignments; flags "
                                            "override it.", usage=USAGE, add_help=False)
    for name, f in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind = kind_of(name)[0]
        values = ("true", "false") if kind is bool else f.metadata["limits"].get("choices")
        group.add_argument(f"--{name}", nargs="?" if kind is bool else None, choices=values,
                           metavar=None if values else kind.__name__.upper(),
                           help=f"{f.metadata['help']} (default {str(f.default).lower()})")
    group = parser.add_argument_group("instead of training")
    group.add_argument("--plan", nargs="?", metavar="measure", help="print memory, disk and length of the run; "
                                                                   "--plan=measure: its speed too")
    group.add_argument("--help", action="store_true", help="print this")
    return parser.format_help().rstrip()
