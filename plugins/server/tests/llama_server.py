"""llama.cpp's own HTTP server, from its wheel on PyPI (xllamacpp), as `llama-server` starts it."""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    number = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, number)  # the server's threads inherit it
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.model_alias = {"tiny"}
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_parallel = args.slots
    params.n_ctx = 16_384
    params.kv_unified = True
    params.cpuparams.n_threads = 1
    # With 16 bits, what a step computes for other requests shows in the last digits, and a random model has near ties.
    params.cache_type_k = params.cache_type_v = int(xllamacpp.ggml_type.GGML_TYPE_F32)
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = xllamacpp.Server(params)
    print(f"llama.cpp listens at {server.listening_address}", flush=True)
    signal.sigwait(number)


if __name__ == "__main__":
    main()
