# Every parser under libFuzzer for a few seconds each; `make fuzz SECONDS=600` takes longer. The targets are in tests/fuzz.

# fuzz NAME: builds a target, runs it, and tells the result. What it found interesting is kept in build/corpus for the next run;
# a finding in build/findings.
fuzz() {
    local name=$1 said=$scratch/fuzz.$1 runs
    if ! make --no-print-directory "build/fuzz/$name" >"$said" 2>&1; then
        fail "$name" "it does not build: $(reason "$said")"
        return
    fi
    mkdir -p "build/corpus/$name" build/findings
    "build/fuzz/$name" -max_total_time="$fuzz_seconds" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 -max_len=65536 \
        -artifact_prefix="build/findings/$name-" "build/corpus/$name" "$scratch/seeds/$name" >"$said" 2>&1 </dev/null
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$said")
    if grep -qE 'ERROR|SUMMARY|runtime error' "$said" || [ -z "$runs" ]; then
        fail "$name" "$(grep -E 'ERROR|SUMMARY|runtime error|Test unit written' "$said" | head -n 4 | tr '\n' '|')"
    else
        ok "$name: nothing found in $runs inputs"
    fi
}

if ! command -v clang >/dev/null; then
    skip "all targets" "clang is not installed"
elif ! echo 'int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d && n > 99; }' |
    clang -x c - -fsanitize=fuzzer,address -o "$scratch/fuzzer" 2>/dev/null; then
    skip "all targets" "this clang has no libFuzzer"
elif ! make --no-print-directory build/fuzz/tokenizer.o >"$scratch/said" 2>&1; then
    fail "all targets" "they do not build: $(reason "$scratch/said")"
elif ! tests/fuzz/seeds.sh "$scratch/seeds" >"$scratch/said" 2>&1; then
    fail "all targets" "no seeds: $(brief "$scratch/said")"
else
    # Two at a time; the model's, first, takes as long to build as the others to run.
    for target in tests/fuzz/*.c; do
        fuzz "$(basename "$target" .c)" &
        [ "$(jobs -rp | wc -l)" -ge 2 ] && wait -n
    done
    wait
fi
