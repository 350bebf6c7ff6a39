"""Reading and checking the YAML configuration file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.options import ENGINE_ARGS_KEY, OPTIONS
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from pathlib import Path

#: A command line could not be longer.
_MOST_CHARACTERS: Final = 1 << 20


@dataclass(frozen=True)
class ConfigFile:
    """The content of a configuration file.

    :param path: the file.
    :param values: the worker's settings, by field name, not yet validated.
    :param engine_args: the engine's own flags, as a mapping or as command-line words.
    """

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    engine_args: Mapping[str, Any] | Sequence[Any] = ()


def read_config(path: Path) -> ConfigFile:
    """Read a YAML configuration file.

    :raises UsageError: the file cannot be read, is not valid YAML, or has an unknown key.
    """
    content = _read_mapping(path, f"the configuration file {path}")
    engine_args = content.pop(ENGINE_ARGS_KEY, None) or ()
    if isinstance(engine_args, str) or not isinstance(engine_args, (Mapping, Sequence)):
        raise UsageError(
            f"{path}: {ENGINE_ARGS_KEY}: expected a mapping (`tensor-parallel-size: 2`) or a list of command-line words"
        )
    known = [option.name for option in OPTIONS if option.name != "config"]
    for key in content:
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {key!r}{suggestion(str(key).replace('-', '_'), [*known, ENGINE_ARGS_KEY])}",
                hint=f"keys are flag names with underscores; put the engine's own flags under {ENGINE_ARGS_KEY}",
            )
    return ConfigFile(path, content, engine_args)


def read_flags(flag: str, path: Path) -> Mapping[str, Any]:
    """Read the file in which an engine's own command line has its flags.

    :param flag: the flag that names the file.
    :raises UsageError: the file cannot be read or is not a YAML mapping.
    """
    return _read_mapping(path, f"the file of {flag} {path}")


def _read_mapping(path: Path, named: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file; an empty file has an empty one.

    :param named: the file, for messages.
    :raises UsageError: the file cannot be read, is too large, or is not a YAML mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys, of which YAML would silently use the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    name = (key.tag, key.value)
                    if name in lines:
                        problem = f"duplicate key {key.value!r}, first given in line {lines[name]}"
                        raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                    lines[name] = key.start_mark.line + 1
            return node

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise UsageError(f"{named} is too large: expected at most {_MOST_CHARACTERS} characters")
        content = yaml.load(text, Loader)  # noqa: S506 - a safe loader
    except OSError as error:
        raise UsageError(f"cannot read {named}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{named} is not valid UTF-8: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"{named}{where} is not valid YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{named}: expected `key: value` pairs, got a {type(content).__name__}")
    return content
