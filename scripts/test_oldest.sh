#!/usr/bin/env bash
# Tests with the oldest packages that pyproject.toml allows (.ci/oldest.txt), in a virtual environment of their own:
# contract, export, generation, chunkwise, data and one run from end to end. Arguments are other tests than these.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    for name in compat contract export sparse_export plain_transformers generate kv_cache chunkwise decoder data token_cache sources end_to_end; do
        tests+=("tests/test_$name.py")
    done
fi
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
# shellcheck disable=SC1091
source "$venv/bin/activate"
pip install --quiet torch==2.13.0
pip install --quiet --constraint .ci/oldest.txt -e ".[test]"
echo "oldest packages:"
pip list
pytest --durations=10 "${tests[@]}"
