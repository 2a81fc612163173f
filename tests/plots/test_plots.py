"""Figures hold the numbers and the words they were given, and are written whole."""

import io

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from chestxray.config import CLASSES
from chestxray.plots import data, evaluation, explanation, style, training

NOTE = "phantom images"


def history():
    return pd.DataFrame(
        {
            "phase": ["head"] * 3 + ["fine_tune"] * 4,
            "epoch": [1, 2, 3, 1, 2, 3, 4],
            "loss": np.linspace(2, 1, 7),
            "val_loss": np.linspace(2.2, 1.4, 7),
            "val_six_finding_auroc": [0.5, 0.55, 0.9, 0.6, 0.7, 0.75, 0.72],
        }
    )


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_learning_curves_part_the_phases_and_mark_the_last_ones_best_epoch():
    figure = training.learning_curves(history(), "3a Fine tuning", NOTE)
    assert figure.get_suptitle() == "3a Fine tuning (phantom images)"
    loss, auroc = figure.axes
    curves = [line for line in loss.get_lines() if len(line.get_xdata()) > 1 and line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in curves] == [[1, 2, 3], [4, 5, 6, 7]]
    assert np.concatenate([line.get_ydata() for line in curves]) == pytest.approx(np.linspace(2, 1, 7))
    star = next(line for line in auroc.get_lines() if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (6, 0.75)
    assert {"head", "fine tune", "best 0.750"} <= set(texts(figure))


def test_confusion_matrix_writes_counts_and_per_cent():
    counts = pd.DataFrame(np.arange(49).reshape(7, 7), index=CLASSES, columns=CLASSES)
    shares = counts.div(counts.sum(axis=1), axis=0)
    both = evaluation.confusion_matrices(counts, shares, "Ensemble on test", NOTE)
    assert {"0", "24", "48", "No finding", "Ensemble on test (phantom images)"} <= set(texts(both))
    assert both.axes[0].get_ylabel() == "true" and both.axes[0].get_xlabel() == "predicted"
    written = [text.get_text() for text in both.axes[1].texts]
    assert written == [f"{share * 100:.0f}" for share in shares.to_numpy().ravel()]


def test_roc_curves_draw_the_points_given():
    points = pd.DataFrame(
        {
            "class": ["Mass"] * 3 + ["Nodule"] * 2,
            "false_positive_rate": [0, 0.5, 1, 0, 1],
            "true_positive_rate": [0, 1, 1, 0, 1],
            "auroc": [0.75] * 3 + [0.5] * 2,
        }
    )
    axis = evaluation.roc_curves(points, "Ensemble on test", NOTE).axes[0]
    curves = {line.get_label(): line for line in axis.get_lines()}
    assert list(curves) == ["chance 0.500", "Mass 0.750", "Nodule 0.500"]
    assert list(curves["Mass 0.750"].get_ydata()) == [0, 1, 1]
    assert curves["Mass 0.750"].get_linestyle() != curves["Nodule 0.500"].get_linestyle()


def test_forest_keeps_the_order_and_says_where_nothing_was_measured():
    table = pd.DataFrame(
        {"estimate": [0.6, 0.712, np.nan], "low": [0.5, 0.7, np.nan], "high": [0.7, 0.734, np.nan]},
        index=["0 Dense", "4 Ensemble", "AP"],
    )
    axis = evaluation.forest(table, "Macro AUROC on test", NOTE, chance=0.5).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0 Dense", "4 Ensemble", "AP"]
    assert axis.yaxis_inverted()
    assert [text.get_text() for text in axis.texts] == ["0.600 (0.500–0.700)", "0.712 (0.700–0.734)", "too few images"]
    ends = axis.containers[0].lines[2][0].get_segments()
    assert ends[1][:, 0] == pytest.approx([0.7, 0.734])


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ((0.5, np.nan, np.nan), "0.500"),
        ((-0.0123, -0.05, 0.02), "−0.012 (−0.050 to 0.020)"),
        ((0.9999, 0.99, 1.0), "1.000 (0.990–1.000)"),
    ],
)
def test_numbers_are_written_in_one_form(entry, text):
    assert style.interval(pd.Series(entry, index=["estimate", "low", "high"])) == text


def test_image_grids_show_every_image_with_its_words():
    images = [np.full((8, 8, 1), value, dtype=np.uint8) for value in range(5)]
    figure = style.image_grid(images, [f"image {i}" for i in range(5)], "Radiographs", NOTE, columns=3, caption="NIH")
    shown = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]
    assert [array[0, 0] for array in shown] == [0, 1, 2, 3, 4]
    assert len(figure.axes) == 6
    assert {"image 0", "image 4", "NIH", "Radiographs (phantom images)"} <= set(texts(figure))


def test_classes_differ_in_lightness_or_dash_and_not_in_hue_alone():
    assert len({str(dash) for dash in style.DASHES.values()}) == len(CLASSES)
    assert len({to_rgb(colour) for colour in style.CLASS_COLOURS.values()}) == len(CLASSES)


