// AVX-512 forms of the kernels, for processors with VNNI and VBMI (Intel Ice Lake, AMD Zen 4, and later).
//
// Panels keep 32 rows side by side, so a vector holds 16 rows and no sum ever crosses lanes: 32 rows times one token are
// two accumulators, and up to 8 tokens share each weight that was loaded. One token is bound by memory; with 8 the dot
// products are the limit. Written with intrinsics in the same shape as the portable functions of r1.c, which say what
// each one computes; the number of tokens is a constant inside each instance, so that accumulators live in registers.
#ifndef R1_AVX512_KERNELS
#define R1_AVX512_KERNELS

#include "avx2.h"

#include <immintrin.h>

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))
#define AVX512_INLINE INLINE AVX512

// Makes `static void NAME(panel, cols, x, n, out)` from an always-inlined NAME_tile that takes n as a constant.
#define AVX512_PRODUCT(name)                                                                                            \
    AVX512 static void name(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {             \
        switch (n) {                                                                                                    \
        case 1: name##_tile(panel, cols, x, 1, out); break;                                                             \
        case 2: name##_tile(panel, cols, x, 2, out); break;                                                             \
        case 3: name##_tile(panel, cols, x, 3, out); break;                                                             \
        case 4: name##_tile(panel, cols, x, 4, out); break;                                                             \
        case 5: name##_tile(panel, cols, x, 5, out); break;                                                             \
        case 6: name##_tile(panel, cols, x, 6, out); break;                                                             \
        case 7: name##_tile(panel, cols, x, 7, out); break;                                                             \
        case 8: name##_tile(panel, cols, x, 8, out); break;                                                             \
        }                                                                                                               \
    }

// sum + the products of four unsigned and four signed bytes in each lane. As assembly because gcc 12 spills
// accumulators to memory around the intrinsic, which halves the speed with 8 tokens.
AVX512_INLINE __m512i add_byte_products_avx512(__m512i sum, __m512i bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
    return sum;
}

// Four quants of a token in every lane.
AVX512_INLINE __m512i broadcast_quants_avx512(const int8_t *quants) {
    int32_t four;
    memcpy(&four, quants, sizeof four);
    return _mm512_set1_epi32(four);
}

// Asks for the beginnings of the pages that begin in the bytes 4 KB behind these.
AVX512_INLINE void prefetch_pages(const uint8_t *w, size_t bytes) {
    if (!prefetching.pages) return;
    uintptr_t first = (uintptr_t)w + 4096;
    for (uintptr_t page = align_up(first, 4096); page < first + bytes; page += 4096) prefetch_page(page);
}

// ---- products of a panel

// The instruction multiplies unsigned by signed bytes: weights get 128 added (their sign bit flipped), and the
// accumulators start at -128 times the sum of the token's quants.
AVX512_INLINE void product_q8_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                          float *out) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q8, length);     // [length/4][32][4]
        prefetch_pages(panel, block_head_bytes(DTYPE_Q8, length) + value_bytes(DTYPE_Q8, length));
        __m512i sum[TILE_TOKENS][2];
        UNROLL for (size_t t = 0; t < n; t++)
            sum[t][0] = sum[t][1] = _mm512_set1_epi32(-128 * x[t].block_sums[first / K_BLOCK]);
        for (size_t k = 0; k < length; k += 4) {
            const uint8_t *four = w + k * PANEL_ROWS;
            prefetch_weights(four);
            __m512i w0 = _mm512_xor_si512(_mm512_loadu_si512(four), flip);
            __m512i w1 = _mm512_xor_si512(_mm512_loadu_si512(four + 64), flip);
            UNROLL for (size_t t = 0; t < n; t++) {
                __m512i q = broadcast_quants_avx512(x[t].quants + first + k);
                sum[t][0] = add_byte_products_avx512(sum[t][0], w0, q);
                sum[t][1] = add_byte_products_avx512(sum[t][1], w1, q);
            }
        }
        __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
        UNROLL for (size_t t = 0; t < n; t++) {
            float *o = out + t * PANEL_ROWS;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[first / K_BLOCK]);
            __m512 before0 = first ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = first ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), _mm512_mul_ps(scale0, x_scale), before0));
            _mm512_storeu_ps(o + 16,
                             _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][1]), _mm512_mul_ps(scale1, x_scale), before1));
        }
        panel = w + value_bytes(DTYPE_Q8, length);
    }
}

