// r1-convert: a Hugging Face checkpoint directory -> one .r1 file (format.h), without Python.
//
// It runs in four steps. config.json becomes a ModelConfig, every value checked. The plan lists each tensor of the output
// with its sources, dtype, shape and place, all checked against the shard headers, before a byte is written. Then the
// tensors stream through, a few panels at a time: threads read their rows by pread, convert and pack them, while one of
// them writes what the last round made. Preamble and tables come last, and the file gets its name only when it is whole and
// synced.
//
// --synthetic takes the config of a known shape instead, and random numbers for weights; the rest is the same.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <getopt.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>
#include <xxhash.h>

#include "../tokenizer.h"
#include "format.h"
#include "quantize.h"
#include "safetensors.h"
#include "shapes.h"

#define F8_BLOCK 128                     // rows and columns under one scale of an FP8 checkpoint
#define F8_MAX 448.0f
#define BATCH_BYTES ((uint64_t)24 << 20)      // of output in one round; two are in memory
#define SMALL_BATCH_BYTES ((uint64_t)512 << 10)   // not worth waking other threads
#define SCRATCH_BYTES ((uint64_t)512 << 20)   // all threads together; fewer threads run where this does not suffice
#define FILE_MAX_BYTES ((uint64_t)1 << 56)
#define SYNC_BYTES ((uint64_t)1 << 30)        // written between two syncs, so that the last one is short

typedef struct {
    const char *directory;               // the checkpoint; with a shape the folder of the tokenizer, or NULL
    const char *output;
    const struct Shape *shape;           // of --synthetic, else NULL
    uint32_t recipe;                     // enum Dtype or RECIPE_SOURCE
    uint32_t layers;                     // 0: all
    int threads;
    bool uniform, tokenizer_only, dry_run, force, quiet;
} Options;

// --------------------------------------------------------------------------------------------------------- config.json

typedef struct {
    const json_t *object;
    const char *path;                    // of the file, for messages
    const char *within;                  // "" or "rope_scaling."
    Failure *failure;
} Keys;

// A value as JSON, shortened for a message.
static const char *show_value(const json_t *value, char *text, size_t size) {
    char *dump = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    snprintf(text, size, "%.*s%s", (int)size - 5, dump ? dump : value ? "?" : "nothing",
             dump && strlen(dump) > size - 5 ? "..." : "");
    free(dump);
    return text;
}

// The value of a key; null counts as absent.
static const json_t *get_key(const Keys *keys, const char *key) {
    const json_t *value = json_object_get(keys->object, key);
    return json_is_null(value) ? NULL : value;
}

static bool fail_key(const Keys *keys, const char *key, const char *expected) {
    char text[80];
    return fail(keys->failure, "%s: %s%s: expected %s, got %s", keys->path, keys->within, key, expected,
                show_value(json_object_get(keys->object, key), text, sizeof text));
}

// A key that config.json must have, if only as null.
static bool need_key(const Keys *keys, const char *key) {
    return json_object_get(keys->object, key) || fail(keys->failure, "%s: key %s%s is missing", keys->path, keys->within, key);
}

// Ranges are left to check_config(), which r1 applies to the finished file.
static bool read_real(const Keys *keys, const char *key, double *out) {
    if (!need_key(keys, key)) return false;
    const json_t *value = get_key(keys, key);
    if (!json_is_number(value)) return fail_key(keys, key, "a number");
    *out = json_number_value(value);
    return true;
}

static bool read_real_or(const Keys *keys, const char *key, double fallback, double *out) {
    *out = fallback;
    return !get_key(keys, key) || read_real(keys, key, out);
}

static bool read_count(const Keys *keys, const char *key, uint32_t *out) {
    if (!need_key(keys, key)) return false;
    const json_t *value = get_key(keys, key);
    double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= 0 && number <= UINT32_MAX) || number != floor(number)) {
        return fail_key(keys, key, "a whole number from 0 to 4294967295");
    }
    *out = (uint32_t)number;
    return true;
}

static bool read_count_or(const Keys *keys, const char *key, uint32_t fallback, uint32_t *out) {
    *out = fallback;
    return !get_key(keys, key) || read_count(keys, key, out);
}

static bool read_flag(const Keys *keys, const char *key, uint32_t *out) {
    if (!need_key(keys, key)) return false;
    const json_t *value = get_key(keys, key);
    if (!json_is_boolean(value)) return fail_key(keys, key, "true or false");
    *out = json_is_true(value);
    return true;
}

// Switches that we do not implement must be absent or at the value that changes nothing.
static bool expect_flag(const Keys *keys, const char *key, bool expected) {
    const json_t *value = get_key(keys, key);
    if (!value || (json_is_boolean(value) && json_is_true(value) == expected)) return true;
    return fail_key(keys, key, expected ? "true (nothing else is supported)" : "false (nothing else is supported)");
}

static bool expect_text(const Keys *keys, const char *key, const char *expected) {
    const json_t *value = get_key(keys, key);
    if (!value || (json_is_string(value) && strcmp(json_string_value(value), expected) == 0)) return true;
    char text[80];
    snprintf(text, sizeof text, "\"%s\" (nothing else is supported)", expected);
    return fail_key(keys, key, text);
}

static bool expect_one(const Keys *keys, const char *key) {
    const json_t *value = get_key(keys, key);
    return !value || (json_is_number(value) && json_number_value(value) == 1.0) ||
           fail_key(keys, key, "1 (nothing else is supported)");
}

static const struct {
    const char *model_type, *architecture;
    uint32_t number;
} known_models[] = {
    {"deepseek_v3", "DeepseekV3ForCausalLM", ARCH_DEEPSEEK_V3},
    {"qwen2", "Qwen2ForCausalLM", ARCH_QWEN2},
    {"llama", "LlamaForCausalLM", ARCH_LLAMA},
    {"qwen3", "Qwen3ForCausalLM", ARCH_QWEN3},
};

static bool read_architecture(const Keys *keys, struct ModelConfig *config) {
    const json_t *type = get_key(keys, "model_type"), *list = get_key(keys, "architectures");
    const char *name = json_string_value(type), *architecture = json_string_value(json_array_get(list, 0));
    const char *known = "deepseek_v3, qwen2, llama and qwen3";
    char text[80];
    for (size_t i = 0; name && i < sizeof known_models / sizeof *known_models; i++) {
        if (strcmp(name, known_models[i].model_type) != 0) continue;
        if (list && (!architecture || strcmp(architecture, known_models[i].architecture) != 0)) {
            return fail(keys->failure, "%s: architectures: expected %s for model_type %s, got %s", keys->path,
                        known_models[i].architecture, name, show_value(list, text, sizeof text));
        }
        config->architecture = known_models[i].number;
        return true;
    }
    return fail(keys->failure, "%s: model_type %s is not known; r1 runs %s", keys->path,
                show_value(type, text, sizeof text), known);
}

// rope_theta and the scaling from `key`, an object that may be absent.
static bool read_rope_object(const Keys *keys, const char *key, struct ModelConfig *config) {
    const json_t *object = get_key(keys, key), *value;
    if (object && !json_is_object(object)) return fail_key(keys, key, "an object or null");
    char within[24];
    snprintf(within, sizeof within, "%s.", key);
    Keys rope = {object, keys->path, within, keys->failure};
    const char *name;
    json_object_foreach((json_t *)object, name, value) {
        if (json_is_object(value)) {
            return fail_key(&rope, name, "no object (different rotations by layer are not supported)");
        }
    }
    double theta;
    if (!expect_one(keys, "partial_rotary_factor") || !expect_one(&rope, "partial_rotary_factor") ||
        !read_real_or(keys, "rope_theta", 10000.0, &theta) ||
        !read_real_or(&rope, "rope_theta", theta, &config->rope_theta)) {
        return false;
    }
    if (get_key(keys, "rope_theta") && config->rope_theta != theta) {
        return fail(keys->failure, "%s: rope_theta is %.10g, but %srope_theta is %.10g", keys->path, theta, within,
                    config->rope_theta);
    }
    const char *kind_key = get_key(&rope, "rope_type") ? "rope_type" : "type";
    const json_t *kind_value = get_key(&rope, kind_key);
    const char *kind = kind_value ? json_string_value(kind_value) : "default";
    if (kind && strcmp(kind, "default") == 0) return true;
    if (kind && strcmp(kind, "yarn") == 0) {
        config->rope_scaling = ROPE_YARN;
        double attention;
        if (!read_real(&rope, "factor", &config->rope_factor) ||
            !read_count(&rope, "original_max_position_embeddings", &config->rope_original_max_position_embeddings) ||
            !read_real_or(&rope, "beta_fast", 32.0, &config->rope_beta_fast) ||
            !read_real_or(&rope, "beta_slow", 1.0, &config->rope_beta_slow) ||
            !read_real_or(&rope, "mscale", 0.0, &config->rope_mscale) ||
            !read_real_or(&rope, "mscale_all_dim", 0.0, &config->rope_mscale_all_dim) ||
            !read_real_or(&rope, "attn_factor", 1.0, &config->rope_attn_factor) ||
            !read_real_or(&rope, "attention_factor", 0.0, &attention) || !expect_flag(&rope, "truncate", true)) {
            return false;
        }
        if (get_key(&rope, "attention_factor")) {
            // It is the factor of cos and sin itself. The engine multiplies rope_attn_factor with YaRN's own, unless both
            // mscales are there.
            config->rope_attn_factor = attention / (0.1 * log(config->rope_factor) + 1.0);
            config->rope_mscale = 0.0;
        }
    } else if (kind && strcmp(kind, "llama3") == 0) {
        config->rope_scaling = ROPE_LLAMA3;
        if (!read_real(&rope, "factor", &config->rope_factor) ||
            !read_count(&rope, "original_max_position_embeddings", &config->rope_original_max_position_embeddings) ||
            !read_real(&rope, "low_freq_factor", &config->rope_low_freq_factor) ||
            !read_real(&rope, "high_freq_factor", &config->rope_high_freq_factor)) {
            return false;
        }
        if (config->rope_high_freq_factor <= config->rope_low_freq_factor) {
            return fail_key(&rope, "high_freq_factor", "more than low_freq_factor");
        }
    } else {
        return fail_key(&rope, kind_key, "\"default\", \"yarn\" or \"llama3\"");
    }
    return true;
}

// The rotation, from the keys as published (rope_theta, rope_scaling) or as transformers 5 writes them (rope_parameters).
static bool read_rope(const Keys *keys, struct ModelConfig *config) {
    bool published = get_key(keys, "rope_scaling"), later = get_key(keys, "rope_parameters");
    struct ModelConfig other = *config;
    if (!read_rope_object(keys, later ? "rope_parameters" : "rope_scaling", config)) return false;
    if (!published || !later) return true;
    if (!read_rope_object(keys, "rope_scaling", &other)) return false;
    return memcmp(&other, config, sizeof other) == 0 ||
           fail(keys->failure, "%s: rope_scaling and rope_parameters contradict each other", keys->path);
}

