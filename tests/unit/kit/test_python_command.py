"""An engine's Python processes import no file of the current directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dynamo_worker.kit.python_command import python_command


def test_the_module_runs_with_its_arguments_but_without_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise SystemExit('a file of the current directory was imported')")
    command = [*python_command("json.tool"), "--compact"]
    done = subprocess.run(
        command, input="[1, 2]", capture_output=True, text=True, cwd=tmp_path, timeout=30, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[1,2]", 0), done.stderr
