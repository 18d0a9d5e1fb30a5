# r1-convert and what can be wrong with a checkpoint: one sentence, status 1, no output; never a file under the final name that
# is not whole, even when the program is killed or the disk is full.

work=$scratch/work
out=$scratch/out

# fresh NAME: a copy of an oracle in $work, an empty folder $out.
fresh() {
    rm -rf "$work" "$out"
    mkdir -p "$work" "$out"
    cp "$oracles/$1"/* "$work"
    chmod u+w "$work"/*
}

# refused WHAT PATTERN [OPTION...]: converting $work fails with one sentence that PATTERN is in, and leaves nothing.
refused() {
    local what=$1 pattern=$2 result
    shift 2
    result=$(rejects "$what" 1 "$pattern" "$convert" "$work" "$out/model.r1" --type source "$@")
    if [[ $result = ok* ]] && [ -n "$(ls -A "$out")" ]; then fail "$what" "it left $(ls -A "$out") behind"; else echo "$result"; fi
}

header_bytes() { od -An -tu8 -N8 "$1" | tr -d ' '; }
header() { tail -c +9 "$1" | head -c "$(header_bytes "$1")"; }

# bytes_of NUMBER: eight bytes, the lowest first.
bytes_of() {
    local value=$1 i
    for i in 1 2 3 4 5 6 7 8; do
        printf "\\x$(printf %02x $((value & 255)))"
        value=$((value >> 8))
    done
}

# edit_header FILE SED-SCRIPT: changes the header of a safetensors file and leaves the data alone.
edit_header() {
    local file=$1 length
    length=$(header_bytes "$file")
    header "$file" | sed "$2" >"$scratch/header"
    tail -c +$((9 + length)) "$file" >"$scratch/data"
    { bytes_of "$(stat -c %s "$scratch/header")"; cat "$scratch/header" "$scratch/data"; } >"$file"
}

# poke FILE OFFSET BYTES: overwrites bytes, given as printf escapes.
poke() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null; }

# tensor_offset FILE NAME: where a tensor's data starts in a safetensors file.
tensor_offset() {
    local first
    first=$(header "$1" | grep -o "\"$2\":{[^}]*}" | sed 's/.*"data_offsets":\[\([0-9]*\),.*/\1/')
    echo $((8 + $(header_bytes "$1") + first))
}

single=$work/model.safetensors

# ---- files

fresh r1_fp8; rm "$work/model-00002-of-000003.safetensors"
refused "a missing shard" 'model-00002-of-000003'
fresh llama_bf16; rm "$single"
refused "no weights at all" 'safetensors'
fresh llama_bf16; rm "$work/config.json"
refused "no config.json" 'config.json'
fresh llama_bf16; rm "$work/tokenizer.json"
refused "no tokenizer.json" 'tokenizer.json'
fresh r1_fp8; truncate -s -100 "$work/model-00002-of-000003.safetensors"
refused "a shard that is cut short" 'model-00002-of-000003'
fresh llama_bf16; truncate -s 5 "$single"
refused "a file shorter than its header's length" 'model.safetensors'
fresh llama_bf16; : >"$single"
refused "an empty file" 'model.safetensors'
for name in config.json tokenizer.json tokenizer_config.json generation_config.json; do
    fresh llama_bf16; head -c 40 "$work/$name" >"$scratch/half" && cp "$scratch/half" "$work/$name"
    refused "half of $name" "$name"
    fresh llama_bf16; head -c 500 /dev/urandom >"$work/$name"
    refused "random bytes as $name" "$name"
    fresh llama_bf16; : >"$work/$name"
    refused "an empty $name" "$name"
    fresh llama_bf16; awk 'BEGIN { for (i = 0; i < 100000; i++) printf "[" }' >"$work/$name"
    refused "100,000 brackets as $name" "$name"
    fresh llama_bf16; echo '[1, 2]' >"$work/$name"
    refused "a list as $name" "$name"
done
fresh r1_fp8; echo '{"weight_map": 3}' >"$work/model.safetensors.index.json"
refused "an index without a map" 'index.json'
fresh r1_fp8; echo 'garbage' >"$work/model.safetensors.index.json"
refused "garbage as index" 'index.json'
rm -rf "$work"
refused "a folder that is not there" 'work'
echo text >"$work"
refused "a file where a folder belongs" 'work'

# ---- safetensors headers

