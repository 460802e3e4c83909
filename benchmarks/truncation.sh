#!/bin/sh
# Stage 1 without training, on three ViTs trained on Fashion-MNIST and on the demo's: about 20 minutes on a CPU core.
#   sh benchmarks/truncation.sh            writes docs/truncation_fashion.* and docs/truncation_digits.*
# FASHION is the folder of the four gzipped IDX files (Debian: dataset-fashion-mnist).
set -e
cd "$(dirname "$0")/.."
FASHION=${FASHION:-/usr/share/datasets/fashion-mnist}
OUTPUT=${OUTPUT:-output/truncation}
REQUIREMENTS=requirements.txt
. tools/setup.sh

DATA="--data-set FASHION_MNIST --data-path $FASHION --device cpu --num-workers 0 --batch-size 128"
RECIPE="--no-repeated-aug --no-model-ema --aa= --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --drop-path 0"
for seed in 0 1 2; do
    [ -f $OUTPUT/seed$seed/pretrained.pth ] || $PYTHON tools/pretrain.py --model vit_fashion $DATA $RECIPE \
        --epochs 8 --lr 6e-3 --warmup-epochs 0 --seed $seed --output-dir $OUTPUT/seed$seed
done
$PYTHON benchmarks/truncation.py --model vit_fashion $DATA --test-images 3000 --output docs/truncation_fashion --pretrained \
    $OUTPUT/seed0/pretrained.pth $OUTPUT/seed1/pretrained.pth $OUTPUT/seed2/pretrained.pth
# The demo's network is made by run_demo.sh.
$PYTHON benchmarks/truncation.py --model vit_digits --data-set DIGITS --device cpu --num-workers 0 \
    --output docs/truncation_digits --pretrained output/demo/pretrain/pretrained.pth
