// check_json PATH...: reads one JSON value from standard input and checks that every PATH is in it.
//
// A PATH is keys and array indices joined by dots, as "decode.0.tok_s", optionally followed by =VALUE (a string or a number as
// JSON prints it) or by :TYPE (string, number, object, array). Says what is wrong and exits 1 otherwise.
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static json_t *find(json_t *value, char *path) {
    for (char *key = strtok(path, "."); key && value; key = strtok(NULL, "."))
        value = json_is_array(value) ? json_array_get(value, (size_t)strtoul(key, NULL, 10)) : json_object_get(value, key);
    return value;
}

static const char *type_of(const json_t *value) {
    return json_is_string(value) ? "string" : json_is_number(value) ? "number" : json_is_object(value) ? "object"
         : json_is_array(value) ? "array" : json_is_boolean(value) ? "boolean" : "null";
}

int main(int argc, char **argv) {
    json_error_t error;
    json_t *root = json_loadf(stdin, 0, &error);
    if (!root) {
        printf("not JSON: %s in line %d\n", error.text, error.line);
        return 1;
    }
    for (int i = 1; i < argc; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s", argv[i]);
        char *expected = strpbrk(path, "=:");
        char kind = expected ? *expected : 0;
        if (expected) *expected++ = 0;
        json_t *value = find(root, path);
        if (!value) {
            printf("no %.*s in it\n", (int)strcspn(argv[i], "=:"), argv[i]);
            return 1;
        }
        if (kind == ':' && strcmp(type_of(value), expected) != 0) {
            printf("%.*s: expected a value of type %s, got %s\n", (int)strcspn(argv[i], "=:"), argv[i], expected, type_of(value));
            return 1;
        }
        if (kind == '=') {
            char *dumped = json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, JSON_ENCODE_ANY);
            if (!dumped || strcmp(dumped, expected) != 0) {
                printf("%.*s: expected %s, got %s\n", (int)strcspn(argv[i], "=:"), argv[i], expected, dumped ? dumped : "nothing");
                return 1;
            }
            free(dumped);
        }
    }
    json_decref(root);
    return 0;
}
