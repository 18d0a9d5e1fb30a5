// NEON forms of the kernels, for 64-bit ARM processors.
//
// Panels keep 32 rows side by side, so a vector holds 4 rows and no sum ever crosses lanes. There are 32 registers: one
// or two tokens take all 32 rows at a time, three or four take 16, and more tokens go in groups of four. Bytes are
// multiplied by the best instructions that the processor has, found when the program starts: dot products (most since
// ARMv8.2, every Apple one), small matrix products (i8mm: ARMv8.6), or widening multiplications; the sums, integers,
// have the same bits. What is not here is as fast in portable C, which the compiler turns into NEON anyway. Every
// function has the same name and meaning as its portable form in r1.c.
#ifndef R1_NEON_KERNELS
#define R1_NEON_KERNELS

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

// ---- what the processor has

enum ByteProducts { WIDENING, DOTPROD, I8MM };   // I8MM has DOTPROD, too
static enum ByteProducts best_products_neon;

__attribute__((constructor)) static void find_best_products_neon(void) {
    bool dotprod = false, i8mm = false;
#if defined(__linux__)
    dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
    i8mm = getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    dotprod = true;
    i8mm = sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, NULL, 0) == 0 && has;
#endif
    best_products_neon = !dotprod ? WIDENING : i8mm ? I8MM : DOTPROD;
}

// Assemblers refuse instructions that not every processor has in functions that are for all of them, and no attribute
// makes a function for some of them that gcc 12 and clang 14 both take and inline the rest into. So these instructions
// are written as numbers: `code` with the numbers of the registers, which the assembler looks up by their names.
#define NEON_INSTRUCTION(code, sum, a, b)                                                                               \
    __asm__(".ifndef .Lregister_v31\n"                                                                                  \
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,"  \
            " 27, 28, 29, 30, 31\n"                                                                                     \
            ".equ .Lregister_v\\n, \\n\n"                                                                               \
            ".endr\n"                                                                                                   \
            ".endif\n"                                                                                                  \
            ".inst " #code " + .Lregister_%2 * 0x10000 + .Lregister_%1 * 0x20 + .Lregister_%0"                          \
            : "+w"(sum) : "w"(a), "w"(b))
// sdot sum.4s, a.16b, b.16b: to each lane, the products of four pairs of bytes.
#define ADD_DOT_PRODUCTS(sum, a, b) NEON_INSTRUCTION(0x4e809400, sum, a, b)
// sdot sum.4s, a.16b, b.4b[lane]: the same with the four bytes of one lane of b.
#define ADD_LANE_PRODUCTS(sum, a, b, lane) NEON_INSTRUCTION(0x4f80e000 + (lane & 1) * 0x200000 + (lane >> 1) * 0x800, sum, a, b)
// smmla sum.4s, a.16b, b.16b: [2][8] times [2][8], transposed, is [2][2].
#define ADD_MATRIX_PRODUCTS(sum, a, b) NEON_INSTRUCTION(0x4e80a400, sum, a, b)

// Four quants of a token, over and over.
INLINE int8x16_t broadcast_quants_neon(const int8_t *quants) {
    int32_t four;
    memcpy(&four, quants, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// ---- products of a panel
// Each NAME_tile takes n (1 to 4) and vectors (how many vectors of 4 rows at a time) as constants. Between blocks of 256
// columns the sums rest in out, which does not change their bits.

#define NEON_PRODUCT(name, tile, ...)                                                                                   \
    static void name(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {                    \
        for (; n > 4; n -= 4, x += 4, out += 4 * PANEL_ROWS) tile(panel, cols, x, 4, 4, out __VA_ARGS__);               \
        switch (n) {                                                                                                    \
        case 1: tile(panel, cols, x, 1, 8, out __VA_ARGS__); break;                                                     \
        case 2: tile(panel, cols, x, 2, 8, out __VA_ARGS__); break;                                                     \
        case 3: tile(panel, cols, x, 3, 4, out __VA_ARGS__); break;                                                     \
        case 4: tile(panel, cols, x, 4, 4, out __VA_ARGS__); break;                                                     \
        }                                                                                                               \
    }

// Floats, or half-precision numbers: [cols][32].
INLINE void product_floats_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                     const size_t vectors, float *out, const bool halves) {
    const float *w = (const float *)(const void *)panel;
    const uint16_t *half = (const uint16_t *)(const void *)panel;
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK)
        for (size_t row = 0; row < PANEL_ROWS; row += 4 * vectors) {
            size_t end = min_size(first + K_BLOCK, cols);
            float32x4_t sum[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vld1q_f32(out + t * PANEL_ROWS + row + 4 * v);
            for (size_t k = first; k < end; k++)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    size_t at = k * PANEL_ROWS + row + 4 * v;
                    float32x4_t weights = halves ? vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + at))) : vld1q_f32(w + at);
                    UNROLL for (size_t t = 0; t < n; t++)
                        sum[t][v] = vfmaq_f32(sum[t][v], weights, vdupq_n_f32(x[t].values[k]));
                }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) vst1q_f32(out + t * PANEL_ROWS + row + 4 * v, sum[t][v]);
        }
}

