// unit MODEL.r1...: functions of r1.c by themselves. Kernels have a program of their own, tests/kernels.c.
// unit --synthetic FILE SHAPE LAYERS: a file of random weights, all of one type, against the model that r1 bench makes up.
//
// The models are small ones that tests/groups/unit.sh converts; the loader is shown every single damaged byte of their
// metadata, the forward pass every kind of garbage as weights. Prints a line "ok WHAT" or "FAIL WHAT: WHY" for each thing.
#define _GNU_SOURCE
#include <float.h>
#include <ftw.h>
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

// Every allocation of r1.c is counted, to show that a forward pass makes none.
static size_t allocations;
static void *count_allocation(void *memory) {
    allocations++;
    return memory;
}
#define malloc(bytes) count_allocation((malloc)(bytes))
#define calloc(count, bytes) count_allocation((calloc)(count, bytes))
#define realloc(memory, bytes) count_allocation((realloc)(memory, bytes))
#define mmap(...) count_allocation((mmap)(__VA_ARGS__))
#include "../r1.c"
#undef malloc
#undef calloc
#undef realloc
#undef mmap

// ---- results

static bool any_failed;
static char failure[1024];        // the first thing that was wrong with what is under test; empty: none

#define EXPECT(condition, ...)                                                                                          \
    do {                                                                                                                \
        if (!(condition) && !failure[0]) snprintf(failure, sizeof failure, __VA_ARGS__);                                \
    } while (0)

