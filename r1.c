// r1.c: runs DeepSeek-R1 and its family on a CPU.
//
// The whole engine is this one file, to be read from top to bottom: helpers, threads, the .r1 file, the kernels in
// portable C, the session, matrix products, norms and RoPE, the cache, attention, router and experts, forward, sampling.
// Then come the commands and what they need: options, generation of text, and main; `r1 bench` and `r1 perplexity` are in measure.h.
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

// A line on standard error. Names come from files: nothing that a terminal would obey gets through.
static void print_remark(const char *format, va_list args) {
    char line[4096];
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
    fprintf(stderr, "r1: %s\n", line);
}

static _Noreturn __attribute__((format(printf, 1, 2))) void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    print_remark(format, args);
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

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
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

// The number behind `name` in a file of /proc or /sys, whose lines start with names; with "" the number that the file is.
// `otherwise` where there is none, as in "max".
static uint64_t read_system_number(const char *folder, const char *file_name, const char *name, uint64_t otherwise) {
    char path[8192], line[256];
    snprintf(path, sizeof path, "%s/%s", folder, file_name);
    FILE *file = fopen(path, "r");
    if (!file) return otherwise;
    uint64_t number = otherwise;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0 && sscanf(line + strlen(name), "%" SCNu64, &number) == 1) break;
    fclose(file);
    return number;
}

// Bytes that can still be taken before the control group of this process (a container's, say), or one around it, reaches its
// limit; UINT64_MAX without limits. Pages of files count as used there, but make way. `root` is "", or a test's folder that
// stands for /.
static uint64_t available_in_group(const char *root) {
    static const struct { const char *line, *folder, *limit, *used, *pages[2]; } versions[] = {   // 1 and 2 of control groups
        {"%*u:memory:%4095[^\n]", "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", {"total_active_file ", "total_inactive_file "}},
        {"0::%4095[^\n]", "", "memory.max", "memory.current", {"active_file ", "inactive_file "}},
    };
    uint64_t available = UINT64_MAX;
    char path[6144], line[4096], group[4096];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        for (size_t v = 0; v < sizeof versions / sizeof *versions; v++) {
            if (sscanf(line, versions[v].line, group) != 1) continue;
            // Outwards to the top, which is where a container that sees no groups but its own has that one.
            for (char *end = strchr(group, 0); end; end = strrchr(group, '/')) {
                *end = 0;
                snprintf(path, sizeof path, "%s/sys/fs/cgroup%s%s", root, versions[v].folder, group);
                uint64_t limit = read_system_number(path, versions[v].limit, "", UINT64_MAX);
                uint64_t used = read_system_number(path, versions[v].used, "", 0);
                for (int i = 0; i < 2; i++) {
                    uint64_t pages = read_system_number(path, "memory.stat", versions[v].pages[i], 0);
                    used -= pages < used ? pages : used;
                }
                if (limit == UINT64_MAX) continue;
                uint64_t left = used < limit ? limit - used : 0;
                if (left < available) available = left;
            }
        }
    if (file) fclose(file);
    return available;
}

// Addresses that OpenBLAS takes for each thread at its first product; where there are none it asks for ever.
#define BLAS_THREAD_BYTES (128ull << 20)

