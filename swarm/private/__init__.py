"""Private runs: who is let in, by whose word, and how somebody is put out. Start at entry.py."""