def test_saving_writes_one_whole_png(tmp_path):
    figure = evaluation.roc_curves(
        pd.DataFrame(columns=["class", "false_positive_rate", "true_positive_rate", "auroc"]), "x"
    )
    path = style.save(figure, tmp_path / "figures" / "roc.png")
    assert matplotlib.image.imread(path).ndim == 3
    assert [file.name for file in path.parent.iterdir()] == ["roc.png"]


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    figure = training.learning_curves(history(), "CNN", NOTE)
    assert figure._repr_png_().startswith(b"\x89PNG")
    for drawn in (figure, style.image_grid(np.zeros((2, 8, 8)), ["a", "b"], "Two", NOTE)):
        picture = Image.open(io.BytesIO(drawn._repr_png_()))
        assert picture.mode == "P" and picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert matplotlib.pyplot.get_fignums() == []


def test_co_occurrence_shows_counts_beside_lift():
    names = ["Effusion", "Mass"]
    counts = pd.DataFrame([[1200, 3], [3, 40]], names, names)
    lift = pd.DataFrame([[np.nan, 0.5], [0.5, np.nan]], names, names)
    shown = texts(data.co_occurrence(counts, lift, "Together", NOTE))
    assert {"1.2k", "3", "40", "0.5", "Together (phantom images)"} <= set(shown)


def test_effects_are_filled_only_where_the_correction_holds_and_rare_findings_stay_empty():
    table = pd.DataFrame(
        {
            "factor": ["AP to PA"] * 3 + ["age"] * 3,
            "finding": ["Effusion", "Mass", "Hernia"] * 2,
            "odds_ratio": [2.0, 1.1, np.nan, np.nan, np.nan, np.nan],
            "odds_low": [1.5, 0.9, np.nan, np.nan, np.nan, np.nan],
            "odds_high": [2.5, 1.3, np.nan, np.nan, np.nan, np.nan],
            "effect": [0.1, 0.01, np.nan, 0.2, -0.1, np.nan],
            "effect_low": [0.05, 0.0, np.nan, 0.1, -0.2, np.nan],
            "effect_high": [0.2, 0.02, np.nan, 0.3, 0.1, np.nan],
            "p_holm": [0.001, 0.9, np.nan, 0.01, 0.9, np.nan],
        }
    )
    figure = data.effects(table, "Effects", NOTE)
    views, ages = figure.axes
    dots = {axis: [line for line in axis.lines if line.get_marker() == "o"] for axis in (views, ages)}
    assert [dot.get_xdata()[0] for dot in dots[views]] == [2.0, 1.1]
    assert [dot.get_xdata()[0] for dot in dots[ages]] == [0.2, -0.1]
    assert [dot.get_markerfacecolor() == "white" for dot in dots[views]] == [False, True]
    assert views.get_xscale() == "log" and ages.get_xscale() == "linear"


def test_patients_counts_each_patient_once():
    table = pd.DataFrame(
        {
            "patient": ["1", "1", "2"],
            "age": pd.array([50, 51, None], dtype="Int64"),
            "sex": ["F", "F", ""],
            "view": ["PA", "AP", ""],
        }
    )
    figure = data.patients(table, "People", NOTE)
    heights = [bar.get_height() for bar in figure.axes[2].patches]
    assert heights[:3] == [1, 1, 0]
    assert {"unknown", "women"} <= set(texts(figure)) | {t.get_text() for t in figure.axes[1].get_xticklabels()}


def test_grey_level_figures_draw_every_class_and_both_views():
    rng = np.random.default_rng(0)
    levels = pd.DataFrame(rng.random((len(CLASSES), 256)) / 128, index=list(CLASSES))
    figure = data.grey_levels(levels, levels.head(2).set_axis(["AP", "PA"]), "Grey", NOTE)
    assert [len(axis.lines) for axis in figure.axes] == [len(CLASSES), 2]
    table = pd.DataFrame({"label": [*CLASSES] * 4, "view": ["PA", "AP"] * 14, "mean": rng.random(28)})
    boxes = data.distributions(table, ["mean"], "Means", NOTE)
    assert {"PA", "AP"} <= set(texts(boxes))
    halves = data.mean_images([np.zeros((8, 8))] * 2, [np.ones((8, 8))] * 2, ["Mass", "Nodule"], "Means", NOTE)
    assert {"Mass", "Nodule", "mean", "standard deviation"} <= set(texts(halves)) | {
        axis.get_ylabel() for axis in halves.axes
    }


def test_pairs_write_what_the_table_holds():
    index = pd.MultiIndex.from_tuples([("a", "b"), ("a", "c"), ("b", "c")])
    gaps = pd.DataFrame({"difference": [0.1, -0.02, 0.0], "p_holm": [0.01, 0.4, 1.0]}, index=index)
    figure = evaluation.pairs(gaps, ["a", "b", "c"], "Differences", NOTE)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["+0.100*", "−0.020", "−0.100*", "0.000", "+0.020", "0.000"]  # the diagonal is empty


