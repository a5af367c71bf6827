# Ingot on CPUs. From the root of the checkout:
#   docker build --file infra/docker/cpu.Dockerfile --tag ingot:cpu .
# torch's default build brings CUDA: `--build-arg PIP_INDEX_URL=...` names an index that has the build for CPUs.
# The project (ingot.toml, data.dvc, .dvc) is mounted at, or copied to, /project.
FROM python:3.11.11-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends git g++ \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 ingot \
 && useradd --uid 1000 --gid ingot --create-home ingot

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/ingot
COPY flows/constraints.txt flows/constraints.txt
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN pip install --constraint flows/constraints.txt torch
COPY . .
RUN pip install --constraint flows/constraints.txt . "psycopg[binary]" Flask-WTF \
 && install --directory --owner ingot --group ingot /project /cache

USER ingot
WORKDIR /project
ENV INGOT_CACHE=/cache
CMD ["ingot", "doctor"]
