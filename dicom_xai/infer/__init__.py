"""ONNX Runtime, with proof: `session` (one graph on one device), `model` (a file and its card)."""
