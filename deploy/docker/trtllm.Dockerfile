# A worker with TensorRT-LLM, on NVIDIA's own image. Not built by us yet. Build it from the root of the repository, with digests
# that you have checked:
#   docker build -f deploy/docker/trtllm.Dockerfile --build-arg BASE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc29@sha256:… \
#     --build-arg PYTHON=python:3.12-slim@sha256:… -t dynamo-worker-trtllm:0.2.0 .
# To try unpinned tags, add `--build-arg UNPINNED=1`.
#
# What to watch out for:
#   - The image's entry point is NVIDIA's nvidia_entrypoint.sh, a shell in front of everything; its user is root. That
#     script adds the libraries with which an old driver runs a newer CUDA. Without it the node's driver must know the
#     image's CUDA; or else set LD_LIBRARY_PATH=/usr/local/cuda/compat in front of its value.
#   - PIP_CONSTRAINT binds pip to the versions of the image; it is lifted for our packages only.
#   - Several ranks are started by Open MPI, which refuses to run as root; user 1000 may.
#   - Models go to $HOME/.cache (HF_HOME): put a volume there.
ARG BASE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc29
ARG PYTHON=python:3.12-slim

# Our wheels are pure Python: they are built elsewhere, and the engine's image gets no build tools.
FROM ${PYTHON} AS build
ARG BASE
ARG PYTHON
ARG UNPINNED=
# A tag can move to another image; a digest cannot.
RUN case "$BASE $PYTHON" in \
    *@sha256:*" "*@sha256:*) ;; \
    *) echo "BASE=$BASE or PYTHON=$PYTHON is not pinned: use NAME@sha256:DIGEST, or set UNPINNED=1" >&2; \
       [ -n "$UNPINNED" ] ;; \
    esac
COPY deploy/docker/build-requirements.txt /src/
RUN pip install --no-cache-dir --require-hashes -r /src/build-requirements.txt
COPY core /src/core
COPY plugins/trtllm /src/plugin
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels /src/core /src/plugin

FROM ${BASE}
USER 0
COPY --from=build /wheels /tmp/wheels
COPY deploy/docker/requirements.txt deploy/docker/install_missing.py /tmp/
# The engine keeps its own packages. What the worker lacks is installed with hashes; the last line says so if it cannot
# be imported.
RUN PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 \
    python3 -m pip install --no-cache-dir --compile --no-deps --no-index /tmp/wheels/*.whl \
    && python3 /tmp/install_missing.py /tmp/requirements.txt \
    && rm -r /tmp/wheels /tmp/requirements.txt /tmp/install_missing.py \
    && python3 -P -m dynamo_worker engines >/tmp/engines && grep trtllm /tmp/engines && rm /tmp/engines

# Ubuntu's images have a user 1000 of their own, others have none. A home directory of that user is all that is needed.
RUN (getent passwd 1000 || useradd --uid 1000 --home-dir /home/worker worker) && install -d -o 1000 -m 0755 /home/worker
USER 1000
ENV HOME=/home/worker
WORKDIR /home/worker

# /live, /health and /metrics.
ENV DYN_SYSTEM_PORT=9090
EXPOSE 9090

# It replaces the image's own entry point. Use the exec form, without a shell: dynamo-worker is PID 1. `python3` comes
# first, so that Dynamo's operator can append its flags; -P keeps the current directory off the module path.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-P", "-m", "dynamo_worker", "--engine", "trtllm"]
CMD ["--help"]
