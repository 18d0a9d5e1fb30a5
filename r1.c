// r1.c: runs DeepSeek-R1 and its family on a CPU.
//
// The whole engine is this one file, to be read from top to bottom: helpers, threads, the .r1 file, the kernels in
// portable C, norms and RoPE, attention, router and experts, forward, sampling. Then come the commands and what they
// need: options, synthetic models, bench, perplexity, generation of text, and main.
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
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "convert/format.h"
#include "convert/shapes.h"
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
    struct rlimit limit;          // `ulimit -v`
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur < bytes) bytes = limit.rlim_cur;
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
    int spins;                    // how often a waiting thread looks before it lets others run
    void (*job)(void *argument, int thread);
    void *argument;
    // Each on a cache line of its own: threads that spin on one must not slow down writers of another.
    _Alignas(64) atomic_uint job_number;   // counts up with every job posted
    _Alignas(64) atomic_uint arrived;      // threads at the barrier
    _Alignas(64) atomic_uint epoch;        // barriers passed
    _Alignas(64) atomic_bool ended;
    struct { _Alignas(64) atomic_uint_least64_t next; } shares[MAX_THREADS];   // of each thread: see share_items()
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
static void wait_for_change(const struct Team *team, atomic_uint *value, unsigned old) {
    for (int looks = 0; atomic_load_explicit(value, memory_order_acquire) == old; looks++) {
        if (looks < team->spins) spin_pause();
        else if (looks < 65536) sched_yield();
        else nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
}

static void team_barrier(struct Team *team) {
    unsigned epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)team->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->epoch, epoch + 1, memory_order_release);
    } else {
        wait_for_change(team, &team->epoch, epoch);
    }
}

// Runs job(argument, thread) on every thread of the team and returns when all are done.
static void team_run(struct Team *team, void (*job)(void *argument, int thread), void *argument) {
    team->job = job;
    team->argument = argument;
    atomic_fetch_add_explicit(&team->job_number, 1, memory_order_release);
    job(argument, 0);
    team_barrier(team);
}

