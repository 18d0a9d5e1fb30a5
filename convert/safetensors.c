// Reads safetensors checkpoints: one file or shards with an index.
//
// A safetensors file is 8 bytes of header length (little-endian), a JSON object that gives each tensor's dtype, shape and
// range of bytes, and the data. Headers come from the network: every length, offset, shape and dtype is checked against
// the size of the file before anything trusts it. Holes between tensors and overlapping tensors are allowed.

#include "safetensors.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SINGLE_NAME "model.safetensors"
#define INDEX_NAME "model.safetensors.index.json"
#define HEADER_MAX_BYTES (100u << 20)       // the limit of the safetensors library itself
#define SMALL_FILE_MAX_BYTES (1u << 30)     // of a JSON file beside the weights

// --------------------------------------------------------------------------------------------------------- small files

bool fail(Failure *failure, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(failure->text, sizeof failure->text, format, arguments);
    va_end(arguments);
    return false;
}

static char *join_path(const char *directory, const char *name) {
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path) snprintf(path, bytes, "%s/%s", directory, name);
    return path;
}

// Opens a regular file for reading; a symbolic link to one will do (the Hugging Face cache is made of them). O_NONBLOCK: a
// named pipe must not hang us.
static int open_regular(const char *path, uint64_t *bytes, struct stat *status, Failure *failure) {
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        fail(failure, "%s: %s", path, strerror(errno));
        return -1;
    }
    if (fstat(descriptor, status) != 0 || !S_ISREG(status->st_mode)) {
        fail(failure, "%s: not a regular file", path);
        close(descriptor);
        return -1;
    }
    *bytes = (uint64_t)status->st_size;
    return descriptor;
}

static bool read_range(int descriptor, const char *path, uint64_t offset, void *out, size_t bytes, Failure *failure) {
    unsigned char *at = out;
    while (bytes > 0) {
        ssize_t got = pread(descriptor, at, bytes < (1u << 30) ? bytes : (1u << 30), (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            return fail(failure, "%s: cannot read at byte %llu: %s", path, (unsigned long long)offset, strerror(errno));
        }
        if (got == 0) {
            return fail(failure, "%s: ends at byte %llu, %zu bytes early: it became shorter while it was read", path,
                        (unsigned long long)offset, bytes);
        }
        at += got;
        offset += (uint64_t)got;
        bytes -= (size_t)got;
    }
    return true;
}

bool read_whole_file(const char *directory, const char *name, bool optional, char **contents, size_t *bytes,
                     Failure *failure) {
    *contents = NULL;
    *bytes = 0;
    char *path = join_path(directory, name);
    if (!path) return fail(failure, "out of memory");
    struct stat status;
    uint64_t size;
    bool ok = false;
    int descriptor = -1;
    if (optional && stat(path, &status) != 0 && (errno == ENOENT || errno == ENOTDIR)) {
        ok = true;
    } else if ((descriptor = open_regular(path, &size, &status, failure)) >= 0) {
        if (size > SMALL_FILE_MAX_BYTES) {
            fail(failure, "%s: %llu bytes are too many for this file", path, (unsigned long long)size);
        } else if (!(*contents = malloc((size_t)size + 1))) {
            fail(failure, "%s: no memory for its %llu bytes", path, (unsigned long long)size);
        } else if (read_range(descriptor, path, 0, *contents, (size_t)size, failure)) {
            (*contents)[size] = 0;
            *bytes = (size_t)size;
            ok = true;
        }
        if (!ok) {
            free(*contents);
            *contents = NULL;
        }
    }
    if (descriptor >= 0) close(descriptor);
    free(path);
    return ok;
}

json_t *parse_json_object(const char *directory, const char *name, const char *text, size_t bytes, Failure *failure) {
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) {
        fail(failure, "%s/%s: no valid JSON: line %d: %s", directory, name, error.line, error.text);
    } else if (!json_is_object(root)) {
        fail(failure, "%s/%s: expected a JSON object", directory, name);
        json_decref(root);
        root = NULL;
    }
    return root;
}

// ------------------------------------------------------------------------------------------------------------- headers

const char *print_shape(const uint64_t *shape, unsigned dimensions, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (unsigned i = 0; i < dimensions && used < size; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%llu", i ? ", " : "", (unsigned long long)shape[i]);
    }
    if (used < size) snprintf(text + used, size - used, "]");
    return text;
}

