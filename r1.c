// r1.c: runs DeepSeek-R1 and its family on a CPU.
//
// The whole engine is this one file, to be read from top to bottom: helpers, threads, the .r1 file, the kernels in
// portable C, norms and RoPE, attention, router and experts, forward, sampling, generation, commands, main.
// convert/ makes the .r1 files, tokenizer.c turns text into tokens and back, and kernels/ holds faster forms of a
// dozen inner functions for particular processors; without that folder everything still works, slowly.
//
// A token's way through the program: forward() looks up its embedding, runs it through the layers (attention over what
// the cache holds, then a feed-forward network, in a mixture-of-experts layer one chosen by the router), and multiplies
// by the head: logits. sample_token() picks the next token from them, and run_generation() streams its text.
//
// Shapes are written [rows][cols]; n is the number of tokens of a micro-batch. Sizes are size_t throughout.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cblas.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "convert/format.h"
#include "tokenizer.h"

// ====================================================================================================================
// Helpers: errors, clock, allocation
//
// A command that cannot go on says so in one sentence and ends with status 1; wrong usage ends with status 2. Functions
// that look at a file they cannot trust return false and leave the sentence to their caller, so that a test can call
// them with anything.
// ====================================================================================================================

#define ERROR_BYTES 512

static _Noreturn __attribute__((format(printf, 1, 2))) void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("r1: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// Writes the sentence of a failure and returns false, for `return fail(error, ...)`.
static __attribute__((format(printf, 2, 3))) bool fail(char *error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, ERROR_BYTES, format, args);
    va_end(args);
    return false;
}

// Seconds on a clock that only goes forward.
static double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory) die("out of memory: %zu MB more were needed", bytes >> 20);
    return memory;
}

// Zeroed memory that the kernel may back with 2 MB pages (4 KB pages cost some 5-15 % of the read bandwidth). NULL if
// there is not enough. Freed with munmap.
static void *map_memory(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

// Bytes of memory that a new program can still take without pushing others out; 0 if the system does not say.
static uint64_t available_memory(void) {
    uint64_t bytes = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    if (file) {
        char line[256];
        uint64_t kilobytes;
        while (fgets(line, sizeof line, file))
            if (sscanf(line, "MemAvailable: %" SCNu64 " kB", &kilobytes) == 1) bytes = kilobytes << 10;
        fclose(file);
    }
    return bytes;
}

static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// ====================================================================================================================
// Threads
//
// One team of threads lives as long as the program: OpenMP starts it once, thread 0 goes on to run the command and posts
// jobs, the others wait for them. Inside a job all threads run the same function and meet at barriers. Work is dealt out
// in items whose results do not depend on who computes them, so that any number of threads gives the same bits.
// ====================================================================================================================

#define MAX_THREADS 1024

struct Team {
    int threads;
    void (*job)(void *argument, int thread);
    void *argument;
    // Each on a cache line of its own: threads that spin on one must not slow down writers of another.
    _Alignas(64) atomic_uint job_number;   // counts up with every job posted
    _Alignas(64) atomic_uint arrived;      // threads at the barrier
    _Alignas(64) atomic_uint epoch;        // barriers passed
    _Alignas(64) atomic_size_t next_item;  // the next item to hand out; every barrier sets it to 0
    _Alignas(64) atomic_bool ended;
};

static inline void spin_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits until *value is not `old` any more: spins for some microseconds, then lets other threads run, and in the end
// sleeps, since a worker may wait for a person to type.
static void wait_for_change(atomic_uint *value, unsigned old) {
    for (int spins = 0; atomic_load_explicit(value, memory_order_acquire) == old; spins++) {
        if (spins < 4096) spin_pause();
        else if (spins < 65536) sched_yield();
        else nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
}

static void team_barrier(struct Team *team) {
    unsigned epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)team->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next_item, 0, memory_order_relaxed);
        atomic_store_explicit(&team->epoch, epoch + 1, memory_order_release);
    } else {
        wait_for_change(&team->epoch, epoch);
    }
}

// Runs job(argument, thread) on every thread of the team and returns when all are done.
static void team_run(struct Team *team, void (*job)(void *argument, int thread), void *argument) {
    team->job = job;
    team->argument = argument;
    atomic_store_explicit(&team->next_item, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&team->job_number, 1, memory_order_release);
    job(argument, 0);
    team_barrier(team);
}

static void team_work(struct Team *team, int thread) {
    for (unsigned seen = 0;; seen++) {
        wait_for_change(&team->job_number, seen);
        if (atomic_load(&team->ended)) return;
        team->job(team->argument, thread);
        team_barrier(team);
    }
}

// A thread's share [*first, *end) of `items`, in equal parts.
static void static_share(const struct Team *team, int thread, size_t items, size_t *first, size_t *end) {
    *first = items * (size_t)thread / (size_t)team->threads;
    *end = items * ((size_t)thread + 1) / (size_t)team->threads;
}

// The processors to run on, one a physical core, from the ones this process may use. Returns how many.
static int list_physical_cores(int *cpus, int most) {
    int count = 0;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE && count < most; cpu++) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            // A core's hardware threads are listed by the kernel, lowest first; take the first one that is allowed.
            char path[96];
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            FILE *file = fopen(path, "r");
            int sibling, first_allowed = cpu;
            if (file) {
                char separator = ',';
                int previous = -1;
                while (fscanf(file, "%d", &sibling) == 1) {
                    for (int s = separator == '-' ? previous + 1 : sibling; s <= sibling; s++)
                        if (s >= 0 && s < CPU_SETSIZE && CPU_ISSET(s, &allowed) && s < first_allowed) first_allowed = s;
                    previous = sibling;
                    if (fscanf(file, "%c", &separator) != 1) break;
                }
                fclose(file);
            }
            if (first_allowed == cpu) cpus[count++] = cpu;
        }
        if (count) return count;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    for (count = 0; count < online && count < most; count++) cpus[count] = count;
    return count ? count : 1;
}

// Keeps the calling thread on one processor: a thread that wanders loses its caches.
static void pin_thread(int cpu) {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
#else
    (void)cpu;
#endif
}

// Starts a team and runs main_function(argument) on its thread 0; the others serve its jobs until it returns.
static int team_start(struct Team *team, int threads, int (*main_function)(void *argument), void *argument) {
    int status = 0;
    team->threads = threads;
    openblas_set_num_threads(1);   // OpenBLAS is called from inside our own threads, one at a time each
    omp_set_dynamic(0);
    int cpus[MAX_THREADS], cores = list_physical_cores(cpus, MAX_THREADS);
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        if (omp_get_num_threads() != threads) {
            if (thread == 0) die("threads: the system starts %d of %d; ask for fewer with -t", omp_get_num_threads(), threads);
        } else {
            // Only when every thread gets a core of its own; one thread alone is left to the system.
            if (threads > 1 && threads <= cores) pin_thread(cpus[thread]);
            if (thread == 0) {
                status = main_function(argument);
                atomic_store(&team->ended, true);
                atomic_fetch_add_explicit(&team->job_number, 1, memory_order_release);
            } else {
                team_work(team, thread);
            }
        }
    }
    return status;
}

// ====================================================================================================================
// The model: an .r1 file, checked and bound
//
// A file is mapped, not read: its panels are used where they lie. Before anything is used, the preamble, the config and
// every entry of the tensor table are checked, and every tensor the architecture needs is bound once, by name, to a
// field of struct Model, with its shape and dtype verified; no later code looks at names or offsets.
// ====================================================================================================================

#define MAX_LAYERS 1024
#define MAX_DIMENSION (1u << 20)  // of any hidden, intermediate or head size
#define MAX_VOCAB (1u << 24)
#define MAX_EXPERTS 4096
#define MAX_ACTIVE_EXPERTS 64

// A matrix as panels: see format.h.
struct Matrix {
    const uint8_t *data;
    uint32_t dtype;
    size_t rows, cols;
    size_t panel_bytes;           // from one panel of 32 rows to the next
};

// `count` blobs of up to three matrices of the same shapes: a feed-forward network, a layer's experts, a factor per head.
struct Blobs {
    struct Matrix part[ENTRY_MAX_PARTS];   // of blob 0
    size_t count, stride;
};

enum { GATE, UP, DOWN };          // the parts of a feed-forward network

struct Layer {
    const float *input_norm;      // [hidden]
    const float *post_attention_norm;
    // GQA
    struct Matrix q, k, v;        // [heads * head_dim, hidden], [kv_heads * head_dim, hidden] twice
    const float *q_bias, *k_bias, *v_bias;   // NULL without attention_bias
    const float *q_norm, *k_norm; // [head_dim], NULL without qk_norm
    // MLA
    struct Matrix q_a;            // [q_lora_rank, hidden]; unused when q_lora_rank is 0
    const float *q_a_norm;        // [q_lora_rank]
    struct Matrix q_b;            // [heads * (nope + rope), q_lora_rank], or the full q_proj [.., hidden]
    struct Matrix kv_a;           // [kv_lora_rank + rope, hidden]
    const float *kv_a_norm;       // [kv_lora_rank]
    struct Blobs key;             // per head [nope, kv_lora_rank]
    struct Blobs key_transposed;  // per head [kv_lora_rank, nope]
    struct Blobs value;           // per head [v_head_dim, kv_lora_rank]
    struct Matrix o;              // [hidden, heads * head_dim or heads * v_head_dim]
    // Feed-forward
    bool routed;
    struct Blobs dense;           // 1 blob, when not routed
    struct Matrix router;         // [experts, hidden] f32
    const float *router_bias;     // [experts]: e_score_correction_bias
    struct Blobs experts;         // n_routed_experts blobs
    struct Blobs shared;          // 1 blob
};

struct Model {
    char name[256];               // for messages: the path, "demo", or a shape's name
    struct ModelConfig config;
    const uint8_t *bytes;         // the whole file in memory
    size_t size;
    bool mapped;                  // bytes came from mmap and are ours to unmap
    const struct TensorEntry *entries;
    size_t entry_count;
    Tokenizer *tokenizer;         // NULL for a synthetic model
    bool has_weights;             // false for a file made with --tokenizer-only

    struct Matrix embedding;      // [vocab, hidden]
    const float *final_norm;      // [hidden]
    struct Matrix head;           // [vocab, hidden]; the embedding when tied
    struct Layer *layers;         // [num_hidden_layers]
    uint64_t total_weights;       // weights in the main model (no MTP)
};

static bool is_mla(const struct ModelConfig *config) { return config->architecture == ARCH_DEEPSEEK_V3; }
static bool is_routed(const struct ModelConfig *config, size_t layer) {
    return config->n_routed_experts && layer >= config->first_k_dense_replace;
}
// Values a head's query and key have; of these, how many RoPE turns; values a head gives out.
static size_t query_dim(const struct ModelConfig *c) {
    return is_mla(c) ? (size_t)c->qk_nope_head_dim + c->qk_rope_head_dim : c->head_dim;
}
static size_t rope_dim(const struct ModelConfig *c) { return is_mla(c) ? c->qk_rope_head_dim : c->head_dim; }
static size_t value_dim(const struct ModelConfig *c) { return is_mla(c) ? c->v_head_dim : c->head_dim; }

static const char *architecture_name(uint32_t architecture) {
    static const char *const names[] = {"none", "deepseek_v3", "qwen2", "llama", "qwen3"};
    return architecture < sizeof names / sizeof *names ? names[architecture] : "unknown";
}

static bool check_range(const char *field, uint64_t value, uint64_t least, uint64_t most, char *error) {
    if (value >= least && value <= most) return true;
    return fail(error, "config: %s is %" PRIu64 ", expected %" PRIu64 " to %" PRIu64, field, value, least, most);
}

static bool check_number(const char *field, double value, double least, double most, char *error) {
    if (value >= least && value <= most) return true;    // false for NaN
    return fail(error, "config: %s is %g, expected %g to %g", field, value, least, most);
}

// Everything that later code relies on: no size can overflow a product, no divisor is zero.
static bool check_config(const struct ModelConfig *c, char *error) {
#define RANGE(field, least, most) if (!check_range(#field, c->field, least, most, error)) return false
#define NUMBER(field, least, most) if (!check_number(#field, c->field, least, most, error)) return false
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
        if (c->rope_high_freq_factor == c->rope_low_freq_factor)
            return fail(error, "config: rope_high_freq_factor equals rope_low_freq_factor (%g)", c->rope_low_freq_factor);
    }
    if (is_mla(c)) {
        RANGE(q_lora_rank, 0, MAX_DIMENSION);
        RANGE(kv_lora_rank, 32, 4096);
        RANGE(qk_nope_head_dim, 32, 1024);
        RANGE(qk_rope_head_dim, 2, 1024);
        RANGE(v_head_dim, 1, 1024);
        if (c->qk_rope_head_dim % 2) return fail(error, "config: qk_rope_head_dim is %u, expected an even number", c->qk_rope_head_dim);
    } else {
        RANGE(num_key_value_heads, 1, c->num_attention_heads);
        RANGE(head_dim, 2, 1024);
        if (c->head_dim % 2) return fail(error, "config: head_dim is %u, expected an even number", c->head_dim);
        if (c->num_attention_heads % c->num_key_value_heads)
            return fail(error, "config: %u attention heads do not divide into %u key-value heads", c->num_attention_heads,
                        c->num_key_value_heads);
    }
    RANGE(n_routed_experts, 0, MAX_EXPERTS);
    if (c->n_routed_experts) {
        RANGE(n_shared_experts, 0, 64);
        RANGE(moe_intermediate_size, 32, MAX_DIMENSION / 64);
        RANGE(n_group, 1, c->n_routed_experts);
        RANGE(topk_group, 1, c->n_group);
        if (c->n_routed_experts % c->n_group)
            return fail(error, "config: %u experts do not divide into %u groups", c->n_routed_experts, c->n_group);
        RANGE(num_experts_per_tok, 1, min_size(MAX_ACTIVE_EXPERTS, (size_t)c->n_routed_experts / c->n_group * c->topk_group));
        NUMBER(routed_scaling_factor, 1e-6, 1e6);
    }
