"""States of units between peers: fetched, served, and kept for those too few hold. Start at client.py."""
