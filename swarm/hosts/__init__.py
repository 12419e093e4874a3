"""A peer that holds blocks for others: which, when it serves them, when it steps back. Start at hosting.py."""