// A lane holds two columns of a row; each is the upper half of a float.
INLINE void product_bf16_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                   const size_t vectors, float *out) {
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK)
        for (size_t row = 0; row < PANEL_ROWS; row += 4 * vectors) {
            size_t end = min_size(first + K_BLOCK, cols);
            float32x4_t sum[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vld1q_f32(out + t * PANEL_ROWS + row + 4 * v);
            for (size_t k = first; k < end; k += 2)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                uint32x4_t pairs =
                    vreinterpretq_u32_u8(vld1q_u8(panel + k * PANEL_ROWS * 2 + row * 4 + 16 * v)); // [cols/2][32][2]
                float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
                float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
                UNROLL for (size_t t = 0; t < n; t++) {
                    sum[t][v] = vfmaq_f32(sum[t][v], even, vdupq_n_f32(x[t].values[k]));
                    sum[t][v] = vfmaq_f32(sum[t][v], odd, vdupq_n_f32(x[t].values[k + 1]));
                }
                }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) vst1q_f32(out + t * PANEL_ROWS + row + 4 * v, sum[t][v]);
        }
}

// An E4M3 number's bits, one place further right in 16, are a half-precision number 2^-8 times as large, subnormals
// included. Columns 0 and 2 of each four come out side by side in the lanes, and so do 1 and 3: a row has two sums, added
// up at the end. The group's scale goes into the tokens' values.
INLINE void product_f8_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                 const size_t vectors, float *out) {
    const size_t rows = 2 * vectors;                                       // at a time: two vectors of sums for each 4
    const int16x8_t half_bits = vdupq_n_s16((int16_t)0xbf80);
    float sums[4][PANEL_ROWS * 2];
    memset(sums, 0, n * sizeof *sums);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [8], one for each 32 columns
        const uint8_t *w = panel + block_head_bytes(DTYPE_F8, length);     // [length/4][32][4]
        float values[4][K_BLOCK];                                          // columns 0, 2, 1, 3 of each four
        for (size_t t = 0; t < n; t++)
            for (size_t k = 0; k < length; k += 4) {
                const float *from = x[t].values + first + k;
                float scale = scales[k / K_GROUP] * 256.0f;
                values[t][k] = from[0] * scale, values[t][k + 1] = from[2] * scale;
                values[t][k + 2] = from[1] * scale, values[t][k + 3] = from[3] * scale;
            }
        for (size_t row = 0; row < PANEL_ROWS; row += rows) {
            float32x4_t sum[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vld1q_f32(sums[t] + 2 * row + 4 * v);
            for (size_t k = 0; k < length; k += 4)
                UNROLL for (size_t v = 0; v < vectors; v += 2) {
                    int16x8_t codes = vreinterpretq_s16_u8(vld1q_u8(w + k * PANEL_ROWS + row * 4 + 8 * v));
                    int16x8_t even_bits = vandq_s16(vshrq_n_s16(vshlq_n_s16(codes, 8), 1), half_bits);
                    int16x8_t odd_bits = vandq_s16(vshrq_n_s16(codes, 1), half_bits);
                    float16x8_t even = vreinterpretq_f16_s16(even_bits), odd = vreinterpretq_f16_s16(odd_bits);
                    float32x4_t even0 = vcvt_f32_f16(vget_low_f16(even)), even1 = vcvt_high_f32_f16(even);
                    float32x4_t odd0 = vcvt_f32_f16(vget_low_f16(odd)), odd1 = vcvt_high_f32_f16(odd);
                    UNROLL for (size_t t = 0; t < n; t++) {
                        float32x2_t pair0 = vld1_f32(values[t] + k), pair1 = vld1_f32(values[t] + k + 2);
                        float32x4_t even_values = vcombine_f32(pair0, pair0), odd_values = vcombine_f32(pair1, pair1);
                        sum[t][v] = vfmaq_f32(vfmaq_f32(sum[t][v], even0, even_values), odd0, odd_values);
                        sum[t][v + 1] = vfmaq_f32(vfmaq_f32(sum[t][v + 1], even1, even_values), odd1, odd_values);
                    }
                }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) vst1q_f32(sums[t] + 2 * row + 4 * v, sum[t][v]);
        }
        panel = w + value_bytes(DTYPE_F8, length);
    }
    for (size_t t = 0; t < n; t++)
        for (size_t row = 0; row < PANEL_ROWS; row += 4)
            vst1q_f32(out + t * PANEL_ROWS + row,
                      vpaddq_f32(vld1q_f32(sums[t] + 2 * row), vld1q_f32(sums[t] + 2 * row + 4)));
}

