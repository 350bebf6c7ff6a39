"""Makes an environment without CUDA importable for SGLang: run it with that environment's Python, as often as you like.

SGLang imports `sgl_kernel` and `torchvision` whatever device it runs on, and neither has a build for CPUs on PyPI:

- `sgl_kernel` is made here, as a package whose every function refuses to be called. On a CPU with ``torch_native``
  attention and ``pytorch`` sampling nothing calls one. It is imported early in every process of SGLang, so it also lets
  torch ignore requests for pinned memory, which only exists beside an accelerator: adapters ask for it anyway.
- `torchvision` (installed without its dependencies) registers operators that only its CUDA library defines; they are
  declared before it is imported.

Nothing here is needed, or wanted, beside a GPU.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

SGL_KERNEL = '''"""Stands in for sgl-kernel on a CPU: importable, but nothing in it can be called."""

import functools

import torch


def _unpinned(make):
    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return wrapped


for _name in ("tensor", "empty", "zeros"):
    setattr(torch, _name, _unpinned(getattr(torch, _name)))
torch.Tensor.pin_memory = lambda tensor, *_: tensor


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a CPU")

    return missing
'''

#: First line of the changed ``torchvision/__init__.py``; tells that it is changed already.
MARK = "# Operators of the CUDA library, declared for a torch without CUDA."
TORCHVISION = f"""{MARK}
import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{{_name}}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def write(path: Path, text: str) -> None:
    """Replace a file by a new one: the old one may be a link into the package manager's cache."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def main() -> None:
    """Write both."""
    packages = Path(sysconfig.get_path("purelib"))
    write(packages / "sgl_kernel" / "__init__.py", SGL_KERNEL)
    torchvision = packages / "torchvision" / "__init__.py"
    text = torchvision.read_text()
    if not text.startswith(MARK):
        write(torchvision, TORCHVISION + text)


if __name__ == "__main__":
    main()
