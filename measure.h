// What r1 measures: synthetic models, what a token costs, the machine's limits, `r1 bench` and `r1 perplexity`. A part of r1.c,
// which includes it between its options and its generation of text; by itself it is no header.
#ifndef R1_MEASURE
#define R1_MEASURE

// ====================================================================================================================
// Synthetic models
//
// `r1 bench SHAPE[:TYPE]` times a known model without its file: memory is filled with the tensors that convert/shapes.h
// lists for its shape, the same as in a file of r1-convert --synthetic, and bound by the same bind_model(). What it writes
// makes no sense; how long it takes does.
// ====================================================================================================================

// Lays out a model of a known shape in memory that is not yet filled, nor taken from the system. layers: 0 for all.
// Not in_memory: only to be counted, at an address that is never read.
static struct Model *model_of_shape(const struct Shape *shape, uint32_t type, bool uniform, size_t layers, bool in_memory) {
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
    if (!model->bytes) die("%s: the system does not give %.1f GB of memory", shape->name, (double)model->size / 1e9);
    char error[ERROR_BYTES];
    if (!bind_model(model, error)) die("%s: %s", shape->name, error);
    return model;
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
// What a token costs
//
// The weights that it multiplies and the bytes that they take: what the speeds are measured against.
// ====================================================================================================================

static void count_matrix(const struct Matrix *m, double times, double *weights, double *bytes) {
    *weights += times * (double)m->rows * (double)m->cols;
    *bytes += times * (double)matrix_bytes(m->dtype, m->rows, m->cols);
}

// Weights that one token multiplies in the layers from `first` on; adds what they take to *bytes.
static double count_active(const struct Model *model, size_t first, double *bytes) {
    const struct ModelConfig *c = &model->config;
    double weights = 0;
#define COUNT_MATRIX(matrix, times) count_matrix(&(matrix), (double)(times), &weights, bytes)
    for (size_t i = first; i < c->num_hidden_layers; i++) {
        const struct Layer *l = &model->layers[i];
        COUNT_MATRIX(l->o, 1);
        if (is_mla(c)) {
            if (c->q_lora_rank) COUNT_MATRIX(l->q_a, 1);
            COUNT_MATRIX(l->q_b, 1);
            COUNT_MATRIX(l->kv_a, 1);
            COUNT_MATRIX(l->key_transposed.part[0], c->num_attention_heads);
            COUNT_MATRIX(l->value.part[0], c->num_attention_heads);
        } else {
            COUNT_MATRIX(l->q, 1);
            COUNT_MATRIX(l->k, 1);
            COUNT_MATRIX(l->v, 1);
        }
        for (int part = GATE; part <= DOWN; part++) {
            if (!l->routed) COUNT_MATRIX(l->dense.part[part], 1);
            if (l->routed) COUNT_MATRIX(l->experts.part[part], c->num_experts_per_tok);
            if (l->routed && c->n_shared_experts) COUNT_MATRIX(l->shared.part[part], 1);
        }
        if (l->routed) COUNT_MATRIX(l->router, 1);
    }
#undef COUNT_MATRIX
    return weights;
}

// Multiply-adds of one token of prefill, without the head.
static double active_weights(const struct Model *model) {
    double bytes = 0;
    return count_active(model, 0, &bytes);
}

// Bytes of weights that decoding one token reads: the active experts, the head, of the embedding one row.
static double active_bytes(const struct Model *model) {
    double bytes = 0, ignored = 0;
    count_active(model, 0, &bytes);
    count_matrix(&model->head, 1, &ignored, &bytes);
    return bytes + (double)model->embedding.panel_step / PANEL_ROWS;
}

// Multiply-adds of weights in a prefill. The head is for the last token alone, and so is the last layer but for fill_cache(): see
// run_forward().
static double prefill_macs(const struct Model *model, size_t count, size_t batch) {
    const struct ModelConfig *c = &model->config;
    const struct Layer *last = &model->layers[c->num_hidden_layers - 1];
    const struct Matrix *filling_cache[] = {is_mla(c) ? c->q_lora_rank ? &last->q_a : &last->q_b : &last->q, is_mla(c) ? &last->kv_a : &last->k, &last->v};
    double ignored = 0, rest = count_active(model, c->num_hidden_layers - 1, &ignored);
    for (size_t i = 0; i < (is_mla(c) ? 2 : 3); i++) rest -= (double)filling_cache[i]->rows * (double)filling_cache[i]->cols;
    size_t end = (count - 1) % batch + 1, through = end > EXACT_TOKENS ? 1 : end;
    return (double)count * active_weights(model) - (double)(count - through) * rest + (double)model->head.rows * (double)model->head.cols;
}

// ====================================================================================================================
// What the machine can do
//
// Decoding cannot be faster than memory is read, prefill not faster than integers are multiplied. `r1 bench` measures
// these limits with all threads while it measures a model: machines differ, and a cloud moves its guests to other cores
// while they run, which can change what they read in a second by half. So slices of memory are read after each token that
// is decoded; the multiplications are measured before and after a prefill.
// ====================================================================================================================

#define PROBE_PASSES 4
#define PROBE_SECONDS 2.0         // after which there are no more passes of reading
#define PROBE_BYTES ((uint64_t)2 << 30)
#define PROBE_SLICE ((size_t)64 << 20)
#define PROBE_CHUNK ((size_t)128 << 10)   // bytes that a thread reads in a row
#define PROBE_ROUND_ITEMS 32      // parts of a thread's multiplications
#define READING_MANNERS 3

// What to ask for while reading: each is the fastest on some processor, by up to 15 %.
static const struct {
    size_t ahead;                 // bytes; 0: nothing
    bool pages;                   // the beginnings of pages, too
} reading_manners[READING_MANNERS] = {{0, false}, {6144, false}, {128, true}};

struct Machine {
    double read_gb_s;             // 10^9 bytes a second, from huge pages; 0 if there was no memory for it
    double int8_gmac_s;           // 10^9 int8 multiply-adds a second, operands in registers
};

struct Probe {
    struct Team *team;
    const struct Kernels *kernels;
    uint8_t *memory;              // [memory_bytes] of its own; NULL if there was none
    size_t memory_bytes;
    const uint8_t *bytes;         // [count] to be read: its own memory, or a model's weights
    size_t count;
    size_t first, length;         // of the slice being read
    size_t manner;                // and how it is read
    struct { double bytes, seconds; } read[READING_MANNERS];   // so far
    uint64_t rounds;              // of a part of the multiplications
    enum { PROBE_TOUCH, PROBE_READ, PROBE_MULTIPLY } what;
    atomic_uint_fast64_t result;  // of no meaning; keeps the compiler from dropping the reads
};

// Threads take over what others have not got to, as in a model's steps: cores may differ in speed.
static void run_probe(void *argument, int thread) {
    struct Probe *probe = argument;
    size_t count = probe->what == PROBE_MULTIPLY ? PROBE_ROUND_ITEMS * (size_t)probe->team->threads : ceil_div(probe->length, PROBE_CHUNK), item;
    struct Items items = share_items(probe->team, thread, count, 8);
    uint64_t result = 0;
    while (next_item(&items, &item)) {
        if (probe->what == PROBE_MULTIPLY) {
            probe->kernels->multiply_probe(probe->rounds);
            continue;
        }
        const uint8_t *chunk = probe->bytes + probe->first + item * PROBE_CHUNK;
        size_t bytes = min_size(PROBE_CHUNK, probe->length - item * PROBE_CHUNK);
        if (probe->what == PROBE_TOUCH)   // numbers that differ: a host may keep pages of the same bytes once
            for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) *(uint64_t *)((uintptr_t)chunk + i) = ((uintptr_t)chunk + i) * 0x9e3779b97f4a7c15;
        else result ^= probe->kernels->read_probe(chunk, bytes, reading_manners[probe->manner].ahead, reading_manners[probe->manner].pages);
    }
    atomic_fetch_add(&probe->result, result);
}

