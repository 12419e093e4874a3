"""Who is let into a private run. The rules are in membership.py and revocation.py; gate.py applies them."""
