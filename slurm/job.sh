#!/usr/bin/env bash
# What the batch scripts beside it share; they source it.
#
# TABLE OUT                   needed; METADATA and COLUMN too, by aam train
# TREE or UNIFRAC             UniFrac from a tree or a matrix; aam train without either leaves that loss off
# METADATA                    for aam pretrain: where --group-column is found
# ENCODER                     for aam train: best_model.pt of a pretrain run
# OPTIONS                     more options, as in OPTIONS="--preset small --group-column subject_id"
# STRATEGY                    of several tasks: distributed or fsdp; without it fsdp for aam pretrain, distributed for aam train
# SAVE_EVERY                  optimizer steps between two saved states (200)
# AAM_ENV                     environment made by env-cuda.sh or env-rocm.sh
# MODULES                     modules to load; gcc is what --compile-model needs
set -euo pipefail

prepare() {
    local modules
    read -ra modules <<< "${MODULES-gcc}"
    if [ ${#modules[@]} -gt 0 ]; then
        set +u # module itself may read variables that are not set
        module load "${modules[@]}"
        set -u
    fi
    export PATH="${AAM_ENV:-$HOME/envs/aam}/bin:$PATH" MPLBACKEND=agg
    export SLURM_KILL_BAD_EXIT=1 # a task that fails ends the others
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export TMPDIR=${TMPDIR:-/tmp}/aam-${SLURM_JOB_ID:-$$} # compiled kernels and temporary files stay on the node
    mkdir -p "$TMPDIR"
    trap 'rm -rf "$TMPDIR"' EXIT
}

# Runs a command as a job step. At SIGUSR1 and SIGTERM aam saves its state and ends with status 75. SIGUSR1 comes before the time limit, as the headers ask:
# the job then goes back into the queue. SIGTERM comes when SLURM takes the job away: SLURM itself requeues what is pre-empted, and what scancel ended stays ended.
step() {
    local asked= ended= again=1 status srun
    srun "$@" &
    srun=$!
    trap 'asked=1 again=1; kill -USR1 "$srun" || true' USR1 # which srun hands on to every task
    trap 'ended=1 again=1' TERM
    while [ -n "$again" ]; do # a trap cuts wait short
        again= status=0
        wait "$srun" || status=$?
    done
    case $status in
        75 | 138) asked=1 ;; # 138: SIGUSR1 came before there was anything to save
        0) asked= ;;
    esac
    if [ -n "$asked" ] && [ -z "$ended" ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    return "$status"
}

# Options that pretrain and train have in common, then those given, then OPTIONS.
aam_step() {
    local command=$1 strategy=$2 more
    shift 2
    set -- --table "$TABLE" --output-dir "$OUT" --resume-from auto --save-every-steps "${SAVE_EVERY:-200}" "$@"
    if [ -n "${METADATA:-}" ]; then set -- "$@" --metadata "$METADATA"; fi
    if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then set -- "$@" "--${STRATEGY:-$strategy}"; fi
    if [ -n "${TREE:-}" ]; then set -- "$@" --tree "$TREE"; fi
    if [ -n "${UNIFRAC:-}" ]; then set -- "$@" --unifrac-matrix "$UNIFRAC"; fi
    if [ -n "${ENCODER:-}" ] && [ "$command" = train ]; then set -- "$@" --pretrained-encoder "$ENCODER"; fi
    read -ra more <<< "${OPTIONS:-}"
    step aam "$command" "$@" ${more[@]+"${more[@]}"}
}

pretrain() {
    : "${TABLE:?BIOM table}" "${OUT:?output folder}"
    prepare
    aam_step pretrain fsdp
}

train() {
    : "${TABLE:?BIOM table}" "${METADATA:?metadata file}" "${COLUMN:?metadata column}" "${OUT:?output folder}"
    prepare
    aam_step train distributed --metadata-column "$COLUMN"
}
