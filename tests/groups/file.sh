# Files that r1 must not believe: cut short, changed, or of another kind. One sentence and status 1, never a crash.

file=$scratch/file.r1
source=$(model moonlight_bf16 q8)
size=$(stat -c %s "$source")
# The preamble holds where the tensor table starts (byte 32) and how many entries it has (byte 40); an entry (struct TensorEntry)
# has 168 bytes, a name of 64 first, the offset of the data at 144.
table_offset=$(od -An -tu8 -j32 -N8 "$source" | tr -d ' ')
tensors=$(od -An -tu4 -j40 -N4 "$source" | tr -d ' ')
metadata=$((table_offset + tensors * 168))

# unsound COMMAND...: ends with status 1 and one line "r1: ..."; otherwise prints what it did.
unsound() {
    local status
    timeout 60 "$@" >"$scratch/said" 2>"$scratch/error" </dev/null
    status=$?
    [ $status = 1 ] && [ "$(wc -l <"$scratch/error")" = 1 ] && grep -q '^r1: ' "$scratch/error" && return
    echo "status $status, $(brief "$scratch/error")"
}

# ---- cut short

why= count=0
for length in 1 7 8 9 63 64 65 100 $((64 + 207)) 300 $((table_offset - 1)) "$table_offset" $((table_offset + 1)) $((metadata - 1)) \
    "$metadata" $((metadata + 1)) 4096 8192 $((size / 2)) $((size - 4097)) $((size - 1)) $(for i in $(seq 30); do echo $(((RANDOM * 32768 + RANDOM) % size)); done); do
    head -c "$length" "$source" >"$file"
    for command in inspect "run"; do
        said=$(unsound "$r1" $command "$file" $([ $command = run ] && echo hello))
        [ -n "$said" ] && why="$command of the first $length of $size bytes: $said"
        count=$((count + 1))
    done
done
if [ -z "$why" ]; then ok "cut short ($count commands)"; else fail "cut short" "$why"; fi
: >"$file"
rejects "an empty file" 1 'empty' "$r1" inspect "$file"
rm -f "$file.pipe" && mkfifo "$file.pipe"
rejects "a named pipe" 1 'regular' "$r1" inspect "$file.pipe"
{ cat "$source"; echo; } >"$file"
rejects "a byte too much" 1 'bytes' "$r1" inspect "$file"

# ---- changed

# flip FILE OFFSET: changes one byte.
flip() {
    local byte
    byte=$(od -An -tu1 -j"$2" -N1 "$1" | tr -d ' ')
    printf "\\x$(printf %02x $((byte ^ (1 + RANDOM % 255))))" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}

# All of the preamble, then anywhere in config, tokenizer and table; tests/unit.c flips every single byte.
why= count=0
for offset in $(seq 0 63) $(for i in $(seq 150); do echo $((64 + (RANDOM * 32768 + RANDOM) % (metadata - 64))); done); do
    cp "$source" "$file"
    flip "$file" "$offset"
    said=$(unsound "$r1" inspect "$file")
    [ -n "$said" ] && why="byte $offset of $metadata: $said"
    count=$((count + 1))
done
if [ -z "$why" ]; then ok "$count single bytes of the metadata changed"; else fail "a byte of the metadata changed" "$why"; fi

passes "inspect --verify of a sound file" "$r1" inspect "$source" --verify
# The first byte of some tensors.
for i in 1 2 3; do
    cp "$source" "$file"
    entry=$((table_offset + 168 * (RANDOM % tensors)))
    name=$(tail -c +$((entry + 1)) "$source" | head -c 64 | tr -d '\0')
    offset=$(od -An -tu8 -j$((entry + 144)) -N8 "$source" | tr -d ' ')
    flip "$file" "$offset"
    rejects "inspect --verify finds a changed byte of $name" 1 "${name//./\\.}" "$r1" inspect "$file" --verify
done

# ---- foreign

echo "Once upon a time there was a text file." >"$file"
rejects "a text file" 1 'not an .r1 file' "$r1" run "$file" hello
printf 'GGUF\x03\x00\x00\x00' >"$file"
head -c 1000 /dev/zero >>"$file"
rejects "a GGUF file" 1 'GGUF' "$r1" run "$file" hello
rejects "a Hugging Face folder: the message has the command to convert it" 1 'r1-convert ' "$r1" run "$oracles/llama_bf16" hello
rejects "a folder" 1 'folder|directory' "$r1" run "$scratch" hello
rejects "a file that is not there" 1 'nothing.r1.*No such file' "$r1" run "$scratch/nothing.r1" hello
rejects "a device" 1 'not a regular file' "$r1" inspect /dev/null

# A file without weights tokenizes, and says what it lacks.
"$convert" --tokenizer-only "$oracles/llama_bf16" "$scratch/tokenizer.r1" --force >/dev/null 2>&1
passes "inspect a tokenizer alone" "$r1" inspect "$scratch/tokenizer.r1"
passes "tokenize with a tokenizer alone" "$r1" tokenize "$scratch/tokenizer.r1" hello
rejects "run a tokenizer alone" 1 'weights|tokenizer' "$r1" run "$scratch/tokenizer.r1" hello
