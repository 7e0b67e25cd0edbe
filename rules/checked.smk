# Study files are read once before Snakemake reads them: it would take the second of two equal keys, and tell a slip without
# file and line.
import os

from snakemake.exceptions import WorkflowError

from buddy.errors import UserError
from buddy.study.config import read_file


def checked(ask, *arguments):
    """What `ask` answers; a user's mistake is one line that names file, key, value and what is allowed."""
    try:
        return ask(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


for _file in ("config.yaml", *workflow.overwrite_configfiles):
    checked(read_file, os.path.relpath(_file))
