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
        # Beyond 16 tokens OpenBLAS takes part.
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

        # More tokens unpack integer weights first, of which q8 and q6 lose nothing. (MLA has another way for many tokens, whose
        # rounding moves a quant here and there.)
        case "$name $type $kv" in "qwen2_bf16 q"[86]" f16" | "llama_bf16 q"[86]" f16")
            bits "$file" "$scratch/short" --kv "$kv" --batch 60 >"$scratch/batch.60"
            what="$name, $type, $kv cache: --batch 60 against --batch 1"
            if result=$("$build/tests/compare_golden" "$scratch/batch.1" "$scratch/batch.60"); then ok "$what ($result)"; else fail "$what" "$result"; fi
            ;;
        esac
    done
done

# Who asks for experts sees those of every token and layer, though in the last layer of a prompt most tokens are not needed.
for name in r1_fp8 moonlight_bf16; do
    tr -s ' \n' '\n\n' <"$(prompt $name)" | grep . | head -n 60 >"$scratch/short"
    what="$name, experts of a prompt, with and without its logits"
    for more in "" --argmax; do
        # shellcheck disable=SC2086
        timeout 120 "$r1" logits "$(model $name q8)" --ids "$scratch/short" --experts "$(seq -s, 0 59)" $more 2>"$scratch/error" |
            grep '^experts' >"$scratch/experts$more"
    done
    why=
    [ "$(grep -c . "$scratch/experts")" -gt 60 ] || why="few lines: $(head -c 300 "$scratch/experts") $(brief "$scratch/error")"
    cmp -s "$scratch/experts" "$scratch/experts--argmax" || why="$why they differ"
    if [ -z "$why" ]; then ok "$what"; else fail "$what" "$why"; fi
done

# Behind 1024 positions few tokens look at the cache in more than one span; 13 tokens at a time cross its end. A prefill goes
# through the cache in one piece and must agree with that.
[ -n "$quick" ] || for name in qwen2_bf16 moonlight_bf16; do
    tr -s ' \n' '\n\n' <"$(prompt $name)" | grep . | head -n 50 >"$scratch/fifty"
    for _ in $(seq 42); do cat "$scratch/fifty"; done | head -n 2061 >"$scratch/long"
    file=$(model $name f32)
    for kv in f32 f16 q8; do
        what="$name, $kv cache, more than one span of it"
        long() { # OPTION...
            timeout 120 "$r1" logits "$file" --ids "$scratch/long" --kv $kv --logits 2042,2047,2048,2052,2060 "$@" 2>"$scratch/error" ||
                echo "status $?: $(brief "$scratch/error")"
        }
        long -t 1 --batch 1 >"$scratch/spans.1"
        why=
        grep -q '^logits 2060 ' "$scratch/spans.1" || why="no logits: $(head -c 300 "$scratch/spans.1")"
        for options in "-t 3 --batch 1" "-t 1 --batch 13" "-t 2 --batch 16"; do
            # shellcheck disable=SC2086
            long $options >"$scratch/spans.2"
            cmp -s "$scratch/spans.1" "$scratch/spans.2" || why="$why $options differs from -t 1 --batch 1;"
        done
        if [ $kv = f32 ]; then
            long --batch 2061 >"$scratch/spans.2"
            result=$("$build/tests/compare_golden" "$scratch/spans.2" "$scratch/spans.1") || why="$why against one prefill: $result"
        fi
        if [ -z "$why" ]; then ok "$what"; else fail "$what" "$why"; fi
    done
done
