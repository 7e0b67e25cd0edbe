# The packages of envs/constraints.txt with this checkout in them:   docker build -t buddy .      (docs/containers.md)
# Another base: --build-arg BASE=...; it needs Python 3.11 or newer as python and python3, with pip.
ARG BASE=python:3.12-slim
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8
WORKDIR /buddy

# Packages first: a change of the code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY envs/constraints.txt envs/
COPY buddy/__init__.py buddy/
RUN python3 -m pip install --constraint envs/constraints.txt --editable '.[workflow]'

COPY . .
# The commit that records name, as there is no .git in here: --build-arg BUDDY_COMMIT=$(git rev-parse HEAD)
ARG BUDDY_COMMIT=""
ENV BUDDY_COMMIT=${BUDDY_COMMIT} HOME=/tmp
CMD ["buddy", "--help"]
