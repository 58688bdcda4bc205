"""Annotations between programs: random sets there and back in every format, and files that were made to harm.

EQ_TEST_SETS says how many random sets a round trip takes; shapes that came later take a tenth of it.
"""
import json
import os
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eq.core.registry import EqError
from eq.data.annotation_files import FORMATS, convert_annotations, differences, read_annotations, write_annotations
from eq.data.annotation_folders import convert_sets, read_sets
from eq.data.annotation_format import ManyImages
from eq.data.shapes import AnnotationSet, ImageInfo, Part, Region, draw_regions, regions_of_labels

SIDE = 24
STEPS = {"geojson": None, "aperio": None, "labelstudio": 1024, "imagej": 1024}  # finest fraction of a pixel that is tried; None: any
SETTINGS = settings(max_examples=int(os.environ.get("EQ_TEST_SETS", "1000")), deadline=None, suppress_health_check=list(HealthCheck), database=None)
FEWER = settings(SETTINGS, max_examples=max(1, SETTINGS.max_examples // 10))
names = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn")), min_size=1, max_size=12).filter(lambda t: t.strip() == t and t != "hole")
numbers = st.floats(-1e9, 1e9, allow_nan=False) | st.integers(-(10**6), 10**6).map(float)
attributes = st.dictionaries(names.filter(lambda t: t not in ("Label", "name", "objectType")), numbers | names, max_size=3)
masks = arrays(np.int32, st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)), elements=st.integers(0, 3))


@st.composite
def grid_sets(draw) -> AnnotationSet:
    "Regions of a random label image: many parts, holes, islands in holes, corners that touch."
    labels = draw(masks)
    found = regions_of_labels(labels, {n: draw(names) for n in (1, 2, 3)})
    described = tuple(Region(r.label, r.parts, r.category, draw(attributes)) for r in found)
    return AnnotationSet(described, ImageInfo("a slide.svs", *labels.shape, px_size_um=draw(st.sampled_from([None, 0.25, 0.1234567]))))


@st.composite
def fine_sets(draw, step: int | None, width: int, holes: bool = True) -> AnnotationSet:
    "The same shapes, each moved, stretched and bent by fractions of a pixel."
    labels = draw(arrays(np.int32, st.tuples(st.integers(2, 8), st.integers(2, 8)), elements=st.integers(0, 2)))
    at = draw(st.integers(0, width - 400)) + draw(st.floats(0, 1))
    stretch = draw(st.floats(1, 40))

    def placed(ring: np.ndarray) -> np.ndarray:
        points = ring * stretch + at
        return points if step is None else np.round(points * step) / step

    regions = [
        Region(r.label, tuple(Part(placed(p.outline), tuple(placed(h) for h in p.holes) if holes else ()) for p in r.parts), draw(names), draw(attributes))
        for r in regions_of_labels(labels)
    ]
    return AnnotationSet(tuple(regions), ImageInfo("b.svs", width, width, 0.5))


def back(folder: Path, format: str, drawn: AnnotationSet) -> AnnotationSet:
    path = folder / f"x{FORMATS[format].suffixes[0]}"
    write_annotations(path, drawn, format)
    return read_annotations(path, drawn.image, format)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("annotations")


@pytest.mark.parametrize("format", FORMATS.names())
def test_pixels_classes_and_attributes_come_back(format, folder):
    "On the pixel grid every format gives equal regions, and the same label image."

    @SETTINGS
    @given(grid_sets())
    def check(drawn: AnnotationSet) -> None:
        read = back(folder, format, drawn)
        assert read == drawn, "\n".join(differences(drawn, read))
        size = drawn.image.height, drawn.image.width
        assert np.array_equal(draw_regions(read.regions, *size), draw_regions(drawn.regions, *size))

    check()


