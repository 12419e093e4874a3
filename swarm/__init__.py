"""One running peer and everything that a person touches. Start at node.run_node()."""
