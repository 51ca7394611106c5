"""What a run tells about itself: TensorBoard, metrics.jsonl, the terminal."""