fresh llama_bf16; poke "$single" 0 '\xff\xff\xff\xff\xff\xff\xff\xff'
refused "a header of 2^64 - 1 bytes" 'model.safetensors'
fresh llama_bf16; poke "$single" 0 '\xff\xff\xff\x7f\x00\x00\x00\x00'
refused "a header longer than the file" 'model.safetensors'
fresh llama_bf16; poke "$single" 0 '\x00\x00\x00\x00\x00\x00\x00\x00'
refused "a header of 0 bytes" 'model.safetensors'
fresh llama_bf16; poke "$single" 8 'garbage'
refused "a header that is not JSON" 'model.safetensors'
fresh llama_bf16; edit_header "$single" 's/"model.norm.weight"/"model.norn.weight"/'
refused "a missing tensor" 'model.norm.weight'
fresh llama_bf16; edit_header "$single" 's/"shape":\[288,128\]/"shape":[128,288]/'
refused "a tensor of another shape" '(lm_head|embed_tokens).weight.*288'
fresh llama_bf16; edit_header "$single" 's/"shape":\[288,128\]/"shape":[288,129]/'
refused "a shape that does not fit its bytes" '(lm_head|embed_tokens).weight'
fresh llama_bf16; edit_header "$single" 's/"shape":\[288,128\]/"shape":[4294967296,4294967296]/'
refused "a shape whose product overflows" '(lm_head|embed_tokens).weight'
fresh llama_bf16; edit_header "$single" 's/"shape":\[288,128\]/"shape":[-288,-128]/'
refused "a negative shape" '(lm_head|embed_tokens).weight'
fresh llama_bf16; edit_header "$single" 's/"shape":\[288,128\]/"shape":"big"/'
refused "a shape that is no list" '(lm_head|embed_tokens).weight'
fresh llama_bf16; edit_header "$single" 's/"data_offsets":\[0,73728\]/"data_offsets":[99999999999,99999999999]/'
refused "data offsets beyond the file" 'lm_head.weight'
fresh llama_bf16; edit_header "$single" 's/"data_offsets":\[0,73728\]/"data_offsets":[73728,0]/'
refused "data offsets the wrong way round" 'lm_head.weight'
fresh llama_bf16; edit_header "$single" 's/"data_offsets":\[0,73728\]/"data_offsets":[-73728,0]/'
refused "a negative data offset" 'lm_head.weight'
fresh llama_bf16; edit_header "$single" 's/,"data_offsets":\[0,73728\]//'
refused "no data offsets" 'lm_head.weight'
fresh llama_bf16; edit_header "$single" 's/"lm_head.weight":{"dtype":"BF16"/"lm_head.weight":{"dtype":"I16"/'
refused "a dtype that holds no weights" 'lm_head.weight.*I16'
fresh llama_bf16; edit_header "$single" 's/"lm_head.weight":{[^}]*}/"lm_head.weight":3/'
refused "an entry that is no object" 'lm_head.weight'

# ---- FP8 scales

shard=$work/model-00001-of-000003.safetensors
scale=model.layers.0.self_attn.kv_b_proj.weight_scale_inv
fresh r1_fp8; poke "$shard" "$(tensor_offset "$shard" $scale)" '\x00\x00\xc0\x7f'
refused "a scale that is NaN" "kv_b_proj"
fresh r1_fp8; poke "$shard" "$(tensor_offset "$shard" $scale)" '\x00\x00\x80\x7f'
refused "a scale that is infinite" "kv_b_proj"
fresh r1_fp8; edit_header "$shard" "s/\"$scale\"/\"model.layers.0.self_attn.kv_b_proj.weight_scale_inx\"/"
sed -i "s/\"$scale\"/\"model.layers.0.self_attn.kv_b_proj.weight_scale_inx\"/" "$work/model.safetensors.index.json"
refused "an FP8 tensor without its scales" "kv_b_proj"
fresh r1_fp8; sed -i 's/"weight_block_size"/"weight_block_sizes"/' "$work/config.json"
refused "FP8 without a block size" 'weight_block_size'

# ---- config.json

# config NAME SED-SCRIPT PATTERN WHAT
config() {
    fresh "$1"
    sed -i "$2" "$work/config.json"
    refused "$4" "$3"
}
config llama_bf16 's/"model_type": "llama"/"model_type": "mamba"/; s/LlamaForCausalLM/MambaForCausalLM/' 'mamba.*' "an unknown architecture"
for family in deepseek_v3 qwen2 llama qwen3; do
    config llama_bf16 's/"model_type": "llama"/"model_type": "mamba"/; s/LlamaForCausalLM/MambaForCausalLM/' "$family" "an unknown architecture: the message lists $family"
