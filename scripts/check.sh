#!/usr/bin/env bash
# Every check of the project, the same here and in CI. Needs the `dev` extra.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
