"""Models for other programs: Hugging Face, ONNX, torch.export."""
