# Sourced by run_reparam.sh, run_train.sh, run_test.sh and run_train_peeled.sh. Each variable can be set from outside.
set -e
root=$(dirname "$0")
MODELS=${MODELS:-vit_tiny vit_small vit_base}
DATA=${DATA:-/data/imagenet}      # with train/<wnid>/ and val/<wnid>/
GPUS=${GPUS:-8}                   # of each machine
OUTPUT=${OUTPUT:-$root/output}
RECIPE=${RECIPE:-ours}            # or paper
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
machines=--standalone
case $RECIPE in
    ours | paper) ;;
    *) echo "error: RECIPE=$RECIPE: choose ours or paper" >&2; exit 2 ;;
esac

# stage SCRIPT OPTION...: run one on the GPUs, pass signals on to it, and end as it does unless that is well.
stage() {
    script=$1
    shift
    # Ctrl-C goes to all processes of a terminal.
    running=
    trap : INT
    trap 'kill -TERM $running 2>/dev/null || :' TERM
    trap 'kill -USR1 $running 2>/dev/null || :' USR1
    "$PYTHON" "$root/tools/launch.py" $machines --nproc-per-node="$GPUS" "$root/$script" --data-path "$DATA" "$@" &
    running=$!
    code=0
    wait $running || code=$?
    while kill -0 $running 2>/dev/null; do  # a signal ended the waiting, and not the stage
        code=0
        wait $running || code=$?
    done
    [ $code = 0 ] || exit $code
}
