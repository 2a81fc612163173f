"""Networks: backbones and their ImageNet weights, heads, the graph of the ensemble, class activation maps, ONNX.

`efficientnet` builds the backbones, whose PyTorch weights `torch_weights` reads; `transfer` puts heads on them, with
the layers of `layers`; `ensemble` joins trained models to one; `class_activation` finds what part of an image speaks
for a class; `onnx_graph` converts a model layer by layer. Nothing here knows a dataset.
"""
