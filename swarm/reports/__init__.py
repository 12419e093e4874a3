"""What peers measured and how the swarm stands, for people and other programs. Start at metrics.py and status.py."""
