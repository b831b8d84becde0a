"""make fuzz: the properties of test_properties.py for some minutes, with other examples each time.

What fails is shown with its smallest example and how to reproduce it, and the exit status is 1. After a crash the last
seed that was printed reproduces it: python tests/fuzz.py --seed SEED.
"""

import argparse
import faulthandler
import functools
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # relu_ext need not be installed

import hypothesis
import strategies  # registers the profiles
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

hypothesis.settings.load_profile("fuzz")  # before @given looks at it
import test_properties  # noqa: E402

EXAMPLES = strategies.LONG.max_examples
console = Console()


def properties() -> dict[str, Callable]:
    return {name: value for name, value in vars(test_properties).items() if name.startswith("test_")}


def count_into(counts: Counter, name: str, test: Callable, on_example: Callable) -> None:
    """Hypothesis calls ``inner_test`` for every example, those that it makes to shrink a failure too."""
    inner = test.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        counts[name] += 1
        on_example()
        return inner(*args, **kwargs)

    test.hypothesis.inner_test = counted


def rounds(first: int | None, end: float) -> Iterator[int]:
    """A seed for each round, printed before it."""
    seed = first
    while time.monotonic() < end:
        seed = secrets.randbits(32) if seed is None else seed
        console.print(f"seed {seed}")
        yield seed
        seed = None


def fuzz(minutes: float, first_seed: int | None, names: list[str]) -> Counter:
    """The number of examples of each property. Raises what a property raises, with Hypothesis's notes."""
    counts, tests, end = Counter(), properties(), time.monotonic() + 60 * minutes
    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=EXAMPLES)
        for name in names:
            count_into(counts, name, tests[name], lambda: progress.advance(task))
        for seed in rounds(first_seed, end):
            for name in names:
                progress.reset(task, description=name)
                hypothesis.seed(seed)(tests[name])()
                if time.monotonic() > end:
                    break
    return counts


def print_counts(counts: Counter, seconds: float) -> None:
    table = Table("property", "examples", title=f"{counts.total()} examples in {seconds:.0f} s")
    table.columns[1].justify = "right"
    for name, count in counts.items():
        table.add_row(name, str(count))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="of the first round")
    parser.add_argument("--only", nargs="+", choices=properties(), default=list(properties()), metavar="PROPERTY")
    options = parser.parse_args()
    faulthandler.enable()
    begin = time.monotonic()
    try:
        counts = fuzz(options.minutes, options.seed, options.only)
    except Exception:
        traceback.print_exc()
        return 1
    print_counts(counts, time.monotonic() - begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
