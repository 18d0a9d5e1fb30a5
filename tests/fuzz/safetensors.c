// Fuzzes the reader of safetensors headers: an input is a whole model.safetensors file; what it lists is then read.
#include "../../convert/safetensors.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char folder[] = "/tmp/r1-fuzz-XXXXXX", path[64];
    if (!path[0]) {
        if (!mkdtemp(folder)) abort();
        snprintf(path, sizeof path, "%s/model.safetensors", folder);
    }
    FILE *out = fopen(path, "wb");
    if (!out || fwrite(data, 1, size, out) != size || fclose(out) != 0) abort();

    Checkpoint checkpoint;
    Failure failure = {""};
    if (open_checkpoint(&checkpoint, folder, &failure)) {
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
    unlink(path);
    return 0;
}
