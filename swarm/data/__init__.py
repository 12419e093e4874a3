"""Training data: rows of text, from files and tables to batches of token ids. Start at stream.load_samples()."""