// Both nibbles of every byte become table values plus 128 by one byte permutation each: it looks at 6 bits of an index,
// the table stands there four times, so the two bits above a nibble do not matter. The 128 too many and the shift of a
// row that has it are in what the accumulators start from: (shift - 128) times the sum of the 32 quants.
AVX512_INLINE void product_q4_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                          float *out) {
    const __m128i signed_table = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(signed_table, _mm_set1_epi8((char)0x80)));
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    panel += panel_head_bytes(DTYPE_Q4);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const uint8_t *sub = panel;                                        // [length/32][32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        prefetch_pages(panel, block_head_bytes(DTYPE_Q4, length) + value_bytes(DTYPE_Q4, length));
        for (size_t i = 0; i < block_head_bytes(DTYPE_Q4, length); i += 128) prefetch_weights(sub + i);
        __m512i part[TILE_TOKENS][2];
        UNROLL for (size_t t = 0; t < n; t++) part[t][0] = part[t][1] = _mm512_setzero_si512();
        for (size_t group = 0; group < length; group += K_GROUP) {
            __m256i sub_bytes = _mm256_loadu_si256((const __m256i *)(const void *)(sub + group));
            __mmask32 shifted = _mm256_test_epi8_mask(sub_bytes, _mm256_set1_epi8(1));
            sub_bytes = _mm256_and_si256(sub_bytes, _mm256_set1_epi8((char)0xfe));
            __m512i sum[TILE_TOKENS][2];
            UNROLL for (size_t t = 0; t < n; t++) {
                int32_t quant_sum = x[t].sums[(first + group) / K_GROUP];
                __m512i plain = _mm512_set1_epi32(-128 * quant_sum),
                        with_shift = _mm512_set1_epi32((Q4_SHIFT - 128) * quant_sum);
                sum[t][0] = _mm512_mask_mov_epi32(plain, (__mmask16)shifted, with_shift);
                sum[t][1] = _mm512_mask_mov_epi32(plain, (__mmask16)(shifted >> 16), with_shift);
            }
            const uint8_t *eight = w + group * PANEL_ROWS / 2;
            for (size_t k = first + group; k < first + group + K_GROUP; k += 8, eight += 8 * PANEL_ROWS / 2) {
                prefetch_weights(eight);
                __m512i pairs0 = _mm512_loadu_si512(eight), pairs1 = _mm512_loadu_si512(eight + 64);
                __m512i low0 = _mm512_permutexvar_epi8(pairs0, table), low1 = _mm512_permutexvar_epi8(pairs1, table);
                __m512i high0 = _mm512_permutexvar_epi8(_mm512_srli_epi32(pairs0, 4), table);
                __m512i high1 = _mm512_permutexvar_epi8(_mm512_srli_epi32(pairs1, 4), table);
                UNROLL for (size_t t = 0; t < n; t++) {
                    __m512i q_low = broadcast_quants_avx512(x[t].quants + k),
                            q_high = broadcast_quants_avx512(x[t].quants + k + 4);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], low0, q_low);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], low1, q_low);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], high0, q_high);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], high1, q_high);
                }
            }
            __m512i sub0 = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(sub_bytes));
            __m512i sub1 = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(sub_bytes, 1));
            UNROLL for (size_t t = 0; t < n; t++) {
                part[t][0] = _mm512_add_epi32(part[t][0], _mm512_mullo_epi32(sum[t][0], sub0));
                part[t][1] = _mm512_add_epi32(part[t][1], _mm512_mullo_epi32(sum[t][1], sub1));
            }
        }
        UNROLL for (size_t t = 0; t < n; t++) {
            float *o = out + t * PANEL_ROWS;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[first / K_BLOCK]);
            __m512 before0 = first ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = first ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[t][0]), x_scale, before0));
            _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[t][1]), x_scale, before1));
        }
        panel = w + value_bytes(DTYPE_Q4, length);
    }
    // Until the next panel is multiplied nothing is asked for, and memory must not fall idle: some of that panel's requests now.
    for (size_t i = 0; i < 384; i += 128) prefetch_weights(panel + i);
    __m512 scale0 = _mm512_loadu_ps(row_scales), scale1 = _mm512_loadu_ps(row_scales + 16);
    for (size_t t = 0; t < n; t++) {
        float *o = out + t * PANEL_ROWS;
        _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), scale0));
        _mm512_storeu_ps(o + 16, _mm512_mul_ps(_mm512_loadu_ps(o + 16), scale1));
    }
}

// The codes of 16 rows and four of 16 columns, the i-th ones: a nibble of `pairs` with two bits of `tops` above it.
AVX512_INLINE __m512i join_q6_avx512(__m512i pairs, __m512i tops, const size_t i) {
    __m512i nibbles = _mm512_and_si512(i % 2 ? _mm512_srli_epi32(pairs, 4) : pairs, _mm512_set1_epi8(15));
    __m512i above = i == 0   ? _mm512_slli_epi32(tops, 4)
                    : i == 1 ? _mm512_slli_epi32(tops, 2)
                    : i == 2 ? tops
                             : _mm512_srli_epi32(tops, 2);
    return _mm512_ternarylogic_epi32(nibbles, above, _mm512_set1_epi8(0x30), 0xf8);     // nibbles | (above & 0x30)
}

