#!/usr/bin/env bash
# usage: check_options.sh PROGRAM USER_GUIDE: every option in a job's --help is in its table of the user guide, and the reverse.
set -euo pipefail
program=$1 guide=$2 failed=0
common=$(awk '/^Options of every job/{on=1} /^### /{on=0} on' "$guide" | grep -oE '^\| `--[a-z-]+`' | grep -oE '[-]-[a-z-]+' | sort -u)
jobs=$("$program" --help | awk '/^jobs:/{on=1;next} /^$/{on=0} on{print $1}')
[[ -n $jobs ]] || { echo "no jobs found in --help"; exit 1; }
for job in $jobs; do
  helped=$("$program" "$job" --help | grep -oE '^ +(-h \[ )?--[a-z-]+' | grep -oE '[-]-[a-z-]+' | sort -u)
  written=$({ awk -v job="### $job" '$0 == job {on=1; next} /^##/{on=0} on' "$guide" | grep -oE '^\| `--[a-z-]+`' | grep -oE '[-]-[a-z-]+'; echo "$common"; } | sort -u)
  if ! delta=$(diff <(echo "$helped") <(echo "$written")); then
    echo "job $job: < only in --help, > only in $guide"
    echo "$delta"
    failed=1
  fi
done
exit $failed
