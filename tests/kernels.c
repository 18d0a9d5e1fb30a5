// Tests every kernel table that this processor can run: the products against exact sums in double, everything against
// the portable table, and that a token's result has the same bits whichever other tokens are in the call.
// `kernels TABLE` tests that one alone.
//
// Prints one line `ok   kernels: TABLE: WHAT` or `FAIL kernels: TABLE: WHAT: WHY` for each thing and ends with status 1
// if one failed. Buffers are allocated to the exact byte, so that a build with the address sanitizer sees every read
// beyond an end.
// Most of the engine is not used here.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../r1.c"

static const size_t COLS[] = {32, 64, 96, 224, 256, 288, 512, 1536, 8960};
enum { COLS_COUNT = sizeof COLS / sizeof *COLS, MAX_COLS = 8960 };

// ---- reporting

static bool any_failed;
static char failure[512];        // the first failure of the thing under test; empty: none

#define EXPECT(condition, ...)                                                                                          \
    do {                                                                                                                \
        if (!(condition) && !failure[0]) snprintf(failure, sizeof failure, __VA_ARGS__);                                \
    } while (0)

static void report(const char *table, const char *what) {
    if (failure[0]) printf("FAIL kernels: %s: %s: %s\n", table, what, failure);
    else printf("ok   kernels: %s: %s\n", table, what);
    any_failed |= failure[0] != 0;
    failure[0] = 0;
}

// ---- random numbers and memory

static uint64_t random_state = 0x9e3779b97f4a7c15;

static uint32_t next_bits(void) {      // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545f4914f6cdd1d >> 32);
}

static int next_integer(int low, int high) { return low + (int)(next_bits() % (uint32_t)(high - low + 1)); }
static float next_float(void) { return (float)(int32_t)next_bits() * 0x1p-31f; }     // -1 to 1

// `bytes` bytes at `offset` beyond a multiple of 64; nothing lies behind them. free_buffer() takes the same offset.
static void *new_buffer(size_t bytes, size_t offset) {
    char *memory;
    if (posix_memalign((void **)&memory, 64, bytes + offset)) exit(2);
    memset(memory, 0, bytes + offset);
    return memory + offset;
}

static void free_buffer(void *buffer, size_t offset) { free((char *)buffer - offset); }

