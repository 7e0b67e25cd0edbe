"""Tiny random models, built from a configuration: the suite needs no network."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from buddy import runs
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.decision import source_feature
from buddy.routing.model import RoutedModel

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


def prompts(batch: int = 3, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, the second sequence padded left by four."""
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def with_router(
    backbone: torch.nn.Module,
    feature: str = "value",
    source_block: int = 1,
    kv: str = "zero",
    seed: int = 0,
    balanced: int = 0,
) -> RoutedModel:
    """A model with a router that is strong enough to change its mind between steps."""
    width = backbone.config.num_key_value_heads * backbone.config.head_dim
    policy = BuddyPolicy(backbone.config.num_hidden_layers, width, feature, source_block)
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        torch.nn.init.normal_(parameter, std=20.0 if name.endswith("weight") else 0.1)
    with torch.no_grad():  # after this prompt all blocks score alike: every decoded token tips the balance
        backbone(prompts(batch=1, seed=balanced)[0], past_key_values=(plain := DynamicCache()), use_cache=True)
        states = plain.layers[source_block - 1]
        scores = policy.decision(source_feature(states.keys, states.values, feature))
        policy.decision.up.bias -= scores.mean((0, 1))
    return RoutedModel(backbone, policy, kv).eval()


def saved(model: RoutedModel, root: Path) -> Path:
    """The folder of a model with a tokenizer as a run of BUDDY, beside its backbone."""
    backbone, run = root / "backbones/tiny", root / "run"
    model.backbone.save_pretrained(backbone)
    model.tokenizer.save_pretrained(backbone)
    where = runs.relative(backbone, run)
    info = runs.RunInfo("buddy", "buddy", model.policy.settings(), "tiny", where, {"feature": "value"}, 3, "small")
    runs.save(run, info, model.policy)
    return run
