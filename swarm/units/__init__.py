"""The units that a peer holds: on disk, in rounds, with keepers, after something was missed. Start at holder.py."""
