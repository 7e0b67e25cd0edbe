"""SLEB (Song et al., arXiv 2402.09025): remove the block that is missed least, measure again without it, repeat.

The paper's third metric is the mean negative log-likelihood of the calibration set by the model as it stands, without
the block; each round removes the block where it is lowest. Its exponential, the perplexity, ranks alike and is what
stands in the scores.

The public code (jiwonsong-dev/SLEB) says what the formula leaves open, and differs in one point:

- The first and the last block are no candidates (``early_barrier=1``, ``latter_barrier=1``). So they are protected
  here; the metric itself says nothing of it.
- Of equal scores the earlier block goes.
- The paper calibrates on 128 samples of WikiText-2's training split. The code takes 128 of its rows (lines, many of
  them empty or headings), joins and tokenises them with a beginning-of-sequence token, and cuts windows of 2048 tokens
  from that: a few windows, not 128. Here ``samples`` is the number of windows.

A round costs about half of what running the model once per candidate would: blocks before the candidate run once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from buddy.baselines.removal import Peer, Removal, lowest
from buddy.importance import removal_ppl
from buddy.routing.types import CausalLM


def find(backbone: CausalLM, ids: Tensor, removed: int, candidates: Sequence[int], batch_size: int) -> Removal:
    """Remove one block after another, greedily; arguments as in `Peer`."""
    kept = list(range(len(backbone.get_decoder().layers)))
    order: list[int] = []
    rounds: list[dict[int, float]] = []
    full: float | None = None
    with tqdm(total=removed * len(ids), desc="sleb", unit="window") as bar:
        for _ in range(removed):
            left = [block for block in candidates if block in kept]
            ppl, without = removal_ppl(backbone, ids, kept, left, batch_size, bar)
            full = ppl if full is None else full
            rounds.append(without)
            order += lowest(without, left, 1)
            kept.remove(order[-1])
            bar.set_postfix_str(f"removed {order[-1]}, ppl {without[order[-1]]:.4g}")
    return Removal(order, rounds, full)


CRITERIA = {"ppl": Peer(find, protected=(0, -1), score="perplexity without the block")}
