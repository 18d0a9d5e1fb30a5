// The .r1 file: one flat, little-endian binary that holds a whole model. docs/format.md tells it byte by byte.
//
//   preamble    64 bytes: magic, version, where each section lies, a checksum over everything but the tensor data
//   config      struct ModelConfig
//   tokenizer   bytes that tokenizer.c writes and reads
//   table       tensor_count x struct TensorEntry
//   data        every tensor at a multiple of 4096 bytes
//
// The converter (convert/) and the engine (r1.c) share this header, and shapes.h, which tells what tensors a model has.
#ifndef R1_FORMAT_H
#define R1_FORMAT_H

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "r1.c reads little-endian files in place and needs a little-endian processor"
#endif

// The last four bytes show whether the file was mangled as text on its way.
#define FORMAT_MAGIC "r1.c\r\n\x1a\n"
#define FORMAT_VERSION 2
#define FORMAT_PAGE 4096          // alignment of every tensor, and of every expert inside one

struct FilePreamble {
    char magic[8];                // FORMAT_MAGIC without its terminating zero
    uint32_t version;             // FORMAT_VERSION
    uint32_t config_bytes;        // sizeof(struct ModelConfig); the config stands right behind the preamble
    uint64_t tokenizer_offset;    // from the start of the file
    uint64_t tokenizer_bytes;
    uint64_t table_offset;
    uint32_t tensor_count;        // 0 in a file made with --tokenizer-only
    uint32_t reserved;            // 0
    uint64_t file_bytes;          // the size of the whole file
    uint64_t metadata_hash;       // XXH3-64 of bytes [0, 56) followed by [64, end of the table)
};

enum Architecture { ARCH_DEEPSEEK_V3 = 1, ARCH_QWEN2, ARCH_LLAMA, ARCH_QWEN3 };
enum RopeScaling { ROPE_PLAIN = 0, ROPE_YARN, ROPE_LLAMA3 };

// Names and meanings are those of Hugging Face's config.json. Fields that an architecture does not have are 0.
struct ModelConfig {
    uint32_t architecture;        // enum Architecture
    uint32_t recipe;              // enum Dtype of --type, or RECIPE_SOURCE: for display only
    uint32_t hidden_size;
    uint32_t intermediate_size;   // of a dense feed-forward layer
    uint32_t num_hidden_layers;   // without the MTP layers
    uint32_t num_attention_heads;
    uint32_t num_key_value_heads;
    uint32_t head_dim;            // of a GQA head; 0 for deepseek_v3
    uint32_t vocab_size;          // rows of the embedding (may exceed the tokenizer's ids)
    uint32_t max_position_embeddings;
    uint32_t tie_word_embeddings; // 0 or 1: the head is the embedding
    uint32_t attention_bias;      // 0 or 1: q, k and v carry a bias (qwen2)
    uint32_t qk_norm;             // 0 or 1: RMSNorm on every head of q and k (qwen3)
    uint32_t q_lora_rank;         // 0: q_proj is one full matrix
    uint32_t kv_lora_rank;
    uint32_t qk_nope_head_dim;
    uint32_t qk_rope_head_dim;
    uint32_t v_head_dim;
    uint32_t n_routed_experts;    // 0: every layer is dense
    uint32_t n_shared_experts;
    uint32_t num_experts_per_tok;
    uint32_t moe_intermediate_size;
    uint32_t first_k_dense_replace;
    uint32_t n_group;
    uint32_t topk_group;
    uint32_t norm_topk_prob;      // 0 or 1
    uint32_t num_nextn_predict_layers; // MTP layers in the file: layers num_hidden_layers and up
    uint32_t rope_scaling;        // enum RopeScaling
    uint32_t rope_original_max_position_embeddings;
    uint32_t reserved;            // 0
    double rms_norm_eps;
    double rope_theta;
    double routed_scaling_factor;
    double rope_factor;           // yarn, llama3
    double rope_beta_fast;        // yarn
    double rope_beta_slow;        // yarn
    double rope_mscale;           // yarn: 0 where config.json has none
    double rope_mscale_all_dim;   // yarn: 0 where config.json has none
    double rope_attn_factor;      // yarn: 1 where config.json has none
    double rope_low_freq_factor;  // llama3
    double rope_high_freq_factor; // llama3
};