// Bytes of memory that a new program can still take without pushing others out; 0 if the system does not say.
static uint64_t available_memory(void) {
    uint64_t bytes = read_system_number("/proc", "meminfo", "MemAvailable:", 0) << 10;
    uint64_t in_group = available_in_group("");
    if (in_group < bytes) bytes = in_group ? in_group : 1;   // 0 would be taken for unknown
    struct rlimit limit;          // `ulimit -v`: of addresses, some of which are taken already, or will be by OpenBLAS
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        uint64_t taken = read_system_number("/proc/self", "statm", "", 0) * (uint64_t)sysconf(_SC_PAGESIZE) +
                         BLAS_THREAD_BYTES * (uint64_t)omp_get_max_threads();
        uint64_t left = limit.rlim_cur > taken ? limit.rlim_cur - taken : 1;
        if (left < bytes) bytes = left;
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
    int spins;                    // how often a waiting thread looks before it lets others run
    void (*job)(void *argument, int thread);   // NULL at the end of the program
    void *argument;
    // Each on a cache line of its own: threads that spin on one must not slow down writers of another.
    _Alignas(64) atomic_uint job_number;   // counts up with every job posted
    _Alignas(64) atomic_uint arrived;      // threads at the barrier
    _Alignas(64) atomic_uint epoch;        // barriers passed
    _Alignas(64) atomic_int blas_callers;  // threads inside OpenBLAS
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
    for (int looks = 0; atomic_load_explicit(value, memory_order_acquire) == old; looks += looks < 65536) {
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
        if (!team->job) return;
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
// for a step by whoever looks at it first. Where items are a microsecond long they are taken several at a time, half of what is
// left of a share, so that all end together (guided self-scheduling, Polychronopoulos and Kuck 1987): the processor asks for no
// memory while it counts.
struct Items {
    struct Team *team;
    int owner, left;              // whose share is being worked off, and how many shares are left
    size_t count, most;           // items in all, and taken at a time
    size_t next, end;             // items taken and not given out yet
    uint64_t step;
};

// `count` items, below 2^32, dealt out among the threads, who take up to `most` at a time. Between two steps there must be a
// barrier.
static struct Items share_items(struct Team *team, int thread, size_t count, size_t most) {
    uint64_t epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    return (struct Items){.team = team, .owner = thread, .left = team->threads, .count = count, .most = most, .step = epoch << 32};
}

// Takes items, at least one; false when there are no more.
static bool take_items(struct Items *items) {
    for (; items->left; items->left--, items->owner = (items->owner + 1) % items->team->threads) {
        atomic_uint_least64_t *next = &items->team->shares[items->owner].next;
        uint_least64_t seen = atomic_load_explicit(next, memory_order_relaxed);
        size_t first, end;
        static_share(items->team, items->owner, items->count, &first, &end);
        do {
            items->next = seen >> 32 == items->step >> 32 ? (uint32_t)seen : first;
            items->end = items->next + min_size(ceil_div(end - items->next, 2), items->most);
        } while (items->next < end && !atomic_compare_exchange_weak_explicit(next, &seen, items->step | items->end, memory_order_relaxed,
                                                                             memory_order_relaxed));
        if (items->next < end) return true;
    }
    return false;
}

// The next item in *item; false when there are no more.
static bool next_item(struct Items *items, size_t *item) {
    if (items->next == items->end && !take_items(items)) return false;
    *item = items->next++;
    return true;
}

// The processors to run on, one a physical core, from the ones this process may use. Returns how many.
static int list_physical_cores(int cpus[MAX_THREADS]) {
    int count = 0;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE && count < MAX_THREADS; cpu++) {
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
    for (count = 0; count < online && count < MAX_THREADS; count++) cpus[count] = count;
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
static void team_start(struct Team *team, int threads, void (*main_function)(void *argument), void *argument) {
    team->threads = threads;
    atomic_store(&team->epoch, 1);   // no counter of items is of this step yet
    openblas_set_num_threads(1);   // OpenBLAS is called from inside our own threads, one at a time each
    omp_set_dynamic(0);
    omp_set_num_threads(threads);
    int cpus[MAX_THREADS], cores = list_physical_cores(cpus);
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
                main_function(argument);
                team->job = NULL;
                atomic_fetch_add_explicit(&team->job_number, 1, memory_order_release);
            } else {
                team_work(team, thread);
            }
        }
    }
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

// Blobs, `stride` bytes apart, of up to three matrices, alike from blob to blob: a feed-forward network, a layer's experts, a factor per head.
struct Blobs {
    struct Matrix part[ENTRY_MAX_PARTS];   // of blob 0
    size_t stride;
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
    const uint8_t *bytes;         // the whole file in memory; of a shape, its tensors
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
// Values a head's query and key have; of these, how many RoPE turns; values a head gives out.
static size_t query_dim(const struct ModelConfig *c) {
    return is_mla(c) ? (size_t)c->qk_nope_head_dim + c->qk_rope_head_dim : c->head_dim;
}
static size_t rope_dim(const struct ModelConfig *c) { return is_mla(c) ? c->qk_rope_head_dim : c->head_dim; }
static size_t value_dim(const struct ModelConfig *c) { return is_mla(c) ? c->v_head_dim : c->head_dim; }

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

// The entry of a layer's tensor; NULL with a sentence in the binder's error if there is none.
static const struct TensorEntry *find_entry(const struct Binder *binder, const char *format, size_t layer) {
    struct TensorEntry key;
    snprintf(key.name, sizeof key.name, format, layer);
    const struct TensorEntry *wanted = &key;
    const struct TensorEntry **found = bsearch(&wanted, binder->sorted, binder->model->entry_count, sizeof *binder->sorted, compare_entries);
    if (!found) fail(binder->error, "tensor %s is missing", key.name);
    return found ? *found : NULL;
}

static bool check_shape(const struct Binder *binder, const struct TensorEntry *entry, unsigned part, size_t rows, size_t cols) {
    if (entry->rows[part] == rows && entry->cols[part] == cols) return true;
    return fail(binder->error, "tensor %s: shape [%" PRIu64 ", %" PRIu64 "], expected [%zu, %zu]", entry->name, entry->rows[part],
                entry->cols[part], rows, cols);
}

// Binds blobs of `parts` matrices. sizes: rows and cols of each part.
static bool bind_blobs(const struct Binder *binder, struct Blobs *out, size_t count, unsigned parts, const size_t sizes[][2],
                       const char *format, size_t layer) {
    const struct TensorEntry *entry = find_entry(binder, format, layer);
    if (!entry) return false;
    if (entry->is_vector || entry->parts != parts || entry->experts != count)
        return fail(binder->error, "tensor %s: %" PRIu64 " blobs of %u parts, expected %zu of %u", entry->name, entry->experts, entry->parts, count, parts);
    for (unsigned part = 0; part < parts; part++) {
        if (!check_shape(binder, entry, part, sizes[part][0], sizes[part][1])) return false;
        out->part[part] = (struct Matrix){.data = binder->model->bytes + entry->offset + part_offset(entry, part), .dtype = entry->dtype[part],
                                          .rows = sizes[part][0], .cols = sizes[part][1], .panel_step = panel_step(entry, part)};
    }
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
    const struct TensorEntry *entry = find_entry(binder, format, layer);
    if (!entry) return false;
    if (!entry->is_vector) return fail(binder->error, "tensor %s: a matrix, expected a vector", entry->name);
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
    out->routed = c->n_routed_experts && i >= c->first_k_dense_replace;
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

// Reads a file's preamble and checks it against the file's size, and the metadata against its checksum; false with a sentence in error.
static bool read_preamble(const uint8_t *bytes, size_t size, const char *name, struct FilePreamble *preamble, char *error) {
    if (size >= 4 && memcmp(bytes, "GGUF", 4) == 0)
        return fail(error, "%s: a GGUF file; r1 reads .r1 files, which r1-convert makes from the original Hugging Face checkpoint", name);
    if (size < sizeof *preamble || memcmp(bytes, FORMAT_MAGIC, sizeof preamble->magic) != 0) return fail(error, "%s: not an .r1 file", name);
    memcpy(preamble, bytes, sizeof *preamble);
    if (preamble->version != FORMAT_VERSION || preamble->config_bytes != sizeof(struct ModelConfig))
        return fail(error, "%s: an .r1 file of version %u, this program reads version %u; convert the model again", name, preamble->version,
                    FORMAT_VERSION);
    if (preamble->file_bytes != size)
        return fail(error, "%s: %zu bytes, expected %" PRIu64 ": the file is cut short or has grown", name, size, preamble->file_bytes);
    uint64_t config_end = sizeof *preamble + sizeof(struct ModelConfig);
    uint64_t table_bytes = (uint64_t)preamble->tensor_count * sizeof(struct TensorEntry);
    if (config_end > size || preamble->tokenizer_offset < config_end || preamble->tokenizer_offset > size ||
        preamble->tokenizer_bytes > size - preamble->tokenizer_offset ||
        preamble->table_offset < preamble->tokenizer_offset + preamble->tokenizer_bytes || preamble->table_offset > size ||
        preamble->table_offset % 8 || table_bytes > size - preamble->table_offset)
        return fail(error, "%s: damaged: its sections do not lie inside the file", name);
    XXH3_state_t *state = XXH3_createState();
    if (!state) die("out of memory");
    XXH3_64bits_reset(state);
    XXH3_64bits_update(state, bytes, offsetof(struct FilePreamble, metadata_hash));
    XXH3_64bits_update(state, bytes + sizeof *preamble, preamble->table_offset + table_bytes - sizeof *preamble);
    uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash == preamble->metadata_hash || fail(error, "%s: damaged: the checksum of its metadata is wrong", name);
}

// Makes a model of a whole file in memory (page-aligned); NULL with a sentence in error if it is not a sound one. bytes
// must outlive the model.
static struct Model *model_from_memory(const uint8_t *bytes, size_t size, const char *name, char *error) {
    struct FilePreamble preamble;
    if (!read_preamble(bytes, size, name, &preamble, error)) return NULL;
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
    uint64_t table_end = preamble.table_offset + model->entry_count * sizeof *model->entries;
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

// A directory, given where an .r1 file belongs: error says what to do instead.
static void explain_directory(const char *path, char *error) {
    char config[4096];
    snprintf(config, sizeof config, "%s/config.json", path);
    int length = (int)strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    if (access(config, R_OK) != 0) fail(error, "%s: a directory, not an .r1 file", path);
    else fail(error, "%s: a Hugging Face directory, not an .r1 file; convert it first: r1-convert %.*s %.*s.r1", path, length, path,
              (int)min_size((size_t)length, 200), path);
}

// Opens MODEL of the command line: a path to an .r1 file, or the word "demo". NULL with a sentence in error.
static struct Model *model_open(const char *path, char *error) {
#ifdef R1_DEMO_FILE
    if (strcmp(path, "demo") == 0) return model_from_memory(demo_file_start, (size_t)(demo_file_end - demo_file_start), "demo", error);
#endif
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);   // nobody may ever write into a named pipe
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) {
        fail(error, "%s: %s", path, strerror(errno));
        if (file >= 0) close(file);
        return NULL;
    }
    if (S_ISDIR(status.st_mode)) explain_directory(path, error);
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
    struct Model *model = model_from_memory(bytes, size, path, error);
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
    const int8_t *quants;         // [cols]            rotated values (format.h) = quants * scales[column / 256]
    const float *scales;          // [ceil(cols/256)]
    const int32_t *sums;          // [cols / 32]       sum of each 32 quants
    const int32_t *block_sums;    // [ceil(cols/256)]  and of each 256
};

// One panel times n tokens (1 to TILE_TOKENS): out[t][r] = sum over k of weight(r, k) * x[t](k), t < n, r < 32.
typedef void PanelProduct(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out);

// Many tokens take an integer panel in two steps, so that decoding its weights is paid once for all of them. Unpacking
// turns columns [first, first + depth) of a panel, first a multiple of 256, into one byte a weight, [depth/4][32][4], and
// one scale for each row and 256 columns, [ceil(depth/256)][32]. The bytes are int8 in whatever disguise suits the
// instruction set, up to UNPACKED_BLOCK_BYTES for 256 columns: only multiply_unpacked[] of the same table and type looks at them.
#define UNPACKED_BLOCK_BYTES (2 * K_BLOCK * PANEL_ROWS + 4 * PANEL_ROWS)
typedef void PanelUnpacking(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales);

// out[t * stride + r] = sum over `depth` unpacked columns k of weight(r, k) * x[t](first + k), for any n; += with `add`.
typedef void UnpackedProduct(const uint8_t *bytes, const float *scales, size_t depth, const struct Row *x, size_t first, size_t n,
                             bool add, float *out, size_t stride);

struct Kernels {
    const char *name;
    PanelProduct *product[DTYPE_COUNT + 1];   // by dtype; the last is DTYPE_F16
    PanelUnpacking *unpack[DTYPE_COUNT];  // of q8, q4 and q6
    UnpackedProduct *multiply_unpacked[DTYPE_COUNT];
    // Quantises a k-block of up to 256 columns (a multiple of 32): *scale = max|x| / 127, the nearest integers, the sums of
    // each 32, and in *block_sum of all. Not-a-number in x gives numbers out, never undefined behaviour.
    void (*quantize_block)(const float *x, size_t cols, int8_t *quants, float *scale, int32_t *sums, int32_t *block_sum);
    // rotate_columns() of format.h.
    void (*rotate_columns)(const float *x, size_t n, float *out);
    // out[t * stride + r] = tile[t][r], t < n, r < 32; += with `add`.
    void (*store_tile)(const float *tile, size_t n, bool add, float *out, size_t stride);
    // Sum of x[i] * y[i].
    float (*dot)(const float *x, const float *y, size_t n);
    // The largest of n numbers, -infinity of none; not-a-numbers are left out.
    float (*find_maximum)(const float *x, size_t n);
    // Quantises x [rows][32] for a block of a q8 cache: 32 positions, a column each, with one scale a column. quantize_keys writes
    // a k-block of a panel of keys (rows <= 256, a multiple of 32), quantize_values positions first to first + 31 of the panels
    // of values, and their scales (rows a multiple of 32).
    void (*quantize_keys)(const float *x, size_t rows, uint8_t *block);
    void (*quantize_values)(const float *x, size_t rows, size_t first, float *scales, uint8_t *panels);
    // x[i] = exp(x[i] - maximum), times scales[i] unless scales is NULL; returns the sum without scales.
    float (*exp_row)(float *x, float maximum, const float *scales, size_t n);
    // gate[i] = silu(gate[i]) * up[i], silu(g) = g / (1 + exp(-g)).
    void (*silu_multiply)(float *gate, const float *up, size_t n);
    // What a half-precision cache holds.
    void (*float_to_half)(const float *x, uint16_t *half, size_t n);
    // What `r1 bench` measures the processor's limits with: reads `count` bytes (a multiple of 256) and makes one number of
    // them, asking for each line `ahead` of time, if that is not 0, and for the beginning of the next page, if `pages`;
    // multiplies and adds int8 numbers that stand in registers, macs_per_round of them in a round.
    uint64_t (*read_probe)(const uint8_t *bytes, size_t count, size_t ahead, bool pages);
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

static void product_f16(const uint8_t *panel, size_t cols, const struct Row *x, size_t n, float *out) {
    const uint16_t *w = (const uint16_t *)(const void *)panel;   // [cols][32]
    for (size_t t = 0; t < n; t++) {
        float sum[PANEL_ROWS] = {0};
        for (size_t k = 0; k < cols; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) sum[r] += float_from_half(w[k * PANEL_ROWS + r]) * x[t].values[k];
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
    const uint8_t *block = panel + panel_bytes(DTYPE_Q8, first);
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
    const uint8_t *block = panel + panel_bytes(DTYPE_Q4, first);
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
                int ratio = (int)lrintf((float)(int8_t)(block[k / K_GROUP * PANEL_ROWS + r] & 0xfe) * inverse);
                bytes[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4] = (uint8_t)((q4_value(block, w, r, k) * ratio + 0x4000) >> 15);
            }
        }
        block = w + value_bytes(DTYPE_Q4, length);
        bytes += length * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
}

static void unpack_q6(const uint8_t *panel, size_t cols, size_t first, size_t depth, uint8_t *bytes, float *scales) {
    const uint8_t *block = panel + panel_bytes(DTYPE_Q6, first);
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
                              bool add, float *out, size_t stride) {
    for (size_t start = 0; start < depth; start += K_BLOCK, scales += PANEL_ROWS)
        for (size_t t = 0; t < n; t++) {
            const int8_t *w = (const int8_t *)bytes + start * PANEL_ROWS, *q = x[t].quants + first + start;
            int32_t part[PANEL_ROWS] = {0};
            for (size_t k = 0; k < min_size(K_BLOCK, depth - start); k += 4)
                for (size_t r = 0; r < PANEL_ROWS; r++)
                    for (size_t j = 0; j < 4; j++) part[r] += w[k * PANEL_ROWS + r * 4 + j] * q[k + j];
            float x_scale = x[t].scales[(first + start) / K_BLOCK];
            for (size_t r = 0; r < PANEL_ROWS; r++) {
                float before = add || start ? out[t * stride + r] : 0;
                out[t * stride + r] = before + (float)part[r] * (scales[r] * x_scale);
            }
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

static float find_maximum(const float *x, size_t n) {
    float largest = -INFINITY;
    for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
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

INLINE void store_tile_body(const float *tile, size_t n, bool add, float *out, size_t stride) {
    for (size_t t = 0; t < n; t++, tile += PANEL_ROWS, out += stride)
#pragma omp simd
        for (size_t r = 0; r < PANEL_ROWS; r++) out[r] = (add ? out[r] : 0) + tile[r];
}

INLINE float exp_row_body(float *x, float maximum, const float *scales, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        x[i] = exp_float(x[i] - maximum);
        sum += x[i];
    }
    for (size_t i = 0; i < n && scales; i++) x[i] *= scales[i];
    return sum;
}

INLINE void silu_multiply_body(float *gate, const float *up, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exp_float(-gate[i])) * up[i];
}

INLINE void float_to_half_body(const float *x, uint16_t *half, size_t n) {
    for (size_t i = 0; i < n; i++) half[i] = half_from_float(x[i]);
}

// The widest vectors of an instruction set: of wider ones compilers make a detour through memory that is slower than the memory.
typedef uint64_t Vector128 __attribute__((vector_size(16), may_alias));
typedef uint64_t Vector256 __attribute__((vector_size(32), may_alias));
typedef uint64_t Vector512 __attribute__((vector_size(64), may_alias));

// Asks for the beginning of a page of 4 KB; the processor's own prefetcher goes on from there.
INLINE void prefetch_page(uintptr_t page) {
    for (size_t i = 0; i < 512; i += 64) __builtin_prefetch((const void *)(page + i), 0, 2);
}

#define READ_PROBE_BODY(Vector, bytes, count, ahead, pages)                                                             \
    Vector a = {0}, b = {0}, c = {0}, d = {0};                                                                          \
    for (size_t i = 0; i < count; i += 4 * sizeof(Vector)) {                                                            \
        const Vector *at = (const Vector *)(const void *)(bytes + i);                                                   \
        if (pages && (uintptr_t)at % 4096 == 0) prefetch_page((uintptr_t)at + 4096);                                    \
        for (size_t line = 0; line < 2 * sizeof(Vector) && ahead; line += 64)                                           \
            __builtin_prefetch((const void *)((uintptr_t)at + ahead + line), 0, 0);                                     \
        a ^= at[0], b ^= at[1];                                                                                         \
        for (size_t line = 2 * sizeof(Vector); line < 4 * sizeof(Vector) && ahead; line += 64)                          \
            __builtin_prefetch((const void *)((uintptr_t)at + ahead + line), 0, 0);                                     \
        c ^= at[2], d ^= at[3];                                                                                         \
    }                                                                                                                   \
    a ^= b ^ c ^ d;                                                                                                     \
    uint64_t sum = 0;                                                                                                   \
    for (size_t i = 0; i < sizeof(Vector) / sizeof sum; i++) sum ^= a[i];                                               \
    return sum;

static uint64_t read_probe(const uint8_t *bytes, size_t count, size_t ahead, bool pages) {
    READ_PROBE_BODY(Vector128, bytes, count, ahead, pages)
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
                [DTYPE_Q4] = product_q4, [DTYPE_Q6] = product_q6, [DTYPE_F16] = product_f16},
    .unpack = {[DTYPE_Q8] = unpack_q8, [DTYPE_Q4] = unpack_q4, [DTYPE_Q6] = unpack_q6},
    .multiply_unpacked = {[DTYPE_Q8] = multiply_unpacked, [DTYPE_Q4] = multiply_unpacked, [DTYPE_Q6] = multiply_unpacked},
    .quantize_block = quantize_block_body,
    .rotate_columns = rotate_columns_body,
    .store_tile = store_tile_body,
    .dot = dot_body,
    .find_maximum = find_maximum,
    .quantize_keys = quantize_keys_body,
    .quantize_values = quantize_values_body,
    .exp_row = exp_row_body,
    .silu_multiply = silu_multiply_body,
    .float_to_half = float_to_half_body,
    .read_probe = read_probe,
    .multiply_probe = multiply_probe_portable,
    .macs_per_round = PORTABLE_PROBE_MACS,
};

// How the kernels of x86-64 ask for weights before they multiply them; the processor's own prefetcher stops at the end of each 4 KB
// page. What is best on one processor costs a quarter of the speed on another, so decode tries these ways: see try_prefetching(). Other
// kernels ask for nothing, and the trial changes nothing.
#define PREFETCHING_WAYS 6
static const struct Prefetching {
    size_t bytes;                 // how far ahead
    bool first_only;              // into the first cache alone ("non-temporal"), not into the second
    bool pages;                   // ask for the beginning of the page after the next, too: AVX-512 alone
} prefetching_ways[PREFETCHING_WAYS] = {
    [0] = {192, true, true}, [1] = {0, true, true}, [2] = {4096, false, false},    // guess_prefetching() names them by their numbers
    [3] = {1536, true, false}, [4] = {6144, true, false}, [5] = {3072, true, false},
};
static _Thread_local struct Prefetching prefetching;         // how this thread asks

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

#ifndef R1_AVX2_KERNELS
static size_t guess_prefetching(void) { return 0; }
#endif

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
#define MIDDLE_TOKENS 256         // tokens for which 256 columns of a feed-forward network's middle are computed at a time
#define MAX_KEY_COLS 5120         // of a cache: 4096 + 1024 of MLA (format.h's limits)
#define CACHE_BLOCK 256           // positions of a block of the cache, which attention takes at a time
#define CACHE_SPAN 1024           // positions of a piece of attention for few tokens; a multiple of CACHE_BLOCK
#define ATTENTION_QUERIES 256     // most queries (tokens times heads) of one piece of attention work
#define MAX_BATCH 16384

struct SessionOptions {
    size_t context;               // tokens that the cache has room for
    size_t batch;                 // most tokens of one forward (micro-batch)
    size_t logits_rows;           // rows of logits kept: 1 (the last token's) or batch
    enum CacheType cache;
};

// Inputs of matrix products, one Row a token, whose numbers lie in buffers together.
struct Activations {
    struct Row *rows;
    float *values;
    int8_t *quants;
    float *scales;
    int32_t *sums, *block_sums;
};

// A feed-forward network and the tokens that visit it: a visit is one token at one job. A dense layer is one job that every
// token visits; a mixture-of-experts layer has a job for each expert that was chosen, and one for the shared experts.
struct FeedForwardJob {
    struct Matrix gate, up, down;
    size_t n;                     // tokens
    const uint32_t *tokens;       // [n] which ones
    const float *weights;         // [n] how much of the result each takes
    struct Row *inputs;           // [n]
    struct Row *middle;           // [n] silu(gate) * up, the inputs of down
    float *gate_results, *up_results;   // [intermediate/32][n][32] of few tokens: what the two gave
    float *results;               // [hidden/32][n][32] of few tokens: what down gave
};

// What a thread needs for itself.
struct Worker {
    float *gate_tile;             // [4][batch][32] results of a product, or [8][256][32]
    float *up_tile;               // [4][256][32]
    float *gemm_weights;          // [512][128]
    uint8_t *unpacked;            // [2][UNPACKED_BLOCK_BYTES]
    float *unpacked_scales;       // [2][32]
    float *gemm_inputs;           // [batch][512]
    float *gemm_tile;             // [batch][128]
    struct Activations queries;   // [256, or batch][query dim, or kv_lora_rank + rope]
    float *mixed;                 // as many [value dim, or kv_lora_rank]
    struct Activations scores;    // [256][256] of the queries, and the softmax of them
    float *maxima, *sums;         // [256, or batch] of the softmax of each query
    // MLA where keys and values are expanded
    float *key_factor;            // [kv_lora_rank][nope] a head's factors as floats
    float *value_factor;          // [kv_lora_rank][v_head_dim]
    struct Activations factors;   // [v_head_dim + nope][kv_lora_rank] the same as rows
    float *expanded;              // [v_head_dim + nope + rope][32] values and keys of 32 positions
    uint8_t *block_keys, *block_values;   // a block like one of the cache
};

// The times of the first layers that are decoded, each with another way of asking for weights.
#define TRIAL_ROUNDS 18
_Static_assert(TRIAL_ROUNDS % PREFETCHING_WAYS == 0, "the order moves on between whole rounds");
struct Trial {
    size_t layers;                // tried so far
    size_t guess;                 // the way that prefill starts with, and that others must beat
    size_t way;                   // of the layer at hand; of all to come when the trial is over
    double start;                 // of the layer at hand, by the clock
    double seconds[PREFETCHING_WAYS][TRIAL_ROUNDS];
};

struct Session {
    const struct Model *model;
    struct Team *team;
    const struct Kernels *kernels;
    struct SessionOptions options;
    size_t position;              // tokens in the cache; setting it lower forgets the last ones
    struct Trial trial;

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
    struct Activations middle;    // [batch * (experts per token + 1)][intermediate] silu(gate) * up of each visit
    float *q;                     // [batch][heads * query dim]
    struct Activations queries;   // [heads][n] of few tokens, as they meet the cache
    float *k, *v;                 // [batch][kv_heads * head_dim] GQA
    float *q_latent;              // [batch][q_lora_rank] MLA
    float *kv_latent;             // [batch][kv_lora_rank + rope] MLA
    float *router_logits;         // [batch][experts]

    struct FeedForwardJob *jobs;  // [experts + 1]
    size_t job_count;
    uint32_t *job_tokens;         // [batch * (experts per token + 1)]
    float *job_weights;
    struct Row *job_inputs;
    size_t *expert_visits;        // [experts + 1]
    float *gate_results, *up_results;   // [16 * (experts per token + 1)][intermediate] of few tokens
    float *down_results;          // [16 * (experts per token + 1)][hidden] of few tokens: what each visit adds to the residual stream

    uint8_t *cache;
    uint32_t cache_dtype;         // enum Dtype
    size_t key_block_bytes, cache_block_bytes;   // of 256 positions of a head: the keys, and with the values behind them
    size_t cache_layer_bytes;

    float *span_mixed;            // [16][spans][heads][value dim, or kv_lora_rank] of few tokens: what each span of the cache gave
    float *span_maxima, *span_sums;          // [16][spans][heads]

    struct Worker *workers;       // [threads]
    void *arena;
    size_t arena_bytes;
};

struct MemoryPlan {
    uint64_t weights, cache, scratch;   // bytes
};

// Columns of keys and values in the cache. MLA has one latent with the rotated part of the key behind it, shared by all heads,
// and the latent again as value. Values are padded to panels; q8 pads keys, too, a latent and its rotated part each.
static size_t padded(size_t cols) { return align_up(cols, PANEL_ROWS); }
static size_t key_columns(uint32_t dtype, size_t cols, size_t rest) { return dtype == DTYPE_Q8 ? padded(cols) + padded(rest) : cols + rest; }
static size_t cache_heads(const struct ModelConfig *c) { return is_mla(c) ? 1 : c->num_key_value_heads; }
static size_t cache_key_cols(const struct ModelConfig *c, uint32_t dtype) {
    return is_mla(c) ? key_columns(dtype, c->kv_lora_rank, c->qk_rope_head_dim) : key_columns(dtype, c->head_dim, 0);
}
static size_t cache_value_cols(const struct ModelConfig *c) { return padded(is_mla(c) ? c->kv_lora_rank : c->head_dim); }

// Bytes of a block of the cache, and those in front of its values' panels: a q8 cache's scales.
static size_t key_block_bytes(uint32_t dtype, size_t cols) { return CACHE_BLOCK / PANEL_ROWS * panel_bytes(dtype, cols); }
static size_t value_head_bytes(uint32_t dtype) { return dtype == DTYPE_Q8 ? CACHE_BLOCK * sizeof(float) : 0; }
static size_t value_block_bytes(uint32_t dtype, size_t cols) { return value_head_bytes(dtype) + cols / PANEL_ROWS * panel_bytes(dtype, CACHE_BLOCK); }

// Of MLA's expanded keys and values.
static uint32_t expanded_dtype(uint32_t cache_dtype) { return cache_dtype == DTYPE_Q8 ? DTYPE_Q8 : DTYPE_F32; }

// All buffers of a session lie in one arena. `make asan` and `make fuzz` leave gaps between them, so that the sanitizer sees where
// one ends.
#ifdef __has_feature              // clang; gcc defines the other, as newer ones of both may
#if __has_feature(address_sanitizer) && !defined __SANITIZE_ADDRESS__
#define __SANITIZE_ADDRESS__
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define ARENA_GAP 4096
#else
#define ARENA_GAP 0
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#endif

struct Arena {
    uint8_t *base;                // NULL: only count
    size_t used;
};

static void *take(struct Arena *arena, size_t count, size_t size) {
    size_t offset = align_up(arena->used, 64), end = offset + count * size;
    arena->used = end + ARENA_GAP;
    if (!arena->base) return NULL;
    ASAN_POISON_MEMORY_REGION(arena->base + end, ARENA_GAP);
    return arena->base + offset;
}

// Every row starts at a multiple of 256 values, so that its scales and sums have places of their own; an odd multiple, so
// that the rows of a product do not compete for the same places of a cache.
static size_t row_stride(size_t cols) { return align_up(cols, K_BLOCK) | K_BLOCK; }

static void take_activations(struct Arena *arena, struct Activations *out, size_t rows, size_t capacity) {
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
    size_t lora = c->kv_lora_rank, nope = padded(c->qk_nope_head_dim), rope = padded(c->qk_rope_head_dim), value = padded(c->v_head_dim);
    size_t query_rows = is_mla(c) ? max_size(ATTENTION_QUERIES, batch) : ATTENTION_QUERIES;
    uint32_t dtype = expanded_dtype(s->cache_dtype);
    w->gate_tile = take(arena, max_size(batch * GEMM_COLUMNS, min_size(batch, MIDDLE_TOKENS) * K_BLOCK), 4);
    w->up_tile = take(arena, min_size(batch, MIDDLE_TOKENS) * GEMM_COLUMNS, 4);
    w->gemm_weights = take(arena, GEMM_DEPTH * GEMM_COLUMNS, 4);
    w->unpacked = take(arena, GEMM_DEPTH / K_BLOCK * UNPACKED_BLOCK_BYTES, 1);
    w->unpacked_scales = take(arena, GEMM_DEPTH / K_BLOCK * PANEL_ROWS, 4);
    w->gemm_inputs = take(arena, batch * GEMM_DEPTH, 4);
    w->gemm_tile = take(arena, batch * GEMM_COLUMNS, 4);
    take_activations(arena, &w->queries, query_rows, query_rows * row_stride(max_size(nope + rope, cache_key_cols(c, DTYPE_Q8))));
    w->mixed = take(arena, query_rows * max_size(value, cache_value_cols(c)), 4);
    take_activations(arena, &w->scores, ATTENTION_QUERIES, ATTENTION_QUERIES * CACHE_BLOCK);
    w->maxima = take(arena, query_rows, 4);
    w->sums = take(arena, query_rows, 4);
    if (!is_mla(c)) return;
    w->key_factor = take(arena, lora * nope, 4);
    w->value_factor = take(arena, lora * value, 4);
    take_activations(arena, &w->factors, value + nope, (value + nope) * row_stride(lora));
    w->expanded = take(arena, (value + nope + rope) * PANEL_ROWS, 4);
    w->block_keys = take(arena, key_block_bytes(dtype, nope + rope), 1);
    w->block_values = take(arena, value_block_bytes(dtype, value), 1);
}

static void lay_out_session(struct Session *s, struct Arena *arena, int threads) {
    const struct ModelConfig *c = &s->model->config;
    size_t batch = s->options.batch, hidden = c->hidden_size, heads = c->num_attention_heads;
    size_t attended = heads * value_dim(c), visits = c->n_routed_experts ? c->num_experts_per_tok : 0;
    size_t routed_columns = visits * row_stride(c->moe_intermediate_size) +
                            (visits && c->n_shared_experts ? row_stride((size_t)c->n_shared_experts * c->moe_intermediate_size) : 0);
    size_t middle_columns = max_size(routed_columns, row_stride(c->intermediate_size));
    s->cache_dtype = (const uint32_t[]){[CACHE_F32] = DTYPE_F32, [CACHE_F16] = DTYPE_F16, [CACHE_Q8] = DTYPE_Q8}[s->options.cache];

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
    take_activations(arena, &s->middle, batch * (visits + 1), batch * middle_columns);
    s->q = take(arena, batch * heads * query_dim(c), 4);
    take_activations(arena, &s->queries, heads * EXACT_TOKENS, heads * EXACT_TOKENS * row_stride(cache_key_cols(c, DTYPE_Q8)));
    s->k = take(arena, is_mla(c) ? 0 : batch * c->num_key_value_heads * c->head_dim, 4);
    s->v = take(arena, is_mla(c) ? 0 : batch * c->num_key_value_heads * c->head_dim, 4);
    s->q_latent = take(arena, batch * c->q_lora_rank, 4);
    s->kv_latent = take(arena, is_mla(c) ? batch * cache_key_cols(c, DTYPE_F32) : 0, 4);
    s->router_logits = take(arena, batch * c->n_routed_experts, 4);
    s->jobs = take(arena, (size_t)c->n_routed_experts + 1, sizeof *s->jobs);
    s->job_tokens = take(arena, batch * (visits + 1), 4);
    s->job_weights = take(arena, batch * (visits + 1), 4);
    s->job_inputs = take(arena, batch * (visits + 1), sizeof *s->job_inputs);
    s->expert_visits = take(arena, (size_t)c->n_routed_experts + 1, sizeof *s->expert_visits);
    s->gate_results = take(arena, min_size(batch, EXACT_TOKENS) * middle_columns, 4);
    s->up_results = take(arena, min_size(batch, EXACT_TOKENS) * middle_columns, 4);
    s->down_results = take(arena, min_size(batch, EXACT_TOKENS) * (visits + 1) * ceil_div(hidden, PANEL_ROWS) * PANEL_ROWS, 4);

    s->workers = take(arena, (size_t)threads, sizeof *s->workers);
    for (int i = 0; i < threads; i++) {
        struct Worker ignored;
        lay_out_worker(s, arena, s->workers ? &s->workers[i] : &ignored);
    }

    size_t spans = ceil_div(s->options.context, CACHE_SPAN), span_rows = spans > 1 ? spans * EXACT_TOKENS * heads : 0;
    s->span_mixed = take(arena, span_rows * cache_value_cols(c), 4);
    s->span_maxima = take(arena, span_rows, 4);
    s->span_sums = take(arena, span_rows, 4);

    size_t blocks = cache_heads(c) * ceil_div(s->options.context, CACHE_BLOCK);
    s->key_block_bytes = key_block_bytes(s->cache_dtype, cache_key_cols(c, s->cache_dtype));
    s->cache_block_bytes = s->key_block_bytes + value_block_bytes(s->cache_dtype, cache_value_cols(c));
    s->cache_layer_bytes = blocks * s->cache_block_bytes;
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
    for (int i = 0; i < team->threads; i++)
        for (size_t row = 0; row < ATTENTION_QUERIES; row++) place_row(&s->workers[i].scores, row, row * CACHE_BLOCK);
    // Multiply-adds per key and head: expanded kv_lora_rank * (nope + v) once and nope + rope + v per query, absorbed
    // 2 * kv_lora_rank + rope per query. For R1 they meet at 171 queries.
    s->expand_tokens = SIZE_MAX;
    if (is_mla(c)) {
        size_t lora = c->kv_lora_rank, nope = c->qk_nope_head_dim, v = c->v_head_dim;
        if (2 * lora > nope + v) s->expand_tokens = max_size(EXACT_TOKENS + 1, ceil_div(lora * (nope + v), 2 * lora - nope - v));
    }
    init_rope(s);
    s->trial.guess = s->trial.way = guess_prefetching();
    return s;
}

static void session_free(struct Session *s) {
    ASAN_UNPOISON_MEMORY_REGION(s->arena, s->arena_bytes);
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
            default: *value = ((const float *)(const void *)panel)[r] * (float)((int8_t)(block[k / K_GROUP * PANEL_ROWS + r] & 0xfe) * q4_value(block, w, r, k));
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

// Where in a panel columns from `first` on, a multiple of 256, begin.
static const uint8_t *column_data(const struct Matrix *m, size_t panel, size_t first) {
    return m->data + panel * m->panel_step + panel_bytes(m->dtype, first);
}

// Expands columns [first, first + depth) of a panel of float weights to out[k][r], stride floats from one k to the next.
// first is a multiple of 256.
static void expand_panel(const struct Matrix *m, size_t panel, size_t first, size_t depth, float *out, size_t stride) {
    const uint8_t *data = column_data(m, panel, first);
    if (m->dtype == DTYPE_F32) {
        const float *w = (const float *)(const void *)data;
        for (size_t k = 0; k < depth; k++) memcpy(out + k * stride, w + k * PANEL_ROWS, PANEL_ROWS * sizeof *w);
    } else if (m->dtype == DTYPE_BF16) {
        const uint16_t *w = (const uint16_t *)(const void *)data;
        for (size_t k = 0; k < depth; k++)
            for (size_t r = 0; r < PANEL_ROWS; r++) out[k * stride + r] = float_from_bf16(w[k / 2 * 2 * PANEL_ROWS + r * 2 + k % 2]);
    } else {
        for (size_t start = 0; start < depth; start += K_BLOCK) {
            size_t length = min_size(K_BLOCK, depth - start);
            const float *scales = (const float *)(const void *)data;
            const uint8_t *w = data + block_head_bytes(DTYPE_F8, length);
            for (size_t k = 0; k < length; k++)
                for (size_t r = 0; r < PANEL_ROWS; r++)
                    out[(start + k) * stride + r] = scales[k / K_GROUP] * float_from_e4m3(w[k / 4 * 4 * PANEL_ROWS + r * 4 + k % 4]);
            data = w + value_bytes(DTYPE_F8, length);
        }
    }
}

// Asks for the part [first, end) of `all` of some bytes. An address that is not there is no error.
static void prefetch_part(const uint8_t *data, size_t bytes, size_t first, size_t end, size_t all) {
    for (size_t line = bytes / 64 * first / all; line < bytes / 64 * end / all; line++) __builtin_prefetch(data + line * 64, 0, 2);
}

// out[i][32] = a panel times the rows, `stride` floats from row to row; += with `add`. The next panel is `step` bytes further. If all rows
// are one tile, its weights are asked for ahead of themselves. Otherwise the last tile, which is a full one, asks for the next panel, a
// little with every step, and those before for nothing new: a core cannot both multiply and wait for a panel that is not there.
static void multiply_rows(const struct Session *s, uint32_t dtype, const uint8_t *panel, size_t step, size_t cols, const struct Row *rows,
                          size_t count, bool add, float *out, size_t stride) {
    const struct Prefetching own = prefetching;
    float tile[TILE_TOKENS * PANEL_ROWS];
    bool direct = stride == PANEL_ROWS && !add;
    for (size_t i = 0, n; i < count; i += n) {
        n = i == 0 && count % TILE_TOKENS ? count % TILE_TOKENS : TILE_TOKENS;
        if (n < count) prefetching = (struct Prefetching){.bytes = i + n == count ? step : 0};
        s->kernels->product[dtype](panel, cols, rows + i, n, direct ? out + i * stride : tile);
        if (!direct) s->kernels->store_tile(tile, n, add, out + i * stride, stride);
    }
    prefetching = own;
}

#define PREFETCH_TOKENS 32        // that are multiplied between two requests for the weights to come

// Columns [first, first + depth) of some panels of integer weights times n rows, added to out [panels][n][32] but for the first
// columns, which are written there.
static void multiply_columns(const struct Session *s, struct Worker *worker, const struct Matrix *m, size_t first_panel, size_t panels,
                             size_t first, size_t depth, const struct Row *x, size_t n, float *out) {
    for (size_t p = 0; p < panels; p++) {
        s->kernels->unpack[m->dtype](m->data + (first_panel + p) * m->panel_step, m->cols, first, depth, worker->unpacked, worker->unpacked_scales);
        // Meanwhile what is unpacked next comes from memory, a part with every few tokens.
        bool last = p + 1 == panels;
        size_t next_first = last ? first + depth : first, bytes = panel_bytes(m->dtype, min_size(GEMM_DEPTH, m->cols - next_first));
        const uint8_t *next = column_data(m, last ? first_panel : first_panel + p + 1, next_first);
        for (size_t t = 0, count; t < n; t += count) {
            count = min_size(PREFETCH_TOKENS, n - t);
            prefetch_part(next, bytes, t, t + count, n);
            s->kernels->multiply_unpacked[m->dtype](worker->unpacked, worker->unpacked_scales, depth, x + t, first, count, first > 0,
                                                    out + (p * n + t) * PANEL_ROWS, PANEL_ROWS);
        }
    }
}

// OpenBLAS has room for as many callers as it was built for, some 128 on Debian, and crashes at more.
#define MAX_BLAS_CALLERS 64

// 1 to 4 panels from first_panel on, one after the other if n <= 16, times n rows: out [panels][n][32]. What a panel gives for all
// rows lies together, since rows that lie as far apart as a matrix is wide would compete for the same places of a cache.
static void multiply_tile(const struct Session *s, struct Worker *worker, const struct Matrix *m, size_t first_panel, size_t panels,
                          const struct Row *x, size_t n, float *out) {
    size_t width = panels * PANEL_ROWS;
    bool floats = m->dtype <= DTYPE_F8;
    if (n <= EXACT_TOKENS) {
        for (size_t p = 0; p < panels; p++)
            multiply_rows(s, m->dtype, m->data + (first_panel + p) * m->panel_step, m->panel_step, m->cols, x, n, false, out + p * n * PANEL_ROWS,
                          PANEL_ROWS);
        return;
    }
    for (size_t first = 0; first < m->cols; first += GEMM_DEPTH) {
        size_t depth = min_size(GEMM_DEPTH, m->cols - first);
        if (!floats) {
            multiply_columns(s, worker, m, first_panel, panels, first, depth, x, n, out);
            continue;
        }
        for (size_t p = 0; p < panels; p++) expand_panel(m, first_panel + p, first, depth, worker->gemm_weights + p * PANEL_ROWS, width);
        for (size_t t = 0; t < n; t++) memcpy(worker->gemm_inputs + t * depth, x[t].values + first, depth * sizeof(float));
        int callers = atomic_load(&s->team->blas_callers);
        while (callers >= MAX_BLAS_CALLERS || !atomic_compare_exchange_weak(&s->team->blas_callers, &callers, callers + 1)) {
            sched_yield();
            callers = atomic_load(&s->team->blas_callers);
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)width, (int)depth, 1, worker->gemm_inputs, (int)depth,
                    worker->gemm_weights, (int)width, first ? 1 : 0, worker->gemm_tile, (int)width);
        atomic_fetch_sub(&s->team->blas_callers, 1);
    }
    for (size_t i = 0; i < panels * n && floats; i++)
        memcpy(out + i * PANEL_ROWS, worker->gemm_tile + i % n * width + i / n * PANEL_ROWS, PANEL_ROWS * sizeof *out);
}

// One of the products of a step: out[t][row] = matrix * x[t] (+ bias), or += matrix * x[t].
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

// Asks for `rows` floats of each of n (few) tokens, which will be added to. All threads have read them for the norm, and taking a
// line back from the others takes longer between two parts of a chip than a processor can look ahead.
static void prefetch_to_add(const float *out, size_t stride, size_t n, size_t rows) {
    if (n > EXACT_TOKENS) return;
    for (size_t t = 0; t < n; t++)
        for (size_t r = 0; r < rows; r += 64 / sizeof *out) {
#if defined(__x86_64__)
            __asm__ volatile("prefetchw %0" : : "m"(out[t * stride + r]));     // compilers make a plain one for no processor in particular
#else
            __builtin_prefetch(&out[t * stride + r], 1);
#endif
        }
}

static size_t panel_count(const struct Matrix *m) { return ceil_div(m->rows, PANEL_ROWS); }
static size_t panels_per_item(size_t n) { return n > EXACT_TOKENS ? GEMM_PANELS : 1; }
// Of few tokens an item is a microsecond long, and no thread should have many more when its processor is taken away for a while.
static size_t items_at_a_time(size_t n) { return n > EXACT_TOKENS ? 1 : 64; }

// Computes some products of n rows each. All threads call it.
static void multiply(struct Session *s, int thread, const struct Product *products, size_t count, size_t n) {
    struct Worker *worker = &s->workers[thread];
    size_t total = 0, width = panels_per_item(n), item;
    for (size_t i = 0; i < count; i++) total += ceil_div(panel_count(products[i].matrix), width);
    struct Items items = share_items(s->team, thread, total, items_at_a_time(n));
    while (next_item(&items, &item)) {
        const struct Product *product = products;
        size_t first = item;
        for (size_t here; first >= (here = ceil_div(panel_count(product->matrix), width)); first -= here) product++;
        size_t panels = min_size(width, panel_count(product->matrix) - first * width);
        if (product->add) prefetch_to_add(product->out + first * width * PANEL_ROWS, product->stride, n, panels * PANEL_ROWS);
        multiply_tile(s, worker, product->matrix, first * width, panels, product->x, n, worker->gate_tile);
        for (size_t p = 0; p < panels; p++) store_panel(product, first * width + p, worker->gate_tile + p * n * PANEL_ROWS, n);
    }
}

// ====================================================================================================================
// Norms and RoPE
// ====================================================================================================================

#define LATENT_NORM_EPS 1e-6      // of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (DeepSeek's modeling file)

// 1 / sqrt(mean(x^2) + eps)
static float rms_scale(const struct Session *s, const float *x, size_t n, double eps) {
    return 1.0f / sqrtf(s->kernels->dot(x, x, n) / (float)n + (float)eps);
}

static void scale_values(const float *x, float scale, const float *weight, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// out = x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467). out may be x.
static void rms_norm(const struct Session *s, const float *x, const float *weight, size_t n, double eps, float *out) {
    scale_values(x, rms_scale(s, x, n, eps), weight, n, out);
}

// Rotates up to 256 columns at a time, as format.h does: out [padded(cols)].
static void rotate_padded(const struct Session *s, const float *x, size_t cols, float *out) {
    float piece[K_BLOCK];
    for (size_t first = 0, width; first < padded(cols); first += width) {
        width = rotation_width(padded(cols) - first);
        bool whole = first + width <= cols;
        for (size_t i = 0; i < width && !whole; i++) piece[i] = first + i < cols ? x[first + i] : 0;
        s->kernels->rotate_columns(whole ? x + first : piece, width, out + first);
    }
}

// Fills in the quantised form of values as they are, k-block by k-block, the first at value `at` of the buffer.
static void quantize_blocks(const struct Session *s, const struct Activations *a, size_t at, const float *values, size_t cols) {
    for (size_t first = 0; first < cols; first += K_BLOCK, at += K_BLOCK)
        s->kernels->quantize_block(values + first, min_size(K_BLOCK, cols - first), a->quants + at, a->scales + at / K_BLOCK,
                                   a->sums + at / K_GROUP, a->block_sums + at / K_BLOCK);
}

// The same of one k-block, in rotated columns.
static void quantize_k_block(const struct Session *s, const struct Activations *a, size_t at, const float *values, size_t length) {
    _Alignas(64) float rotated[K_BLOCK];
    rotate_padded(s, values, length, rotated);
    quantize_blocks(s, a, at, rotated, length);
}

// The k-blocks of rows of `cols` values. Norms and quantising are dealt out by these, so that a single token, too, is work for
// several threads.
static size_t count_k_blocks(size_t rows, size_t cols) { return rows * ceil_div(cols, K_BLOCK); }

// Quantises k-block `item` of the rows, whose values are there, if some matrix needs it.
static void quantize_item(const struct Session *s, const struct Activations *a, size_t cols, size_t item) {
    if (!s->integer_weights) return;
    size_t blocks = ceil_div(cols, K_BLOCK), first = item % blocks * K_BLOCK;
    const float *values = a->rows[item / blocks].values + first;
    quantize_k_block(s, a, (size_t)(values - a->values), values, min_size(K_BLOCK, cols - first));
}

// Normalises every token's x into `input`. All of a token's blocks are written before the first is rotated, for the reason given at
// store_middle(). All threads call it.
static void norm_tokens(struct Session *s, int thread, const float *weight) {
    size_t hidden = s->model->config.hidden_size, blocks = ceil_div(hidden, K_BLOCK), item, end;
    for (static_share(s->team, thread, count_k_blocks(s->n, hidden), &item, &end); item < end;) {
        size_t t = item / blocks, last = min_size((t + 1) * blocks, end);         // of the token's blocks
        size_t first = item % blocks * K_BLOCK, length = min_size((last - t * blocks) * K_BLOCK, hidden) - first;
        const float *x = s->x + t * hidden;
        scale_values(x + first, rms_scale(s, x, hidden, s->model->config.rms_norm_eps), weight + first, length, row_values(&s->input, t) + first);
        for (; item < last; item++) quantize_item(s, &s->input, hidden, item);
    }
    team_barrier(s->team);
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
// values of all heads, arXiv:2405.04434 section 2.1) with the rotated part of the key behind it, shared by all heads; its
// latents are kept twice, as keys and as values.
//
// Layer by layer [head][block]. A block has 256 positions, their values behind their keys, as attention reads them, and is made for
// the kernels that multiply matrices: its keys are 8 panels of 32 positions (format.h's panels of 32 rows), its values a panel
// for each 32 columns, whose own columns are the 256 positions. f32 and f16 panels are [column][32] numbers. q8 keys are q8 panels
// in rotated columns; q8 values are not rotated, have a float scale a position in front, and their panels' scales are 1.
// ====================================================================================================================

static uint8_t *cache_keys(const struct Session *s, size_t layer, size_t head, size_t position) {
    size_t blocks = ceil_div(s->options.context, CACHE_BLOCK);
    return s->cache + layer * s->cache_layer_bytes + (head * blocks + position / CACHE_BLOCK) * s->cache_block_bytes;
}

static uint8_t *cache_values(const struct Session *s, size_t layer, size_t head, size_t position) {
    return cache_keys(s, layer, head, position) + s->key_block_bytes;
}

// A key or query of a q8 cache as it is multiplied: the first `cols` of x and the `rest` ones behind them rotated apart, and
// padded. out [padded(cols) + padded(rest)].
static void rotate_key(const struct Session *s, const float *x, size_t cols, size_t rest, float *out) {
    rotate_padded(s, x, cols, out);
    rotate_padded(s, x + cols, rest, out + padded(cols));
}

// x [cols] to places `step` apart, as the cache's floats.
static void store_floats(const struct Session *s, const float *x, size_t cols, uint8_t *out, size_t step) {
    size_t size = value_bytes(s->cache_dtype, 1) / PANEL_ROWS;
    uint16_t halves[MAX_KEY_COLS];
    if (s->cache_dtype == DTYPE_F16) s->kernels->float_to_half(x, halves, cols);
    const uint8_t *from = s->cache_dtype == DTYPE_F16 ? (const uint8_t *)halves : (const uint8_t *)x;
    for (size_t i = 0; i < cols; i++) memcpy(out + i * step, from + i * size, size);
}

static void store_key(const struct Session *s, uint8_t *block, size_t position, const float *x, size_t cols, size_t rest) {
    size_t key_cols = key_columns(s->cache_dtype, cols, rest), row = position % PANEL_ROWS;
    uint8_t *panel = block + position % CACHE_BLOCK / PANEL_ROWS * panel_bytes(s->cache_dtype, key_cols);
    if (s->cache_dtype != DTYPE_Q8) {
        size_t column_bytes = value_bytes(s->cache_dtype, 1);
        store_floats(s, x, key_cols, panel + row * (column_bytes / PANEL_ROWS), column_bytes);
        return;
    }
    float rotated[MAX_KEY_COLS];
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

static void store_value(const struct Session *s, uint8_t *block, size_t position, const float *x, size_t cols) {
    size_t place = position % CACHE_BLOCK, step = panel_bytes(s->cache_dtype, CACHE_BLOCK);
    if (s->cache_dtype != DTYPE_Q8) {
        size_t column_bytes = value_bytes(s->cache_dtype, 1);
        for (size_t first = 0; first < cols; first += PANEL_ROWS)
            store_floats(s, x + first, min_size(PANEL_ROWS, cols - first), block + first / PANEL_ROWS * step + place * column_bytes,
                         column_bytes / PANEL_ROWS);
        return;
    }
    uint8_t *panels = block + value_head_bytes(DTYPE_Q8);
    float largest = 0;
    for (size_t i = 0; i < cols; i++) largest = fmaxf(largest, fabsf(x[i]));
    bool usable = largest > 1e-35f && largest < INFINITY;
    float inverse = usable ? 127.0f / largest : 0;
    ((float *)(void *)block)[place] = usable ? largest / 127.0f : 0;
    for (size_t i = 0; i < padded(cols); i++) {
        uint8_t *panel = panels + i / PANEL_ROWS * step;
        if (place == 0) ((float *)(void *)panel)[i % PANEL_ROWS] = 1;
        uint8_t *w = panel + block_head_bytes(DTYPE_Q8, CACHE_BLOCK);
        w[place / 4 * 4 * PANEL_ROWS + i % PANEL_ROWS * 4 + place % 4] = i < cols ? (uint8_t)quantize_value(x[i], inverse) : 0;
    }
}

// ====================================================================================================================
// Attention
//
// The keys and values of a block of 256 positions at a time meet all queries of a piece of work; each query keeps the
// maximum, the sum and the mix of its softmax so far (online softmax, as in FlashAttention, arXiv:2205.14135). Both products
// are those of panels: of keys times the queries, and of values times the softmax of 256 scores. With a q8 cache both are
// int8 products: queries are quantised, and so is the softmax, with the scales of the values multiplied in.
//
// Few tokens look at a long text in spans of 1024 positions, which different threads can take; what the spans give is then
// put together in order. A span, a block and a query's result depend on positions alone, not on the number of threads or
// of tokens.
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
    const struct Row *rows;       // [count] the queries, multiplied by the softmax scale
    size_t key_cols, value_cols;
    float *mixed;                 // [count][value_cols]
    float *maxima, *sums;         // [count]
};

static void start_softmax(const struct Queries *queries) {
    for (size_t i = 0; i < queries->count; i++) {
        queries->maxima[i] = -INFINITY;
        queries->sums[i] = 0;
    }
    memset(queries->mixed, 0, queries->count * queries->value_cols * sizeof *queries->mixed);
}

static void end_softmax(const struct Queries *queries) {
    for (size_t i = 0; i < queries->count; i++) {
        float *mixed = queries->mixed + i * queries->value_cols, inverse = 1.0f / queries->sums[i];
        for (size_t c = 0; c < queries->value_cols; c++) mixed[c] *= inverse;
    }
}

// A step of the online softmax (arXiv:1805.02867) of query i: its maximum becomes that of the first `visible` scores, too, these
// become exp(score - maximum), which its sum grows by, and sum and mixed so far are scaled to the new maximum. Then the values' scales,
// if they have any, are multiplied into the exponentials.
static void update_softmax(const struct Session *s, const struct Queries *queries, size_t i, float *scores, const float *scales, size_t visible) {
    float *mixed = queries->mixed + i * queries->value_cols, maximum = fmaxf(queries->maxima[i], s->kernels->find_maximum(scores, visible));
    float kept = exp_float(queries->maxima[i] - maximum);    // -inf gives next to nothing
    queries->sums[i] = queries->sums[i] * kept + s->kernels->exp_row(scores, maximum, scales, visible);
    if (maximum != queries->maxima[i])
        for (size_t c = 0; c < queries->value_cols; c++) mixed[c] *= kept;
    queries->maxima[i] = maximum;
}

// out[i][32] = the first `cols` of a panel's panel_cols columns times the rows, `stride` floats from row to row; += with `add`.
static void multiply_panel(const struct Session *s, struct Worker *worker, uint32_t dtype, const uint8_t *panel, size_t panel_cols,
                           size_t cols, const struct Row *rows, size_t count, bool add, float *out, size_t stride) {
    if (dtype == DTYPE_Q8 && s->n > EXACT_TOKENS) {
        for (size_t first = 0; first < cols; first += GEMM_DEPTH) {
            size_t depth = min_size(GEMM_DEPTH, cols - first);
            s->kernels->unpack[DTYPE_Q8](panel, panel_cols, first, depth, worker->unpacked, worker->unpacked_scales);
            s->kernels->multiply_unpacked[DTYPE_Q8](worker->unpacked, worker->unpacked_scales, depth, rows, first, count, add || first, out,
                                                    stride);
        }
        return;
    }
    multiply_rows(s, dtype, panel, panel_bytes(dtype, panel_cols), cols, rows, count, add, out, stride);
}

// Lets the queries look at a block's `count` positions from `first` on.
static void attend_block(const struct Session *s, struct Worker *w, const struct Queries *queries, size_t first, size_t count, uint32_t dtype,
                         const uint8_t *keys, const uint8_t *values) {
    const float *scales = dtype == DTYPE_Q8 ? (const float *)(const void *)values : NULL;
    size_t cols = scales ? padded(count) : count, n = queries->count, key_cols = queries->key_cols;
    float *all_scores = w->scores.values;      // [n][256]
    for (size_t j = 0; j < count; j += PANEL_ROWS)
        multiply_panel(s, w, dtype, keys + j / PANEL_ROWS * panel_bytes(dtype, key_cols), key_cols, key_cols, queries->rows, n, false,
                       all_scores + j, CACHE_BLOCK);
    for (size_t i = 0; i < n; i++) {
        size_t position = s->position + queries->first_token + i / queries->heads, at = i * CACHE_BLOCK;
        size_t visible = position < first ? 0 : min_size(count, position - first + 1);
        float *scores = all_scores + at;
        if (visible) update_softmax(s, queries, i, scores, scales, visible);
        memset(scores + visible, 0, (padded(count) - visible) * sizeof *scores);
        if (scales) quantize_blocks(s, &w->scores, at, scores, cols);
    }
    for (size_t c = 0; c < queries->value_cols; c += PANEL_ROWS)
        multiply_panel(s, w, dtype, values + value_head_bytes(dtype) + c / PANEL_ROWS * panel_bytes(dtype, CACHE_BLOCK), CACHE_BLOCK, cols,
                       w->scores.rows, n, true, queries->mixed + c, queries->value_cols);
}

// Where the values of query i are to be written before quantize_query().
static float *place_query(struct Activations *queries, size_t i, size_t key_cols) {
    place_row(queries, i, i * row_stride(key_cols));
    return row_values(queries, i);
}

// Query i as a q8 cache needs it, `cols` and `rest` values.
static void quantize_query(const struct Session *s, const struct Activations *a, size_t i, size_t cols, size_t rest) {
    if (s->cache_dtype != DTYPE_Q8) return;
    float rotated[MAX_KEY_COLS];
    size_t key_cols = key_columns(DTYPE_Q8, cols, rest);
    rotate_key(s, a->rows[i].values, cols, rest, rotated);
    quantize_blocks(s, a, i * row_stride(key_cols), rotated, key_cols);
}

// ---- GQA, and MLA absorbed

// Normalises, rotates and stores the keys and values of the micro-batch. An item is a token's cache head.
static void store_keys_values(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t kv_heads = c->num_key_value_heads, dim = c->head_dim, item, end;
    for (static_share(s->team, thread, s->n * kv_heads, &item, &end); item < end; item++) {
        size_t t = item / kv_heads, head = item % kv_heads, position = s->position + t;
        float *k = s->k + item * dim;
        if (l->k_norm) rms_norm(s, k, l->k_norm, dim, c->rms_norm_eps, k);
        rotate(s, t, k);
        store_key(s, cache_keys(s, layer, head, position), position, k, dim, 0);
        store_value(s, cache_values(s, layer, head, position), position, s->v + item * dim, dim);
    }
}

// Normalises the query's latents and the key-value latents, rotates the key part, and stores the latter two. An item is one
// or the other of a token.
static void store_latents(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t lora = c->kv_lora_rank, rope = c->qk_rope_head_dim, q_lora = c->q_lora_rank, parts = q_lora ? 2 : 1, item, end;
    for (static_share(s->team, thread, s->n * parts, &item, &end); item < end; item++) {
        size_t t = item / parts, position = s->position + t;
        if (item % parts) {
            rms_norm(s, s->q_latent + t * q_lora, l->q_a_norm, q_lora, LATENT_NORM_EPS, row_values(&s->latent, t));
            for (size_t k = count_k_blocks(t, q_lora); k < count_k_blocks(t + 1, q_lora); k++) quantize_item(s, &s->latent, q_lora, k);
            continue;
        }
        float *latent = s->kv_latent + t * (lora + rope);
        rms_norm(s, latent, l->kv_a_norm, lora, LATENT_NORM_EPS, latent);
        rotate(s, t, latent + lora);
        store_key(s, cache_keys(s, layer, 0, position), position, latent, lora, rope);
        store_value(s, cache_values(s, layer, 0, position), position, latent, lora);
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

// A piece of attention: some tokens, some of the heads that share a cache head, and a span of the cache.
struct Piece {
    size_t cache_head, first_head, heads, first_token, tokens, span;
};

// How a step is cut into pieces: as large as the buffers allow, so that a part of the cache is read once for many queries,
// but enough pieces for all threads. Of few tokens no thread shall have a quarter more to do than its part: that is what a cache
// read twice, for half the heads each, costs.
struct Pieces {
    size_t cache_heads, group;    // heads that share one
    size_t heads, tokens;         // of a piece at most
    size_t spans;                 // of the cache; 1 for many tokens
    size_t head_pieces, token_pieces;
};

static struct Pieces cut_attention(const struct Session *s) {
    const struct ModelConfig *c = &s->model->config;
    bool many = s->n > EXACT_TOKENS;
    struct Pieces all = {.cache_heads = cache_heads(c), .spans = many ? 1 : ceil_div(s->position + s->n, CACHE_SPAN)};
    all.group = c->num_attention_heads / all.cache_heads;
    all.heads = min_size(all.group, ATTENTION_QUERIES);
    all.tokens = min_size(s->n, ATTENTION_QUERIES / all.heads);
    size_t threads = (size_t)s->team->threads, positions = s->position + s->n, longest = all.spans > 1 ? CACHE_SPAN : positions;
    size_t whole_spans = positions / longest, rest = positions % longest;
    for (;;) {
        all.head_pieces = ceil_div(all.group, all.heads);
        all.token_pieces = ceil_div(s->n, all.tokens);
        size_t of_a_span = all.cache_heads * all.head_pieces * all.token_pieces, pieces = of_a_span * all.spans;
        // The thread with most to do has whole spans, and of the last span what the threads with fewer of those have left over.
        size_t whole = of_a_span * whole_spans, idle = ceil_div(whole, threads) * threads - whole;
        size_t most = ceil_div(whole, threads) * longest + ceil_div(of_a_span - min_size(of_a_span, idle), threads) * rest;
        bool even = most * threads * 4 <= of_a_span * positions * 5;
        if ((many ? pieces >= 16 * threads : even) || all.heads * all.tokens == 1) return all;
        if (all.tokens > 1) all.tokens = ceil_div(all.tokens, 2);
        else all.heads = ceil_div(all.heads, 2);
    }
}

static struct Piece piece_at(const struct Session *s, const struct Pieces *all, size_t item) {
    struct Piece p = {.span = item % all->spans};
    item /= all->spans;
    p.first_token = item % all->token_pieces * all->tokens;
    item /= all->token_pieces;
    p.cache_head = item / all->head_pieces;
    size_t first_of_group = item % all->head_pieces * all->heads;
    p.first_head = p.cache_head * all->group + first_of_group;
    p.heads = min_size(all->heads, all->group - first_of_group);
    p.tokens = min_size(all->tokens, s->n - p.first_token);
    return p;
}

// A piece's queries, from s->q to rows `row` and up of out: the i-th is of token first_token + i / heads, head first_head + i % heads.
static void take_queries(const struct Session *s, const struct Layer *l, const struct Piece *piece, struct Activations *out, size_t row) {
    const struct ModelConfig *c = &s->model->config;
    size_t heads = c->num_attention_heads, dim = query_dim(c), key_cols = cache_key_cols(c, s->cache_dtype), stride = row_stride(key_cols);
    size_t lora = is_mla(c) ? c->kv_lora_rank : 0, kept = rope_dim(c);      // of MLA the rotated part goes behind what is absorbed
    for (size_t h = 0; h < piece->heads; h++) {
        const float *q = s->q + (piece->first_token * heads + piece->first_head + h) * dim;
        for (size_t t = 0; t < piece->tokens; t++)
            memcpy(place_query(out, row + t * piece->heads + h, key_cols) + lora, q + t * heads * dim + dim - kept, kept * sizeof *q);
        if (!is_mla(c)) continue;
        struct Matrix absorb = blob_matrix(&l->key_transposed, 0, piece->first_head + h);
        multiply_factor(s, &absorb, q, heads * dim, piece->tokens, row_values(out, row + h), piece->heads * stride);
    }
    for (size_t i = 0; i < piece->tokens * piece->heads; i++) quantize_query(s, out, row + i, lora ? lora : dim, lora ? kept : 0);
}

// Normalises and rotates the queries and multiplies them by the softmax scale. An item is a token's head; or a head of few tokens,
// whose queries are taken here, since several pieces of attention need them.
static void prepare_queries(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t heads = c->num_attention_heads, dim = query_dim(c), tokens = s->n > EXACT_TOKENS ? 1 : s->n, item;
    struct Items items = share_items(s->team, thread, s->n / tokens * heads, s->n > EXACT_TOKENS ? 64 : 1);
    while (next_item(&items, &item)) {
        size_t first = item / heads * tokens, head = item % heads;
        for (size_t t = first; t < first + tokens; t++) {
            float *q = s->q + (t * heads + head) * dim;
            if (l->q_norm) rms_norm(s, q, l->q_norm, dim, c->rms_norm_eps, q);
            rotate(s, t, q + dim - rope_dim(c));
            for (size_t d = 0; d < dim; d++) q[d] *= s->softmax_scale;
        }
        if (s->n <= EXACT_TOKENS) take_queries(s, l, &(struct Piece){.first_head = head, .heads = 1, .tokens = s->n}, &s->queries, head * s->n);
    }
}

// What a head's queries of `tokens` tokens have mixed, `stride` floats from token to token, to s->attended.
static void store_attended(const struct Session *s, const struct Layer *l, size_t head, size_t first_token, size_t tokens, const float *mixed,
                           size_t stride) {
    const struct ModelConfig *c = &s->model->config;
    size_t dim = value_dim(c), row = row_stride(c->num_attention_heads * dim);
    float *out = row_values(&s->attended, first_token) + head * dim;
    if (is_mla(c)) {
        struct Matrix up = blob_matrix(&l->value, 0, head);
        multiply_factor(s, &up, mixed, stride, tokens, out, row);
    } else {
        for (size_t t = 0; t < tokens; t++) memcpy(out + t * row, mixed + t * stride, dim * sizeof *out);
    }
}

// What the spans gave for a head of token t, put together in order: out [value columns].
static void join_spans(const struct Session *s, size_t t, size_t head, size_t spans, float *out) {
    size_t cols = cache_value_cols(&s->model->config), heads = s->model->config.num_attention_heads, first = t * spans * heads + head;
    float maximum = -INFINITY, sum = 0;
    for (size_t span = 0; span < spans; span++) maximum = fmaxf(maximum, s->span_maxima[first + span * heads]);
    memset(out, 0, cols * sizeof *out);
    for (size_t span = 0, at = first; span < spans; span++, at += heads) {
        if (s->span_sums[at] == 0) continue;                 // the token is before this span
        float weight = exp_float(s->span_maxima[at] - maximum);
        sum += weight * s->span_sums[at];
        for (size_t c = 0; c < cols; c++) out[c] += weight * s->span_mixed[at * cols + c];
    }
    for (size_t c = 0; c < cols; c++) out[c] *= 1.0f / sum;
}

// Attention of a piece's queries, in w->queries, over its span, one of `spans`: maxima, sums and what they mix in w.
static struct Queries attend_span(const struct Session *s, struct Worker *w, size_t layer, const struct Piece *piece, size_t spans) {
    const struct ModelConfig *c = &s->model->config;
    struct Queries queries = {.count = piece->tokens * piece->heads, .heads = piece->heads, .first_token = piece->first_token,
                              .rows = w->queries.rows, .key_cols = cache_key_cols(c, s->cache_dtype), .value_cols = cache_value_cols(c),
                              .mixed = w->mixed, .maxima = w->maxima, .sums = w->sums};
    size_t first = piece->span * CACHE_SPAN, end = s->position + piece->first_token + piece->tokens;
    if (spans > 1) end = min_size(end, first + CACHE_SPAN);
    start_softmax(&queries);
    for (; first < end; first += CACHE_BLOCK)
        attend_block(s, w, &queries, first, min_size(CACHE_BLOCK, end - first), s->cache_dtype, cache_keys(s, layer, piece->cache_head, first),
                     cache_values(s, layer, piece->cache_head, first));
    return queries;
}

// Attention of the micro-batch over the cache as it is. All threads call it.
static void attend_cache(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, value_cols = cache_value_cols(c), item;
    struct Pieces all = cut_attention(s);
    struct Items items = share_items(s->team, thread, all.cache_heads * all.head_pieces * all.token_pieces * all.spans, 1);
    while (next_item(&items, &item)) {
        struct Piece piece = piece_at(s, &all, item);
        if (s->n > EXACT_TOKENS) take_queries(s, l, &piece, &w->queries, 0);
        else for (size_t i = 0; i < piece.tokens * piece.heads; i++)
            w->queries.rows[i] = s->queries.rows[(piece.first_head + i % piece.heads) * s->n + piece.first_token + i / piece.heads];
        struct Queries queries = attend_span(s, w, layer, &piece, all.spans);
        for (size_t i = 0; i < queries.count && all.spans > 1; i++) {
            size_t at = ((piece.first_token + i / piece.heads) * all.spans + piece.span) * heads + piece.first_head + i % piece.heads;
            memcpy(s->span_mixed + at * value_cols, w->mixed + i * value_cols, value_cols * sizeof *w->mixed);
            s->span_maxima[at] = w->maxima[i];
            s->span_sums[at] = w->sums[i];
        }
        if (all.spans > 1) continue;
        end_softmax(&queries);
        for (size_t h = 0; h < piece.heads; h++)
            store_attended(s, l, piece.first_head + h, piece.first_token, piece.tokens, w->mixed + h * value_cols, piece.heads * value_cols);
    }
    if (all.spans == 1) return;
    team_barrier(s->team);
    size_t head, end;
    for (static_share(s->team, thread, heads, &head, &end); head < end; head++) {
        for (size_t t = 0; t < s->n; t++) join_spans(s, t, head, all.spans, w->mixed + t * value_cols);
        store_attended(s, l, head, 0, s->n, w->mixed, value_cols);
    }
}

// ---- MLA, expanded

// Expands a whole factor to out [cols][rows, padded to panels].
static void expand_factor(const struct Matrix *factor, float *out) {
    size_t width = panel_count(factor) * PANEL_ROWS;
    for (size_t p = 0; p < panel_count(factor); p++) expand_panel(factor, p, 0, factor->cols, out + p * PANEL_ROWS, width);
}

// A head's factors as rows to multiply panels of latents by: the values' [padded(v_head_dim)], then the keys' [padded(nope)].
// Latents of a q8 cache come in rotated columns, so the factors' columns are rotated as well; and its keys must come out in
// rotated columns, so the rows of their factor are.
static void prepare_factors(const struct Session *s, struct Worker *w, const struct Matrix *key, const struct Matrix *up) {
    const struct ModelConfig *c = &s->model->config;
    size_t lora = c->kv_lora_rank, nope = padded(c->qk_nope_head_dim), value = padded(c->v_head_dim);
    bool q8 = s->cache_dtype == DTYPE_Q8;
    expand_factor(key, w->key_factor);
    expand_factor(up, w->value_factor);
    for (size_t k = 0; q8 && k < lora; k++) {
        float rotated[MAX_KEY_COLS];
        rotate_padded(s, w->key_factor + k * nope, c->qk_nope_head_dim, rotated);
        memcpy(w->key_factor + k * nope, rotated, nope * sizeof *rotated);
    }
    for (size_t r = 0; r < value + nope; r++) {
        const float *column = r < value ? w->value_factor + r : w->key_factor + r - value;
        size_t stride = r < value ? value : nope, at = r * row_stride(lora);
        place_row(&w->factors, r, at);
        float *row = row_values(&w->factors, r), rotated[MAX_KEY_COLS];
        for (size_t k = 0; k < lora; k++) row[k] = column[k * stride];
        if (!q8) continue;
        rotate_padded(s, row, lora, rotated);
        quantize_blocks(s, &w->factors, at, rotated, padded(lora));
    }
}

// Column k of a panel of the cache's keys, which has `cols`: out [32].
static void read_key_column(const struct Session *s, const uint8_t *panel, size_t cols, size_t k, float *out) {
    if (s->cache_dtype == DTYPE_Q8) {
        size_t block = k / K_BLOCK * K_BLOCK, length = min_size(K_BLOCK, cols - block);
        const uint8_t *at = panel + panel_bytes(DTYPE_Q8, block);
        const int8_t *quants = (const int8_t *)at + block_head_bytes(DTYPE_Q8, length) + (k - block) / 4 * 4 * PANEL_ROWS + k % 4;
        for (size_t r = 0; r < PANEL_ROWS; r++) out[r] = ((const float *)(const void *)at)[r] * (float)quants[r * 4];
    } else if (s->cache_dtype == DTYPE_F16) {
        for (size_t r = 0; r < PANEL_ROWS; r++) out[r] = float_from_half(((const uint16_t *)(const void *)panel)[k * PANEL_ROWS + r]);
    } else {
        memcpy(out, (const float *)(const void *)panel + k * PANEL_ROWS, PANEL_ROWS * sizeof *out);
    }
}

// Expands `count` positions of a block of latents to a head's keys and values, w->block_keys and w->block_values: a block as of
// a cache of expanded_dtype().
static void expand_block(const struct Session *s, struct Worker *w, const uint8_t *latents, size_t count) {
    const struct ModelConfig *c = &s->model->config;
    uint32_t dtype = expanded_dtype(s->cache_dtype);
    size_t lora = c->kv_lora_rank, rope = c->qk_rope_head_dim, nope = padded(c->qk_nope_head_dim), value = padded(c->v_head_dim);
    size_t latent_cols = key_columns(s->cache_dtype, lora, rope), key_cols = key_columns(dtype, c->qk_nope_head_dim, rope);
    size_t first_rope = s->cache_dtype == DTYPE_Q8 ? padded(lora) : lora, value_panel = panel_bytes(dtype, CACHE_BLOCK);
    uint8_t *panels = w->block_values + value_head_bytes(dtype);
    for (size_t d = 0; dtype == DTYPE_Q8 && d < value; d++) ((float *)(void *)(panels + d / PANEL_ROWS * value_panel))[d % PANEL_ROWS] = 1;
    for (size_t j = 0; j < count; j += PANEL_ROWS) {
        const uint8_t *panel = latents + j / PANEL_ROWS * panel_bytes(s->cache_dtype, latent_cols);
        uint8_t *out = w->block_keys + j / PANEL_ROWS * panel_bytes(dtype, key_cols);
        float *values = w->expanded, *keys = values + value * PANEL_ROWS;            // [rows][32 positions]
        multiply_panel(s, w, s->cache_dtype, panel, latent_cols, first_rope, w->factors.rows, value + nope, false, values, PANEL_ROWS);
        // The rotated part of the keys stands in the cache behind the latents, and here behind the keys.
        size_t behind = dtype == DTYPE_Q8 ? nope : c->qk_nope_head_dim;
        for (size_t k = 0; behind + k < key_cols; k++) read_key_column(s, panel, latent_cols, first_rope + k, keys + (behind + k) * PANEL_ROWS);
        if (dtype == DTYPE_F32) {
            memcpy(out, keys, panel_bytes(DTYPE_F32, key_cols));
            for (size_t d = 0; d < value; d++) {
                float *column = (float *)(void *)(panels + d / PANEL_ROWS * value_panel) + j * PANEL_ROWS + d % PANEL_ROWS;
                for (size_t r = 0; r < PANEL_ROWS; r++) column[r * PANEL_ROWS] = values[d * PANEL_ROWS + r];
            }
            continue;
        }
        for (size_t first = 0; first < key_cols; first += K_BLOCK) {
            size_t length = min_size(K_BLOCK, key_cols - first);
            s->kernels->quantize_keys(keys + first * PANEL_ROWS, length, out);
            out += block_head_bytes(DTYPE_Q8, length) + value_bytes(DTYPE_Q8, length);
        }
        s->kernels->quantize_values(values, value, j, (float *)(void *)w->block_values, panels);
    }
}

// Many tokens: a head expands each block of the cache to its own keys and values. One item a head.
static void attend_expanded(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    struct Worker *w = &s->workers[thread];
    size_t heads = c->num_attention_heads, nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim, dim = nope + rope, head;
    uint32_t dtype = expanded_dtype(s->cache_dtype);
    size_t key_cols = key_columns(dtype, nope, rope), value_cols = padded(c->v_head_dim), end = s->position + s->n;
    struct Items items = share_items(s->team, thread, heads, 1);
    while (next_item(&items, &head)) {
        struct Matrix key = blob_matrix(&l->key, 0, head), up = blob_matrix(&l->value, 0, head);
        prepare_factors(s, w, &key, &up);
        for (size_t t = 0; t < s->n; t++) {
            memcpy(place_query(&w->queries, t, key_cols), s->q + (t * heads + head) * dim, dim * sizeof *s->q);
            quantize_query(s, &w->queries, t, nope, rope);
        }
        struct Queries all = {.count = s->n, .heads = 1, .rows = w->queries.rows, .key_cols = key_cols, .value_cols = value_cols,
                              .mixed = w->mixed, .maxima = w->maxima, .sums = w->sums};
        start_softmax(&all);
        for (size_t first = 0; first < end; first += CACHE_BLOCK) {
            size_t count = min_size(CACHE_BLOCK, end - first);
            expand_block(s, w, cache_keys(s, layer, 0, first), count);
            for (size_t t = first > s->position ? first - s->position : 0; t < s->n; t += ATTENTION_QUERIES) {
                struct Queries some = {.count = min_size(ATTENTION_QUERIES, s->n - t), .heads = 1, .first_token = t, .rows = all.rows + t,
                                       .key_cols = key_cols, .value_cols = value_cols, .mixed = all.mixed + t * value_cols,
                                       .maxima = all.maxima + t, .sums = all.sums + t};
                attend_block(s, w, &some, first, min_size(count, s->position + t + some.count - first), dtype, w->block_keys, w->block_values);
            }
        }
        end_softmax(&all);
        for (size_t t = 0; t < s->n; t++)
            memcpy(row_values(&s->attended, t) + head * c->v_head_dim, w->mixed + t * value_cols, c->v_head_dim * sizeof(float));
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

// Chooses a token's experts from the router's logits [experts]; ids, each another one, and weights [num_experts_per_tok] in order
// of choice.
static void select_experts(const struct ModelConfig *c, const float *bias, const float *logits, uint32_t *ids, float *weights) {
    size_t experts = c->n_routed_experts, per_group = experts / c->n_group;
    float scores[MAX_EXPERTS], choice[MAX_EXPERTS], group_scores[MAX_EXPERTS];
    for (size_t e = 0; e < experts; e++) {
        scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        choice[e] = scores[e] + bias[e];
        // Damaged weights: what is no number, or -infinity, must not be taken for an expert that was chosen before.
        if (!(choice[e] > -1e30f)) choice[e] = -1e30f;
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

// Adds a job of n tokens, with its places in the lists of visits (from *visit on) and in s->middle (from *offset on).
static void add_job(struct Session *s, const struct Blobs *blobs, size_t index, size_t n, size_t *visit, size_t *offset) {
    struct FeedForwardJob *job = &s->jobs[s->job_count++];
    *job = (struct FeedForwardJob){
        .gate = blob_matrix(blobs, GATE, index), .up = blob_matrix(blobs, UP, index), .down = blob_matrix(blobs, DOWN, index), .n = n,
        .tokens = s->job_tokens + *visit, .weights = s->job_weights + *visit, .inputs = s->job_inputs + *visit, .middle = s->middle.rows + *visit};
    if (s->n <= EXACT_TOKENS) {
        job->gate_results = s->gate_results + *offset;
        job->up_results = s->up_results + *offset;
        job->results = s->down_results + *visit * ceil_div(s->model->config.hidden_size, PANEL_ROWS) * PANEL_ROWS;
    }
    for (size_t i = 0; i < n; i++, *offset += row_stride(job->gate.rows)) place_row(&s->middle, *visit + i, *offset);
    *visit += n;
}

// Adds a job that every token visits: a dense layer, or the shared experts.
static void add_common_job(struct Session *s, const struct Blobs *blobs, size_t *visit, size_t *offset) {
    size_t first = *visit;
    add_job(s, blobs, 0, s->n, visit, offset);
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
            if (n) add_job(s, &l->experts, e, n, &visit, &offset);
        }
        for (size_t i = 0; i < s->n * per_token; i++) {
            size_t place = next[ids[i]]++, token = i / per_token;
            s->job_tokens[place] = (uint32_t)token;
            s->job_weights[place] = weights[i];
            s->job_inputs[place] = s->input.rows[token];
        }
        if (c->n_shared_experts) add_common_job(s, &l->shared, &visit, &offset);
    }
}

// A k-block of the middle, the input of the product that follows, comes from 8 panels.
#define MIDDLE_PANELS (K_BLOCK / PANEL_ROWS)
#define GATHERED_ROWS 8           // see store_middle()

static size_t count_middle_blocks(const struct FeedForwardJob *job) { return ceil_div(panel_count(&job->gate), MIDDLE_PANELS); }

// An item of run_gate_up(): of few tokens a panel, of many a k-block for some of the tokens.
static size_t count_gate_up_items(const struct Session *s, const struct FeedForwardJob *job) {
    return s->n > EXACT_TOKENS ? count_middle_blocks(job) * ceil_div(job->n, MIDDLE_TOKENS) : panel_count(&job->gate);
}

// A k-block, silu(gate) * up of some panels, [panels][n][32], to rows of s->middle. Some rows are gathered before the first
// of them is read again, since a vector that is loaded while its parts are still being stored comes late.
static void store_middle(const struct Session *s, const float *gate, const struct FeedForwardJob *job, size_t first_panel, size_t panels,
                         size_t first_token, size_t n) {
    size_t first_row = first_panel * PANEL_ROWS, length = min_size(panels * PANEL_ROWS, job->gate.rows - first_row);
    size_t row = (size_t)(job->middle - s->middle.rows) + first_token;
    float gathered[GATHERED_ROWS][K_BLOCK];
    for (size_t first = 0, count; first < n; first += count, row += count) {
        count = min_size(GATHERED_ROWS, n - first);
        for (size_t i = 0; i < count; i++)
            for (size_t p = 0; p < panels; p++)
                memcpy(gathered[i] + p * PANEL_ROWS, gate + (p * n + first + i) * PANEL_ROWS, PANEL_ROWS * sizeof(float));
        for (size_t i = 0; i < count; i++) {
            float *values = row_values(&s->middle, row + i) + first_row;
            if (job->down.dtype >= DTYPE_Q8) quantize_k_block(s, &s->middle, (size_t)(values - s->middle.values), gathered[i], length);
            else memcpy(values, gathered[i], length * sizeof *values);
        }
    }
}

// middle = silu(gate * x) * (up * x) of all jobs. Of many tokens a k-block is quantised at once: what 512 have there as floats would
// not fit in a cache. Of few tokens finish_middle() follows: until then memory is read without a break. All threads call it.
static void run_gate_up(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    size_t total = 0, item;
    for (size_t j = 0; j < s->job_count; j++) total += count_gate_up_items(s, &s->jobs[j]);
    struct Items items = share_items(s->team, thread, total, items_at_a_time(s->n));
    while (next_item(&items, &item)) {
        const struct FeedForwardJob *job = s->jobs;
        for (size_t here; item >= (here = count_gate_up_items(s, job)); item -= here) job++;
        if (s->n <= EXACT_TOKENS) {
            size_t at = item * job->n * PANEL_ROWS;
            multiply_tile(s, w, &job->gate, item, 1, job->inputs, job->n, job->gate_results + at);
            multiply_tile(s, w, &job->up, item, 1, job->inputs, job->n, job->up_results + at);
            continue;
        }
        size_t chunks = ceil_div(job->n, MIDDLE_TOKENS), first_token = item % chunks * MIDDLE_TOKENS, first_panel = item / chunks * MIDDLE_PANELS;
        size_t n = min_size(MIDDLE_TOKENS, job->n - first_token), panels = min_size(MIDDLE_PANELS, panel_count(&job->gate) - first_panel);
        for (size_t p = 0; p < panels; p += GEMM_PANELS) {
            size_t some = min_size(GEMM_PANELS, panels - p);
            float *gate = w->gate_tile + p * n * PANEL_ROWS;
            multiply_tile(s, w, &job->gate, first_panel + p, some, job->inputs + first_token, n, gate);
            multiply_tile(s, w, &job->up, first_panel + p, some, job->inputs + first_token, n, w->up_tile);
            s->kernels->silu_multiply(gate, w->up_tile, some * n * PANEL_ROWS);
        }
        store_middle(s, w->gate_tile, job, first_panel, panels, first_token, n);
    }
}

// What run_gate_up() leaves to do for few tokens: silu and quantising. An item is a job's k-block.
static void finish_middle(struct Session *s, int thread) {
    size_t total = 0, item, end;
    for (size_t j = 0; j < s->job_count; j++) total += count_middle_blocks(&s->jobs[j]);
    static_share(s->team, thread, total, &item, &end);
    for (size_t j = 0, first = 0, blocks; j < s->job_count && first < end; j++, first += blocks) {
        const struct FeedForwardJob *job = &s->jobs[j];
        blocks = count_middle_blocks(job);
        for (; item < min_size(end, first + blocks); item++) {
            size_t panel = (item - first) * MIDDLE_PANELS, panels = min_size(MIDDLE_PANELS, panel_count(&job->gate) - panel);
            size_t at = panel * job->n * PANEL_ROWS;
            s->kernels->silu_multiply(job->gate_results + at, job->up_results + at, panels * job->n * PANEL_ROWS);
            store_middle(s, job->gate_results + at, job, panel, panels, 0, job->n);
        }
    }
}

// x += weight * results, [panels][n][32], what some panels of a job's down gave.
static void add_results(struct Session *s, const struct FeedForwardJob *job, size_t first_panel, size_t panels, const float *results) {
    size_t hidden = s->model->config.hidden_size;
    for (size_t p = first_panel; p < first_panel + panels; p++) {
        size_t rows = min_size(PANEL_ROWS, hidden - p * PANEL_ROWS);
        for (size_t i = 0; i < job->n; i++, results += PANEL_ROWS) {
            float *x = s->x + job->tokens[i] * hidden + p * PANEL_ROWS;
            for (size_t r = 0; r < rows; r++) x[r] += job->weights[i] * results[r];
        }
    }
}

// x += sum over the jobs of weight * (down * middle). An item is some rows of the result and goes through the jobs in
// order, so that every sum has one order of additions. All threads call it.
static void run_down(struct Session *s, int thread) {
    struct Worker *w = &s->workers[thread];
    size_t hidden = s->model->config.hidden_size, all = ceil_div(hidden, PANEL_ROWS), width = panels_per_item(s->n), item;
    struct Items items = share_items(s->team, thread, ceil_div(all, width), items_at_a_time(s->n));
    while (next_item(&items, &item)) {
        size_t first = item * width, panels = min_size(width, all - first);
        prefetch_to_add(s->x + first * PANEL_ROWS, hidden, s->n, panels * PANEL_ROWS);
        for (const struct FeedForwardJob *job = s->jobs; job < s->jobs + s->job_count; job++) {
            multiply_tile(s, w, &job->down, first, panels, job->middle, job->n, w->gate_tile);
            add_results(s, job, first, panels, w->gate_tile);
        }
    }
}

// The same of a few tokens' experts. A job's few rows would be over before memory reads them at full speed, so the threads read one
// whole matrix after the other, and then add what they gave up, in the same order.
static void run_down_of_experts(struct Session *s, int thread) {
    size_t all = ceil_div(s->model->config.hidden_size, PANEL_ROWS), item, panel, end;
    struct Items items = share_items(s->team, thread, all * s->job_count, items_at_a_time(s->n));
    while (next_item(&items, &item)) {
        const struct FeedForwardJob *job = &s->jobs[item / all];
        panel = item % all;
        multiply_tile(s, &s->workers[thread], &job->down, panel, 1, job->middle, job->n, job->results + panel * job->n * PANEL_ROWS);
    }
    team_barrier(s->team);
    for (static_share(s->team, thread, all, &panel, &end); panel < end; panel++)
        for (const struct FeedForwardJob *job = s->jobs; job < s->jobs + s->job_count; job++)
            add_results(s, job, panel, 1, job->results + panel * job->n * PANEL_ROWS);
}

// ====================================================================================================================
// forward: tokens to logits
// ====================================================================================================================

// Keys and values (with MLA their latent) go into the cache. The queries, or with q_lora_rank their latents, come along: one step for
// all the products of the same input.
static void fill_cache(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t q_width = (size_t)c->num_attention_heads * query_dim(c);
    if (is_mla(c)) {
        struct Product q_full = {&l->q_b, s->input.rows, s->q, q_width, NULL, false};
        struct Product q_down = {&l->q_a, s->input.rows, s->q_latent, c->q_lora_rank, NULL, false};
        struct Product kv_down = {&l->kv_a, s->input.rows, s->kv_latent, cache_key_cols(c, DTYPE_F32), NULL, false};
        multiply(s, thread, (struct Product[]){c->q_lora_rank ? q_down : q_full, kv_down}, 2, s->n);
        team_barrier(s->team);
        store_latents(s, thread, layer);
    } else {
        size_t kv_width = (size_t)c->num_key_value_heads * c->head_dim;
        multiply(s, thread, (struct Product[]){{&l->q, s->input.rows, s->q, q_width, l->q_bias, false},
                                               {&l->k, s->input.rows, s->k, kv_width, l->k_bias, false},
                                               {&l->v, s->input.rows, s->v, kv_width, l->v_bias, false}}, 3, s->n);
        team_barrier(s->team);
        store_keys_values(s, thread, layer);
    }
}

static void run_attention(struct Session *s, int thread, size_t layer) {
    const struct ModelConfig *c = &s->model->config;
    const struct Layer *l = &s->model->layers[layer];
    size_t heads = c->num_attention_heads, attended = heads * value_dim(c), item, end;
    fill_cache(s, thread, layer);
    if (is_mla(c) && c->q_lora_rank) {
        team_barrier(s->team);
        multiply(s, thread, &(struct Product){&l->q_b, s->latent.rows, s->q, heads * query_dim(c), NULL, false}, 1, s->n);
        team_barrier(s->team);
    }
    prepare_queries(s, thread, layer);
    team_barrier(s->team);
    if (is_mla(c) && s->n >= s->expand_tokens) attend_expanded(s, thread, layer);
    else attend_cache(s, thread, layer);
    team_barrier(s->team);
    for (static_share(s->team, thread, count_k_blocks(s->n, attended), &item, &end); item < end; item++)
        quantize_item(s, &s->attended, attended, item);
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
        finish_middle(s, thread);
        team_barrier(s->team);
    }
    if (l->routed && s->n <= EXACT_TOKENS) run_down_of_experts(s, thread);
    else run_down(s, thread);
    team_barrier(s->team);
}

// The way that was fastest, by the lower quarter of its times (layers may have waited for the disk or for another program), or the
// guess, if that is within 2 % of it. Sorts the times.
static size_t find_fastest_way(struct Trial *trial) {
    size_t fastest = trial->guess, nth = TRIAL_ROUNDS / 4;
    for (size_t way = 0; way < PREFETCHING_WAYS; way++) qsort(trial->seconds[way], TRIAL_ROUNDS, sizeof *trial->seconds[way], compare_doubles);
    for (size_t way = 0; way < PREFETCHING_WAYS; way++)
        if (trial->seconds[way][nth] < trial->seconds[fastest][nth]) fastest = way;
    return trial->seconds[fastest][nth] < 0.98 * trial->seconds[trial->guess][nth] ? fastest : trial->guess;
}

// Thread 0 calls it at the end of a layer that decodes: the others can get no further than the barrier of norm_tokens(), before which
// nobody asks for weights. In a round every way has one layer. After TRIAL_ROUNDS layers the order moves on by one, lest a way always
// have the same layers of a model of 5 or 10. The logits do not depend on it.
static void try_prefetching(struct Session *s) {
    struct Trial *trial = &s->trial;
    if (trial->layers == PREFETCHING_WAYS * TRIAL_ROUNDS) return;
    double now = clock_seconds();
    trial->seconds[trial->way][trial->layers / PREFETCHING_WAYS] = now - trial->start;
    trial->start = now;
    size_t next = ++trial->layers;
    trial->way = next < PREFETCHING_WAYS * TRIAL_ROUNDS ? (trial->guess + next + next / TRIAL_ROUNDS) % PREFETCHING_WAYS : find_fastest_way(trial);
}

// Leaves the last token alone, as if it were decoded behind the others.
static void keep_last_token(struct Session *s) {
    size_t hidden = s->model->config.hidden_size;
    memcpy(s->x, s->x + (s->n - 1) * hidden, hidden * sizeof *s->x);
    s->position += s->n - 1;
    s->n = 1;
    fill_rope_row(s, 0);
}

// What each thread does for one micro-batch.
static void run_forward(void *argument, int thread) {
    struct Session *s = argument;
    const struct Model *model = s->model;
    size_t hidden = model->config.hidden_size, vocab = model->config.vocab_size, layers = model->config.num_hidden_layers;
    bool decoding = s->n == 1;
    for (size_t t = (size_t)thread; t < s->n; t += (size_t)s->team->threads) {
        read_row(&model->embedding, s->tokens[t], s->x + t * hidden);
        fill_rope_row(s, t);
    }
    team_barrier(s->team);
    for (size_t layer = 0; layer < layers; layer++) {
        norm_tokens(s, thread, model->layers[layer].input_norm);
        prefetching = prefetching_ways[s->trial.way];
        // Tokens whose logits nobody wants need no more of the last layer than their keys and values.
        if (layer + 1 == layers && (s->wanted == LOGITS_NONE || (s->wanted == LOGITS_LAST && s->n > EXACT_TOKENS))) {
            fill_cache(s, thread, layer);
            if (s->wanted == LOGITS_NONE) return;
            team_barrier(s->team);
            if (thread == 0) keep_last_token(s);
            team_barrier(s->team);
            norm_tokens(s, thread, model->layers[layer].input_norm);
        }
        run_attention(s, thread, layer);
        norm_tokens(s, thread, model->layers[layer].post_attention_norm);
        run_feed_forward(s, thread, layer);
        if (thread == 0 && decoding) try_prefetching(s);
    }
    norm_tokens(s, thread, model->final_norm);
    size_t first = s->wanted == LOGITS_ALL ? 0 : s->n - 1;
    multiply(s, thread, &(struct Product){&model->head, s->input.rows + first, s->logits, vocab, NULL, false}, 1, s->n - first);
}

// Evaluates n tokens (1 to options.batch, position + n <= options.context, ids below vocab_size) and moves position on.
// With LOGITS_LAST, row 0 of s->logits holds the last token's, with LOGITS_ALL (logits_rows >= n) row t token t's.
static void forward(struct Session *s, const uint32_t *tokens, size_t n, enum LogitsWanted wanted) {
    size_t position = s->position;
    s->tokens = tokens;
    s->n = n;
    s->wanted = wanted;
    s->trial.start = clock_seconds();
    team_run(s->team, run_forward, s);
    s->position = position + n;
}

// Evaluates the next micro-batch of n tokens, `done` of which were evaluated before; logits of the last of all. How many are done now.
static size_t prefill_micro_batch(struct Session *s, const uint32_t *tokens, size_t n, size_t done) {
    size_t step = min_size(s->options.batch, n - done);
    forward(s, tokens + done, step, done + step == n ? LOGITS_LAST : LOGITS_NONE);
    return done + step;
}

// Evaluates any number of tokens; logits of the last one.
static void prefill(struct Session *s, const uint32_t *tokens, size_t n) {
    for (size_t done = 0; done < n;) done = prefill_micro_batch(s, tokens, n, done);
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

// Draws a token. At a temperature above 0, if any logit is not a number, it is a token whose logit is not finite, for the caller to report.
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
        if (isnan(probability)) return (uint32_t)i;
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
    void (*function)(struct Command *command);
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
    {"context", 'c', RUN | INSPECT, OPTION_COUNT, FIELD(context), 1, 1 << 24, NULL, "Length", "N",
     "room for N tokens, prompt and output together"},
    {"context", 'c', PERPLEXITY, OPTION_COUNT, FIELD(context), 1, 1 << 24, NULL, "Length", "N", "windows of N tokens (2048)"},
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
    {"batch", 0, RUN | BENCH | LOGITS | INSPECT, OPTION_COUNT, FIELD(batch), 1, MAX_BATCH, NULL, "Machine", "N",
     "tokens of a prompt read at once (512; 2048 with experts)"},
    {"batch", 0, PERPLEXITY, OPTION_COUNT, FIELD(batch), 1, MAX_BATCH, NULL, "Machine", "N", "tokens of a window read at once (512)"},
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

struct Copying {
    const struct Team *team;
    const struct Model *model;
    uint8_t *copy;
};

// The threads copy 2 MB by turns: a page lies near the processor that writes it first, so that every layer is spread over the
// memory of all processors, and a file that is not cached yet is read nearly in order.
static void copy_share(void *argument, int thread) {
    const struct Copying *copying = argument;
    const struct Model *model = copying->model;
    const size_t piece = 2 << 20;
    for (size_t at = piece * (size_t)thread; at < model->size; at += piece * (size_t)copying->team->threads)
        memcpy(copying->copy + at, model->bytes + at, min_size(piece, model->size - at));
}

// The same model in memory of its own, which the system can back with 2 MB pages; the file's mapping goes.
static struct Model *copy_model(struct Team *team, struct Model *model) {
    uint64_t available = available_memory();
    uint8_t *copy = available && model->size > available ? NULL : map_memory(model->size);
    if (!copy) die("%s: a copy takes %s of memory, %s are available; leave --copy out", model->name, BYTES(model->size), BYTES(available));
    team_run(team, copy_share, &(struct Copying){team, model, copy});
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
    if (command->copy && model->mapped) model = copy_model(command->team, model);
    if (needs_weights && !model->has_weights) die("%s: the file holds a tokenizer and no weights (it was made with --tokenizer-only)", path);
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
    print_remark(format, args);
    va_end(args);
}

static bool shows_progress(const struct Command *command) {
    const char *kind = getenv("TERM");
    return !command->quiet && isatty(STDERR_FILENO) && !(kind && strcmp(kind, "dumb") == 0);
}

static bool progress_shown;

// One line on a terminal that overwrites itself: how far the work is, and the time left; with a total of 0 only `what`.
// `started` is a clock_seconds().
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

// `r1 bench` and `r1 perplexity`: how fast and how good a model is. They use the engine and are no part of it, so they have a
// file of their own. What a token costs, active_weights() and active_bytes(), is counted there, too.
#include "measure.h"

// ====================================================================================================================
// Generation: thinking, then the answer
//
// run_generation() reads a prompt, draws token after token and streams their text. Where the thinking begins and ends is
// known by the ids of <think> and </think> alone: those of the prompt's generation prefix, which may force <think>, and
// those that the model writes. On a terminal the thinking is dimmed and the tags are left out; into a pipe the text goes as
// it is; with --hide-thinking only the answer is shown.
// ====================================================================================================================

// Ctrl-C: the first one ends the generation, the second one the program, as other signals do at once. None leaves the terminal dimmed.
static volatile sig_atomic_t interrupted, terminal_dimmed;

static void handle_interrupt(int signal_number) {
    if (interrupted || signal_number != SIGINT) {
        if (terminal_dimmed && write(STDOUT_FILENO, "\x1b[0m", 4) < 0) terminal_dimmed = 0;
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
    interrupted = 1;
}

static void catch_interrupts(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action = {.sa_handler = handle_interrupt, .sa_flags = SA_RESTART}, old;
        // One that was ignored from outside (nohup, a script's background) stays so.
        if (sigaction(signals[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN) sigaction(signals[i], &action, NULL);
    }
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
    else if (!specials->has_chat && g->command->no_think) note(g->command, "%s has no chat form: --no-think does nothing", g->model->name);
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

    // A model larger than memory is read from disk as it runs; an eighth of the memory may hold its cache all the same. A copy is in
    // memory already.
    uint64_t room = available / 8, weights = command->copy ? 0 : g->model->size;
    if (available > weights && available - weights > room) room = available - weights;
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
        done = prefill_micro_batch(g->session, prompt->ids, prompt->count, done);
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
        bool skipped = g->reason == END_BY_LENGTH || g->reason == END_BY_CONTEXT;   // the last one was drawn, not evaluated
        double rate = (double)(g->written - skipped) / writing;
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

// Answers one question of text.
static void run_generation(const struct Command *command, const struct Model *model, const char *text, size_t bytes) {
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
}

// ====================================================================================================================
// Commands: run, tokenize, logits, inspect
// ====================================================================================================================

static void command_run(struct Command *command) {
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
    run_generation(command, model, prompt, bytes);
    free(input);
    model_close(model);
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
        if (!json_is_string(role) || strlen(json_string_value(role)) != json_string_length(role) || !json_is_string(content))
            die("%s: message %zu has no \"role\" and \"content\" of text", place, i + 1);
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

static void command_tokenize(struct Command *command) {
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
            if (session->model->layers[layer].routed && contains_count(&trace->command->experts, first + t)) write_experts(trace, layer, first + t, t);
    return trace->argmax[first + n - 1];
}

static void print_ids(const char *what, const uint32_t *ids, size_t count) {
    printf("%s %zu", what, count);
    for (size_t i = 0; i < count; i++) printf(" %" PRIu32, ids[i]);
    putchar('\n');
}

static void command_logits(struct Command *command) {
    bool positions = command->logits.count || command->logits.all, every = command->argmax || positions || command->experts.count;
    if (!command->ids) wrong_usage(command, "--ids FILE is missing");
    if (!command->greedy && !every) wrong_usage(command, "nothing to print: give --greedy, --argmax, --logits or --experts");
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
        .context = trace.length, .batch = batch, .logits_rows = every ? batch : 1, .cache = (enum CacheType)command->cache});
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
    static const char *const architectures[] = {"none", "deepseek_v3", "qwen2", "llama", "qwen3"}, *const scalings[] = {"none", "yarn", "llama3"};
    json_t *object = json_pack("{s:s, s:s, s:s}", "architecture", architectures[c->architecture], "type", dtype_name(c->recipe),
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

static void command_inspect(struct Command *command) {
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
static void start_command(void *argument) {
    struct Command *command = argument;
    command->kind->function(command);
}

static void prepare_machine(struct Command *command) {
    int cpus[MAX_THREADS];
    if (command->threads == NOT_GIVEN) command->threads = (uint64_t)list_physical_cores(cpus);
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
    if (command.help) {
        print_command_help(command.kind);
    } else {
        if (command.argument_count < command.kind->least_arguments) wrong_usage(&command, "MODEL is missing");
        prepare_machine(&command);
        if (command.kind->computes) team_start(&team, (int)command.threads, start_command, &command);
        else start_command(&command);
    }
    flush_output();
    return 0;
}
#endif
