# What the groups of tests share: the programs, results, converted models. Sourced by run.sh; $group, $build and $scratch are set.
set -u

case $build in build) bin=$PWD ;; /*) bin=$build ;; *) bin=$PWD/$build ;; esac
r1=$bin/r1
convert=$bin/r1-convert
oracles=$PWD/tests/oracles
mkdir -p "$scratch/models"

# A sanitizer's finding must not look like an ordinary failure, which is status 1.
export ASAN_OPTIONS=exitcode=77 LSAN_OPTIONS=exitcode=77 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:exitcode=77

# ---- results

ok()   { echo "ok   $group: $1"; }
fail() { echo "FAIL $group: $1: $2"; }
skip() { echo "skip $group: $1: $2"; }

# Joins the lines of a file for a message, and cuts it.
brief() { tr '\n' '|' <"$1" | cut -c1-400; }

# What a failed build or program says about it: its first lines with an error or a warning, else its last ones.
reason() {
    if grep -qE 'error:|warning:|ERROR' "$1"; then grep -E 'error:|warning:|ERROR' "$1" | head -n 3 | tr '\n' '|' | cut -c1-600
    else tail -n 3 "$1" | tr '\n' '|' | cut -c1-600; fi
}

# passes NAME COMMAND...: the command must end with status 0; what it says when it does not is the reason.
passes() {
    local name=$1 status
    shift
    timeout 300 "$@" >"$scratch/said" 2>&1 </dev/null
    status=$?
    if [ $status = 0 ]; then ok "$name"; else fail "$name" "status $status: $(reason "$scratch/said")"; fi
}

# same NAME EXPECTED-FILE GOT-FILE: the files must be the same bytes.
same() {
    if cmp -s "$2" "$3"; then ok "$1"; return; fi
    fail "$1" "expected \"$(head -c 300 "$2" | tr '\n' '|')\", got \"$(head -c 300 "$3" | tr '\n' '|')\" ($(cmp "$2" "$3" 2>&1 | head -n 1 | sed 's/.*\(byte\|EOF\)/\1/'))"
}

# rejects NAME STATUS PATTERN COMMAND...: the command (or a `bash -c` with r1 in it) must end with this status and say exactly one line on standard error,
# "PROGRAM: ...", that the extended regular expression PATTERN is found in; wrong usage (2) may take more lines.
rejects() {
    local name=$1 expected=$2 pattern=$3 status program
    shift 3
    program=$(basename "$1")
    case $program in bash) program=r1 ;; r1-convert*) program=r1-convert ;; esac
    timeout 60 "$@" >"$scratch/said" 2>"$scratch/error" </dev/null
    status=$?
    if [ $status != "$expected" ]; then
        fail "$name" "expected status $expected, got $status: $(brief "$scratch/error")"
    elif [ "$expected" = 1 ] && [ "$(wc -l <"$scratch/error")" != 1 ]; then
        fail "$name" "expected one line on standard error, got: $(brief "$scratch/error")"
    elif ! head -n 1 "$scratch/error" | grep -q "^$program: "; then
        fail "$name" "expected a message that starts with \"$program: \", got: $(brief "$scratch/error")"
    elif ! grep -qiE -- "$pattern" "$scratch/error"; then
        fail "$name" "expected a message with \"$pattern\", got: $(brief "$scratch/error")"
    else
        ok "$name"
    fi
}

# results NAME COMMAND...: the command runs a test program that prints its own lines, "ok NAME: WHAT" or "FAIL NAME: WHAT: WHY", with
# NAME or without; a crash shows in its status. program NAME ARGUMENT...: that for a program of build/tests.
results() {
    local name=$1 said status
    shift
    said=$(mktemp "$scratch/said.XXXXXX")
    timeout 300 "$@" >"$said" 2>&1 </dev/null
    status=$?
    sed -nE "s/^(ok|FAIL|skip) +($name: )?/\\1 /p" "$said" | sed "s/^ok /ok   $group: /; s/^FAIL /FAIL $group: /; s/^skip /skip $group: /"
    if [ $status != 0 ] && ! { [ $status = 1 ] && grep -q '^FAIL ' "$said"; }; then
        fail "$name" "the program ended with status $status: $(grep -vE '^(ok|skip) ' "$said" | head -n 20 | tr '\n' '|')"
    elif ! grep -q '^ok ' "$said"; then
        fail "$name" "the program printed no result"
    fi
    rm "$said"
}
program() { results "$1" "$build/tests/$1" "${@:2}"; }

# ---- models

# model NAME TYPE: prints the path of tests/oracles/NAME (or the demo) converted to TYPE, made once a run.
model() {
    local folder=$oracles/$1 file=$scratch/models/$1.$2.r1
    [ "$1" = demo ] && folder=$PWD/demo
    if [ ! -f "$file" ] && ! "$convert" "$folder" "$file" --type "$2" >"$scratch/convert" 2>&1 </dev/null; then
        fail "convert $1 to $2" "$(brief "$scratch/convert")" >&2
    fi
    echo "$file"
}

# prompt NAME: prints the path of a file with the prompt's ids of an oracle; sequence NAME: with the greedy ones behind them.
prompt() {
    local file=$scratch/$1.ids
    [ -f "$file" ] || awk '$1 == "tokens" { $1 = $2 = ""; print }' "$oracles/$1/golden.txt" >"$file"
    echo "$file"
}
sequence() {
    local file=$scratch/$1.sequence
    [ -f "$file" ] || awk '$1 == "tokens" || $1 == "greedy" { $1 = $2 = ""; print }' "$oracles/$1/golden.txt" >"$file"
    echo "$file"
}

# logit_positions NAME, expert_positions NAME: the positions that a golden has, joined by commas.
logit_positions()  { awk '$1 == "logits"  { print $2 }' "$oracles/$1/golden.txt" | sort -nu | paste -sd, -; }
expert_positions() { awk '$1 == "experts" { print $3 }' "$oracles/$1/golden.txt" | sort -nu | paste -sd, -; }

# The instruction sets that this machine can run: `r1` refuses the others with status 2.
runnable_isas() {
    local isa
    echo 0 >"$scratch/zero.ids"
    for isa in portable avx2 avxvnni avx512 neon; do
        "$r1" logits demo --isa $isa --ids "$scratch/zero.ids" --argmax >/dev/null 2>&1 </dev/null && echo $isa
    done
}
