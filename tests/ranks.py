"""Runs a function on several ranks of a gloo group on the CPU, each a process of its own."""

import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

#: Forks processes from one that has imported torch already and done nothing else with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hyperproto.testing.strategies",
        "pytest",
        "scipy.optimize",
        "timm",
        "torch._dynamo.utils",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.debug",
    ]
)

#: Another kind of machine, as far as a process can be one: what a CPU without AVX computes.
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def run_on_unequal_machines(
    function: Callable[..., Any], *arguments: object, num_ranks: int = 2, seconds: float = 120
) -> list[Any]:
    """As `run_on_ranks`, on ranks of which all but the first compute with other kernels."""
    # Kernels are chosen when torch is imported: these processes start afresh.
    spawn = multiprocessing.get_context("spawn")
    environments = [{}, *[OTHER_KERNELS] * (num_ranks - 1)]
    return run_on_ranks(function, num_ranks, *arguments, seconds=seconds, context=spawn, environments=environments)


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: object,
    seconds: float = 60,
    context: multiprocessing.context.BaseContext = CONTEXT,
    environments: Sequence[dict[str, str]] = (),
) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank; it must be importable, its results plain or tensors.

    Raises:
        AssertionError: a rank raised, with its traceback, or the ranks were not done in time, as when one of them
            waits for a collective that the others do not join.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(function, rank, world_size, folder, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process, environment in itertools.zip_longest(processes, environments, fillvalue={}):
            with mock.patch.dict(os.environ, environment):
                process.start()
        deadline = time.monotonic() + seconds
        running = {process.sentinel: process for process in processes}
        failed = False
        while running and not failed and time.monotonic() < deadline:
            for sentinel in multiprocessing.connection.wait(list(running), deadline - time.monotonic()):
                process = running.pop(sentinel)
                process.join()
                failed |= process.exitcode != 0
        for process in running.values():
            process.kill()
            process.join()
        tracebacks = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert not tracebacks, "\n".join(tracebacks)
        assert not failed, f"exit codes {[process.exitcode for process in processes]}"
        assert not running, f"not done in {seconds} s"
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]


def _run(function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[object, ...]) -> None:
    try:
        warnings.simplefilter("error")
        # Dynamo asks for the gradient of whatever a compiled function is given.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        torch.save(function(rank, *arguments), Path(folder, f"{rank}.pt"))
        dist.barrier()  # no rank leaves while another still talks to it
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through destroy_process_group: torch 2.6 may wait there for ever, with the interpreter's lock held, for a
        # thread of gloo that needs this lock to let go of its last tensor.
        os._exit(0)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        sys.exit(1)