// Codes are unsigned: accumulators start at -32 times the sum of the token's quants.
AVX512_INLINE void product_q6_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                          float *out) {
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q6, length);     // [length/16][384]
        prefetch_pages(panel, block_head_bytes(DTYPE_Q6, length) + value_bytes(DTYPE_Q6, length));
        __m512i sum[TILE_TOKENS][2];
        UNROLL for (size_t t = 0; t < n; t++)
            sum[t][0] = sum[t][1] = _mm512_set1_epi32(-Q6_ZERO * x[t].block_sums[first / K_BLOCK]);
        for (size_t k = first; k < first + length; k += Q6_COLUMNS, w += Q6_BYTES) {
            UNROLL for (size_t i = 0; i < Q6_BYTES; i += 128) prefetch_weights(w + i);
            __m512i tops0 = _mm512_loadu_si512(w), tops1 = _mm512_loadu_si512(w + 64);
            UNROLL for (size_t i = 0; i < 4; i++) {
                const uint8_t *eight = w + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS;
                __m512i w0 = join_q6_avx512(_mm512_loadu_si512(eight), tops0, i);
                __m512i w1 = join_q6_avx512(_mm512_loadu_si512(eight + 64), tops1, i);
                UNROLL for (size_t t = 0; t < n; t++) {
                    __m512i q = broadcast_quants_avx512(x[t].quants + k + 4 * i);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], w0, q);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], w1, q);
                }
            }
        }
        __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
        UNROLL for (size_t t = 0; t < n; t++) {
            float *o = out + t * PANEL_ROWS;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[first / K_BLOCK]);
            __m512 before0 = first ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = first ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), _mm512_mul_ps(scale0, x_scale), before0));
            _mm512_storeu_ps(o + 16,
                             _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][1]), _mm512_mul_ps(scale1, x_scale), before1));
        }
        panel = w;
    }
}

