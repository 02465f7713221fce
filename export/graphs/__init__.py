"""Networks to graphs, and the folder they lie in; needs torch and onnx."""
