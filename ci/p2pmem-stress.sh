#!/usr/bin/env bash
# Peer memory comes and goes, at length: binds, maps, copies, exports, and takes the device away in the middle of it,
# again and again in one guest, and holds that no page of its memory is lost and that the kernel has not complained.
# `cargo test` does the same with 20 rounds. `ci/p2pmem-stress.sh [ROUNDS]`; 1000 by default, about a second each.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-1000}
case $rounds in
'' | *[!0-9]* | 0)
    echo "ci/p2pmem-stress.sh: '$rounds' is no number of rounds; use for instance: ci/p2pmem-stress.sh 2000" >&2
    exit 2
    ;;
esac

export P2PLAB_P2PMEM_ROUNDS=$rounds
exec cargo test --locked --quiet -p p2plab-tests --test scenarios -- \
    --exact p2pmem_removal::comes_and_goes_under_load --nocapture