static __attribute__((format(printf, 1, 2))) void report(const char *format, ...) {
    char what[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (failure[0]) printf("FAIL %s: %s\n", what, failure);
    else printf("ok %s\n", what);
    any_failed |= failure[0] != 0;
    failure[0] = 0;
}

// xorshift64*
static uint64_t test_random_state = 0x9e3779b97f4a7c15;
static uint32_t test_random(void) {
    test_random_state ^= test_random_state >> 12;
    test_random_state ^= test_random_state << 25;
    test_random_state ^= test_random_state >> 27;
    return (uint32_t)(test_random_state * 0x2545f4914f6cdd1d >> 32);
}

// ---- number formats

// A number of 1 sign bit, `exponent` and `mantissa` bits, from the definition.
static double small_float(unsigned bits, int exponent, int mantissa) {
    int bias = (1 << (exponent - 1)) - 1, e = (int)(bits >> mantissa) & ((1 << exponent) - 1);
    double m = bits & ((1u << mantissa) - 1);
    double value = e ? ldexp(1 + ldexp(m, -mantissa), e - bias) : ldexp(m, 1 - bias - mantissa);
    return bits >> (exponent + mantissa) & 1 ? -value : value;
}

static void test_formats(void) {
    for (unsigned bits = 0; bits < 256; bits++) {
        if ((bits & 0x7f) == 0x7f) continue;             // not a number
        EXPECT(float_from_e4m3((uint8_t)bits) == small_float(bits, 4, 3), "code %02x: expected %g, got %g", bits,
               small_float(bits, 4, 3), (double)float_from_e4m3((uint8_t)bits));
    }
    report("all E4M3 numbers");

    for (unsigned bits = 0; bits < 65536; bits++) {
        float value = float_from_half((uint16_t)bits);
        if ((bits & 0x7c00) == 0x7c00) {
            EXPECT((bits & 0x3ff) ? isnan(value) : isinf(value), "%04x: got %g", bits, (double)value);
            continue;
        }
        EXPECT(value == small_float(bits, 5, 10), "%04x: expected %g, got %g", bits, small_float(bits, 5, 10), (double)value);
        EXPECT(half_from_float(value) == bits, "%04x comes back as %04x", bits, half_from_float(value));
    }
    report("all half-precision numbers, there and back");

    for (int i = 0; i < 2000000; i++) {
        float value = float_from_bits(test_random() >> 1);
        if (!(fabsf(value) < 65504.0f)) continue;
        uint16_t half = half_from_float(value);
        double error = fabs((double)value - (double)float_from_half(half));
        double below = half ? fabs((double)value - (double)float_from_half((uint16_t)(half - 1))) : INFINITY;
        double above = half < 0x7bff ? fabs((double)value - (double)float_from_half((uint16_t)(half + 1))) : INFINITY;
        EXPECT(error <= below && error <= above, "%g: not the nearest half", (double)value);
        if (error == below || error == above) EXPECT(half % 2 == 0, "%g: a tie that is not rounded to even", (double)value);
    }
    EXPECT(isfinite(float_from_half(half_from_float(1e30f))), "1e30 is not kept finite");
    report("floats rounded to half precision");
}

// ---- sampling

static void test_sampler(void) {
    float logits[64];
    struct Sampler sampler;
    for (int round = 0; round < 2000; round++) {
        for (size_t i = 0; i < 64; i++) logits[i] = (float)(test_random() % 1000) * 0.01f;
        uint32_t best = find_largest(logits, 64);
        for (size_t i = 0; i < 64; i++) EXPECT(logits[i] < logits[best] || (logits[i] == logits[best] && i >= best), "the first largest is %zu, got %u", i, best);
        size_t top_k = 1 + test_random() % 5;
        sampler_init(&sampler, 64, 1.0f, 1.0f, 0, top_k, test_random());
        uint32_t token = sample_token(&sampler, logits);
        size_t above = 0;
        for (size_t i = 0; i < 64; i++) above += logits[i] > logits[token];
        EXPECT(above < top_k, "top-k %zu gave the token of rank %zu", top_k, above);
        sampler_free(&sampler);
        sampler_init(&sampler, 64, 0, 1.0f, 0, 0, test_random());
        EXPECT(sample_token(&sampler, logits) == best, "temperature 0 gave another than the largest");
        sampler_free(&sampler);
    }
    report("the largest logit, and top-k");

    // Three tokens of probability 0.5, 0.3 and 0.2: how often each is drawn.
    for (size_t i = 0; i < 64; i++) logits[i] = -INFINITY;
    logits[7] = logf(0.5f);
    logits[30] = logf(0.3f);
    logits[63] = logf(0.2f);
    const struct { float temperature, top_p, min_p; double expected[3]; } cases[] = {
        {1, 1, 0, {0.5, 0.3, 0.2}},
        {1, 0.6f, 0, {0.625, 0.375, 0}},                 // the smallest set that weighs 0.6
        {1, 0.5f, 0, {1, 0, 0}},
        {1, 1, 0.5f, {0.625, 0.375, 0}},                 // at least half of the largest
        {0.5f, 1, 0, {0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38}},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        sampler_init(&sampler, 64, cases[k].temperature, cases[k].top_p, cases[k].min_p, 0, 1234);
        int counts[3] = {0};
        enum { DRAWS = 40000 };
        for (int i = 0; i < DRAWS; i++) {
            uint32_t token = sample_token(&sampler, logits);
            EXPECT(token == 7 || token == 30 || token == 63, "a token of probability 0 was drawn: %u", token);
            counts[token == 7 ? 0 : token == 30 ? 1 : 2]++;
        }
        for (int i = 0; i < 3; i++)
            EXPECT(fabs(counts[i] / (double)DRAWS - cases[k].expected[i]) < 0.012,
                   "temperature %g, top-p %g, min-p %g: expected a share of %.3f, got %.3f", (double)cases[k].temperature,
                   (double)cases[k].top_p, (double)cases[k].min_p, cases[k].expected[i], counts[i] / (double)DRAWS);
        sampler_free(&sampler);
    }
    report("how often tokens are drawn");

    static const float oddities[] = {NAN, INFINITY, -INFINITY, 0, 3e38f, -3e38f};
    for (int round = 0; round < 2000; round++) {
        for (size_t i = 0; i < 64; i++) logits[i] = oddities[test_random() % (round % 6 + 1)];
        sampler_init(&sampler, 64, (float)(round % 3), 0.95f, 0.01f * (float)(round % 2), test_random() % 4, test_random());
        EXPECT(sample_token(&sampler, logits) < 64, "a token beyond the vocabulary");
        sampler_free(&sampler);
    }
    report("logits that are no numbers give some token");

    for (size_t i = 0; i < 64; i++) logits[i] = i == 5 ? NAN : (float)i / 100;
    for (size_t top_k = 0; top_k < 4; top_k++) {
        sampler_init(&sampler, 64, 1, 0.95f, 0, top_k, 1234);
        uint32_t token = sample_token(&sampler, logits);
        EXPECT(token == 5, "token %u was drawn, whose logit is a number", token);
        sampler_free(&sampler);
    }
    report("one logit that is no number is not passed over");
}

// ---- streaming UTF-8

static void test_utf8_stream(void) {
    static const char text[] = "a\xc3\xa9\xe4\xb8\x96\xf0\x9f\x8e\x89z";       // 1, 2, 3, 4 and 1 bytes
    size_t length = sizeof text - 1;
    char out[256];
    for (size_t first = 0; first <= length; first++)
        for (size_t second = first; second <= length; second++) {
            Utf8Stream stream = {0};
            size_t n = utf8_stream_push(&stream, text, first, out);
            n += utf8_stream_push(&stream, text + first, second - first, out + n);
            n += utf8_stream_push(&stream, text + second, length - second, out + n);
            n += utf8_stream_end(&stream, out + n);
            EXPECT(n == length && memcmp(out, text, n) == 0, "cut at %zu and %zu: got %.*s", first, second, (int)n, out);
        }
    Utf8Stream stream = {0};
    size_t n = utf8_stream_push(&stream, text, 7, out);  // ends inside the last sequence
    EXPECT(n == 6, "a started sequence was not held back: %zu bytes", n);
    report("UTF-8 cut at any two places");

    const struct { const char *in, *out; } cases[] = {
        {"\xff", "\xef\xbf\xbd"}, {"a\x80z", "a\xef\xbf\xbdz"}, {"\xc3", "\xef\xbf\xbd"}, {"\xe4\xb8", "\xef\xbf\xbd"},
        {"\xe4z", "\xef\xbf\xbdz"}, {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        stream = (Utf8Stream){0};
        n = 0;
        for (const char *at = cases[i].in; *at; at++) n += utf8_stream_push(&stream, at, 1, out + n);
        n += utf8_stream_end(&stream, out + n);
        EXPECT(n == strlen(cases[i].out) && memcmp(out, cases[i].out, n) == 0, "case %zu: %zu bytes, expected %zu", i, n, strlen(cases[i].out));
    }
    report("broken UTF-8 comes out as U+FFFD");
}

// ---- the loader

struct File {
    uint8_t *bytes;               // page-aligned
    size_t size, metadata;        // metadata: up to the end of the tensor table
};

static struct File read_model(const char *path) {
    struct File file = {0};
    struct stat status;
    FILE *in = fopen(path, "rb");
    if (!in || fstat(fileno(in), &status) != 0 || status.st_size == 0) die("%s: cannot be read", path);
    file.size = (size_t)status.st_size;
    file.bytes = aligned_alloc(4096, align_up(file.size, 4096));
    if (!file.bytes || fread(file.bytes, 1, file.size, in) != file.size) die("%s: cannot be read", path);
    fclose(in);
    struct FilePreamble preamble;
    memcpy(&preamble, file.bytes, sizeof preamble);
    file.metadata = preamble.table_offset + preamble.tensor_count * sizeof(struct TensorEntry);
    return file;
}

// Makes the checksum right again, so that the damage gets past it. A table that lies outside has no right one.
static void mend_hash(const struct File *file) {
    struct FilePreamble *preamble = (struct FilePreamble *)(void *)file->bytes;
    uint64_t end = preamble->table_offset + preamble->tensor_count * sizeof(struct TensorEntry);
    if (preamble->table_offset > file->size || end > file->size || end < sizeof *preamble) return;
    XXH3_state_t *state = XXH3_createState();
    XXH3_64bits_reset(state);
    XXH3_64bits_update(state, file->bytes, offsetof(struct FilePreamble, metadata_hash));
    XXH3_64bits_update(state, file->bytes + sizeof *preamble, end - sizeof *preamble);
    preamble->metadata_hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
}

// Loads it: it must be sound, or refused with one line that names the file.
static bool loads(const struct File *file, size_t size, const char *what, size_t where) {
    char error[ERROR_BYTES] = "";
    struct Model *model = model_from_memory(file->bytes, size, "some.r1", error);
    if (model) {
        model_close(model);
        return true;
    }
    EXPECT(strncmp(error, "some.r1: ", 9) == 0 && strlen(error) > 12, "%s %zu: no sentence that names the file: \"%s\"", what, where, error);
    EXPECT(!strchr(error, '\n'), "%s %zu: more than one line: \"%s\"", what, where, error);
    return false;
}

// Gate and up, whose panels alternate in the file, must have one shape: with another one of them every network is refused.
static void test_gate_and_up(const struct File *file, const char *name) {
    struct FilePreamble preamble;
    memcpy(&preamble, file->bytes, sizeof preamble);
    struct TensorEntry *entries = (struct TensorEntry *)(void *)(file->bytes + preamble.table_offset);
    size_t networks = 0;
    for (uint32_t i = 0; i < preamble.tensor_count; i++) {
        if (entries[i].parts != ENTRY_MAX_PARTS) continue;
        networks++;
        uint64_t *const sizes[] = {&entries[i].rows[UP], &entries[i].cols[UP]};
        for (int k = 0; k < 2; k++) {
            char error[ERROR_BYTES] = "it loads";
            *sizes[k] += K_GROUP;
            mend_hash(file);
            struct Model *model = model_from_memory(file->bytes, file->size, "some.r1", error);
            EXPECT(strstr(error, entries[i].name) && strstr(error, "gate and up differ in shape"), "%s: %s", entries[i].name, error);
            if (model) model_close(model);
            *sizes[k] -= K_GROUP;
        }
    }
    memcpy(file->bytes, &preamble, sizeof preamble);
    EXPECT(networks, "no feed-forward network");
    report("%s: gate and up of different shapes (%zu networks)", name, networks);
}

static void test_loader(const char *path) {
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    struct File file = read_model(path);
    EXPECT(loads(&file, file.size, "as it is", 0), "the model as it is was refused");
    report("%s loads", name);

    uint8_t head[4096];
    for (size_t i = 0; i < file.metadata; i++) {
        file.bytes[i] ^= 0x41;
        EXPECT(!loads(&file, file.size, "byte", i), "byte %zu of %zu can change without a word", i, file.metadata);
        file.bytes[i] ^= 0x41;
    }
    report("%s: every byte of the metadata changed (%zu)", name, file.metadata);

    // The same with a checksum that fits: what is left must be refused for what it says, or make some sense.
    size_t accepted = 0;
    memcpy(head, file.bytes, sizeof(struct FilePreamble));
    for (size_t i = 0; i < file.metadata; i++)
        for (int kind = 0; kind < 4; kind++) {
            uint8_t old = file.bytes[i];
            file.bytes[i] = kind == 0 ? 0 : kind == 1 ? 0xff : kind == 2 ? old ^ 0x80 : old + 1;
            if (file.bytes[i] != old) {
                mend_hash(&file);
                accepted += loads(&file, file.size, "byte", i);
            }
            memcpy(file.bytes, head, sizeof(struct FilePreamble));
            file.bytes[i] = old;
            memcpy(file.bytes, head, sizeof(struct FilePreamble));
        }
    report("%s: every byte changed behind the checksum's back (%zu still load)", name, accepted);

    test_gate_and_up(&file, name);
    for (size_t size = 0; size < file.metadata; size += size < 512 ? 1 : 7) EXPECT(!loads(&file, size, "length", size), "a file of %zu bytes loads", size);
    report("%s: cut at every length", name);
    free(file.bytes);
}

// ---- forward

static void test_forward(const char *path) {
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    struct File file = read_model(path);
    char error[ERROR_BYTES];
    struct Model *model = model_from_memory(file.bytes, file.size, "some.r1", error);
    if (!model) {
        EXPECT(false, "%s", error);
        report("%s: forward", name);
        free(file.bytes);
        return;
    }
    static struct Team team;
    team.threads = 1;
    openblas_set_num_threads(1);
    uint32_t tokens[40];
    for (size_t i = 0; i < 40; i++) tokens[i] = test_random() % model->config.vocab_size;
    const struct Kernels *list[MAX_KERNEL_TABLES];
    size_t tables = list_kernels(list);
    struct Sampler sampler;
    sampler_init(&sampler, model->config.vocab_size, 1, 0.95f, 0, 0, 1);
    for (enum CacheType cache = CACHE_F32; cache <= CACHE_Q8; cache++) {
        struct SessionOptions options = {.context = 64, .batch = 32, .logits_rows = 1, .cache = cache};
        for (size_t i = 0; i < tables; i++) {
            struct Session *session = session_create(model, &team, list[i], &options, error);
            if (!session) die("%s", error);
            size_t before = allocations;
            prefill(session, tokens, 40);
            for (int k = 0; k < 4; k++) {
                uint32_t token = sample_token(&sampler, session->logits);
                forward(session, &token, 1, LOGITS_LAST);
            }
            size_t tried = min_size(4 * model->config.num_hidden_layers, PREFETCHING_WAYS * TRIAL_ROUNDS);
            EXPECT(session->trial.layers == tried, "%zu layers tried a way to ask for weights, not %zu", session->trial.layers, tried);
            EXPECT(allocations == before, "%s, %s cache: %zu allocations", list[i]->name, cache_names[cache], allocations - before);
            for (size_t k = 0; k < model->config.vocab_size; k++) EXPECT(isfinite(session->logits[k]), "logit %zu is not finite", k);
            session_free(session);
        }
    }
    report("%s: a forward pass allocates nothing, and decode tries ways to ask for weights", name);

    // Weights that are no numbers, or any: garbage out, but nothing worse.
    size_t data = align_up(file.metadata, FORMAT_PAGE);
    for (int kind = 0; kind < 4; kind++) {
        for (size_t i = data; i < file.size; i++)
            file.bytes[i] = kind == 0 ? 0xff : kind == 1 ? 0x7f : kind == 2 ? 0 : (uint8_t)test_random();
        for (size_t i = 0; i < tables; i++) {
            struct SessionOptions options = {.context = 64, .batch = 32, .logits_rows = 1, .cache = (enum CacheType)(kind % 3)};
            struct Session *session = session_create(model, &team, list[i], &options, error);
            if (!session) die("%s", error);
            prefill(session, tokens, 40);
            for (int k = 0; k < 4; k++) {
                uint32_t token = sample_token(&sampler, session->logits);
                EXPECT(token < model->config.vocab_size, "a token beyond the vocabulary");
                forward(session, &token, 1, LOGITS_LAST);
                for (size_t j = 0; j < session->job_count; j++)
                    EXPECT(session->jobs[j].n == 1, "a token visits an expert %zu times", session->jobs[j].n);
            }
            session_free(session);
        }
    }
    report("%s: garbage as weights", name);
    sampler_free(&sampler);
    model_close(model);
    free(file.bytes);
}

// In a prompt's last layer only the last token goes all the way; its logits, and those of a token behind, are those of a session in
// which every token does, but for what kernels of one and of many tokens round differently: q4 has coarser scales for many.
static void test_last_layer(const char *path) {
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    struct File file = read_model(path);
    char error[ERROR_BYTES];
    struct Model *model = model_from_memory(file.bytes, file.size, "some.r1", error);
    if (!model) die("%s", error);
    static struct Team team;
    team.threads = 1;
    openblas_set_num_threads(1);
    enum { TOKENS = 60, STEP = 20 };
    uint32_t tokens[TOKENS + 1], vocab = model->config.vocab_size;
    for (size_t i = 0; i <= TOKENS; i++) tokens[i] = test_random() % vocab;
    struct SessionOptions options = {.context = 64, .batch = STEP, .logits_rows = STEP};
    struct Session *some = session_create(model, &team, &portable_kernels, &options, error);
    struct Session *all = session_create(model, &team, &portable_kernels, &options, error);
    if (!some || !all) die("%s", error);
    double furthest = 0, largest = 0;
    for (size_t done = 0; done <= TOKENS; done += STEP) {
        size_t n = min_size(STEP, TOKENS + 1 - done);
        forward(some, tokens + done, n, done + STEP < TOKENS ? LOGITS_NONE : LOGITS_LAST);
        forward(all, tokens + done, n, LOGITS_ALL);
        EXPECT(some->position == done + n && all->position == done + n, "at position %zu after %zu tokens", some->position, done + n);
        for (size_t k = 0; k < vocab && done + STEP >= TOKENS; k++) {
            furthest = fmax(furthest, fabs((double)some->logits[k] - (double)all->logits[(n - 1) * vocab + k]));
            largest = fmax(largest, fabs((double)some->logits[k]));
        }
    }
    EXPECT(some->trial.layers == model->config.num_hidden_layers, "a prompt's layer tried a way to ask for weights");
    some->trial.layers = PREFETCHING_WAYS * TRIAL_ROUNDS, some->trial.way = 3;      // as if that had been found
    forward(some, (const uint32_t[]){1}, 1, LOGITS_LAST);
    EXPECT(prefetching.bytes == prefetching_ways[3].bytes && prefetching.first_only == prefetching_ways[3].first_only &&
               prefetching.pages == prefetching_ways[3].pages, "the way found is not in use");
    EXPECT(furthest < (model->config.recipe == DTYPE_Q4 ? 0.05 : 1e-4) * largest, "logits of up to %g differ by up to %g", largest, furthest);
    report("%s: only the last token goes through the whole of a prompt's last layer (logits within %.1e)", name, furthest / largest);
    session_free(some);
    session_free(all);
    model_close(model);
    free(file.bytes);
}

// Whatever the router's logits and biases are, a token's experts are different ones, of the groups that may be chosen: a buffer has
// room for as many visits of an expert as there are tokens.
static void test_router(void) {
    static const struct ModelConfig configs[] = {
        {.n_routed_experts = 256, .n_group = 8, .topk_group = 4, .num_experts_per_tok = 8, .norm_topk_prob = 1, .routed_scaling_factor = 2.5f},
        {.n_routed_experts = 64, .n_group = 1, .topk_group = 1, .num_experts_per_tok = 6, .norm_topk_prob = 1, .routed_scaling_factor = 2.446f},
        {.n_routed_experts = 6, .n_group = 6, .topk_group = 6, .num_experts_per_tok = 6, .norm_topk_prob = 0, .routed_scaling_factor = 1},
    };
    static const float odd[] = {NAN, -NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 0, 1};
    enum { ODD = sizeof odd / sizeof *odd };
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++)
        for (size_t round = 0; round < 1000; round++) {
            const struct ModelConfig *c = &configs[i];
            float logits[256], bias[256], weights[8];
            uint32_t ids[8];
            for (size_t e = 0; e < c->n_routed_experts; e++) {   // first each with each, then any with any
                logits[e] = odd[(round < ODD * ODD ? round : test_random()) % ODD];
                bias[e] = odd[(round < ODD * ODD ? round / ODD : test_random()) % ODD];
            }
            select_experts(c, bias, logits, ids, weights);
            bool chosen[256] = {false}, group_chosen[256] = {false};
            size_t groups = 0;
            for (size_t k = 0; k < c->num_experts_per_tok; k++) {
                EXPECT(ids[k] < c->n_routed_experts, "expert %u of %u", ids[k], c->n_routed_experts);
                EXPECT(!chosen[ids[k] % 256], "round %zu: expert %u is chosen twice", round, ids[k]);
                size_t group = ids[k] % 256 / (c->n_routed_experts / c->n_group);
                groups += !group_chosen[group];
                chosen[ids[k] % 256] = group_chosen[group] = true;
            }
            EXPECT(groups <= c->topk_group, "experts of %zu groups, not %u", groups, c->topk_group);
        }
    report("a token's experts are different ones, whatever the router says");
}

// A file larger than memory leaves an eighth of it to the cache; weights that --copy has read are no longer to come.
static void test_context(void) {
    const char *type;
    struct Model *model = model_of_shape(find_shape("r1-distill-qwen-1.5b", &type), DTYPE_Q4, false, 0, false);
    static struct Team team;
    team.threads = 1;
    uint64_t available = available_memory();
    model->config.max_position_embeddings = UINT32_MAX;
    model->size = 2 * available;
    struct SessionOptions options = {.context = 1 << 20, .batch = 512, .logits_rows = 1, .cache = CACHE_F16};
    struct MemoryPlan plan = plan_memory(model, &options, 1);
    struct Command command = {.context = NOT_GIVEN, .batch = NOT_GIVEN, .cache = CACHE_F16, .quiet = true, .team = &team};
    command.max_tokens = (uint64_t)((double)options.context / (double)(plan.cache + plan.scratch) * (double)available / 2);
    struct Generation generation = {.command = &command, .model = model};
    options = choose_session(&generation);
    plan = plan_memory(model, &options, 1);
    EXPECT(plan.cache + plan.scratch < available / 7 && plan.cache + plan.scratch > available / 10, "%.1f GB beside a file twice as large as the %.1f GB of memory",
           (double)(plan.cache + plan.scratch) / 1e9, (double)available / 1e9);
    command.copy = true;
    options = choose_session(&generation);
    EXPECT(options.context == command.max_tokens, "a context of %zu tokens beside a copy, not %" PRIu64, options.context, command.max_tokens);
    report("the context that fits into memory beside a file, and beside its copy");
    close_shape(model);
}

// What a dense model says of experts, which nobody checks, must not count.
static void test_dense_memory(void) {
    const char *type;
    struct Model *model = model_of_shape(find_shape("r1-distill-qwen-1.5b", &type), DTYPE_Q4, false, 0, false);
    struct SessionOptions options = {.context = 1024, .batch = 512, .logits_rows = 1, .cache = CACHE_F16};
    struct MemoryPlan plan = plan_memory(model, &options, 1);
    model->config.n_shared_experts = model->config.moe_intermediate_size = 1u << 31;
    struct MemoryPlan hostile = plan_memory(model, &options, 1);
    EXPECT(hostile.scratch == plan.scratch, "%" PRIu64 " bytes of working space, not %" PRIu64, hostile.scratch, plan.scratch);
    report("a dense model's working space does not depend on experts that it has not");
    close_shape(model);
}

// ---- numbers that JSON does not know

// A mean of 800 nats is finite, e to the 800 is not. report_json() ends the program where jansson takes no object.
static void test_infinite_perplexity(void) {
    struct Model model = {.name = "model"};
    struct Command command = {.cache = CACHE_F16};
    struct Windows windows = {.count = 1, .scored = 1};
    struct Evaluation evaluation = {.command = &command, .windows = &windows};
    struct Summary summaries[SCORE_COUNT] = {[SCORE_NLL] = {.mean = 800}};
    report_json(&evaluation, summaries, &model);
    report("a perplexity that is infinite, as JSON");
}

// ---- the memory of a control group

static void put_file(const char *folder, const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    if (!file || fputs(text, file) < 0 || fclose(file) != 0) die("%s: %s", path, strerror(errno));
}

static int remove_found(const char *path, const struct stat *status, int kind, struct FTW *place) {
    (void)status, (void)kind, (void)place;
    return remove(path);
}

// Each case is a system of its own: what /proc/self/cgroup says, then names below /sys/fs/cgroup, each with what that says.
static void test_groups(void) {
    static const struct { const char *what; uint64_t expected; const char *membership, *files[12]; } cases[] = {
        {"no limit", UINT64_MAX, "0::/a\n", {"a/memory.max", "max\n", "a/memory.current", "700\n"}},
        {"a limit", 300, "0::/a\n", {"a/memory.max", "1000\n", "a/memory.current", "700\n"}},
        {"used in part by pages of files", 350, "0::/a\n",
         {"a/memory.max", "1000\n", "a/memory.current", "700\n",
          "a/memory.stat", "anon 5000\nactive_anon 4000\ninactive_file 30\nactive_file 20\n"}},
        {"more pages of files than bytes used", 1000, "0::/a\n",
         {"a/memory.max", "1000\n", "a/memory.current", "40\n", "a/memory.stat", "inactive_file 30\nactive_file 20\n"}},
        {"more used than the limit", 0, "0::/a\n", {"a/memory.max", "1000\n", "a/memory.current", "1700\n"}},
        {"less left further out", 300, "0::/a/b/c\n",
         {"a/b/c/memory.max", "max\n", "a/b/memory.max", "5000\n", "a/b/memory.current", "600\n",
          "a/memory.max", "1000\n", "a/memory.current", "700\n"}},
        {"less left further in", 200, "0::/a/b\n",
         {"a/b/memory.max", "400\n", "a/b/memory.current", "200\n", "a/memory.max", "1000\n", "a/memory.current", "200\n"}},
        {"a container that is the top", 100, "0::/\n", {"memory.max", "1000\n", "memory.current", "900\n"}},
        {"a container with its host's name", 100, "0::/docker/12ab\n", {"memory.max", "1000\n", "memory.current", "900\n"}},
        {"version 1", 340, "9:name=systemd:/x\n4:memory:/a b:c\n3:cpu,cpuacct:/\n0::/\n",
         {"memory/a b:c/memory.limit_in_bytes", "1000\n", "memory/a b:c/memory.usage_in_bytes", "700\n",
          "memory/a b:c/memory.stat", "inactive_file 1\nactive_file 2\ntotal_inactive_file 30\ntotal_active_file 10\n",
          "memory/memory.limit_in_bytes", "9223372036854771712\n", "memory/x/memory.limit_in_bytes", "1\n"}},
    };
    char folder[] = "/tmp/r1-unit-XXXXXX", root[64];
    if (!mkdtemp(folder)) die("%s: %s", folder, strerror(errno));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(root, sizeof root, "%s/%zu", folder, i);
        EXPECT(available_in_group(root) == UINT64_MAX, "a limit without groups");
        put_file(root, "proc/self/cgroup", cases[i].membership);
        for (const char *const *file = cases[i].files; *file; file += 2) {
            char name[64];
            snprintf(name, sizeof name, "sys/fs/cgroup/%s", file[0]);
            put_file(root, name, file[1]);
        }
        uint64_t available = available_in_group(root);
        EXPECT(available == cases[i].expected, "%s: %" PRIu64 " bytes, expected %" PRIu64, cases[i].what, available, cases[i].expected);
    }
    nftw(folder, remove_found, 8, FTW_DEPTH | FTW_PHYS);
    report("the memory that control groups leave");
}

