// compare_golden GOLDEN OUTPUT: does what `r1 logits` printed agree with a golden.txt of tests/oracles?
//
// Every `greedy`, `argmax` and `experts` id must be equal, every logit within 1e-3 of the largest absolute logit of its
// position, every expert's weight within 1e-4. Prints the largest errors and exits 0, or says what is wrong first and exits 1.
// With --prefill the output has no greedy tokens of its own: the golden's were part of the prompt. With --finite there is
// nothing to compare: the records must be there and all numbers finite.
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOGIT_TOLERANCE 1e-3    // of the largest absolute logit of the position
#define WEIGHT_TOLERANCE 1e-4

// A line of either file: its fields, separated by blanks.
struct Record {
    char *text;
    char **fields;
    size_t count;
};

struct File {
    struct Record *records;
    size_t count;
};

static _Noreturn __attribute__((format(printf, 1, 2))) void wrong(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    exit(1);
}

static void *grow(void *memory, size_t bytes) {
    memory = realloc(memory, bytes);
    if (!memory) wrong("out of memory");
    return memory;
}

static struct File read_records(const char *path) {
    FILE *in = fopen(path, "r");
    if (!in) wrong("%s: cannot be opened", path);
    struct File file = {0};
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, in) > 0) {
        if (line[0] == '#') continue;
        struct Record record = {.text = strdup(line)};
        if (!record.text) wrong("out of memory");
        for (char *field = strtok(record.text, " \n"); field; field = strtok(NULL, " \n")) {
            record.fields = grow(record.fields, (record.count + 1) * sizeof *record.fields);
            record.fields[record.count++] = field;
        }
        if (!record.count) {
            free(record.text);
            continue;
        }
        file.records = grow(file.records, (file.count + 1) * sizeof *file.records);
        file.records[file.count++] = record;
    }
    free(line);
    fclose(in);
    return file;
}

static void free_records(struct File *file) {
    for (size_t i = 0; i < file->count; i++) {
        free(file->records[i].text);
        free(file->records[i].fields);
    }
    free(file->records);
}

// The record whose first `keys` fields are those of `like`: the name alone, "logits POS", "experts LAYER POS".
static const struct Record *find_record(const struct File *file, const struct Record *like, size_t keys) {
    for (size_t i = 0; i < file->count; i++) {
        const struct Record *record = &file->records[i];
        bool same = record->count >= keys;
        for (size_t k = 0; same && k < keys; k++) same = strcmp(record->fields[k], like->fields[k]) == 0;
        if (same) return record;
    }
    return NULL;
}

static double number(const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !isfinite(value)) wrong("\"%s\" is not a finite number", text);
    return value;
}

static void compare_ids(const struct Record *golden, const struct Record *output) {
    const char *name = golden->fields[0];
    for (size_t i = 1; i < golden->count && i < output->count; i++)
        if (strcmp(golden->fields[i], output->fields[i]) != 0) {
            if (i == 1) wrong("%s: expected %s ids, got %s", name, golden->fields[1], output->fields[1]);
            wrong("%s: number %zu: expected id %s, got %s", name, i - 2, golden->fields[i], output->fields[i]);
        }
    if (golden->count != output->count) wrong("%s: expected %zu fields, got %zu", name, golden->count, output->count);
}

static double compare_logits(const struct Record *golden, const struct Record *output) {
    if (golden->count != output->count)
        wrong("logits of position %s: expected %zu values, got %zu", golden->fields[1], golden->count - 2, output->count - 2);
    double largest = 0, worst = 0;
    size_t worst_id = 0;
    for (size_t i = 2; i < golden->count; i++) largest = fmax(largest, fabs(number(golden->fields[i])));
    for (size_t i = 2; i < golden->count; i++) {
        double error = fabs(number(output->fields[i]) - number(golden->fields[i])) / largest;
        if (error > worst) {
            worst = error;
            worst_id = i - 2;
        }
    }
    if (worst > LOGIT_TOLERANCE)
        wrong("logits of position %s: id %zu: expected %s, got %s, off by %.2g of the largest logit (at most %g)", golden->fields[1],
              worst_id, golden->fields[worst_id + 2], output->fields[worst_id + 2], worst, LOGIT_TOLERANCE);
    return worst;
}

static double compare_experts(const struct Record *golden, const struct Record *output) {
    const char *layer = golden->fields[1], *position = golden->fields[2];
    if (golden->count != output->count)
        wrong("experts of layer %s, position %s: expected %s of them, got %zu", layer, position, golden->fields[3], output->count - 4);
    double worst = 0;
    for (size_t i = 4; i < golden->count; i++) {
        const char *expected = golden->fields[i], *got = output->fields[i];
        const char *weight = strchr(expected, ':'), *got_weight = strchr(got, ':');
        if (!weight || !got_weight) wrong("experts of layer %s, position %s: expected %s, got %s", layer, position, expected, got);
        if (weight - expected != got_weight - got || strncmp(expected, got, (size_t)(weight - expected)) != 0)
            wrong("experts of layer %s, position %s: expected %s, got %s", layer, position, expected, got);
        double error = fabs(number(weight + 1) - number(got_weight + 1));
        if (error > WEIGHT_TOLERANCE) wrong("experts of layer %s, position %s: expected %s, got %s", layer, position, expected, got);
        worst = fmax(worst, error);
    }
    return worst;
}

// Every number of the output can be read and is finite.
static void check_finite(const struct Record *record) {
    for (size_t i = 1; i < record->count; i++) {
        const char *colon = strchr(record->fields[i], ':');
        number(colon ? colon + 1 : record->fields[i]);
    }
}

int main(int argc, char **argv) {
    bool prefill = argc == 4 && strcmp(argv[1], "--prefill") == 0, finite = argc == 4 && strcmp(argv[1], "--finite") == 0;
    if (argc != 3 && !prefill && !finite) {
        fprintf(stderr, "usage: compare_golden [--prefill | --finite] GOLDEN OUTPUT\n");
        return 2;
    }
    struct File golden = read_records(argv[argc - 2]), output = read_records(argv[argc - 1]);
    double logits = 0, weights = 0;
    size_t compared = 0;
    for (size_t i = 0; i < golden.count; i++) {
        const struct Record *expected = &golden.records[i];
        const char *name = expected->fields[0];
        bool ids = (strcmp(name, "greedy") == 0 && !prefill) || strcmp(name, "argmax") == 0;
        size_t keys = ids ? 1 : strcmp(name, "logits") == 0 ? 2 : strcmp(name, "experts") == 0 ? 3 : 0;
        if (!keys) continue;
        const struct Record *got = find_record(&output, expected, keys);
        if (!got) wrong("the output has no line \"%s%s%s%s%s\"", name, keys > 1 ? " " : "", keys > 1 ? expected->fields[1] : "",
                        keys > 2 ? " " : "", keys > 2 ? expected->fields[2] : "");
        if (finite) check_finite(got);
        else if (ids) compare_ids(expected, got);
        else if (keys == 2) logits = fmax(logits, compare_logits(expected, got));
        else weights = fmax(weights, compare_experts(expected, got));
        compared++;
    }
    if (!compared) wrong("nothing to compare in %s", argv[argc - 2]);
    if (finite) printf("%zu records, all finite", compared);
    else printf("logits within %.1e", logits);
    if (weights > 0) printf(", weights within %.1e", weights);
    printf("\n");
    free_records(&golden);
    free_records(&output);
    return 0;
}
