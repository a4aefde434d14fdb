#!/usr/bin/env bash
set -euo pipefail
unset CDPATH

usage() {
    cat <<'TEXT'
usage: run_experiment.sh CONFIG [--download] [flags of train_staged.py: --debug, --training.epochs 1, ...]

Runs the stages that CONFIG's training.mode names, with all their set-up:
  environment   the active virtual or conda environment as it is; without one .venv beside this script, made and filled
                from requirements.txt where it is missing, unfinished or older than that file (PYTHON names the
                interpreter that makes it, 3.11 or newer)
  --download    first fetch the data set of CONFIG's task (or of --task) into data/
  GPUs          several visible ones get a process each, by torchrun; not with --debug or --device cpu

CONFIG is read from where you are. The run itself takes place in this script's folder: outputs/ lies there, and relative
paths in CONFIG and in flags are read from there. The same command again goes on where it stopped.
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

case "${1-}" in
    "") usage >&2; exit 2 ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "CONFIG comes first, got $1; run_experiment.sh --help shows the usage" ;;
esac
config=$1
shift
[ -f "$config" ] || fail "$config: no such config file"
config="$(cd "$(dirname "$config")" && pwd)/$(basename "$config")"
cd "$(dirname "${BASH_SOURCE[0]}")"

download=false task='' one_process=false before='' flags=()
for word in "$@"; do
    case $before in
        --task) task=$word ;;
        --device) [[ $word == cuda || $word == auto ]] || one_process=true ;;
    esac
    case $word in
        --debug) one_process=true ;; # it runs on the CPU
        --task=*) task=${word#*=} ;;
        --device=cpu | --device=mps) one_process=true ;;
    esac
    before=$word
    if [ "$word" = --download ]; then download=true; else flags+=("$word"); fi
done

# --- environment
if [ -n "${VIRTUAL_ENV-}${CONDA_PREFIX-}" ]; then
    python -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("torch", "transformers", "peft"))))' ||
        fail "the active environment lacks packages: pip install -r $PWD/requirements.txt, or deactivate it"
else
    installed=.venv/requirements.installed # a copy, put there once everything is installed
    if ! cmp -s requirements.txt "$installed"; then
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            maker=${PYTHON:-python3}
            "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
                fail "$maker is missing or older than Python 3.11: set PYTHON to a newer one"
            "$maker" -m venv --clear .venv
        fi
        echo "installing requirements.txt into $PWD/.venv"
        rm -f "$installed"
        cp requirements.txt "$installed.new" # as it is now: it may be edited while pip works
        .venv/bin/python -m pip install -r "$installed.new"
        mv "$installed.new" "$installed"
    fi
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
fi

# --- data
if $download; then
    [ -n "$task" ] || task=$(python -c '
import sys
from common.config import load_config
from common.log import command
print(command(lambda argv: load_config(argv[0]).task)(sys.argv[1:]))' "$config")
    python data/download_datasets.py --dataset "$task" --splits train,val,test
fi

# --- run
gpus=0
if ! $one_process && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # nvidia-smi does not look at it
        named=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
        gpus=$((named < gpus ? named : gpus))
    fi
fi
run=(train_staged.py --config "$config" ${flags[@]+"${flags[@]}"})
if [ "$gpus" -gt 1 ]; then
    echo "$gpus GPUs: torchrun --nproc-per-node $gpus"
    exec torchrun --nproc-per-node "$gpus" "${run[@]}"
fi
exec python "${run[@]}"