// ---- known shapes

// Every shape in every type is a model that would be sound in a file. The first layers are enough: R1's fourth is of another kind.
static void test_shapes(void) {
    char error[ERROR_BYTES];
    for (size_t i = 0; i < SHAPE_COUNT; i++) {
        for (uint32_t type = DTYPE_F32; type < DTYPE_COUNT; type++) {
            struct Model *model = model_of_shape(&known_shapes[i], type, false, 4, true);
            EXPECT(check_config(&model->config, error), "%s: %s", dtype_name(type), error);
            for (size_t k = 0; k < model->entry_count; k++)
                EXPECT(check_entry(&model->entries[k], 0, model->size, error), "%s: %s", dtype_name(type), error);
            free((void *)(uintptr_t)model->entries);
            model_close(model);
        }
        report("shape %s", known_shapes[i].name);
    }
}

// ---- the table of r1 bench

static void expect_speeds(struct TableRow *rows, size_t i, const struct Machine *machine, double decode, double prefill) {
    complete_row(&rows[i], rows, machine);
    const double tok_s[SPEEDS] = {rows[i].speed[DECODE].tok_s, rows[i].speed[PREFILL].tok_s};
    EXPECT(fabs(tok_s[DECODE] - decode) < 1e-9 * decode && fabs(tok_s[PREFILL] - prefill) < 1e-9 * prefill,
           "row %zu: %g and %g tokens a second, expected %g and %g", i, tok_s[DECODE], tok_s[PREFILL], decode, prefill);
}

