// Fuzzes the tokenizer section of a .r1 file, which the loader must not believe.
#include <stdlib.h>

#include "../../tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char error[1024] = "";
    Tokenizer *tokenizer = tokenizer_load(data, size, error, sizeof error);
    if (!tokenizer) {
        if (!error[0]) abort();
        return 0;
    }
    static const char text[] = "Hello  <think> 123\n\xe4\xbd\xa0\xe5\xa5\xbd e\xcc\x81 \xff'll";
    TokenList list = {0};
    for (int markup = 0; markup < 2; markup++)
        if (!tokenizer_encode(tokenizer, text, sizeof text - 1, markup, &list, error, sizeof error) && !error[0]) abort();
    size_t length;
    for (size_t i = 0; i < list.count; i++)
        if (list.ids[i] >= tokenizer_size(tokenizer)) abort();
    for (uint32_t id = 0; id < tokenizer_size(tokenizer); id++) tokenizer_piece(tokenizer, id, &length);
    tokenizer_piece(tokenizer, TOKEN_NONE, &length);
    if (tokenizer_specials(tokenizer)->has_chat) {
        ChatMessage message = {"user", text, sizeof text - 1};
        if (!tokenizer_encode_chat(tokenizer, &message, 1, &list, error, sizeof error) && !error[0]) abort();
    }
    free(list.ids);
    tokenizer_free(tokenizer);
    return 0;
}