#undef RANGE
#undef NUMBER
    return true;
}

// ---- reading the file

static bool check_entry(const struct TensorEntry *entry, uint64_t data_start, uint64_t file_bytes, char *error) {
    if (!memchr(entry->name, 0, sizeof entry->name) || !entry->name[0]) return fail(error, "a tensor's name is damaged");
    const char *name = entry->name;
    if (entry->parts != 1 && entry->parts != ENTRY_MAX_PARTS) return fail(error, "tensor %s: %u parts, expected 1 or 3", name, entry->parts);
    if (entry->is_vector > 1 || (entry->is_vector && (entry->parts != 1 || entry->rows[0] != 1 || entry->dtype[0] != DTYPE_F32)))
        return fail(error, "tensor %s: a vector must be one row of f32", name);
    for (unsigned i = 0; i < entry->parts; i++) {
        if (entry->dtype[i] < DTYPE_F32 || entry->dtype[i] >= DTYPE_COUNT)
            return fail(error, "tensor %s: unknown dtype %u", name, entry->dtype[i]);
        if (entry->rows[i] < 1 || entry->rows[i] > MAX_VOCAB || entry->cols[i] < 1 || entry->cols[i] > MAX_VOCAB)
            return fail(error, "tensor %s: impossible shape [%" PRIu64 ", %" PRIu64 "]", name, entry->rows[i], entry->cols[i]);
        if (!entry->is_vector && entry->cols[i] % K_GROUP)
            return fail(error, "tensor %s: %" PRIu64 " columns, expected a multiple of %d", name, entry->cols[i], K_GROUP);
    }
    if (entry->experts < 1 || entry->experts > MAX_EXPERTS) return fail(error, "tensor %s: %" PRIu64 " blobs, expected 1 to %d", name, entry->experts, MAX_EXPERTS);
    if (entry->stride != blob_bytes(entry)) return fail(error, "tensor %s: blobs of %" PRIu64 " bytes, expected %" PRIu64, name, entry->stride, blob_bytes(entry));
    if (entry->bytes != entry->experts * entry->stride)   // cannot overflow: 2^12 * 3 * 2^24 * 2^24 * 4 < 2^64
        return fail(error, "tensor %s: %" PRIu64 " bytes, expected %" PRIu64, name, entry->bytes, entry->experts * entry->stride);
    if (entry->offset % FORMAT_PAGE || entry->offset < data_start || entry->offset > file_bytes || entry->bytes > file_bytes - entry->offset)
        return fail(error, "tensor %s: its data (offset %" PRIu64 ", %" PRIu64 " bytes) does not lie in the file's %" PRIu64 " bytes", name,
                    entry->offset, entry->bytes, file_bytes);
    return true;
}

static int compare_entries(const void *a, const void *b) {
    return strcmp((*(const struct TensorEntry *const *)a)->name, (*(const struct TensorEntry *const *)b)->name);
}

// What binding needs to know; sorted is an index of the entries by name.
struct Binder {
    const struct Model *model;
    const struct TensorEntry **sorted;
    char *error;
};

static const struct TensorEntry *find_entry(const struct Binder *binder, const char *name) {
    struct TensorEntry key;
    snprintf(key.name, sizeof key.name, "%s", name);
    const struct TensorEntry *wanted = &key;
    const struct TensorEntry **found = bsearch(&wanted, binder->sorted, binder->model->entry_count, sizeof *binder->sorted, compare_entries);
    return found ? *found : NULL;
}

static struct Matrix part_matrix(const struct Binder *binder, const struct TensorEntry *entry, unsigned part) {
    return (struct Matrix){
        .data = binder->model->bytes + entry->offset + part_offset(entry, part),
        .dtype = entry->dtype[part],
        .rows = entry->rows[part],
        .cols = entry->cols[part],
        .panel_bytes = panel_bytes(entry->dtype[part], entry->cols[part]),
    };
}

static bool check_shape(const struct Binder *binder, const struct TensorEntry *entry, unsigned part, size_t rows, size_t cols) {
    if (entry->rows[part] == rows && entry->cols[part] == cols) return true;
    return fail(binder->error, "tensor %s: shape [%" PRIu64 ", %" PRIu64 "], expected [%zu, %zu]", entry->name, entry->rows[part],
                entry->cols[part], rows, cols);
}

// Binds blobs of `parts` matrices. sizes: rows and cols of each part.
static bool bind_blobs(const struct Binder *binder, struct Blobs *out, size_t count, unsigned parts, const size_t sizes[][2],
                       const char *format, size_t layer) {
    char name[64];
    snprintf(name, sizeof name, format, layer);
    const struct TensorEntry *entry = find_entry(binder, name);
    if (!entry) return fail(binder->error, "tensor %s is missing", name);
    if (entry->is_vector || entry->parts != parts || entry->experts != count)
        return fail(binder->error, "tensor %s: %" PRIu64 " blobs of %u parts, expected %zu of %u", name, entry->experts, entry->parts, count, parts);
    for (unsigned part = 0; part < parts; part++) {
        if (!check_shape(binder, entry, part, sizes[part][0], sizes[part][1])) return false;
        out->part[part] = part_matrix(binder, entry, part);
    }
    out->count = count;
    out->stride = entry->stride;
    return true;
}

static bool bind_matrix(const struct Binder *binder, struct Matrix *out, size_t rows, size_t cols, const char *format, size_t layer) {
    struct Blobs blobs;
    if (!bind_blobs(binder, &blobs, 1, 1, (const size_t[][2]){{rows, cols}}, format, layer)) return false;
    *out = blobs.part[0];
    return true;
}

static bool bind_vector(const struct Binder *binder, const float **out, size_t cols, const char *format, size_t layer) {
    char name[64];
    snprintf(name, sizeof name, format, layer);
    const struct TensorEntry *entry = find_entry(binder, name);
    if (!entry) return fail(binder->error, "tensor %s is missing", name);
    if (!entry->is_vector) return fail(binder->error, "tensor %s: a matrix, expected a vector", name);
    if (!check_shape(binder, entry, 0, 1, cols)) return false;
    *out = (const float *)(const void *)(binder->model->bytes + entry->offset);
    return true;
}

static bool bind_feed_forward(const struct Binder *binder, struct Blobs *out, size_t count, size_t intermediate, const char *format, size_t layer) {
    size_t hidden = binder->model->config.hidden_size;
    return bind_blobs(binder, out, count, 3, (const size_t[][2]){{intermediate, hidden}, {intermediate, hidden}, {hidden, intermediate}}, format, layer);
}

static bool bind_layer(const struct Binder *binder, struct Layer *out, size_t i) {
#define L "model.layers.%zu."
    const struct ModelConfig *c = &binder->model->config;
    size_t hidden = c->hidden_size, heads = c->num_attention_heads;
    if (!bind_vector(binder, &out->input_norm, hidden, L "input_layernorm.weight", i) ||
        !bind_vector(binder, &out->post_attention_norm, hidden, L "post_attention_layernorm.weight", i) ||
        !bind_matrix(binder, &out->o, hidden, heads * value_dim(c), L "self_attn.o_proj.weight", i))
        return false;
    if (is_mla(c)) {
        size_t lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim, v = c->v_head_dim;
        size_t q_cols = c->q_lora_rank ? c->q_lora_rank : hidden;
        if (c->q_lora_rank && (!bind_matrix(binder, &out->q_a, c->q_lora_rank, hidden, L "self_attn.q_a_proj.weight", i) ||
                               !bind_vector(binder, &out->q_a_norm, c->q_lora_rank, L "self_attn.q_a_layernorm.weight", i)))
            return false;
        if (!bind_matrix(binder, &out->q_b, heads * (nope + rope), q_cols,
                         c->q_lora_rank ? L "self_attn.q_b_proj.weight" : L "self_attn.q_proj.weight", i) ||
            !bind_matrix(binder, &out->kv_a, lora + rope, hidden, L "self_attn.kv_a_proj_with_mqa.weight", i) ||
            !bind_vector(binder, &out->kv_a_norm, lora, L "self_attn.kv_a_layernorm.weight", i) ||
            !bind_blobs(binder, &out->key, heads, 1, (const size_t[][2]){{nope, lora}}, L "self_attn.kv_b_proj.key", i) ||
            !bind_blobs(binder, &out->key_transposed, heads, 1, (const size_t[][2]){{lora, nope}}, L "self_attn.kv_b_proj.key_transposed", i) ||
            !bind_blobs(binder, &out->value, heads, 1, (const size_t[][2]){{v, lora}}, L "self_attn.kv_b_proj.value", i))
            return false;
        const struct Blobs *factors[] = {&out->key, &out->key_transposed, &out->value};
        for (size_t f = 0; f < 3; f++)
            if (factors[f]->part[0].dtype > DTYPE_F8)
                return fail(binder->error, "layer %zu: the factors of kv_b_proj are %s, expected f32, bf16 or f8", i,
                            dtype_name(factors[f]->part[0].dtype));
    } else {
        size_t q_rows = heads * c->head_dim, kv_rows = (size_t)c->num_key_value_heads * c->head_dim;
        if (!bind_matrix(binder, &out->q, q_rows, hidden, L "self_attn.q_proj.weight", i) ||
            !bind_matrix(binder, &out->k, kv_rows, hidden, L "self_attn.k_proj.weight", i) ||
            !bind_matrix(binder, &out->v, kv_rows, hidden, L "self_attn.v_proj.weight", i))
            return false;
        if (c->attention_bias && (!bind_vector(binder, &out->q_bias, q_rows, L "self_attn.q_proj.bias", i) ||
                                  !bind_vector(binder, &out->k_bias, kv_rows, L "self_attn.k_proj.bias", i) ||
                                  !bind_vector(binder, &out->v_bias, kv_rows, L "self_attn.v_proj.bias", i)))
            return false;
        if (c->qk_norm && (!bind_vector(binder, &out->q_norm, c->head_dim, L "self_attn.q_norm.weight", i) ||
                           !bind_vector(binder, &out->k_norm, c->head_dim, L "self_attn.k_norm.weight", i)))
            return false;
    }
    out->routed = is_routed(c, i);
    if (!out->routed) return bind_feed_forward(binder, &out->dense, 1, c->intermediate_size, L "mlp", i);
    if (!bind_matrix(binder, &out->router, c->n_routed_experts, hidden, L "mlp.gate.weight", i) ||
        !bind_vector(binder, &out->router_bias, c->n_routed_experts, L "mlp.gate.e_score_correction_bias", i) ||
        !bind_feed_forward(binder, &out->experts, c->n_routed_experts, c->moe_intermediate_size, L "mlp.experts", i))
        return false;
    if (out->router.dtype != DTYPE_F32) return fail(binder->error, "layer %zu: the router is %s, expected f32", i, dtype_name(out->router.dtype));
    return !c->n_shared_experts || bind_feed_forward(binder, &out->shared, 1, (size_t)c->n_shared_experts * c->moe_intermediate_size,
                                                     L "mlp.shared_experts", i);
#undef L
}

// Binds every tensor of the main model. The layers array is the model's from here on, whatever the outcome.
static bool bind_model(struct Model *model, char *error) {
    const struct ModelConfig *c = &model->config;
    struct Binder binder = {.model = model, .error = error};
    binder.sorted = allocate(model->entry_count * sizeof *binder.sorted);
    for (size_t i = 0; i < model->entry_count; i++) binder.sorted[i] = &model->entries[i];
    qsort(binder.sorted, model->entry_count, sizeof *binder.sorted, compare_entries);
    bool fine = bind_matrix(&binder, &model->embedding, c->vocab_size, c->hidden_size, "model.embed_tokens.weight", 0) &&
                bind_vector(&binder, &model->final_norm, c->hidden_size, "model.norm.weight", 0);
    if (fine && c->tie_word_embeddings) model->head = model->embedding;
    else if (fine) fine = bind_matrix(&binder, &model->head, c->vocab_size, c->hidden_size, "lm_head.weight", 0);
    model->layers = allocate(c->num_hidden_layers * sizeof *model->layers);
    for (size_t i = 0; fine && i < c->num_hidden_layers; i++) fine = bind_layer(&binder, &model->layers[i], i);
    free(binder.sorted);
    return fine;
}

static void model_close(struct Model *model) {
    if (model->tokenizer) tokenizer_free(model->tokenizer);
    free(model->layers);
    if (model->mapped) munmap((void *)(uintptr_t)model->bytes, model->size);
    free(model);
}

// Makes a model of a whole file in memory (page-aligned); NULL with a sentence in error if it is not a sound one. bytes
// must outlive the model.
static struct Model *model_from_memory(const uint8_t *bytes, size_t size, const char *name, char *error) {
    struct FilePreamble preamble;
    if (size < sizeof preamble || memcmp(bytes, FORMAT_MAGIC, sizeof preamble.magic) != 0) {
        fail(error, "%s: not an .r1 file", name);
        return NULL;
    }
    memcpy(&preamble, bytes, sizeof preamble);
    if (preamble.version != FORMAT_VERSION || preamble.config_bytes != sizeof(struct ModelConfig)) {
        fail(error, "%s: an .r1 file of version %u, this program reads version %u; convert the model again", name, preamble.version, FORMAT_VERSION);
        return NULL;
    }
    if (preamble.file_bytes != size) {
        fail(error, "%s: %zu bytes, expected %" PRIu64 ": the file is cut short or has grown", name, size, preamble.file_bytes);
        return NULL;
    }
    uint64_t config_end = sizeof preamble + sizeof(struct ModelConfig);
    uint64_t table_bytes = (uint64_t)preamble.tensor_count * sizeof(struct TensorEntry);
    if (config_end > size || preamble.tokenizer_offset < config_end || preamble.tokenizer_offset > size ||
        preamble.tokenizer_bytes > size - preamble.tokenizer_offset ||
        preamble.table_offset < preamble.tokenizer_offset + preamble.tokenizer_bytes || preamble.table_offset > size ||
        preamble.table_offset % 8 || table_bytes > size - preamble.table_offset) {
        fail(error, "%s: damaged: its sections do not lie inside the file", name);
        return NULL;
    }
    uint64_t table_end = preamble.table_offset + table_bytes;
    XXH3_state_t *state = XXH3_createState();
    if (!state) die("out of memory");
    XXH3_64bits_reset(state);
    XXH3_64bits_update(state, bytes, offsetof(struct FilePreamble, metadata_hash));
    XXH3_64bits_update(state, bytes + sizeof preamble, table_end - sizeof preamble);
    uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    if (hash != preamble.metadata_hash) {
        fail(error, "%s: damaged: the checksum of its metadata is wrong", name);
        return NULL;
    }

