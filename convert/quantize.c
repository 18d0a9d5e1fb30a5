// Float rows -> panels of f32, bf16, f8, q8, q6 and q4.
//
// Everything here gives the same bytes on every machine and for every thread count: the searches compare sums of
// integers, and what floating point remains runs in one fixed order.

#include "quantize.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------------------------------------------------ elements

static float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// E4M3: a sign, four exponent bits with bias 7, three mantissa bits; exponent 0 is subnormal, steps of 2^-9.
float e4m3_to_float(uint8_t code) {
    uint32_t sign = (uint32_t)(code & 0x80) << 24, magnitude = code & 0x7f;
    if (magnitude == 0x7f) return bits_to_float(sign | 0x7fc00000);
    if (magnitude < 8) return code & 0x80 ? -(float)magnitude * 0x1p-9f : (float)magnitude * 0x1p-9f;
    return bits_to_float(sign | ((magnitude << 20) + ((127 - 7) << 23)));
}

uint8_t float_to_e4m3(float value) {
    uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
    uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    if (magnitude > 0x7f800000) return sign | 0x7f;
    if (magnitude >= 0x43e00000) return sign | 0x7e;              // 448 and beyond
    if (magnitude < 0x3c800000) {                                 // below 2^-6: count steps of 2^-9
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits, ties to even.
        return sign | (uint8_t)(float_to_bits(bits_to_float(magnitude) * 512.0f + 12582912.0f) & 0xf);
    }
    magnitude += 0x7ffff + (magnitude >> 20 & 1);
    uint32_t code = (magnitude >> 20) - ((127 - 7) << 3);
    return sign | (uint8_t)(code > 0x7e ? 0x7e : code);           // 448 to 464 would round up to the NaN code
}

float f16_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return bits_to_float(sign | float_to_bits((float)mantissa * 0x1p-24f));
    return bits_to_float(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);   // NaN stays one
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

size_t find_beyond(const float *values, size_t count, float limit) {
    uint32_t most = float_to_bits(limit); // finite floats of one sign sort as their bits do, infinity and NaN behind them
    // Blocks without an early exit become vector code.
    for (size_t start = 0; start < count; start += 256) {
        size_t end = count - start < 256 ? count : start + 256;
        uint32_t worst = 0;
        for (size_t i = start; i < end; i++) {
            uint32_t magnitude = float_to_bits(values[i]) & 0x7fffffff;
            worst = magnitude > worst ? magnitude : worst;
        }
        if (worst < most) continue;
        for (size_t i = start; i < end; i++) {
            if ((float_to_bits(values[i]) & 0x7fffffff) >= most) return i;
        }
    }
    return count;
}

static float largest_magnitude(const float *values, size_t count) {
    uint32_t worst = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t magnitude = float_to_bits(values[i]) & 0x7fffffff;
        worst = magnitude > worst ? magnitude : worst;
    }
    return bits_to_float(worst);
}

// Nearest integer, ties to even, for |value| < 2^22.
static inline int32_t round_to_int(float value) {
    return (int32_t)(float_to_bits(value + 12582912.0f) & 0x7fffff) - 0x400000;
}

// ------------------------------------------------------------------------------------------------------------------ q8

// One k-block of one row; the codes go to out[k / 4 * 128 + k % 4].
static float pack_q8_block(const float *values, size_t count, uint8_t *out) {
    float largest = largest_magnitude(values, count), scale = largest / 127.0f, inverse = 127.0f / largest;
    // A block of (almost) nothing but zeros: 127 / largest is no number to multiply with.
    if (!(largest > 1e-35f)) scale = inverse = 0.0f;
    for (size_t k = 0; k < count; k++) {
        int32_t code = round_to_int(values[k] * inverse);
        out[k / 4 * (PANEL_ROWS * 4) + k % 4] = (uint8_t)(int8_t)(code > 127 ? 127 : code < -127 ? -127 : code);
    }
    return scale;
}

// ------------------------------------------------------------------------------------------------------------------ q6
//
// A k-block of a row is scaled to 16-bit integers, tried with its largest weight at some places near the end of the codes, and
// takes the scale xq / qq of the trial with the smallest error (see q4 below for the two sums), then the codes that are nearest
// under that scale. The largest weight is tried on the negative side, which has one code more.

