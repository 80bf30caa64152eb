"""Networks that compute features of boxes of a picture: torchvision's classifiers and the mini detector.

The mini detector takes the role of the Faster R-CNN behind the region features of UNITER or VL-BERT
(Anderson et al. 2018: trained on names and attributes of objects), without proposing boxes.
``tdlib.make.detector`` trains it on the MiniWorld.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms.functional import normalize, to_tensor

from tdlib.core.devices import usual_device
from tdlib.core.files import why_unreadable, write_json
from tdlib.core.paths import resolve
from tdlib.core.store import fingerprint
from tdlib.data.examples import DataError
from tdlib.regions.specs import backbone_parts


class Backbone(Protocol):
    """Computes features (regions, dim) of the boxes (regions, 4), normalised xyxy, of one picture."""

    dim: int
    fingerprint: str

    def __call__(self, picture: Image.Image, boxes: Tensor) -> Tensor: ...


_SLIVER = 1e-3  # cells of a feature map


def pool_regions(feature_maps: Tensor, boxes: Sequence[Tensor], bins: int) -> Tensor:
    """RoIAlign (He et al. 2017) with ``bins`` x ``bins`` bins: (all regions, dim, bins, bins).

    Args:
        feature_maps: (batch, dim, rows, columns), each covering a whole picture.
        boxes: per picture (regions, 4), normalised xyxy. One without width or height is given a sliver of a
            cell, because RoIAlign takes no samples of it and returns zeros.
        bins: number along each side; each bin is the mean of enough samples to cover its area.
    """
    rows, columns = feature_maps.shape[2:]
    scale = feature_maps.new_tensor([columns, rows, columns, rows])
    scaled = [box.to(feature_maps) * scale for box in boxes]
    for box in scaled:
        box[:, 2:] = torch.maximum(box[:, 2:], box[:, :2] + _SLIVER)
    return roi_align(feature_maps, scaled, bins, sampling_ratio=-1, aligned=True)


_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_HEADS = ("fc", "classifier", "head", "aux1", "aux2", "AuxLogits")  # modules after the last map


SHORTER_SIDE = 448  # pixels: twice the 224 of the classifiers' training, as objects are small


class TorchvisionBackbone:
    """Averages the last feature map of one of torchvision's convolutional classifiers over each box.

    Pictures are resized so that the shorter side has ``SHORTER_SIDE`` pixels and the longer one at most
    5/3 of it (600 and 1000 in Faster R-CNN, Ren et al. 2015), both to multiples of the map's stride.

    Args:
        name: a model of torchvision's that ends in ``avgpool`` ("resnet50", "convnext_tiny", ...).
        weights: its state dict, ``.pth`` or ``.safetensors``, with or without the classifier.
        device: where it runs.

    Raises:
        DataError: the model is unknown or has no such map, or the weights do not fit.
    """

    def __init__(self, name: str, weights: Path | str, device: str = "cpu"):
        known = torchvision.models.list_models(torchvision.models)
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 3)) or "resnet50"
            raise DataError(f"backbone {name!r}: not a model of torchvision's; expected one such as {near}")
        with torch.random.fork_rng():  # initialising the weights must not change the caller's random numbers
            self.model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
        if not hasattr(self.model, "avgpool"):
            raise DataError(f"backbone {name!r} has no map before an avgpool; take resnet50")
        for head in _HEADS:
            if hasattr(self.model, head):
                setattr(self.model, head, nn.Identity())
        own = {}
        if hasattr(self.model, "transform_input"):  # torchvision sets it with all weights of its own
            self.model.transform_input, own = True, {"transform_input": "True"}
        load_weights(self.model, name, Path(resolve(str(weights))))
        self.device = torch.device(device)
        self.model.to(self.device)
        feature_map = self.feature_map(torch.zeros(1, 3, 256, 256, device=self.device))
        self.dim, self.stride = feature_map.shape[1], 256 // feature_map.shape[2]
        self.fingerprint = fingerprint(
            self.model, size=SHORTER_SIDE, torchvision=torchvision.__version__, **own
        )

    @torch.no_grad()
    def feature_map(self, pixels: Tensor) -> Tensor:
        """Captures the input of ``avgpool``, (1, dim, rows, columns), for pixels (1, 3, height, width)."""
        seen: list[Tensor] = []
        hook = self.model.avgpool.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            self.model(pixels)
        finally:
            hook.remove()
        return seen[0].float()

    @torch.no_grad()
    def __call__(self, picture: Image.Image, boxes: Tensor) -> Tensor:
        scale = min(SHORTER_SIDE / min(picture.size), SHORTER_SIDE * 5 / 3 / max(picture.size))
        size = [max(1, round(side * scale / self.stride)) * self.stride for side in picture.size]
        resized = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        pixels = normalize(to_tensor(resized), _MEAN, _DEVIATION)
        feature_map = self.feature_map(pixels[None].to(self.device))
        return pool_regions(feature_map, [boxes], bins=7).mean((2, 3)).cpu()


def load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Loads a state dict, without the classifier's parameters."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        model.load_state_dict({k: v for k, v in state.items() if k.partition(".")[0] not in _HEADS})
    except Exception as error:  # torch lets through what pickle, zip and safetensors raise
        raise DataError(
            f"{path}: cannot be loaded into {name} ({why_unreadable(error)[:300]}); expected its state dict "
            "as .pth or .safetensors"
        ) from None


BINS = 3  # of a region, along each side


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class MiniDetector(nn.Module):
    """A feature map of stride 8, RoIAlign with 3 x 3 bins, one linear map, and a classifier per attribute.

    Args:
        attributes: names of the attributes of a box, each with its possible values.
        size: pictures are squashed to ``size`` x ``size`` pixels.
        dim: width of the map and of the region features.
    """

    def __init__(self, attributes: dict[str, list[str]], size: int = 96, dim: int = 128):
        super().__init__()
        self.attributes, self.size, self.dim = attributes, size, dim
        self.stem = nn.Sequential(
            _conv(3, dim // 4, 2), _conv(dim // 4, dim // 2, 2), _conv(dim // 2, dim, 2)
        )
        self.context = nn.Sequential(_conv(dim, dim), _conv(dim, dim))
        self.region = nn.Linear(dim * BINS * BINS, dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, len(v)) for name, v in attributes.items()})

    def forward(self, pixels: Tensor, boxes: list[Tensor]) -> Tensor:
        """Computes features (all regions, dim), not negative, picture after picture.

        ``pixels`` (batch, 3, size, size), 0 to 255; per picture ``boxes`` (regions, 4), normalised xyxy.
        """
        feature_map = self.stem(pixels / 127.5 - 1)
        feature_map = (feature_map + self.context(feature_map)).float()
        return F.relu(self.region(pool_regions(feature_map, boxes, BINS).flatten(1)))

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Classifies regions: per attribute logits (regions, values)."""
        return {name: head(features) for name, head in self.heads.items()}

    def pixels(self, picture: Image.Image) -> Tensor:
        """Resizes a picture to the network's input, (3, size, size) uint8."""
        image = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class DetectorBackbone:
    """Uses a mini detector as a backbone."""

    def __init__(self, detector: MiniDetector, device: str = "cpu"):
        self.detector = detector.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.dim = detector.dim
        self.fingerprint = fingerprint(detector, size=detector.size)

    @torch.no_grad()
    def __call__(self, picture: Image.Image, boxes: Tensor) -> Tensor:
        pixels = self.detector.pixels(picture)[None].to(self.device)
        return self.detector(pixels, [boxes.to(self.device)]).cpu()


def save_detector(detector: MiniDetector, folder: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in detector.state_dict().items()
    }
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    config = {"size": detector.size, "dim": detector.dim, "attributes": detector.attributes}
    write_json(folder / "config.json", {"model_type": "mini_detector", **config})


def load_detector(name: Path | str) -> MiniDetector:
    """Loads the mini detector of a folder, in single precision, for inference."""
    folder = Path(resolve(str(name)))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.pop("model_type") != "mini_detector":
            raise ValueError("its model_type is another")
        detector = MiniDetector(**config)
        detector.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # torch lets through what json and safetensors raise
        raise DataError(
            f"{folder}: not a mini detector ({str(error)[:300]}); expected a folder with config.json and "
            "model.safetensors that tdlib.make.detector wrote, or MODEL@WEIGHTS (resnet50@resnet50.pth)"
        ) from None
    return detector.eval()


def open_backbone(name: str) -> Backbone:
    """Opens MODEL@WEIGHTS of torchvision's, or the folder of a mini detector, on ``usual_device``."""
    device = usual_device()
    model, weights = backbone_parts(name)
    if model:
        return TorchvisionBackbone(model, weights, device=device)
    return DetectorBackbone(load_detector(name), device)
