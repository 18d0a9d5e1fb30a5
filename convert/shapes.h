// What a model is made of: the tensors of each architecture, the type that each is stored as, and the shapes of the published
// models, in which random weights stand for the real ones where only speed is to be measured.
//
// r1-convert looks a checkpoint's tensors up and writes them by this list; `r1-convert --synthetic` writes random ones by it,
// and `r1 bench SHAPE` lays out the same model in memory.
#ifndef R1_SHAPES_H
#define R1_SHAPES_H

#include <string.h>
#include <xxhash.h>

#include "format.h"

// ---- the tensors of an architecture

// What a tensor is for; this decides its type.
enum Role {
    ROLE_EMBEDDING, ROLE_ATTENTION, ROLE_KEYS /* and values */, ROLE_FACTOR /* of kv_b_proj */, ROLE_DENSE,
    ROLE_EXPERTS, ROLE_SHARED, ROLE_ROUTER, ROLE_VECTOR, ROLE_HEAD, ROLE_MTP, ROLE_COUNT
};

struct ModelTensor {
    enum Role role;
    struct TensorEntry entry;     // name and shape; the type, and with it size and place, come later
};

// `blobs` matrices [rows, cols], or feed-forward networks, of which gate and up are [rows, cols], down [cols, rows].
static inline struct ModelTensor describe_tensor(enum Role role, uint64_t blobs, uint64_t rows, uint64_t cols, const char *format,
                                                 size_t layer) {
    bool network = role == ROLE_DENSE || role == ROLE_EXPERTS || role == ROLE_SHARED;
    struct ModelTensor tensor = {role, {.parts = network ? 3 : 1, .is_vector = role == ROLE_VECTOR, .experts = blobs}};
    snprintf(tensor.entry.name, sizeof tensor.entry.name, format, layer);
    for (unsigned part = 0; part < tensor.entry.parts; part++) {
        tensor.entry.rows[part] = part == 2 ? cols : rows;
        tensor.entry.cols[part] = part == 2 ? rows : cols;
    }
    return tensor;
}

#define LAYER_TENSORS 16          // no layer has more

// Lists the tensors of a layer, main or MTP, in the order of the file; returns how many.
static inline size_t list_layer(const struct ModelConfig *c, size_t layer, struct ModelTensor out[LAYER_TENSORS]) {
#define TENSOR(role, blobs, rows, cols, name) \
    out[count++] = describe_tensor(role, blobs, rows, cols, "model.layers.%zu." name, layer)
#define MATRIX(role, rows, cols, name) TENSOR(role, 1, rows, cols, name)
#define VECTOR(cols, name) TENSOR(ROLE_VECTOR, 1, 1, cols, name)
    uint64_t hidden = c->hidden_size, heads = c->num_attention_heads;
    size_t count = 0;
    VECTOR(hidden, "input_layernorm.weight");
    if (c->architecture == ARCH_DEEPSEEK_V3) {
        uint64_t query = heads * (c->qk_nope_head_dim + c->qk_rope_head_dim), lora = c->kv_lora_rank, nope = c->qk_nope_head_dim;
        if (c->q_lora_rank) {
            MATRIX(ROLE_ATTENTION, c->q_lora_rank, hidden, "self_attn.q_a_proj.weight");
            VECTOR(c->q_lora_rank, "self_attn.q_a_layernorm.weight");
            MATRIX(ROLE_ATTENTION, query, c->q_lora_rank, "self_attn.q_b_proj.weight");
        } else {
            MATRIX(ROLE_ATTENTION, query, hidden, "self_attn.q_proj.weight");
        }
        MATRIX(ROLE_KEYS, lora + c->qk_rope_head_dim, hidden, "self_attn.kv_a_proj_with_mqa.weight");
        VECTOR(lora, "self_attn.kv_a_layernorm.weight");
        TENSOR(ROLE_FACTOR, heads, nope, lora, "self_attn.kv_b_proj.key");
        TENSOR(ROLE_FACTOR, heads, lora, nope, "self_attn.kv_b_proj.key_transposed");
        TENSOR(ROLE_FACTOR, heads, c->v_head_dim, lora, "self_attn.kv_b_proj.value");
        MATRIX(ROLE_ATTENTION, hidden, heads * c->v_head_dim, "self_attn.o_proj.weight");
    } else {
        uint64_t query = heads * c->head_dim, key = (uint64_t)c->num_key_value_heads * c->head_dim;
        MATRIX(ROLE_ATTENTION, query, hidden, "self_attn.q_proj.weight");
        MATRIX(ROLE_KEYS, key, hidden, "self_attn.k_proj.weight");
        MATRIX(ROLE_KEYS, key, hidden, "self_attn.v_proj.weight");
        MATRIX(ROLE_ATTENTION, hidden, query, "self_attn.o_proj.weight");
        if (c->attention_bias) {
            VECTOR(query, "self_attn.q_proj.bias");
            VECTOR(key, "self_attn.k_proj.bias");
            VECTOR(key, "self_attn.v_proj.bias");
        }
        if (c->qk_norm) {
            VECTOR(c->head_dim, "self_attn.q_norm.weight");
            VECTOR(c->head_dim, "self_attn.k_norm.weight");
        }
    }
    VECTOR(hidden, "post_attention_layernorm.weight");
    if (!c->n_routed_experts || layer < c->first_k_dense_replace) {
        TENSOR(ROLE_DENSE, 1, c->intermediate_size, hidden, "mlp");
        return count;
    }
    MATRIX(ROLE_ROUTER, c->n_routed_experts, hidden, "mlp.gate.weight");
    VECTOR(c->n_routed_experts, "mlp.gate.e_score_correction_bias");
    if (c->n_shared_experts)
        TENSOR(ROLE_SHARED, 1, (uint64_t)c->n_shared_experts * c->moe_intermediate_size, hidden, "mlp.shared_experts");
    TENSOR(ROLE_EXPERTS, c->n_routed_experts, c->moe_intermediate_size, hidden, "mlp.experts");
    return count;
#undef TENSOR
#undef MATRIX
#undef VECTOR
}

