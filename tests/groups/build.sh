# The build itself: free of warnings with gcc and with clang, right without kernels/, and nothing rebuilt without need.

jobs=-j$(getconf _NPROCESSORS_ONLN)

# tree NAME: a copy of the sources in $scratch/NAME.
tree() {
    mkdir -p "$scratch/$1"
    cp -r Makefile r1.c measure.h tokenizer.c tokenizer.h convert demo "$scratch/$1"
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

# start NAME OPTION...: builds $scratch/NAME in the background; built NAME WHAT tells how that went, and tries what was built.
start() {
    local name=$1
    shift
    { make -C "$scratch/$name" "$jobs" "$@" >"$scratch/$name.said" 2>&1; echo $? >"$scratch/$name.status"; } &
}
built() {
    local status
    status=$(cat "$scratch/$1.status")
    if [ "$status" = 0 ]; then ok "$2"; else fail "$2" "status $status: $(reason "$scratch/$1.said")"; fi
    one_golden "$1" r1_fp8 "$2: what was built"
}

# All at once: each ends with the compilation of r1.c, which keeps one processor. Some warnings come with -O2 only.
compilers=
for compiler in gcc clang; do
    if ! command -v $compiler >/dev/null; then skip "$compiler -Werror" "$compiler is not installed"; continue; fi
    compilers="$compilers $compiler"
    tree $compiler
    start $compiler CC=$compiler CFLAGS="-O2 -Werror"
done
tree bare
rm -rf "$scratch/bare/kernels"
start bare CFLAGS="-O2 -Werror"
wait
for compiler in $compilers; do built $compiler "$compiler -Werror"; done
built bare "without kernels/"

# Up to date after the build; a changed header means work for both programs.
copy=$scratch/bare
passes "nothing to do after a build" make -q -C "$copy"
if [ -x "$copy/r1" ]; then
    for file in convert/format.h convert/shapes.h tokenizer.h demo/config.json; do
        sleep 0.1                         # beyond the resolution of the files' times
        touch "$copy/$file"
        if make -q -C "$copy" >/dev/null 2>&1; then fail "a changed $file rebuilds" "make says that nothing is to do"; else ok "a changed $file rebuilds"; fi
        make -C "$copy" "$jobs" -t >/dev/null 2>&1
    done
    passes "make install" make -C "$copy" install DESTDIR="$scratch/root" PREFIX=/usr
    passes "the installed r1 has its model inside" env -C / "$scratch/root/usr/bin/r1" run demo --temperature 0 -n 5 hello
fi

# A header that is not there: make names the package and the command, and when it went away after it was found, too. The compiler
# cannot find anything in an empty system root.
names_package() { # WHAT MAKE-ARGUMENT...
    local what=$1 status
    shift
    make -C "$copy" CPPFLAGS="-nostdinc" "$@" >"$scratch/said" 2>&1
    status=$?
    if [ $status != 0 ] && grep -q 'missing: .*jansson' "$scratch/said" &&
        grep -v '^make' "$scratch/said" | tail -n 1 | grep -q '^Install them with.*install'; then ok "$what"
    else fail "$what" "status $status: $(brief "$scratch/said")"; fi
}
names_package "a missing header is named" -B build/packages
make -C "$copy" "$jobs" -t >/dev/null 2>&1
rm -f "$copy/build/tokenizer.o"
names_package "a header that went missing later is named" build/tokenizer.o
passes "make help" make help
