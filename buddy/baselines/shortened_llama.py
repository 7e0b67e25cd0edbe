"""Shortened LLaMA (Kim et al., arXiv 2402.02834): remove the blocks that matter least, ranked once.

Two of the paper's criteria, the two that its authors publish models of, each with the first four and the last two blocks
kept, as their pruning script has it unless told ``--no_plus_heuristic``:

- ``ppl``: perplexity of the calibration set without the block, ascending.
- ``taylor``: the sum over the block's weights of |weight * gradient of the calibration set's loss|, ascending
  ("Taylor+"): by the score alone early blocks look unimportant (the authors' own list for Llama-2-7B begins with block 0),
  while removing them ruins the model.

``ppl_unprotected`` is the first to the letter of the paper, which protects no block by it. Its order is the same until it
reaches one of the six, in the authors' lists place 27 of 32 for Llama-2-7B (block 30) and place 15 for Llama-3-8B (block 3).

The public code (Nota-NetsPresso/shortened-llm) differs in two more ways:

- The formula has the linear weights; the code also adds the two norms of the block. So do we.
- Calibration: 10 samples of 128 tokens drawn from BookCorpus, each from another text. The Taylor gradient there is of
  all samples in one batch, so products are added up before absolute values are taken (variant ``corpus`` of
  `buddy.importance.TAYLOR`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from buddy.baselines.removal import Peer, Removal, lowest
from buddy.importance import estimate, removal_ppl
from buddy.routing.types import CausalLM

FIRST_FOUR_LAST_TWO = (0, 1, 2, 3, -2, -1)


def by_ppl(backbone: CausalLM, ids: Tensor, removed: int, candidates: Sequence[int], batch_size: int) -> Removal:
    """Rank by the perplexity without the block, ascending; arguments as in `Peer`."""
    full, without = removal_ppl(backbone, ids, range(len(backbone.get_decoder().layers)), None, batch_size)
    return Removal(lowest(without, candidates, removed), [without], full)


def by_taylor(backbone: CausalLM, ids: Tensor, removed: int, candidates: Sequence[int], batch_size: int) -> Removal:
    """Rank by the first-order Taylor score, ascending; arguments as in `Peer`, one window per pass."""
    scores = dict(enumerate(estimate(backbone, ids, "taylor", batch_size, taylor="corpus").values.tolist()))
    return Removal(lowest(scores, candidates, removed), [scores])


CRITERIA = {
    "ppl": Peer(by_ppl, protected=FIRST_FOUR_LAST_TWO, score="perplexity without the block"),
    "taylor": Peer(by_taylor, protected=FIRST_FOUR_LAST_TWO, score="sum of |weight * gradient|"),
    "ppl_unprotected": Peer(by_ppl, protected=(), score="perplexity without the block"),
}
