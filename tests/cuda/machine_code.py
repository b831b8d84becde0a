"""The machine code of the shipped kernels, without a GPU: python machine_code.py [ARCHITECTURE ... | all].

Compiles csrc/cuda/*.cu for each architecture (90 unless named), warnings and spills being errors, and
disassembles it. In every kernel with several vectors a thread, which are those for large tensors, the path of a full
tile must be straight, with nothing but 128-bit loads and stores of elements and the bytes of bits, and all loads must
be under way before the first value is waited for.

Needs nvcc, and nvdisasm, which PyPI has too: pip install nvidia-cuda-nvdisasm. Without nvcc it says so and succeeds.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DEFAULT = ["90"]
# Instructions from the first load to the last, of which there are up to eight: addresses, and what the scheduler puts
# between them.
MAX_SPREAD = 32
# Where the address of each of a batch takes a division of 64 bits by multiplication, of 16 instructions.
BATCH = 4  # Sums::batch
MAX_SPREAD_OF_DIVISIONS = MAX_SPREAD + BATCH * 16

NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]
PTXAS_FLAGS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]

BYTES = {"float": 4, "double": 8, "relu_ext::Float16<(unsigned short)31744>": 2}
BYTES["relu_ext::Float16<(unsigned short)32640>"] = 2
DTYPES = dict(zip(BYTES, ["float32", "float64", "float16", "bfloat16"], strict=True))
ELEMENT = r"(?P<element>float|double|relu_ext::Float16<[^>]*>)"
TILE = rf"{ELEMENT}, relu_ext::cuda::Tile<\d+, (?P<vectors>\d+), [^>]*>"
ELEMENTWISE = re.compile(
    rf"cuda::(?P<way>forward|backward)_kernel<(?:\(relu_ext::Kept\)(?P<kept>\d), )?{TILE}, (?P<aligned>true|false)"
    r"(?:, (?P<bits>true|false))?, relu_ext::(?:cuda::)?(?P<activation>\w+)<(?P<of>.*)"
)
GATED = re.compile(
    rf"cuda::gated(?P<backward>_backward)?_kernel<{TILE}, (?P<lanes>\d+)(?:, (?P<gate>\w+), (?P<up>\w+))?>"
)
SPREADING, CHOICE = r"\(relu_ext::cuda::Spread\)", r"\(relu_ext::cuda::Choice\)"
FUSED = re.compile(
    rf"cuda::fused_kernel<relu_ext::Parts<(?P<parts>[^>]*)>, {TILE}, (?P<aligned>\w+), {SPREADING}(?P<spread>\d), "
    rf"{CHOICE}(?P<bits>\d), "
)
FUSED_BACKWARD = re.compile(
    rf"cuda::fused_backward_kernel<{TILE}, (?P<aligned>\w+), relu_ext::(?:cuda::)?(?P<activation>\w+)<.*"
    rf"ByChannel<{SPREADING}(?P<spread>\d)>, {CHOICE}(?P<bits>\d), (?P<scaled>\w+), {CHOICE}(?P<residual>\d)>"
)
SUMMING = re.compile(
    rf"cuda::sums_kernel<(?P<by>\w+), {ELEMENT}, \d+, (?P<aligned>\w+), relu_ext::cuda::(?P<work>\w+)<"
    rf"(?:[^(]*\([^)]*\)\d*>|\w+)(?:, {CHOICE}(?P<bits>\d), {CHOICE}(?P<input>\d))?"
)
NONFINITE = re.compile(rf"cuda::nonfinite_kernel<{TILE}, (?P<aligned>\w+)>")
# What adds up what the others left, and what reads bits: next to nothing.
SMALL = re.compile(r"cuda::(join_kernel<|count_\w+_kernel\()")
KEPT = ["bits", "input", "output"]
PARTS = ["scale", "shift", "residual", "dropout", "multiply-add"]
SPREAD = ["one", "consecutive", "any"]
YES = "1"  # of enum class Choice
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z]\w*)(?P<modifiers>[.\w]*)(?P<rest>.*)"
)
MEMORY = re.compile(r"LD(?!C|SM$)|ST|ATOM|RED|CCTL|MEMBAR")
WIDTHS = {"128", "256", "64", "U8", "S8", "U16", "S16"}


@dataclass(frozen=True)
class Instruction:
    op: str
    modifiers: list[str]
    operands: str
    guard: str
    label: str  # where a branch goes

    @property
    def access(self) -> str | None:
        """STG.128 for STG.E.EF.128; None for what leaves memory alone. Constants and uniform ones are no memory."""
        if not MEMORY.match(self.op):
            return None
        kept = [modifier for modifier in self.modifiers if modifier in WIDTHS or modifier == "STRONG"]
        return ".".join([self.op, *kept])

    @property
    def registers(self) -> list[int]:
        """Those it names, the first being the first that a load writes."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]

    @property
    def loaded(self) -> set[int]:
        first = self.registers[0]
        return set(range(first, first + (4 if "128" in self.modifiers else 1)))


