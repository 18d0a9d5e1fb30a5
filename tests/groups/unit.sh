# Functions by themselves: r1.c's (tests/unit.c), and the inner loops of every instruction set (tests/kernels.c).
program kernels
program unit "$(model r1_fp8 source)" "$(model llama_bf16 q4)" "$(model moonlight_mixed q8)"
