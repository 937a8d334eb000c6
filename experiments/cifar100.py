"""The runs behind docs/results_scratch.md, made by examples/train.py: those that experiments/results/ lacks.

    python experiments/cifar100.py balanced DATA --jobs 2 --threads 1     # two runs at a time, each on a core
    python experiments/cifar100.py banks DATA --jobs 2 --threads 1        # from the simplex runs of the former
    python experiments/cifar100.py ablation DATA --jobs 2 --threads 1     # the recipe less one part at a time
    python experiments/cifar100.py selection DATA --jobs 2 --threads 1    # learning rates, on held-out training images
    python experiments/cifar100.py variants DATA --jobs 2 --threads 1     # of balanced: learning rate, start
    python experiments/cifar100.py longer DATA --jobs 2 --threads 1       # balanced, three times as many epochs
    python experiments/cifar100.py cost DATA                              # time and memory, on a quiet machine
    python experiments/cifar100.py long-tail DATA --list                  # what is done and what is not
    python experiments/cifar100.py published DATA                         # 200 epochs each: for a GPU
    python experiments/cifar100.py quarter DATA --jobs 2 --threads 1      # of the published epochs, all else the same
    python experiments/tables.py                                          # docs/results_scratch.md from all results

DATA is a folder of class folders of CIFAR-100, DATA/train/<class>/*.png and DATA/test/<class>/*.png. "long-tail" has
the 10,847 images of the published profile at imbalance 0.01, "published" and "quarter" the 12,608 of 0.02, the others
200 training images of each class. Other flags go to train.py, such as --precision bf16 and --threads 1, which change
rounding only. Runs that are interrupted go on where they stopped, and those that train as another one take its epochs.
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

import numpy as np
from published_banks import published_prototypes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import train  # noqa: E402

#: Arguments that change a result by rounding only.
ROUNDING_ARGUMENTS = ("precision", "channels_last", "compile")

NUM_CLASSES = 100
SEEDS = {
    "balanced": (0, 1, 2),
    "banks": (0, 1, 2),
    "ablation": (0,),
    "selection": (0, 1, 2),
    "variants": (0, 1, 2),
    "longer": (0,),
    "cost": (0, 1),
    "long-tail": (0, 1, 2),
    "published": (0,),
    "quarter": (0,),
}
DIMS = {
    "balanced": (100, 50, 25, 10),
    "banks": (50, 25, 10),
    "ablation": (100,),
    "selection": (100,),
    "variants": (100, 50),
    "longer": (100, 50),
    "cost": (50,),
    "long-tail": (100,),
    "published": (128,),
    "quarter": (128,),
}
#: How the names of methods begin whose heads have no fewer dimensions than classes.
WIDE = ("ETF [2]", "simplex, refitted")
#: Of a suite, another one whose data and budget it has, and whose trainings serve it.
TRAINED_IN = {"banks": "balanced", "ablation": "balanced", "variants": "balanced"}

#: File of the bank that minimises the published potential as far as it was published.
AS_PUBLISHED = "uniform-as-published-{dim}.npy"

#: The scale of the cosines in all these suites, older than the default is.
SCALE = "--scale 16"

#: Training towards the simplex, and the refit.
RECIPE = "--head etf --loss cross-entropy --lr 0.2 --refit 200"
#: Training towards fixed prototypes in half as many dimensions as there are classes, and the refit.
AT_HALF = f"{RECIPE} --dim 50 --head dl2pa --bank orthoplex"

# fmt: off
#: The same network, epochs, schedule and projection for all. docs/results_scratch.md tells which rates were compared.
METHODS: dict[str, dict[str, str]] = {
    "balanced": {
        "softmax": "--head softmax --lr 0.2 --dim {dim}",
        "softmax, refitted": "--head softmax --lr 0.2 --dim {dim} --refit 200",
        "softmax at D = 100, then softmax at D": "--head softmax --lr 0.2 --dim 100 --refit 200 --final-dim {dim}",
        "ETF [2]": "--head etf --loss cross-entropy --lr 0.2 --refit 0 --dim {dim}",
        "simplex, refitted": f"{RECIPE} --dim {{dim}}",
        "simplex, then class-vector prototypes": f"{RECIPE} --dim 100 --final-dim {{dim}}",
        "HPN, static [3]": "--head hpn --loss balanced --reduction sum --lr 0.05 --dim {dim}",
        "DL2PA [1]": "--head dl2pa --bank uniform --start random --momentum 0.95 --loss balanced "
                     "--reduction sum --lr 0.05 --dim {dim}",
    },
    "banks": {
        bank: f"{RECIPE} --dim 100 --final-dim {{dim}} --final-bank {bank}"
        for bank in ("orthoplex", "separated", "hpn", "uniform", "random")
    } | {"uniform, as published": f"{RECIPE} --dim 100 --final-dim {{dim}} --final-bank {AS_PUBLISHED}"},
    "ablation": {
        "the recipe": f"{RECIPE} --dim {{dim}}",
        "no batch norm before the normalisation": f"{RECIPE} --dim {{dim}} --projection linear",
        "scale 8 instead of 16": f"{RECIPE} --dim {{dim}} --scale 8",
        "learning rate 0.1 instead of 0.2": f"{RECIPE} --dim {{dim}} --lr 0.1",
        "weight decay 1e-4 instead of 5e-4": f"{RECIPE} --dim {{dim}} --weight-decay 1e-4",
        "a start from the data": f"{RECIPE} --dim {{dim}} --start data",
        "training at D = 50: orthoplex, start from the data, dynamic": f"{AT_HALF} --start data",
        "the same, matched 4 times an epoch, frozen after 3":
            f"{AT_HALF} --start data --assign-every 0.25 --freeze-epoch 3",
        "the same, momentum 0.5 instead of 0.9": f"{AT_HALF} --start data --momentum 0.5",
        "the same, static": f"{AT_HALF} --start data --assignment static",
        "the same, dynamic from a random start": f"{AT_HALF} --start random",
        "the same, static from a random start": f"{AT_HALF} --start random --assignment static",
    },
    "long-tail": {
        "softmax": "--head softmax --lr 0.1 --dim {dim}",
        "softmax, refitted": "--head softmax --lr 0.1 --dim {dim} --refit 200",
        "softmax, refitted, 100 iterations": "--head softmax --lr 0.1 --dim {dim} --refit 100",
        "ETF + dot regression [2]": "--head etf --loss long-tail --lr 0.1 --dim {dim}",
        "DL2PA [1]": "--head dl2pa --bank uniform --start random --momentum 0.95 --loss long-tail "
                     "--lr 0.1 --dim {dim}",
        "simplex at the end": "--head softmax --lr 0.1 --dim {dim} --refit 200 --final-dim {dim} --final-bank simplex",
    },
    "published": {
        "DL2PA [1]": "--head dl2pa --dim {dim}",
        "ETF + dot regression [2]": "--head etf --loss long-tail --dim {dim}",
        "softmax": "--head softmax --dim {dim}",
        "softmax, refitted": "--head softmax --dim {dim} --refit 200",
        "softmax, refitted, 100 iterations": "--head softmax --dim {dim} --refit 100",
        "simplex at the end": "--head softmax --dim {dim} --refit 200 --final-dim {dim} --final-bank simplex",
    },
}
METHODS["cost"] = {
    method: METHODS["balanced"][method]
    for method in (
        "softmax", "softmax at D = 100, then softmax at D", "simplex, then class-vector prototypes", "HPN, static [3]",
        "DL2PA [1]",
    )
}
METHODS["longer"] = {
    method: METHODS["balanced"][method]
    for method in (
        "softmax", "softmax, refitted", "softmax at D = 100, then softmax at D", "ETF [2]", "simplex, refitted",
        "simplex, then class-vector prototypes",
    )
}
METHODS["quarter"] = {
    method: METHODS["published"][method]
    for method in (
        "DL2PA [1]", "softmax", "softmax, refitted", "softmax, refitted, 100 iterations", "simplex at the end",
    )
}
METHODS["selection"] = {
    f"{method}, learning rate {rate}": f"{METHODS['balanced'][method]} --lr {rate}{more}"
    for methods, rates, more in (
        (("softmax", "softmax, refitted", "ETF [2]", "simplex, refitted"), (0.2, 0.4, 0.8), ""),
        (("HPN, static [3]", "DL2PA [1]"), (0.05, 0.1), " --dim 50"),
    )
    for method in methods
    for rate in rates
} | {"simplex, refitted, start from the data": f"{RECIPE} --dim {{dim}} --start data"}
METHODS["variants"] = {
    f"{method}, {variant}": f"{METHODS['balanced'][method]} {flags}"
    for variant, flags, methods in (
        ("learning rate 0.4", "--lr 0.4", ("softmax", "softmax, refitted", "softmax at D = 100, then softmax at D")),
        ("start from the data", "--start data", ("simplex, refitted", "simplex, then class-vector prototypes")),
    )
    for method in methods
}
# fmt: on
BUDGET = {
    "balanced": "--model cifar_resnet20 --epochs 10 --projection linear+bn",
    "longer": "--model cifar_resnet20 --epochs 30 --projection linear+bn",
    # One epoch takes as long as another.
    "cost": "--model cifar_resnet20 --epochs 1 --projection linear+bn",
    # Of the training images alone.
    "selection": "--model cifar_resnet20 --epochs 10 --projection linear+bn --validation 0.2",
    "long-tail": "--model cifar_resnet20 --epochs 20 --projection linear+bn --mixup 1.0",
    # The data are long-tailed already, and whole.
    "published": "--preset cifar100-lt --imbalance 1.0 --holdout 0",
}
# The learning rate falls at the same shares of the epochs.
BUDGET["quarter"] = f"{BUDGET['published']} --epochs 50 --milestones 40 45"


def runs(suite: str) -> Iterator[tuple[str, list[str]]]:
    """Name of the method and flags of train.py of each run, the most telling first."""
    budget = f"{BUDGET[TRAINED_IN.get(suite, suite)]} {SCALE}"
    for seed in SEEDS[suite]:
        for dim in DIMS[suite]:
            for method, template in METHODS[suite].items():
                without_simplex = method.startswith(WIDE) and dim < NUM_CLASSES
                none_fewer = "--dim 100" in template and dim >= NUM_CLASSES  # than in training
                no_orthoplex = method == "orthoplex" and dim < NUM_CLASSES / 2
                if without_simplex or none_fewer or no_orthoplex:
                    continue
                yield method, shlex.split(f"{budget} {template.format(dim=dim)} --seed {seed}")


def output_of(suite: str, flags: list[str]) -> Path:
    """Folder of the run with these flags."""
    return HERE / "output" / suite / sha256(" ".join(flags).encode()).hexdigest()[:12]


def deciding(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a run's arguments, those that decide its result; one that is not given decides nothing."""
    return {key: value for key, value in arguments.items() if key not in ROUNDING_ARGUMENTS and value is not None}


