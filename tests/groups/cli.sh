# The command line: options, exit statuses, standard input and output, seeds, JSON.

question="How many r's are in strawberry?"
answer="There are 3 r's in strawberry."
small=$(model llama_bf16 q8)

# output NAME EXPECTED COMMAND...: status 0 and exactly this on standard output (EXPECTED as printf takes it).
output() {
    local name=$1 status
    printf "$2" >"$scratch/expected"
    shift 2
    timeout 120 "$@" >"$scratch/got" 2>"$scratch/error"
    status=$?
    if [ $status = 0 ]; then same "$name" "$scratch/expected" "$scratch/got"
    else fail "$name" "status $status: $(brief "$scratch/error")"; fi
}

# ---- help and wrong usage

passes "--help" "$r1" --help
for command in run bench perplexity inspect tokenize logits; do
    timeout 20 "$r1" $command --help >"$scratch/got" 2>"$scratch/error" </dev/null
    status=$?
    if [ $status = 0 ] && [ ! -s "$scratch/error" ] && grep -q "r1 $command" "$scratch/got"; then ok "$command --help"
    else fail "$command --help" "expected status 0 and \"r1 $command\" on standard output, got status $status: $(brief "$scratch/got") $(brief "$scratch/error")"; fi
done
timeout 20 "$r1" >"$scratch/got" 2>"$scratch/error" </dev/null
status=$?
if [ $status = 2 ] && grep -q '^Usage: r1 ' "$scratch/error" && [ ! -s "$scratch/got" ]; then ok "no command"
else fail "no command" "expected status 2 and the usage on standard error, got status $status: $(brief "$scratch/error")"; fi
rejects "an unknown command" 2 'frobnicate' "$r1" frobnicate
rejects "an unknown option" 2 'frobnicate' "$r1" run demo --frobnicate hello
rejects "an unknown short option" 2 "-z|'z'" "$r1" run demo -z hello
rejects "run without a model" 2 'MODEL' "$r1" run
rejects "too many arguments" 2 'three|argument|usage' "$r1" run demo one two three
rejects "logits without --ids" 2 '--ids' "$r1" logits demo
rejects "an option without its value" 2 'seed' "$r1" run demo hello --seed
for wrong in "--max-tokens -5" "--max-tokens 3.5" "--max-tokens many" "--max-tokens 99999999999999999999" "--threads 0" "--threads -1" "--threads x" \
    "--context 0" "--batch 0" "--batch -3" "--temperature -1" "--temperature nan" "--temperature hot" "--top-p 1.5" "--top-p -0.1" "--top-k -1" "--min-p 2" "--seed x" "--kv q3" "--isa mmx" "--color blue"; do
    rejects "$wrong" 2 "${wrong%% *}" "$r1" run demo hello ${wrong%% *} "${wrong#* }"
done

# ---- what run prints

output "the answer alone with --hide-thinking" "$answer\n" "$r1" run demo --temperature 0 --hide-thinking "$question"
printf '%s\n' "$question" >"$scratch/question"
output "a prompt from standard input" "$answer\n" "$r1" run demo --temperature 0 --hide-thinking <"$scratch/question"
output "a prompt from standard input by -" "$answer\n" "$r1" run demo - --temperature 0 --hide-thinking <"$scratch/question"
printf '%s' "$question" >"$scratch/question"
output "a prompt without a newline" "$answer\n" "$r1" run demo --temperature 0 --hide-thinking <"$scratch/question"
output "--option=VALUE" "$answer\n" "$r1" run demo --temperature=0 --hide-thinking "$question"
for option in "-t 1" "-t 2" "--batch 3" "--kv f32" "--kv q8" "-c 400" "--isa portable" "-q"; do
    output "the same answer with $option" "$answer\n" "$r1" run demo --temperature 0 --hide-thinking $option "$question"
done

