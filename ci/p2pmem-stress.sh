#!/usr/bin/env bash
# Peer memory comes and goes, at length: in each round it is bound, mapped, copied through, exported and held, its device
# is pulled out in the middle of that (an NVRAM card, an SSD with a CMB, one with a PMR, in turn) and plugged in again, and
# in every other round another device is unbound or removed at the same time. Holds that no page is lost, that the kernel
# has not complained nor grown, and that the counters keep their laws. `cargo test` does the same with 20 rounds.
# `ci/p2pmem-stress.sh [ROUNDS]`; 1000 by default, in one guest, a good second each.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-1000}
if [[ ! $rounds =~ ^[1-9][0-9]{0,6}$ ]]; then
    echo "ci/p2pmem-stress.sh: '$rounds' is no number of rounds; use for instance: ci/p2pmem-stress.sh 2000" >&2
    exit 2
fi

export P2PLAB_P2PMEM_ROUNDS=$rounds
said=$(mktemp)
trap 'rm -f "$said"' EXIT
cargo test --locked --quiet -p p2plab-tests --test scenarios -- \
    --exact p2pmem_stress::comes_and_goes_under_load --nocapture | tee "$said"
# A filter that finds no test is a success to cargo.
if ! grep -Eq "(^| )$rounds rounds in " "$said"; then
    echo "ci/p2pmem-stress.sh: the test has not said that it did $rounds rounds" >&2
    exit 1
fi