@pytest.mark.parametrize("format", sorted(STEPS))
def test_fractions_of_a_pixel_come_back(format, folder):
    "At 100,000 pixels in Label Studio's percent, anywhere in GeoJSON and XML, within the 32 bits of ImageJ up to 8,192 pixels."
    width = 8_192 if format == "imagej" else 100_000

    @SETTINGS
    @given(fine_sets(STEPS[format], width))
    def check(drawn: AnnotationSet) -> None:
        assert back(folder, format, drawn).regions == drawn.regions

    check()


def test_polygons_without_holes_keep_fractions_in_coco(folder):
    @SETTINGS
    @given(fine_sets(None, 100_000, holes=False))
    def check(drawn: AnnotationSet) -> None:
        assert back(folder, "coco", drawn) == drawn

    check()


@st.composite
def cell_sets(draw) -> AnnotationSet:
    "Cells as QuPath has them, some with a nucleus of one part or more, some with an identifier."
    drawn = draw(grid_sets())
    nuclei = regions_of_labels(draw(masks))
    kinds = st.sampled_from(["cell", "detection", "tile", "annotation"])
    regions = []
    for region in drawn.regions:
        kind, identity, nucleus = draw(kinds), draw(st.none() | st.uuids()), draw(st.sampled_from([(), *(n.parts for n in nuclei)]))
        told = ({} if kind == "annotation" else {"objectType": kind}) | ({} if identity is None else {"id": str(identity)})
        regions.append(replace(region, attributes={**region.attributes, **told}, nucleus=nucleus))
    return AnnotationSet(tuple(regions), drawn.image)


def test_cells_keep_their_nuclei_in_geojson_and_lose_them_by_name_elsewhere(folder):
    "Never in silence: whatever a format did not keep is in the list."

    @FEWER
    @given(cell_sets(), st.sampled_from([f for f in FORMATS.names() if f != "geojson"]))
    def check(drawn: AnnotationSet, other: str) -> None:
        assert back(folder, "geojson", drawn) == drawn
        read = back(folder, other, drawn)
        cells = [r.label for r in drawn.regions if r.nucleus]
        assert any("no nucleus" in line and f"{len(cells)} regions" in line for line in differences(drawn, read)) == bool(cells)
        assert replace(drawn, regions=tuple(replace(r, nucleus=()) for r in drawn.regions)) == read

    check()


def test_a_cell_of_qupath_comes_back_as_a_cell(tmp_path):
    "The file that the review found: the nucleus was gone, and the tool said that nothing was lost."
    ring, inner = [[0, 0], [8, 0], [8, 8], [0, 0]], [[5, 1], [6, 1], [6, 2], [5, 1]]
    cell = {"type": "Feature", "id": "8b6e3f6a-3c1f-4d0e-9a8e-0d0a2b9f7c11", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    cell |= {"nucleusGeometry": {"type": "Polygon", "coordinates": [inner]}, "properties": {"objectType": "cell"}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [cell]}))
    assert convert_annotations(tmp_path / "a.geojson", tmp_path / "b.geojson", "geojson")[1] == []
    (stored,) = json.loads((tmp_path / "b.geojson").read_text())["features"]
    assert {key: stored[key] for key in ("id", "geometry", "nucleusGeometry")} == {key: cell[key] for key in ("id", "geometry", "nucleusGeometry")}
    assert stored["properties"]["objectType"] == "cell"
    assert convert_annotations(tmp_path / "a.geojson", tmp_path / "b.xml", "aperio")[1] == ["1 regions (1) have no nucleus, or another one"]


