#!/bin/sh
# Stage 2 on ImageNet: 300 epochs for Ti and S, 150 for B, the list growing in the first 50. A run that was stopped goes
# on when the script is started again. The paper's list, which grows: sh run_train.sh --mask-table none
# Several machines: NODES=4 NODE_RANK=0..3 MASTER=host:port, the same on each but for the rank.
set -e
cd "$(dirname "$0")"
MODELS=${MODELS:-vit_tiny vit_small vit_base}
DATA=${DATA:-/data/imagenet}      # with train/<wnid>/ and val/<wnid>/
GPUS=${GPUS:-8}
OUTPUT=${OUTPUT:-output}
PYTHON=${PYTHON:-python3}
BATCH=${BATCH:-128}               # per GPU; the learning rate follows the total
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER=${MASTER:-localhost:29500}

for model in $MODELS; do
    epochs=300
    [ $model = vit_base ] && epochs=150
    $PYTHON -m torch.distributed.run --nnodes=$NODES --node-rank=$NODE_RANK --nproc-per-node=$GPUS \
        --master-addr=${MASTER%:*} --master-port=${MASTER#*:} main_train.py --model $model --data-path $DATA \
        --pretrained $OUTPUT/reparam/$model/reparamed.pth --batch-size $BATCH --epochs $epochs --warmup-epochs 0 \
        --grow-epochs 50 --drop-ratio 0.875 --proxy-samples 1024 --resume auto \
        --output-dir $OUTPUT/peelable/$model "$@"
done
