"""Features: whatever the picture, a row a glomerulus comes back, and what could not be measured is named."""
import numpy as np
import pandas as pd
import pytest

from eq.core.registry import EqError
from eq.data.synthetic_kidney import KidneySpec, make_kidney_field
from eq.quantification.features import FeatureOptions, feature_columns, feature_table, feature_units
from eq.quantification.instances import instance_table

KNOWN = FeatureOptions(px_size_um=1.0)


def glomeruli_of(labels: np.ndarray) -> pd.DataFrame:
    table = instance_table(labels)
    return table.assign(id=[f"x#{n}" for n in table["label"]])


@pytest.fixture(scope="module")
def field():
    return make_kidney_field(KidneySpec(size=300, glomeruli=(1, 2), edge=0, logit=-2), 5)


def measure(image: np.ndarray, labels: np.ndarray, options: FeatureOptions = KNOWN, names=None) -> pd.DataFrame:
    table = feature_table(image, labels, glomeruli_of(labels), names, options)
    numbers = table[feature_columns(table)]
    told = table["problems"] != ""
    assert numbers.isna().any(axis=1).equals(told & numbers.isna().any(axis=1)), "NaN without a problem"
    assert not np.isinf(numbers.to_numpy(float)).any()
    return table


def test_whole_field(field):
    table = measure(field.image, field.glomerulus)
    units = feature_units()
    assert list(table.columns) == ["id", *units["column"], "problems"]
    largest = table.loc[table["area_um2"].idxmax()]
    assert largest["problems"] == "" and 0.1 < largest["open_fraction"] < 0.6 and largest["nuclear_count"] > 20


def test_empty_mask(field):
    table = measure(field.image, np.zeros_like(field.glomerulus))
    assert len(table) == 0 and "open_fraction" in table


def test_one_pixel_object(field):
    labels = np.zeros_like(field.glomerulus)
    labels[100, 100] = 1
    row = measure(field.image, labels).iloc[0]
    assert row["area_um2"] == 1 and np.isnan(row["open_fraction"]) and np.isnan(row["circularity"])
    assert "lumen: too small" in row["problems"] and "geometry: too small for a shape" in row["problems"]


def test_object_that_fills_the_image(field):
    row = measure(field.image, np.ones_like(field.glomerulus)).iloc[0]
    assert row["area_um2"] == field.image.shape[0] ** 2 and row["solidity"] == 1 and np.isfinite(row["glcm_contrast"])


def test_grey_image(field):
    for image in (field.image[..., 1], np.repeat(field.image[..., 1:2], 3, 2)):
        row = measure(image, field.glomerulus).iloc[0]
        assert np.isnan(row["haematoxylin_mean"]) and "stain: no colour" in row["problems"] and "nuclei: no colour" in row["problems"]
        assert np.isfinite(row["open_fraction"]) and np.isfinite(row["glcm_contrast"])


def test_alpha_is_dropped(field):
    alpha = np.dstack([field.image, np.full(field.image.shape[:2], 7, np.uint8)])
    pd.testing.assert_frame_equal(measure(alpha, field.glomerulus), measure(field.image, field.glomerulus))


def test_sixteen_bit(field):
    deep = measure(field.image.astype(np.uint16) * 257, field.glomerulus)
    plain = measure(field.image, field.glomerulus)
    assert deep["area_um2"].equals(plain["area_um2"])
    whole = plain["area_um2"] > 5000
    assert np.allclose(deep["open_fraction"][whole], plain["open_fraction"][whole], atol=0.08)


def test_all_white_and_all_black(field):
    for level in (255, 0):
        row = measure(np.full_like(field.image, level), field.glomerulus).iloc[0]
        assert np.isnan(row["open_fraction"]) and "lumen: no tissue" in row["problems"]


def test_no_lumen():
    labels = np.zeros((160, 160), np.int32)
    rows, cols = np.indices(labels.shape)
    labels[(rows - 80) ** 2 + (cols - 80) ** 2 < 60**2] = 1
    image = np.where(labels[..., None] > 0, np.uint8((190, 100, 160)), np.uint8(245))
    row = measure(image, labels).iloc[0]
    assert (row["open_fraction"], row["lumen_count"], row["lumen_area_um2"], row["problems"]) == (0, 0, 0, "")


def test_unknown_pixel_size_gives_no_um(field):
    table = measure(field.image, field.glomerulus, FeatureOptions())
    assert not [c for c in table if "_um" in c] and {"area_px2", "perimeter_px", "lumen_density_per_px2"} <= set(table)


def test_doubling_the_pixel_size_scales_areas_by_four(field):
    one, two = (measure(field.image, field.glomerulus, FeatureOptions(px_size_um=p), ["area", "perimeter"]) for p in (1.0, 2.0))
    assert (two["area_um2"] == 4 * one["area_um2"]).all() and (two["perimeter_um"] == 2 * one["perimeter_um"]).all()


def test_coarse_image_is_told(field):
    row = measure(field.image, field.glomerulus, FeatureOptions(px_size_um=8.0)).iloc[0]
    assert "image too coarse" in row["problems"] and np.isfinite(row["area_um2"])


def test_label_that_is_not_there(field):
    table = glomeruli_of(field.glomerulus)
    table.loc[0, "label"] = 77
    row = feature_table(field.image, field.glomerulus, table, ["area", "lumen"], KNOWN).iloc[0]
    assert "label 77 is not at its place" in row["problems"] and np.isnan(row["area_um2"])


def test_nonsense_is_refused(field):
    with pytest.raises(EqError, match="not valid"):
        measure(field.image, field.glomerulus, FeatureOptions(px_size_um=-1.0))
    with pytest.raises(EqError, match="unknown stain 'paz'"):
        measure(field.image, field.glomerulus, FeatureOptions(1.0, stain="paz"), ["nuclei"])
    with pytest.raises(EqError, match=r"valid: \(H, W\)"):
        measure(np.zeros(5, np.uint8), field.glomerulus)
    with pytest.raises(EqError, match="NaN"):
        measure(np.full(field.image.shape, np.nan, np.float32), field.glomerulus)
