"""Checks of :class:`~dynamo_worker.engine.EngineInfo`: what a started engine tells routers and frontends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_worker.engine import EngineInfo
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.testing.dialects import only

if TYPE_CHECKING:
    from dynamo_worker.testing.trial import Trial

_POSITIVE = (
    *("context_length", "vocab_size", "kv_block_size", "total_kv_blocks", "max_num_seqs", "max_loras"),
    *("max_num_batched_tokens", "data_parallel_size"),
)


def _info(trial: Trial) -> EngineInfo:
    assert trial.info is not None
    return trial.info


class DescriptionChecks:
    """What ``start`` returns."""

    def test_start_returns_an_engine_info(self, trial: Trial) -> None:
        """The worker registers what it contains; anything else fails the start."""
        info = _info(trial)
        trial.expect(isinstance(info, EngineInfo), f"start returned {info!r:.80}", trial.engine.start)

    def test_the_model_has_a_name(self, trial: Trial) -> None:
        """Clients ask for the model by this name."""
        name = _info(trial).model_name
        trial.expect(isinstance(name, str) and name, f"model_name is {name!r}", trial.engine.start)

    def test_sizes_are_positive(self, trial: Trial) -> None:
        """Routers divide by them and compare prompts with them."""
        info = _info(trial)
        for name in _POSITIVE:
            value = getattr(info, name)
            right = value is None or (type(value) is int and value > 0)
            trial.expect(right, f"EngineInfo.{name} is {value!r}; expected a positive integer", trial.engine.start)

    @only("tokens")
    def test_the_context_length_is_known(self, trial: Trial) -> None:
        """Without it neither the worker nor the frontend can refuse a prompt that is too long."""
        trial.expect(_info(trial).context_length, "EngineInfo.context_length is not set", trial.engine.start)

    def test_the_models_files_exist(self, trial: Trial) -> None:
        """The frontend reads ``config.json`` and the tokenizer from this directory, or from the Hub."""
        path = _info(trial).model_path
        if path is None or not path.startswith(("/", ".")):
            trial.skip("the model is not a directory")
        trial.expect((Path(path) / "config.json").is_file(), f"{path} has no config.json", trial.engine.start)

    @only("tokens")
    def test_the_canary_lies_in_the_vocabulary(self, trial: Trial) -> None:
        """A vocabulary that is too small makes the worker refuse the engine's own canary."""
        size, tokens = _info(trial).vocab_size, trial.canary()["token_ids"]
        trial.expect(size is None or max(tokens) < size, f"vocab_size {size}, canary {tokens}", trial.engine.start)

    def test_runtime_data_can_be_encoded(self, trial: Trial) -> None:
        """It is published as JSON with the model; anything else fails the start."""
        info = _info(trial)
        for name in ("runtime_data", "runtime_config"):
            try:
                json.dumps(dict(getattr(info, name)), allow_nan=False)
            except (TypeError, ValueError) as error:  # noqa: PERF203 - it ends the loop
                raise trial.finding(f"EngineInfo.{name} is not JSON: {error}", trial.engine.start) from error

    def test_processes_are_pids(self, trial: Trial) -> None:
        """The worker watches these processes; it cannot watch anything else."""
        trial.expect(EngineChecks("the engine").pids(trial.engine.processes()) is not None, "no pids")
