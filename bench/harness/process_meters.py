"""What a stretch of this process takes in memory, and what others take of the machine (Linux)."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

SAMPLE_S = 0.002
QUIET_CORES = 0.1  # that others may take
_malloc_trim = ctypes.CDLL(None).malloc_trim


class PeakMemory:
    """Inside it, a thread keeps the largest RssAnon and RssFile over those at its beginning."""

    def __enter__(self) -> PeakMemory:
        _malloc_trim(0)
        self.peak = self.base = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.anon_bytes, self.file_bytes = (
            peak - base for peak, base in zip(self.peak, self.base, strict=True)
        )

    @staticmethod
    def now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        return 1024 * int(kib["RssAnon"]), 1024 * int(kib["RssFile"])

    def sample(self) -> None:
        while True:
            anon, file = self.now()
            self.peak = max(self.peak[0], anon), max(self.peak[1], file)
            if self.stop.wait(SAMPLE_S):
                return


class Others:
    """How many cores other processes kept busy meanwhile.

    Threads that wait for each other lose far more than the share that others take: with one of two
    cores taken, products by two threads have been seen to take eight times as long.
    """

    def __enter__(self) -> Others:
        self.began_s, self.theirs_s = time.perf_counter(), self.now_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = (self.now_s() - self.theirs_s) / (time.perf_counter() - self.began_s)

    @staticmethod
    def now_s() -> float:
        user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split()[1:9]
        ticks = sum(map(int, (user, nice, system, *interrupts)))
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def wait_for_quiet(limit_s: float) -> None:
    """Return when others have left the machine alone for two seconds, or after limit_s."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        with Others() as others:
            time.sleep(2)
        if others.cores < QUIET_CORES:
            return