// Of made-up models on a machine that reads 100 GB/s and multiplies 1000 GMAC/s.
static void test_table(void) {
    struct Machine machine = {100, 1000};
    struct TableRow rows[TABLE_ROWS] = {
        {.type = DTYPE_Q4, .work = {5e9, 2e9}},
        {.type = DTYPE_Q8, .work = {10e9, 2e9}},
        {.type = DTYPE_Q4, .work = {20e9, 10e9}},
        {.type = DTYPE_Q4, .work = {5e9, 4e9}, .has_experts = true},
        {.type = DTYPE_Q4, .work = {50e9, 40e9}},
        {.type = DTYPE_Q8, .work = {80e9, 40e9}},
        {.type = DTYPE_Q8, .work = {40e9, 20e9}, .has_experts = true},
    };
    expect_speeds(rows, 4, &machine, 2, 25);
    report("the table of bench: the limits, where nothing was measured");
    static const double measured[4][SPEEDS] = {{10, 100}, {8, 200}, {4.5, 30}, {12, 25}};
    for (size_t i = 0; i < 4; i++) {
        rows[i].measured = true;
        const double limits[SPEEDS] = {machine.read_gb_s * 1e9, machine.int8_gmac_s * 1e9};
        for (int k = DECODE; k < SPEEDS; k++)
            rows[i].speed[k] = (struct Speed){.tok_s = measured[i][k], .fraction = measured[i][k] * rows[i].work[k] / limits[k]};
    }
    for (size_t i = 0; i < 4; i++) expect_speeds(rows, i, &machine, measured[i][DECODE], measured[i][PREFILL]);
    report("the table of bench: what was measured stays");
    expect_speeds(rows, 4, &machine, 2 * 0.9, 25 * 0.3);
    expect_speeds(rows, 5, &machine, 1.25 * 0.8, 25 * 0.4);
    expect_speeds(rows, 6, &machine, 2.5 * 0.6, 50 * 0.1);
    report("the table of bench: what was not, by the largest of its kind and type");
}

