// AVX2 forms of the kernels, for processors with FMA and F16C (Intel since Haswell, AMD since Zen), and a second table
// for those that can multiply and add bytes in one instruction (AVX-VNNI: Intel since Alder Lake, AMD since Zen 5).
//
// Panels keep 32 rows side by side, so a vector holds 8 rows and no sum ever crosses lanes. There are 16 registers: one
// or two tokens take all 32 rows at a time, three or four take 16, and more tokens go in groups of four. The number of
// tokens is a constant inside each instance, so that sums live in registers. Every function has the same name and
// meaning as its portable form in r1.c.
#ifndef R1_AVX2_KERNELS
#define R1_AVX2_KERNELS

#include <cpuid.h>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE INLINE AVX2

// FINISH keeps gcc from computing all products of a step first and adding them later, for which it lacks registers. clang does not do
// that, and is slower with it.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define FINISH(sum)
#else
#define UNROLL _Pragma("GCC unroll 8")
#define FINISH(sum) __asm__ volatile("" : "+x"(sum))
#endif

// The number in prefetching_ways of what was best on processors of this kind. Zen 4 fetches ahead well by itself once it sees the lines
// in order and in time: it wants no more than a hint of the next ones. Zen 3 and Zen 5 want weights from further away, in the first
// cache; they pass the second by there, where inputs, cache and code stay. Intel's want them in the second.
static size_t guess_prefetching(void) {
    unsigned eax, ebx, ecx, edx;
    if (__builtin_cpu_is("intel")) return 2;
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
    if (family >= 0x1a) return 4;                                          // since Zen 5
    return __builtin_cpu_supports("avx512f") ? 0 : 3;                      // Zen 4; up to Zen 3
}

// Asks for the 128 bytes so far behind w. An address that is not there is no error.
INLINE void prefetch_weights(const void *w) {
    const uint8_t *first = (const uint8_t *)((uintptr_t)w + prefetching.bytes);
    if (prefetching.first_only) __builtin_prefetch(first, 0, 0), __builtin_prefetch(first + 64, 0, 0);
    else __builtin_prefetch(first, 0, 2), __builtin_prefetch(first + 64, 0, 2);
}

// Four quants of a token in every lane.
AVX2_INLINE __m256i broadcast_quants_avx2(const int8_t *quants) {
    int32_t four;
    memcpy(&four, quants, sizeof four);
    return _mm256_set1_epi32(four);
}

// Two floats, over and over.
AVX2_INLINE __m256 broadcast_pair_avx2(const float *pair) {
    double both;
    memcpy(&both, pair, sizeof both);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
}

AVX2_INLINE __m256i load_bytes_avx2(const void *bytes) { return _mm256_loadu_si256((const __m256i *)bytes); }
AVX2_INLINE void store_bytes_avx2(void *bytes, __m256i vector) { _mm256_storeu_si256((__m256i *)bytes, vector); }

// The sums of the lanes of four vectors.
AVX2_INLINE __m128 sum_lanes_avx2(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// ---- products of a panel
// Each NAME_tile takes n (1 to 4) and vectors (how many vectors of 8 rows at a time) as constants. Between blocks of 256
// columns the sums rest in out, which does not change their bits.

#define AVX2_PRODUCT(name, tile, ...)                                                                                   \
    AVX2 static void name(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {               \
        for (; n > 4; n -= 4, x += 4, out += 4 * PANEL_ROWS) tile(panel, cols, x, 4, 2, out __VA_ARGS__);               \
        switch (n) {                                                                                                    \
        case 1: tile(panel, cols, x, 1, 4, out __VA_ARGS__); break;                                                     \
        case 2: tile(panel, cols, x, 2, 4, out __VA_ARGS__); break;                                                     \
        case 3: tile(panel, cols, x, 3, 2, out __VA_ARGS__); break;                                                     \
        case 4: tile(panel, cols, x, 4, 2, out __VA_ARGS__); break;                                                     \
        }                                                                                                               \
    }

// Floats, or half-precision numbers: [cols][32].
AVX2_INLINE void product_floats_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                          const size_t vectors, float *out, const bool halves) {
    const size_t size = halves ? 2 : 4;
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK)
        for (size_t row = 0; row < PANEL_ROWS; row += 8 * vectors) {
            size_t end = min_size(first + K_BLOCK, cols);
            __m256 sum[4][4];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++)
                    sum[t][v] = _mm256_loadu_ps(out + t * PANEL_ROWS + row + 8 * v);
            for (size_t k = first; k < end; k++) {
                const uint8_t *column = panel + (k * PANEL_ROWS + row) * size;
                if (row == 0) prefetch_weights(column);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    const uint8_t *eight = column + 8 * v * size;
                    __m256 weights = halves ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)eight))
                                            : _mm256_loadu_ps((const float *)(const void *)eight);
                    UNROLL for (size_t t = 0; t < n; t++)
                        sum[t][v] = _mm256_fmadd_ps(weights, _mm256_set1_ps(x[t].values[k]), sum[t][v]);
                }
            }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++)
                    _mm256_storeu_ps(out + t * PANEL_ROWS + row + 8 * v, sum[t][v]);
        }
}

// A lane holds two columns of a row; each is the upper half of a float.
AVX2_INLINE void product_bf16_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                        const size_t vectors, float *out) {
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK)
        for (size_t row = 0; row < PANEL_ROWS; row += 8 * vectors) {
            size_t end = min_size(first + K_BLOCK, cols);
            __m256 sum[4][4];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++)
                    sum[t][v] = _mm256_loadu_ps(out + t * PANEL_ROWS + row + 8 * v);
            for (size_t k = first; k < end; k += 2) {
                const uint8_t *two = panel + k * PANEL_ROWS * 2 + row * 4; // [cols/2][32][2]
                if (row == 0) prefetch_weights(two);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    __m256i pairs = load_bytes_avx2(two + 32 * v);
                    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
                    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
                    UNROLL for (size_t t = 0; t < n; t++) {
                        sum[t][v] = _mm256_fmadd_ps(even, _mm256_set1_ps(x[t].values[k]), sum[t][v]);
                        sum[t][v] = _mm256_fmadd_ps(odd, _mm256_set1_ps(x[t].values[k + 1]), sum[t][v]);
                    }
                }
            }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++)
                    _mm256_storeu_ps(out + t * PANEL_ROWS + row + 8 * v, sum[t][v]);
        }
}

