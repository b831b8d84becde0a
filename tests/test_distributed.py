"""Converted models on torch.distributed, in two gloo processes on the CPU; the checks are in distributed_checks.py.

The processes start once, for whichever test comes first, and make all checks in turn.
"""

import json
import os
import time

import pytest
import torch
from filelock import FileLock

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("a torch without distributed, or without gloo", allow_module_level=True)

import distributed_checks

SECONDS = 300  # for all checks; then the processes are ended


def run_checks(folder) -> str:
    """Empty, or why not every check was made."""
    processes = torch.multiprocessing.start_processes(
        distributed_checks.run, (folder,), nprocs=distributed_checks.RANKS, join=False, start_method="spawn"
    )
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=max(0, end - time.monotonic())):
            if time.monotonic() > end:
                return f"not done after {SECONDS} s"
    except Exception as error:  # a process has died, and join has ended the other
        return str(error)
    finally:
        for process in processes.processes:
            process.kill()
    return ""


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> tuple[str, dict[str, list[str | None]]]:
    """Of one run, that pytest-xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "end").write_text(json.dumps(run_checks(folder)))
    return json.loads((folder / "end").read_text()), distributed_checks.outcomes(folder)


@pytest.mark.parametrize("name", [check.__name__ for check in distributed_checks.CHECKS])
def test_distributed(results, name):
    end, outcomes = results
    for rank, error in enumerate(outcomes[name]):
        if error != "":
            pytest.fail(f"rank {rank} did not come to it: {end}" if error is None else f"rank {rank}: {error}")
