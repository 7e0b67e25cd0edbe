"""``python -m buddy`` is the command ``buddy``."""

from buddy.cli import main

main()