def test_reliability_draws_each_stage_in_each_panel():
    rows = [("Mass", stage, 0.1 + shift, 0.2, 0.1, 0.3, 5) for stage in ("before", "after") for shift in (0, 0.2)]
    points = pd.DataFrame(rows, columns=["class", "stage", "predicted", "observed", "low", "high", "images"])
    figure = evaluation.reliability(points, "Reliability", NOTE)
    assert figure.axes[0].get_title() == "Mass"
    assert {"before", "after"} <= set(texts(figure))


def test_decision_curves_show_acting_on_all_and_on_none():
    curves = pd.DataFrame({"finding": "Mass", "threshold": [0.1, 0.2], "model": [0.2, 0.1]})
    curves = curves.assign(low=0.0, high=0.3, all=[0.15, -0.1])
    axis = evaluation.decision_curves(curves, "Net benefit", NOTE).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert lines["act on the model"] == [0.2, 0.1] and lines["act on every radiograph"] == [0.15, -0.1]


def test_groups_say_their_size_and_where_nothing_was_measured():
    index = pd.MultiIndex.from_product([["sex"], ["F", "M"], ["auroc", "tpr"]])
    table = pd.DataFrame({"estimate": 0.7, "low": 0.6, "high": 0.8, "n_images": 1234, "p_holm": 0.01}, index=index)
    table["too_small"] = [False, False, True, True]
    shown = texts(evaluation.groups(table, {"sex": "Sex"}, "Groups", NOTE))
    assert {"Sex: F (1,234)", "0.700 (0.600–0.800)", "too few to measure"} <= set(shown)


def test_image_grids_lay_maps_over_images_and_frame_boxes_at_any_size():
    images = [np.zeros((16, 16), np.uint8), np.zeros((32, 32), np.uint8)]
    boxes = [[(0.25, 0.5, 0.5, 1.0)], [(0.25, 0.5, 0.5, 1.0), (0, 0, 1, 1)]]
    maps = [image / 255 for image in images]
    figure = style.image_grid(images, ["a", "b"], "Maps", NOTE, columns=2, maps=maps, boxes=boxes)
    frames = [[(f.get_x(), f.get_y(), f.get_width(), f.get_height()) for f in axis.patches] for axis in figure.axes]
    assert frames == [[(3.5, 7.5, 4, 8)], [(7.5, 15.5, 8, 16), (-0.5, -0.5, 32, 32)]]
    assert [len(axis.images) for axis in figure.axes] == [2, 2]


def test_pointing_peaks_and_robustness_draw_their_tables():
    metrics = ("pointing", "centre_pointing", "fixed_pointing", "pointing_gain")
    index = pd.MultiIndex.from_product([["Mass", "mean"], metrics], names=["finding", "metric"])
    table = pd.DataFrame({"estimate": 0.4, "low": 0.3, "high": 0.5, "n_images": 9}, index=index)
    table.loc[("mean", "pointing_gain"), "low"] = 0
    figure = explanation.pointing(table, "Pointing", NOTE)
    assert {"Mass (9)", "heat-map's peak in a box", "image's centre in a box"} <= set(texts(figure))
    circles = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    filled = [line for line in circles if line.get_markerfacecolor() == style.PALETTE[0]]
    assert [list(line.get_ydata()) for line in filled] == [[-0.22]]  # Mass alone: the mean's interval reaches zero

    scored = pd.DataFrame({"finding": "Mass", "x": [0.25, 0.25, 0.75], "y": [0.5, 0.5, 0.1], "pointing": [1.0, 1, 0]})
    fixed = pd.DataFrame({"x": [0.3], "y": [0.4]}, index=["Mass"])
    figure = explanation.peaks(scored, fixed, {"Mass": np.eye(8)}, "Peaks", NOTE, np.zeros((16, 16)))
    assert "Mass: 2 of 3 in a box" in texts(figure)
    circles, centre, point = figure.axes[0].collections
    assert circles.get_offsets().tolist() == [[0.25, 0.5], [0.75, 0.1]]
    assert circles.get_sizes()[0] == 2 * circles.get_sizes()[1]
    assert [mark.get_offsets().tolist() for mark in (centre, point)] == [[[0.5, 0.5]], [[0.3, 0.4]]]

    index = pd.MultiIndex.from_tuples([("blur", 0.0), ("blur", 2.0)], names=["degradation", "strength"])
    swept = pd.DataFrame({"estimate": [0.7, 0.6], "low": 0.5, "high": 0.8, "loss_high": [0, -0.01]}, index=index)
    figure = explanation.robustness(swept, {"blur": ("Blur", "pixels"), "noise": ("Noise", "")}, "Worse", NOTE)
    assert figure.axes[0].get_title() == "Blur" and figure.axes[0].get_xlabel() == "pixels"


def test_differences_are_written_with_their_sign():
    assert [style.signed(value) for value in (0.0123, -0.5, 0.0001, -0.0001)] == ["+0.012", "−0.500", "0.000", "0.000"]
