// Fuzzes the reader of tokenizer.json and tokenizer_config.json: an input is the first, a zero byte, and the second. What is
// accepted must load, and encode and decode some text.
#include <stdlib.h>
#include <string.h>

#include "../../tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char plain_config[] = "{\"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}";
    const uint8_t *zero = memchr(data, 0, size);
    size_t first = zero ? (size_t)(zero - data) : size, second = zero ? size - first - 1 : sizeof plain_config - 1;
    uint32_t stops[] = {1};
    char error[1024] = "";
    TokenizerSource source = {
        .tokenizer_json = (const char *)data, .tokenizer_json_bytes = first,
        .tokenizer_config_json = zero ? (const char *)zero + 1 : plain_config, .tokenizer_config_json_bytes = second,
        .stops = stops, .stop_count = 1,
    };
    uint8_t *section = NULL;
    size_t bytes = 0;
    if (!tokenizer_build(&source, &section, &bytes, error, sizeof error)) {
        if (!error[0]) abort();
        return 0;
    }
    Tokenizer *tokenizer = tokenizer_load(section, bytes, error, sizeof error);
    if (!tokenizer) abort();                             // what the converter writes, the engine reads
    static const char text[] = "Hello  <think> 123\n\xe4\xbd\xa0\xe5\xa5\xbd e\xcc\x81 \xff'll";
    TokenList list = {0};
    for (int markup = 0; markup < 2; markup++)
        if (!tokenizer_encode(tokenizer, text, sizeof text - 1, markup, &list, error, sizeof error) && !error[0]) abort();
    for (size_t i = 0; i < list.count; i++) {
        size_t length;
        if (!tokenizer_piece(tokenizer, list.ids[i], &length)) abort();
    }
    if (tokenizer_specials(tokenizer)->has_chat) {
        ChatMessage message = {"user", text, sizeof text - 1};
        if (!tokenizer_encode_chat(tokenizer, &message, 1, &list, error, sizeof error) && !error[0]) abort();
    }
    free(list.ids);
    tokenizer_free(tokenizer);
    free(section);
    return 0;
}