    struct Model *model = allocate(sizeof *model);
    snprintf(model->name, sizeof model->name, "%s", name);
    model->bytes = bytes;
    model->size = size;
    memcpy(&model->config, bytes + sizeof preamble, sizeof model->config);
    model->entries = (const struct TensorEntry *)(const void *)(bytes + preamble.table_offset);
    model->entry_count = preamble.tensor_count;
    model->has_weights = preamble.tensor_count > 0;
    char reason[ERROR_BYTES] = "";
    bool fine = true;
    for (size_t i = 0; fine && i < model->entry_count; i++) fine = check_entry(&model->entries[i], table_end, size, reason);
    fine = fine && (!model->has_weights || (check_config(&model->config, reason) && bind_model(model, reason)));
    if (fine) {
        model->tokenizer = tokenizer_load(bytes + preamble.tokenizer_offset, preamble.tokenizer_bytes, reason, sizeof reason);
        fine = model->tokenizer != NULL;
    }
    if (fine && model->has_weights && tokenizer_size(model->tokenizer) > model->config.vocab_size)
        fine = fail(reason, "the tokenizer has ids up to %u, the model's vocabulary ends at %u", tokenizer_size(model->tokenizer) - 1,
                    model->config.vocab_size - 1);
    if (!fine) {
        snprintf(error, ERROR_BYTES, "%s: %.300s", name, reason);
        model_close(model);
        return NULL;
    }
    return model;
}

#ifdef R1_DEMO_FILE
// The demo model is part of the program: the assembler copies the file in at build time.
#define STRING_OF(x) #x
#define EXPANDED_STRING_OF(x) STRING_OF(x)
#define ASSEMBLER_NAME(name) EXPANDED_STRING_OF(__USER_LABEL_PREFIX__) #name
#ifdef __APPLE__
#define READ_ONLY_SECTION ".const_data\n"
#else
#define READ_ONLY_SECTION ".section .rodata\n"
#endif
__asm__(READ_ONLY_SECTION
        ".balign 4096\n"
        ".globl " ASSEMBLER_NAME(demo_file_start) "\n" ASSEMBLER_NAME(demo_file_start) ":\n"
        ".incbin \"" R1_DEMO_FILE "\"\n"
        ".globl " ASSEMBLER_NAME(demo_file_end) "\n" ASSEMBLER_NAME(demo_file_end) ":\n"
        ".byte 0\n"
        ".text\n");
extern const uint8_t demo_file_start[], demo_file_end[];
#endif

// A directory or a file of another program, given where an .r1 file belongs: says what to do instead.
static bool explain_foreign_model(const char *path, bool directory, const uint8_t *bytes, size_t size, char *error) {
    if (directory) {
        char config[4096];
        snprintf(config, sizeof config, "%s/config.json", path);
        if (access(config, R_OK) == 0)
            return fail(error, "%s: a Hugging Face directory, not an .r1 file; convert it first: r1-convert %s %.200s.r1", path, path, path);
        return fail(error, "%s: a directory, not an .r1 file", path);
    }
    if (size >= 4 && memcmp(bytes, "GGUF", 4) == 0)
        return fail(error, "%s: a GGUF file; r1 reads .r1 files, which r1-convert makes from the original Hugging Face checkpoint", path);
    return true;
}

// Opens MODEL of the command line: a path to an .r1 file, or the word "demo". NULL with a sentence in error.
static struct Model *model_open(const char *path, char *error) {
#ifdef R1_DEMO_FILE
    if (strcmp(path, "demo") == 0) return model_from_memory(demo_file_start, (size_t)(demo_file_end - demo_file_start), "demo", error);
#endif
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) {
        fail(error, "%s: %s", path, strerror(errno));
        if (file >= 0) close(file);
        return NULL;
    }
    if (S_ISDIR(status.st_mode)) explain_foreign_model(path, true, NULL, 0, error);
    else if (!S_ISREG(status.st_mode)) fail(error, "%s: not a regular file", path);
    else if (status.st_size == 0) fail(error, "%s: the file is empty", path);
    if (!S_ISREG(status.st_mode) || status.st_size == 0) {
        close(file);
        return NULL;
    }
    size_t size = (size_t)status.st_size;
    void *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    int mapping_error = errno;
    close(file);
    if (bytes == MAP_FAILED) {
        fail(error, "%s: cannot be mapped: %s", path, strerror(mapping_error));
        return NULL;
    }
    struct Model *model = NULL;
    if (explain_foreign_model(path, false, bytes, size, error)) model = model_from_memory(bytes, size, path, error);
    if (model) model->mapped = true;
    else munmap(bytes, size);
    return model;
}

// ====================================================================================================================
// Kernels
//
// The inner functions where the time goes, in portable C: these are the definition of what each computes. Headers in
// kernels/ fill the same table with faster forms for one instruction set each; choose_kernels() takes the best one that
// the processor has, once at start.
//
// The order of the additions within one output is part of a kernel's meaning: a row times a token gives the same bits
// whichever other tokens are in the call, so that a batch of up to 16 tokens computes exactly what single tokens do.
// ====================================================================================================================

#define TILE_TOKENS 8             // most tokens of one kernel call
#define INLINE static inline __attribute__((always_inline))

// One token's input of a matrix product. Integer weights (q8, q4) take the quantised form, float weights the values.
struct Row {
    const float *values;          // [cols]
    const int8_t *quants;         // [cols]            values = quants * scales[column / 256]
    const float *scales;          // [ceil(cols/256)]
    const int32_t *sums;          // [cols / 32]       sum of each 32 quants
};

// One panel times n tokens (1 to TILE_TOKENS): out[t][r] = sum over k of weight(r, k) * x[t](k), t < n, r < 32.
typedef void PanelProduct(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out);

struct Kernels {
    const char *name;
    PanelProduct *product[DTYPE_COUNT];   // by dtype
    // Quantises a row: for each 256 columns scale = max|x| / 127 and the nearest integers, and the sums of each 32.
    // cols is a multiple of 32. Not-a-number in x gives numbers out, never undefined behaviour.
    void (*quantize_row)(const float *x, size_t cols, int8_t *quants, float *scales, int32_t *sums);
    // Sum of x[i] * y[i].
    float (*dot)(const float *x, const float *y, size_t n);
    // scores[j] = dot(q, rows[j]) for `count` rows of `cols` floats, row_stride floats apart.
    void (*score_rows)(const float *q, const float *rows, size_t row_stride, size_t count, size_t cols, float *scores);
    // out[c] += sum over j of weights[j] * rows[j][c].
    void (*mix_rows)(const float *weights, const float *rows, size_t row_stride, size_t count, size_t cols, float *out);
    // x[i] = exp(x[i] - maximum); returns their sum.
    float (*exp_row)(float *x, float maximum, size_t n);
    // gate[i] = silu(gate[i]) * up[i], silu(g) = g / (1 + exp(-g)).
    void (*silu_multiply)(float *gate, const float *up, size_t n);
    // Half-precision cache rows.
    void (*half_to_float)(const uint16_t *half, float *out, size_t n);
    void (*float_to_half)(const float *x, uint16_t *half, size_t n);
    // out[i] = scale * quants[i].
    void (*int8_to_float)(const int8_t *quants, float scale, float *out, size_t n);
};

// ---- number formats

INLINE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_from_bf16(uint16_t bits) { return float_from_bits((uint32_t)bits << 16); }

// E4M3 (4 exponent bits of bias 7, 3 mantissa bits, no infinities): shifting exponent and mantissa to a float's place
// gives the value times 2^-120, subnormals included.
INLINE float float_from_e4m3(uint8_t bits) {
    return float_from_bits((uint32_t)(bits & 0x80) << 24 | (uint32_t)(bits & 0x7f) << 20) * 0x1p120f;
}

// IEEE half precision, by the same trick; 2^112 moves the exponent's bias from 15 to 127.
INLINE float float_from_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float value = float_from_bits(magnitude) * 0x1p112f;
    if (magnitude >= 0x0f800000) value = float_from_bits(magnitude | 0x7f800000);   // infinity and not-a-number
    return (half & 0x8000) ? -value : value;
}

// Rounds to nearest even; beyond the largest half it saturates: a cache value must stay finite.
INLINE uint16_t half_from_float(float value) {
    uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477fe000) return (uint16_t)(sign | 0x7bff);        // 65504 and more
    if (magnitude < 0x38800000) {                                         // subnormal half: adding 0.5 aligns the bits
        uint32_t aligned = bits_from_float(float_from_bits(magnitude) + 0.5f);
        return (uint16_t)(sign | (aligned - 0x3f000000));
    }
    uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | rounded >> 13);
}

// exp(x) to about 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (coefficients as in Cephes' expf).
// Written without branches or library calls, so that a compiler turns a loop of it into vector code.
INLINE float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f;          // adding 1.5 * 2^23 rounds to an integer
    uint32_t shift = (bits_from_float(n) - 0x4b400000u) << 23;
    n -= 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return float_from_bits(bits_from_float(p) + shift);
}

// ---- products of a panel

static void product_f32(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    const float *w = (const float *)(const void *)panel;    // [cols][32]
    for (size_t t = 0; t < n; t++) {
        float sum[PANEL_ROWS] = {0};
        for (size_t k = 0; k < cols; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += w[k * PANEL_ROWS + r] * x[t].values[k];
        memcpy(out + t * PANEL_ROWS, sum, sizeof sum);
    }
}

static void product_bf16(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    const uint16_t *w = (const uint16_t *)(const void *)panel;   // [cols/2][32][2]
    for (size_t t = 0; t < n; t++) {
        float sum[PANEL_ROWS] = {0};
        for (size_t k = 0; k < cols; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++)
                sum[r] += float_from_bf16(w[k / 2 * 2 * PANEL_ROWS + r * 2 + k % 2]) * x[t].values[k];
        memcpy(out + t * PANEL_ROWS, sum, sizeof sum);
    }
}

static void product_f8(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) {
        const uint8_t *block = panel;
        float sum[PANEL_ROWS] = {0};
        for (size_t first = 0; first < cols; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, cols - first);
            const float *scales = (const float *)(const void *)block;   // [8], one for each 32 columns
            const uint8_t *w = block + block_head_bytes(DTYPE_F8, length);   // [length/4][32][4]
            for (size_t group = 0; group < length; group += K_GROUP) {
                float part[PANEL_ROWS] = {0};
                for (size_t k = group; k < group + K_GROUP; k++)
                    for (size_t r = 0; r < PANEL_ROWS; r++)
                        part[r] += float_from_e4m3(w[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4]) * x[t].values[first + k];
                for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += scales[group / K_GROUP] * part[r];
            }
            block = w + value_bytes(DTYPE_F8, length);
        }
        memcpy(out + t * PANEL_ROWS, sum, sizeof sum);
    }
}

static void product_q8(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) {
        const uint8_t *block = panel;
        float sum[PANEL_ROWS] = {0};
        for (size_t first = 0; first < cols; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, cols - first);
            const float *scales = (const float *)(const void *)block;                            // [32]
            const int8_t *w = (const int8_t *)(block + block_head_bytes(DTYPE_Q8, length));      // [length/4][32][4]
            const int8_t *q = x[t].quants + first;
            float x_scale = x[t].scales[first / K_BLOCK];
            int32_t part[PANEL_ROWS] = {0};
            for (size_t k = 0; k < length; k += 4)
                for (size_t r = 0; r < PANEL_ROWS; r++)
                    for (size_t j = 0; j < 4; j++) part[r] += w[k * PANEL_ROWS + r * 4 + j] * q[k + j];
            for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += (float)part[r] * (scales[r] * x_scale);
            block = (const uint8_t *)w + value_bytes(DTYPE_Q8, length);
        }
        memcpy(out + t * PANEL_ROWS, sum, sizeof sum);
    }
}

static void product_q4(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    const float *row_scales = (const float *)(const void *)panel;   // [32]
    for (size_t t = 0; t < n; t++) {
        const uint8_t *block = panel + panel_head_bytes(DTYPE_Q4);
        float sum[PANEL_ROWS] = {0};
        for (size_t first = 0; first < cols; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, cols - first);
            const uint8_t *sub = block;                                           // [length/32][32]
            const uint8_t *w = block + block_head_bytes(DTYPE_Q4, length);        // [length/8][32][4]
            const int8_t *q = x[t].quants + first;
            int32_t part[PANEL_ROWS] = {0};
            for (size_t group = 0; group < length; group += K_GROUP) {
                int32_t products[PANEL_ROWS] = {0};
                for (size_t k = group; k < group + K_GROUP; k += 8)
                    for (size_t r = 0; r < PANEL_ROWS; r++)
                        for (size_t j = 0; j < 4; j++) {
                            uint8_t pair = w[k / 2 * PANEL_ROWS + r * 4 + j];
                            products[r] += Q4_TABLE[pair & 15] * q[k + j] + Q4_TABLE[pair >> 4] * q[k + 4 + j];
                        }
                int32_t group_sum = x[t].sums[(first + group) / K_GROUP];
                for (size_t r = 0; r < PANEL_ROWS; r++) {
                    uint8_t s = sub[group / K_GROUP * PANEL_ROWS + r];
                    part[r] += (int8_t)(s & 0xfe) * (products[r] + (s & 1 ? Q4_SHIFT : 0) * group_sum);
                }
            }
            float x_scale = x[t].scales[first / K_BLOCK];
            for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += (float)part[r] * x_scale;
            block = w + value_bytes(DTYPE_Q4, length);
        }
        for (size_t r = 0; r < PANEL_ROWS; r++) out[t * PANEL_ROWS + r] = sum[r] * row_scales[r];
    }
}

