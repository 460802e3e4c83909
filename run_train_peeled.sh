#!/bin/sh
# Stage 4 on ImageNet, as in the paper: 30 epochs for one sub-network of each super-network, of either RECIPE, at
# learning rate 5e-5 for 512 images. Variables are in tools/stage.sh and here.
. "$(dirname "$0")/tools/stage.sh"
BATCH=${BATCH:-128}               # per GPU; the learning rate follows the total
RATIO=${RATIO:-0.5}               # share of the full network's MACs

for model in $MODELS; do
    stage main_finetune_peeled.py --model "$model" --checkpoint "$OUTPUT/peelable/$model" --macs-ratio "$RATIO" \
        --batch-size "$BATCH" --epochs 30 --lr 5e-5 --min-lr 1e-6 --resume auto \
        --output-dir "$OUTPUT/finetune/$model-$RATIO" "$@"
done
