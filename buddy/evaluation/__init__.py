"""Measuring: accuracy through lm-evaluation-harness (`harness`) and speed (`latency`)."""
