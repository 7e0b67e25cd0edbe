"""Training: the Decision Module with LoRA (`sft`)."""