static void team_work(struct Team *team, int thread) {
    for (unsigned seen = 0;; seen++) {
        wait_for_change(team, &team->job_number, seen);
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

// The items of a step as a thread takes them: its own share in order, so that it reads memory as one stream, and then what
// the others have not got to yet, since a thread whose processor is taken away for a while must not keep all waiting.
// A counter holds the number of the step (the team's epoch) in its upper half and the next item in its lower one, and is set
// for a step by whoever looks at it first.
struct Items {
    struct Team *team;
    int owner, left;              // whose share is being worked off, and how many shares are left
    size_t count;
    uint64_t step;
};

// `count` items, below 2^32, dealt out among the threads. Between two steps there must be a barrier.
static struct Items share_items(struct Team *team, int thread, size_t count) {
    uint64_t epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    return (struct Items){.team = team, .owner = thread, .left = team->threads, .count = count, .step = epoch << 32};
}

// The next item in *item; false when there are no more.
static bool next_item(struct Items *items, size_t *item) {
    for (; items->left; items->left--, items->owner = (items->owner + 1) % items->team->threads) {
        atomic_uint_least64_t *next = &items->team->shares[items->owner].next;
        size_t first, end;
        static_share(items->team, items->owner, items->count, &first, &end);
        uint_least64_t seen = atomic_load_explicit(next, memory_order_relaxed);
        if (seen >> 32 != items->step >> 32)
            atomic_compare_exchange_strong_explicit(next, &seen, items->step | first, memory_order_relaxed, memory_order_relaxed);
        *item = (uint32_t)atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        if (*item < end) return true;
    }
    return false;
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
    atomic_store(&team->epoch, 1);   // no counter of items is of this step yet
    openblas_set_num_threads(1);   // OpenBLAS is called from inside our own threads, one at a time each
    omp_set_dynamic(0);
    int cpus[MAX_THREADS], cores = list_physical_cores(cpus, MAX_THREADS);
    team->spins = threads <= cores ? 4096 : 0;   // with fewer cores than threads, the one waited for may not be running
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

// A matrix as panels: see format.h.
struct Matrix {
    const uint8_t *data;
    uint32_t dtype;
    size_t rows, cols;
    size_t panel_step;            // bytes from one panel of 32 rows to the next
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
        if (i == 1 && (entry->rows[1] != entry->rows[0] || entry->cols[1] != entry->cols[0]))
            return fail(error, "tensor %s: gate and up differ in shape", name);
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
        .panel_step = panel_step(entry, part),
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
        int length = (int)strlen(path);
        while (length > 1 && path[length - 1] == '/') length--;
        if (access(config, R_OK) == 0)
            return fail(error, "%s: a Hugging Face directory, not an .r1 file; convert it first: r1-convert %.*s %.*s.r1", path, length, path,
                        (int)min_size((size_t)length, 200), path);
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

// One token's input of a matrix product. Integer weights (q8, q4, q6) take the quantised form, float weights the values.
struct Row {
    const float *values;          // [cols]
    const int8_t *quants;         // [cols]            values = quants * scales[column / 256]
    const float *scales;          // [ceil(cols/256)]
    const int32_t *sums;          // [cols / 32]       sum of each 32 quants
    const int32_t *block_sums;    // [ceil(cols/256)]  and of each 256
};

// One panel times n tokens (1 to TILE_TOKENS): out[t][r] = sum over k of weight(r, k) * x[t](k), t < n, r < 32.
typedef void PanelProduct(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out);

// Many tokens take an integer panel in two steps, so that decoding its weights is paid once for all of them. Unpacking
// turns columns [first, first + depth) of a panel, first a multiple of 256, into one byte a weight, [depth/4][32][4], and
// one scale for each row and 256 columns, [ceil(depth/256)][32]. The bytes are int8 in whatever disguise suits the
// instruction set: only multiply_unpacked() of the same table looks at them.
typedef void PanelUnpacking(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales);

struct Kernels {
    const char *name;
    PanelProduct *product[DTYPE_COUNT];   // by dtype
    PanelUnpacking *unpack[DTYPE_COUNT];  // of q8, q4 and q6
    // out[t * stride + r] += sum over `depth` unpacked columns k of weight(r, k) * x[t](first + k), for any n.
    void (*multiply_unpacked)(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x, size_t first, size_t n,
                              float *out, size_t stride);
    // Quantises a k-block of up to 256 columns (a multiple of 32): *scale = max|x| / 127, the nearest integers, the sums of
    // each 32, and in *block_sum of all. Not-a-number in x gives numbers out, never undefined behaviour.
    void (*quantize_block)(const float *x, size_t cols, int8_t *quants, float *scale, int32_t *sums, int32_t *block_sum);
    // rotate_columns() of format.h.
    void (*rotate_columns)(const float *x, size_t n, float *out);
    // Sum of x[i] * y[i].
    float (*dot)(const float *x, const float *y, size_t n);
    // scores[j] = dot(q, rows[j]) for `count` rows of `cols` floats, row_stride floats apart.
    void (*score_rows)(const float *q, const float *rows, size_t row_stride, size_t count, size_t cols, float *scores);
    // out[c] += sum over j of weights[j] * rows[j][c].
    void (*mix_rows)(const float *weights, const float *rows, size_t row_stride, size_t count, size_t cols, float *out);
    // The largest of n numbers, -infinity of none.
    float (*find_maximum)(const float *x, size_t n);
    // Quantises 32 columns of x [rows][32], each with a scale of its own: what a block of 256 positions of a q8 cache holds
    // of keys (rows <= 256, a multiple of 32: a k-block of a q8 panel) and of values (its place is that of positions first
    // to first + 31; rows a multiple of 32).
    void (*quantize_keys)(const float *x, size_t rows, uint8_t *block);
    void (*quantize_values)(const float *x, size_t rows, size_t first, float *scales, uint8_t *panels);
    // x[i] = exp(x[i] - maximum); returns their sum.
    float (*exp_row)(float *x, float maximum, size_t n);
    // gate[i] = silu(gate[i]) * up[i], silu(g) = g / (1 + exp(-g)).
    void (*silu_multiply)(float *gate, const float *up, size_t n);
    // Half-precision cache rows.
    void (*half_to_float)(const uint16_t *half, float *out, size_t n);
    void (*float_to_half)(const float *x, uint16_t *half, size_t n);
    // What `r1 bench` measures the processor's limits with: reads `count` bytes (a multiple of 256) and makes one number of
    // them; multiplies and adds int8 numbers that stand in registers, macs_per_round of them in a round.
    uint64_t (*read_probe)(const uint8_t *bytes, size_t count);
    void (*multiply_probe)(uint64_t rounds);
    double macs_per_round;
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

static void product_q6(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    for (size_t t = 0; t < n; t++) {
        const uint8_t *block = panel;
        float sum[PANEL_ROWS] = {0};
        for (size_t first = 0; first < cols; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, cols - first);
            const float *scales = (const float *)(const void *)block;             // [32]
            const uint8_t *w = block + block_head_bytes(DTYPE_Q6, length);        // [length/16][384]
            const int8_t *q = x[t].quants + first;
            float x_scale = x[t].scales[first / K_BLOCK];
            int32_t part[PANEL_ROWS] = {0};
            for (size_t k = 0; k < length; k++)
                for (size_t r = 0; r < PANEL_ROWS; r++) part[r] += q6_value(w, r, k) * q[k];
            for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += (float)part[r] * (scales[r] * x_scale);
            block = w + value_bytes(DTYPE_Q6, length);
        }
        memcpy(out + t * PANEL_ROWS, sum, sizeof sum);
    }
}

// ---- products of many tokens

static void unpack_q8(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const uint8_t *block = panel + first / K_BLOCK * (block_head_bytes(DTYPE_Q8, K_BLOCK) + value_bytes(DTYPE_Q8, K_BLOCK));
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        memcpy(bytes, block + block_head_bytes(DTYPE_Q8, length), length * PANEL_ROWS);
        block += block_head_bytes(DTYPE_Q8, length) + value_bytes(DTYPE_Q8, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

// A row's largest sub-scale in a block becomes the scale of the whole block: the values of its group stay as they are,
// those of the others are rounded to 8 bits in its measure, a small part of what 4 bits have lost already. The ratios of
// the sub-scales are fixed-point numbers of 15 bits.
static void unpack_q4(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const float *row_scales = (const float *)(const void *)panel;
    const uint8_t *block = panel + panel_head_bytes(DTYPE_Q4) +
                           first / K_BLOCK * (block_head_bytes(DTYPE_Q4, K_BLOCK) + value_bytes(DTYPE_Q4, K_BLOCK));
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        const uint8_t *w = block + block_head_bytes(DTYPE_Q4, length);
        for (size_t r = 0; r < PANEL_ROWS; r++) {
            int largest = 0;
            for (size_t k = 0; k < length; k += K_GROUP) {
                int magnitude = abs((int8_t)(block[k / K_GROUP * PANEL_ROWS + r] & 0xfe));
                largest = magnitude > largest ? magnitude : largest;
            }
            scales[r] = row_scales[r] * (float)largest;
            float inverse = largest ? 32767.0f / (float)largest : 0;
            for (size_t k = 0; k < length; k++) {
                uint8_t pair = w[k / 8 * 4 * PANEL_ROWS + r * 4 + k % 4], sub = block[k / K_GROUP * PANEL_ROWS + r];
                int value = Q4_TABLE[k % 8 < 4 ? pair & 15 : pair >> 4] + (sub & 1 ? Q4_SHIFT : 0);
                int ratio = (int)lrintf((float)(int8_t)(sub & 0xfe) * inverse);
                bytes[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4] = (uint8_t)((value * ratio + 0x4000) >> 15);
            }
        }
        block = w + value_bytes(DTYPE_Q4, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

static void unpack_q6(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const uint8_t *block = panel + first / K_BLOCK * (block_head_bytes(DTYPE_Q6, K_BLOCK) + value_bytes(DTYPE_Q6, K_BLOCK));
    for (size_t start = first; start < first + depth; start += K_BLOCK) {
        size_t length = min_size(K_BLOCK, cols - start);
        const uint8_t *w = block + block_head_bytes(DTYPE_Q6, length);
        memcpy(scales, block, PANEL_ROWS * sizeof *scales);
        for (size_t k = 0; k < length; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) bytes[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4] = (uint8_t)q6_value(w, r, k);
        block = w + value_bytes(DTYPE_Q6, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

static void multiply_unpacked(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x, size_t first, size_t n,
                              float *out, size_t stride) {
    for (size_t start = 0; start < depth; start += K_BLOCK, scales += PANEL_ROWS)
        for (size_t t = 0; t < n; t++) {
            const int8_t *w = (const int8_t *)bytes + start * PANEL_ROWS, *q = x[t].quants + first + start;
            int32_t part[PANEL_ROWS] = {0};
            for (size_t k = 0; k < min_size(K_BLOCK, depth - start); k += 4)
                for (size_t r = 0; r < PANEL_ROWS; r++)
                    for (size_t j = 0; j < 4; j++) part[r] += w[k * PANEL_ROWS + r * 4 + j] * q[k + j];
            float x_scale = x[t].scales[(first + start) / K_BLOCK];
            for (size_t r = 0; r < PANEL_ROWS; r++) out[t * stride + r] += (float)part[r] * (scales[r] * x_scale);
        }
}

// ---- everything else
// The bodies are inlined into each instruction set's own functions, where the compiler makes vector code of them.

INLINE void quantize_block_body(const float *x, size_t cols, int8_t *quants, float *scale, int32_t *sums, int32_t *block_sum) {
    float largest = 0;
    for (size_t k = 0; k < cols; k++) {
        float magnitude = fabsf(x[k]);
        largest = magnitude > largest ? magnitude : largest;
    }
    *scale = largest < INFINITY ? largest / 127.0f : 0.0f;
    float inverse = *scale > 1e-38f ? 1.0f / *scale : 0.0f;
    if (!(inverse > 0)) *scale = 0;
    *block_sum = 0;
    for (size_t group = 0; group < cols; group += K_GROUP) {
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
        *block_sum += sum;
    }
}

INLINE void rotate_columns_body(const float *x, size_t n, float *out) { rotate_columns(x, n, out); }

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

INLINE float find_maximum_body(const float *x, size_t n) {
    float largest[16], all = -INFINITY;
    for (size_t i = 0; i < 16; i++) largest[i] = -INFINITY;
    for (; n >= 16; n -= 16, x += 16)
        for (size_t i = 0; i < 16; i++) largest[i] = x[i] > largest[i] ? x[i] : largest[i];
    for (size_t i = 0; i < n; i++) largest[i] = x[i] > largest[i] ? x[i] : largest[i];
    for (size_t i = 0; i < 16; i++) all = largest[i] > all ? largest[i] : all;
    return all;
}

// The scales that bring the largest of each column to 127, and their inverses.
INLINE void scale_columns(const float *x, size_t rows, float *scales, float *inverses) {
    float largest[PANEL_ROWS] = {0};
    for (size_t k = 0; k < rows; k++)
#pragma omp simd
        for (size_t r = 0; r < PANEL_ROWS; r++) {
            float magnitude = fabsf(x[k * PANEL_ROWS + r]);
            largest[r] = magnitude > largest[r] ? magnitude : largest[r];
        }
#pragma omp simd
    for (size_t r = 0; r < PANEL_ROWS; r++) {
        bool usable = largest[r] > 1e-35f && largest[r] < INFINITY;
        scales[r] = usable ? largest[r] / 127.0f : 0.0f;
        inverses[r] = usable ? 127.0f / largest[r] : 0.0f;
    }
}

// To the nearest of -127 to 127 (a not-a-number to one of them), as the low byte of a number.
INLINE uint32_t quantize_value(float x, float inverse) {
    float scaled = x * inverse;
    scaled = scaled > -127.0f ? scaled : -127.0f;
    scaled = scaled < 127.0f ? scaled : 127.0f;
    return bits_from_float(scaled + 12582912.0f) & 0xff;
}

INLINE void quantize_keys_body(const float *x, size_t rows, uint8_t *block) {
    float inverses[PANEL_ROWS];
    scale_columns(x, rows, (float *)(void *)block, inverses);
    uint32_t *four = (uint32_t *)(void *)(block + block_head_bytes(DTYPE_Q8, rows));   // [rows/4][32][4]
    for (size_t k = 0; k < rows; k += 4, four += PANEL_ROWS, x += 4 * PANEL_ROWS)
#pragma omp simd
        for (size_t r = 0; r < PANEL_ROWS; r++)
            four[r] = quantize_value(x[r], inverses[r]) | quantize_value(x[PANEL_ROWS + r], inverses[r]) << 8 |
                      quantize_value(x[2 * PANEL_ROWS + r], inverses[r]) << 16 | quantize_value(x[3 * PANEL_ROWS + r], inverses[r]) << 24;
}

INLINE void quantize_values_body(const float *x, size_t rows, size_t first, float *scales, uint8_t *panels) {
    float inverses[PANEL_ROWS];
    scale_columns(x, rows, scales + first, inverses);
    for (size_t d = 0; d < rows; d++) {
        uint8_t *panel = panels + d / PANEL_ROWS * panel_bytes(DTYPE_Q8, K_BLOCK);
        uint8_t *out = panel + block_head_bytes(DTYPE_Q8, K_BLOCK) + first * PANEL_ROWS + d % PANEL_ROWS * 4;   // [64][32][4]
        uint8_t quants[PANEL_ROWS];
#pragma omp simd
        for (size_t r = 0; r < PANEL_ROWS; r++) quants[r] = (uint8_t)quantize_value(x[d * PANEL_ROWS + r], inverses[r]);
        for (size_t r = 0; r < PANEL_ROWS; r += 4) memcpy(out + r * PANEL_ROWS, quants + r, 4);
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

typedef uint64_t WideVector __attribute__((vector_size(64), may_alias));

INLINE uint64_t read_probe_body(const uint8_t *bytes, size_t count) {
    WideVector a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < count; i += 256) {
        const WideVector *at = (const WideVector *)(const void *)(bytes + i);
        a ^= at[0], b ^= at[1], c ^= at[2], d ^= at[3];
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

// What a compiler makes of plain C.
#define PORTABLE_PROBE_MACS 1024
static void multiply_probe_portable(uint64_t rounds) {
    static const int8_t zeros[PORTABLE_PROBE_MACS];
    for (; rounds; rounds--) {
        int32_t sum = 0;
        const int8_t *x = zeros;
        __asm__ volatile("" : "+r"(x));   // so that no round is left out, nor its result
        for (size_t i = 0; i < PORTABLE_PROBE_MACS; i++) sum += x[i] * x[PORTABLE_PROBE_MACS - 1 - i];
        __asm__ volatile("" : : "r"(sum));
    }
}

static const struct Kernels portable_kernels = {
    .name = "portable",
    .product = {[DTYPE_F32] = product_f32, [DTYPE_BF16] = product_bf16, [DTYPE_F8] = product_f8, [DTYPE_Q8] = product_q8,
                [DTYPE_Q4] = product_q4, [DTYPE_Q6] = product_q6},
    .unpack = {[DTYPE_Q8] = unpack_q8, [DTYPE_Q4] = unpack_q4, [DTYPE_Q6] = unpack_q6},
    .multiply_unpacked = multiply_unpacked,
    .quantize_block = quantize_block_body,
    .rotate_columns = rotate_columns_body,
    .dot = dot_body,
    .score_rows = score_rows_body,
    .mix_rows = mix_rows_body,
    .find_maximum = find_maximum_body,
    .quantize_keys = quantize_keys_body,
    .quantize_values = quantize_values_body,
    .exp_row = exp_row_body,
    .silu_multiply = silu_multiply_body,
    .half_to_float = half_to_float_body,
    .float_to_half = float_to_half_body,
    .read_probe = read_probe_body,
    .multiply_probe = multiply_probe_portable,
    .macs_per_round = PORTABLE_PROBE_MACS,
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
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
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

#define EXACT_TOKENS 16           // batches up to this size give the same bits as single tokens
#define GEMM_PANELS 4             // panels of one OpenBLAS product: 128 rows
#define GEMM_COLUMNS (GEMM_PANELS * PANEL_ROWS)
#define GEMM_DEPTH 512            // columns of one OpenBLAS product, or of the panels unpacked at a time
#define HIDDEN_TOKENS 256         // tokens for which 256 columns of a feed-forward network's middle are computed at a time
#define ATTENTION_CHUNK 64        // positions of a float cache that attention takes at a time, always from a multiple of it
#define MAX_KEY_COLS 5120         // of a cache: 4096 + 1024 of MLA (format.h's limits)
#define CACHE_BLOCK 256           // positions of a block of a q8 cache
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
    int32_t *sums, *block_sums;
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
    float *gate_tile;             // [4][batch][32] results of a product, or [8][256][32]
    float *up_tile;               // [4][256][32]
    float *gemm_weights;          // [512][128]
    uint8_t *unpacked;            // [512/4][32][4]
    float *unpacked_scales;       // [2][32]
    float *gemm_inputs;           // [batch][512]
    float *gemm_tile;             // [batch][128]
    struct Activations queries;   // [256][query dim, or kv_lora_rank + rope]
    float *mixed;                 // [256][value dim, or kv_lora_rank]
    float *scores;                // [256][64], of a q8 cache [256][256]
    struct Activations shares;    // [256][256] q8 cache: the softmax of the scores
    float *maxima, *sums;         // [max(256, batch)] of the softmax of each query
    float *keys, *values;         // [64][dim] a piece of the cache as floats
    float *latents;               // [64][kv_lora_rank + rope] MLA: the piece before it is expanded
    float *key_factor;            // [kv_lora_rank][nope] MLA: a head's factors as floats
    float *value_factor;          // [kv_lora_rank][v_head_dim]
    // MLA with a q8 cache, where keys and values are expanded
    struct Activations factors;   // [nope + v_head_dim][kv_lora_rank] a head's factors, quantised
    float *expanded;              // [nope + rope + v_head_dim][32] keys and values of 32 positions
    uint8_t *block_keys, *block_values;   // a block like one of the cache
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
    bool integer_weights;         // some matrix is q8, q4 or q6: inputs are quantised too
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
    size_t key_row_bytes, value_row_bytes;   // of one position and head, or of 256 in a q8 cache
    size_t cache_values, cache_layer_bytes;  // where a layer's values begin, and its end

    struct Worker *workers;       // [threads]
    void *arena;
    size_t arena_bytes;
};

struct MemoryPlan {
    uint64_t weights, cache, scratch;   // bytes
};

static size_t cache_row_bytes(enum CacheType type, size_t cols) { return type == CACHE_F32 ? cols * 4 : align_up(cols * 2, 4); }

// Values of a key and a value in the cache, per position and head of the cache. MLA keeps one latent with the rotated
// part of the key behind it, shared by all heads, and no values.
static size_t cache_heads(const struct ModelConfig *c) { return is_mla(c) ? 1 : c->num_key_value_heads; }
static size_t cache_key_dim(const struct ModelConfig *c) { return is_mla(c) ? (size_t)c->kv_lora_rank + c->qk_rope_head_dim : c->head_dim; }
static size_t cache_value_dim(const struct ModelConfig *c) { return is_mla(c) ? 0 : c->head_dim; }

// A q8 cache pads keys and values to multiples of 32, a latent and its rotated part each; the latents are kept twice, as
// keys and as values.
static size_t padded(size_t cols) { return align_up(cols, PANEL_ROWS); }
static size_t q8_key_cols(const struct ModelConfig *c) {
    return is_mla(c) ? padded(c->kv_lora_rank) + padded(c->qk_rope_head_dim) : padded(c->head_dim);
}
static size_t q8_value_cols(const struct ModelConfig *c) { return padded(is_mla(c) ? c->kv_lora_rank : c->head_dim); }
static size_t q8_expanded_key_cols(const struct ModelConfig *c) { return padded(c->qk_nope_head_dim) + padded(c->qk_rope_head_dim); }
static size_t key_block_bytes(size_t cols) { return CACHE_BLOCK / PANEL_ROWS * panel_bytes(DTYPE_Q8, cols); }
static size_t value_block_bytes(size_t cols) {
    return CACHE_BLOCK * sizeof(float) + cols / PANEL_ROWS * panel_bytes(DTYPE_Q8, CACHE_BLOCK);
}

struct Arena {
    uint8_t *base;                // NULL: only count
    size_t used;
};

static void *take(struct Arena *arena, size_t count, size_t size) {
    size_t offset = align_up(arena->used, 64);
    arena->used = offset + count * size;
    return arena->base ? arena->base + offset : NULL;
}

// Every row starts at a multiple of 256 values, so that its scales and sums have places of their own; an odd multiple, so
// that the rows of a product do not compete for the same places of a cache.
static size_t row_stride(size_t cols) { return align_up(cols, K_BLOCK) | K_BLOCK; }

static void take_activations(struct Arena *arena, struct Activations *out, size_t rows, size_t capacity) {
    out->capacity = capacity;
    out->rows = take(arena, rows, sizeof *out->rows);
    out->values = take(arena, capacity, sizeof *out->values);
    out->quants = take(arena, capacity, sizeof *out->quants);
    out->scales = take(arena, capacity / K_BLOCK, sizeof *out->scales);
    out->sums = take(arena, capacity / K_GROUP, sizeof *out->sums);
    out->block_sums = take(arena, capacity / K_BLOCK, sizeof *out->block_sums);
}

// Row `row` whose values start at `offset` (a multiple of 256).
static void place_row(struct Activations *a, size_t row, size_t offset) {
    a->rows[row] = (struct Row){a->values + offset, a->quants + offset, a->scales + offset / K_BLOCK, a->sums + offset / K_GROUP,
                                a->block_sums + offset / K_BLOCK};
}

// The values of a row, to be written.
static float *row_values(const struct Activations *a, size_t row) { return a->values + (a->rows[row].values - a->values); }

// What one thread needs.
static void lay_out_worker(const struct Session *s, struct Arena *arena, struct Worker *w) {
    const struct ModelConfig *c = &s->model->config;
    size_t batch = s->options.batch;
    size_t key = max_size(query_dim(c), cache_key_dim(c)), value = padded(max_size(value_dim(c), c->kv_lora_rank));
    size_t lora = c->kv_lora_rank, softmax_rows = max_size(ATTENTION_QUERIES, batch);
    bool expands_q8 = is_mla(c) && s->options.cache == CACHE_Q8;
    size_t query_rows = expands_q8 ? softmax_rows : ATTENTION_QUERIES, factor_rows = padded(c->qk_nope_head_dim) + padded(c->v_head_dim);
    w->gate_tile = take(arena, max_size(batch * GEMM_COLUMNS, min_size(batch, HIDDEN_TOKENS) * K_BLOCK), 4);
    w->up_tile = take(arena, min_size(batch, HIDDEN_TOKENS) * GEMM_COLUMNS, 4);
    w->gemm_weights = take(arena, GEMM_DEPTH * GEMM_COLUMNS, 4);
    w->unpacked = take(arena, GEMM_DEPTH * PANEL_ROWS, 1);
    w->unpacked_scales = take(arena, GEMM_DEPTH / K_BLOCK * PANEL_ROWS, 4);
    w->gemm_inputs = take(arena, batch * GEMM_DEPTH, 4);
    w->gemm_tile = take(arena, batch * GEMM_COLUMNS, 4);
    take_activations(arena, &w->queries, query_rows, query_rows * row_stride(max_size(key, q8_key_cols(c))));
    w->mixed = take(arena, query_rows * value, 4);
    w->scores = take(arena, ATTENTION_QUERIES * CACHE_BLOCK, 4);
    take_activations(arena, &w->shares, ATTENTION_QUERIES, ATTENTION_QUERIES * CACHE_BLOCK);
    w->maxima = take(arena, softmax_rows, 4);
    w->sums = take(arena, softmax_rows, 4);
    w->keys = take(arena, ATTENTION_CHUNK * key, 4);
    w->values = take(arena, ATTENTION_CHUNK * value, 4);
    w->latents = take(arena, is_mla(c) ? ATTENTION_CHUNK * key : 0, 4);
    w->key_factor = take(arena, lora * padded(c->qk_nope_head_dim), 4);
    w->value_factor = take(arena, lora * padded(c->v_head_dim), 4);
    take_activations(arena, &w->factors, expands_q8 ? factor_rows : 0, expands_q8 ? factor_rows * row_stride(lora) : 0);
    w->expanded = take(arena, expands_q8 ? (factor_rows + padded(c->qk_rope_head_dim)) * PANEL_ROWS : 0, 4);
    w->block_keys = take(arena, expands_q8 ? key_block_bytes(q8_expanded_key_cols(c)) : 0, 1);
    w->block_values = take(arena, expands_q8 ? value_block_bytes(padded(c->v_head_dim)) : 0, 1);
}

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
        struct Worker ignored;
        lay_out_worker(s, arena, s->workers ? &s->workers[i] : &ignored);
    }

    size_t rows = s->options.context;
    if (s->options.cache == CACHE_Q8) {
        rows = ceil_div(rows, CACHE_BLOCK);
        s->key_row_bytes = key_block_bytes(q8_key_cols(c));
        s->value_row_bytes = value_block_bytes(q8_value_cols(c));
    } else {
        s->key_row_bytes = cache_row_bytes(s->options.cache, cache_key_dim(c));
        s->value_row_bytes = cache_value_dim(c) ? cache_row_bytes(s->options.cache, cache_value_dim(c)) : 0;
    }
    s->cache_values = cache_heads(c) * rows * s->key_row_bytes;
    s->cache_layer_bytes = s->cache_values + cache_heads(c) * rows * s->value_row_bytes;
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
    for (int i = 0; i < team->threads; i++) {
        struct Worker *w = &s->workers[i];
        for (size_t row = 0; row < ATTENTION_QUERIES; row++) place_row(&w->shares, row, row * CACHE_BLOCK);
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
// A product of a matrix with the rows of a micro-batch is cut into items, dealt out among the threads. Up to 16 tokens go
// through the kernels' product() a panel at a time. More take four panels at a time, in pieces of 512 columns that stay
// in the caches: integer weights are unpacked for multiply_unpacked(), float weights for OpenBLAS.
// ====================================================================================================================

static bool uses_gemm(uint32_t dtype, size_t n) { return dtype <= DTYPE_F8 && n > EXACT_TOKENS; }

static struct Matrix blob_matrix(const struct Blobs *blobs, unsigned part, size_t index) {
    struct Matrix m = blobs->part[part];
    m.data += index * blobs->stride;
    return m;
}

// Reads one row of a matrix as floats: an embedding.
static void read_row(const struct Matrix *m, size_t row, float *out) {
    const uint8_t *panel = m->data + row / PANEL_ROWS * m->panel_step;
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
            case DTYPE_Q6: *value = scales[r] * (float)q6_value(w, r, k); break;
            default: {
                uint8_t pair = w[k / 8 * 4 * PANEL_ROWS + r * 4 + k % 4], sub = block[k / K_GROUP * PANEL_ROWS + r];
                int table = Q4_TABLE[k % 8 < 4 ? pair & 15 : pair >> 4] + (sub & 1 ? Q4_SHIFT : 0);
                *value = ((const float *)(const void *)panel)[r] * (float)((int8_t)(sub & 0xfe) * table);
            }
            }
        }
        block = w + value_bytes(m->dtype, length);
        if (m->dtype < DTYPE_Q8) continue;
        for (size_t k = 0, width; k < length; k += width) {
            float turned_back[K_BLOCK];
            width = rotation_width(length - k);
            rotate_columns_back(out + first + k, width, turned_back);
            memcpy(out + first + k, turned_back, width * sizeof *out);
        }
    }
}

// Expands columns [first, first + depth) of a panel of float weights to out[k][r], stride floats from one k to the next.
// first is a multiple of 256.
static void expand_panel(const struct Matrix *m, size_t panel, size_t first, size_t depth, float *out, size_t stride) {
    const uint8_t *data = m->data + panel * m->panel_step;
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

// `panels` panels from first_panel on (up to 4 of more than 16 rows) times n rows: out [panels][n][32]. What a panel gives for all
// rows lies together, since rows that lie as far apart as a matrix is wide would compete for the same places of a cache.
static void multiply_tile(const struct Session *s, struct Worker *worker, const struct Matrix *m, size_t first_panel, size_t panels,
                          const struct Row *x, size_t n, float *out) {
    size_t width = panels * PANEL_ROWS;
    if (n <= EXACT_TOKENS) {
        for (size_t p = 0; p < panels; p++)
            for (size_t t = 0; t < n; t += TILE_TOKENS)
                s->kernels->product[m->dtype](m->data + (first_panel + p) * m->panel_step, m->cols, x + t, min_size(TILE_TOKENS, n - t),
                                              out + (p * n + t) * PANEL_ROWS);
        return;
    }
    for (size_t first = 0; first < m->cols; first += GEMM_DEPTH) {
        size_t depth = min_size(GEMM_DEPTH, m->cols - first);
        if (uses_gemm(m->dtype, n)) {
            for (size_t p = 0; p < panels; p++) expand_panel(m, first_panel + p, first, depth, worker->gemm_weights + p * PANEL_ROWS, width);
            for (size_t t = 0; t < n; t++) memcpy(worker->gemm_inputs + t * depth, x[t].values + first, depth * sizeof(float));
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)width, (int)depth, 1, worker->gemm_inputs, (int)depth,
                        worker->gemm_weights, (int)width, first ? 1 : 0, worker->gemm_tile, (int)width);
            continue;
        }
        for (size_t p = 0; p < panels; p++) {
            float *panel_out = out + p * n * PANEL_ROWS;
            if (first == 0) memset(panel_out, 0, n * PANEL_ROWS * sizeof *out);
            s->kernels->unpack[m->dtype](m->data + (first_panel + p) * m->panel_step, m->cols, first, depth, worker->unpacked,
                                         worker->unpacked_scales);
            s->kernels->multiply_unpacked(worker->unpacked, worker->unpacked_scales, depth, x, first, n, panel_out, PANEL_ROWS);
        }
    }
    for (size_t i = 0; i < panels * n && uses_gemm(m->dtype, n); i++)
        memcpy(out + i * PANEL_ROWS, worker->gemm_tile + i % n * width + i / n * PANEL_ROWS, PANEL_ROWS * sizeof *out);
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

// A panel's results, [n][32].
static void store_panel(const struct Product *product, size_t panel, const float *results, size_t n) {
    size_t first_row = panel * PANEL_ROWS, rows = min_size(PANEL_ROWS, product->matrix->rows - first_row);
    for (size_t t = 0; t < n; t++, results += PANEL_ROWS) {
        float *out = product->out + t * product->stride + first_row;
        if (product->add) {
            for (size_t r = 0; r < rows; r++) out[r] += results[r];
        } else if (product->bias) {
            for (size_t r = 0; r < rows; r++) out[r] = results[r] + product->bias[first_row + r];
        } else {
            memcpy(out, results, rows * sizeof *out);
        }
    }
}

static size_t panel_count(const struct Matrix *m) { return ceil_div(m->rows, PANEL_ROWS); }
static size_t panels_per_item(size_t n) { return n > EXACT_TOKENS ? GEMM_PANELS : 1; }

// Computes some products of n rows each. All threads call it.
static void multiply(struct Session *s, int thread, const struct Product *products, size_t count, size_t n) {
    struct Worker *worker = &s->workers[thread];
    size_t total = 0, width = panels_per_item(n), item;
    for (size_t i = 0; i < count; i++) total += ceil_div(panel_count(products[i].matrix), width);
    struct Items items = share_items(s->team, thread, total);
    while (next_item(&items, &item)) {
        const struct Product *product = products;
        size_t first = item;
        for (size_t here; first >= (here = ceil_div(panel_count(product->matrix), width)); first -= here) product++;
        size_t panels = min_size(width, panel_count(product->matrix) - first * width);
        multiply_tile(s, worker, product->matrix, first * width, panels, product->x, n, worker->gate_tile);
        for (size_t p = 0; p < panels; p++) store_panel(product, first * width + p, worker->gate_tile + p * n * PANEL_ROWS, n);
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

// Fills in the quantised form of a k-block of up to 256 values, in rotated columns as format.h tells; it starts at value `at`
// of the buffer.
static void quantize_k_block(const struct Session *s, const struct Activations *a, size_t at, const float *values, size_t length) {
    _Alignas(64) float rotated[K_BLOCK];
    for (size_t k = 0, width; k < length; k += width) {
        width = rotation_width(length - k);
        s->kernels->rotate_columns(values + k, width, rotated + k);
    }
    s->kernels->quantize_block(rotated, length, a->quants + at, a->scales + at / K_BLOCK, a->sums + at / K_GROUP, a->block_sums + at / K_BLOCK);
}

// The same for a row whose values are there.
static void quantize_activations(const struct Session *s, const struct Activations *a, size_t row, size_t cols) {
    if (!s->integer_weights) return;
    const float *values = a->rows[row].values;
    for (size_t first = 0; first < cols; first += K_BLOCK)
        quantize_k_block(s, a, (size_t)(values - a->values) + first, values + first, min_size(K_BLOCK, cols - first));
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
// values of all heads, arXiv:2405.04434 section 2.1) followed by the rotated key part. Layer by layer.
//
// f32, f16   [head][position] keys, then [head][position] values
// q8         blocks of 256 positions, made for the kernels that multiply int8 matrices: [head][block] keys, 8 panels of 32
//            positions, each a q8 panel of 32 rows (format.h, rotated columns); then [head][block] values: a float scale a
//            position, and a q8 panel for each 32 columns of the values whose columns are the 256 positions (not rotated;
//            its own scales are 1). MLA has its latents twice.
// ====================================================================================================================

// The row of a float cache, or the block of a q8 cache, that has the position.
static uint8_t *cache_keys(const struct Session *s, size_t layer, size_t head, size_t position) {
    bool q8 = s->options.cache == CACHE_Q8;
    size_t rows = q8 ? ceil_div(s->options.context, CACHE_BLOCK) : s->options.context;
    return s->cache + layer * s->cache_layer_bytes + (head * rows + (q8 ? position / CACHE_BLOCK : position)) * s->key_row_bytes;
}

static uint8_t *cache_values(const struct Session *s, size_t layer, size_t head, size_t position) {
    bool q8 = s->options.cache == CACHE_Q8;
    size_t rows = q8 ? ceil_div(s->options.context, CACHE_BLOCK) : s->options.context;
    return s->cache + layer * s->cache_layer_bytes + s->cache_values + (head * rows + (q8 ? position / CACHE_BLOCK : position)) * s->value_row_bytes;
}

static void write_float_row(const struct Session *s, uint8_t *row, const float *x, size_t cols) {
    if (s->options.cache == CACHE_F32) memcpy(row, x, cols * sizeof *x);
    else s->kernels->float_to_half(x, (uint16_t *)(void *)row, cols);
}

// Reads `count` rows of a float cache, out [count][cols].
static void read_float_rows(const struct Session *s, const uint8_t *rows, size_t row_bytes, size_t count, size_t cols, float *out) {
    for (size_t j = 0; j < count; j++, rows += row_bytes, out += cols) {
        if (s->options.cache == CACHE_F32) memcpy(out, rows, cols * sizeof *out);
        else s->kernels->half_to_float((const uint16_t *)(const void *)rows, out, cols);
    }
}

// Rotates up to 256 columns at a time, as format.h does: out [padded(cols)].
static void rotate_padded(const struct Session *s, const float *x, size_t cols, float *out) {
    float piece[K_BLOCK];
    for (size_t first = 0, width; first < padded(cols); first += width) {
        width = rotation_width(padded(cols) - first);
        for (size_t i = 0; i < width; i++) piece[i] = first + i < cols ? x[first + i] : 0;
        s->kernels->rotate_columns(piece, width, out + first);
    }
}

// A key or query of a q8 cache as it is multiplied: the first `cols` of x and the `rest` ones behind them rotated apart, and
// padded. out [padded(cols) + padded(rest)].
static void rotate_key(const struct Session *s, const float *x, size_t cols, size_t rest, float *out) {
    rotate_padded(s, x, cols, out);
    rotate_padded(s, x + cols, rest, out + padded(cols));
}

static void write_q8_key(const struct Session *s, uint8_t *block, size_t position, const float *x, size_t cols, size_t rest) {
    float rotated[MAX_KEY_COLS];
    size_t key_cols = padded(cols) + padded(rest), row = position % PANEL_ROWS;
    uint8_t *panel = block + position % CACHE_BLOCK / PANEL_ROWS * panel_bytes(DTYPE_Q8, key_cols);
    rotate_key(s, x, cols, rest, rotated);
    for (size_t first = 0; first < key_cols; first += K_BLOCK) {
        int8_t quants[K_BLOCK];
        int32_t sums[K_BLOCK / K_GROUP], block_sum;
        size_t length = min_size(K_BLOCK, key_cols - first);
        s->kernels->quantize_block(rotated + first, length, quants, (float *)(void *)panel + row, sums, &block_sum);
        panel += block_head_bytes(DTYPE_Q8, length);
        for (size_t k = 0; k < length; k += 4) memcpy(panel + k * PANEL_ROWS + row * 4, quants + k, 4);
        panel += value_bytes(DTYPE_Q8, length);
    }
}

static void write_q8_value(uint8_t *block, size_t position, const float *x, size_t cols) {
    size_t place = position % CACHE_BLOCK;
    uint8_t *panels = block + CACHE_BLOCK * sizeof(float);
    float largest = 0;
    for (size_t i = 0; i < cols; i++) largest = fmaxf(largest, fabsf(x[i]));
    bool usable = largest > 1e-35f && largest < INFINITY;
    float inverse = usable ? 127.0f / largest : 0;
    ((float *)(void *)block)[place] = usable ? largest / 127.0f : 0;
    for (size_t i = 0; i < padded(cols); i++) {
        uint8_t *panel = panels + i / PANEL_ROWS * panel_bytes(DTYPE_Q8, CACHE_BLOCK);
        if (place == 0) ((float *)(void *)panel)[i % PANEL_ROWS] = 1;
        uint8_t *w = panel + block_head_bytes(DTYPE_Q8, CACHE_BLOCK);
        w[place / 4 * 4 * PANEL_ROWS + i % PANEL_ROWS * 4 + place % 4] = i < cols ? (uint8_t)quantize_value(x[i], inverse) : 0;
    }
}

// Writes a position's key, `cols` values and `rest` rotated ones, and its value.
static void write_cache(const struct Session *s, size_t layer, size_t head, size_t position, const float *key, size_t cols, size_t rest,
                        const float *value, size_t value_cols) {
    uint8_t *keys = cache_keys(s, layer, head, position), *values = cache_values(s, layer, head, position);
    if (s->options.cache == CACHE_Q8) {
        write_q8_key(s, keys, position, key, cols, rest);
        write_q8_value(values, position, value, value_cols);
    } else {
        write_float_row(s, keys, key, cols + rest);
        if (s->value_row_bytes) write_float_row(s, values, value, value_cols);
    }
}

// ====================================================================================================================
// Attention
//
// The keys and values of 64 positions at a time (of a q8 cache 256) meet all queries of a piece of work; each query keeps
// the maximum, the sum and the mix of its softmax so far (online softmax, as in FlashAttention, arXiv:2205.14135). Pieces
// always start at a multiple of 64 (256), so a query's result depends on its own position alone.
//
// With a q8 cache both products are those of int8 matrices: a panel of keys times the quantised queries, and a panel of
// values times the quantised softmax of 256 scores, in which the scales of the values have been multiplied.
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
    const struct Row *rows;       // [count] the same queries quantised, for a q8 cache; q is then not used
    float *mixed;                 // [count], mixed_stride floats apart
    size_t mixed_stride, value_dim;
    float *maxima, *sums;         // [count]
};

// `count` queries from `first` on of one head's.
static struct Queries slice_queries(const struct Queries *all, size_t first, size_t count) {
    struct Queries some = *all;
    some.count = count;
    some.first_token = first;
    if (all->q) some.q += first * all->q_stride;
    some.rows += first;
    some.mixed += first * all->mixed_stride;
    some.maxima += first;
    some.sums += first;
    return some;
}

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

// The scores of the first `visible` positions from maximum and sum so far on: exponentials, both brought up to date, and what
// was mixed before weighed anew.
static void update_softmax(const struct Session *s, const struct Queries *queries, size_t i, float *scores, size_t visible) {
    float *mixed = queries->mixed + i * queries->mixed_stride, maximum = fmaxf(queries->maxima[i], s->kernels->find_maximum(scores, visible));
    float kept = exp_float(queries->maxima[i] - maximum);    // -inf gives next to nothing
    queries->sums[i] = queries->sums[i] * kept + s->kernels->exp_row(scores, maximum, visible);
    if (maximum != queries->maxima[i])
        for (size_t c = 0; c < queries->value_dim; c++) mixed[c] *= kept;
    queries->maxima[i] = maximum;
}

// Positions from `first` on that query i sees.
static size_t count_visible(const struct Session *s, const struct Queries *queries, size_t i, size_t first, size_t count) {
    size_t position = s->position + queries->first_token + i / queries->heads;
    return position < first ? 0 : min_size(count, position - first + 1);
}

// Lets the queries look at `count` positions from `first` on: keys [count][key_stride], values [count][value_stride].
static void attend_chunk(const struct Session *s, struct Worker *worker, const struct Queries *queries, size_t first, size_t count,
                         const float *keys, size_t key_stride, const float *values, size_t value_stride) {
    bool gemm = s->n > EXACT_TOKENS;
    if (gemm)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)queries->count, (int)count, (int)queries->key_dim, 1, queries->q,
                    (int)queries->q_stride, keys, (int)key_stride, 0, worker->scores, ATTENTION_CHUNK);
    for (size_t i = 0; i < queries->count; i++) {
        size_t visible = count_visible(s, queries, i, first, count);
        float *scores = worker->scores + i * ATTENTION_CHUNK;
        if (!gemm && visible) s->kernels->score_rows(queries->q + i * queries->q_stride, keys, key_stride, visible, queries->key_dim, scores);
        if (visible) update_softmax(s, queries, i, scores, visible);
        if (gemm) memset(scores + visible, 0, (count - visible) * sizeof *scores);
        else if (visible) s->kernels->mix_rows(scores, values, value_stride, visible, queries->value_dim, queries->mixed + i * queries->mixed_stride);
    }
    if (gemm)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)queries->count, (int)queries->value_dim, (int)count, 1, worker->scores,
                    ATTENTION_CHUNK, values, (int)value_stride, 1, queries->mixed, (int)queries->mixed_stride);
}

// out[i][32] += a q8 panel of `cols` columns times the rows.
static void multiply_q8_panel(const struct Session *s, struct Worker *worker, const uint8_t *panel, size_t cols, const struct Row *rows,
                              size_t count, float *out, size_t stride) {
    for (size_t first = 0; first < cols; first += GEMM_DEPTH) {
        size_t depth = min_size(GEMM_DEPTH, cols - first);
        s->kernels->unpack[DTYPE_Q8](panel, cols, first, depth, worker->unpacked, worker->unpacked_scales);
        s->kernels->multiply_unpacked(worker->unpacked, worker->unpacked_scales, depth, rows, first, count, out, stride);
    }
}

// attend_chunk() for a block of a q8 cache with `count` positions from `first` on.
static void attend_q8_block(const struct Session *s, struct Worker *worker, const struct Queries *queries, size_t first, size_t count,
                            const uint8_t *keys, const uint8_t *values) {
    size_t cols = padded(count), n = queries->count;
    memset(worker->scores, 0, n * CACHE_BLOCK * sizeof *worker->scores);
    for (size_t j = 0; j < cols; j += PANEL_ROWS)
        multiply_q8_panel(s, worker, keys + j / PANEL_ROWS * panel_bytes(DTYPE_Q8, queries->key_dim), queries->key_dim, queries->rows, n,
                          worker->scores + j, CACHE_BLOCK);
    const float *value_scales = (const float *)(const void *)values;
    for (size_t i = 0; i < n; i++) {
        size_t visible = count_visible(s, queries, i, first, count);
        float *scores = worker->scores + i * CACHE_BLOCK;
        if (visible) update_softmax(s, queries, i, scores, visible);
        for (size_t j = 0; j < visible; j++) scores[j] *= value_scales[j];
        memset(scores + visible, 0, (cols - visible) * sizeof *scores);
        size_t at = i * CACHE_BLOCK;
        s->kernels->quantize_block(scores, cols, worker->shares.quants + at, worker->shares.scales + i, worker->shares.sums + at / K_GROUP,
                                   worker->shares.block_sums + i);
    }
    for (size_t c = 0; c < queries->value_dim; c += PANEL_ROWS)
        multiply_q8_panel(s, worker, values + CACHE_BLOCK * sizeof(float) + c / PANEL_ROWS * panel_bytes(DTYPE_Q8, CACHE_BLOCK), cols,
                          worker->shares.rows, n, queries->mixed + c, queries->mixed_stride);
}

// Quantises query i of a piece for a q8 cache.
static void quantize_query(const struct Session *s, struct Worker *worker, size_t i, const float *q, size_t cols, size_t rest) {
    float rotated[MAX_KEY_COLS];
    size_t key_cols = padded(cols) + padded(rest), at = i * row_stride(key_cols);
    const struct Activations *a = &worker->queries;
    rotate_key(s, q, cols, rest, rotated);
    place_row(&worker->queries, i, at);
    for (size_t first = 0; first < key_cols; first += K_BLOCK, at += K_BLOCK)
        s->kernels->quantize_block(rotated + first, min_size(K_BLOCK, key_cols - first), a->quants + at, a->scales + at / K_BLOCK,
                                   a->sums + at / K_GROUP, a->block_sums + at / K_BLOCK);
}

// Attention of a piece over all that the cache has for a head up to the piece's last token.
static void attend_cache(const struct Session *s, struct Worker *w, const struct Queries *queries, size_t layer, size_t head) {
    bool q8 = s->options.cache == CACHE_Q8;
    size_t step = q8 ? CACHE_BLOCK : ATTENTION_CHUNK, end = s->position + queries->first_token + queries->count / queries->heads;
    size_t dim = queries->key_dim;
    start_softmax(queries);
    for (size_t first = 0; first < end; first += step) {
        size_t count = min_size(step, end - first);
        const uint8_t *keys = cache_keys(s, layer, head, first), *values = cache_values(s, layer, head, first);
        if (q8) {
            attend_q8_block(s, w, queries, first, count, keys, values);
            continue;
        }
        read_float_rows(s, keys, s->key_row_bytes, count, dim, w->keys);
        if (s->value_row_bytes) read_float_rows(s, values, s->value_row_bytes, count, queries->value_dim, w->values);
        // MLA's values are the latents, with which its keys begin.
        attend_chunk(s, w, queries, first, count, w->keys, dim, s->value_row_bytes ? w->values : w->keys, s->value_row_bytes ? queries->value_dim : dim);
    }
    end_softmax(queries);
}

// How a step's tokens and the heads that share a cache head are cut into pieces of work: as large as the buffers allow,
// so that a piece of the cache is read once for many queries, but enough pieces for all threads. Where OpenBLAS computes,
// its last bits depend on the size of the piece, which so must not depend on the number of threads.
#define GEMM_PIECES 64
static void choose_piece(const struct Session *s, size_t cache_heads_count, size_t heads, size_t *piece_tokens, size_t *piece_heads) {
    size_t least_pieces = s->n > EXACT_TOKENS ? GEMM_PIECES : (size_t)s->team->threads;
    *piece_heads = min_size(heads, ATTENTION_QUERIES);
    *piece_tokens = min_size(s->n, ATTENTION_QUERIES / *piece_heads);
    while (cache_heads_count * ceil_div(heads, *piece_heads) * ceil_div(s->n, *piece_tokens) < least_pieces) {
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
            write_cache(s, layer, h, s->position + t, k, dim, 0, s->v + (t * kv_heads + h) * dim, dim);
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
    struct Items items = share_items(s->team, thread, kv_heads * head_pieces * token_pieces);
    while (next_item(&items, &item)) {
        size_t kv_head = item / token_pieces / head_pieces, first_token = item % token_pieces * piece_tokens;
        size_t first_head = item / token_pieces % head_pieces * piece_heads;
        size_t tokens = min_size(piece_tokens, s->n - first_token), own_heads = min_size(piece_heads, group - first_head);
        bool q8 = s->options.cache == CACHE_Q8;
        for (size_t i = 0; i < tokens * own_heads; i++) {
            size_t t = first_token + i / own_heads, h = kv_head * group + first_head + i % own_heads;
            float *q = w->queries.values + i * dim;
            memcpy(q, s->q + (t * heads + h) * dim, dim * sizeof *q);
            if (l->q_norm) rms_norm(s, q, l->q_norm, dim, c->rms_norm_eps, q);
            rotate(s, t, q);
            for (size_t d = 0; d < dim; d++) q[d] *= s->softmax_scale;
            if (q8) quantize_query(s, w, i, q, dim, 0);
        }
        struct Queries queries = {.count = tokens * own_heads, .heads = own_heads, .first_token = first_token, .q = w->queries.values,
                                  .q_stride = dim, .key_dim = q8 ? padded(dim) : dim, .rows = w->queries.rows, .mixed = w->mixed,
                                  .mixed_stride = padded(dim), .value_dim = q8 ? padded(dim) : dim, .maxima = w->maxima, .sums = w->sums};
        attend_cache(s, w, &queries, layer, kv_head);
        for (size_t i = 0; i < tokens * own_heads; i++) {
            size_t t = first_token + i / own_heads, h = kv_head * group + first_head + i % own_heads;
            memcpy(row_values(&s->attended, t) + h * dim, w->mixed + i * padded(dim), dim * sizeof(float));
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
        write_cache(s, layer, 0, s->position + t, latent, lora, row - lora, latent, lora);
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
            s->kernels->product[factor->dtype](factor->data + p * factor->panel_step, factor->cols, rows, n, tile);
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
    struct Items items = share_items(s->team, thread, head_pieces * token_pieces);
    while (next_item(&items, &item)) {
        size_t first_token = item % token_pieces * piece_tokens, first_head = item / token_pieces * piece_heads;
        size_t tokens = min_size(piece_tokens, s->n - first_token), own_heads = min_size(piece_heads, heads - first_head);
        // Query i is token first_token + i / own_heads, head first_head + i % own_heads.
        for (size_t h = 0; h < own_heads; h++) {
            float *q = s->q + (first_token * heads + first_head + h) * dim;
            struct Matrix absorb = blob_matrix(&l->key_transposed, 0, first_head + h);
            for (size_t t = 0; t < tokens; t++) {
                prepare_mla_query(s, first_token + t, q + t * heads * dim);
                memcpy(w->queries.values + (t * own_heads + h) * row + lora, q + t * heads * dim + nope, rope * sizeof *q);
            }
            multiply_factor(s, &absorb, q, heads * dim, tokens, w->queries.values + h * row, own_heads * row);
        }
        bool q8 = s->options.cache == CACHE_Q8;
        for (size_t i = 0; q8 && i < tokens * own_heads; i++) quantize_query(s, w, i, w->queries.values + i * row, lora, rope);
        struct Queries queries = {.count = tokens * own_heads, .heads = own_heads, .first_token = first_token, .q = w->queries.values,
                                  .q_stride = row, .key_dim = q8 ? q8_key_cols(c) : row, .rows = w->queries.rows, .mixed = w->mixed,
                                  .mixed_stride = padded(lora), .value_dim = q8 ? padded(lora) : lora, .maxima = w->maxima, .sums = w->sums};
        attend_cache(s, w, &queries, layer, 0);
        for (size_t h = 0; h < own_heads; h++) {
            struct Matrix up = blob_matrix(&l->value, 0, first_head + h);
            multiply_factor(s, &up, w->mixed + h * padded(lora), own_heads * padded(lora), tokens,
                            row_values(&s->attended, first_token) + (first_head + h) * value, row_stride(heads * value));
        }
    }
}

// Expands a whole factor to out [cols][rows, padded to panels].
static void expand_factor(const struct Matrix *factor, float *out) {
    size_t width = panel_count(factor) * PANEL_ROWS;
    for (size_t p = 0; p < panel_count(factor); p++) expand_panel(factor, p, 0, factor->cols, out + p * PANEL_ROWS, width);
}

// A head's factors for a q8 cache, as rows to multiply panels of latents by: the keys' first [padded(nope)], then the values'
// [padded(v_head_dim)]. Latents come in rotated columns, so the factors' columns are rotated as well; and the keys must come out
// in rotated columns, so the rows of their factor are.
static void quantize_factors(const struct Session *s, struct Worker *w, const struct Matrix *key, const struct Matrix *up) {
    const struct ModelConfig *c = &s->model->config;
    size_t lora = c->kv_lora_rank, nope = padded(c->qk_nope_head_dim), rows = nope + padded(c->v_head_dim);
    expand_factor(key, w->key_factor);
    expand_factor(up, w->value_factor);
    for (size_t k = 0; k < lora; k++) {
        float rotated[MAX_KEY_COLS];
        rotate_padded(s, w->key_factor + k * nope, c->qk_nope_head_dim, rotated);
        memcpy(w->key_factor + k * nope, rotated, nope * sizeof *rotated);
    }
    for (size_t r = 0; r < rows; r++) {
        const float *column = r < nope ? w->key_factor + r : w->value_factor + r - nope;
        size_t stride = r < nope ? nope : rows - nope, at = r * row_stride(lora);
        float row[MAX_KEY_COLS], rotated[MAX_KEY_COLS];
        for (size_t k = 0; k < lora; k++) row[k] = column[k * stride];
        rotate_padded(s, row, lora, rotated);
        place_row(&w->factors, r, at);
        for (size_t first = 0; first < padded(lora); first += K_BLOCK, at += K_BLOCK)
            s->kernels->quantize_block(rotated + first, min_size(K_BLOCK, padded(lora) - first), w->factors.quants + at,
                                       w->factors.scales + at / K_BLOCK, w->factors.sums + at / K_GROUP, w->factors.block_sums + at / K_BLOCK);
    }
}

// Expands `count` positions of a q8 cache's block of latents to a head's keys and values, w->block_keys and w->block_values.
static void expand_q8_block(const struct Session *s, struct Worker *w, const uint8_t *latents, size_t count) {
    const struct ModelConfig *c = &s->model->config;
    size_t lora = padded(c->kv_lora_rank), rope = padded(c->qk_rope_head_dim), nope = padded(c->qk_nope_head_dim), value = padded(c->v_head_dim);
    uint8_t *panels = w->block_values + CACHE_BLOCK * sizeof(float);
    for (size_t d = 0; d < value; d++) ((float *)(void *)(panels + d / PANEL_ROWS * panel_bytes(DTYPE_Q8, CACHE_BLOCK)))[d % PANEL_ROWS] = 1;
    for (size_t j = 0; j < count; j += PANEL_ROWS) {
        const uint8_t *panel = latents + j / PANEL_ROWS * panel_bytes(DTYPE_Q8, lora + rope);
        float *keys = w->expanded, *values = keys + (nope + rope) * PANEL_ROWS;      // [rows][32 positions]
        memset(keys, 0, (nope + rope + value) * PANEL_ROWS * sizeof *keys);
        for (size_t first = 0; first < lora; first += GEMM_DEPTH) {
            s->kernels->unpack[DTYPE_Q8](panel, lora + rope, first, min_size(GEMM_DEPTH, lora + rope - first), w->unpacked, w->unpacked_scales);
            size_t depth = min_size(GEMM_DEPTH, lora - first);
            s->kernels->multiply_unpacked(w->unpacked, w->unpacked_scales, depth, w->factors.rows, first, nope, keys, PANEL_ROWS);
            s->kernels->multiply_unpacked(w->unpacked, w->unpacked_scales, depth, w->factors.rows + nope, first, value, values, PANEL_ROWS);
        }
        // The rotated part of the keys stands in the cache behind the latents.
        for (size_t k = 0; k < rope; k++) {
            size_t column = lora + k, block = column / K_BLOCK * K_BLOCK, length = min_size(K_BLOCK, lora + rope - block);
            const uint8_t *at = panel + block / K_BLOCK * (block_head_bytes(DTYPE_Q8, K_BLOCK) + value_bytes(DTYPE_Q8, K_BLOCK));
            const int8_t *quants = (const int8_t *)at + block_head_bytes(DTYPE_Q8, length) + (column - block) / 4 * 4 * PANEL_ROWS + column % 4;
            for (size_t r = 0; r < PANEL_ROWS; r++) keys[(nope + k) * PANEL_ROWS + r] = ((const float *)(const void *)at)[r] * (float)quants[r * 4];
        }
        uint8_t *out = w->block_keys + j / PANEL_ROWS * panel_bytes(DTYPE_Q8, nope + rope);
        for (size_t first = 0; first < nope + rope; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, nope + rope - first);
            s->kernels->quantize_keys(keys + first * PANEL_ROWS, length, out);
            out += block_head_bytes(DTYPE_Q8, length) + value_bytes(DTYPE_Q8, length);
        }
        s->kernels->quantize_values(values, value, j, (float *)(void *)w->block_values, panels);
    }
}

// attend_mla_expanded() for a q8 cache: keys and values are expanded by int8 products, too, and quantised. One item a head.
static void attend_mla_q8(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, nope = c->qk_nope_head_dim, dim = query_dim(c), value = c->v_head_dim, h;
    struct Items items = share_items(s->team, thread, heads);
    while (next_item(&items, &h)) {
        struct Matrix key = blob_matrix(&l->key, 0, h), up = blob_matrix(&l->value, 0, h);
        quantize_factors(s, w, &key, &up);
        for (size_t t = 0; t < s->n; t++) {
            float *q = s->q + (t * heads + h) * dim;
            prepare_mla_query(s, t, q);
            quantize_query(s, w, t, q, nope, dim - nope);
        }
        struct Queries all = {.count = s->n, .heads = 1, .key_dim = q8_expanded_key_cols(c), .rows = w->queries.rows, .mixed = w->mixed,
                              .mixed_stride = padded(value), .value_dim = padded(value), .maxima = w->maxima, .sums = w->sums};
        start_softmax(&all);
        size_t end = s->position + s->n;
        for (size_t first = 0; first < end; first += CACHE_BLOCK) {
            size_t count = min_size(CACHE_BLOCK, end - first);
            expand_q8_block(s, w, cache_keys(s, layer, 0, first), count);
            for (size_t t = first > s->position ? first - s->position : 0; t < s->n; t += ATTENTION_QUERIES) {
                struct Queries some = slice_queries(&all, t, min_size(ATTENTION_QUERIES, s->n - t));
                attend_q8_block(s, w, &some, first, min_size(count, s->position + t + some.count - first), w->block_keys, w->block_values);
            }
        }
        end_softmax(&all);
        for (size_t t = 0; t < s->n; t++) memcpy(row_values(&s->attended, t) + h * value, w->mixed + t * padded(value), value * sizeof(float));
    }
}

// Many tokens: a head expands each piece of the cache to its own keys and values. One item a head.
static void attend_mla_expanded(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim;
    size_t dim = query_dim(c), row = cache_key_dim(c), value = c->v_head_dim, h;
    size_t nope_width = align_up(nope, PANEL_ROWS), value_width = align_up(value, PANEL_ROWS);
    struct Items items = share_items(s->team, thread, heads);
    while (next_item(&items, &h)) {
        struct Matrix key = blob_matrix(&l->key, 0, h), up = blob_matrix(&l->value, 0, h);
        expand_factor(&key, w->key_factor);
        expand_factor(&up, w->value_factor);
        for (size_t t = 0; t < s->n; t++) prepare_mla_query(s, t, s->q + (t * heads + h) * dim);
        struct Queries all = {.count = s->n, .heads = 1, .q = s->q + h * dim, .q_stride = heads * dim, .key_dim = dim,
                              .mixed = row_values(&s->attended, 0) + h * value, .mixed_stride = row_stride(heads * value),
                              .value_dim = value, .rows = w->queries.rows, .maxima = w->maxima, .sums = w->sums};
        start_softmax(&all);
        size_t end = s->position + s->n;
        for (size_t first = 0; first < end; first += ATTENTION_CHUNK) {
            size_t count = min_size(ATTENTION_CHUNK, end - first);
            read_float_rows(s, cache_keys(s, layer, 0, first), s->key_row_bytes, count, row, w->latents);
            // The product fills nope_width columns of each key; the rotated part then overwrites any padding behind nope.
            size_t key_stride = nope_width + rope;
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)count, (int)nope_width, (int)lora, 1, w->latents, (int)row,
                        w->key_factor, (int)nope_width, 0, w->keys, (int)key_stride);
            for (size_t j = 0; j < count; j++) memcpy(w->keys + j * key_stride + nope, w->latents + j * row + lora, rope * sizeof(float));
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)count, (int)value_width, (int)lora, 1, w->latents, (int)row,
                        w->value_factor, (int)value_width, 0, w->values, (int)value_width);
            for (size_t t = 0; t < s->n; t += ATTENTION_QUERIES) {
                struct Queries some = slice_queries(&all, t, min_size(ATTENTION_QUERIES, s->n - t));
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

#define PANEL_PREFETCH 4096       // bytes

// Asks for the beginning of a panel that is read soon: it takes the processor some kilobytes to see that a stream has begun.
static void prefetch_panel(const struct Matrix *m, size_t panel) {
    const uint8_t *start = m->data + panel * m->panel_step;
    for (size_t i = 0; i < min_size(PANEL_PREFETCH, m->panel_step); i += 64) __builtin_prefetch(start + i, 0, 2);
}

// An item of run_gate_up(): some rows of a job's result for some of its tokens. Of many tokens it has 256 rows, the k-block of
// the product that follows, and quantises it at once: what 512 tokens have there as floats would not fit in a cache.
#define HIDDEN_PANELS (K_BLOCK / PANEL_ROWS)

static size_t count_gate_up_items(const struct Session *s, const struct FeedForwardJob *job) {
    size_t panels = panel_count(&job->gate);
    return s->n > EXACT_TOKENS ? ceil_div(panels, HIDDEN_PANELS) * ceil_div(job->n, HIDDEN_TOKENS) : panels;
}

// hidden = silu(gate * x) * (up * x) of all jobs. All threads call it.
static void run_gate_up(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    bool many = s->n > EXACT_TOKENS;
    size_t total = 0, item;
    for (size_t j = 0; j < s->job_count; j++) total += count_gate_up_items(s, &s->jobs[j]);
    struct Items items = share_items(s->team, thread, total);
    while (next_item(&items, &item)) {
        const struct FeedForwardJob *job = s->jobs;
        for (size_t here; item >= (here = count_gate_up_items(s, job)); item -= here) job++;
        size_t chunks = many ? ceil_div(job->n, HIDDEN_TOKENS) : 1, first_token = item % chunks * HIDDEN_TOKENS;
        size_t first_panel = item / chunks * (many ? HIDDEN_PANELS : 1), n = many ? min_size(HIDDEN_TOKENS, job->n - first_token) : job->n;
        size_t panels = many ? min_size(HIDDEN_PANELS, panel_count(&job->gate) - first_panel) : 1;
        for (size_t p = 0; p < panels; p += GEMM_PANELS) {
            size_t some = min_size(GEMM_PANELS, panels - p);
            float *gate = w->gate_tile + p * n * PANEL_ROWS;
            multiply_tile(s, w, &job->gate, first_panel + p, some, job->inputs + first_token, n, gate);
            multiply_tile(s, w, &job->up, first_panel + p, some, job->inputs + first_token, n, w->up_tile);
            s->kernels->silu_multiply(gate, w->up_tile, some * n * PANEL_ROWS);
        }
        size_t first_row = first_panel * PANEL_ROWS, rows = min_size(panels * PANEL_ROWS, job->gate.rows - first_row);
        for (size_t i = 0; i < n; i++) {
            float *values = row_values(&s->hidden, (size_t)(job->hidden - s->hidden.rows) + first_token + i) + first_row, middle[K_BLOCK];
            for (size_t p = 0; p < panels; p++)
                memcpy(middle + p * PANEL_ROWS, w->gate_tile + (p * n + i) * PANEL_ROWS, PANEL_ROWS * sizeof *middle);
            if (many && job->down.dtype >= DTYPE_Q8) quantize_k_block(s, &s->hidden, (size_t)(values - s->hidden.values), middle, rows);
            else memcpy(values, middle, rows * sizeof *values);
        }
    }
}

// Of few tokens the hidden rows are quantised when all panels are there.
static void quantize_hidden(struct Session *s, int thread) {
    for (size_t j = 0, row = 0; j < s->job_count; j++)
        for (size_t i = 0; i < s->jobs[j].n; i++, row++)
            if (row % (size_t)s->team->threads == (size_t)thread) quantize_activations(s, &s->hidden, row, s->jobs[j].gate.rows);
}

#define DOWN_PANELS 8             // most panels of an item for few tokens

// x += sum over the jobs of weight * (down * hidden). An item is some rows of the result and goes through the jobs in
// order, so that every sum has one order of additions. All threads call it.
static void run_down(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    size_t hidden = s->model->config.hidden_size, panels_in_all = ceil_div(hidden, PANEL_ROWS), item;
    // Of few tokens, too, as many panels as leave each thread some items: a processor needs tens of kilobytes of a job's to read
    // them at full speed.
    size_t width = s->n > EXACT_TOKENS ? GEMM_PANELS : min_size(DOWN_PANELS, max_size(panels_in_all / (4 * (size_t)s->team->threads), 1));
    struct Items items = share_items(s->team, thread, ceil_div(panels_in_all, width));
    while (next_item(&items, &item)) {
        size_t panels = min_size(width, panels_in_all - item * width);
        for (size_t j = 0; j < s->job_count; j++) {
            const struct FeedForwardJob *job = &s->jobs[j];
            if (s->n <= EXACT_TOKENS && j + 1 < s->job_count) prefetch_panel(&job[1].down, item * width);
            multiply_tile(s, w, &job->down, item * width, panels, job->hidden, job->n, w->gate_tile);
            const float *results = w->gate_tile;         // [panels][n][32]
            for (size_t p = 0; p < panels; p++) {
                size_t first_row = (item * width + p) * PANEL_ROWS, rows = min_size(PANEL_ROWS, hidden - first_row);
                for (size_t i = 0; i < job->n; i++, results += PANEL_ROWS) {
                    float *x = s->x + job->tokens[i] * hidden + first_row;
                    for (size_t r = 0; r < rows; r++) x[r] += job->weights[i] * results[r];
                }
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
        else if (s->options.cache == CACHE_Q8) attend_mla_q8(s, thread, layer);
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
    if (s->n <= EXACT_TOKENS) {
        quantize_hidden(s, thread);
        team_barrier(s->team);
    }
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
    return bytes + (double)model->embedding.panel_step / PANEL_ROWS;
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

// ====================================================================================================================
// Options
//
// One table says which options there are, what values they take, which commands know them and what the help says of them.
// Parsing fills a struct Command; every value is checked here, so that the commands meet none that is out of range.
// ====================================================================================================================

#define DEFAULT_MAX_TOKENS 32768  // the model card's
#define NOT_GIVEN UINT64_MAX      // of an option whose default depends on the model, or that has none

// A list of whole numbers, as --prefill 128,512 gives it.
struct CountList {
    uint64_t values[4096];
    size_t count;
    bool all;                     // the word "all" instead of numbers
};

enum Color { COLOR_AUTO, COLOR_ALWAYS, COLOR_NEVER };

// One command line. The numbers are uint64_t throughout, since the table below reaches them by their offset.
struct Command {
    const struct CommandKind *kind;
    const char *arguments[2];     // MODEL and what follows it; NULL where absent
    size_t argument_count;
    uint64_t threads, batch, context;
    uint64_t cache;               // enum CacheType
    bool copy;
    const char *isa;
    uint64_t max_tokens, top_k, seed, think_budget;
    double temperature, top_p, min_p;
    bool no_think, hide_thinking;
    bool json, quiet;
    uint64_t color;               // enum Color
    const char *ids;              // a file; NULL where absent, as are the next two
    const char *save_base, *kld;
    uint64_t greedy;
    struct CountList logits, experts;
    bool argmax;
    struct CountList prefill, depth;
    uint64_t decode, layers;      // layers: 0 for all of the shape
    uint64_t seconds;
    bool uniform;
    bool markup, decode_ids, hex, chat, ids_only;
    bool verify;
    bool help;
    // What main() has started, for the commands that compute.
    struct Team *team;
    const struct Kernels *kernels;
};

enum { RUN = 1, BENCH = 2, PERPLEXITY = 4, INSPECT = 8, TOKENIZE = 16, LOGITS = 32, ALL_COMMANDS = 63 };

struct CommandKind {
    const char *name;
    unsigned bit;                 // of the enum above
    const char *arguments;        // as the help shows them
    size_t least_arguments, most_arguments;
    int (*function)(struct Command *command);
    bool computes;                // needs threads and kernels
    const char *summary;          // one line for `r1 --help`
    const char *details;          // lines for `r1 COMMAND --help`: more to know, and examples
};

enum OptionKind {
    OPTION_FLAG,                  // no value
    OPTION_COUNT,                 // a whole number
    OPTION_NUMBER,
    OPTION_WORD,                  // one of words[0..most]
    OPTION_TEXT,
    OPTION_COUNTS,                // whole numbers joined by commas
    OPTION_COUNTS_OR_ALL,
};

struct Option {
    const char *name;
    char letter;                  // of the short form, or 0
    unsigned commands;            // that know it
    enum OptionKind kind;
    size_t field;                 // its offset in struct Command
    double least, most;
    const char *const *words;
    const char *topic;            // its heading in the help
    const char *value;            // what the help calls its value
    const char *help;
};

static const char *const color_words[] = {"auto", "always", "never"};

#define FIELD(name) offsetof(struct Command, name)
#define COMPUTING (RUN | BENCH | PERPLEXITY | LOGITS)
static const struct Option options[] = {
    {"max-tokens", 'n', RUN, OPTION_COUNT, FIELD(max_tokens), 1, 1 << 24, NULL, "Length", "N", "end after N tokens (32768)"},
    {"context", 'c', RUN | PERPLEXITY | INSPECT, OPTION_COUNT, FIELD(context), 1, 1 << 24, NULL, "Length", "N",
     "room for N tokens, prompt and output together"},
    {"temperature", 0, RUN, OPTION_NUMBER, FIELD(temperature), 0, 100, NULL, "Sampling", "X",
     "how freely tokens are drawn; 0 always takes the likeliest (0.6)"},
    {"top-p", 0, RUN, OPTION_NUMBER, FIELD(top_p), 0, 1, NULL, "Sampling", "X",
     "only the likeliest tokens that sum to X (0.95; 1: off)"},
    {"top-k", 0, RUN, OPTION_COUNT, FIELD(top_k), 0, MAX_VOCAB, NULL, "Sampling", "N", "only the N likeliest tokens (0: off)"},
    {"min-p", 0, RUN, OPTION_NUMBER, FIELD(min_p), 0, 1, NULL, "Sampling", "X",
     "only tokens at least X times as likely as the likeliest (0: off)"},
    {"seed", 0, RUN, OPTION_COUNT, FIELD(seed), 0, 0x1p63, NULL, "Sampling", "N", "the same seed gives the same text again"},
    {"no-think", 0, RUN, OPTION_FLAG, FIELD(no_think), 0, 0, NULL, "Thinking", NULL, "answer at once"},
    {"think-budget", 0, RUN, OPTION_COUNT, FIELD(think_budget), 0, 1 << 24, NULL, "Thinking", "N",
     "end the thinking after N tokens and have the answer written"},
    {"hide-thinking", 0, RUN, OPTION_FLAG, FIELD(hide_thinking), 0, 0, NULL, "Thinking", NULL, "show the answer alone"},
    {"ids", 0, PERPLEXITY | LOGITS, OPTION_TEXT, FIELD(ids), 0, 0, NULL, "Input", "FILE",
     "token ids separated by white space, not text"},
    {"save-base", 0, PERPLEXITY, OPTION_TEXT, FIELD(save_base), 0, 0, NULL, "Divergence", "FILE",
     "keep this model's predictions as the base for --kld"},
    {"kld", 0, PERPLEXITY, OPTION_TEXT, FIELD(kld), 0, 0, NULL, "Divergence", "FILE", "KL divergence from the predictions in FILE"},
    {"greedy", 0, LOGITS, OPTION_COUNT, FIELD(greedy), 0, 1 << 24, NULL, "Output", "N", "go on for N tokens, always the likeliest"},
    {"argmax", 0, LOGITS, OPTION_FLAG, FIELD(argmax), 0, 0, NULL, "Output", NULL, "the likeliest next token of every position"},
    {"logits", 0, LOGITS, OPTION_COUNTS_OR_ALL, FIELD(logits), 0, 1 << 25, NULL, "Output", "POS,..",
     "the whole vocabulary's logits at these positions, or at all"},
    {"experts", 0, LOGITS, OPTION_COUNTS, FIELD(experts), 0, 1 << 25, NULL, "Output", "POS,..", "experts and weights at these positions"},
    {"prefill", 0, BENCH, OPTION_COUNTS, FIELD(prefill), 0, 1 << 24, NULL, "What is measured", "N,..", "reading prompts of N tokens (512)"},
    {"decode", 0, BENCH, OPTION_COUNT, FIELD(decode), 0, 1 << 24, NULL, "What is measured", "N", "writing N tokens (64)"},
    {"depth", 0, BENCH, OPTION_COUNTS, FIELD(depth), 0, 1 << 24, NULL, "What is measured", "N,..",
     "with N tokens in the cache already (0)"},
    {"layers", 0, BENCH, OPTION_COUNT, FIELD(layers), 1, MAX_LAYERS, NULL, "What is measured", "N", "the first N layers of a shape"},
    {"uniform", 0, BENCH, OPTION_FLAG, FIELD(uniform), 0, 0, NULL, "What is measured", NULL,
     "a shape with every matrix at TYPE, not mixed as r1-convert does"},
    {"seconds", 0, BENCH, OPTION_COUNT, FIELD(seconds), 0, 86400, NULL, "What is measured", "N",
     "how long the table may take (180; 0: only predict)"},
    {"markup", 0, TOKENIZE, OPTION_FLAG, FIELD(markup), 0, 0, NULL, "Input", NULL, "special tokens in the text count as such"},
    {"chat", 0, TOKENIZE, OPTION_FLAG, FIELD(chat), 0, 0, NULL, "Input", NULL,
     "a line is a JSON array of {\"role\", \"content\"}: the prompt's ids"},
    {"decode", 0, TOKENIZE, OPTION_FLAG, FIELD(decode_ids), 0, 0, NULL, "Input", NULL, "a line is ids: their text"},
    {"hex", 0, TOKENIZE, OPTION_FLAG, FIELD(hex), 0, 0, NULL, "Input", NULL,
     "text, in or out, is written as the hexadecimal of its bytes"},
    {"ids-only", 0, TOKENIZE, OPTION_FLAG, FIELD(ids_only), 0, 0, NULL, "Output", NULL,
     "ids without their pieces (the default into a pipe)"},
    {"verify", 0, INSPECT, OPTION_FLAG, FIELD(verify), 0, 0, NULL, "Output", NULL, "read every tensor and compare its checksum"},
    {"json", 0, BENCH | INSPECT | PERPLEXITY, OPTION_FLAG, FIELD(json), 0, 0, NULL, "Output", NULL, "one JSON object"},
    {"color", 0, RUN, OPTION_WORD, FIELD(color), 0, COLOR_NEVER, color_words, "Output", "WHEN", "auto, always or never dim the thinking"},
    {"quiet", 'q', ALL_COMMANDS, OPTION_FLAG, FIELD(quiet), 0, 0, NULL, "Output", NULL, "no progress, remarks and statistics"},
    {"threads", 't', COMPUTING | INSPECT, OPTION_COUNT, FIELD(threads), 1, MAX_THREADS, NULL, "Machine", "N",
     "threads (as many as there are physical cores)"},
    {"batch", 0, COMPUTING | INSPECT, OPTION_COUNT, FIELD(batch), 1, MAX_BATCH, NULL, "Machine", "N",
     "tokens of a prompt read at once (512; 2048 with experts)"},
    {"copy", 0, COMPUTING, OPTION_FLAG, FIELD(copy), 0, 0, NULL, "Machine", NULL,
     "copy the model's file into memory first, in 2 MB pages, instead of reading it in place"},
    {"kv", 0, COMPUTING | INSPECT, OPTION_WORD, FIELD(cache), 0, CACHE_Q8, cache_names, "Machine", "TYPE",
     "f32, f16 or q8: how the cache is kept (f16)"},
    {"isa", 0, COMPUTING, OPTION_TEXT, FIELD(isa), 0, 0, NULL, "Machine", "NAME",
     "auto, portable, avx2, avxvnni, avx512 or neon instructions"},
    {"help", 'h', ALL_COMMANDS, OPTION_FLAG, FIELD(help), 0, 0, NULL, "Machine", NULL, "this text"},
};
#undef FIELD
#define OPTION_TOTAL (sizeof options / sizeof *options)

static void print_command_help(const struct CommandKind *kind) {
    printf("Usage: r1 %s %s\n\n%s\n", kind->name, kind->arguments, kind->details);
    bool printed[OPTION_TOTAL] = {false};
    for (size_t first = 0; first < OPTION_TOTAL; first++) {
        if (printed[first] || !(options[first].commands & kind->bit)) continue;
        printf("\n%s\n", options[first].topic);
        for (size_t i = first; i < OPTION_TOTAL; i++) {
            const struct Option *option = &options[i];
            if (printed[i] || !(option->commands & kind->bit) || strcmp(option->topic, options[first].topic) != 0) continue;
            char left[64], letter[8] = "    ";
            if (option->letter) snprintf(letter, sizeof letter, "-%c, ", option->letter);
            snprintf(left, sizeof left, "%s--%s%s%s", letter, option->name, option->value ? " " : "", option->value ? option->value : "");
            printf("  %-26s %s\n", left, option->help);
            printed[i] = true;
        }
    }
}

// Ends the program with status 2.
static _Noreturn __attribute__((format(printf, 2, 3))) void wrong_usage(const struct Command *command, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "r1: %s: ", command->kind->name);
    vfprintf(stderr, format, args);
    fprintf(stderr, " (r1 %s --help tells more)\n", command->kind->name);
    va_end(args);
    exit(2);
}

// Digits only; false for anything else and for what 64 bits do not hold.
static bool parse_count(const char *text, size_t length, uint64_t *value) {
    *value = 0;
    for (size_t i = 0; i < length; i++) {
        unsigned digit = (unsigned char)text[i] - (unsigned)'0';
        if (digit > 9 || *value > (UINT64_MAX - digit) / 10) return false;
        *value = *value * 10 + digit;
    }
    return length > 0;
}

static void parse_counts(const struct Command *command, const struct Option *option, const char *text, struct CountList *list) {
    const size_t most = sizeof list->values / sizeof *list->values;
    list->count = 0;
    list->all = option->kind == OPTION_COUNTS_OR_ALL && strcmp(text, "all") == 0;
    for (const char *item = text; !list->all; item++) {
        size_t length = strcspn(item, ",");
        uint64_t value;
        if (!parse_count(item, length, &value) || (double)value < option->least || (double)value > option->most)
            wrong_usage(command, "--%s: '%.*s' is not a whole number from %.0f to %.0f", option->name, (int)min_size(length, 40), item,
                        option->least, option->most);
        if (list->count == most) wrong_usage(command, "--%s: more than %zu numbers", option->name, most);
        list->values[list->count++] = value;
        item += length;
        if (!*item) return;
    }
}

static void set_option(struct Command *command, const struct Option *option, const char *text) {
    char *field = (char *)command + option->field, *end;
    double number;
    uint64_t count;
    switch (option->kind) {
    case OPTION_FLAG:
        *(bool *)field = true;
        break;
    case OPTION_TEXT:
        *(const char **)(void *)field = text;
        break;
    case OPTION_COUNT:
        if (!parse_count(text, strlen(text), &count) || (double)count < option->least || (double)count > option->most)
            wrong_usage(command, "--%s: '%.40s' is not a whole number from %.0f to %.0f", option->name, text, option->least, option->most);
        *(uint64_t *)(void *)field = count;
        break;
    case OPTION_NUMBER:
        number = strtod(text, &end);
        if (end == text || *end || !(number >= option->least && number <= option->most))   // not-a-number fails, too
            wrong_usage(command, "--%s: '%.40s' is not a number from %g to %g", option->name, text, option->least, option->most);
        *(double *)(void *)field = number;
        break;
    case OPTION_WORD:
        for (count = 0; count <= (uint64_t)option->most; count++)
            if (strcmp(text, option->words[count]) == 0) {
                *(uint64_t *)(void *)field = count;
                return;
            }
        wrong_usage(command, "--%s: '%.40s' is none of %s, %s, %s", option->name, text, option->words[0], option->words[1], option->words[2]);
    case OPTION_COUNTS:
    case OPTION_COUNTS_OR_ALL:
        parse_counts(command, option, text, (struct CountList *)(void *)field);
        break;
    }
}

// The option that the argument names, by its long form up to '=' or the end, or its letter; NULL if the command has none such.
static const struct Option *find_option(const struct Command *command, const char *argument) {
    bool is_long = argument[1] == '-';
    size_t length = is_long ? strcspn(argument + 2, "=") : 1;
    for (const struct Option *option = options; option < options + OPTION_TOTAL; option++)
        if ((option->commands & command->kind->bit) &&
            (is_long ? strlen(option->name) == length && strncmp(option->name, argument + 2, length) == 0 : option->letter == argument[1]))
            return option;
    return NULL;
}

// Takes --x V, --x=V, -x V and -xV; everything behind "--" is an argument, and so is "-".
static void parse_command_line(struct Command *command, int argc, char **argv) {
    bool only_arguments = false;
    for (int i = 0; i < argc; i++) {
        const char *argument = argv[i];
        if (only_arguments || argument[0] != '-' || !argument[1]) {
            if (command->argument_count == command->kind->most_arguments)
                wrong_usage(command, "too many arguments at '%.60s'; a text with blanks needs quotes", argument);
            command->arguments[command->argument_count++] = argument;
            continue;
        }
        if (strcmp(argument, "--") == 0) {
            only_arguments = true;
            continue;
        }
        const struct Option *option = find_option(command, argument);
        bool is_long = argument[1] == '-';
        const char *value = is_long ? strchr(argument, '=') : argument[2] ? argument + 1 : NULL;
        if (!option && isdigit((unsigned char)argument[1])) wrong_usage(command, "%.60s is no option; a text that starts with - goes behind --", argument);
        if (!option) wrong_usage(command, "unknown option %.*s", is_long ? (int)min_size(strcspn(argument, "="), 60) : 2, argument);
        if (option->kind == OPTION_FLAG) {
            if (value) wrong_usage(command, "--%s takes no value, but '%.60s' gives it one", option->name, argument);
        } else if (value) {
            value++;
        } else if (i + 1 == argc) {
            wrong_usage(command, "%s needs a value", argument);
        } else {
            value = argv[++i];
        }
        set_option(command, option, value);
    }
}

// ---- what the commands share

// "1.23 GB", "671 billion": three digits and a unit; units is a list of the names of 1, 1000, 1000^2...
static const char *format_amount(double value, const char *const *units, char *text, size_t size) {
    while (value >= 999.5 && units[1]) value /= 1000, units++;
    snprintf(text, size, value >= 100 || value == floor(value) ? "%.0f %s" : value >= 10 ? "%.1f %s" : "%.2f %s", value, *units);
    return text;
}

static const char *const byte_units[] = {"bytes", "kB", "MB", "GB", "TB", NULL};
static const char *const count_units[] = {"", "thousand", "million", "billion", "trillion", NULL};
#define BYTES(value) format_amount((double)(value), byte_units, (char[32]){0}, 32)
#define COUNT(value) format_amount((double)(value), count_units, (char[32]){0}, 32)

// The same model in memory of its own, which the system can back with 2 MB pages; the file's mapping goes.
static struct Model *copy_model(struct Model *model) {
    uint64_t available = available_memory();
    uint8_t *copy = available && model->size > available ? NULL : map_memory(model->size);
    if (!copy) die("%s: a copy takes %s of memory, %s are available; leave --copy out", model->name, BYTES(model->size), BYTES(available));
    memcpy(copy, model->bytes, model->size);
    char error[ERROR_BYTES];
    struct Model *moved = model_from_memory(copy, model->size, model->name, error);
    if (!moved) die("%s", error);
    moved->mapped = true;
    model_close(model);
    return moved;
}

static struct Model *open_model(const struct Command *command, const char *path, bool needs_weights) {
    char error[ERROR_BYTES];
    struct Model *model = model_open(path, error);
    if (!model) die("%s", error);
    if (command->copy && model->mapped) model = copy_model(model);
    if (needs_weights && !model->has_weights) {
        model_close(model);
        die("%s: the file holds a tokenizer and no weights (it was made with --tokenizer-only)", path);
    }
    return model;
}

// For a command that turns text into tokens or back.
static void need_tokenizer(const struct Model *model) {
    if (!tokenizer_size(model->tokenizer))
        die("%s: the file has no tokenizer; r1-convert --synthetic puts one in with --tokenizer DIR", model->name);
}

static size_t micro_batch(const struct Command *command, const struct Model *model) {
    if (command->batch != NOT_GIVEN) return command->batch;
    return model->config.n_routed_experts ? 2048 : 512;
}

// A session, or the end with a sentence where the memory for it (besides the weights, which are the file's) is not there.
static struct Session *open_session(const struct Command *command, const struct Model *model, const struct SessionOptions *session_options) {
    struct MemoryPlan plan = plan_memory(model, session_options, command->team->threads);
    uint64_t available = available_memory();
    if (available && plan.cache + plan.scratch > available)
        die("%s: a context of %zu tokens in micro-batches of %zu needs %s of memory besides the weights, %s are available",
            model->name, session_options->context, session_options->batch, BYTES(plan.cache + plan.scratch), BYTES(available));
    char error[ERROR_BYTES];
    struct Session *session = session_create(model, command->team, command->kernels, session_options, error);
    if (!session) die("%s", error);
    return session;
}

// A remark on standard error.
static __attribute__((format(printf, 2, 3))) void note(const struct Command *command, const char *format, ...) {
    if (command->quiet) return;
    va_list args;
    va_start(args, format);
    fputs("r1: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

static bool shows_progress(const struct Command *command) {
    const char *kind = getenv("TERM");
    return !command->quiet && isatty(STDERR_FILENO) && !(kind && strcmp(kind, "dumb") == 0);
}

// One line on a terminal that overwrites itself: how far the work is, and the time left; with a total of 0 only `what`.
// `started` is a clock_seconds().
static bool progress_shown;

static void show_progress(const struct Command *command, const char *what, double done, double total, double started) {
    static double shown_at;
    double now = clock_seconds();
    if (!shows_progress(command) || now - shown_at < 0.1) return;
    shown_at = now;
    progress_shown = true;
    fprintf(stderr, "\r%s", what);
    if (total > 0) fprintf(stderr, ": %.0f %%", 100 * done / total);
    if (done > 0 && done < total && now - started > 1) {
        double left = (now - started) * (total - done) / done;
        fprintf(stderr, ", %.0f:%02.0f left", floor(left / 60), floor(fmod(left, 60)));
    }
    fputs("\x1b[K", stderr);
}

static void end_progress(const struct Command *command) {
    if (progress_shown && shows_progress(command)) fputs("\r\x1b[K", stderr);
    progress_shown = false;
}

// Standard output takes no more. A reader that has seen enough and closed the pipe (`| head`) ends the program quietly.
static _Noreturn void end_output(int reason) {
    if (reason == EPIPE) _exit(0);
    die("standard output: %s", reason ? strerror(reason) : "a write failed");
}

// Hands on what standard output has buffered.
static void flush_output(void) {
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout)) end_output(errno);
}

// A string for a JSON object, which must be UTF-8; a file's name need not be, and then gets a '?' for each strange byte.
static json_t *json_text(const char *text) {
    json_t *string = json_string(text);
    if (string) return string;
    char ascii[256];
    snprintf(ascii, sizeof ascii, "%s", text);
    for (char *c = ascii; *c; c++)
        if (*c & 0x80) *c = '?';
    return json_string(ascii);
}

static void print_json(json_t *object) {
    if (!object || (json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) != 0 && !ferror(stdout))) die("out of memory");
    json_decref(object);
    putchar('\n');
    flush_output();
}

// A list that has room for one more item than it holds; items may move.
static void *grow(void *items, size_t count, size_t *capacity, size_t item_bytes) {
    if (count < *capacity) return items;
    *capacity = max_size(64, 2 * *capacity);
    items = realloc(items, *capacity * item_bytes);
    if (!items) die("out of memory: %zu MB more were needed", *capacity * item_bytes >> 20);
    return items;
}

// The whole of a file, a zero behind it; "-" is standard input.
static char *read_file(const char *path, size_t *bytes) {
    bool is_input = strcmp(path, "-") == 0;
    FILE *file = is_input ? stdin : fopen(path, "rb");
    if (!file) die("%s: %s", path, strerror(errno));
    size_t capacity = 1 << 16;
    char *text = allocate(capacity);
    *bytes = 0;
    while (!feof(file) && !ferror(file)) {   // a terminal's end of input comes once: do not read on behind it
        *bytes += fread(text + *bytes, 1, capacity - 1 - *bytes, file);
        text = grow(text, *bytes + 1, &capacity, 1);
    }
    if (ferror(file)) die("%s: %s", is_input ? "standard input" : path, strerror(errno));
    if (!is_input) fclose(file);
    text[*bytes] = 0;
    return text;
}

static void push_id(TokenList *list, uint32_t id) {
    list->ids = grow(list->ids, list->count, &list->capacity, sizeof *list->ids);
    list->ids[list->count++] = id;
}

// Appends the ids that a text names, separated by white space; each must be below `limit`. Complaints name the place that
// the text comes from and count its ids from 1.
static void parse_ids(const char *text, size_t bytes, uint64_t limit, const char *place, TokenList *out) {
    size_t at = 0, number = 0;
    for (;;) {
        while (at < bytes && isspace((unsigned char)text[at])) at++;
        if (at == bytes) return;
        size_t start = at;
        while (at < bytes && !isspace((unsigned char)text[at])) at++;
        number++;
        uint64_t id;
        if (!parse_count(text + start, at - start, &id))
            die("%s: id %zu: '%.*s' is not a whole number", place, number, (int)min_size(at - start, 40), text + start);
        if (id >= limit)
            die("%s: id %zu: %" PRIu64 " is beyond the vocabulary, whose ids are 0 to %" PRIu64, place, number, id, limit - 1);
        push_id(out, (uint32_t)id);
    }
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// ====================================================================================================================
// Synthetic models
//
// `r1 bench SHAPE[:TYPE]` times a known model without its file: memory is filled with the tensors that convert/shapes.h
// lists for its shape, the same as in a file of r1-convert --synthetic, and bound by the same bind_model(). What it writes
// makes no sense; how long it takes does.
// ====================================================================================================================

// Lays out a model of a known shape in memory that is not yet filled, nor taken from the system. NULL with a sentence in
// error. layers: 0 for all. Not in_memory: only to be counted, at an address that is never read.
static struct Model *model_of_shape(const struct Shape *shape, uint32_t type, bool uniform, size_t layers, bool in_memory, char *error) {
    struct Model *model = allocate(sizeof *model);
    model->config = shape_config(shape, type, (uint32_t)layers);
    model->has_weights = true;
    snprintf(model->name, sizeof model->name, "%s", shape->name);
    struct ModelTensor *tensors = allocate(most_tensors(&model->config) * sizeof *tensors);
    model->entry_count = list_model(&model->config, tensors);
    struct TensorEntry *entries = allocate(model->entry_count * sizeof *entries);
    for (size_t i = 0; i < model->entry_count; i++) {
        struct TensorEntry *entry = &entries[i];
        *entry = tensors[i].entry;
        for (unsigned part = 0; part < entry->parts; part++)
            entry->dtype[part] = choose_dtype(&model->config, uniform, tensors[i].role, shape->source);
        entry->stride = blob_bytes(entry);
        entry->bytes = entry->experts * entry->stride;
        entry->offset = model->size;
        model->size = align_up(model->size + entry->bytes, FORMAT_PAGE);
    }
    free(tensors);
    model->entries = entries;
    model->bytes = in_memory ? map_memory(model->size) : (const uint8_t *)(uintptr_t)FORMAT_PAGE;
    model->mapped = in_memory && model->bytes;
    if (!model->bytes) fail(error, "%s: the system does not give %.1f GB of memory", shape->name, (double)model->size / 1e9);
    else if (bind_model(model, error)) return model;
    free(entries);
    model_close(model);
    return NULL;
}

static void close_shape(struct Model *model) {
    const struct TensorEntry *entries = model->entries;
    model_close(model);
    free((void *)(uintptr_t)entries);
}

struct Filling {
    const struct Team *team;
    const struct Model *model;
};

static void fill_weights(void *argument, int thread) {
    const struct Filling *filling = argument;
    for (size_t i = 0; i < filling->model->entry_count; i++) {
        const struct TensorEntry *entry = &filling->model->entries[i];
        uint8_t *data = (uint8_t *)(uintptr_t)filling->model->bytes + entry->offset;
        if (entry->is_vector) {
            if (thread == 0) fill_vector(entry, data);
            continue;
        }
        for (uint64_t blob = 0; blob < entry->experts; blob++)
            for (unsigned part = 0; part < entry->parts; part++) {
                // The share that this thread reads when it decodes: the page comes from memory near its processor.
                size_t panel, end;
                static_share(filling->team, thread, ceil_div(entry->rows[part], PANEL_ROWS), &panel, &end);
                for (; panel < end; panel++) {
                    uint64_t offset = panel_offset(entry, blob, part, panel);
                    fill_panel(entry, part, offset, data + offset);
                }
            }
    }
}

// ====================================================================================================================
// What the machine can do
//
// Decoding cannot be faster than memory is read, prefill not faster than integers are multiplied. `r1 bench` measures
// these limits before and after every measurement, with all threads: machines differ, and a cloud moves its guests to
// other cores while they run, which can change what they read in a second by half.
// ====================================================================================================================

#define PROBE_PASSES 3            // the best one counts
#define PROBE_SECONDS 2.0         // after which there are no more passes
#define PROBE_BYTES ((uint64_t)2 << 30)

struct Machine {
    double read_gb_s;             // 10^9 bytes a second, from huge pages; 0 if there was no memory for it
    double int8_gmac_s;           // 10^9 int8 multiply-adds a second, operands in registers
};

struct Probe {
    struct Team *team;
    const struct Kernels *kernels;
    uint8_t *bytes;               // [count] to be read; NULL if there was no memory
    size_t count;
    uint64_t rounds;
    enum { PROBE_TOUCH, PROBE_READ, PROBE_MULTIPLY } what;
    atomic_uint_fast64_t result;  // of no meaning; keeps the compiler from dropping the reads
};

static void run_probe(void *argument, int thread) {
    struct Probe *probe = argument;
    if (probe->what == PROBE_MULTIPLY) {
        probe->kernels->multiply_probe(probe->rounds);
        return;
    }
    size_t first, end;
    static_share(probe->team, thread, probe->count / 4096, &first, &end);
    uint8_t *share = probe->bytes + first * 4096;
    size_t count = (end - first) * 4096;
    if (probe->what == PROBE_TOUCH) memset(share, 1, count);
    else atomic_fetch_add(&probe->result, probe->kernels->read_probe(share, count));
}

// Seconds that all threads take for it, the best of a few times.
static double time_probe(struct Probe *probe, int what) {
    probe->what = what;
    double best = INFINITY, began = clock_seconds();
    for (int pass = 0; pass < PROBE_PASSES && clock_seconds() - began < PROBE_SECONDS; pass++) {
        double start = clock_seconds();
        team_run(probe->team, run_probe, probe);
        best = fmin(best, clock_seconds() - start);
    }
    return best;
}

// Takes memory to read from, up to half of `room` bytes.
static struct Probe open_probe(struct Team *team, const struct Kernels *kernels, uint64_t room) {
    struct Probe probe = {.team = team, .kernels = kernels, .rounds = 1000, .what = PROBE_TOUCH};
    probe.count = (size_t)(room / 2 < PROBE_BYTES ? room / 2 : PROBE_BYTES) / 4096 * 4096;
    probe.bytes = probe.count ? map_memory(probe.count) : NULL;
    if (probe.bytes) team_run(team, run_probe, &probe);
    while (time_probe(&probe, PROBE_MULTIPLY) < 0.02) probe.rounds *= 2;   // shorter is not exact
    return probe;
}

static void close_probe(struct Probe *probe) {
    if (probe->bytes) munmap(probe->bytes, probe->count);
}

static double measure_reading(struct Probe *probe) {
    return probe->bytes ? (double)probe->count / time_probe(probe, PROBE_READ) / 1e9 : 0;
}

static double measure_multiplying(struct Probe *probe) {
    return probe->kernels->macs_per_round * (double)probe->rounds * probe->team->threads / time_probe(probe, PROBE_MULTIPLY) / 1e9;
}

// ====================================================================================================================
// r1 bench
//
// Of one model: a line for each prompt length and depth. Without a model: the table of all known ones, in which the
// cheapest are measured, as many as the time allows, and the others predicted from them.
// ====================================================================================================================

#define BENCH_REPETITIONS 5       // of a measurement; the median counts
#define BENCH_PATIENCE 20.0       // see struct Bench
#define BENCH_WARM_TOKENS 4

struct Bench {
    const struct Command *command;
    struct Model *model;
    bool synthetic;
    double patience;              // a measurement that has taken this many seconds is not repeated
    double load_s;
    struct Probe probe;
    struct Machine machine;       // as it was at the start
    struct Session *session;
    uint32_t *tokens;             // pseudo-random, as many as the longest prefill and decode take
};

// Opens or lays out the model; the weights of a synthetic one are filled in later.
static void open_bench_model(struct Bench *bench) {
    const struct Command *command = bench->command;
    const char *text = command->arguments[0], *type_name;
    const struct Shape *shape = find_shape(text, &type_name);
    if (!shape) {
        if (command->uniform || command->layers)
            wrong_usage(command, "--%s goes with a shape, %s is none", command->uniform ? "uniform" : "layers", text);
        if (access(text, F_OK) != 0 && strcmp(text, "demo") != 0 && !strchr(text, '/'))
            die("%s: neither a file nor a known shape (r1 bench --help lists the shapes)", text);
        double start = clock_seconds();
        bench->model = open_model(command, text, true);
        bench->load_s = clock_seconds() - start;
        return;
    }
    uint32_t type = type_name ? 0 : DTYPE_Q4;
    for (uint32_t dtype = DTYPE_F32; type_name && dtype < DTYPE_COUNT; dtype++)
        if (strcmp(type_name, dtype_name(dtype)) == 0) type = dtype;
    if (!type) wrong_usage(command, "%s: unknown type \"%s\", expected f32, bf16, f8, q8, q6 or q4", text, type_name);
    if (command->layers > shape->config.num_hidden_layers)
        wrong_usage(command, "--layers %" PRIu64 ": %s has 1 to %u", command->layers, shape->name, shape->config.num_hidden_layers);
    char error[ERROR_BYTES];
    bench->model = model_of_shape(shape, type, command->uniform, command->layers, true, error);
    if (!bench->model) die("%s", error);
    bench->synthetic = true;
}

static uint64_t largest_count(const struct CountList *list) {
    uint64_t largest = 0;
    for (size_t i = 0; i < list->count; i++) largest = list->values[i] > largest ? list->values[i] : largest;
    return largest;
}

// The session has room for the longest measurement. Every page of its cache is written: a page that was only ever read is
// the system's one page of zeros, which would stay in the processor's own cache. Zeros are as good as real keys and values
// to measure time.
static void open_bench_session(struct Bench *bench) {
    const struct Command *command = bench->command;
    const struct ModelConfig *c = &bench->model->config;
    uint64_t longest = largest_count(&command->prefill), depth = largest_count(&command->depth), most = c->max_position_embeddings;
    uint64_t decoded = command->decode + BENCH_WARM_TOKENS, tokens = longest > decoded ? longest : decoded;
    if (tokens > most || depth > most - tokens)
        wrong_usage(command, "a depth of %" PRIu64 " and %" PRIu64 " tokens more go beyond the model's %" PRIu64 " positions", depth, tokens, most);
    size_t batch = min_size(micro_batch(command, bench->model), max_size((size_t)longest, 1));
    struct SessionOptions options = {.context = (size_t)(depth + tokens), .batch = batch, .logits_rows = 1, .cache = (enum CacheType)command->cache};
    struct MemoryPlan plan = plan_memory(bench->model, &options, (int)command->threads);
    uint64_t needed = plan.weights + plan.cache + plan.scratch, available = available_memory();
    if (bench->synthetic && available && needed > available)
        die("%s:%s does not fit in memory: it needs %.1f GB, %.1f GB are available; --layers N takes a slice", bench->model->name,
            dtype_name(c->recipe), (double)needed / 1e9, (double)available / 1e9);
    bench->probe = open_probe(command->team, command->kernels, available ? available - (needed < available ? needed : available) : 2 * PROBE_BYTES);
    bench->machine = (struct Machine){measure_reading(&bench->probe), measure_multiplying(&bench->probe)};
    if (bench->synthetic) {
        double start = clock_seconds();
        team_run(command->team, fill_weights, &(struct Filling){command->team, bench->model});
        bench->load_s = clock_seconds() - start;
    }
    bench->session = open_session(command, bench->model, &options);
    memset(bench->session->cache, 0, c->num_hidden_layers * bench->session->cache_layer_bytes);
    bench->tokens = allocate((size_t)tokens * sizeof *bench->tokens);
    uint64_t random = 1;
    for (size_t i = 0; i < tokens; i++) bench->tokens[i] = (uint32_t)(random_word(&random) % c->vocab_size);
}

// Seconds of evaluating `count` tokens behind `depth` others, in one prefill or one by one.
static double time_once(const struct Bench *bench, bool decoding, size_t count, size_t depth) {
    bench->session->position = depth;
    double start = clock_seconds();
    if (!decoding) prefill(bench->session, bench->tokens, count);
    for (size_t i = 0; decoding && i < count; i++) forward(bench->session, bench->tokens + i, 1, LOGITS_LAST);
    return clock_seconds() - start;
}

// Multiply-adds of weights in a prefill; the head's are for the last token alone.
static double prefill_macs(const struct Model *model, size_t count) {
    return (double)count * active_weights(model) + (double)model->head.rows * (double)model->head.cols;
}

// A fraction as `length` characters, ended by a zero byte.
static const char *draw_bar(char *bar, int length, double fraction) {
    for (int i = 0; i < length; i++) bar[i] = fraction * length >= i + 0.5 ? '#' : '.';
    bar[length] = 0;
    return bar;
}

// A speed against the machine's limit at that time.
struct Speed {
    double tok_s;
    double rate, limit, fraction; // 10^9 bytes read, or multiply-adds of weights, a second; the most there can be; rate / limit
};

static int compare_speeds(const void *a, const void *b) {
    return compare_doubles(&((const struct Speed *)a)->fraction, &((const struct Speed *)b)->fraction);
}

// The median of a few times, by the fraction; before and after each the limit is measured.
static struct Speed measure_speed(struct Bench *bench, bool decoding, size_t count, size_t depth) {
    double (*measure_limit)(struct Probe *) = decoding ? measure_reading : measure_multiplying;
    double work = (decoding ? (double)count * active_bytes(bench->model) : prefill_macs(bench->model, count)) / 1e9;
    struct Speed speeds[BENCH_REPETITIONS];
    double spent = time_once(bench, decoding, decoding ? BENCH_WARM_TOKENS : count, depth), before = measure_limit(&bench->probe);
    size_t rounds = 0;
    do {
        double seconds = time_once(bench, decoding, count, depth), after = measure_limit(&bench->probe), limit = (before + after) / 2;
        speeds[rounds++] = (struct Speed){(double)count / seconds, work / seconds, limit, limit > 0 ? work / seconds / limit : 0};
        spent += seconds;
        before = after;
    } while (rounds < BENCH_REPETITIONS && spent <= bench->patience);
    qsort(speeds, rounds, sizeof *speeds, compare_speeds);
    return speeds[rounds / 2];
}

// Measures, and prints a line or adds it to the list of the JSON object.
static void measure_tokens(struct Bench *bench, bool decoding, size_t count, size_t depth, json_t *list) {
    struct Speed speed = measure_speed(bench, decoding, count, depth);
    if (bench->command->json) {
        json_t *row = decoding ? json_pack("{s:I, s:f, s:f, s:f, s:f, s:f}", "depth", (json_int_t)depth, "tok_s", speed.tok_s, "bytes_per_token",
                                           active_bytes(bench->model), "gb_s", speed.rate, "limit", speed.limit, "fraction", speed.fraction)
                               : json_pack("{s:I, s:I, s:f, s:f, s:f, s:f}", "tokens", (json_int_t)count, "depth", (json_int_t)depth, "tok_s",
                                           speed.tok_s, "gmac_s", speed.rate, "limit", speed.limit, "fraction", speed.fraction);
        json_array_append_new(list, row);
        return;
    }
    printf("%-8s %7zu %8zu %10.2f  %7.1f of %5.1f %-6s  %s %5.1f %%\n", decoding ? "decode" : "prefill", count, depth, speed.tok_s, speed.rate,
           speed.limit, decoding ? "GB/s" : "GMAC/s", draw_bar((char[21]){0}, 20, speed.fraction), 100 * speed.fraction);
    flush_output();
}

static void print_bench_head(const struct Bench *bench) {
    const struct Model *model = bench->model;
    const struct Command *command = bench->command;
    printf("%s, %s, %.3g GB (%.3g GB read per token), %" PRIu64 " thread%s, %s, cache %s\n", model->name, dtype_name(model->config.recipe),
           (double)model->size / 1e9, active_bytes(model) / 1e9, command->threads, command->threads == 1 ? "" : "s", command->kernels->name,
           cache_names[command->cache]);
    printf("this machine: reads %.1f GB/s, multiplies %.0f int8 GMAC/s; %s in %.2f s\n\n", bench->machine.read_gb_s,
           bench->machine.int8_gmac_s, bench->synthetic ? "weights made up" : "loaded", bench->load_s);
    printf("%-8s %7s %8s %10s  %23s  of the machine's\n", "", "tokens", "depth", "tok/s", "");
    flush_output();
}

static void close_bench(struct Bench *bench) {
    free(bench->tokens);
    close_probe(&bench->probe);
    session_free(bench->session);
    if (bench->synthetic) close_shape(bench->model);
    else model_close(bench->model);
}

// ---- the table of all known models

#define TABLE_PROMPT 512          // tokens of a prefill
#define TABLE_DECODE 16           // tokens decoded
#define TABLE_CONTEXT 4096        // tokens of cache in the memory that a model needs
#define TABLE_SECONDS 180         // that measuring may take
#define TABLE_PATIENCE 8.0        // see struct Bench
#define TABLE_ROWS (2 * SHAPE_COUNT)

enum { DECODE, PREFILL, SPEEDS };

struct TableRow {
    const struct Shape *shape;
    uint32_t type;
    char name[64];
    bool has_experts, measured;
    double weights, memory;       // bytes; memory: weights, cache and scratch
    double seconds;               // that measuring it will take, about
    double work[SPEEDS];          // a token takes: bytes read to decode it, multiply-adds of its prefill
    struct Speed speed[SPEEDS];
};

// Bytes of memory that a model may take; 4 GB where the system does not say what is available.
static double find_room(void) {
    uint64_t available = available_memory();
    return available ? (double)available : 4e9;
}

static struct TableRow count_row(const struct Command *command, const struct Shape *shape, uint32_t type) {
    char error[ERROR_BYTES];
    struct Model *model = model_of_shape(shape, type, command->uniform, command->layers, false, error);
    if (!model) die("%s", error);
    struct SessionOptions options = {.context = TABLE_CONTEXT, .batch = micro_batch(command, model), .logits_rows = 1,
                                     .cache = (enum CacheType)command->cache};
    struct MemoryPlan plan = plan_memory(model, &options, (int)command->threads);
    struct TableRow row = {.shape = shape, .type = type, .has_experts = model->config.n_routed_experts > 0, .weights = (double)plan.weights,
                           .memory = (double)(plan.weights + plan.cache + plan.scratch),
                           .work = {[DECODE] = active_bytes(model), [PREFILL] = prefill_macs(model, TABLE_PROMPT) / TABLE_PROMPT}};
    snprintf(row.name, sizeof row.name, "%s:%s", shape->name, dtype_name(type));
    close_shape(model);
    return row;
}

static int compare_seconds(const void *a, const void *b) {
    return compare_doubles(&((const struct TableRow *)a)->seconds, &((const struct TableRow *)b)->seconds);
}

static int compare_memory(const void *a, const void *b) {
    return compare_doubles(&((const struct TableRow *)a)->memory, &((const struct TableRow *)b)->memory);
}

static void measure_row(const struct Command *command, struct TableRow *row) {
    char error[ERROR_BYTES];
    struct Bench bench = {.command = command, .synthetic = true, .patience = TABLE_PATIENCE};
    bench.model = model_of_shape(row->shape, row->type, command->uniform, command->layers, true, error);
    if (!bench.model) die("%s", error);
    open_bench_session(&bench);
    row->speed[PREFILL] = measure_speed(&bench, false, TABLE_PROMPT, 0);
    row->speed[DECODE] = measure_speed(&bench, true, TABLE_DECODE, 0);
    row->measured = true;
    close_bench(&bench);
}

// Measures the rows that take the least time, as long as there is time and they leave a tenth of the memory and 0.5 GB free.
static void measure_rows(const struct Command *command, struct TableRow *rows, const struct Machine *machine, double seconds) {
    double started = clock_seconds(), passed;
    for (struct TableRow *row = rows; row < rows + TABLE_ROWS; row++)   // weights are made up more slowly than they are read
        row->seconds = (8 * row->weights + 4 * TABLE_DECODE * row->work[DECODE]) / machine->read_gb_s / 1e9 +
                       4 * TABLE_PROMPT * row->work[PREFILL] / machine->int8_gmac_s / 1e9;
    qsort(rows, TABLE_ROWS, sizeof *rows, compare_seconds);
    for (struct TableRow *row = rows; row < rows + TABLE_ROWS && (passed = clock_seconds() - started) + row->seconds <= seconds; row++) {
        if (row->memory + 0.5e9 > 0.9 * find_room()) continue;
        char what[128];
        snprintf(what, sizeof what, "measuring %s; the table", row->name);
        show_progress(command, what, passed, seconds, started);
        measure_row(command, row);
    }
    end_progress(command);
}

// What was not measured is taken to come as near to the limits as what was and is most like it: first of all has experts or
// none like it, then is of its type, then is large; where nothing was measured, to reach them. The rows are sorted by memory.
static void complete_row(struct TableRow *row, const struct TableRow *rows, const struct Machine *machine) {
    const struct TableRow *like = NULL;
    int most_alike = 0;
    for (const struct TableRow *other = rows; other < rows + TABLE_ROWS; other++) {
        int alike = 2 * (other->has_experts == row->has_experts) + (other->type == row->type);
        if (!other->measured || alike < most_alike) continue;
        like = other;
        most_alike = alike;
    }
    const double limits[SPEEDS] = {machine->read_gb_s * 1e9, machine->int8_gmac_s * 1e9};
    for (int i = DECODE; i < SPEEDS && !row->measured; i++) {
        double fraction = like ? like->speed[i].fraction : 1;
        row->speed[i] = (struct Speed){.tok_s = fraction * limits[i] / row->work[i], .fraction = fraction};
    }
}

static void print_row(const struct TableRow *row) {
    printf("%-24s %8s", row->name, BYTES(row->memory));
    for (int i = DECODE; i < SPEEDS; i++) {
        char text[32];
        double tok_s = row->speed[i].tok_s;
        snprintf(text, sizeof text, "%s%.*f", row->measured ? "" : "~", tok_s >= 100 ? 0 : tok_s >= 10 ? 1 : 2, tok_s);
        printf("  %8s", text);
        if (row->measured) printf("  %s %3.0f %%", draw_bar((char[15]){0}, 14, row->speed[i].fraction), 100 * row->speed[i].fraction);
        else if (i == DECODE) printf("%22s", "");
    }
    putchar('\n');
}

static int bench_all(const struct Command *command) {
    double seconds = command->seconds != NOT_GIVEN ? (double)command->seconds : TABLE_SECONDS, room = find_room();
    struct TableRow rows[TABLE_ROWS];
    for (size_t i = 0; i < TABLE_ROWS; i++) rows[i] = count_row(command, &known_shapes[i / 2], i % 2 ? DTYPE_Q8 : DTYPE_Q4);
    if (seconds > 0) note(command, "measuring for %.0f seconds at most (--seconds)", seconds);
    struct Probe probe = open_probe(command->team, command->kernels, (uint64_t)room / 2);
    struct Machine machine = {measure_reading(&probe), measure_multiplying(&probe)};
    close_probe(&probe);
    measure_rows(command, rows, &machine, seconds);
    qsort(rows, TABLE_ROWS, sizeof *rows, compare_memory);
    printf("%" PRIu64 " thread%s, %s: reads %.1f GB/s, multiplies %.0f int8 GMAC/s; %s of memory available%s\n\n", command->threads,
           command->threads == 1 ? "" : "s", command->kernels->name, machine.read_gb_s, machine.int8_gmac_s, BYTES(room),
           command->layers ? "; first layers alone" : "");
    printf("%-24s %8s  %8s  %-20s  %8s  %s\n", "", "memory", "decode", "of the", "prefill", "of the");
    printf("%-24s %8s  %8s  %-20s  %8s  %s\n", "", "needed", "tok/s", "read bandwidth", "tok/s", "int8 peak");
    bool all_fit = true, any_measured = false;
    for (struct TableRow *row = rows; row < rows + TABLE_ROWS; row++) {
        if (all_fit && row->memory > room) puts("---- too large for the memory available; if it were there:");
        all_fit = row->memory <= room;
        any_measured |= row->measured;
        complete_row(row, rows, &machine);
        print_row(row);
    }
    printf("\nPrefill of %d tokens; the memory has a cache for %d. ~ is predicted, not measured: from the bytes\n"
           "that a token reads and its multiply-adds, at %s.\n", TABLE_PROMPT, TABLE_CONTEXT,
           any_measured ? "the share of the limits that the measured model\nmost like it reached" : "the limits themselves");
    return 0;
}

static int command_bench(struct Command *command) {
    bool has_model = command->argument_count;
    if (!has_model && (command->json || command->prefill.count || command->depth.count || command->decode != NOT_GIVEN))
        wrong_usage(command, "--prefill, --decode, --depth and --json go with a model");
    if (has_model && command->seconds != NOT_GIVEN) wrong_usage(command, "--seconds goes with the table of all models");
    if (!command->prefill.count) command->prefill = (struct CountList){{TABLE_PROMPT}, 1, false};
    if (!command->depth.count) command->depth = (struct CountList){{0}, 1, false};
    if (command->decode == NOT_GIVEN) command->decode = has_model ? 64 : TABLE_DECODE;
    if (!has_model) return bench_all(command);
    struct Bench bench = {.command = command, .patience = BENCH_PATIENCE};
    open_bench_model(&bench);
    open_bench_session(&bench);
    if (!command->json) print_bench_head(&bench);
    json_t *prefills = json_array(), *decodes = json_array();
    for (size_t d = 0; d < command->depth.count; d++)
        for (size_t i = 0; i < command->prefill.count; i++)
            if (command->prefill.values[i]) measure_tokens(&bench, false, command->prefill.values[i], command->depth.values[d], prefills);
    for (size_t d = 0; d < command->depth.count && command->decode; d++)
        measure_tokens(&bench, true, command->decode, command->depth.values[d], decodes);
    json_t *object = json_pack("{s:o, s:s, s:s, s:I, s:{s:f, s:f}, s:f, s:o, s:o}", "model", json_text(bench.model->name), "type",
                               dtype_name(bench.model->config.recipe), "isa", command->kernels->name, "threads", (json_int_t)command->threads,
                               "machine", "read_gb_s", bench.machine.read_gb_s, "int8_gmac_s", bench.machine.int8_gmac_s, "load_s",
                               bench.load_s, "prefill", prefills, "decode", decodes);
    if (command->json) print_json(object);
    else json_decref(object);
    close_bench(&bench);
    return 0;
}

// ====================================================================================================================
// r1 perplexity
//
// How well a model foretells a text: the mean of -ln p(token | those before it) and its exponential, the perplexity; and
// how far a quantised model strays from the original, the divergence KL(base || model) at each position, where the base's
// log-probabilities come from a file that an earlier run with --save-base wrote.
//
// A text is cut into consecutive windows of the context's length; each begins with the begin-of-sentence token where the
// tokenizer wants it, and its first position, which nothing foretells, is not scored. With --ids each line is a sequence
// of its own, taken as it stands; ids before a '|' are context only and not scored (the prompt of a dialogue).
// ====================================================================================================================

#define PERPLEXITY_CONTEXT 2048   // default window of a text
#define PERPLEXITY_BATCH 512      // default micro-batch: the logits of each of its tokens are kept

struct Window {                   // a piece of text evaluated by itself
    size_t start, count;          // its ids
    size_t first_scored;          // position of the first one that is scored, 1 or higher
};

struct Windows {
    TokenList ids;
    struct Window *items;
    size_t count, capacity;
    size_t scored, longest;       // positions over all of them; tokens of the longest one
};

// The file of --save-base: this header, then for each scored position, in order, the float log-probabilities of the vocabulary.
struct BaseHeader {
    char magic[8];                // BASE_MAGIC
    uint32_t version, vocab_size;
    uint64_t positions;
    uint64_t hash;                // of the windows and their ids: both runs must score the same
};
#define BASE_MAGIC "r1.base\n"

// What is noted of each scored position; all but the first only against a base.
enum Score {
    SCORE_NLL,                    // -ln p of the token that followed
    SCORE_LN_RATIO,               // the same less the base's
    SCORE_KL,                     // KL(base || model)
    SCORE_SAME_TOP,               // 1 if base and model hold the same token for the most likely one, else 0
    SCORE_COUNT
};

struct Evaluation {
    const struct Command *command;
    const struct Windows *windows;
    struct Session *session;
    double *scores[SCORE_COUNT];  // [windows->scored] each
    size_t scored;                // positions so far
    FILE *base;                   // that --kld reads or --save-base writes; NULL without
    float *base_rows;             // [batch][vocab]: of the positions at hand
    // The positions at hand
    size_t rows;
    const float *logits;          // [rows][vocab]
    const uint32_t *targets;      // [rows]: the tokens that followed
};

// Cuts a sequence, of which ids from first_scored on are scored, into windows of at most `context` tokens.
static void cut_windows(struct Windows *windows, const TokenList *ids, size_t first_scored, size_t context, uint32_t bos) {
    size_t lead = bos != TOKEN_NONE, step = context - lead;
    for (size_t at = 0; at < ids->count; at += step) {
        struct Window window = {.start = windows->ids.count, .count = lead + min_size(step, ids->count - at)};
        window.first_scored = max_size(1, lead + (first_scored > at ? first_scored - at : 0));
        if (window.first_scored >= window.count) continue;
        if (lead) push_id(&windows->ids, bos);
        for (size_t i = 0; i < window.count - lead; i++) push_id(&windows->ids, ids->ids[at + i]);
        windows->items = grow(windows->items, windows->count, &windows->capacity, sizeof *windows->items);
        windows->items[windows->count++] = window;
        windows->scored += window.count - window.first_scored;
        windows->longest = max_size(windows->longest, window.count);
    }
}

// Tokens of a window: -c, or `standard`, but never more positions than the model has.
static size_t choose_window(const struct Command *command, const struct Model *model, size_t standard) {
    size_t most = model->config.max_position_embeddings;
    if (command->context == NOT_GIVEN) return max_size(min_size(standard, most), 2);
    if (command->context < 2) wrong_usage(command, "--context %" PRIu64 ": at least 2 tokens are needed", command->context);
    if (command->context > most) note(command, "the context is %zu tokens, all that the model has", most);
    return max_size(min_size(command->context, most), 2);
}

static void read_text_windows(const struct Command *command, const struct Model *model, struct Windows *windows) {
    need_tokenizer(model);
    const char *path = command->arguments[1];
    size_t bytes, context = choose_window(command, model, PERPLEXITY_CONTEXT);
    char *text = read_file(path, &bytes), error[ERROR_BYTES];
    const TokenizerSpecials *specials = tokenizer_specials(model->tokenizer);
    TokenList ids = {0};
    if (!tokenizer_encode(model->tokenizer, text, bytes, false, &ids, error, sizeof error)) die("%s: %s", path, error);
    cut_windows(windows, &ids, 0, context, specials->add_bos ? specials->bos : TOKEN_NONE);
    free(text);
    free(ids.ids);
    if (!windows->count) die("%s: no text to score: at least two tokens are needed", path);
}

static void read_ids_windows(const struct Command *command, const struct Model *model, struct Windows *windows) {
    size_t bytes, line = 1, context = choose_window(command, model, SIZE_MAX);
    char *text = read_file(command->ids, &bytes), place[ERROR_BYTES];
    TokenList ids = {0};
    for (const char *at = text, *end = text + bytes; at < end; at++, line++) {
        const char *line_end = memchr(at, '\n', (size_t)(end - at));
        if (!line_end) line_end = end;
        const char *bar = memchr(at, '|', (size_t)(line_end - at));
        snprintf(place, sizeof place, "%s: line %zu", command->ids, line);
        ids.count = 0;
        if (bar) parse_ids(at, (size_t)(bar - at), model->config.vocab_size, place, &ids);
        size_t first_scored = ids.count;
        at = bar ? bar + 1 : at;
        parse_ids(at, (size_t)(line_end - at), model->config.vocab_size, place, &ids);
        cut_windows(windows, &ids, first_scored, context, TOKEN_NONE);
        at = line_end;
    }
    free(text);
    free(ids.ids);
    if (!windows->count) die("%s: no ids to score: at least two on one line are needed", command->ids);
}

// ---- the base file

static struct BaseHeader base_header(const struct Windows *windows, size_t vocab) {
    uint64_t shape = XXH3_64bits(windows->items, windows->count * sizeof *windows->items);
    struct BaseHeader header = {.version = 1, .vocab_size = (uint32_t)vocab, .positions = windows->scored};
    memcpy(header.magic, BASE_MAGIC, sizeof header.magic);
    header.hash = XXH3_64bits_withSeed(windows->ids.ids, windows->ids.count * sizeof *windows->ids.ids, shape);
    return header;
}

static FILE *open_base(const char *path, const struct BaseHeader *expected) {
    FILE *file = fopen(path, "rb");
    struct stat status;
    struct BaseHeader header;
    if (!file || fstat(fileno(file), &status) != 0) die("%s: %s", path, strerror(errno));
    if (fread(&header, sizeof header, 1, file) != 1 || memcmp(header.magic, BASE_MAGIC, sizeof header.magic) != 0 || header.version != 1)
        die("%s: not a file that --save-base wrote", path);
    if (memcmp(&header, expected, sizeof header) != 0)
        die("%s: of another model, text or --context: %" PRIu64 " positions of a vocabulary of %u, here %" PRIu64 " of %u", path, header.positions,
            header.vocab_size, expected->positions, expected->vocab_size);
    uint64_t bytes = sizeof header + header.positions * header.vocab_size * sizeof(float);
    if ((uint64_t)status.st_size != bytes) die("%s: %" PRIu64 " bytes, expected %" PRIu64, path, (uint64_t)status.st_size, bytes);
    return file;
}

// A file that is left unfinished is too short for its header, which open_base() notices.
// Written beside its final name, which it gets when it is whole.
static FILE *create_base(const char *path, char *partial, size_t size, const struct BaseHeader *header) {
    if ((size_t)snprintf(partial, size, "%s.partial", path) >= size) die("%s: the name is too long", path);
    FILE *file = fopen(partial, "wb");
    if (!file || fwrite(header, sizeof *header, 1, file) != 1) die("%s: cannot be written: %s", partial, strerror(errno));
    return file;
}

static void finish_base(FILE *file, const char *partial, const char *path) {
    if (fclose(file) != 0 || rename(partial, path) != 0) die("%s: cannot be written: %s", path, strerror(errno));
}

// ---- scoring

#define SUM_BLOCK 256             // floats are summed within blocks, the blocks as doubles

// ln of the sum of exp(x[i]).
static double log_sum_exp(const float *x, size_t n) {
    float largest = x[find_largest(x, n)];
    double sum = 0;
    for (size_t first = 0; first < n; first += SUM_BLOCK) {
        size_t end = min_size(first + SUM_BLOCK, n);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (size_t i = first; i < end; i++) part += exp_float(x[i] - largest);
        sum += part;
    }
    return (double)largest + log(sum);
}

// KL(base || model) = sum of p ln(p / q), p = exp(base), q = exp(model), computed as the sum of p ln(p / q) - p + q: the
// same, since p and q each sum to one, but with no negative terms whose rounding would drown small divergences. Not a
// number if base is not a distribution.
static double kl_divergence(const float *base, const float *logits, float log_total, size_t n) {
    double divergence = 0, mass = 0;
    for (size_t first = 0; first < n; first += SUM_BLOCK) {
        size_t end = min_size(first + SUM_BLOCK, n);
        float part = 0, part_mass = 0;
#pragma omp simd reduction(+ : part, part_mass)
        for (size_t i = first; i < end; i++) {
            float model = logits[i] - log_total, d = base[i] - model, p = exp_float(base[i]), q = exp_float(model);
            float series = p * d * d * (0.5f - d * (1.0f / 6) + d * d * (1.0f / 24));
            part += fabsf(d) < 0.05f ? series : p * d - p + q;
            part_mass += p;
        }
        divergence += part;
        mass += part_mass;
    }
    return mass > 0.99 && mass < 1.01 ? divergence : (double)NAN;
}

static void score_row(const struct Evaluation *e, size_t row) {
    size_t vocab = e->session->model->config.vocab_size, at = e->scored + row;
    const float *logits = e->logits + row * vocab;
    float *base = e->base_rows + row * vocab;
    double log_total = log_sum_exp(logits, vocab);
    e->scores[SCORE_NLL][at] = log_total - (double)logits[e->targets[row]];
    if (e->command->save_base)
        for (size_t i = 0; i < vocab; i++) base[i] = logits[i] - (float)log_total;
    if (!e->command->kld) return;
    e->scores[SCORE_LN_RATIO][at] = e->scores[SCORE_NLL][at] + (double)base[e->targets[row]];
    e->scores[SCORE_KL][at] = kl_divergence(base, logits, (float)log_total, vocab);
    e->scores[SCORE_SAME_TOP][at] = find_largest(base, vocab) == find_largest(logits, vocab);
}

static void score_rows_job(void *argument, int thread) {
    struct Evaluation *e = argument;
    struct Items items = share_items(e->session->team, thread, e->rows);
    for (size_t row; next_item(&items, &row);) score_row(e, row);
}

// Scores the positions at hand, and reads or writes the base's rows of them.
static void score_positions(struct Evaluation *e) {
    const struct Command *command = e->command;
    size_t row_bytes = e->session->model->config.vocab_size * sizeof(float);
    if (command->kld && fread(e->base_rows, row_bytes, e->rows, e->base) != e->rows)
        die("%s: cannot be read: %s", command->kld, ferror(e->base) ? strerror(errno) : "it ends early");
    team_run(e->session->team, score_rows_job, e);
    for (size_t end = e->scored + e->rows; e->scored < end; e->scored++) {
        if (!isfinite(e->scores[SCORE_NLL][e->scored]))
            die("%s: logits that are not finite at scored position %zu; look at the file with `r1 inspect MODEL --verify`",
                e->session->model->name, e->scored);
        if (command->kld && !(isfinite(e->scores[SCORE_KL][e->scored]) && isfinite(e->scores[SCORE_LN_RATIO][e->scored])))
            die("%s: damaged: no log-probabilities at scored position %zu", command->kld, e->scored);
    }
    if (command->save_base && fwrite(e->base_rows, row_bytes, e->rows, e->base) != e->rows)
        die("%s: cannot be written: %s", command->save_base, strerror(errno));
}

// Row t of the logits foretells token t + 1, so the last token need not be evaluated.
static void evaluate_window(struct Evaluation *e, const struct Window *window) {
    const uint32_t *ids = e->windows->ids.ids + window->start;
    size_t evaluated = window->count - 1;
    e->session->position = 0;
    for (size_t at = 0, n; at < evaluated; at += n) {
        n = min_size(e->session->options.batch, evaluated - at);
        size_t first = max_size(at, window->first_scored - 1);
        bool scored = first < at + n;
        forward(e->session, ids + at, n, scored ? LOGITS_ALL : LOGITS_NONE);
        if (!scored) continue;
        e->logits = e->session->logits + (first - at) * e->session->model->config.vocab_size;
        e->rows = at + n - first;
        e->targets = ids + first + 1;
        score_positions(e);
    }
}

static void evaluate(struct Evaluation *e, const struct Model *model) {
    const struct Command *command = e->command;
    const struct Windows *windows = e->windows;
    size_t vocab = model->config.vocab_size, done = 0;
    size_t batch = min_size(command->batch == NOT_GIVEN ? PERPLEXITY_BATCH : command->batch, windows->longest);
    struct SessionOptions options = {.context = windows->longest, .batch = batch, .logits_rows = batch, .cache = (enum CacheType)command->cache};
    struct BaseHeader header = base_header(windows, vocab);
    if (command->kld) e->base = open_base(command->kld, &header);
    e->session = open_session(command, model, &options);
    char partial[4096];
    if (command->save_base) e->base = create_base(command->save_base, partial, sizeof partial, &header);
    e->base_rows = allocate(e->base ? batch * vocab * sizeof *e->base_rows : 0);
    for (int score = 0; score < (command->kld ? SCORE_COUNT : 1); score++) e->scores[score] = allocate(windows->scored * sizeof(double));
    double started = clock_seconds();
    for (size_t i = 0; i < windows->count; i++) {
        evaluate_window(e, &windows->items[i]);
        done += windows->items[i].count;
        show_progress(command, "perplexity", (double)done, (double)windows->ids.count, started);
    }
    end_progress(command);
    if (command->save_base) finish_base(e->base, partial, command->save_base);
    else if (e->base) fclose(e->base);
    free(e->base_rows);
    session_free(e->session);
}

// ---- the report

struct Summary {
    double mean, error;           // of the mean: one standard error
    double percentiles[5];        // the median, 90 %, 99 %, 99.9 %, the largest
};

// Sorts the values. A percentile lies between two of them in proportion.
static struct Summary summarize(double *values, size_t n) {
    static const double parts[] = {0.5, 0.9, 0.99, 0.999, 1};
    struct Summary s = {0};
    double squares = 0;
    for (size_t i = 0; i < n; i++) s.mean += values[i] / (double)n;
    for (size_t i = 0; i < n; i++) squares += (values[i] - s.mean) * (values[i] - s.mean);
    s.error = n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : 0;
    qsort(values, n, sizeof *values, compare_doubles);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        double place = parts[i] * (double)(n - 1);
        size_t below = (size_t)place, above = min_size(below + 1, n - 1);
        s.percentiles[i] = values[below] + (place - (double)below) * (values[above] - values[below]);
    }
    return s;
}

static void report_text(const struct Evaluation *e, const struct Summary *s) {
    double perplexity = exp(s[SCORE_NLL].mean);
    printf("perplexity %.4f +- %.4f (mean -ln p %.5f +- %.5f, %zu positions in %zu windows)\n", perplexity, perplexity * s[SCORE_NLL].error,
           s[SCORE_NLL].mean, s[SCORE_NLL].error, e->windows->scored, e->windows->count);
    if (!e->command->kld) return;
    const struct Summary *kl = &s[SCORE_KL];
    printf("KL divergence from %s: mean %.6g +- %.2g, median %.4g, 90 %% %.4g, 99 %% %.4g, 99.9 %% %.4g, max %.4g\n", e->command->kld, kl->mean,
           kl->error, kl->percentiles[0], kl->percentiles[1], kl->percentiles[2], kl->percentiles[3], kl->percentiles[4]);
    printf("same most likely token: %.2f %% of the positions\n", 100 * s[SCORE_SAME_TOP].mean);
    printf("ln(perplexity / base perplexity): %.6f +- %.6f\n", s[SCORE_LN_RATIO].mean, s[SCORE_LN_RATIO].error);
}

static void report_json(const struct Evaluation *e, const struct Summary *s, const struct Model *model) {
    double perplexity = exp(s[SCORE_NLL].mean);
    json_t *object = json_pack("{s:o, s:s, s:s, s:I, s:I, s:f, s:f, s:f, s:f}", "model", json_text(model->name), "type",
                               dtype_name(model->config.recipe), "kv", cache_names[e->command->cache], "windows",
                               (json_int_t)e->windows->count, "positions", (json_int_t)e->windows->scored, "nll", s[SCORE_NLL].mean,
                               "nll_error", s[SCORE_NLL].error, "perplexity", perplexity, "perplexity_error", perplexity * s[SCORE_NLL].error);
    const struct Summary *kl = &s[SCORE_KL];
    if (e->command->kld)
        json_object_update_new(object, json_pack("{s:{s:f, s:f, s:f, s:f, s:f, s:f, s:f}, s:f, s:{s:f, s:f}}", "kl", "mean", kl->mean,
            "mean_error", kl->error, "median", kl->percentiles[0], "p90", kl->percentiles[1], "p99", kl->percentiles[2], "p99.9",
            kl->percentiles[3], "max", kl->percentiles[4],
            "top1_agreement", s[SCORE_SAME_TOP].mean, "ln_ppl_ratio", "mean", s[SCORE_LN_RATIO].mean, "mean_error", s[SCORE_LN_RATIO].error));
    print_json(object);
}

static int command_perplexity(struct Command *command) {
    const char *text = command->arguments[1];
    if (!text == !command->ids) wrong_usage(command, "expected either a text file or --ids FILE");
    if (command->save_base && command->kld) wrong_usage(command, "--save-base does not go with --kld");
    struct Model *model = open_model(command, command->arguments[0], true);
    struct Windows windows = {0};
    if (text) read_text_windows(command, model, &windows);
    else read_ids_windows(command, model, &windows);
    struct Evaluation evaluation = {.command = command, .windows = &windows};
    evaluate(&evaluation, model);
    struct Summary summaries[SCORE_COUNT] = {0};
    for (int score = 0; score < (command->kld ? SCORE_COUNT : 1); score++) {
        summaries[score] = summarize(evaluation.scores[score], windows.scored);
        free(evaluation.scores[score]);
    }
    if (command->json) report_json(&evaluation, summaries, model);
    else report_text(&evaluation, summaries);
    free(windows.items);
    free(windows.ids.ids);
    model_close(model);
    return 0;
}

// ====================================================================================================================
// Generation: thinking, then the answer
//
// run_generation() reads a prompt, draws token after token and streams their text. Where the thinking begins and ends is
// known by the ids of <think> and </think> alone: those of the prompt's generation prefix, which may force <think>, and
// those that the model writes. On a terminal the thinking is dimmed and the tags are left out; into a pipe the text goes as
// it is; with --hide-thinking only the answer is shown.
// ====================================================================================================================

// Ctrl-C: the first one ends the generation, the second one the program.
static volatile sig_atomic_t interrupted, terminal_dimmed;

static void handle_interrupt(int signal_number) {
    if (interrupted) {
        if (terminal_dimmed && write(STDOUT_FILENO, "\x1b[0m", 4) < 0) terminal_dimmed = 0;
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
    interrupted = 1;
}

static void catch_interrupts(void) {
    struct sigaction action = {.sa_handler = handle_interrupt, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, NULL);
}

// ---- what is shown

struct Display {
    const Tokenizer *tokenizer;
    bool bare;                    // no tags; newlines around the thinking and the answer are ours, not the model's
    bool dims;                    // the thinking is dimmed
    bool hides;                   // the thinking is left out
    bool thinking;                // what comes now is thought
    bool leading;                 // nothing of this part was shown yet: drop its newlines
    bool shown;                   // something was
    char last;                    // the last byte that came, shown or not
    size_t newlines;              // held back until something follows them
    Utf8Stream utf8;
};

static void display_init(struct Display *display, const struct Command *command, const Tokenizer *tokenizer) {
    bool terminal = isatty(STDOUT_FILENO);
    const char *no_color = getenv("NO_COLOR"), *kind = getenv("TERM");   // see no-color.org
    bool wants_color = terminal && !(no_color && *no_color) && !(kind && strcmp(kind, "dumb") == 0);
    *display = (struct Display){
        .tokenizer = tokenizer,
        .bare = terminal || command->hide_thinking,
        .dims = command->color == COLOR_AUTO ? wants_color : command->color == COLOR_ALWAYS,
        .hides = command->hide_thinking,
    };
    display->leading = display->bare;
}

static void set_dim(struct Display *display, bool dim) {
    if (!display->dims || dim == terminal_dimmed) return;
    fputs(dim ? "\x1b[2m" : "\x1b[0m", stdout);
    terminal_dimmed = dim;
}

static void show_text(struct Display *display, const char *text, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == '\n') {
            if (!display->leading) display->newlines++;
            continue;
        }
        display->leading = false;
        display->shown = true;
        for (; display->newlines; display->newlines--) putchar('\n');
        set_dim(display, display->thinking);
        putchar(text[i]);
    }
}

// Bytes of a token, cut in pieces that the UTF-8 stream has room for.
static void show_bytes(struct Display *display, const char *bytes, size_t count) {
    char ready[3 * (256 + 4)];
    if (count) display->last = bytes[count - 1];
    if (display->hides && display->thinking) return;
    for (size_t done = 0; done < count;) {
        size_t step = min_size(256, count - done);
        show_text(display, ready, utf8_stream_push(&display->utf8, bytes + done, step, ready));
        done += step;
    }
}

static void end_utf8(struct Display *display) {
    char rest[3];
    show_text(display, rest, utf8_stream_end(&display->utf8, rest));
}

// A switch between thinking and answer. Without tags a blank line stands between them.
static void set_thinking(struct Display *display, bool thinking, uint32_t tag) {
    end_utf8(display);
    if (display->bare && thinking == display->thinking) return;
    size_t bytes;
    const char *text = tokenizer_piece(display->tokenizer, tag, &bytes);
    if (thinking) display->thinking = true;
    if (!display->bare) show_bytes(display, text, bytes);
    display->last = '>';
    display->thinking = thinking;
    if (!display->bare) return;
    display->leading = true;
    display->newlines = display->shown ? 2 : 0;
    if (!thinking) set_dim(display, false);
}

static bool is_special(const TokenizerSpecials *specials, uint32_t id) {
    return id == specials->bos || id == specials->eos || id == specials->user || id == specials->assistant || id == specials->end_of_turn;
}

static void show_token(struct Display *display, uint32_t id) {
    const TokenizerSpecials *specials = tokenizer_specials(display->tokenizer);
    if (id == specials->think || id == specials->end_think) {
        set_thinking(display, id == specials->think, id);
    } else if (!is_special(specials, id)) {
        size_t bytes;
        const char *piece = tokenizer_piece(display->tokenizer, id, &bytes);
        if (piece) show_bytes(display, piece, bytes);
    }
    flush_output();
}

// Whatever newlines the text ended with, it is one.
static void end_display(struct Display *display) {
    end_utf8(display);
    set_dim(display, false);
    putchar('\n');
    flush_output();
}

// ---- a model that repeats itself

#define LOOP_PERIOD 64            // longest period looked for
#define LOOP_TOKENS 256           // a loop lasts at least this long
#define LOOP_REPEATS 8            // and comes round at least this often

struct LoopGuard {
    uint32_t last[LOOP_PERIOD];   // the last tokens, a ring
    size_t count;
    size_t same[LOOP_PERIOD + 1]; // [p]: how many tokens on end were the same as the one p before
    bool found;
};

// Takes the next token; true once, when the end of the text has become a loop.
static bool finds_loop(struct LoopGuard *guard, uint32_t token) {
    bool found = false;
    for (size_t period = 1; period <= min_size(LOOP_PERIOD, guard->count); period++) {
        bool same = guard->last[(guard->count - period) % LOOP_PERIOD] == token;
        guard->same[period] = same ? guard->same[period] + 1 : 0;
        found |= guard->same[period] + period >= max_size(LOOP_TOKENS, LOOP_REPEATS * period);
    }
    guard->last[guard->count++ % LOOP_PERIOD] = token;
    bool first = found && !guard->found;
    guard->found |= found;
    return first;
}

// ---- the generation

enum EndReason { END_BY_MODEL, END_BY_LENGTH, END_BY_CONTEXT, END_BY_USER };

struct Generation {
    const struct Command *command;
    const struct Model *model;
    const TokenizerSpecials *specials;
    struct Session *session;
    struct Sampler sampler;
    struct Display display;
    struct LoopGuard guard;
    TokenList prompt;
    size_t prefix_start;          // the prompt's generation prefix, as far as it is shown: ids [prefix_start, prompt.count)
    TokenList close;              // ids of "\n</think>\n\n", which end the thinking when its budget is used up
    size_t close_newline;         // how many of them are the first newline
    TokenList next;               // ids to evaluate next
    uint64_t seed;
    size_t written, thought;      // tokens
    enum EndReason reason;
    double started, first_token, ended;   // clock_seconds()
};

static void append_text(const struct Generation *g, const char *text, size_t bytes, TokenList *out) {
    char error[ERROR_BYTES];
    if (!tokenizer_encode(g->model->tokenizer, text, bytes, false, out, error, sizeof error)) die("%s", error);
}

// The prompt in the model's chat form, or raw where the tokenizer knows none.
static void encode_prompt(struct Generation *g, const char *text, size_t bytes) {
    const TokenizerSpecials *specials = g->specials;
    const ChatMessage question = {.role = "user", .content = text, .content_bytes = bytes};
    bool has_tags = specials->think != TOKEN_NONE && specials->end_think != TOKEN_NONE;
    char error[ERROR_BYTES];
    if (specials->has_chat ? !tokenizer_encode_chat(g->model->tokenizer, &question, 1, &g->prompt, error, sizeof error)
                           : !tokenizer_encode_raw(g->model->tokenizer, text, bytes, &g->prompt, error, sizeof error))
        die("%s: %s", g->model->name, error);
    g->prefix_start = g->prompt.count;
    if (!g->prompt.count) die("the prompt is empty");
    if (!specials->has_chat) note(g->command, "%s has no chat form: it goes on from the prompt as it stands", g->model->name);
    else while (g->prompt.ids[g->prefix_start - 1] != specials->assistant) g->prefix_start--;   // typed text never makes this id

    if (!has_tags && (g->command->no_think || g->command->think_budget != NOT_GIVEN))
        note(g->command, "%s has no <think> tokens: --no-think and --think-budget do nothing", g->model->name);
    if (has_tags) {
        append_text(g, "\n", 1, &g->close);
        g->close_newline = g->close.count;
        push_id(&g->close, specials->end_think);
        append_text(g, "\n\n", 2, &g->close);
    }
    if (has_tags && specials->has_chat && g->command->no_think) {
        // In place of the generation prefix the model finds its thinking done: <think>\n\n</think>\n\n, which is how these
        // models are prompted to answer at once. Not shown: it is no part of the answer.
        g->prompt.count = g->prefix_start;
        push_id(&g->prompt, specials->think);
        append_text(g, "\n\n", 2, &g->prompt);
        push_id(&g->prompt, specials->end_think);
        append_text(g, "\n\n", 2, &g->prompt);
        g->prefix_start = g->prompt.count;
    }
    if (g->command->think_budget == 0 && specials->starts_thinking && g->prefix_start < g->prompt.count)
        for (size_t i = g->close_newline; i < g->close.count; i++) push_id(&g->prompt, g->close.ids[i]);   // behind "<think>\n"
}

// Tokens of context: what -c says, else prompt and output, as far as the model was made for it and memory holds it.
static struct SessionOptions choose_session(const struct Generation *g) {
    const struct Command *command = g->command;
    size_t most = g->model->config.max_position_embeddings, least = g->prompt.count + 1;
    struct SessionOptions chosen = {
        .context = min_size(most, g->prompt.count + command->max_tokens + g->close.count),
        .batch = min_size(micro_batch(command, g->model), max_size(g->prompt.count, EXACT_TOKENS)),
        .logits_rows = 1,
        .cache = (enum CacheType)command->cache,
    };
    if (command->context != NOT_GIVEN) {
        if (command->context > most) die("%s: --context %" PRIu64 ": the model was made for at most %zu tokens", g->model->name, command->context, most);
        chosen.context = most = command->context;
    }
    if (g->prompt.count >= most) die("the prompt is too long: %zu tokens in a context of %zu", g->prompt.count, most);
    uint64_t available = available_memory();
    if (command->context != NOT_GIVEN || !available) return chosen;

    // A model larger than memory is read from disk as it runs; an eighth of the memory may hold its cache all the same.
    uint64_t room = available / 8;
    if (available > g->model->size && available - g->model->size > room) room = available - g->model->size;
    size_t wanted = chosen.context;
    struct MemoryPlan plan = plan_memory(g->model, &chosen, command->team->threads);
    for (; plan.cache + plan.scratch > room && chosen.context > least; plan = plan_memory(g->model, &chosen, command->team->threads))
        chosen.context = max_size(chosen.context - ceil_div(chosen.context, 32), least);
    if (chosen.context < wanted)
        note(command, "the context is %zu tokens instead of %zu: that is what fits into %s of memory", chosen.context, wanted, BYTES(available));
    return chosen;
}

// Evaluates the prompt; false if the user has ended it. Progress is shown where it takes more than a moment.
static bool read_prompt(struct Generation *g) {
    const TokenList *prompt = &g->prompt;
    bool is_long = active_weights(g->model) * (double)prompt->count > 1e11;
    double started = clock_seconds();
    for (size_t done = 0; done < prompt->count && !interrupted;) {
        if (is_long || clock_seconds() - started > 1) show_progress(g->command, "reading the prompt", (double)done, (double)prompt->count, started);
        size_t step = min_size(g->session->options.batch, prompt->count - done);
        forward(g->session, prompt->ids + done, step, done + step == prompt->count ? LOGITS_LAST : LOGITS_NONE);
        done += step;
    }
    end_progress(g->command);
    return !interrupted;
}

static bool is_stop(const TokenizerSpecials *specials, uint32_t id) {
    for (size_t i = 0; i < specials->stop_count; i++)
        if (specials->stops[i] == id) return true;
    return false;
}

// Evaluates the token that was drawn, and the end of the thinking behind it if its budget is used up. False if the context
// has no room for them.
static bool go_on(struct Generation *g, uint32_t token) {
    uint64_t budget = g->command->think_budget;
    bool closes = false;
    if (g->display.thinking) {
        g->thought += token != g->specials->think;
        closes = budget != NOT_GIVEN && g->thought >= budget;
    }
    TokenList *next = &g->next;
    next->count = 0;
    push_id(next, token);
    if (closes)
        for (size_t i = g->display.last == '\n' ? g->close_newline : 0; i < g->close.count; i++) push_id(next, g->close.ids[i]);
    if (next->count > g->session->options.context - g->session->position) return false;
    for (size_t i = 1; i < next->count; i++) show_token(&g->display, next->ids[i]);
    prefill(g->session, next->ids, next->count);
    return true;
}

// With --hide-thinking a terminal shows that there is some.
static void show_thinking_progress(const struct Generation *g) {
    char what[48];
    snprintf(what, sizeof what, "thinking: %zu tokens", g->written);
    if (g->display.thinking) show_progress(g->command, what, 0, 0, 0);
    else end_progress(g->command);
}

static enum EndReason write_tokens(struct Generation *g) {
    const struct Command *command = g->command;
    while (!interrupted) {
        uint32_t token = sample_token(&g->sampler, g->session->logits);
        if (!isfinite(g->session->logits[token])) {
            if (g->display.shown) end_display(&g->display);
            die("%s: the model's output is not a number after %zu tokens", g->model->name, g->session->position);
        }
        if (!g->written) g->first_token = clock_seconds();
        if (is_stop(g->specials, token)) return END_BY_MODEL;
        g->written++;
        show_token(&g->display, token);
        if (g->display.hides) show_thinking_progress(g);
        if (finds_loop(&g->guard, token) && !g->display.hides)
            note(command, "%sthe model repeats itself; Ctrl-C ends it", isatty(STDOUT_FILENO) ? "\n" : "");
        if (g->written == command->max_tokens) return END_BY_LENGTH;
        if (!go_on(g, token)) return END_BY_CONTEXT;
    }
    return END_BY_USER;
}

static void print_statistics(const struct Generation *g) {
    const struct Command *command = g->command;
    if (command->quiet) return;
    if (g->reason == END_BY_LENGTH) note(command, "ended after %" PRIu64 " tokens (--max-tokens)", command->max_tokens);
    if (g->reason == END_BY_CONTEXT) note(command, "ended: the context of %zu tokens is full (--context)", g->session->options.context);
    double reading = g->first_token - g->started, writing = g->ended - g->first_token;
    if (!g->written) note(command, "%s", g->reason == END_BY_USER ? "ended before the prompt was read" : "the model had nothing to say");
    if (g->first_token <= 0) return;
    fprintf(stderr, "r1: prompt %zu tokens", g->prompt.count);
    if (reading > 0) fprintf(stderr, ", %.1f tok/s", (double)g->prompt.count / reading);
    fprintf(stderr, " | first token %.2f s | written %zu tokens", reading, g->written);
    if (g->written > 1 && writing > 0) {
        double rate = (double)(g->written - (g->reason != END_BY_MODEL)) / writing;   // the last one was drawn, not evaluated
        fprintf(stderr, ", %.1f tok/s, %.2f GB/s", rate, rate * active_bytes(g->model) / 1e9);
    }
    if (command->temperature > 0) fprintf(stderr, " | seed %" PRIu64, g->seed);
    fputc('\n', stderr);
}

// A fresh number, short enough to be typed again.
static uint64_t make_seed(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t source[3] = {(uint64_t)now.tv_sec, (uint64_t)now.tv_nsec, (uint64_t)getpid()};
    return XXH3_64bits(source, sizeof source) % 1000000000;
}

// Answers one question of text. Returns the program's status.
static int run_generation(const struct Command *command, const struct Model *model, const char *text, size_t bytes) {
    static const char *const reasons[] = {"the model stopped before it came to an answer", "--max-tokens is too small", "--context is too small",
                                          "it was interrupted"};
    struct Generation g = {.command = command, .model = model, .specials = tokenizer_specials(model->tokenizer)};
    encode_prompt(&g, text, bytes);
    struct SessionOptions session_options = choose_session(&g);
    g.session = open_session(command, model, &session_options);
    g.seed = command->seed != NOT_GIVEN ? command->seed : make_seed();
    sampler_init(&g.sampler, model->config.vocab_size, (float)command->temperature, (float)command->top_p, (float)command->min_p, command->top_k, g.seed);
    display_init(&g.display, command, model->tokenizer);
    catch_interrupts();
    g.started = clock_seconds();
    g.reason = END_BY_USER;
    if (read_prompt(&g)) {
        for (size_t i = g.prefix_start; i < g.prompt.count; i++) show_token(&g.display, g.prompt.ids[i]);
        g.reason = write_tokens(&g);
    }
    g.ended = clock_seconds();
    if (g.display.hides) {
        end_progress(command);
        if (g.display.thinking)
            die("%s: the thinking did not end: %s%s", model->name, reasons[g.reason], g.guard.found ? ", and the model repeats itself" : "");
    }
    end_display(&g.display);
    print_statistics(&g);
    sampler_free(&g.sampler);
    session_free(g.session);
    free(g.prompt.ids);
    free(g.close.ids);
    free(g.next.ids);
    return 0;
}

// ====================================================================================================================
// Commands: run, tokenize, logits, inspect
// ====================================================================================================================

static int command_run(struct Command *command) {
    struct Model *model = open_model(command, command->arguments[0], true);
    need_tokenizer(model);
    const char *prompt = command->arguments[1];
    char *input = NULL;
    size_t bytes = prompt ? strlen(prompt) : 0;
    if (!prompt || strcmp(prompt, "-") == 0) {
        if (isatty(STDIN_FILENO)) note(command, "type the question; Ctrl-D on an empty line sends it");
        prompt = input = read_file("-", &bytes);
        if (bytes && input[bytes - 1] == '\n') bytes--;
    }
    if (!bytes) die("the question is empty");
    int status = run_generation(command, model, prompt, bytes);
    free(input);
    model_close(model);
    return status;
}

// ---- tokenize

// In the functions below `place` says where a text came from, for messages.

// Turns hexadecimal digits into the bytes they name, in place; returns how many.
static size_t decode_hex(const char *place, char *text, size_t bytes) {
    if (bytes % 2) die("%s: an odd number of hexadecimal digits", place);
    for (size_t i = 0; i < bytes; i++)
        if (!isxdigit((unsigned char)text[i])) die("%s: character %zu is no hexadecimal digit", place, i + 1);
    for (size_t i = 0; i < bytes; i += 2) text[i / 2] = (char)strtoul((const char[]){text[i], text[i + 1], 0}, NULL, 16);
    return bytes / 2;
}

// A piece in quotes, with escapes for what would not show or is not UTF-8 by itself.
static void print_piece(const char *piece, size_t bytes) {
    Utf8Stream stream = {0};
    char *valid = allocate(3 * (bytes + 4));
    size_t ready = utf8_stream_push(&stream, piece, bytes, valid);
    bool is_text = !stream.held_bytes && ready == bytes && memcmp(valid, piece, bytes) == 0;
    free(valid);
    putchar('"');
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)piece[i];
        if (c == '\n') fputs("\\n", stdout);
        else if (c == '\t') fputs("\\t", stdout);
        else if (c == '"' || c == '\\') printf("\\%c", c);
        else if (c < 32 || c == 127 || (c >= 128 && !is_text)) printf("\\x%02x", c);
        else putchar(c);
    }
    putchar('"');
}

static void print_tokens(const struct Command *command, const struct Model *model, const TokenList *tokens) {
    for (size_t i = 0; i < tokens->count; i++) {
        printf(i ? " %" PRIu32 : "%" PRIu32, tokens->ids[i]);
        if (command->ids_only) continue;
        size_t bytes;
        const char *piece = tokenizer_piece(model->tokenizer, tokens->ids[i], &bytes);
        putchar(' ');
        if (piece) print_piece(piece, bytes);
        else printf("<id %" PRIu32 ">", tokens->ids[i]);
    }
}

// A JSON array of {"role", "content"} into the prompt's ids.
static void encode_chat_json(const char *place, const struct Model *model, const char *text, size_t bytes, TokenList *out) {
    json_error_t json_error;
    json_t *array = json_loadb(text, bytes, JSON_ALLOW_NUL, &json_error);
    if (!array) die("%s: not JSON: %s", place, json_error.text);
    if (!json_is_array(array)) die("%s: not an array of messages", place);
    size_t count = json_array_size(array);
    ChatMessage *messages = allocate(count * sizeof *messages);
    for (size_t i = 0; i < count; i++) {
        const json_t *entry = json_array_get(array, i), *role = json_object_get(entry, "role"), *content = json_object_get(entry, "content");
        if (!json_is_string(role) || !json_is_string(content)) die("%s: message %zu has no \"role\" and \"content\" of text", place, i + 1);
        messages[i] = (ChatMessage){json_string_value(role), json_string_value(content), json_string_length(content)};
    }
    char error[ERROR_BYTES];
    if (!tokenizer_encode_chat(model->tokenizer, messages, count, out, error, sizeof error)) die("%s: %s", place, error);
    free(messages);
    json_decref(array);
}

static void print_decoded(const struct Command *command, const char *place, const struct Model *model, const TokenList *tokens) {
    size_t bytes;
    for (size_t i = 0; i < tokens->count; i++)
        if (!tokenizer_piece(model->tokenizer, tokens->ids[i], &bytes)) die("%s: id %zu: %" PRIu32 " has no token", place, i + 1, tokens->ids[i]);
    for (size_t i = 0; i < tokens->count; i++) {
        const char *piece = tokenizer_piece(model->tokenizer, tokens->ids[i], &bytes);
        if (!command->hex) fwrite(piece, 1, bytes, stdout);
        else for (size_t k = 0; k < bytes; k++) printf("%02x", (unsigned char)piece[k]);
    }
}

// One text, which may be changed, and its line of output.
static void tokenize_text(const struct Command *command, const char *place, const struct Model *model, char *text, size_t bytes) {
    TokenList tokens = {0};
    char error[ERROR_BYTES];
    if (command->hex && !command->decode_ids) bytes = decode_hex(place, text, bytes);
    if (command->decode_ids) {
        uint64_t vocabulary = max_size(model->config.vocab_size, tokenizer_size(model->tokenizer));
        parse_ids(text, bytes, vocabulary, place, &tokens);
        print_decoded(command, place, model, &tokens);
    } else if (bytes) {
        if (command->chat) encode_chat_json(place, model, text, bytes, &tokens);
        else if (!tokenizer_encode(model->tokenizer, text, bytes, command->markup, &tokens, error, sizeof error)) die("%s: %s", place, error);
        print_tokens(command, model, &tokens);
    }
    putchar('\n');
    flush_output();
    free(tokens.ids);
}

static int command_tokenize(struct Command *command) {
    if (command->decode_ids && (command->markup || command->chat || command->ids_only))
        wrong_usage(command, "--decode does not go with --markup, --chat or --ids-only");
    if (command->chat && command->markup) wrong_usage(command, "--chat does not go with --markup");
    if (!isatty(STDOUT_FILENO)) command->ids_only = true;
    struct Model *model = open_model(command, command->arguments[0], false);
    need_tokenizer(model);
    if (command->arguments[1]) {
        char *text = strdup(command->arguments[1]);
        if (!text) die("out of memory");
        tokenize_text(command, "TEXT", model, text, strlen(text));
        free(text);
    } else {
        char *line = NULL, place[64];
        size_t capacity = 0, number = 0;
        for (ssize_t bytes; (bytes = getline(&line, &capacity, stdin)) >= 0;) {
            snprintf(place, sizeof place, "standard input: line %zu", ++number);
            if (bytes && line[bytes - 1] == '\n') bytes--;
            tokenize_text(command, place, model, line, (size_t)bytes);
        }
        if (ferror(stdin)) die("standard input: %s", strerror(errno));
        free(line);
    }
    model_close(model);
    return 0;
}

// ---- logits

// Lines that are printed only when the whole sequence is known, since others come before them.
struct Lines {
    FILE *file;                   // writes to text
    char *text;
    size_t bytes;
};

struct Trace {
    const struct Command *command;
    struct Session *session;
    size_t length;                // of the sequence
    uint32_t *argmax;             // [length]
    struct Lines logits;
    struct Lines *experts;        // [layers]
};

static void open_lines(struct Lines *lines) {
    lines->file = open_memstream(&lines->text, &lines->bytes);
    if (!lines->file) die("out of memory");
}

static void print_lines(struct Lines *lines) {
    if (ferror(lines->file) || fclose(lines->file) != 0) die("out of memory");
    if (fwrite(lines->text, 1, lines->bytes, stdout) != lines->bytes) end_output(errno);
    free(lines->text);
}

static bool contains_count(const struct CountList *list, uint64_t value) {
    for (size_t i = 0; i < list->count; i++)
        if (list->values[i] == value) return true;
    return list->all;
}

static void check_positions(const struct Trace *trace, const char *option, const struct CountList *positions) {
    uint64_t last = largest_count(positions);
    if (last >= trace->length)
        die("--%s: position %" PRIu64 " is beyond the sequence of %zu tokens, whose positions are 0 to %zu", option, last, trace->length,
            trace->length - 1);
}

// One layer's experts of token t of the micro-batch at hand, sorted by id.
static void write_experts(const struct Trace *trace, size_t layer, size_t position, size_t t) {
    const struct Session *session = trace->session;
    size_t count = session->model->config.num_experts_per_tok, start = (layer * session->options.batch + t) * count;
    const uint32_t *ids = session->expert_ids + start;
    FILE *file = trace->experts[layer].file;
    fprintf(file, "experts %zu %zu %zu", layer, position, count);
    for (uint64_t written = 0, least = 0; written < count; written++) {
        size_t next = count;
        for (size_t i = 0; i < count; i++)
            if (ids[i] >= least && (next == count || ids[i] < ids[next])) next = i;
        fprintf(file, " %" PRIu32 ":%.6g", ids[next], (double)session->expert_weights[start + next]);
        least = (uint64_t)ids[next] + 1;
    }
    fputc('\n', file);
}

// Evaluates the next n tokens of the sequence and writes what is wanted of them. Returns the largest logit's id at the last.
static uint32_t trace_tokens(struct Trace *trace, const uint32_t *tokens, size_t n) {
    struct Session *session = trace->session;
    const struct ModelConfig *c = &session->model->config;
    size_t first = session->position;
    bool every = session->options.logits_rows >= n;
    forward(session, tokens, n, every ? LOGITS_ALL : LOGITS_LAST);
    for (size_t t = every ? 0 : n - 1; t < n; t++) {
        const float *logits = session->logits + (every ? t * c->vocab_size : 0);
        trace->argmax[first + t] = find_largest(logits, c->vocab_size);
        if (!contains_count(&trace->command->logits, first + t)) continue;
        fprintf(trace->logits.file, "logits %zu", first + t);
        for (size_t i = 0; i < c->vocab_size; i++) fprintf(trace->logits.file, " %.6g", (double)logits[i]);
        fputc('\n', trace->logits.file);
    }
    for (size_t t = 0; t < n; t++)
        for (size_t layer = 0; layer < c->num_hidden_layers; layer++)
            if (is_routed(c, layer) && contains_count(&trace->command->experts, first + t)) write_experts(trace, layer, first + t, t);
    return trace->argmax[first + n - 1];
}

static void print_ids(const char *what, const uint32_t *ids, size_t count) {
    printf("%s %zu", what, count);
    for (size_t i = 0; i < count; i++) printf(" %" PRIu32, ids[i]);
    putchar('\n');
}

static int command_logits(struct Command *command) {
    bool positions = command->logits.count || command->logits.all;
    if (!command->ids) wrong_usage(command, "--ids FILE is missing");
    if (!command->greedy && !command->argmax && !positions && !command->experts.count)
        wrong_usage(command, "nothing to print: give --greedy, --argmax, --logits or --experts");
    struct Model *model = open_model(command, command->arguments[0], true);
    size_t bytes, layers = model->config.num_hidden_layers;
    char *text = read_file(command->ids, &bytes);
    TokenList sequence = {0};
    parse_ids(text, bytes, model->config.vocab_size, command->ids, &sequence);
    free(text);
    if (!sequence.count) die("%s: no token ids in it", command->ids);
    if (command->experts.count && !model->config.n_routed_experts) die("%s: --experts: the model has no experts to choose from", model->name);

    size_t prompt = sequence.count, batch = min_size(micro_batch(command, model), prompt);
    struct Trace trace = {.command = command, .length = prompt + command->greedy};
    check_positions(&trace, "logits", &command->logits);
    check_positions(&trace, "experts", &command->experts);
    trace.session = open_session(command, model, &(struct SessionOptions){
        .context = trace.length, .batch = batch, .logits_rows = command->argmax || positions ? batch : 1, .cache = (enum CacheType)command->cache});
    trace.argmax = allocate(trace.length * sizeof *trace.argmax);
    trace.experts = allocate(layers * sizeof *trace.experts);
    open_lines(&trace.logits);
    for (size_t layer = 0; layer < layers; layer++) open_lines(&trace.experts[layer]);
    uint32_t next = 0;
    double started = clock_seconds();
    for (size_t done = 0, n; done < trace.length; done += n) {
        n = done < prompt ? min_size(batch, prompt - done) : 1;
        if (done >= prompt) push_id(&sequence, next);
        next = trace_tokens(&trace, sequence.ids + done, n);
        show_progress(command, "evaluating", (double)(done + n), (double)trace.length, started);
    }
    end_progress(command);
    if (command->greedy) print_ids("greedy", sequence.ids + prompt, command->greedy);
    if (command->argmax) print_ids("argmax", trace.argmax, trace.length);
    print_lines(&trace.logits);
    for (size_t layer = 0; layer < layers; layer++) print_lines(&trace.experts[layer]);
    session_free(trace.session);
    free(trace.argmax);
    free(trace.experts);
    free(sequence.ids);
    model_close(model);
    return 0;
}

// ---- inspect

enum TensorGroup { GROUP_EMBEDDING, GROUP_HEAD, GROUP_NORMS, GROUP_ATTENTION, GROUP_DENSE, GROUP_ROUTERS, GROUP_EXPERTS, GROUP_SHARED, GROUP_MTP, GROUP_COUNT };
static const char *const group_names[] = {"embedding", "head", "norms and biases", "attention", "dense feed-forward",
                                         "routers", "routed experts", "shared experts", "MTP layer"};

// What a model is made of.
struct Census {
    struct {
        size_t tensors;
        char types[64];           // of its matrices, a blank between two
        uint64_t weights, bytes;
    } groups[GROUP_COUNT];
    uint64_t weights;             // of the main model, without the MTP layer
    uint64_t active;              // of these, those that take part in a token: all but the experts that were not chosen
    double bits_per_weight;
};

static enum TensorGroup tensor_group(const struct Model *model, const char *name) {
    size_t layer;
    int end = 0;
    if (strcmp(name, "model.embed_tokens.weight") == 0) return GROUP_EMBEDDING;
    if (strcmp(name, "lm_head.weight") == 0) return GROUP_HEAD;
    if (sscanf(name, "model.layers.%zu.%n", &layer, &end) != 1 || !end) return GROUP_NORMS;
    if (layer >= model->config.num_hidden_layers) return GROUP_MTP;
    name += end;
    if (strcmp(name, "mlp.experts") == 0) return GROUP_EXPERTS;
    if (strcmp(name, "mlp.shared_experts") == 0) return GROUP_SHARED;
    if (strncmp(name, "mlp.gate.", 9) == 0) return GROUP_ROUTERS;
    if (strcmp(name, "mlp") == 0) return GROUP_DENSE;
    return strstr(name, "proj") && !strstr(name, "bias") ? GROUP_ATTENTION : GROUP_NORMS;
}

static struct Census count_tensors(const struct Model *model) {
    struct Census census = {0};
    unsigned types[GROUP_COUNT] = {0};   // bit d: a matrix of dtype d is in the group
    uint64_t bytes = 0;
    for (size_t i = 0; i < model->entry_count; i++) {
        const struct TensorEntry *entry = &model->entries[i];
        enum TensorGroup group = tensor_group(model, entry->name);
        uint64_t weights = 0;
        for (unsigned part = 0; part < entry->parts; part++) {
            weights += entry->experts * entry->rows[part] * entry->cols[part];
            types[group] |= 1u << entry->dtype[part];
        }
        if (strstr(entry->name, "key_transposed")) weights = 0;   // kv_b_proj.key once more
        census.groups[group].tensors++;
        census.groups[group].weights += weights;
        census.groups[group].bytes += entry->bytes;
        if (group == GROUP_MTP) continue;
        census.weights += weights;
        census.active += group == GROUP_EXPERTS ? weights / entry->experts * model->config.num_experts_per_tok : weights;
        bytes += entry->bytes;
    }
    for (int group = 0; group < GROUP_COUNT; group++)
        for (unsigned d = DTYPE_F32, length = 0; d < DTYPE_COUNT; d++)
            if (types[group] >> d & 1)
                length += (unsigned)snprintf(census.groups[group].types + length, sizeof census.groups[group].types - length, "%s%s",
                                             length ? " " : "", dtype_name(d));
    census.bits_per_weight = (double)bytes * 8 / (double)census.weights;
    return census;
}

// Every field of the config, by its name in format.h.
static json_t *describe_config(const struct ModelConfig *c) {
    static const char *const scalings[] = {"none", "yarn", "llama3"};
    json_t *object = json_pack("{s:s, s:s, s:s}", "architecture", architecture_name(c->architecture), "type", dtype_name(c->recipe),
                               "rope_scaling", scalings[c->rope_scaling]);
#define FIELD(name) json_object_set_new(object, #name, json_integer((json_int_t)c->name))
#define REAL(name) json_object_set_new(object, #name, json_real(c->name))
    FIELD(hidden_size), FIELD(intermediate_size), FIELD(num_hidden_layers), FIELD(num_attention_heads), FIELD(num_key_value_heads);
    FIELD(head_dim), FIELD(vocab_size), FIELD(max_position_embeddings), FIELD(tie_word_embeddings), FIELD(attention_bias), FIELD(qk_norm);
    FIELD(q_lora_rank), FIELD(kv_lora_rank), FIELD(qk_nope_head_dim), FIELD(qk_rope_head_dim), FIELD(v_head_dim), FIELD(n_routed_experts);
    FIELD(n_shared_experts), FIELD(num_experts_per_tok), FIELD(moe_intermediate_size), FIELD(first_k_dense_replace), FIELD(n_group);
    FIELD(topk_group), FIELD(norm_topk_prob), FIELD(num_nextn_predict_layers), FIELD(rope_original_max_position_embeddings);
    REAL(rms_norm_eps), REAL(rope_theta), REAL(routed_scaling_factor), REAL(rope_factor), REAL(rope_beta_fast), REAL(rope_beta_slow);
    REAL(rope_mscale), REAL(rope_mscale_all_dim), REAL(rope_attn_factor), REAL(rope_low_freq_factor), REAL(rope_high_freq_factor);
#undef FIELD
#undef REAL
    return object;
}

static json_t *describe_tokenizer(const struct Model *model) {
    const TokenizerSpecials *specials = tokenizer_specials(model->tokenizer);
    json_t *stops = json_array();
    for (size_t i = 0; i < specials->stop_count; i++) json_array_append_new(stops, json_integer(specials->stops[i]));
    json_t *object = json_pack("{s:I, s:o, s:b, s:b, s:b}", "size", (json_int_t)tokenizer_size(model->tokenizer), "stops", stops, "add_bos",
                               specials->add_bos, "has_chat", specials->has_chat, "starts_thinking", specials->starts_thinking);
#define ID(name) json_object_set_new(object, #name, specials->name == TOKEN_NONE ? json_null() : json_integer(specials->name))
    ID(bos), ID(eos), ID(user), ID(assistant), ID(end_of_turn), ID(think), ID(end_think);
#undef ID
    return object;
}

static json_t *describe_tensors(const struct Model *model) {
    json_t *list = json_array();
    for (size_t i = 0; i < model->entry_count; i++) {
        const struct TensorEntry *entry = &model->entries[i];
        json_t *parts = json_array();
        for (unsigned part = 0; part < entry->parts; part++)
            json_array_append_new(parts, json_pack("{s:s, s:[I, I]}", "type", dtype_name(entry->dtype[part]), "shape",
                                                   (json_int_t)entry->rows[part], (json_int_t)entry->cols[part]));
        char hash[20];
        snprintf(hash, sizeof hash, "%016" PRIx64, entry->hash);
        json_array_append_new(list, json_pack("{s:o, s:I, s:o, s:I, s:I, s:s}", "name", json_text(entry->name), "blobs",
                                              (json_int_t)entry->experts, "parts", parts, "offset", (json_int_t)entry->offset, "bytes",
                                              (json_int_t)entry->bytes, "xxh3", hash));
    }
    return list;
}

static void print_groups(const struct Census *census) {
    printf("\n%-22s%8s  %-10s%16s%12s\n", "Tensors", "number", "types", "parameters", "size");
    for (int group = 0; group < GROUP_COUNT; group++)
        if (census->groups[group].tensors)
            printf("  %-20s%8zu  %-10s%16" PRIu64 "%12s\n", group_names[group], census->groups[group].tensors, census->groups[group].types,
                   census->groups[group].weights, BYTES(census->groups[group].bytes));
    printf("\n  %s parameters, %s of them active for a token; %.2f bits each\n", COUNT(census->weights), COUNT(census->active),
           census->bits_per_weight);
}

// An object's members in two columns, without those that are false, null or `empty`. The object is freed.
static void print_members(const char *heading, json_t *object, double empty) {
    const char *name;
    json_t *value;
    size_t printed = 0;
    printf("\n%s", heading);
    json_object_foreach(object, name, value) {
        char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
        if (!text) die("out of memory");
        if (!json_is_false(value) && !json_is_null(value) && !(json_is_number(value) && json_number_value(value) == empty))
            printf("%s%-36s%14s", printed++ % 2 ? "      " : "\n  ", name, json_is_string(value) ? json_string_value(value) : text);
        free(text);
    }
    putchar('\n');
    json_decref(object);
}

// Compares the checksum of every tensor's data; dies with the name of the first that is wrong.
static void verify_tensors(const struct Command *command, const struct Model *model) {
    double total = 0, done = 0, started = clock_seconds();
    for (size_t i = 0; i < model->entry_count; i++) total += (double)model->entries[i].bytes;
    for (size_t i = 0; i < model->entry_count; i++) {
        const struct TensorEntry *entry = &model->entries[i];
        show_progress(command, "verifying", done, total, started);
        uint64_t hash = XXH3_64bits(model->bytes + entry->offset, entry->bytes);
        done += (double)entry->bytes;
        if (hash == entry->hash) continue;
        end_progress(command);
        die("%s: tensor %s is damaged: its checksum is %016" PRIx64 ", expected %016" PRIx64, model->name, entry->name, hash, entry->hash);
    }
    end_progress(command);
}

static int command_inspect(struct Command *command) {
    const char *path = command->arguments[0];
    if (!path) note(command, "no model given: this is the demo");
    struct Model *model = open_model(command, path ? path : "demo", false);
    if (command->verify) verify_tensors(command, model);
    struct Census census = count_tensors(model);
    struct SessionOptions options = {.logits_rows = 1, .cache = (enum CacheType)command->cache};
    struct MemoryPlan plan = {0};
    uint64_t available = available_memory();
    if (model->has_weights) {
        size_t most = model->config.max_position_embeddings;
        options.context = command->context != NOT_GIVEN ? command->context : min_size(most, DEFAULT_MAX_TOKENS);
        options.batch = min_size(micro_batch(command, model), options.context);
        plan = plan_memory(model, &options, (int)command->threads);
    }
    uint64_t total = plan.weights + plan.cache + plan.scratch;
    if (command->json) {
        json_t *object = json_pack("{s:o, s:I, s:o}", "model", json_text(model->name), "bytes", (json_int_t)model->size, "tokenizer",
                                   describe_tokenizer(model));
        if (model->has_weights)
            json_object_update_new(object, json_pack("{s:o, s:{s:I, s:I, s:I}, s:f, s:{s:I, s:s, s:I, s:I, s:I, s:I, s:I, s:I}, s:o}",
                "config", describe_config(&model->config),
                "parameters", "total", (json_int_t)census.weights, "active", (json_int_t)census.active, "mtp", (json_int_t)census.groups[GROUP_MTP].weights,
                "bits_per_weight", census.bits_per_weight,
                "memory", "context", (json_int_t)options.context, "cache_type", cache_names[options.cache], "batch", (json_int_t)options.batch,
                "weights", (json_int_t)plan.weights, "cache", (json_int_t)plan.cache, "scratch", (json_int_t)plan.scratch,
                "total", (json_int_t)total, "available", (json_int_t)available, "tensors", describe_tensors(model)));
        if (command->verify) json_object_set_new(object, "verified", json_true());
        print_json(object);
    } else {
        printf("%s: %s%s\n", model->name, BYTES(model->size), model->has_weights ? "" : ", a tokenizer without weights");
        if (model->has_weights) {
            print_members("Config", describe_config(&model->config), 0);   // what an architecture lacks is 0
            print_groups(&census);
            printf("\nMemory for %zu tokens of context (%s cache, micro-batches of %zu)\n  weights %s, cache %s, scratch %s: %s in all, %s available\n",
                   options.context, cache_names[options.cache], options.batch, BYTES(plan.weights), BYTES(plan.cache), BYTES(plan.scratch),
                   BYTES(total), available ? BYTES(available) : "unknown");
        }
        print_members("Tokenizer", describe_tokenizer(model), NAN);
        if (command->verify) printf("\nVerified: the checksums of all %zu tensors are right.\n", model->entry_count);
        flush_output();
    }
    model_close(model);
    return 0;
}

// ====================================================================================================================
// main: the command line's first word, threads, kernels
// ====================================================================================================================

#define R1_VERSION "0.1"

static const struct CommandKind commands[] = {
    {"run", RUN, "[OPTION]... MODEL [PROMPT|-]", 1, 2, command_run, true, "ask one question; the thinking, then the answer",
     "Asks MODEL (an .r1 file, or the word demo) one question and streams what it thinks and answers. Without PROMPT, or\n"
     "with -, the question is read from standard input. Ctrl-C ends the answer.\n\n"
     "  r1 run demo \"How many r's are in strawberry?\"\n"
     "  echo \"What is 2 + 3?\" | r1 run demo --hide-thinking --seed 1 >answer.txt"},
    {"bench", BENCH, "[OPTION]... [MODEL|SHAPE[:TYPE]]", 0, 1, command_bench, true, "measure prefill and decode speed",
     "Measures tokens per second of MODEL, or of a known model's SHAPE filled with synthetic weights: no file is needed.\n"
     "SHAPE is r1, r1-distill-qwen-1.5b, -7b, -14b or -32b, r1-distill-llama-8b or -70b, r1-0528-qwen3-8b or\n"
     "moonlight-16b-a3b; TYPE is f32, bf16, f8, q8, q6 or q4 (default).\n"
     "Without either: a table of all shapes in q4 and q8 and the memory they need. In three minutes it measures what it\n"
     "can of those that fit, and predicts the others from the limits of the machine.\n\n"
     "  r1 bench\n"
     "  r1 bench r1-distill-qwen-1.5b:q8\n"
     "  r1 bench r1 --layers 4 --prefill 128,512 --json"},
    {"perplexity", PERPLEXITY, "[OPTION]... MODEL [TEXT.txt]", 1, 2, command_perplexity, true, "measure how well a model predicts a text",
     "Prints the perplexity of TEXT.txt (or of --ids FILE, a sequence a line; ids before a '|' on its line are context and are\n"
     "not scored) with its standard error. --save-base keeps the predictions, --kld compares another file of the same model,\n"
     "say a smaller type, with them.\n\n"
     "  echo \"What is 2 + 3? 2 + 3 = 5\" >text.txt && r1 perplexity demo text.txt --save-base base.bin\n"
     "  r1 perplexity demo text.txt --kv q8 --kld base.bin"},
    {"inspect", INSPECT, "[OPTION]... [MODEL]", 0, 1, command_inspect, false, "show a model's config, tensors, sizes and memory plan",
     "Shows what MODEL (without one: the demo) is made of, and the memory that it takes.\n\n"
     "  r1 inspect demo --context 8192 --kv q8\n"
     "  r1 inspect demo --verify"},
    {"tokenize", TOKENIZE, "[OPTION]... MODEL [TEXT]", 1, 2, command_tokenize, false, "turn text into token ids, and back",
     "Prints the token ids of TEXT, or of every line of standard input, a line each; on a terminal with their pieces.\n\n"
     "  r1 tokenize demo \"Hello there\"\n"
     "  echo '[{\"role\": \"user\", \"content\": \"Hi\"}]' | r1 tokenize demo --chat"},
    {"logits", LOGITS, "[OPTION]... MODEL --ids FILE", 1, 1, command_logits, true, "print numbers to compare with another implementation",
     "Evaluates the ids of FILE as one prompt, then --greedy N tokens more, and prints what is asked for of this sequence,\n"
     "positions counting from 0.\n\n"
     "  r1 tokenize demo \"Hello there\" >prompt.ids && r1 logits demo --ids prompt.ids --greedy 16 --logits 0,5 --kv f32"},
};
#define COMMAND_TOTAL (sizeof commands / sizeof *commands)

static void print_help(FILE *out) {
    fputs("r1 runs DeepSeek-R1 and its family on a CPU.\n\nUsage: r1 COMMAND [OPTION]... MODEL ...\n\n", out);
    for (size_t i = 0; i < COMMAND_TOTAL; i++) fprintf(out, "  %-12s%s\n", commands[i].name, commands[i].summary);
    fputs("\nMODEL is an .r1 file, which r1-convert makes of a Hugging Face checkpoint, or the word demo: a small model that is\n"
          "part of this program. `r1 COMMAND --help` tells more; `r1 --version` prints the version. Try:\n\n"
          "  r1 run demo \"How many r's are in strawberry?\"\n", out);
}

#ifndef TESTING
static int start_command(void *argument) {
    struct Command *command = argument;
    return command->kind->function(command);
}

static void prepare_machine(struct Command *command) {
    int cpus[MAX_THREADS];
    if (command->threads == NOT_GIVEN) command->threads = (uint64_t)list_physical_cores(cpus, MAX_THREADS);
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (command->kind->computes && processors > 0 && command->threads > (uint64_t)processors)
        note(command, "%" PRIu64 " threads share %ld processors: fewer would be faster", command->threads, processors);
    command->kernels = choose_kernels(command->isa);
    if (command->kernels) return;
    const struct Kernels *list[MAX_KERNEL_TABLES];
    char names[256] = "auto";
    size_t count = list_kernels(list);
    for (size_t i = 0; i < count; i++) {
        size_t length = strlen(names);
        snprintf(names + length, sizeof names - length, ", %s", list[i]->name);
    }
    wrong_usage(command, "--isa %.40s: this processor and this build have %s", command->isa, names);
}

int main(int argc, char **argv) {
    static struct Team team;
    signal(SIGPIPE, SIG_IGN);     // flush_output() deals with closed pipes
    if (argc < 2) {
        fputs("r1: a command is missing\n\n", stderr);
        print_help(stderr);
        return 2;
    }
    bool wants_help = strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0;
    if (wants_help || strcmp(argv[1], "--version") == 0) {
        if (wants_help) print_help(stdout);
        else puts("r1 " R1_VERSION);
        flush_output();
        return 0;
    }
    static struct Command command;   // too large for the stack of some systems
    command = (struct Command){
        .team = &team, .threads = NOT_GIVEN, .batch = NOT_GIVEN, .context = NOT_GIVEN, .cache = CACHE_F16, .isa = "auto",
        .max_tokens = DEFAULT_MAX_TOKENS, .seed = NOT_GIVEN, .think_budget = NOT_GIVEN, .temperature = 0.6, .top_p = 0.95,
        .decode = NOT_GIVEN, .seconds = NOT_GIVEN,
    };
    for (size_t i = 0; i < COMMAND_TOTAL; i++)
        if (strcmp(argv[1], commands[i].name) == 0) command.kind = &commands[i];
    if (!command.kind && (strcmp(argv[1], "demo") == 0 || access(argv[1], F_OK) == 0)) {
        fprintf(stderr, "r1: '%.200s' is a model, not a command; ask it something with: r1 run %.200s \"...\"\n", argv[1], argv[1]);
        return 2;
    }
    if (!command.kind) {
        fprintf(stderr, "r1: unknown %s '%.60s' (r1 --help lists the commands)\n", argv[1][0] == '-' ? "option" : "command", argv[1]);
        return 2;
    }
    parse_command_line(&command, argc - 2, argv + 2);
    int status = 0;
    if (command.help) {
        print_command_help(command.kind);
    } else {
        if (command.argument_count < command.kind->least_arguments) wrong_usage(&command, "MODEL is missing");
        prepare_machine(&command);
        if (command.kind->computes) status = team_start(&team, (int)command.threads, start_command, &command);
        else status = command.kind->function(&command);
    }
    flush_output();
    return status;
}
#endif
