"""Computed regions: RoIAlign, backbones, the mini detector, CLIP's grid, and the cache of them."""

import base64
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from tdlib.core.store import CacheError, NotFiniteError
from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import read_header, upright_boxes
from tdlib.method.tokens import grid_boxes
from tdlib.regions.backbones import (
    DetectorBackbone,
    MiniDetector,
    TorchvisionBackbone,
    load_detector,
    pool_regions,
    save_detector,
)
from tdlib.regions.computed import BackboneRegions, CachedRegions, ClipGridRegions, Regions
from tdlib.regions.convert import convert
from tdlib.regions.convert import main as convert_command
from tdlib.regions.sources import open_regions
from tdlib.teacher.cache import TeacherCache

# RoIAlign


def test_roi_align_of_a_ramp_is_where_the_box_is():
    """Of a map that holds its own coordinates, a box's mean is its centre; cell centres are at halves."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    ramp = torch.stack([x + 0.5, y + 0.5])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.3, 0.25, 0.35, 0.3], [0.2, 0.5, 0.8, 0.75]])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 * torch.tensor([20.0, 12.0])
    for bins in (1, 3, 7):
        assert_close(pool_regions(ramp[None], [boxes], bins).mean((2, 3)), centres, rtol=0, atol=1e-4)
    bins = pool_regions(ramp[None], [boxes], 2)  # their order: rows, then columns
    assert bool((bins[:, 0, :, 0] < bins[:, 0, :, 1]).all() and (bins[:, 1, 0] < bins[:, 1, 1]).all())


def test_roi_align_of_cells_is_their_own_mean():
    feature_map = torch.rand(5, 12, 8)
    pooled = pool_regions(feature_map[None], [grid_boxes(3, 2)], 2).mean((2, 3))
    expected = feature_map.view(5, 3, 4, 2, 4).mean((2, 4)).flatten(1).T
    assert_close(pooled, expected)


@pytest.mark.parametrize("bins", [1, 3])
def test_a_box_without_area_has_the_features_of_its_place(bins):
    # One map: RoIAlign takes a sample more of a box that is a little longer, which shows more in some maps.
    feature_map = torch.rand(1, 5, 12, 8, generator=torch.Generator().manual_seed(0))
    for box in ([0.3, 0.4, 0.3, 0.4], [1.0, 0.0, 1.0, 1.0], [0.2, 0.5, 0.6, 0.5], [1.0, 1.0, 1.0, 1.0]):
        thin = torch.tensor([box])
        wide = thin + torch.tensor([-1e-3, -1e-3, 1e-3, 1e-3])
        flat, real = (pool_regions(feature_map, [boxes], bins) for boxes in (thin, wide))
        assert_close(flat, real, rtol=0, atol=0.02)
        assert thin.tolist() == torch.tensor([box]).tolist()


def test_grid_boxes_tile_the_picture():
    boxes = grid_boxes(2, 3)
    assert_close(boxes[1], torch.tensor([1 / 3, 0, 2 / 3, 0.5]))
    assert_close(boxes[3], torch.tensor([0, 0.5, 1 / 3, 1]))
    assert_close((boxes[:, 2:] - boxes[:, :2]).prod(-1).sum(), torch.tensor(1.0))


# Backbones


@pytest.fixture(scope="module")
def example(world) -> Example:
    from tdlib.data.vcr import VcrReader

    return next(e for e in VcrReader(world, "train").read() if len(e.boxes) >= 3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_a_torchvision_backbone_reads_the_last_map(resnet, monkeypatch):
    model, path = resnet
    monkeypatch.setattr("tdlib.regions.backbones.SHORTER_SIDE", 224)
    backbone = TorchvisionBackbone("resnet18", path)
    assert backbone.dim == 512
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / deviation
    with torch.inference_mode():
        feature_map = torch.nn.Sequential(*list(model.children())[:-2])(pixels[None])[0]
    assert_close(backbone(picture, torch.tensor([[0.0, 0, 1, 1]]))[0], feature_map.mean((1, 2)))
    cells = backbone(picture, grid_boxes(7, 7))
    nearest = torch.cdist(cells, feature_map.flatten(1).T).argmin(1)
    assert (nearest == torch.arange(49)).float().mean() > 0.9  # row by row


@pytest.mark.parametrize(
    ("size", "expected"), [((500, 375), (288, 224)), ((100, 400), (96, 384)), ((900, 900), (224, 224))]
)
def test_pictures_keep_their_shape_up_to_a_stride(resnet, size, expected, monkeypatch):
    """The shorter side has 224 pixels unless the longer one would have more than 5/3 of that."""
    monkeypatch.setattr("tdlib.regions.backbones.SHORTER_SIDE", 224)
    backbone, shapes = TorchvisionBackbone("resnet18", resnet[1]), []
    monkeypatch.setattr(
        backbone, "feature_map", lambda pixels: shapes.append(pixels.shape) or pixels[:, :, ::32, ::32]
    )
    backbone(Image.new("RGB", size), grid_boxes(1, 1))
    assert shapes == [(1, 3, expected[1], expected[0])]


def test_weights_may_lack_the_classifier_and_nothing_else(resnet, tmp_path, example):
    model, path = resnet
    state = model.state_dict()
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "parallel.pth")
    random_numbers = torch.random.get_rng_state()
    a, b, c = (
        open_regions(f"boxes:resnet18@{file}")
        for file in (path, tmp_path / "body.safetensors", tmp_path / "parallel.pth")
    )
    assert a.fingerprint == b.fingerprint == c.fingerprint
    assert torch.equal(a(example).features, b(example).features)
    assert torch.equal(torch.random.get_rng_state(), random_numbers)
    save_file({k: v for k, v in body.items() if "layer4" not in k}, tmp_path / "less.safetensors")
    save_file(body | {"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no")
    torch.save({"state_dict": body, "path": Path("x")}, tmp_path / "objects.pth")
    for name, file, message in (
        ("resnet18", "less.safetensors", r"cannot be loaded into resnet18 .*\n?.*Missing key.*layer4"),
        ("resnet18", "other.safetensors", r"cannot be loaded into resnet18 .*\n?.*size mismatch for conv1"),
        ("resnet18", "damaged.pth", "cannot be loaded"),
        ("resnet18", "objects.pth", "could run any code and are not read"),
        ("resnet18", "nowhere.pth", "cannot be loaded"),
        ("resnet81", "body.safetensors", "one such as resnet18"),
        ("squeezenet1_1", "body.safetensors", "no map before an avgpool"),
    ):
        with pytest.raises(DataError, match=message):
            open_regions(f"boxes:{name}@{tmp_path / file}")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "detector"
    save_detector(MiniDetector({"name": ["person", "cup"], "shirt": ["red"]}, size=32, dim=16), folder)
    return folder


@pytest.mark.parametrize("layout", ["boxes", "grid", "boxes+grid"])
def test_the_whole_picture_comes_first_then_boxes_then_cells(detector_folder, example, layout):
    source = BackboneRegions(DetectorBackbone(load_detector(detector_folder)), layout, (2, 3))
    regions = source(example)
    own, number = torch.tensor(example.boxes), len(example.boxes)
    expected, objects = [torch.tensor([[0.0, 0, 1, 1]])], [-1]
    if "boxes" in layout:
        expected, objects = [*expected, own], [*objects, *range(number)]
    if "grid" in layout:
        expected, objects = [*expected, grid_boxes(2, 3)], [*objects, *[-1] * 6]
    assert torch.equal(regions.boxes, torch.cat(expected)) and regions.objects.tolist() == objects
    assert regions.features.shape == (len(objects), source.dim)
    assert len({tuple(row) for row in regions.features.tolist()}) > len(objects) // 2  # they differ
    without = source(replace(example, boxes=(), names=()))
    assert len(without.boxes) == 1 + 6 * ("grid" in layout)
    assert_close(without.features[0], regions.features[0])
    assert not regions.features.is_inference()  # a student trains on them


@pytest.mark.parametrize("size", [(4000, 8), (1, 120), (1, 1)])
def test_the_longest_and_thinnest_pictures_have_regions(detector_folder, resnet, example, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    thin = replace(example, image=tmp_path / "thin.png")
    spec = f"boxes+grid:{detector_folder}"
    detected = open_regions(spec)(thin)
    seen_by_resnet = open_regions(f"boxes+grid:resnet18@{resnet[1]}")(thin)
    for regions in (detected, seen_by_resnet):
        assert regions.features.isfinite().all() and len(regions.features) == 1 + len(thin.boxes) + 36
        assert regions.size == size


def test_regions_are_what_their_boxes_show(detector_folder, example):
    """A region's features depend on its own box only, not on the order or on the others."""
    backbone = DetectorBackbone(load_detector(detector_folder))
    with Image.open(example.image) as picture:
        boxes = grid_boxes(3, 3)
        together = backbone(picture.convert("RGB"), boxes)
        order = torch.randperm(9)
        assert_close(backbone(picture.convert("RGB"), boxes[order]), together[order], rtol=0, atol=1e-5)
        assert_close(backbone(picture.convert("RGB"), boxes[4:5]), together[4:5], rtol=0, atol=1e-5)