enum Dtype {
    DTYPE_F32 = 1, DTYPE_BF16, DTYPE_F8, DTYPE_Q8, DTYPE_Q4, DTYPE_Q6,
    DTYPE_COUNT,
    DTYPE_F16 = DTYPE_COUNT,      // [k][32] half-precision numbers: of the engine's cache, no file has it
};
#define RECIPE_SOURCE 0

static inline const char *dtype_name(uint32_t dtype) {
    static const char *const names[DTYPE_COUNT] = {"source", "f32", "bf16", "f8", "q8", "q4", "q6"};
    return dtype < DTYPE_COUNT ? names[dtype] : "unknown";
}

// ---- what a config may hold
//
// Everything that the engine relies on: no size can overflow a product, no divisor is zero. The converter asks, too, so that
// it never spends hours on a file that r1 refuses.
#define MAX_LAYERS 1024
#define MAX_DIMENSION (1u << 20)  // of any hidden, intermediate or head size
#define MAX_VOCAB (1u << 24)
#define MAX_EXPERTS 4096
#define MAX_ACTIVE_EXPERTS 64

#define CONFIG_ERROR_BYTES 200    // room for the longest sentence below

static inline bool check_range(const char *field, uint64_t value, uint64_t least, uint64_t most, char *error) {
    if (value >= least && value <= most) return true;
    snprintf(error, CONFIG_ERROR_BYTES, "%s is %" PRIu64 ", expected %" PRIu64 " to %" PRIu64, field, value, least, most);
    return false;
}

static inline bool check_number(const char *field, double value, double least, double most, char *error) {
    if (value >= least && value <= most) return true;    // false for NaN
    snprintf(error, CONFIG_ERROR_BYTES, "%s is %g, expected %g to %g", field, value, least, most);
    return false;
}

static inline bool check_multiple(const char *field, uint32_t value, const char *of, uint32_t divisor, char *error) {
    if (value % divisor == 0) return true;
    snprintf(error, CONFIG_ERROR_BYTES, "%s is %u, expected a multiple of %s (%u)", field, value, of, divisor);
    return false;
}