// What a prefill multiplies, against sums by hand of the models' shapes: of 16 tokens all go through the last layer, of 17 one.
static void test_prefill_macs(void) {
    static const struct { const char *shape; double fill, rest, others, head; } cases[] = {
        // q, k, v; o, gate, up, down; 27 other layers
        {"r1-distill-qwen-1.5b", 2048.0 * 1536, 1536.0 * 1536 + 3 * 8960.0 * 1536, 27 * (2048.0 * 1536 + 1536.0 * 1536 + 3 * 8960.0 * 1536),
         151936.0 * 1536},
        // q, kv_a; key and value factors, o, 6 experts, 2 shared, router; a dense layer and 25 others
        {"moonlight-16b-a3b", 3648.0 * 2048, 2 * 16 * 128.0 * 512 + 2048.0 * 2048 + 8 * 3 * 1408.0 * 2048 + 64 * 2048.0,
         26 * (3648.0 * 2048 + 2 * 16 * 128.0 * 512 + 2048.0 * 2048) + 3 * 11264.0 * 2048 + 25 * (8 * 3 * 1408.0 * 2048 + 64 * 2048.0),
         163840.0 * 2048},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *type;
        struct Model *model = model_of_shape(find_shape(cases[i].shape, &type), DTYPE_Q4, false, 0, false);
        static const struct { size_t count, batch, through; } prompts[] = {{1, 512, 1}, {16, 512, 16}, {17, 512, 1}, {512, 512, 1}, {520, 512, 8}};
        for (size_t k = 0; k < sizeof prompts / sizeof *prompts; k++) {
            double count = (double)prompts[k].count, through = (double)prompts[k].through;
            double expected = count * (cases[i].others + cases[i].fill) + through * cases[i].rest + cases[i].head;
            double macs = prefill_macs(model, prompts[k].count, prompts[k].batch);
            EXPECT(macs == expected, "%s, %zu tokens: %.0f multiply-adds, not %.0f", cases[i].shape, prompts[k].count, macs, expected);
        }
        close_shape(model);
    }
    report("the multiply-adds of a prefill, by hand");
}

