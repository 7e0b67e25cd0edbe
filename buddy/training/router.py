"""The tuned recipe of BUDDY's router: whole routes are searched and measured, and one is chosen by what the router reads.

Straight-through gradients do not say what a block is worth on a language model, and blocks interact, so that values of
single blocks do not add up to the value of a route (docs/method.md). Losses of good whole routes are a better teacher:

1. *Pool.* Removal orders are searched on training examples (`buddy.training.orders`): one on a mixture of all, others
   each on examples that are alike in what the router reads, then on those that an order is predicted to suit best.
2. *Table.* The losses of many examples along every order of the pool, at the depths of the study.
3. *Which suits whom* (`buddy.training.choosing`). A network like the Decision Module predicts what each order costs an
   example; how long it learns, examples left out decide. The order with the lowest prediction is the one to take.
4. *Scores.* The Decision Module learns to rank the blocks of each example as its order does, so that one state serves
   every depth.
5. *Held-out losses decide.* The routes that the router really takes are measured on examples kept apart: those of its
   start (the prior), of each order for all inputs, and of each variant of step 4. The best state is kept, and a
   router that no input-dependent state improves ends on one path.

The backbone is frozen throughout and has no LoRA yet; afterwards LoRA is trained along the routes, the router frozen.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from buddy.data.templates import Example
from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.routing.ranking import ranking
from buddy.routing.types import CausalLM
from buddy.settings import Router, Training
from buddy.storage.checkpoints import FOLDER, Checkpoints
from buddy.storage.files import read_json
from buddy.training import choosing, fingerprints
from buddy.training.examples import encode
from buddy.training.orders import Search, route
from buddy.training.routes import Bundle, Row, by_length, measure

logger = logging.getLogger(__name__)

SHARD = 64
"""Examples of the table that are written together."""
EPOCHS, RATE = 200, 5e-3
"""Adam on the Decision Module, all examples at once: a second or two on a CPU."""
SHARES = (1.0, 0.5, 0.25)
"""Of the examples for which another order than the best for all is predicted to be better, the share that gets it, those
with the largest lead first: variants of step 4."""


@dataclass(frozen=True)
class Fit:
    """What the fit found.

    Attributes:
        orders: removal orders of the pool by name; ``prior`` and ``all`` first.
        depths: numbers of removed blocks at which losses were measured.
        table: mean loss over the measured examples along each order, at each depth.
        gain: cross-validated gain of choosing an order by the features, over the best order for all; nats per token,
            mean over depths; and ``oracle``: of choosing it by the losses themselves, which nobody can.
        held_out: mean loss on held-out examples of every state that was tried, mean over depths, and distinct routes.
        kept: name of the state that was kept.
        examples: numbers of examples: measured, held out.
    """

    orders: dict[str, list[int]]
    depths: list[int]
    table: dict[str, list[float]]
    gain: float
    oracle: float
    held_out: dict[str, dict[str, float]]
    kept: str
    examples: list[int]

    def facts(self) -> dict[str, Any]:
        """The same as plain values, for the training record."""
        return asdict(self)


@dataclass
class _Examples:
    """Examples with what the router reads of their prompts.

    Attributes:
        rows: N examples in tokens.
        tokens: features of the prompts' tokens, one tensor (tokens, width) each.
    """

    rows: list[Row]
    tokens: list[Tensor]
    pooled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.pooled = torch.stack([tokens.double().mean(0) for tokens in self.tokens])

    def part(self, start: int, stop: int) -> _Examples:
        return _Examples(self.rows[start:stop], self.tokens[start:stop])


def fit(
    backbone: CausalLM,
    tokenizer: Any,
    policy: BuddyPolicy,
    pairs: Sequence[tuple[str, str] | Example],
    settings: Router,
    training: Training,
    depths: Sequence[int],
    folder: Path | None = None,
    seed: int = 0,
    on_log: Callable[[str], None] = logger.info,
) -> Fit:
    """Fit a router on a frozen backbone; what is done is kept below ``folder``, and not done again.

    Args:
        backbone: causal language model without LoRA, on its device.
        tokenizer: its tokenizer.
        policy: with its prior; changed in place.
        pairs: prompts and responses of the training data.
        settings: the section `router` of the study.
        training: the section `training`, for the longest example.
        depths: numbers of removed blocks at which losses are measured.
        folder: the run's; None keeps nothing.
        seed: of which examples are measured, and of the searches.
        on_log: told what was found, in words.

    Raises:
        UserError: too few examples.
    """
    backbone.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = encode(tokenizer, pairs, training.max_length, settings.pool_over)
    wanted = settings.held_out + settings.examples
    if len(rows) < settings.held_out + 2 * settings.search_examples:
        raise UserError(
            f"router: {len(rows)} training examples are too few for {settings.held_out} held out and twice "
            f"{settings.search_examples} to search on; lower router.held_out and router.search_examples"
        )
    chosen = [
        _cut(rows[index], settings.response_tokens)
        for index in torch.randperm(len(rows), generator=generator).tolist()[:wanted]
    ]
    examples = _Examples(chosen, read(backbone, policy, chosen, settings.batch_size))
    held_out, learnt = examples.part(0, settings.held_out), examples.part(settings.held_out, len(chosen))
    made_by = {
        "settings": settings.model_dump(exclude={"start", "at_measured"}, exclude_none=True),
        "depths": list(depths),
        "seed": seed,
        "examples": fingerprints.of_examples(chosen),
        "policy": {"settings": policy.settings(), "state": fingerprints.of_weights(policy)},
        "backbone": fingerprints.of_weights(backbone),
    }
    kept = Checkpoints(folder / FOLDER / "router", made_by) if folder else None
    fitting = _Fitting(backbone, policy, settings, sorted(depths), kept, generator)
    return fitting.run(learnt, held_out, on_log)


def _cut(row: Row, tokens: int) -> Row:
    """An example whose response has at most so many tokens."""
    return {**row, "input_ids": row["input_ids"][: row["prompt_length"] + tokens]}


@torch.no_grad()
def read(backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Row], batch_size: int) -> list[Tensor]:
    """(tokens, width) of each prompt: what the policy reads of it in the source block."""
    found: dict[int, Tensor] = {}
    for members in by_length(rows, batch_size):
        part = [rows[member] for member in members]
        features = Bundle(backbone, part).features(policy.source_block, policy.feature)
        lengths = [len(row["question"]) if row.get("question") else int(row["prompt_length"]) for row in part]
        found |= dict(zip(members, features.split(lengths), strict=True))
    return [found[index] for index in range(len(rows))]


@dataclass
class _Fitting:
    """The steps of a fit, on examples in tokens."""

    backbone: CausalLM
    policy: BuddyPolicy
    settings: Router
    depths: list[int]
    kept: Checkpoints | None
    generator: torch.Generator

    def run(self, learnt: _Examples, held_out: _Examples, on_log: Callable[[str], None]) -> Fit:
        """All steps; the policy holds the best state afterwards."""
        orders, table = self._pool(learnt, on_log)
        names = list(orders)
        means = table.mean(-1)  # (N, orders), over depths
        best = int(means.mean(0).argmin())
        suits = choosing.predicted(learnt.tokens, means, self.policy.rank, self.generator)
        gain = float((means[:, best] - means.gather(1, suits.argmin(1, keepdim=True)).squeeze(1)).mean())
        states, losses = self._candidates(learnt, held_out, orders, names[best], suits)
        kept = min(losses, key=lambda name: losses[name]["loss"])
        self.policy.decision.load_state_dict(states[kept])
        on_log(
            f"router: {kept}, held-out loss {losses[kept]['loss']:.4f} on {losses[kept]['paths']:.0f} paths; the prior's "
            f"route {losses['start']['loss']:.4f}, the best order for all inputs {self._best_fixed(losses):.4f}"
        )
        return Fit(
            orders=orders,
            depths=self.depths,
            table={name: table[:, place].mean(0).tolist() for place, name in enumerate(names)},
            gain=gain,
            oracle=float((means[:, best] - means.min(1).values).mean()),
            held_out=losses,
            kept=kept,
            examples=[len(learnt.rows), len(held_out.rows)],
        )

    @staticmethod
    def _best_fixed(losses: dict[str, dict[str, float]]) -> float:
        return min(each["loss"] for name, each in losses.items() if name.startswith("fixed"))

    # ---- the pool and its table ----------------------------------------------------------------------------------------

    def _pool(self, learnt: _Examples, on_log: Callable[[str], None]) -> tuple[dict[str, list[int]], Tensor]:
        """Orders by name, and the losses (N, orders, depths) of the examples along them."""
        prior = self._prior_order()
        if self.settings.known:
            orders = {"prior": prior}
            for name, order in known_orders(self.settings.known, self._candidate_blocks(), max(self.depths)).items():
                if self._routes(order) not in map(self._routes, orders.values()):
                    orders[name] = order
            return orders, self._table(learnt, list(orders.values()))
        orders = {"prior": prior, "all": self._search(learnt, torch.arange(len(learnt.rows)), "all", prior)}
        table = self._table(learnt, list(orders.values()))
        for turn in range(self.settings.rounds):
            found: dict[str, list[int]] = {}
            for number, members in enumerate(self._groups(learnt, table, turn), start=1):
                name = f"{turn + 1}.{number}"
                order = self._search(learnt, members, name, orders["all"])
                if self._routes(order) not in map(self._routes, [*orders.values(), *found.values()]):
                    found[name] = order
            if found:
                table = torch.cat([table, self._table(learnt, list(found.values()))], 1)
                orders |= found
        on_log(f"router: {len(orders)} removal orders, measured on {len(learnt.rows)} examples")
        return orders, table

    def _routes(self, order: Sequence[int]) -> list[frozenset[int]]:
        """What an order leaves out at each depth."""
        return [frozenset(order[:depth]) for depth in self.depths]

    def _groups(self, learnt: _Examples, table: Tensor, turn: int) -> list[Tensor]:
        """Examples that are searched together, the largest groups first: at the first turn those alike in what the router
        reads, then those that the same order is predicted to suit best."""
        if turn == 0:
            group = alike(learnt.pooled, self.settings.orders, self.generator)
        else:
            group = choosing.predicted(learnt.tokens, table.mean(-1), self.policy.rank, self.generator).argmin(1)
        members = [(group == each).nonzero().squeeze(1) for each in group.unique()]
        large = [each for each in members if len(each) >= self.settings.search_examples // 2]
        return sorted(large, key=len, reverse=True)[: self.settings.orders]

    def _candidate_blocks(self) -> range:
        return range(self.policy.blocks)[self.policy.candidates]

    def _prior_order(self) -> list[int]:
        """The order in which the prior alone would leave blocks out."""
        policy = self.policy
        order = (ranking((policy.omega * policy.prior).unsqueeze(0))[0] + policy.source_block).tolist()
        return order[::-1][: max(self.depths)]

    def _search(self, learnt: _Examples, members: Tensor, name: str, known: Sequence[int]) -> list[int]:
        """An order for some of the examples, searched on a sample of them; from runs, or from one that is known."""
        sample = members[torch.randperm(len(members), generator=self.generator)[: self.settings.search_examples]]
        rows = [learnt.rows[index] for index in sample.tolist()]
        return self._once(f"order-{name}", lambda: self._searched(rows, name, known))

    def _searched(self, rows: Sequence[Row], name: str, known: Sequence[int]) -> list[int]:
        started = time.perf_counter()
        candidates = self._candidate_blocks()
        search = Search(self.backbone, rows, candidates, self.settings.loss, self.settings.batch_size)
        anew = name == "all" or not self.settings.exchanges
        starts = [frozenset(known), *(search.runs(max(self.depths)) if anew else ())]
        order = search.order(search.climb(search.best(starts), self.settings.exchanges))
        logger.info("router: order %s removes %s (%.0f s)", name, order, time.perf_counter() - started)
        return order

    def _table(self, learnt: _Examples, orders: Sequence[Sequence[int]]) -> Tensor:
        """Losses (N, orders, depths)."""
        routes = torch.stack([route(order, depth, self.policy.blocks) for order in orders for depth in self.depths])
        parts = []
        with tqdm(total=len(learnt.rows), desc=f"losses along {len(routes)} routes", unit="example") as bar:
            for start in range(0, len(learnt.rows), SHARD):
                rows = learnt.rows[start : start + SHARD]
                name = f"table-{fingerprints.of_examples(rows)}-{fingerprints.digest(routes.tolist())}"
                parts.append(torch.tensor(self._once(name, lambda rows=rows: self._losses(rows, routes))))  # type: ignore[misc]
                bar.update(len(rows))
        return torch.cat(parts).double().view(len(learnt.rows), len(orders), len(self.depths))

    def _losses(self, rows: Sequence[Row], routes: Tensor) -> list[list[float]]:
        every = routes.expand(len(rows), *routes.shape)
        return measure(self.backbone, rows, every, self.settings.loss, self.settings.batch_size).tolist()

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, kept as JSON."""
        done = self.kept.read(f"{name}.json") if self.kept else None
        if done is not None:
            return json.loads(done)
        found = compute()
        if self.kept:
            self.kept.write(f"{name}.json", json.dumps(found).encode())
        return found

    # ---- the states that are tried -------------------------------------------------------------------------------------

    def _candidates(
        self, learnt: _Examples, held_out: _Examples, orders: dict[str, list[int]], best: str, suits: Tensor
    ) -> tuple[dict[str, State], dict[str, dict[str, float]]]:
        """Every state by name, and what it costs on held-out examples."""
        decision, names = self.policy.decision, list(orders)
        start = _copied(decision)
        states = {"start": start}
        places = torch.stack([self._places(order) for order in orders.values()])
        for name, same in zip(names, places, strict=True):
            self._fix(same)
            states[f"fixed {name}"] = _copied(decision)
        for share in SHARES:
            decision.load_state_dict(start)
            self._learn(learnt, places[self._given(suits, share, names.index(best))])
            states[f"chosen {share:g}"] = _copied(decision)
        losses = {}
        seen: dict[bytes, float] = {}
        for name, state in states.items():
            decision.load_state_dict(state)
            losses[name] = self._held_out(held_out, seen)
        return states, losses

    @staticmethod
    def _given(suits: Tensor, share: float, best: int) -> Tensor:
        """The order of each example: the one predicted best, or for those with the smallest lead the best one for all."""
        lowest, which = suits.min(1)
        lead = suits[:, best] - lowest
        leading = lead[lead > 0]
        least = leading.quantile(1 - share) if len(leading) else 0.0
        return torch.where((lead > 0) & (lead >= least), which, best)

    def _places(self, order: Sequence[int]) -> Tensor:
        """(candidates,): in which place a block is left out, from 0; more than any for one that never is."""
        places = torch.full((self.policy.prior.numel(),), float(max(self.depths)))
        for place, block in enumerate(order):
            places[block - self.policy.source_block] = place
        return places

    @torch.no_grad()
    def _fix(self, places: Tensor) -> None:
        """Scores that are the same for all inputs, and rank the blocks as one order does."""
        up, policy = self.policy.decision.up, self.policy
        up.weight.zero_()
        up.bias.copy_(places.to(up.bias) / len(places) - policy.omega * policy.prior)

    def _learn(self, learnt: _Examples, places: Tensor) -> None:
        """Fit the Decision Module: at every depth, blocks that run rank above those left out.

        A logistic loss on pairs of a block that an order removes and one that it removes later or never.

        Args:
            learnt: N examples.
            places: (N, candidates), from `_places`.
        """
        decision, offset = self.policy.decision, self.policy.omega * self.policy.prior.cpu()
        device = next(decision.parameters()).device
        decision.cpu()
        tokens = torch.cat(learnt.tokens)
        mean, deviation = tokens.mean(0), tokens.std(0, correction=0).clamp(min=1e-6)
        tokens = (tokens - mean) / deviation
        owner = torch.arange(len(learnt.rows)).repeat_interleave(torch.tensor([len(each) for each in learnt.tokens]))
        counts = torch.bincount(owner).unsqueeze(1)
        later = (places.unsqueeze(1) > places.unsqueeze(2)).float()  # (N, removed, kept longer)
        optimizer = torch.optim.AdamW(decision.parameters(), lr=RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for _ in range(EPOCHS):
            scores = torch.zeros(len(places), places.shape[1]).index_add(0, owner, decision(tokens)) / counts + offset
            lead = scores.unsqueeze(1) - scores.unsqueeze(2)
            loss = (softplus(-SHARPNESS * lead) * later).sum() / later.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        decision.fold(mean, deviation)
        decision.to(device)

    @torch.no_grad()
    def _held_out(self, held_out: _Examples, seen: dict[bytes, float]) -> dict[str, float]:
        """Mean loss of the routes that the router takes, and how many different ones at the deepest pruning."""
        routes = taken(self.policy, held_out.tokens, self.depths)
        key = routes.numpy().tobytes()
        if key not in seen:
            seen[key] = float(
                measure(self.backbone, held_out.rows, routes, self.settings.loss, self.settings.batch_size).mean()
            )
        return {"loss": seen[key], "paths": float(len(routes[:, -1].unique(dim=0)))}


@torch.no_grad()
def taken(policy: BuddyPolicy, tokens: Sequence[Tensor], depths: Sequence[int]) -> Tensor:
    """Boolean (N, depths, L): the routes that a router takes after prompts.

    Args:
        policy: the router.
        tokens: features of N prompts' tokens, (tokens, width) each.
        depths: numbers of removed blocks.
    """
    device = next(policy.decision.parameters()).device
    scores = torch.stack([policy.decision(each[None].to(device))[0].double().mean(0) for each in tokens])
    orders = ranking(scores + policy.omega * policy.prior.to(device)).cpu().flip(-1) + policy.source_block
    return torch.stack([
        torch.stack([route(order, depth, policy.blocks) for depth in depths]) for order in orders.tolist()
    ])  # fmt: skip


def known_orders(record: str, candidates: range, depth: int) -> dict[str, list[int]]:
    """The searched removal orders of a training record, by name, cut to ``depth`` blocks.

    Args:
        record: file of a tuned run.
        candidates: blocks that may be left out.
        depth: the deepest pruning.

    Raises:
        UserError: no such record, or orders of another kind of backbone.
    """
    metrics = read_json(Path(record)).get("metrics") or {}
    orders = (metrics.get("router") or {}).get("orders") or {}
    if not orders:
        raise UserError(f"router.known: {record} is no training record of a tuned run: it has no removal orders")
    for name, order in orders.items():
        if len(order) < depth or not set(order) <= {*candidates}:
            raise UserError(
                f"router.known: order {name} of {record} is {order}, where {depth} blocks of {candidates.start} to "
                f"{candidates.stop - 1} are to be left out"
            )
    return {name: order[:depth] for name, order in orders.items() if name != "prior"}


State = dict[str, Tensor]
SHARPNESS = 4.0


def _copied(module: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def alike(pooled: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """(N,): k-means groups of standardised features."""
    from scipy.cluster.vq import kmeans2

    seed = int(torch.randint(2**31, (1,), generator=generator))
    _, found = kmeans2(_standard(pooled).numpy(), groups, minit="++", seed=seed)
    return torch.from_numpy(found).long()


def _standard(pooled: Tensor) -> Tensor:
    return (pooled - pooled.mean(0)) / pooled.std(0, correction=0).clamp(min=1e-9)