def test_a_detector_is_saved_and_loaded(detector_folder, tmp_path):
    detector = load_detector(detector_folder)
    save_detector(detector, tmp_path)
    again = load_detector(tmp_path)
    pixels, boxes = torch.randint(0, 255, (2, 3, 32, 32)), [grid_boxes(2, 2), grid_boxes(1, 1)]
    with torch.no_grad():
        features = detector(pixels, boxes)
        assert features.shape == (5, 16) and torch.equal(features, again(pixels, boxes))
    assert {name: votes.shape[1] for name, votes in again.logits(features).items()} == {"name": 2, "shirt": 1}
    for damage in (
        lambda: (tmp_path / "model.safetensors").write_bytes(b"no"),
        lambda: (tmp_path / "config.json").write_text('{"model_type": "vilt"}'),
        lambda: (tmp_path / "config.json").unlink(),
    ):
        damage()
        with pytest.raises(DataError, match=r"not a mini detector .*MODEL@WEIGHTS"):
            open_regions(f"boxes:{tmp_path}")


def test_a_detector_learns_what_stands_in_its_boxes(tmp_path):
    from tdlib.make.corpus import ATTRIBUTES
    from tdlib.make.detector import evaluate_detector, train_mini_detector

    losses = train_mini_detector(tmp_path / "made", tmp_path, scenes=64, steps=20, batch=16)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    figures = evaluate_detector(tmp_path / "made", tmp_path, scenes=20)
    assert figures.keys() == ATTRIBUTES.keys() and all(0 <= value <= 1 for value in figures.values())
    made = json.loads((tmp_path / "made" / "provenance.json").read_text())
    assert made["steps"] == 20 and made["corpus"] == "curated"