// ---- everything else
// The bodies are inlined into each instruction set's own functions, where the compiler makes vector code of them.

INLINE void quantize_row_body(const float *x, size_t cols, int8_t *quants, float *scales, int32_t *sums) {
    for (size_t first = 0; first < cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - first);
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (size_t k = 0; k < length; k++) {
            float magnitude = fabsf(x[first + k]);
            largest = magnitude > largest ? magnitude : largest;
        }
        float scale = largest < INFINITY ? largest / 127.0f : 0.0f;
        float inverse = scale > 1e-38f ? 1.0f / scale : 0.0f;
        scales[first / K_BLOCK] = inverse > 0 ? scale : 0.0f;
        for (size_t group = first; group < first + length; group += K_GROUP) {
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t k = group; k < group + K_GROUP; k++) {
                float scaled = x[k] * inverse;
                scaled = scaled > -127.0f ? scaled : -127.0f;      // not-a-number too
                scaled = scaled < 127.0f ? scaled : 127.0f;
                int32_t nearest = (int32_t)bits_from_float(scaled + 12582912.0f) - 0x4b400000;   // to nearest even
                quants[k] = (int8_t)nearest;
                sum += nearest;
            }
            sums[group / K_GROUP] = sum;
        }
    }
}

INLINE float dot_body(const float *x, const float *y, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

INLINE void score_rows_body(const float *q, const float *rows, size_t row_stride, size_t count, size_t cols, float *scores) {
    for (size_t j = 0; j < count; j++) scores[j] = dot_body(q, rows + j * row_stride, cols);
}

INLINE void mix_rows_body(const float *weights, const float *rows, size_t row_stride, size_t count, size_t cols, float *out) {
    for (size_t j = 0; j < count; j++) {
        const float *row = rows + j * row_stride;
        float weight = weights[j];
#pragma omp simd
        for (size_t c = 0; c < cols; c++) out[c] += weight * row[c];
    }
}

INLINE float exp_row_body(float *x, float maximum, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        x[i] = exp_float(x[i] - maximum);
        sum += x[i];
    }
    return sum;
}

INLINE void silu_multiply_body(float *gate, const float *up, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exp_float(-gate[i])) * up[i];
}

INLINE void half_to_float_body(const uint16_t *half, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = float_from_half(half[i]);
}

INLINE void float_to_half_body(const float *x, uint16_t *half, size_t n) {
    for (size_t i = 0; i < n; i++) half[i] = half_from_float(x[i]);
}

INLINE void int8_to_float_body(const int8_t *quants, float scale, float *out, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) out[i] = scale * (float)quants[i];
}

static void quantize_row_portable(const float *x, size_t cols, int8_t *quants, float *scales, int32_t *sums) {
    quantize_row_body(x, cols, quants, scales, sums);
}
static float dot_portable(const float *x, const float *y, size_t n) { return dot_body(x, y, n); }
static void score_rows_portable(const float *q, const float *rows, size_t row_stride, size_t count, size_t cols, float *scores) {
    score_rows_body(q, rows, row_stride, count, cols, scores);
}
static void mix_rows_portable(const float *weights, const float *rows, size_t row_stride, size_t count, size_t cols, float *out) {
    mix_rows_body(weights, rows, row_stride, count, cols, out);
}
static float exp_row_portable(float *x, float maximum, size_t n) { return exp_row_body(x, maximum, n); }
static void silu_multiply_portable(float *gate, const float *up, size_t n) { silu_multiply_body(gate, up, n); }
static void half_to_float_portable(const uint16_t *half, float *out, size_t n) { half_to_float_body(half, out, n); }
static void float_to_half_portable(const float *x, uint16_t *half, size_t n) { float_to_half_body(x, half, n); }
static void int8_to_float_portable(const int8_t *quants, float scale, float *out, size_t n) { int8_to_float_body(quants, scale, out, n); }

static const struct Kernels portable_kernels = {
    .name = "portable",
    .product = {[DTYPE_F32] = product_f32, [DTYPE_BF16] = product_bf16, [DTYPE_F8] = product_f8, [DTYPE_Q8] = product_q8,
                [DTYPE_Q4] = product_q4},
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

#if defined(__x86_64__) && __has_include("kernels/avx2.h")
#include "kernels/avx2.h"
#endif
#if defined(__x86_64__) && __has_include("kernels/avx512.h")
#include "kernels/avx512.h"
#endif
#if defined(__aarch64__) && __has_include("kernels/neon.h")
#include "kernels/neon.h"
#endif

// The tables this program was built with that this processor can run, best first; the portable one is last.
static size_t list_kernels(const struct Kernels **list) {
    size_t count = 0;
#ifdef R1_AVX512_KERNELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        list[count++] = &avx512_kernels;
#endif
#ifdef R1_AVX2_KERNELS
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (has_avxvnni()) list[count++] = &avxvnni_kernels;
        list[count++] = &avx2_kernels;
    }
#endif
#ifdef R1_NEON_KERNELS
    list[count++] = &neon_kernels;
#endif
    list[count++] = &portable_kernels;
    return count;
}

#define MAX_KERNEL_TABLES 8

// --isa NAME: the table of that name, NULL if the processor lacks it; "auto" takes the best.
static const struct Kernels *choose_kernels(const char *name) {
    const struct Kernels *list[MAX_KERNEL_TABLES];
    size_t count = list_kernels(list);
    for (size_t i = 0; i < count; i++)
        if (strcmp(name, "auto") == 0 || strcmp(name, list[i]->name) == 0) return list[i];
    return NULL;
}

// ====================================================================================================================
// The session: memory for a sequence and for the work on a micro-batch
//
// A session owns one arena, laid out by lay_out_session() and known in size before it is taken: the cache (what
// attention remembers of every position) and the buffers of forward(). Nothing is allocated after it is made.
// ====================================================================================================================

enum CacheType { CACHE_F32, CACHE_F16, CACHE_Q8 };
static const char *const cache_names[] = {"f32", "f16", "q8"};

#define CACHE_GROUP 64            // values under one scale of a q8 cache row
#define EXACT_TOKENS 16           // batches up to this size give the same bits as single tokens
#define GEMM_PANELS 4             // panels of one OpenBLAS product: 128 rows
#define GEMM_COLUMNS (GEMM_PANELS * PANEL_ROWS)
#define GEMM_DEPTH 512            // columns of one OpenBLAS product
#define ATTENTION_CHUNK 64        // cache positions that attention takes at a time, always from a multiple of it
#define ATTENTION_QUERIES 256     // most queries (tokens times heads) of one piece of attention work
#define MAX_BATCH 16384

struct SessionOptions {
    size_t context;               // tokens that the cache has room for
    size_t batch;                 // most tokens of one forward (micro-batch)
    size_t logits_rows;           // rows of logits kept: 1 (the last token's) or batch
    enum CacheType cache;
};

// Inputs of matrix products, one Row a token, in one buffer of `capacity` values.
struct Activations {
    struct Row *rows;
    float *values;
    int8_t *quants;
    float *scales;
    int32_t *sums;
    size_t capacity;
};

// A feed-forward network and the tokens that visit it. A dense layer is one job that every token visits; a
// mixture-of-experts layer has a job for each expert that was chosen, and one for the shared experts.
struct FeedForwardJob {
    struct Matrix gate, up, down;
    size_t n;                     // tokens
    const uint32_t *tokens;       // [n] which ones
    const float *weights;         // [n] how much of the result each takes
    struct Row *inputs;           // [n]
    struct Row *hidden;           // [n] silu(gate) * up, the inputs of down
};

// What a thread needs for itself.
struct Worker {
    float *gate_tile, *up_tile;   // [batch][128] results of a product
    float *gemm_weights;          // [512][128]
    float *gemm_inputs;           // [batch][512]
    float *queries;               // [256][query dim, or kv_lora_rank + rope]
    float *mixed;                 // [256][value dim, or kv_lora_rank]
    float *scores;                // [256][64]
    float *maxima, *sums;         // [max(256, batch)] of the softmax of each query
    float *keys, *values;         // [64][dim] a piece of the cache as floats
    float *latents;               // [64][kv_lora_rank + rope] MLA: the piece before it is expanded
    float *key_factor;            // [kv_lora_rank][nope] MLA: a head's factors as floats
    float *value_factor;          // [kv_lora_rank][v_head_dim]
};

struct Session {
    const struct Model *model;
    struct Team *team;
    const struct Kernels *kernels;
    struct SessionOptions options;
    size_t position;              // tokens in the cache; setting it lower forgets the last ones

    // The micro-batch at hand
    const uint32_t *tokens;
    size_t n;
    enum LogitsWanted { LOGITS_NONE, LOGITS_LAST, LOGITS_ALL } wanted;

    double *inverse_frequencies;  // [rope dim / 2]
    float rope_magnitude;         // factor of cos and sin
    float softmax_scale;
    bool integer_weights;         // some matrix is q8 or q4: inputs are quantised too
    size_t expand_tokens;         // MLA: from this many tokens on, keys and values are expanded

    float *logits;                // [logits_rows][vocab]
    uint32_t *expert_ids;         // [layers][batch][num_experts_per_tok], of the last forward, in order of choice
    float *expert_weights;        // same shape: final weights

    float *x;                     // [batch][hidden] the residual stream
    float *cosines, *sines;       // [batch][rope dim / 2]
    struct Activations input;     // [batch][hidden] normalised x
    struct Activations latent;    // [batch][q_lora_rank] MLA
    struct Activations attended;  // [batch][heads * value dim]
    struct Activations hidden;    // [batch * visits][intermediate]
    float *q;                     // [batch][heads * query dim]
    float *k, *v;                 // [batch][kv_heads * head_dim] GQA
    float *q_latent;              // [batch][q_lora_rank] MLA
    float *kv_latent;             // [batch][kv_lora_rank + rope] MLA
    float *router_logits;         // [batch][experts]

    struct FeedForwardJob *jobs;  // [experts + 1]
    size_t job_count;
    size_t hidden_rows;           // rows of `hidden` in use
    uint32_t *job_tokens;         // [batch * (experts per token + 1)]
    float *job_weights;
    struct Row *job_inputs;
    size_t *expert_visits;        // [experts + 1]

    uint8_t *cache;
    size_t key_row_bytes, value_row_bytes;   // of one position and head
    size_t cache_layer_bytes;

    struct Worker *workers;       // [threads]
    void *arena;
    size_t arena_bytes;
};

struct MemoryPlan {
    uint64_t weights, cache, scratch;   // bytes
};

static size_t cache_row_bytes(enum CacheType type, size_t cols) {
    switch (type) {
    case CACHE_F32: return cols * 4;
    case CACHE_F16: return align_up(cols * 2, 4);
    default: return ceil_div(cols, CACHE_GROUP) * 4 + align_up(cols, 4);
    }
}

// Values of a key and a value in the cache, per position and head of the cache. MLA keeps one latent with the rotated
// part of the key behind it, shared by all heads, and no values.
static size_t cache_heads(const struct ModelConfig *c) { return is_mla(c) ? 1 : c->num_key_value_heads; }
static size_t cache_key_dim(const struct ModelConfig *c) { return is_mla(c) ? (size_t)c->kv_lora_rank + c->qk_rope_head_dim : c->head_dim; }
static size_t cache_value_dim(const struct ModelConfig *c) { return is_mla(c) ? 0 : c->head_dim; }

struct Arena {
    uint8_t *base;                // NULL: only count
    size_t used;
};

static void *take(struct Arena *arena, size_t count, size_t size) {
    size_t offset = align_up(arena->used, 64);
    arena->used = offset + count * size;
    return arena->base ? arena->base + offset : NULL;
}

// Every row starts at a multiple of 256 values, so that its scales and sums have places of their own.
static size_t row_stride(size_t cols) { return align_up(cols, K_BLOCK); }

static void take_activations(struct Arena *arena, struct Activations *out, size_t rows, size_t capacity) {
    out->capacity = capacity;
    out->rows = take(arena, rows, sizeof *out->rows);
    out->values = take(arena, capacity, sizeof *out->values);
    out->quants = take(arena, capacity, sizeof *out->quants);
    out->scales = take(arena, capacity / K_BLOCK, sizeof *out->scales);
    out->sums = take(arena, capacity / K_GROUP, sizeof *out->sums);
}

// Row `row` whose values start at `offset` (a multiple of 256).
static void place_row(struct Activations *a, size_t row, size_t offset) {
    a->rows[row] = (struct Row){a->values + offset, a->quants + offset, a->scales + offset / K_BLOCK, a->sums + offset / K_GROUP};
}

// The values of a row, to be written.
static float *row_values(const struct Activations *a, size_t row) { return a->values + (a->rows[row].values - a->values); }

