"""`python -m hyperproto.timm SCRIPT ...`: a script as it is, with the names of converted models known."""

import runpy
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Run the script that the first argument names as if it were the program, with the arguments behind it."""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m hyperproto.timm SCRIPT [ARGUMENT ...]")
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as Python does for a script
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