// Seconds that all threads take for it.
static double time_probe(struct Probe *probe, int what) {
    double start = clock_seconds();
    probe->what = what;
    team_run(probe->team, run_probe, probe);
    return clock_seconds() - start;
}

// Seconds that multiplying takes, the mean of a few times: a prefill, too, has the slow moments of the machine and the fast ones.
static double time_multiplying(struct Probe *probe) {
    double seconds = 0;
    for (int pass = 0; pass < PROBE_PASSES; pass++) seconds += time_probe(probe, PROBE_MULTIPLY);
    return seconds / PROBE_PASSES;
}

// Takes memory to read from, up to half of `room` bytes.
static struct Probe open_probe(struct Team *team, const struct Kernels *kernels, uint64_t room) {
    struct Probe probe = {.team = team, .kernels = kernels, .rounds = 32};
    probe.memory_bytes = probe.count = probe.length = (size_t)(room / 2 < PROBE_BYTES ? room / 2 : PROBE_BYTES) / 4096 * 4096;
    probe.bytes = probe.memory = probe.count ? map_memory(probe.count) : NULL;
    if (probe.bytes) time_probe(&probe, PROBE_TOUCH);
    while (time_multiplying(&probe) < 0.02) probe.rounds *= 2;   // shorter is not exact
    return probe;
}

static void close_probe(struct Probe *probe) {
    if (probe->memory) munmap(probe->memory, probe->memory_bytes);
}

