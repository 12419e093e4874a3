"""The model as this machine holds it: spans of frozen blocks, LoRA on them, and the compute. Start at load.load_span()."""
