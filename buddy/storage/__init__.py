"""What is written to disk and read back: whole files, claimed folders, locks, checkpoints, tensors."""
