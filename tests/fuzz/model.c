// Fuzzes the .r1 loader, and what runs on a model that it accepted.
//
// An input is the metadata of a file: preamble, config, tokenizer, tensor table. The data behind it, up to the size that the
// preamble tells (at most 4 MB), is made up here, and the checksum is made to fit; otherwise hardly any input would get past it.
#include "../../r1.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void run_model(const struct Model *model) {
    static struct Team team;
    team.threads = 1;
    struct SessionOptions options = {.context = 24, .batch = 18, .logits_rows = 1, .cache = (enum CacheType)(model->config.hidden_size / 32 % 3)};
    // A sound file may still describe a model that takes long: not here.
    struct MemoryPlan plan = plan_memory(model, &options, 1);
    if (plan.cache + plan.scratch > 64 << 20) return;
    char error[ERROR_BYTES];
    struct Session *session = session_create(model, &team, choose_kernels("auto"), &options, error);
    if (!session) return;
    uint32_t tokens[20];
    for (size_t i = 0; i < 20; i++) tokens[i] = (uint32_t)(i * 2654435761u % model->config.vocab_size);
    prefill(session, tokens, 20);
    struct Sampler sampler;
    sampler_init(&sampler, model->config.vocab_size, 1, 0.9f, 0, 5, 1);
    if (sample_token(&sampler, session->logits) >= model->config.vocab_size) abort();
    sampler_free(&sampler);
    session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    openblas_set_num_threads(1);
    struct FilePreamble preamble = {0};
    memcpy(&preamble, data, min_size(size, sizeof preamble));
    size_t whole = size;
    if (preamble.file_bytes > size && preamble.file_bytes <= 4 << 20) whole = preamble.file_bytes;
    uint8_t *bytes = aligned_alloc(FORMAT_PAGE, align_up(whole + 1, FORMAT_PAGE));
    if (!bytes) return 0;
    memcpy(bytes, data, size);
    for (size_t i = size; i < whole; i++) bytes[i] = (uint8_t)(i * 37 + (i >> 8) * 11);
    uint64_t end = preamble.table_offset + (uint64_t)preamble.tensor_count * sizeof(struct TensorEntry);
    if (size >= sizeof preamble && end >= sizeof preamble && end <= whole && preamble.table_offset <= end) {
        XXH3_state_t *state = XXH3_createState();
        XXH3_64bits_reset(state);
        XXH3_64bits_update(state, bytes, offsetof(struct FilePreamble, metadata_hash));
        XXH3_64bits_update(state, bytes + sizeof preamble, end - sizeof preamble);
        preamble.metadata_hash = XXH3_64bits_digest(state);
        XXH3_freeState(state);
        memcpy(bytes, &preamble, sizeof preamble);
    }
    char error[ERROR_BYTES] = "";
    struct Model *model = model_from_memory(bytes, whole, "fuzz", error);
    if (!model && !error[0]) abort();
    if (model) {
        // Running takes much longer than loading: one of eight.
        if (model->has_weights && model->config.num_hidden_layers <= 4 && XXH3_64bits(data, size) % 8 == 0) run_model(model);
        model_close(model);
    }
    free(bytes);
    return 0;
}
