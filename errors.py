"""The one kind of error that scripts report without a traceback."""

import errno
import io
import os
import re
import sys


class UserError(Exception):
    """Problems the user can mend. Each says what is wrong, where, and what to do."""

    def __init__(self, *problems):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self):
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


def run_script(main):
    """Run `main(argv) -> exit code or None` as a script, whose texts are UTF-8 on every system, and exit.

    A UserError becomes a line on stderr and exit code 2, Ctrl-C becomes 130; any other
    exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # not None, as where it is closed
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        if lost := [word for word in sys.argv[1:] if re.fullmatch(r"--\w+=--", word)]:
            raise UserError(f"{lost[0]}: a value cannot be '--'")  # argparse before Python 3.13 loses it
        code = main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Keep Python from failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0  # the reader of our output has gone (`| head`)
        if error.errno == errno.ENOSPC:
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
            code = 2
    sys.exit(code)
