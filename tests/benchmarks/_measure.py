"""Cases measured each in a process of its own: median seconds, and peak memory above what was there before."""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def time_calls(call: Callable[[], object], *, repeats: int, warm_up: int = 1) -> float:
    """Median seconds of a call."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def time_alternately(first: Callable[[], object], second: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Median seconds of two calls that take turns, so that what else the machine does slows both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 3):
        for call, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            call()
            if number >= 3:  # the first ones warm up
                taken.append(time.perf_counter() - start)
    return median(seconds[0]), median(seconds[1])


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class PeakMemory:
    """Largest resident memory within the block, above that at its start, in MiB (sampled every 5 ms)."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = resident_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, resident_mib())

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_mib())

    @property
    def mib(self) -> float:
        """The result, after the block."""
        return self.peak - self.start


def in_new_process(script: str, case: str, **arguments: object) -> dict[str, float]:
    """Run `script --case case arguments` and return the JSON object that it prints last."""
    command = [sys.executable, script, "--case", case, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
