#!/bin/sh
# Set up and run the tests: sh run_tests.sh [pytest options]. The longer checks: sh run_tests.sh -m slow
set -e
cd "$(dirname "$0")"
REQUIREMENTS="requirements.txt tests/requirements.txt"
. tools/setup.sh
exec "$PYTHON" -m pytest tests "$@"
