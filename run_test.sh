#!/bin/sh
# Stage 3 on ImageNet: the default ladder (1, 5/6, 4/6, 3/6, 2/6 of the full MACs) of every super-network.
set -e
cd "$(dirname "$0")"
MODELS=${MODELS:-vit_tiny vit_small vit_base}
DATA=${DATA:-/data/imagenet}      # with train/<wnid>/ and val/<wnid>/
GPUS=${GPUS:-8}
OUTPUT=${OUTPUT:-output}
PYTHON=${PYTHON:-python3}

for model in $MODELS; do
    $PYTHON -m torch.distributed.run --standalone --nproc-per-node=$GPUS main_test.py --model $model \
        --data-path $DATA --checkpoint $OUTPUT/peelable/$model --output-dir $OUTPUT/test/$model "$@"
done
