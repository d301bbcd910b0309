"""DICOM files, through pydicom: header, and one frame as a picture.

Shapes: H rows, W columns of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.data.greys import as_grey, auto_limits

if TYPE_CHECKING:
    from pydicom import Dataset

INSTALL = 'pip install -e ".[dicom]"'
DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
GREYS = ("MONOCHROME1", "MONOCHROME2")
# Everything that is read beside the pixels. Private and long values are skipped.
TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
]  # fmt: skip


class NotReadable(ValueError):
    """A file cannot be read; the message is the rule, the value and the fix, to follow the file's name."""


@dataclass(frozen=True)
class DicomHeader:
    """What a file declares about its pixels."""

    kind: str
    """Its photometric interpretation, such as MONOCHROME2."""
    bits: int
    """Bits of a stored value."""
    size: tuple[int, int]
    """Width and height in pixels."""
    frames: int
    data: Dataset
    """The elements of `TAGS`."""


def is_dicom(path: str) -> bool:
    """Whether the file has DICOM's mark after its preamble."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str) -> DicomHeader:
    """The header of a file, without its pixels.

    Raises:
        NotReadable: pydicom or a decoder is not installed, or the file holds no pictures.
        Exception: pydicom raises anything for damaged bytes.
    """
    try:
        import pydicom
        from pydicom.filereader import read_file_meta_info
        from pydicom.pixels import get_decoder
    except ImportError as error:
        raise NotReadable(f"must be read by pydicom, but that is not installed: {INSTALL}") from error
    syntax = read_file_meta_info(path).TransferSyntaxUID
    if syntax.is_deflated:  # pydicom would inflate the whole file, whatever its size becomes
        raise NotReadable("must not be deflated, but is: write it in another transfer syntax")
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise NotReadable(
            f"must hold single pictures, but its transfer syntax is {syntax.name}: take its entry out"
        ) from error
    if not decodable:
        raise NotReadable(
            f"must be decodable, but no decoder of {syntax.name} is installed: {DECODERS}, or decompress it"
        )
    data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
    kind, rows, columns = (data.get(name) for name in ("PhotometricInterpretation", "Rows", "Columns"))
    if kind not in (*COLOURS, *GREYS) or not rows or not columns:
        raise NotReadable(f"must hold a grey or colour picture, but is {kind}, {columns} x {rows}: take its entry out")
    bits = int(data.get("BitsStored") or data.BitsAllocated)
    return DicomHeader(str(kind), bits, (int(columns), int(rows)), max(1, int(data.get("NumberOfFrames") or 1)), data)


def read_pixels(path: str, header: DicomHeader, frame: int, limits: tuple[float, float] | None) -> np.ndarray:
    """One frame as a grey [H, W] or colour [H, W, 3] uint8 picture.

    Args:
        frame: index of the frame, from 0.
        limits: the rescaled values that become black and white. None: the file's window, or all values.

    Raises:
        Exception: pydicom raises anything for damaged pixels.
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    stored: Any = pixel_array(path, index=frame)  # YBR has become RGB
    if stored.shape[:2] != header.size[::-1]:
        raise ValueError(f"its header declares {header.size}, but its frame is {stored.shape[1::-1]}")
    if header.kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, header.data)
        bits = int(header.data.RedPaletteColorLookupTableDescriptor[2])
        return as_grey(stored, 0, 2**bits - 1)
    if header.kind in COLOURS:
        return stored if stored.dtype == np.uint8 else as_grey(stored, 0, 2**header.bits - 1)
    grey = grey_levels(stored, header, frame, limits)
    return 255 - grey if header.kind == "MONOCHROME1" else grey


def grey_levels(stored: np.ndarray, header: DicomHeader, frame: int, limits: tuple[float, float] | None) -> np.ndarray:
    """Grey levels [H, W] uint8 of stored values [H, W], low values dark (PS3.3 C.11.1 and C.11.2, PS3.4 N.2)."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, functional_group(header.data, frame, "PixelValueTransformationSequence"))
    if limits:
        return as_grey(values, *limits)
    window = functional_group(header.data, frame, "FrameVOILUTSequence")
    center, width = (first_number(window.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 0:
        function = window.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            with np.errstate(over="ignore"):
                return as_grey(1 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width)), 0, 1)
        if function == "LINEAR" and width >= 1:
            center, width = center - 0.5, width - 1
        return as_grey(values, center - width / 2, center + width / 2)
    if tables := window.get("VOILUTSequence"):
        looked_up = apply_voi(np.rint(values).astype(np.int64), window)
        return as_grey(looked_up, 0, 2 ** int(tables[0].LUTDescriptor[2]) - 1)
    # Shown as they are, like any image of 8 bits.
    if header.bits <= 8 and stored.dtype == np.uint8 and np.array_equal(values, stored):
        return as_grey(values, 0, 2**header.bits - 1)
    return as_grey(values, *auto_limits(values))


def functional_group(data: Dataset, frame: int, name: str) -> Dataset:
    """The elements of a frame: its own, else those of all frames (both in enhanced files), else those of the file."""
    places = (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0))
    for groups, number in places:
        items = data.get(groups) or []
        if number < len(items) and (found := items[number].get(name)):
            return found[0]
    return data


def first_number(value: Any) -> float | None:
    """The first of one or several numbers; None if there is none."""
    several = value if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    return float(several[0]) if len(several) and several[0] not in (None, "") else None
