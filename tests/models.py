"""Tiny random models, built from a configuration: the suite needs no network."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 97


def tiny(architecture: str = "llama", blocks: int = 7, seed: int = 0, kv_heads: int = 2) -> torch.nn.Module:
    """A random model whose blocks matter: weights are large enough that skipping one moves the logits."""
    configuration, model = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return model(
        configuration(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
