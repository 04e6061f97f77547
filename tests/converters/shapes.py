"""Every way in which a model may differ from the usual one, by architecture: the settings of
transformers' config, and `dtype` and `shard` of the saved file."""

from __future__ import annotations

from typing import Any

Shapes = dict[str, dict[str, Any]]

GPT2: Shapes = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "narrow inner": {"n_inner": 72},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "epsilon": {"layer_norm_epsilon": 0.05},
    "unscaled attention": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast attention": {"reorder_and_upcast_attn": True},
    "smallest ugly": {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 5, "vocab_size": 401},
    "ugly width": {"n_embd": 72, "n_head": 3, "n_inner": 100, "vocab_size": 419},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "sharded": {"shard": "40KB"},
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA: Shapes = {
    "llama": {},
    "one kv head": {"num_key_value_heads": 1},
    "two kv heads": {"num_key_value_heads": 2},
    "three kv heads": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
    },
    "theta": {"rope_theta": 100000.0},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 419, "tie_word_embeddings": True},
    "odd inner": {"intermediate_size": 100},
    "attention bias": {"attention_bias": True, "num_key_value_heads": 2},
    "mlp bias": {"mlp_bias": True},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3 scaling": {"rope_scaling": _LLAMA3, "rope_theta": 500.0},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 2},
    "other heads": {"head_dim": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    "epsilon of rms": {"rms_norm_eps": 0.05},
    "gelu gate": {"hidden_act": "gelu_pytorch_tanh"},
    "exact gelu gate": {"hidden_act": "gelu"},
    "relu gate": {"hidden_act": "relu"},
    "llama bf16": {"dtype": "bfloat16"},
    "llama sharded": {"shard": "40KB"},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
}
for _name, _settings in LLAMA.items():
    _settings.setdefault("model_type", "llama")