// False with a sentence in error, which has room for CONFIG_ERROR_BYTES, if a field is not what the engine can run.
static inline bool check_config(const struct ModelConfig *c, char *error) {
#define RANGE(field, least, most) if (!check_range(#field, c->field, least, most, error)) return false
#define NUMBER(field, least, most) if (!check_number(#field, c->field, least, most, error)) return false
#define MULTIPLE(field, of) if (!check_multiple(#field, c->field, #of, c->of, error)) return false
    RANGE(architecture, ARCH_DEEPSEEK_V3, ARCH_QWEN3);
    RANGE(recipe, 0, DTYPE_COUNT - 1);
    RANGE(hidden_size, 32, MAX_DIMENSION);
    RANGE(intermediate_size, c->n_routed_experts && !c->first_k_dense_replace ? 0 : 32, MAX_DIMENSION);
    RANGE(num_hidden_layers, 1, MAX_LAYERS);
    RANGE(num_attention_heads, 1, 4096);
    RANGE(vocab_size, 1, MAX_VOCAB);
    RANGE(max_position_embeddings, 1, 1u << 24);
    RANGE(tie_word_embeddings, 0, 1);
    RANGE(attention_bias, 0, 1);
    RANGE(qk_norm, 0, 1);
    RANGE(norm_topk_prob, 0, 1);
    RANGE(num_nextn_predict_layers, 0, 16);
    RANGE(rope_scaling, ROPE_PLAIN, ROPE_LLAMA3);
    NUMBER(rms_norm_eps, 0, 1);
    NUMBER(rope_theta, 1, 1e12);
    if (c->rope_scaling != ROPE_PLAIN) {
        NUMBER(rope_factor, 1, 1e6);
        RANGE(rope_original_max_position_embeddings, 1, 1u << 24);
    }
    if (c->rope_scaling == ROPE_YARN) {
        NUMBER(rope_beta_fast, 1e-6, 1e6);
        NUMBER(rope_beta_slow, 1e-6, 1e6);
        NUMBER(rope_mscale, 0, 100);
        NUMBER(rope_mscale_all_dim, 0, 100);
        NUMBER(rope_attn_factor, 1e-6, 100);
    }
    if (c->rope_scaling == ROPE_LLAMA3) {
        NUMBER(rope_low_freq_factor, 1e-6, 1e6);
        NUMBER(rope_high_freq_factor, 1e-6, 1e6);
        if (c->rope_high_freq_factor == c->rope_low_freq_factor) {
            snprintf(error, CONFIG_ERROR_BYTES, "rope_high_freq_factor equals rope_low_freq_factor (%g)", c->rope_low_freq_factor);
            return false;
        }
    }
    if (c->architecture == ARCH_DEEPSEEK_V3) {
        RANGE(q_lora_rank, 0, MAX_DIMENSION);
        RANGE(kv_lora_rank, 32, 4096);
        RANGE(qk_nope_head_dim, 32, 1024);
        RANGE(qk_rope_head_dim, 2, 1024);
        RANGE(v_head_dim, 1, 1024);
        if (!check_multiple("qk_rope_head_dim", c->qk_rope_head_dim, "a pair", 2, error)) return false;
    } else {
        RANGE(num_key_value_heads, 1, c->num_attention_heads);
        RANGE(head_dim, 2, 1024);
        if (!check_multiple("head_dim", c->head_dim, "a pair", 2, error)) return false;
        MULTIPLE(num_attention_heads, num_key_value_heads);
    }
    RANGE(n_routed_experts, 0, MAX_EXPERTS);
    if (c->n_routed_experts) {
        RANGE(n_shared_experts, 0, 64);
        RANGE(moe_intermediate_size, 32, MAX_DIMENSION / 64);
        RANGE(n_group, 1, c->n_routed_experts);
        RANGE(topk_group, 1, c->n_group);
        MULTIPLE(n_routed_experts, n_group);
        uint64_t within_reach = (uint64_t)c->n_routed_experts / c->n_group * c->topk_group;
        RANGE(num_experts_per_tok, 1, within_reach < MAX_ACTIVE_EXPERTS ? within_reach : MAX_ACTIVE_EXPERTS);
        NUMBER(routed_scaling_factor, 1e-6, 1e6);
    }
#undef RANGE
#undef NUMBER
#undef MULTIPLE
    return true;
}

#define ENTRY_MAX_PARTS 3

// A tensor is `experts` blobs of `stride` bytes, each of `parts` matrices. Most have one blob of one part. A feed-forward network
// is a blob of three parts: gate and up, with as many rows, whose panels alternate, and down behind them at a multiple of 64; the
// routed experts of a layer are n_routed_experts such blobs; the per-head factors of MLA are num_attention_heads blobs.
//
//   model.embed_tokens.weight [vocab, hidden]    model.norm.weight (vector)    lm_head.weight (absent when tied)
//   model.layers.L. input_layernorm.weight, post_attention_layernorm.weight (vectors)
//     self_attn.    GQA: q_proj.weight k_proj.weight v_proj.weight o_proj.weight, vectors q_proj.bias k_proj.bias
//                   v_proj.bias (qwen2), q_norm.weight k_norm.weight (qwen3)
//                   MLA: q_proj.weight, or q_a_proj.weight q_a_layernorm.weight q_b_proj.weight; kv_a_proj_with_mqa.weight
//                   kv_a_layernorm.weight o_proj.weight, and kv_b_proj cut into its factors, one blob a head:
//                   kv_b_proj.key            [qk_nope_head_dim, kv_lora_rank]   expands a latent to the keys
//                   kv_b_proj.key_transposed [kv_lora_rank, qk_nope_head_dim]   the same numbers: absorbs a query
//                   kv_b_proj.value          [v_head_dim, kv_lora_rank]
//     mlp                  (gate, up, down)  a dense layer
//     mlp.gate.weight      [n_routed_experts, hidden] f32, mlp.gate.e_score_correction_bias (vector)
//     mlp.experts          (gate, up, down)  n_routed_experts blobs
//     mlp.shared_experts   (gate, up, down)
//   MTP layers add enorm.weight hnorm.weight shared_head.norm.weight (vectors), eh_proj.weight [hidden, 2 hidden], and
//     embed_tokens.weight, shared_head.head.weight where they differ from the main model's.
struct TensorEntry {
    char name[64];                // zero-terminated, the rest zero
    uint16_t parts;               // 1 or 3
    uint16_t is_vector;           // 1: rows = 1, plain floats, not panels (norms, biases)
    uint32_t dtype[ENTRY_MAX_PARTS];  // enum Dtype; 0 beyond parts, as are rows and cols
    uint64_t rows[ENTRY_MAX_PARTS];
    uint64_t cols[ENTRY_MAX_PARTS];
    uint64_t experts;             // blobs; 1 unless told otherwise above
    uint64_t stride;              // bytes of a blob: blob_bytes()
    uint64_t offset;              // of the data, from the start of the file, a multiple of FORMAT_PAGE
    uint64_t bytes;               // experts * stride
    uint64_t hash;                // XXH3-64 of these bytes
};

