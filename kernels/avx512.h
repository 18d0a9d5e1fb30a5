// AVX-512 forms of the kernels, for processors with VNNI and VBMI (Intel Ice Lake, AMD Zen 4, and later).
//
// Panels keep 32 rows side by side, so a vector holds 16 rows and no sum ever crosses lanes: 32 rows times one token are
// two accumulators, and up to 8 tokens share each weight that was loaded. One token is bound by memory; with 8 the dot
// products are the limit. Written with intrinsics in the same shape as the portable functions of r1.c, which say what
// each one computes; the number of tokens is a constant inside each instance, so that accumulators live in registers.
#ifndef R1_AVX512_KERNELS
#define R1_AVX512_KERNELS

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

#ifdef __clang__
#define UNROLL_TOKENS _Pragma("clang loop unroll(full)")
#else
#define UNROLL_TOKENS _Pragma("GCC unroll 8")
#endif

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

// ---- products of a panel

// Adds the products of four columns, [32][4], with n tokens to sum[t]: rows 0-15 and 16-31.
AVX512_INLINE void add_columns_q8_avx512(__m512i (*sum)[2], const uint8_t *four, const int8_t *const *quants, size_t k, const size_t n) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i w0 = _mm512_xor_si512(_mm512_loadu_si512(four), flip);
    __m512i w1 = _mm512_xor_si512(_mm512_loadu_si512(four + 64), flip);
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
        __m512i q = broadcast_quants_avx512(quants[t] + k);
        sum[t][0] = add_byte_products_avx512(sum[t][0], w0, q);
        sum[t][1] = add_byte_products_avx512(sum[t][1], w1, q);
    }
}

// The instruction multiplies unsigned by signed bytes: weights get 128 added (their sign bit flipped), and the
// accumulators start at -128 times the sum of the token's quants.
//
// An addition into an accumulator takes 4 to 5 cycles, so few tokens keep the processor busy only with a second set of
// accumulators for every other four columns. Integers add up to the same sum in any order.
AVX512_INLINE void product_q8_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n, float *out) {
    const int8_t *quants[TILE_TOKENS];
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) quants[t] = x[t].quants;
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q8, length);     // [length/4][32][4]
        __m512i sum[TILE_TOKENS][2], other[TILE_TOKENS][2];
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
            int32_t quant_sum = 0;
            for (size_t g = 0; g < length / K_GROUP; g++) quant_sum += x[t].sums[first / K_GROUP + g];
            sum[t][0] = sum[t][1] = _mm512_set1_epi32(-128 * quant_sum);
            other[t][0] = other[t][1] = _mm512_setzero_si512();
        }
        if (n < 4) {
            for (size_t k = 0; k < length; k += 8) {
                add_columns_q8_avx512(sum, w + k * PANEL_ROWS, quants, first + k, n);
                add_columns_q8_avx512(other, w + (k + 4) * PANEL_ROWS, quants, first + k + 4, n);
            }
            UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
                sum[t][0] = _mm512_add_epi32(sum[t][0], other[t][0]);
                sum[t][1] = _mm512_add_epi32(sum[t][1], other[t][1]);
            }
        } else {
            for (size_t k = 0; k < length; k += 4) add_columns_q8_avx512(sum, w + k * PANEL_ROWS, quants, first + k, n);
        }
        __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
            float *o = out + t * PANEL_ROWS;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[first / K_BLOCK]);
            __m512 before0 = first ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = first ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), _mm512_mul_ps(scale0, x_scale), before0));
            _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][1]), _mm512_mul_ps(scale1, x_scale), before1));
        }
        panel = w + value_bytes(DTYPE_Q8, length);
    }
}