// An E4M3 number's bits, one place further right in 16, are a half-precision number 2^-8 times as large, subnormals
// included, and the conversion of those to float costs no more than that of others (arithmetic with subnormal floats
// costs over a hundred cycles on Intel). Columns 0 and 2 of each four come out side by side in the lanes, and so do 1
// and 3: a row has two sums, added up at the end. The halves of 32 columns go through memory because converting what is
// there takes half the operations of converting half a register. The group's scale goes into the tokens' values.
AVX2_INLINE void product_f8_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                      const size_t vectors, float *out) {
    const __m256i half_bits = _mm256_set1_epi16((int16_t)0xbf80);
    const size_t rows = 4 * vectors;                                       // at a time
    float sums[4][PANEL_ROWS * 2];
    memset(sums, 0, n * sizeof *sums);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [8], one for each 32 columns
        const uint8_t *w = panel + block_head_bytes(DTYPE_F8, length);     // [length/4][32][4]
        for (size_t group = 0; group < length; group += K_GROUP) {
            // [8 fours][columns 0 and 2, columns 1 and 3][32 rows][2]
            uint16_t halves[K_GROUP * PANEL_ROWS] __attribute__((aligned(64)));
            for (size_t i = 0; i < K_GROUP * PANEL_ROWS; i += 4 * PANEL_ROWS, w += 4 * PANEL_ROWS) {
                prefetch_weights(w);
                UNROLL for (size_t v = 0; v < 4; v++) {
                    __m256i codes = load_bytes_avx2(w + 32 * v);
                    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1), odd = _mm256_srai_epi16(codes, 1);
                    store_bytes_avx2(halves + i + 16 * v, _mm256_and_si256(even, half_bits));
                    store_bytes_avx2(halves + i + 64 + 16 * v, _mm256_and_si256(odd, half_bits));
                }
            }
            float values[4][K_GROUP] __attribute__((aligned(64))); // columns 0, 2, 1, 3 of each four
            __m256 scale = _mm256_set1_ps(scales[group / K_GROUP] * 256.0f);
            for (size_t t = 0; t < n; t++)
                for (size_t k = 0; k < K_GROUP; k += 8)
                    _mm256_storeu_ps(
                        values[t] + k,
                        _mm256_mul_ps(_mm256_permute_ps(_mm256_loadu_ps(x[t].values + first + group + k), 0xd8), scale));
            for (size_t row = 0; row < PANEL_ROWS; row += rows) {
                __m256 sum[4][8];
                UNROLL for (size_t t = 0; t < n; t++)
                    UNROLL for (size_t v = 0; v < rows / 4; v++) sum[t][v] = _mm256_loadu_ps(sums[t] + 2 * row + 8 * v);
                for (size_t k = 0; k < K_GROUP; k += 2) {
                    const uint16_t *two = halves + k * PANEL_ROWS + 2 * row;
                    UNROLL for (size_t v = 0; v < rows / 4; v++) {
                        __m256 weights = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(two + 8 * v)));
                        UNROLL for (size_t t = 0; t < n; t++)
                            sum[t][v] = _mm256_fmadd_ps(weights, broadcast_pair_avx2(values[t] + k), sum[t][v]);
                    }
                }
                UNROLL for (size_t t = 0; t < n; t++)
                    UNROLL for (size_t v = 0; v < rows / 4; v++) _mm256_storeu_ps(sums[t] + 2 * row + 8 * v, sum[t][v]);
            }
        }
        panel = w;
    }
    for (size_t t = 0; t < n; t++)
        for (size_t row = 0; row < PANEL_ROWS; row += 8) {
            __m256 eight = _mm256_hadd_ps(_mm256_loadu_ps(sums[t] + 2 * row), _mm256_loadu_ps(sums[t] + 2 * row + 8));
            eight =
                _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(eight), 0xd8)); // rows 0 1 4 5 2 3 6 7 before
            _mm256_storeu_ps(out + t * PANEL_ROWS + row, eight);
        }
}

// sum + the products of four pairs of bytes in each lane. With vnni the weights are unsigned (128 was added); without, both
// are signed, and |weight| times the quant with the weight's sign keeps the intermediate sums of two within 16 bits.
AVX2_INLINE __m256i add_byte_products_avx2(__m256i sum, __m256i weights, __m256i quants, const bool vnni) {
    if (vnni) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(quants));
        return sum;
    }
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(quants, weights));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    FINISH(sum);
    return sum;
}

// The sums of 8 rows over a block, times their scales, are added to what is in out.
AVX2_INLINE void add_scaled_avx2(float *out, __m256i sum, __m256 scale, bool is_first) {
    __m256 before = is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(out);
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, before));
}

AVX2_INLINE void product_q8_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                      const size_t vectors, float *out, const bool vnni) {
    const __m256i flip = vnni ? _mm256_set1_epi8((char)0x80) : _mm256_setzero_si256();   // adds 128
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q8, length);     // [length/4][32][4]
        int32_t start[4] = {0};                                            // takes back the 128 times each quant
        for (size_t t = 0; vnni && t < n; t++) start[t] = -128 * x[t].block_sums[first / K_BLOCK];
        for (size_t row = 0; row < PANEL_ROWS; row += 8 * vectors) {
            __m256i sum[4][4];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = _mm256_set1_epi32(start[t]);
            for (size_t k = 0; k < length; k += 4) {
                const uint8_t *four = w + k * PANEL_ROWS + row * 4;
                if (row == 0) prefetch_weights(four);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    __m256i weights = _mm256_xor_si256(load_bytes_avx2(four + 32 * v), flip);
                    UNROLL for (size_t t = 0; t < n; t++)
                        sum[t][v] = add_byte_products_avx2(sum[t][v], weights,
                                                           broadcast_quants_avx2(x[t].quants + first + k), vnni);
                }
            }
            UNROLL for (size_t t = 0; t < n; t++) {
                __m256 x_scale = _mm256_set1_ps(x[t].scales[first / K_BLOCK]);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    size_t r = row + 8 * v;
                    add_scaled_avx2(out + t * PANEL_ROWS + r, sum[t][v],
                                    _mm256_mul_ps(_mm256_loadu_ps(scales + r), x_scale), first == 0);
                }
            }
        }
        panel = w + value_bytes(DTYPE_Q8, length);
    }
}

// part + the products of 8 rows' weights (low: columns 0 to 3 of eight, high: 4 to 7) and a token's quants, times the rows' scales,
// 16-bit numbers that stand twice in each lane. |quant| is multiplied by the weight with the quant's sign: the magnitudes of one
// token's quants serve all rows. In one piece, since compilers that may move its eight instructions about run out of registers.
AVX2_INLINE __m256i add_scaled_products_avx2(__m256i part, __m256i low, __m256i high, const __m256i *quants,
                                             const __m256i *magnitudes, __m256i scales) {
    __asm__("vpsignb %3, %1, %1\n\t"
            "vpsignb %4, %2, %2\n\t"
            "vpmaddubsw %1, %5, %1\n\t"
            "vpmaddubsw %2, %6, %2\n\t"
            "vpmaddwd %7, %1, %1\n\t"
            "vpmaddwd %7, %2, %2\n\t"
            "vpaddd %1, %0, %0\n\t"
            "vpaddd %2, %0, %0"
            : "+x"(part), "+&x"(low), "+&x"(high)
            : "x"(quants[0]), "x"(quants[1]), "x"(magnitudes[0]), "x"(magnitudes[1]), "x"(scales));
    return part;
}

