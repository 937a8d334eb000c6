"""Exact assignment: hyperproto's sparse solver beside scipy's dense one, on four shapes of class means.

    python tests/benchmarks/assignment.py --quick             # sizes of a few thousand labels, under a minute
    python tests/benchmarks/assignment.py --out figures.jsonl # all sizes; --only 8000 for one of them

Every row runs in a process of its own. Seconds are wall time; CPU seconds are given too, since a busy machine
stretches the former. The peer's are those of scipy.optimize.linear_sum_assignment alone, without making its matrix.
"warm" is a second solve from the first one's assignment and prices, with means moved a little. Memory is the growth of
the peak of the process over what it had with the inputs and scipy loaded.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

SHAPES = ("random", "coinciding", "clusters", "trained")
SIZES = {"quick": [(2000, 128)], "full": [(8000, 256), (21_841, 512), (100_000, 256)]}

#: Shapes of the largest size, and the largest size at which the dense peer runs (its matrix and its copy: 1 GiB).
LARGEST_SHAPES = ("trained", "random")
LARGEST_DENSE = 8000


def problem(shape, num_classes, dim):
    """Class means and prototypes: random unit prototypes, and means as an early, a middle or a late epoch has them."""
    import torch

    from hyperproto.geometry import normalise

    generator = torch.Generator().manual_seed(0)

    def unit_rows(count):
        return normalise(torch.randn(count, dim, generator=generator))

    prototypes, noise = unit_rows(num_classes), unit_rows(num_classes)
    if shape == "random":
        return noise, prototypes
    if shape == "coinciding":
        return normalise(unit_rows(1) + 0.1 * noise), prototypes
    if shape == "clusters":
        return normalise(
            unit_rows(20)[torch.randint(20, (num_classes,), generator=generator)] + 0.1 * noise
        ), prototypes
    return normalise(prototypes[torch.randperm(num_classes, generator=generator)] + 0.5 * noise), prototypes


def measured(function, *args, **kwargs):
    """What a call returns, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_sparse(shape, num_classes, dim):
    import torch

    from hyperproto.functional import solve_assignment
    from hyperproto.geometry import normalise

    means, prototypes = problem(shape, num_classes, dim)
    solve_assignment(means[:200], prototypes[:200], method="sparse")  # loads scipy
    before = peak_mib()
    first, seconds, cpu = measured(solve_assignment, means, prototypes, method="sparse")
    memory = peak_mib() - before
    noise = normalise(torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(1)))
    moved = normalise(means + 1e-3 * noise)
    warm, warm_seconds, warm_cpu = measured(
        solve_assignment, moved, prototypes, current=first.assignment, prices=first.prices, method="sparse"
    )
    return {
        "seconds": seconds,
        "cpu": cpu,
        "warm_seconds": warm_seconds,
        "warm_cpu": warm_cpu,
        "mib": memory,
        "total": first.similarity,
        "method": first.method,
        "optimal": first.optimal and warm.optimal,
    }


def run_dense(shape, num_classes, dim):
    from scipy.optimize import linear_sum_assignment

    from hyperproto.geometry import normalise

    means, prototypes = problem(shape, num_classes, dim)
    linear_sum_assignment([[0.0]])
    before = peak_mib()
    similarity = normalise(means).double().numpy() @ normalise(prototypes).double().numpy().T
    (rows, columns), seconds, cpu = measured(linear_sum_assignment, similarity, maximize=True)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "mib": peak_mib() - before,
        "total": float(similarity[rows, columns].sum()),
    }


def in_own_process(solver, shape, num_classes, dim):
    command = [sys.executable, __file__, "--row", solver, shape, str(num_classes), str(dim)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


HEADING = (
    "labels  dim shape       |  seconds      cpu     warm    MiB | scipy s      cpu    MiB |  ratio of cpu  proven"
)


def line(row):
    ours, peer = row["sparse"], row["dense"]
    text = f"{row['num_classes']:>6} {row['dim']:>4} {row['shape']:<11} | {ours['seconds']:8.2f} {ours['cpu']:8.2f} "
    text += f"{ours['warm_seconds']:8.2f} {ours['mib']:6.0f} | "
    if peer is None:
        return f"{text}      -        -      - |      -      -  {ours['optimal']}"
    ratio, cpu_ratio = peer["seconds"] / ours["seconds"], peer["cpu"] / ours["cpu"]
    text += f"{peer['seconds']:7.2f} {peer['cpu']:8.2f} {peer['mib']:6.0f} | {ratio:6.1f} {cpu_ratio:6.1f}  "
    return f"{text}{ours['optimal']}, totals differ by {abs(ours['total'] - peer['total']):.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--only", type=int, help="only this number of labels")
    parser.add_argument("--out", help="write the figures to this file, one JSON object a line")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        solver, shape, num_classes, dim = arguments.row
        run = run_sparse if solver == "sparse" else run_dense
        print(json.dumps(run(shape, int(num_classes), int(dim))))
        return
    print(HEADING, flush=True)
    rows = []
    for num_classes, dim in SIZES["quick" if arguments.quick else "full"]:
        if arguments.only not in (None, num_classes):
            continue
        for shape in SHAPES if num_classes < 100_000 else LARGEST_SHAPES:
            row = {"shape": shape, "num_classes": num_classes, "dim": dim}
            row["sparse"] = in_own_process("sparse", shape, num_classes, dim)
            row["dense"] = in_own_process("dense", shape, num_classes, dim) if num_classes <= LARGEST_DENSE else None
            rows.append(row)
            print(line(row), flush=True)
            if arguments.out:
                with open(arguments.out, "w") as file:
                    file.writelines(json.dumps(each) + "\n" for each in rows)


if __name__ == "__main__":
    main()
