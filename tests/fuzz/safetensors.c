// Fuzzes the reader of safetensors headers: an input is a whole model.safetensors file; what it lists is then read.
//
// The file has no name: it lies in memory, and is opened anew through /proc/self/fd, so nothing is left behind however a run ends.
#define _GNU_SOURCE    // for memfd_create
#include "../../convert/safetensors.c"

#include <sys/mman.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int memory = -1;
    static char name[16];
    if (memory < 0) {
        memory = memfd_create("model.safetensors", MFD_CLOEXEC);
        if (memory < 0) abort();
        snprintf(name, sizeof name, "%d", memory);
    }
    if (ftruncate(memory, 0) != 0 || pwrite(memory, data, size, 0) != (ssize_t)size) abort();

    // What open_checkpoint does with a folder that has one file in it.
    Checkpoint checkpoint = {
        .directory = strdup("/proc/self/fd"), .by_name = json_object(), .shards = calloc(1, sizeof *checkpoint.shards),
    };
    if (!checkpoint.directory || !checkpoint.by_name || !checkpoint.shards) abort();
    Failure failure = {""};
    if (open_shard(&checkpoint, name, NULL, &failure)) {
        for (size_t i = 0; i < checkpoint.tensor_count && i < 64; i++) {
            const SourceTensor *tensor = &checkpoint.tensors[i];
            if (tensor->bytes > size) abort();           // it lies inside the file
            unsigned char *bytes = malloc(tensor->bytes + 1);
            char shape[256];
            if (!bytes || !read_tensor(&checkpoint, tensor, 0, bytes, tensor->bytes, &failure)) abort();
            if (find_tensor(&checkpoint, tensor->name) == NULL) abort();
            print_shape(tensor->shape, tensor->dimensions, shape, sizeof shape);
            free(bytes);
        }
    } else if (!failure.text[0]) {
        abort();
    }
    close_checkpoint(&checkpoint);
    return 0;
}
