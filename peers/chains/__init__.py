"""Work that goes from host to host: texts and microbatches. Start at decode_chain.py and train_chain.py."""
