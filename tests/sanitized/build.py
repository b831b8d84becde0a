"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer: python build.py FOLDER."""

import sys
from pathlib import Path

from torch.utils.cpp_extension import CppExtension

sys.path.append(str(Path(__file__).resolve().parents[1]))
import variant

SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def main(folder: Path) -> None:
    project = variant.setup_py()
    project.Build.choice = project.Choice(None, None, "CPU only, with sanitizers.")
    sources = [source for source in project.sources("*.cpp") if not source.startswith("csrc/cuda/")]
    variant.build(
        project,
        folder,
        [
            CppExtension(
                "relu_ext._C",
                [str(variant.ROOT / source) for source in sources],
                extra_compile_args=[*project.FLAGS, *SANITIZED],
                extra_link_args=["-fopenmp", "-fsanitize=address,undefined"],
            )
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