// Decode on a processor without VNNI, which may be limited by instructions rather than by memory: each group's scales go into the
// products where pairs of them are added up, instead of into the group's sum.
AVX2_INLINE void product_q4_one_token_avx2(const uint8_t *panel, size_t cols, const struct Row *x, float *out) {
    const __m128i single_table = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m256i table = _mm256_broadcastsi128_si256(single_table), nibble = _mm256_set1_epi8(15);
    const __m256i each_four_times = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, //
                                                     4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    panel += panel_head_bytes(DTYPE_Q4);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const uint8_t *sub = panel;                                        // [length/32][32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        const int8_t *q = x->quants + first;
        for (size_t i = 0; i < block_head_bytes(DTYPE_Q4, length); i += 128) prefetch_weights(sub + i);
        __m256i part[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        for (size_t group = 0; group < length; group += K_GROUP, sub += PANEL_ROWS) {
            __m256i scales[4], shift = _mm256_set1_epi32(Q4_SHIFT * x->sums[(first + group) / K_GROUP] & 0xffff); // in the lower 16 bits
            UNROLL for (size_t v = 0; v < 4; v++) {
                int64_t eight;
                memcpy(&eight, sub + 8 * v, sizeof eight);
                __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), each_four_times);
                __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi8(-2));
                __m256i is_shifted = _mm256_and_si256(bytes, _mm256_set1_epi32(1));
                scales[v] = _mm256_srai_epi16(even, 8);
                part[v] = _mm256_add_epi32(part[v], _mm256_madd_epi16(_mm256_maddubs_epi16(is_shifted, even), shift));
            }
            UNROLL for (size_t k = 0; k < K_GROUP; k += 8, q += 8, w += 4 * PANEL_ROWS) {
                __asm__ volatile("" : "+r"(w), "+r"(q));                   // gcc would mix the steps and run out of registers
                prefetch_weights(w);
                const __m256i quants[2] = {broadcast_quants_avx2(q), broadcast_quants_avx2(q + 4)};
                const __m256i magnitudes[2] = {_mm256_abs_epi8(quants[0]), _mm256_abs_epi8(quants[1])};
                UNROLL for (size_t v = 0; v < 4; v++) {
                    __m256i pairs = load_bytes_avx2(w + 32 * v);
                    __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, nibble));
                    __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble));
                    part[v] = add_scaled_products_avx2(part[v], low, high, quants, magnitudes, scales[v]);
                }
            }
        }
        __m256 x_scale = _mm256_set1_ps(x->scales[first / K_BLOCK]);
        UNROLL for (size_t v = 0; v < 4; v++) add_scaled_avx2(out + 8 * v, part[v], x_scale, first == 0);
        panel = w;
    }
    for (size_t i = 0; i < PANEL_ROWS; i += 8)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(out + i), _mm256_loadu_ps(row_scales + i)));
}

// The table values get 128 added where vnni asks for it, and the shift of a row that has it is not added to its weights
// but, times the sum of the 32 quants, to the sum.
AVX2_INLINE void product_q4_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                      const size_t vectors, float *out, const bool vnni) {
    if (n == 1 && !vnni) {
        // Two instances of the same lines, each of which knows how it asks for weights and need not look at every step.
        if (prefetching.first_only) product_q4_one_token_avx2(panel, cols, x, out);
        else product_q4_one_token_avx2(panel, cols, x, out);
        return;
    }
    const __m256i flip = vnni ? _mm256_set1_epi8((char)0x80) : _mm256_setzero_si256();
    const __m128i signed_table = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m256i table = _mm256_xor_si256(_mm256_broadcastsi128_si256(signed_table), flip);
    const __m256i nibble = _mm256_set1_epi8(15);
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    panel += panel_head_bytes(DTYPE_Q4);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const uint8_t *sub = panel;                                        // [length/32][32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        for (size_t i = 0; i < block_head_bytes(DTYPE_Q4, length); i += 128) prefetch_weights(sub + i);
        for (size_t row = 0; row < PANEL_ROWS; row += 8 * vectors) {
            __m256i part[4][4];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) part[t][v] = _mm256_setzero_si256();
            for (size_t group = 0; group < length; group += K_GROUP) {
                __m256i sum[4][4];
                UNROLL for (size_t t = 0; t < n; t++)
                    UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = _mm256_setzero_si256();
                for (size_t k = group; k < group + K_GROUP; k += 8) {
                    const uint8_t *eight = w + k * PANEL_ROWS / 2 + row * 4;
                    if (row == 0) prefetch_weights(eight);
                    UNROLL for (size_t v = 0; v < vectors; v++) {
                        __m256i pairs = load_bytes_avx2(eight + 32 * v);
                        __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, nibble));
                        __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble));
                        UNROLL for (size_t t = 0; t < n; t++) {
                            const int8_t *q = x[t].quants + first + k;
                            sum[t][v] = add_byte_products_avx2(sum[t][v], low, broadcast_quants_avx2(q), vnni);
                            sum[t][v] = add_byte_products_avx2(sum[t][v], high, broadcast_quants_avx2(q + 4), vnni);
                        }
                    }
                }
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    const __m128i *bytes =
                        (const __m128i *)(const void *)(sub + group + row + 8 * v); // [group / 32][32]
                    __m256i scale = _mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes));
                    // Q4_SHIFT or 0 in each lane, less the 128 of vnni.
                    __m256i shift =
                        _mm256_mullo_epi16(_mm256_and_si256(scale, _mm256_set1_epi32(1)), _mm256_set1_epi32(Q4_SHIFT));
                    if (vnni) shift = _mm256_sub_epi32(shift, _mm256_set1_epi32(128));
                    scale = _mm256_and_si256(scale, _mm256_set1_epi32(-2));
                    UNROLL for (size_t t = 0; t < n; t++) {
                        __m256i shifts =
                            _mm256_mullo_epi32(shift, _mm256_set1_epi32(x[t].sums[(first + group) / K_GROUP]));
                        __m256i products = _mm256_mullo_epi32(_mm256_add_epi32(sum[t][v], shifts), scale);
                        part[t][v] = _mm256_add_epi32(part[t][v], products);
                    }
                }
            }
            UNROLL for (size_t t = 0; t < n; t++) {
                __m256 x_scale = _mm256_set1_ps(x[t].scales[first / K_BLOCK]);
                UNROLL for (size_t v = 0; v < vectors; v++)
                    add_scaled_avx2(out + t * PANEL_ROWS + row + 8 * v, part[t][v], x_scale, first == 0);
            }
        }
        panel = w + value_bytes(DTYPE_Q4, length);
    }
    for (size_t i = 0; i < n * PANEL_ROWS; i += 8)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(out + i), _mm256_loadu_ps(row_scales + i % PANEL_ROWS)));
}

