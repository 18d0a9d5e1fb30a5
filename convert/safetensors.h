// A Hugging Face checkpoint directory: which tensors it has, where they lie, and how to read parts of them.
//
// Nothing is mapped and nothing is kept: the caller names a range of bytes of a tensor and gets it by pread.
#ifndef R1_SAFETENSORS_H
#define R1_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

// One sentence about what went wrong: "file: tensor or key: expected and got".
typedef struct {
    char text[1200];
} Failure;

// Writes the sentence and returns false, so that a function can end with `return fail(...)`.
bool fail(Failure *failure, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum SourceDtype { SOURCE_F32 = 1, SOURCE_F16, SOURCE_BF16, SOURCE_F8, SOURCE_OTHER };

#define SOURCE_MAX_DIMENSIONS 8

typedef struct {
    char *name;
    uint32_t shard;               // index into Checkpoint.shards
    uint8_t dtype;                // enum SourceDtype
    uint8_t dimensions;
    uint8_t element_bytes;        // 0 for SOURCE_OTHER
    char dtype_text[13];          // as the file spells it, for messages
    uint64_t shape[SOURCE_MAX_DIMENSIONS];
    uint64_t offset, bytes;       // in the shard; checked to lie inside it
} SourceTensor;

typedef struct {
    char *path;
    int descriptor;
    uint64_t bytes;
    uint64_t device, inode;       // to tell whether the output would overwrite it
} Shard;

typedef struct {
    char *directory;
    Shard *shards;
    size_t shard_count;
    SourceTensor *tensors;
    size_t tensor_count, tensor_capacity;
    json_t *by_name;              // name -> index into tensors: Jansson's objects are hashed
} Checkpoint;

// False, with what the directory has instead, if there are no safetensors weights.
bool check_weights(const char *directory, Failure *failure);

// Opens model.safetensors, or every shard that model.safetensors.index.json names, and checks every header against the size
// of its file. Close it in either case.
bool open_checkpoint(Checkpoint *checkpoint, const char *directory, Failure *failure);
void close_checkpoint(Checkpoint *checkpoint);

// NULL where there is no tensor of that name.
const SourceTensor *find_tensor(const Checkpoint *checkpoint, const char *name);

// Reads `bytes` bytes of a tensor, from its byte `offset` on.
bool read_tensor(const Checkpoint *checkpoint, const SourceTensor *tensor, uint64_t offset, void *out, size_t bytes,
                 Failure *failure);

// The shape as "[a, b]"; returns text.
const char *print_shape(const uint64_t *shape, unsigned dimensions, char *text, size_t size);

// Whole small files. The contents are zero-terminated (the zero is not counted). *contents stays NULL with true returned if
// the file does not exist and is optional.
bool read_whole_file(const char *directory, const char *name, bool optional, char **contents, size_t *bytes,
                     Failure *failure);

// NULL with a sentence in failure unless the text is one JSON object.
json_t *parse_json_object(const char *directory, const char *name, const char *text, size_t bytes, Failure *failure);

#endif