// One thread that reads two slices and a half, twice.
static void test_reading(void) {
    static struct Team team;
    team.threads = 1;
    size_t count = 2 * PROBE_SLICE + PROBE_SLICE / 2;
    struct Probe probe = {.team = &team, .kernels = &portable_kernels};
    EXPECT(find_read_gb_s(&probe) == 0, "a speed before anything was read");
    read_slice(&probe);
    EXPECT(probe.length == 0, "read without memory");
    probe.memory_bytes = probe.count = probe.length = count;
    probe.bytes = probe.memory = map_memory(count);
    if (!probe.bytes) die("no memory");
    size_t first[] = {0, PROBE_SLICE, 2 * PROBE_SLICE, 0, PROBE_SLICE, 2 * PROBE_SLICE}, length[] = {PROBE_SLICE, PROBE_SLICE, PROBE_SLICE / 2};
    for (size_t i = 0; i < 6; i++) {
        read_slice(&probe);
        EXPECT(probe.first == first[i] && probe.length == length[i % 3], "slice %zu: %zu bytes from %zu", i, probe.length, probe.first);
    }
    double bytes = 0;
    for (size_t i = 0; i < READING_MANNERS; i++) {
        bytes += probe.read[i].bytes;
        EXPECT(probe.read[i].seconds > 0, "manner %zu had no turn", i);
    }
    EXPECT(bytes == 2.0 * (double)count, "%.0f bytes", bytes);
    forget_reading(&probe);
    probe.read[0].bytes = 8e9, probe.read[0].seconds = 2;
    probe.read[2].bytes = 3e9, probe.read[2].seconds = 0.5;
    EXPECT(find_read_gb_s(&probe) == 6, "%g GB/s", find_read_gb_s(&probe));
    struct Model model = {.bytes = probe.bytes, .size = 8 * PROBE_SLICE - 1};
    const uint8_t *own = probe.bytes;
    probe_model(&probe, &model);
    EXPECT(probe.bytes == own && probe.count == count, "a small model is read");
    static _Alignas(4096) uint8_t weights[4096];
    model.bytes = weights, model.size = 8 * PROBE_SLICE + 1;
    probe_model(&probe, &model);
    EXPECT(probe.bytes == weights && probe.count == 8 * PROBE_SLICE, "a large model is not read, but %zu bytes", probe.count);
    EXPECT(probe.memory == own && probe.memory_bytes == count, "it gave its memory back");
    close_probe(&probe);
    weights[0] = 1;                                                        // still there
    report("the read bandwidth: every manner has its turn, and the fastest counts");
}

