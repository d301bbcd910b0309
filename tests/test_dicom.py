"""DICOM: pixels with the right values, and files that are refused or damaged."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from train_fn.data.images import AS_USUAL, ImageFacts, image_facts, image_problems, image_size, read_image
from train_fn.settings import ImageOptions

STORED = np.array([[0, 1000, 2000, 3000, 4000]] * 4, np.uint16)  # 12 bits in 16


def dicom(path: Path, pixels: np.ndarray = STORED, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> str:
    """Write a DICOM file. `elements` replace those of a grey picture of 12 bits; None takes an element out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    little = syntax != ExplicitVRBigEndian
    data = FileDataset(str(path), {}, bytes(128), meta, syntax == ImplicitVRLittleEndian, little)
    colours = pixels.ndim > 2 and pixels.shape[-1] == 3
    frames = pixels.ndim - 2 - colours
    bits = pixels.dtype.itemsize * 8
    values = {
        "Rows": pixels.shape[frames], "Columns": pixels.shape[frames + 1], "SamplesPerPixel": 3 if colours else 1,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2", "BitsAllocated": bits,
        "BitsStored": min(bits, 12), "HighBit": min(bits, 12) - 1, "PixelData": pixels.tobytes(),
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }  # fmt: skip
    values |= {"NumberOfFrames": len(pixels)} if frames else {}
    values |= {"PlanarConfiguration": 0} if colours else {}
    for name, value in (values | elements).items():
        if value is not None:
            setattr(data, name, value)
    if syntax == RLELossless:
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.compress(RLELossless)
    data.save_as(path, enforce_file_format=True)
    return str(path)


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """The pixels as an image file in one of Pillow's formats."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def levels(path: str, options: ImageOptions = AS_USUAL) -> list[int]:
    """The grey levels of a picture's first row."""
    assert image_problems([path], options=options) == {}
    picture = read_image(path, options)
    assert picture.mode == "RGB" and image_size(path, options) == picture.size
    pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


# ------------------------------------------------------------------------------------------------ greys

WINDOWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "none: the range": ({}, [0, 64, 128, 191, 255]),
    "linear": ({"WindowCenter": 2000.5, "WindowWidth": 2001}, [0, 0, 128, 255, 255]),
    "linear_exact": (
        {"WindowCenter": 2000, "WindowWidth": 4000, "VOILUTFunction": "LINEAR_EXACT"},
        [0, 64, 128, 191, 255],
    ),
    "sigmoid": (
        {"WindowCenter": 2000, "WindowWidth": 4000, "VOILUTFunction": "SIGMOID"},
        [30, 69, 128, 186, 225],  # 255 / (1 + exp(-4 (x - center) / width))
    ),
    "the first of two": ({"WindowCenter": [1000.5, 5], "WindowWidth": [2001, 7]}, [0, 128, 255, 255, 255]),
    "a threshold": ({"WindowCenter": 2000, "WindowWidth": 1}, [0, 0, 255, 255, 255]),
    "a width of 0": ({"WindowCenter": 2000, "WindowWidth": 0}, [0, 64, 128, 191, 255]),
    "of rescaled values": (
        {"WindowCenter": 40.5, "WindowWidth": 1001, "RescaleSlope": 0.5, "RescaleIntercept": -960},
        [0, 0, 128, 255, 255],
    ),
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, [255, 191, 127, 64, 0]),
}


@pytest.mark.parametrize(("elements", "expected"), WINDOWS.values(), ids=WINDOWS)
def test_the_files_own_window(tmp_path, elements, expected) -> None:
    assert levels(dicom(tmp_path / "a", **elements)) == expected


def test_a_given_window_counts_in_rescaled_values(tmp_path) -> None:
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": 5, "WindowWidth": 5}
    assert levels(dicom(tmp_path / "a", **rescaled), ImageOptions("0,2000")) == [0, 0, 128, 255, 255]
    inverted = dicom(tmp_path / "b", **rescaled, PhotometricInterpretation="MONOCHROME1")
    assert levels(inverted, ImageOptions("0,2000")) == [255, 255, 127, 0, 0]


def test_signed_values(tmp_path) -> None:
    path = dicom(tmp_path / "a", (STORED.astype(np.int16) - 2000).astype(np.int16), BitsStored=16, HighBit=15)
    assert levels(path) == [0, 64, 128, 191, 255]
    assert levels(path, ImageOptions("-1000,1000")) == [0, 0, 128, 255, 255]


def test_a_table_of_grey_levels(tmp_path) -> None:
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [5, 0, 8])
    table.add_new("LUTData", "US", [5, 4, 3, 200, 255])
    path = dicom(tmp_path / "a", np.arange(5, dtype=np.uint16)[None].repeat(3, 0), VOILUTSequence=[table])
    assert levels(path) == [5, 4, 3, 200, 255]


