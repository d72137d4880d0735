# The CPU image, for x86-64 and aarch64: the way for macOS and Windows, and for Linux with an older glibc.
#   docker build -f tools/image/cpu.Dockerfile -t megatron-dsrl-cpu .
#   docker run --rm --shm-size=2g -v "$PWD/runs:/opt/megatron-dsrl/runs" megatron-dsrl-cpu     the tiny run
# .devcontainer/ starts from it too.
FROM python:3.12.13-slim-bookworm

ENV DSRL_VENV=/opt/dsrl \
    PIP_NO_CACHE_DIR=1
# Debian keeps one version of a package: none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*

# A layer for the packages: a change of the sources downloads nothing again.
WORKDIR /opt/megatron-dsrl
COPY pyproject.toml README.md LICENSE CITATION.cff ./
COPY tools tools
RUN bash tools/setup_cpu.sh --packages

COPY megatron_dsrl megatron_dsrl
COPY configs configs
COPY examples examples
COPY slurm slurm
COPY tests tests
RUN bash tools/setup_cpu.sh

ENV PATH=/opt/dsrl/bin:$PATH
CMD ["bash", "examples/tiny_dsrl/run.sh"]
