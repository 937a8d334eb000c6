"""The runs behind docs/results.md, made by examples/train.py: those that experiments/results/ does not have yet.

    python experiments/cifar100.py balanced DATA --jobs 2 --threads 1     # two runs at a time, each on a core
    python experiments/cifar100.py banks DATA --jobs 2 --threads 1        # from the softmax runs of the former
    python experiments/cifar100.py long-tail DATA --list                  # what is done and what is not
    python experiments/cifar100.py published DATA                         # 200 epochs each: for a GPU
    python experiments/tables.py                                          # docs/results.md from all results

DATA is a folder of CIFAR-100's class folders, DATA/train/<class>/*.png and DATA/test/<class>/*.png: 200 training images
of each class for "balanced" and "banks", the 10,847 images of the published profile at imbalance 0.01 for "long-tail",
the 12,608 of 0.02 for "published". Other flags go to train.py, such as --precision fp32 and --threads 1; what they
change is rounding. Runs that are interrupted go on where they stopped, and those that begin as a softmax run did take
its epochs from that one's folder.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import train  # noqa: E402

#: Arguments that change a result by rounding only.
ROUNDING_ARGUMENTS = ("precision", "channels_last", "compile")

NUM_CLASSES = 100
SEEDS = {"balanced": (0, 1, 2), "banks": (0, 1, 2), "long-tail": (0, 1, 2), "published": (0,)}
DIMS = {"balanced": (100, 50, 25, 10), "banks": (50,), "long-tail": (100,), "published": (128,)}
#: Of a suite without softmax runs, the one that has them on the same data.
SOFTMAX_SUITE = {"banks": "balanced"}
#: Of the cosines, for each D: in few dimensions more of them are large.
SCALES = {128: 16, 100: 16, 50: 16, 25: 12, 10: 8}

# fmt: off
#: The same network, epochs, schedule and projection for all. docs/results.md tells which learning rates were compared.
METHODS: dict[str, dict[str, str]] = {
    "balanced": {
        "softmax": "--head softmax --lr 0.2",
        "softmax at D = 100, truncated": "--head softmax --lr 0.2 --truncate {dim}",
        "softmax, refitted": "--head softmax --lr 0.2 --refit 100",
        "class-vector prototypes": "--head dl2pa --bank class-vectors --start-epoch 10 --assignment static "
                                   "--loss cross-entropy --lr 0.2 --scale {scale}",
        "class-vector prototypes, refitted": "--head dl2pa --bank class-vectors --start-epoch 10 --assignment static "
                                             "--loss cross-entropy --lr 0.2 --scale {scale} --refit 100",
        "ETF [2]": "--head etf --loss cross-entropy --lr 0.2",
        "HPN, static [3]": "--head hpn --loss balanced --reduction sum --lr 0.05",
        "DL2PA as published [1]": "--head dl2pa --bank uniform --start random --momentum 0.95 --loss balanced "
                                  "--reduction sum --lr 0.05",
    },
    "banks": {
        f"{bank}, fitted and refitted": f"--head dl2pa --bank {bank} --assignment static --loss cross-entropy --lr 0.2 "
                                        "--scale {scale} --start data --start-epoch 10 --refit 100"
        for bank in ("orthoplex", "separated", "hpn", "uniform", "random")
    },
    "long-tail": {
        "softmax": "--head softmax --lr 0.1",
        "softmax, refitted": "--head softmax --lr 0.1 --refit 100",
        "ETF + dot regression [2]": "--head etf --loss long-tail --lr 0.1",
        "DL2PA as published [1]": "--head dl2pa --bank uniform --start random --momentum 0.95 --loss long-tail "
                                  "--lr 0.1",
        "simplex by fit_head": "--head dl2pa --bank simplex --assignment static --loss cross-entropy --lr 0.1 "
                               "--start data --start-epoch 20",
        "simplex by fit_head, refitted": "--head dl2pa --bank simplex --assignment static --loss cross-entropy "
                                         "--lr 0.1 --start data --start-epoch 20 --scale 8 --refit 100",
    },
    "published": {
        "DL2PA [1]": "--head dl2pa",
        "ETF + dot regression [2]": "--head etf --loss long-tail",
        "softmax": "--head softmax",
        "simplex by fit_head, refitted": "--head dl2pa --bank simplex --assignment static --loss cross-entropy "
                                         "--start data --start-epoch 200 --scale 8 --refit 100",
    },
}
# fmt: on
BUDGET = {
    "balanced": "--model cifar_resnet20 --epochs 10 --projection linear+bn",
    "banks": "--model cifar_resnet20 --epochs 10 --projection linear+bn",
    "long-tail": "--model cifar_resnet20 --epochs 20 --projection linear+bn --mixup 1.0",
    # The data are long-tailed already.
    "published": "--preset cifar100-lt --imbalance 1.0",
}


def runs(suite: str) -> Iterator[tuple[str, list[str]]]:
    """Name of the method and flags of train.py of each run, the most telling first."""
    for seed in SEEDS[suite]:
        for dim in DIMS[suite]:
            for method, template in METHODS[suite].items():
                # A simplex needs as many dimensions as there are classes, and no truncation would be left.
                if (method.startswith("ETF") and dim < NUM_CLASSES) or (
                    "--truncate" in template and dim == NUM_CLASSES
                ):
                    continue
                flags = template.format(dim=dim, scale=SCALES[dim])
                width = NUM_CLASSES if "--truncate" in template else dim
                yield method, shlex.split(f"{BUDGET[suite]} {flags} --dim {width} --seed {seed}")


def output_of(suite: str, flags: list[str]) -> Path:
    """Folder of the run with these flags."""
    return HERE / "output" / suite / sha256(" ".join(flags).encode()).hexdigest()[:12]


def free_epochs(suite: str, flags: list[str]) -> Path | None:
    """The checkpoint of a softmax run that did what this run begins with, if the run begins so and there is one."""
    args = train.parse_arguments(["DATA", *flags])
    if not args.start_epoch and args.truncate is None and args.refit is None:
        return None
    tail = ["--dim", str(train.free_dim(args, NUM_CLASSES)), "--seed", str(args.seed)]
    of_softmax = SOFTMAX_SUITE.get(suite, suite)
    for method, softmax in runs(of_softmax):
        path = output_of(of_softmax, softmax) / f"epoch{args.start_epoch or args.epochs}.pt"
        if method == "softmax" and softmax[-len(tail) :] == tail and path.is_file():
            return path
    return None


def deciding(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arguments, those that decide its result; one that is not given decides nothing."""
    return {key: value for key, value in arguments.items() if key not in ROUNDING_ARGUMENTS and value is not None}


