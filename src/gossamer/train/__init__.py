"""Training sparse models: 2:4 pre-training, gradual block pruning, distillation."""
