"""Networks: backbones and their ImageNet weights, heads, the graph of the ensemble, class activation maps, ONNX."""
