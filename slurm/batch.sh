# shellcheck shell=bash
# What every batch script of headfold does after its header: sourced by it, then `run_stage`. `slurm/submit` copies this file
# into the run folder, so that waiting jobs do not change when the repository does.
#
# Set by the script before:
#   HEADFOLD_CONFIG        the pipeline's INI file
#   HEADFOLD_STAGE         calibrate, convert, finetune, evaluate or report; the element is the array task, else 0
#   HEADFOLD_FOLDER        the run's folder (default: `folder` of the INI's [run])
#   HEADFOLD_SITE          site.env, where there is one
#   HEADFOLD_MAX_REQUEUES  times that a stage that stopped with everything saved (75) goes back into the queue (20)
#   HEADFOLD_MAX_RETRIES   times in a row that a stage that failed, but not for its options (64) or data (65), does (2)
# Settings of the site: site.env.example.
set -euo pipefail

batch_say() {
  printf '%s %s\n' "$(date '+%F %T')" "$*" || true  # a full disk must not end the script here
}

batch_refuse() {
  printf 'headfold batch script: %s\n' "$1" >&2 || true
  exit "${2:-64}"
}

[[ -n ${SLURM_JOB_ID:-} ]] || batch_refuse "there is no SLURM_JOB_ID: submit this script with sbatch instead of running it"

# The repository, where this file lies in one; known before anything changes the folder.
batch_repository=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Modules and the like are not written for unset variables and failing commands.
if [[ -n ${HEADFOLD_SITE:-} ]]; then
  [[ -r $HEADFOLD_SITE ]] || batch_refuse "cannot read HEADFOLD_SITE=$HEADFOLD_SITE"
  set +eu
  # shellcheck source=/dev/null
  source "$HEADFOLD_SITE"
  set -eu
fi

# The program, inside the site's container if it has one. Sets `program` and, for pyxis, `container_options` of srun.
# As slurm/submit finds it: what the repository has built, else the one of PATH; an image has only the latter.
batch_program() {
  local built=$batch_repository/build/release/jobs/headfold
  [[ ${HEADFOLD_CONTAINER:-none} == none && -x $built ]] || built=headfold
  program=("${HEADFOLD:-$built}")
  container_options=()
  local flags=()
  read -r -a flags <<<"${HEADFOLD_CONTAINER_FLAGS:-}"
  case "${HEADFOLD_CONTAINER:-none}" in
    none) ;;
    apptainer)
      program=("${HEADFOLD_APPTAINER:-apptainer}" exec --bind "${HEADFOLD_MOUNTS:-$PWD}" ${flags[@]+"${flags[@]}"}
        "${HEADFOLD_IMAGE:?site.env names no HEADFOLD_IMAGE}" "${program[@]}")
      ;;
    pyxis)
      container_options=("--container-image=${HEADFOLD_IMAGE:?site.env names no HEADFOLD_IMAGE}"
        "--container-mounts=${HEADFOLD_MOUNTS:-$PWD:$PWD}" "--container-workdir=$PWD" ${flags[@]+"${flags[@]}"})
      ;;
    *) batch_refuse "HEADFOLD_CONTAINER is none, apptainer or pyxis, not '$HEADFOLD_CONTAINER'" ;;
  esac
}