// Weights of two vectors a column, 16 rows each: floats, or half-precision numbers.
AVX512_INLINE void product_floats_avx512(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n, float *out,
                                         const bool halves) {
    __m512 sum[TILE_TOKENS][2];
    UNROLL for (size_t t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < cols; k++) {
        const uint8_t *w = panel + k * PANEL_ROWS * (halves ? 2 : 4);       // [cols][32]
        if (k % 64 == 0) prefetch_pages(w, 64 * PANEL_ROWS * (halves ? 2 : 4));
        if (!halves || k % 2 == 0) prefetch_weights(w);
        __m512 w0 = halves ? _mm512_cvtph_ps(load_bytes_avx2(w)) : _mm512_loadu_ps(w);
        __m512 w1 = halves ? _mm512_cvtph_ps(load_bytes_avx2(w + 32)) : _mm512_loadu_ps(w + 64);
        UNROLL for (size_t t = 0; t < n; t++) {
            __m512 value = _mm512_set1_ps(x[t].values[k]);
            sum[t][0] = _mm512_fmadd_ps(w0, value, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(w1, value, sum[t][1]);
        }
    }
    UNROLL for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_ps(out + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

AVX512_INLINE void product_f32_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                           float *out) {
    product_floats_avx512(panel, cols, x, n, out, false);
}

AVX512_INLINE void product_f16_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                           float *out) {
    product_floats_avx512(panel, cols, x, n, out, true);
}

// A lane holds two columns of a row; each is the upper half of a float.
AVX512_INLINE void product_bf16_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                            float *out) {
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512 sum[TILE_TOKENS][2];
    UNROLL for (size_t t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < cols; k += 2, panel += 2 * 2 * PANEL_ROWS) {    // [cols/2][32][2]
        if (k % 64 == 0) prefetch_pages(panel, 64 * 2 * PANEL_ROWS);
        prefetch_weights(panel);
        __m512i pairs0 = _mm512_loadu_si512(panel), pairs1 = _mm512_loadu_si512(panel + 64);
        __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs0, 16)),
               odd0 = _mm512_castsi512_ps(_mm512_and_si512(pairs0, upper));
        __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs1, 16)),
               odd1 = _mm512_castsi512_ps(_mm512_and_si512(pairs1, upper));
        UNROLL for (size_t t = 0; t < n; t++) {
            __m512 even = _mm512_set1_ps(x[t].values[k]), odd = _mm512_set1_ps(x[t].values[k + 1]);
            sum[t][0] = _mm512_fmadd_ps(even0, even, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(even1, even, sum[t][1]);
            sum[t][0] = _mm512_fmadd_ps(odd0, odd, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(odd1, odd, sum[t][1]);
        }
    }
    UNROLL for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_ps(out + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

// The upper and lower bytes of the bf16 numbers that E4M3 codes without their sign stand for: the exponent's bias is 120
// more, and the subnormal numbers of exponent 0 are normal ones.
#define UPPER_8(e) ((e) + 120) >> 1, ((e) + 120) >> 1, ((e) + 120) >> 1, ((e) + 120) >> 1, \
                   ((e) + 120) >> 1, ((e) + 120) >> 1, ((e) + 120) >> 1, ((e) + 120) >> 1
#define LOWER_8(e) ((e) & 1) << 7, ((e) & 1) << 7 | 16, ((e) & 1) << 7 | 32, ((e) & 1) << 7 | 48, \
                   ((e) & 1) << 7 | 64, ((e) & 1) << 7 | 80, ((e) & 1) << 7 | 96, ((e) & 1) << 7 | 112
static const uint8_t E4M3_UPPER[128] = {
    0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, UPPER_8(1), UPPER_8(2), UPPER_8(3), UPPER_8(4), UPPER_8(5), UPPER_8(6), UPPER_8(7),
    UPPER_8(8), UPPER_8(9), UPPER_8(10), UPPER_8(11), UPPER_8(12), UPPER_8(13), UPPER_8(14), UPPER_8(15)};
static const uint8_t E4M3_LOWER[128] = {
    0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60, LOWER_8(1), LOWER_8(2), LOWER_8(3), LOWER_8(4), LOWER_8(5), LOWER_8(6), LOWER_8(7),
    LOWER_8(8), LOWER_8(9), LOWER_8(10), LOWER_8(11), LOWER_8(12), LOWER_8(13), LOWER_8(14), LOWER_8(15)};
#undef UPPER_8
#undef LOWER_8

// Adds the products of 16 rows and four columns, [16][4], with n tokens to sum[t]. upper and lower are the tables above, 64
// codes in each half. Columns 0 and 2 come out side by side in the lanes, and so do 1 and 3: a row has two sums. sum[t][0] has
// rows 0, 1, 4, 5, 8 and so on, sum[t][1] the others.
AVX512_INLINE void add_columns_f8_avx512(__m512 (*sum)[2], const uint8_t *w, const __m512i *upper, const __m512i *lower,
                                         float (*values)[K_GROUP], size_t k, const size_t n) {
    const __m512i odd_mask = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512i codes = _mm512_loadu_si512(w);
    __m512i high = _mm512_permutex2var_epi8(upper[0], codes, upper[1]), low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xf8);   // high | (codes & sign)
    __m512i pairs0 = _mm512_unpacklo_epi8(low, high), pairs1 = _mm512_unpackhi_epi8(low, high);
    __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs0, 16)), odd0 = _mm512_castsi512_ps(_mm512_and_si512(pairs0, odd_mask));
    __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs1, 16)), odd1 = _mm512_castsi512_ps(_mm512_and_si512(pairs1, odd_mask));
    UNROLL for (size_t t = 0; t < n; t++) {
        double even_pair, odd_pair;
        memcpy(&even_pair, values[t] + k, sizeof even_pair);
        memcpy(&odd_pair, values[t] + k + 2, sizeof odd_pair);
        __m512 even = _mm512_castpd_ps(_mm512_set1_pd(even_pair)), odd = _mm512_castpd_ps(_mm512_set1_pd(odd_pair));
        sum[t][0] = _mm512_fmadd_ps(even0, even, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(even1, even, sum[t][1]);
        sum[t][0] = _mm512_fmadd_ps(odd0, odd, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(odd1, odd, sum[t][1]);
    }
}

// The group's scale goes into the tokens' values. Up to four tokens take all 32 rows at a time; more have registers for 16
// only, and pass a group twice.
AVX512_INLINE void product_f8_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                          float *out) {
    const __m512i upper[2] = {_mm512_loadu_si512(E4M3_UPPER), _mm512_loadu_si512(E4M3_UPPER + 64)};
    const __m512i lower[2] = {_mm512_loadu_si512(E4M3_LOWER), _mm512_loadu_si512(E4M3_LOWER + 64)};
    __m512 first_rows[TILE_TOKENS][2], last_rows[TILE_TOKENS][2];          // rows 0-15, rows 16-31
    UNROLL for (size_t t = 0; t < n; t++)
        first_rows[t][0] = first_rows[t][1] = last_rows[t][0] = last_rows[t][1] = _mm512_setzero_ps();
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [8], one for each 32 columns
        const uint8_t *w = panel + block_head_bytes(DTYPE_F8, length);     // [length/4][32][4]
        prefetch_pages(panel, block_head_bytes(DTYPE_F8, length) + value_bytes(DTYPE_F8, length));
        for (size_t group = 0; group < length; group += K_GROUP, w += K_GROUP * PANEL_ROWS) {
            float values[TILE_TOKENS][K_GROUP] __attribute__((aligned(64))); // columns 0, 2, 1, 3 of each four
            __m512 scale = _mm512_set1_ps(scales[group / K_GROUP]);
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t k = 0; k < K_GROUP; k += 16)
                    _mm512_storeu_ps(values[t] + k,
                                     _mm512_mul_ps(_mm512_permute_ps(_mm512_loadu_ps(x[t].values + first + group + k), 0xd8), scale));
            if (n <= 4) {
                for (size_t k = 0; k < K_GROUP; k += 4) {
                    prefetch_weights(w + k * PANEL_ROWS);
                    add_columns_f8_avx512(first_rows, w + k * PANEL_ROWS, upper, lower, values, k, n);
                    add_columns_f8_avx512(last_rows, w + k * PANEL_ROWS + 64, upper, lower, values, k, n);
                }
            } else {
                for (size_t k = 0; k < K_GROUP; k += 4) {
                    prefetch_weights(w + k * PANEL_ROWS);
                    add_columns_f8_avx512(first_rows, w + k * PANEL_ROWS, upper, lower, values, k, n);
                }
                for (size_t k = 0; k < K_GROUP; k += 4)
                    add_columns_f8_avx512(last_rows, w + k * PANEL_ROWS + 64, upper, lower, values, k, n);
            }
        }
        panel = w;
    }
    UNROLL for (size_t t = 0; t < n; t++) {
        float *o = out + t * PANEL_ROWS;
        _mm512_storeu_ps(o, _mm512_add_ps(_mm512_shuffle_ps(first_rows[t][0], first_rows[t][1], 0x88),
                                          _mm512_shuffle_ps(first_rows[t][0], first_rows[t][1], 0xdd)));
        _mm512_storeu_ps(o + 16, _mm512_add_ps(_mm512_shuffle_ps(last_rows[t][0], last_rows[t][1], 0x88),
                                               _mm512_shuffle_ps(last_rows[t][0], last_rows[t][1], 0xdd)));
    }
}