// The sub-scales of 4 rows, with their shift bits.
INLINE int32x4_t load_sub_scales_neon(const uint8_t *sub) {
    int32_t four;
    memcpy(&four, sub, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

// sum + the products of four pairs of bytes in each lane. Two products of at most 127 * 127 fit in 16 bits.
INLINE int32x4_t add_byte_products_neon(int32x4_t sum, int8x16_t weights, int8x16_t quants, const bool dotprod) {
    if (dotprod) {
        ADD_DOT_PRODUCTS(sum, weights, quants);
        return sum;
    }
    int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(quants)), high = vmull_high_s8(weights, quants);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
}

INLINE void product_q8_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                 const size_t vectors, float *out, const bool dotprod) {
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q8, length);     // [length/4][32][4]
        for (size_t row = 0; row < PANEL_ROWS; row += 4 * vectors) {
            int32x4_t sum[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vdupq_n_s32(0);
            for (size_t k = 0; k < length; k += 4)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w + k * PANEL_ROWS + row * 4 + 16 * v));
                    UNROLL for (size_t t = 0; t < n; t++)
                        sum[t][v] = add_byte_products_neon(sum[t][v], weights,
                                                           broadcast_quants_neon(x[t].quants + first + k), dotprod);
                }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    float *o = out + t * PANEL_ROWS + row + 4 * v;
                    float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + row + 4 * v), x[t].scales[first / K_BLOCK]);
                    vst1q_f32(o, vfmaq_f32(vld1q_f32(o), vcvtq_f32_s32(sum[t][v]), scale));
                }
        }
        panel = w + value_bytes(DTYPE_Q8, length);
    }
}

INLINE void product_q4_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                 const size_t vectors, float *out, const bool dotprod) {
    const int8x16_t table = vld1q_s8(Q4_TABLE);
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    panel += panel_head_bytes(DTYPE_Q4);
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const uint8_t *sub = panel;                                        // [length/32][32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        for (size_t row = 0; row < PANEL_ROWS; row += 4 * vectors) {
            int32x4_t part[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) part[t][v] = vdupq_n_s32(0);
            for (size_t group = 0; group < length; group += K_GROUP) {
                int32x4_t sum[4][8];
                UNROLL for (size_t t = 0; t < n; t++)
                    UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vdupq_n_s32(0);
                for (size_t k = group; k < group + K_GROUP; k += 8)
                    UNROLL for (size_t v = 0; v < vectors; v++) {
                        uint8x16_t pairs = vld1q_u8(w + k * PANEL_ROWS / 2 + row * 4 + 16 * v);
                        int8x16_t low = vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15)));
                        int8x16_t high = vqtbl1q_s8(table, vshrq_n_u8(pairs, 4));
                        UNROLL for (size_t t = 0; t < n; t++) {
                            const int8_t *q = x[t].quants + first + k;
                            sum[t][v] = add_byte_products_neon(sum[t][v], low, broadcast_quants_neon(q), dotprod);
                            sum[t][v] = add_byte_products_neon(sum[t][v], high, broadcast_quants_neon(q + 4), dotprod);
                        }
                    }
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    int32x4_t scale = load_sub_scales_neon(sub + group + row + 4 * v);     // [group / 32][32]
                    int32x4_t shift = vmulq_n_s32(vandq_s32(scale, vdupq_n_s32(1)), Q4_SHIFT);
                    scale = vandq_s32(scale, vdupq_n_s32(-2));
                    UNROLL for (size_t t = 0; t < n; t++) {
                        int32x4_t shifted = vmlaq_n_s32(sum[t][v], shift, x[t].sums[(first + group) / K_GROUP]);
                        part[t][v] = vmlaq_s32(part[t][v], shifted, scale);
                    }
                }
            }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    float *o = out + t * PANEL_ROWS + row + 4 * v;
                    float32x4_t x_scale = vdupq_n_f32(x[t].scales[first / K_BLOCK]);
                    vst1q_f32(o, vfmaq_f32(vld1q_f32(o), vcvtq_f32_s32(part[t][v]), x_scale));
                }
        }
        panel = w + value_bytes(DTYPE_Q4, length);
    }
    for (size_t i = 0; i < n * PANEL_ROWS; i += 4)
        vst1q_f32(out + i, vmulq_f32(vld1q_f32(out + i), vld1q_f32(row_scales + i % PANEL_ROWS)));
}