// YaRN blends two frequencies along a ramp over the dimensions; init_rope() in r1.c computes the same ends of it. With
// an original context of a few tokens it would end before it starts, which programs read in different ways.
static bool check_yarn_ramp(const Keys *keys, const struct ModelConfig *c) {
    if (c->rope_scaling != ROPE_YARN) return true;
    if (c->rope_beta_fast < c->rope_beta_slow) {
        return fail(keys->failure, "%s: YaRN's beta_fast is %g, expected beta_slow (%g) or more", keys->path,
                    c->rope_beta_fast, c->rope_beta_slow);
    }
    double dim = c->architecture == ARCH_DEEPSEEK_V3 ? c->qk_rope_head_dim : c->head_dim;
    double original = c->rope_original_max_position_embeddings, scale = dim / (2 * log(c->rope_theta));
    double start = fmax(floor(scale * log(original / (c->rope_beta_fast * 2 * M_PI))), 0);
    double end = fmin(ceil(scale * log(original / (c->rope_beta_slow * 2 * M_PI))), dim - 1);
    return end >= start ||
           fail(keys->failure,
                "%s: original_max_position_embeddings is too small: with %.0f tokens YaRN's ramp would start at dimension "
                "%.0f and end at %.0f",
                keys->path, original, start, end);
}

// transformers has defaults for many of these keys, those of DeepSeek-V3, and guesses of ours might differ: all must be
// there. null means "none" where the architecture knows that.
static bool read_deepseek(const Keys *keys, struct ModelConfig *config) {
    if (!expect_text(keys, "scoring_func", "sigmoid") || !expect_text(keys, "topk_method", "noaux_tc") ||
        !expect_one(keys, "moe_layer_freq") || !expect_flag(keys, "rope_interleave", true) ||
        !need_key(keys, "q_lora_rank") || !read_count_or(keys, "q_lora_rank", 0, &config->q_lora_rank) ||
        !read_count(keys, "kv_lora_rank", &config->kv_lora_rank) ||
        !read_count(keys, "qk_nope_head_dim", &config->qk_nope_head_dim) ||
        !read_count(keys, "qk_rope_head_dim", &config->qk_rope_head_dim) ||
        !read_count(keys, "v_head_dim", &config->v_head_dim) || !need_key(keys, "n_routed_experts") ||
        !read_count_or(keys, "n_routed_experts", 0, &config->n_routed_experts) ||
        !read_count_or(keys, "num_nextn_predict_layers", 0, &config->num_nextn_predict_layers)) {
        return false;
    }
    if (config->n_routed_experts == 0) {
        config->first_k_dense_replace = config->num_hidden_layers;
        return true;
    }
    if (!need_key(keys, "n_shared_experts") || !read_count_or(keys, "n_shared_experts", 0, &config->n_shared_experts) ||
        !read_count(keys, "moe_intermediate_size", &config->moe_intermediate_size) ||
        !read_count(keys, "first_k_dense_replace", &config->first_k_dense_replace) ||
        !read_count(keys, "num_experts_per_tok", &config->num_experts_per_tok) || !need_key(keys, "n_group") ||
        !read_count_or(keys, "n_group", 1, &config->n_group) || !need_key(keys, "topk_group") ||
        !read_count_or(keys, "topk_group", 1, &config->topk_group) ||
        !read_flag(keys, "norm_topk_prob", &config->norm_topk_prob) ||
        !read_real(keys, "routed_scaling_factor", &config->routed_scaling_factor)) {
        return false;
    }
    if (config->first_k_dense_replace > config->num_hidden_layers) {
        return fail_key(keys, "first_k_dense_replace", "num_hidden_layers or less");
    }
    // A group's score is the sum of its two best experts.
    if (config->n_group > 1 && config->n_routed_experts / config->n_group < 2) {
        return fail_key(keys, "n_group", "two experts a group or more");
    }
    return true;
}

static bool read_gqa(const Keys *keys, struct ModelConfig *config) {
    const json_t *types = get_key(keys, "layer_types");
    if (!expect_flag(keys, "use_sliding_window", false) || !expect_flag(keys, "use_mrope", false) ||
        !expect_flag(keys, "rope_interleaved", false)) {
        return false;
    }
    if (types && !json_is_array(types)) return fail_key(keys, "layer_types", "an array");
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type || strcmp(type, "full_attention") != 0) {
            return fail_key(keys, "layer_types", "\"full_attention\" alone (nothing else is supported)");
        }
    }
    uint32_t heads = config->num_attention_heads;
    if (get_key(keys, "head_dim")) {
        if (!read_count(keys, "head_dim", &config->head_dim)) return false;
    } else if (heads) {
        if (config->hidden_size % heads) return fail_key(keys, "num_attention_heads", "a divisor of hidden_size");
        config->head_dim = config->hidden_size / heads;
    }
    config->attention_bias = config->architecture == ARCH_QWEN2;
    config->qk_norm = config->architecture == ARCH_QWEN3;
    return true;
}

static bool check_quantization(const Keys *keys) {
    const json_t *object = get_key(keys, "quantization_config");
    if (!object) return true;
    if (!json_is_object(object)) return fail_key(keys, "quantization_config", "an object or null");
    Keys inner = {object, keys->path, "quantization_config.", keys->failure};
    const json_t *block = get_key(&inner, "weight_block_size");
    if (!get_key(&inner, "quant_method")) return fail_key(&inner, "quant_method", "\"fp8\"");
    if (!expect_text(&inner, "quant_method", "fp8") || !expect_text(&inner, "fmt", "e4m3")) return false;
    if (json_array_size(block) != 2 || json_integer_value(json_array_get(block, 0)) != F8_BLOCK ||
        json_integer_value(json_array_get(block, 1)) != F8_BLOCK) {
        return fail_key(&inner, "weight_block_size", "[128, 128] (nothing else is supported)");
    }
    return true;
}

static bool read_config(const Keys *keys, struct ModelConfig *config) {
    *config = (struct ModelConfig){0};
    if (!read_architecture(keys, config) || !expect_text(keys, "hidden_act", "silu") ||
        !expect_flag(keys, "mlp_bias", false) ||
        // qwen2 always has biases on q, k and v, and its config.json has no such key.
        (config->architecture != ARCH_QWEN2 && !expect_flag(keys, "attention_bias", false)) || !check_quantization(keys) ||
        !read_count(keys, "hidden_size", &config->hidden_size) ||
        !read_count(keys, "intermediate_size", &config->intermediate_size) ||
        !read_count(keys, "num_hidden_layers", &config->num_hidden_layers) ||
        !read_count(keys, "num_attention_heads", &config->num_attention_heads) ||
        !read_count_or(keys, "num_key_value_heads", config->num_attention_heads, &config->num_key_value_heads) ||
        !read_count(keys, "vocab_size", &config->vocab_size) ||
        !read_count(keys, "max_position_embeddings", &config->max_position_embeddings) ||
        (get_key(keys, "tie_word_embeddings") && !read_flag(keys, "tie_word_embeddings", &config->tie_word_embeddings)) ||
        !read_real(keys, "rms_norm_eps", &config->rms_norm_eps) || !read_rope(keys, config)) {
        return false;
    }
    if (!(config->architecture == ARCH_DEEPSEEK_V3 ? read_deepseek(keys, config) : read_gqa(keys, config))) return false;
    char why[CONFIG_ERROR_BYTES];
    return (check_config(config, why) || fail(keys->failure, "%s: %s", keys->path, why)) && check_yarn_ramp(keys, config);
}

// ------------------------------------------------------------------------------------------------ config and tokenizer

typedef struct {
    uint32_t *ids;
    size_t count;
} Stops;

// eos_token_id may be an id, a list of them, or null.
static bool add_stops(const Keys *keys, Stops *stops) {
    const json_t *value = get_key(keys, "eos_token_id");
    size_t count = json_is_array(value) ? json_array_size(value) : value ? 1 : 0;
    if (count == 0) return true;
    uint32_t *grown = realloc(stops->ids, (stops->count + count) * sizeof *grown);
    if (!grown) return fail(keys->failure, "out of memory");
    stops->ids = grown;
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_is_array(value) ? json_array_get(value, i) : value;
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= TOKEN_NONE) {
            return fail_key(keys, "eos_token_id", "a token id, a list of them, or null");
        }
        bool seen = false;
        for (size_t j = 0; j < stops->count; j++) seen |= stops->ids[j] == (uint32_t)json_integer_value(id);
        if (!seen) stops->ids[stops->count++] = (uint32_t)json_integer_value(id);
    }
    return true;
}

// Everything of the output that comes before the tensors.
typedef struct {
    struct ModelConfig config;
    uint8_t *tokenizer;
    size_t tokenizer_bytes;
} Head;

// Reads a JSON file of the checkpoint; *object is NULL where an optional one does not exist.
static bool read_json(const Options *options, const char *name, bool optional, json_t **object, Failure *failure) {
    char *text;
    size_t bytes;
    *object = NULL;
    if (!read_whole_file(options->directory, name, optional, &text, &bytes, failure)) return false;
    if (!text) return true;
    *object = parse_json_object(options->directory, name, text, bytes, failure);
    free(text);
    return *object != NULL;
}

// Makes the tokenizer of the files' texts in `source`, for a model of head->config.
static bool build_tokenizer(const char *place, TokenizerSource *source, Head *head, Failure *failure) {
    char why[1000] = "";
    source->vocab_size = head->config.vocab_size;
    return tokenizer_build(source, &head->tokenizer, &head->tokenizer_bytes, why, sizeof why) ||
           fail(failure, "%.150s: %.1000s", place, why);
}

static bool read_tokenizer(const Options *options, const Stops *stops, Head *head, Failure *failure) {
    char *json = NULL, *config = NULL, *template = NULL;
    TokenizerSource source = {.stops = stops->ids, .stop_count = stops->count};
    bool ok =
        read_whole_file(options->directory, "tokenizer.json", false, &json, &source.tokenizer_json_bytes, failure) &&
        read_whole_file(options->directory, "tokenizer_config.json", false, &config, &source.tokenizer_config_json_bytes,
                        failure) &&
        read_whole_file(options->directory, "chat_template.jinja", true, &template, &source.chat_template_bytes, failure);
    source.tokenizer_json = json;
    source.tokenizer_config_json = config;
    source.chat_template = template;
    ok = ok && build_tokenizer(options->directory, &source, head, failure);
    free(json);
    free(config);
    free(template);
    return ok;
}

// A file without a tokenizer has one that knows no token.
static bool make_empty_tokenizer(const Options *options, Head *head, Failure *failure) {
    static const char json[] = "{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}, "
                               "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}, "
                               "\"decoder\": {\"type\": \"ByteLevel\"}}";
    TokenizerSource source = {.tokenizer_json = json, .tokenizer_json_bytes = sizeof json - 1,
                              .tokenizer_config_json = "{}", .tokenizer_config_json_bytes = 2};
    return build_tokenizer(options->shape->name, &source, head, failure);
}

// Cuts the model as --layers wants it.
static bool cut_config(const Options *options, const char *path, struct ModelConfig *config, Failure *failure) {
    if (!options->layers) return true;
    if (options->layers > config->num_hidden_layers) {
        return fail(failure, "%s: num_hidden_layers: --layers %u asks for more than its %u layers", path, options->layers,
                    config->num_hidden_layers);
    }
    if (!options->quiet) {
        fprintf(stderr, "r1-convert: keeping the first %u of %u layers%s\n", options->layers, config->num_hidden_layers,
                config->num_nextn_predict_layers ? ", without the MTP layer" : "");
    }
    keep_layers(config, options->layers);
    return true;
}

