"""Processes of their own, for what may crash, exit or be interrupted: forked, or of a new interpreter."""

import faulthandler
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tally import TRIED

TESTS = Path(__file__).resolve().parent
# Autograd's threads, which it has for an accelerator, do not survive a fork.
CAN_FORK = not torch.accelerator.is_available()
MOST_SECONDS = 120
FAULTS = "faults"


def in_child(faults: Iterable[tuple[str, Callable]]) -> None:
    """Calls these functions, each with a name, in one forked process.

    A crash fails with the name that it was in, one that does not end with what its threads do.
    """
    if not CAN_FORK:
        for _, fault in faults:
            fault()
            TRIED[FAULTS] += 1
        return
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True, file=writing)
        torch.set_num_threads(1)
        try:
            for name, fault in faults:
                os.write(writing, f"{name}\n".encode())
                fault()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status >= 0, f"signal {-status} in {said.splitlines()[-1:]}"
    assert status == 0, said
    TRIED[FAULTS] += len(said.splitlines())


def run_script(script: str, **environment: str) -> str:
    """What a new interpreter prints. It must exit with 0 and have nothing to say on stderr."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        cwd=TESTS,  # from which the project's package is not imported before that of PYTHONPATH
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr or f"exit status {done.returncode}"
    return done.stdout
