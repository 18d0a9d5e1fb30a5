#!/usr/bin/env bash
# seeds.sh DIR: makes DIR/TARGET for every fuzz target, filled from the tests' own files. Needs r1-convert.
set -eu
cd "$(dirname "$0")/../.."
seeds=$1
mkdir -p "$seeds"/{model,safetensors,tokenizer_json,tokenizer_section,tokenizer_text}

# The metadata of a model: up to the end of its tensor table (byte 32: where it starts; byte 40: entries of 168 bytes).
for folder in tests/oracles/*/; do
    name=$(basename "$folder")
    ./r1-convert "$folder" "$seeds/whole.r1" --type q4 --layers 2 --force >/dev/null 2>&1
    number() { od -An "-tu$2" -j"$1" "-N$2" "$seeds/whole.r1" | tr -d ' '; }
    head -c $(($(number 32 8) + $(number 40 4) * 168)) "$seeds/whole.r1" >"$seeds/model/$name"
    tail -c +$(($(number 16 8) + 1)) "$seeds/whole.r1" | head -c "$(number 24 8)" >"$seeds/tokenizer_section/$name"
done
./r1-convert tests/oracles/llama_bf16 "$seeds/whole.r1" --tokenizer-only --force >/dev/null 2>&1
cp "$seeds/whole.r1" "$seeds/model/tokenizer_only"
rm "$seeds/whole.r1"

# The header of each checkpoint with a little of its data, and with shapes small enough to fit.
for file in tests/oracles/*/*.safetensors; do
    head -c 20000 "$file" >"$seeds/safetensors/$(basename "$(dirname "$file")").$(basename "$file")"
done
header='{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"BF16","shape":[2,4],"data_offsets":[0,16]},"b":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[16,24]}}'
{ printf "\\x$(printf %02x ${#header})\\0\\0\\0\\0\\0\\0\\0%s" "$header"; printf '0123456789abcdef01234567'; } >"$seeds/safetensors/small"

{ cat demo/tokenizer.json; printf '\0'; cat demo/tokenizer_config.json; } >"$seeds/tokenizer_json/demo"
{ cat tests/oracles/r1_fp8/tokenizer.json; printf '\0'; cat tests/oracles/r1_fp8/tokenizer_config.json; } >"$seeds/tokenizer_json/r1_fp8"
echo '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "ignore_merges": true}, "normalizer": {"type": "NFC"},
"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|[^\\s\\p{L}]+|(?i:'"'"'ll)"}, "behavior": "Isolated", "invert": false},
{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}, "decoder": {"type": "ByteLevel"}, "added_tokens":
[{"id": 3, "content": "<think>", "special": false, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false}]}' >"$seeds/tokenizer_json/small"

tar -xJOf tests/tokenizers/goldens.tar.xz deepseek_r1.golden | awk -F '\t' 'NR % 8 == 0 && length($1) < 600 { print $1 }' | head -n 90 |
    { n=0; while read -r hex; do n=$((n + 1)); printf "$(sed 's/../\\x&/g' <<<"$hex")" >"$seeds/tokenizer_text/$n"; done; }
printf '<｜User｜>hi<think>\xff\xfe</think><｜Assistant｜>' >"$seeds/tokenizer_text/markup"

# What fuzzing once found: a mended bug must not come back.
for target in tests/fuzz/known/*/; do cp "$target"* "$seeds/$(basename "$target")/"; done
