#!/bin/sh
# The whole chain on scikit-learn's 1,797 real digits, on a CPU, in a few minutes:
# a small ViT trained on the spot -> stage 1 -> stage 2 -> stage 3 on three sets of weights -> stage 4 -> a chart.
# Started again it goes on where it was stopped; remove output/demo to start afresh.
set -e
cd "$(dirname "$0")"
OUTPUT=${OUTPUT:-output/demo}
REQUIREMENTS=requirements.txt
. tools/setup.sh

DATA="--model vit_digits --data-set DIGITS --device cpu --num-workers 0"
# 1,198 images of 8 x 8 pixels: shifts are augmentation enough, and a plain recipe learns them best.
RECIPE="--resume auto --no-repeated-aug --no-model-ema --aa= --hflip 0 --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --drop-path 0 --warmup-epochs 5"
LADDER="--macs-ratio 1 0.8333 0.6667 0.5 0.4167 0.3333 0.25 0.1667"

echo "== a small ViT, trained from scratch"
"$PYTHON" tools/pretrain.py $DATA $RECIPE --epochs 60 --lr 8e-3 --eval-period 20 --output-dir "$OUTPUT/pretrain"
echo "== stage 1: reparameterise, and cut without training"
"$PYTHON" main_reparam.py $DATA --pretrained "$OUTPUT/pretrain/pretrained.pth" --output-dir "$OUTPUT/reparam"
"$PYTHON" main_test.py $DATA --checkpoint "$OUTPUT/reparam" $LADDER --output-dir "$OUTPUT/test/reparam"
echo "== stage 2: train the super-network"
"$PYTHON" main_train.py $DATA $RECIPE --pretrained "$OUTPUT/reparam/reparamed.pth" --epochs 60 --lr 8e-3 \
    --eval-period 20 --output-dir "$OUTPUT/supernet"
echo "== stage 3: sub-networks of the same widths, from the original, the reparameterised and the trained weights"
for weights in pretrain/pretrained.pth reparam/reparamed.pth; do
    "$PYTHON" main_test.py $DATA --no-compensation --checkpoint "$OUTPUT/$weights" --mask-table "$OUTPUT/supernet/mask_table.json" $LADDER \
        --output-dir "$OUTPUT/test/plain/${weights%%/*}"
done
"$PYTHON" main_test.py $DATA --checkpoint "$OUTPUT/supernet" $LADDER --output-dir "$OUTPUT/test/supernet"
echo "== stage 4: fine-tune one sub-network"
"$PYTHON" main_finetune_peeled.py $DATA $RECIPE --checkpoint "$OUTPUT/supernet" --macs-ratio 0.1667 --epochs 10 --lr 1e-3 --warmup-epochs 0 \
    --eval-period 10 --output-dir "$OUTPUT/finetune"
"$PYTHON" main_test.py --data-set DIGITS --device cpu --num-workers 0 --checkpoint "$OUTPUT/finetune" --output-dir "$OUTPUT/test/finetune"
echo "== accuracy against MACs"
"$PYTHON" tools/plot_accuracy.py "$OUTPUT/accuracy.png" --title "scikit-learn digits: sub-networks of one ViT" \
    "original weights, truncated=$OUTPUT/test/plain/pretrain" "stage 1, truncated: the same widths=$OUTPUT/test/plain/reparam" \
    "stage 1, compensated: its own widths=$OUTPUT/test/reparam" "stage 2, trained super-network=$OUTPUT/test/supernet"
