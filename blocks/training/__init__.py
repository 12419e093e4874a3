"""Training on one span: microbatches, sums of gradients, and steps. Start at span_trainer.SpanTrainer."""