def arguments_of(flags: list[str]) -> dict[str, Any]:
    """What decides the result of a run with these flags, as its result line holds it."""
    described = train.described(train.parse_arguments(["DATA", *flags]))
    return deciding(json.loads(json.dumps(described)))


def results_of(suite: str) -> list[dict[str, Any]]:
    """All result lines of a suite."""
    path = HERE / "results" / f"{suite}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Start what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=METHODS)
    parser.add_argument("data", type=Path, help="folder of class folders")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is not")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit", type=int, help="start no more than so many runs")
    arguments, more_flags = parser.parse_known_args()
    done = [deciding(result["arguments"]) for result in results_of(arguments.suite)]
    missing = [(name, flags) for name, flags in runs(arguments.suite) if arguments_of(flags) not in done]
    print(f"{len(done)} results, {len(missing)} runs missing", flush=True)

    def start(run: tuple[str, list[str]]) -> None:
        name, flags = run
        output = output_of(arguments.suite, flags)
        output.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {' '.join(flags)} -> {output}", flush=True)
        command = [sys.executable, str(HERE.parent / "examples/train.py"), str(arguments.data), *flags]
        cache = HERE / "output" / f"{SOFTMAX_SUITE.get(arguments.suite, arguments.suite)}.pt"
        command += ["--cache", str(cache), "--output", str(output), "--resume"]
        command += ["--results", str(HERE / "results" / f"{arguments.suite}.jsonl"), "--quiet"]
        command += ["--keep-checkpoints", *more_flags]
        shared = free_epochs(arguments.suite, flags)
        command += [] if shared is None else ["--free-from", str(shared)]
        with (output / "log.txt").open("a") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                print(f"failed: see {output / 'log.txt'}", flush=True)

    if arguments.list:
        for name, flags in missing:
            print(f"{name}: {' '.join(flags)}")
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, missing[: arguments.limit]))


if __name__ == "__main__":
    main()
