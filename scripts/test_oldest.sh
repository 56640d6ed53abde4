#!/usr/bin/env bash
# Tests with the oldest packages that pyproject.toml allows (.ci/oldest.txt), in a virtual
# environment of their own: contract, architectures, recipes, export, generation, data,
# reports and one run from end to end. Arguments are other tests than these.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    names=(compat contract speed_up task_model heads plain_losses plain_transformers recipe
        wrong_recipes readers data token_cache sources export generator answer kv_cache decoder report end_to_end)
    for name in "${names[@]}"; do
        tests+=("$(find tests -name "test_$name.py")")
    done
    # More than a minute, about what the newest packages warn of.
    tests+=(--deselect tests/test_compat.py::test_train_and_generate_give_no_warning_of_what_will_change)
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
pytest -n auto --durations=10 "${tests[@]}"
