"""From a checkpoint to ONNX halves, engines and the engine folder."""