done
config llama_bf16 '/"model_type"/d; /architectures/,+2d' 'model_type' "no architecture"
config llama_bf16 '/"hidden_size"/d' 'hidden_size' "no hidden_size"
config llama_bf16 's/"hidden_size": 128/"hidden_size": "128"/' 'hidden_size' "hidden_size is text"
config llama_bf16 's/"hidden_size": 128/"hidden_size": -128/' 'hidden_size' "hidden_size is negative"
config llama_bf16 's/"hidden_size": 128/"hidden_size": 0/' 'hidden_size' "hidden_size is 0"
config llama_bf16 's/"hidden_size": 128/"hidden_size": 99999999999999/' 'hidden_size' "hidden_size is huge"
config llama_bf16 's/"hidden_size": 128/"hidden_size": 256/' '128' "hidden_size is not the tensors'"
config llama_bf16 's/"intermediate_size": 160/"intermediate_size": 161/' '16[01]' "intermediate_size is no multiple of 32"
config llama_bf16 's/"num_hidden_layers": 3/"num_hidden_layers": 4/' 'layers.3.' "more layers than the checkpoint has"
config llama_bf16 's/"num_hidden_layers": 3/"num_hidden_layers": 2000000000/' 'num_hidden_layers' "two billion layers"
config llama_bf16 's/"num_key_value_heads": 2/"num_key_value_heads": 3/' 'num_key_value_heads|k_proj' "query heads that do not fit the key heads"
config llama_bf16 's/"rope_type": "llama3"/"rope_type": "longrope"/' 'longrope' "an unknown rope scaling"
config llama_bf16 's/"rms_norm_eps": 1e-05/"rms_norm_eps": "tiny"/' 'rms_norm_eps' "rms_norm_eps is text"
config r1_fp8 's/"num_experts_per_tok": 8/"num_experts_per_tok": 33/' 'num_experts_per_tok' "more active experts than there are"
config r1_fp8 's/"n_group": 8/"n_group": 7/' 'n_group' "experts that do not fit the groups"
config r1_fp8 's/"scoring_func": "sigmoid"/"scoring_func": "softmax"/' 'scoring_func' "another scoring function"
config r1_fp8 's/"quant_method": "fp8"/"quant_method": "gptq"/' 'gptq' "another quantisation"

# Keys of deepseek_v3 that have no value of ours: transformers has defaults for them, those of DeepSeek-V3.
for key in q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts \
    moe_intermediate_size first_k_dense_replace n_group topk_group norm_topk_prob routed_scaling_factor num_experts_per_tok; do
    config moonlight_bf16 "/\"$key\"/d" "config.json: key $key is missing" "no $key"
done
config moonlight_bf16 's/"n_shared_experts": 2/"n_shared_experts": 0/' 'n_shared_experts.*model.layers.1.mlp.shared_experts' "shared experts that n_shared_experts does not count"
config moonlight_bf16 's/"n_shared_experts": 2/"n_shared_experts": null/' 'n_shared_experts.*model.layers.1.mlp.shared_experts' "shared experts and n_shared_experts null"

# What r1 would refuse in the finished file is refused before the work.
config llama_bf16 's/"max_position_embeddings": 512/"max_position_embeddings": 33554432/' 'max_position_embeddings is 33554432, expected' "a limit of r1: max_position_embeddings"
config llama_bf16 's/"num_hidden_layers": 3/"num_hidden_layers": 1025/' 'num_hidden_layers is 1025, expected' "a limit of r1: num_hidden_layers"
config llama_bf16 's/"rope_theta": 500000.0/"rope_theta": 1e13/' 'rope_theta is 1e.13, expected' "a limit of r1: rope_theta"
config llama_bf16 's/"num_attention_heads": 8/"num_attention_heads": 0/' 'num_attention_heads is 0, expected' "no heads"
config r1_fp8 's/"num_nextn_predict_layers": 1/"num_nextn_predict_layers": 17/' 'num_nextn_predict_layers is 17, expected' "a limit of r1: num_nextn_predict_layers"
config r1_fp8 's/"n_shared_experts": 1/"n_shared_experts": 65/' 'n_shared_experts is 65, expected' "a limit of r1: n_shared_experts"
config r1_fp8 's/"mscale": 1.0/"mscale": 101/' 'rope_mscale is 101, expected' "a limit of r1: mscale"
config r1_fp8 's/"n_group": 8/"n_group": 32/' 'n_group' "groups of one expert"

