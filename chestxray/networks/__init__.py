"""Networks: backbones and their ImageNet weights, heads, the graph of the ensemble, class activation maps, ONNX.

`efficientnet` builds the backbones, whose PyTorch weights `torch_weights` reads; `transfer` puts heads on them, with
the layers of `layers`; `ensemble` finds the members of a model; `class_activation` maps which positions raise a
finding's logit; `onnx_graph` converts a model layer by layer. Nothing here knows a dataset.
"""
