# syntax=docker/dockerfile:1
# CPU (the default):  docker build -t pilothouse .
# CUDA:               docker build -t pilothouse:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# vLLM:               docker build -t pilothouse:vllm --build-arg EXTRAS=ray,postgres --build-arg CONSTRAINTS=constraints-vllm.txt
#                         --build-arg TORCH_INDEX=https://pypi.org/simple --build-arg PACKAGES="gcc libc6-dev" .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Of pyproject.toml, e.g. "structured,loadtest".
ARG EXTRAS=structured
ARG CONSTRAINTS=constraints.txt
WORKDIR /src
RUN python -m venv /opt/pilothouse
ENV PATH=/opt/pilothouse/bin:$PATH
# torch first, from its own index: a change of ours does not fetch it again.
COPY constraints.txt constraints-vllm.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
    --constraint "$CONSTRAINTS" torch
COPY pyproject.toml README.md LICENSE ./
COPY steering steering
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint "$CONSTRAINTS" ".[$EXTRAS]"

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="Pilothouse" \
      org.opencontainers.image.licenses="Apache-2.0"
# Debian's. vLLM's kernels are compiled where they run.
ARG PACKAGES=
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$PACKAGES" ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends $PACKAGES \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# A number, so that Kubernetes can see that it is not root. /keys/* are volumes of compose.yaml,
# which start with these owners.
RUN useradd --uid 10001 --create-home pilothouse \
    && install -d -o pilothouse -g pilothouse /data /keys/server /keys/scrape /keys/load /keys/database
COPY --from=build /opt/pilothouse /opt/pilothouse
ENV PATH=/opt/pilothouse/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PILOTHOUSE_PORT=8000
USER 10001
WORKDIR /data
EXPOSE 8000
# /ready, not /health: a container that drains is not one to send requests to.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['PILOTHOUSE_PORT'] + '/ready', timeout=4)"]
# Outside the container nobody reaches it until a host (and keys, or --insecure) are given:
#   docker run -p 127.0.0.1:8000:8000 pilothouse serve --host 0.0.0.0 --insecure
ENTRYPOINT ["pilothouse"]
CMD ["serve"]