#define Q6_FIRST_PLACE 25                     // of the largest weight: -25, -26 .. -36; beyond -32 it is clipped
#define Q6_LAST_PLACE 36

static inline int32_t clip_q6(int32_t value) { return value < -32 ? -32 : value > 31 ? 31 : value; }

static float search_q6_block(const float *values, size_t count) {
    uint32_t signed_largest = 0;
    for (size_t k = 0; k < count; k++) {
        uint32_t bits = float_to_bits(values[k]);
        if ((bits & 0x7fffffff) > (signed_largest & 0x7fffffff)) signed_largest = bits;
    }
    float largest = bits_to_float(signed_largest);
    if (!(fabsf(largest) > 1e-30f)) return 0.0f;
    float factor = -32767.0f / largest, best = 0.0f, scale = 0.0f;
    int16_t x[K_BLOCK];                       // the largest is -32767
    for (size_t k = 0; k < count; k++) x[k] = (int16_t)round_to_int(values[k] * factor);
    for (int32_t place = Q6_FIRST_PLACE; place <= Q6_LAST_PLACE; place++) {
        int32_t xq = 0, qq = 0;
        for (size_t k = 0; k < count; k++) {
            int32_t q = clip_q6((x[k] * place + 0x4000) >> 15);
            xq += x[k] * q;
            qq += q * q;
        }
        float error = (float)xq * (float)xq;
        if (error > best * (float)qq) {
            best = error / (float)qq;
            scale = (float)xq / (float)qq;
        }
    }
    return scale / factor;
}

// One k-block of one row; w: the block's values, zero so far.
static float pack_q6_block(const float *values, size_t count, size_t row, uint8_t *w) {
    float scale = search_q6_block(values, count), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    for (size_t k = 0; k < count; k++) {
        unsigned code = (unsigned)(clip_q6(round_to_int(values[k] * inverse)) + Q6_ZERO);
        uint8_t *sixteen = w + k / Q6_COLUMNS * Q6_BYTES;
        size_t i = k % Q6_COLUMNS / 4, at = row * 4 + k % 4;
        sixteen[Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS + at] |= (uint8_t)((code & 15) << i % 2 * 4);
        sixteen[at] |= (uint8_t)(code >> 4 << i * 2);
    }
    return scale;
}

// ------------------------------------------------------------------------------------------------------------------ q4
//
// A group of 32 weights x is stored as D * s * (table[n] + b): D the row's scale, s an even integer in -126..126, b 0 or
// Q4_SHIFT. The search works on x scaled to 16-bit integers by the largest of the group, and on the sums
//     xq = sum x * q,  qq = sum q * q,   q = table[n] + b,
// because the squared error at scale d is sum x^2 - 2 d xq + d^2 qq, and xq / qq is the best d for given q.
//   1. For each sign and shift, some scales that put the largest weight near the end of the table; the best xq^2 / qq wins.
//   2. D is what makes the largest of these scales 126. Each group tries the even integers next to its scale, with both
//      shifts, for the true error.
//   3. D is fitted again by least squares, the codes are chosen anew for it, and D is fitted once more.

#define GROUP_TOP 32767                       // what the largest weight of a group becomes
#define SCALE_MAX 126
#define FIRST_TRIALS 7 // scales of step 1 for each sign and shift: the largest weight at 94, 101 .. 136

typedef struct {
    int16_t limit[16];                        // a weight above limit[n] is nearer to entry n + 1 than to n; 15 are used
} Limits;

// What step 1 compares with, the same for every group.
typedef struct {
    Limits at[2][FIRST_TRIALS];               // [shift or not][scale]
} FirstLimits;

typedef struct {
    int32_t xq, qq;
} GroupSums;

// The midpoints between the entries, in the units of the scaled weights; ratio is that of one step of the table.
static inline __attribute__((always_inline)) void set_limits(Limits *limits, float ratio, int shift) {
    for (int n = 0; n < 15; n++) {
        float limit = (float)(Q4_TABLE[n] + Q4_TABLE[n + 1] + 2 * shift) * 0.5f * ratio;
        limit = limit > 32767.0f ? 32767.0f : limit < -32767.0f ? -32767.0f : limit;
        limits->limit[n] = (int16_t)limit;
    }
    limits->limit[15] = 0;
}