class Code:
    """A kernel's instructions, and where its labels are."""

    def __init__(self, text: str):
        self.instructions, self.labels = [], {}
        for line in text.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                self.labels[label[1]] = len(self.instructions)
            elif found := INSTRUCTION.search(line):
                goal = re.search(r"`\((\.L_x_\d+)\)", found["rest"])
                self.instructions.append(
                    Instruction(
                        found["op"],
                        found["modifiers"].split(".")[1:],
                        found["rest"],
                        (found["guard"] or "").strip(),
                        goal[1] if goal else "",
                    )
                )

    def straight(self, at: int) -> list[Instruction] | None:
        """From here to the exit, if no branch depends on data; BRA.DIV is taken by divergent warps only."""
        path = []
        while at < len(self.instructions):
            instruction = self.instructions[at]
            path.append(instruction)
            if instruction.op == "EXIT":
                return path if not instruction.guard else None
            if instruction.op == "BRA" and "DIV" not in instruction.modifiers:
                if instruction.guard or instruction.label not in self.labels:
                    return None
                at = self.labels[instruction.label]
            else:
                at += 1
            if len(path) > len(self.instructions):
                return None
        return None

    def full_tile(self) -> list[Instruction] | None:
        """From the entry to the branch that asks whether the tile is full, and on from there.

        It is the first one with a straight way behind it; sm_87 has another before it, over a preamble.
        """
        for at, instruction in enumerate(self.instructions):
            if instruction.op == "BRA" and instruction.guard:
                ways = [self.straight(at + 1), self.straight(self.labels[instruction.label])]
                if straight := [way for way in ways if way]:
                    return self.instructions[: at + 1] + straight[0] if len(straight) == 1 else None
        return None

    def batch(self) -> list[Instruction] | None:
        """The stretch without a jump that has most wide loads, up to the last of them."""
        stretches, goals = [[]], set(self.labels.values())
        for at, instruction in enumerate(self.instructions):
            if at in goals:
                stretches.append([])
            stretches[-1].append(instruction)
            if instruction.op == "BRA":
                stretches.append([])
        best = max(stretches, key=lambda stretch: sum(instruction.access == "LDG.128" for instruction in stretch))
        return best[: loads(best)[-1] + 1] if loads(best) else None


