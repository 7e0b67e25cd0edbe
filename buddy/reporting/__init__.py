"""From records to tables and figures: reads ``study.json`` and ``records/`` and nothing else, and imports no torch."""
