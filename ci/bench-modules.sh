#!/usr/bin/env bash
# How long a kernel module takes to build with what is in the cache: all of it, after a change of one file, and unchanged.
# `ci/bench-modules.sh [ROUNDS [MODULE...]]`; all modules of guest-kernel/ by default, or of P2PLAB_GUEST_KERNEL.
# Prints medians in seconds of whole commands `p2plab modules MODULE`, beside what is wanted. It changes a copy of the
# sources and builds beside the cache, which it leaves as it was but for what was missing. It fails for no figure: one
# loaded host, one different figure.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-3}
shift || true
case $rounds in
'' | *[!0-9]* | 0)
    echo "ci/bench-modules.sh: '$rounds' is no number of rounds; use for instance: ci/bench-modules.sh 3 p2pmem" >&2
    exit 2
    ;;
esac
sources=${P2PLAB_GUEST_KERNEL:-guest-kernel}
modules=("$@")
if [ $# -eq 0 ]; then
    for path in "$sources"/*/Kbuild "$sources"/patches/*/build.toml; do
        path=${path%/*}
        modules+=("${path##*/}")
    done
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

binary=$(cargo build --release --locked -p p2plab --bin p2plab --message-format json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
# The user's cache has, after this, all that a build needs.
"$binary" modules "${modules[@]}" >/dev/null
fetched=${P2PLAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/p2plab}/artifacts

# Sources and a cache in which nothing was built, in $work.
begin() {
    mkdir -p "$work/cache/artifacts"
    cp -r "$sources" "$work/guest-kernel"
    for path in "$fetched"/*; do
        case ${path##*/} in module-*) ;; *) ln -s "$path" "$work/cache/artifacts/" ;; esac
    done
}

# Changes one file of module $1: its longest, or the last patch.
change() {
    local own=$work/guest-kernel/$1 patches=$work/guest-kernel/patches/$1 file
    if [ -d "$own" ]; then
        # shellcheck disable=SC2012 # names of ours
        file=$(ls -S "$own"/*.c | head -n 1)
        echo "/* round $round */" >>"$file"
    else
        file=$(printf '%s\n' "$patches"/*.patch | tail -n 1)
        sed -i "0,/^+.*;\$/s|^+.*;\$|& /* round $round */|" "$file"
    fi
}

# Runs `p2plab modules $1`, which must say $2 of each module, and adds its seconds to the samples of $3.
timed() {
    local begin=$EPOCHREALTIME end
    P2PLAB_CACHE=$work/cache P2PLAB_GUEST_KERNEL=$work/guest-kernel \
        "$binary" modules "$1" >"$folder/said" 2>"$folder/log" || {
        cat "$folder/log" >&2
        exit 1
    }
    end=$EPOCHREALTIME
    if sed 1d "$folder/said" | grep -v "$2"; then
        echo "ci/bench-modules.sh: of each module p2plab should have said '$2'" >&2
        exit 1
    fi
    awk -v a="$begin" -v b="$end" 'BEGIN { print b - a }' >>"$folder/$1.$3"
}

median() {
    sort -g "$1" | awk '{ v[NR] = $1 } END {
        print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2, v[1], v[NR] }'
}

touched=0
for ((round = 1; round <= rounds; round++)); do
    work=$folder/$round
    begin
    for module in "${modules[@]}"; do
        timed "$module" 'built in' first
        change "$module"
        timed "$module" 'built in' changed
        touch "$folder/since"
        timed "$module" unchanged unchanged
        touched=$((touched + $(find "$work/cache" -type f -newer "$folder/since" | wc -l)))
    done
    rm -rf "$work"
    echo "round $round of $rounds" >&2
done

echo "p2plab modules MODULE, $rounds rounds; medians, seconds"
printf '%-16s %22s %22s %22s\n' module 'all of it (min-max)' 'one file (min-max)' 'unchanged (min-max)'
slowest=0
for module in "${modules[@]}"; do
    printf '%-16s' "$module"
    for what in first changed unchanged; do
        read -r middle low high <<<"$(median "$folder/$module.$what")"
        awk -v m="$middle" -v l="$low" -v h="$high" 'BEGIN { printf " %22s", sprintf("%.3f (%.3f-%.3f)", m, l, h) }'
        [ "$what" != changed ] || slowest=$(awk -v a="$slowest" -v b="$middle" 'BEGIN { print (a > b ? a : b) }')
    done
    echo
done
awk -v t="$slowest" -v n="$touched" 'BEGIN {
    printf "\na changed source: under 20 s: %.2f, %s\n", t, t < 20 ? "met" : "MISSED"
    printf "unchanged: nothing is done: %d files written, %s\n", n, n ? "MISSED" : "met" }'