static void lay_out_session(struct Session *s, struct Arena *arena, int threads) {
    const struct ModelConfig *c = &s->model->config;
    size_t batch = s->options.batch, hidden = c->hidden_size, heads = c->num_attention_heads;
    size_t attended = heads * value_dim(c), visits = c->n_routed_experts ? c->num_experts_per_tok : 0;
    size_t routed_columns = visits * row_stride(c->moe_intermediate_size) +
                            (c->n_shared_experts ? row_stride((size_t)c->n_shared_experts * c->moe_intermediate_size) : 0);
    size_t hidden_columns = max_size(routed_columns, row_stride(c->intermediate_size));

    s->inverse_frequencies = take(arena, rope_dim(c) / 2, sizeof *s->inverse_frequencies);
    s->logits = take(arena, s->options.logits_rows * c->vocab_size, 4);
    s->expert_ids = take(arena, c->num_hidden_layers * batch * visits, 4);
    s->expert_weights = take(arena, c->num_hidden_layers * batch * visits, 4);
    s->x = take(arena, batch * hidden, 4);
    s->cosines = take(arena, batch * (rope_dim(c) / 2), 4);
    s->sines = take(arena, batch * (rope_dim(c) / 2), 4);
    take_activations(arena, &s->input, batch, batch * row_stride(hidden));
    take_activations(arena, &s->latent, batch, batch * row_stride(c->q_lora_rank));
    take_activations(arena, &s->attended, batch, batch * row_stride(attended));
    take_activations(arena, &s->hidden, batch * (visits + 1), batch * hidden_columns);
    s->q = take(arena, batch * heads * query_dim(c), 4);
    s->k = take(arena, is_mla(c) ? 0 : batch * c->num_key_value_heads * c->head_dim, 4);
    s->v = take(arena, is_mla(c) ? 0 : batch * c->num_key_value_heads * c->head_dim, 4);
    s->q_latent = take(arena, batch * c->q_lora_rank, 4);
    s->kv_latent = take(arena, is_mla(c) ? batch * cache_key_dim(c) : 0, 4);
    s->router_logits = take(arena, batch * c->n_routed_experts, 4);
    s->jobs = take(arena, (size_t)c->n_routed_experts + 1, sizeof *s->jobs);
    s->job_tokens = take(arena, batch * (visits + 1), 4);
    s->job_weights = take(arena, batch * (visits + 1), 4);
    s->job_inputs = take(arena, batch * (visits + 1), sizeof *s->job_inputs);
    s->expert_visits = take(arena, (size_t)c->n_routed_experts + 1, sizeof *s->expert_visits);

    s->workers = take(arena, (size_t)threads, sizeof *s->workers);
    for (int i = 0; i < threads; i++) {
        struct Worker ignored, *w = s->workers ? &s->workers[i] : &ignored;
        size_t key = max_size(query_dim(c), cache_key_dim(c)), value = max_size(value_dim(c), c->kv_lora_rank);
        size_t lora = c->kv_lora_rank, softmax_rows = max_size(ATTENTION_QUERIES, batch);
        w->gate_tile = take(arena, batch * GEMM_COLUMNS, 4);
        w->up_tile = take(arena, batch * GEMM_COLUMNS, 4);
        w->gemm_weights = take(arena, GEMM_DEPTH * GEMM_COLUMNS, 4);
        w->gemm_inputs = take(arena, batch * GEMM_DEPTH, 4);
        w->queries = take(arena, ATTENTION_QUERIES * key, 4);
        w->mixed = take(arena, ATTENTION_QUERIES * value, 4);
        w->scores = take(arena, ATTENTION_QUERIES * ATTENTION_CHUNK, 4);
        w->maxima = take(arena, softmax_rows, 4);
        w->sums = take(arena, softmax_rows, 4);
        w->keys = take(arena, ATTENTION_CHUNK * key, 4);
        w->values = take(arena, ATTENTION_CHUNK * align_up(value, PANEL_ROWS), 4);
        w->latents = take(arena, is_mla(c) ? ATTENTION_CHUNK * key : 0, 4);
        w->key_factor = take(arena, lora * align_up(c->qk_nope_head_dim, PANEL_ROWS), 4);
        w->value_factor = take(arena, lora * align_up(c->v_head_dim, PANEL_ROWS), 4);
    }

    s->key_row_bytes = cache_row_bytes(s->options.cache, cache_key_dim(c));
    s->value_row_bytes = cache_value_dim(c) ? cache_row_bytes(s->options.cache, cache_value_dim(c)) : 0;
    s->cache_layer_bytes = cache_heads(c) * s->options.context * (s->key_row_bytes + s->value_row_bytes);
    s->cache = take(arena, c->num_hidden_layers, s->cache_layer_bytes);
}

static struct MemoryPlan plan_memory(const struct Model *model, const struct SessionOptions *options, int threads) {
    struct Session session = {.model = model, .options = *options};
    struct Arena arena = {0};
    lay_out_session(&session, &arena, threads);
    uint64_t cache = session.cache_layer_bytes * model->config.num_hidden_layers;
    return (struct MemoryPlan){.weights = model->size, .cache = cache, .scratch = arena.used - cache};
}

static bool has_integer_weights(const struct Model *model) {
    for (size_t i = 0; i < model->entry_count; i++)
        for (unsigned part = 0; part < model->entries[i].parts; part++)
            if (model->entries[i].dtype[part] >= DTYPE_Q8) return true;
    return false;
}

static void init_rope(struct Session *s);

// Prepares a session; NULL with a sentence in error if memory is short. The model must outlive it.
static struct Session *session_create(const struct Model *model, struct Team *team, const struct Kernels *kernels,
                                      const struct SessionOptions *options, char *error) {
    const struct ModelConfig *c = &model->config;
    struct Session *s = allocate(sizeof *s);
    *s = (struct Session){.model = model, .team = team, .kernels = kernels, .options = *options};
    struct Arena arena = {0};
    lay_out_session(s, &arena, team->threads);
    s->arena_bytes = arena.used;
    s->arena = map_memory(s->arena_bytes);
    if (!s->arena) {
        fail(error, "%s: a context of %zu tokens needs %zu MB of memory besides the weights, which the system does not give; choose a smaller -c",
             model->name, options->context, s->arena_bytes >> 20);
        free(s);
        return NULL;
    }
    arena = (struct Arena){.base = s->arena};
    lay_out_session(s, &arena, team->threads);
    s->integer_weights = has_integer_weights(model);
    for (size_t t = 0; t < options->batch; t++) {
        place_row(&s->input, t, t * row_stride(c->hidden_size));
        place_row(&s->latent, t, t * row_stride(c->q_lora_rank));
        place_row(&s->attended, t, t * row_stride((size_t)c->num_attention_heads * value_dim(c)));
    }
    // Multiply-adds per key and head: expanded kv_lora_rank * (nope + v) once and nope + rope + v per query, absorbed
    // 2 * kv_lora_rank + rope per query. For R1 they meet at 171 queries.
    s->expand_tokens = SIZE_MAX;
    if (is_mla(c)) {
        size_t lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, v = c->v_head_dim;
        if (2 * lora > nope + v) s->expand_tokens = max_size(EXACT_TOKENS + 1, ceil_div(lora * (nope + v), 2 * lora - nope - v));
    }
    init_rope(s);
    return s;
}

static void session_free(struct Session *s) {
    munmap(s->arena, s->arena_bytes);
    free(s);
}

// ====================================================================================================================
// Matrix products
//
// A product of a matrix with the rows of a micro-batch is cut into items of one panel (or four, where OpenBLAS takes
// over), dealt out among the threads. Float weights and more than 16 tokens go through OpenBLAS on fixed tiles; all else
// through the kernels.
// ====================================================================================================================

static bool uses_gemm(uint32_t dtype, size_t n) { return dtype <= DTYPE_F8 && n > EXACT_TOKENS; }

static struct Matrix blob_matrix(const struct Blobs *blobs, unsigned part, size_t index) {
    struct Matrix m = blobs->part[part];
    m.data += index * blobs->stride;
    return m;
}

// Reads one row of a matrix as floats: an embedding.
static void read_row(const struct Matrix *m, size_t row, float *out) {
    const uint8_t *panel = m->data + row / PANEL_ROWS * m->panel_bytes;
    size_t r = row % PANEL_ROWS;
    const uint8_t *block = panel + panel_head_bytes(m->dtype);
    for (size_t first = 0; first < m->cols; first += K_BLOCK) {
        size_t length = min_size(K_BLOCK, m->cols - first);
        const uint8_t *w = block + block_head_bytes(m->dtype, length);
        const float *scales = (const float *)(const void *)block;
        for (size_t k = 0; k < length; k++) {
            size_t at8 = k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4;
            float *value = &out[first + k];
            switch (m->dtype) {
            case DTYPE_F32: *value = ((const float *)(const void *)w)[k * PANEL_ROWS + r]; break;
            case DTYPE_BF16: *value = float_from_bf16(((const uint16_t *)(const void *)w)[k / 2 * 2 * PANEL_ROWS + r * 2 + k % 2]); break;
            case DTYPE_F8: *value = scales[k / K_GROUP] * float_from_e4m3(w[at8]); break;
            case DTYPE_Q8: *value = scales[r] * (float)(int8_t)w[at8]; break;
            default: {
                uint8_t pair = w[k / 8 * 4 * PANEL_ROWS + r * 4 + k % 4], sub = block[k / K_GROUP * PANEL_ROWS + r];
                int table = Q4_TABLE[k % 8 < 4 ? pair & 15 : pair >> 4] + (sub & 1 ? Q4_SHIFT : 0);
                *value = ((const float *)(const void *)panel)[r] * (float)((int8_t)(sub & 0xfe) * table);
            }
            }
        }
        block = w + value_bytes(m->dtype, length);
    }
}

// Expands columns [first, first + depth) of a panel of float weights to out[k][r], stride floats from one k to the next.
// first is a multiple of 256.
static void expand_panel(const struct Matrix *m, size_t panel, size_t first, size_t depth, float *out, size_t stride) {
    const uint8_t *data = m->data + panel * m->panel_bytes;
    if (m->dtype == DTYPE_F32) {
        const float *w = (const float *)(const void *)data + first * PANEL_ROWS;
        for (size_t k = 0; k < depth; k++) memcpy(out + k * stride, w + k * PANEL_ROWS, PANEL_ROWS * sizeof *w);
    } else if (m->dtype == DTYPE_BF16) {
        const uint16_t *w = (const uint16_t *)(const void *)data + first * PANEL_ROWS;
        for (size_t k = 0; k < depth; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) out[k * stride + r] = float_from_bf16(w[k / 2 * 2 * PANEL_ROWS + r * 2 + k % 2]);
    } else {
        const uint8_t *block = data + first / K_BLOCK * (block_head_bytes(DTYPE_F8, K_BLOCK) + value_bytes(DTYPE_F8, K_BLOCK));
        for (size_t start = 0; start < depth; start += K_BLOCK) {
            size_t length = min_size(K_BLOCK, depth - start);
            const float *scales = (const float *)(const void *)block;
            const uint8_t *w = block + block_head_bytes(DTYPE_F8, length);
            for (size_t k = 0; k < length; k++)
                for (size_t r = 0; r < PANEL_ROWS; r++)
                    out[(start + k) * stride + r] = scales[k / K_GROUP] * float_from_e4m3(w[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4]);
            block = w + value_bytes(DTYPE_F8, length);
        }
    }
}

// `panels` panels from first_panel on times n rows: out [n][panels * 32].
static void multiply_tile(const struct Session *s, struct Worker *worker, const struct Matrix *m, size_t first_panel, size_t panels,
                          const struct Row *x, size_t n, float *out) {
    size_t stride = panels * PANEL_ROWS;
    if (!uses_gemm(m->dtype, n)) {
        for (size_t p = 0; p < panels; p++) {
            const uint8_t *panel = m->data + (first_panel + p) * m->panel_bytes;
            for (size_t t = 0; t < n; t += TILE_TOKENS) {
                size_t count = min_size(TILE_TOKENS, n - t);
                if (panels == 1) {
                    s->kernels->product[m->dtype](panel, m->cols, x + t, count, out + t * stride);
                    continue;
                }
                float tile[TILE_TOKENS * PANEL_ROWS];
                s->kernels->product[m->dtype](panel, m->cols, x + t, count, tile);
                for (size_t i = 0; i < count; i++)
                    memcpy(out + (t + i) * stride + p * PANEL_ROWS, tile + i * PANEL_ROWS, PANEL_ROWS * sizeof *tile);
            }
        }
        return;
    }
    for (size_t first = 0; first < m->cols; first += GEMM_DEPTH) {
        size_t depth = min_size(GEMM_DEPTH, m->cols - first);
        for (size_t p = 0; p < panels; p++) expand_panel(m, first_panel + p, first, depth, worker->gemm_weights + p * PANEL_ROWS, stride);
        for (size_t t = 0; t < n; t++) memcpy(worker->gemm_inputs + t * depth, x[t].values + first, depth * sizeof(float));
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)stride, (int)depth, 1, worker->gemm_inputs, (int)depth,
                    worker->gemm_weights, (int)stride, first ? 1 : 0, out, (int)stride);
    }
}

// The items of a step that are this thread's: a fixed share when tokens are few and every item takes equally long, else
// from a common counter.
struct Items {
    atomic_size_t *counter;       // NULL: a fixed share
    size_t next, end;
};

static struct Items share_items(const struct Session *s, int thread, size_t count) {
    struct Items items = {.counter = s->n > EXACT_TOKENS ? &s->team->next_item : NULL, .end = count};
    if (!items.counter) static_share(s->team, thread, count, &items.next, &items.end);
    return items;
}

// The next item of this thread in *item; false at the end. Between two steps there must be a barrier.
static bool next_item(struct Items *items, size_t *item) {
    *item = items->counter ? atomic_fetch_add_explicit(items->counter, 1, memory_order_relaxed) : items->next++;
    return *item < items->end;
}

// One of the products of a step: out[t][row] (= or +=) matrix * x[t] (+ bias).
struct Product {
    const struct Matrix *matrix;
    const struct Row *x;
    float *out;
    size_t stride;                // floats from one token to the next
    const float *bias;            // or NULL
    bool add;                     // add to what is there: the residual stream
};

static void store_tile(const struct Product *product, size_t first_row, size_t width, const float *tile, size_t n) {
    size_t rows = min_size(width, product->matrix->rows - first_row);
    for (size_t t = 0; t < n; t++) {
        float *out = product->out + t * product->stride + first_row;
        const float *result = tile + t * width;
        if (product->add) {
            for (size_t r = 0; r < rows; r++) out[r] += result[r];
        } else if (product->bias) {
            for (size_t r = 0; r < rows; r++) out[r] = result[r] + product->bias[first_row + r];
        } else {
            memcpy(out, result, rows * sizeof *out);
        }
    }
}

static size_t panel_count(const struct Matrix *m) { return ceil_div(m->rows, PANEL_ROWS); }
static size_t panels_per_item(uint32_t dtype, size_t n) { return uses_gemm(dtype, n) ? GEMM_PANELS : 1; }