rejects "thinking that never ends, with --hide-thinking" 1 'think' "$r1" run demo --temperature 0 --hide-thinking -n 5 -q "$question"
timeout 60 "$r1" run demo --temperature 0 --hide-thinking -n 5 "$question" >"$scratch/got" 2>/dev/null </dev/null
if [ -s "$scratch/got" ]; then fail "and nothing on standard output" "got $(brief "$scratch/got")"; else ok "and nothing on standard output"; fi
timeout 60 "$r1" run demo --temperature 0 -n 5 "$question" >"$scratch/got" 2>/dev/null </dev/null
if [ "$(head -n 1 "$scratch/got")" = "<think>" ] && [ "$(wc -c <"$scratch/got")" -lt 60 ]; then ok "-n 5 prints a short piece"
else fail "-n 5 prints a short piece" "got $(brief "$scratch/got")"; fi
if LC_ALL=C grep -q $'\033' "$scratch/got"; then fail "no colours in a pipe" "there are escape sequences"; else ok "no colours in a pipe"; fi
timeout 60 "$r1" run demo --temperature 0 --color always "$question" >"$scratch/got" 2>/dev/null </dev/null
if LC_ALL=C grep -q $'\033' "$scratch/got"; then ok "--color always dims the thinking"; else fail "--color always dims the thinking" "there are no escape sequences"; fi
rejects "a prompt longer than the context" 1 'context' "$r1" run demo -c 10 "$question" -q

# ---- sampling

"$r1" run demo --seed 7 --temperature 1.5 --top-p 1 -n 60 "Hi" >"$scratch/first" 2>"$scratch/error" </dev/null
"$r1" run demo --seed 7 --temperature 1.5 --top-p 1 -n 60 "Hi" >"$scratch/second" 2>/dev/null </dev/null
same "a seed gives the same text again" "$scratch/first" "$scratch/second"
"$r1" run demo --seed 7 --temperature 1.5 --top-p 1 -n 60 -t 1 "Hi" >"$scratch/second" 2>/dev/null </dev/null
same "with any number of threads" "$scratch/first" "$scratch/second"
different=no
for seed in 8 9 10 11 12; do
    "$r1" run demo --seed $seed --temperature 1.5 --top-p 1 -n 60 "Hi" 2>/dev/null </dev/null | cmp -s - "$scratch/first" || different=yes
done
if [ $different = yes ]; then ok "other seeds give other texts"; else fail "other seeds give other texts" "five seeds gave the text of seed 7"; fi
"$r1" run demo -n 20 "Hi" >/dev/null 2>"$scratch/error" </dev/null
seed=$(grep -oE 'seed [0-9]+' "$scratch/error" | grep -oE '[0-9]+' | head -n 1)
if [ -n "$seed" ]; then ok "a sampled run prints its seed"; else fail "a sampled run prints its seed" "got $(brief "$scratch/error")"; fi
for option in "--top-k 1" "--min-p 1" "--top-p 0"; do
    output "$option takes the most likely token" "$answer\n" "$r1" run demo --hide-thinking --seed 3 $option "$question"
done

# ---- pipes

"$r1" run demo --temperature 0 "$question" 2>"$scratch/error" </dev/null | head -c 1 >/dev/null
status=${PIPESTATUS[0]}
if [ "$status" -lt 128 ] || [ "$status" = 141 ]; then ok "a pipe that is closed early"; else fail "a pipe that is closed early" "status $status"; fi
if [ -w /dev/full ]; then
    "$r1" inspect demo >/dev/full 2>"$scratch/error" </dev/null
    status=$?
    if [ $status = 1 ] && grep -q '^r1: ' "$scratch/error"; then ok "a full disk under standard output"
    else fail "a full disk under standard output" "expected status 1 and a sentence, got $status: $(brief "$scratch/error")"; fi
    rejects "a full disk under r1-convert --help" 1 'standard output' bash -c "'$convert' --help >/dev/full 2> >(sed s/^r1-convert:/r1:/ >&2); s=\$?; sleep 0.2; exit \$s"
fi

# ---- signals, and what a terminal obeys

