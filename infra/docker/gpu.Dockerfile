# Ingot on NVIDIA GPUs. From the root of the checkout:
#   docker build --file infra/docker/gpu.Dockerfile --tag ingot:gpu .
# The wheel of torch brings CUDA's libraries, the host its driver. There is no nvcc, so DeepSpeed builds no CUDA kernels.
FROM python:3.11.11-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends git g++ \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 ingot \
 && useradd --uid 1000 --gid ingot --create-home ingot

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/ingot
COPY . .
RUN pip install --constraint flows/constraints.txt ".[gpu]" "psycopg[binary]" Flask-WTF \
 && install --directory --owner ingot --group ingot /project /cache

USER ingot
WORKDIR /project
ENV INGOT_CACHE=/cache
CMD ["ingot", "doctor"]
