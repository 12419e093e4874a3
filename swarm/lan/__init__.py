"""Finding the run of a group on the local network. Start at discovery.py."""
