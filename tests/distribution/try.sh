#!/bin/bash
# try.sh BIN: README's first commands with the programs of BIN, in a folder that holds nothing.
set -euo pipefail
export PATH="$1:$PATH" HF_HUB_OFFLINE=1
unset PYTHONPATH
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
say() { printf '\n$ %s\n' "$*" >&2; "$@"; }
say shoal --version
say shoal inspect smollm2 | tail -n 4
say shoal prune smollm2 --method shortgpt --drop 6 --limit 4 --no-assess --output out -q | tail -n 3
say shoal verify out | tail -n 1
say shoal doctor out | head -n 2
say shoal generate out "Why is the sky blue?" --max-new-tokens 8 | tail -n 2
say shoal push out someone/smollm2-24 --dry-run | tail -n 12
say python -c 'import shoal, pathlib; print("shoal of", pathlib.Path(shoal.__file__).parents[2].name, "with", len(shoal.__all__), "names")'
say shoal --help > /dev/null
echo "the wheel does what README says"
