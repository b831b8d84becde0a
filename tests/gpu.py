"""make gpu: builds relu_ext for the GPU that is here, tests it and measures it; logs, and a summary at the end.

A part that fails or takes too long does not stop the others; one for which no time is left is not run.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
FOUND_ERRORS = 99  # compute-sanitizer's exit status where it has found any


@dataclass(frozen=True)
class Command:
    """Has done what it should when it ends with this status and its log has a match of `says`."""

    arguments: list
    environ: dict[str, str] = field(default_factory=dict)
    status: int = 0
    says: str = ""


class Part(NamedTuple):
    what: str
    seconds: float  # more than this it does not get
    commands: Callable[[Path], dict[str, Command]]  # by name, for the folder of results
    key: str = r"\S.*"  # what matches this last in a log is shown in the summary, else the log's last line
    at_once: bool = False  # else one after the other, as long as they succeed


class Outcome(NamedTuple):
    verdict: str
    seconds: float
    key: str


def build(out: Path) -> dict[str, Command]:
    setup = Command(
        [PYTHON, "setup.py", "build_ext", "--inplace", "--force"],
        # compute-sanitizer then names lines of the sources; no instruction changes.
        {"RELU_EXT_CUDA": "1", "NVCC_APPEND_FLAGS": "-lineinfo"},
    )
    return {"build": setup, "info": Command([PYTHON, "-m", "relu_ext"], says=r"^cuda_archs +\w*\d")}


def test(out: Path) -> dict[str, Command]:
    pytest = [PYTHON, "-m", "pytest", "-rs", "--durations=10"]
    return {"cuda": Command([*pytest, "-k", "cuda"]), "cpu": Command([*pytest, "-k", "not cuda"])}


def sanitize(out: Path) -> dict[str, Command]:
    def watched(tool: str, *options: str, test: str = "--kernel-test", **expected) -> Command:
        # Without PyTorch's cache each tensor is memory of its own, past whose end nobody may go.
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), *options]
        return Command([*sanitizer, PYTHON, __file__, test], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, **expected)

    # PyTorch asks CUDA for what it may not have, and copes; launches that fail are its errors anyway.
    memcheck = ["memcheck", "--report-api-errors", "no", "--padding", "64"]
    return {
        "memcheck": watched(*memcheck, says=r"ERROR SUMMARY: 0 errors"),
        "racecheck": watched("racecheck", says=r"RACECHECK SUMMARY: 0 hazards"),
        "initcheck": watched("initcheck", says=r"ERROR SUMMARY: 0 errors"),
        "synccheck": watched("synccheck", says=r"ERROR SUMMARY: 0 errors"),
        "planted": watched(*memcheck, test="--planted-overrun", status=FOUND_ERRORS, says=r"Invalid __global__"),
    }


def bench(out: Path) -> dict[str, Command]:
    measure = [PYTHON, "benchmarks/run.py", "--devices", "cuda", "--json", out / "latest-{device}.json"]
    return {"run": Command(measure), "plot": Command([PYTHON, "benchmarks/plot.py", out])}


def digits(out: Path) -> dict[str, Command]:
    return {"train": Command([PYTHON, "benchmarks/train_digits.py", "--device", "cuda"])}


def sweep(out: Path) -> dict[str, Command]:
    return {"sweep": Command([PYTHON, "benchmarks/sweep.py", "--json", out / "latest-{device}-sweep.json"])}


def kernels(out: Path) -> dict[str, Command]:
    return {"kernels": Command([PYTHON, __file__, "--kernel-test"])}


PARTS = {
    "build": Part("the extension in place, for the GPU that is here", 240, build, key=r"^cuda_archs.*"),
    "kernels": Part("a short test of every kernel", 60, kernels),
    "test": Part(
        "the whole test-suite, CUDA and CPU at once", 300, test, key=r"\d+ (passed|failed|error).*", at_once=True
    ),
    "sanitize": Part(
        "compute-sanitizer's four tools over the short test, and memcheck over a planted overrun",
        180,
        sanitize,
        key=r"SUMMARY: .*",
        at_once=True,
    ),
    "bench": Part("benchmarks/run.py on CUDA, and its pictures", 270, bench, key=r"^targets: .*"),
    "digits": Part("benchmarks/train_digits.py on CUDA", 60, digits, key=r"(not )?bit-identical.*"),
    "sweep": Part("benchmarks/sweep.py: tiles and cache hints", 120, sweep),
}


# Running commands


@cache
def environment() -> dict[str, str]:
    """Programs of this Python (ninja) and of the CUDA toolkit are found, and what is printed is in the log at once."""
    from torch.utils.cpp_extension import CUDA_HOME

    toolkit = [str(Path(CUDA_HOME, "bin"))] if CUDA_HOME else []
    path = os.pathsep.join([sysconfig.get_path("scripts"), *toolkit, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "150"}


class Running:
    """A command under way in a process group of its own, which writes to its log."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log = command, log
        environ = environment() | command.environ
        arguments = [str(argument) for argument in command.arguments]
        program = shutil.which(arguments[0], path=environ["PATH"])
        if program is None:
            log.write_text(f"{arguments[0]} is not found\n")
            self.process = None
            return
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [program, *arguments[1:]],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, until: float) -> bool:
        """Has it ended by then?"""
        with suppress(subprocess.TimeoutExpired):
            if self.process:
                self.process.wait(max(0.0, until - time.monotonic()))
        return self.process is None or self.process.returncode is not None

    def kill(self) -> None:
        """Also what it has started and left behind."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def succeeded(self) -> bool:
        if self.process is None or self.process.returncode != self.command.status:
            return False
        return re.search(self.command.says, self.log.read_text(errors="replace"), re.M) is not None

    def says(self, pattern: str) -> str | None:
        """What matches last in its log."""
        found = [match[0].strip() for match in re.finditer(pattern, self.log.read_text(errors="replace"), re.M)]
        return found[-1] if found else None


@contextmanager
def killed_at_the_end(running: list[Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for each in running:
            each.kill()


def run(name: str, part: Part, out: Path, deadline: float) -> Outcome:
    start = time.monotonic()
    until = min(deadline, start + part.seconds)
    running: list[Running] = []
    with killed_at_the_end(running):
        for command_name, command in part.commands(out).items():
            log = name if command_name == name else f"{name}-{command_name}"
            running.append(Running(command, out / f"{log}.log"))
            if not part.at_once and not (running[-1].wait(until) and running[-1].succeeded()):
                break
        in_time = all([each.wait(until) for each in running])
    verdict = "passed" if all(each.succeeded() for each in running) else "failed" if in_time else "timed out"
    shown = [each for each in running if verdict == "passed" or not each.succeeded()]
    return Outcome(verdict, time.monotonic() - start, what_they_say(part, shown))


def what_they_say(part: Part, commands: list[Running]) -> str:
    keys = {each.log.stem.partition("-")[2]: each.says(part.key) for each in commands}
    last_lines = {each.log.stem.partition("-")[2]: each.says(r"\S.*") for each in commands}
    if part.at_once:
        return "; ".join(f"{name}: {keys[name] or last_lines[name] or 'nothing'}" for name in keys)
    found = [text for text in (*last_lines.values(), *keys.values()) if text]
    return found[-1] if found else "nothing in the log"


def run_all(names: list[str], out: Path, seconds: float, console: Console) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + seconds
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for name in names:
        part, left = PARTS[name], deadline - time.monotonic()
        if left < part.seconds / 4:
            outcomes[name] = Outcome("not run", 0.0, f"{max(left, 0):.0f} s of {seconds:.0f} s are left")
        else:
            with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
                progress.add_task(f"{name}: {part.what}")
                outcomes[name] = run(name, part, out, deadline)
        verdict, took, key = outcomes[name]
        console.print(f"{name}: [{STYLES[verdict]}]{verdict}[/] after {took:.0f} s; {escape(key)}", soft_wrap=True)
    return outcomes


STYLES = {"passed": "green", "failed": "bold red", "timed out": "bold red", "not run": "yellow"}


def summary(outcomes: dict[str, Outcome]) -> Table:
    table = Table()
    for heading in ("part", "verdict", "seconds", "what it says"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for name, (verdict, seconds, key) in outcomes.items():
        table.add_row(name, f"[{STYLES[verdict]}]{verdict}[/]", f"{seconds:.0f}", escape(key))
    return table


# The short test. compute-sanitizer makes every access to memory slow, and every kernel of PyTorch is one more to watch,
# so numbers are made and compared on the CPU.


def kernel_test(device: str = "cuda") -> None:
    """Every kernel, at lengths around its tiles and at even and odd addresses, against PyTorch on the CPU."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch
    from operations import DTYPES, OPERATIONS, assert_same, kept_by, mixed_values, packed

    # Around a vector, a warp, a small tile; many of these; enough for large tiles, 16 MiB of any dtype, and a tail.
    lengths = [1, 7, 8, 9, 31, 33, 255, 1023, 1025, 2047, 2049, 4097, 2**16 + 5]
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for length in [*lengths, 2**24 // dtype.itemsize + 4099]:
                values, grads = (mixed_values(length, dtype, seed=seed) for seed in (length, -length))
                leaf = values.clone().requires_grad_()
                expected = operation.definition(leaf)
                (gradient,) = torch.autograd.grad(expected, leaf, grads)
                for offset in (0, 1):
                    input, grad = (torch.cat([x.new_zeros(offset), x]).to(device)[offset:] for x in (values, grads))
                    assert_same(operation.function(input).cpu(), expected.detach())
                    output, (bits,) = kept_by(operation.function, input.requires_grad_())
                    assert_same(output.detach().cpu(), expected.detach())
                    assert torch.equal(bits.cpu(), packed(operation.keep(values)))
                    assert_same(torch.autograd.grad(output, input, grad)[0].cpu(), gradient)
                    assert_same(operation.function_(input.detach()).cpu(), expected.detach())
    print(f"{len(OPERATIONS)} operations, {len(DTYPES)} dtypes, {len(lengths) + 1} lengths: equal to torch's")


def planted_overrun() -> None:
    """A tensor that says it is 64 elements longer than its memory: what does the sanitizer see of it?"""
    sys.path[:0] = [str(ROOT)]
    import torch

    import relu_ext

    class Longer:
        memory = torch.ones(1024, device="cuda")
        __cuda_array_interface__ = memory.__cuda_array_interface__ | {"shape": (1024 + 64,)}

    relu_ext.relu(torch.as_tensor(Longer(), device="cuda"))
    torch.cuda.synchronize()


# The command line


def part_name(name: str) -> str:
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return name


def parse() -> argparse.Namespace:
    lines = [f"  {name:10}{part.what}; at most {part.seconds:.0f} s" for name, part in PARTS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="parts, in the order in which they run:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", type=part_name, help="default: all")
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for logs and results; default: build/gpu")
    add("--seconds", type=float, default=600, help="for all parts together; default: %(default)s")
    add("--kernel-test", action="store_true", help="nothing but the short test that compute-sanitizer watches")
    add("--planted-overrun", action="store_true", help="nothing but a kernel that leaves its memory")
    options = parser.parse_args()
    import torch  # takes seconds, which --help should not

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        parser.exit(2, f"There is no GPU that torch can use: torch {torch.__version__} is {built}.\n")
    return options


def main() -> int:
    options = parse()
    if options.kernel_test:
        return kernel_test() or 0
    if options.planted_overrun:
        return planted_overrun() or 0
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    names = [name for name in PARTS if not options.parts or name in options.parts]
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    outcomes = run_all(names, out, options.seconds, console)
    passed = sum(outcome.verdict == "passed" for outcome in outcomes.values())
    console.print(summary(outcomes))
    console.print(f"{passed} of {len(names)} passed in {time.monotonic() - start:.0f} s; all output is in {out}")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