static void test_synthetic(const char *path, const char *name, uint32_t layers) {
    static struct Team team;
    char error[ERROR_BYTES];
    const char *rest;
    struct Model *file = model_open(path, error);
    if (!file) die("%s", error);
    struct Model *model = model_of_shape(find_shape(name, &rest), file->config.recipe, true, layers, true);
    team.threads = 3;
    for (int thread = 0; thread < team.threads; thread++) fill_weights(&(struct Filling){&team, model}, thread);

    EXPECT(memcmp(&file->config, &model->config, sizeof file->config) == 0, "the configs differ");
    EXPECT(file->entry_count == model->entry_count, "the file has %zu tensors, expected %zu", file->entry_count, model->entry_count);
    for (size_t i = 0; i < min_size(file->entry_count, model->entry_count); i++) {
        const struct TensorEntry *got = &file->entries[i], *expected = &model->entries[i];
        EXPECT(memcmp(got, expected, offsetof(struct TensorEntry, offset)) == 0 && got->bytes == expected->bytes,
               "tensor %s is not the %s expected", got->name, expected->name);
        if (failure[0]) break;
        EXPECT(memcmp(file->bytes + got->offset, model->bytes + expected->offset, got->bytes) == 0, "the weights of %s differ", got->name);
    }
    report("%s: the file is what r1 bench has in memory", name);
    free((void *)(uintptr_t)model->entries);
    model_close(model);
    model_close(file);
}

// Three threads' shares, taken by one or by two by turns, over two steps: every item once, and a thread's own share first.
static void test_items(void) {
    static struct Team team;
    team.threads = 3;
    for (unsigned step = 1; step <= 2; step++)
        for (size_t count = 0; count < 20; count++)
            for (unsigned way = 0; way < 4; way++) {
                int takers = 1 + (int)way % 2;
                size_t most = way < 2 ? 1 : 3;
                size_t taken[20] = {0}, item, first, end, own = 0;
                atomic_fetch_add(&team.epoch, 1);
                struct Items items[2] = {share_items(&team, 1, count, most), share_items(&team, 2, count, most)};
                static_share(&team, 1, count, &first, &end);
                bool more[2] = {true, takers == 2};
                for (size_t turn = 0; more[0] || more[1]; turn++) {
                    if (!more[turn % 2] || !(more[turn % 2] = next_item(&items[turn % 2], &item))) continue;
                    EXPECT(item < count, "item %zu of %zu", item, count);
                    size_t kept = items[turn % 2].end - items[turn % 2].next;
                    EXPECT(kept < most && kept <= count / 3 / 2, "of %zu items a thread took %zu at a time, of %zu allowed", count, kept + 1, most);
                    if (item < count) taken[item]++;
                    if (turn % 2 == 0 && own < end - first) {
                        EXPECT(item == first + own, "of %zu items thread 1 took %zu as its number %zu", count, item, own);
                        own++;
                    }
                }
                for (size_t i = 0; i < count; i++) EXPECT(taken[i] == 1, "item %zu of %zu was taken %zu times", i, count, taken[i]);
            }
    report("every item of a step is taken once, a thread's own share first, and not too many at a time");
}

