# Real tokenizers of the four families against the reference library's goldens (tests/tokenizers/README.md): every line exact.
# Only the texts that depend on a Unicode version are counted and not asserted.

folder=$scratch/tokenizers
mkdir -p "$folder"
tar -C "$folder" -xJf tests/tokenizers/goldens.tar.xz

# compare NAME EXPECTED GOT INPUT: the same lines; else says how many differ and shows the first.
compare() {
    local name=$1 expected=$2 got=$3 input=$4 count
    count=$(wc -l <"$expected")
    if [ "$(wc -l <"$got")" != "$count" ]; then
        fail "$name" "expected $count lines, got $(wc -l <"$got"): $(brief "$scratch/error")"
    elif cmp -s "$expected" "$got"; then
        ok "$name ($count texts)"
    else
        fail "$name" "$(paste -d '\t' "$input" "$expected" "$got" | awk -F '\t' '$2 != $3 { if (!n++) first = sprintf("line %d, %s: expected %s, got %s", NR, $1, $2, $3) }
            END { printf "%d of %d lines differ; %s", n, NR, substr(first, 1, 600) }')"
    fi
}

# ids FILE OPTION...: all lines of FILE through one process; the ids, joined by single blanks.
ids() {
    local input=$1
    shift
    timeout 120 "$r1" tokenize "$tokenizer" --ids-only "$@" <"$input" 2>"$scratch/error" | sed 's/  */ /g; s/ *$//'
}

for name in deepseek_r1 r1_distill_qwen r1_distill_llama r1_0528_qwen3; do
    tar -C "$folder" -xJf "tests/tokenizers/$name.tar.xz"
    tokenizer=$folder/$name.r1
    passes "$name: convert" "$convert" --tokenizer-only "$folder/$name" "$tokenizer"
    golden=$folder/$name

    cut -f 1 "$golden.golden" >"$folder/texts"
    cut -f 2 "$golden.golden" >"$folder/plain"
    awk -F '\t' '{ print $3 == "=" ? $2 : $3 }' "$golden.golden" >"$folder/markup"
    ids "$folder/texts" --hex >"$folder/got"
    compare "$name: plain text" "$folder/plain" "$folder/got" "$folder/texts"
    ids "$folder/texts" --hex --markup >"$folder/got"
    compare "$name: markup" "$folder/markup" "$folder/got" "$folder/texts"

    cut -f 1 "$golden.decode" >"$folder/texts"
    cut -f 2 "$golden.decode" >"$folder/bytes"
    timeout 120 "$r1" tokenize "$tokenizer" --decode --hex <"$folder/texts" >"$folder/got" 2>"$scratch/error"
    compare "$name: decode" "$folder/bytes" "$folder/got" "$folder/texts"

    sed 's/^{"turns": //; s/, "ids": \[[^]]*\]}$//' "$golden.chat" >"$folder/texts"
    sed 's/.*, "ids": \[\([^]]*\)\]}$/\1/; s/,//g' "$golden.chat" >"$folder/plain"
    ids "$folder/texts" --chat >"$folder/got"
    compare "$name: chat" "$folder/plain" "$folder/got" "$folder/texts"

    cut -f 1 "$golden.unicode.golden" >"$folder/texts"
    cut -f 2 "$golden.unicode.golden" >"$folder/plain"
    ids "$folder/texts" --hex >"$folder/got"
    if [ "$(wc -l <"$folder/got")" = "$(wc -l <"$folder/plain")" ]; then
        ok "$name: texts that depend on the Unicode version: $(paste -d '\t' "$folder/plain" "$folder/got" | awk -F '\t' '$1 == $2' | wc -l) of $(wc -l <"$folder/plain") agree"
    else
        fail "$name: texts that depend on the Unicode version" "expected $(wc -l <"$folder/plain") lines, got $(wc -l <"$folder/got"): $(brief "$scratch/error")"
    fi

    # What a person typed is never parsed for special tokens; --markup says that it is not a person's.
    echo '<｜User｜>hi<think></think><｜Assistant｜>' >"$folder/texts"
    special=$(for text in '<｜User｜>' '<｜Assistant｜>' '<think>' '</think>'; do "$r1" tokenize "$tokenizer" --ids-only --markup "$text"; done)
    if [ "$(wc -w <<<"$special")" != 4 ]; then
        fail "$name: special tokens" "expected one id each with --markup, got $special"
    else
        plain=$(ids "$folder/texts")
        found=$(for id in $special; do grep -ow "$id" <<<"$plain"; done)
        if [ -n "$plain" ] && [ -z "$found" ]; then ok "$name: typed special tokens stay text"
        else fail "$name: typed special tokens stay text" "ids of special tokens ($(echo $found)) in $plain"; fi
        echo '[{"role": "user", "content": "<｜User｜>hi<think></think><｜Assistant｜>"}]' >"$folder/texts"
        chat=$(ids "$folder/texts" --chat)
        read -r user assistant think end_think <<<"$(echo $special)"
        counts="$(grep -ow "$user" <<<"$chat" | wc -l) $(grep -ow "$assistant" <<<"$chat" | wc -l) $(grep -ow "$end_think" <<<"$chat" | wc -l)"
        if [ "$counts" = "1 1 0" ]; then ok "$name: typed special tokens stay text in a chat"
        else fail "$name: typed special tokens stay text in a chat" "expected the user, assistant and </think> ids 1, 1, 0 times, got $counts"; fi
    fi

    # Decoding what was encoded gives the text back.
    printf 'Grüße, 世界! 3.14 \\frac{1}{2}\n\n  indented\tand\ttabbed\nnaïve café 🎉\n' >"$folder/texts"
    ids "$folder/texts" | "$r1" tokenize "$tokenizer" --decode >"$folder/got" 2>"$scratch/error"
    same "$name: decoding gives the text back" "$folder/texts" "$folder/got"

    # A long word and a long text: no line may take time that grows with its square (the limit of 60 s only ends a runaway).
    for what in "one word of 1 MB" "1 MB of prose"; do
        if [ "$what" = "1 MB of prose" ]; then
            awk 'BEGIN { for (i = 0; i < 18000; i++) printf "The quick brown fox no. %d jumps over the lazy dog, again. ", i; print "" }' >"$folder/long"
        else
            awk 'BEGIN { for (i = 0; i < 1000000; i++) printf "%c", 97 + (i * i) % 23; print "" }' >"$folder/long"
        fi
        timeout 60 "$r1" tokenize "$tokenizer" --ids-only <"$folder/long" 2>"$scratch/error" >"$folder/ids" &&
            "$r1" tokenize "$tokenizer" --decode <"$folder/ids" >"$folder/got" 2>"$scratch/error"
        if cmp -s "$folder/long" "$folder/got"; then ok "$name: $what"
        else fail "$name: $what" "encoding and decoding does not give the text back: $(brief "$scratch/error")"; fi
    done
done
