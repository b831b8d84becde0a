"""What tests try in a run, of which there are many in one test: added up over pytest-xdist's workers and printed."""

from collections import Counter

import pytest

TRIED: Counter[str] = Counter()


def pytest_sessionfinish(session):
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))  # a worker that has crashed has none


def pytest_terminal_summary(terminalreporter):
    if TRIED:
        terminalreporter.write_line("tried: " + ", ".join(f"{TRIED[what]:,} {what}" for what in sorted(TRIED)))
