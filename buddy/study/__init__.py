"""The study around the core: its settings, its grid of runs, its jobs, their records and how far they are."""