// Values of 4 rows and four of 16 columns, the i-th ones: a nibble of `pairs` with two bits of `tops` above it, less 32.
INLINE int8x16_t join_q6_neon(uint8x16_t pairs, uint8x16_t tops, const size_t i) {
    uint8x16_t nibbles = i % 2 ? vshrq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(15));
    uint8x16_t above = i == 0 ? vshlq_n_u8(tops, 4) : i == 1 ? vshlq_n_u8(tops, 2) : i == 2 ? tops : vshrq_n_u8(tops, 2);
    uint8x16_t codes = vorrq_u8(nibbles, vandq_u8(above, vdupq_n_u8(0x30)));
    return vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(Q6_ZERO));
}

INLINE void product_q6_neon_tile(const uint8_t *panel, size_t cols, const struct Row *x, const size_t n,
                                 const size_t vectors, float *out, const bool dotprod) {
    memset(out, 0, n * PANEL_ROWS * sizeof *out);
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        const float *scales = (const float *)(const void *)panel;          // [32]
        const uint8_t *w = panel + block_head_bytes(DTYPE_Q6, length);     // [length/16][384]
        for (size_t row = 0; row < PANEL_ROWS; row += 4 * vectors) {
            int32x4_t sum[4][8];
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) sum[t][v] = vdupq_n_s32(0);
            for (size_t k = 0; k < length; k += Q6_COLUMNS) {
                const uint8_t *sixteen = w + k / Q6_COLUMNS * Q6_BYTES + row * 4;
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    uint8x16_t tops = vld1q_u8(sixteen + 16 * v);
                    UNROLL for (size_t i = 0; i < 4; i++) {
                        const uint8_t *eight = sixteen + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS;
                        int8x16_t weights = join_q6_neon(vld1q_u8(eight + 16 * v), tops, i);
                        UNROLL for (size_t t = 0; t < n; t++) {
                            const int8_t *q = x[t].quants + first + k + 4 * i;
                            sum[t][v] = add_byte_products_neon(sum[t][v], weights, broadcast_quants_neon(q), dotprod);
                        }
                    }
                }
            }
            UNROLL for (size_t t = 0; t < n; t++)
                UNROLL for (size_t v = 0; v < vectors; v++) {
                    float *o = out + t * PANEL_ROWS + row + 4 * v;
                    float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + row + 4 * v), x[t].scales[first / K_BLOCK]);
                    vst1q_f32(o, vfmaq_f32(vld1q_f32(o), vcvtq_f32_s32(sum[t][v]), scale));
                }
        }
        panel = w + value_bytes(DTYPE_Q6, length);
    }
}

#define NO_MORE
#define WITHOUT , false
#define WITH , true
NEON_PRODUCT(product_f32_neon, product_floats_neon_tile, WITHOUT)
NEON_PRODUCT(product_f16_neon, product_floats_neon_tile, WITH)
NEON_PRODUCT(product_bf16_neon, product_bf16_neon_tile, NO_MORE)
NEON_PRODUCT(product_f8_neon, product_f8_neon_tile, NO_MORE)
NEON_PRODUCT(product_q8_widening, product_q8_neon_tile, WITHOUT)
NEON_PRODUCT(product_q4_widening, product_q4_neon_tile, WITHOUT)
NEON_PRODUCT(product_q6_widening, product_q6_neon_tile, WITHOUT)
NEON_PRODUCT(product_q8_dotprod, product_q8_neon_tile, WITH)
NEON_PRODUCT(product_q4_dotprod, product_q4_neon_tile, WITH)
NEON_PRODUCT(product_q6_dotprod, product_q6_neon_tile, WITH)

static void product_q8_neon(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    (best_products_neon == WIDENING ? product_q8_widening : product_q8_dotprod)(panel, cols, x, n, out);
}

static void product_q4_neon(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    (best_products_neon == WIDENING ? product_q4_widening : product_q4_dotprod)(panel, cols, x, n, out);
}

static void product_q6_neon(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    (best_products_neon == WIDENING ? product_q6_widening : product_q6_dotprod)(panel, cols, x, n, out);
}

// ---- products of many tokens
// Unpacked weights are int8, [depth/4][32][4]; for matrix products eight columns of two rows stand together,
// [depth/8][16][2][8].

