"""Data: the paper's sets by name, published or embedded, in the same columns.

`materialise` fetches a set into a study's folder; `read` gives its rows to a job without network; `prompts` and
`text_of` turn rows into text; `buddy.data.tasks` hands them to lm-evaluation-harness. `CATALOGUE` lists their
columns.
"""

from buddy.data.catalogue import CATALOGUE, DataSet
from buddy.data.sources import load
from buddy.data.store import materialise, read
from buddy.data.templates import instruction, prompts, text_of

__all__ = ["CATALOGUE", "DataSet", "instruction", "load", "materialise", "prompts", "read", "text_of"]