@pytest.mark.parametrize("format", [f for f in FORMATS.names() if isinstance(FORMATS[f], ManyImages)])
def test_many_images_come_back_from_one_file_and_from_a_folder(format, tmp_path):
    "A project, a folder of GeoJSON, and a project again; images without regions too."

    @settings(SETTINGS, max_examples=max(1, SETTINGS.max_examples // 50))  # each writes a dozen files to the disk
    @given(st.lists(grid_sets(), min_size=2, max_size=4))
    def check(drawn: list[AnnotationSet]) -> None:
        made = Path(tempfile.mkdtemp(dir=tmp_path))
        sets = [replace(one, image=replace(one.image, name=f"{i}.svs")) for i, one in enumerate(drawn)]
        suffix, target = FORMATS[format].suffixes[0], FORMATS[format]
        assert isinstance(target, ManyImages)
        target.write_all(made / f"a{suffix}", sets)
        assert target.read_all(made / f"a{suffix}") == sets
        named = {one.image.name: one for one in sets}
        assert convert_sets(made / f"a{suffix}", made / "apart", "geojson") == (named, [])
        assert read_sets(made / "apart") == named
        assert convert_sets(made / "apart", made / f"b{suffix}", format) == (named, [])
        assert target.read_all(made / f"b{suffix}") == sets

    check()


boxes = st.tuples(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(1, 20_000), st.integers(1, 20_000))


def test_ellipses_of_imagescope_are_no_boxes(tmp_path):
    "Two opposite corners or four, as vertices of a region of type 2: the area is that of the ellipse, within 0.2 %."

    @FEWER
    @given(boxes, st.booleans())
    def check(box, four: bool) -> None:
        x, y, w, h = box
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)] if four else [(x + w, y), (x, y + h)]
        vertices = "".join(f'<Vertex X="{a}" Y="{b}"/>' for a, b in corners)
        (tmp_path / "a.xml").write_text(f'<Annotations><Annotation><Regions><Region Type="2"><Vertices>{vertices}</Vertices></Region></Regions></Annotation></Annotations>')
        read = read_annotations(tmp_path / "a.xml")
        ellipse = shapely.Polygon(read.regions[0].parts[0].outline)
        assert abs(ellipse.area / (np.pi * w * h / 4) - 1) < 0.002 and np.allclose(ellipse.bounds, (x, y, x + w, y + h), rtol=0, atol=max(w, h) * 0.002)
        assert read.notes[0].startswith("1 ellipses became polygons")

    check()


def test_boxes_and_ellipses_of_label_studio_turn_as_they_do_there(tmp_path):
    "A box about the corner it stores, an ellipse about its centre, clockwise on the screen, in pixels: against shapely."
    width, height = 80_000, 60_000

    @FEWER
    @given(boxes, st.floats(-360, 360))
    def check(box, degrees: float) -> None:
        x, y, w, h = box
        place = {"original_width": width, "original_height": height}
        values = [{"x": x / width * 100, "y": y / height * 100, "width": w / width * 100, "height": h / height * 100, "rotation": degrees}]
        values.append({"x": x / width * 100, "y": y / height * 100, "radiusX": w / width * 100, "radiusY": h / height * 100, "rotation": degrees})
        result = [place | {"type": f"{kind}labels", "value": v | {f"{kind}labels": [kind]}} for kind, v in zip(("rectangle", "ellipse"), values, strict=True)]
        (tmp_path / "a.json").write_text(json.dumps([{"data": {"image": "a.png"}, "annotations": [{"result": result}]}]))
        read = read_annotations(tmp_path / "a.json")
        found = [shapely.Polygon(region.parts[0].outline) for region in read.regions]
        expected = [shapely.affinity.rotate(shapely.box(x, y, x + w, y + h), degrees, (x, y)), shapely.affinity.scale(shapely.Point(x, y).buffer(1, 256), w, h)]
        expected[1] = shapely.affinity.rotate(expected[1], degrees, (x, y))
        assert [r.category for r in read.regions] == ["rectangle", "ellipse"]
        assert found[0].hausdorff_distance(expected[0]) < 0.01 and found[1].hausdorff_distance(expected[1]) < 0.2 + max(w, h) * 0.002
        assert abs(found[1].area / (np.pi * w * h) - 1) < 0.002 + 0.01 / min(w, h)

    check()


