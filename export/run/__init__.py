"""An exported folder in ONNX Runtime; needs neither torch nor onnx."""
