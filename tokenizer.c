// The tokenizer: from tokenizer.json to the section of the .r1 file (the converter's side), and from that section to token
// ids and back (the engine's side). Text goes through these stages, as in the Hugging Face tokenizers library:
//
//   bytes -> valid UTF-8 -> [added tokens cut out] -> NFC -> [added tokens looked for in normalised text, too] -> regexes
//   that split it, each inside the pieces of the one before -> byte-level BPE of each piece -> ids     [...]: with markup
//
// The section, all numbers little-endian, no padding anywhere:
//
//    0  u32 token_count     one more than the highest id
//    4  u32 merge_count
//    8  u32 split_count     at most MAX_SPLITS
//   12  u32 stop_count
//   16  u32 piece_bytes     size of the pieces area
//   20  u32 split_bytes     size of the splits area
//   24  u32 prefix_bytes    size of the generation prefix
//   28  u32 flags           1: text is normalised to NFC; 2: a piece that is a token as it stands is not merged
//                           (ignore_merges); 4: a raw prompt starts with bos
//   32  u32 ids[7]          bos, eos, user, assistant, end_of_turn, think, end_think; 0xffffffff where there is none
//   60  u32 reserved        0
//   64  u32 starts[token_count + 1]      piece i is bytes starts[i] .. starts[i + 1] of the pieces area
//       u32 merges[merge_count][3]       left, right, result: ids; the first merge has the highest priority
//       u32 stops[stop_count]            ids that end a generation
//       u8  token_flags[token_count]     1: the id has a token; 2: its piece is a word of the BPE vocabulary;
//                                        4: added token; 8: special; 16: looked for in normalised text
//       u8  pieces[piece_bytes]          the tokens' real bytes (not the byte-level alphabet), in the order of the ids
//       splits[split_count]              each a u32 length and a regex in UTF-8, for PCRE2 with UTF and UCP
//       u8  prefix[prefix_bytes]         text behind <｜Assistant｜> where an answer begins, e.g. "<think>\n"; added tokens
//                                        in it count
#include "tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <jansson.h>
#include <pcre2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

enum { SECTION_NFC = 1, SECTION_IGNORE_MERGES = 2, SECTION_ADD_BOS = 4, SECTION_FLAGS = 7 };
enum { TOKEN_PRESENT = 1, TOKEN_WORD = 2, TOKEN_ADDED = 4, TOKEN_SPECIAL = 8, TOKEN_NORMALIZED = 16, TOKEN_FLAGS = 31 };
enum { ID_BOS, ID_EOS, ID_USER, ID_ASSISTANT, ID_END_OF_TURN, ID_THINK, ID_END_THINK, ID_COUNT };

#define HEADER_BYTES 64
#define MERGE_BYTES 12
#define MAX_SPLITS 64             // each is one level of recursion
#define MAX_TOKENS (1u << 22)     // bounds the table that one high id in a tokenizer.json makes
#define MAX_ADDED_BYTES 4096      // of one added token: bounds the work of looking for one at every byte
#define MAX_REGEX_BYTES 65536

#define ASSISTANT_TEXT "<｜Assistant｜>"

// ================================================================================================================
// Helpers: errors, growing buffers, little-endian numbers
// ================================================================================================================

typedef enum { UTF8_VALID, UTF8_INVALID, UTF8_INCOMPLETE } Utf8State;

// Looks at the start of count > 0 bytes. Returns the length of the sequence there, or, where it is not valid, of what one
// U+FFFD stands for: the longest start of a valid sequence, at least one byte (Unicode's recommended practice, which
// Python and Rust follow). UTF8_INCOMPLETE: it breaks off at the end of the bytes.
static size_t scan_utf8(const uint8_t *bytes, size_t count, Utf8State *state) {
    uint8_t first = bytes[0], low = 0x80, high = 0xbf;    // the range of the second byte
    size_t length;
    *state = UTF8_VALID;
    if (first < 0x80) return 1;
    if (first >= 0xc2 && first <= 0xdf) length = 2;
    else if (first >= 0xe0 && first <= 0xef) length = 3;
    else if (first >= 0xf0 && first <= 0xf4) length = 4;
    else { *state = UTF8_INVALID; return 1; }
    if (first == 0xe0) low = 0xa0;                        // shorter forms, surrogates, beyond U+10FFFF
    else if (first == 0xed) high = 0x9f;
    else if (first == 0xf0) low = 0x90;
    else if (first == 0xf4) high = 0x8f;
    for (size_t i = 1; i < length; i++) {
        if (i == count) { *state = UTF8_INCOMPLETE; return i; }
        if (bytes[i] < low || bytes[i] > high) { *state = UTF8_INVALID; return i; }
        low = 0x80, high = 0xbf;
    }
    return length;
}

static bool is_valid_utf8(const uint8_t *bytes, size_t count) {
    Utf8State state = UTF8_VALID;
    for (size_t i = 0; i < count && state == UTF8_VALID;) i += scan_utf8(bytes + i, count - i, &state);
    return state == UTF8_VALID;
}

// Writes one sentence into error: control characters and broken UTF-8, which names taken from a file may hold, are masked.
// Always false, so that a caller can return it.
__attribute__((format(printf, 3, 4)))
static bool fail(char *error, size_t error_size, const char *format, ...) {
    if (!error_size) return false;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    uint8_t *text = (uint8_t *)error;
    for (size_t i = 0, count = strlen(error), length; i < count; i += length) {
        Utf8State state;
        length = scan_utf8(text + i, count - i, &state);
        if (state != UTF8_VALID) memset(text + i, '?', length);
        else if (text[i] < 0x20 || text[i] == 0x7f) text[i] = ' ';
    }
    return false;
}

typedef struct {
    uint8_t *data;
    size_t count, capacity;
} Bytes;

// Makes room for more bytes behind those that are there; false if memory is short.
static bool reserve_bytes(Bytes *bytes, size_t more) {
    if (more <= bytes->capacity - bytes->count) return true;
    if (more > SIZE_MAX / 2 - bytes->count) return false;
    size_t capacity = bytes->count + more;
    if (capacity < bytes->capacity * 2) capacity = bytes->capacity * 2;
    if (capacity < 64) capacity = 64;
    uint8_t *data = realloc(bytes->data, capacity);
    if (!data) return false;
    bytes->data = data, bytes->capacity = capacity;
    return true;
}

static bool append_bytes(Bytes *bytes, const void *data, size_t count) {
    if (!count) return true;
    if (!reserve_bytes(bytes, count)) return false;
    memcpy(bytes->data + bytes->count, data, count);
    bytes->count += count;
    return true;
}

