"""Training loops of one's own as members of a run. Start at member.py."""
