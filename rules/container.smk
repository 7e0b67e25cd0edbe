# With `--sdm apptainer` every job runs in the image of envs/buddy.def; without it this file says nothing. It comes before all
# rules: a container that is named later is none of theirs.
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

IMAGE = "envs/buddy.sif"

if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method and not os.path.exists(IMAGE):
    raise WorkflowError(
        f"{IMAGE}: no such image; build it with: apptainer build {IMAGE} envs/buddy.def (docs/containers.md)"
    )


container: IMAGE