rejects "a name with control characters" 1 'no.\[2Jwhere' "$r1" inspect $'no\033[2Jwhere'
if LC_ALL=C grep -q $'\033' "$scratch/error"; then fail "and none of them on standard error" "there is one"; else ok "and none of them on standard error"; fi
# Slow enough to be ended in the midst of it. A shell without job control has its background ignore Ctrl-C.
slow=("$r1" run demo --seed 3 --temperature 100 --isa portable -t 1 --color always hello)
"${slow[@]}" >"$scratch/whole" 2>/dev/null </dev/null
: >"$scratch/got"
"${slow[@]}" >"$scratch/got" 2>/dev/null </dev/null &
child=$!
until [ -s "$scratch/got" ] || ! kill -0 $child 2>/dev/null; do sleep 0.01; done
while kill -INT $child 2>/dev/null; do sleep 0.02; done
same "Ctrl-C that is ignored from outside stays ignored" "$scratch/whole" "$scratch/got"
status=0
for try in 1 2 3 4 5; do
    : >"$scratch/got"
    "${slow[@]}" >"$scratch/got" 2>/dev/null </dev/null &
    child=$!
    until [ -s "$scratch/got" ] || ! kill -0 $child 2>/dev/null; do sleep 0.01; done
    kill -TERM $child 2>/dev/null
    wait $child 2>/dev/null
    status=$?
    [ $status = 143 ] && break
done
if [ $status = 143 ] && [ "$(tail -c 4 "$scratch/got")" = $'\033[0m' ]; then ok "a terminal is not left dimmed by SIGTERM"
else fail "a terminal is not left dimmed by SIGTERM" "status $status, the last bytes are $(tail -c 8 "$scratch/got" | od -An -c)"; fi

# ---- tokenize

printf '\nhello\n\n' >"$scratch/lines"
"$r1" tokenize demo --ids-only <"$scratch/lines" >"$scratch/got" 2>"$scratch/error"
if [ "$(sed -n '1p;3p' "$scratch/got" | tr -d '\n')" = "" ] && [ "$(wc -l <"$scratch/got")" = 3 ] && [ -n "$(sed -n 2p "$scratch/got")" ]; then
    ok "an empty line in gives an empty line out"
else
    fail "an empty line in gives an empty line out" "got $(brief "$scratch/got")"
fi
output "tokenize and decode" "Hello, world\n" bash -c "'$r1' tokenize demo 'Hello, world' --ids-only | '$r1' tokenize demo --decode"
rejects "decode an id beyond the vocabulary" 1 '600' bash -c "'$r1' tokenize demo --decode <<<600"
rejects "decode an id without a token" 1 '500' bash -c "'$r1' tokenize demo --decode <<<500"
rejects "decode what is no id" 1 'x12' bash -c "'$r1' tokenize demo --decode <<<'x12'"
rejects "hexadecimal that is none" 1 'hex' bash -c "'$r1' tokenize demo --hex <<<'0g'"
rejects "a chat that is not JSON" 1 'JSON|json' bash -c "'$r1' tokenize demo --chat <<<'[{'"
rejects "a chat with an unknown role" 1 'role|wizard' bash -c "'$r1' tokenize demo --chat <<<'[{\"role\": \"wizard\", \"content\": \"x\"}]'"

rejects "a chat with a zero byte in a role" 1 'role' bash -c "'$r1' tokenize demo --chat <<<'[{\"role\": \"user\\u0000x\", \"content\": \"x\"}]'"

# ---- logits and perplexity

echo "0 1 2 600" >"$scratch/ids"
rejects "ids beyond the vocabulary" 1 '600' "$r1" logits demo --ids "$scratch/ids" --argmax
echo "0 1 two" >"$scratch/ids"
rejects "ids that are none" 1 'two' "$r1" logits demo --ids "$scratch/ids" --argmax
: >"$scratch/ids"
rejects "no ids" 1 'ids|empty' "$r1" logits demo --ids "$scratch/ids" --argmax
rejects "ids that are not there" 1 'No such file' "$r1" logits demo --ids "$scratch/nowhere" --argmax
echo "0 5 6 7" >"$scratch/ids"
rejects "a position beyond the sequence" 1 'position|4' "$r1" logits demo --ids "$scratch/ids" --logits 4
rejects "positions that are none" 2 'logits' "$r1" logits demo --ids "$scratch/ids" --logits 1,x
output "greedy tokens are not stopped by an end of sequence" "300\n" bash -c "'$r1' logits demo --ids '$scratch/ids' --greedy 300 | awk '\$1 == \"greedy\" { print NF - 2 }'"

