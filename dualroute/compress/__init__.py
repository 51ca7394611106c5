"""From a trained model to a smaller one: pruning, quantisation."""
