"""Step 7: the trained model as an adapter, a merged checkpoint, or GGUF files, each checked against the trained one."""
