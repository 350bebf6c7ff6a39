"""The table of engines in docs/engines.md says what the sources say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import engine_table  # noqa: E402


def served() -> dict[str, dict[str, str]]:
    return {engine.name: engine.serves for engine in engine_table.engines()}


def test_every_engine_is_there() -> None:
    plugins = {path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml")}
    assert set(served()) == {"echo", *plugins}
    headings, rows = engine_table.rows()
    assert {len(row) for row in rows} == {len(headings)}


@pytest.mark.parametrize("feature", engine_table.FEATURES)
def test_every_rule_tells_engines_apart(feature: str) -> None:
    """A rule that fits all or none, as after a change of the kit's names, says nothing."""
    cells = {serves[feature] for serves in served().values()}
    assert len(cells) > 1 or feature in ("stall detection", "requests reach it as")
    assert cells - {engine_table.NO}


def test_what_is_known() -> None:
    engines = served()
    assert engines["echo"]["log probabilities"] == engines["echo"]["LoRA adapters"] == engine_table.NO
    assert {engines[name]["LoRA adapters"] for name in ("vllm", "sglang", "trtllm")} == {engine_table.YES}
    assert engines["trtllm"]["new weights from trainers"] == engine_table.NO
    assert engines["dynamo"]["guided decoding"] == "the class's"
    tested = {engine.name: engine.tested for engine in engine_table.engines()}
    assert "stand-in" in tested["trtllm"]
    assert tested["dynamo"] == "ai-dynamo 1.6.1"


def package(directory: Path, source: str, more: str = "") -> Path:
    """Write the package of an engine below ``directory/plugins``."""
    plugin = directory / "plugins" / "new"
    (plugin / "src" / "new_engine").mkdir(parents=True)
    (plugin / "src" / "new_engine" / "plugin.py").write_text(source)
    (plugin / "pyproject.toml").write_text(
        "[project]\nname = 'new-engine'\n[project.optional-dependencies]\ncpu = ['thing>=1']\n"
        f"[project.entry-points.\"dynamo_worker.engines\"]\nnew = 'new_engine.plugin:plugin'\n{more}"
    )
    return plugin


def test_a_new_package_appears(tmp_path: Path) -> None:
    source = "from dynamo_worker.kit import lora\nINFO = EngineInfo(model_input='text')\n"
    plugin = package(tmp_path, source, "[tool.dynamo-worker.serves]\n'several nodes' = 'two'\n")
    (plugin / "constraints.txt").write_text("other==2\nthing==1.5+cpu\n")
    (engine,) = engine_table._of_package(plugin)
    assert (engine.name, engine.extras, engine.tested) == ("new", ("cpu",), "thing 1.5")
    assert engine.serves["requests reach it as"] == "text"
    assert engine.serves["LoRA adapters"] == "the server's"
    assert engine.serves["several nodes"] == "two"
    assert engine.serves["stall detection"] == engine_table.NO


def test_an_engine_that_makes_embeddings_too(tmp_path: Path) -> None:
    """Texts for embeddings do not make an engine one that generates from text."""
    source = "INFO = EngineInfo('m', embeddings=EmbeddingSpec(8), model_input='text')\n"
    (engine,) = engine_table._of_package(package(tmp_path, source))
    assert (engine.serves["embeddings"], engine.serves["requests reach it as"]) == (engine_table.YES, "tokens")


def test_a_row_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown rows: wings"):
        list(engine_table._of_package(package(tmp_path, "", "[tool.dynamo-worker.serves]\nwings = 'yes'\n")))