// Computes some products of n rows each. All threads call it.
static void multiply(struct Session *s, int thread, const struct Product *products, size_t count, size_t n) {
    struct Worker *worker = &s->workers[thread];
    size_t total = 0, item;
    for (size_t i = 0; i < count; i++) total += ceil_div(panel_count(products[i].matrix), panels_per_item(products[i].matrix->dtype, n));
    struct Items items = share_items(s, thread, total);
    while (next_item(&items, &item)) {
        const struct Product *product = products;
        size_t width = panels_per_item(product->matrix->dtype, n), first = item;
        for (size_t here; first >= (here = ceil_div(panel_count(product->matrix), width)); first -= here) {
            product++;
            width = panels_per_item(product->matrix->dtype, n);
        }
        size_t panels = min_size(width, panel_count(product->matrix) - first * width);
        multiply_tile(s, worker, product->matrix, first * width, panels, product->x, n, worker->gate_tile);
        store_tile(product, first * width * PANEL_ROWS, panels * PANEL_ROWS, worker->gate_tile, n);
    }
}

// ====================================================================================================================
// Norms and RoPE
// ====================================================================================================================

#define LATENT_NORM_EPS 1e-6      // of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (DeepSeek's modeling file)

// out = x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467). out may be x.
static void rms_norm(const struct Session *s, const float *x, const float *weight, size_t n, double eps, float *out) {
    float scale = 1.0f / sqrtf(s->kernels->dot(x, x, n) / (float)n + (float)eps);
    for (size_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// Fills in the quantised form of a row whose values are there.
static void quantize_activations(const struct Session *s, const struct Activations *a, size_t row, size_t cols) {
    if (!s->integer_weights) return;
    const struct Row *r = &a->rows[row];
    size_t at = (size_t)(r->values - a->values);
    s->kernels->quantize_row(r->values, cols, a->quants + at, a->scales + at / K_BLOCK, a->sums + at / K_GROUP);
}

static void norm_input(struct Session *s, size_t t, const float *x, const float *weight) {
    size_t hidden = s->model->config.hidden_size;
    rms_norm(s, x, weight, hidden, s->model->config.rms_norm_eps, row_values(&s->input, t));
    quantize_activations(s, &s->input, t, hidden);
}

static double yarn_mscale(double factor, double mscale) { return factor > 1 ? 0.1 * mscale * log(factor) + 1 : 1; }

// The frequencies of RoPE (arXiv:2104.09864) and their stretching for long contexts: YaRN (arXiv:2309.00071, as in
// DeepSeek-V3's modeling file) and Llama 3.1's scheme.
static void init_rope(struct Session *s) {
    const struct ModelConfig *c = &s->model->config;
    size_t dim = rope_dim(c);
    double theta = c->rope_theta, factor = c->rope_factor, original = c->rope_original_max_position_embeddings, low = 0, high = 1;
    s->rope_magnitude = 1;
    s->softmax_scale = (float)(1 / sqrt((double)query_dim(c)));
    if (c->rope_scaling == ROPE_YARN) {
        // Dimensions that turn more than beta_fast times over the original context keep their frequency, those that turn
        // less than beta_slow times are slowed down by the factor; in between a ramp.
        low = fmax(floor((double)dim * log(original / (c->rope_beta_fast * 2 * M_PI)) / (2 * log(theta))), 0);
        high = fmin(ceil((double)dim * log(original / (c->rope_beta_slow * 2 * M_PI)) / (2 * log(theta))), (double)dim - 1);
        bool both = c->rope_mscale > 0 && c->rope_mscale_all_dim > 0;
        s->rope_magnitude = (float)(both ? yarn_mscale(factor, c->rope_mscale) / yarn_mscale(factor, c->rope_mscale_all_dim)
                                         : yarn_mscale(factor, 1) * c->rope_attn_factor);
        if (is_mla(c) && c->rope_mscale_all_dim > 0) {
            double mscale = yarn_mscale(factor, c->rope_mscale_all_dim);
            s->softmax_scale = (float)(mscale * mscale / sqrt((double)query_dim(c)));
        }
    }
    for (size_t i = 0; i < dim / 2; i++) {
        double frequency = pow(theta, -2.0 * (double)i / (double)dim);
        if (c->rope_scaling == ROPE_YARN) {
            double slowed = fmin(fmax(((double)i - low) / fmax(high - low, 1e-3), 0), 1);
            frequency = frequency / factor * slowed + frequency * (1 - slowed);
        } else if (c->rope_scaling == ROPE_LLAMA3) {
            double turns = original * frequency / (2 * M_PI);
            double kept = (turns - c->rope_low_freq_factor) / (c->rope_high_freq_factor - c->rope_low_freq_factor);
            kept = fmin(fmax(kept, 0), 1);
            frequency = frequency / factor * (1 - kept) + frequency * kept;
        }
        s->inverse_frequencies[i] = frequency;
    }
}

static void fill_rope_row(struct Session *s, size_t t) {
    size_t half = rope_dim(&s->model->config) / 2;
    for (size_t i = 0; i < half; i++) {
        double angle = (double)(s->position + t) * s->inverse_frequencies[i];
        s->cosines[t * half + i] = (float)cos(angle) * s->rope_magnitude;
        s->sines[t * half + i] = (float)sin(angle) * s->rope_magnitude;
    }
}

// Turns a head's vector by token t's angles: DeepSeek pairs neighbours (2i, 2i + 1), the others halves (i, i + dim/2).
static void rotate(const struct Session *s, size_t t, float *x) {
    const struct ModelConfig *c = &s->model->config;
    size_t half = rope_dim(c) / 2, step = is_mla(c) ? 2 : 1, partner = is_mla(c) ? 1 : half;
    const float *cosines = s->cosines + t * half, *sines = s->sines + t * half;
    for (size_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + partner];
        x[i * step] = a * cosines[i] - b * sines[i];
        x[i * step + partner] = b * cosines[i] + a * sines[i];
    }
}

// ====================================================================================================================
// The cache
//
// What attention remembers of each position: GQA a key and a value a kv head, MLA one latent (the compressed keys and
// values of all heads, arXiv:2405.04434 section 2.1) followed by the rotated key part. Rows are f32, half precision, or
// int8 with a scale for each 64 values. Layer by layer: [head][position] keys, then [head][position] values.
// ====================================================================================================================

static uint8_t *key_row(const struct Session *s, size_t layer, size_t head, size_t position) {
    return s->cache + layer * s->cache_layer_bytes + (head * s->options.context + position) * s->key_row_bytes;
}

static uint8_t *value_row(const struct Session *s, size_t layer, size_t head, size_t position) {
    size_t keys = cache_heads(&s->model->config) * s->options.context * s->key_row_bytes;
    return s->cache + layer * s->cache_layer_bytes + keys + (head * s->options.context + position) * s->value_row_bytes;
}

static void write_cache_row(const struct Session *s, uint8_t *row, const float *x, size_t cols) {
    if (s->options.cache == CACHE_F32) {
        memcpy(row, x, cols * sizeof *x);
    } else if (s->options.cache == CACHE_F16) {
        s->kernels->float_to_half(x, (uint16_t *)(void *)row, cols);
    } else {
        float *scales = (float *)(void *)row;
        int8_t *quants = (int8_t *)(row + ceil_div(cols, CACHE_GROUP) * sizeof *scales);
        for (size_t first = 0; first < cols; first += CACHE_GROUP) {
            size_t count = min_size(CACHE_GROUP, cols - first);
            float largest = 0;
            for (size_t i = first; i < first + count; i++) largest = fmaxf(largest, fabsf(x[i]));
            float inverse = largest > 1e-30f && largest < INFINITY ? 127.0f / largest : 0.0f;
            scales[first / CACHE_GROUP] = inverse > 0 ? largest / 127.0f : 0.0f;
            for (size_t i = first; i < first + count; i++) quants[i] = (int8_t)lrintf(fminf(fmaxf(x[i] * inverse, -127.0f), 127.0f));
        }
    }
}

// Reads `count` rows of the cache as floats, out [count][cols].
static void read_cache_rows(const struct Session *s, const uint8_t *rows, size_t row_bytes, size_t count, size_t cols, float *out) {
    for (size_t j = 0; j < count; j++, rows += row_bytes, out += cols) {
        if (s->options.cache == CACHE_F32) {
            memcpy(out, rows, cols * sizeof *out);
        } else if (s->options.cache == CACHE_F16) {
            s->kernels->half_to_float((const uint16_t *)(const void *)rows, out, cols);
        } else {
            const float *scales = (const float *)(const void *)rows;
            const int8_t *quants = (const int8_t *)(rows + ceil_div(cols, CACHE_GROUP) * sizeof *scales);
            for (size_t first = 0; first < cols; first += CACHE_GROUP)
                s->kernels->int8_to_float(quants + first, scales[first / CACHE_GROUP], out + first, min_size(CACHE_GROUP, cols - first));
        }
    }
}

// ====================================================================================================================
// Attention
//
// The keys and values of 64 positions at a time meet all queries of a piece of work; each query keeps the maximum, the
// sum and the mix of its softmax so far (online softmax, as in FlashAttention, arXiv:2205.14135). Pieces always start at
// a multiple of 64, so a query's result depends on its own position alone.
//
// GQA: groups of query heads share a kv head. MLA has two ways that give the same result: for few tokens the query is
// multiplied by the head's key factor ("absorbed") and then meets the cached latents as they are, all heads sharing
// them; for many tokens the latents are expanded to each head's keys and values, which costs less per query.
// ====================================================================================================================

// Queries that meet the same keys and values.
struct Queries {
    size_t count;
    size_t heads;                 // query i belongs to token first_token + i / heads
    size_t first_token;
    const float *q;               // [count], q_stride floats apart, multiplied by the softmax scale
    size_t q_stride, key_dim;
    float *mixed;                 // [count], mixed_stride floats apart
    size_t mixed_stride, value_dim;
    float *maxima, *sums;         // [count]
};

static void start_softmax(const struct Queries *queries) {
    for (size_t i = 0; i < queries->count; i++) {
        queries->maxima[i] = -INFINITY;
        queries->sums[i] = 0;
        memset(queries->mixed + i * queries->mixed_stride, 0, queries->value_dim * sizeof *queries->mixed);
    }
}

static void end_softmax(const struct Queries *queries) {
    for (size_t i = 0; i < queries->count; i++) {
        float *mixed = queries->mixed + i * queries->mixed_stride, inverse = 1.0f / queries->sums[i];
        for (size_t c = 0; c < queries->value_dim; c++) mixed[c] *= inverse;
    }
}

// Lets the queries look at `count` positions from `first` on: keys [count][key_stride], values [count][value_stride].
static void attend_chunk(const struct Session *s, struct Worker *worker, const struct Queries *queries, size_t first, size_t count,
                         const float *keys, size_t key_stride, const float *values, size_t value_stride) {
    bool gemm = s->n > EXACT_TOKENS;
    if (gemm)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)queries->count, (int)count, (int)queries->key_dim, 1, queries->q,
                    (int)queries->q_stride, keys, (int)key_stride, 0, worker->scores, ATTENTION_CHUNK);
    for (size_t i = 0; i < queries->count; i++) {
        size_t position = s->position + queries->first_token + i / queries->heads;
        size_t visible = position < first ? 0 : min_size(count, position - first + 1);
        float *scores = worker->scores + i * ATTENTION_CHUNK, *mixed = queries->mixed + i * queries->mixed_stride;
        if (!gemm && visible) s->kernels->score_rows(queries->q + i * queries->q_stride, keys, key_stride, visible, queries->key_dim, scores);
        if (visible) {
            float maximum = queries->maxima[i];
            for (size_t j = 0; j < visible; j++) maximum = scores[j] > maximum ? scores[j] : maximum;
            float kept = exp_float(queries->maxima[i] - maximum);    // of what was mixed before; -inf gives next to nothing
            queries->sums[i] = queries->sums[i] * kept + s->kernels->exp_row(scores, maximum, visible);
            if (maximum != queries->maxima[i])
                for (size_t c = 0; c < queries->value_dim; c++) mixed[c] *= kept;
            queries->maxima[i] = maximum;
        }
        if (gemm) memset(scores + visible, 0, (count - visible) * sizeof *scores);
        else if (visible) s->kernels->mix_rows(scores, values, value_stride, visible, queries->value_dim, mixed);
    }
    if (gemm)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)queries->count, (int)queries->value_dim, (int)count, 1, worker->scores,
                    ATTENTION_CHUNK, values, (int)value_stride, 1, queries->mixed, (int)queries->mixed_stride);
}

// How a step's tokens and the heads that share a cache head are cut into pieces of work: as large as the buffers allow,
// so that a piece of the cache is read once for many queries, but enough pieces for all threads.
static void choose_piece(const struct Session *s, size_t cache_heads_count, size_t heads, size_t *piece_tokens, size_t *piece_heads) {
    *piece_heads = min_size(heads, ATTENTION_QUERIES);
    *piece_tokens = min_size(s->n, ATTENTION_QUERIES / *piece_heads);
    while (cache_heads_count * ceil_div(heads, *piece_heads) * ceil_div(s->n, *piece_tokens) < 2 * (size_t)s->team->threads) {
        if (*piece_tokens > 1) *piece_tokens = ceil_div(*piece_tokens, 2);
        else if (*piece_heads > 1) *piece_heads = ceil_div(*piece_heads, 2);
        else break;
    }
}

// ---- GQA

// Normalises, rotates and stores the keys and values of the micro-batch. One item a token.
static void store_keys_values(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t kv_heads = c->num_key_value_heads, dim = c->head_dim;
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) {
        for (size_t h = 0; h < kv_heads; h++) {
            float *k = s->k + (t * kv_heads + h) * dim;
            if (l->k_norm) rms_norm(s, k, l->k_norm, dim, c->rms_norm_eps, k);
            rotate(s, t, k);
            write_cache_row(s, key_row(s, layer, h, s->position + t), k, dim);
            write_cache_row(s, value_row(s, layer, h, s->position + t), s->v + (t * kv_heads + h) * dim, dim);
        }
    }
}

