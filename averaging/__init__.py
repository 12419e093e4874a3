"""How many adapters become one. Start at rounds.plan() and averager.Averager.run_round()."""