// Bytes of an element, 0 for a dtype whose size we do not know (such a tensor is fine as long as nobody asks for it).
static unsigned parse_dtype(const char *text, uint8_t *dtype) {
    static const struct {
        const char *text;
        uint8_t dtype, bytes;
    } known[] = {
        {"F32", SOURCE_F32, 4},   {"F16", SOURCE_F16, 2},   {"BF16", SOURCE_BF16, 2}, {"F8_E4M3", SOURCE_F8, 1},
        {"F64", SOURCE_OTHER, 8}, {"I64", SOURCE_OTHER, 8}, {"U64", SOURCE_OTHER, 8}, {"I32", SOURCE_OTHER, 4},
        {"U32", SOURCE_OTHER, 4}, {"I16", SOURCE_OTHER, 2}, {"U16", SOURCE_OTHER, 2}, {"I8", SOURCE_OTHER, 1},
        {"U8", SOURCE_OTHER, 1},  {"BOOL", SOURCE_OTHER, 1}, {"F8_E5M2", SOURCE_OTHER, 1},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(text, known[i].text) == 0) {
            *dtype = known[i].dtype;
            return known[i].bytes;
        }
    }
    *dtype = SOURCE_OTHER;
    return 0;
}

// Fills a tensor from its header entry. data_start is where the data begins in the shard.
static bool parse_tensor(const Shard *shard, const char *name, const json_t *entry, uint64_t data_start,
                         SourceTensor *tensor, Failure *failure) {
    const json_t *dtype = json_object_get(entry, "dtype"), *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2) {
        return fail(failure, "%s: tensor %s: its header entry lacks a proper dtype, shape or data_offsets", shard->path,
                    name);
    }
    snprintf(tensor->dtype_text, sizeof tensor->dtype_text, "%s", json_string_value(dtype));
    tensor->element_bytes = (uint8_t)parse_dtype(json_string_value(dtype), &tensor->dtype);
    if (json_array_size(shape) > SOURCE_MAX_DIMENSIONS) {
        return fail(failure, "%s: tensor %s: %zu dimensions, at most %d are expected", shard->path, name,
                    json_array_size(shape), SOURCE_MAX_DIMENSIONS);
    }
    tensor->dimensions = (uint8_t)json_array_size(shape);
    uint64_t elements = 1;
    for (unsigned i = 0; i < tensor->dimensions; i++) {
        const json_t *length = json_array_get(shape, i);
        if (!json_is_integer(length) || json_integer_value(length) < 0) {
            return fail(failure, "%s: tensor %s: its shape holds something that is not a length", shard->path, name);
        }
        tensor->shape[i] = (uint64_t)json_integer_value(length);
        if (__builtin_mul_overflow(elements, tensor->shape[i], &elements)) {
            return fail(failure, "%s: tensor %s: its shape is too large to be true", shard->path, name);
        }
    }
    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    uint64_t data_bytes = shard->bytes - data_start;
    if (!json_is_integer(first) || !json_is_integer(last) || json_integer_value(first) < 0 ||
        json_integer_value(last) < json_integer_value(first)) {
        return fail(failure, "%s: tensor %s: its data_offsets are not two ascending byte offsets", shard->path, name);
    }
    if ((uint64_t)json_integer_value(last) > data_bytes) {
        return fail(failure,
                    "%s: tensor %s: its data ends at byte %lld, but the file has %llu bytes of data: is it complete?",
                    shard->path, name, (long long)json_integer_value(last), (unsigned long long)data_bytes);
    }
    tensor->offset = data_start + (uint64_t)json_integer_value(first);
    tensor->bytes = (uint64_t)(json_integer_value(last) - json_integer_value(first));
    uint64_t expected = 0;
    if (tensor->element_bytes &&
        (__builtin_mul_overflow(elements, (uint64_t)tensor->element_bytes, &expected) || expected != tensor->bytes)) {
        char text[200];
        return fail(failure, "%s: tensor %s: %s %s needs %llu bytes, its data_offsets span %llu", shard->path, name,
                    tensor->dtype_text, print_shape(tensor->shape, tensor->dimensions, text, sizeof text),
                    (unsigned long long)expected, (unsigned long long)tensor->bytes);
    }
    return true;
}

static bool add_tensor(Checkpoint *checkpoint, uint32_t shard, const char *name, const json_t *entry, uint64_t data_start,
                       Failure *failure) {
    if (checkpoint->tensor_count == checkpoint->tensor_capacity) {
        size_t capacity = checkpoint->tensor_capacity ? checkpoint->tensor_capacity * 2 : 256;
        SourceTensor *grown = realloc(checkpoint->tensors, capacity * sizeof *grown);
        if (!grown) return fail(failure, "out of memory");
        checkpoint->tensors = grown;
        checkpoint->tensor_capacity = capacity;
    }
    SourceTensor tensor = {.shard = shard};
    if (!parse_tensor(&checkpoint->shards[shard], name, entry, data_start, &tensor, failure)) return false;
    if (!(tensor.name = strdup(name))) return fail(failure, "out of memory");
    checkpoint->tensors[checkpoint->tensor_count++] = tensor;
    if (json_object_set_new(checkpoint->by_name, name, json_integer((json_int_t)checkpoint->tensor_count - 1)) != 0) {
        return fail(failure, "out of memory");
    }
    return true;
}

