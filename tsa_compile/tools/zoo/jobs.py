"""Run the zoo: every entry, implementation and scenario, in as many processes as wanted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence

import torch

from tsa_compile.tools.zoo.all_entries import ENTRIES, missing
from tsa_compile.tools.zoo.check_model import run_scenario
from tsa_compile.tools.zoo.entries import FLEX, Entry
from tsa_compile.tools.zoo.result import NOT_RUN, Result
from tsa_compile.tools.zoo.scenarios import SCENARIOS

Job = tuple[int, str]  # an entry's place among `ENTRIES`, and an implementation


def jobs_of(entries: Sequence[Entry]) -> list[Job]:
    return [(ENTRIES.index(e), implementation) for e in entries for implementation in e.implementations]


def run(jobs: Sequence[Job], processes: int = 1) -> Iterator[list[Result]]:
    """The results of each job, in the order of the jobs."""
    if processes == 1:
        yield from map(run_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(run_job, jobs)


def run_job(job: Job) -> list[Result]:
    """All scenarios of one entry with one implementation."""
    entry, implementation = ENTRIES[job[0]], job[1]
    why = missing(entry.library)
    if why is not None:
        return [Result(entry.name, entry.library, implementation, "", NOT_RUN, why)]
    torch.set_num_threads(1)
    with quiet():
        return _scenarios(entry, implementation)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log lines and warnings: the results have them."""
    log = logging.getLogger("tsa_compile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _scenarios(entry: Entry, implementation: str) -> list[Result]:
    results = []
    scenarios = SCENARIOS[entry.kind]
    for scenario in scenarios[:1] if implementation == FLEX else scenarios:  # flex attention is slow to trace, and never read
        results.append(run_scenario(entry, implementation, scenario))
        if results[0].status == "not offered":
            break  # not the call: the whole implementation
    return results