// Stores weights of 4 rows, [4][4] of columns 0 to 3 and [4][4] of 4 to 7, where `eight` has room for rows 0 to 31.
INLINE void store_columns_neon(uint8_t *eight, size_t row, int8x16_t low, int8x16_t high) {
    int8_t *out = (int8_t *)eight;
    if (best_products_neon == I8MM) {
        int32x4_t low4 = vreinterpretq_s32_s8(low), high4 = vreinterpretq_s32_s8(high);
        vst1q_s8(out + row * 8, vreinterpretq_s8_s32(vzip1q_s32(low4, high4)));
        vst1q_s8(out + row * 8 + 16, vreinterpretq_s8_s32(vzip2q_s32(low4, high4)));
    } else {
        vst1q_s8(out + row * 4, low);
        vst1q_s8(out + row * 4 + 4 * PANEL_ROWS, high);
    }
}

static void unpack_q8_neon(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const uint8_t *block = panel + panel_bytes(DTYPE_Q8, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        const int8_t *w = (const int8_t *)block + block_head_bytes(DTYPE_Q8, length);      // [length/4][32][4]
        for (size_t k = 0; k < length; k += 8)
            UNROLL for (size_t row = 0; row < PANEL_ROWS; row += 4) {
                const int8_t *four = w + k * PANEL_ROWS + row * 4;
                store_columns_neon(bytes + k * PANEL_ROWS, row, vld1q_s8(four), vld1q_s8(four + 4 * PANEL_ROWS));
            }
        block += block_head_bytes(DTYPE_Q8, length) + value_bytes(DTYPE_Q8, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

static void unpack_q6_neon(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const uint8_t *block = panel + panel_bytes(DTYPE_Q6, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        block += block_head_bytes(DTYPE_Q6, length);
        for (size_t k = 0; k < length; k += Q6_COLUMNS, block += Q6_BYTES)
            for (size_t row = 0; row < PANEL_ROWS; row += 4) {
                uint8x16_t tops = vld1q_u8(block + row * 4);
                int8x16_t four[4];
                UNROLL for (size_t i = 0; i < 4; i++)
                    four[i] = join_q6_neon(vld1q_u8(block + Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS + row * 4), tops, i);
                store_columns_neon(bytes + k * PANEL_ROWS, row, four[0], four[1]);
                store_columns_neon(bytes + (k + 8) * PANEL_ROWS, row, four[2], four[3]);
            }
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

// Values of 4 rows and four columns times their rows' ratios, [4][4] numbers of 16 bits each, rounded.
INLINE int8x16_t scale_q4_neon(int8x16_t values, int16x8x2_t ratios) {
    int16x8_t low = vqrdmulhq_s16(vmovl_s8(vget_low_s8(values)), ratios.val[0]);
    int16x8_t high = vqrdmulhq_s16(vmovl_high_s8(values), ratios.val[1]);
    return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
}

static void unpack_q4_neon(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const int8x16_t table = vld1q_s8(Q4_TABLE);
    const float *row_scales = (const float *)(const void *)panel;          // [32]
    const uint8_t *block = panel + panel_bytes(DTYPE_Q4, first);
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start), groups = length / K_GROUP;
        const uint8_t *w = block + block_head_bytes(DTYPE_Q4, length);     // [length/8][32][4]
        for (size_t row = 0; row < PANEL_ROWS; row += 4) {
            int32x4_t largest = vdupq_n_s32(0);
            for (size_t g = 0; g < groups; g++) {
                int32x4_t sub = load_sub_scales_neon(block + g * PANEL_ROWS + row);
                largest = vmaxq_s32(largest, vabsq_s32(vandq_s32(sub, vdupq_n_s32(-2))));
            }
            float32x4_t whole = vcvtq_f32_s32(largest);
            vst1q_f32(scales + row, vmulq_f32(vld1q_f32(row_scales + row), whole));
            uint32x4_t used = vcgtq_s32(largest, vdupq_n_s32(0));
            float32x4_t inverse = vdivq_f32(vdupq_n_f32(32767.0f), whole);
            inverse = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(inverse), used));
            for (size_t g = 0; g < groups; g++) {
                int32x4_t sub = load_sub_scales_neon(block + g * PANEL_ROWS + row);
                uint32x4_t shifted = vtstq_s32(sub, vdupq_n_s32(1));
                int8x16_t shift = vandq_s8(vreinterpretq_s8_u32(shifted), vdupq_n_s8(Q4_SHIFT));
                float32x4_t scale = vcvtq_f32_s32(vandq_s32(sub, vdupq_n_s32(-2)));
                int16x4_t ratio = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(scale, inverse)));
                int16x8_t twice = vzip1q_s16(vcombine_s16(ratio, ratio), vcombine_s16(ratio, ratio));
                int32x4x2_t four_times = vzipq_s32(vreinterpretq_s32_s16(twice), vreinterpretq_s32_s16(twice));
                int16x8x2_t ratios = {{vreinterpretq_s16_s32(four_times.val[0]), vreinterpretq_s16_s32(four_times.val[1])}};
                for (size_t k = g * K_GROUP; k < (g + 1) * K_GROUP; k += 8) {
                    uint8x16_t pairs = vld1q_u8(w + k * PANEL_ROWS / 2 + row * 4);
                    int8x16_t low = vaddq_s8(vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15))), shift);
                    int8x16_t high = vaddq_s8(vqtbl1q_s8(table, vshrq_n_u8(pairs, 4)), shift);
                    store_columns_neon(bytes + k * PANEL_ROWS, row, scale_q4_neon(low, ratios), scale_q4_neon(high, ratios));
                }
            }
        }
        block = w + value_bytes(DTYPE_Q4, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

// The sums of 16 rows of a k-block, sum[t][4], for n tokens (1 to 4). w is the first of those rows' unpacked weights,
// quants each token's of the block.
INLINE void sum_block_neon(const uint8_t *w, size_t length, const int8_t *const *quants, const size_t n,
                           int32x4_t (*sum)[4], const bool dotprod) {
    UNROLL for (size_t t = 0; t < n; t++)
        UNROLL for (size_t v = 0; v < 4; v++) sum[t][v] = vdupq_n_s32(0);
#define ADD_LANE(lane)                                                                                                  \
    UNROLL for (size_t v = 0; v < 4; v++) {                                                                             \
        int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w + (k + 4 * lane) * PANEL_ROWS + 16 * v));                    \
        UNROLL for (size_t t = 0; t < n; t++) ADD_LANE_PRODUCTS(sum[t][v], weights, q[t], lane);                        \
    }
    if (dotprod) {
        for (size_t k = 0; k < length; k += 16) {
            int8x16_t q[4];
            UNROLL for (size_t t = 0; t < n; t++) q[t] = vld1q_s8(quants[t] + k);
            ADD_LANE(0) ADD_LANE(1) ADD_LANE(2) ADD_LANE(3)
        }
        return;
    }
