"""Types of what comes from Hugging Face, whose modules a type checker cannot see into."""

from typing import Any

CausalLM = Any
"""A ``...ForCausalLM`` of a supported architecture: ``config``, ``get_decoder()``, ``get_output_embeddings()``."""

Decoder = Any
"""The model without its head (``LlamaModel`` and its like): ``embed_tokens``, ``layers``, ``norm``, ``rotary_emb``."""

Block = Any
"""One decoder layer: ``input_layernorm``, ``self_attn``, ``post_attention_layernorm``, ``mlp``."""
