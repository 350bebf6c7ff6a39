#!/usr/bin/env python3
"""transformers under dynamo-worker beside transformers' own batching loop, in turns, on the same model and settings.

Run it in an environment with dynamo-worker-transformers (`nox -s "tests(transformers)" --install-only`). Each round has
the loop alone (`generate_batch`, which streams nothing) and the engine as the worker drives it: its process, the
messages and the chunks, every token streamed. Neither has a frontend. On a machine that does other work, go by the
tokens per second of CPU time. While the engine answers, the worker's event loop
is asked every 5 ms whether it is late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: The settings of continuous batching, for both.
SIZES = {"page_size": 64, "num_blocks": 512, "max_batch_tokens": 512, "max_requests_per_batch": 256}
#: Seconds between two looks at the event loop.
_TICK = 0.005
#: Issue 16 of the project: the least that ours / alone may be.
_BAR = 0.9


def main() -> int:
    """Run the rounds, or one side's part of them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="all at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer (default: 200)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the random model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="of the random model (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for both (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--part", choices=("make", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "make":
        return make(arguments)
    if arguments.part == "alone":
        return alone(arguments)
    os.environ.update({"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory() as directory:
        arguments.model = f"{directory}/model"
        subprocess.run(_command(arguments, "make"), check=True)
        rounds = asyncio.run(compare(arguments, Path(directory)))
    return report(arguments, rounds)


def _command(arguments: argparse.Namespace, part: str) -> list[str]:
    own = {
        "part": part,
        **{name: getattr(arguments, name) for name in ("model", "requests", "tokens", "hidden", "layers")},
    }
    return [sys.executable, __file__, *(word for name, value in own.items() for word in (f"--{name}", str(value)))]


def prompts(count: int) -> list[list[int]]:
    """Return different prompts of 32 tokens."""
    return [[3 + (7 * number + place) % 250 for place in range(32)] for number in range(count)]


def make(arguments: argparse.Namespace) -> int:
    """Write the model: a Llama with random weights and a vocabulary of 32,000."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from dynamo_worker.testing import tiny_model

    tiny_model.make(Path(arguments.model))  # for the tokenizer
    heads = max(1, arguments.hidden // 64)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(arguments.model)
    return 0


def alone(arguments: argparse.Namespace) -> int:
    """Answer all prompts with transformers alone for each line of stdin, and print the seconds."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=arguments.tokens)
    batching = ContinuousBatchingConfig(**SIZES)
    inputs = prompts(arguments.requests)
    for _ in sys.stdin:
        cpu, begun = time.process_time(), time.perf_counter()
        outputs = model.generate_batch(
            inputs, generation_config=settings, continuous_batching_config=batching, persistent_manager=True
        )
        seconds = time.perf_counter() - begun
        answers = [output.generated_tokens for output in outputs.values()]
        times = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({**times, "tokens": sum(map(len, answers)), "answers": answers}), flush=True)
    os._exit(0)


async def compare(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return the tokens per second of both in each round, and how late the worker's event loop was."""
    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import EngineContext
    from dynamo_worker_transformers import arguments as flags
    from dynamo_worker_transformers.engine import TransformersEngine

    parser = argparse.ArgumentParser()
    flags.add(parser)
    sizes = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    engine = TransformersEngine(
        parser.parse_args(["--model", arguments.model, *sizes]),
        EngineContext(component="benchmark.backend", private_dir=directory, supervised=False, events_wanted=False),
    )
    process = await asyncio.create_subprocess_exec(
        *_command(arguments, "alone"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 24
    )
    assert process.stdin is not None
    assert process.stdout is not None
    rounds = []
    try:
        await engine.start(1)
        for number in range(arguments.rounds + 1):
            parts = {}
            for side in ("alone", "ours") if number % 2 else ("ours", "alone"):
                if side == "alone":
                    process.stdin.write(b"go\n")
                    parts[side] = json.loads(await process.stdout.readline())
                else:
                    parts[side] = await answer(engine, arguments)
            assert sorted(parts["alone"].pop("answers")) == sorted(parts["ours"].pop("answers")), "different answers"
            print(f"round {number}: {parts}", file=sys.stderr, flush=True)
            if number:  # the first one warms up
                rounds.append(parts)
    finally:
        process.stdin.close()
        await process.wait()
        await engine.shutdown(Deadline.after(5.0))
    return rounds


async def answer(engine: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer all prompts with the engine at once."""
    from dynamo_worker.engine import LocalContext

    late: list[float] = []
    answers: list[list[int]] = [[] for _ in range(arguments.requests)]

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK)
            late.append(time.perf_counter() - before - _TICK)

    async def one(number: int, prompt: list[int]) -> None:
        stop = {"max_tokens": arguments.tokens, "ignore_eos": True}
        request = {"token_ids": prompt, "stop_conditions": stop, "sampling_options": {"temperature": 0.0}}
        await engine.push(
            request, LocalContext(f"request-{number}"), lambda chunk: answers[number].extend(chunk["token_ids"])
        )

    watcher = asyncio.ensure_future(watch())
    (pid,) = engine.processes()
    cpu, begun = _cpu_seconds(pid), time.perf_counter()
    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts(arguments.requests))))
    seconds = time.perf_counter() - begun
    watcher.cancel()
    tokens = sum(map(len, answers))
    late.sort()
    lateness = {"late_p99_ms": 1e3 * late[int(0.99 * (len(late) - 1))], "late_most_ms": 1e3 * late[-1]}
    return {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds(pid) - cpu,
        "tokens": tokens,
        **lateness,
        "answers": answers,
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(arguments: argparse.Namespace, rounds: list[dict[str, Any]]) -> int:
    """Print the table; return 1 if the engine has less than 0.9 of the loop's tokens per second."""
    speeds = {side: [each[side]["tokens"] / each[side]["seconds"] for each in rounds] for side in ("alone", "ours")}
    ratios = [ours / own for ours, own in zip(speeds["ours"], speeds["alone"], strict=True)]
    print(f"{arguments.requests} requests of {arguments.tokens} tokens at once, {arguments.layers} layers of width")
    print(f"{arguments.hidden}, {arguments.threads} thread(s), {os.cpu_count()} cores, {len(rounds)} rounds")
    print(f"  transformers alone   {_spread(speeds['alone'], 0)} tokens/s")
    print(f"  under dynamo-worker  {_spread(speeds['ours'], 0)} tokens/s")
    print(f"  ratio                {_spread(ratios, 2)}; bar: at least 0.90")
    cpu = [each["alone"]["cpu_seconds"] / each["ours"]["cpu_seconds"] for each in rounds]
    print(f"  the same per CPU second of the process with the model: {_spread(cpu, 2)}")
    for key, name in (("late_p99_ms", "event loop late, p99"), ("late_most_ms", "event loop late, most")):
        print(f"  {name:21}{_spread([each['ours'][key] for each in rounds], 1)} ms")
    ratio = statistics.median(ratios)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": rounds, "ratio": ratio, "cores": os.cpu_count()}, indent=1))
    return int(ratio < _BAR)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}…{max(values):.{digits}f})"


if __name__ == "__main__":
    raise SystemExit(main())
