# The kernels for 64-bit ARM where the processor is another: tests/kernels.c built for that target by gcc and by clang and run by qemu
# as processors without dot products, with them, and with matrix products, too. Skipped without a cross compiler or qemu.

qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)

# emulated COMPILER CPU: what it built, on qemu's processor of that name.
emulated() { results kernels "$qemu" -cpu "$2" "build/arm64-$1/arm64/kernels" neon | sed "s/$group: /&$1, $2: /"; }

# tested NAME COMPILER...: what this compiler makes of it.
tested() {
    local name=$1
    shift
    if ! command -v "$1" >/dev/null; then
        skip "$name" "$1 is not installed"
    elif ! printf '#include <arm_neon.h>\n#include <stdio.h>\nint main(void) { return 0; }\n' |
        "$@" -x c - -static -lm -o "$scratch/arm64-$name" 2>/dev/null; then
        skip "$name" "it builds no static program for 64-bit ARM: the C library for that, or libgcc, is missing"
    elif ! make --no-print-directory arm64-programs CFLAGS="-O2 -Werror" BUILD="build/arm64-$name" ARM64_CC="$*" \
        >"$scratch/arm64-$name.said" 2>&1; then
        fail "$name" "$(reason "$scratch/arm64-$name.said")"
    else
        emulated "$name" cortex-a53
        emulated "$name" neoverse-n1
        emulated "$name" max
    fi
}

if [ -z "$qemu" ]; then
    skip "kernels for 64-bit ARM" "qemu-aarch64 is not installed"
else
    tested gcc aarch64-linux-gnu-gcc &
    tested clang clang --target=aarch64-linux-gnu &
    wait
fi
