"""Related attention systems, a slice each: attention, model, checkpoints."""
