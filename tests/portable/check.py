"""The kernels where none of their instruction sets is: python check.py [COMPILER FLAG ...]

For plain x86-64 and for aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user) this shows what g++ makes of the portable
loops (loops.cpp): each must have a loop that loads and stores vectors, and calculates with nothing else. But SSE2
cannot compare 64-bit integers, and g++ makes no vectors of float64 with bits for it.

Then it runs every kernel (results.cpp) with each instruction set of this machine and, emulated, of aarch64: the same
bits from all, but for what a NaN looks like. Multiplications are not fused with additions for that: not all can,
and fma_relu, which is to fuse them where it can, is left out.

A target whose compiler or emulator is not installed is left out, and named.
"""

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = [CSRC / "cpu" / f"{name}.cpp" for name in ("kernels", "fused", "prelu", "gated", "monitor", "isa")]
FLAGS = ["-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp", f"-I{CSRC}", *sys.argv[1:]]

TYPES = {
    "relu_ext::Float16<(unsigned short)31744>": "float16",
    "relu_ext::Float16<(unsigned short)32640>": "bfloat16",
    "float": "float32",
    "double": "float64",
}
LOOP = re.compile(rf"relu_ext::cpu::(\w+)<({'|'.join(map(re.escape, TYPES))}), relu_ext::(\w+)<")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\t(\S+)\s*(.*)$")


@dataclass(frozen=True)
class Target:
    """A processor and what of its instructions, with their operands, is which."""

    name: str
    prefix: str  # of the compiler's and the disassembler's names
    vector_load: re.Pattern
    vector_store: re.Pattern
    vector: re.Pattern
    scalar: re.Pattern  # arithmetic of floating-point numbers
    branch: re.Pattern  # group 1: where to
    no_vectors: tuple[str, ...] = ()  # of bits and this dtype

    @property
    def compiler(self) -> str:
        return f"{self.prefix}g++"


X86 = Target(
    name="x86-64 (SSE2)",
    prefix="",
    vector_load=re.compile(r"\w*(mov[ua]p[sd]|movdq[ua]|p[a-z]+|[a-z]+p[sd]) \S*\(.*,%xmm"),
    vector_store=re.compile(r"(mov[ua]p[sd]|movdq[ua]) %xmm\d+,.*\("),
    vector=re.compile(r".*%xmm"),
    scalar=re.compile(r"(add|sub|mul|div|min|max|sqrt|u?comi|cmp\w*|cvt\w*)s[sd] "),
    branch=re.compile(r"j[a-z]+ ([0-9a-f]+)"),
    no_vectors=("float64",),
)
ARM = Target(
    name="aarch64 (NEON)",
    prefix="aarch64-linux-gnu-",
    vector_load=re.compile(r"(ld[rp] q|ld[1-4] \{v)"),
    vector_store=re.compile(r"(st[rp] q|st[1-4] \{v)"),
    vector=re.compile(r".*\bv\d+\.|(ld[rp]|st[rp]) q"),
    scalar=re.compile(r"f\w+ [sdh]\d"),
    branch=re.compile(r"(?:b\.\w+|cbn?z \w+,|tbn?z \w+, #\d+,) ([0-9a-f]+)"),
)


def run(*command) -> str:
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE).stdout


def functions(target: Target, folder: Path) -> dict[tuple[str, str, str], list[tuple[int, str]]]:
    """Instructions with their addresses, by activation, loop and dtype."""
    compiled = folder / f"{target.prefix}loops.o"
    run(target.compiler, *FLAGS, "-ffp-contract=fast", "-c", HERE / "loops.cpp", "-o", compiled)
    found, own = {}, []
    for line in run(f"{target.prefix}objdump", "-dC", "--no-show-raw-insn", compiled).splitlines():
        if name := FUNCTION.match(line):
            loop = LOOP.search(name[1])
            own = found.setdefault((loop[3], loop[1], TYPES[loop[2]]), []) if loop else []
        elif instruction := INSTRUCTION.match(line):
            own.append((int(instruction[1], 16), f"{instruction[2]} {instruction[3]}"))
    return found


def loops(target: Target, instructions: list[tuple[int, str]]) -> list[list[str]]:
    """What is between a jump backward and where it goes."""
    found = []
    for end, (address, text) in enumerate(instructions):
        if (branch := target.branch.match(text)) and int(branch[1], 16) < address:
            found.append([own for at, own in instructions[: end + 1] if at >= int(branch[1], 16)])
    return found


def vector_loop(target: Target, instructions: list[tuple[int, str]]) -> list[str] | None:
    """The shortest loop that loads and stores vectors and has no scalar arithmetic."""

    def serves(loop: list[str]) -> bool:
        has = [any(map(kind.match, loop)) for kind in (target.vector_load, target.vector_store, target.scalar)]
        return has == [True, True, False]

    return min(filter(serves, loops(target, instructions)), key=len, default=None)


def show_loops(target: Target, folder: Path, console: Console) -> bool:
    table = Table("activation", "loop", *TYPES.values(), title=f"{target.name}: vector instructions of the loop")
    rows, right = {}, True
    for (activation, loop, dtype), instructions in functions(target, folder).items():
        vectors = vector_loop(target, instructions)
        right &= vectors is not None or (dtype in target.no_vectors and loop.endswith("bits"))
        count = vectors and sum(bool(target.vector.match(text)) for text in vectors)
        rows.setdefault((activation, loop), {})[dtype] = f"{count} of {len(vectors)}" if vectors else "scalar"
    for (activation, loop), cells in sorted(rows.items()):
        table.add_row(activation, loop, *(cells.get(dtype, "") for dtype in TYPES.values()))
    console.print(table)
    return right


def results(target: Target, folder: Path, *emulator: str) -> dict[str, list[str]]:
    """Of each instruction set."""
    program = folder / f"{target.prefix}results"
    run(target.compiler, *FLAGS, "-ffp-contract=off", "-static", HERE / "results.cpp", *KERNELS, "-o", program)
    found = {}
    for line in run(*emulator, program).splitlines():
        isa, result = line.split(": ")
        if not result.startswith("fma_relu"):
            found.setdefault(isa, []).append(result)
    return found


def main() -> bool:
    console = Console(width=120)
    tools = {tool: shutil.which(tool) for tool in (ARM.compiler, "qemu-aarch64")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right = show_loops(X86, folder, console)
        found = results(X86, folder)
        if tools[ARM.compiler]:
            right &= show_loops(ARM, folder, console)
        if all(tools.values()):
            found[ARM.name] = results(ARM, folder, "qemu-aarch64")["portable"]
        for isa, lines in found.items():
            other = sum(a != b for a, b in zip(lines, found["portable"], strict=True))
            console.print(f"{isa}: {len(lines)} results, {other} of them other than the portable ones of this machine")
            right &= not other
    for tool, path in tools.items():
        if not path:
            console.print(f"{tool} is not installed: aarch64 is left out")
    return right


if __name__ == "__main__":
    if platform.machine() != "x86_64":
        sys.exit("this compares x86-64 with aarch64, and runs on x86-64")
    sys.exit(not main())
