"""Install what a worker lacks in an engine's image, from a list with hashes, and leave everything else as it is.

``python3 install_missing.py REQUIREMENTS`` runs after ``pip install --no-deps`` of the worker's own wheels. The image
has most of their dependencies, in the versions that the engine was built with. Only what is not there is installed, or
what a package on the list cannot use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Each round may bring packages with requirements of their own; the list is three levels deep.
ROUNDS = 5


def entries(text: str) -> dict[str, str]:
    """Return each package's entry in a list of requirements, with its hashes."""
    lines = (line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(Requirement(line.split(" --")[0]).name): line for line in lines}


def missing(listed: dict[str, str], path: list[str]) -> list[str]:
    """Return the entries of packages that are not there, or that do not have what another one requires.

    :param listed: ``entries``.
    :param path: the directories to look in, as in ``sys.path``.
    :raises SystemExit: one of them is not on the list.
    """
    # The first directory wins, as in an import.
    there: dict[str, metadata.Distribution] = {}
    for one in metadata.distributions(path=path):
        there.setdefault(canonicalize_name(one.metadata["Name"]), one)
    wanted = {name for name in listed if name not in there}
    for name in ("dynamo-worker", *listed):
        for text in (there[name].requires or []) if name in there else []:
            requirement = Requirement(text)
            needs = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if needs in there and not requirement.specifier.contains(there[needs].version, prereleases=True):
                wanted.add(needs)
    unknown = wanted - set(listed)
    if unknown:
        sys.exit(f"the worker needs other versions of {', '.join(sorted(unknown))}, which the list does not have")
    return [listed[name] for name in sorted(wanted)]


def main() -> None:
    """Install until nothing is missing."""
    listed = entries(Path(sys.argv[1]).read_text())
    for _ in range(ROUNDS):
        lines = missing(listed, sys.path)
        if not lines:
            return
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(lines))
            file.flush()
            pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-deps", "--require-hashes"]
            # NVIDIA's images bind pip to their own versions, Ubuntu's forbid it to install anything.
            environment = {**os.environ, "PIP_CONSTRAINT": "", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
            subprocess.run([*pip, "-r", file.name], check=True, env=environment)
    sys.exit(f"still missing after {ROUNDS} rounds: {lines}")


if __name__ == "__main__":
    main()