AVX512_PRODUCT(product_f32_avx512)
AVX512_PRODUCT(product_bf16_avx512)
AVX512_PRODUCT(product_f16_avx512)
AVX512_PRODUCT(product_f8_avx512)
AVX512_PRODUCT(product_q8_avx512)
AVX512_PRODUCT(product_q4_avx512)
AVX512_PRODUCT(product_q6_avx512)

// ---- products of many tokens
// Unpacked weights have 128 added already, so that the inner loop is dot products and loads alone.

AVX512 static void unpack_q8_avx512(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                    float *scales) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    const uint8_t *block = panel + panel_bytes(DTYPE_Q8, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        block += block_head_bytes(DTYPE_Q8, length);
        for (size_t i = 0; i < length * PANEL_ROWS; i += 64) {
            if (i % 128 == 0) prefetch_weights(block + i);
            _mm512_storeu_si512(bytes + i, _mm512_xor_si512(_mm512_loadu_si512(block + i), flip));
        }
        block += value_bytes(DTYPE_Q8, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

// Table values of 16 rows and four columns times their rows' ratios, rounded, plus 128. A row's ratio stands in both
// halves of its lane: even and odd bytes are multiplied as 16-bit numbers.
AVX512_INLINE __m512i scale_q4_avx512(__m512i index, __m512i table, __m512i ratios) {
    __m512i values = _mm512_permutexvar_epi8(index, table);
    __m512i even = _mm512_mulhrs_epi16(_mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8), ratios);
    __m512i odd = _mm512_slli_epi16(_mm512_mulhrs_epi16(_mm512_srai_epi16(values, 8), ratios), 8);
    return _mm512_xor_si512(_mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd), _mm512_set1_epi8((char)0x80));
}

// Bit 4 of an index says whether the row is shifted: the table has both values, twice.
AVX512 static void unpack_q4_avx512(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                    float *scales) {
    const __m128i plain = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m256i both = _mm256_setr_m128i(plain, _mm_add_epi8(plain, _mm_set1_epi8(Q4_SHIFT)));
    const __m512i table = _mm512_broadcast_i64x4(both), nibbles = _mm512_set1_epi8(15);
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    const uint8_t *block = panel + panel_bytes(DTYPE_Q4, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start), groups = length / K_GROUP;
        const uint8_t *w = block + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        __m256i largest = _mm256_setzero_si256();
        for (size_t g = 0; g < groups; g++) {
            __m256i sub = _mm256_and_si256(load_bytes_avx2(block + g * PANEL_ROWS), _mm256_set1_epi8((char)0xfe));
            largest = _mm256_max_epu8(largest, _mm256_abs_epi8(sub));
        }
        __m512 inverse[2];
        UNROLL for (size_t v = 0; v < 2; v++) {
            __m128i half = v ? _mm256_extracti128_si256(largest, 1) : _mm256_castsi256_si128(largest);
            __m512 whole = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(half));
            __mmask16 used = _mm512_cmp_ps_mask(whole, _mm512_setzero_ps(), _CMP_GT_OQ);
            inverse[v] = _mm512_maskz_div_ps(used, _mm512_set1_ps(32767.0f), whole);
            _mm512_storeu_ps(scales + 16 * v, _mm512_mul_ps(_mm512_loadu_ps(row_scales + 16 * v), whole));
        }
        for (size_t g = 0; g < groups; g++, w += K_GROUP * PANEL_ROWS / 2)
            UNROLL for (size_t v = 0; v < 2; v++) {
                __m512i sub = _mm512_cvtepi8_epi32(
                    _mm_loadu_si128((const __m128i *)(const void *)(block + g * PANEL_ROWS + 16 * v)));
                __mmask16 shifted = _mm512_test_epi32_mask(sub, _mm512_set1_epi32(1));
                __m512i shift = _mm512_maskz_set1_epi32(shifted, 0x10101010);
                __m512 scale = _mm512_cvtepi32_ps(_mm512_andnot_si512(_mm512_set1_epi32(1), sub));
                __m512i ratios = _mm512_cvtps_epi32(_mm512_mul_ps(scale, inverse[v]));
                ratios = _mm512_mask_mov_epi16(ratios, 0xaaaaaaaa, _mm512_slli_epi32(ratios, 16));
                UNROLL for (size_t i = 0; i < K_GROUP / 8; i++) {
                    if (v == 0) prefetch_weights(w + i * 4 * PANEL_ROWS);
                    __m512i pairs = _mm512_loadu_si512(w + i * 4 * PANEL_ROWS + 64 * v);
                    // (pairs & nibbles) | shift
                    __m512i low = _mm512_ternarylogic_epi32(pairs, nibbles, shift, 0xea);
                    __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(pairs, 4), nibbles, shift, 0xea);
                    uint8_t *eight = bytes + (g * K_GROUP + i * 8) * PANEL_ROWS + 64 * v;
                    _mm512_storeu_si512(eight, scale_q4_avx512(low, table, ratios));
                    _mm512_storeu_si512(eight + 4 * PANEL_ROWS, scale_q4_avx512(high, table, ratios));
                }
            }
        block = w;
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