def test_labels_are_true_of_their_boxes():
    """The picture inside a person's box has the colour of the shirt that the label names; things likewise."""
    from tdlib.make.corpus import ATTRIBUTES, labelled_boxes
    from tdlib.miniworld.drawing import COLOURS, draw
    from tdlib.miniworld.writers import scene_at

    for index in range(40):
        scene = scene_at(3, "curated", index)
        picture = draw(scene)
        found = labelled_boxes(scene, picture)
        assert found[0] == ((0, 0, 1, 1), {"place": scene.place, "weather": scene.weather or "indoors"})
        for box, said in found:
            assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
            assert all(value in ATTRIBUTES[name] for name, value in said.items())
            if "shirt" in said:
                inside = np.array(picture.image.crop(tuple(round(256 * side) for side in box))).reshape(-1, 3)
                colour = [int(COLOURS[said["shirt"]][i : i + 2], 16) for i in (1, 3, 5)]
                assert (np.abs(inside - colour).max(1) < 8).mean() > 0.05
        names = [said["name"] for _, said in found if "name" in said]
        held = [person.held for person in scene.people if person.held]
        assert sorted(names) == sorted(["person"] * len(scene.people) + held + list(scene.things))


# CLIP's grid


def test_the_teachers_patches_are_regions(teacher, example, tmp_path):
    cache = TeacherCache(tmp_path, teacher)
    cache.add(pictures=[example.image])
    source = open_regions("clip", cache=cache)
    assert isinstance(source, ClipGridRegions) and source.dim == teacher.dim
    regions, record = source(example), cache.picture(example.image)
    assert torch.equal(regions.features, record.projected) and torch.equal(regions.boxes, record.positions)
    assert regions.objects.eq(-1).all()
    with pytest.raises(DataError, match="teacher's cache"):
        open_regions("clip")


