"""All stages in a row, each done once: prepare, pretrain, distil, prune, quantise, evaluate, export."""
