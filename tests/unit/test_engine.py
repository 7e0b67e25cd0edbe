"""The routed model against the untouched Hugging Face model, physically sliced models and hooks on its modules."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, prompts, tiny, with_router

from buddy.errors import BudgetError, UserError
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced

KV = ("zero", "mask", "project")
GREEDY = {"max_new_tokens": 8, "do_sample": False}


class CountBlocks:
    """Counts, by hooks on the backbone's own modules, how many sequences each block, attention and MLP works on."""

    def __init__(self, backbone, part=None):
        self.rows = []
        self.handles = []
        for index, layer in enumerate(backbone.model.layers):
            module = layer if part is None else getattr(layer, part)
            self.handles.append(module.register_forward_pre_hook(self._hook(index), with_kwargs=True))

    def _hook(self, index):
        def hook(_module, arguments, keywords):
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            self.rows.append((index, len(hidden)))

        return hook

    def total(self):
        return sum(rows for _, rows in self.rows)

    def close(self):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def test_budget_one_is_the_untouched_model_bit_for_bit(backbone):
    ids, mask = prompts()
    plain = copy.deepcopy(backbone)
    names = list(backbone.state_dict())
    model = with_router(backbone)
    assert torch.equal(model(ids, mask, budget=1.0).logits, plain(ids, mask).logits)
    assert torch.equal(
        model.generate(ids, mask, budget=1.0, **GREEDY),
        plain.generate(input_ids=ids, attention_mask=mask, **GREEDY),
    )
    assert type(model.backbone) is type(plain)
    assert list(model.backbone.state_dict()) == names
    assert torch.equal(backbone(ids, mask).logits, plain(ids, mask).logits)  # nothing is left behind


