#!/bin/sh
# Stage 2 on ImageNet: 300 epochs for Ti and S, 150 for B. A run that was stopped goes on when the script is started
# again. Variables are in tools/stage.sh and here. RECIPE=paper: the width table grows in the first 50 epochs.
# Several machines: NODES=4 NODE_RANK=0..3 MASTER=host:port, the same on each but for the rank; srun says them by itself.
. "$(dirname "$0")/tools/stage.sh"
BATCH=${BATCH:-128}               # per GPU; the learning rate follows the total
NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ "$NODES" -gt 1 ]; then
    : "${MASTER:=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))}"
    machines="--nnodes=$NODES --node-rank=$NODE_RANK --master-addr=${MASTER%:*} --master-port=${MASTER##*:}"
fi
recipe=
[ "$RECIPE" = ours ] || recipe="--mask-table none --grow-epochs 50 --drop-ratio 0.875 --proxy-samples 1024"

for model in $MODELS; do
    epochs=300
    [ "$model" != vit_base ] || epochs=150
    stage main_train.py --model "$model" --pretrained "$OUTPUT/reparam/$model/reparamed.pth" --batch-size "$BATCH" \
        --epochs $epochs --warmup-epochs 0 $recipe --resume auto --output-dir "$OUTPUT/peelable/$model" "$@"
done
