"""Bytes between two peers: frames, messages, questions with answers. Start at wire.py and calls.py."""
