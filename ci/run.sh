#!/usr/bin/env bash
# The pipeline: what CI runs, anywhere. Format, lints, documentation, tests (VM scenarios among them).
# `ci/run.sh STEP...` runs only those steps: format clippy docs test.
# Long runs are no part of it: `ci/durability.sh` kills a process that writes hundreds of times, `ci/fuzz.sh` fuzzes the
# NVMe controller, `ci/p2pmem-stress.sh` pulls devices out under users of their memory a thousand times.
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '== %s: %d s\n' "$name" $((SECONDS - start))
}

need() {
    cargo "$1" --version >/dev/null 2>&1 || {
        echo "ci/run.sh: cargo $1 is missing; install it with: rustup component add $2" >&2
        exit 2
    }
}

run() {
    case $1 in
    format)
        need fmt rustfmt
        step format cargo fmt --all --check
        step format cargo fmt --manifest-path devices/nvme/fuzz/Cargo.toml --check
        ;;
    clippy)
        need clippy clippy
        step clippy cargo clippy --locked --workspace --all-targets -- -D warnings
        ;;
    docs) RUSTDOCFLAGS='-D warnings' step docs cargo doc --locked --workspace --no-deps --quiet ;;
    # The README's test command.
    test) step test cargo test ;;
    *)
        echo "ci/run.sh: there is no step '$1'; the steps are: format clippy docs test" >&2
        exit 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- format clippy docs test
for name; do run "$name"; done
