#!/bin/sh
# Stage 3 on ImageNet: the default ladder (1, 5/6, 4/6, 3/6, 2/6 of the full MACs) of every super-network, of either
# RECIPE. Variables are in tools/stage.sh.
. "$(dirname "$0")/tools/stage.sh"

for model in $MODELS; do
    stage main_test.py --model "$model" --checkpoint "$OUTPUT/peelable/$model" --output-dir "$OUTPUT/test/$model" "$@"
done
