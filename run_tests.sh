#!/bin/sh
# Set up and run the tests: sh run_tests.sh [files or pytest options]. The longer checks: sh run_tests.sh -m slow
set -e
cd "$(dirname "$0")"
REQUIREMENTS="requirements.txt tests/requirements.txt"
. tools/setup.sh
# Two processes of one thread each: the networks are tiny. A file's tests share fixtures, so they stay together.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
