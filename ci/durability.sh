#!/usr/bin/env bash
# Nothing acknowledged is lost, at length: kills a process with an SSD and a PMR in files while it writes, again and
# again, and looks after each kill for all that was acknowledged; then the same of an NVRAM card, and what has arrived in
# it. `cargo test` does both with a few kills. `ci/durability.sh [KILLS [SEED]]`; 200 kills of each by default. Prints
# summaries, or fails; the SSD's with the seed and the kill.
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-200}
case $kills in
'' | *[!0-9]* | 0)
    echo "ci/durability.sh: '$kills' is no number of kills; use for instance: ci/durability.sh 1000" >&2
    exit 2
    ;;
esac
seed=${2-}
case $seed in
*[!0-9]*)
    echo "ci/durability.sh: '$seed' is no seed; use for instance: ci/durability.sh 200 382097" >&2
    exit 2
    ;;
esac

export P2PLAB_KILLS=$kills
[ -z "$seed" ] || export P2PLAB_SEED=$seed
cargo test --locked --quiet -p p2plab-nvme --test durability -- --exact nothing_acknowledged_is_lost --nocapture
exec cargo test --locked --quiet -p p2plab-nvram --test durability -- --exact \
    what_has_arrived_outlives_a_killed_process --nocapture
