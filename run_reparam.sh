#!/bin/sh
# Stage 1 on ImageNet, to cut sub-networks at once or as the start of stage 2: 1024 proxy images. Variables are in
# tools/stage.sh, for example
#   MODELS=vit_small DATA=/datasets/imagenet GPUS=4 sh run_reparam.sh
# RECIPE=paper: the paper's basis and order, and no more than it has.
. "$(dirname "$0")/tools/stage.sh"
case $RECIPE in
    ours) recipe= ;;
    paper) recipe="--basis pca --mlp-order hessian --no-compensation" ;;
esac

for model in $MODELS; do
    # DeiT's weights: a downloaded file in output/pretrained/ if there is one, else timm's hub.
    weights=$OUTPUT/pretrained/$model.pth
    [ -f "$weights" ] || weights=
    stage main_reparam.py --model "$model" $recipe --proxy-samples 1024 --output-dir "$OUTPUT/reparam/$model" \
        ${weights:+--pretrained "$weights"} "$@"
done