def arguments_of(flags: list[str]) -> dict[str, Any]:
    """What decides the result of a run with these flags, as its result line holds it."""
    described = train.described(train.parse_arguments(["DATA", *flags]))
    return deciding(json.loads(json.dumps(described)))


def trained_epochs(suite: str, flags: list[str]) -> Path | None:
    """The last checkpoint of another run that trained as this one does, if there is one."""
    arguments = arguments_of(flags)
    for place in sorted({suite, TRAINED_IN.get(suite, suite)}):
        for _, others in runs(place):
            path = output_of(place, others) / f"epoch{arguments['epochs']}.pt"
            same = train.training_of(arguments_of(others)) == train.training_of(arguments)
            if same and (place, others) != (suite, flags) and path.is_file():
                return path
    return None


def save_published_banks() -> None:
    """Write the files that some runs of "banks" read."""
    (HERE / "output").mkdir(exist_ok=True)
    for dim in DIMS["banks"]:
        rows = published_prototypes(NUM_CLASSES, dim, "uniformity")
        np.save(HERE / "output" / AS_PUBLISHED.format(dim=dim), rows.numpy())


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
        located = [str(HERE / "output" / flag) if flag.endswith(".npy") else flag for flag in flags]
        command = [sys.executable, str(HERE.parent / "examples/train.py"), str(arguments.data), *located]
        cache = HERE / "output" / f"{TRAINED_IN.get(arguments.suite, arguments.suite)}.pt"
        command += ["--cache", str(cache), "--output", str(output), "--resume"]
        command += ["--results", str(HERE / "results" / f"{arguments.suite}.jsonl"), "--quiet"]
        command += ["--keep-checkpoints", *more_flags]
        trained = trained_epochs(arguments.suite, flags)
        command += [] if trained is None else ["--epochs-from", str(trained)]
        with (output / "log.txt").open("a") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                print(f"failed: see {output / 'log.txt'}", flush=True)

    if arguments.list:
        for name, flags in missing:
            print(f"{name}: {' '.join(flags)}")
        return
    if arguments.suite == "banks":
        save_published_banks()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, missing[: arguments.limit]))


if __name__ == "__main__":
    main()