@dataclass(frozen=True)
class Kernel:
    """One instantiation: what its demangled name says, and how often its full tile goes to memory in which way."""

    title: str
    accesses: Counter
    has_loop: bool = False  # then it is the loop's body that is looked at

    @property
    def divides(self) -> bool:
        return self.title.startswith(("Reglu", "Slopes", "Fused"))

    @classmethod
    def named(cls, name: str) -> "Kernel | None":
        """None where a thread has one vector or element at a time, pointers are misaligned, or channels are any."""
        if found := ELEMENTWISE.search(name):
            return cls.elementwise(found)
        if found := GATED.search(name):
            return cls.gated(found)
        if found := FUSED.search(name):
            return cls.fused(found)
        if found := FUSED_BACKWARD.search(name):
            return cls.fused_backward(found)
        if found := SUMMING.search(name):
            return cls.summing(found)
        if found := NONFINITE.search(name):
            return cls.nonfinite(found)
        if SMALL.search(name):
            return None
        raise SystemExit(f"a kernel that this check does not know: {name}")

    @classmethod
    def elementwise(cls, found: re.Match) -> "Kernel | None":
        """Forward gathers a byte of bits from neighbours, backward reads one for each vector."""
        vectors, size = int(found["vectors"]), BYTES[found["element"]]
        if found["aligned"] == "false" or vectors == 1:
            return None
        accesses = Counter({"LDG.128": vectors, "STG.128": vectors})
        of = ""
        if found["activation"] == "Slopes":
            spread = SPREAD[int(re.search(r"Spread\)(\d)", found["of"])[1])]
            if spread == "any":
                return None
            accesses[{"one": ONE_ELEMENT[size], "consecutive": "LDG.128"}[spread]] += vectors
            of = f" {spread}"
        if found["way"] == "forward":
            with_bits = found["bits"] == "true"
            accesses["STG.U8"] = with_bits * vectors * 16 // size // 8
            way = "forward with bits" if with_bits else "forward"
        else:
            kept = KEPT[int(found["kept"])]
            accesses["LDG.U8" if kept == "bits" else "LDG.128"] += vectors
            way = f"backward from {kept}"
        return cls(f"{found['activation']}{of} {DTYPES[found['element']]} {way}", +accesses)

    @classmethod
    def gated(cls, found: re.Match) -> "Kernel | None":
        if found["lanes"] == "1":
            return None
        vectors, way, operands, results = int(found["vectors"]), "forward", 2, 1
        if found["backward"]:
            wanted = [name for name in ("gate", "up") if found[name] == "true"]
            operands, results = 2 + ("gate" in wanted), len(wanted)
            way = "backward to " + " and ".join(wanted)
        accesses = Counter({"LDG.128": vectors * operands, "STG.128": vectors * results})
        return cls(f"Reglu {DTYPES[found['element']]} {way}", accesses)

    @classmethod
    def fused(cls, found: re.Match) -> "Kernel | None":
        if found["aligned"] == "false" or SPREAD[int(found["spread"])] == "any":
            return None
        vectors, size = int(found["vectors"]), BYTES[found["element"]]
        parts = [name for name, there in zip(PARTS, found["parts"].split(", "), strict=True) if there == "true"]
        accesses = Counter({"LDG.128": vectors * (1 + ("residual" in parts)), "STG.128": vectors})
        channels = [name for name in ("scale", "shift") if name in parts]
        spread = SPREAD[int(found["spread"])]
        for _ in channels:
            accesses[{"one": ONE_ELEMENT[size], "consecutive": "LDG.128"}[spread]] += vectors
        if "dropout" in parts:  # where a captured graph has its seed
            accesses["LDG.64"] += 2
        accesses["STG.U8"] = (found["bits"] == YES) * vectors * 16 // size // 8
        way = "forward with bits" if found["bits"] == YES else "forward"
        words = ["Fused", *parts, *[spread] * bool(channels), DTYPES[found["element"]], way]
        return cls(" ".join(words), +accesses)

    @classmethod
    def fused_backward(cls, found: re.Match) -> "Kernel | None":
        spread = SPREAD[int(found["spread"])]
        if found["aligned"] == "false" or spread == "any":
            return None
        vectors, size = int(found["vectors"]), BYTES[found["element"]]
        to_residual = found["residual"] == YES
        accesses = Counter({"LDG.128": vectors, "STG.128": vectors * (1 + to_residual)})
        accesses["LDG.U8" if found["bits"] == YES else "LDG.128"] += vectors
        words = ["Fused", found["activation"]]
        if found["scaled"] == "true":
            accesses[{"one": ONE_ELEMENT[size], "consecutive": "LDG.128"}[spread]] += vectors
            words += ["scale", spread]
        words += [DTYPES[found["element"]], "backward from", "bits" if found["bits"] == YES else "output"]
        return cls(" ".join(words + ["and residual"] * to_residual), accesses)

    @classmethod
    def summing(cls, found: re.Match) -> "Kernel | None":
        if found["aligned"] == "false":
            return None
        dtype, way = DTYPES[found["element"]], "by channel" if found["by"] == "true" else "by column"
        if found["work"] == "SlopeGradients":
            return cls(f"Slopes {dtype} sums {way}", Counter({"LDG.128": 2 * BATCH}), True)
        sums = 2 if found["input"] == YES else 1
        batch = BATCH // sums
        accesses = Counter({"LDG.128": batch * sums})
        accesses["LDG.U8" if found["bits"] == YES else "LDG.128"] += batch
        kept = "bits" if found["bits"] == YES else "output"
        return cls(f"Fused {dtype} sums of {sums} {way} from {kept}", accesses, True)

    @classmethod
    def nonfinite(cls, found: re.Match) -> "Kernel | None":
        """What comes behind the loads is left to chance: whether a thread writes depends on what it has read."""
        vectors = int(found["vectors"])
        if found["aligned"] == "false" or vectors == 1:
            return None
        return cls(f"NonFinite {DTYPES[found['element']]}", Counter({"LDG.128": vectors}), True)


ONE_ELEMENT = {2: "LDG.U16", 4: "LDG", 8: "LDG.64"}


def loads(path: list[Instruction]) -> list[int]:
    return [at for at, instruction in enumerate(path) if (instruction.access or "").startswith("LDG")]


def spread(path: list[Instruction]) -> int:
    return loads(path)[-1] - loads(path)[0]


# CUDA's exponentials and exact square roots are long, some with branches, and so is rounding to bfloat16 where there is
# no instruction for it: of these only what ptxas itself complains of.
LONG = re.compile(r"Elu .*(forward|from input)|ReluSquared .*from output")
LONG_BEFORE_80 = re.compile(r"(LeakyRelu|Elu|ReluSquared) bfloat16 ")