static bool append_u32(Bytes *bytes, uint32_t value) {
    uint8_t data[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    return append_bytes(bytes, data, 4);
}

static uint32_t read_u32(const uint8_t *data) {
    return (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
}

static bool append_token(TokenList *list, uint32_t id) {
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        if (capacity > SIZE_MAX / sizeof *list->ids) return false;
        uint32_t *ids = realloc(list->ids, capacity * sizeof *ids);
        if (!ids) return false;
        list->ids = ids, list->capacity = capacity;
    }
    list->ids[list->count++] = id;
    return true;
}

// Appends text with every broken sequence replaced by U+FFFD.
static bool append_valid_utf8(Bytes *out, const uint8_t *text, size_t bytes) {
    size_t done = 0, i = 0;                   // text[done .. i) is valid and not yet appended
    while (i < bytes) {
        Utf8State state;
        size_t length = text[i] < 0x80 ? (state = UTF8_VALID, 1) : scan_utf8(text + i, bytes - i, &state);
        if (state != UTF8_VALID) {
            if (!append_bytes(out, text + done, i - done) || !append_bytes(out, "\xef\xbf\xbd", 3)) return false;
            done = i + length;
        }
        i += length;
    }
    return append_bytes(out, text + done, bytes - done);
}

// ================================================================================================================
// NFC, as the reference library has it: by utf8proc, except for a few characters
// ================================================================================================================

// The library's tables are of Unicode 9. It leaves these characters alone, where utf8proc reorders or composes: marks (with
// a combining class) of Unicode 10 to 15 and U+11930, the second half of a composition of Unicode 13. U+11A7 stands before
// the first final consonant of Hangul and is none, but utf8proc 2.8 drops it behind a syllable without one. The text is cut
// at these characters; the parts are normalised. Found by comparing the two on every code point, alone and among marks.
static const struct { uint32_t first, last; } NFC_EXCEPTIONS[] = {
    {0x07fd, 0x07fd},   {0x0898, 0x089f},   {0x08ca, 0x08d3},   {0x09fe, 0x09fe},   {0x0c3c, 0x0c3c},
    {0x0d3b, 0x0d3c},   {0x0eba, 0x0eba},   {0x11a7, 0x11a7},   {0x1715, 0x1715},   {0x1abf, 0x1ace},
    {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff},
    {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136},
    {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
};

static bool is_nfc_exception(utf8proc_int32_t character) {
    size_t low = 0, high = sizeof NFC_EXCEPTIONS / sizeof *NFC_EXCEPTIONS;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if ((uint32_t)character > NFC_EXCEPTIONS[middle].last) low = middle + 1;
        else high = middle;
    }
    return low < sizeof NFC_EXCEPTIONS / sizeof *NFC_EXCEPTIONS && (uint32_t)character >= NFC_EXCEPTIONS[low].first;
}

// Decomposed characters that wait to be ordered and composed.
typedef struct {
    utf8proc_int32_t *data;
    size_t count, capacity;
} Characters;

static bool append_decomposed(Characters *run, utf8proc_int32_t character) {
    enum { LONGEST = 4 };                     // characters in the longest canonical decomposition
    if (run->capacity - run->count < LONGEST) {
        size_t capacity = run->capacity * 2 + 64;
        if (capacity > SIZE_MAX / sizeof *run->data) return false;
        utf8proc_int32_t *data = realloc(run->data, capacity * sizeof *data);
        if (!data) return false;
        run->data = data, run->capacity = capacity;
    }
    int boundary = 0;
    utf8proc_ssize_t count = utf8proc_decompose_char(character, run->data + run->count, LONGEST,
                                                     UTF8PROC_STABLE | UTF8PROC_DECOMPOSE, &boundary);
    if (count < 0 || count > LONGEST) return false;
    run->count += (size_t)count;
    return true;
}

static uint8_t combining_class(utf8proc_int32_t character) {
    return (uint8_t)utf8proc_get_property(character)->combining_class;
}

// Sorts the marks behind each starter by their class, equal ones staying in order. utf8proc does it one exchange at a time,
// which on a long run of marks takes time that grows as its square.
static bool order_marks(Characters *run) {
    for (size_t start = 0, end; start < run->count; start = end + 1) {
        size_t sums[257] = {0};
        bool sorted = true;
        uint8_t before = 0;
        for (end = start; end < run->count; end++) {
            uint8_t class = combining_class(run->data[end]);
            if (!class) break;
            if (class < before) sorted = false;
            before = class;
            sums[class + 1]++;
        }
        if (sorted) continue;
        utf8proc_int32_t *copy = malloc((end - start) * sizeof *copy);
        if (!copy) return false;
        memcpy(copy, run->data + start, (end - start) * sizeof *copy);
        for (size_t i = 1; i < 257; i++) sums[i] += sums[i - 1];
        for (size_t i = 0; i < end - start; i++) run->data[start + sums[combining_class(copy[i])]++] = copy[i];
        free(copy);
    }
    return true;
}

// Orders and composes the run, appends it to out and empties it.
static bool finish_run(Characters *run, Bytes *out) {
    if (!run->count) return true;
    if (!order_marks(run)) return false;
    utf8proc_ssize_t count = utf8proc_normalize_utf32(run->data, (utf8proc_ssize_t)run->count,
                                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    run->count = 0;
    if (count < 0 || (size_t)count > SIZE_MAX / 4 || !reserve_bytes(out, (size_t)count * 4)) return false;
    for (utf8proc_ssize_t i = 0; i < count; i++)
        out->count += (size_t)utf8proc_encode_char(run->data[i], out->data + out->count);
    return true;
}

// Appends the NFC of a valid UTF-8 text; false if memory is short.
static bool append_nfc(Bytes *out, const uint8_t *text, size_t bytes) {
    Characters run = {0};
    bool fine = true;
    size_t i = 0;
    while (fine && i < bytes) {
        // Characters below U+0300 (first byte below 0xcc) are in NFC and never join the one before them; only the last of
        // a stretch of them can take up what follows.
        size_t start = i;
        while (i < bytes && text[i] < 0xcc) i++;
        if (i < bytes && i > start) do i--; while ((text[i] & 0xc0) == 0x80);
        fine = append_bytes(out, text + start, i - start);
        for (bool first = true; fine && i < bytes && (first || text[i] >= 0xcc); first = false) {
            utf8proc_int32_t character;
            utf8proc_ssize_t length = utf8proc_iterate(text + i, (utf8proc_ssize_t)(bytes - i), &character);
            if (length < 1) { fine = false; break; }
            if (is_nfc_exception(character))
                fine = finish_run(&run, out) && append_bytes(out, text + i, (size_t)length);
            else fine = append_decomposed(&run, character);
            i += (size_t)length;
        }
        fine = fine && finish_run(&run, out);
    }
    free(run.data);
    return fine;
}

// ================================================================================================================
// Loading: the section is checked and read in place; hash tables, sorted added tokens and compiled regexes are made
// ================================================================================================================

typedef struct {
    uint32_t left, right;
    uint32_t rank_plus_1;         // 0: the slot is free
} MergeSlot;

typedef struct {
    const uint8_t *text;
    uint32_t bytes, id;
} AddedToken;

// Added tokens in the order of their bytes; those that start with byte b are tokens[first[b]] to tokens[first[b + 1] - 1].
typedef struct {
    AddedToken *tokens;
    uint32_t count, first[257];
} AddedSet;

struct Tokenizer {
    // the section
    const uint8_t *starts, *merges, *token_flags, *pieces;
    uint32_t token_count, merge_count, split_count;
    bool nfc, ignore_merges;
    // made of it
    TokenizerSpecials specials;
    uint32_t *stops;
    TokenList prefix;             // the generation prefix, behind specials.assistant
    uint32_t byte_ids[256];       // the token of each single byte, or TOKEN_NONE
    MergeSlot *merge_slots;       // open addressing, at most half full; slots = mask + 1, a power of two
    size_t merge_mask;
    uint32_t *word_slots;         // ids of the vocabulary's words by their bytes (TOKEN_NONE: free); ignore_merges only
    size_t word_mask;
    AddedSet added, added_normalized;
    pcre2_code *splits[MAX_SPLITS];
};

static const uint8_t *get_piece(const Tokenizer *tokenizer, uint32_t id, size_t *bytes) {
    uint32_t start = read_u32(tokenizer->starts + (size_t)id * 4), end = read_u32(tokenizer->starts + (size_t)id * 4 + 4);
    *bytes = end - start;
    return tokenizer->pieces + start;
}

// Slots for count entries, at most half full.
static size_t count_slots(size_t count) {
    size_t slots = 16;
    while (slots < count * 2) slots *= 2;
    return slots;
}

static size_t hash_pair(uint32_t left, uint32_t right) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93u;
    return (size_t)(hash ^ hash >> 32);
}

// The rank of the merge of two neighbours, or TOKEN_NONE.
static uint32_t find_merge(const Tokenizer *tokenizer, uint32_t left, uint32_t right) {
    for (size_t i = hash_pair(left, right) & tokenizer->merge_mask;; i = (i + 1) & tokenizer->merge_mask) {
        const MergeSlot *slot = &tokenizer->merge_slots[i];
        if (!slot->rank_plus_1) return TOKEN_NONE;
        if (slot->left == left && slot->right == right) return slot->rank_plus_1 - 1;
    }
}

// The slot of a word: of its id, or the free one where it belongs.
static uint32_t *find_word(const Tokenizer *tokenizer, const uint8_t *word, size_t bytes) {
    for (size_t i = (size_t)XXH3_64bits(word, bytes) & tokenizer->word_mask;; i = (i + 1) & tokenizer->word_mask) {
        uint32_t *slot = &tokenizer->word_slots[i];
        if (*slot == TOKEN_NONE) return slot;
        size_t length;
        const uint8_t *piece = get_piece(tokenizer, *slot, &length);
        if (length == bytes && !memcmp(piece, word, bytes)) return slot;
    }
}

static int compare_added(const void *left, const void *right) {
    const AddedToken *a = left, *b = right;
    int order = memcmp(a->text, b->text, a->bytes < b->bytes ? a->bytes : b->bytes);
    if (order) return order;
    if (a->bytes != b->bytes) return a->bytes < b->bytes ? -1 : 1;
    return a->id < b->id ? -1 : 1;
}

// Gathers the added tokens whose flag TOKEN_NORMALIZED is as told.
static bool load_added(const Tokenizer *tokenizer, bool normalized, AddedSet *set) {
    uint8_t mask = TOKEN_ADDED | TOKEN_NORMALIZED, wanted = normalized ? mask : TOKEN_ADDED;
    uint32_t count = 0;
    for (uint32_t id = 0; id < tokenizer->token_count; id++) count += (tokenizer->token_flags[id] & mask) == wanted;
    if (!count) return true;
    set->tokens = malloc(count * sizeof *set->tokens);
    if (!set->tokens) return false;
    for (uint32_t id = 0; id < tokenizer->token_count; id++) {
        if ((tokenizer->token_flags[id] & mask) != wanted) continue;
        size_t bytes;
        const uint8_t *text = get_piece(tokenizer, id, &bytes);
        set->tokens[set->count++] = (AddedToken){text, (uint32_t)bytes, id};
    }
    qsort(set->tokens, count, sizeof *set->tokens, compare_added);
    for (uint32_t byte = 0, i = 0; byte < 256; byte++) {
        while (i < count && set->tokens[i].text[0] == byte) i++;
        set->first[byte + 1] = i;
    }
    return true;
}

static bool load_splits(Tokenizer *tokenizer, const uint8_t *splits, size_t bytes, uint32_t count, char *error,
                        size_t error_size) {
    size_t offset = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = bytes - offset >= 4 ? read_u32(splits + offset) : UINT32_MAX;
        if (length > MAX_REGEX_BYTES || length > bytes - offset - 4)
            return fail(error, error_size, "tokenizer: regex %u runs over the end of its area of %zu bytes", i, bytes);
        const uint8_t *regex = splits + offset + 4;
        offset += 4 + (size_t)length;
        pcre2_compile_context *context = pcre2_compile_context_create(NULL);
        if (!context) return fail(error, error_size, "tokenizer: out of memory");
        // As in the library's regex engine (Oniguruma with Ruby's syntax): ^ and $ match at every line, which ends in \n.
        pcre2_set_newline(context, PCRE2_NEWLINE_LF);
        int code = 0;
        PCRE2_SIZE where = 0;
        pcre2_code *split = pcre2_compile(regex, length, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                          &code, &where, context);
        pcre2_compile_context_free(context);
        if (!split) {
            char reason[160] = "unknown error";
            pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
            return fail(error, error_size, "tokenizer: regex %u does not compile: %s at byte %zu of \"%.*s\"", i, reason,
                        (size_t)where, length < 200 ? (int)length : 200, (const char *)regex);
        }
        pcre2_jit_compile(split, PCRE2_JIT_COMPLETE);     // where it cannot, pcre2_match interprets
        tokenizer->splits[tokenizer->split_count++] = split;
    }
    if (offset != bytes) return fail(error, error_size, "tokenizer: %zu bytes behind the last regex", bytes - offset);
    return true;
}

