"""Finished adapters that a run's hosts serve beside the one that they train. The owner starts at publishing.py."""
