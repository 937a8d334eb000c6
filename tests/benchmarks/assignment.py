"""Exact assignment: hyperproto's sparse solver beside scipy's dense one, on four shapes of class means.

    python tests/benchmarks/assignment.py --quick             # one size of two thousand labels, under a minute
    python tests/benchmarks/assignment.py                     # all sizes; --only 8000 for one of them
    python tests/benchmarks/assignment.py --device cuda       # the sparse solver's input lies on a GPU

The table of all sizes is part of docs/performance.md, which performance.py makes. Every row runs in a process of its
own. Seconds are wall time; CPU seconds are given too, since a busy machine stretches the former. The peer is
scipy.optimize.linear_sum_assignment, with and without the seconds that its matrix takes. "warm" is a second solve from
the first one's assignment and prices, with means moved a little. Memory is the growth of the peak of the process over
what it had with the inputs and scipy loaded.
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
    from torch.nn.functional import normalize

    generator = torch.Generator().manual_seed(0)

    def unit_rows(count):
        return normalize(torch.randn(count, dim, generator=generator))

    prototypes, noise = unit_rows(num_classes), unit_rows(num_classes)
    if shape == "random":
        return noise, prototypes
    if shape == "coinciding":
        return normalize(unit_rows(1) + 0.1 * noise), prototypes
    if shape == "clusters":
        return normalize(
            unit_rows(20)[torch.randint(20, (num_classes,), generator=generator)] + 0.1 * noise
        ), prototypes
    return normalize(prototypes[torch.randperm(num_classes, generator=generator)] + 0.5 * noise), prototypes


def measured(function, *args, **kwargs):
    """What a call returns, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_sparse(shape, num_classes, dim, device):
    import torch
    from torch.nn.functional import normalize

    from hyperproto.functional import solve_assignment

    means, prototypes = (rows.to(device) for rows in problem(shape, num_classes, dim))
    solve_assignment(means[:200], prototypes[:200], method="sparse")  # loads scipy
    before = peak_mib()
    first, seconds, cpu = measured(solve_assignment, means, prototypes, method="sparse")
    memory = peak_mib() - before
    noise = normalize(torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(1)))
    noise = noise.to(device)
    moved = normalize(means + 1e-3 * noise)
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


def cosines(means, prototypes):
    """The whole matrix in float64, as the dense solver takes it."""
    return (means.double() @ prototypes.double().T).numpy()


def run_dense(shape, num_classes, dim):
    from scipy.optimize import linear_sum_assignment
    from torch.nn.functional import normalize

    means, prototypes = problem(shape, num_classes, dim)
    linear_sum_assignment([[0.0]])
    before = peak_mib()
    similarity, matrix_seconds, _ = measured(cosines, normalize(means), normalize(prototypes))
    (rows, columns), seconds, cpu = measured(linear_sum_assignment, similarity, maximize=True)
    return {
        "seconds": seconds,
        "with_matrix": seconds + matrix_seconds,
        "cpu": cpu,
        "mib": peak_mib() - before,
        "total": float(similarity[rows, columns].sum()),
    }


def in_own_process(solver, shape, num_classes, dim, device):
    command = [sys.executable, __file__, "--row", solver, shape, str(num_classes), str(dim), "--device", device]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def measure(quick=False, only=None, device="cpu"):
    """The rows of all sizes, one after the other."""
    for num_classes, dim in SIZES["quick" if quick else "full"]:
        if only not in (None, num_classes):
            continue
        for shape in SHAPES if num_classes < 100_000 else LARGEST_SHAPES:
            row = {"shape": shape, "num_classes": num_classes, "dim": dim}
            row["sparse"] = in_own_process("sparse", shape, num_classes, dim, device)
            dense = num_classes <= LARGEST_DENSE
            row["dense"] = in_own_process("dense", shape, num_classes, dim, "cpu") if dense else None
            yield row


HEADING = ("labels", "dim", "means", "s", "cpu s", "warm s", "MiB", "scipy s", "with matrix", "MiB", "ratio", "proven")


def cells(row):
    """The texts of a row of the table under `HEADING`; the ratio is scipy's wall seconds over ours."""
    ours, peer = row["sparse"], row["dense"]
    texts = [f"{row['num_classes']:,}", str(row["dim"]), row["shape"]]
    texts += [f"{ours[name]:.2f}" for name in ("seconds", "cpu", "warm_seconds")] + [f"{ours['mib']:.0f}"]
    if peer is None:
        return [*texts, "-", "-", "-", "-", "yes" if ours["optimal"] else "no"]
    if abs(ours["total"] - peer["total"]) > 1e-6:
        raise RuntimeError(f"{row}: the totals differ")
    texts += [f"{peer['seconds']:.2f}", f"{peer['with_matrix']:.2f}", f"{peer['mib']:.0f}"]
    return [*texts, f"{peer['seconds'] / ours['seconds']:.1f}", "yes" if ours["optimal"] else "no"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--only", type=int, help="only this number of labels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the sparse solver's input")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        solver, shape, num_classes, dim = arguments.row
        size = int(num_classes), int(dim)
        result = run_sparse(shape, *size, arguments.device) if solver == "sparse" else run_dense(shape, *size)
        print(json.dumps(result))
        return
    line = "{:>7} {:>4} {:<10} {:>7} {:>7} {:>7} {:>6} {:>8} {:>11} {:>6} {:>7} {:>6}"
    print(line.format(*HEADING), flush=True)
    for row in measure(arguments.quick, arguments.only, arguments.device):
        print(line.format(*cells(row)), flush=True)


if __name__ == "__main__":
    main()