# Sums of the demo: text that it knows.
for i in 1 2 3 4 5 6 7 8 9; do echo "What is $i + $i? $i + $i = $((i + i))"; done >"$scratch/text"
"$r1" perplexity --help >"$scratch/got" 2>&1
if grep -q -e '-c, --context N .*windows of N tokens (2048)' "$scratch/got" && grep -q -e '--batch N .*(512)$' "$scratch/got"; then ok "perplexity --help tells its own defaults"
else fail "perplexity --help tells its own defaults" "$(brief "$scratch/got")"; fi
timeout 120 "$r1" perplexity demo "$scratch/text" --json 2>"$scratch/error" >"$scratch/got" </dev/null
if said=$("$build/tests/check_json" perplexity:number <"$scratch/got"); then ok "perplexity --json"; else fail "perplexity --json" "$said: $(brief "$scratch/got") $(brief "$scratch/error")"; fi
"$r1" tokenize demo --ids-only <"$scratch/text" >"$scratch/ids" 2>/dev/null
passes "perplexity --ids --save-base" "$r1" perplexity demo --ids "$scratch/ids" --save-base "$scratch/base"
timeout 120 "$r1" perplexity demo --ids "$scratch/ids" --kld "$scratch/base" >"$scratch/got" 2>"$scratch/error" </dev/null
status=$?
if [ $status = 0 ]; then ok "perplexity --kld"; else fail "perplexity --kld" "status $status: $(brief "$scratch/error")"; fi
rejects "a base that cannot be written whole" 1 'written' bash -c "ulimit -f 4; exec '$r1' perplexity demo --ids '$scratch/ids' --save-base '$scratch/unfinished' -q"
if [ -z "$(ls "$scratch"/unfinished* 2>/dev/null)" ]; then ok "and nothing of it is left"; else fail "and nothing of it is left" "$(ls "$scratch"/unfinished*)"; fi
head -c 100 "$scratch/base" >"$scratch/short"
rejects "a base that is cut short" 1 'short' "$r1" perplexity demo --ids "$scratch/ids" --kld "$scratch/short"
rejects "a base of another model" 1 'base' "$r1" perplexity "$small" --ids <(echo 5 6 7) --kld "$scratch/base"

# ---- JSON

if said=$("$r1" inspect demo --json 2>/dev/null </dev/null | "$build/tests/check_json"); then ok "inspect --json"; else fail "inspect --json" "$said"; fi
timeout 300 "$r1" bench demo --prefill 16,32 --decode 4 --depth 0,8 --json >"$scratch/got" 2>"$scratch/error" </dev/null
if said=$("$build/tests/check_json" model:string type:string isa:string threads:number machine.read_gb_s:number machine.int8_gmac_s:number \
    load_s:number prefill.0.tokens=16 prefill.1.tokens=32 prefill.0.depth=0 prefill.0.tok_s:number prefill.0.gmac_s:number \
    prefill.0.fraction:number decode.0.depth=0 decode.1.depth=8 decode.0.tok_s:number decode.0.bytes_per_token:number decode.0.gb_s:number \
    decode.0.fraction:number <"$scratch/got"); then ok "bench --json"
else fail "bench --json" "$said: $(brief "$scratch/error")"; fi
passes "bench of a known shape, one layer" "$r1" bench r1-distill-qwen-1.5b:q4 --layers 1 --prefill 8 --decode 2
rejects "bench of an unknown shape" 1 'gpt-9' "$r1" bench gpt-9
rejects "bench of a shape that does not fit" 1 'memory|GB' "$r1" bench r1:f32

# ---- the table of bench

