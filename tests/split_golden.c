// split_golden GOLDEN.json DIR: takes demo/golden.json apart, so that shell scripts can use it.
//
// Every turn of every case gets files named DIR/CASE-TURN.*: .ids (the prompt's ids), .output (the ids that must follow),
// .question, .answer (both without a newline at the end) and .thinking; the first turns, which a plain `r1 run` can ask, are
// listed in DIR/first, all in DIR/all, one CASE-TURN a line.
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *create(const char *folder, const char *name, const char *suffix) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s%s", folder, name, suffix);
    FILE *out = fopen(path, "w");
    if (!out) {
        perror(path);
        exit(1);
    }
    return out;
}

static void write_text(const char *folder, const char *name, const char *suffix, const json_t *text) {
    FILE *out = create(folder, name, suffix);
    if (json_is_string(text)) fwrite(json_string_value(text), 1, json_string_length(text), out);
    fclose(out);
}

static void write_ids(const char *folder, const char *name, const char *suffix, const json_t *ids) {
    FILE *out = create(folder, name, suffix);
    size_t i;
    json_t *id;
    json_array_foreach((json_t *)ids, i, id) fprintf(out, "%s%lld", i ? " " : "", (long long)json_integer_value(id));
    fprintf(out, "\n");
    fclose(out);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: split_golden GOLDEN.json DIR\n");
        return 2;
    }
    json_error_t error;
    json_t *golden = json_load_file(argv[1], 0, &error);
    if (!golden) {
        fprintf(stderr, "%s:%d: %s\n", argv[1], error.line, error.text);
        return 1;
    }
    FILE *first = create(argv[2], "first", ""), *all = create(argv[2], "all", "");
    size_t i, k;
    json_t *dialogue, *turn;
    json_array_foreach(json_object_get(golden, "cases"), i, dialogue) {
        json_array_foreach(json_object_get(dialogue, "turns"), k, turn) {
            char name[64];
            snprintf(name, sizeof name, "%zu-%zu", i, k);
            write_ids(argv[2], name, ".ids", json_object_get(turn, "prompt_ids"));
            write_ids(argv[2], name, ".output", json_object_get(turn, "output_ids"));
            write_text(argv[2], name, ".question", json_object_get(turn, "user"));
            write_text(argv[2], name, ".answer", json_object_get(turn, "answer"));
            write_text(argv[2], name, ".thinking", json_object_get(turn, "thinking"));
            fprintf(all, "%s\n", name);
            if (k == 0) fprintf(first, "%s\n", name);
        }
    }
    fclose(first);
    fclose(all);
    json_decref(golden);
    return 0;
}