// Attention of the micro-batch, s->q to s->attended. All threads call it.
static void attend_gqa(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, kv_heads = c->num_key_value_heads, group = heads / kv_heads, dim = c->head_dim;
    size_t piece_tokens, piece_heads, item;
    choose_piece(s, kv_heads, group, &piece_tokens, &piece_heads);
    size_t token_pieces = ceil_div(s->n, piece_tokens), head_pieces = ceil_div(group, piece_heads);
    struct Items items = share_items(s, thread, kv_heads * head_pieces * token_pieces);
    while (next_item(&items, &item)) {
        size_t kv_head = item / token_pieces / head_pieces, first_token = item % token_pieces * piece_tokens;
        size_t first_head = item / token_pieces % head_pieces * piece_heads;
        size_t tokens = min_size(piece_tokens, s->n - first_token), own_heads = min_size(piece_heads, group - first_head);
        for (size_t i = 0; i < tokens * own_heads; i++) {
            size_t t = first_token + i / own_heads, h = kv_head * group + first_head + i % own_heads;
            float *q = w->queries + i * dim;
            memcpy(q, s->q + (t * heads + h) * dim, dim * sizeof *q);
            if (l->q_norm) rms_norm(s, q, l->q_norm, dim, c->rms_norm_eps, q);
            rotate(s, t, q);
            for (size_t d = 0; d < dim; d++) q[d] *= s->softmax_scale;
        }
        struct Queries queries = {.count = tokens * own_heads, .heads = own_heads, .first_token = first_token, .q = w->queries,
                                  .q_stride = dim, .key_dim = dim, .mixed = w->mixed, .mixed_stride = dim, .value_dim = dim,
                                  .maxima = w->maxima, .sums = w->sums};
        start_softmax(&queries);
        size_t end = s->position + first_token + tokens;
        for (size_t first = 0; first < end; first += ATTENTION_CHUNK) {
            size_t count = min_size(ATTENTION_CHUNK, end - first);
            read_cache_rows(s, key_row(s, layer, kv_head, first), s->key_row_bytes, count, dim, w->keys);
            read_cache_rows(s, value_row(s, layer, kv_head, first), s->value_row_bytes, count, dim, w->values);
            attend_chunk(s, w, &queries, first, count, w->keys, dim, w->values, dim);
        }
        end_softmax(&queries);
        for (size_t i = 0; i < tokens * own_heads; i++) {
            size_t t = first_token + i / own_heads, h = kv_head * group + first_head + i % own_heads;
            memcpy(row_values(&s->attended, t) + h * dim, w->mixed + i * dim, dim * sizeof(float));
        }
    }
}

// ---- MLA

// Normalises the query's latent and the key-value latent, rotates the key part, and stores the latter two. One item a token.
static void store_latents(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t lora = c->kv_lora_rank, row = cache_key_dim(c);
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) {
        float *latent = s->kv_latent + t * row;
        rms_norm(s, latent, l->kv_a_norm, lora, LATENT_NORM_EPS, latent);
        rotate(s, t, latent + lora);
        write_cache_row(s, key_row(s, layer, 0, s->position + t), latent, row);
        if (!c->q_lora_rank) continue;
        rms_norm(s, s->q_latent + t * c->q_lora_rank, l->q_a_norm, c->q_lora_rank, LATENT_NORM_EPS, row_values(&s->latent, t));
        quantize_activations(s, &s->latent, t, c->q_lora_rank);
    }
}

// out[t][rows] = a head's factor times `count` vectors of its columns, x_stride floats apart (float dtypes only).
static void multiply_factor(const struct Session *s, const struct Matrix *factor, const float *x, size_t x_stride, size_t count,
                            float *out, size_t out_stride) {
    float tile[TILE_TOKENS * PANEL_ROWS];
    for (size_t t = 0; t < count; t += TILE_TOKENS) {
        size_t n = min_size(TILE_TOKENS, count - t);
        struct Row rows[TILE_TOKENS];
        for (size_t i = 0; i < n; i++) rows[i] = (struct Row){.values = x + (t + i) * x_stride};
        for (size_t p = 0; p < panel_count(factor); p++) {
            s->kernels->product[factor->dtype](factor->data + p * factor->panel_bytes, factor->cols, rows, n, tile);
            size_t width = min_size(PANEL_ROWS, factor->rows - p * PANEL_ROWS);
            for (size_t i = 0; i < n; i++) memcpy(out + (t + i) * out_stride + p * PANEL_ROWS, tile + i * PANEL_ROWS, width * sizeof *tile);
        }
    }
}

// Rotates the RoPE part of a head's query and multiplies all of it by the softmax scale.
static void prepare_mla_query(const struct Session *s, size_t t, float *q) {
    rotate(s, t, q + s->model->config.qk_nope_head_dim);
    for (size_t d = 0; d < query_dim(&s->model->config); d++) q[d] *= s->softmax_scale;
}

// Few tokens: queries [head][token] of kv_lora_rank + rope meet the cached rows themselves; what they mix are latents.
static void attend_mla_absorbed(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim;
    size_t dim = query_dim(c), row = cache_key_dim(c), value = c->v_head_dim;
    size_t piece_tokens, piece_heads, item;
    choose_piece(s, 1, heads, &piece_tokens, &piece_heads);
    size_t token_pieces = ceil_div(s->n, piece_tokens), head_pieces = ceil_div(heads, piece_heads);
    struct Items items = share_items(s, thread, head_pieces * token_pieces);
    while (next_item(&items, &item)) {
        size_t first_token = item % token_pieces * piece_tokens, first_head = item / token_pieces * piece_heads;
        size_t tokens = min_size(piece_tokens, s->n - first_token), own_heads = min_size(piece_heads, heads - first_head);
        // Query i is token first_token + i / own_heads, head first_head + i % own_heads.
        for (size_t h = 0; h < own_heads; h++) {
            float *q = s->q + (first_token * heads + first_head + h) * dim;
            struct Matrix absorb = blob_matrix(&l->key_transposed, 0, first_head + h);
            for (size_t t = 0; t < tokens; t++) {
                prepare_mla_query(s, first_token + t, q + t * heads * dim);
                memcpy(w->queries + (t * own_heads + h) * row + lora, q + t * heads * dim + nope, rope * sizeof *q);
            }
            multiply_factor(s, &absorb, q, heads * dim, tokens, w->queries + h * row, own_heads * row);
        }
        struct Queries queries = {.count = tokens * own_heads, .heads = own_heads, .first_token = first_token, .q = w->queries,
                                  .q_stride = row, .key_dim = row, .mixed = w->mixed, .mixed_stride = lora, .value_dim = lora,
                                  .maxima = w->maxima, .sums = w->sums};
        start_softmax(&queries);
        size_t end = s->position + first_token + tokens;
        for (size_t first = 0; first < end; first += ATTENTION_CHUNK) {
            size_t count = min_size(ATTENTION_CHUNK, end - first);
            read_cache_rows(s, key_row(s, layer, 0, first), s->key_row_bytes, count, row, w->keys);
            attend_chunk(s, w, &queries, first, count, w->keys, row, w->keys, row);
        }
        end_softmax(&queries);
        for (size_t h = 0; h < own_heads; h++) {
            struct Matrix up = blob_matrix(&l->value, 0, first_head + h);
            multiply_factor(s, &up, w->mixed + h * lora, own_heads * lora, tokens,
                            row_values(&s->attended, first_token) + (first_head + h) * value, row_stride(heads * value));
        }
    }
}

// Expands a whole factor to out [cols][rows, padded to panels].
static void expand_factor(const struct Matrix *factor, float *out) {
    size_t width = panel_count(factor) * PANEL_ROWS;
    for (size_t p = 0; p < panel_count(factor); p++) expand_panel(factor, p, 0, factor->cols, out + p * PANEL_ROWS, width);
}

// Many tokens: a head expands each piece of the cache to its own keys and values. One item a head.
static void attend_mla_expanded(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim;
    size_t dim = query_dim(c), row = cache_key_dim(c), value = c->v_head_dim, h;
    size_t nope_width = align_up(nope, PANEL_ROWS), value_width = align_up(value, PANEL_ROWS);
    struct Items items = share_items(s, thread, heads);
    while (next_item(&items, &h)) {
        struct Matrix key = blob_matrix(&l->key, 0, h), up = blob_matrix(&l->value, 0, h);
        expand_factor(&key, w->key_factor);
        expand_factor(&up, w->value_factor);
        for (size_t t = 0; t < s->n; t++) prepare_mla_query(s, t, s->q + (t * heads + h) * dim);
        struct Queries all = {.count = s->n, .heads = 1, .q = s->q + h * dim, .q_stride = heads * dim, .key_dim = dim,
                              .mixed = row_values(&s->attended, 0) + h * value, .mixed_stride = row_stride(heads * value),
                              .value_dim = value, .maxima = w->maxima, .sums = w->sums};
        start_softmax(&all);
        size_t end = s->position + s->n;
        for (size_t first = 0; first < end; first += ATTENTION_CHUNK) {
            size_t count = min_size(ATTENTION_CHUNK, end - first);
            read_cache_rows(s, key_row(s, layer, 0, first), s->key_row_bytes, count, row, w->latents);
            // The product fills nope_width columns of each key; the rotated part then overwrites any padding behind nope.
            size_t key_stride = nope_width + rope;
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)count, (int)nope_width, (int)lora, 1, w->latents, (int)row,
                        w->key_factor, (int)nope_width, 0, w->keys, (int)key_stride);
            for (size_t j = 0; j < count; j++) memcpy(w->keys + j * key_stride + nope, w->latents + j * row + lora, rope * sizeof(float));
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)count, (int)value_width, (int)lora, 1, w->latents, (int)row,
                        w->value_factor, (int)value_width, 0, w->values, (int)value_width);
            for (size_t t = 0; t < s->n; t += ATTENTION_QUERIES) {
                struct Queries some = all;
                some.count = min_size(ATTENTION_QUERIES, s->n - t);
                some.first_token = t;
                some.q += t * all.q_stride;
                some.mixed += t * all.mixed_stride;
                some.maxima += t;
                some.sums += t;
                if (s->position + t + some.count > first)
                    attend_chunk(s, w, &some, first, count, w->keys, key_stride, w->values, value_width);
            }
        }
        end_softmax(&all);
    }
}

// ====================================================================================================================
// Router and experts
//
// DeepSeek-V3's router (arXiv:2412.19437 section 2.1.2, "noaux_tc" in its modeling file) scores all experts for a token
// with a sigmoid, chooses by score plus bias, first groups of experts, then experts in these groups, and mixes what the
// chosen ones compute by their scores without the bias. Tokens are then sorted by expert, so that an expert's weights
// are read once for all tokens that visit it.
// ====================================================================================================================

// Index of the largest value, the lowest index at a tie.
static uint32_t find_largest(const float *values, size_t n) {
    size_t largest = 0;
    for (size_t i = 1; i < n; i++)
        if (values[i] > values[largest]) largest = i;
    return (uint32_t)largest;
}

// Chooses a token's experts. logits [experts] are replaced; ids and weights [num_experts_per_tok] in order of choice.
static void select_experts(const struct ModelConfig *c, const float *bias, float *logits, uint32_t *ids, float *weights) {
    size_t experts = c->n_routed_experts, per_group = experts / c->n_group;
    float scores[MAX_EXPERTS], choice[MAX_EXPERTS], group_scores[MAX_EXPERTS];
    for (size_t e = 0; e < experts; e++) {
        scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        choice[e] = scores[e] + bias[e];
    }
    // A group counts for its two best experts.
    for (size_t g = 0; g < c->n_group; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (size_t e = g * per_group; e < (g + 1) * per_group; e++) {
            if (choice[e] > best) {
                second = best;
                best = choice[e];
            } else if (choice[e] > second) {
                second = choice[e];
            }
        }
        group_scores[g] = per_group > 1 ? best + second : best;
    }
    bool kept[MAX_EXPERTS] = {false};
    for (size_t i = 0; i < c->topk_group; i++) {
        uint32_t group = find_largest(group_scores, c->n_group);
        kept[group] = true;
        group_scores[group] = -INFINITY;
    }
    for (size_t e = 0; e < experts; e++)
        if (!kept[e / per_group]) choice[e] = -INFINITY;
    float sum = 0;
    for (size_t i = 0; i < c->num_experts_per_tok; i++) {
        ids[i] = find_largest(choice, experts);
        weights[i] = scores[ids[i]];
        sum += weights[i];
        choice[ids[i]] = -INFINITY;
    }
    for (size_t i = 0; i < c->num_experts_per_tok; i++) {
        if (c->norm_topk_prob) weights[i] /= sum + 1e-20f;
        weights[i] *= (float)c->routed_scaling_factor;
    }
}

static struct FeedForwardJob make_job(const struct Blobs *blobs, size_t index) {
    return (struct FeedForwardJob){.gate = blob_matrix(blobs, GATE, index), .up = blob_matrix(blobs, UP, index), .down = blob_matrix(blobs, DOWN, index)};
}

// Gives a job of n tokens its places: in the lists of visits (from *visit on) and in `hidden` (from *offset on).
static void place_job(struct Session *s, struct FeedForwardJob *job, size_t n, size_t *visit, size_t *offset) {
    job->n = n;
    job->tokens = s->job_tokens + *visit;
    job->weights = s->job_weights + *visit;
    job->inputs = s->job_inputs + *visit;
    job->hidden = s->hidden.rows + *visit;
    for (size_t i = 0; i < n; i++, *offset += row_stride(job->gate.rows)) place_row(&s->hidden, *visit + i, *offset);
    *visit += n;
}

// Adds a job that every token visits: a dense layer, or the shared experts.
static void add_common_job(struct Session *s, const struct Blobs *blobs, size_t *visit, size_t *offset) {
    struct FeedForwardJob *job = &s->jobs[s->job_count++];
    size_t first = *visit;
    *job = make_job(blobs, 0);
    place_job(s, job, s->n, visit, offset);
    for (size_t t = 0; t < s->n; t++) {
        s->job_tokens[first + t] = (uint32_t)t;
        s->job_weights[first + t] = 1;
        s->job_inputs[first + t] = s->input.rows[t];
    }
}

