"""Text through a span: caches of many sessions, and the passes that extend them together. Start at cache.py."""