// The most that list_model() can list.
static inline size_t most_tensors(const struct ModelConfig *c) { return 3 + (size_t)c->num_hidden_layers * LAYER_TENSORS; }

// Lists the tensors of the main model in the order of the file; returns how many.
static inline size_t list_model(const struct ModelConfig *c, struct ModelTensor *out) {
    size_t count = 0;
    out[count++] = describe_tensor(ROLE_EMBEDDING, 1, c->vocab_size, c->hidden_size, "model.embed_tokens.weight", 0);
    for (size_t layer = 0; layer < c->num_hidden_layers; layer++) count += list_layer(c, layer, out + count);
    out[count++] = describe_tensor(ROLE_VECTOR, 1, 1, c->hidden_size, "model.norm.weight", 0);
    if (!c->tie_word_embeddings) out[count++] = describe_tensor(ROLE_HEAD, 1, c->vocab_size, c->hidden_size, "lm_head.weight", 0);
    return count;
}

// The type of a matrix by its role and the model's recipe; source: what it is in the checkpoint. --type q4 means the matrices
// that make up the bulk of a model; the others, which 4 bits harm more for their size, take 6, and what makes keys and values,
// small and shared by many query heads, takes 8 in q6 as well, unless all are to be uniform. docs/quality.md has the measurements.
static inline uint32_t choose_dtype(const struct ModelConfig *c, bool uniform, enum Role role, uint32_t source) {
    uint32_t recipe = c->recipe;
    if (role == ROLE_VECTOR || role == ROLE_ROUTER) return DTYPE_F32;
    if (role == ROLE_FACTOR) {
        // These are small and sensitive: never below their source, unless the type is a float one that was asked for.
        uint32_t dtype = recipe == RECIPE_SOURCE ? source
                       : recipe < DTYPE_Q8       ? recipe
                       : source == DTYPE_F8      ? DTYPE_F8
                                                 : DTYPE_BF16;
        // A panel of f8 has one scale for its 32 rows; the 128-row blocks of the source stay whole panels only like this.
        return dtype == DTYPE_F8 && c->v_head_dim % PANEL_ROWS ? DTYPE_F32 : dtype;
    }
    if (recipe == RECIPE_SOURCE) return source;
    if (uniform || (recipe != DTYPE_Q4 && recipe != DTYPE_Q6)) return recipe;
    if (role == ROLE_KEYS) return DTYPE_Q8;
    bool bulk = role == ROLE_EXPERTS || (!c->n_routed_experts && (role == ROLE_ATTENTION || role == ROLE_DENSE));
    return bulk ? recipe : DTYPE_Q6;
}

// Leaves of a model its first layers alone.
static inline void keep_layers(struct ModelConfig *c, uint32_t layers) {
    c->num_hidden_layers = layers;
    c->num_nextn_predict_layers = 0;
    if (c->first_k_dense_replace > layers) c->first_k_dense_replace = layers;
}

// ---- the shapes of the published models