static bool same_bits(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

// ---- panels and rows

// TINY keeps every sum below 2^24 with all scales 1: then each table must give the same bits whatever it adds first.
// EDGES takes only the largest weights, quants and sub-scales.
enum PanelContents { RANDOM, EDGES, TINY };

// Fills a panel with weights of every kind that its format has; the last row is zero (for q4, whose table has no zero,
// its scale is).
static void fill_test_panel(uint32_t dtype, uint8_t *panel, size_t cols, enum PanelContents filling) {
    uint8_t *block = panel;
    float *row_scales = (float *)(void *)panel;
    size_t zero_row = PANEL_ROWS - 1;
    if (dtype == DTYPE_Q4) {
        for (size_t r = 0; r < PANEL_ROWS; r++) row_scales[r] = r == zero_row ? 0 : filling == TINY ? 1 : next_float();
        block += panel_head_bytes(dtype);
    }
    unsigned code = next_bits() & 0xff;
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first), heads = block_head_bytes(dtype, length);
        uint8_t *w = block + heads;
        if (dtype == DTYPE_F8)
            for (size_t i = 0; i < 8; i++) ((float *)(void *)block)[i] = filling == TINY ? 1 : next_float();
        if (dtype == DTYPE_Q8 || dtype == DTYPE_Q6)
            for (size_t r = 0; r < PANEL_ROWS; r++) ((float *)(void *)block)[r] = filling == TINY ? 1 : next_float();
        if (dtype == DTYPE_Q4)           // every byte in turn; EDGES: -128 and 127, the largest either way
            for (size_t i = 0; i < heads; i++)
                block[i] = filling == TINY    ? "\2\3\xfe\xff"[i & 3]
                           : filling == EDGES ? "\x80\x7f"[(first + i / PANEL_ROWS) & 1]
                                              : (uint8_t)code++;
        for (size_t k = 0; k < length; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) {
                bool zero = r == zero_row;
                switch (dtype) {
                case DTYPE_F32:
                    ((float *)(void *)w)[k * PANEL_ROWS + r] = zero              ? 0
                                                               : filling == TINY ? (float)next_integer(-3, 3)
                                                                                 : next_float();
                    break;
                case DTYPE_BF16: {
                    float value = zero ? 0 : filling == TINY ? (float)next_integer(-3, 3) : next_float();
                    ((uint16_t *)(void *)w)[k / 2 * 2 * PANEL_ROWS + r * 2 + k % 2] =
                        (uint16_t)(bits_from_float(value) >> 16);
                    break;
                }
                case DTYPE_F16: {        // RANDOM: every exponent; EDGES: subnormals
                    uint16_t any = (uint16_t)next_bits(), finite = (any & 0x7c00) == 0x7c00 ? any ^ 0x4000 : any;
                    ((uint16_t *)(void *)w)[k * PANEL_ROWS + r] = zero              ? 0
                                                                  : filling == TINY ? half_from_float((float)next_integer(-3, 3))
                                                                  : filling == EDGES ? any & 0x83ff
                                                                                     : finite;
                    break;
                }
                case DTYPE_F8: {         // RANDOM: every code in turn but the two not-a-numbers; EDGES: subnormals
                    uint8_t e4m3 = filling == TINY    ? (uint8_t)(0x38 + (next_bits() & 0x88))
                                   : filling == EDGES ? next_bits() & 0x87
                                                      : (uint8_t)code++;
                    if ((e4m3 & 0x7f) == 0x7f) e4m3 ^= 1;
                    w[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4] = zero ? 0x80 & e4m3 : e4m3;
                    break;
                }
                case DTYPE_Q8: {
                    int q = filling == TINY    ? next_integer(-3, 3)
                            : filling == EDGES ? (r & 1 ? -127 : 127)
                                               : next_integer(-127, 127);
                    w[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4] = (uint8_t)(zero ? 0 : q);
                    break;
                }
                case DTYPE_Q6: {         // EDGES: -32 and 31
                    unsigned value = zero              ? Q6_ZERO
                                     : filling == TINY ? (unsigned)next_integer(Q6_ZERO - 3, Q6_ZERO + 3)
                                     : filling == EDGES ? (r & 1 ? 0 : 63)
                                                        : next_bits() & 63;
                    uint8_t *nibble = w + k / 16 * 384 + 4 * PANEL_ROWS + k % 16 / 8 * 4 * PANEL_ROWS + r * 4 + k % 4;
                    *nibble |= (uint8_t)((value & 15) << k % 8 / 4 * 4);
                    w[k / 16 * 384 + r * 4 + k % 4] |= (uint8_t)(value >> 4 << k % 16 / 4 * 2);
                    break;
                }
                case DTYPE_Q4:           // two columns a byte: every byte is written twice
                    w[k / 8 * 4 * PANEL_ROWS + r * 4 + k % 4] =
                        filling == EDGES ? (r & 1 ? 0x00 : 0xff) : (uint8_t)next_bits();
                    break;
                }
            }
        block = w + value_bytes(dtype, length);
    }
}