AVX512 static void unpack_q6_avx512(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                    float *scales) {
    const __m512i offset = _mm512_set1_epi8(128 - Q6_ZERO);
    const uint8_t *block = panel + panel_bytes(DTYPE_Q6, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        block += block_head_bytes(DTYPE_Q6, length);
        for (size_t k = 0; k < length; k += Q6_COLUMNS, block += Q6_BYTES)
            UNROLL for (size_t half = 0; half < 128; half += 64) {
                __m512i tops = _mm512_loadu_si512(block + half);
                UNROLL for (size_t i = 0; i < 4; i++) {
                    const uint8_t *eight = block + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS;
                    __m512i codes = join_q6_avx512(_mm512_loadu_si512(eight + half), tops, i);
                    _mm512_storeu_si512(bytes + (k + 4 * i) * PANEL_ROWS + half, _mm512_add_epi8(codes, offset));
                }
            }
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

AVX512_INLINE void multiply_unpacked_avx512_tile(const uint8_t *bytes, const float *scales, size_t depth,
                                                 const struct Row *x, size_t first, const size_t n, bool add,
                                                 float *out, size_t stride) {
    const int8_t *quants[TILE_TOKENS];
    UNROLL for (size_t t = 0; t < n; t++) quants[t] = x[t].quants + first;
    for (size_t start = 0; start < depth; start += K_BLOCK, scales += PANEL_ROWS, add = true) {
        size_t end = min_size(start + K_BLOCK, depth);
        __m512i sum[TILE_TOKENS][2];
        UNROLL for (size_t t = 0; t < n; t++)
            sum[t][0] = sum[t][1] = _mm512_set1_epi32(-128 * x[t].block_sums[(first + start) / K_BLOCK]);
        // Columns come in 32s: four steps in a row need no end of the loop between them.
        for (size_t k = start; k < end; k += 16)
            UNROLL for (size_t i = 0; i < 16; i += 4) {
                const uint8_t *four = bytes + (k + i) * PANEL_ROWS;
                __m512i w0 = _mm512_loadu_si512(four), w1 = _mm512_loadu_si512(four + 64);
                UNROLL for (size_t t = 0; t < n; t++) {
                    __m512i q = broadcast_quants_avx512(quants[t] + k + i);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], w0, q);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], w1, q);
                }
            }
        __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
        UNROLL for (size_t t = 0; t < n; t++) {
            float *o = out + t * stride;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[(first + start) / K_BLOCK]);
            __m512 value0 = _mm512_cvtepi32_ps(sum[t][0]), value1 = _mm512_cvtepi32_ps(sum[t][1]);
            __m512 before0 = add ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = add ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(value0, _mm512_mul_ps(scale0, x_scale), before0));
            _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(value1, _mm512_mul_ps(scale1, x_scale), before1));
        }
    }
}

AVX512 static void multiply_unpacked_avx512(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x,
                                            size_t first, size_t n, bool add, float *out, size_t stride) {
#define TILE(tokens) \
    case tokens: multiply_unpacked_avx512_tile(bytes, scales, depth, x, first, tokens, add, out, stride); break;
    // In groups of equal size, as nearly as possible.
    for (size_t groups = ceil_div(n, TILE_TOKENS), count; n; groups--, n -= count, x += count, out += count * stride) {
        count = ceil_div(n, groups);
        switch (count) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) }
    }
#undef TILE
}

// ---- everything else
// The last vector of a row is loaded and stored under a mask of the lanes that it has.

AVX512_INLINE __mmask16 lanes_avx512(size_t n) { return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1); }

