"""Which chain of hosts a piece of work takes. Start at router.Router; the rules are in routing.py."""
