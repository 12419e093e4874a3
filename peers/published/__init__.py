"""Finished adapters that a run's owner has published: the signed list, and what each is made of. See catalogue.py."""