static bool load_merges(Tokenizer *tokenizer, char *error, size_t error_size) {
    size_t slots = count_slots(tokenizer->merge_count);
    tokenizer->merge_slots = calloc(slots, sizeof *tokenizer->merge_slots);
    if (!tokenizer->merge_slots) return fail(error, error_size, "tokenizer: out of memory");
    tokenizer->merge_mask = slots - 1;
    for (uint32_t rank = 0; rank < tokenizer->merge_count; rank++) {
        const uint8_t *merge = tokenizer->merges + (size_t)rank * MERGE_BYTES;
        for (size_t part = 0; part < 3; part++) {
            uint32_t id = read_u32(merge + part * 4);
            if (id >= tokenizer->token_count || !(tokenizer->token_flags[id] & TOKEN_PRESENT))
                return fail(error, error_size, "tokenizer: merge %u has id %u, which has no token (%u ids)", rank, id,
                            tokenizer->token_count);
        }
        uint32_t left = read_u32(merge), right = read_u32(merge + 4);
        size_t i = hash_pair(left, right) & tokenizer->merge_mask;
        MergeSlot *slot = &tokenizer->merge_slots[i];
        while (slot->rank_plus_1 && (slot->left != left || slot->right != right)) {
            i = (i + 1) & tokenizer->merge_mask;
            slot = &tokenizer->merge_slots[i];
        }
        *slot = (MergeSlot){left, right, rank + 1};       // of a pair told twice the later counts, as in the library
    }
    return true;
}

// Checks the tokens, fills byte_ids and, for ignore_merges, the words' table.
static bool load_tokens(Tokenizer *tokenizer, uint32_t piece_bytes, char *error, size_t error_size) {
    uint32_t count = tokenizer->token_count, words = 0, end = read_u32(tokenizer->starts);
    if (end) return fail(error, error_size, "tokenizer: the first piece starts at %u, expected 0", end);
    for (uint32_t id = 0; id < count; id++) {
        uint32_t start = end;
        uint8_t flags = tokenizer->token_flags[id];
        end = read_u32(tokenizer->starts + ((size_t)id + 1) * 4);
        if (end < start || end > piece_bytes)
            return fail(error, error_size, "tokenizer: the piece of id %u ends at %u, expected %u to %u", id, end, start,
                        piece_bytes);
        if (flags & ~TOKEN_FLAGS || (flags && !(flags & TOKEN_PRESENT)))
            return fail(error, error_size, "tokenizer: id %u has unknown flags %u", id, flags);
        if (flags & TOKEN_ADDED && (start == end || end - start > MAX_ADDED_BYTES))
            return fail(error, error_size, "tokenizer: the added token of id %u has %u bytes, expected 1 to %u", id,
                        end - start, MAX_ADDED_BYTES);
        // Half a character would cut the text in the middle of one, and the regexes are told that they get whole ones.
        if (flags & TOKEN_ADDED && !is_valid_utf8(tokenizer->pieces + start, end - start))
            return fail(error, error_size, "tokenizer: the added token of id %u is not UTF-8", id);
        words += (flags & TOKEN_WORD) != 0;
    }
    if (end != piece_bytes)
        return fail(error, error_size, "tokenizer: the last piece ends at %u, expected %u", end, piece_bytes);

    memset(tokenizer->byte_ids, 0xff, sizeof tokenizer->byte_ids);
    if (tokenizer->ignore_merges) {
        size_t slots = count_slots(words);
        tokenizer->word_slots = malloc(slots * sizeof *tokenizer->word_slots);
        if (!tokenizer->word_slots) return fail(error, error_size, "tokenizer: out of memory");
        memset(tokenizer->word_slots, 0xff, slots * sizeof *tokenizer->word_slots);
        tokenizer->word_mask = slots - 1;
    }
    for (uint32_t id = 0; id < count; id++) {
        if (!(tokenizer->token_flags[id] & TOKEN_WORD)) continue;
        size_t bytes;
        const uint8_t *piece = get_piece(tokenizer, id, &bytes);
        if (bytes == 1) tokenizer->byte_ids[piece[0]] = id;
        if (tokenizer->ignore_merges) *find_word(tokenizer, piece, bytes) = id;
    }
    return true;
}

static bool load_specials(Tokenizer *tokenizer, const uint8_t *ids, bool add_bos, const uint8_t *stops,
                          uint32_t stop_count, char *error, size_t error_size) {
    TokenizerSpecials *specials = &tokenizer->specials;
    uint32_t *const fields[ID_COUNT] = {&specials->bos, &specials->eos, &specials->user, &specials->assistant,
                                        &specials->end_of_turn, &specials->think, &specials->end_think};
    for (size_t i = 0; i < ID_COUNT; i++) {
        uint32_t id = *fields[i] = read_u32(ids + i * 4);
        if (id != TOKEN_NONE && (id >= tokenizer->token_count || !(tokenizer->token_flags[id] & TOKEN_PRESENT)))
            return fail(error, error_size, "tokenizer: special id %u has no token (%u ids)", id, tokenizer->token_count);
    }
    specials->add_bos = add_bos && specials->bos != TOKEN_NONE;
    specials->has_chat = specials->user != TOKEN_NONE && specials->assistant != TOKEN_NONE &&
                         specials->end_of_turn != TOKEN_NONE && specials->bos != TOKEN_NONE;
    tokenizer->stops = malloc(stop_count ? stop_count * sizeof *tokenizer->stops : 1);
    if (!tokenizer->stops) return fail(error, error_size, "tokenizer: out of memory");
    for (uint32_t i = 0; i < stop_count; i++) tokenizer->stops[i] = read_u32(stops + (size_t)i * 4);
    specials->stops = tokenizer->stops;
    specials->stop_count = stop_count;
    return true;
}

static bool load_section(Tokenizer *tokenizer, const uint8_t *section, size_t bytes, char *error, size_t error_size) {
    if (bytes < HEADER_BYTES)
        return fail(error, error_size, "tokenizer: %zu bytes, expected at least %d", bytes, HEADER_BYTES);
    uint32_t token_count = read_u32(section), merge_count = read_u32(section + 4), split_count = read_u32(section + 8);
    uint32_t stop_count = read_u32(section + 12), piece_bytes = read_u32(section + 16);
    uint32_t split_bytes = read_u32(section + 20), prefix_bytes = read_u32(section + 24), flags = read_u32(section + 28);
    // Every term is below 2^36.
    uint64_t starts_at = HEADER_BYTES, merges_at = starts_at + ((uint64_t)token_count + 1) * 4;
    uint64_t stops_at = merges_at + (uint64_t)merge_count * MERGE_BYTES, flags_at = stops_at + (uint64_t)stop_count * 4;
    uint64_t pieces_at = flags_at + token_count, splits_at = pieces_at + piece_bytes;
    uint64_t prefix_at = splits_at + split_bytes, end = prefix_at + prefix_bytes;
    if (end != bytes)
        return fail(error, error_size, "tokenizer: its header tells of %llu bytes, but there are %zu",
                    (unsigned long long)end, bytes);
    uint32_t reserved = read_u32(section + 60);
    if (token_count > MAX_TOKENS || merge_count == UINT32_MAX || split_count > MAX_SPLITS ||
        flags & ~(uint32_t)SECTION_FLAGS || reserved)
        return fail(error, error_size, "tokenizer: its header has a number out of range (%u ids, %u merges, %u regexes, "
                    "flags %u, reserved %u)", token_count, merge_count, split_count, flags, reserved);
    tokenizer->starts = section + starts_at;
    tokenizer->merges = section + merges_at;
    tokenizer->token_flags = section + flags_at;
    tokenizer->pieces = section + pieces_at;
    tokenizer->token_count = token_count;
    tokenizer->merge_count = merge_count;
    tokenizer->nfc = flags & SECTION_NFC;
    tokenizer->ignore_merges = flags & SECTION_IGNORE_MERGES;
    if (!load_tokens(tokenizer, piece_bytes, error, error_size) || !load_merges(tokenizer, error, error_size) ||
        !load_specials(tokenizer, section + 32, flags & SECTION_ADD_BOS, section + stops_at, stop_count, error,
                       error_size) ||
        !load_splits(tokenizer, section + splits_at, split_bytes, split_count, error, error_size)) return false;
    if (!load_added(tokenizer, false, &tokenizer->added) || !load_added(tokenizer, true, &tokenizer->added_normalized))
        return fail(error, error_size, "tokenizer: out of memory");

    if (!tokenizer_encode(tokenizer, (const char *)section + prefix_at, prefix_bytes, true, &tokenizer->prefix, error,
                          error_size)) return false;
    for (size_t i = 0; i < tokenizer->prefix.count; i++) {
        if (tokenizer->prefix.ids[i] == tokenizer->specials.think) tokenizer->specials.starts_thinking = true;
        if (tokenizer->prefix.ids[i] == tokenizer->specials.end_think) tokenizer->specials.starts_thinking = false;
    }
    return true;
}

Tokenizer *tokenizer_load(const uint8_t *section, size_t bytes, char *error, size_t error_size) {
    Tokenizer *tokenizer = calloc(1, sizeof *tokenizer);
    if (!tokenizer) {
        fail(error, error_size, "tokenizer: out of memory");
        return NULL;
    }
    if (!load_section(tokenizer, section, bytes, error, error_size)) {
        tokenizer_free(tokenizer);
        return NULL;
    }
    return tokenizer;
}