// Both halves of a vector added to each other.
AVX512_INLINE __m256 fold_avx512(__m512 x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

AVX512_INLINE float sum_avx512(__m512 x) {
    __m256 folded = fold_avx512(x);
    return _mm_cvtss_f32(sum_lanes_avx2(folded, folded, folded, folded));
}

// Quants of 64 columns at a time. Their sums, too, are dot products, with ones: four columns to a lane.
AVX512 static void quantize_block_avx512(const float *x, size_t cols, int8_t *quants, float *scale, int32_t *sums,
                                         int32_t *block_sum) {
    __m512 largest16[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    // max_ps(a, b) is a > b ? a : b, so a not-a-number in a leaves b.
    for (size_t k = 0; k < cols; k += K_GROUP)
        UNROLL for (size_t v = 0; v < 2; v++)
            largest16[v] = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + k + 16 * v)), largest16[v]);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(largest16[0], largest16[1]));
    *scale = largest < INFINITY ? largest / 127.0f : 0.0f;
    float inverse = *scale > 1e-38f ? 1.0f / *scale : 0.0f;
    if (!(inverse > 0)) *scale = 0;
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i fours[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    UNROLL for (size_t i = 0; i < 4; i++) {
        if (64 * i >= cols) break;
        bool group_alone = 64 * i + K_GROUP == cols;
        __m512i nearest[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        UNROLL for (size_t v = 0; v < 4; v++) {
            if (v >= 2 && group_alone) break;
            __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + 64 * i + 16 * v), _mm512_set1_ps(inverse));
            scaled = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
            nearest[v] = _mm512_cvtps_epi32(scaled);                       // to nearest even
        }
        __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(nearest[0], nearest[1]), _mm512_packs_epi32(nearest[2], nearest[3]));
        bytes = _mm512_permutexvar_epi32(in_order, bytes);
        fours[i] = add_byte_products_avx512(fours[i], _mm512_set1_epi8(1), bytes);
        if (group_alone) _mm256_storeu_si256((__m256i *)(void *)(quants + 64 * i), _mm512_castsi512_si256(bytes));
        else _mm512_storeu_si512(quants + 64 * i, bytes);
    }
    // The eight lanes of a group are added up for four groups together.
    __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[0], fours[1]), _mm512_unpackhi_epi32(fours[0], fours[1]));
    __m512i last = _mm512_add_epi32(_mm512_unpacklo_epi32(fours[2], fours[3]), _mm512_unpackhi_epi32(fours[2], fours[3]));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, last), _mm512_unpackhi_epi64(first, last));
    all = _mm512_add_epi32(all, _mm512_shuffle_i64x2(all, all, 0xb1));
    // Groups 0, 2, 4, 6 are in lanes 0 to 3 now, 1, 3, 5, 7 in lanes 8 to 11.
    __m256i together = _mm512_castsi512_si256(_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0), all));
    _mm256_mask_storeu_epi32(sums, (__mmask8)((1u << cols / K_GROUP) - 1), together);
    __m128i pairs = _mm_add_epi32(_mm256_castsi256_si128(together), _mm256_extracti128_si256(together, 1));
    pairs = _mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0x4e));
    *block_sum = _mm_cvtsi128_si32(pairs) + _mm_extract_epi32(pairs, 1);
}

AVX512 static float dot_avx512(const float *x, const float *y, size_t n) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    size_t i = 0;
    for (; i + 64 <= n; i += 64)
        UNROLL for (size_t v = 0; v < 4; v++)
            sum[v] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16 * v), _mm512_loadu_ps(y + i + 16 * v), sum[v]);
    for (; i < n; i += 16) {
        __mmask16 lanes = lanes_avx512(n - i);
        sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_maskz_loadu_ps(lanes, y + i), sum[0]);
    }
    return sum_avx512(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

AVX512 static float find_maximum_avx512(const float *x, size_t n) {
    __m512 largest[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        UNROLL for (size_t v = 0; v < 2; v++) largest[v] = _mm512_max_ps(_mm512_loadu_ps(x + i + 16 * v), largest[v]);
    for (; i < n; i += 16) {
        __mmask16 lanes = lanes_avx512(n - i);
        largest[0] = _mm512_mask_max_ps(largest[0], lanes, _mm512_maskz_loadu_ps(lanes, x + i), largest[0]);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
}

// exp_float() of 16 numbers.
AVX512_INLINE __m512 exp_avx512(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), shift));
}

AVX512 static float exp_row_avx512(float *x, float maximum, const float *scales, size_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes_avx512(n - i);
        __m512 value = exp_avx512(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_set1_ps(maximum)));
        __m512 scaled = scales ? _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, scales + i)) : value;
        _mm512_mask_storeu_ps(x + i, lanes, scaled);
        sum = _mm512_mask_add_ps(sum, lanes, sum, value);
    }
    return sum_avx512(sum);
}

AVX512 static void silu_multiply_avx512(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes_avx512(n - i);
        __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i);
        __m512 exponential = exp_avx512(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f)));
        __m512 silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential));
        _mm512_mask_storeu_ps(gate + i, lanes, _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(lanes, up + i)));
    }
}

AVX512 static void float_to_half_avx512(const float *x, uint16_t *half, size_t n) {
    const __m512 largest = _mm512_set1_ps(65504.0f), sign = _mm512_set1_ps(-0.0f);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes_avx512(n - i);
        __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
        // A not-a-number becomes the plain one with its sign; min and max return their second operand for it.
        __m512 plain = _mm512_or_ps(_mm512_and_ps(value, sign), _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
        __m512 limited = _mm512_max_ps(_mm512_set1_ps(-65504.0f), _mm512_min_ps(largest, value));
        limited = _mm512_mask_mov_ps(limited, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), plain);
        _mm256_mask_storeu_epi16(half + i, lanes, _mm512_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT));
    }
}