#undef ADD_LANE
    for (size_t k = 0; k < length; k += 4)
        UNROLL for (size_t v = 0; v < 4; v++) {
            int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w + k * PANEL_ROWS + 16 * v));
            UNROLL for (size_t t = 0; t < n; t++)
                sum[t][v] = add_byte_products_neon(sum[t][v], weights, broadcast_quants_neon(quants[t] + k), false);
        }
}

// The same by matrix products: those of two rows with two tokens stand in one register until the end. An odd last token
// is its own companion.
INLINE void sum_block_i8mm(const uint8_t *w, size_t length, const int8_t *const *quants, const size_t n, int32x4_t (*sum)[4]) {
    int32x4_t part[2][8];                                                  // [token pair][row pair][2 rows][2 tokens]
    UNROLL for (size_t p = 0; p < (n + 1) / 2; p++)
        UNROLL for (size_t v = 0; v < 8; v++) part[p][v] = vdupq_n_s32(0);
    for (size_t k = 0; k < length; k += 16) {
        int64x2_t q[2][2];                                                 // [8 columns][token pair][2 tokens][8]
        UNROLL for (size_t p = 0; p < (n + 1) / 2; p++) {
            int64x2_t even = vreinterpretq_s64_s8(vld1q_s8(quants[2 * p] + k));
            int64x2_t odd = vreinterpretq_s64_s8(vld1q_s8(quants[min_size(2 * p + 1, n - 1)] + k));
            q[0][p] = vzip1q_s64(even, odd), q[1][p] = vzip2q_s64(even, odd);
        }
        UNROLL for (size_t i = 0; i < 2; i++)
            UNROLL for (size_t v = 0; v < 8; v++) {
                uint8x16_t weights = vld1q_u8(w + (k + 8 * i) * PANEL_ROWS + 16 * v);
                UNROLL for (size_t p = 0; p < (n + 1) / 2; p++) ADD_MATRIX_PRODUCTS(part[p][v], weights, q[i][p]);
            }
    }
    UNROLL for (size_t t = 0; t < n; t++)
        UNROLL for (size_t v = 0; v < 4; v++) {
            int32x4_t upper = part[t / 2][2 * v], lower = part[t / 2][2 * v + 1];
            sum[t][v] = t % 2 ? vuzp2q_s32(upper, lower) : vuzp1q_s32(upper, lower);
        }
}