// The pieces of attention: every query meets every position once, and of a token no thread has a quarter more to do than its
// part, at any depth; who is ready first takes the next piece, of its own share or, when that is at its end, of another's.
static void test_pieces(void) {
    static struct Team team;
    static const struct { uint32_t heads, kv_heads, latent; } shapes[] = {{16, 16, 512}, {128, 128, 512}, {12, 2, 0}, {28, 4, 0}, {32, 8, 0}};
    static const size_t depths[] = {0, 500, 1023, 1030, 1500, 2100, 3000, 6000, 6200, 8200}, counts[] = {1, 4, 16, 17, 512};
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++)
        for (size_t d = 0; d < sizeof depths / sizeof *depths; d++)
            for (size_t n = 0; n < sizeof counts / sizeof *counts; n++)
                for (team.threads = 1; team.threads <= 4; team.threads++) {
                    struct Model model = {.config = {.num_attention_heads = shapes[shape].heads, .num_key_value_heads = shapes[shape].kv_heads,
                                                     .kv_lora_rank = shapes[shape].latent}};
                    model.config.architecture = shapes[shape].latent ? ARCH_DEEPSEEK_V3 : ARCH_QWEN2;
                    struct Session s = {.model = &model, .team = &team, .n = counts[n], .position = depths[d]};
                    struct Pieces all = cut_attention(&s);
                    size_t work[4] = {0}, next[4], ends[4], sum = 0, largest = 0, count = all.cache_heads * all.head_pieces * all.token_pieces * all.spans;
                    for (int thread = 0; thread < team.threads; thread++) static_share(&team, thread, count, &next[thread], &ends[thread]);
                    for (size_t i = 0; i < count; i++) {
                        int ready = 0;
                        for (int thread = 1; thread < team.threads; thread++)
                            if (work[thread] < work[ready]) ready = thread;
                        int owner = ready;
                        while (next[owner] == ends[owner]) owner = (owner + 1) % team.threads;
                        struct Piece p = piece_at(&s, &all, next[owner]++);
                        size_t last = depths[d] + counts[n], first = p.span * CACHE_SPAN, positions = all.spans > 1 ? min_size(last - first, CACHE_SPAN) : last;
                        EXPECT(p.first_head + p.heads <= shapes[shape].heads && p.first_token + p.tokens <= counts[n], "a piece beyond the queries");
                        work[ready] += p.heads * p.tokens * positions;
                        sum += p.heads * p.tokens * positions;
                        largest = max_size(largest, work[ready]);
                    }
                    size_t expected = shapes[shape].heads * counts[n] * (depths[d] + counts[n]);
                    EXPECT(sum == expected, "%u heads, %zu tokens behind %zu: %zu products, not %zu", shapes[shape].heads, counts[n], depths[d], sum, expected);
                    EXPECT(counts[n] > 1 || largest * (size_t)team.threads * 4 <= sum * 5, "%u heads behind %zu, %d threads: one has %zu products of %zu",
                           shapes[shape].heads, depths[d], team.threads, largest, sum);
                }
    report("attention's pieces: every query meets every position once, and of a token the threads have about as much work");
}

// Way 2 has the smallest lower quarter; way 0 has the smallest time, way 3 the smallest mean.
static void test_trial(void) {
    static struct Trial trial;
    static const struct { size_t guess; double second; size_t expected; } cases[] = {{0, 4, 2}, {3, 4, 2}, {3, 5.95, 3}, {2, 4, 2}, {5, 5.95, 2}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        trial.guess = cases[c].guess;
        for (size_t i = 0; i < TRIAL_ROUNDS; i++) {
            double times[PREFETCHING_WAYS] = {i % 7 ? 9 : 1, 7, i % 3 ? 40 : cases[c].second, 6, 6.1, 6.2};
            for (size_t way = 0; way < PREFETCHING_WAYS; way++) trial.seconds[way][i] = times[way];
        }
        size_t fastest = find_fastest_way(&trial);
        EXPECT(fastest == cases[c].expected, "case %zu: way %zu, not %zu", c, fastest, cases[c].expected);
    }
    report("the trial of ways to ask for weights: the fastest wins, if it is faster than the guess");

    // Of a few layers, which may differ much, each is to meet most ways.
    EXPECT(guess_prefetching() < PREFETCHING_WAYS, "the guess is no way");
    for (size_t layers = 1; layers <= 10; layers++) {
        static struct Session session;
        unsigned met[10] = {0};                                            // by layer, a bit for each way
        session = (struct Session){.n = 1, .trial = {.guess = layers % PREFETCHING_WAYS, .way = layers % PREFETCHING_WAYS}};
        for (size_t i = 0; i < 2 * PREFETCHING_WAYS * TRIAL_ROUNDS; i++) {
            if (session.trial.layers < PREFETCHING_WAYS * TRIAL_ROUNDS) met[i % layers] |= 1u << session.trial.way;
            session.trial.start = -1;
            try_prefetching(&session);
        }
        for (size_t layer = 0; layer < layers; layer++)
            EXPECT(__builtin_popcount(met[layer]) >= 4, "layer %zu of %zu meets %d ways", layer, layers, __builtin_popcount(met[layer]));
        for (size_t i = 0; i < PREFETCHING_WAYS * TRIAL_ROUNDS; i++)
            EXPECT(session.trial.seconds[i / TRIAL_ROUNDS][i % TRIAL_ROUNDS] > 0, "%zu layers: way %zu has a round without a time", layers, i / TRIAL_ROUNDS);
        EXPECT(session.trial.way == find_fastest_way(&session.trial), "%zu layers: way %zu is not the one found", layers, session.trial.way);
    }
    report("the trial of ways to ask for weights: all get their turns, and the one found stays");
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 5 && strcmp(argv[1], "--synthetic") == 0) {
        test_synthetic(argv[2], argv[3], (uint32_t)atoi(argv[4]));
        return any_failed;
    }
    test_shapes();
    test_table();
    test_prefill_macs();
    test_reading();
    test_formats();
    test_sampler();
    test_utf8_stream();
    test_items();
    test_pieces();
    test_trial();
    test_router();
    test_context();
    test_dense_memory();
    test_infinite_perplexity();
    test_groups();
    for (int i = 1; i < argc; i++) test_loader(argv[i]);
    for (int i = 1; i < argc; i++) test_forward(argv[i]);
    for (int i = 1; i < argc; i++) test_last_layer(argv[i]);
    return any_failed;
}
