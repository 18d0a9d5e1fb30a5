// Byte-level BPE as tokenizer.json describes it, the chat prompt of the R1 family, and streaming UTF-8 output.
//
// The converter calls tokenizer_build once; what it returns is the tokenizer section of the .r1 file. Everything else works
// on a Tokenizer loaded from that section; nothing changes it, so any number of threads may use one at a time.
#ifndef R1_TOKENIZER_H
#define R1_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TOKEN_NONE UINT32_MAX

typedef struct Tokenizer Tokenizer;

// A growing list of token ids. {0} is an empty one; free(list.ids) ends it.
typedef struct {
    uint32_t *ids;
    size_t count, capacity;
} TokenList;

// The ids that a prompt and a generation need, each TOKEN_NONE where the vocabulary has no such token.
typedef struct {
    uint32_t bos, eos;            // of tokenizer_config.json
    uint32_t user, assistant;     // <｜User｜>, <｜Assistant｜>
    uint32_t end_of_turn;         // <｜end▁of▁sentence｜>, behind every earlier answer
    uint32_t think, end_think;    // <think>, </think>
    bool add_bos;                 // a raw prompt starts with bos
    bool has_chat;                // user, assistant, end_of_turn and bos are there: prompts take the chat form
    bool starts_thinking;         // the generation prefix opens <think>: output starts inside the thinking
    const uint32_t *stops;        // ids that end a generation
    size_t stop_count;
} TokenizerSpecials;

typedef struct {
    const char *role;             // "system", "user" or "assistant"
    const char *content;
    size_t content_bytes;
} ChatMessage;

// ---- the converter's side

typedef struct {
    const char *tokenizer_json, *tokenizer_config_json;   // whole files, JSON
    size_t tokenizer_json_bytes, tokenizer_config_json_bytes;
    const char *chat_template;    // chat_template.jinja, or NULL: then tokenizer_config_json's chat_template, if any
    size_t chat_template_bytes;
    const uint32_t *stops;        // every eos_token_id of generation_config.json and config.json; one beyond vocab_size,
    size_t stop_count;            // which can never be generated, is passed over
    uint32_t vocab_size;          // rows of the embedding; no token may have a higher id. 0: not known (--tokenizer-only)
} TokenizerSource;

// Writes the tokenizer section into *section (malloc'ed, *bytes long). On failure returns false with one sentence in error,
// which names the file and the key at fault, and leaves *section alone.
bool tokenizer_build(const TokenizerSource *source, uint8_t **section, size_t *bytes, char *error, size_t error_size);

// ---- the engine's side

// Checks the section (it may come from a damaged or hostile file) and makes a tokenizer of it, or returns NULL with one
// sentence in error. The section must stay in memory until tokenizer_free.
Tokenizer *tokenizer_load(const uint8_t *section, size_t bytes, char *error, size_t error_size);
void tokenizer_free(Tokenizer *tokenizer);

const TokenizerSpecials *tokenizer_specials(const Tokenizer *tokenizer);

// One more than the highest id that has a token.
uint32_t tokenizer_size(const Tokenizer *tokenizer);

// The bytes of a token (an added token's are its content); NULL and *bytes = 0 for an id without one.
const char *tokenizer_piece(const Tokenizer *tokenizer, uint32_t id, size_t *bytes);

// Appends the ids of a text of any bytes (invalid UTF-8 becomes U+FFFD, as in the reference library's callers). With markup,
// added tokens in the text count as such; without, it is all plain text: what a person typed is never parsed for tokens.
// False with a sentence in error if the pre-tokenizer's regex gives up or memory is short; the list is then as it was, here
// and in the two functions below.
bool tokenizer_encode(const Tokenizer *tokenizer, const char *text, size_t bytes, bool markup, TokenList *out, char *error,
                      size_t error_size);

// Appends the ids of a conversation up to and including the generation prefix: special ids are spliced in, contents are
// encoded by themselves as plain text. System messages come first wherever they stand, joined by an empty line; of an
// assistant's content only what follows the last "</think>" goes in, unstripped. Needs specials.has_chat, and no other roles.
bool tokenizer_encode_chat(const Tokenizer *tokenizer, const ChatMessage *messages, size_t count, TokenList *out, char *error,
                           size_t error_size);

// Appends the ids of a prompt without a chat form: bos where add_bos asks for it, then the text.
bool tokenizer_encode_raw(const Tokenizer *tokenizer, const char *text, size_t bytes, TokenList *out, char *error,
                          size_t error_size);

// ---- streaming output

// Holds back the start of a UTF-8 sequence until the rest has come. {0} is a fresh one.
typedef struct {
    char held[4];
    size_t held_bytes;
} Utf8Stream;

// Takes some bytes, returns how many are ready in out (room for bytes + 4). What cannot become valid UTF-8 any more comes
// out as U+FFFD (room: 3 * (bytes + 4)).
size_t utf8_stream_push(Utf8Stream *stream, const char *bytes, size_t count, char *out);

// At the end of a generation: what is still held back, as U+FFFD (room for 3).
size_t utf8_stream_end(Utf8Stream *stream, char *out);

#endif