// Reads a model's weights from now on: other pages of the same machine may be 10 % faster or slower. Small models would be read from
// the processor's cache. What was read before stays mapped: a virtual machine may be busy for seconds with giving memory back.
static void probe_model(struct Probe *probe, const struct Model *model) {
    if (model->size < 8 * PROBE_SLICE) return;
    probe->bytes = model->bytes;                                           // begins a page
    probe->count = model->size / 4096 * 4096;
    probe->first = probe->length = 0;
}

static void forget_reading(struct Probe *probe) { memset(probe->read, 0, sizeof probe->read); }

// Reads the next slice in the next manner.
static void read_slice(struct Probe *probe) {
    if (!probe->bytes) return;
    probe->first = probe->first + probe->length < probe->count ? probe->first + probe->length : 0;
    probe->length = min_size(PROBE_SLICE, probe->count - probe->first);
    probe->manner = (probe->manner + 1) % READING_MANNERS;
    probe->read[probe->manner].seconds += time_probe(probe, PROBE_READ);
    probe->read[probe->manner].bytes += (double)probe->length;
}

// 10^9 bytes a second in the manner that was fastest since forget_reading(); 0 if nothing was read.
static double find_read_gb_s(const struct Probe *probe) {
    double fastest = 0;
    for (size_t i = 0; i < READING_MANNERS; i++)
        if (probe->read[i].seconds > 0) fastest = fmax(fastest, probe->read[i].bytes / probe->read[i].seconds / 1e9);
    return fastest;
}

// The best of a few passes over all the memory.
static double measure_reading(struct Probe *probe) {
    double best = 0, began = clock_seconds();
    for (int pass = 0; pass < PROBE_PASSES && clock_seconds() - began < PROBE_SECONDS; pass++) {
        forget_reading(probe);
        for (size_t bytes = 0; probe->bytes && bytes < probe->count; bytes += probe->length) read_slice(probe);
        best = fmax(best, find_read_gb_s(probe));
    }
    return best;
}

static double measure_multiplying(struct Probe *probe) {
    return probe->kernels->macs_per_round * (double)(probe->rounds * PROBE_ROUND_ITEMS) * probe->team->threads / time_multiplying(probe) / 1e9;
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
    bench->model = model_of_shape(shape, type, command->uniform, command->layers, true);
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
        probe_model(&bench->probe, bench->model);
    }
    bench->session = open_session(command, bench->model, &options);
    memset(bench->session->cache, 0, c->num_hidden_layers * bench->session->cache_layer_bytes);
    bench->tokens = allocate((size_t)tokens * sizeof *bench->tokens);
    uint64_t random = 1;
    for (size_t i = 0; i < tokens; i++) bench->tokens[i] = (uint32_t)(random_word(&random) % c->vocab_size);
}

// Seconds of evaluating `count` tokens behind `depth` others in one prefill.
static double time_prefill(struct Bench *bench, size_t count, size_t depth) {
    bench->session->position = depth;
    double start = clock_seconds();
    prefill(bench->session, bench->tokens, count);
    return clock_seconds() - start;
}