void tokenizer_free(Tokenizer *tokenizer) {
    if (!tokenizer) return;
    for (uint32_t i = 0; i < tokenizer->split_count; i++) pcre2_code_free(tokenizer->splits[i]);
    free(tokenizer->added.tokens);
    free(tokenizer->added_normalized.tokens);
    free(tokenizer->merge_slots);
    free(tokenizer->word_slots);
    free(tokenizer->prefix.ids);
    free(tokenizer->stops);
    free(tokenizer);
}

const TokenizerSpecials *tokenizer_specials(const Tokenizer *tokenizer) { return &tokenizer->specials; }

uint32_t tokenizer_size(const Tokenizer *tokenizer) { return tokenizer->token_count; }

const char *tokenizer_piece(const Tokenizer *tokenizer, uint32_t id, size_t *bytes) {
    *bytes = 0;
    if (id >= tokenizer->token_count || !(tokenizer->token_flags[id] & TOKEN_PRESENT)) return NULL;
    return (const char *)get_piece(tokenizer, id, bytes);
}

// ================================================================================================================
// Encoding
// ================================================================================================================

// A token on its way to become a longer one, in a doubly linked list; a merge leaves the left one and takes out the right.
typedef struct {
    uint32_t id;
    uint32_t previous, next;      // places of its neighbours; next == the number of symbols: it is the last
    uint32_t rank;                // of the merge with the next, TOKEN_NONE if there is none or the symbol is gone
} Symbol;

// What one call of tokenizer_encode works with.
typedef struct {
    const Tokenizer *tokenizer;
    bool markup;
    TokenList *out;
    pcre2_match_data *match;
    pcre2_match_context *limits;
    Bytes normalized;
    Symbol *symbols;
    uint64_t *heap;               // rank << 32 | place of the left symbol: lowest rank first, then leftmost
    size_t symbol_capacity;       // of symbols; the heap has room for twice as many
    char *error;
    size_t error_size;
} Encoder;

typedef bool EncodeText(Encoder *encoder, const uint8_t *text, size_t bytes);

static bool fail_memory(const Encoder *encoder) {
    return fail(encoder->error, encoder->error_size, "tokenizer: out of memory");
}

static void push_heap(uint64_t *heap, size_t *count, uint64_t item) {
    size_t place = (*count)++;
    while (place && heap[(place - 1) / 2] > item) {
        heap[place] = heap[(place - 1) / 2];
        place = (place - 1) / 2;
    }
    heap[place] = item;
}

static uint64_t pop_heap(uint64_t *heap, size_t *count) {
    uint64_t top = heap[0], item = heap[--*count];
    size_t place = 0;
    for (size_t child; (child = place * 2 + 1) < *count; place = child) {
        if (child + 1 < *count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= item) break;
        heap[place] = heap[child];
    }
    heap[place] = item;
    return top;
}

static bool reserve_symbols(Encoder *encoder, size_t count) {
    if (count <= encoder->symbol_capacity) return true;
    size_t capacity = count < 256 ? 256 : count + count / 2;
    if (capacity > SIZE_MAX / sizeof(Symbol)) return false;
    free(encoder->symbols);
    free(encoder->heap);
    encoder->symbol_capacity = 0;
    encoder->symbols = malloc(capacity * sizeof(Symbol));
    encoder->heap = malloc(capacity * 2 * sizeof(uint64_t));
    if (!encoder->symbols || !encoder->heap) return false;
    encoder->symbol_capacity = capacity;
    return true;
}

// Looks up the merge of a symbol with its next one and queues it.
static void queue_merge(Encoder *encoder, uint32_t place, uint32_t count, size_t *heap_count) {
    Symbol *symbol = &encoder->symbols[place];
    symbol->rank = TOKEN_NONE;
    if (symbol->next == count) return;
    symbol->rank = find_merge(encoder->tokenizer, symbol->id, encoder->symbols[symbol->next].id);
    if (symbol->rank != TOKEN_NONE) push_heap(encoder->heap, heap_count, (uint64_t)symbol->rank << 32 | place);
}

// Byte-level BPE of one piece. Time is n log n: of n bytes at most n - 1 merges, each queueing at most two more.
static bool encode_piece(Encoder *encoder, const uint8_t *piece, size_t bytes) {
    const Tokenizer *tokenizer = encoder->tokenizer;
    if (tokenizer->ignore_merges) {
        uint32_t id = *find_word(tokenizer, piece, bytes);
        if (id != TOKEN_NONE) return append_token(encoder->out, id) || fail_memory(encoder);
    }
    if (bytes >= TOKEN_NONE)
        return fail(encoder->error, encoder->error_size, "tokenizer: a word of %zu bytes is too long", bytes);
    if (!reserve_symbols(encoder, bytes)) return fail_memory(encoder);
    Symbol *symbols = encoder->symbols;
    uint32_t count = 0;
    for (size_t i = 0; i < bytes; i++) {      // the library, too, passes over a byte that has no token
        uint32_t id = tokenizer->byte_ids[piece[i]];
        if (id == TOKEN_NONE) continue;
        symbols[count] = (Symbol){id, count - 1, count + 1, TOKEN_NONE};
        count++;
    }
    if (!count) return true;
    size_t heap_count = 0;
    for (uint32_t place = 0; place < count; place++) queue_merge(encoder, place, count, &heap_count);
    while (heap_count) {
        uint64_t item = pop_heap(encoder->heap, &heap_count);
        uint32_t rank = (uint32_t)(item >> 32), place = (uint32_t)item;
        Symbol *symbol = &symbols[place];
        if (symbol->rank != rank) continue;   // one of the two has changed since
        Symbol *right = &symbols[symbol->next];
        symbol->id = read_u32(tokenizer->merges + (size_t)rank * MERGE_BYTES + 8);
        symbol->next = right->next;
        right->rank = TOKEN_NONE;
        if (symbol->next != count) symbols[symbol->next].previous = place;
        queue_merge(encoder, place, count, &heap_count);
        if (place) queue_merge(encoder, symbol->previous, count, &heap_count);
    }
    for (uint32_t place = 0; place != count; place = symbols[place].next)
        if (!append_token(encoder->out, symbols[place].id)) return fail_memory(encoder);
    return true;
}

// Cuts a text by the regexes from `level` on: each match is a piece, so is what lies between, and the next regex sees no
// further than the piece.
static bool split_text(Encoder *encoder, uint32_t level, const uint8_t *text, size_t bytes) {
    const Tokenizer *tokenizer = encoder->tokenizer;
    if (!bytes) return true;
    if (level == tokenizer->split_count) return encode_piece(encoder, text, bytes);
    size_t done = 0, from = 0;                // text[0 .. done) is encoded; the next search starts at `from`
    bool matched = false;
    while (from <= bytes) {
        const uint32_t options = PCRE2_NO_UTF_CHECK;      // append_valid_utf8 and append_nfc saw to it
        int code = pcre2_match(tokenizer->splits[level], text, bytes, from, options, encoder->match, encoder->limits);
        if (code == PCRE2_ERROR_JIT_STACKLIMIT)           // a small stack; the interpreter takes its own from the heap
            code = pcre2_match(tokenizer->splits[level], text, bytes, from, options | PCRE2_NO_JIT, encoder->match,
                               encoder->limits);
        if (code == PCRE2_ERROR_NOMATCH) break;
        if (code < 0) {
            char reason[160] = "unknown error";
            pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
            return fail(encoder->error, encoder->error_size, "tokenizer: regex %u gave up at byte %zu of a text of %zu: %s",
                        level, from, bytes, reason);
        }
        PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(encoder->match), start = bounds[0], end = bounds[1];
        if (start < done || end < start || end > bytes)
            return fail(encoder->error, encoder->error_size, "tokenizer: regex %u matched outside of the text", level);
        if (start == end && matched && end == done) {     // nothing, where the last match ended: go on a character further
            from++;
            while (from < bytes && (text[from] & 0xc0) == 0x80) from++;
            continue;
        }
        if (!split_text(encoder, level + 1, text + done, start - done) ||
            !split_text(encoder, level + 1, text + start, end - start)) return false;
        done = from = end;
        matched = true;
    }
    return split_text(encoder, level + 1, text + done, bytes - done);
}

