"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer: python build.py FOLDER."""

import sys
from pathlib import Path

from torch.utils.cpp_extension import CppExtension

sys.path.append(str(Path(__file__).resolve().parents[1]))
import variant

# Not vptr: it reads the object through which torch's dispatcher calls a kernel, which uninstall() may have freed; the
# call itself reads nothing of it.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS, "-fno-sanitize-recover=all"]


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
                extra_link_args=["-fopenmp", *SANITIZERS],
            )
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