// ---- how a matrix lies in memory
//
// Panels of 32 rows (the last one padded with zero rows), each panel one sequential stream over the columns in k-blocks
// of 256 columns (the last may be any multiple of 32). With r the row in the panel, k the column in the block:
//
//   f32   [k][32]            float                                       no head
//   bf16  [k/2][32][2]       upper half of a float                       no head
//   f8    [k/4][32][4]       E4M3     block head: float scale[8], one for each 32 columns, then 32 zero bytes
//   q8    [k/4][32][4]       int8     block head: float scale[32], one a row; value = scale * int8
//   q4    [k/8][32][4]       byte j of the 4: low nibble column 8i + j, high nibble column 8i + 4 + j
//                            panel head: float scale[32], one a row
//                            block head: uint8 sub[k-block / 32][32], one for each 32 columns and row;
//                            value = scale * (int8)(sub & 0xfe) * (Q4_TABLE[nibble] + (sub & 1 ? Q4_SHIFT : 0))
//   q6    [k/16] times 384 bytes: the tops of 16 columns, [32][4]: bits 2i and 2i + 1 of byte j belong to column 4i + j; then
//                            their nibbles as in q4, [2][32][4]. In this order each weight is read where the one before ends
//                            block head: float scale[32], one a row; value = scale * (16 * top + nibble - Q6_ZERO)
//
// q8, q4 and q6 hold the matrix in rotated columns: see below.
//
// The columns of every matrix are a multiple of 32. Stored int8 and table values stay in -127..127.
#define PANEL_ROWS 32
#define K_BLOCK 256
#define K_GROUP 32                // columns under one f8 scale, one q4 sub-scale; every column count is a multiple of it

#define Q4_SHIFT 7
// Denser near zero, where most weights are. Table and shift were fitted together (Lloyd's iteration around the converter's own
// search) to rows of 4096 normal and Student-t(5) weights.
static const int8_t Q4_TABLE[16] = {-127, -91, -71, -56, -42, -31, -20, -10, 0, 10, 21, 33, 46, 61, 80, 101};

// The code of zero: values are -32 to 31. A scale may be negative, so that the largest weight of a block takes the end that
// reaches further.
//
// Rotated columns are nearly normal, so one scale for 256 of them does: on normal weights the error is 0.027 of their
// deviation. A scale for each 32 would make that 0.020 for a quarter of a bit more, and unpacked weights inexact; uneven steps
// 0.024, but AVX2 cannot look up a table of 64.
#define Q6_ZERO 32
#define Q6_COLUMNS 16                                     // columns that lie together
#define Q6_NIBBLES (Q6_COLUMNS / 4 * PANEL_ROWS)          // where their nibbles start: behind the tops
#define Q6_BYTES (Q6_NIBBLES + Q6_COLUMNS / 2 * PANEL_ROWS)   // and where they end