// The codes of 8 rows and four of 16 columns, the i-th ones: a nibble of `pairs` with two bits of `tops` above it.
AVX2_INLINE __m256i join_q6_avx2(__m256i pairs, __m256i tops, const size_t i) {
    __m256i nibbles = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(pairs, 4) : pairs, _mm256_set1_epi8(15));
    __m256i above = i == 0   ? _mm256_slli_epi16(tops, 4)
                    : i == 1 ? _mm256_slli_epi16(tops, 2)
                    : i == 2 ? tops
                             : _mm256_srli_epi16(tops, 2);
    return _mm256_or_si256(nibbles, _mm256_and_si256(above, _mm256_set1_epi8(0x30)));
}

// Codes are unsigned, 0 to 63: sums start at -32 times the sum of the token's quants, and the products of four of them with
// quants fit in 16 bits.
AVX2_INLINE void product_q6_avx2_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                      const size_t vectors, float *out, const bool vnni) {
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q6, length);     // [length/16][384]
        for (size_t row = 0; row < PANEL_ROWS; row += 8 * vectors) {
            __m256i sum[4][4];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++)
                    sum[t][v] = _mm256_set1_epi32(-Q6_ZERO * x[t].block_sums[first / K_BLOCK]);
            for (size_t k = 0; k < length; k += Q6_COLUMNS) {
                const uint8_t *sixteen = w + k / Q6_COLUMNS * Q6_BYTES + row * 4;
                for (size_t i = 0; row == 0 && i < Q6_BYTES; i += 128) prefetch_weights(sixteen + i);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    __m256i tops = load_bytes_avx2(sixteen + 32 * v);
                    UNROLL for (size_t i = 0; i < 4; i += 2) {
                        __m256i pairs = load_bytes_avx2(sixteen + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS + 32 * v);
                        __m256i low = join_q6_avx2(pairs, tops, i), high = join_q6_avx2(pairs, tops, i + 1);
                        UNROLL for (size_t t = 0; t < n; t++) {
                            const int8_t *quants = x[t].quants + first + k + 4 * i;
                            __m256i q_low = broadcast_quants_avx2(quants), q_high = broadcast_quants_avx2(quants + 4);
                            if (vnni) {
                                sum[t][v] = add_byte_products_avx2(sum[t][v], low, q_low, true);
                                sum[t][v] = add_byte_products_avx2(sum[t][v], high, q_high, true);
                            } else {
                                __m256i pair_sums =
                                    _mm256_add_epi16(_mm256_maddubs_epi16(low, q_low), _mm256_maddubs_epi16(high, q_high));
                                sum[t][v] = _mm256_add_epi32(sum[t][v], _mm256_madd_epi16(pair_sums, _mm256_set1_epi16(1)));
                            }
                        }
                    }
                }
            }
            UNROLL for (size_t t = 0; t < n; t++) {
                __m256 x_scale = _mm256_set1_ps(x[t].scales[first / K_BLOCK]);
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    size_t r = row + 8 * v;
                    add_scaled_avx2(out + t * PANEL_ROWS + r, sum[t][v],
                                    _mm256_mul_ps(_mm256_loadu_ps(scales + r), x_scale), first == 0);
                }
            }
        }
        panel = w + value_bytes(DTYPE_Q6, length);
    }
}

#define NO_MORE
#define WITHOUT , false
#define WITH , true
AVX2_PRODUCT(product_f32_avx2, product_floats_avx2_tile, WITHOUT)
AVX2_PRODUCT(product_f16_avx2, product_floats_avx2_tile, WITH)
AVX2_PRODUCT(product_bf16_avx2, product_bf16_avx2_tile, NO_MORE)
AVX2_PRODUCT(product_f8_avx2, product_f8_avx2_tile, NO_MORE)
AVX2_PRODUCT(product_q8_avx2, product_q8_avx2_tile, WITHOUT)
AVX2_PRODUCT(product_q4_avx2, product_q4_avx2_tile, WITHOUT)
AVX2_PRODUCT(product_q6_avx2, product_q6_avx2_tile, WITHOUT)
AVX2_PRODUCT(product_q8_avxvnni, product_q8_avx2_tile, WITH)
AVX2_PRODUCT(product_q4_avxvnni, product_q4_avx2_tile, WITH)
AVX2_PRODUCT(product_q6_avxvnni, product_q6_avx2_tile, WITH)

// ---- products of many tokens
// Unpacked weights have 128 added for AVX-VNNI. For plain AVX2 those of q6 stay codes, 0 to 63, and others are split into
// magnitudes and signs, further below.