// Seconds of evaluating `count` tokens behind `depth` others one by one; after each a slice of memory is read in every manner.
static double time_decode(struct Bench *bench, size_t count, size_t depth) {
    bench->session->position = depth;
    forget_reading(&bench->probe);
    double seconds = 0;
    for (size_t i = 0; i < count; i++) {
        double start = clock_seconds();
        forward(bench->session, bench->tokens + i, 1, LOGITS_LAST);
        seconds += clock_seconds() - start;
        for (size_t manner = 0; manner < READING_MANNERS; manner++) read_slice(&bench->probe);
    }
    return seconds;
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

// The median of a few times, by the fraction of the limit at that time.
static struct Speed measure_speed(struct Bench *bench, bool decoding, size_t count, size_t depth) {
    double work = (decoding ? (double)count * active_bytes(bench->model) : prefill_macs(bench->model, count, bench->session->options.batch)) / 1e9;
    struct Speed speeds[BENCH_REPETITIONS];
    double spent = decoding ? time_decode(bench, BENCH_WARM_TOKENS, depth) : time_prefill(bench, count, depth);
    double before = decoding ? 0 : measure_multiplying(&bench->probe);
    size_t rounds = 0;
    do {
        double seconds = decoding ? time_decode(bench, count, depth) : time_prefill(bench, count, depth);
        double after = decoding ? 0 : measure_multiplying(&bench->probe);
        double limit = decoding ? find_read_gb_s(&bench->probe) : (before + after) / 2;
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
    struct Model *model = model_of_shape(shape, type, command->uniform, command->layers, false);
    struct SessionOptions options = {.context = TABLE_CONTEXT, .batch = micro_batch(command, model), .logits_rows = 1,
                                     .cache = (enum CacheType)command->cache};
    struct MemoryPlan plan = plan_memory(model, &options, (int)command->threads);
    struct TableRow row = {.shape = shape, .type = type, .has_experts = model->config.n_routed_experts > 0, .weights = (double)plan.weights,
                           .memory = (double)(plan.weights + plan.cache + plan.scratch),
                           .work = {[DECODE] = active_bytes(model), [PREFILL] = prefill_macs(model, TABLE_PROMPT, TABLE_PROMPT) / TABLE_PROMPT}};
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
    struct Bench bench = {.command = command, .synthetic = true, .patience = TABLE_PATIENCE};
    bench.model = model_of_shape(row->shape, row->type, command->uniform, command->layers, true);
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

static void bench_all(const struct Command *command) {
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
}

static void command_bench(struct Command *command) {
    bool has_model = command->argument_count;
    if (!has_model && (command->json || command->prefill.count || command->depth.count || command->decode != NOT_GIVEN))
        wrong_usage(command, "--prefill, --decode, --depth and --json go with a model");
    if (has_model && command->seconds != NOT_GIVEN) wrong_usage(command, "--seconds goes with the table of all models");
    if (!command->prefill.count) command->prefill = (struct CountList){{TABLE_PROMPT}, 1, false};
    if (!command->depth.count) command->depth = (struct CountList){{0}, 1, false};
    if (command->decode == NOT_GIVEN) command->decode = has_model ? 64 : TABLE_DECODE;
    if (!has_model) {
        bench_all(command);
        return;
    }
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

// A base is written beside its final name, which it gets when it is whole; an error leaves nothing.
static char partial_base[4096];   // "": none

static void remove_partial_base(void) {
    if (*partial_base) unlink(partial_base);
}

static FILE *create_base(const char *path, const struct BaseHeader *header) {
    if ((size_t)snprintf(partial_base, sizeof partial_base, "%s.partial", path) >= sizeof partial_base) die("%s: the name is too long", path);
    FILE *file = fopen(partial_base, "wb");
    if (file) atexit(remove_partial_base);
    signal(SIGXFSZ, SIG_IGN);     // a limit of the file's size becomes an error of writing
    if (!file || fwrite(header, sizeof *header, 1, file) != 1) die("%s: cannot be written: %s", path, strerror(errno));
    return file;
}

static void finish_base(FILE *file, const char *path) {
    if (fclose(file) != 0 || rename(partial_base, path) != 0) die("%s: cannot be written: %s", path, strerror(errno));
    *partial_base = 0;
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
    struct Items items = share_items(e->session->team, thread, e->rows, 1);
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
    if (command->save_base) e->base = create_base(command->save_base, &header);
    e->base_rows = allocate(e->base ? batch * vocab * sizeof *e->base_rows : 0);
    for (int score = 0; score < (command->kld ? SCORE_COUNT : 1); score++) e->scores[score] = allocate(windows->scored * sizeof(double));
    double started = clock_seconds();
    for (size_t i = 0; i < windows->count; i++) {
        evaluate_window(e, &windows->items[i]);
        done += windows->items[i].count;
        show_progress(command, "perplexity", (double)done, (double)windows->ids.count, started);
    }
    end_progress(command);
    if (command->save_base) finish_base(e->base, command->save_base);
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

// For a JSON object, which knows no infinity; e to the 710 is one.
static json_t *json_number_or_null(double number) { return isfinite(number) ? json_real(number) : json_null(); }

static void report_json(const struct Evaluation *e, const struct Summary *s, const struct Model *model) {
    double perplexity = exp(s[SCORE_NLL].mean);
    json_t *object = json_pack("{s:o, s:s, s:s, s:I, s:I, s:f, s:f, s:o, s:o}", "model", json_text(model->name), "type",
                               dtype_name(model->config.recipe), "kv", cache_names[e->command->cache], "windows",
                               (json_int_t)e->windows->count, "positions", (json_int_t)e->windows->scored, "nll", s[SCORE_NLL].mean,
                               "nll_error", s[SCORE_NLL].error, "perplexity", json_number_or_null(perplexity), "perplexity_error",
                               json_number_or_null(perplexity * s[SCORE_NLL].error));
    const struct Summary *kl = &s[SCORE_KL];
    if (e->command->kld)
        json_object_update_new(object, json_pack("{s:{s:f, s:f, s:f, s:f, s:f, s:f, s:f}, s:f, s:{s:f, s:f}}", "kl", "mean", kl->mean,
            "mean_error", kl->error, "median", kl->percentiles[0], "p90", kl->percentiles[1], "p99", kl->percentiles[2], "p99.9",
            kl->percentiles[3], "max", kl->percentiles[4],
            "top1_agreement", s[SCORE_SAME_TOP].mean, "ln_ppl_ratio", "mean", s[SCORE_LN_RATIO].mean, "mean_error", s[SCORE_LN_RATIO].error));
    print_json(object);
}

static void command_perplexity(struct Command *command) {
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
}

#endif