@torch.no_grad()
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    feature=st.sampled_from(("key", "value", "key+value")),
    source=st.integers(1, 3),
    executed=st.lists(st.integers(4, 7), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_hooks_count_exactly_the_budget_at_every_step(architecture, kv, feature, source, executed, seed):
    backbone = tiny(architecture, seed=seed % 3)
    model = with_router(backbone, feature, source, kv, seed)
    if min(executed) < source + 1:
        return
    ids, mask = prompts(seed=seed)
    counters = {part: CountBlocks(backbone, part) for part in (None, "self_attn", "mlp")}
    model.generate(ids, mask, budget=[k / 7 for k in executed], max_new_tokens=5, do_sample=False)
    for part, counter in counters.items():
        counter.close()
        if part == "mlp" or part is None or kv != "project":
            assert counter.total() == sum(executed) * 5
    assert model.trace.executed().tolist() == [executed] * 5
    routes = torch.stack(model.trace.steps)
    assert routes[..., :source].all()
    assert routes[..., -1].all()


@torch.no_grad()
@pytest.mark.parametrize("removed", [[1], [3, 4], [5, 2, 1]])
@pytest.mark.parametrize("kv", KV)
def test_a_constant_route_is_the_sliced_model(backbone, removed, kv):
    ids, mask = prompts()
    model = RoutedModel(backbone, StaticPolicy(7, removed), kv)
    reference = sliced(backbone, [index for index in range(7) if index not in removed])
    # The independent reference: a model built anew from the kept blocks' weights.
    rebuilt = tiny(backbone.config.model_type, blocks=7 - len(removed))
    kept = [index for index in range(7) if index not in removed]
    state = backbone.state_dict()
    for place, index in enumerate(kept):
        prefix, new = f"model.layers.{index}.", f"model.layers.{place}."
        for name in [name for name in state if name.startswith(prefix)]:
            rebuilt.state_dict()[new + name.removeprefix(prefix)].copy_(state[name])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        rebuilt.state_dict()[name].copy_(state[name])
    expected = rebuilt(ids, mask).logits
    assert torch.equal(reference(ids, mask).logits, expected)
    assert torch.equal(model(ids, mask).logits, expected)
    assert torch.equal(
        model.generate(ids, mask, **GREEDY), rebuilt.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    )


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("source", [1, 2])
def test_a_batch_generates_what_its_sequences_generate_alone(deep_backbone, kv, source):
    # Balanced on another prompt: an exact tie would be broken by the rounding that batching changes.
    model = with_router(deep_backbone, source_block=source, kv=kv, balanced=1)
    ids, mask = prompts()
    budgets = [0.5, 1.0, 0.75]
    together = model.generate(ids, mask, budget=budgets, **GREEDY)
    paths = [model.trace.paths(row) for row in range(3)]
    assert max(len(set(path)) for path in paths) > 1, "the router never changed its mind: the test shows nothing"
    for row, budget in enumerate(budgets):
        start = 4 if row == 1 else 0
        alone = model.generate(ids[row : row + 1, start:], budget=budget, **GREEDY)
        assert torch.equal(alone[0, -8:], together[row, -8:])
        assert model.trace.paths(0) == paths[row]


@torch.no_grad()
def test_every_decode_step_may_take_a_new_path_unless_told_to_reuse(deep_backbone):
    model = with_router(deep_backbone)
    ids, _ = prompts(batch=1)
    sampled = {"max_new_tokens": 16, "do_sample": True, "temperature": 3.0, "pad_token_id": 0}
    torch.manual_seed(0)
    model.generate(ids, budget=0.5, decode="recompute", **sampled)
    recomputed = model.trace.paths()
    model.generate(ids, budget=0.5, decode="reuse", **sampled)
    assert len(set(recomputed)) > 1
    assert model.trace.paths() == [recomputed[0]] * 16
    model.generate(ids, budget=0.5, decode=4, **sampled)
    fourth = model.trace.paths()
    assert all(fourth[step] == fourth[step - step % 4] for step in range(16))
    assert len(set(fourth)) > 1


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_decoding_step_by_step_follows_the_definition(backbone, kv):
    """One more generated token, computed the slow way: no cache object, K/V tensors kept by hand per block."""
    model = with_router(backbone, kv=kv)
    ids, _ = prompts(batch=1)
    for token in torch.arange(1, VOCABULARY).view(-1, 1, 1):  # one that makes the router change its mind
        cache = model.new_cache()
        model(ids, budget=4 / 7, past_key_values=cache)
        first = model.trace.routes()[0]
        logits = model(token, budget=4 / 7, past_key_values=cache).logits[0, -1]
        second = model.trace.routes()[0]
        if not torch.equal(first, second):
            break
    assert not torch.equal(first, second), "every step takes one path: the K/V policy is not exercised"
    torch.testing.assert_close(logits, slow_second_step(backbone, ids, token, first, second, kv), atol=1e-4, rtol=1e-4)


def slow_second_step(backbone, ids, token, first, second, kv):
    """Logits of ``token`` after ``ids`` when the passes take routes ``first`` and ``second``, from the formulas."""
    decoder, n = backbone.model, ids.shape[1]
    hidden, latest = decoder.embed_tokens(ids), decoder.embed_tokens(token)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(n + 1)[None])

    def heads(attention, states, rotary, name):
        out = getattr(attention, f"{name}_proj")(states).view(1, states.shape[1], -1, attention.head_dim)
        if hasattr(attention, f"{name}_norm"):
            out = getattr(attention, f"{name}_norm")(out)
        out = out.transpose(1, 2)
        if name == "v":
            return out
        half = out.shape[-1] // 2
        turned = torch.cat([-out[..., half:], out[..., :half]], -1)
        return out * rotary[0][:, None] + turned * rotary[1][:, None]

    def attend(attention, queries, keys, values, allowed):
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        weights = queries @ keys.transpose(-1, -2) * attention.scaling
        weights = weights.masked_fill(~allowed, -torch.inf).softmax(-1)
        return attention.o_proj((weights @ values).transpose(1, 2).flatten(2))

    early, late = (cos[:, :n], sin[:, :n]), (cos[:, n:], sin[:, n:])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        states = layer.input_layernorm(hidden)
        keys, values = heads(attention, states, early, "k"), heads(attention, states, early, "v")
        allowed = torch.ones(1, n + 1, dtype=torch.bool)
        if first[index]:
            mixed = hidden + attend(attention, heads(attention, states, early, "q"), keys, values, causal)
            hidden = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
        elif kv == "zero":
            keys, values = torch.zeros_like(keys), torch.zeros_like(values)
        elif kv == "mask":
            allowed[:, :n] = False
        if second[index]:
            states = layer.input_layernorm(latest)
            keys = torch.cat([keys, heads(attention, states, late, "k")], 2)
            values = torch.cat([values, heads(attention, states, late, "v")], 2)
            mixed = latest + attend(attention, heads(attention, states, late, "q"), keys, values, allowed)
            latest = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
    return backbone.lm_head(decoder.norm(latest))[0, -1]


