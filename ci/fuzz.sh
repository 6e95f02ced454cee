#!/usr/bin/env bash
# Fuzzes the NVMe controller: `ci/fuzz.sh [SECONDS=600] [TARGET...]`; the targets are commands and registers.
# It fails where one crashes, hangs or breaks a law, and says where the input is and how to repeat it.
#
# The seeds are in devices/nvme/fuzz/seeds/TARGET, what a run finds beyond them in target/fuzz/TARGET, where the next
# run goes on. `ci/fuzz.sh --seeds` makes the seeds anew: half of them random bytes, of which the targets make mostly
# valid accesses and commands, half of them from there.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.13.2
tools=${P2PLAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/p2plab}/cargo-fuzz-$version
fuzz=$PWD/devices/nvme/fuzz
target_dir=${CARGO_TARGET_DIR:-$PWD/target}
host=$(rustc -vV | sed -n 's/^host: //p')
seeds_kept=24 # of each kind

export CARGO_TARGET_DIR=$target_dir
# Freed memory is kept from being used again, but not so much of it that the caches are full of it. Leaks are not
# looked for: threads that end are taken for some.
export ASAN_OPTIONS=detect_odr_violation=0:quarantine_size_mb=4:malloc_context_size=4:detect_leaks=0

# cargo-fuzz, which needs no root and goes into the user's cache; the lints, which ci/run.sh leaves out as the crate
# compiles libFuzzer; the targets.
build() {
    command -v c++ >/dev/null || {
        echo "ci/fuzz.sh: libFuzzer is C++, and there is no c++; install g++" >&2
        exit 2
    }
    [ -x "$tools/bin/cargo-fuzz" ] ||
        cargo install --quiet --locked --root "$tools" --version "$version" cargo-fuzz
    (cd "$fuzz" && cargo clippy --quiet --locked -- -D warnings)
    # AddressSanitizer comes with the toolchain, but the flags for it are not stable.
    RUSTC_BOOTSTRAP=1 "$tools/bin/cargo-fuzz" build --fuzz-dir "$fuzz"
}

fuzzer() {
    local target=$1
    shift
    "$target_dir/$host/release/$target" -detect_leaks=0 -max_len=1024 "$@"
}

# The lines that say how it went, and all of a failure.
run() {
    local target=$1 seconds=$2 found=$target_dir/fuzz/$1 log
    log=$found/log
    mkdir -p "$found/corpus" "$found/crashes"
    printf '\n== %s: %d s\n' "$target" "$seconds"
    if fuzzer "$target" -max_total_time="$seconds" -len_control=20 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$found/crashes/" "$found/corpus" "$fuzz/seeds/$target" >"$log" 2>&1; then
        grep -aE 'DONE|^stat::' "$log"
    else
        grep -avE 'NEW|REDUCE|RELOAD|pulse' "$log" | tail -n 200
        echo "ci/fuzz.sh: $target failed; its output: $log; again with the input that follows 'written to':" \
            "$target_dir/$host/release/$target INPUT" >&2
        return 1
    fi
}

# Of the inputs that together cover what all of the corpus does, the longest ones: they do the most. And random ones.
seeds() {
    local target=$1 found=$target_dir/fuzz/$1 chosen
    chosen=$(mktemp -d)
    mkdir -p "$found/corpus"
    fuzzer "$target" -max_len=512 -set_cover_merge=1 "$chosen" "$found/corpus" "$fuzz/seeds/$target" 2>&1 | tail -n 1
    rm -f "$fuzz/seeds/$target"/*
    find "$chosen" -type f -size -512c -printf '%s %p\n' | sort -rn | head -n "$seeds_kept" | cut -d' ' -f2 |
        xargs -I{} cp {} "$fuzz/seeds/$target/"
    for ((i = 1; i <= seeds_kept; i++)); do
        head -c $((200 + 12 * i)) /dev/urandom >"$fuzz/seeds/$target/random-$i"
    done
    rm -rf "$chosen"
}

case ${1:-} in
--seeds)
    build
    for target in commands registers; do seeds "$target"; done
    exit
    ;;
'' | *[!0-9]*) seconds=600 ;;
*)
    seconds=$1
    shift
    ;;
esac
[ $# -gt 0 ] || set -- commands registers
for target; do
    [ -d "$fuzz/seeds/$target" ] || {
        echo "ci/fuzz.sh: there is no target '$target'; the targets are: commands registers" >&2
        exit 2
    }
done
build
failed=0
for target; do run "$target" "$seconds" || failed=1; done
exit "$failed"
