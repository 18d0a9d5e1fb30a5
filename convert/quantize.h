// Rows of floats to panels of a dtype (format.h tells how a panel lies).
#ifndef R1_QUANTIZE_H
#define R1_QUANTIZE_H

#include <stddef.h>
#include <stdint.h>

#include "format.h"

// ---- elements of a checkpoint

// NaN where the code is 0x7f or 0xff; E4M3 has no infinities.
float e4m3_to_float(uint8_t code);
// To the nearest, ties to even; beyond 448 it saturates.
uint8_t float_to_e4m3(float value);
float f16_to_float(uint16_t half);
static inline float bf16_to_float(uint16_t upper) {
    union { uint32_t bits; float value; } pun = {.bits = (uint32_t)upper << 16};
    return pun.value;
}
// To the nearest, ties to even. A finite value may round to infinity.
uint16_t float_to_bf16(float value);

// The index of the first value whose magnitude is not below limit (NaN is not, and infinity never is), or count.
size_t find_beyond(const float *values, size_t count, float limit);

// What pack_panel can take: magnitudes below this (for f32, everything finite).
static inline float magnitude_limit(uint32_t dtype) {
    return dtype == DTYPE_F32 ? __builtin_inff() : dtype == DTYPE_BF16 ? 0x1.ffp127f : 1e37f;
}

// ---- panels

// Packs row_count (1 to 32) rows of cols floats, one behind the other, into panel (panel_bytes(dtype, cols) bytes, all of
// which are written). dtype is f32, bf16, q8, q4 or q6; cols is a multiple of 32. For q8, q4 and q6 the rows are rotated
// in place. scratch has pack_scratch_bytes() bytes.
void pack_panel(uint32_t dtype, float *rows, size_t row_count, size_t cols, uint8_t *panel, void *scratch);
size_t pack_scratch_bytes(uint32_t dtype, size_t cols);

// The same for f8: E4M3 codes and one scale for each 32 columns.
void pack_f8_panel(const uint8_t *codes, size_t row_count, size_t cols, const float *scales, uint8_t *panel);

#endif