def test_8_bits_without_a_window_are_shown_as_they_are(tmp_path) -> None:
    path = dicom(tmp_path / "a", np.array([[50, 60, 70]] * 3, np.uint8), RescaleSlope=1, RescaleIntercept=0)
    assert levels(path) == [50, 60, 70]
    assert levels(path, ImageOptions("50,70")) == [0, 128, 255]


def test_values_of_a_frame_of_an_enhanced_file(tmp_path) -> None:
    def group(intercept: float) -> Dataset:
        rescale, item = Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, intercept, "HU"
        item.PixelValueTransformationSequence = [rescale]
        return item

    window, shared = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 1000.5, 2001
    shared.FrameVOILUTSequence = [window]
    path = dicom(
        tmp_path / "a", np.stack([STORED, STORED]), SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[group(0), group(-1000)],
    )  # fmt: skip
    assert levels(path, ImageOptions(frames="1")) == [0, 128, 255, 255, 255]
    assert levels(path, ImageOptions(frames="2")) == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_transfer_syntaxes(tmp_path, syntax) -> None:
    big = syntax == ExplicitVRBigEndian
    meta = {"PixelData": STORED.astype(">u2").tobytes()} if big else {}
    assert levels(dicom(tmp_path / "a.dcm", syntax=syntax, **meta)) == [0, 64, 128, 191, 255]


def test_jpeg_2000_inside(tmp_path) -> None:
    inside = encapsulate([encoded(STORED, "JPEG2000", no_jp2=True)])
    path = dicom(tmp_path / "a", syntax=JPEG2000Lossless, PixelData=inside, BitsStored=16)
    assert levels(path) == [0, 64, 128, 191, 255]


# ------------------------------------------------------------------------------------------------ colours, frames


def test_colours(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8)
    read = read_image(dicom(tmp_path / "a", pixels, BitsStored=8), AS_USUAL)
    assert np.array_equal(np.asarray(read), pixels)
    planes = dicom(tmp_path / "b", pixels, PlanarConfiguration=1, PixelData=pixels.transpose(2, 0, 1).tobytes())
    assert np.array_equal(np.asarray(read_image(planes, AS_USUAL)), pixels)
    red = np.full((4, 4, 3), (76, 85, 255), np.uint8)
    path = dicom(tmp_path / "c", red, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(read_image(path, AS_USUAL)).astype(int) - (254, 0, 0)).max() <= 1
    (problem,) = image_problems([path], options=ImageOptions("0,100")).values()
    assert "--window" in problem and "YBR_FULL" in problem


@pytest.mark.parametrize(
    ("syntax", "kind", "form", "tolerance"),
    [
        (JPEGBaseline8Bit, "JPEG", "YBR_FULL_422", 1),
        (JPEG2000Lossless, "JPEG2000", "YBR_RCT", 0),
        (JPEG2000Lossless, "JPEG2000", "RGB", 0),
    ],
)
def test_compressed_colours(tmp_path, syntax, kind, form, tolerance) -> None:
    rows, columns = np.mgrid[:64, :64]
    pixels = np.stack([columns * 4, rows * 4, 255 - columns * 4], -1).astype(np.uint8)
    options = {"quality": 95} if kind == "JPEG" else {"no_jp2": True, "mct": form == "YBR_RCT"}
    inside = encapsulate([encoded(pixels, kind, **options)])
    path = dicom(tmp_path / "a", pixels, syntax, PixelData=inside, PhotometricInterpretation=form, BitsStored=8)
    assert image_problems([path]) == {}
    assert np.abs(np.asarray(read_image(path)).astype(int) - pixels).mean() <= tolerance


def test_a_palette(tmp_path) -> None:
    tables = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, data in (("Red", [0, 65535]), ("Green", [0, 0]), ("Blue", [32768, 0]))
        for part, value in (("Descriptor", [2, 0, 16]), ("Data", np.array(data, np.uint16).tobytes()))
    }
    pixels = np.array([[0, 1]] * 2, np.uint8)
    read = read_image(dicom(tmp_path / "a", pixels, PhotometricInterpretation="PALETTE COLOR", **tables), AS_USUAL)
    assert np.asarray(read)[0].tolist() == [[0, 0, 128], [255, 0, 0]]