static bool encode_normalized(Encoder *encoder, const uint8_t *text, size_t bytes) {
    // Work in proportion to the text is allowed: PCRE2's default, ten million steps, stops at a run of that many spaces.
    uint64_t limit = 10000000 + (uint64_t)bytes * 16;
    pcre2_set_match_limit(encoder->limits, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    pcre2_set_depth_limit(encoder->limits, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    pcre2_set_heap_limit(encoder->limits, 1 << 20);       // KiB
    return split_text(encoder, 0, text, bytes);
}

// The longest token of the set that the text (at least one byte) starts with, or NULL.
static const AddedToken *match_added(const AddedSet *set, const uint8_t *text, size_t bytes) {
    const AddedToken *tokens = set->tokens, *best = NULL;
    uint32_t low = set->first[text[0]], end = set->first[text[0] + 1];
    for (size_t depth = 1; low < end; depth++) {          // tokens[low .. end) share the text's first depth bytes
        if (tokens[low].bytes == depth) best = &tokens[low];
        while (low < end && tokens[low].bytes == depth) low++;
        if (depth == bytes) break;
        uint32_t high = end;
        while (low < high) {                              // the first with a byte not below the text's
            uint32_t middle = low + (high - low) / 2;
            if (tokens[middle].text[depth] < text[depth]) low = middle + 1;
            else high = middle;
        }
        high = end;
        for (uint32_t first = low; first < high;) {       // the first with a byte above the text's
            uint32_t middle = first + (high - first) / 2;
            if (tokens[middle].text[depth] <= text[depth]) first = middle + 1;
            else high = middle;
        }
        end = high;
    }
    return best;
}

// Appends the added tokens of the set that stand in the text, leftmost first and the longest where several start, and hands
// what lies between to encode_rest.
static bool cut_added(Encoder *encoder, const AddedSet *set, const uint8_t *text, size_t bytes, EncodeText *encode_rest) {
    size_t done = 0;
    for (size_t i = 0; set->count && i < bytes;) {
        const AddedToken *token = match_added(set, text + i, bytes - i);
        if (!token) { i++; continue; }
        if (i > done && !encode_rest(encoder, text + done, i - done)) return false;
        if (!append_token(encoder->out, token->id)) return fail_memory(encoder);
        done = i += token->bytes;
    }
    return done == bytes || encode_rest(encoder, text + done, bytes - done);
}

static bool normalize_and_encode(Encoder *encoder, const uint8_t *text, size_t bytes) {
    if (encoder->tokenizer->nfc) {
        encoder->normalized.count = 0;
        if (!append_nfc(&encoder->normalized, text, bytes)) return fail_memory(encoder);
        text = encoder->normalized.data, bytes = encoder->normalized.count;
    }
    if (!encoder->markup) return encode_normalized(encoder, text, bytes);
    return cut_added(encoder, &encoder->tokenizer->added_normalized, text, bytes, encode_normalized);
}

bool tokenizer_encode(const Tokenizer *tokenizer, const char *text, size_t bytes, bool markup, TokenList *out, char *error,
                      size_t error_size) {
    if (!bytes) return true;
    Encoder encoder = {.tokenizer = tokenizer, .markup = markup, .out = out, .error = error, .error_size = error_size};
    size_t count = out->count;
    Bytes valid = {0};
    encoder.match = pcre2_match_data_create(1, NULL);
    encoder.limits = pcre2_match_context_create(NULL);
    bool fine;
    if (!encoder.match || !encoder.limits || !append_valid_utf8(&valid, (const uint8_t *)text, bytes))
        fine = fail_memory(&encoder);
    else if (markup) fine = cut_added(&encoder, &tokenizer->added, valid.data, valid.count, normalize_and_encode);
    else fine = normalize_and_encode(&encoder, valid.data, valid.count);
    if (!fine) out->count = count;
    pcre2_match_data_free(encoder.match);
    pcre2_match_context_free(encoder.limits);
    free(encoder.normalized.data);
    free(encoder.symbols);
    free(encoder.heap);
    free(valid.data);
    return fine;
}

// ================================================================================================================
// Prompts
// ================================================================================================================

// What follows the last "</think>" of an earlier answer, unstripped.
static const char *skip_thinking(const char *content, size_t *bytes) {
    static const char end_think[] = "</think>";
    const size_t length = sizeof end_think - 1;
    for (size_t i = *bytes; i >= length; i--) {
        if (memcmp(content + i - length, end_think, length)) continue;
        *bytes -= i;
        return content + i;
    }
    return content;
}

// The system messages, joined by an empty line as R1's later templates and the demo's do.
static bool encode_system(const Tokenizer *tokenizer, const ChatMessage *messages, size_t count, TokenList *out,
                          char *error, size_t error_size) {
    Bytes system = {0};
    bool fine = true;
    for (size_t i = 0; i < count && fine; i++) {
        if (strcmp(messages[i].role, "system")) continue;
        fine = (!system.count || append_bytes(&system, "\n\n", 2)) &&
               append_bytes(&system, messages[i].content, messages[i].content_bytes);
    }
    if (!fine) fail(error, error_size, "tokenizer: out of memory");
    else fine = tokenizer_encode(tokenizer, (const char *)system.data, system.count, false, out, error, error_size);
    free(system.data);
    return fine;
}

bool tokenizer_encode_chat(const Tokenizer *tokenizer, const ChatMessage *messages, size_t count, TokenList *out,
                           char *error, size_t error_size) {
    const TokenizerSpecials *specials = &tokenizer->specials;
    size_t before = out->count;
    if (!specials->has_chat)
        return fail(error, error_size, "tokenizer: it lacks tokens of R1's chat form, such as <｜User｜>");
    for (size_t i = 0; i < count; i++) {
        const char *role = messages[i].role;
        if (!role || (strcmp(role, "system") && strcmp(role, "user") && strcmp(role, "assistant")))
            return fail(error, error_size, "message %zu has role \"%.40s\", expected system, user or assistant", i + 1,
                        role ? role : "");
    }
    bool memory = append_token(out, specials->bos);
    bool fine = memory && encode_system(tokenizer, messages, count, out, error, error_size);
    for (size_t i = 0; i < count && fine; i++) {
        const char *content = messages[i].content;
        size_t bytes = messages[i].content_bytes;
        bool is_user = !strcmp(messages[i].role, "user");
        if (!is_user && strcmp(messages[i].role, "assistant")) continue;
        if (!is_user) content = skip_thinking(content, &bytes);
        fine = memory = append_token(out, is_user ? specials->user : specials->assistant);
        fine = fine && tokenizer_encode(tokenizer, content, bytes, false, out, error, error_size);
        if (fine && !is_user) fine = memory = append_token(out, specials->end_of_turn);
    }
    if (fine) fine = memory = append_token(out, specials->assistant);
    for (size_t i = 0; i < tokenizer->prefix.count && fine; i++)
        fine = memory = append_token(out, tokenizer->prefix.ids[i]);
    if (!memory) fail(error, error_size, "tokenizer: out of memory");
    if (!fine) out->count = before;
    return fine;
}

bool tokenizer_encode_raw(const Tokenizer *tokenizer, const char *text, size_t bytes, TokenList *out, char *error,
                          size_t error_size) {
    size_t before = out->count;
    if (tokenizer->specials.add_bos && !append_token(out, tokenizer->specials.bos))
        return fail(error, error_size, "tokenizer: out of memory");
    if (tokenizer_encode(tokenizer, text, bytes, false, out, error, error_size)) return true;
    out->count = before;
    return false;
}

// ================================================================================================================
// Streaming output
// ================================================================================================================

size_t utf8_stream_push(Utf8Stream *stream, const char *bytes, size_t count, char *out) {
    size_t ready = 0;
    for (size_t i = 0; i < count; i++) {
        stream->held[stream->held_bytes++] = bytes[i];
        while (stream->held_bytes) {
            Utf8State state;
            size_t length = scan_utf8((const uint8_t *)stream->held, stream->held_bytes, &state);
            if (state == UTF8_INCOMPLETE) break;
            if (state == UTF8_VALID) memcpy(out + ready, stream->held, length), ready += length;
            else memcpy(out + ready, "\xef\xbf\xbd", 3), ready += 3;
            stream->held_bytes -= length;
            memmove(stream->held, stream->held + length, stream->held_bytes);
        }
    }
    return ready;
}

size_t utf8_stream_end(Utf8Stream *stream, char *out) {
    if (!stream->held_bytes) return 0;
    stream->held_bytes = 0;
    memcpy(out, "\xef\xbf\xbd", 3);
    return 3;
}

// ================================================================================================================
// The converter's side: tokenizer.json and tokenizer_config.json to the section
// ================================================================================================================

typedef struct {
    const char *text;             // as tokenizer.json spells it; NULL: no token has this id
    size_t bytes;
    uint8_t flags;
} SourceToken;

typedef struct {
    const TokenizerSource *source;
    json_t *json, *config;        // the two files
    const json_t *vocab;          // model.vocab: token -> id
    SourceToken *tokens;
    uint32_t token_count, capacity;
    uint32_t ids[ID_COUNT];
    uint32_t flags;               // SECTION_...
    uint32_t merge_count, split_count, stop_count;
    Bytes merges, splits, stops, prefix;      // as the section has them
    bool byte_level;              // the pre-tokenizer ends in ByteLevel
    char *error;
    size_t error_size;
} Builder;

// Errors about tokenizer.json and tokenizer_config.json.
#define REFUSE(builder, ...) fail((builder)->error, (builder)->error_size, "tokenizer.json: " __VA_ARGS__)
#define REFUSE_CONFIG(builder, ...) fail((builder)->error, (builder)->error_size, "tokenizer_config.json: " __VA_ARGS__)

static bool fail_build_memory(const Builder *builder) {
    return fail(builder->error, builder->error_size, "tokenizer.json: out of memory");
}

static bool is_absent(const json_t *value) { return !value || json_is_null(value); }

static const char *describe_type(const json_t *value) {
    if (!value) return "nothing";
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: case JSON_REAL: return "a number";
    case JSON_TRUE: return "true";
    case JSON_FALSE: return "false";
    default: return "null";
    }
}

static bool parse_file(const Builder *builder, const char *name, const char *text, size_t bytes, json_t **json) {
    json_error_t where;
    *json = json_loadb(text ? text : "", bytes, JSON_REJECT_DUPLICATES, &where);
    if (!*json)
        return fail(builder->error, builder->error_size, "%s: line %d, column %d: %s", name, where.line, where.column,
                    where.text);
    if (!json_is_object(*json))
        return fail(builder->error, builder->error_size, "%s: expected an object, got %s", name, describe_type(*json));
    return true;
}

// ---- vocabulary

// Real bytes of a token spelled in the byte-level alphabet, where printable bytes stand for themselves and the 68 others
// are U+0100 and up, in order. Writes at most `bytes` bytes; false where a character is not of the alphabet.
static bool decode_alphabet(const char *text, size_t bytes, uint8_t *out, size_t *count) {
    *count = 0;
    for (size_t i = 0; i < bytes;) {
        utf8proc_int32_t character;
        utf8proc_ssize_t length = utf8proc_iterate((const uint8_t *)text + i, (utf8proc_ssize_t)(bytes - i), &character);
        if (length < 1) return false;
        i += (size_t)length;
        if ((character >= 33 && character <= 126) || (character >= 161 && character <= 172) ||
            (character >= 174 && character <= 255)) out[(*count)++] = (uint8_t)character;
        else if (character >= 256 && character < 256 + 33) out[(*count)++] = (uint8_t)(character - 256);
        else if (character >= 256 + 33 && character < 256 + 67) out[(*count)++] = (uint8_t)(character - 256 - 33 + 127);
        else if (character == 256 + 67) out[(*count)++] = 173;
        else return false;
    }
    return true;
}

// Makes the table of tokens long enough for an id that tokenizer.json gives to the token `text` under `key`.
static bool reserve_id(Builder *builder, const char *key, const char *text, const json_t *value, uint32_t *id) {
    if (!json_is_integer(value))
        return REFUSE(builder, "%s: the id of \"%.80s\" is %s, expected an integer", key, text, describe_type(value));
    json_int_t number = json_integer_value(value), rows = builder->source->vocab_size;
    if (number < 0 || number >= MAX_TOKENS)
        return REFUSE(builder, "%s: \"%.80s\" has id %" JSON_INTEGER_FORMAT ", expected 0 to %u", key, text, number,
                      MAX_TOKENS - 1);
    if (rows && number >= rows)
        return REFUSE(builder, "%s: \"%.80s\" has id %" JSON_INTEGER_FORMAT ", but the embedding has %" JSON_INTEGER_FORMAT
                      " rows", key, text, number, rows);
    *id = (uint32_t)number;
    if (*id >= builder->capacity) {
        uint32_t capacity = *id + 1 > builder->capacity * 2 ? *id + 1 : builder->capacity * 2;
        SourceToken *tokens = realloc(builder->tokens, capacity * sizeof *tokens);
        if (!tokens) return fail_build_memory(builder);
        memset(tokens + builder->capacity, 0, (capacity - builder->capacity) * sizeof *tokens);
        builder->tokens = tokens, builder->capacity = capacity;
    }
    if (*id >= builder->token_count) builder->token_count = *id + 1;
    return true;
}

static bool read_vocabulary(Builder *builder, const json_t *model) {
    builder->vocab = json_object_get(model, "vocab");
    if (!json_is_object(builder->vocab))
        return REFUSE(builder, "model.vocab: expected an object, got %s", describe_type(builder->vocab));
    const char *text;
    json_t *value;
    json_object_foreach((json_t *)builder->vocab, text, value) {
        uint32_t id;
        if (!reserve_id(builder, "model.vocab", text, value, &id)) return false;
        SourceToken *token = &builder->tokens[id];
        if (token->text)
            return REFUSE(builder, "model.vocab: id %u is both \"%.80s\" and \"%.80s\"", id, token->text, text);
        *token = (SourceToken){text, strlen(text), TOKEN_PRESENT | TOKEN_WORD};
    }
    return true;
}

static bool is_nfc(const char *text, size_t bytes, bool *memory) {
    Bytes normal = {0};
    *memory = append_nfc(&normal, (const uint8_t *)text, bytes);
    bool same = *memory && normal.count == bytes && !memcmp(normal.data, text, bytes);
    free(normal.data);
    return same;
}

static bool read_added_tokens(Builder *builder) {
    const json_t *list = json_object_get(builder->json, "added_tokens");
    if (is_absent(list)) return true;
    if (!json_is_array(list)) return REFUSE(builder, "added_tokens: expected an array, got %s", describe_type(list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *entry = json_array_get(list, i), *content = json_object_get(entry, "content");
        if (!json_is_string(content) || !json_string_length(content) || json_string_length(content) > MAX_ADDED_BYTES)
            return REFUSE(builder, "added_tokens[%zu].content: expected a string of 1 to %u bytes, got %s (%zu bytes)", i,
                          MAX_ADDED_BYTES, describe_type(content), json_string_length(content));
        const char *text = json_string_value(content);
        size_t bytes = json_string_length(content);
        static const char *const unsupported[] = {"single_word", "lstrip", "rstrip"};
        for (size_t j = 0; j < 3; j++)
            if (json_is_true(json_object_get(entry, unsupported[j])))
                return REFUSE(builder, "added_tokens[%zu]: \"%.80s\" has %s true, which is not supported", i, text,
                              unsupported[j]);
        uint32_t id;
        if (!reserve_id(builder, "added_tokens", text, json_object_get(entry, "id"), &id)) return false;
        const json_t *same = json_object_get(builder->vocab, text);
        SourceToken *token = &builder->tokens[id];
        if (same && json_integer_value(same) != id)
            return REFUSE(builder, "added_tokens[%zu]: \"%.80s\" has id %u, but %" JSON_INTEGER_FORMAT " in model.vocab", i,
                          text, id, json_integer_value(same));
        if (token->flags & TOKEN_ADDED || (token->text && !same))
            return REFUSE(builder, "added_tokens[%zu]: id %u is both \"%.80s\" and \"%.80s\"", i, id, token->text, text);
        *token = (SourceToken){text, bytes, (uint8_t)(token->flags | TOKEN_PRESENT | TOKEN_ADDED)};
        if (json_is_true(json_object_get(entry, "special"))) token->flags |= TOKEN_SPECIAL;
        if (!json_is_true(json_object_get(entry, "normalized"))) continue;
        token->flags |= TOKEN_NORMALIZED;
        bool memory;
        if (builder->flags & SECTION_NFC && !is_nfc(text, bytes, &memory))
            return memory ? REFUSE(builder, "added_tokens[%zu]: \"%.80s\" is normalized, but its content is not in NFC", i,
                                   text)
                          : fail_build_memory(builder);
    }
    return true;
}

// The id of a token of the vocabulary, or TOKEN_NONE.
static uint32_t find_vocab(const Builder *builder, const char *text) {
    const json_t *value = json_object_get(builder->vocab, text);
    return value ? (uint32_t)json_integer_value(value) : TOKEN_NONE;
}

// The id of a token by its content, added tokens first, or TOKEN_NONE.
static uint32_t find_content(const Builder *builder, const char *text) {
    size_t bytes = strlen(text);
    for (uint32_t id = 0; id < builder->token_count; id++) {
        const SourceToken *token = &builder->tokens[id];
        if (token->flags & TOKEN_ADDED && token->bytes == bytes && !memcmp(token->text, text, bytes)) return id;
    }
    return find_vocab(builder, text);
}

// ---- merges

static bool read_merges(Builder *builder, const json_t *model) {
    const json_t *list = json_object_get(model, "merges");
    if (!json_is_array(list)) return REFUSE(builder, "model.merges: expected an array, got %s", describe_type(list));
    Bytes buffer = {0};                       // the left token, a zero byte, both tokens joined, a zero byte
    bool fine = true;
    for (size_t i = 0; i < json_array_size(list) && fine; i++) {
        const json_t *entry = json_array_get(list, i);
        const char *left = NULL, *right = NULL;
        size_t left_bytes = 0;
        if (json_is_string(entry)) {
            const char *text = json_string_value(entry), *space = strchr(text, ' ');
            if (!strncmp(text, "#version", 8)) continue;  // a line that old files carry over from merges.txt
            if (space && !strchr(space + 1, ' ')) left = text, left_bytes = (size_t)(space - text), right = space + 1;
        } else if (json_is_array(entry) && json_array_size(entry) == 2) {
            left = json_string_value(json_array_get(entry, 0)), right = json_string_value(json_array_get(entry, 1));
            left_bytes = left ? strlen(left) : 0;
        }
        if (!left || !right) {
            fine = REFUSE(builder, "model.merges[%zu]: expected \"left right\" or [\"left\", \"right\"]", i);
            break;
        }
        buffer.count = 0;
        if (!append_bytes(&buffer, left, left_bytes) || !append_bytes(&buffer, "", 1) ||
            !append_bytes(&buffer, left, left_bytes) || !append_bytes(&buffer, right, strlen(right) + 1)) {
            fine = fail_build_memory(builder);
            break;
        }
        const char *parts[3] = {(char *)buffer.data, right, (char *)buffer.data + left_bytes + 1};
        for (size_t part = 0; part < 3 && fine; part++) {
            uint32_t id = find_vocab(builder, parts[part]);
            if (id == TOKEN_NONE)
                fine = REFUSE(builder, "model.merges[%zu] of \"%.80s\" and \"%.80s\": \"%.80s\" is not in model.vocab", i,
                              parts[0], right, parts[part]);
            else if (!append_u32(&builder->merges, id)) fine = fail_build_memory(builder);
        }
        builder->merge_count++;
    }
    free(buffer.data);
    return fine;
}

// ---- regexes

// White space as the library's regex engine has it: PCRE2 would add U+180E.
#define SPACES "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
// All the rest, for \S inside a class.
#define NO_SPACES "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}" \
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"

static bool append_text(Bytes *bytes, const char *text) { return append_bytes(bytes, text, strlen(text)); }

// Appends a regex of tokenizer.json as PCRE2 must read it: \s and \S are written out; what the two engines take
// differently is refused.
static bool translate_regex(Builder *builder, const char *regex, Bytes *out) {
    bool in_class = false;
    for (const char *at = regex; *at;) {
        const char *unclear = NULL;
        size_t length = 1;                    // of what is copied as it stands
        if (*at == '\\' && (at[1] == 's' || at[1] == 'S')) {
            const char *open = in_class ? "" : at[1] == 's' ? "[" : "[^", *close = in_class ? "" : "]";
            if (!append_text(out, open) || !append_text(out, in_class && at[1] == 'S' ? NO_SPACES : SPACES) ||
                !append_text(out, close)) return fail_build_memory(builder);
            at += 2;
            continue;
        }
        if (*at == '\\' && at[1]) {
            length = 2;
            if (at[1] == 'h' || at[1] == 'H') unclear = "\\h";        // a hexadecimal digit there, white space in PCRE2
        } else if (!in_class && *at == '[') {
            in_class = true;
            if (at[1] == '^') length = 2;
            if (at[length] == ']') length++;              // a first ] is a character
        } else if (in_class && *at == '[') {
            const char *end = at[1] == ':' ? strstr(at + 2, ":]") : NULL;
            if (end) length = (size_t)(end + 2 - at);
            else unclear = "a class in a class";
        } else if (in_class && *at == '&' && at[1] == '&') unclear = "&& in a class";
        else if (!in_class && at[0] == '(' && at[1] == '?') {
            length = 2 + strspn(at + 2, "abcdefghijklmnopqrstuvwxyz-");
            if (memchr(at, 'm', length)) unclear = "(?m";             // . matches \n there, ^ and $ at lines in PCRE2
        }
        else if (in_class && *at == ']') in_class = false;
        if (unclear)
            return REFUSE(builder, "pre_tokenizer: the regex \"%.200s\" has %s, which is not supported", regex, unclear);
        if (!append_bytes(out, at, length)) return fail_build_memory(builder);
        at += length;
    }
    return true;
}

static bool add_split(Builder *builder, const char *regex) {
    if (builder->split_count == MAX_SPLITS) return REFUSE(builder, "pre_tokenizer: more than %d regexes", MAX_SPLITS);
    Bytes split = {0};
    bool fine = translate_regex(builder, regex, &split);
    if (fine && split.count > MAX_REGEX_BYTES)
        fine = REFUSE(builder, "pre_tokenizer: a regex of more than %d bytes", MAX_REGEX_BYTES);
    else if (fine && (!append_u32(&builder->splits, (uint32_t)split.count) ||
                      !append_bytes(&builder->splits, split.data, split.count))) fine = fail_build_memory(builder);
    free(split.data);
    builder->split_count++;
    return fine;
}

// ---- normalizer and pre-tokenizer

#define MAX_NESTING 16            // of Sequences

static bool read_normalizer(Builder *builder, const json_t *normalizer, unsigned depth) {
    if (is_absent(normalizer)) return true;
    const char *type = json_string_value(json_object_get(normalizer, "type"));
    if (type && !strcmp(type, "NFC")) {
        builder->flags |= SECTION_NFC;
        return true;
    }
    const json_t *list = json_object_get(normalizer, "normalizers");
    if (!type || strcmp(type, "Sequence") || !json_is_array(list) || depth == MAX_NESTING)
        return REFUSE(builder, "normalizer: \"%.80s\" is not supported (NFC, none, or a Sequence of these)",
                      type ? type : describe_type(normalizer));
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!read_normalizer(builder, json_array_get(list, i), depth + 1)) return false;
    return true;
}

static bool read_pre_tokenizer(Builder *builder, const json_t *pre_tokenizer, unsigned depth) {
    const char *type = json_string_value(json_object_get(pre_tokenizer, "type"));
    if (!type)
        return REFUSE(builder, "pre_tokenizer: expected an object with a type, got %s", describe_type(pre_tokenizer));
    if (builder->byte_level) return REFUSE(builder, "pre_tokenizer: \"%.80s\" behind ByteLevel is not supported", type);
    if (!strcmp(type, "Sequence") && depth < MAX_NESTING) {
        const json_t *list = json_object_get(pre_tokenizer, "pretokenizers");
        if (!json_is_array(list))
            return REFUSE(builder, "pre_tokenizer.pretokenizers: expected an array, got %s", describe_type(list));
        for (size_t i = 0; i < json_array_size(list); i++)
            if (!read_pre_tokenizer(builder, json_array_get(list, i), depth + 1)) return false;
        return true;
    }
    if (!strcmp(type, "Split")) {
        const json_t *pattern = json_object_get(json_object_get(pre_tokenizer, "pattern"), "Regex");
        const char *behavior = json_string_value(json_object_get(pre_tokenizer, "behavior"));
        const json_t *invert = json_object_get(pre_tokenizer, "invert");
        if (!json_is_string(pattern))
            return REFUSE(builder, "pre_tokenizer: Split.pattern.Regex: expected a string, got %s", describe_type(pattern));
        if (!behavior || strcmp(behavior, "Isolated"))
            return REFUSE(builder, "pre_tokenizer: Split.behavior: expected \"Isolated\", got \"%.80s\"",
                          behavior ? behavior : "");
        if (!is_absent(invert) && !json_is_false(invert))
            return REFUSE(builder, "pre_tokenizer: Split.invert: expected false, got %s", describe_type(invert));
        return add_split(builder, json_string_value(pattern));
    }
    if (!strcmp(type, "Digits"))
        return add_split(builder, json_is_true(json_object_get(pre_tokenizer, "individual_digits")) ? "\\p{N}" : "\\p{N}+");
    if (!strcmp(type, "ByteLevel")) {
        const json_t *space = json_object_get(pre_tokenizer, "add_prefix_space");
        if (!json_is_false(space))
            return REFUSE(builder, "pre_tokenizer: ByteLevel.add_prefix_space: expected false, got %s",
                          describe_type(space));
        builder->byte_level = true;
        // use_regex is true where it is absent; the regex is GPT-2's.
        return json_is_false(json_object_get(pre_tokenizer, "use_regex")) ||
               add_split(builder, "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    }
    return REFUSE(builder, "pre_tokenizer: \"%.80s\" is not supported (Sequence, Split, Digits, ByteLevel)", type);
}

static bool read_decoder(Builder *builder) {
    const json_t *decoder = json_object_get(builder->json, "decoder");
    const char *type = json_string_value(json_object_get(decoder, "type"));
    if (is_absent(decoder) || (type && !strcmp(type, "ByteLevel"))) return true;
    return REFUSE(builder, "decoder: expected ByteLevel, got \"%.80s\"", type ? type : describe_type(decoder));
}

static bool read_model(Builder *builder) {
    const json_t *model = json_object_get(builder->json, "model"), *value;
    if (!json_is_object(model)) return REFUSE(builder, "model: expected an object, got %s", describe_type(model));
    value = json_object_get(model, "type");
    if (!is_absent(value) && (!json_is_string(value) || strcmp(json_string_value(value), "BPE")))
        return REFUSE(builder, "model.type: expected BPE, got \"%.80s\"",
                      json_is_string(value) ? json_string_value(value) : describe_type(value));
    value = json_object_get(model, "dropout");
    if (!is_absent(value) && !(json_is_number(value) && json_number_value(value) == 0))
        return REFUSE(builder, "model.dropout: expected null or 0, got %s", describe_type(value));
    static const char *const empty[] = {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < 3; i++) {
        value = json_object_get(model, empty[i]);
        if (is_absent(value) || (i && json_is_string(value) && !json_string_length(value))) continue;
        return REFUSE(builder, "model.%s: expected null%s, got \"%.80s\"", empty[i], i ? " or \"\"" : "",
                      json_is_string(value) ? json_string_value(value) : describe_type(value));
    }
    value = json_object_get(model, "byte_fallback");
    if (!is_absent(value) && !json_is_false(value))
        return REFUSE(builder, "model.byte_fallback: expected false, got %s", describe_type(value));
    if (json_is_true(json_object_get(model, "ignore_merges"))) builder->flags |= SECTION_IGNORE_MERGES;
    return read_vocabulary(builder, model) && read_merges(builder, model);
}

// ---- tokenizer_config.json

// Whether a post_processor, or one in its Sequence, puts the token bos in front of a text.
static bool prepends(const json_t *processor, const char *bos, unsigned depth) {
    const json_t *list = json_object_get(processor, "processors");
    for (size_t i = 0; i < json_array_size(list) && depth < MAX_NESTING; i++)
        if (prepends(json_array_get(list, i), bos, depth + 1)) return true;
    const json_t *first = json_array_get(json_object_get(processor, "single"), 0);
    const char *id = json_string_value(json_object_get(json_object_get(first, "SpecialToken"), "id"));
    return id && !strcmp(id, bos);
}

// The id of config's bos_token or eos_token, a string or an object with a content; TOKEN_NONE where there is none.
static bool read_config_token(Builder *builder, const char *key, const char **text, uint32_t *id) {
    const json_t *value = json_object_get(builder->config, key);
    *id = TOKEN_NONE;
    *text = NULL;
    if (is_absent(value)) return true;
    if (json_is_object(value)) value = json_object_get(value, "content");
    if (!json_is_string(value))
        return REFUSE_CONFIG(builder, "%s: expected a string, got %s", key, describe_type(value));
    *text = json_string_value(value);
    *id = find_content(builder, *text);
    if (*id != TOKEN_NONE) return true;
    return REFUSE_CONFIG(builder, "%s: \"%.80s\" is not in tokenizer.json", key, *text);
}

static bool add_stop(Builder *builder, uint32_t id) {
    for (uint32_t i = 0; i < builder->stop_count; i++)
        if (read_u32(builder->stops.data + (size_t)i * 4) == id) return true;
    if (!append_u32(&builder->stops, id)) return fail_build_memory(builder);
    builder->stop_count++;
    return true;
}

// The end of the last ASSISTANT_TEXT in a text, or NULL.
static const char *skip_assistant(const char *text, size_t bytes) {
    const size_t length = sizeof ASSISTANT_TEXT - 1;
    for (size_t end = bytes; end >= length; end--)
        if (!memcmp(text + end - length, ASSISTANT_TEXT, length)) return text + end;
    return NULL;
}

// Reads the Jinja string literal at text[at] (a quote) into out, escapes resolved; returns the place behind it.
static size_t read_literal(const char *text, size_t bytes, size_t at, Bytes *out, bool *memory) {
    char quote = text[at++];
    out->count = 0;
    for (; at < bytes && text[at] != quote; at++) {
        char escaped = text[at] == '\\' && at + 1 < bytes ? text[at + 1] : 0, plain;
        switch (escaped) {
        case 'n': plain = '\n'; break;
        case 't': plain = '\t'; break;
        case 'r': plain = '\r'; break;
        case '\\': case '\'': case '"': plain = escaped; break;
        default: plain = text[at], escaped = 0;
        }
        if (escaped) at++;
        if (!append_bytes(out, &plain, 1)) *memory = false;
    }
    return at < bytes ? at + 1 : bytes;
}

static bool starts_tag(const char *text, size_t bytes) {
    return bytes >= 2 && text[0] == '{' && (text[1] == '{' || text[1] == '%' || text[1] == '#');
}

// Where text between Jinja's tags ends when it is rendered as transformers does it (lstrip_blocks): it is text[start ..
// end), and a tag stands behind it.
static size_t trim_data(const char *text, size_t start, size_t end, size_t bytes) {
    if (bytes - end < 3) return end;
    if (text[end + 2] == '-') {
        while (end > start && strchr(" \t\r\n", text[end - 1])) end--;
        return end;
    }
    size_t blank = end;
    if (text[end + 1] != '{' && text[end + 2] != '+')
        while (blank > start && strchr(" \t", text[blank - 1])) blank--;
    return blank > start && text[blank - 1] == '\n' ? blank : end;
}

// The generation prefix: what follows the last ASSISTANT_TEXT of a chat template, to the end of the string literal that
// holds it (and of literals joined to it by + or ~), or of the plain text between two tags.
static bool read_prefix(Builder *builder, const char *template, size_t bytes) {
    Bytes literal = {0}, *prefix = &builder->prefix;
    bool memory = true;
    for (size_t at = 0; at < bytes && memory;) {
        size_t start = at;
        while (at < bytes && !starts_tag(template + at, bytes - at)) at++;
        size_t end = at < bytes ? trim_data(template, start, at, bytes) : at;
        const char *found = skip_assistant(template + start, end - start);
        if (found) {
            prefix->count = 0;
            memory = append_bytes(prefix, found, (size_t)(template + end - found));
        }
        if (at == bytes) break;
        char close = template[at + 1] == '{' ? '}' : template[at + 1];
        bool open = false, joined = false;    // the prefix may go on; a + or ~ stands before what comes
        for (at += 2; at < bytes && memory;) {
            char character = template[at];
            if (character == close && at + 1 < bytes && template[at + 1] == '}') break;
            if (close == '#' || (character != '"' && character != '\'')) {
                if (open && !joined && (character == '+' || character == '~')) joined = true;
                else if (!strchr(" \t\r\n", character)) open = false;
                at++;
                continue;
            }
            at = read_literal(template, bytes, at, &literal, &memory);
            found = literal.count ? skip_assistant((char *)literal.data, literal.count) : NULL;
            if (found) {
                prefix->count = 0;
                memory = memory && append_bytes(prefix, found, (size_t)((char *)literal.data + literal.count - found));
            } else if (open && joined) memory = memory && append_bytes(prefix, literal.data, literal.count);
            open = found || (open && joined);
            joined = false;
        }
        at = bytes - at < 2 ? bytes : at + 2;
        if (at < bytes && template[at] == '\n' && close != '}') at++;         // trim_blocks: a newline behind a block
    }
    free(literal.data);
    return memory || fail_build_memory(builder);
}

// The template of tokenizer_config.json: a string, or the one named "default" in a list; NULL where there is none.
static const json_t *find_template(const json_t *config) {
    const json_t *value = json_object_get(config, "chat_template");
    if (json_is_string(value)) return value;
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name && !strcmp(name, "default")) return json_object_get(entry, "template");
    }
    return NULL;
}

static bool read_config(Builder *builder) {
    const TokenizerSource *source = builder->source;
    const char *bos, *eos;
    static const char *const contents[ID_COUNT] = {
        [ID_USER] = "<｜User｜>", [ID_ASSISTANT] = ASSISTANT_TEXT, [ID_END_OF_TURN] = "<｜end▁of▁sentence｜>",
        [ID_THINK] = "<think>", [ID_END_THINK] = "</think>",
    };
    for (size_t i = 0; i < ID_COUNT; i++) builder->ids[i] = contents[i] ? find_content(builder, contents[i]) : TOKEN_NONE;
    if (!read_config_token(builder, "bos_token", &bos, &builder->ids[ID_BOS]) ||
        !read_config_token(builder, "eos_token", &eos, &builder->ids[ID_EOS])) return false;

    const json_t *add_bos = json_object_get(builder->config, "add_bos_token");
    if (!is_absent(add_bos) && !json_is_boolean(add_bos))
        return REFUSE_CONFIG(builder, "add_bos_token: expected true or false, got %s", describe_type(add_bos));
    if (bos && (is_absent(add_bos) ? prepends(json_object_get(builder->json, "post_processor"), bos, 0)
                                   : json_is_true(add_bos))) builder->flags |= SECTION_ADD_BOS;

    if (builder->ids[ID_EOS] != TOKEN_NONE && !add_stop(builder, builder->ids[ID_EOS])) return false;
    for (size_t i = 0; i < source->stop_count; i++) {
        // An id that the embedding has no row for is never generated (small test models keep a large model's eos).
        if (source->vocab_size && source->stops[i] >= source->vocab_size) continue;
        if (!add_stop(builder, source->stops[i])) return false;
    }

    if (builder->ids[ID_ASSISTANT] == TOKEN_NONE) return true;
    if (source->chat_template) return read_prefix(builder, source->chat_template, source->chat_template_bytes);
    const json_t *template = find_template(builder->config);
    return !json_is_string(template) || read_prefix(builder, json_string_value(template), json_string_length(template));
}

// ---- the section

static bool write_section(Builder *builder, Bytes *section) {
    size_t total = 0;
    for (uint32_t id = 0; id < builder->token_count; id++) total += builder->tokens[id].bytes;
    if (total > UINT32_MAX || builder->splits.count > UINT32_MAX || builder->prefix.count > UINT32_MAX)
        return REFUSE(builder, "more than 4 GiB of tokens");
    Bytes pieces = {0}, flags = {0}, starts = {0};
    const char *clash = NULL;                 // an added token that model.vocab has for other bytes
    bool fine = reserve_bytes(&pieces, total + 1) && append_u32(&starts, 0);
    for (uint32_t id = 0; id < builder->token_count && fine; id++) {
        const SourceToken *token = &builder->tokens[id];
        uint8_t flag = token->flags, *out = pieces.data + pieces.count;
        if (token->text) {
            size_t bytes;
            if (!decode_alphabet(token->text, token->bytes, out, &bytes)) {
                // The special tokens in some vocabularies: they stand for their text and are never found by their bytes.
                memcpy(out, token->text, bytes = token->bytes);
                flag &= (uint8_t)~TOKEN_WORD;
            } else if (flag & TOKEN_ADDED) {              // the content is the token, whatever it spells
                bool same = bytes == token->bytes && !memcmp(out, token->text, bytes);
                if (flag & TOKEN_WORD && !same) clash = token->text;
                memcpy(out, token->text, bytes = token->bytes);
            }
            pieces.count += bytes;
        }
        fine = append_bytes(&flags, &flag, 1) && append_u32(&starts, (uint32_t)pieces.count);
    }
    const uint32_t header[] = {builder->token_count, builder->merge_count, builder->split_count, builder->stop_count,
                               (uint32_t)pieces.count, (uint32_t)builder->splits.count, (uint32_t)builder->prefix.count,
                               builder->flags};
    for (size_t i = 0; i < sizeof header / sizeof *header; i++) fine = fine && append_u32(section, header[i]);
    for (size_t i = 0; i < ID_COUNT; i++) fine = fine && append_u32(section, builder->ids[i]);
    fine = fine && append_u32(section, 0);
    const Bytes *const areas[] = {&starts, &builder->merges, &builder->stops, &flags, &pieces, &builder->splits,
                                  &builder->prefix};
    for (size_t i = 0; i < sizeof areas / sizeof *areas; i++)
        fine = fine && append_bytes(section, areas[i]->data, areas[i]->count);
    free(pieces.data);
    free(flags.data);
    free(starts.data);
    if (clash)
        return REFUSE(builder, "added_tokens: \"%.80s\" is also in model.vocab, where it stands for other bytes", clash);
    return fine || fail_build_memory(builder);
}

static bool build_section(Builder *builder, Bytes *section) {
    const TokenizerSource *source = builder->source;
    if (!parse_file(builder, "tokenizer.json", source->tokenizer_json, source->tokenizer_json_bytes, &builder->json) ||
        !parse_file(builder, "tokenizer_config.json", source->tokenizer_config_json, source->tokenizer_config_json_bytes,
                    &builder->config) ||
        !read_normalizer(builder, json_object_get(builder->json, "normalizer"), 0) ||
        !read_pre_tokenizer(builder, json_object_get(builder->json, "pre_tokenizer"), 0)) return false;
    if (!builder->byte_level) return REFUSE(builder, "pre_tokenizer: expected a ByteLevel at its end");
    if (!read_decoder(builder) || !read_model(builder) || !read_added_tokens(builder) || !read_config(builder) ||
        !write_section(builder, section)) return false;

    // The section must load: this compiles the regexes and encodes the prefix.
    char reason[400];
    Tokenizer *tokenizer = tokenizer_load(section->data, section->count, reason, sizeof reason);
    tokenizer_free(tokenizer);
    return tokenizer || fail(builder->error, builder->error_size, "tokenizer.json: %s", reason + strlen("tokenizer: "));
}

bool tokenizer_build(const TokenizerSource *source, uint8_t **section, size_t *bytes, char *error, size_t error_size) {
    Builder builder = {.source = source, .error = error, .error_size = error_size};
    Bytes result = {0};
    bool fine = build_section(&builder, &result);
    json_decref(builder.json);
    json_decref(builder.config);
    free(builder.tokens);
    free(builder.merges.data);
    free(builder.splits.data);
    free(builder.stops.data);
    free(builder.prefix.data);
    if (fine) *section = result.data, *bytes = result.count;
    else free(result.data);
    return fine;
}
