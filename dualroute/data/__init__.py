"""From shards to batches: manifest (what there is) → plan (what comes next) → reader (tensors) → module.

The parts are imported from their modules: `data_prep` needs `manifest` alone and must not pay for torch.
"""
