# The programs built with the address and undefined-behaviour sanitizers, on the groups that show most in little time;
# `make asan` runs all groups so.
if ! echo 'int main(void) { return 0; }' | ${CC:-cc} -x c - -fsanitize=address,undefined -o "$scratch/sanitized" 2>/dev/null; then
    skip "all groups" "this compiler has no sanitizers"
elif ! make --no-print-directory -j"$(getconf _NPROCESSORS_ONLN)" asan-programs >"$scratch/said" 2>&1; then
    fail "build" "$(reason "$scratch/said")"
else
    tests/run.sh --build build/asan --quick unit golden file convert cli >"$scratch/sanitized.txt" 2>&1
    grep -E '^(ok|FAIL|skip) ' "$scratch/sanitized.txt" | awk '!seen[$0]++' | sed 's/^\(ok  \|FAIL\|skip\) /\1 sanitize: /'
    tail -n 1 "$scratch/sanitized.txt" | grep -q ' passed, ' || fail "all groups" "they did not run to their end: $(tail -n 3 "$scratch/sanitized.txt" | tr '\n' '|')"
fi