// Both nibbles of every byte become table values plus 128 by one byte permutation each: it looks at 6 bits of an index,
// the table stands there four times, so the two bits above a nibble do not matter. The 128 too many and the shift of a
// row that has it are in what the accumulators start from: (shift - 128) times the sum of the 32 quants.
AVX512_INLINE void product_q4_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n, float *out) {
    const __m128i signed_table = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(signed_table, _mm_set1_epi8((char)0x80)));
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    panel += panel_head_bytes(DTYPE_Q4);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const uint8_t *sub = panel;                                        // [length/32][32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        __m512i part[TILE_TOKENS][2];
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) part[t][0] = part[t][1] = _mm512_setzero_si512();
        for (size_t group = 0; group < length; group += K_GROUP) {
            __m256i sub_bytes = _mm256_loadu_si256((const __m256i *)(const void *)(sub + group));
            __mmask32 shifted = _mm256_test_epi8_mask(sub_bytes, _mm256_set1_epi8(1));
            sub_bytes = _mm256_and_si256(sub_bytes, _mm256_set1_epi8((char)0xfe));
            __m512i sum[TILE_TOKENS][2];
            UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
                int32_t quant_sum = x[t].sums[(first + group) / K_GROUP];
                __m512i plain = _mm512_set1_epi32(-128 * quant_sum), with_shift = _mm512_set1_epi32((Q4_SHIFT - 128) * quant_sum);
                sum[t][0] = _mm512_mask_mov_epi32(plain, (__mmask16)shifted, with_shift);
                sum[t][1] = _mm512_mask_mov_epi32(plain, (__mmask16)(shifted >> 16), with_shift);
            }
            const uint8_t *eight = w + group * PANEL_ROWS / 2;
            for (size_t k = first + group; k < first + group + K_GROUP; k += 8, eight += 8 * PANEL_ROWS / 2) {
                __m512i pairs0 = _mm512_loadu_si512(eight), pairs1 = _mm512_loadu_si512(eight + 64);
                __m512i low0 = _mm512_permutexvar_epi8(pairs0, table), low1 = _mm512_permutexvar_epi8(pairs1, table);
                __m512i high0 = _mm512_permutexvar_epi8(_mm512_srli_epi32(pairs0, 4), table);
                __m512i high1 = _mm512_permutexvar_epi8(_mm512_srli_epi32(pairs1, 4), table);
                UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
                    __m512i q_low = broadcast_quants_avx512(x[t].quants + k), q_high = broadcast_quants_avx512(x[t].quants + k + 4);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], low0, q_low);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], low1, q_low);
                    sum[t][0] = add_byte_products_avx512(sum[t][0], high0, q_high);
                    sum[t][1] = add_byte_products_avx512(sum[t][1], high1, q_high);
                }
            }
            __m512i sub0 = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(sub_bytes));
            __m512i sub1 = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(sub_bytes, 1));
            UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
                part[t][0] = _mm512_add_epi32(part[t][0], _mm512_mullo_epi32(sum[t][0], sub0));
                part[t][1] = _mm512_add_epi32(part[t][1], _mm512_mullo_epi32(sum[t][1], sub1));
            }
        }
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
            float *o = out + t * PANEL_ROWS;
            __m512 x_scale = _mm512_set1_ps(x[t].scales[first / K_BLOCK]);
            __m512 before0 = first ? _mm512_loadu_ps(o) : _mm512_setzero_ps();
            __m512 before1 = first ? _mm512_loadu_ps(o + 16) : _mm512_setzero_ps();
            _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[t][0]), x_scale, before0));
            _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[t][1]), x_scale, before1));
        }
        panel = w + value_bytes(DTYPE_Q4, length);
    }
    __m512 scale0 = _mm512_loadu_ps(row_scales), scale1 = _mm512_loadu_ps(row_scales + 16);
    for (size_t t = 0; t < n; t++) {
        float *o = out + t * PANEL_ROWS;
        _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), scale0));
        _mm512_storeu_ps(o + 16, _mm512_mul_ps(_mm512_loadu_ps(o + 16), scale1));
    }
}

// Weights of two float vectors a column: 16 rows each.
AVX512_INLINE void product_f32_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n, float *out) {
    const float *w = (const float *)(const void *)panel;                   // [cols][32]
    __m512 sum[TILE_TOKENS][2];
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < cols; k++, w += PANEL_ROWS) {
        __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
            __m512 value = _mm512_set1_ps(x[t].values[k]);
            sum[t][0] = _mm512_fmadd_ps(w0, value, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(w1, value, sum[t][1]);
        }
    }
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_ps(out + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

// A lane holds two columns of a row; each is the upper half of a float.
AVX512_INLINE void product_bf16_avx512_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n, float *out) {
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512 sum[TILE_TOKENS][2];
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < cols; k += 2, panel += 2 * 2 * PANEL_ROWS) {    // [cols/2][32][2]
        __m512i pairs0 = _mm512_loadu_si512(panel), pairs1 = _mm512_loadu_si512(panel + 64);
        __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs0, 16)), odd0 = _mm512_castsi512_ps(_mm512_and_si512(pairs0, upper));
        __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs1, 16)), odd1 = _mm512_castsi512_ps(_mm512_and_si512(pairs1, upper));
        UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
            __m512 even = _mm512_set1_ps(x[t].values[k]), odd = _mm512_set1_ps(x[t].values[k + 1]);
            sum[t][0] = _mm512_fmadd_ps(even0, even, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(even1, even, sum[t][1]);
            sum[t][0] = _mm512_fmadd_ps(odd0, odd, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(odd1, odd, sum[t][1]);
        }
    }
    UNROLL_TOKENS for (size_t t = 0; t < n; t++) {
        _mm512_storeu_ps(out + t * PANEL_ROWS, sum[t][0]);
        _mm512_storeu_ps(out + t * PANEL_ROWS + 16, sum[t][1]);
    }
}

AVX512_PRODUCT(product_f32_avx512)
AVX512_PRODUCT(product_bf16_avx512)
AVX512_PRODUCT(product_q8_avx512)
AVX512_PRODUCT(product_q4_avx512)

static const struct Kernels avx512_kernels = {
    .name = "avx512",
    .product = {[DTYPE_F32] = product_f32_avx512, [DTYPE_BF16] = product_bf16_avx512, [DTYPE_F8] = product_f8,
                [DTYPE_Q8] = product_q8_avx512, [DTYPE_Q4] = product_q4_avx512},
    .quantize_row = quantize_row_portable,
    .dot = dot_portable,
    .score_rows = score_rows_portable,
    .mix_rows = mix_rows_portable,
    .exp_row = exp_row_portable,
    .silu_multiply = silu_multiply_portable,
    .half_to_float = half_to_float_portable,
    .float_to_half = float_to_half_portable,
    .int8_to_float = int8_to_float_portable,
};

#endif