// Sorts the micro-batch's tokens by expert and makes the layer's jobs. One thread calls it.
static void plan_jobs(struct Session *s, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t visit = 0, offset = 0;
    s->job_count = 0;
    if (!l->routed) {
        add_common_job(s, &l->dense, &visit, &offset);
    } else {
        size_t per_token = c->num_experts_per_tok, experts = c->n_routed_experts;
        const uint32_t *ids = s->expert_ids + layer * s->options.batch * per_token;
        const float *weights = s->expert_weights + layer * s->options.batch * per_token;
        // Counting sort: visits of each expert, then the place of its next one.
        size_t *next = s->expert_visits;
        memset(next, 0, (experts + 1) * sizeof *next);
        for (size_t i = 0; i < s->n * per_token; i++) next[ids[i]]++;
        for (size_t e = 0; e < experts; e++) {
            size_t n = next[e];
            next[e] = visit;
            if (!n) continue;
            struct FeedForwardJob *job = &s->jobs[s->job_count++];
            *job = make_job(&l->experts, e);
            place_job(s, job, n, &visit, &offset);
        }
        for (size_t i = 0; i < s->n * per_token; i++) {
            size_t place = next[ids[i]]++, token = i / per_token;
            s->job_tokens[place] = (uint32_t)token;
            s->job_weights[place] = weights[i];
            s->job_inputs[place] = s->input.rows[token];
        }
        if (c->n_shared_experts) add_common_job(s, &l->shared, &visit, &offset);
    }
    s->hidden_rows = visit;
}

// hidden = silu(gate * x) * (up * x) of all jobs. All threads call it.
static void run_gate_up(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    size_t total = 0, item;
    for (size_t j = 0; j < s->job_count; j++) total += ceil_div(panel_count(&s->jobs[j].gate), panels_per_item(s->jobs[j].gate.dtype, s->n));
    struct Items items = share_items(s, thread, total);
    while (next_item(&items, &item)) {
        const struct FeedForwardJob *job = s->jobs;
        size_t width = panels_per_item(job->gate.dtype, s->n), first = item;
        for (size_t here; first >= (here = ceil_div(panel_count(&job->gate), width)); first -= here) {
            job++;
            width = panels_per_item(job->gate.dtype, s->n);
        }
        size_t panels = min_size(width, panel_count(&job->gate) - first * width), columns = panels * PANEL_ROWS;
        multiply_tile(s, w, &job->gate, first * width, panels, job->inputs, job->n, w->gate_tile);
        multiply_tile(s, w, &job->up, first * width, panels, job->inputs, job->n, w->up_tile);
        s->kernels->silu_multiply(w->gate_tile, w->up_tile, job->n * columns);
        size_t first_row = first * width * PANEL_ROWS, rows = min_size(columns, job->gate.rows - first_row);
        for (size_t i = 0; i < job->n; i++)
            memcpy(row_values(&s->hidden, (size_t)(job->hidden - s->hidden.rows) + i) + first_row, w->gate_tile + i * columns, rows * sizeof(float));
    }
}

static void quantize_hidden(struct Session *s, int thread) {
    for (size_t j = 0, row = 0; j < s->job_count; j++)
        for (size_t i = 0; i < s->jobs[j].n; i++, row++)
            if (row % (size_t)s->team->threads == (size_t)thread) quantize_activations(s, &s->hidden, row, s->jobs[j].gate.rows);
}

// x += sum over the jobs of weight * (down * hidden). An item is some rows of the result and goes through the jobs in
// order, so that every sum has one order of additions. All threads call it.
static void run_down(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    size_t hidden = s->model->config.hidden_size, panels_in_all = ceil_div(hidden, PANEL_ROWS), item;
    size_t width = panels_per_item(s->jobs[0].down.dtype, s->n);
    struct Items items = share_items(s, thread, ceil_div(panels_in_all, width));
    while (next_item(&items, &item)) {
        size_t panels = min_size(width, panels_in_all - item * width), columns = panels * PANEL_ROWS;
        size_t first_row = item * width * PANEL_ROWS, rows = min_size(columns, hidden - first_row);
        for (size_t j = 0; j < s->job_count; j++) {
            const struct FeedForwardJob *job = &s->jobs[j];
            multiply_tile(s, w, &job->down, item * width, panels, job->hidden, job->n, w->gate_tile);
            for (size_t i = 0; i < job->n; i++) {
                float *x = s->x + job->tokens[i] * hidden + first_row;
                for (size_t r = 0; r < rows; r++) x[r] += job->weights[i] * w->gate_tile[i * columns + r];
            }
        }
    }
}

// ====================================================================================================================
// forward: tokens to logits
// ====================================================================================================================

static void run_attention(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t heads = c->num_attention_heads, q_width = heads * query_dim(c), attended = heads * value_dim(c);
    if (is_mla(c)) {
        struct Product q_full = {&l->q_b, s->input.rows, s->q, q_width, NULL, false};
        struct Product q_down = {&l->q_a, s->input.rows, s->q_latent, c->q_lora_rank, NULL, false};
        struct Product kv_down = {&l->kv_a, s->input.rows, s->kv_latent, cache_key_dim(c), NULL, false};
        multiply(s, thread, (struct Product[]){c->q_lora_rank ? q_down : q_full, kv_down}, 2, s->n);
        team_barrier(s->team);
        store_latents(s, thread, layer);
        team_barrier(s->team);
        if (c->q_lora_rank) {
            multiply(s, thread, &(struct Product){&l->q_b, s->latent.rows, s->q, q_width, NULL, false}, 1, s->n);
            team_barrier(s->team);
        }
        if (s->n < s->expand_tokens) attend_mla_absorbed(s, thread, layer);
        else attend_mla_expanded(s, thread, layer);
    } else {
        size_t kv_width = (size_t)c->num_key_value_heads * c->head_dim;
        multiply(s, thread, (struct Product[]){{&l->q, s->input.rows, s->q, q_width, l->q_bias, false},
                                               {&l->k, s->input.rows, s->k, kv_width, l->k_bias, false},
                                               {&l->v, s->input.rows, s->v, kv_width, l->v_bias, false}}, 3, s->n);
        team_barrier(s->team);
        store_keys_values(s, thread, layer);
        team_barrier(s->team);
        attend_gqa(s, thread, layer);
    }
    team_barrier(s->team);
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) quantize_activations(s, &s->attended, t, attended);
    team_barrier(s->team);
    multiply(s, thread, &(struct Product){&l->o, s->attended.rows, s->x, c->hidden_size, NULL, true}, 1, s->n);
    team_barrier(s->team);
}

static void run_feed_forward(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    if (l->routed) {
        multiply(s, thread, &(struct Product){&l->router, s->input.rows, s->router_logits, c->n_routed_experts, NULL, false}, 1, s->n);
        team_barrier(s->team);
        for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) {
            size_t at = (layer * s->options.batch + t) * c->num_experts_per_tok;
            select_experts(c, l->router_bias, s->router_logits + t * c->n_routed_experts, s->expert_ids + at, s->expert_weights + at);
        }
        team_barrier(s->team);
    }
    if (thread == 0) plan_jobs(s, layer);
    team_barrier(s->team);
    run_gate_up(s, thread);
    team_barrier(s->team);
    quantize_hidden(s, thread);
    team_barrier(s->team);
    run_down(s, thread);
    team_barrier(s->team);
}

// Normalises every token's x into `input`.
static void norm_tokens(struct Session *s, int thread, const float *weight) {
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads)
        norm_input(s, t, s->x + t * s->model->config.hidden_size, weight);
    team_barrier(s->team);
}

// What each thread does for one micro-batch.
static void run_forward(void *argument, int thread) {
    struct Session *s = argument;
    const struct Model *model = s->model;
    size_t hidden = model->config.hidden_size, vocab = model->config.vocab_size;
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) {
        read_row(&model->embedding, s->tokens[t], s->x + t * hidden);
        fill_rope_row(s, t);
    }
    team_barrier(s->team);
    for (size_t layer = 0; layer < model->config.num_hidden_layers; layer++) {
        norm_tokens(s, thread, model->layers[layer].input_norm);
        run_attention(s, thread, layer);
        norm_tokens(s, thread, model->layers[layer].post_attention_norm);
        run_feed_forward(s, thread, layer);
    }
    if (s->wanted == LOGITS_NONE) return;
    norm_tokens(s, thread, model->final_norm);
    size_t first = s->wanted == LOGITS_ALL ? 0 : s->n - 1;
    multiply(s, thread, &(struct Product){&model->head, s->input.rows + first, s->logits, vocab, NULL, false}, 1, s->n - first);
}

// Evaluates n tokens (1 to options.batch, position + n <= options.context, ids below vocab_size) and moves position on.
// With LOGITS_LAST, row 0 of s->logits holds the last token's, with LOGITS_ALL (logits_rows >= n) row t token t's.
static void forward(struct Session *s, const uint32_t *tokens, size_t n, enum LogitsWanted wanted) {
    s->tokens = tokens;
    s->n = n;
    s->wanted = wanted;
    team_run(s->team, run_forward, s);
    s->position += n;
}

// Evaluates any number of tokens in micro-batches; logits of the last one.
static void prefill(struct Session *s, const uint32_t *tokens, size_t n) {
    for (size_t done = 0; done < n;) {
        size_t step = min_size(s->options.batch, n - done);
        forward(s, tokens + done, step, done + step == n ? LOGITS_LAST : LOGITS_NONE);
        done += step;
    }
}

static void count_matrix(const struct Matrix *m, double times, double *weights, double *bytes) {
    *weights += times * (double)m->rows * (double)m->cols;
    *bytes += times * (double)matrix_bytes(m->dtype, m->rows, m->cols);
}

// Weights that one token multiplies, without the head and the embedding; adds what they take to *bytes.
static double count_active(const struct Model *model, double *bytes) {
    const struct ModelConfig *c = &model->config;
    double weights = 0;
#define COUNT(matrix, times) count_matrix(&(matrix), (double)(times), &weights, bytes)
    for (size_t i = 0; i < c->num_hidden_layers; i++) {
        const struct Layer *l = &model->layers[i];
        COUNT(l->o, 1);
        if (is_mla(c)) {
            if (c->q_lora_rank) COUNT(l->q_a, 1);
            COUNT(l->q_b, 1);
            COUNT(l->kv_a, 1);
            COUNT(l->key_transposed.part[0], c->num_attention_heads);
            COUNT(l->value.part[0], c->num_attention_heads);
        } else {
            COUNT(l->q, 1);
            COUNT(l->k, 1);
            COUNT(l->v, 1);
        }
        for (int part = GATE; part <= DOWN; part++) {
            if (!l->routed) COUNT(l->dense.part[part], 1);
            if (l->routed) COUNT(l->experts.part[part], c->num_experts_per_tok);
            if (l->routed && c->n_shared_experts) COUNT(l->shared.part[part], 1);
        }
        if (l->routed) COUNT(l->router, 1);
    }
#undef COUNT
    return weights;
}

// Multiply-adds of one token of prefill, without the head.
static double active_weights(const struct Model *model) {
    double bytes = 0;
    return count_active(model, &bytes);
}

// Bytes of weights that decoding one token reads: the active experts, the head, of the embedding one row.
static double active_bytes(const struct Model *model) {
    double bytes = 0, ignored = 0;
    count_active(model, &bytes);
    count_matrix(&model->head, 1, &ignored, &bytes);
    return bytes + (double)model->embedding.panel_bytes / PANEL_ROWS;
}

// ====================================================================================================================
// Sampling
//
// The next token: the largest logit at temperature 0, else a draw from the softmax of logits / temperature, cut by top-k,
// top-p (nucleus) and min-p. The generator is part of the program, so a seed gives the same text everywhere.
// ====================================================================================================================

struct Candidate {
    float probability;            // not normalised
    uint32_t token;
};

struct Sampler {
    size_t vocab;
    float temperature;            // 0: always the largest logit
    float top_p, min_p;           // 1 and 0 switch them off
    size_t top_k;                 // 0: off
    uint64_t state;
    struct Candidate *candidates; // [vocab]
};

static void sampler_init(struct Sampler *sampler, size_t vocab, float temperature, float top_p, float min_p, size_t top_k, uint64_t seed) {
    *sampler = (struct Sampler){.vocab = vocab, .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k, .state = seed};
    sampler->candidates = allocate(vocab * sizeof *sampler->candidates);
}

static void sampler_free(struct Sampler *sampler) { free(sampler->candidates); }

// SplitMix64 (Steele, Lea, Flood 2014): the next number, uniform in [0, 1).
static double draw_uniform(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}

// Most probable first; equal ones by id, so that the order never depends on the sorting.
static int compare_candidates(const void *a, const void *b) {
    const struct Candidate *x = a, *y = b;
    if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
    return x->token < y->token ? -1 : 1;
}

static uint32_t sample_token(struct Sampler *sampler, const float *logits) {
    uint32_t best = find_largest(logits, sampler->vocab);
    if (sampler->temperature <= 0) return best;
    // What is below the cutoff can be left out before sorting: min_p says so, or all of it together weighs less than
    // the 1 - top_p that the nucleus drops anyway.
    float maximum = logits[best], cutoff = sampler->min_p;
    if (sampler->top_p < 1) cutoff = fmaxf(cutoff, (1 - sampler->top_p) / (float)sampler->vocab);
    size_t count = 0;
    double total = 0;
    for (size_t i = 0; i < sampler->vocab; i++) {
        float probability = expf((logits[i] - maximum) / sampler->temperature);
        total += probability;
        if (probability >= cutoff && probability > 0) sampler->candidates[count++] = (struct Candidate){probability, (uint32_t)i};
    }
    qsort(sampler->candidates, count, sizeof *sampler->candidates, compare_candidates);
    if (sampler->top_k && sampler->top_k < count) {
        count = sampler->top_k;
        total = 0;
        for (size_t i = 0; i < count; i++) total += sampler->candidates[i].probability;
    }
    double kept = 0;
    size_t end = 0;
    while (end < count && kept < sampler->top_p * total) kept += sampler->candidates[end++].probability;
    double target = draw_uniform(&sampler->state) * kept;
    for (size_t i = 0; i + 1 < end; i++) {
        target -= sampler->candidates[i].probability;
        if (target < 0) return sampler->candidates[i].token;
    }
    return end ? sampler->candidates[end - 1].token : best;
}

