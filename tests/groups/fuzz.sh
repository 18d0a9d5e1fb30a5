# Every parser under libFuzzer for a few seconds each; `make fuzz SECONDS=600` takes longer. The targets are in tests/fuzz.

if ! command -v clang >/dev/null; then
    skip "all targets" "clang is not installed"
elif ! echo 'int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d && n > 99; }' |
    clang -x c - -fsanitize=fuzzer,address -o "$scratch/fuzzer" 2>/dev/null; then
    skip "all targets" "this clang has no libFuzzer"
elif ! make --no-print-directory -j"$(getconf _NPROCESSORS_ONLN)" fuzz-programs >"$scratch/said" 2>&1; then
    fail "all targets" "they do not build: $(reason "$scratch/said")"
elif ! tests/fuzz/seeds.sh "$scratch/seeds" >"$scratch/said" 2>&1; then
    fail "all targets" "no seeds: $(brief "$scratch/said")"
else
    # What was found interesting is kept in build/corpus for the next run; a finding in build/findings.
    mkdir -p build/corpus build/findings
    for target in tests/fuzz/*.c; do
        name=$(basename "$target" .c)
        mkdir -p "build/corpus/$name"
        build/fuzz/"$name" -max_total_time="$fuzz_seconds" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix="build/findings/$name-" \
            -max_len=65536 "build/corpus/$name" "$scratch/seeds/$name" >"$scratch/fuzz.$name" 2>&1 </dev/null &
        # Two at a time.
        [ "$(jobs -rp | wc -l)" -ge 2 ] && wait -n
    done
    wait
    for target in tests/fuzz/*.c; do
        name=$(basename "$target" .c)
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$scratch/fuzz.$name")
        if grep -qE 'ERROR|SUMMARY|runtime error' "$scratch/fuzz.$name" || [ -z "$runs" ]; then
            fail "$name" "$(grep -E 'ERROR|SUMMARY|runtime error|Test unit written' "$scratch/fuzz.$name" | head -n 4 | tr '\n' '|')"
        else
            ok "$name: nothing found in $runs inputs"
        fi
    done
fi
