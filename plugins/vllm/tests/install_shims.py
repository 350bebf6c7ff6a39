"""Makes an environment without CUDA importable for vLLM's models of images: run it with that environment's Python.

These import `torchvision`, which registers operators that only its CUDA library defines; they are declared here before
it is imported. Nothing here is needed, or wanted, beside a GPU.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

#: First line of the changed ``torchvision/__init__.py``; tells that it is changed already.
MARK = "# Operators of the CUDA library, declared for a torch without CUDA."
TORCHVISION = f"""{MARK}
import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{{_name}}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Declare the operators. The file is replaced: the old one may be a link into the package manager's cache."""
    torchvision = Path(sysconfig.get_path("purelib")) / "torchvision" / "__init__.py"
    text = torchvision.read_text()
    if not text.startswith(MARK):
        new = torchvision.with_name("__init__.py.new")
        new.write_text(TORCHVISION + text)
        os.replace(new, torchvision)


if __name__ == "__main__":
    main()
