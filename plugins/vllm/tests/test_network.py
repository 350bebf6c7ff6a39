"""Where vLLM's processes listen, and when they may need to be reached from elsewhere: vLLM itself is not started."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_worker.testing.cluster import free_port
from dynamo_worker_vllm import arguments, waiting

TRANSFER = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = FlexibleArgumentParser()
    arguments.add(made)
    return made


@pytest.mark.parametrize(
    ("flags", "alone"),
    [
        ((), True),
        (("--tensor-parallel-size", "2"), True),
        (("--data-parallel-size", "2"), True),
        (("--data-parallel-size", "2", "--data-parallel-size-local", "2"), True),
        (("--data-parallel-size", "2", "--data-parallel-size-local", "1"), False),
        (("--data-parallel-size", "2", "--data-parallel-rank", "1"), False),
        (("--data-parallel-size", "2", "--data-parallel-address", "192.0.2.1"), False),
        (("--data-parallel-size", "2", "--data-parallel-backend", "ray"), False),
        (("--distributed-executor-backend", "ray"), False),
        (("--nnodes", "2"), False),
        (("--headless",), False),
        (("--kv-transfer-config", TRANSFER), False),
    ],
)
def test_who_may_have_to_be_reached_from_another_machine(
    parser: argparse.ArgumentParser, flags: tuple[str, ...], alone: bool
) -> None:
    assert arguments.on_one_machine(parser.parse_args(["--model", "m", *flags])) is alone


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
PARTS = {"connectors": [{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}, NIXL]}


@pytest.mark.parametrize(
    ("transfer", "given", "own", "expected"),
    [
        (NIXL, None, "10.1.2.3", "10.1.2.3"),
        (NIXL, None, "2001:db8::5", "2001:db8::5"),
        (NIXL, None, "127.0.0.1", "127.0.0.1"),
        (NIXL, "192.0.2.7", "10.1.2.3", "192.0.2.7"),
        (
            {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": PARTS},
            None,
            "10.1.2.3",
            "10.1.2.3",
        ),
        (json.loads(TRANSFER), None, "10.1.2.3", None),
    ],
    ids=["IPv4", "IPv6", "loopback", "the operator's", "inside another", "not NIXL"],
)
def test_where_decode_workers_ask_for_blocks(
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tmp_path: Path,
    transfer: dict[str, Any],
    given: str | None,
    own: str,
    expected: str | None,
) -> None:
    for name, value in ((arguments.NIXL_HOST, given), ("DYN_TCP_RPC_HOST", own), (waiting.MARK, "1")):
        monkeypatch.setenv(name, value or "")
    if given is None:
        monkeypatch.delenv(arguments.NIXL_HOST)
    flags = ["--model", str(tiny_model), "--max-model-len", "2048", "--kv-transfer-config", json.dumps(transfer)]
    arguments.configure(parser.parse_args(flags), tmp_path)
    assert os.environ.get(arguments.NIXL_HOST) == expected


_STORE = """
import sys
from dynamo_worker.kit import rendezvous
from torch.distributed.rendezvous import rendezvous as meet

if sys.argv[1] == "closed":
    rendezvous.listen_on_loopback()
store, *_ = next(iter(meet(f"tcp://{sys.argv[2]}:{sys.argv[3]}", 0, 1)))
store.set("a", "b")
assert store.get("a") == b"b"

import os
from dynamo_worker.testing.sockets import listening
for each in listening([os.getpid()]):
    print(each.local, flush=True)
"""


@pytest.mark.parametrize(
    ("how", "host", "local"),
    [
        ("closed", "127.0.0.1", "True"),
        ("closed", "localhost", "True"),
        ("closed", "0.0.0.0", "False"),  # several nodes meet there
        ("open", "127.0.0.1", "False"),  # PyTorch by itself: what this is for
    ],
)
def test_where_ranks_meet(how: str, host: str, local: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STORE, how, host, str(free_port())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == [local], done.stderr[-2000:]