# Runs on every node before the stage does; names the node and what is wrong with it. One task, no MPI.
batch_check_node() {
  local node=${SLURMD_NODENAME:-$(hostname)} bad=0 free message gpus
  complain() {
    printf 'node %s: %s\n' "$node" "$1" >&2
    bad=1
  }
  # headfold refuses to be one of several tasks without PMI; here it only says its version.
  message=$(env -u SLURM_PROCID -u SLURM_STEP_NUM_TASKS "$@" --version 2>&1) || complain "headfold does not start: $message"
  if [[ $(cat "$HEADFOLD_TOKEN" 2>&1) != "$SLURM_JOB_ID" ]]; then
    complain "$HEADFOLD_FOLDER is not the folder that the other nodes see (is it on a shared file system?)"
  elif ! message=$( (: >"$HEADFOLD_TOKEN-$node") 2>&1); then
    complain "cannot write into $HEADFOLD_FOLDER: $message"
  fi
  rm -f "$HEADFOLD_TOKEN-$node"
  free=$(df -Pk "$HEADFOLD_FOLDER" | awk 'NR == 2 {print int($4 / 1048576)}') || free=0
  ((free >= ${HEADFOLD_MIN_FREE_GB:-1})) || complain "$free GiB are free in $HEADFOLD_FOLDER, HEADFOLD_MIN_FREE_GB is ${HEADFOLD_MIN_FREE_GB:-1}"
  if [[ ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    [[ ${gpus:-0} -ge $SLURM_GPUS_ON_NODE ]] || complain "${gpus:-0} GPUs answer, $SLURM_GPUS_ON_NODE were asked for"
  fi
  if [[ -n ${HEADFOLD_NODE_CHECK:-} ]]; then
    message=$(bash -c "$HEADFOLD_NODE_CHECK" 2>&1) || complain "HEADFOLD_NODE_CHECK failed: $message"
  fi
  return "$bad"
}

batch_check_nodes() {
  local code=0
  export HEADFOLD_TOKEN=$HEADFOLD_FOLDER/slurm/.token-$SLURM_JOB_ID
  if ! echo "$SLURM_JOB_ID" >"$HEADFOLD_TOKEN"; then
    batch_say "cannot write into $HEADFOLD_FOLDER/slurm: is the disk full?"
    rm -f "$HEADFOLD_TOKEN"
    return 74
  fi
  srun --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    ${container_options[@]+"${container_options[@]}"} \
    bash -c "$(declare -f batch_check_node); batch_check_node \"\$@\"" headfold-check "${program[@]}" || code=$?
  rm -f "$HEADFOLD_TOKEN"
  return "$code"
}

# The `folder` of [run], by the rules of headfold's own reader (a test compares the two): a comment begins with # or ; at the start of a line or after
# a blank, outside of double quotes; blanks, tabs and carriage returns around everything go; names of sections may have blanks around them.
batch_folder() {
  local folder
  folder=$(LC_ALL=C awk '
    function trimmed(text) {
      gsub(/^[ \t\r]+|[ \t\r]+$/, "", text)
      return text
    }
    {
      line = $0
      quoted = 0
      before = " "
      for (i = 1; i <= length(line); ++i) {
        character = substr(line, i, 1)
        if (character == "\"") quoted = !quoted
        if (!quoted && (character == "#" || character == ";") && (before == " " || before == "\t")) {
          line = substr(line, 1, i - 1)
          break
        }
        before = character
      }
      line = trimmed(line)
      equals = index(line, "=")
      if (substr(line, 1, 1) == "[") {
        inside = trimmed(substr(line, 2, length(line) - 2)) == "run"
      } else if (inside && equals && trimmed(substr(line, 1, equals - 1)) == "folder") {
        print trimmed(substr(line, equals + 1))
        exit
      }
    }' "$1")
  [[ -n $folder ]] || batch_refuse "$1 has no folder in [run]" 65
  [[ $folder == /* ]] || folder=$(cd "$(dirname "$1")" && pwd)/$folder
  printf '%s\n' "$folder"
}

# Is this job still one that may go back into the queue? After scancel, at its time limit or while Slurm requeues it by itself it is not.
batch_still_running() {
  scontrol show job --oneliner "$job" | grep -q ' JobState=RUNNING '
}

# batch_requeue REASON: does not return when the job goes back into the queue.
batch_requeue() {
  local restarts=${SLURM_RESTART_COUNT:-0} limit=${HEADFOLD_MAX_REQUEUES:-20}
  if [[ -e $HEADFOLD_FOLDER/STOP ]]; then
    batch_say "$1; $HEADFOLD_FOLDER/STOP exists, so it is not requeued: remove the file and submit again"
  elif ! batch_still_running; then
    batch_say "$1; Slurm is ending this job itself"
  elif ((restarts >= limit)); then
    batch_say "$1; requeued $restarts times already, which is the limit (max-requeues)"
  else
    batch_say "$1; back into the queue ($((restarts + 1)) of at most $limit)"
    if scontrol requeue "$job"; then
      # Slurm ends this script now; the next start goes on where this one stopped.
      exit 75
    fi
    batch_say "scontrol requeue failed: submit again by hand"
  fi
}

run_stage() {
  local stage=${HEADFOLD_STAGE:?} config=${HEADFOLD_CONFIG:?} element=${SLURM_ARRAY_TASK_ID:-0}
  # The number of an array's last task is that of the whole array, so a task is named by both.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$element}
  job=${job:-$SLURM_JOB_ID}
  local command options=() code=0 failures=0 failures_file retries=${HEADFOLD_MAX_RETRIES:-2}
  [[ -r $config ]] || batch_refuse "cannot read $config" 65
  if [[ -z ${HEADFOLD_FOLDER:-} ]]; then HEADFOLD_FOLDER=$(batch_folder "$config"); fi
  export HEADFOLD_FOLDER
  mkdir -p "$HEADFOLD_FOLDER/slurm"
  failures_file=$HEADFOLD_FOLDER/slurm/.failures-$stage-$element
  # Slurm's SIGTERM is for the ranks, which save and stop; this script waits for them.
  local asked=false
  trap 'asked=true; batch_say "SIGTERM"' TERM

  batch_program
  batch_say "stage $stage, element $element; job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)); nodes ${SLURM_JOB_NODELIST:-?}"
  if [[ -e $HEADFOLD_FOLDER/STOP ]]; then
    batch_say "$HEADFOLD_FOLDER/STOP exists: nothing is done"
    exit 75
  fi
  # headfold itself says whether this flag still holds, and ends at once if so.
  if [[ ! -e $HEADFOLD_FOLDER/finished/$stage-$element ]]; then
    local mpi_types
    mpi_types=$(srun --mpi=list 2>&1) || true
    grep -qw "${HEADFOLD_MPI:-pmix}" <<<"$mpi_types" ||
      batch_refuse "this Slurm has no --mpi=${HEADFOLD_MPI:-pmix}; 'srun --mpi=list' says: $mpi_types (HEADFOLD_MPI in site.env)"
    batch_check_nodes || code=$?
    case "$code" in
      0) ;;
      138 | 143) batch_say "the check of the nodes was interrupted" ;;
      *) batch_say "the nodes are not fit for the job, for the reasons above" ;;
    esac
  fi

  if ((code == 0)); then
    # srun does not take this one over from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    read -r -a options <<<"${HEADFOLD_SRUN_OPTIONS:-}"
    command=(srun "--mpi=${HEADFOLD_MPI:-pmix}" --kill-on-bad-exit=1 --wait=60 ${options[@]+"${options[@]}"}
      ${container_options[@]+"${container_options[@]}"} "${program[@]}" run --config "$config" --stage "$stage" --element "$element")
    batch_say "${command[*]}"
    "${command[@]}" || code=$?
    batch_say "exit code $code"
    # srun also says 0 when it could not launch a step.
    if ((code == 0)) && [[ ! -e $HEADFOLD_FOLDER/finished/$stage-$element ]]; then
      batch_say "but $HEADFOLD_FOLDER/finished/$stage-$element is not there"
      code=1
    fi
  fi

  case "$code" in
    0)
      rm -f "$failures_file"
      exit 0
      ;;
    75)
      rm -f "$failures_file"
      batch_requeue "stopped with everything saved"
      ;;
    # SIGUSR1 came before headfold listened to it.
    138) batch_requeue "stopped before it had begun" ;;
    64 | 65) ;;
    *)
      # Of SIGTERM before headfold listens, only this script knows whether somebody asked for it: srun sends it to the others when a rank dies.
      if ((code == 143)) && $asked; then
        batch_requeue "stopped before it had begun"
      elif ! batch_still_running; then
        batch_say "Slurm is ending this job"
      else
        failures=$(cat "$failures_file" 2>/dev/null) || failures=0
        failures=$((${failures:-0} + 1))
        # Where failures cannot be counted, every start is taken for one.
        if ((failures <= retries)) && ! echo "$failures" 2>/dev/null >"$failures_file"; then
          failures=$((${SLURM_RESTART_COUNT:-0} + 1))
          batch_say "cannot count failures in $failures_file: is the disk full?"
        fi
        if ((failures > retries)); then
          rm -f "$failures_file"
          batch_say "failed $failures times in a row: given up (max-retries is $retries)"
        else
          batch_requeue "failed $failures times in a row"
        fi
      fi
      ;;
  esac
  exit "$code"
}