def test_the_frame_is_chosen(tmp_path) -> None:
    path = dicom(tmp_path / "a", np.stack([STORED, STORED[:, ::-1], STORED]))
    assert image_facts(path) == ImageFacts("DICOM", "MONOCHROME2 12 bit", (5, 4), False, 3)
    said: list[str] = []
    assert image_problems([path], log=said.append, options=ImageOptions(frames="middle")) == {}
    assert said == ["Using frame middle of each of the 1 images that hold several"]
    for choice in ("middle", "2"):
        assert levels(path, ImageOptions(frames=choice)) == [255, 191, 128, 64, 0]
    assert levels(path, ImageOptions(frames="first")) == [0, 64, 128, 191, 255]
    (problem,) = image_problems([path]).values()
    assert "several frames or pages (3): choose one with --frames" in problem
    (problem,) = image_problems([path], options=ImageOptions(frames="4")).values()
    assert "must have frame 4" in problem


# ------------------------------------------------------------------------------------------------ what is refused

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "huge sides": ({"Rows": 65535, "Columns": 65535}, ["at most 50,000,000 pixels, but has 65535 x 65535"]),
    "more rows than its pixels": ({"Rows": 400}, ["must be decodable"]),
    "many frames": ({"NumberOfFrames": 2_000_000_000}, ["2,000,000,000"]),
    "pixels cut off": ({"PixelData": STORED.tobytes()[:-8]}, ["must be decodable"]),
    "no pixels": ({"PixelData": None}, ["must be decodable"]),
    "no rows": ({"Rows": None}, ["5 x None", "take its entry out"]),
    "a report": ({"PhotometricInterpretation": None, "Rows": None}, ["must hold a grey or colour picture"]),
    "a kind of pixels of its own": ({"PhotometricInterpretation": "HSV"}, ["is HSV"]),
    "lossless JPEG": ({"syntax": JPEGLosslessSV1}, ["JPEG Lossless", "pip install pylibjpeg", "decompress"]),
    "JPEG-LS": ({"syntax": JPEGLSLossless}, ["JPEG-LS", "pip install pylibjpeg"]),
    "a film": ({"syntax": MPEG2MPML}, ["must hold single pictures", "MPEG2"]),
    "deflated": ({"syntax": DeflatedExplicitVRLittleEndian}, ["must not be deflated"]),
}


def compressed(elements: dict[str, Any]) -> dict[str, Any]:
    """With pixels that a compressed transfer syntax can hold."""
    if elements.get("syntax") in (JPEGLosslessSV1, JPEGLSLossless, MPEG2MPML):
        return elements | {"PixelData": encapsulate([b"\xff\xd8\xff\xd9"])}
    return elements


@pytest.mark.parametrize(("elements", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_its_name(tmp_path, elements, words) -> None:
    path = dicom(tmp_path / "scan", **compressed(elements))
    if "pip install" in " ".join(words) and get_decoder(elements["syntax"]).is_available:
        pytest.skip("a decoder that is no requirement is installed")
    (problem,) = image_problems([path]).values()
    assert path in problem and all(word in problem for word in words), problem


def test_damaged_bytes_are_no_traceback(tmp_path) -> None:
    content = Path(dicom(tmp_path / "a")).read_bytes()
    random = np.random.default_rng(0)
    paths = []
    for number in range(60):
        changed = bytearray(content[: random.integers(132, len(content))] if number % 2 else content)
        for place in random.integers(132, len(changed), 3) if len(changed) > 132 else ():
            changed[place] = random.integers(256)
        paths.append(str(tmp_path / f"{number}.dcm"))
        Path(paths[-1]).write_bytes(changed)
    problems = image_problems(paths)
    assert 30 <= len(problems) < 60 and all(path in text for path, text in problems.items())


def test_a_frame_inside_that_is_larger_than_the_header_says(tmp_path) -> None:
    inside = encapsulate([encoded(np.zeros((900, 900), np.uint16), "JPEG2000", no_jp2=True)])
    path = dicom(tmp_path / "a", syntax=JPEG2000Lossless, PixelData=inside, BitsStored=16)
    (problem,) = image_problems([path]).values()
    assert "must be decodable" in problem


def test_without_pydicom(tmp_path, monkeypatch) -> None:
    path = dicom(tmp_path / "scan")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (problem,) = image_problems([path]).values()
    assert problem == f'image {path} must be read by pydicom, but that is not installed: pip install -e ".[dicom]"'


# ------------------------------------------------------------------------------------------------ as data


def test_bytes_and_folders_of_dicom(tmp_path) -> None:
    from train_fn.data.folders import read_class_folders
    from train_fn.data.stored_images import store_image

    for name in ("normal", "benign"):
        (tmp_path / name).mkdir()
    path = dicom(tmp_path / "normal" / "a.dcm")
    dicom(tmp_path / "benign" / "IM00001")
    dicom(tmp_path / "normal" / "1.2.840.1")
    assert store_image(Path(path).read_bytes()).suffix == ".dcm"
    records, problems = read_class_folders(tmp_path)
    assert len(records) == 3 and not problems and pydicom.dcmread(path).Rows == 4
