#!/usr/bin/env bash
# What counting costs: the same copies with the counters compiled in and compiled out, in turn.
# `ci/bench-counters.sh [ROUNDS [OPTION...]]`; options go to `p2plab run nvme-cmb-copy`.
# Prints medians in MB/s and their ratios. It fails for no figure: one loaded host, one different figure.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-7}
shift || true
case $rounds in
'' | *[!0-9]* | 0)
    echo "ci/bench-counters.sh: '$rounds' is no number of rounds; use for instance: ci/bench-counters.sh 7 --size 512MiB" >&2
    exit 2
    ;;
esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# $1: name of the binary, the rest: features.
build() {
    local name=$1
    shift
    local binary
    binary=$(cargo build --release --locked -p p2plab --bin p2plab "$@" --message-format json |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    cp "$binary" "$folder/$name"
}

# Throughput of mode $2 in the report $1.
rate() {
    awk -v mode="\"$2\":" '$1 == mode { inside = 1 } inside && $1 == "\"bytes_per_second\":" {
        sub(",", "", $2); print $2 / 1e6; exit }' "$1"
}

median() {
    sort -g "$1" | awk '{ v[NR] = $1 } END {
        print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2, v[1], v[NR] }'
}

# The usual binary last: it is what stays behind in the target directory.
build out --no-default-features
build in
for ((round = 1; round <= rounds; round++)); do
    # Who goes first changes, so that neither always runs on a warmer host.
    order=(in out)
    ((round % 2)) || order=(out in)
    for counters in "${order[@]}"; do
        "$folder/$counters" run nvme-cmb-copy --json "$folder/report" "$@" >/dev/null 2>"$folder/log" || {
            cat "$folder/log" >&2
            exit 1
        }
        for mode in classic p2p; do
            rate "$folder/report" "$mode" >>"$folder/$mode.$counters"
        done
    done
    echo "round $round of $rounds" >&2
done

echo "nvme-cmb-copy $*, $rounds rounds, counters in and out in turn; medians, MB/s"
printf '%-8s %26s %26s %8s\n' mode 'counters in (min-max)' 'counters out (min-max)' cost
for mode in classic p2p; do
    read -r in in_low in_high <<<"$(median "$folder/$mode.in")"
    read -r out out_low out_high <<<"$(median "$folder/$mode.out")"
    awk -v mode="$mode" -v a="$in" -v al="$in_low" -v ah="$in_high" -v b="$out" -v bl="$out_low" -v bh="$out_high" \
        'BEGIN { printf "%-8s %26s %26s %7.1f%%\n", mode, sprintf("%.0f (%.0f-%.0f)", a, al, ah),
            sprintf("%.0f (%.0f-%.0f)", b, bl, bh), (1 - a / b) * 100 }'
done