@torch.no_grad()
def test_an_answer_does_not_choose_its_own_route(backbone):
    model = with_router(backbone)
    ids, _ = prompts(batch=2)
    ids[1, :5] = ids[0, :5]  # same context, different answers
    context = torch.zeros_like(ids, dtype=torch.bool)
    context[:, :5] = True
    model(ids, budget=4 / 7, context_mask=context)
    same = model.trace.routes(0), model.trace.routes(1)
    assert torch.equal(*same)
    model(ids[:, :5], budget=4 / 7)
    assert torch.equal(model.trace.routes(0), same[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_enters_a_score(backbone, side):
    model = with_router(backbone)
    ids, _ = prompts(batch=1)
    model(ids, budget=4 / 7)
    route = model.trace.routes()
    for filler in (3, 77):
        pad = torch.full((1, 6), filler)
        padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)][:: 1 if side == "left" else -1], 1)
        model(padded, mask, budget=4 / 7)
        assert torch.equal(model.trace.routes(), route)


@torch.no_grad()
def test_skipped_blocks_take_no_time():
    """Real skipping: a third of the blocks takes well under two thirds of the time."""
    import time

    backbone = tiny(blocks=24)
    ids = torch.randint(1, VOCABULARY, (4, 128))

    def seconds(removed):
        model = RoutedModel(backbone, StaticPolicy(24, list(range(1, 23))))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            model(ids, budget=(24 - removed) / 24)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16) < 0.66 * seconds(0)


def test_sampling_and_stopping_work_as_usual(backbone):
    model = with_router(backbone)
    ids, mask = prompts()
    torch.manual_seed(3)
    sampled = model.generate(ids, mask, budget=0.6, do_sample=True, top_k=5, max_new_tokens=6)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(ids, mask, budget=0.6, do_sample=True, top_k=5, max_new_tokens=6))
    greedy = model.generate(ids[:1], budget=0.6, max_new_tokens=6, do_sample=False)
    stop = int(greedy[0, -3])
    stopped = model.generate(ids[:1], budget=0.6, max_new_tokens=6, do_sample=False, eos_token_id=stop)
    first = greedy[0, 9:].tolist().index(stop)
    assert stopped[0].tolist() == greedy[0, : 9 + first + 1].tolist()
    several = model.generate(ids[:1], budget=[0.6], num_return_sequences=3, do_sample=True, max_new_tokens=4)
    assert several.shape == (3, 13)
    assert model.trace.executed().tolist() == [[4, 4, 4]] * 4


def test_wrong_requests_are_refused_in_one_line(backbone):
    model = with_router(backbone)
    ids, mask = prompts()
    for budget in (0, 1.2, 0.1, [0.5, 0.5]):
        with pytest.raises(BudgetError) as error:
            model.generate(ids, mask, budget=budget)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="predictor"):
        model.generate(ids, mask, budget=None)
    with pytest.raises(UserError, match="beam"):
        model.generate(ids, mask, budget=0.5, num_beams=2)
    with pytest.raises(UserError, match="decode"):
        model.generate(ids, mask, budget=0.5, decode="sometimes")
    with pytest.raises(UserError, match="kv"):
        RoutedModel(backbone, model.policy, kv="none")
    with pytest.raises(BudgetError, match="dense model runs every block"):
        RoutedModel(backbone, StaticPolicy(7)).generate(ids, mask, budget=0.5)


def test_the_cache_grows_without_losing_anything(backbone):
    model = with_router(backbone, kv="project")
    ids, _ = prompts(batch=1)
    with torch.no_grad():
        small, large = model.new_cache(1), model.new_cache(400)
        for cache in (small, large):
            model(ids, budget=0.6, past_key_values=cache)
        for token in range(1, 40):
            step = torch.tensor([[token]])
            assert torch.equal(
                model(step, budget=0.6, past_key_values=small).logits,
                model(step, budget=0.6, past_key_values=large).logits,
            )
    assert small.length == large.length == 48
    assert large.capacity == 400