// The sums over a group when each weight takes the nearest entry, found by counting the midpoints below it. mirrored: the
// scale is negative, that is, the weights are. Written for vectors of BYTES bytes, the width of an instruction set's registers:
// compilers make poor code of wider ones.
#define STEP(n) q += (values > limits->limit[n]) & (int16_t)(Q4_TABLE[n + 1] - Q4_TABLE[n]);
#define DEFINE_SUM_GROUP(BYTES) \
    static inline __attribute__((always_inline)) GroupSums sum_group_##BYTES(const int16_t *x, const Limits *limits, int shift, \
                                                                             bool mirrored) { \
        typedef int16_t Vector __attribute__((vector_size(BYTES))); \
        int16_t a[K_GROUP], b[K_GROUP]; \
        for (int i = 0; i < K_GROUP; i += (BYTES) / 2) { \
            Vector values, q = (Vector){0} + (int16_t)(Q4_TABLE[0] + shift); \
            memcpy(&values, x + i, sizeof values); \
            if (mirrored) values = -values; \
            STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) \
            STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) \
            memcpy(a + i, &values, sizeof values); \
            memcpy(b + i, &q, sizeof q); \
        } \
        int32_t xq = 0, qq = 0; \
        for (int i = 0; i < K_GROUP; i++) { \
            xq += a[i] * b[i]; \
            qq += b[i] * b[i]; \
        } \
        return (GroupSums){xq, qq}; \
    }
DEFINE_SUM_GROUP(16)
DEFINE_SUM_GROUP(32)
#undef STEP

// width is a constant in every caller, so one of the two remains.
static inline __attribute__((always_inline)) GroupSums sum_group(int width, const int16_t *x, const Limits *limits,
                                                                 int shift, bool mirrored) {
    return width == 32 ? sum_group_32(x, limits, shift, mirrored) : sum_group_16(x, limits, shift, mirrored);
}

static inline __attribute__((always_inline)) void code_group(const int16_t *x, const Limits *limits, bool mirrored,
                                                             uint8_t *codes) {
    for (int i = 0; i < K_GROUP; i++) {
        int value = mirrored ? -x[i] : x[i];
        uint8_t code = 0;
        for (int n = 0; n < 15; n++) code = (uint8_t)(code + (value > limits->limit[n]));
        codes[i] = code;
    }
}

// Scales a group to integers; returns the value of one unit, 0 for a group that is zero for all purposes.
static inline __attribute__((always_inline)) float scale_group(const float *values, int16_t *x) {
    float largest = largest_magnitude(values, K_GROUP), factor = GROUP_TOP / largest;
    if (!(largest > 1e-30f)) {
        memset(x, 0, K_GROUP * sizeof *x);
        return 0.0f;
    }
    for (int i = 0; i < K_GROUP; i++) x[i] = (int16_t)round_to_int(values[i] * factor);
    return largest / GROUP_TOP;
}

// Step 1 for one group: the best scale in the group's own units.
static inline __attribute__((always_inline)) float search_group(int width, const int16_t *x, const FirstLimits *first) {
    float best = 0.0f, scale = 0.0f;
    for (int mirrored = 0; mirrored < 2; mirrored++) {
        for (int shifted = 0; shifted < 2; shifted++) {
            for (int trial = 0; trial < FIRST_TRIALS; trial++) {
                GroupSums sums = sum_group(width, x, &first->at[shifted][trial], shifted * Q4_SHIFT, mirrored);
                float xq = (float)sums.xq, qq = (float)sums.qq;
                if (sums.xq > 0 && xq * xq > best * qq) {
                    best = xq * xq / qq;
                    scale = mirrored ? -(xq / qq) : xq / qq;
                }
            }
        }
    }
    return scale;
}