other_rope='"rope_scaling": {"type": "llama3", "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}'
config llama_rope_parameters "s/\"rope_parameters\": {/$other_rope, &/" 'rope_scaling.*rope_parameters' "rope_scaling and rope_parameters that differ"
config llama_rope_parameters 's/"rope_parameters": {/"rope_theta": 10000.0, &/' 'rope_theta' "two values of rope_theta"
config qwen2_yarn 's/"original_max_position_embeddings": 64/"original_max_position_embeddings": 2/' 'original_max_position_embeddings.*too small' "YaRN with an original context of 2 tokens"
config r1_fp8 's/"beta_fast": 32/"beta_fast": 0.5/' 'beta_fast' "YaRN with beta_fast below beta_slow"

# ---- tensors that config.json does not tell of

# beside NAME: adds tensor NAME to $single, with the data of model.norm.weight.
beside() { edit_header "$single" "s/\"model.norm.weight\":\({[^}]*}\)/&,\"$1\":\1/"; }

# accepted WHAT NAME: $work gives the same file as the oracle NAME itself.
accepted() {
    passes "$1" "$convert" "$work" "$out/model.r1" --type source
    if cmp -s "$(model "$2" source)" "$out/model.r1"; then ok "$1: the same file"; else fail "$1: the same file" "the files differ"; fi
}

fresh llama_bf16; beside model.layers.1.self_attn.q_proj.bias
refused "a tensor that the architecture lacks" 'tensor model.layers.1.self_attn.q_proj.bias is not part of this architecture'
fresh llama_bf16; beside one; beside two; beside three
refused "three of them" 'tensor (one|two|three) .*\(and 2 more\)'
fresh llama_bf16; beside model.layers.1.self_attn.o_proj.weight_scale_inv
refused "a scale of a tensor that is not FP8" 'model.layers.1.self_attn.o_proj.weight_scale_inv'
fresh llama_bf16; beside model.layers.1.self_attn.rotary_emb.inv_freq; beside model.rotary_emb.inv_freq
accepted "the frequencies that old checkpoints carry" llama_bf16
fresh llama_bf16; sed -i 's/"num_hidden_layers": 3/"num_hidden_layers": 2/' "$work/config.json"
refused "fewer layers than the checkpoint has" 'model.layers.2.*layer 2 .*beyond.*num_hidden_layers'
fresh r1_fp8; sed -i 's/"num_hidden_layers": 3/"num_hidden_layers": 4/' "$work/config.json"
refused "an MTP layer counted as a main one" 'model.layers.3.(eh_proj|enorm|hnorm|embed_tokens|shared_head)'
fresh r1_fp8; sed -i '/"num_nextn_predict_layers"/d' "$work/config.json"
refused "an MTP layer that is not counted" 'model.layers.3.*num_nextn_predict_layers'
fresh r1_fp8; sed -i 's/"first_k_dense_replace": 1/"first_k_dense_replace": 4/' "$work/config.json"
refused "first_k_dense_replace beyond the layers" 'first_k_dense_replace'

fresh llama_tied; edit_header "$single" 's/"model.embed_tokens.weight":\({[^}]*}\)/&,"lm_head.weight":\1/'
accepted "a tied head that is there and equal" llama_tied
fresh llama_bf16; sed -i 's/"tie_word_embeddings": false/"tie_word_embeddings": true/' "$work/config.json"
accepted "a head that is called tied and differs" llama_bf16
if grep -q 'note.*lm_head.weight.*tie_word_embeddings' "$scratch/said"; then ok "and it is told"; else fail "and it is told" "$(brief "$scratch/said")"; fi
fresh llama_bf16; edit_header "$single" 's/"lm_head.weight":{"dtype":"BF16","shape":\[288,128\]/"lm_head.weight":{"dtype":"BF16","shape":[128,288]/'
sed -i 's/"tie_word_embeddings": false/"tie_word_embeddings": true/' "$work/config.json"
refused "a tied head of another shape" 'lm_head.weight.*288'

