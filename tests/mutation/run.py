"""What the tests would not notice: small changes to the code, each tried against the tests of the function it is in.

    pip install -e ".[test,mutation]"
    python tests/mutation/run.py

Files and tests are listed in pyproject.toml under [tool.mutmut]. A sample is tried, the same at every run; the work is
done in the folder mutants/. Prints each change that no test noticed and is not in equivalent.toml, and the score: the
share noticed of those that are not equivalent.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED = 0
#: Meant for half an hour on two cores.
SAMPLE = 300


def mutmut(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        sys.exit(process.stdout)
    return process.stdout


def outcomes() -> dict[str, str]:
    """Of each change by name: "killed", "survived", "timeout", "no tests", "not checked", ..."""
    return dict(re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", mutmut("results", "--all", "true"), flags=re.MULTILINE))


def difference(name: str) -> tuple[str, ...]:
    """Lines taken out and put in, without their indentation: what a note in equivalent.toml is found by."""
    lines = mutmut("show", name).splitlines()
    return tuple(line[0] + line[1:].strip() for line in lines if re.match(r"[+-](?![+-]{2} )", line))


def notes() -> dict[tuple[str, ...], str]:
    """Why a change makes no difference, by its lines."""
    import tomllib  # of Python 3.11; pytest, looking for doctests, imports this file with 3.10 as well

    entries = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text())["equivalent"]
    return {(f"-{entry['before']}", f"+{entry['after']}"): entry["because"] for entry in entries}


def sampled(names: list[str], size: int) -> list[str]:
    """In order, so that the sample does not depend on how many names there are of other files."""
    return sorted(random.Random(SEED).sample(sorted(names), min(size, len(names))))


def noticed(results: dict[str, str]) -> Iterator[tuple[str, bool]]:
    for name, outcome in results.items():
        yield name, outcome in ("killed", "timeout", "caught by type check")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help='names of changes, such as "hyperproto.targets.*"')
    parser.add_argument("--sample", type=int, default=SAMPLE)
    arguments = parser.parse_args()
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    # A few changes, which write down all others, and which tests run which function.
    mutmut("run", "--max-children", "2", "hyperproto.targets.*__mutmut_1")
    names = sampled([name for name in outcomes() if fnmatch(name, arguments.pattern)], arguments.sample)
    mutmut("run", "--max-children", "2", *names)
    results = {name: outcome for name, outcome in outcomes().items() if name in set(names)}
    known, unnoticed, equivalent = notes(), [], 0
    for name, killed in noticed(results):
        if killed:
            continue
        lines = difference(name)
        if lines in known:
            equivalent += 1
        else:
            unnoticed.append(name)
            print(f"{name}: {results[name]}", *lines, sep="\n    ")
    counted = len(names) - equivalent
    print(f"{counted - len(unnoticed)} of {counted} changes noticed, {100 * (1 - len(unnoticed) / counted):.1f} %; "
          f"{equivalent} others make no difference")  # fmt: skip


if __name__ == "__main__":
    main()