// The value, without its scale, at row r and column k of a k-block's values w.
static inline int q6_value(const uint8_t *w, uint64_t r, uint64_t k) {
    const uint8_t *sixteen = w + k / Q6_COLUMNS * Q6_BYTES;
    uint64_t i = k % Q6_COLUMNS / 4, at = r * 4 + k % 4;
    int nibble = sixteen[Q6_NIBBLES + i / 2 * 4 * PANEL_ROWS + at] >> i % 2 * 4 & 15, top = sixteen[at] >> i * 2 & 3;
    return 16 * top + nibble - Q6_ZERO;
}

// The same of q4, without its row's scale and its group's sub-scale. sub: those of the k-block, whose low bits say which values shift.
static inline int q4_value(const uint8_t *sub, const uint8_t *w, uint64_t r, uint64_t k) {
    uint8_t pair = w[k / 8 * 4 * PANEL_ROWS + r * 4 + k % 4];
    return Q4_TABLE[k % 8 < 4 ? pair & 15 : pair >> 4] + (sub[k / K_GROUP * PANEL_ROWS + r] & 1 ? Q4_SHIFT : 0);
}

// Bytes in front of the first k-block of a panel.
static inline uint64_t panel_head_bytes(uint32_t dtype) { return dtype == DTYPE_Q4 ? PANEL_ROWS * 4 : 0; }

// Bytes in front of the values of a k-block of k columns (k a multiple of 32, at most 256).
static inline uint64_t block_head_bytes(uint32_t dtype, uint64_t k) {
    switch (dtype) {
    case DTYPE_F8: return 64;
    case DTYPE_Q8: case DTYPE_Q6: return PANEL_ROWS * 4;
    case DTYPE_Q4: return k / K_GROUP * PANEL_ROWS;
    default: return 0;
    }
}

// Bytes of k columns of 32 rows, without heads.
static inline uint64_t value_bytes(uint32_t dtype, uint64_t k) {
    switch (dtype) {
    case DTYPE_F32: return k * PANEL_ROWS * 4;
    case DTYPE_BF16: case DTYPE_F16: return k * PANEL_ROWS * 2;
    case DTYPE_F8: case DTYPE_Q8: return k * PANEL_ROWS;
    case DTYPE_Q4: return k * PANEL_ROWS / 2;
    case DTYPE_Q6: return k / Q6_COLUMNS * Q6_BYTES;
    default: return 0;
    }
}

static inline uint64_t panel_bytes(uint32_t dtype, uint64_t cols) {
    uint64_t full = cols / K_BLOCK, rest = cols % K_BLOCK;
    return panel_head_bytes(dtype) + full * block_head_bytes(dtype, K_BLOCK) + (rest ? block_head_bytes(dtype, rest) : 0) +
           value_bytes(dtype, cols);
}

// Bytes of a matrix, a multiple of 32. The caller has checked that rows and cols are below 2^32 and cols a multiple of 32.
static inline uint64_t matrix_bytes(uint32_t dtype, uint64_t rows, uint64_t cols) {
    return (rows + PANEL_ROWS - 1) / PANEL_ROWS * panel_bytes(dtype, cols);
}

// ---- the rotation of q8, q4 and q6
//
// A few columns of a model's activations are far larger than the rest, and one int8 scale for 256 of them would leave the
// others next to nothing. So integer products take place in rotated columns (QuaRot, arXiv:2404.00456): each k-block of a
// row is multiplied by random signs and a Hadamard matrix, which spreads a large column evenly over its block. The matrix is
// orthogonal: rotating the weights here and the activations in the engine leaves every product as it was.

// Inlined so that the engine's vector code for a processor takes them in.
#define ROTATION static inline __attribute__((always_inline))

// Multiplies by the Hadamard matrix of size `rows` down each of `cols` columns: x [rows][cols], rows a power of two.
ROTATION void hadamard_down(float *x, uint64_t rows, uint64_t cols) {
    for (uint64_t half = 1; half < rows; half *= 2)
        for (uint64_t r = 0; r < rows; r++) {
            if (r & half) continue;
            float *a = x + r * cols, *b = a + half * cols;
            for (uint64_t c = 0; c < cols; c++) {
                float sum = a[c] + b[c];
                b[c] = a[c] - b[c];
                a[c] = sum;
            }
        }
}