// The weight at row r, column k, and for the block it lies in.
static double panel_weight(uint32_t dtype, const uint8_t *panel, size_t cols, size_t r, size_t k) {
    size_t first = k / K_BLOCK * K_BLOCK, length = min_size(K_BLOCK, cols - first), j = k - first;
    const uint8_t *block = panel + panel_head_bytes(dtype);
    for (size_t i = 0; i < first; i += K_BLOCK) block += block_head_bytes(dtype, K_BLOCK) + value_bytes(dtype, K_BLOCK);
    const uint8_t *w = block + block_head_bytes(dtype, length);
    const float *scales = (const float *)(const void *)block;
    switch (dtype) {
    case DTYPE_F32: return ((const float *)(const void *)w)[j * PANEL_ROWS + r];
    case DTYPE_BF16: return float_from_bf16(((const uint16_t *)(const void *)w)[j / 2 * 2 * PANEL_ROWS + r * 2 + j % 2]);
    case DTYPE_F16: return float_from_half(((const uint16_t *)(const void *)w)[j * PANEL_ROWS + r]);
    case DTYPE_F8: {
        uint8_t e4m3 = w[j / 4 * 4 * PANEL_ROWS + r * 4 + j % 4];
        int exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
        double magnitude = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
        return (e4m3 & 0x80 ? -magnitude : magnitude) * scales[j / K_GROUP];
    }
    case DTYPE_Q8: return (double)scales[r] * (int8_t)w[j / 4 * 4 * PANEL_ROWS + r * 4 + j % 4];
    case DTYPE_Q6: {
        uint8_t pair = w[j / 16 * 384 + 4 * PANEL_ROWS + j % 16 / 8 * 4 * PANEL_ROWS + r * 4 + j % 4];
        int nibble = j % 8 < 4 ? pair & 15 : pair >> 4;
        int top = w[j / 16 * 384 + r * 4 + j % 4] >> j % 16 / 4 * 2 & 3;
        return (double)scales[r] * (16 * top + nibble - 32);
    }
    default: {
        uint8_t pair = w[j / 8 * 4 * PANEL_ROWS + r * 4 + j % 4], sub = block[j / K_GROUP * PANEL_ROWS + r];
        int value = Q4_TABLE[j % 8 < 4 ? pair & 15 : pair >> 4] + (sub & 1 ? Q4_SHIFT : 0);
        return (double)((const float *)(const void *)panel)[r] * (int8_t)(sub & 0xfe) * value;
    }
    }
}

static struct Row new_row(size_t cols, enum PanelContents filling) {
    size_t blocks = ceil_div(cols, K_BLOCK), groups = cols / K_GROUP;
    float *values = new_buffer(cols * sizeof *values, 0), *scales = new_buffer(blocks * sizeof *scales, 0);
    int8_t *quants = new_buffer(cols, 0);
    int32_t *sums = new_buffer(groups * sizeof *sums, 0), *block_sums = new_buffer(blocks * sizeof *sums, 0);
    int sign = next_bits() & 1 ? 1 : -1;
    for (size_t b = 0; b < blocks; b++) scales[b] = filling == TINY ? 1 : next_float();
    for (size_t k = 0; k < cols; k++) {
        quants[k] = (int8_t)(filling == TINY    ? next_integer(-1, 1)
                             : filling == EDGES ? sign * 127
                                                : next_integer(-127, 127));
        values[k] = filling == TINY ? (float)next_integer(-3, 3) : next_float();
        sums[k / K_GROUP] += quants[k];
        block_sums[k / K_BLOCK] += quants[k];
    }
    return (struct Row){values, quants, scales, sums, block_sums};
}

static void free_row(struct Row row) {
    free((void *)row.values);
    free((void *)row.quants);
    free((void *)row.scales);
    free((void *)row.sums);
    free((void *)row.block_sums);
}

// ---- tests

