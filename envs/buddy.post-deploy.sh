#!/usr/bin/env bash
# Run by Snakemake inside the new environment, from the working directory of the workflow.
set -euo pipefail
python -m pip install --constraint envs/constraints.txt --editable '.[workflow]'
