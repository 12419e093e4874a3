"""The model as this machine holds it: spans of frozen blocks, LoRA, and the compute. Start at load.load_span()."""