// A table's product of one dtype.
static void test_product(const struct Kernels *table, uint32_t dtype, enum PanelContents filling) {
    bool integer = dtype >= DTYPE_Q8 && dtype < DTYPE_COUNT;
    for (size_t c = 0; c < COLS_COUNT; c++) {
        size_t cols = COLS[c], offset = c & 1 ? 32 : 0;       // panels are promised to be aligned to 32 bytes, not more
        uint8_t *panel = new_buffer(panel_bytes(dtype, cols), offset);
        fill_test_panel(dtype, panel, cols, filling);
        struct Row rows[TILE_TOKENS];
        for (size_t t = 0; t < TILE_TOKENS; t++) rows[t] = new_row(cols, filling);

        float alone[TILE_TOKENS][PANEL_ROWS], portable[TILE_TOKENS][PANEL_ROWS];
        for (size_t t = 0; t < TILE_TOKENS; t++) {
            memset(alone[t], 0xff, sizeof alone[t]);          // the kernel must overwrite what was there
            prefetching = prefetching_ways[t % PREFETCHING_WAYS];          // a kernel may have an instance for some
            table->product[dtype](panel, cols, rows + t, 1, alone[t]);
        }
        portable_kernels.product[dtype](panel, cols, rows, TILE_TOKENS, portable[0]);
        for (size_t t = 0; t < TILE_TOKENS; t++)
            for (size_t r = 0; r < PANEL_ROWS; r++) {
                if (filling == TINY || (integer && cols <= K_BLOCK)) {
                    EXPECT(same_bits(&alone[t][r], &portable[t][r], 1),
                           "%zu columns, row %zu: %.9g, not %.9g as the portable table", cols, r, (double)alone[t][r],
                           (double)portable[t][r]);
                    continue;
                }
                if (t > 1) continue;                          // decoding weights one by one is slow
                double exact = 0, size = 0;
                for (size_t k = 0; k < cols; k++) {
                    double value = integer ? (double)rows[t].quants[k] * rows[t].scales[k / K_BLOCK] : rows[t].values[k];
                    double product = panel_weight(dtype, panel, cols, r, k) * value;
                    exact += product;
                    size += fabs(product);
                }
                EXPECT(fabs(alone[t][r] - exact) <= 1e-5 * size,
                       "%zu columns, row %zu: %.9g, not %.9g (products of %.3g in all)", cols, r, (double)alone[t][r],
                       exact, size);
            }

        // The same tokens in company, in another order.
        for (size_t n = 2; n <= TILE_TOKENS; n++) {
            struct Row some[TILE_TOKENS];
            float *together = new_buffer(n * PANEL_ROWS * sizeof *together, 0);
            for (size_t t = 0; t < n; t++) some[t] = rows[(t * 3 + n) % TILE_TOKENS];
            memset(together, 0xff, n * PANEL_ROWS * sizeof *together);
            table->product[dtype](panel, cols, some, n, together);
            for (size_t t = 0; t < n; t++)
                EXPECT(same_bits(together + t * PANEL_ROWS, alone[(t * 3 + n) % TILE_TOKENS], PANEL_ROWS),
                       "%zu columns: token %zu of %zu differs from the same token alone", cols, t, n);
            free_buffer(together, 0);
        }
        for (size_t t = 0; t < TILE_TOKENS; t++) free_row(rows[t]);
        free_buffer(panel, offset);
    }
}

