#!/usr/bin/env bash
# Trains a dense language model and three sparse ones (HashLayer, Switch, Avg-K) of the same active
# size on the State of the Union addresses, and compares them. It took 7 minutes on 2 cores.
#
#   bash examples/quickstart.sh                          everything
#   QUICKSTART_UPDATES=100 bash examples/quickstart.sh   shorter training
#   QUICKSTART_MODELS="dense avgk pkm_ffn" bash examples/quickstart.sh   other models
#   QUICKSTART_MODELS=all bash examples/quickstart.sh    all methods
#
# Results are in runs/quickstart. A second run reuses results with the same settings and code.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/venv.sh

UPDATES=${QUICKSTART_UPDATES:-800}
[[ $UPDATES =~ ^[1-9][0-9]*$ ]] ||
    { echo "QUICKSTART_UPDATES=$UPDATES: must be a positive whole number" >&2; exit 1; }
# Updates from one validation to the next: a validation takes as long as tens of updates, so a short
# training validates no more often than one of 800 updates does.
INTERVAL=$(((UPDATES + 7) / 8))
INTERVAL=$((INTERVAL < 100 ? 100 : INTERVAL))
KNOWN=$(python -W ignore -c "
from fairseq_sffn.models.transformer_lm import METHODS
print('dense', *(method.name for method in METHODS if method.selector))")
# Any white space separates words. read fails at the end of its input.
read -r -d '' -a MODELS <<<"${QUICKSTART_MODELS:-dense hash_layer switch avgk}" || true
if [ "${MODELS[*]}" = all ]; then read -r -a MODELS <<<"$KNOWN"; fi
for model in "${MODELS[@]}"; do
    [[ " $KNOWN " == *" $model "* ]] ||
        { echo "QUICKSTART_MODELS: $model is none of ${KNOWN// /, }" >&2; exit 1; }
done
SEED=1
RUNS=runs/quickstart
DATA=$RUNS/data/bin
CODE="$(python -W ignore -c "from fairseq_sffn import fingerprint; print(fingerprint.code_fingerprint())")"
CODE+=" $(sha256sum examples/requirements.txt)"

# fresh DIRECTORY SETTINGS: empties the directory unless it was made with the same settings.
fresh() {
    if [ "$(cat "$1/settings.txt" 2>/dev/null)" != "$2" ]; then
        rm -rf "$1"
        mkdir -p "$1"
        echo "$2" >"$1/settings.txt"
    fi
}

# once FILE COMMAND...: runs the command unless the file shows that it completed before.
once() {
    local marker=$1
    shift
    if [ -e "$marker" ]; then return; fi
    "$@"
    touch "$marker"
}

prepare() {
    python examples/quickstart/prepare.py --input examples/data/state_of_the_union.txt.xz \
        --output $RUNS/data --vocab-size 1024 --seed $SEED
    fairseq-preprocess --only-source --srcdict $RUNS/data/dict.txt --workers 2 --destdir $DATA \
        --trainpref $RUNS/data/train.bpe --validpref $RUNS/data/valid.bpe \
        --testpref $RUNS/data/test.bpe >$RUNS/data/preprocess.log 2>&1 ||
        { tail -n 3 $RUNS/data/preprocess.log >&2; return 1; }
}

# The recipe is the same for all models: 16 x 128 tokens per update, and no dropout, as a training sees
# less than half of the text.
train_command() {
    echo fairseq-train $DATA --user-dir fairseq_sffn --task sffn_language_modeling \
        --arch "transformer_lm_$1_tiny" --criterion sffn_cross_entropy \
        --tokens-per-sample 128 --batch-size 16 --max-update "$UPDATES" \
        --optimizer sffn_adam --adam-betas "0.9,0.98" --lr 8e-3 --dropout 0 \
        --lr-scheduler polynomial_decay --warmup-updates $((UPDATES / 10)) \
        --total-num-update "$UPDATES" --seed $SEED --cpu --num-workers 0 \
        --save-dir "$RUNS/$1/checkpoints" --no-epoch-checkpoints \
        --save-interval-updates "$INTERVAL" --keep-interval-updates 1 \
        --log-format json --log-interval $(((UPDATES + 15) / 16))
}

train() {
    local log=$RUNS/$1/train.log
    $(train_command "$1") 2>&1 |
        python examples/quickstart/progress.py --log "$log" --name "$1" --updates "$UPDATES" ||
        { tail -n 1 "$log" >&2; return 1; }
}

evaluate() {
    local log=$RUNS/$1/evaluate.log
    fairseq-sffn evaluate "$RUNS/$1/checkpoints/checkpoint_best.pt" $DATA:valid $DATA:test \
        --routing $DATA:valid --json --cpu --num-workers 0 --tokens-per-sample 128 --batch-size 32 \
        >"$RUNS/$1/evaluation.json" 2>"$log" || { tail -n 1 "$log" >&2; return 1; }
}

fresh $RUNS/data "$(declare -f prepare) $(sha256sum examples/quickstart/prepare.py) $SEED"
echo "== data"
once $RUNS/data/prepared prepare

run_model() {
    local settings
    settings="$(train_command "$1") $(declare -f evaluate) $CODE $(cat $RUNS/data/settings.txt)"
    fresh $RUNS/"$1" "$settings"
    train_command "$1" >$RUNS/"$1"/command.txt
    once $RUNS/"$1"/trained train "$1"
    once $RUNS/"$1"/evaluated evaluate "$1"
}

# Two models train at a time on one thread each. This is as fast as one after the other on two threads,
# and other programs stall it less. Each has its own process group, which ends with this script.
export OMP_NUM_THREADS=1
# glibc keeps the memory of large tensors. Otherwise it is returned and allocated again at each update.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4000000000:glibc.malloc.mmap_threshold=4000000000}
set -m
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
set -- "${MODELS[@]}"
while [ $# -gt 0 ]; do
    pair=("${@:1:2}")
    shift $(($# > 1 ? 2 : 1))
    echo "== ${pair[*]} ($(($# + ${#pair[@]})) of ${#MODELS[@]} models left)"
    jobs=()
    for model in "${pair[@]}"; do
        run_model "$model" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
done

echo "== results"
python -W ignore examples/quickstart/report.py --runs $RUNS --data $DATA --models "${MODELS[@]}"
cat <<END

Written: $RUNS/results.json, $RUNS/perplexity.png, $RUNS/block_load.png

Next:
- train on your own text: README.md, "Train on your own text"
- add a method of your own: fairseq_sffn/memory/README.md
- compare methods with tuned settings and several seeds: examples/paper/README.md
END
