# One case per command and per parser under valgrind, with one thread, on the portable and the AVX2 kernels (valgrind knows no
# AVX-512). Not part of `make test`: `make valgrind`.

# clean NAME COMMAND...: no errors, nothing lost. Standard input is $input.
input=/dev/null
clean() {
    local name=$1
    shift
    timeout 900 valgrind --quiet --error-exitcode=77 --leak-check=full --errors-for-leak-kinds=definite --num-callers=20 "$@" \
        >"$scratch/said" 2>"$scratch/error" <"$input"
    local status=$?
    if [ $status = 77 ] || [ $status -ge 124 ] || grep -q '^==' "$scratch/error"; then fail "$name" "status $status: $(brief "$scratch/error")"
    else ok "$name"; fi
}

small=$(model qwen3_tied q8)
for type in source f32 bf16 f8 q8 q6 q4; do clean "convert r1_fp8 to $type" "$convert" "$oracles/r1_fp8" "$scratch/valgrind.r1" --type $type -t 1 --force; done
clean "convert the demo" "$convert" demo "$scratch/valgrind.r1" --type q4 -t 1 --force
clean "convert --dry-run" "$convert" demo "$scratch/valgrind.r1" --dry-run
clean "convert a folder that is not there" "$convert" "$scratch/nowhere" "$scratch/valgrind.r1" --force
head -c 3000 "$(model demo q4)" >"$scratch/short.r1"
clean "inspect a short file" "$r1" inspect "$scratch/short.r1"
clean "inspect --verify" "$r1" inspect "$small" --verify
clean "inspect --json" "$r1" inspect demo --json
clean "tokenize" "$r1" tokenize demo "Hello, wörld! 123"
input=$scratch/input
echo '[{"role": "user", "content": "hi"}]' >"$input"
clean "tokenize --chat" "$r1" tokenize demo --chat
echo 5 6 7 >"$input"
clean "tokenize --decode" "$r1" tokenize demo --decode
printf '68c3\n\nff\n' >"$input"
clean "tokenize --hex --markup" "$r1" tokenize demo --hex --markup
input=/dev/null
echo "1 + 1 = 2, 2 + 2 = 4." >"$scratch/text"
awk '{ for (i = 1; i <= 40; i++) printf "%s ", $i; print "" }' "$(prompt r1_fp8)" >"$scratch/valgrind.ids"
for isa in $(runnable_isas | grep -E '^(portable|avx2)$'); do
    clean "run, $isa" "$r1" run demo -t 1 --isa "$isa" -n 8 --seed 1 "2+2"
    for type in source q8 q6 q4; do
        for kv in f32 f16 q8; do
            clean "logits, $isa, $type, $kv cache" "$r1" logits "$(model r1_fp8 $type)" -t 1 --isa "$isa" --kv $kv --ids "$scratch/valgrind.ids" --greedy 4 --argmax
        done
    done
    clean "logits of a dense model, $isa" "$r1" logits "$small" -t 1 --isa "$isa" --ids "$scratch/valgrind.ids" --greedy 4 --argmax
    clean "perplexity, $isa" "$r1" perplexity demo "$scratch/text" -t 1 --isa "$isa"
    clean "bench, $isa" "$r1" bench "$small" -t 1 --isa "$isa" --prefill 8 --decode 2
done
