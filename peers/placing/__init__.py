"""Who holds which blocks, and who moves when. Pure rules; start at placement.py and moving.py."""