fresh llama_rope_parameters; sed -i "s/\"rope_parameters\": {/${other_rope/4.0/8.0}, &/; s/\"type\": \"llama3\"/\"rope_theta\": 500000.0, &/" "$work/config.json"
accepted "rope_scaling and rope_parameters that agree" llama_rope_parameters
fresh moonlight_bf16; sed -i 's/"n_group": 1/"n_group": null/; s/"topk_group": 1/"topk_group": null/' "$work/config.json"
accepted "n_group and topk_group null" moonlight_bf16

# ---- the output

fresh llama_bf16; echo mine >"$out/model.r1"
rejects "an existing output is refused" 1 'exists|--force' "$convert" "$work" "$out/model.r1" --type source
if [ "$(cat "$out/model.r1")" = mine ]; then ok "an existing output is left alone"; else fail "an existing output is left alone" "it was changed"; fi
passes "--force replaces it" "$convert" "$work" "$out/model.r1" --type source --force
passes "and the file is sound" "$r1" inspect "$out/model.r1" --verify
rejects "an output in a folder that is not there" 1 'nowhere' "$convert" "$work" "$out/nowhere/model.r1" --type source
rejects "an output that is a folder" 1 'out' "$convert" "$work" "$out" --type source --force

fresh llama_bf16
passes "--dry-run" "$convert" "$work" "$out/model.r1" --dry-run
if [ -z "$(ls -A "$out")" ]; then ok "--dry-run writes nothing"; else fail "--dry-run writes nothing" "it wrote $(ls -A "$out")"; fi