static bool make_head(const Options *options, Head *head, Failure *failure) {
    if (options->shape) head->config = shape_config(options->shape, options->recipe, options->layers);
    if (!options->directory) return make_empty_tokenizer(options, head, failure);
    json_t *config = NULL, *generation = NULL;
    Stops stops = {0};
    bool needs_model = !options->shape && !options->tokenizer_only;
    char path[PATH_MAX], generation_path[PATH_MAX];
    snprintf(path, sizeof path, "%s/config.json", options->directory);
    snprintf(generation_path, sizeof generation_path, "%s/generation_config.json", options->directory);
    bool ok = read_json(options, "config.json", !needs_model, &config, failure) &&
              read_json(options, "generation_config.json", true, &generation, failure);
    Keys keys = {config, path, "", failure}, generation_keys = {generation, generation_path, "", failure};
    ok = ok && (!generation || add_stops(&generation_keys, &stops)) && (!config || add_stops(&keys, &stops));
    if (ok && config && !options->shape && !read_config(&keys, &head->config)) {
        // A tokenizer is of use without a model that we know.
        head->config = (struct ModelConfig){0};
        ok = options->tokenizer_only;
    }
    if (needs_model) {
        head->config.recipe = options->recipe;
        ok = ok && cut_config(options, path, &head->config, failure);
    }
    ok = ok && read_tokenizer(options, &stops, head, failure);
    free(stops.ids);
    json_decref(config);
    json_decref(generation);
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------- plan

static const char *const role_names[ROLE_COUNT] = {
    "embedding", "attention", "attention, kv", "attention, kv_b", "dense feed-forward", "routed experts", "shared experts", "routers",
    "norms and biases", "head", "MTP layer"};

// How the rows of the source become the rows of a blob.
enum Layout { LAYOUT_PLAIN, LAYOUT_KEY, LAYOUT_KEY_TRANSPOSED, LAYOUT_VALUE };

typedef struct {
    const SourceTensor *weight, *scale;  // scale: NULL unless the weight is F8
} Source;

// One tensor of the output.
typedef struct {
    struct TensorEntry entry;
    enum Role role;                      // ROLE_MTP for all of an MTP layer
    enum Layout layout;
    Source *sources;                     // of expert e and part p: sources[e * parts + p]; a kv_b factor has one
    size_t source_count;
    uint8_t widest[ENTRY_MAX_PARTS];     // bytes of an element in the widest source of the part
    bool rescaled[ENTRY_MAX_PARTS];      // f8 from a source that is not: a scale needs the whole 128-row block
    uint32_t tensors;                    // of the checkpoint that are told in this line
    uint64_t weights;
} Planned;

typedef struct {
    const Checkpoint *checkpoint;        // NULL with a shape, or without weights
    const struct Shape *shape;           // whose weights are random numbers
    bool *used;                          // of each tensor of the checkpoint: whether the plan reads it or knows it as a copy
    struct ModelConfig *config;
    bool uniform;                        // every matrix at the recipe's type
    bool cut;                            // --layers: tensors of later layers are left out
    Planned *tensors;
    size_t count, capacity;
    uint64_t table_offset, file_bytes;
    Failure *failure;
} Plan;

// Adds a tensor whose sources and types are not known yet.
static Planned *add_planned(Plan *plan, const struct ModelTensor *tensor, bool mtp) {
    if (plan->count == plan->capacity) {
        size_t capacity = plan->capacity ? plan->capacity * 2 : 256;
        Planned *grown = realloc(plan->tensors, capacity * sizeof *grown);
        if (!grown) {
            fail(plan->failure, "out of memory");
            return NULL;
        }
        plan->tensors = grown;
        plan->capacity = capacity;
    }
    const struct TensorEntry *entry = &tensor->entry;
    Planned *planned = &plan->tensors[plan->count];
    *planned = (Planned){.entry = *entry, .role = mtp ? ROLE_MTP : tensor->role};
    if (tensor->role == ROLE_FACTOR) {
        const char *kind = strrchr(entry->name, '.') + 1;
        planned->layout = strcmp(kind, "key") == 0 ? LAYOUT_KEY : strcmp(kind, "value") == 0 ? LAYOUT_VALUE
                                                                                             : LAYOUT_KEY_TRANSPOSED;
    }
    planned->source_count = tensor->role == ROLE_FACTOR ? 1 : entry->experts * entry->parts;
    if (!(planned->sources = calloc(planned->source_count, sizeof(Source)))) {
        fail(plan->failure, "out of memory");
        return NULL;
    }
    plan->count++;
    // The three factors are one tensor of the checkpoint, and the transposed one holds weights of which the key has told.
    if (tensor->role != ROLE_FACTOR || planned->layout == LAYOUT_KEY) planned->tensors = (uint32_t)planned->source_count;
    if (planned->layout == LAYOUT_KEY_TRANSPOSED) return planned;
    for (unsigned part = 0; part < entry->parts; part++) {
        planned->weights += entry->experts * entry->rows[part] * entry->cols[part];
    }
    return planned;
}

static const char *shard_path(const Plan *plan, const SourceTensor *tensor) {
    return plan->checkpoint->shards[tensor->shard].path;
}

static bool check_shape(const Plan *plan, const SourceTensor *tensor, const uint64_t *shape, unsigned dimensions) {
    bool same = tensor->dimensions == dimensions;
    for (unsigned i = 0; same && i < dimensions; i++) same = tensor->shape[i] == shape[i];
    char expected[100], got[200];
    return same || fail(plan->failure, "%s: tensor %s: expected shape %s, got %s", shard_path(plan, tensor), tensor->name,
                        print_shape(shape, dimensions, expected, sizeof expected),
                        print_shape(tensor->shape, tensor->dimensions, got, sizeof got));
}

static const SourceTensor *need_tensor(const Plan *plan, const char *name) {
    const SourceTensor *tensor = find_tensor(plan->checkpoint, name);
    if (!tensor) fail(plan->failure, "%s: tensor %s is missing", plan->checkpoint->directory, name);
    return tensor;
}

// Finds a matrix (dimensions 2) or a vector (1) of the checkpoint and checks it.
static bool find_source(const Plan *plan, const char *name, unsigned dimensions, uint64_t rows, uint64_t cols,
                        Source *source) {
    const SourceTensor *weight = need_tensor(plan, name);
    uint64_t shape[2] = {dimensions == 2 ? rows : cols, cols};
    if (!weight || !check_shape(plan, weight, shape, dimensions)) return false;
    if (weight->dtype == SOURCE_OTHER || (weight->dtype == SOURCE_F8 && dimensions == 1)) {
        return fail(plan->failure, "%s: tensor %s: expected dtype %s, got %s", shard_path(plan, weight), name,
                    dimensions == 1 ? "F32, F16 or BF16" : "F32, F16, BF16 or F8_E4M3", weight->dtype_text);
    }
    if (dimensions == 2 && cols % K_GROUP) {
        return fail(plan->failure, "%s: tensor %s: has %llu columns, r1 needs a multiple of %d", shard_path(plan, weight),
                    name, (unsigned long long)cols, K_GROUP);
    }
    *source = (Source){weight, NULL};
    plan->used[weight - plan->checkpoint->tensors] = true;
    if (weight->dtype != SOURCE_F8) return true;
    char scale_name[160];
    snprintf(scale_name, sizeof scale_name, "%s_scale_inv", name);
    const SourceTensor *scale = need_tensor(plan, scale_name);
    uint64_t grid[2] = {(rows + F8_BLOCK - 1) / F8_BLOCK, (cols + F8_BLOCK - 1) / F8_BLOCK};
    if (!scale || !check_shape(plan, scale, grid, 2)) return false;
    if (scale->dtype == SOURCE_OTHER || scale->dtype == SOURCE_F8) {
        return fail(plan->failure, "%s: tensor %s: expected dtype F32, F16 or BF16, got %s", shard_path(plan, scale),
                    scale_name, scale->dtype_text);
    }
    source->scale = scale;
    plan->used[scale - plan->checkpoint->tensors] = true;
    return true;
}

static uint32_t source_type(uint8_t dtype) {
    return dtype == SOURCE_F8 ? DTYPE_F8 : dtype == SOURCE_BF16 ? DTYPE_BF16 : DTYPE_F32;
}

// MLA's kv_b_proj [heads * (nope + v), lora] is cut into one key and one value factor a head.
static bool find_factor_source(const Plan *plan, Planned *planned) {
    const struct ModelConfig *c = plan->config;
    const char *name = planned->entry.name;
    char source_name[96];
    snprintf(source_name, sizeof source_name, "%.*s.weight", (int)(strrchr(name, '.') - name), name);
    uint64_t rows = (uint64_t)c->num_attention_heads * (c->qk_nope_head_dim + c->v_head_dim);
    if (!find_source(plan, source_name, 2, rows, c->kv_lora_rank, planned->sources)) return false;
    return c->qk_nope_head_dim % K_GROUP == 0 ||
           fail(plan->failure, "%s: tensor %s: its qk_nope_head_dim of %u becomes columns, which must be a multiple of %d",
                shard_path(plan, planned->sources[0].weight), source_name, c->qk_nope_head_dim, K_GROUP);
}

static bool find_sources(const Plan *plan, enum Role role, Planned *planned) {
    static const char *const part_names[3] = {"gate_proj", "up_proj", "down_proj"};
    const struct TensorEntry *entry = &planned->entry;
    if (role == ROLE_FACTOR) return find_factor_source(plan, planned);
    for (uint64_t i = 0; i < planned->source_count; i++) {
        unsigned part = (unsigned)(i % entry->parts);
        char name[128], number[24] = "";
        if (role == ROLE_EXPERTS) snprintf(number, sizeof number, ".%" PRIu64, i / entry->parts);
        if (entry->parts == 1) snprintf(name, sizeof name, "%s", entry->name);
        else snprintf(name, sizeof name, "%s%s.%s.weight", entry->name, number, part_names[part]);
        if (!find_source(plan, name, entry->is_vector ? 1 : 2, entry->rows[part], entry->cols[part], &planned->sources[i])) {
            return false;
        }
    }
    return true;
}

// The type that a part has in the checkpoint. It has one in all experts; where they differ only f32 keeps them all.
static uint32_t common_source_type(const Planned *planned, unsigned part) {
    uint32_t common = source_type(planned->sources[part].weight->dtype);
    for (uint64_t i = part; i < planned->source_count; i += planned->entry.parts) {
        if (source_type(planned->sources[i].weight->dtype) != common) common = DTYPE_F32;
    }
    return common;
}

// What the sources of a part mean for the memory that it takes to convert them.
static void measure_sources(Planned *planned, unsigned part) {
    for (uint64_t i = part; i < planned->source_count; i += planned->entry.parts) {
        const SourceTensor *weight = planned->sources[i].weight;
        if (weight->element_bytes > planned->widest[part]) planned->widest[part] = weight->element_bytes;
        if (planned->entry.dtype[part] == DTYPE_F8 && weight->dtype != SOURCE_F8) planned->rescaled[part] = true;
    }
}

// mtp: it is one of an MTP layer.
static bool plan_tensor(Plan *plan, const struct ModelTensor *tensor, bool mtp) {
    Planned *planned = add_planned(plan, tensor, mtp);
    if (!planned || (!plan->shape && !find_sources(plan, tensor->role, planned))) return false;
    for (unsigned part = 0; part < planned->entry.parts; part++) {
        uint32_t source = plan->shape ? plan->shape->source : common_source_type(planned, part);
        planned->entry.dtype[part] = choose_dtype(plan->config, plan->uniform, tensor->role, source);
        if (!plan->shape) measure_sources(planned, part);
    }
    return true;
}

// Whether two tensors of the checkpoint hold the same bytes.
static bool compare_tensors(const Plan *plan, const SourceTensor *a, const SourceTensor *b, bool *same) {
    *same = a->dtype == b->dtype && a->bytes == b->bytes;
    const size_t chunk = 4u << 20;
    uint8_t *buffer = malloc(2 * chunk);
    if (!buffer) return fail(plan->failure, "out of memory");
    bool ok = true;
    for (uint64_t at = 0; ok && *same && at < a->bytes; at += chunk) {
        size_t bytes = a->bytes - at < chunk ? (size_t)(a->bytes - at) : chunk;
        ok = read_tensor(plan->checkpoint, a, at, buffer, bytes, plan->failure) &&
             read_tensor(plan->checkpoint, b, at, buffer + chunk, bytes, plan->failure);
        *same = ok && memcmp(buffer, buffer + chunk, bytes) == 0;
    }
    free(buffer);
    return ok;
}

// Whether two matrices [vocab_size, hidden_size] of the checkpoint are the same; *same is false where types differ.
static bool compare_tables(const Plan *plan, const char *name, const char *other_name, bool *same) {
    uint64_t rows = plan->config->vocab_size, cols = plan->config->hidden_size;
    Source table = {0}, other = {0};
    if (!find_source(plan, name, 2, rows, cols, &table) || !find_source(plan, other_name, 2, rows, cols, &other) ||
        !compare_tensors(plan, table.weight, other.weight, same)) {
        return false;
    }
    return !*same || !table.scale || compare_tensors(plan, table.scale, other.scale, same);
}

// A copy that an MTP layer carries of a matrix of the main model: kept only where it differs, in R1 it is 0.9 GB of the
// same.
static bool plan_copy(Plan *plan, const char *format, uint32_t layer, const char *original) {
    const struct ModelConfig *c = plan->config;
    struct ModelTensor copy = describe_tensor(ROLE_MTP, 1, c->vocab_size, c->hidden_size, format, layer);
    if (!find_tensor(plan->checkpoint, copy.entry.name)) return true;
    bool same = false;
    if (!compare_tables(plan, copy.entry.name, original, &same)) return false;
    return same || plan_tensor(plan, &copy, true);
}

// A head that config.json calls tied may be in the checkpoint all the same. Where it differs from the embedding,
// transformers 5 uses it, and so do we.
static bool check_tied_head(const Plan *plan) {
    if (!plan->config->tie_word_embeddings || !find_tensor(plan->checkpoint, "lm_head.weight")) return true;
    bool same = false;
    if (!compare_tables(plan, "lm_head.weight", "model.embed_tokens.weight", &same)) return false;
    plan->config->tie_word_embeddings = same;
    return true;
}

static bool plan_mtp_layer(Plan *plan, uint32_t layer) {
    uint64_t hidden = plan->config->hidden_size;
    struct ModelTensor list[4 + LAYER_TENSORS];
    size_t count = 0;
    list[count++] = describe_tensor(ROLE_VECTOR, 1, 1, hidden, "model.layers.%zu.enorm.weight", layer);
    list[count++] = describe_tensor(ROLE_VECTOR, 1, 1, hidden, "model.layers.%zu.hnorm.weight", layer);
    list[count++] = describe_tensor(ROLE_MTP, 1, hidden, 2 * hidden, "model.layers.%zu.eh_proj.weight", layer);
    count += list_layer(plan->config, layer, list + count);
    list[count++] = describe_tensor(ROLE_VECTOR, 1, 1, hidden, "model.layers.%zu.shared_head.norm.weight", layer);
    for (size_t i = 0; i < count; i++) {
        if (!plan_tensor(plan, &list[i], true)) return false;
    }
    return plan_copy(plan, "model.layers.%zu.embed_tokens.weight", layer, "model.embed_tokens.weight") &&
           plan_copy(plan, "model.layers.%zu.shared_head.head.weight", layer,
                     plan->config->tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
}

// The tensors of the main model.
static bool plan_model(Plan *plan) {
    struct ModelTensor *list = malloc(most_tensors(plan->config) * sizeof *list);
    if (!list) return fail(plan->failure, "out of memory");
    size_t count = list_model(plan->config, list);
    bool ok = true;
    for (size_t i = 0; ok && i < count; i++) ok = plan_tensor(plan, &list[i], false);
    free(list);
    return ok;
}

// MTP layers may have been left out of a checkpoint whose config.json still counts them.
static bool has_mtp_tensors(const Plan *plan) {
    char prefix[40];
    size_t length = (size_t)snprintf(prefix, sizeof prefix, "model.layers.%u.", plan->config->num_hidden_layers);
    for (size_t i = 0; i < plan->checkpoint->tensor_count; i++) {
        if (strncmp(plan->checkpoint->tensors[i].name, prefix, length) == 0) return true;
    }
    return false;
}

// Old checkpoints carry RoPE's frequencies, which follow from config.json.
static bool is_frequencies(const char *name) {
    const char suffix[] = "rotary_emb.inv_freq";
    size_t length = strlen(name);
    return length >= sizeof suffix - 1 && strcmp(name + length - (sizeof suffix - 1), suffix) == 0;
}

// Whether a tensor is of a layer behind those of the plan, and of which.
static bool is_beyond(const Plan *plan, const char *name, uint32_t *layer) {
    char digits[10];
    int end = 0;
    if (sscanf(name, "model.layers.%9[0-9].%n", digits, &end) != 1 || end == 0) return false;
    *layer = (uint32_t)strtoul(digits, NULL, 10);
    return *layer >= plan->config->num_hidden_layers + plan->config->num_nextn_predict_layers;
}

// Tensors that the plan does not know mean that the model is not what config.json makes of it.
static bool check_unused(const Plan *plan) {
    const SourceTensor *first = NULL;
    size_t count = 0;
    uint32_t layer;
    for (size_t i = 0; i < plan->checkpoint->tensor_count; i++) {
        const SourceTensor *tensor = &plan->checkpoint->tensors[i];
        if (plan->used[i] || is_frequencies(tensor->name) || (plan->cut && is_beyond(plan, tensor->name, &layer))) continue;
        if (count++ == 0) first = tensor;
    }
    if (!first) return true;
    char more[40] = "";
    if (count > 1) snprintf(more, sizeof more, " (and %zu more)", count - 1);
    if (plan->config->n_routed_experts && !plan->config->n_shared_experts && strstr(first->name, ".mlp.shared_experts.")) {
        return fail(plan->failure, "%s/config.json: n_shared_experts counts none, but there is tensor %s",
                    plan->checkpoint->directory, first->name);
    }
    if (is_beyond(plan, first->name, &layer)) {
        return fail(plan->failure,
                    "%s: tensor %s%s: layer %u lies beyond those of config.json (num_hidden_layers %u, "
                    "num_nextn_predict_layers %u)",
                    shard_path(plan, first), first->name, more, layer, plan->config->num_hidden_layers,
                    plan->config->num_nextn_predict_layers);
    }
    return fail(plan->failure, "%s: tensor %s is not part of this architecture%s", shard_path(plan, first), first->name, more);
}

static bool plan_checkpoint(Plan *plan, bool quiet) {
    struct ModelConfig *c = plan->config;
    const struct ModelConfig told = *c;
    if (!(plan->used = calloc(plan->checkpoint->tensor_count + 1, sizeof *plan->used))) {
        return fail(plan->failure, "out of memory");
    }
    if (c->num_nextn_predict_layers && !has_mtp_tensors(plan)) c->num_nextn_predict_layers = 0;
    if (!check_tied_head(plan) || !plan_model(plan)) return false;
    for (uint32_t i = 0; i < c->num_nextn_predict_layers; i++) {
        if (!plan_mtp_layer(plan, c->num_hidden_layers + i)) return false;
    }
    if (!check_unused(plan)) return false;
    if (told.num_nextn_predict_layers != c->num_nextn_predict_layers && !quiet) {
        fprintf(stderr, "r1-convert: note: the checkpoint has no MTP layer, though its config.json tells of one\n");
    }
    if (told.tie_word_embeddings != c->tie_word_embeddings && !quiet) {
        fprintf(stderr, "r1-convert: note: lm_head.weight differs from the embedding and is kept, though config.json says "
                "tie_word_embeddings\n");
    }
    return true;
}

// Gives every section and tensor its place.
static bool place_tensors(Plan *plan, size_t tokenizer_bytes) {
    plan->table_offset = align_up(sizeof(struct FilePreamble) + sizeof(struct ModelConfig) + tokenizer_bytes, 64);
    uint64_t end = plan->table_offset + plan->count * sizeof(struct TensorEntry);
    for (size_t i = 0; i < plan->count; i++) {
        struct TensorEntry *entry = &plan->tensors[i].entry;
        entry->stride = blob_bytes(entry);
        entry->offset = align_up(end, FORMAT_PAGE);
        // Shards may be sparse files that only claim to be huge.
        if (__builtin_mul_overflow(entry->experts, entry->stride, &entry->bytes) || entry->bytes > FILE_MAX_BYTES ||
            (end = entry->offset + entry->bytes) > FILE_MAX_BYTES) {
            return fail(plan->failure, "tensor %s: the model is too large to be true", entry->name);
        }
    }
    plan->file_bytes = end;
    return true;
}

static void free_plan(Plan *plan) {
    for (size_t i = 0; i < plan->count; i++) free(plan->tensors[i].sources);
    free(plan->tensors);
    free(plan->used);
}

// ----------------------------------------------------------------------------------------------------- reading sources
//
// A unit is what one thread converts at a time: some panels of one matrix, or all of one head's factor. Its buffers are
// carved out of the thread's scratch memory.

typedef struct {
    const Planned *planned;
    uint64_t blob, output;               // output: of its first byte, from the start of the batch
    unsigned part;
    uint64_t first_row, rows;            // of the blob's matrix
} Unit;

typedef struct {
    uint8_t *raw;                        // rows as the checkpoint has them
    float *values;                       // as floats
    uint8_t *codes;                      // as E4M3
    float *grid;                         // scales of the 128 x 128 blocks that the rows touch
    float *scales;                       // of one f8 panel
    float *turned;                       // the transposed matrix, floats or codes
    void *pack;
} Buffers;

static const Source *unit_source(const Planned *planned, uint64_t blob, unsigned part) {
    return &planned->sources[planned->layout == LAYOUT_PLAIN ? blob * planned->entry.parts + part : 0];
}

static uint64_t unit_rows(const Planned *planned, unsigned part) {
    const struct TensorEntry *entry = &planned->entry;
    if (planned->layout != LAYOUT_PLAIN || entry->is_vector) return entry->rows[part];
    bool pair = entry->parts == ENTRY_MAX_PARTS && part < 2;      // gate and up go together
    return planned->rescaled[part] || (pair && planned->rescaled[!part]) ? F8_BLOCK : PANEL_ROWS;
}

static void *carve(uint8_t *base, uint64_t *used, uint64_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += align_up(bytes, 64);
    return at;
}

// Bytes of scratch for a unit of source_rows x source_cols; sets the buffers if there is memory at base.
static uint64_t lay_out_buffers(const Planned *planned, unsigned part, uint8_t *base, Buffers *buffers) {
    const struct TensorEntry *entry = &planned->entry;
    uint32_t dtype = entry->dtype[part];
    bool turn = planned->layout == LAYOUT_KEY_TRANSPOSED, rescaled = planned->rescaled[part];
    uint64_t rows = turn ? entry->cols[part] : unit_rows(planned, part),
             cols = turn ? entry->rows[part] : entry->cols[part];
    // The first and the last row may stand inside a block.
    uint64_t loaded = rescaled && planned->layout != LAYOUT_PLAIN ? rows + 2 * F8_BLOCK : rows, used = 0;
    Buffers b;
    b.raw = carve(base, &used, loaded * cols * planned->widest[part]);
    b.values = carve(base, &used, dtype == DTYPE_F8 && !rescaled ? 0 : loaded * cols * sizeof(float));
    b.codes = carve(base, &used, dtype == DTYPE_F8 ? rows * cols : 0);
    b.grid = carve(base, &used, (loaded / F8_BLOCK + 2) * (cols / F8_BLOCK + 1) * sizeof(float));
    b.scales = carve(base, &used, (cols > rows ? cols : rows) / K_GROUP * sizeof(float) + sizeof(float));
    b.turned = carve(base, &used, turn ? rows * cols * (dtype == DTYPE_F8 ? 1 : sizeof(float)) : 0);
    b.pack = carve(base, &used, pack_scratch_bytes(dtype, entry->cols[part]));
    if (buffers) *buffers = b;
    return used;
}

typedef struct {
    const Checkpoint *checkpoint;
    Failure *failure;
} Reader;

static bool fail_tensor(const Reader *reader, const SourceTensor *tensor, uint64_t index, uint64_t cols, const char *what) {
    return fail(reader->failure, "%s: tensor %s: row %" PRIu64 ", column %" PRIu64 " %s",
                reader->checkpoint->shards[tensor->shard].path, tensor->name, index / cols, index % cols, what);
}

// All weights must be finite and fit in the type that they become.
static bool check_values(const Reader *reader, const SourceTensor *tensor, uint64_t first, uint64_t count, uint64_t cols,
                         uint32_t dtype, const float *values) {
    uint64_t bad = find_beyond(values, count, magnitude_limit(dtype));
    if (bad == count) return true;
    char what[40];
    snprintf(what, sizeof what, "is too large for %s", dtype_name(dtype));
    return fail_tensor(reader, tensor, first + bad, cols, isfinite(values[bad]) ? what : "is NaN or infinite");
}

// Floats of a tensor that is not F8, from element `first` on. raw has room for them as they are stored.
static bool read_floats(const Reader *reader, const SourceTensor *tensor, uint64_t first, uint64_t count, void *raw,
                        float *out) {
    bool direct = tensor->dtype == SOURCE_F32;
    if (!read_tensor(reader->checkpoint, tensor, first * tensor->element_bytes, direct ? out : raw,
                     count * tensor->element_bytes, reader->failure)) {
        return false;
    }
    const uint16_t *halves = raw;
    if (tensor->dtype == SOURCE_BF16) {
        for (uint64_t i = 0; i < count; i++) out[i] = bf16_to_float(halves[i]);
    } else if (tensor->dtype == SOURCE_F16) {
        for (uint64_t i = 0; i < count; i++) out[i] = f16_to_float(halves[i]);
    }
    return true;
}

// The scales of the blocks that rows [row, row + rows) touch, a line of (cols + 127) / 128 for each 128 rows.
static bool read_grid(const Reader *reader, const Source *source, uint64_t row, uint64_t rows, uint64_t cols, float *grid) {
    uint64_t width = (cols + F8_BLOCK - 1) / F8_BLOCK, first = row / F8_BLOCK, last = (row + rows - 1) / F8_BLOCK;
    uint64_t count = (last - first + 1) * width;
    const SourceTensor *scale = source->scale;
    if (!read_tensor(reader->checkpoint, scale, first * width * scale->element_bytes, grid, count * scale->element_bytes,
                     reader->failure)) {
        return false;
    }
    if (scale->element_bytes == 2) {     // in place, from the end
        for (uint64_t i = count; i-- > 0;) {
            uint16_t half;
            memcpy(&half, (const char *)grid + 2 * i, 2);
            float value = scale->dtype == SOURCE_BF16 ? bf16_to_float(half) : f16_to_float(half);
            memcpy(&grid[i], &value, sizeof value);
        }
    }
    for (uint64_t i = 0; i < count; i++) {
        const char *what = "is a scale that is NaN or infinite";
        if (isfinite(grid[i])) what = "is a scale that makes its weights overflow";
        if (!(fabsf(grid[i]) <= FLT_MAX / F8_MAX)) return fail_tensor(reader, scale, first * width + i, width, what);
    }
    return true;
}

static float e4m3_values[256];

static bool read_codes(const Reader *reader, const Source *source, uint64_t row, uint64_t rows, uint64_t cols,
                       uint8_t *codes) {
    if (!read_tensor(reader->checkpoint, source->weight, row * cols, codes, rows * cols, reader->failure)) return false;
    for (uint64_t i = 0; i < rows * cols; i++) {
        if ((codes[i] & 0x7f) == 0x7f) return fail_tensor(reader, source->weight, row * cols + i, cols, "is NaN");
    }
    return true;
}

// Rows of a matrix as floats that dtype can hold.
static bool load_values(const Reader *reader, const Source *source, uint64_t row, uint64_t rows, uint64_t cols,
                        uint32_t dtype, const Buffers *b) {
    if (source->weight->dtype != SOURCE_F8) {
        return read_floats(reader, source->weight, row * cols, rows * cols, b->raw, b->values) &&
               check_values(reader, source->weight, row * cols, rows * cols, cols, dtype, b->values);
    }
    if (!read_codes(reader, source, row, rows, cols, b->raw) || !read_grid(reader, source, row, rows, cols, b->grid)) {
        return false;
    }
    uint64_t width = (cols + F8_BLOCK - 1) / F8_BLOCK;
    for (uint64_t r = 0; r < rows; r++) {
        const float *scales = b->grid + ((row + r) / F8_BLOCK - row / F8_BLOCK) * width;
        for (uint64_t block = 0; block < width; block++) {
            uint64_t end = (block + 1) * F8_BLOCK < cols ? (block + 1) * F8_BLOCK : cols;
            for (uint64_t c = block * F8_BLOCK; c < end; c++) {
                b->values[r * cols + c] = e4m3_values[b->raw[r * cols + c]] * scales[block];
            }
        }
    }
    return check_values(reader, source->weight, row * cols, rows * cols, cols, dtype, b->values);
}

// Rows of a matrix as E4M3 codes with the grid of scales, whose first line belongs to the block of `row`. Other sources
// than F8 get scale = amax / 448 for each 128 x 128 block of the whole matrix.
static bool load_codes(const Reader *reader, const Source *source, uint64_t row, uint64_t rows, uint64_t cols,
                       const Buffers *b) {
    if (source->weight->dtype == SOURCE_F8) {
        return read_codes(reader, source, row, rows, cols, b->codes) && read_grid(reader, source, row, rows, cols, b->grid);
    }
    uint64_t total = source->weight->shape[0], width = (cols + F8_BLOCK - 1) / F8_BLOCK;
    uint64_t start = row / F8_BLOCK * F8_BLOCK, end = align_up(row + rows, F8_BLOCK);
    if (end > total) end = total;
    if (!load_values(reader, source, start, end - start, cols, DTYPE_F8, b)) return false;
    for (uint64_t i = 0; i < align_up(end - start, F8_BLOCK) / F8_BLOCK * width; i++) b->grid[i] = 0.0f;
    for (uint64_t r = start; r < end; r++) {
        float *line = b->grid + (r - start) / F8_BLOCK * width;
        const float *values = b->values + (r - start) * cols;
        for (uint64_t c = 0; c < cols; c++) line[c / F8_BLOCK] = fmaxf(line[c / F8_BLOCK], fabsf(values[c]));
    }
    for (uint64_t i = 0; i < align_up(end - start, F8_BLOCK) / F8_BLOCK * width; i++) {
        // A block of zeros takes any scale; a tiny one must stay a normal number to divide by.
        float largest = b->grid[i];
        b->grid[i] = largest == 0 ? 1.0f : fmaxf(largest / F8_MAX, 0x1p-126f);
    }
    for (uint64_t r = row; r < row + rows; r++) {
        const float *line = b->grid + (r - start) / F8_BLOCK * width, *values = b->values + (r - start) * cols;
        for (uint64_t c = 0; c < cols; c++) b->codes[(r - row) * cols + c] = float_to_e4m3(values[c] / line[c / F8_BLOCK]);
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------- converting

// Packs a unit whose rows are codes. turn: the unit is the transposed matrix.
static void pack_codes(const Unit *unit, uint64_t row, uint64_t cols, bool turn, const Buffers *b, uint8_t *out) {
    uint64_t width = (cols + F8_BLOCK - 1) / F8_BLOCK, unit_cols = unit->planned->entry.cols[unit->part];
    const uint8_t *codes = b->codes;
    if (turn) {
        uint8_t *turned = (uint8_t *)b->turned;
        for (uint64_t r = 0; r < unit->rows; r++) {
            for (uint64_t c = 0; c < unit_cols; c++) turned[r * unit_cols + c] = codes[c * cols + r];
        }
        codes = turned;
    }
    for (uint64_t r = 0; r < unit->rows; r += PANEL_ROWS) {
        uint64_t count = unit->rows - r < PANEL_ROWS ? unit->rows - r : PANEL_ROWS;
        for (uint64_t c = 0; c < unit_cols; c += K_GROUP) {
            uint64_t source_row = turn ? c : r, source_col = turn ? r : c;
            b->scales[c / K_GROUP] =
                b->grid[((row + source_row) / F8_BLOCK - row / F8_BLOCK) * width + source_col / F8_BLOCK];
        }
        pack_f8_panel(codes + r * unit_cols, count, unit_cols, b->scales, out);
        out += panel_step(&unit->planned->entry, unit->part);
    }
}

static bool convert_unit(const Reader *reader, const struct ModelConfig *config, const Unit *unit, uint8_t *scratch,
                         uint8_t *out) {
    const Planned *planned = unit->planned;
    const struct TensorEntry *entry = &planned->entry;
    const Source *source = unit_source(planned, unit->blob, unit->part);
    uint32_t dtype = entry->dtype[unit->part];
    bool turn = planned->layout == LAYOUT_KEY_TRANSPOSED;
    uint64_t unit_cols = entry->cols[unit->part], rows = turn ? unit_cols : unit->rows,
             cols = turn ? unit->rows : unit_cols;
    uint64_t row = unit->first_row;      // in the source
    if (planned->layout != LAYOUT_PLAIN) {
        row = unit->blob * (config->qk_nope_head_dim + config->v_head_dim);
        if (planned->layout == LAYOUT_VALUE) row += config->qk_nope_head_dim;
    }
    Buffers b;
    lay_out_buffers(planned, unit->part, scratch, &b);
    if (entry->is_vector) {
        if (!read_floats(reader, source->weight, 0, cols, b.raw, b.values) ||
            !check_values(reader, source->weight, 0, cols, cols, DTYPE_F32, b.values)) {
            return false;
        }
        memcpy(out, b.values, cols * sizeof(float));
        return true;
    }
    if (dtype == DTYPE_F8) {
        if (!load_codes(reader, source, row, rows, cols, &b)) return false;
        pack_codes(unit, row, cols, turn, &b, out);
        return true;
    }
    if (!load_values(reader, source, row, rows, cols, dtype, &b)) return false;
    float *values = b.values;
    if (turn) {
        for (uint64_t r = 0; r < unit->rows; r++) {
            for (uint64_t c = 0; c < unit_cols; c++) b.turned[r * unit_cols + c] = b.values[c * cols + r];
        }
        values = b.turned;
    }
    for (uint64_t r = 0; r < unit->rows; r += PANEL_ROWS) {
        uint64_t count = unit->rows - r < PANEL_ROWS ? unit->rows - r : PANEL_ROWS;
        pack_panel(dtype, values + r * unit_cols, count, unit_cols, out, b.pack);
        out += panel_step(entry, unit->part);
    }
    return true;
}

// The same for a model of random weights.
static void fill_unit(const Unit *unit, uint8_t *out) {
    const struct TensorEntry *entry = &unit->planned->entry;
    if (entry->is_vector) {
        fill_vector(entry, out);
        return;
    }
    uint64_t first = unit->first_row / PANEL_ROWS, end = (unit->first_row + unit->rows) / PANEL_ROWS;
    for (uint64_t panel = first; panel < end; panel++) {
        fill_panel(entry, unit->part, panel_offset(entry, unit->blob, unit->part, panel), out);
        out += panel_step(entry, unit->part);
    }
}

// ------------------------------------------------------------------------------------------------------------- writing

// A run of units whose output is one stretch of the file.
typedef struct {
    Planned *planned;                    // NULL: empty
    uint64_t offset, bytes;              // from the start of the tensor
    uint8_t *data;
    uint64_t capacity;
    Unit *units;
    size_t unit_count, unit_capacity;
} Batch;

// Where the next batch starts.
typedef struct {
    size_t tensor;
    uint64_t blob, row, offset;          // offset: what the batches before have covered
    unsigned part;
} Cursor;

typedef struct {
    const Options *options;
    Plan *plan;
    const Head *head;
    int descriptor;
    uint64_t written, unsynced, data_bytes;
    XXH3_state_t *hash;
    double start, shown;
    bool progress;
    Failure failure;                     // of the writing thread
} Writer;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void show_progress(Writer *writer, bool last) {
    double seconds = now() - writer->start;
    if (!writer->progress || (!last && seconds - writer->shown < 0.2)) return;
    writer->shown = seconds;
    double share = writer->data_bytes ? (double)writer->written / (double)writer->data_bytes : 1.0;
    double speed = seconds > 0 ? (double)writer->written / seconds : 0.0;
    uint64_t left = speed > 0 ? (uint64_t)((double)(writer->data_bytes - writer->written) / speed + 0.5) : 0;
    char bar[31];
    for (int i = 0; i < 30; i++) bar[i] = i < (int)(share * 30) ? '#' : '-';
    bar[30] = 0;
    fprintf(stderr, "\r[%s] %3d%%  %.0f MB/s  %" PRIu64 ":%02" PRIu64 ":%02" PRIu64 " left ", bar, (int)(share * 100),
            speed * 1e-6, left / 3600, left / 60 % 60, left % 60);
    if (last) fprintf(stderr, "\r\033[K");
    fflush(stderr);
}

static bool write_all(Writer *writer, const void *data, uint64_t bytes, uint64_t offset) {
    const uint8_t *at = data;
    while (bytes > 0) {
        ssize_t done = pwrite(writer->descriptor, at, bytes < (1u << 30) ? bytes : (1u << 30), (off_t)offset);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) {
            return fail(&writer->failure, "%s: cannot write: %s", writer->options->output, done ? strerror(errno) : "full");
        }
        at += done;
        offset += (uint64_t)done;
        bytes -= (uint64_t)done;
    }
    return true;
}

static bool write_batch(Writer *writer, const Batch *batch) {
    if (!batch->planned) return true;
    struct TensorEntry *entry = &batch->planned->entry;
    if (batch->offset == 0) XXH3_64bits_reset(writer->hash);
    XXH3_64bits_update(writer->hash, batch->data, (size_t)batch->bytes);
    if (batch->offset + batch->bytes == entry->bytes) entry->hash = XXH3_64bits_digest(writer->hash);
    if (!write_all(writer, batch->data, batch->bytes, entry->offset + batch->offset)) return false;
    writer->written += batch->bytes;
    writer->unsynced += batch->bytes;
    if (writer->unsynced >= SYNC_BYTES) {
        writer->unsynced = 0;
        if (fsync(writer->descriptor) != 0) {
            return fail(&writer->failure, "%s: cannot write: %s", writer->options->output, strerror(errno));
        }
    }
    show_progress(writer, false);
    return true;
}

// Fills the batch with the next units, of one tensor. Leaves it empty at the end of the plan.
static bool next_batch(const Plan *plan, Cursor *cursor, Batch *batch, Failure *failure) {
    batch->planned = NULL;
    batch->unit_count = 0;
    if (cursor->tensor == plan->count) return true;
    Planned *planned = &plan->tensors[cursor->tensor];
    const struct TensorEntry *entry = &planned->entry;
    batch->planned = planned;
    batch->offset = cursor->offset;
    uint64_t end = cursor->offset;
    while (cursor->blob < entry->experts && end - batch->offset < BATCH_BYTES) {
        unsigned first = cursor->part, parts = entry->parts == ENTRY_MAX_PARTS && first == 0 ? 2 : 1;   // gate and up go together
        uint64_t rows = entry->rows[first] - cursor->row, most = unit_rows(planned, first);
        if (rows > most) rows = most;
        if (batch->unit_count + parts > batch->unit_capacity) {
            size_t capacity = batch->unit_capacity ? batch->unit_capacity * 2 : 64;
            Unit *grown = realloc(batch->units, capacity * sizeof *grown);
            if (!grown) return fail(failure, "out of memory");
            batch->units = grown;
            batch->unit_capacity = capacity;
        }
        for (unsigned part = first; part < first + parts; part++) {
            uint64_t start = entry->is_vector ? 0 : panel_offset(entry, cursor->blob, part, cursor->row / PANEL_ROWS);
            batch->units[batch->unit_count++] = (Unit){planned, cursor->blob, start - batch->offset, part, cursor->row, rows};
        }
        cursor->row += rows;
        end = entry->is_vector ? entry->bytes : panel_offset(entry, cursor->blob, first, (cursor->row + PANEL_ROWS - 1) / PANEL_ROWS);
        if (cursor->row == entry->rows[first]) {
            cursor->row = 0;
            cursor->part += parts;
        }
        if (cursor->part == entry->parts) {
            cursor->part = 0;
            cursor->blob++;
            end = cursor->blob * entry->stride;
        }
    }
    batch->bytes = end - batch->offset;
    cursor->offset = end;
    if (cursor->blob == entry->experts) *cursor = (Cursor){.tensor = cursor->tensor + 1};
    if (batch->bytes > batch->capacity) {
        free(batch->data);
        batch->capacity = 0;
        if (!(batch->data = malloc(batch->bytes))) {
            return fail(failure, "no memory for %" PRIu64 " bytes of output", batch->bytes);
        }
        batch->capacity = batch->bytes;
    }
    memset(batch->data, 0, batch->bytes);   // the gaps between parts and experts
    return true;
}

// What each thread needs at most for any unit of the plan. Random weights are made where they are written from.
static uint64_t scratch_per_thread(const Plan *plan) {
    uint64_t most = 0;
    if (plan->shape) return 0;
    for (size_t i = 0; i < plan->count; i++) {
        for (unsigned part = 0; part < plan->tensors[i].entry.parts; part++) {
            uint64_t bytes = lay_out_buffers(&plan->tensors[i], part, NULL, NULL);
            if (bytes > most) most = bytes;
        }
    }
    return most;
}

static int usable_threads(const Plan *plan, int wanted) {
    uint64_t scratch = scratch_per_thread(plan), most = scratch ? SCRATCH_BYTES / scratch : INT_MAX;
    return most < 1 ? 1 : most < (uint64_t)wanted ? (int)most : wanted;
}

// Converts all tensors. In each round one thread writes the batch of the round before, then helps the others with the next.
static bool write_tensors(Writer *writer, Failure *failure) {
    const Plan *plan = writer->plan;
    int threads = usable_threads(plan, writer->options->threads);
    uint64_t scratch_bytes = scratch_per_thread(plan);
    Batch batches[2] = {0};
    uint8_t **scratch = calloc((size_t)threads, sizeof *scratch);
    bool ok = scratch || fail(failure, "out of memory");
    for (int i = 0; ok && i < threads; i++) {
        if (posix_memalign((void **)&scratch[i], 64, scratch_bytes) != 0) {
            scratch[i] = NULL;
            ok = fail(failure, "no memory for %" PRIu64 " bytes of scratch space", scratch_bytes);
        }
    }
    Cursor cursor = {0};
    for (int round = 0; ok; round++) {
        Batch *current = &batches[round & 1];
        const Batch *previous = &batches[~round & 1];
        ok = next_batch(plan, &cursor, current, failure);
        if (!ok || (!current->planned && !previous->planned)) break;
        bool write_ok = true;
        size_t failed = SIZE_MAX;             // the first unit that failed, so that every run tells the same one
#pragma omp parallel num_threads(threads) if (current->bytes > SMALL_BATCH_BYTES)
        {
            Failure own;
            Reader reader = {plan->checkpoint, &own};
#pragma omp master
            write_ok = write_batch(writer, previous);
#pragma omp for schedule(dynamic, 1)
            for (size_t i = 0; i < current->unit_count; i++) {
                size_t seen;
#pragma omp atomic read
                seen = failed;
                if (i > seen) continue;
                const Unit *unit = &current->units[i];
                uint8_t *out = current->data + unit->output;
                if (plan->shape) fill_unit(unit, out);
                if (plan->shape || convert_unit(&reader, plan->config, unit, scratch[omp_get_thread_num()], out)) continue;
#pragma omp critical
                if (i < failed) {
#pragma omp atomic write
                    failed = i;
                    *failure = own;
                }
            }
        }
        if (failed != SIZE_MAX) ok = false;
        if (!write_ok) {
            *failure = writer->failure;
            ok = false;
        }
    }
    for (int i = 0; scratch && i < threads; i++) free(scratch[i]);
    free(scratch);
    for (int i = 0; i < 2; i++) {
        free(batches[i].data);
        free(batches[i].units);
    }
    return ok;
}

// Preamble, config, tokenizer and table, in one piece.
static bool write_metadata(Writer *writer, Failure *failure) {
    const Plan *plan = writer->plan;
    uint64_t end = plan->table_offset + plan->count * sizeof(struct TensorEntry);
    uint8_t *metadata = calloc(1, end);
    if (!metadata) return fail(failure, "out of memory");
    struct FilePreamble preamble = {
        .version = FORMAT_VERSION,
        .config_bytes = sizeof(struct ModelConfig),
        .tokenizer_offset = sizeof(struct FilePreamble) + sizeof(struct ModelConfig),
        .tokenizer_bytes = writer->head->tokenizer_bytes,
        .table_offset = plan->table_offset,
        .tensor_count = (uint32_t)plan->count,
        .file_bytes = plan->file_bytes,
    };
    memcpy(preamble.magic, FORMAT_MAGIC, sizeof preamble.magic);
    memcpy(metadata, &preamble, sizeof preamble);
    memcpy(metadata + sizeof preamble, plan->config, sizeof *plan->config);
    memcpy(metadata + preamble.tokenizer_offset, writer->head->tokenizer, writer->head->tokenizer_bytes);
    for (size_t i = 0; i < plan->count; i++) {
        memcpy(metadata + plan->table_offset + i * sizeof(struct TensorEntry), &plan->tensors[i].entry,
               sizeof(struct TensorEntry));
    }
    const size_t hashed = offsetof(struct FilePreamble, metadata_hash);
    XXH3_64bits_reset(writer->hash);
    XXH3_64bits_update(writer->hash, metadata, hashed);
    XXH3_64bits_update(writer->hash, metadata + sizeof preamble, end - sizeof preamble);
    preamble.metadata_hash = XXH3_64bits_digest(writer->hash);
    memcpy(metadata, &preamble, sizeof preamble);
    bool ok = write_all(writer, metadata, end, 0);
    if (!ok) *failure = writer->failure;
    free(metadata);
    return ok;
}

// ---- the file under its temporary name

#define PARTIAL_SUFFIX ".partial-XXXXXX" // behind the output's name; mkstemp() replaces the X

static char *partial_path;               // to be removed if we are interrupted

static void remove_partial(void) {
    if (partial_path) unlink(partial_path);
}

static void handle_signal(int number) {
    remove_partial();
    signal(number, SIG_DFL);
    raise(number);
}

static const int deadly_signals[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGQUIT};

static void watch_signals(bool on) {
    for (size_t i = 0; i < sizeof deadly_signals / sizeof *deadly_signals; i++) {
        struct sigaction action = {.sa_handler = on ? handle_signal : SIG_DFL}, old;
        // One that was ignored from outside (nohup) stays so.
        if (sigaction(deadly_signals[i], NULL, &old) == 0 && old.sa_handler == SIG_IGN) continue;
        sigaction(deadly_signals[i], &action, NULL);
    }
    signal(SIGXFSZ, SIG_IGN);            // a file size limit becomes an error of write
}

// Creates the partial file beside the final name, so that renaming it is one step.
static int create_partial(const Options *options, Failure *failure) {
    size_t bytes = strlen(options->output) + sizeof PARTIAL_SUFFIX;
    if (!(partial_path = malloc(bytes))) {
        fail(failure, "out of memory");
        return -1;
    }
    snprintf(partial_path, bytes, "%s" PARTIAL_SUFFIX, options->output);
    sigset_t all, old;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &old);  // no signal between the file's creation and its watch
    int descriptor = mkstemp(partial_path);
    int reason = errno;
    if (descriptor >= 0) {
        watch_signals(true);
        atexit(remove_partial);          // the OpenMP library ends the program where it cannot start its threads
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
    if (descriptor < 0) {
        fail(failure, "%s: cannot create a file there: %s", options->output, strerror(reason));
        return -1;
    }
    mode_t mask = umask(0);
    umask(mask);
    fchmod(descriptor, 0666 & ~mask);
    return descriptor;
}

static const char *show_bytes(double bytes, char *text, size_t size) {
    if (bytes < 999.5e3) snprintf(text, size, "%.1f kB", bytes * 1e-3);
    else if (bytes < 999.5e6) snprintf(text, size, "%.1f MB", bytes * 1e-6);
    else snprintf(text, size, "%.1f GB", bytes * 1e-9);
    return text;
}

// A conversion that is killed outright (kill -9, power) leaves its partial file. Whether it may go only the user knows:
// another conversion could be writing it.
static void tell_leftovers(const Options *options) {
    char *directory_copy = strdup(options->output), *name_copy = strdup(options->output);
    const char *name = name_copy ? basename(name_copy) : "";
    DIR *directory = directory_copy ? opendir(dirname(directory_copy)) : NULL;
    size_t length = strlen(name), suffix = strlen(PARTIAL_SUFFIX);
    for (const struct dirent *entry; directory && (entry = readdir(directory));) {
        struct stat status;
        if (strlen(entry->d_name) != length + suffix || strncmp(entry->d_name, name, length) != 0 ||
            strncmp(entry->d_name + length, PARTIAL_SUFFIX, suffix - strlen("XXXXXX")) != 0 ||
            fstatat(dirfd(directory), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) {
            continue;
        }
        char size[32];
        fprintf(stderr, "r1-convert: note: %s%s (%s) was left by a conversion that was killed; unless one is still running, "
                "delete it\n", options->output, entry->d_name + length, show_bytes((double)status.st_size, size, sizeof size));
    }
    if (directory) closedir(directory);
    free(directory_copy);
    free(name_copy);
}

static bool sync_directory(const char *path, Failure *failure) {
    char *copy = strdup(path);
    if (!copy) return fail(failure, "out of memory");
    int descriptor = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    // Some file systems cannot sync a directory; the file itself is whole by now.
    bool ok = descriptor >= 0 && (fsync(descriptor) == 0 || errno == EINVAL || errno == ENOTSUP);
    if (!ok) fail(failure, "%s: cannot sync its directory: %s", path, strerror(errno));
    if (descriptor >= 0) close(descriptor);
    free(copy);
    return ok;
}

// The output must not exist (without --force), and never be a device, a directory or a shard of the checkpoint.
static bool check_output(const Options *options, const Checkpoint *checkpoint, Failure *failure) {
    struct stat status;
    if (lstat(options->output, &status) != 0) {
        return errno == ENOENT || fail(failure, "%s: %s", options->output, strerror(errno));
    }
    if (stat(options->output, &status) == 0 && !S_ISREG(status.st_mode)) {
        return fail(failure, "%s: exists and is not a regular file", options->output);
    }
    if (!options->force) return fail(failure, "%s: exists already (--force replaces it)", options->output);
    for (size_t i = 0; checkpoint && i < checkpoint->shard_count; i++) {
        if (checkpoint->shards[i].device == (uint64_t)status.st_dev &&
            checkpoint->shards[i].inode == (uint64_t)status.st_ino) {
            return fail(failure, "%s: is a file of the checkpoint itself", options->output);
        }
    }
    return true;
}

static bool check_space(const Options *options, uint64_t needed, Failure *failure) {
    char *copy = strdup(options->output);
    if (!copy) return fail(failure, "out of memory");
    struct statvfs status;
    const char *directory = dirname(copy);
    bool ok = statvfs(directory, &status) == 0 || fail(failure, "%s: %s", directory, strerror(errno));
    if (ok) {
        uint64_t unit = status.f_frsize ? status.f_frsize : status.f_bsize, left = (uint64_t)status.f_bavail;
        char a[32], b[32];
        if (needed / unit >= left) {
            ok = fail(failure, "%s: the file needs %s, the disk has %s left", options->output,
                      show_bytes((double)needed, a, sizeof a), show_bytes((double)left * (double)unit, b, sizeof b));
        }
    }
    free(copy);
    return ok;
}

static bool write_file(const Options *options, Plan *plan, const Head *head, Failure *failure) {
    if (!check_output(options, plan->checkpoint, failure) || !check_space(options, plan->file_bytes, failure)) return false;
    if (options->shape && !options->quiet) {
        char size[32];
        fprintf(stderr, "r1-convert: writing %s of random weights in the shape of %s (%u of %u layers)\n",
                show_bytes((double)plan->file_bytes, size, sizeof size), options->shape->name, plan->config->num_hidden_layers,
                options->shape->config.num_hidden_layers);
    }
    Writer writer = {.options = options, .plan = plan, .head = head, .start = now(), .hash = XXH3_createState(),
                     .progress = !options->quiet && isatty(STDERR_FILENO)};
    for (size_t i = 0; i < plan->count; i++) writer.data_bytes += plan->tensors[i].entry.bytes;
    if (!writer.hash) return fail(failure, "out of memory");
    if (!options->quiet) tell_leftovers(options);
    writer.descriptor = create_partial(options, failure);
    bool created = writer.descriptor >= 0, ok = created;
    ok = ok && write_tensors(&writer, failure) && write_metadata(&writer, failure);
    if (created) show_progress(&writer, true);
    if (ok && (ftruncate(writer.descriptor, (off_t)plan->file_bytes) != 0 || fsync(writer.descriptor) != 0)) {
        ok = fail(failure, "%s: cannot write: %s", options->output, strerror(errno));
    }
    if (created && close(writer.descriptor) != 0 && ok)
        ok = fail(failure, "%s: cannot write: %s", options->output, strerror(errno));
    // Somebody may have made the file meanwhile.
    ok = ok && check_output(options, plan->checkpoint, failure);
    if (ok && rename(partial_path, options->output) != 0) {
        ok = fail(failure, "%s: cannot rename the finished file: %s", options->output, strerror(errno));
    }
    if (created && !ok) unlink(partial_path);
    watch_signals(false);
    ok = ok && sync_directory(options->output, failure);
    XXH3_freeState(writer.hash);
    free(partial_path);
    partial_path = NULL;
    return ok;
}

// -------------------------------------------------------------------------------------------------------------- report

static double bits_per_weight(const Plan *plan) {
    uint64_t bytes = 0, weights = 0;
    for (size_t i = 0; i < plan->count; i++) {
        bytes += plan->tensors[i].entry.bytes;
        weights += plan->tensors[i].weights;
    }
    return weights ? 8.0 * (double)bytes / (double)weights : 0.0;
}

static const char *show_weights(double weights, char *text, size_t size) {
    if (weights < 999.5e3) snprintf(text, size, "%.1f k", weights * 1e-3);
    else if (weights < 999.95e6) snprintf(text, size, "%.1f M", weights * 1e-6);
    else snprintf(text, size, "%.2f G", weights * 1e-9);
    return text;
}

// --dry-run: tensors, weights and bytes by role and type.
static void print_plan(const Options *options, const Plan *plan) {
    typedef struct {
        uint64_t tensors, weights, bytes;
    } Line;
    Line lines[ROLE_COUNT][DTYPE_COUNT] = {0}, total = {0};
    for (size_t i = 0; i < plan->count; i++) {
        const Planned *planned = &plan->tensors[i];
        const struct TensorEntry *entry = &planned->entry;
        uint64_t counted = 0;
        for (unsigned part = 0; part < entry->parts; part++) {
            Line *line = &lines[planned->role][entry->dtype[part]];
            uint64_t bytes = matrix_bytes(entry->dtype[part], entry->rows[part], entry->cols[part]) * entry->experts;
            if (part + 1 == entry->parts) bytes = entry->bytes - counted;   // with the padding behind an expert
            counted += bytes;
            line->tensors += planned->tensors / entry->parts;
            line->weights += planned->weights / entry->parts;
            line->bytes += bytes;
        }
        total.tensors += planned->tensors;
        total.weights += planned->weights;
        total.bytes += entry->bytes;
    }
    char a[32], b[32];
    printf("%-20s %9s  %-6s %10s %12s %8s\n", "role", "tensors", "type", "weights", "size", "share");
    for (int role = 0; role < ROLE_COUNT; role++) {
        for (int dtype = 1; dtype < DTYPE_COUNT; dtype++) {
            const Line *line = &lines[role][dtype];
            if (!line->bytes) continue;
            printf("%-20s %9" PRIu64 "  %-6s %10s %12s %7.2f%%\n", role_names[role], line->tensors,
                   dtype_name((uint32_t)dtype), show_weights((double)line->weights, a, sizeof a),
                   show_bytes((double)line->bytes, b, sizeof b),
                   total.bytes ? 100.0 * (double)line->bytes / (double)total.bytes : 0.0);
        }
    }
    printf("%-20s %9" PRIu64 "  %-6s %10s %12s %7.2f%%\n", "total", total.tensors, dtype_name(plan->config->recipe),
           show_weights((double)total.weights, a, sizeof a), show_bytes((double)total.bytes, b, sizeof b), 100.0);
    int threads = usable_threads(plan, options->threads);
    uint64_t memory = (uint64_t)threads * scratch_per_thread(plan) + 2 * BATCH_BYTES;
    printf("file %s (%" PRIu64 " bytes), %.3f bits per weight; converting needs about %s of memory with %d thread%s\n",
           show_bytes((double)plan->file_bytes, a, sizeof a), plan->file_bytes, bits_per_weight(plan),
           show_bytes((double)memory, b, sizeof b), threads, threads == 1 ? "" : "s");
}

// ---------------------------------------------------------------------------------------------------------------- main

static const char usage[] =
    "usage: r1-convert CHECKPOINT_DIR OUT.r1 [options]\n"
    "       r1-convert --synthetic SHAPE[:LAYERS] OUT.r1 [options]\n"
    "Turns a Hugging Face checkpoint (safetensors) into one .r1 file, or makes one of random weights, to measure speed.\n"
    "\n"
    "  --type TYPE       source, f32, bf16, f8, q8, q6 or q4 (default q4). source keeps every tensor's own type;\n"
    "                    q8, q6 and q4 keep sensitive tensors at more bits\n"
    "  --layers N        only the first N layers, and no MTP layer\n"
    "  --tokenizer-only  a file without weights; needs only tokenizer.json and tokenizer_config.json\n"
    "  --synthetic SHAPE[:LAYERS]\n"
    "                    random weights in the shape of a published model, or of its first LAYERS layers\n"
    "  --tokenizer DIR   with --synthetic: the tokenizer of the checkpoint in DIR; without it the file has none\n"
    "  --uniform         with --synthetic: every matrix at TYPE\n"
    "  --dry-run         print the plan, write nothing (OUT.r1 may be left out)\n"
    "  --force           replace OUT.r1 if it exists\n"
    "  -t, --threads N   default: all processors\n"
    "  -q, --quiet       print nothing but errors\n"
    "  -h, --help        this text\n"
    "\n"
    "Models: deepseek_v3 (DeepSeek-R1, R1-Zero, R1-0528, Moonlight), qwen2 and llama (the distills), qwen3 "
    "(R1-0528-Qwen3-8B).\n"
    "Shapes: r1, r1-distill-qwen-1.5b, -7b, -14b or -32b, r1-distill-llama-8b or -70b, r1-0528-qwen3-8b, "
    "moonlight-16b-a3b.\n";

static int complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "r1-convert: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "; r1-convert --help tells more\n");
    va_end(arguments);
    return 2;
}

static bool parse_number(const char *text, long least, long most, long *out) {
    char *end;
    errno = 0;
    long number = strtol(text, &end, 10);
    if (errno || *end || end == text || number < least || number > most) return false;
    *out = number;
    return true;
}

// The SHAPE[:LAYERS] of --synthetic, behind all other options; 0 or 2 as below.
static int parse_shape(const char *text, Options *options) {
    if (options->tokenizer_only) return complain("--tokenizer-only makes no sense with --synthetic");
    if (options->layers) return complain("--layers does not go with --synthetic, which takes SHAPE:LAYERS");
    if (options->recipe == RECIPE_SOURCE) {
        return complain("--type: random weights have no source; expected f32, bf16, f8, q8, q6 or q4");
    }
    const char *layers;
    options->shape = find_shape(text, &layers);
    if (!options->shape) {
        char names[400] = "";
        for (size_t i = 0; i < SHAPE_COUNT; i++) {
            size_t length = strlen(names);
            snprintf(names + length, sizeof names - length, "%s%s", i ? ", " : "", known_shapes[i].name);
        }
        return complain("--synthetic: %.60s is no known shape; there are %s", text, names);
    }
    long number = 0, most = (long)options->shape->config.num_hidden_layers;
    if (layers && !parse_number(layers, 1, most, &number)) {
        return complain("--synthetic: %s has 1 to %ld layers, got %.60s", options->shape->name, most, layers);
    }
    options->layers = (uint32_t)number;
    return 0;
}

// 0 to go on, 1 to end well, 2 for wrong usage.
static int parse_options(int argc, char **argv, Options *options) {
    enum { OPTION_TYPE = 1000, OPTION_LAYERS, OPTION_TOKENIZER_ONLY, OPTION_SYNTHETIC, OPTION_TOKENIZER, OPTION_UNIFORM,
           OPTION_DRY_RUN, OPTION_FORCE };
    static const struct option table[] = {
        {"type", required_argument, NULL, OPTION_TYPE},
        {"layers", required_argument, NULL, OPTION_LAYERS},
        {"tokenizer-only", no_argument, NULL, OPTION_TOKENIZER_ONLY},
        {"synthetic", required_argument, NULL, OPTION_SYNTHETIC},
        {"tokenizer", required_argument, NULL, OPTION_TOKENIZER},
        {"uniform", no_argument, NULL, OPTION_UNIFORM},
        {"dry-run", no_argument, NULL, OPTION_DRY_RUN},
        {"force", no_argument, NULL, OPTION_FORCE},
        {"threads", required_argument, NULL, 't'},
        {"quiet", no_argument, NULL, 'q'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    const char *shape = NULL, *tokenizer = NULL;
    long number;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":t:qh", table, NULL)) != -1;) {
        switch (option) {
        case OPTION_TYPE:
            for (options->recipe = 0; options->recipe < DTYPE_COUNT; options->recipe++) {
                if (strcmp(optarg, dtype_name(options->recipe)) == 0) break;
            }
            if (options->recipe == DTYPE_COUNT) {
                return complain("--type: expected source, f32, bf16, f8, q8, q6 or q4, got %s", optarg);
            }
            break;
        case OPTION_LAYERS:
            if (!parse_number(optarg, 1, 1000000, &number)) {
                return complain("--layers: expected a positive number, got %s", optarg);
            }
            options->layers = (uint32_t)number;
            break;
        case OPTION_TOKENIZER_ONLY: options->tokenizer_only = true; break;
        case OPTION_SYNTHETIC: shape = optarg; break;
        case OPTION_TOKENIZER: tokenizer = optarg; break;
        case OPTION_UNIFORM: options->uniform = true; break;
        case OPTION_DRY_RUN: options->dry_run = true; break;
        case OPTION_FORCE: options->force = true; break;
        case 't':
            if (!parse_number(optarg, 1, 4096, &number)) {
                return complain("-t: expected a number from 1 to 4096, got %s", optarg);
            }
            options->threads = (int)number;
            break;
        case 'q': options->quiet = true; break;
        case 'h': fputs(usage, stdout); return 1;
        case ':': return complain("%s needs a value", argv[optind - 1]);
        default:
            // An unknown letter may stand among others, as in -qx. Else optopt is a known option that was given a value, or 0.
            if (optopt && !strchr("tqh", optopt) && optopt < 0x80) return complain("there is no option -%c", optopt);
            return complain(optopt ? "%s: this option takes no value" : "there is no option %s", argv[optind - 1]);
        }
    }
    char **arguments = argv + optind;
    if (shape) {
        if (parse_shape(shape, options)) return 2;
        options->directory = tokenizer;
    } else {
        if (tokenizer || options->uniform) return complain("--%s goes with --synthetic", tokenizer ? "tokenizer" : "uniform");
        if (!*arguments) return complain("CHECKPOINT_DIR is missing");
        options->directory = *arguments++;
    }
    if (!*arguments && !options->dry_run) return complain("OUT.r1 is missing");
    options->output = *arguments;
    if (*arguments && arguments[1]) return complain("%s is one argument too many", arguments[1]);
    if (options->output && !*options->output) return complain("OUT.r1 is an empty name");
    if (options->tokenizer_only && options->layers) return complain("--layers makes no sense with --tokenizer-only");
    return 0;
}

static bool check_directory(const Options *options, Failure *failure) {
    struct stat status;
    if (!options->directory) return true;
    if (stat(options->directory, &status) != 0) return fail(failure, "%s: %s", options->directory, strerror(errno));
    bool tokenizer_alone = options->tokenizer_only || options->shape;
    // A folder of GGUF or PyTorch weights has no config.json either, often; which weights it has says more.
    if (S_ISDIR(status.st_mode)) return tokenizer_alone || check_weights(options->directory, failure);
    return fail(failure, "%s: not a directory; r1-convert takes the folder that holds %s", options->directory,
                tokenizer_alone ? "tokenizer.json" : "config.json and the .safetensors files");
}

static bool convert(const Options *options, Failure *failure) {
    Head head = {0};
    Checkpoint checkpoint = {0};
    Plan plan = {.shape = options->shape, .config = &head.config, .uniform = options->uniform, .cut = options->layers > 0,
                 .failure = failure};
    double start = now();
    bool ok = check_directory(options, failure) &&
              // A long conversion should not fail at its end for a name that was taken from the beginning.
              (options->dry_run || check_output(options, NULL, failure)) && make_head(options, &head, failure);
    if (ok && options->shape) {
        ok = plan_model(&plan);
    } else if (ok && !options->tokenizer_only) {
        plan.checkpoint = &checkpoint;
        ok = open_checkpoint(&checkpoint, options->directory, failure) && plan_checkpoint(&plan, options->quiet);
    }
    ok = ok && place_tensors(&plan, head.tokenizer_bytes);
    if (ok && options->dry_run) print_plan(options, &plan);
    if (ok && !options->dry_run) ok = write_file(options, &plan, &head, failure);
    if (ok && !options->dry_run && !options->quiet) {
        char size[32], bits[48] = "";
        if (plan.count) snprintf(bits, sizeof bits, ", %.3f bits per weight", bits_per_weight(&plan));
        fprintf(stderr, "%s: %s%s, %.1f seconds\n", options->output, show_bytes((double)plan.file_bytes, size, sizeof size),
                bits, now() - start);
    }
    free_plan(&plan);
    close_checkpoint(&checkpoint);
    free(head.tokenizer);
    return ok;
}

int main(int argc, char **argv) {
    Options options = {.recipe = DTYPE_Q4, .threads = omp_get_num_procs()};
    int status = parse_options(argc, argv, &options);
    if (status == 2) return 2;
    for (int code = 0; code < 256; code++) e4m3_values[code] = e4m3_to_float((uint8_t)code);
    Failure failure = {0};
    if (status == 1 || convert(&options, &failure)) {   // 1: the help is printed
        if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
        fail(&failure, "standard output: %s", strerror(errno));
    }
    // Names come from files: nothing that a terminal would obey gets through.
    for (char *at = failure.text; *at; at++) {
        if ((unsigned char)*at < 0x20 || *at == 0x7f) *at = '?';
    }
    fprintf(stderr, "r1-convert: %s\n", failure.text);
    return 1;
}
