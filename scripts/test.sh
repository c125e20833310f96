#!/usr/bin/env bash
# Set up .venv, lint, check types, and run the tests that take seconds. Further arguments go to pytest.
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
install_project "test,export,docs"

echo "== lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
echo "== tests"
.venv/bin/python -m pytest -m "not slow and not gpu and not downstream" "$@"