// Unpacking and multiply_unpacked() of every table give what the portable ones give, to the bit within a k-block; of q8
// and q6 that is what product() gives, of q4 nearly.
static void test_unpacked(const struct Kernels *table, uint32_t dtype, enum PanelContents filling) {
    enum { TOKENS = 21, STRIDE = 3 * PANEL_ROWS };
    for (size_t c = 0; c < 2 * COLS_COUNT; c++) {
        // All of a panel's columns, or all but the last 32.
        size_t panel_cols = COLS[c / 2], cols = panel_cols - c % 2 * 32, offset = c & 2 ? 32 : 0;
        uint8_t *panel = new_buffer(panel_bytes(dtype, panel_cols), offset);
        fill_test_panel(dtype, panel, panel_cols, filling);
        struct Row rows[TOKENS];
        for (size_t t = 0; t < TOKENS; t++) rows[t] = new_row(cols, filling);
        // From each second k-block on, up to 512 columns.
        for (size_t first = 0; first < cols; first += 2 * K_BLOCK) {
            size_t depth = min_size(2 * K_BLOCK, cols - first), blocks = ceil_div(depth, K_BLOCK);
            uint8_t *bytes = new_buffer(blocks * UNPACKED_BLOCK_BYTES, 0);
            float *scales = new_buffer(blocks * PANEL_ROWS * sizeof *scales, 0);
            static float out[2][TOKENS][STRIDE];
            const struct Kernels *tables[] = {&portable_kernels, table};
            for (size_t i = 0; i < 2; i++) {
                for (size_t j = 0; j < TOKENS * STRIDE; j++) out[i][j / STRIDE][j % STRIDE] = (float)(j % 5);
                tables[i]->unpack[dtype](panel, panel_cols, first, depth, bytes, scales);
                for (size_t n = 1, t = 0; t < TOKENS; t += n, n = min_size(n + 1, TOKENS - t))   // 1, 2, 3, 4, 5, 6
                    tables[i]->multiply_unpacked[dtype](bytes, scales, depth, rows + t, first, n, first > 0 || n % 2,
                                                        out[i][t] + PANEL_ROWS, STRIDE);
            }
            for (size_t t = 0; t < TOKENS; t++)
                for (size_t r = 0; r < STRIDE; r++) {
                    float got = out[1][t][r], want = out[0][t][r];
                    bool inside = r / PANEL_ROWS == 1;
                    double size = 4;
                    for (size_t k = 0; inside && filling != TINY && k < depth; k += K_BLOCK)
                        size += 256.0 * 127 * 127 * fabs((double)scales[k / K_BLOCK * PANEL_ROWS + r % PANEL_ROWS]) *
                                fabs((double)rows[t].scales[(first + k) / K_BLOCK]);
                    EXPECT(inside && filling != TINY ? fabs(got - want) <= 1e-6 * size : same_bits(&got, &want, 1),
                           "%zu columns from %zu: token %zu, row %zu: %.9g, not %.9g", depth, first, t, r, (double)got,
                           (double)want);
                }
            free(bytes), free(scales);
        }
        // All tokens at once: a token's bits do not depend on its company, and are those of product() or near them.
        if (cols == panel_cols && cols <= 2 * K_BLOCK) {
            uint8_t *bytes = new_buffer(ceil_div(cols, K_BLOCK) * UNPACKED_BLOCK_BYTES, 0);
            float scales[2 * PANEL_ROWS], product[PANEL_ROWS];
            static float together[TOKENS][PANEL_ROWS];
            table->unpack[dtype](panel, cols, 0, cols, bytes, scales);
            table->multiply_unpacked[dtype](bytes, scales, cols, rows, 0, TOKENS, false, together[0], PANEL_ROWS);
            for (size_t t = 0; t < TOKENS; t++) {
                float alone[PANEL_ROWS];
                table->multiply_unpacked[dtype](bytes, scales, cols, rows + t, 0, 1, false, alone, PANEL_ROWS);
                EXPECT(same_bits(alone, together[t], PANEL_ROWS), "%zu columns: token %zu depends on its company", cols, t);
                table->product[dtype](panel, cols, rows + t, 1, product);
                if (dtype != DTYPE_Q4) {
                    EXPECT(same_bits(alone, product, PANEL_ROWS), "%zu columns: token %zu differs from product()", cols, t);
                    continue;
                }
                for (size_t r = 0; r < PANEL_ROWS; r++) {
                    double most = 0;       // half a unit of each weight, and of its ratio
                    for (size_t k = 0; k < cols; k++)
                        most += 0.51 * fabs((double)scales[k / K_BLOCK * PANEL_ROWS + r] * rows[t].quants[k] *
                                            rows[t].scales[k / K_BLOCK]);
                    EXPECT(fabs(alone[r] - product[r]) <= most * 1.01 + 1e-6, "%zu columns: %.9g is too far from product()'s %.9g",
                           cols, (double)alone[r], (double)product[r]);
                }
            }
            free(bytes);
        }
        for (size_t t = 0; t < TOKENS; t++) free_row(rows[t]);
        free_buffer(panel, offset);
    }
}

static void test_products(const struct Kernels *table) {
    static const char *const fillings[] = {"random", "largest and smallest", "tiny integer"};
    for (uint32_t dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++)
        for (int filling = RANDOM; filling <= TINY; filling++) {
            const char *name = dtype == DTYPE_F16 ? "f16" : dtype_name(dtype);
            char what[96];
            snprintf(what, sizeof what, "product %s, %s weights", name, fillings[filling]);
            test_product(table, dtype, filling);
            report(table->name, what);
            if (dtype == DTYPE_F16 || !table->unpack[dtype]) continue;
            snprintf(what, sizeof what, "unpack %s, %s weights", name, fillings[filling]);
            test_unpacked(table, dtype, filling);
            report(table->name, what);
        }
}