// Opens one shard and takes its tensors in. With an index (weight_map not NULL), only those that it places in this file.
static bool open_shard(Checkpoint *checkpoint, const char *file, const json_t *weight_map, Failure *failure) {
    uint32_t index = (uint32_t)checkpoint->shard_count;
    Shard *shard = &checkpoint->shards[index];
    *shard = (Shard){.descriptor = -1, .path = join_path(checkpoint->directory, file)};
    checkpoint->shard_count++;
    if (!shard->path) return fail(failure, "out of memory");
    struct stat status;
    if ((shard->descriptor = open_regular(shard->path, &shard->bytes, &status, failure)) < 0) {
        char why[sizeof failure->text];
        memcpy(why, failure->text, sizeof why);
        if (weight_map && access(shard->path, F_OK) != 0) {
            return fail(failure, "%.600s (" INDEX_NAME " names this file: is the download complete?)", why);
        }
        return false;
    }
    shard->device = (uint64_t)status.st_dev;
    shard->inode = (uint64_t)status.st_ino;

    unsigned char prefix[8];
    if (shard->bytes < sizeof prefix) {
        return fail(failure, "%s: %llu bytes are too few for a safetensors file", shard->path,
                    (unsigned long long)shard->bytes);
    }
    if (!read_range(shard->descriptor, shard->path, 0, prefix, sizeof prefix, failure)) return false;
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | prefix[i];
    if (memcmp(prefix, "version ", sizeof prefix) == 0) {   // how git-lfs begins the small text that stands for a large file
        return fail(failure, "%s: a git-lfs pointer, not the weights; with git-lfs installed, \"git -C %s lfs pull\" downloads them",
                    shard->path, checkpoint->directory);
    }
    if (header_bytes > shard->bytes - sizeof prefix || header_bytes > HEADER_MAX_BYTES) {
        return fail(failure, "%s: its header claims %llu bytes, in a file of %llu: truncated, or no safetensors file",
                    shard->path, (unsigned long long)header_bytes, (unsigned long long)shard->bytes);
    }
    char *text = malloc((size_t)header_bytes + 1);
    if (!text) {
        return fail(failure, "%s: no memory for its header of %llu bytes", shard->path, (unsigned long long)header_bytes);
    }
    if (!read_range(shard->descriptor, shard->path, sizeof prefix, text, (size_t)header_bytes, failure)) {
        free(text);
        return false;
    }
    text[header_bytes] = 0;
    json_t *header = parse_json_object(checkpoint->directory, file, text, (size_t)header_bytes, failure);
    free(text);
    if (!header) return false;

    bool ok = true;
    const char *name;
    json_t *entry;
    json_object_foreach(header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) continue;
        const json_t *home = weight_map ? json_object_get(weight_map, name) : NULL;
        if (weight_map && (!home || strcmp(json_string_value(home), file) != 0)) continue;
        if (!(ok = add_tensor(checkpoint, index, name, entry, sizeof prefix + header_bytes, failure))) break;
    }
    json_decref(header);
    return ok;
}

// ---------------------------------------------------------------------------------------------------------- checkpoint

static int compare_names(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static bool open_shards(Checkpoint *checkpoint, const json_t *index, Failure *failure) {
    const json_t *weight_map = json_object_get(index, "weight_map");
    if (!json_is_object(weight_map) || json_object_size(weight_map) == 0) {
        return fail(failure, "%s/%s: expected weight_map, an object of tensor and file names", checkpoint->directory,
                    INDEX_NAME);
    }
    size_t count = 0, distinct = 0, most = json_object_size(weight_map);
    const char **files = malloc(most * sizeof *files);
    if (!files) return fail(failure, "out of memory");
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)weight_map, name, value) {
        const char *file = json_string_value(value);
        // The files of a checkpoint lie in its directory; an index must not lead us elsewhere.
        if (!file || !*file || strchr(file, '/') || strchr(file, '\\') || strstr(file, "..")) {
            fail(failure, "%s/%s: tensor %s: \"%s\" is not a plain file name", checkpoint->directory, INDEX_NAME, name,
                 file ? file : "(no string)");
            free(files);
            return false;
        }
        files[count++] = file;
    }
    qsort(files, count, sizeof *files, compare_names);
    for (size_t i = 0; i < count; i++) {
        if (i == 0 || strcmp(files[i], files[distinct - 1]) != 0) files[distinct++] = files[i];
    }
    checkpoint->shards = calloc(distinct, sizeof *checkpoint->shards);
    bool ok = checkpoint->shards || fail(failure, "out of memory");
    for (size_t i = 0; ok && i < distinct; i++) ok = open_shard(checkpoint, files[i], weight_map, failure);
    free(files);
    if (!ok) return false;
    json_object_foreach((json_t *)weight_map, name, value) {
        if (!json_object_get(checkpoint->by_name, name)) {
            return fail(failure, "%s/%s: tensor %s is missing, though %s places it there", checkpoint->directory,
                        json_string_value(value), name, INDEX_NAME);
        }
    }
    return true;
}