AVX2 static void unpack_q8_avxvnni(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                   float *scales) {
    const __m256i flip = _mm256_set1_epi8((char)0x80);
    const uint8_t *block = panel + panel_bytes(DTYPE_Q8, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        block += block_head_bytes(DTYPE_Q8, length);
        for (size_t i = 0; i < length * PANEL_ROWS; i += 32)
            store_bytes_avx2(bytes + i, _mm256_xor_si256(load_bytes_avx2(block + i), flip));
        block += value_bytes(DTYPE_Q8, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

// Values of 8 rows and four columns times their rows' ratios, rounded. A row's ratio stands in both halves of its lane:
// even and odd bytes are multiplied as 16-bit numbers.
AVX2_INLINE __m256i scale_q4_avx2(__m256i values, __m256i ratios) {
    __m256i even = _mm256_mulhrs_epi16(_mm256_srai_epi16(_mm256_slli_epi16(values, 8), 8), ratios);
    __m256i odd = _mm256_mulhrs_epi16(_mm256_srai_epi16(values, 8), ratios);
    return _mm256_blendv_epi8(even, _mm256_slli_epi16(odd, 8), _mm256_set1_epi16((int16_t)0xff00));
}

AVX2_INLINE void unpack_q4_avx2_any(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                    float *scales, const bool vnni) {
    const __m256i flip = vnni ? _mm256_set1_epi8((char)0x80) : _mm256_setzero_si256();
    const __m128i signed_table = _mm_loadu_si128((const __m128i *)(const void *)Q4_TABLE);
    const __m256i table = _mm256_broadcastsi128_si256(signed_table), nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi32(1);
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
        uint8_t row_largest[PANEL_ROWS];
        store_bytes_avx2(row_largest, largest);
        __m256 inverse[4];
        UNROLL for (size_t v = 0; v < 4; v++) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(const void *)(row_largest + 8 * v));
            __m256 whole = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
            __m256 used = _mm256_cmp_ps(whole, _mm256_setzero_ps(), _CMP_GT_OQ);
            inverse[v] = _mm256_and_ps(used, _mm256_div_ps(_mm256_set1_ps(32767.0f), whole));
            _mm256_storeu_ps(scales + 8 * v, _mm256_mul_ps(_mm256_loadu_ps(row_scales + 8 * v), whole));
        }
        for (size_t g = 0; g < groups; g++)
            UNROLL for (size_t v = 0; v < 4; v++) {
                const void *sub_bytes = block + g * PANEL_ROWS + 8 * v;
                __m256i sub = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)sub_bytes));
                __m256i shifted = _mm256_cmpeq_epi32(_mm256_and_si256(sub, one), one);
                __m256i shift = _mm256_and_si256(shifted, _mm256_set1_epi8(Q4_SHIFT));
                __m256 scale = _mm256_cvtepi32_ps(_mm256_andnot_si256(one, sub));
                __m256i ratios = _mm256_cvtps_epi32(_mm256_mul_ps(scale, inverse[v]));
                ratios = _mm256_blend_epi16(ratios, _mm256_slli_epi32(ratios, 16), 0xaa);
                for (size_t k = g * K_GROUP; k < (g + 1) * K_GROUP; k += 8) {
                    const uint8_t *eight = w + k * PANEL_ROWS / 2 + 32 * v;
                    if (v == 0) prefetch_weights(eight);
                    __m256i pairs = load_bytes_avx2(eight);
                    __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, nibble));
                    __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble));
                    low = scale_q4_avx2(_mm256_add_epi8(low, shift), ratios);
                    high = scale_q4_avx2(_mm256_add_epi8(high, shift), ratios);
                    uint8_t *out = bytes + k * PANEL_ROWS + 32 * v;
                    store_bytes_avx2(out, _mm256_xor_si256(low, flip));
                    store_bytes_avx2(out + 4 * PANEL_ROWS, _mm256_xor_si256(high, flip));
                }
            }
        block = w + value_bytes(DTYPE_Q4, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

AVX2 static void unpack_q4_avxvnni(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                   float *scales) {
    unpack_q4_avx2_any(panel, cols, first, depth, bytes, scales, true);
}

AVX2_INLINE void unpack_q6_avx2_any(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                    float *scales, const bool vnni) {
    const __m256i offset = _mm256_set1_epi8((char)(vnni ? 128 - Q6_ZERO : 0));
    const uint8_t *block = panel + panel_bytes(DTYPE_Q6, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        block += block_head_bytes(DTYPE_Q6, length);
        for (size_t k = 0; k < length; k += Q6_COLUMNS, block += Q6_BYTES)
            UNROLL for (size_t v = 0; v < 128; v += 32) {
                __m256i tops = load_bytes_avx2(block + v);
                UNROLL for (size_t i = 0; i < 4; i++) {
                    const uint8_t *eight = block + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS;
                    __m256i codes = join_q6_avx2(load_bytes_avx2(eight + v), tops, i);
                    uint8_t *four = bytes + (k + 4 * i) * PANEL_ROWS + v;
                    _mm256_storeu_si256((__m256i *)(void *)four, _mm256_add_epi8(codes, offset));
                }
            }
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

AVX2 static void unpack_q6_avx2(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    unpack_q6_avx2_any(panel, cols, first, depth, bytes, scales, false);
}

AVX2 static void unpack_q6_avxvnni(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes,
                                   float *scales) {
    unpack_q6_avx2_any(panel, cols, first, depth, bytes, scales, true);
}

// ---- and their products

// A k-block of int8 weights, [length/4][32][4], as plain AVX2 multiplies it: [length/4][magnitudes, masks][32][4], a mask being
// -1 where the weight is negative. Flipping a quant's bits by the mask makes q or -q - 1 of it, in one operation that any vector
// unit does, while the instruction that gives it a weight's sign competes with the multiplications. Each row's sum lacks the
// magnitudes of its negative weights then; those follow, [32] int32, for the sums to start from.
AVX2_INLINE void split_signs_avx2(const uint8_t *w, size_t length, uint8_t *split) {
    __m256i lacking[4];
    UNROLL for (size_t v = 0; v < 4; v++) lacking[v] = _mm256_setzero_si256();
    for (size_t k = 0; k < length; k += 4, w += 4 * PANEL_ROWS, split += 8 * PANEL_ROWS)
        UNROLL for (size_t v = 0; v < 4; v++) {
            __m256i weights = load_bytes_avx2(w + 32 * v), magnitudes = _mm256_abs_epi8(weights);
            __m256i mask = _mm256_cmpgt_epi8(_mm256_setzero_si256(), weights);
            store_bytes_avx2(split + 32 * v, magnitudes);
            store_bytes_avx2(split + 4 * PANEL_ROWS + 32 * v, mask);
            __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_abs_epi8(mask));
            lacking[v] = _mm256_add_epi32(lacking[v], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    UNROLL for (size_t v = 0; v < 4; v++) store_bytes_avx2(split + 32 * v, lacking[v]);
}

AVX2_INLINE void unpack_split_avx2(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales,
                                   const bool is_q4) {
    for (size_t start = first; start < first + depth; start += K_BLOCK, bytes += UNPACKED_BLOCK_BYTES, scales += PANEL_ROWS) {
        size_t length = min_size(K_BLOCK, first + depth - start);
        uint8_t weights[K_BLOCK * PANEL_ROWS] __attribute__((aligned(64)));
        if (is_q4) unpack_q4_avx2_any(panel, cols, start, length, weights, scales, false);
        else unpack_q8(panel, cols, start, length, weights, scales);
        split_signs_avx2(weights, length, bytes);
    }
}

AVX2 static void unpack_q8_avx2(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    unpack_split_avx2(panel, cols, first, depth, bytes, scales, false);
}

AVX2 static void unpack_q4_avx2(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    unpack_split_avx2(panel, cols, first, depth, bytes, scales, true);
}

// Adds to sum[0] and sum[1] the products of 16 rows' magnitudes and four quants of a token, flipped by the rows' masks. In one
// piece, since compilers that may move its eight instructions about run out of registers.
AVX2_INLINE void add_flipped_products_avx2(__m256i *sum, __m256i quants, __m256i magnitudes0, __m256i magnitudes1,
                                           const uint8_t *masks) {
    const __m256i *mask = (const __m256i *)(const void *)masks, one = _mm256_set1_epi16(1);
    __m256i products0, products1;
    __asm__("vpxor %6, %4, %2\n\t"
            "vpxor %7, %4, %3\n\t"
            "vpmaddubsw %2, %8, %2\n\t"
            "vpmaddubsw %3, %9, %3\n\t"
            "vpmaddwd %5, %2, %2\n\t"
            "vpmaddwd %5, %3, %3\n\t"
            "vpaddd %2, %0, %0\n\t"
            "vpaddd %3, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(products0), "=&x"(products1)
            : "x"(quants), "x"(one), "m"(mask[0]), "m"(mask[1]), "x"(magnitudes0), "x"(magnitudes1));
}

// Adds to sum[0] and sum[1] the products of 16 rows' q6 codes, [2 fours][2], and eight quants of a token: four of them fit in 16 bits.
AVX2_INLINE void add_code_products_avx2(__m256i *sum, __m256i quants0, __m256i quants1, const __m256i (*codes)[2]) {
    const __m256i one = _mm256_set1_epi16(1);
    __m256i products0, products1;
    __asm__("vpmaddubsw %4, %6, %2\n\t"
            "vpmaddubsw %4, %7, %3\n\t"
            "vpmaddubsw %5, %8, %4\n\t"
            "vpmaddubsw %5, %9, %5\n\t"
            "vpaddw %4, %2, %2\n\t"
            "vpaddw %5, %3, %3\n\t"
            "vpmaddwd %10, %2, %2\n\t"
            "vpmaddwd %10, %3, %3\n\t"
            "vpaddd %2, %0, %0\n\t"
            "vpaddd %3, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(products0), "=&x"(products1), "+&x"(quants0), "+&x"(quants1)
            : "x"(codes[0][0]), "x"(codes[0][1]), "x"(codes[1][0]), "x"(codes[1][1]), "x"(one));
}

// What unpacked weights look like.
enum Unpacked { SPLIT, CODES, UNSIGNED };

// The products of a k-block with n tokens, 16 rows at a time, to or, with `add`, added to out. w is what split_signs_avx2() made,
// or [length/4][32][4] q6 codes or, for AVX-VNNI, weights to which 128 was added.
AVX2_INLINE void multiply_block_avx2_tile(const uint8_t *w, const float *scales, size_t length, const struct Row *x, size_t first,
                                          const size_t n, bool add, float *out, size_t stride, const enum Unpacked form) {
    const size_t four = (form == SPLIT ? 8 : 4) * PANEL_ROWS, columns = form == SPLIT ? 4 : form == CODES ? 8 : 16;
    const int8_t *quants[6];
    UNROLL for (size_t t = 0; t < n; t++) quants[t] = x[t].quants + first;
    for (size_t row = 0; row < PANEL_ROWS; row += 16) {
        const uint8_t *rows = w + row * 4;
        __m256i sum[6][2];
        UNROLL for (size_t t = 0; t < n; t++)
            if (form == SPLIT) {
                sum[t][0] = load_bytes_avx2(rows + length / 4 * four);
                sum[t][1] = load_bytes_avx2(rows + length / 4 * four + 32);
            } else {
                sum[t][0] = sum[t][1] = _mm256_set1_epi32((form == CODES ? -Q6_ZERO : -128) * x[t].block_sums[first / K_BLOCK]);
            }
        // Columns come in 32s: with VNNI four steps in a row need no end of the loop between them; without, compilers would
        // mix the steps and run out of registers.
        for (size_t k = 0; k < length; k += columns, rows += columns / 4 * four) {
            if (form == CODES) {
                const __m256i codes[2][2] = {{load_bytes_avx2(rows), load_bytes_avx2(rows + 32)},
                                             {load_bytes_avx2(rows + four), load_bytes_avx2(rows + four + 32)}};
                UNROLL for (size_t t = 0; t < n; t++)
                    add_code_products_avx2(sum[t], broadcast_quants_avx2(quants[t] + k), broadcast_quants_avx2(quants[t] + k + 4), codes);
                continue;
            }
            UNROLL for (size_t i = 0; i < columns / 4; i++) {
                __m256i w0 = load_bytes_avx2(rows + i * four), w1 = load_bytes_avx2(rows + i * four + 32);
                UNROLL for (size_t t = 0; t < n; t++) {
                    __m256i q = broadcast_quants_avx2(quants[t] + k + 4 * i);
                    if (form == SPLIT) {
                        add_flipped_products_avx2(sum[t], q, w0, w1, rows + 4 * PANEL_ROWS);
                    } else {
                        sum[t][0] = add_byte_products_avx2(sum[t][0], w0, q, true);
                        sum[t][1] = add_byte_products_avx2(sum[t][1], w1, q, true);
                    }
                }
            }
        }
        __m256 scale0 = _mm256_loadu_ps(scales + row), scale1 = _mm256_loadu_ps(scales + row + 8);
        UNROLL for (size_t t = 0; t < n; t++) {
            __m256 x_scale = _mm256_set1_ps(x[t].scales[first / K_BLOCK]);
            float *o = out + t * stride + row;
            add_scaled_avx2(o, sum[t][0], _mm256_mul_ps(scale0, x_scale), !add);
            add_scaled_avx2(o + 8, sum[t][1], _mm256_mul_ps(scale1, x_scale), !add);
        }
    }
}

// Tokens go in groups of equal size, as nearly as possible: with VNNI up to six, whose 12 sums hide the latency of its additions,
// otherwise as many as there are registers for.
#define AVX2_MULTIPLY(name, form, largest_group, block_bytes)                                                           \
    AVX2 static void name(const uint8_t *w, const float *scales, size_t depth, const struct Row *x, size_t first, size_t n, \
                          bool add, float *out, size_t stride) {                                                        \
        for (size_t start = 0; start < depth; start += K_BLOCK, w += block_bytes, scales += PANEL_ROWS) {               \
            size_t length = min_size(K_BLOCK, depth - start), at = first + start;                                       \
            for (size_t t = 0, groups = ceil_div(n, largest_group), count; t < n; t += count, groups--) {               \
                count = ceil_div(n - t, groups);                                                                        \
                switch (count) {                                                                                        \
                    AVX2_TILE(1, form, largest_group) AVX2_TILE(2, form, largest_group)                                 \
                    AVX2_TILE(3, form, largest_group) AVX2_TILE(4, form, largest_group)                                 \
                    AVX2_TILE(5, form, largest_group) AVX2_TILE(6, form, largest_group)                                 \
                }                                                                                                       \
            }                                                                                                           \
        }                                                                                                               \
    }
#define AVX2_TILE(n, form, largest_group)                                                                               \
    case n:                                                                                                             \
        if (n <= largest_group)                                                                                         \
            multiply_block_avx2_tile(w, scales, length, x + t, at, n, add || start, out + t * stride, stride, form);    \
        break;
AVX2_MULTIPLY(multiply_split_avx2, SPLIT, 5, UNPACKED_BLOCK_BYTES)
AVX2_MULTIPLY(multiply_codes_avx2, CODES, 3, K_BLOCK * PANEL_ROWS)
AVX2_MULTIPLY(multiply_unpacked_avxvnni, UNSIGNED, 6, K_BLOCK * PANEL_ROWS)

// ---- everything else

AVX2 static void quantize_block_avx2(const float *x, size_t cols, int8_t *quants, float *scale, int32_t *sums,
                                     int32_t *block_sum) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest8 = _mm256_setzero_ps();
    // max_ps(a, b) is a > b ? a : b, so a not-a-number in a leaves b.
    for (size_t k = 0; k < cols; k += 8)
        largest8 = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + k), no_sign), largest8);
    __m128 largest4 = _mm_max_ps(_mm256_castps256_ps128(largest8), _mm256_extractf128_ps(largest8, 1));
    largest4 = _mm_max_ps(largest4, _mm_movehl_ps(largest4, largest4));
    float largest = _mm_cvtss_f32(_mm_max_ss(largest4, _mm_movehdup_ps(largest4)));
    *scale = largest < INFINITY ? largest / 127.0f : 0.0f;
    float inverse = *scale > 1e-38f ? 1.0f / *scale : 0.0f;
    if (!(inverse > 0)) *scale = 0;
    *block_sum = 0;
    for (size_t group = 0; group < cols; group += K_GROUP) {
        __m256i nearest[4];
        UNROLL for (size_t v = 0; v < 4; v++) {
            __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + group + 8 * v), _mm256_set1_ps(inverse));
            scaled = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f));
            nearest[v] = _mm256_cvtps_epi32(scaled);                       // to nearest even
        }
        __m256i words0 = _mm256_packs_epi32(nearest[0], nearest[1]), words1 = _mm256_packs_epi32(nearest[2], nearest[3]);
        // The packs work on each 128 bits apart: groups of four come out as 0 2 4 6 1 3 5 7.
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        store_bytes_avx2(quants + group, bytes);
        __m256i sum8 =
            _mm256_add_epi32(_mm256_add_epi32(nearest[0], nearest[1]), _mm256_add_epi32(nearest[2], nearest[3]));
        __m128i sum4 = _mm_add_epi32(_mm256_castsi256_si128(sum8), _mm256_extracti128_si256(sum8, 1));
        sum4 = _mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0x4e));
        sums[group / K_GROUP] = _mm_cvtsi128_si32(_mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0xb1)));
        *block_sum += sums[group / K_GROUP];
    }
}

