#!/bin/sh
# Stage 4 on ImageNet, as in the paper: 30 epochs at learning rate 5e-5 for one sub-network of each super-network.
set -e
cd "$(dirname "$0")"
MODELS=${MODELS:-vit_tiny vit_small vit_base}
DATA=${DATA:-/data/imagenet}      # with train/<wnid>/ and val/<wnid>/
GPUS=${GPUS:-8}
OUTPUT=${OUTPUT:-output}
PYTHON=${PYTHON:-python3}
BATCH=${BATCH:-128}               # per GPU; the learning rate follows the total
RATIO=${RATIO:-0.5}               # share of the full network's MACs

for model in $MODELS; do
    $PYTHON -m torch.distributed.run --standalone --nproc-per-node=$GPUS main_finetune_peeled.py --model $model \
        --data-path $DATA --checkpoint $OUTPUT/peelable/$model --macs-ratio $RATIO --batch-size $BATCH \
        --epochs 30 --lr 5e-5 --min-lr 1e-6 --resume auto \
        --output-dir $OUTPUT/finetune/$model-$RATIO "$@"
done
