"""dualroute: pretrain language models with DualRouting attention, then distil, prune and quantise them."""

__version__ = "0.1.0"