// The signs in front of the Hadamard matrix: bits of the fraction of the golden ratio, one for each column of a block.
static const uint32_t rotation_signs[K_BLOCK / 32] = {0x9e3779b9, 0x7f4a7c15, 0xf39cc060, 0x5cedc834,
                                                      0x1082276b, 0xf3a27251, 0xf86c6a11, 0xd0c18e95};
ROTATION float rotation_sign(uint64_t column) { return rotation_signs[column / 32] >> column % 32 & 1 ? -1.0f : 1.0f; }

// 1 / sqrt(n)
ROTATION float rotation_norm(uint64_t n) {
    return n == 256 ? 0x1p-4f : n == 128 ? 0.08838834764831845f : n == 64 ? 0x1p-3f : 0.17677669529663687f;
}

// Rotates n columns (a power of two, 32 to 256): as a matrix of n/16 rows of 16, down its columns, transposed, and down its
// columns again, so that all additions are of whole vectors. out [n] is not x.
ROTATION void rotate_columns(const float *x, uint64_t n, float *out) {
    float turned[K_BLOCK];
    uint64_t rows = n / 16;
    for (uint64_t i = 0; i < n; i++) turned[i] = x[i] * rotation_sign(i);
    hadamard_down(turned, rows, 16);
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t c = 0; c < 16; c++) out[c * rows + r] = turned[r * 16 + c];
    hadamard_down(out, 16, rows);
    float norm = rotation_norm(n);
    for (uint64_t i = 0; i < n; i++) out[i] *= norm;
}

// The way back.
static inline void rotate_columns_back(const float *x, uint64_t n, float *out) {
    float turned[K_BLOCK];
    uint64_t rows = n / 16;
    for (uint64_t i = 0; i < n; i++) turned[i] = x[i];
    hadamard_down(turned, 16, rows);
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t c = 0; c < 16; c++) out[r * 16 + c] = turned[c * rows + r];
    hadamard_down(out, rows, 16);
    float norm = rotation_norm(n);
    for (uint64_t i = 0; i < n; i++) out[i] *= norm * rotation_sign(i);
}

// Columns that are rotated together at the start of `rest` ones: a k-block, or the largest power of two of a short one.
static inline uint64_t rotation_width(uint64_t rest) {
    uint64_t width = K_BLOCK;
    while (width > rest) width /= 2;
    return width;
}

static inline uint64_t align_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

// Bytes from one panel of a part to its next. The panels of gate and up alternate, so that a core that computes silu(gate) * up
// panel by panel reads one stream, too.
static inline uint64_t panel_step(const struct TensorEntry *entry, unsigned part) {
    uint64_t bytes = panel_bytes(entry->dtype[part], entry->cols[part]);
    if (entry->parts == ENTRY_MAX_PARTS && part < 2) bytes += panel_bytes(entry->dtype[!part], entry->cols[!part]);
    return bytes;
}

// Where part `part` starts inside a blob.
static inline uint64_t part_offset(const struct TensorEntry *entry, unsigned part) {
    if (part == 0) return 0;
    if (part == 1) return panel_bytes(entry->dtype[0], entry->cols[0]);
    return align_up((entry->rows[0] + PANEL_ROWS - 1) / PANEL_ROWS * panel_step(entry, 0), 64);
}

// Bytes of one blob. An expert starts on a page of its own, so that one read brings it in.
static inline uint64_t blob_bytes(const struct TensorEntry *entry) {
    if (entry->is_vector) return align_up(entry->cols[0] * sizeof(float), 64);
    unsigned last = entry->parts - 1u;
    uint64_t bytes = part_offset(entry, last) + align_up(matrix_bytes(entry->dtype[last], entry->rows[last], entry->cols[last]), 64);
    return entry->parts == 3 && entry->experts > 1 ? align_up(bytes, FORMAT_PAGE) : bytes;
}

#endif