AVX2 static float dot_avx2(const float *x, const float *y, size_t n) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        UNROLL for (size_t v = 0; v < 4; v++)
            sum[v] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * v), _mm256_loadu_ps(y + i + 8 * v), sum[v]);
    for (; i + 8 <= n; i += 8) sum[0] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), sum[0]);
    __m128 sums = sum_lanes_avx2(sum[0], sum[1], sum[2], sum[3]);
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    float total = _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
    for (; i < n; i++) total += x[i] * y[i];
    return total;
}

AVX2 static float find_maximum_avx2(const float *x, size_t n) {
    __m256 largest8 = _mm256_set1_ps(-INFINITY);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) largest8 = _mm256_max_ps(_mm256_loadu_ps(x + i), largest8);
    __m128 largest4 = _mm_max_ps(_mm256_castps256_ps128(largest8), _mm256_extractf128_ps(largest8, 1));
    largest4 = _mm_max_ps(largest4, _mm_movehl_ps(largest4, largest4));
    float largest = _mm_cvtss_f32(_mm_max_ss(largest4, _mm_movehdup_ps(largest4)));
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// exp_float() of 8 numbers.
AVX2_INLINE __m256 exp_avx2(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), x);
    __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(p, r), r, r), _mm256_set1_ps(1.0f));
    __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift));
}

