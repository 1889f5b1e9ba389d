# A server of one store. For a graphics card build on a CUDA image:
#   docker build -t slm .
#   docker build -t slm --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# A Python image has its own; a CUDA image has none.
RUN command -v python3 \
 || (apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
     && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/slm
ENV PATH=/opt/slm/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.lock ./
# torch comes first and with what its build needs; the lock names everything else, so nothing is resolved.
# On a machine without a graphics card, TORCH_OPTIONS may name the index of the smaller CPU build.
ARG TORCH_OPTIONS=""
RUN pip install ${TORCH_OPTIONS} --constraint requirements.lock torch
# What only developers need stays out of the image.
RUN grep -vE '^(beartype|grimp|hypothesis|import-linter|mypy|mypy-extensions|playwright|pyee|pytest|pytest-timeout|ruff|schemathesis|torch|types-.*)==' \
      requirements.lock > runtime.lock \
 && pip install --no-deps -r runtime.lock
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation .

FROM ${BASE}
# g++ compiles the CPU kernel on first use.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ $(command -v python3 > /dev/null || echo python3) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin slm \
 && install --directory --owner=slm --group=slm /store \
 && install --directory --mode=1777 /cache
COPY --from=build /opt/slm /opt/slm
ENV PATH=/opt/slm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    HF_HOME=/cache/huggingface \
    SLM_CACHE=/cache/slm \
    HOME=/home/slm
USER slm
WORKDIR /home/slm
VOLUME ["/store", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=4 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["slm"]
# An address that others can reach needs keys: `slm key` makes the file.
CMD ["serve", "/store", "--host", "0.0.0.0", "--port", "8000", "--keys", "/run/secrets/slm-keys"]
