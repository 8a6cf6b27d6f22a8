"""The two tuning stages: DeepSpeed engine, training loop, checkpoints."""