// Steps 2 and 3 for one group: its sub-scale byte for the row scale d, and the sums that go with it. unit is the value of
// one step of the scaled weights, wanted the scale to come near to.
static inline __attribute__((always_inline)) uint8_t choose_group(int width, const int16_t *x, float unit, float d,
                                                                  float wanted, int reach, GroupSums *chosen) {
    bool mirrored = wanted < 0;
    int nearest = (int)(fabsf(wanted) / d * 0.5f + 0.5f) * 2, best_s = 0, best_shifted = 0;
    if (nearest > SCALE_MAX) nearest = SCALE_MAX;
    float best = 0.0f;                        // s = 0 is always possible: its error is sum x^2, the zero of this count
    *chosen = (GroupSums){0, 0};
    for (int s = nearest - reach; s <= nearest + reach; s += 2) {
        if (s < 2 || s > SCALE_MAX) continue;
        float ratio = (float)s * d / unit;
        if (!(ratio < GROUP_TOP)) continue;   // every weight is zero beside this scale
        for (int shifted = 0; shifted < 2; shifted++) {
            Limits limits;
            set_limits(&limits, ratio, shifted * Q4_SHIFT);
            GroupSums sums = sum_group(width, x, &limits, shifted * Q4_SHIFT, mirrored);
            float error = ratio * (ratio * (float)sums.qq - 2.0f * (float)sums.xq);
            if (error < best) {
                best = error;
                best_s = s;
                best_shifted = shifted;
                *chosen = sums;
            }
        }
    }
    return (uint8_t)((unsigned)(mirrored ? -best_s : best_s) & 0xfe) | (uint8_t)best_shifted;
}

// One row of a q4 panel. scratch holds a scale and a unit for each group, the row as integers, and the sub-scales.
static inline __attribute__((always_inline)) void pack_q4_row_body(int width, const float *values, size_t cols, size_t row,
                                                                   uint8_t *panel, const FirstLimits *first,
                                                                   void *scratch) {
    size_t groups = cols / K_GROUP;
    float *scales = scratch, *units = scales + groups, largest = 0.0f, d = 0.0f;
    int16_t *x = (int16_t *)(units + groups);
    uint8_t *subs = (uint8_t *)(x + cols);
    for (size_t g = 0; g < groups; g++) {
        units[g] = scale_group(values + g * K_GROUP, x + g * K_GROUP);
        scales[g] = units[g] > 0 ? units[g] * search_group(width, x + g * K_GROUP, first) : 0.0f;
        if (fabsf(scales[g]) > largest) largest = fabsf(scales[g]);
    }
    memset(subs, 0, groups);
    float row_scale = largest / SCALE_MAX;
    for (int round = 0; round < 2 && largest > 0; round++) {
        double xq = 0.0, qq = 0.0;
        d = row_scale;
        for (size_t g = 0; g < groups; g++) {
            if (!(units[g] > 0)) continue;
            GroupSums sums;
            subs[g] = choose_group(width, x + g * K_GROUP, units[g], d, scales[g], round ? 0 : 2, &sums);
            double s = (int8_t)(subs[g] & 0xfe);
            if (s != 0) scales[g] = (float)s * d;
            xq += fabs(s) * units[g] * sums.xq;
            qq += s * s * sums.qq;
        }
        if (qq > 0) row_scale = (float)(xq / qq);
    }
    memcpy(panel + row * 4, &row_scale, sizeof row_scale);

    uint8_t *block = panel + panel_head_bytes(DTYPE_Q4);
    for (size_t start = 0; start < cols; start += K_BLOCK) {
        size_t count = cols - start < K_BLOCK ? cols - start : K_BLOCK;
        uint8_t *nibbles = block + block_head_bytes(DTYPE_Q4, count);
        for (size_t k = 0; k < count; k += K_GROUP) {
            size_t g = (start + k) / K_GROUP;
            uint8_t codes[K_GROUP] = {0};
            block[k / K_GROUP * PANEL_ROWS + row] = subs[g];
            int s = (int8_t)(subs[g] & 0xfe);
            if (s) {                          // the codes that belong to the sums of the last fit
                Limits limits;
                set_limits(&limits, (float)abs(s) * d / units[g], subs[g] & 1 ? Q4_SHIFT : 0);
                code_group(x + g * K_GROUP, &limits, s < 0, codes);
            }
            for (size_t i = 0; i < K_GROUP; i += 8) {
                uint8_t *out = nibbles + ((k + i) / 8 * PANEL_ROWS + row) * 4;
                for (size_t j = 0; j < 4; j++) out[j] = (uint8_t)(codes[i + j] | codes[i + 4 + j] << 4);
            }
        }
        block = nibbles + value_bytes(DTYPE_Q4, count);
    }
}

// The same code for two instruction sets; the sums are integers, so the bytes are the same. (512-bit registers were
// slower.)
typedef void PackRow(const float *values, size_t cols, size_t row, uint8_t *panel, const FirstLimits *first, void *scratch);

