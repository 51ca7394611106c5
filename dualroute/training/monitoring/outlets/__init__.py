"""Where figures go: TensorBoard, services that keep runs, and whoever is to be told."""
