"""ShortGPT (Men et al., arXiv 2403.03853): remove the blocks that change their input least, ranked once.

The paper's block influence (eq. 1) is ``BI_i = 1 - E[cos(X_i,t, X_i+1,t)]``, the mean over tokens and samples of one
minus the cosine between a block's input and output. Blocks are sorted by it and the lowest are deleted (sec. 3.2);
none is protected, and its Table 9 lists what was removed from Llama-2-7B: 27, 26, 25, 28, 24, 29, 23, 21, 22.

The public code (icip-cas/ShortGPT) differs in three points:

- It reads the states from ``output_hidden_states``, whose last entry has passed the final norm. Its score of the last
  block therefore mixes in that norm; ours, as the paper's, is of the block's own output.
- It adds up over tokens instead of taking the mean, which ranks alike, and counts padding tokens with the others; the
  windows here have no padding.
- It calibrates on books of PG19 in windows of 256 tokens and in float16, where a cosine close to 1 has three digits;
  here cosines are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from buddy.baselines.removal import Peer, Removal, lowest
from buddy.importance import estimate
from buddy.routing.types import CausalLM


def find(backbone: CausalLM, ids: Tensor, removed: int, candidates: Sequence[int], batch_size: int) -> Removal:
    """Rank by block influence, ascending; arguments as in `Peer`."""
    scores = dict(enumerate(estimate(backbone, ids, "block_influence", batch_size).values.tolist()))
    return Removal(lowest(scores, candidates, removed), [scores])


CRITERIA = {"block_influence": Peer(find, protected=(), score="block influence")}