def problems(kernel: Kernel, arch: str, path: list[Instruction] | None) -> list[str]:
    if LONG.match(kernel.title) or (int(arch) < 80 and LONG_BEFORE_80.match(kernel.title)):
        return []
    if path is None:
        return ["the path of a full tile is not straight"]
    found = []
    accesses = Counter(instruction.access for instruction in path if instruction.access)
    if accesses != kernel.accesses:
        return [f"{dict(accesses)}, not {dict(kernel.accesses)}"]
    if spread(path) > (MAX_SPREAD_OF_DIVISIONS if kernel.divides else MAX_SPREAD):
        found.append(f"{spread(path)} instructions from the first load to the last")
    if kernel.title.startswith("Slopes"):  # of which ptxas widens the first while the last vectors are being asked for
        return found
    under_way = set()
    for instruction in path[loads(path)[0] : loads(path)[-1] + 1]:
        is_load = (instruction.access or "").startswith("LDG")
        if under_way & set(instruction.registers[1:] if is_load else instruction.registers):
            found.append(f"waits before the last load: {instruction.op}{instruction.operands}")
        if is_load:
            under_way |= instruction.loaded
    return found


@dataclass(frozen=True)
class Result:
    arch: str
    kernel: Kernel
    registers: int
    path: list[Instruction] | None
    problems: list[str]


class Refused(SystemExit):
    """By a compiler, with what it said."""


def compiled(nvcc: str, arch: str, source: Path, cubin: Path) -> dict[str, int]:
    """Registers of each kernel."""
    command = [nvcc, *NVCC_FLAGS, *PTXAS_FLAGS, "-cubin", f"-arch=sm_{arch}", "-o", cubin, source]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise Refused(process.stdout + process.stderr)
    found = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", process.stderr, re.DOTALL)
    return {name: int(registers) for name, registers in found}


def demangled(names: list[str]) -> list[str]:
    return subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()


def disassembled(nvdisasm: str, cubin: Path) -> dict[str, Code]:
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):\n", text, flags=re.MULTILINE)
    return {name: Code(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def results_of(nvcc: str, nvdisasm: str, arch: str, source: Path) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        registers = compiled(nvcc, arch, source, cubin)
        code = disassembled(nvdisasm, cubin)
    found = []
    for mangled, name in zip(code, demangled(list(code)), strict=True):
        if kernel := Kernel.named(name):
            path = code[mangled].batch() if kernel.has_loop else code[mangled].full_tile()
            found.append(Result(arch, kernel, registers[mangled], path, problems(kernel, arch, path)))
    return found


def results(nvcc: str, nvdisasm: str, archs: list[str], csrc: Path = CSRC) -> list[Result]:
    """The largest source first: all others compile beside it."""
    sources = sorted((csrc / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size)
    jobs = [(arch, source) for source in sources for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda job: results_of(nvcc, nvdisasm, *job), jobs)
        found = [result for part in parts for result in part]
    return sorted(found, key=lambda result: (int(result.arch), result.kernel.title))


def find_nvcc() -> str | None:
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ["PATH"]]
    return shutil.which("nvcc", path=os.pathsep.join(folders[::-1]))


def find_nvdisasm() -> str:
    if on_path := shutil.which("nvdisasm"):
        return on_path
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    raise SystemExit("nvcc is here and nvdisasm is not: pip install nvidia-cuda-nvdisasm")


def known_archs(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    return sorted(re.findall(r"^sm_(\d+)$", listed, re.MULTILINE), key=int)


def print_table(all_results: list[Result]) -> None:
    table = Table("sm", "kernel", *["instructions", "registers", "from first load to last"], "")
    for result in all_results:
        path = result.path or []
        numbers = [len(path), result.registers, spread(path)] if path and loads(path) else ["", result.registers, ""]
        table.add_row(result.arch, result.kernel.title, *map(str, numbers), "; ".join(result.problems) or "ok")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(archs: list[str]) -> int:
    nvcc = find_nvcc()
    if not nvcc:
        print("no nvcc: the CUDA kernels' machine code is not checked")
        return 0
    nvdisasm = find_nvdisasm()
    archs = known_archs(nvcc) if archs == ["all"] else archs or DEFAULT
    all_results = results(nvcc, nvdisasm, archs)
    print_table(all_results)
    bad = sum(bool(result.problems) for result in all_results)
    print(f"{len(all_results)} kernels, {bad} of them not as they should be")
    return 1 if bad or not all_results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