// The products of a k-block with n tokens, 16 rows at a time, to or, with `add`, added to out.
INLINE void multiply_block_neon_tile(const uint8_t *w, const float *scales, size_t length, const struct Row *x,
                                     size_t first, const size_t n, bool add, float *out, size_t stride,
                                     const enum ByteProducts products) {
    const int8_t *quants[4];
    UNROLL for (size_t t = 0; t < n; t++) quants[t] = x[t].quants + first;
    for (size_t row = 0; row < PANEL_ROWS; row += 16) {
        int32x4_t sum[4][4];
        if (products == I8MM) sum_block_i8mm(w + row * 8, length, quants, n, sum);
        else sum_block_neon(w + row * 4, length, quants, n, sum, products == DOTPROD);
        UNROLL for (size_t t = 0; t < n; t++)
            UNROLL for (size_t v = 0; v < 4; v++) {
                float *o = out + t * stride + row + 4 * v;
                float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + row + 4 * v), x[t].scales[first / K_BLOCK]);
                float32x4_t before = add ? vld1q_f32(o) : vdupq_n_f32(0);
                vst1q_f32(o, vfmaq_f32(before, vcvtq_f32_s32(sum[t][v]), scale));
            }
    }
}

// Tokens go in groups of up to four, of equal size as nearly as possible.
#define NEON_TILE(n)                                                                                                    \
    case n: multiply_block_neon_tile(w, scales, length, x + t, at, n, add || start, out + t * stride, stride, products); break;

INLINE void multiply_unpacked_neon_by(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x, size_t first,
                                      size_t n, bool add, float *out, size_t stride, const enum ByteProducts products) {
    for (size_t start = 0; start < depth; start += K_BLOCK, scales += PANEL_ROWS) {
        size_t length = min_size(K_BLOCK, depth - start), at = first + start;
        const uint8_t *w = bytes + start * PANEL_ROWS;
        for (size_t t = 0, groups = ceil_div(n, 4), count; t < n; t += count, groups--) {
            count = ceil_div(n - t, groups);
            switch (count) { NEON_TILE(1) NEON_TILE(2) NEON_TILE(3) NEON_TILE(4) }
        }
    }
}

static void multiply_unpacked_neon(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x, size_t first,
                                   size_t n, bool add, float *out, size_t stride) {
    switch (best_products_neon) {
    case WIDENING: multiply_unpacked_neon_by(bytes, scales, depth, x, first, n, add, out, stride, WIDENING); break;
    case DOTPROD: multiply_unpacked_neon_by(bytes, scales, depth, x, first, n, add, out, stride, DOTPROD); break;
    case I8MM: multiply_unpacked_neon_by(bytes, scales, depth, x, first, n, add, out, stride, I8MM); break;
    }
}

// ---- everything else

// vmaxnm takes the number where the other is none.
static float find_maximum_neon(const float *x, size_t n) {
    float32x4_t largest4 = vdupq_n_f32(-INFINITY);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) largest4 = vmaxnmq_f32(largest4, vld1q_f32(x + i));
    float largest = vmaxnmvq_f32(largest4);
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

static float dot_neon(const float *x, const float *y, size_t n) {
    float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        UNROLL for (size_t v = 0; v < 4; v++)
            sum[v] = vfmaq_f32(sum[v], vld1q_f32(x + i + 4 * v), vld1q_f32(y + i + 4 * v));
    float total = vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
    for (; i < n; i++) total += x[i] * y[i];
    return total;
}

// One stage of hadamard_down(), and all of it, of 4, 8 or 16 rows that stand in registers.
INLINE void hadamard_stage_neon(float32x4_t *row, const size_t rows, const size_t half) {
    _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
        if (r & half) continue;
        float32x4_t sum = vaddq_f32(row[r], row[r + half]);
        row[r + half] = vsubq_f32(row[r], row[r + half]);
        row[r] = sum;
    }
}

INLINE void hadamard_neon(float32x4_t *row, const size_t rows) {
    hadamard_stage_neon(row, rows, 1);
    hadamard_stage_neon(row, rows, 2);
    if (rows > 4) hadamard_stage_neon(row, rows, 4);
    if (rows > 8) hadamard_stage_neon(row, rows, 8);
}