// hadamard_down() of rows that stand in registers, one in each.
AVX512_INLINE void hadamard_avx512(__m512 *row, const size_t rows) {
    UNROLL for (size_t half = 1; half < rows; half *= 2)
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
            if (r & half) continue;
            __m512 sum = _mm512_add_ps(row[r], row[r + half]);
            row[r + half] = _mm512_sub_ps(row[r], row[r + half]);
            row[r] = sum;
        }
}

// A block of `rows` registers: [rows][16] down its columns, transposed, and [16][rows] down its columns again.
AVX512_INLINE void rotate_rows_avx512(const float *x, const size_t rows, float *out) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 norm = _mm512_set1_ps(rotation_norm(rows * 16));
    __m512 row[16], mixed[16];
    _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
        __mmask16 minus = (__mmask16)(rotation_signs[r / 2] >> r % 2 * 16);
        row[r] = _mm512_loadu_ps(x + r * 16);
        row[r] = _mm512_mask_xor_ps(row[r], minus, row[r], _mm512_set1_ps(-0.0f));
    }
    hadamard_avx512(row, rows);
    // To shuffle the first half of the numbers into the second, as a pack of cards, once for each doubling of the rows, is to
    // transpose them.
    UNROLL for (size_t shuffled = 1; shuffled < rows; shuffled *= 2) {
        UNROLL for (size_t r = 0; r < rows / 2; r++) {
            mixed[2 * r] = _mm512_permutex2var_ps(row[r], low, row[r + rows / 2]);
            mixed[2 * r + 1] = _mm512_permutex2var_ps(row[r], high, row[r + rows / 2]);
        }
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) row[r] = mixed[r];
    }
    // A register has 16 / rows columns now: first sums and differences of those, then of registers.
    UNROLL for (size_t half = rows; half < 16; half *= 2) {
        __m512i other = _mm512_xor_si512(lanes, _mm512_set1_epi32((int)half));
        __mmask16 second = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32((int)half));
        UNROLL for (size_t r = 0; r < rows; r++) {
            __m512 partner = _mm512_permutexvar_ps(other, row[r]);
            row[r] = _mm512_mask_sub_ps(_mm512_add_ps(row[r], partner), second, partner, row[r]);
        }
    }
    hadamard_avx512(row, rows);
    _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) _mm512_storeu_ps(out + r * 16, _mm512_mul_ps(row[r], norm));
}

AVX512 static void rotate_columns_avx512(const float *x, size_t n, float *out) {
    switch (n) {
    case 32: rotate_rows_avx512(x, 2, out); break;
    case 64: rotate_rows_avx512(x, 4, out); break;
    case 128: rotate_rows_avx512(x, 8, out); break;
    default: rotate_rows_avx512(x, 16, out);
    }
}

AVX512 static void quantize_keys_avx512(const float *x, size_t rows, uint8_t *block) { quantize_keys_body(x, rows, block); }
AVX512 static void quantize_values_avx512(const float *x, size_t rows, size_t first, float *scales, uint8_t *panels) {
    quantize_values_body(x, rows, first, scales, panels);
}

AVX512 static void store_tile_avx512(const float *tile, size_t n, bool add, float *out, size_t stride) {
    store_tile_body(tile, n, add, out, stride);
}

AVX512 static uint64_t read_probe_avx512(const uint8_t *bytes, size_t count, size_t ahead, bool pages) {
    READ_PROBE_BODY(Vector512, bytes, count, ahead, pages)
}

static void multiply_probe_avx512(uint64_t rounds) {
#define STEP(i) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #i "\n"
    PROBE_LOOP(PROBE_REGISTERS(STEP));
#undef STEP
}

static const struct Kernels avx512_kernels = {
    .name = "avx512",
    .product = {[DTYPE_F32] = product_f32_avx512, [DTYPE_BF16] = product_bf16_avx512, [DTYPE_F8] = product_f8_avx512,
                [DTYPE_Q8] = product_q8_avx512, [DTYPE_Q4] = product_q4_avx512, [DTYPE_Q6] = product_q6_avx512,
                [DTYPE_F16] = product_f16_avx512},
    .unpack = {[DTYPE_Q8] = unpack_q8_avx512, [DTYPE_Q4] = unpack_q4_avx512, [DTYPE_Q6] = unpack_q6_avx512},
    .multiply_unpacked = {[DTYPE_Q8] = multiply_unpacked_avx512, [DTYPE_Q4] = multiply_unpacked_avx512, [DTYPE_Q6] = multiply_unpacked_avx512},
    .quantize_block = quantize_block_avx512,
    .rotate_columns = rotate_columns_avx512,
    .store_tile = store_tile_avx512,
    .dot = dot_avx512,
    .find_maximum = find_maximum_avx512,
    .quantize_keys = quantize_keys_avx512,
    .quantize_values = quantize_values_avx512,
    .exp_row = exp_row_avx512,
    .silu_multiply = silu_multiply_avx512,
    .float_to_half = float_to_half_avx512,
    .read_probe = read_probe_avx512,
    .multiply_probe = multiply_probe_avx512,
    .macs_per_round = 14 * 64,
};

#endif
