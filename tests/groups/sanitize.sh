# The programs built with the address and undefined-behaviour sanitizers, on the groups that show most in little time;
# `make asan` runs all groups so.

# sanitized GROUP...: runs these groups on that build, and passes their results on.
sanitized() {
    local line last= ended= summary=
    while IFS= read -r line; do
        last=$line
        case $line in
        "ok "* | "FAIL "* | "skip "*) [ -n "$summary" ] || echo "${line:0:5}sanitize: ${line:5}" ;;
        "---- what failed"*)          summary=1 ;;
        [0-9]*" passed, "*)           ended=1 ;;
        esac
    done < <(tests/run.sh --build build/asan --quick "$@" 2>&1)
    [ -n "$ended" ] || fail "$*" "they did not run to their end: $last"
}

if ! echo 'int main(void) { return 0; }' | ${CC:-cc} -x c - -fsanitize=address,undefined -o "$scratch/sanitized" 2>/dev/null; then
    skip "all groups" "this compiler has no sanitizers"
elif ! make --no-print-directory -j"$(getconf _NPROCESSORS_ONLN)" asan-programs >"$scratch/said" 2>&1; then
    fail "build" "$(reason "$scratch/said")"
else
    # Two runs side by side: hundreds of short commands, and one alone leaves a processor idle for much of the time.
    sanitized unit golden &
    sanitized file convert cli &
    wait
fi