AVX2 static float exp_row_avx2(float *x, float maximum, const float *scales, size_t n) {
    const __m256 largest = _mm256_set1_ps(maximum);
    __m256 sum = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 value = exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), largest));
        _mm256_storeu_ps(x + i, scales ? _mm256_mul_ps(value, _mm256_loadu_ps(scales + i)) : value);
        sum = _mm256_add_ps(sum, value);
    }
    float total = _mm_cvtss_f32(sum_lanes_avx2(sum, sum, sum, sum));
    for (; i < n; i++) {
        float value = exp_float(x[i] - maximum);
        x[i] = scales ? value * scales[i] : value;
        total += value;
    }
    return total;
}

AVX2 static void silu_multiply_avx2(float *gate, const float *up, size_t n) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp_avx2(_mm256_xor_ps(g, sign))));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
    silu_multiply_body(gate + i, up + i, n - i);
}

AVX2 static void float_to_half_avx2(const float *x, uint16_t *half, size_t n) {
    const __m256 largest = _mm256_set1_ps(65504.0f), sign = _mm256_set1_ps(-0.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i);
        // A not-a-number becomes the plain one with its sign; min and max return their second operand for it.
        __m256 plain = _mm256_or_ps(_mm256_and_ps(value, sign), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
        __m256 limited = _mm256_max_ps(_mm256_xor_ps(largest, sign), _mm256_min_ps(largest, value));
        limited = _mm256_blendv_ps(limited, plain, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        _mm_storeu_si128((__m128i *)(void *)(half + i), _mm256_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++) half[i] = half_from_float(x[i]);
}

// One stage of hadamard_down(), and all of it, of 4, 8 or 16 rows that stand in registers.
AVX2_INLINE void hadamard_stage_avx2(__m256 *row, const size_t rows, const size_t half) {
    _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
        if (r & half) continue;
        __m256 sum = _mm256_add_ps(row[r], row[r + half]);
        row[r + half] = _mm256_sub_ps(row[r], row[r + half]);
        row[r] = sum;
    }
}

AVX2_INLINE void hadamard_avx2(__m256 *row, const size_t rows) {
    hadamard_stage_avx2(row, rows, 1);
    hadamard_stage_avx2(row, rows, 2);
    if (rows > 4) hadamard_stage_avx2(row, rows, 4);
    if (rows > 8) hadamard_stage_avx2(row, rows, 8);
}

// Two vectors of 4 floats, one in each half.
AVX2_INLINE __m256 load_halves_avx2(const float *low, const float *high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}

// A block of [rows][16] down its columns, 8 of them at a time, and transposed, [16][rows], down its columns again. Of 4 rows the
// transposed ones have 4 columns; those stand in both halves of a register then.
AVX2_INLINE void rotate_rows_avx2(const float *x, const size_t rows, float *out) {
    float turned[K_BLOCK] __attribute__((aligned(32)));
    const __m256 sign = _mm256_set1_ps(-0.0f), norm = _mm256_set1_ps(rotation_norm(rows * 16));
    const __m256i place = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    __m256 row[16];
    for (size_t c = 0; c < 16; c += 8) {
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
            // Each column's bit, shifted to where a float has its sign.
            __m256i bits = _mm256_set1_epi32((int32_t)(rotation_signs[r / 2] >> (r % 2 * 16 + c)));
            __m256 minus = _mm256_and_ps(_mm256_castsi256_ps(_mm256_sllv_epi32(bits, place)), sign);
            row[r] = _mm256_xor_ps(_mm256_loadu_ps(x + r * 16 + c), minus);
        }
        hadamard_avx2(row, rows);
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) _mm256_store_ps(turned + r * 16 + c, row[r]);
    }
    const size_t fifth = rows == 4 ? 0 : 64;             // the row in the upper half beside the first
    for (size_t r = 0; r < rows; r += 8) {               // rows r to r + 7, transposed, are columns r to r + 7
        UNROLL for (size_t c = 0; c < 16; c += 4) {
            const float *from = turned + r * 16 + c;
            __m256 a0 = load_halves_avx2(from, from + fifth), a1 = load_halves_avx2(from + 16, from + 16 + fifth);
            __m256 a2 = load_halves_avx2(from + 32, from + 32 + fifth), a3 = load_halves_avx2(from + 48, from + 48 + fifth);
            __m256 b0 = _mm256_unpacklo_ps(a0, a1), b1 = _mm256_unpackhi_ps(a0, a1);
            __m256 b2 = _mm256_unpacklo_ps(a2, a3), b3 = _mm256_unpackhi_ps(a2, a3);
            row[c] = _mm256_shuffle_ps(b0, b2, 0x44), row[c + 1] = _mm256_shuffle_ps(b0, b2, 0xee);
            row[c + 2] = _mm256_shuffle_ps(b1, b3, 0x44), row[c + 3] = _mm256_shuffle_ps(b1, b3, 0xee);
        }
        hadamard_avx2(row, 16);
        _Pragma("GCC unroll 16") for (size_t c = 0; c < 16; c++) {
            __m256 rotated = _mm256_mul_ps(row[c], norm);
            if (rows == 4) _mm_storeu_ps(out + c * rows, _mm256_castps256_ps128(rotated));
            else _mm256_storeu_ps(out + c * rows + r, rotated);
        }
    }
}

