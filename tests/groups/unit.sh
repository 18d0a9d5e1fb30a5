# Functions by themselves: r1.c's (tests/unit.c), the inner loops of every instruction set (tests/kernels.c), and what the converter
# packs against what the engine reads (tests/quantize.c).
program kernels
program quantize
program unit "$(model r1_fp8 source)" "$(model llama_bf16 q4)" "$(model moonlight_mixed q8)"
