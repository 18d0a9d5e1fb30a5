#!/usr/bin/env bash
# Runs the tests: `tests/run.sh [-v] [--build DIR] [--quick] [--fuzz-seconds N] [GROUP...]`, after `make all test-programs`.
#
# A group is a file of tests/groups. It prints a line a check: "ok   GROUP: what", "FAIL GROUP: what: why" or "skip GROUP:
# what: why". On a terminal the ok lines are only counted; -v shows them. The last line of all is "N passed, N failed". Nothing is
# downloaded, nothing is written outside a scratch folder and build/. --build tests another build: DIR/r1, DIR/r1-convert,
# DIR/tests/*. --quick leaves out repetitions, for a slow build.
set -u
cd "$(dirname "$0")/.." || exit 1

ALL_GROUPS="unit tokenizer golden demo determinism convert file cli build neon sanitize fuzz"

build=build
fuzz_seconds=6
quick=
count_only=
[ -t 1 ] && count_only=1
selected=()
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2; shift ;;
    --quick) quick=1 ;;
    -v) count_only= ;;
    --fuzz-seconds) fuzz_seconds=$2; shift ;;
    *) selected+=("$1") ;;
    esac
    shift
done
if [ ${#selected[@]} = 0 ]; then
    # A build that is itself a test is not asked to build more.
    if [ "$build" = build ]; then read -ra selected <<<"$ALL_GROUPS"
    else read -ra selected <<<"${ALL_GROUPS/ build neon sanitize fuzz/}"; fi
fi
for group in "${selected[@]}"; do
    [ -f "tests/groups/$group.sh" ] || { echo "no such group: $group (tests/groups has: $(cd tests/groups && echo *.sh | sed 's/\.sh//g'))" >&2; exit 2; }
done

scratch=$(mktemp -d) || exit 1
trap 'chmod -R u+w "$scratch" 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
export build fuzz_seconds quick scratch
# A make of our own must not think that it is part of the one that started us.
unset MAKEFLAGS MAKELEVEL MFLAGS
started=$SECONDS

# report LINE: keeps a result and shows it at once; on a terminal the ok ones as a count that overwrites itself.
report() {
    printf '%s\n' "$1" >>"$scratch/results"
    if [ -n "$count_only" ] && [[ $1 = ok\ * ]]; then
        ok_count=$((ok_count + 1))
        printf '\r  %d ok ' $ok_count
        return
    fi
    # Every other line is longer than the count that it overwrites.
    if [ -n "$count_only" ]; then printf '\r'; fi
    printf '%s\n' "$1"
}

: >"$scratch/results"
for group in "${selected[@]}"; do
    at=$SECONDS ok_count=0 last=
    echo "---- $group ..."
    while IFS= read -r line; do
        last=$line
        [ "$line" = "done $group" ] || report "$line"
    done < <(group=$group bash -c '. tests/lib.sh; . "tests/groups/$group.sh"; echo "done $group"' </dev/null 2>"$scratch/errors")
    # A group that ends early, or that prints something which is no result, has failed.
    [ "$last" = "done $group" ] || report "FAIL $group: the group did not run to its end"
    if [ -s "$scratch/errors" ]; then
        report "FAIL $group: unexpected messages: $(head -n 5 "$scratch/errors" | tr '\n' '|')"
    fi
    if [ -n "$count_only" ]; then printf '\r'; fi
    printf -- "---- %s: %d s%s\n" "$group" $((SECONDS - at)) "${count_only:+, $ok_count ok}"
done

passed=$(grep -c '^ok ' "$scratch/results")
failed=$(grep -c '^FAIL ' "$scratch/results")
skipped=$(grep -c '^skip ' "$scratch/results")
if [ "$failed" != 0 ] || [ "$skipped" != 0 ]; then
    echo "---- what failed or was skipped:"
    grep -E '^(FAIL|skip) ' "$scratch/results"
fi
printf -- "---- %d s\n" $((SECONDS - started))
if [ "$skipped" = 0 ]; then echo "$passed passed, $failed failed"
else echo "$passed passed, $failed failed, $skipped skipped"; fi
[ "$failed" = 0 ] && [ "$passed" != 0 ]