// The published config.json of each model. R1's 61 layers are without its MTP layer, which synthetic models leave out.
static const struct Shape {
    const char *name;
    uint32_t source;              // dtype of the published kv_b_proj, which the recipe keeps below 16 bits only where exact
    struct ModelConfig config;
} known_shapes[] = {
#define QWEN2(hidden, intermediate, layers, heads, kv_heads, vocab, theta, eps) \
    DTYPE_BF16, {.architecture = ARCH_QWEN2, .hidden_size = hidden, .intermediate_size = intermediate, .num_hidden_layers = layers, \
                 .num_attention_heads = heads, .num_key_value_heads = kv_heads, .head_dim = 128, .vocab_size = vocab, \
                 .max_position_embeddings = 131072, .attention_bias = 1, .rms_norm_eps = eps, .rope_theta = theta}
#define LLAMA3(hidden, intermediate, layers, heads) \
    DTYPE_BF16, {.architecture = ARCH_LLAMA, .hidden_size = hidden, .intermediate_size = intermediate, .num_hidden_layers = layers, \
                 .num_attention_heads = heads, .num_key_value_heads = 8, .head_dim = 128, .vocab_size = 128256, \
                 .max_position_embeddings = 131072, .rope_scaling = ROPE_LLAMA3, .rope_original_max_position_embeddings = 8192, \
                 .rms_norm_eps = 1e-5, .rope_theta = 500000, .rope_factor = 8, .rope_low_freq_factor = 1, .rope_high_freq_factor = 4}
    {"r1", DTYPE_F8, {
        .architecture = ARCH_DEEPSEEK_V3, .hidden_size = 7168, .intermediate_size = 18432, .num_hidden_layers = 61,
        .num_attention_heads = 128, .num_key_value_heads = 128, .vocab_size = 129280, .max_position_embeddings = 163840,
        .q_lora_rank = 1536, .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128,
        .n_routed_experts = 256, .n_shared_experts = 1, .num_experts_per_tok = 8, .moe_intermediate_size = 2048,
        .first_k_dense_replace = 3, .n_group = 8, .topk_group = 4, .norm_topk_prob = 1, .rope_scaling = ROPE_YARN,
        .rope_original_max_position_embeddings = 4096, .rms_norm_eps = 1e-6, .rope_theta = 10000, .routed_scaling_factor = 2.5,
        .rope_factor = 40, .rope_beta_fast = 32, .rope_beta_slow = 1, .rope_mscale = 1, .rope_mscale_all_dim = 1,
        .rope_attn_factor = 1}},
    {"r1-distill-qwen-1.5b", QWEN2(1536, 8960, 28, 12, 2, 151936, 10000, 1e-6)},
    {"r1-distill-qwen-7b", QWEN2(3584, 18944, 28, 28, 4, 152064, 10000, 1e-6)},
    {"r1-distill-qwen-14b", QWEN2(5120, 13824, 48, 40, 8, 152064, 1000000, 1e-5)},
    {"r1-distill-qwen-32b", QWEN2(5120, 27648, 64, 40, 8, 152064, 1000000, 1e-5)},
    {"r1-distill-llama-8b", LLAMA3(4096, 14336, 32, 32)},
    {"r1-distill-llama-70b", LLAMA3(8192, 28672, 80, 64)},
    {"r1-0528-qwen3-8b", DTYPE_BF16, {
        .architecture = ARCH_QWEN3, .hidden_size = 4096, .intermediate_size = 12288, .num_hidden_layers = 36,
        .num_attention_heads = 32, .num_key_value_heads = 8, .head_dim = 128, .vocab_size = 151936,
        .max_position_embeddings = 131072, .qk_norm = 1, .rope_scaling = ROPE_YARN, .rope_original_max_position_embeddings = 32768,
        .rms_norm_eps = 1e-6, .rope_theta = 1000000, .rope_factor = 4, .rope_beta_fast = 32, .rope_beta_slow = 1,
        .rope_attn_factor = 0.8782488562869419}},
    {"moonlight-16b-a3b", DTYPE_BF16, {
        .architecture = ARCH_DEEPSEEK_V3, .hidden_size = 2048, .intermediate_size = 11264, .num_hidden_layers = 27,
        .num_attention_heads = 16, .num_key_value_heads = 16, .vocab_size = 163840, .max_position_embeddings = 8192,
        .kv_lora_rank = 512, .qk_nope_head_dim = 128, .qk_rope_head_dim = 64, .v_head_dim = 128, .n_routed_experts = 64,
        .n_shared_experts = 2, .num_experts_per_tok = 6, .moe_intermediate_size = 1408, .first_k_dense_replace = 1, .n_group = 1,
        .topk_group = 1, .norm_topk_prob = 1, .rms_norm_eps = 1e-5, .rope_theta = 50000, .routed_scaling_factor = 2.446}},
#undef QWEN2
#undef LLAMA3
};

#define SHAPE_COUNT (sizeof known_shapes / sizeof *known_shapes)

