"""``python -m buddy`` is the command ``buddy``."""

import sys

from buddy import warm

status = warm.run(sys.argv[1:])
if status is not None:
    sys.exit(status)

from buddy.cli import main  # noqa: E402

main()
