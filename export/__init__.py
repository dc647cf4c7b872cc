"""From a run folder to a bundle of ONNX graphs, the gate that lets it exist, and engines built from it."""