static void test_quantize_block(const struct Kernels *table) {
    static const float specials[] = {0,     -0.0f,  INFINITY, -INFINITY, NAN,  1e-42f, -1e-38f,
                                     3e38f, 1e-30f, 127,      0.5f,      1.5f, -2.5f};
    for (size_t cols = K_GROUP; cols <= K_BLOCK; cols += K_GROUP)
        for (int kind = 0; kind < 24; kind++) {
            size_t groups = cols / K_GROUP;
            float *x = new_buffer(cols * sizeof *x, 0), scale, want_scale;
            int8_t *quants = new_buffer(cols, 0), *want = new_buffer(cols, 0);
            int32_t *sums = new_buffer(groups * sizeof *sums, 0), *want_sums = new_buffer(groups * sizeof *sums, 0);
            int32_t block_sum, want_block_sum, total = 0;
            for (size_t k = 0; k < cols; k++) {
                float special = specials[next_bits() % (sizeof specials / sizeof *specials)];
                switch (kind) {
                case 0: x[k] = 0; break;
                case 1: x[k] = special; break;
                case 2: x[k] = next_float() * 1e-38f; break;             // scales at the edge of the smallest
                case 3: x[k] = next_float() * 1e-36f; break;
                case 4: x[k] = next_float() * 3e38f; break;
                case 5: x[k] = k ? (float)next_integer(-254, 254) * 0.5f : 127; break;   // ties: scale 1
                case 6: x[k] = NAN; break;
                case 7: x[k] = float_from_bits(next_bits()); break;
                default: x[k] = next_bits() % 97 ? next_float() : kind & 1 ? special : 2 * next_float();
                }
            }
            portable_kernels.quantize_block(x, cols, want, &want_scale, want_sums, &want_block_sum);
            table->quantize_block(x, cols, quants, &scale, sums, &block_sum);
            for (size_t k = 0; k < cols; k++) total += quants[k];
            EXPECT(same_bits(&scale, &want_scale, 1), "%zu columns, input %d: scales differ", cols, kind);
            EXPECT(!memcmp(quants, want, cols), "%zu columns, input %d: integers differ", cols, kind);
            EXPECT(!memcmp(sums, want_sums, groups * sizeof *sums), "%zu columns, input %d: sums differ", cols, kind);
            EXPECT(block_sum == total && want_block_sum == total, "%zu columns, input %d: the block's sum is %d, not %d",
                   cols, kind, block_sum, total);
            free(x), free(quants), free(want), free(sums), free(want_sums);
        }
    report(table->name, "quantize_block, same bits as portable");
}

static void test_rotate_columns(const struct Kernels *table) {
    for (size_t n = 32; n <= K_BLOCK; n *= 2)
        for (int kind = 0; kind < 16; kind++) {
            float *x = new_buffer(n * sizeof *x, 0), *out = new_buffer(n * sizeof *out, 0),
                  *want = new_buffer(n * sizeof *want, 0);
            // Even kinds: numbers of all sizes, so that an addition in another order shows; odd ones: zeros of both signs,
            // too.
            for (size_t k = 0; k < n; k++)
                x[k] = kind % 2 && next_bits() % 4 ? next_bits() % 2 ? -0.0f : 0.0f
                                                   : next_float() * ldexpf(1, next_integer(-20, 20));
            portable_kernels.rotate_columns(x, n, want);
            table->rotate_columns(x, n, out);
            EXPECT(same_bits(out, want, n), "%zu columns, input %d: the values differ", n, kind);
            free(x), free(out), free(want);
        }
    report(table->name, "rotate_columns, same bits as portable");
}

static void test_store_tile(const struct Kernels *table) {
    enum { STRIDE = PANEL_ROWS + 5 };
    float tile[TILE_TOKENS * PANEL_ROWS], before[TILE_TOKENS * STRIDE], out[TILE_TOKENS * STRIDE];
    for (size_t i = 0; i < TILE_TOKENS * PANEL_ROWS; i++) tile[i] = next_float();
    for (size_t n = 1; n <= TILE_TOKENS; n++)
        for (int add = 0; add < 2; add++) {
            for (size_t i = 0; i < TILE_TOKENS * STRIDE; i++) out[i] = before[i] = next_float();
            table->store_tile(tile, n, add, out, STRIDE);
            for (size_t i = 0; i < TILE_TOKENS * STRIDE; i++) {
                size_t t = i / STRIDE, r = i % STRIDE;
                bool stored = t < n && r < PANEL_ROWS;
                float expected = stored ? (add ? before[i] : 0) + tile[t * PANEL_ROWS + r] : before[i];
                EXPECT(same_bits(out + i, &expected, 1), "%zu tokens, add %d: out[%zu][%zu] is %.9g, not %.9g", n, add, t, r, (double)out[i],
                       (double)expected);
            }
        }
    report(table->name, "store_tile");
}

static const size_t LENGTHS[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 64, 80, 100, 128, 192, 256, 512, 576, 1000};
enum { LENGTHS_COUNT = sizeof LENGTHS / sizeof *LENGTHS };

