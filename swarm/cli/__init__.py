"""The `swarm` command: one file per command. Start at main.main()."""
