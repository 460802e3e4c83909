#!/bin/sh
# Stage 1 on ImageNet, to cut sub-networks at once or as the start of stage 2: 1024 proxy images. Every variable can be
# set from outside, e.g.
#   MODELS=vit_small DATA=/datasets/imagenet GPUS=4 sh run_reparam.sh
set -e
cd "$(dirname "$0")"
MODELS=${MODELS:-vit_tiny vit_small vit_base}
DATA=${DATA:-/data/imagenet}      # with train/<wnid>/ and val/<wnid>/
GPUS=${GPUS:-8}
OUTPUT=${OUTPUT:-output}
PYTHON=${PYTHON:-python3}
BASIS=${BASIS:-balanced}          # pca for the paper's

for model in $MODELS; do
    # DeiT's weights: a downloaded file in output/pretrained/ if there is one, else timm's hub.
    file=$OUTPUT/pretrained/$model.pth
    $PYTHON -m torch.distributed.run --standalone --nproc-per-node=$GPUS main_reparam.py --model $model \
        --data-path $DATA --basis $BASIS --proxy-samples 1024 --output-dir $OUTPUT/reparam/$model \
        $([ -f $file ] && echo --pretrained $file) "$@"
done
