// Fuzzes the tokenizer's input: any bytes as text, as markup, and as the contents of a chat, with the demo's tokenizer; the
// pieces of a text that is sound UTF-8 must give it back.
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "../../tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char *read_file(const char *path, size_t *bytes) {
    FILE *in = fopen(path, "rb");
    char *text = malloc(1 << 20);
    if (!in || !text) abort();                           // run it from the root of the repository
    *bytes = fread(text, 1, 1 << 20, in);
    fclose(in);
    return text;
}

static Tokenizer *load_demo(void) {
    TokenizerSource source = {0};
    char error[1024];
    char *json = read_file("demo/tokenizer.json", &source.tokenizer_json_bytes);
    char *config = read_file("demo/tokenizer_config.json", &source.tokenizer_config_json_bytes);
    source.tokenizer_json = json;
    source.tokenizer_config_json = config;
    static uint8_t *section;
    size_t bytes;
    if (!tokenizer_build(&source, &section, &bytes, error, sizeof error)) abort();
    Tokenizer *tokenizer = tokenizer_load(section, bytes, error, sizeof error);
    if (!tokenizer) abort();
    free(json);
    free(config);
    return tokenizer;
}

static bool is_utf8(const uint8_t *data, size_t size) {
    utf8proc_int32_t code;
    for (size_t i = 0; i < size;) {
        utf8proc_ssize_t step = utf8proc_iterate(data + i, (utf8proc_ssize_t)(size - i), &code);
        if (step <= 0) return false;
        i += (size_t)step;
    }
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Tokenizer *tokenizer;
    if (!tokenizer) tokenizer = load_demo();
    const char *text = (const char *)data;
    char error[1024] = "";
    bool sound = is_utf8(data, size);
    TokenList list = {0};
    for (int markup = 0; markup < 2; markup++) {
        list.count = 0;
        if (!tokenizer_encode(tokenizer, text, size, markup, &list, error, sizeof error)) abort();
        // The demo has no normaliser, so the pieces are the text.
        size_t at = 0;
        Utf8Stream stream = {0};
        for (size_t i = 0; i < list.count; i++) {
            size_t length;
            const char *piece = tokenizer_piece(tokenizer, list.ids[i], &length);
            if (!piece) abort();
            if (sound && (length > size - at || memcmp(text + at, piece, length) != 0)) abort();
            at += length;
            char *out = malloc(3 * (length + 4));
            if (!out) abort();
            if (utf8_stream_push(&stream, piece, length, out) > 3 * (length + 4)) abort();
            free(out);
        }
        if (sound && at != size) abort();
    }
    list.count = 0;
    ChatMessage messages[] = {{"user", text, size / 2}, {"assistant", text + size / 2, size - size / 2}, {"user", text, size}};
    if (!tokenizer_encode_chat(tokenizer, messages, 3, &list, error, sizeof error)) abort();
    free(list.ids);
    return 0;
}