static void pack_q4_row(const float *values, size_t cols, size_t row, uint8_t *panel, const FirstLimits *first,
                        void *scratch) {
    pack_q4_row_body(16, values, cols, row, panel, first, scratch);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) static void pack_q4_row_avx2(const float *values, size_t cols, size_t row, uint8_t *panel,
                                                             const FirstLimits *first, void *scratch) {
    pack_q4_row_body(32, values, cols, row, panel, first, scratch);
}
static PackRow *choose_pack_q4_row(void) {
    return __builtin_cpu_supports("avx2") ? pack_q4_row_avx2 : pack_q4_row;
}
#else
static PackRow *choose_pack_q4_row(void) { return pack_q4_row; }
#endif

// -------------------------------------------------------------------------------------------------------------- panels

size_t pack_scratch_bytes(uint32_t dtype, size_t cols) {
    return dtype == DTYPE_Q4 ? cols / K_GROUP * (2 * sizeof(float) + 1) + cols * sizeof(int16_t) : 0;
}

static void rotate_row(float *row, size_t cols) {
    for (size_t first = 0, width; first < cols; first += width) {
        float rotated[K_BLOCK];
        width = rotation_width(cols - first);
        rotate_columns(row + first, width, rotated);
        memcpy(row + first, rotated, width * sizeof *row);
    }
}

void pack_panel(uint32_t dtype, float *rows, size_t row_count, size_t cols, uint8_t *panel, void *scratch) {
    memset(panel, 0, panel_bytes(dtype, cols));
    if (dtype == DTYPE_Q8 || dtype == DTYPE_Q4 || dtype == DTYPE_Q6) {
        for (size_t row = 0; row < row_count; row++) rotate_row(rows + row * cols, cols);
    }
    if (dtype == DTYPE_Q4) {
        PackRow *pack = choose_pack_q4_row();
        FirstLimits first;
        for (int trial = 0; trial < FIRST_TRIALS; trial++) {
            for (int shifted = 0; shifted < 2; shifted++) {
                set_limits(&first.at[shifted][trial], GROUP_TOP / (94.0f + 7.0f * (float)trial), shifted * Q4_SHIFT);
            }
        }
        for (size_t row = 0; row < row_count; row++) {
            pack(rows + row * cols, cols, row, panel, &first, scratch);
        }
        return;
    }
    uint8_t *block = panel;
    for (size_t start = 0; start < cols; start += K_BLOCK) {
        size_t count = cols - start < K_BLOCK ? cols - start : K_BLOCK;
        for (size_t row = 0; row < row_count; row++) {
            const float *values = rows + row * cols + start;
            if (dtype == DTYPE_F32) {
                for (size_t k = 0; k < count; k++) memcpy(block + (k * PANEL_ROWS + row) * 4, &values[k], 4);
            } else if (dtype == DTYPE_BF16) {
                for (size_t k = 0; k < count; k++) {
                    uint16_t upper = float_to_bf16(values[k]);
                    memcpy(block + ((k / 2 * PANEL_ROWS + row) * 2 + k % 2) * 2, &upper, 2);
                }
            } else if (dtype == DTYPE_Q6) {
                float scale = pack_q6_block(values, count, row, block + block_head_bytes(DTYPE_Q6, count));
                memcpy(block + row * 4, &scale, 4);
            } else {
                float scale = pack_q8_block(values, count, block + block_head_bytes(DTYPE_Q8, count) + row * 4);
                memcpy(block + row * 4, &scale, 4);
            }
        }
        block += block_head_bytes(dtype, count) + value_bytes(dtype, count);
    }
}

void pack_f8_panel(const uint8_t *codes, size_t row_count, size_t cols, const float *scales, uint8_t *panel) {
    memset(panel, 0, panel_bytes(DTYPE_F8, cols));
    uint8_t *block = panel;
    for (size_t start = 0; start < cols; start += K_BLOCK) {
        size_t count = cols - start < K_BLOCK ? cols - start : K_BLOCK;
        memcpy(block, scales + start / K_GROUP, count / K_GROUP * sizeof *scales);
        uint8_t *out = block + block_head_bytes(DTYPE_F8, count);
        for (size_t row = 0; row < row_count; row++) {
            const uint8_t *in = codes + row * cols + start;
            for (size_t k = 0; k < count; k += 4) memcpy(out + (k / 4 * PANEL_ROWS + row) * 4, in + k, 4);
        }
        block = out + value_bytes(DTYPE_F8, count);
    }
}
