# The demo model end to end: exact greedy ids, and the answers that a person gets, against demo/golden.json.

golden=$scratch/demo
mkdir -p "$golden"
"$build/tests/split_golden" demo/golden.json "$golden" || fail "golden.json" "cannot be read"

for name in $(cat "$golden/all"); do
    count=$(wc -w <"$golden/$name.output")
    timeout 120 "$r1" logits demo --ids "$golden/$name.ids" --greedy "$count" --kv f32 2>"$scratch/error" | awk '$1 == "greedy" { $1 = $2 = ""; print }' |
        sed 's/^ *//' >"$scratch/got"
    same "greedy ids of \"$(cat "$golden/$name.question")\"" "$golden/$name.output" "$scratch/got"
done

# right EXPECTED GOT: the same answer; the example named after "Try:" is a matter of taste.
right() {
    cmp -s "$1" "$2" || { grep -q 'Try:' "$1" && [ "$(sed 's/Try:.*/Try:/' "$1")" = "$(sed 's/Try:.*/Try:/' "$2")" ]; }
}

# answers MODEL: asks every first question; prints the number of right answers, and the first wrong one in $scratch/wrong.
answers() {
    local right=0 name
    : >"$scratch/wrong"
    for name in $(cat "$golden/first"); do
        { cat "$golden/$name.answer"; echo; } >"$scratch/expected"
        timeout 120 "$r1" run "$1" --temperature 0 --hide-thinking "$(cat "$golden/$name.question")" >"$scratch/got" 2>"$scratch/error"
        if right "$scratch/expected" "$scratch/got"; then right=$((right + 1))
        else echo "\"$(cat "$golden/$name.question")\": expected \"$(brief "$scratch/expected")\", got \"$(brief "$scratch/got")\" $(tail -n 2 "$scratch/error" | tr '\n' '|')" >>"$scratch/wrong"; fi
    done
    echo $right
}

questions=$(wc -l <"$golden/first")
for choice in demo source q8; do
    model=demo
    [ $choice = demo ] || model=$(model demo $choice)
    right=$(answers "$model")
    if [ "$right" = "$questions" ]; then ok "$choice: $right of $questions answers right"
    else fail "$choice: answers" "$right of $questions right; $(brief "$scratch/wrong")"; fi
done
right=$(answers "$(model demo q4)")
if [ "$right" -gt 0 ]; then ok "q4: $right of $questions answers right (printed, not asserted)"
else fail "q4: answers" "none is right: $(brief "$scratch/wrong")"; fi

# A q8 cache, whose attention is computed with integers: read by few tokens at a time (absorbed) and by many (expanded). The
# f16 cache's divergence from f32 is 1.7e-10, that of q8 2e-7; a wrong scale or place gives thousands of times as much.
"$build/tests/golden_ids" demo/golden.json >"$scratch/golden.ids"
timeout 120 "$r1" perplexity demo --ids "$scratch/golden.ids" --kv f32 --save-base "$scratch/base" >/dev/null 2>"$scratch/error"
for batch in 1 8 512; do
    timeout 120 "$r1" perplexity demo --ids "$scratch/golden.ids" --kv q8 --batch $batch --kld "$scratch/base" --json >"$scratch/got" 2>"$scratch/error"
    divergence=$(grep -A2 '"kl":' "$scratch/got" | grep -oE '"mean": *[0-9.e+-]+' | head -n 1 | grep -oE '[0-9.e+-]+$')
    if awk -v got="${divergence:-1}" 'BEGIN { exit !(got > 0 && got < 4e-6) }'; then ok "q8 cache, --batch $batch: mean KL divergence $divergence"
    else fail "q8 cache, --batch $batch" "mean KL divergence '$divergence', expected below 4e-6; $(brief "$scratch/error")"; fi
done

timeout 120 "$r1" run demo --temperature 0 "$(cat "$golden/0-0.question")" >"$scratch/plain" 2>"$scratch/error"
timeout 120 "$r1" run "$(model demo source)" --copy --temperature 0 "$(cat "$golden/0-0.question")" >"$scratch/got" 2>"$scratch/error"
same "--copy" "$scratch/plain" "$scratch/got"

# What a pipe gets, thinking and tags included.
{ printf '<think>\n'; cat "$golden/0-0.thinking" | sed -e '$a\'; printf '</think>\n\n'; cat "$golden/0-0.answer"; echo; } >"$scratch/expected"
timeout 120 "$r1" run demo --temperature 0 "$(cat "$golden/0-0.question")" >"$scratch/got" 2>"$scratch/error"
same "thinking and answer in a pipe" "$scratch/expected" "$scratch/got"

passes "the checksums of the demo" "$r1" inspect demo --verify
