"""W&B as a view on the results: nothing waits for it, nothing fails with it, nothing reads it back.

    with track("train", study="demo", run_path=run.path, group="smollm2-135m × buddy", config=settings,
               folder=study_folder / "wandb", settings=study.tracking, reads=[backbone], writes=[out]) as tracker:
        tracker.log({"loss": 2.3}, step=10)
        tracker.summary({"final_loss": 1.9})

Records stay the one source of truth. Whatever goes wrong between here and W&B's server is told in one warning, and
the job goes on without. W&B is imported only where a run is really opened.

`job` is one job's run, `modes` where it goes, `identity` its id, `journal` what it was told, `lineage` what it was made
from, `client` W&B's own client, and `sync` sends what has not arrived.
"""

from buddy.tracking.identity import run_id, study_id
from buddy.tracking.job import Tracker, track
from buddy.tracking.modes import choose_mode

__all__ = ["Tracker", "choose_mode", "run_id", "study_id", "track"]