static void test_dot(const struct Kernels *table) {
    for (size_t c = 0; c < LENGTHS_COUNT; c++) {
        size_t n = LENGTHS[c];
        float *x = new_buffer(n * 4, 0), *y = new_buffer(n * 4, 0);
        double exact = 0, size = 0;
        for (size_t i = 0; i < n; i++) {
            x[i] = next_float(), y[i] = next_float();
            exact += (double)x[i] * y[i], size += fabs((double)x[i] * y[i]);
        }
        EXPECT(fabs(table->dot(x, y, n) - exact) <= 1e-6 * size, "dot of %zu is not %.9g", n, exact);
        free(x), free(y);
    }
    report(table->name, "dot");
}

static void test_exponentials(const struct Kernels *table) {
    for (size_t c = 0; c < LENGTHS_COUNT; c++) {
        size_t n = LENGTHS[c];
        float *x = new_buffer(n * 4, 0), *y = new_buffer(n * 4, 0), *up = new_buffer(n * 4, 0), *scaled = new_buffer(n * 4, 0);
        for (int kind = 0; kind < 4; kind++) {
            float maximum = 2, width = kind == 0 ? 1 : kind == 1 ? 10 : 100;
            for (size_t i = 0; i < n; i++) {
                x[i] = y[i] = scaled[i] = kind == 3 && next_bits() % 2 ? -INFINITY : maximum - fabsf(next_float()) * width;
                up[i] = next_float();
            }
            double exact_sum = 0;
            float sum = table->exp_row(y, maximum, NULL, n), scaled_sum = table->exp_row(scaled, maximum, up, n);
            EXPECT(scaled_sum == sum, "exp_row of %zu: with scales the sum is %.9g, not %.9g", n, (double)scaled_sum, (double)sum);
            for (size_t i = 0; i < n; i++) {
                double exact = exp((double)x[i] - maximum);
                exact_sum += exact;
                EXPECT(scaled[i] == y[i] * up[i], "exp_row: %g times %g gave %.9g", (double)y[i], (double)up[i], (double)scaled[i]);
                EXPECT(fabs(y[i] - exact) <= 1e-6 * exact + 2e-38, "exp_row: exp(%g) gave %.9g",
                       (double)(x[i] - maximum), (double)y[i]);
            }
            EXPECT(fabs(sum - exact_sum) <= 2e-6 * exact_sum + 1e-35, "exp_row of %zu: sum %.9g, not %.9g", n,
                   (double)sum, exact_sum);
            for (size_t i = 0; i < n; i++)
                x[i] = y[i] = kind == 3 ? (float)next_integer(-1000, 1000) : next_float() * width;
            table->silu_multiply(y, up, n);
            for (size_t i = 0; i < n; i++) {
                double exact = x[i] / (1 + exp(-(double)x[i])) * up[i];
                EXPECT(fabs(y[i] - exact) <= 2e-6 * fabs(exact) + 1e-35, "silu(%.9g) * %.9g gave %.9g", (double)x[i],
                       (double)up[i], (double)y[i]);
            }
        }
        free(x), free(y), free(up), free(scaled);
    }
    report(table->name, "exp_row, silu_multiply");
}