// A block of [rows][16] down its columns, 4 of them at a time, and transposed, [16][rows], down its columns again.
INLINE void rotate_rows_neon(const float *x, const size_t rows, float *out) {
    float turned[K_BLOCK];
    const uint32x4_t sign = vdupq_n_u32(0x80000000);
    const int32x4_t place = {31, 30, 29, 28};
    float32x4_t row[16];
    for (size_t c = 0; c < 16; c += 4) {
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) {
            // Each column's bit, shifted to where a float has its sign.
            uint32x4_t bits = vdupq_n_u32(rotation_signs[r / 2] >> (r % 2 * 16 + c));
            uint32x4_t minus = vandq_u32(vshlq_u32(bits, place), sign);
            row[r] = vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(vld1q_f32(x + r * 16 + c)), minus));
        }
        hadamard_neon(row, rows);
        _Pragma("GCC unroll 16") for (size_t r = 0; r < rows; r++) vst1q_f32(turned + r * 16 + c, row[r]);
    }
    for (size_t r = 0; r < rows; r += 4) {               // rows r to r + 3, transposed, are columns r to r + 3
        UNROLL for (size_t c = 0; c < 16; c += 4) {
            const float *from = turned + r * 16 + c;
            float32x4x2_t a = vzipq_f32(vld1q_f32(from), vld1q_f32(from + 32));          // rows 0 and 2
            float32x4x2_t b = vzipq_f32(vld1q_f32(from + 16), vld1q_f32(from + 48));     // rows 1 and 3
            float32x4x2_t low = vzipq_f32(a.val[0], b.val[0]), high = vzipq_f32(a.val[1], b.val[1]);
            row[c] = low.val[0], row[c + 1] = low.val[1], row[c + 2] = high.val[0], row[c + 3] = high.val[1];
        }
        hadamard_neon(row, 16);
        _Pragma("GCC unroll 16") for (size_t c = 0; c < 16; c++)
            vst1q_f32(out + c * rows + r, vmulq_n_f32(row[c], rotation_norm(rows * 16)));
    }
}

// Whole k-blocks, and what a q8 cache rotates: heads, mostly of 128 columns, and MLA's 64 that carry the position.
static void rotate_columns_neon(const float *x, size_t n, float *out) {
    switch (n) {
    case 64: rotate_rows_neon(x, 4, out); break;
    case 128: rotate_rows_neon(x, 8, out); break;
    case 256: rotate_rows_neon(x, 16, out); break;
    default: rotate_columns_body(x, n, out);
    }
}

// ---- what `r1 bench` measures the processor's limit with: the multiplications that the products above use

#define PROBE_REGISTERS(STEP)                                                                                           \
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)                                                     \
    STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)

// 16 sums hide the latency of an instruction. A round is as long as the portable probe's: 64 dot products of 16
// multiply-adds or 32 matrix products of 32.
static void multiply_probe_neon(uint64_t rounds) {
    if (best_products_neon == WIDENING) {
        multiply_probe_portable(rounds);
        return;
    }
    const int8x16_t zeros = {0};
    int32x4_t sum[16] = {{0}};
#define ADD_DOT(i) ADD_DOT_PRODUCTS(sum[i], zeros, zeros);
#define ADD_MATRIX(i) ADD_MATRIX_PRODUCTS(sum[i], zeros, zeros);
#define KEEP(i) __asm__ volatile("" : : "w"(sum[i]));
    for (; rounds && best_products_neon == DOTPROD; rounds--) {
        PROBE_REGISTERS(ADD_DOT) PROBE_REGISTERS(ADD_DOT) PROBE_REGISTERS(ADD_DOT) PROBE_REGISTERS(ADD_DOT)
    }
    for (; rounds; rounds--) { PROBE_REGISTERS(ADD_MATRIX) PROBE_REGISTERS(ADD_MATRIX) }
    PROBE_REGISTERS(KEEP)
#undef ADD_DOT
#undef ADD_MATRIX
#undef KEEP
}

static const struct Kernels neon_kernels = {
    .name = "neon",
    .product = {[DTYPE_F32] = product_f32_neon, [DTYPE_BF16] = product_bf16_neon, [DTYPE_F8] = product_f8_neon,
                [DTYPE_Q8] = product_q8_neon, [DTYPE_Q4] = product_q4_neon, [DTYPE_Q6] = product_q6_neon,
                [DTYPE_F16] = product_f16_neon},
    .unpack = {[DTYPE_Q8] = unpack_q8_neon, [DTYPE_Q4] = unpack_q4_neon, [DTYPE_Q6] = unpack_q6_neon},
    .multiply_unpacked = {[DTYPE_Q8] = multiply_unpacked_neon, [DTYPE_Q4] = multiply_unpacked_neon, [DTYPE_Q6] = multiply_unpacked_neon},
    .quantize_block = quantize_block_body,
    .rotate_columns = rotate_columns_neon,
    .store_tile = store_tile_body,
    .dot = dot_neon,
    .find_maximum = find_maximum_neon,
    .quantize_keys = quantize_keys_body,
    .quantize_values = quantize_values_body,
    .exp_row = exp_row_body,
    .silu_multiply = silu_multiply_body,
    .float_to_half = float_to_half_body,
    .read_probe = read_probe,
    .multiply_probe = multiply_probe_neon,
    .macs_per_round = PORTABLE_PROBE_MACS,
};

#endif
