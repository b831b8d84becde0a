"""The CPU code under sanitizers: python run.py memory [pytest's arguments] | threads

memory: the tests, with AddressSanitizer and UndefinedBehaviorSanitizer in the extension. They are not in Python, torch
and libgomp: of what these do they see calls of the C library, and that all memory is allocated and freed once.

threads: the kernels in a program without torch (tests/portable/threads.cpp), under ThreadSanitizer. Of torch's threads
it can say nothing: libgomp and torch are built without it, so that it does not see what orders their accesses.

A finding ends the process that made it, is printed and fails the run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "sanitized"
REPORTS = BUILT / "reports"
CXX = os.environ.get("CXX", "g++")
sys.path.append(str(HERE.parent))
import variant  # noqa: E402

# Tests that are not run, each with its reason.
LEFT_OUT = {
    "tests/test_build.py": "looks at setup.py and at the files of a wheel",
    "tests/test_memory.py": "looks into glibc's malloc, in whose place is AddressSanitizer's",
    "tests/test_packaging.py": "looks at the extension that is shipped",
    "tests/test_threads.py::test_fork_while_threads_compute": "AddressSanitizer's locks stay locked in the child",
    "tests/test_faults.py::test_a_limited_address_space": "AddressSanitizer's shadow is larger than any limit",
}
# No finding: that torch is told so is what tests look at.
TOO_MUCH_MEMORY = re.compile(r"==\d+==WARNING: AddressSanitizer failed to allocate 0x[0-9a-f]+ bytes")


def runtime(name: str) -> str:
    """The path of a library that comes with the compiler."""
    command = [CXX, f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, str]:
    options = f"log_path={REPORTS}/report:print_stacktrace=1"
    own = "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1"
    return {
        **os.environ,
        # AddressSanitizer hands exceptions on to libstdc++, which it looks for when it starts.
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        # What Python leaves when it ends is not ours; test_memory.py looks for leaks. Of too much memory torch is told.
        "ASAN_OPTIONS": f"{options}:{own}",
        "UBSAN_OPTIONS": options,
        "PYTHONPATH": str(BUILT),
    }


def memory(*arguments: str) -> bool:
    print("building the extension with sanitizers", flush=True)
    if not variant.run_build(HERE / "build.py", BUILT):
        return False
    REPORTS.mkdir(exist_ok=True)
    for report in REPORTS.iterdir():
        report.unlink()
    # -P: not the package in the folder where this runs.
    command = [sys.executable, "-P", "-m", "pytest", *(f"--deselect={name}" for name in LEFT_OUT), *arguments]
    passed = subprocess.run(command, cwd=ROOT, env=environment()).returncode == 0
    found = [line for report in REPORTS.iterdir() for line in report.read_text(errors="replace").splitlines()]
    found = [line for line in found if not TOO_MUCH_MEMORY.fullmatch(line)]
    print(*found, sep="\n")
    return passed and not any(found)


def threads() -> bool:
    """Shares of a multiple of 64 elements have no race, and those of another number the one that is to be found."""
    program = BUILT / "threads"
    BUILT.mkdir(parents=True, exist_ok=True)
    kernels = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.stem != "backend"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([CXX, *flags, ROOT / "tests" / "portable" / "threads.cpp", *kernels, "-o", program], check=True)

    def races(share: int) -> int:
        result = subprocess.run([program, str(share)], capture_output=True, text=True)
        found = result.stderr.count("WARNING: ThreadSanitizer: data race")
        print(f"{result.stdout.strip()}, shares of {share} elements: {found} races")
        if share % 64 == 0:
            print(result.stderr, end="")
        return found if result.stdout else -1

    return races(64 * 3) == 0 and races(100) > 0


if __name__ == "__main__":
    part, *arguments = sys.argv[1:]
    sys.exit(not {"memory": memory, "threads": threads}[part](*arguments))