// What a q8 cache's blocks are made by, against a plain computation; the same bits as the portable table gives.
static void test_cache_blocks(const struct Kernels *table) {
    static const size_t counts[] = {32, 64, 128, 192, 256};
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        size_t rows = counts[c], key_bytes = panel_bytes(DTYPE_Q8, rows), value_bytes_all = rows / PANEL_ROWS * panel_bytes(DTYPE_Q8, K_BLOCK);
        float *x = new_buffer(rows * PANEL_ROWS * sizeof *x, 0), scales[2][K_BLOCK] = {{0}};
        uint8_t *keys[2], *values[2];
        for (size_t i = 0; i < rows * PANEL_ROWS; i++) x[i] = next_float() * ldexpf(1, (int)(i % PANEL_ROWS) - 16);
        for (size_t i = 0; i < rows; i++) x[i * PANEL_ROWS + 5] = 0, x[i * PANEL_ROWS + 6] = i == 3 ? INFINITY : 1, x[i * PANEL_ROWS + 7] = i ? 1 : NAN;
        for (int i = 0; i < 2; i++) {
            const struct Kernels *kernels = i ? table : &portable_kernels;
            keys[i] = new_buffer(key_bytes, 0), values[i] = new_buffer(value_bytes_all, 0);
            kernels->quantize_keys(x, rows, keys[i]);
            kernels->quantize_values(x, rows, 96, scales[i], values[i]);
        }
        EXPECT(!memcmp(keys[0], keys[1], key_bytes), "quantize_keys of %zu rows differs from the portable one", rows);
        EXPECT(!memcmp(values[0], values[1], value_bytes_all) && !memcmp(scales[0], scales[1], sizeof scales[0]),
               "quantize_values of %zu rows differs from the portable one", rows);
        for (size_t k = 0; k < rows; k++)
            for (size_t r = 8; r < PANEL_ROWS; r++) {
                double exact = x[k * PANEL_ROWS + r], key_scale = ((const float *)(const void *)keys[1])[r], value_scale = scales[1][96 + r];
                double key = key_scale * (int8_t)keys[1][block_head_bytes(DTYPE_Q8, rows) + k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4];
                const uint8_t *panel = values[1] + k / PANEL_ROWS * panel_bytes(DTYPE_Q8, K_BLOCK) + block_head_bytes(DTYPE_Q8, K_BLOCK);
                double value = value_scale * (int8_t)panel[(96 + r) / 4 * 4 * PANEL_ROWS + k % PANEL_ROWS * 4 + (96 + r) % 4];
                EXPECT(fabs(key - exact) <= 0.501 * key_scale, "quantize_keys, %zu rows: %.9g for %.9g", rows, key, exact);
                EXPECT(fabs(value - exact) <= 0.501 * value_scale, "quantize_values, %zu rows: %.9g for %.9g", rows, value, exact);
            }
        free(x), free(keys[0]), free(keys[1]), free(values[0]), free(values[1]);
    }
    for (size_t n = 0; n < 300; n++) {
        float *x = new_buffer(n * sizeof *x, 0), largest = -INFINITY;
        for (size_t i = 0; i < n; i++) x[i] = i % 7 == 3 ? NAN : next_float() - 2, largest = fmaxf(largest, x[i]);   // which leaves NAN out
        EXPECT(table->find_maximum(x, n) == largest, "find_maximum of %zu is not %.9g", n, (double)largest);
        free(x);
    }
    report(table->name, "quantize_keys, quantize_values, find_maximum");
}

static void test_conversions(const struct Kernels *table) {
    enum { ALL = 65536 };
    static uint16_t half[ALL], back[ALL];
    static float values[ALL];
    for (uint32_t round = 0; round < 64; round++) {
        for (size_t i = 0; i < ALL; i++)
            values[i] = float_from_bits(round < 32 ? (uint32_t)i << 16 | round << 11 | (round & 1) : next_bits());
        table->float_to_half(values, back, ALL);
        portable_kernels.float_to_half(values, half, ALL);
        for (size_t i = 0; i < ALL; i++)
            EXPECT(back[i] == half[i], "float_to_half of %.9g: 0x%04x, not 0x%04x", (double)values[i], back[i], half[i]);
    }
    for (size_t c = 0; c < LENGTHS_COUNT; c++) {
        size_t n = LENGTHS[c];
        float *x = new_buffer(n * 4, 0);
        uint16_t *narrowed = new_buffer(n * 2, 0);
        for (size_t i = 0; i < n; i++) x[i] = next_float();
        table->float_to_half(x, narrowed, n);
        for (size_t i = 0; i < n; i++)
            EXPECT(narrowed[i] == half_from_float(x[i]), "half precision of %zu numbers: number %zu is wrong", n, i);
        free(x), free(narrowed);
    }
    report(table->name, "float_to_half, same bits as portable");
}

int main(int argc, char **argv) {
    const struct Kernels *list[MAX_KERNEL_TABLES];
    size_t count = list_kernels(list);
    for (size_t i = 0; i < count; i++) {
        if (argc > 1 && strcmp(argv[1], list[i]->name) != 0) continue;
        test_products(list[i]);
        test_quantize_block(list[i]);
        test_rotate_columns(list[i]);
        test_store_tile(list[i]);
        test_dot(list[i]);
        test_exponentials(list[i]);
        test_cache_blocks(list[i]);
        test_conversions(list[i]);
    }
    return any_failed;
}
