#!/usr/bin/env bash
# usage: check_demo_tasks.sh FOLDER: the demo's benchmark files are what their script makes, byte for byte.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: there is no python3"; exit 77; }
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
python3 "$1/make_tasks.py" --out "$made"
for file in glosses.jsonl endings.jsonl; do cmp "$1/$file" "$made/$file"; done
