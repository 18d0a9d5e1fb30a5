// golden_ids GOLDEN.json: the dialogues of demo/golden.json for `r1 perplexity --ids`, a line each: the ids of the prompt, a
// '|', the ids that the reference implementation answered with.
#include <jansson.h>
#include <stdio.h>

static int print_ids(const json_t *turn, const char *key) {
    const json_t *ids = json_object_get(turn, key), *id;
    size_t i;
    if (!json_is_array(ids)) {
        fprintf(stderr, "golden_ids: a turn without %s\n", key);
        return 1;
    }
    json_array_foreach(ids, i, id) printf("%" JSON_INTEGER_FORMAT " ", json_integer_value(id));
    return 0;
}

int main(int argc, char **argv) {
    json_error_t error;
    json_t *root, *dialogue, *turn;
    size_t i, j;
    if (argc != 2) {
        fprintf(stderr, "usage: golden_ids GOLDEN.json\n");
        return 2;
    }
    if (!(root = json_load_file(argv[1], 0, &error))) {
        fprintf(stderr, "golden_ids: %s: %s\n", argv[1], error.text);
        return 1;
    }
    json_array_foreach(json_object_get(root, "cases"), i, dialogue) {
        json_array_foreach(json_object_get(dialogue, "turns"), j, turn) {
            if (print_ids(turn, "prompt_ids")) return 1;
            printf("| ");
            if (print_ids(turn, "output_ids")) return 1;
            printf("\n");
        }
    }
    json_decref(root);
    return 0;
}