# The cache of computed regions


class Counting:
    """A source that says how often it was asked."""

    dim, fingerprint = 4, "f" * 64

    def __init__(self):
        self.asked = 0

    def __call__(self, example):
        self.asked += 1
        boxes = torch.tensor(example.boxes).reshape(-1, 4)
        with Image.open(example.image) as picture:
            features = torch.full((len(boxes), 4), float(np.asarray(picture).mean())) + torch.arange(4) / 8
        return Regions(features, boxes, torch.arange(len(boxes)))


@pytest.fixture
def pictures(tmp_path, example) -> list[Example]:
    made = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number * 10,) * 3).save(path)
        boxes = tuple((0.0, 0.0, 0.5, 0.1 * (1 + row)) for row in range(number + 1))
        made.append(replace(example, image=path, boxes=boxes))
    return made


def test_cached_regions_are_the_sources_and_computed_once(pictures, tmp_path):
    source = Counting()
    cached = CachedRegions(source, tmp_path / "cache")
    cached.add([*pictures, pictures[0]])
    assert source.asked == cached.store.count("regions") == 5 and cached.dim == 4
    reopened = CachedRegions(source, tmp_path / "cache")
    reopened.add(pictures)
    assert source.asked == 5
    expected = [source(example) for example in pictures]
    for view in (cached, reopened, pickle.loads(pickle.dumps(reopened))):
        for example, regions in zip(pictures, expected, strict=True):
            found = view(example)
            assert torch.equal(found.features, regions.features) and found.features.dtype == torch.float32
            assert torch.equal(found.boxes, regions.boxes) and torch.equal(found.objects, regions.objects)


def test_other_boxes_pictures_and_sources_are_other_records(pictures, tmp_path):
    cached = CachedRegions(Counting(), tmp_path / "cache")
    cached.add(pictures)
    fewer = replace(pictures[3], boxes=pictures[3].boxes[:2])
    with pytest.raises(CacheError, match=r"call add\(\)"):
        cached(fewer)
    cached.add([fewer])
    assert len(cached(fewer).boxes) == 2 and len(cached(pictures[3]).boxes) == 4
    Image.new("RGB", (8, 8), "white").save(pictures[0].image)
    with pytest.raises(CacheError, match=r"no regions of example"):
        cached(pictures[0])
    cached.add([pictures[0]])
    assert cached(pictures[0]).features[0, 0] == 255
    other = Counting()
    other.fingerprint = "e" * 64
    assert CachedRegions(other, tmp_path / "cache").store.count("regions") == 0
    pictures[1].image.unlink()
    with pytest.raises(DataError, match="picture is missing"):
        cached(pictures[1])


def test_features_that_are_not_finite_are_not_stored(pictures, tmp_path):
    source = Counting()
    cached = CachedRegions(source, tmp_path / "cache")
    source.__class__ = type("Infinite", (Counting,), {
        "__call__": lambda self, e: replace(Counting.__call__(self, e), features=torch.full((1, 4), 1e9)),
    })  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"0\.png"):
        cached.add(pictures[:1])
    assert CachedRegions(Counting(), tmp_path / "cache").store.count("regions") == 0


def test_a_backbone_and_its_layout_are_part_of_the_fingerprint(detector_folder, tmp_path, example):
    sources = [
        open_regions(f"boxes:{detector_folder}"), open_regions(f"grid:{detector_folder}"),
        BackboneRegions(DetectorBackbone(load_detector(detector_folder)), "grid", (2, 2)),
    ]  # fmt: skip
    changed = load_detector(detector_folder)
    with torch.no_grad():
        changed.region.bias[0] += 1
    sources.append(BackboneRegions(DetectorBackbone(changed)))
    assert len({source.fingerprint for source in sources}) == 4
    assert open_regions(f"boxes:{detector_folder}").fingerprint == sources[0].fingerprint
    cached = CachedRegions(sources[0], tmp_path)
    cached.add([example])
    assert cached(example).size == sources[0](example).size == Image.open(example.image).size
    assert_close(cached(example).features, sources[0](example).features, rtol=1e-3, atol=1e-3)


