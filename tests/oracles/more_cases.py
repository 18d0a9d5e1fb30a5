# More cases for make.py: `make.py OUTDIR --cases more_cases.py --no-mutants`. Each joins several forms that checkpoints come in
# and that the six cases of make.py do not have.

def yarn(**over):
    return {**dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0,
                   mscale=1.0, mscale_all_dim=0.5), **over}


CASES = {
    # FP8 blocks of kv_b that end inside a head, inside its key (row 16 of 32) as well as inside its value; a latent of 160 and a
    # query rank of 96 (ragged blocks); mscale != mscale_all_dim, so cos and sin are scaled; config keys as transformers 5 writes
    # them; no MTP layer; two shards with unused bytes between the tensors.
    "r1_ragged": dict(seed=1, shards=2, layout="gapped", bias_shift=0.3, config=deepseek_r1(
        hidden_size=128, intermediate_size=160, kv_lora_rank=160, q_lora_rank=96, v_head_dim=48, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=2, num_nextn_predict_layers=0, n_routed_experts=12, n_group=4,
        topk_group=2, num_experts_per_tok=3, moe_intermediate_size=32, vocab_size=289, rope_scaling=DROP, rope_theta=DROP,
        rope_parameters=yarn(rope_theta=10000.0), torch_dtype=DROP, dtype="bfloat16", transformers_version="5.2.0")),
    # No dense layer at all, weights of the experts not normalised, two groups of which one is kept, router in float32, the rest
    # of the tensors in F16, F32 and BF16 side by side; a rope part of 64 beside a nope part of 64.
    "moonlight_mixed": dict(seed=1, shards=1, layout="unsorted", bias_shift=-0.2, dtypes={
        "norm.weight": "float32", "mlp.gate.weight": "float32", "down_proj.weight": "float16", "o_proj.weight": "float32"},
        config=moonlight(first_k_dense_replace=0, norm_topk_prob=False, n_group=2, topk_group=1, n_routed_experts=8,
                         num_experts_per_tok=2, n_shared_experts=1, num_hidden_layers=2, moe_intermediate_size=64,
                         num_attention_heads=2, num_key_value_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=64,
                         v_head_dim=64, vocab_size=300, rope_theta=10000.0)),
    # YaRN without attn_factor (cos and sin are scaled by 0.1 ln 4 + 1), one kv head of 64, tied, norms and biases in float32.
    "qwen2_yarn": dict(seed=1, shards=1, dtypes={"norm.weight": "float32", ".bias": "float32"}, config=qwen2(
        hidden_size=192, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1, vocab_size=301,
        max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64))),
    # Every query head with its own kv head, head_dim that is not hidden / heads, config keys as transformers 5 writes them,
    # F16 with one F32 and one BF16 matrix, header, data and names in three different orders, and holes in the data.
    "llama_rope_parameters": dict(seed=1, shards=1, layout="gapped", dtypes={
        "0.mlp.gate_proj.weight": "float32", "1.mlp.up_proj.weight": "bfloat16"}, config=llama(
        hidden_size=96, head_dim=64, num_attention_heads=3, num_key_value_heads=3, intermediate_size=224, num_hidden_layers=2,
        vocab_size=320, rope_scaling=DROP, rope_theta=DROP, torch_dtype=DROP, dtype="float16", transformers_version="5.2.0",
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, high_freq_factor=4.0,
                             low_freq_factor=1.0, original_max_position_embeddings=64))),
    # As Qwen3-0.6B: tied, head_dim 128 above hidden / heads, no rope scaling; all of it float32.
    "qwen3_tied": dict(seed=1, shards=1, config=qwen3(
        hidden_size=64, head_dim=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96, num_hidden_layers=2,
        vocab_size=293, tie_word_embeddings=True, rope_scaling=DROP, rope_theta=DROP, torch_dtype=DROP, dtype="float32",
        transformers_version="5.2.0", rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
}
