// check_real GOLDEN.json DIR: writes the ids of tests/real/smollm2.golden.json for `r1 logits` and `r1 perplexity`: DIR/K.ids,
// prompt and continuation of the greedy case K (0 and up), DIR/nll.ids, and DIR/prompts, the prompts' texts, one a line.
// check_real GOLDEN.json K OUTPUT: OUTPUT is what `r1 logits --argmax` printed for K.ids: every argmax from the last prompt id on
// must be the next id, except where the reference's own choice was closer than 0.05.
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CLOSE_CALL 0.05

static FILE *create(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *out = fopen(path, "w");
    if (!out) {
        perror(path);
        exit(1);
    }
    return out;
}

static void print_ids(FILE *out, const json_t *ids) {
    for (size_t i = 0; i < json_array_size(ids); i++) fprintf(out, "%lld ", (long long)json_integer_value(json_array_get(ids, i)));
}

static int write_ids(const json_t *golden, const char *folder) {
    FILE *prompts = create(folder, "prompts");
    for (size_t k = 0; k < json_array_size(json_object_get(golden, "greedy")); k++) {
        json_t *greedy = json_array_get(json_object_get(golden, "greedy"), k);
        char name[64];
        snprintf(name, sizeof name, "%zu.ids", k);
        FILE *out = create(folder, name);
        print_ids(out, json_object_get(greedy, "prompt_ids"));
        print_ids(out, json_object_get(greedy, "ids"));
        fclose(out);
        // A prompt may hold newlines: as JSON it stays one line.
        char *text = json_dumps(json_object_get(greedy, "prompt"), JSON_ENCODE_ANY);
        fprintf(prompts, "%s\n", text);
        free(text);
    }
    fclose(prompts);
    FILE *out = create(folder, "nll.ids");
    print_ids(out, json_object_get(json_object_get(golden, "nll"), "ids"));
    fclose(out);
    return 0;
}

static int compare(const json_t *golden, size_t k, const char *path) {
    json_t *greedy = json_array_get(json_object_get(golden, "greedy"), k);
    json_t *ids = json_object_get(greedy, "ids"), *gaps = json_object_get(greedy, "gap");
    size_t prompt = json_array_size(json_object_get(greedy, "prompt_ids")), close_calls = 0;
    FILE *in = fopen(path, "r");
    long long value;
    char word[16];
    size_t count;
    if (!in || fscanf(in, "%15s %zu", word, &count) != 2 || strcmp(word, "argmax") != 0 || count < prompt + json_array_size(ids)) {
        printf("no argmax line for %zu positions\n", prompt + json_array_size(ids));
        return 1;
    }
    for (size_t i = 0; i + 1 < prompt; i++)
        if (fscanf(in, "%lld", &value) != 1) return 1;
    for (size_t i = 0; i < json_array_size(ids); i++) {
        long long expected = json_integer_value(json_array_get(ids, i));
        double gap = json_number_value(json_array_get(gaps, i));
        if (fscanf(in, "%lld", &value) != 1 || (value != expected && gap >= CLOSE_CALL)) {
            printf("step %zu: expected id %lld, got %lld (its lead was %g)\n", i, expected, value, gap);
            return 1;
        }
        close_calls += value != expected;
    }
    printf("%zu ids equal, %zu close calls otherwise\n", json_array_size(ids) - close_calls, close_calls);
    fclose(in);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: check_real GOLDEN.json DIR | GOLDEN.json K OUTPUT\n");
        return 2;
    }
    json_error_t error;
    json_t *golden = json_load_file(argv[1], 0, &error);
    if (!golden) {
        printf("%s: %s\n", argv[1], error.text);
        return 1;
    }
    int status = argc == 3 ? write_ids(golden, argv[2]) : compare(golden, strtoul(argv[2], NULL, 10), argv[3]);
    json_decref(golden);
    return status;
}
