# The image of all nodes. For GPUs:  docker build -t collm-dist:0.2.0 .
# For CPUs:  docker build -t collm-dist:cpu --build-arg BASE_IMAGE=python:3.12-slim --build-arg LOCK=cpu \
#              --build-arg TORCH="torch==2.13.0 --index-url ADDRESS_OF_CPU_BUILDS" .
# The lock for GPUs brings torch with its CUDA libraries; the base image needs none. Features that compile operators,
# such as offloading through cluster.deepspeed_extra, need a devel image of the same CUDA version.
ARG BASE_IMAGE=nvidia/cuda:13.0.0-base-ubuntu24.04
FROM ${BASE_IMAGE}

# cpu: the same versions without torch; TORCH then gives the torch requirement and its pip options.
ARG LOCK=gpu
ARG TORCH=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# torch.compile builds its launchers with gcc and Python's headers; KubeRay's probes use wget. Versions follow the
# distribution, with its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        gcc libc6-dev python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home collm

WORKDIR /app
ENV PATH=/app/venv/bin:$PATH DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
COPY requirements/ requirements/
# hadolint ignore=DL3013,SC2086
RUN python3 -m venv /app/venv \
    && if [ -n "$TORCH" ]; then pip install $TORCH; fi \
    && pip install --no-deps --require-hashes --requirement "requirements/$LOCK.lock"
COPY pyproject.toml README.md LICENSE ./
COPY collm_dist/ collm_dist/
COPY configs/ configs/
COPY launch/ launch/
RUN pip install --no-deps --no-build-isolation --editable . && pip check

USER 10001
CMD ["python", "launch/run_pipeline.py", "--help"]
