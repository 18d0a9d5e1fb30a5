# The build itself: free of warnings with gcc and with clang, right without kernels/, and nothing rebuilt without need.

jobs=-j$(getconf _NPROCESSORS_ONLN)

# tree NAME: a copy of the sources in $scratch/NAME.
tree() {
    mkdir -p "$scratch/$1"
    cp -r Makefile r1.c tokenizer.c tokenizer.h convert demo "$scratch/$1"
    [ ! -d kernels ] || cp -r kernels "$scratch/$1"
}

# one_golden PROGRAM-FOLDER NAME WHAT: an oracle through the programs in that folder.
one_golden() {
    local name=$2 file=$scratch/$1.$2.r1
    if ! "$scratch/$1/r1-convert" "$oracles/$name" "$file" --type source >"$scratch/said" 2>&1 </dev/null; then
        fail "$3" "$(brief "$scratch/said")"
    elif ! "$scratch/$1/r1" logits "$file" --ids "$(prompt "$name")" --greedy 48 --logits "$(logit_positions "$name")" --argmax \
        --experts "$(expert_positions "$name")" --kv f32 >"$scratch/logits" 2>"$scratch/error" </dev/null; then
        fail "$3" "$(brief "$scratch/error")"
    elif result=$("$build/tests/compare_golden" "$oracles/$name/golden.txt" "$scratch/logits"); then
        ok "$3 ($result)"
    else
        fail "$3" "$result"
    fi
}

# warnings COMPILER: builds a copy with warnings as errors.
warnings() {
    tree "$1"
    passes "$1 -Werror" make -C "$scratch/$1" "$jobs" CC="$1" CFLAGS="-O2 -Werror"
    one_golden "$1" r1_fp8 "what $1 built"
}

if command -v gcc >/dev/null; then warnings gcc; else skip "gcc -Werror" "gcc is not installed"; fi
if command -v clang >/dev/null; then warnings clang; else skip "clang -Werror" "clang is not installed"; fi

tree bare
rm -rf "$scratch/bare/kernels"
passes "without kernels/" make -C "$scratch/bare" "$jobs" CFLAGS="-O2 -Werror"
one_golden bare r1_fp8 "what was built without kernels/"

# Up to date after the build; a changed header means work for both programs.
built=$scratch/bare
passes "nothing to do after a build" make -q -C "$built"
if [ -x "$built/r1" ]; then
    for file in convert/format.h tokenizer.h demo/config.json; do
        sleep 0.1                         # beyond the resolution of the files' times
        touch "$built/$file"
        if make -q -C "$built" >/dev/null 2>&1; then fail "a changed $file rebuilds" "make says that nothing is to do"; else ok "a changed $file rebuilds"; fi
        make -C "$built" "$jobs" -t >/dev/null 2>&1
    done
    passes "make install" make -C "$built" install DESTDIR="$scratch/root" PREFIX=/usr
    passes "the installed r1 has its model inside" env -C / "$scratch/root/usr/bin/r1" run demo --temperature 0 -n 5 hello
fi

# A header that is not there: make names the package and the command. The compiler cannot find anything in an empty system root.
make -C "$built" -B build/packages CPPFLAGS="-nostdinc" >"$scratch/said" 2>&1
status=$?
if [ $status != 0 ] && grep -q 'missing: .*jansson' "$scratch/said" && grep -qE 'Install them with: .*install' "$scratch/said"; then ok "a missing header is named"
else fail "a missing header is named" "status $status: $(brief "$scratch/said")"; fi
passes "make help" make help