def test_what_is_lost_is_measured(tmp_path):
    "A sub-pixel outline far out in an ImageJ zip, a hole between pixels in COCO, an overlap in a label image."
    far = Region(1, (Part([(90_000.123, 5), (90_010.5, 5), (90_010.5, 20)]),))
    hole = Region(2, (Part([(0, 0), (9, 0), (9, 9), (0, 9)], ([(2.5, 2.5), (2.5, 4), (4, 4)],)),))
    over = Region(3, (Part([(1, 1), (8, 1), (8, 8), (1, 8)]),))
    drawn = AnnotationSet((far, hole, over), ImageInfo("a", 100, 100_000))
    source = write_annotations(tmp_path / "a.geojson", drawn, "geojson")
    lost = {f: convert_annotations(source, tmp_path / f"b{FORMATS[f].suffixes[0]}", f)[1] for f in FORMATS.names()}
    assert lost["geojson"] == [] and lost["labelstudio"][0].startswith("1 regions (1) have points moved by up to")
    assert lost["imagej"][0].startswith("1 regions (1) have points moved by up to 0.00") and "not kept: image name" in lost["imagej"][1]
    assert len(lost["coco"]) == 1 and lost["coco"][0].startswith("1 regions (2) have another shape: up to ")
    assert "have another shape" in lost["label"][0] and "(1, 2)" in lost["label"][0]


def bomb_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(f"{i}.roi", bytes(60 * 2**20) if i < 5 else b"")


def named_zip(name: str):
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"Iout" + bytes(100))

    return write


def text(content: str):
    return lambda path: path.write_text(content)


