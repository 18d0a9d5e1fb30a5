# The same bits for every number of threads, and for every chunk size from 1 to 16: for each type, dense and with experts.

# Logits of every position of 60 prompt ids and 16 greedy ones.
bits() { # MODEL IDS OPTION...
    local model=$1 ids=$2
    shift 2
    timeout 120 "$r1" logits "$model" --ids "$ids" --greedy 16 --logits all --argmax "$@" 2>"$scratch/error" || echo "status $?: $(brief "$scratch/error")"
}

for name in r1_fp8 qwen2_bf16 llama_bf16; do
    tr -s ' \n' '\n\n' <"$(prompt $name)" | grep . | head -n 60 >"$scratch/short"
    for choice in "f32 f32" "bf16 f16" "f8 f16" "q8 f16" "q8 q8" "q6 f16" "q4 f16" "q4 q8"; do
        read -r type kv <<<"$choice"
        file=$(model $name "$type")
        # Beyond 16 tokens OpenBLAS takes part, in other pieces for 20 tokens than for 60.
        for threads in 1 2 3 4; do
            for batch in 20 60; do bits "$file" "$scratch/short" --kv "$kv" -t $threads --batch $batch; done >"$scratch/threads.$threads"
        done
        why=
        grep -q '^logits 75 ' "$scratch/threads.1" || why="no logits: $(head -c 300 "$scratch/threads.1")"
        for threads in 2 3 4; do cmp -s "$scratch/threads.1" "$scratch/threads.$threads" || why="$why -t $threads differs from -t 1;"; done
        if [ -z "$why" ]; then ok "$name, $type, $kv cache: -t 1 to 4"; else fail "$name, $type, $kv cache: -t 1 to 4" "$why"; fi

        for batch in 1 2 3 5 8 16; do bits "$file" "$scratch/short" --kv "$kv" --batch $batch >"$scratch/batch.$batch"; done
        why=
        for batch in 2 3 5 8 16; do
            cmp -s "$scratch/batch.1" "$scratch/batch.$batch" || why="$why --batch $batch differs from --batch 1;"
        done
        if [ -z "$why" ]; then ok "$name, $type, $kv cache: --batch 1 to 16"; else fail "$name, $type, $kv cache: --batch 1 to 16" "$why"; fi
    done
done
