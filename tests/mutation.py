"""Bugs planted in copies of the project, one at a time, for tests to catch: what the lists of them share.

The lists are programs: FILE [a pattern of names], or FILE --fit, which only sees that each edit still fits its source
and takes no time.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS_FAILED = 1  # pytest's exit status; others, but for signals, are errors of its own


@dataclass(frozen=True)
class Mutant:
    """One bug: what it is, the edit that makes it, and what catches it.

    caught(folder), of a copy with the bug: what ended the tests, or the first that fails; or None.
    """

    name: str
    file: str
    old: str
    new: str
    caught: Callable[[Path], str | None]

    def edited(self, folder: Path) -> str:
        text = (folder / self.file).read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.name}: {self.file} has this {text.count(self.old)} times, not once:\n{self.old}")
        return text.replace(self.old, self.new)

    def plant(self, folder: Path) -> None:
        (folder / self.file).write_text(self.edited(folder))


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    caught: str | None
    seconds: float


def failure(process: subprocess.CompletedProcess) -> str | None:
    """The signal that ended a run of pytest, or the first test that fails; None where all pass."""
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"signal {-process.returncode}"
    if process.returncode != TESTS_FAILED:
        raise SystemExit(process.stdout + process.stderr)
    return re.search(r"^(?:FAILED|ERROR) .*::(\w+)", process.stdout, re.MULTILINE)[1]


def judge(mutant: Mutant, copied: Callable[[], AbstractContextManager[Path]]) -> Verdict:
    """copied() gives, for as long as the tests run, a copy of what is edited."""
    start = time.monotonic()
    with copied() as folder:
        mutant.plant(folder)
        verdict = Verdict(mutant, mutant.caught(folder), time.monotonic() - start)
    print(f"{mutant.name}: {verdict.caught or 'NOT CAUGHT'}", flush=True)
    return verdict


def print_table(verdicts: Sequence[Verdict]) -> None:
    table = Table("bug", "in", "caught by", "seconds")
    for verdict in verdicts:
        caught = verdict.caught or "[bold red]nothing"
        table.add_row(verdict.mutant.name, verdict.mutant.file, caught, f"{verdict.seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def fit(mutants: Sequence[Mutant], folder: Path) -> int:
    for mutant in mutants:
        mutant.edited(folder)
    print(f"{len(mutants)} planted bugs fit the source")
    return 0


def matching(mutants: Sequence[Mutant], pattern: str = "") -> list[Mutant]:
    return [mutant for mutant in mutants if re.search(pattern, mutant.name)]


def run(mutants: Sequence[Mutant], copied: Callable[[], AbstractContextManager[Path]], at_once: int = 1) -> int:
    """The exit status: 1 where one is not caught."""
    with ThreadPoolExecutor(at_once) as pool:
        verdicts = list(pool.map(lambda mutant: judge(mutant, copied), mutants))
    print_table(verdicts)
    survivors = sum(verdict.caught is None for verdict in verdicts)
    print(f"{len(verdicts)} bugs planted, {survivors} not caught")
    return 1 if survivors or not verdicts else 0