VERTEX = '<Annotations><Annotation Name="a"><Regions><Region>{}</Region></Regions></Annotation></Annotations>'
RING = '[[[0,0],[4,0],[4,4]]]'
HOSTILE = {
    "cut.geojson": text('{"type":"FeatureCollection","features":[{"type":"Fea'),
    "nan.geojson": text('[{"geometry":{"type":"Polygon","coordinates":[[[0,0],[NaN,0],[4,4]]]}}]'),
    "infinite.geojson": text('[{"geometry":{"type":"Polygon","coordinates":[[[0,0],[1e999,0],[4,4]]]}}]'),
    "far.geojson": text('[{"geometry":{"type":"Polygon","coordinates":[[[0,0],[1e12,0],[4,4]]]}}]'),
    "deep.geojson": text("[" * 200_000),
    "class.geojson": text(f'[{{"geometry":{{"type":"Polygon","coordinates":{RING}}},"properties":{{"classification":{{"name":"a\\u0000"}}}}}}]'),
    "nucleus.geojson": text(f'[{{"geometry":{{"type":"Polygon","coordinates":{RING}}},"nucleusGeometry":{{"type":"Polygon","coordinates":[[[0,0],[NaN,1],[1,1]]]}}}}]'),
    "binary.json": lambda path: path.write_bytes(bytes(range(256)) * 10),
    "cut.coco.json": text('{"images":[{"id":1,"height":5,"width":5}],"annotations":[{"image_id":1,"segmentation":[[0,0'),
    "runs.coco.json": text(
        '{"images":[{"id":1,"height":16000000,"width":16000000}],"annotations":[{"id":1,"image_id":1,'
        '"segmentation":{"size":[16000000,16000000],"counts":[0,256000000000000]}}]}'
    ),
    "short.coco.json": text('{"images":[{"id":1,"height":5,"width":5}],"annotations":[{"id":1,"image_id":1,"segmentation":{"size":[5,5],"counts":[3,4]}}]}'),
    "packed.coco.json": text('{"images":[{"id":1,"height":5,"width":5}],"annotations":[{"id":1,"image_id":1,"segmentation":{"size":[5,5],"counts":"%s"}}]}' % ("o" * 99)),
    "size.coco.json": text('{"images":[{"id":1,"height":1000000000,"width":1000000000}],"annotations":[]}'),
    "percent.labelstudio.json": text(
        '[{"data":{"image":"a"},"annotations":[{"result":[{"type":"polygonlabels","original_width":9,"original_height":9,"value":{"points":[[0,0],[NaN,1],[1,1]]}}]}]}]'
    ),
    "brush.labelstudio.json": text(
        '[{"data":{"image":"a"},"annotations":[{"result":[{"type":"brushlabels","original_width":32768,"original_height":32768,"value":{"rle":[255,255,255,255,57,27]}}]}]}]'
    ),
    "cut.labelstudio.json": text(
        '[{"data":{"image":"a"},"annotations":[{"result":[{"type":"brushlabels","original_width":4,"original_height":4,"value":{"rle":[0,0,0,64,57,27]}}]}]}]'
    ),
    "ellipse.labelstudio.json": text(
        '[{"data":{"image":"a"},"annotations":[{"result":[{"type":"ellipselabels","original_width":4,"original_height":4,'
        '"value":{"x":1,"y":1,"radiusX":1e999,"radiusY":1}}]}]}]'
    ),
    "laughs.xml": text('<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "%s">]><Annotations>&b;</Annotations>' % ("&a;" * 1000)),
    "outside.xml": text('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><Annotations>&a;</Annotations>'),
    "parameter.xml": text('<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><Annotations/>'),
    "deep.xml": text("<a>" * 100_000),
    "cut.xml": text(VERTEX[:-20]),
    "nan.xml": text(VERTEX.format('<Vertices><Vertex X="0" Y="0"/><Vertex X="nan" Y="0"/><Vertex X="1" Y="1"/></Vertices>')),
    "word.xml": text(VERTEX.format('<Vertices><Vertex X="one" Y="0"/></Vertices>')),
    "bomb.zip": bomb_zip,
    "up.zip": named_zip("../../x.roi"),
    "root.zip": named_zip("/etc/x.roi"),
    "drive.zip": named_zip("C:\\x.roi"),
    "empty.zip": lambda path: path.write_bytes(b"PK\5\6" + bytes(10)),
    "points.roi": lambda path: path.write_bytes(b"Iout" + bytes([0, 227, 0, 0]) + bytes(8) + b"\0\0" + (10**9).to_bytes(4, "big") + bytes(80)),
    "shape.roi": lambda path: path.write_bytes(b"Iout" + bytes([0, 227, 1, 0]) + bytes(28) + (2**31 - 1).to_bytes(4, "big") + bytes(80)),
    "short.roi": lambda path: path.write_bytes(b"Iout"),
    "word.tif": text("II*\0 no"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_are_refused_by_name_and_fast(name, tmp_path):
    HOSTILE[name](tmp_path / name)
    start = time.process_time()
    with pytest.raises(EqError) as caught:
        read_annotations(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - start < 5


def test_damaged_files_never_crash(tmp_path):
    "Bytes flipped or cut: read, or refused by name."
    donut = Region(1, (Part([(0, 0), (9, 0), (9, 9), (0, 9)], ([(2, 2), (2, 4), (4, 4)],)), Part([(20, 0), (25, 0), (25, 5)])), "tuft", {"grade": 2})
    drawn = AnnotationSet((donut, Region(2, (Part([(1.5, 1), (5, 1), (5, 5)]),))), ImageInfo("a.png", 30, 30))
    rng, refused = np.random.default_rng(0), 0
    for format in FORMATS.names():
        path = tmp_path / f"a{FORMATS[format].suffixes[0]}"
        sound = write_annotations(path, drawn, format).read_bytes()
        for _ in range(150):
            damaged = bytearray(sound)
            for _ in range(int(rng.integers(1, 4))):
                damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
            path.write_bytes(bytes(damaged[: int(rng.integers(1, len(damaged)))] if rng.random() < 0.2 else damaged))
            try:
                read_annotations(path, None, format)
            except EqError as error:
                refused += path.name in str(error)
    assert refused > 200


def test_many_regions_take_seconds(tmp_path):
    labels = np.kron(np.arange(1, 2501, dtype=np.int32).reshape(50, 50), np.pad(np.ones((6, 6), np.int32), 1))
    drawn = AnnotationSet(regions_of_labels(labels, "nucleus"), ImageInfo("a.png", 400, 400))
    for format in FORMATS.names():
        start = time.process_time()
        assert json.dumps(differences(drawn, back(tmp_path, format, drawn))) == "[]"
        assert time.process_time() - start < 10, format