// The shape that NAME or NAME:REST names, NULL if none. *rest is what follows the colon, or NULL.
static inline const struct Shape *find_shape(const char *text, const char **rest) {
    size_t length = strcspn(text, ":");
    *rest = text[length] ? text + length + 1 : NULL;
    for (size_t i = 0; i < SHAPE_COUNT; i++)
        if (strlen(known_shapes[i].name) == length && memcmp(known_shapes[i].name, text, length) == 0) return &known_shapes[i];
    return NULL;
}

// The config of a shape's first layers; layers: 0, or as many as there are, for all.
static inline struct ModelConfig shape_config(const struct Shape *shape, uint32_t recipe, uint32_t layers) {
    struct ModelConfig config = shape->config;
    config.recipe = recipe;
    if (layers && layers < config.num_hidden_layers) keep_layers(&config, layers);
    return config;
}

// ---- random weights
//
// They make no sense but have the size of trained ones, so that no sum overflows. Every panel has random numbers of its own,
// which follow from the tensor's name and the panel's place in it: they are the same in memory and in a file, whoever makes
// them in what order. All rows of the shapes above fill whole panels.

#define RANDOM_DEVIATION 0.02f    // standard deviation of the weights: about what trained ones have

// Which bits of a random word are kept and which are set to make weights of it: floats of +-2^-6 to 2^-5; E4M3 numbers of
// +-2 to 448, as almost all real ones are (a block's largest is 448), and never not-a-number; int8 without -128.
static const struct { uint64_t kept, set; } random_weights[DTYPE_COUNT] = {
    [DTYPE_F32] = {0x807fffff807fffff, 0x3c8000003c800000}, [DTYPE_BF16] = {0x807f807f807f807f, 0x3c803c803c803c80},
    [DTYPE_F8] = {0xfefefefefefefefe, 0x4040404040404040}, [DTYPE_Q8] = {UINT64_MAX, 0x0101010101010101},
    [DTYPE_Q4] = {UINT64_MAX, 0}, [DTYPE_Q6] = {UINT64_MAX, 0}};

// Xorshift (Marsaglia 2003): fast, and good enough for weights. The state is never 0.
static inline uint64_t random_word(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static inline void fill_floats(void *out, uint64_t count, float value) {
    for (uint64_t i = 0; i < count; i++) memcpy((uint8_t *)out + i * sizeof value, &value, sizeof value);
}

// A vector: norms scale by one, biases are small.
static inline void fill_vector(const struct TensorEntry *entry, uint8_t *out) {
    fill_floats(out, entry->cols[0], strstr(entry->name, "bias") ? RANDOM_DEVIATION : 1.0f);
}

// Where a panel starts in its tensor.
static inline uint64_t panel_offset(const struct TensorEntry *entry, uint64_t blob, unsigned part, uint64_t panel) {
    return blob * entry->stride + part_offset(entry, part) + panel * panel_step(entry, part);
}

// The panel of a part that starts `offset` bytes into the tensor. The scales undo the deviation of evenly distributed codes:
// 142 for f8, 73 for q8, 67 for q4's table, 18.5 for q6.
static inline void fill_panel(const struct TensorEntry *entry, unsigned part, uint64_t offset, uint8_t *out) {
    uint32_t dtype = entry->dtype[part];
    uint64_t kept = random_weights[dtype].kept, set = random_weights[dtype].set;
    uint64_t random = XXH3_64bits_withSeed(entry->name, strlen(entry->name), offset) | 1;
    fill_floats(out, panel_head_bytes(dtype) / sizeof(float), RANDOM_DEVIATION / (67.0f * 96.0f));
    uint8_t *block = out + panel_head_bytes(dtype);
    for (uint64_t first = 0; first < entry->cols[part]; first += K_BLOCK) {
        uint64_t rest = entry->cols[part] - first, length = rest < K_BLOCK ? rest : K_BLOCK;
        uint64_t head = block_head_bytes(dtype, length), end = head + value_bytes(dtype, length);
        if (dtype == DTYPE_Q4) {
            memset(block, 96, head);
        } else {
            memset(block, 0, head);
            if (dtype == DTYPE_F8) fill_floats(block, length / K_GROUP, RANDOM_DEVIATION / 142.0f);
            if (dtype == DTYPE_Q8) fill_floats(block, PANEL_ROWS, RANDOM_DEVIATION / 73.0f);
            if (dtype == DTYPE_Q6) fill_floats(block, PANEL_ROWS, RANDOM_DEVIATION / 18.5f);
        }
        for (uint64_t i = head; i < end; i += sizeof random) {
            uint64_t word = (random_word(&random) & kept) | set;
            memcpy(block + i, &word, sizeof word);
        }
        block += end;
    }
}

#endif
