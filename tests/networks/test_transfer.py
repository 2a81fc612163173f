"""Networks: raw 8-bit grey in, seven probabilities out, whatever is in between."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from chestxray.config import ALL_LABELS, CLASSES, StudyError
from chestxray.data import augmentation
from chestxray.networks import transfer
from chestxray.training import model_file


def radiographs(count=3, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def small_transfer(**changes):
    settings = {"backbone": "EfficientNetLite0", "image_size": 32, "weights": None}
    return transfer.transfer(**{**settings, "augment": augmentation.layers(1.0, 0), **changes})


@pytest.mark.parametrize("make", [transfer.dense, transfer.cnn])
def test_baselines_give_probabilities(make):
    probabilities = make(32)(radiographs(), training=False).numpy()
    assert probabilities.shape == (3, 7)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_transfer_heads_share_one_backbone():
    net = small_transfer()
    x = radiographs()
    pooled = net.features(x, training=False)
    assert np.allclose(net.head(pooled, training=False), net.classifier(x, training=False), atol=1e-5)
    findings = net.findings(x, training=False).numpy()
    assert findings.shape == (3, 15) and ((findings > 0) & (findings < 1)).all()
    before = net.classifier(x, training=False).numpy()
    net.backbone.weights[0].assign(net.backbone.weights[0] * 0)
    assert not np.allclose(before, net.classifier(x, training=False))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_classifier_answers_by_both_heads(share):
    log_odds = np.linspace(-3, 0, 7).astype("float32")
    net = small_transfer(log_odds=log_odds, share=share)
    x = radiographs()
    sigmoids = net.findings(x, training=False).numpy().astype(float)
    asked = sigmoids[:, [ALL_LABELS.index(name) for name in CLASSES]]
    own = net.head(net.features(x, training=False), training=False).numpy()
    # The same by odds: how they changed by the findings' head, and the class head's logits, which its softmax hides up
    # to a number for each radiograph.
    pooled = net.features(x, training=False).numpy()
    kernel, bias = net.classifier.get_layer("classes").get_weights()
    logits = pooled @ kernel + bias
    assert np.allclose(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), own, atol=1e-5)
    odds = (asked / (1 - asked) / np.exp(log_odds)) ** share * np.exp(logits) ** (1 - share)
    expected = odds / (1 + odds)
    assert np.allclose(net.classifier(x, training=False), expected, atol=1e-5)
    heads = keras.Model(net.classifier.input, net.classifier.get_layer("both_heads").output)
    assert np.allclose(transfer.combine_heads(heads(x, training=False).numpy(), log_odds, share), expected, atol=1e-5)


def test_the_blend_is_not_trained():
    net = small_transfer(log_odds=np.zeros(7))
    assert not any("blend" in v.path for v in net.classifier.trainable_variables)


def test_a_share_beyond_one_is_refused():
    with pytest.raises(StudyError, match=r"share 1\.5: give 0"):
        small_transfer(log_odds=np.zeros(7), share=1.5)


def test_augmentation_acts_while_training_only():
    net = small_transfer(dropout=0.0, drop_connect_rate=0.0)
    layers = [layer for layer in net.features.layers if isinstance(layer, keras.layers.RandomRotation)]
    x = radiographs(1).astype("float32")
    assert not np.allclose(layers[0](x, training=True), x)
    assert np.allclose(net.classifier(x, training=False), net.classifier(x, training=False))


def test_the_backbone_sees_its_own_size():
    net = small_transfer(member_size=48)
    assert net.classifier.input_shape == (None, 32, 32, 1)
    assert net.backbone.input_shape == (None, 48, 48, 3)


def test_freezing_leaves_the_head_to_learn():
    net = small_transfer()
    net.train_backbone(False)
    assert {v.path.split("/")[0] for v in net.classifier.trainable_variables} == {"classes"}


@pytest.mark.parametrize("backbone", ["EfficientNetLite0", "EfficientNetB0"])
def test_the_first_blocks_can_be_frozen(backbone):
    net = small_transfer(backbone=backbone)
    everything = {v.path for v in net.backbone.trainable_variables}
    net.train_backbone(True, frozen=2)
    left = {v.path for v in net.backbone.trainable_variables}
    blocks = {path.split("block")[1][0] for path in left if "block" in path}
    assert blocks == set("34567") and any("top_conv" in path for path in left)
    assert not any("stem" in path for path in left)
    before = [v.numpy() for v in net.backbone.weights]
    net.findings.compile("sgd", "mse")
    net.findings.fit(radiographs(8), np.ones((8, 15)), verbose=0)
    changed = {v.path for v, old in zip(net.backbone.weights, before, strict=True) if not np.array_equal(v, old)}
    assert changed and not any("stem" in path or "block1" in path or "block2" in path for path in changed)
    net.train_backbone(True)
    assert {v.path for v in net.backbone.trainable_variables} == everything


@pytest.mark.parametrize("backbone", ["EfficientNetLite0", "EfficientNetB0"])
def test_a_network_can_be_divided_behind_its_frozen_blocks(backbone):
    net = small_transfer(backbone=backbone, member_size=64, drop_connect_rate=0.0)
    net.train_backbone(True, frozen=3)
    first, last = net.divide(3)
    x = radiographs()
    maps = first(x, training=False)
    assert maps.shape[:3] == (3, 8, 8)
    assert np.allclose(last(maps, training=False), net.findings(x, training=False), atol=1e-5)
    # No augmentation before the cut, and nothing to learn there; behind it all that `findings` learns.
    assert np.array_equal(first(x, training=True), maps) and not first.trainable_variables
    assert {v.path for v in last.trainable_variables} == {v.path for v in net.findings.trainable_variables}
    with pytest.raises(StudyError, match="frozen 8: the backbone has blocks 1 to 7"):
        net.divide(8)


def test_batchnorm_takes_the_momentum_asked_for():
    net = small_transfer(bn_momentum=0.8)
    momenta = {layer.momentum for layer in net.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)}
    assert momenta == {0.8}


def test_a_saved_model_takes_raw_pixels(tmp_path):
    net = small_transfer()
    x = radiographs()
    model_file.save_model(net.classifier, tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.allclose(loaded(x, training=False), net.classifier(x, training=False), atol=1e-6)


def test_means_and_variances_of_every_block_lie_side_by_side():
    net = small_transfer(pooling="blocks", augment=())
    x = radiographs()
    ends = ("1a", "2a", "2b", "3a", "3b", "4a", "4b", "4c", "5a", "5b", "5c", "6a", "6b", "6c", "6d", "7a")
    names = [layer.name for layer in net.backbone.layers]
    last = [max((n for n in names if n.startswith(f"block{end}_")), key=names.index) for end in ends]
    maps = keras.Model(net.backbone.input, [net.backbone.get_layer(name).output for name in last])
    three = np.repeat(x.astype("float32"), 3, axis=-1)
    seen = [np.asarray(each, "float64") for each in maps(three, training=False)]
    pooled = [each.mean(axis=(1, 2)) for each in seen] + [each.var(axis=(1, 2)) for each in seen[:-1]]
    expected = np.concatenate(pooled, axis=1)
    assert expected.shape == (3, 1808 + 1808 - 320)
    assert [name for name, _ in net.pooled][::16] == ["average_pooling_block1a", "variance_block1a"]
    assert sum(width for _, width in net.pooled) == 3296
    assert np.allclose(net.features(x, training=False), expected, atol=1e-3, rtol=1e-3)


def test_variances_too_large_for_half_precision_are_told():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        net = small_transfer(pooling="stages", augment=(), image_size=64)
    finally:
        keras.config.set_dtype_policy("float32")
    block = [layer for layer in net.backbone.layers if layer.name.startswith("block6")]
    maps = keras.Model(net.backbone.input, block[-1].output)
    x = radiographs(size=64)
    three = np.repeat(x.astype("float32"), 3, axis=-1)
    norm = [layer for layer in block if isinstance(layer, keras.layers.BatchNormalization)][-1]
    norm.gamma.assign(norm.gamma * 3000 / np.abs(maps(three, training=False)).max())
    expected = np.asarray(maps(three, training=False), "float64").var(axis=(1, 2))
    told = np.asarray(net.features(x, training=False))[:, -expected.shape[1] :]
    assert net.pooled[-1][0] == "variance_block6" and np.iinfo("uint16").max < expected.max() < 3000**2
    assert np.allclose(told, expected, rtol=0.01, atol=1)


def test_pooled_features_are_standardised_within_the_network():
    net = small_transfer(pooling="blocks", augment=())
    x = np.random.default_rng(0).integers(0, 255, (24, *radiographs().shape[1:]), "uint8")
    before = np.asarray(net.features(x, training=False))
    after = net.standardise(before)
    assert np.allclose(net.features(x, training=False), after, atol=1e-3)
    # What hardly varies is not made to; of 32 px, the last maps are one place, which doesn't vary at all.
    vary = before.var(axis=0) > max(1e-5, 1e-3 * np.median(before.var(axis=0)))
    assert vary.mean() > 0.3
    assert np.allclose(after.mean(axis=0), 0, atol=1e-3) and np.allclose(after[:, vary].std(axis=0), 1, atol=0.01)
    # Fitting doesn't move what it holds.
    net.train_backbone(True)
    assert not [v for v in net.findings.trainable_variables if "standardised" in v.path]
    with pytest.raises(StudyError, match="only what is pooled at several stages"):
        small_transfer().standardise(before)


@pytest.mark.parametrize("pooling", ["last", "stages", "blocks"])
@pytest.mark.parametrize("backbone", ["EfficientNetLite0", "EfficientNetB0"])
def test_no_gradient_is_a_sum_of_three(backbone, pooling):
    """TensorFlow adds two terms to the same number each time, but three in the order in which memory is free."""
    net = small_transfer(backbone=backbone, pooling=pooling, augment=(), log_odds=np.zeros(7, "float32"))

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            told = tf.reduce_sum(net.classifier(x, training=True))
        return tape.gradient(told, net.classifier.trainable_variables)

    graph = gradients.get_concrete_function(tf.zeros((2, 32, 32, 1))).graph
    terms = [len(operation.inputs) for operation in graph.get_operations() if operation.type == "AddN"]
    assert set(terms) == {2}


@pytest.mark.parametrize("backbone", ["EfficientNetLite2", "EfficientNetB0"])
def test_every_block_is_found_in_each_family(backbone):
    net = small_transfer(backbone=backbone, pooling="blocks")
    means = [layer for layer in net.features.layers if layer.name.startswith("average_pooling_")]
    assert len(means) == {"EfficientNetLite2": 21, "EfficientNetB0": 16}[backbone]
    net.train_backbone(False)
    assert not net.features.trainable_variables
    stages = small_transfer(backbone=backbone, pooling="stages")
    assert sum(layer.name.startswith("average_pooling_") for layer in stages.features.layers) == 7
    with pytest.raises(StudyError, match="pooling 'everywhere' is unknown; there are: last, stages, blocks"):
        small_transfer(pooling="everywhere")