# The cache of Hugging Face: a folder of links.
fresh r1_fp8; mkdir "$scratch/blobs.$$"
n=0
for file in "$work"/*; do
    n=$((n + 1))
    mv "$file" "$scratch/blobs.$$/$n" && ln -s "$scratch/blobs.$$/$n" "$file"
done
passes "a checkpoint of symbolic links" "$convert" "$work" "$out/model.r1" --type source
same "and it gives the same file" "$(model r1_fp8 source)" "$out/model.r1"
for threads in 1 3; do
    passes "-t $threads" "$convert" "$work" "$out/threads.r1" --type q4 -t $threads --force
    same "-t $threads gives the same file" "$(model r1_fp8 q4)" "$out/threads.r1"
done
passes "--layers 1" "$convert" "$work" "$out/layers.r1" --type q8 --layers 1
passes "--layers 1 runs" "$r1" logits "$out/layers.r1" --ids "$(prompt r1_fp8)" --argmax

rejects "no arguments" 2 'usage|CHECKPOINT_DIR' "$convert"
rejects "an unknown type" 2 'q7' "$convert" "$work" "$out/x.r1" --type q7
rejects "an unknown option" 2 'frobnicate' "$convert" "$work" "$out/x.r1" --frobnicate
rejects "an unknown letter among others" 2 'no option -x' "$convert" "$work" "$out/x.r1" -xq
rejects "an unknown letter behind others" 2 'no option -x' "$convert" -qx "$work" "$out/x.r1"
rejects "a value for an option that takes none" 2 '--quiet=5.*no value' "$convert" "$work" "$out/x.r1" --quiet=5
passes "--help" "$convert" --help

# ---- random weights in the shape of a known model

# The smallest shape's smallest file: nearly all of it is vocabulary.
shape=r1-distill-qwen-1.5b
tokenizer=$scratch/tokenizer
rm -rf "$out" "$tokenizer"
mkdir "$out" "$tokenizer"
cp "$oracles/r1_fp8"/tokenizer*.json "$tokenizer"
passes "--synthetic" "$convert" --synthetic $shape:1 "$out/synthetic.r1" --type q4 --uniform -t 1
if head -n 1 "$scratch/said" | grep -q '274.2 MB of random weights'; then ok "it tells the size first"; else fail "it tells the size first" "$(brief "$scratch/said")"; fi
passes "its checksums are right" "$r1" inspect "$out/synthetic.r1" --verify
program unit --synthetic "$out/synthetic.r1" $shape 1
passes "bench of it" "$r1" bench "$out/synthetic.r1" --prefill 8 --decode 2
rejects "run of it, without a tokenizer" 1 'no tokenizer.*--tokenizer' "$r1" run "$out/synthetic.r1" hello
rejects "tokenize without a tokenizer" 1 'no tokenizer' "$r1" tokenize "$out/synthetic.r1" hello
rejects "perplexity without a tokenizer" 1 'no tokenizer' "$r1" perplexity "$out/synthetic.r1" README.md
passes "--synthetic --tokenizer, three threads" "$convert" --synthetic $shape:1 "$out/again.r1" --uniform -t 3 --tokenizer "$tokenizer"
passes "run of it" "$r1" run "$out/again.r1" hello -n 3 --seed 1
for file in synthetic again; do "$r1" inspect "$out/$file.r1" --json | grep -E '"(name|xxh3)"' >"$scratch/$file.hashes"; done
if [ "$(grep -c xxh3 "$scratch/again.hashes")" = 13 ]; then same "the same weights" "$scratch/synthetic.hashes" "$scratch/again.hashes"
else fail "the same weights" "expected 13 tensors, got $(brief "$scratch/again.hashes")"; fi
rm -f "$out"/*

passes "--synthetic --dry-run" "$convert" --synthetic r1 --dry-run
if grep -q '671.03 G' "$scratch/said"; then ok "R1 has 671 G weights"; else fail "R1 has 671 G weights" "$(brief "$scratch/said")"; fi
for name in r1 moonlight-16b-a3b r1-distill-llama-70b; do
    rejects "an unknown shape: the message lists $name" 2 "gpt-9 .*[ ,]$name(,|;)" "$convert" --synthetic gpt-9 "$out/x.r1"
done
for layers in 0 29 x -1 ""; do rejects "layers '$layers' of 28" 2 '1 to 28 layers' "$convert" --synthetic "$shape:$layers" "$out/x.r1"; done
rejects "--synthetic --type source" 2 'source' "$convert" --synthetic $shape "$out/x.r1" --type source
rejects "--synthetic --layers" 2 'SHAPE:LAYERS' "$convert" --synthetic $shape "$out/x.r1" --layers 1
rejects "--synthetic --tokenizer-only" 2 'tokenizer-only' "$convert" --synthetic $shape "$out/x.r1" --tokenizer-only
rejects "--synthetic without an output" 2 'OUT.r1' "$convert" --synthetic $shape
rejects "--synthetic with a checkpoint" 2 'argument too many' "$convert" --synthetic $shape "$oracles/llama_bf16" "$out/x.r1"
rejects "--tokenizer of a checkpoint" 2 '--synthetic' "$convert" "$oracles/llama_bf16" "$out/x.r1" --tokenizer "$tokenizer"
rejects "--uniform of a checkpoint" 2 '--synthetic' "$convert" "$oracles/llama_bf16" "$out/x.r1" --uniform
rejects "a tokenizer that is not there" 1 'nowhere' "$convert" --synthetic $shape "$out/x.r1" --tokenizer "$scratch/nowhere"
sed -i 's/"id": 266/"id": 151936/' "$tokenizer/tokenizer.json"
rejects "a tokenizer with ids beyond the vocabulary" 1 'id 151936, but the embedding has 151936 rows' "$convert" --synthetic $shape:1 "$out/x.r1" --tokenizer "$tokenizer"
if [ -z "$(ls -A "$out")" ]; then ok "none of these leaves anything"; else fail "none of these leaves anything" "$(ls -A "$out")"; fi

# ---- killed, and a full disk

# However the program ends, what stands under the final name is a whole file.
fresh r1_fp8
kills=15 survived=0 why=
for i in $(seq $kills); do
    rm -f "$out/killed.r1"
    "$convert" "$PWD/demo" "$out/killed.r1" --type q4 -t 1 >/dev/null 2>&1 </dev/null &
    child=$!
    sleep "0.$(printf %03d $((RANDOM % (10 + 25 * i))))"
    kill -9 $child 2>/dev/null
    wait $child 2>/dev/null
    if [ -e "$out/killed.r1" ]; then
        survived=$((survived + 1))
        "$r1" inspect "$out/killed.r1" --verify >"$scratch/said" 2>&1 </dev/null || why="kill $i left a file that is not whole: $(brief "$scratch/said")"
    fi
done
if [ -z "$why" ]; then ok "killed $kills times: $survived whole files, no other"; else fail "killed $kills times" "$why"; fi
passes "converting after that" "$convert" "$PWD/demo" "$out/killed.r1" --type q4 --force
rm -f "$out"/*.r1
why=
for file in "$out"/*; do
    [ -e "$file" ] || continue
    case $file in *.r1.partial*) ;; *) why="$why $(basename "$file") is left;" ;; esac
done
if [ -z "$why" ]; then ok "what is left of them is called partial"; else fail "what is left of them is called partial" "$why"; fi

# The next conversion to the same name tells of them, and of nothing else.
fresh llama_bf16; echo half >"$out/model.r1.partial-aB3dEf"; echo other >"$out/other.r1.partial-aB3dEf"; echo long >"$out/model.r1.partial-aB3dEfg"
passes "converting beside a leftover" "$convert" "$work" "$out/model.r1" --type source
"$convert" "$work" "$out/model.r1" --type source --force >"$scratch/said" 2>&1 </dev/null
if [ "$(grep -c 'partial-' "$scratch/said")" = 1 ] && grep -q 'model\.r1\.partial-aB3dEf (.*B).*delete' "$scratch/said" && ! grep -q 'aB3dEfg\|other' "$scratch/said"; then ok "a leftover is told"; else fail "a leftover is told" "$(brief "$scratch/said")"; fi
if [ "$(cat "$out/model.r1.partial-aB3dEf")" = half ]; then ok "a leftover is left alone"; else fail "a leftover is left alone" "it is gone"; fi
rejects "--quiet does not tell" 1 'exists' "$convert" "$work" "$out/model.r1" --type source --quiet

# A polite end leaves nothing at all.
rm -rf "$out" && mkdir "$out"
for i in 1 2 3 4 5; do
    "$convert" "$PWD/demo" "$out/ended.r1" --type q4 -t 1 --force >/dev/null 2>&1 </dev/null &
    child=$!
    sleep "0.$(printf %03d $((RANDOM % 60)))"
    kill -TERM $child 2>/dev/null
    wait $child 2>/dev/null
done
rm -f "$out/ended.r1"
if [ -z "$(ls -A "$out")" ]; then ok "ended by a signal: nothing is left"; else fail "ended by a signal: nothing is left" "$(ls -A "$out" | tr '\n' ' ')"; fi

# The OpenMP library ends the program itself where it cannot start its threads.
if [ "$build" = build ]; then
    (ulimit -v 1500000; timeout 60 "$convert" --synthetic r1-distill-qwen-1.5b:1 "$out/ended.r1" -t 1000 -q) >/dev/null 2>&1 </dev/null
    if [ $? != 0 ] && [ -z "$(ls -A "$out")" ]; then ok "threads that cannot be started: nothing is left"
    else fail "threads that cannot be started: nothing is left" "$(ls -A "$out" | tr '\n' ' ')"; rm -f "$out"/*; fi
fi

# A file that cannot grow: the limit stands for a disk that fills up on the way.
printf '#!/bin/bash\ntrap "" XFSZ\nulimit -f 500\nexec "$@"\n' >"$scratch/r1-convert-limited"
chmod +x "$scratch/r1-convert-limited"
rejects "a write that fails on the way" 1 'model.r1' "$scratch/r1-convert-limited" "$convert" "$oracles/r1_fp8" "$out/model.r1" --type source
if [ -z "$(ls -A "$out")" ]; then ok "a write that fails on the way: nothing is left"; else fail "a write that fails on the way: nothing is left" "$(ls -A "$out")"; fi

disk=$scratch/disk
mkdir -p "$disk"
if mount -t tmpfs -o size=256k none "$disk" 2>/dev/null; then
    rejects "a full disk" 1 'space|disk' "$convert" "$oracles/r1_fp8" "$disk/model.r1" --type source
    rejects "a full disk, random weights" 1 'needs 1.1 GB.*disk has' "$convert" --synthetic $shape "$disk/model.r1"
    if [ -z "$(ls -A "$disk")" ]; then ok "a full disk: nothing is left"; else fail "a full disk: nothing is left" "$(ls -A "$disk")"; fi
    if mount -o remount,ro,size=64m "$disk" 2>/dev/null; then
        rejects "a read-only folder" 1 'read-only|cannot' "$convert" "$oracles/r1_fp8" "$disk/model.r1" --type source
    else
        skip "a read-only folder" "this machine does not let a folder be remounted"
    fi
    umount "$disk"
elif [ "$(id -u)" != 0 ]; then
    chmod 555 "$disk"
    rejects "a read-only folder" 1 'denied|cannot' "$convert" "$oracles/r1_fp8" "$disk/model.r1" --type source
    skip "a full disk" "mounting a small one needs root"
else
    skip "a full disk" "this machine does not let a small one be mounted"
fi
