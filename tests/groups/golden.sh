# Every tiny checkpoint of tests/oracles against what the reference implementation computed from it (golden.txt): one prefill,
# token by token, other chunk sizes, and the whole sequence as one prompt; then every instruction set of this machine.

# golden NAME LABEL OPTION...: runs a case; with LABEL "whole sequence" the golden's own continuation is part of the prompt.
golden() {
    local name=$1 label=$2 ids greedy=48 compare=() experts
    shift 2
    ids=$(prompt "$name")
    [ "$label" = "whole sequence" ] && { ids=$(sequence "$name"); greedy=0; compare=(--prefill); }
    experts=$(expert_positions "$name")
    if ! timeout 120 "$r1" logits "$(model "$name" source)" --ids "$ids" --greedy $greedy --logits "$(logit_positions "$name")" --argmax \
        ${experts:+--experts "$experts"} --kv f32 "$@" >"$scratch/logits" 2>"$scratch/error"; then
        fail "$name, $label" "$(brief "$scratch/error")"
    elif result=$("$build/tests/compare_golden" "${compare[@]}" "$oracles/$name/golden.txt" "$scratch/logits"); then
        ok "$name, $label ($result)"
    else
        fail "$name, $label" "$result"
    fi
}

cases=$(cd "$oracles" && for folder in */; do echo "${folder%/}"; done)
for name in $cases; do
    golden "$name" "one prefill"
    golden "$name" "whole sequence"
    for batch in 1 7 64; do golden "$name" "batch $batch" --batch $batch; done
done
for isa in $(runnable_isas); do
    [ -n "$quick" ] && break
    for name in $cases; do
        golden "$name" "$isa, one prefill" --isa "$isa"
        golden "$name" "$isa, token by token" --isa "$isa" --batch 1
    done
done

# The other types and caches are no float arithmetic: here they only have to give sound numbers; tests/groups/demo.sh asks them
# questions, and docs/quality.md has their divergence.
for name in $cases; do
    experts=$(expert_positions "$name")
    for choice in "q8 f16" "q6 f16" "q4 f16" "bf16 f16" "f8 q8" "q8 q8"; do
        read -r type kv <<<"$choice"
        if ! timeout 120 "$r1" logits "$(model "$name" "$type")" --ids "$(prompt "$name")" --greedy 48 --logits "$(logit_positions "$name")" \
            --argmax ${experts:+--experts "$experts"} --kv "$kv" >"$scratch/logits" 2>"$scratch/error"; then
            fail "$name, $type, $kv cache" "$(brief "$scratch/error")"
        elif result=$("$build/tests/compare_golden" --finite "$oracles/$name/golden.txt" "$scratch/logits"); then
            ok "$name, $type, $kv cache ($result)"
        else
            fail "$name, $type, $kv cache" "$result"
        fi
    done
done
