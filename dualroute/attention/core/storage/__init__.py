"""Other places and forms for what a global route keeps while decoding: files or host memory, integers."""
