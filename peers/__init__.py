"""Who else is there, and how to reach them. Start at directory.Directory and chain.Chain."""