static bool file_exists(const char *directory, const char *name) {
    char *path = join_path(directory, name);
    struct stat status;
    bool exists = path && lstat(path, &status) == 0;
    free(path);
    return exists;
}

bool check_weights(const char *path, Failure *failure) {
    if (file_exists(path, SINGLE_NAME) || file_exists(path, INDEX_NAME)) return true;
    DIR *directory = opendir(path);
    if (!directory) return fail(failure, "%s: %s", path, strerror(errno));
    bool safetensors = false, pytorch = false, gguf = false;
    for (const struct dirent *entry; (entry = readdir(directory));) {
        const char *dot = strrchr(entry->d_name, '.');
        if (!dot) continue;
        safetensors |= strcmp(dot, ".safetensors") == 0;
        pytorch |= strcmp(dot, ".bin") == 0 || strcmp(dot, ".pt") == 0 || strcmp(dot, ".pth") == 0;
        gguf |= strcmp(dot, ".gguf") == 0;
    }
    closedir(directory);
    if (safetensors) {
        return fail(failure,
                    "%s: has .safetensors files, but neither " SINGLE_NAME " nor " INDEX_NAME ": is the download complete?",
                    path);
    }
    if (gguf) {
        return fail(failure,
                    "%s: has only GGUF weights, which are quantised already: download the model's original repository "
                    "with its .safetensors files instead",
                    path);
    }
    if (pytorch) {
        return fail(failure,
                    "%s: has only PyTorch weights (.bin), which r1-convert does not read: download the .safetensors "
                    "files of the model instead",
                    path);
    }
    return fail(failure, "%s: has neither " SINGLE_NAME " nor " INDEX_NAME, path);
}

bool open_checkpoint(Checkpoint *checkpoint, const char *directory, Failure *failure) {
    *checkpoint = (Checkpoint){0};
    if (!(checkpoint->directory = strdup(directory)) || !(checkpoint->by_name = json_object())) {
        return fail(failure, "out of memory");
    }
    if (!check_weights(directory, failure)) return false;
    if (file_exists(directory, SINGLE_NAME)) {
        if (!(checkpoint->shards = calloc(1, sizeof *checkpoint->shards))) return fail(failure, "out of memory");
        return open_shard(checkpoint, SINGLE_NAME, NULL, failure);
    }
    char *text;
    size_t bytes;
    if (!read_whole_file(directory, INDEX_NAME, false, &text, &bytes, failure)) return false;
    json_t *index = parse_json_object(directory, INDEX_NAME, text, bytes, failure);
    free(text);
    if (!index) return false;
    bool ok = open_shards(checkpoint, index, failure);
    json_decref(index);
    return ok;
}

void close_checkpoint(Checkpoint *checkpoint) {
    for (size_t i = 0; i < checkpoint->shard_count; i++) {
        if (checkpoint->shards[i].descriptor >= 0) close(checkpoint->shards[i].descriptor);
        free(checkpoint->shards[i].path);
    }
    for (size_t i = 0; i < checkpoint->tensor_count; i++) free(checkpoint->tensors[i].name);
    free(checkpoint->shards);
    free(checkpoint->tensors);
    free(checkpoint->directory);
    json_decref(checkpoint->by_name);
    *checkpoint = (Checkpoint){0};
}

const SourceTensor *find_tensor(const Checkpoint *checkpoint, const char *name) {
    const json_t *index = json_object_get(checkpoint->by_name, name);
    return index ? &checkpoint->tensors[json_integer_value(index)] : NULL;
}

bool read_tensor(const Checkpoint *checkpoint, const SourceTensor *tensor, uint64_t offset, void *out, size_t bytes,
                 Failure *failure) {
    const Shard *shard = &checkpoint->shards[tensor->shard];
    return read_range(shard->descriptor, shard->path, tensor->offset + offset, out, bytes, failure);
}