// Whole k-blocks, and what a q8 cache rotates: heads, mostly of 128 columns, and MLA's 64 that carry the position.
AVX2 static void rotate_columns_avx2(const float *x, size_t n, float *out) {
    switch (n) {
    case 64: rotate_rows_avx2(x, 4, out); break;
    case 128: rotate_rows_avx2(x, 8, out); break;
    case 256: rotate_rows_avx2(x, 16, out); break;
    default: rotate_columns_body(x, n, out);
    }
}

// ---- what `r1 bench` measures the processor's limits with
// A multiplying loop repeats one instruction on as many registers as it takes to hide that instruction's latency.

#define PROBE_REGISTERS(STEP) \
    STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)
#define PROBE_LOOP(body)                                                                                                \
    __asm__ volatile("1:\n" body "dec %0\n jnz 1b\n vzeroupper\n"                                                      \
                     : "+r"(rounds) : : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",   \
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

AVX2 static void quantize_keys_avx2(const float *x, size_t rows, uint8_t *block) { quantize_keys_body(x, rows, block); }
AVX2 static void quantize_values_avx2(const float *x, size_t rows, size_t first, float *scales, uint8_t *panels) {
    quantize_values_body(x, rows, first, scales, panels);
}

AVX2 static void store_tile_avx2(const float *tile, size_t n, bool add, float *out, size_t stride) {
    store_tile_body(tile, n, add, out, stride);
}

AVX2 static uint64_t read_probe_avx2(const uint8_t *bytes, size_t count, size_t ahead, bool pages) {
    READ_PROBE_BODY(Vector256, bytes, count, ahead, pages)
}

// Products of 8 bits, their sums of 16 and of 32: three instructions for 32 multiply-adds.
static void multiply_probe_avx2(uint64_t rounds) {
#define STEP(t, i) "vpmaddubsw %%ymm0, %%ymm1, %%ymm" #t "\n vpmaddwd %%ymm2, %%ymm" #t ", %%ymm" #t "\n"               \
                   "vpaddd %%ymm" #t ", %%ymm" #i ", %%ymm" #i "\n"
    PROBE_LOOP(STEP(3, 9) STEP(4, 10) STEP(5, 11) STEP(6, 12) STEP(7, 13) STEP(8, 14));
#undef STEP
}

static void multiply_probe_avxvnni(uint64_t rounds) {
#define STEP(i) "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm" #i "\n"
    PROBE_LOOP(PROBE_REGISTERS(STEP));
#undef STEP
}

// CPUID leaf 1, ECX bit 29: conversion from and to half precision.
static bool has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

// CPUID leaf 7, subleaf 1, EAX bit 4. Compilers of 2022 do not know the names of these two. The caller has checked for
// AVX2, and with it that the operating system keeps the registers.
static bool has_avxvnni(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;    // eax: the last subleaf
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

#define AVX2_TABLE(table, q8, q4, q6, unpacking_q8, unpacking_q4, unpacking_q6, multiplying, multiplying_q6, probe, macs) \
    {                                                                                                                   \
        .name = table,                                                                                                  \
        .product = {[DTYPE_F32] = product_f32_avx2, [DTYPE_BF16] = product_bf16_avx2, [DTYPE_F8] = product_f8_avx2,     \
                    [DTYPE_Q8] = q8, [DTYPE_Q4] = q4, [DTYPE_Q6] = q6, [DTYPE_F16] = product_f16_avx2},                 \
        .unpack = {[DTYPE_Q8] = unpacking_q8, [DTYPE_Q4] = unpacking_q4, [DTYPE_Q6] = unpacking_q6},                    \
        .multiply_unpacked = {[DTYPE_Q8] = multiplying, [DTYPE_Q4] = multiplying, [DTYPE_Q6] = multiplying_q6},          \
        .quantize_block = quantize_block_avx2,                                                                          \
        .rotate_columns = rotate_columns_avx2,                                                                          \
        .store_tile = store_tile_avx2,                                                                                  \
        .dot = dot_avx2,                                                                                                \
        .find_maximum = find_maximum_avx2,                                                                              \
        .quantize_keys = quantize_keys_avx2,                                                                            \
        .quantize_values = quantize_values_avx2,                                                                        \
        .exp_row = exp_row_avx2,                                                                                        \
        .silu_multiply = silu_multiply_avx2,                                                                            \
        .float_to_half = float_to_half_avx2,                                                                            \
        .read_probe = read_probe_avx2,                                                                                  \
        .multiply_probe = probe,                                                                                        \
        .macs_per_round = macs,                                                                                         \
    }

static const struct Kernels avx2_kernels =
    AVX2_TABLE("avx2", product_q8_avx2, product_q4_avx2, product_q6_avx2, unpack_q8_avx2, unpack_q4_avx2, unpack_q6_avx2,
               multiply_split_avx2, multiply_codes_avx2, multiply_probe_avx2, 6 * 32);
static const struct Kernels avxvnni_kernels =
    AVX2_TABLE("avxvnni", product_q8_avxvnni, product_q4_avxvnni, product_q6_avxvnni, unpack_q8_avxvnni, unpack_q4_avxvnni,
               unpack_q6_avxvnni, multiply_unpacked_avxvnni, multiply_unpacked_avxvnni, multiply_probe_avxvnni, 14 * 32);

#endif