# Regions from files, and their pictures


def put_regions(path: Path, boxes, size=(1, 1), **changes) -> Path:
    """An NPZ whose feature i is i."""
    fields = {"x": np.arange(4.0 * len(boxes)).reshape(-1, 4), "bbox": np.array(boxes, np.float32)}
    fields |= {"num_bbox": len(boxes), "image_w": size[0], "image_h": size[1]}
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **fields | changes)
    return path


def shown(example: Example, folder: Path, name: str = "a.png", orientation: int = 1) -> Example:
    folder.mkdir(exist_ok=True, parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(folder / name, exif=exif)
    return replace(example, image=folder / name)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_of_files_turn_with_their_picture(example, tmp_path, orientation):
    turned = shown(example, tmp_path / "pictures", orientation=orientation)
    header = read_header(turned.image)
    for size in {(40, 20), (80, 40), header.upright}:
        width, height = size
        box = [0, height / 4, width / 2, height]
        put_regions(tmp_path / "npz" / "a.npz", [box], size)
        regions = open_regions(f"npz:{tmp_path / 'npz'}")(turned)
        places = upright_boxes([(0, 0.25, 0.5, 1)], size, header, "")
        assert_close(regions.boxes, torch.tensor(places)) and regions.size is not None
        assert (regions.size[0] > regions.size[1]) == (header.upright[0] > header.upright[1])
        assert sorted(regions.size) == sorted(size)


def test_regions_of_a_picture_of_another_shape_are_refused(example, tmp_path):
    seen = shown(example, tmp_path / "pictures")
    source = open_regions(f"npz:{put_regions(tmp_path / 'npz' / 'a.npz', [[0, 0, 9, 9]], (40, 20)).parent}")
    assert len(source(seen).boxes) == 1
    for size, reason in (((20, 40), "are exchanged"), ((30, 20), "of different releases")):
        path = put_regions(tmp_path / "npz" / "a.npz", [[0, 0, 9, 9]], size)
        with pytest.raises(DataError, match=rf"{path}: width=.*{reason}"):
            source(seen)
    seen.image.unlink()
    assert len(source(seen).boxes) == 1  # features can be used without the pictures


def test_boxes_of_files_are_in_pixels_unless_the_size_is_unknown(example, tmp_path):
    seen, shares = shown(example, tmp_path / "pictures"), [[0, 0, 1, 1], [0.2, 0.1, 0.9, 1.0]]
    path = put_regions(tmp_path / "npz" / "a.npz", shares)
    source = open_regions(f"npz:{path.parent}")
    assert_close(source(seen).boxes, torch.tensor(shares))
    put_regions(path, shares, (40, 20))
    with pytest.raises(DataError, match=rf"{path}: all boxes .* normalised already"):
        source(seen)


def test_rows_behind_the_last_box_are_padding(example, tmp_path):
    seen, boxes = shown(example, tmp_path / "pictures"), [[0, 0, 9, 9], [0, 0, 5, 5], [0, 0, 0, 0]]
    path = put_regions(tmp_path / "npz" / "a.npz", boxes, (40, 20), num_bbox=2)
    source = open_regions(f"npz:{path.parent}")
    assert source(seen).features.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and len(source(seen).boxes) == 2
    put_regions(path, boxes, (40, 20), num_bbox=[2], image_w=[[40]])  # numbers that are arrays
    assert source(seen).features.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for bad in ({"num_bbox": 0}, {"num_bbox": 5}, {"bbox": 3.0}):  # 4 would be the other order of features
        put_regions(path, boxes, (40, 20), **bad)
        with pytest.raises(DataError, match=rf"{path}: num_bbox is "):
            source(seen)
    for bad in ({"image_w": np.inf}, {"num_bbox": [2, 2]}, {"num_bbox": "two"}):
        put_regions(path, boxes, (40, 20), **bad)
        with pytest.raises(DataError, match=rf"{path}: not an NPZ of regions"):
            source(seen)


def test_folders_below_ones_home_are_found(tmp_path, monkeypatch):
    put_regions(tmp_path / "npz" / "a.npz", [[0, 0, 9, 9]])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_regions("npz:~/npz").paths == [tmp_path / "npz"]
    with pytest.raises(DataError, match="~/none: no such file"):
        open_regions("npz:~/none,~/npz")


def test_two_pictures_of_one_name_do_not_share_regions(example, tmp_path):
    first, second = (shown(example, tmp_path / f"clip{i}", "000.jpg") for i in "AB")
    source = open_regions(f"npz:{put_regions(tmp_path / 'npz' / '000.npz', [[0, 0, 9, 9]], (40, 20)).parent}")
    assert len(source(first).boxes) == len(source(replace(first, id="again")).boxes) == 1
    for use in (source, lambda second: source.require([second])):
        with pytest.raises(DataError, match=r"clipB.000\.jpg: .*clipA.000\.jpg has the same name"):
            use(second)
    line = "\t".join(["{}/000", "40", "20", "1", *(base64.b64encode(bytes(16)).decode(),) * 2])
    (tmp_path / "both.tsv").write_text("".join(f"{line.format(name)}\n" for name in "AAB"))
    with pytest.raises(DataError, match=r"line 3: pictures 'A/000' and 'B/000' would both be 000\.npz"):
        convert("tsv", tmp_path / "both.tsv", tmp_path / "converted")


@pytest.mark.parametrize(
    ("first", "second", "file"),
    [("1.jpg", "001.jpg", "1"), ("COCO_train2014_000000000007.jpg", "COCO_val2014_000000000007.jpg", "7")],
)
def test_two_pictures_of_one_number_do_not_share_regions(example, tmp_path, first, second, file):
    source = open_regions(
        f"npz:{put_regions(tmp_path / 'npz' / f'{file}.npz', [[0, 0, 9, 9]], (40, 20)).parent}"
    )
    first, second = (shown(example, tmp_path, name) for name in (first, second))
    source(first)
    for use in (source, lambda second: source.require([second])):
        with pytest.raises(DataError, match=rf"{file}\.npz are the regions of {first.image.name}"):
            use(second)
    put_regions(tmp_path / "npz" / f"{second.image.stem}.npz", [[0, 0, 9, 9]], (40, 20))
    source(second)


def test_marks_and_empty_lines_name_no_pictures(tmp_path, monkeypatch):
    path, numbers = tmp_path / "all.tsv", base64.b64encode(bytes(16)).decode()
    lines = ["\t".join([name, "40", "20", "1", numbers, numbers]) for name in ("7", "8", "")]
    path.write_text("\n\n".join(lines[:2]) + "\r\n\r\n", encoding="utf-8-sig")
    assert convert("tsv", path, tmp_path / "npz") == 2
    assert sorted(file.name for file in (tmp_path / "npz").iterdir()) == ["7.npz", "8.npz"]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"all\.tsv, line 3: no name of a picture"):
        convert("tsv", path, tmp_path / "npz")
    monkeypatch.setattr("sys.argv", ["convert", "tsv", str(path), str(path)])  # no folder to write to
    with pytest.raises(SystemExit, match=r"convert: .*all\.tsv"):
        convert_command()


def test_missing_regions_are_counted_before_they_are_read(example, tmp_path):
    names = ("a.png", "b.png", "c.png")
    examples = [shown(example, tmp_path / "pictures", name) for name in names]
    path = put_regions(tmp_path / "npz" / "a.npz", [[0, 0, 9, 9]], (40, 20))
    put_regions(tmp_path / "more" / "c.npz", [[0, 0, 9, 9]], (40, 20))
    open_regions(f"npz:{path.parent}").require(examples[:1] * 2)
    open_regions(f"npz:{path.parent},{tmp_path / 'more'}").require([examples[0], examples[2]])
    with pytest.raises(DataError, match=r"no regions of b\.png .*\(2 of 3 are missing\)"):
        open_regions(f"npz:{path.parent}").require([*examples, *examples])
