"""A trainer's loop over batches, and what each round's adapter is worth on held-out rows. Start at jobs.py."""
