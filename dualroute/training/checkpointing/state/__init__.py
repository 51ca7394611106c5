"""The training's state inside a checkpoint: its layouts, reading, writing, and from one layout to another."""