# table NAME KILOBYTES OPTION...: with so many addresses (or no limit), every known shape has a row for each type, and both speeds in
# it are measured or predicted ("~"); $measured counts the rows of the former kind.
table() {
    local name=$1 limit=$2 status
    shift 2
    ([ "$limit" = any ] || ulimit -v "$limit"; exec timeout 300 "$r1" bench -q "$@") >"$scratch/got" 2>"$scratch/error" </dev/null
    status=$?
    sed -n 's/^    {"\([a-z0-9.-]*\)",.*/\1:q4\n\1:q8/p' convert/shapes.h | LC_ALL=C sort >"$scratch/shapes"
    awk '(NF == 5 && $4 ~ /^~[0-9.]+$/ && $5 ~ /^~[0-9.]+$/) || (NF == 11 && $4 $8 ~ /^[0-9.]+$/) { print $1 }' "$scratch/got" |
        LC_ALL=C sort >"$scratch/rows"
    measured=$(awk 'NF == 11 && $4 $8 ~ /^[0-9.]+$/' "$scratch/got" | wc -l)
    if [ $status != 0 ] || [ -s "$scratch/error" ]; then fail "$name" "status $status: $(brief "$scratch/error")"
    else same "$name" "$scratch/shapes" "$scratch/rows"; fi
}
table "bench without a model, only predicted: a row for every known shape" any --seconds 0
if [ "$measured" = 0 ]; then ok "and none measured"; else fail "and none measured" "$(brief "$scratch/got")"; fi
if awk 'length > 100 { exit 1 }' "$scratch/got"; then ok "and 100 columns at most"; else fail "and 100 columns at most" "$(brief "$scratch/got")"; fi
if [ "$build" = build ]; then
    # Of the models of one layer two are small enough to be measured where 1.75 GB of addresses leave 1.5.
    table "bench without a model, of first layers: a row for every known shape" 1750000 --layers 1 -t 1
    if [ "$measured" = 2 ] && grep -q 'too large' "$scratch/got"; then ok "and what is too large is not measured"
    else fail "and what is too large is not measured" "$(brief "$scratch/got")"; fi
fi
rejects "--json without a model" 2 'model' "$r1" bench --json
rejects "--decode without a model" 2 'model' "$r1" bench --decode 8
rejects "--seconds with a model" 2 'table' "$r1" bench demo --seconds 9

# ---- more threads than OpenBLAS has room for

[ "$build" = build ] && passes "a prompt of floats with 192 threads" "$r1" bench r1-distill-qwen-1.5b:bf16 --layers 2 --prefill 1024 --batch 1024 --decode 1 -t 192

# ---- few addresses: OpenBLAS takes 128 MB of them a thread, and asks for ever if it gets none

if [ "$build" = build ]; then
    why=
    for limit in 400000 450000 500000 600000; do
        (ulimit -v $limit; OMP_NUM_THREADS=2 exec timeout 60 "$r1" run demo -q -t 2 -n 3 "$(printf 'word %.0s' $(seq 60))") >"$scratch/got" 2>"$scratch/error" </dev/null
        status=$?
        [ $status = 0 ] || { [ $status = 1 ] && grep -q 'needs .* of memory' "$scratch/error"; } || why="status $status with $limit KB: $(brief "$scratch/error")"
    done
    if [ -z "$why" ]; then ok "few addresses: it runs, or says what it needs"; else fail "few addresses: it runs, or says what it needs" "$why"; fi
fi

# ---- a person at a terminal

if command -v script >/dev/null; then
    # A line, one Ctrl-D; then silence, as from somebody who waits for the answer, for as long as r1 runs.
    rm -f "$scratch/ended"
    { sleep 0.3; printf 'What is 2+2?\n'; sleep 0.3; printf '\004'; until [ -e "$scratch/ended" ]; do sleep 0.1; done; } 2>/dev/null |
        { timeout 60 script -qec "$r1 run demo -q --temperature 0" /dev/null >"$scratch/terminal" 2>/dev/null; touch "$scratch/ended"; }
    if grep -q '2 + 2 = 4' "$scratch/terminal"; then ok "one Ctrl-D sends a question typed at a terminal"
    else fail "one Ctrl-D sends a question typed at a terminal" "no answer: $(brief "$scratch/terminal")"; fi
else
    skip "one Ctrl-D sends a question typed at a terminal" "script (of util-linux) is not installed"
fi
rejects "an empty question" 1 "question is empty" "$r1" run demo ""
rejects "a model where a command belongs" 2 "r1 run demo" "$r1" demo "What is 2+2?"
rejects "a question that starts with -" 2 "behind --" "$r1" run demo "-5 + 3"
