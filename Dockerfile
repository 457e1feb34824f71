# Twintune in a container; docs/docker.md says how it is used.
#
#   docker build --target cpu -t twintune:cpu .
#   docker build --target cuda -t twintune:cuda .
#
# llama.cpp is not in the image: it is built on first use, for the CPU that runs it, and stays in the cache's volume.
FROM python:3.11-slim-bookworm AS base
# The compiler builds llama.cpp. Debian's packages are not pinned: it removes old versions, and a build would then fail.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 twintune \
    && install -d -o twintune /work /home/twintune/.cache \
    && python -m venv /opt/twintune
ENV PATH=/opt/twintune/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
WORKDIR /work
VOLUME ["/work", "/home/twintune/.cache"]
ENTRYPOINT ["twintune"]
CMD ["--help"]

# What is installed of this folder; .dockerignore names the same, and lets nothing else reach the build.
FROM base AS source
COPY pyproject.toml README.md LICENSE cli.py /source/
COPY common /source/common
COPY configs /source/configs
COPY examples /source/examples
COPY mlx_backend /source/mlx_backend
COPY torch_backend /source/torch_backend

FROM base AS cpu
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=source,source=/source,target=/source,rw pip install "/source[bitsandbytes]"
USER 1000

FROM base AS cuda
RUN pip install torch==2.13.0
RUN --mount=type=bind,from=source,source=/source,target=/source,rw pip install "/source[bitsandbytes]"
USER 1000
