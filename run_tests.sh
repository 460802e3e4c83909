#!/bin/sh
# Set up and run the tests: sh run_tests.sh [files or pytest options]. The longer checks: sh run_tests.sh -m slow
set -e
cd "$(dirname "$0")"
REQUIREMENTS="requirements.txt tests/requirements.txt"
. tools/setup.sh
# Two processes of one thread each: the networks are tiny. A file's tests share fixtures, so they stay together.
# On the CPU, with a GPU too; TEST_GPUS=0 sh run_tests.sh tests/test_gpu.py is for a GPU.
export CUDA_VISIBLE_DEVICES="${TEST_GPUS-}"
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
