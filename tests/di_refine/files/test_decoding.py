import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from di_refine.files import decoding
from di_refine.files.datasets import ImageDataset
from di_refine.files.image_files import ImageFiles

CASES = Path(__file__).parents[2] / "cases"
COLOUR = np.random.default_rng(0).integers(0, 256, [6, 8, 3], np.uint8)
RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def stored(image, **settings) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, **settings) if isinstance(image, np.ndarray) else image.save(file, **settings)
    return file.getvalue()


def read(content: bytes, name: str = "a.png"):
    """Decode, and check that the header alone says the same."""
    image, remarks = decoding.decode(content, name)
    assert decoding.header(io.BytesIO(content), name) == (image.size, image.mode, remarks)
    return image, remarks


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_before_anything_else(format, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    settings = {"lossless": True} if format == "WEBP" else {}
    lying = [None, COLOUR, COLOUR[:, ::-1], COLOUR[::-1, ::-1], COLOUR[::-1], *[None] * 4]
    turned = COLOUR.transpose(1, 0, 2)  # what has to be stored so that a viewer shows COLOUR
    lying[5:] = [turned, turned[::-1], turned[::-1, ::-1], turned[:, ::-1]]
    image, remarks = read(stored(np.ascontiguousarray(lying[orientation]), format=format, exif=exif, **settings))
    assert np.array_equal(image, COLOUR) and not remarks


def test_orientation_of_jpegs_from_a_data_set():
    images = ImageDataset(CASES / "exif").images([0, 1]).astype(int)
    assert abs(images[0] - images[1]).mean() < 3, "JPEG's blocks lie differently"


def test_damaged_exif_is_a_remark():
    image, remarks = read(stored(COLOUR[:, :6], format="PNG", exif=b"Exif\0\0nonsense"))
    assert np.array_equal(image, COLOUR[:, :6]) and remarks == {decoding.BROKEN_EXIF}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(format):
    image, remarks = read(stored(RAMP, format=format))
    assert image.mode == "L" and np.array_equal(image, np.rint(RAMP / 257)) and remarks == {decoding.DEEP}


def test_white_may_be_zero_in_tiff():
    content = stored(Image.fromarray(RAMP), format="TIFF", tiffinfo={262: 0})
    assert abs(np.asarray(read(content)[0], int) - (255 - RAMP / 257)).max() <= 1


def test_palettes_and_transparent_colours():
    picture = Image.fromarray(COLOUR[:, :6])
    assert read(stored(picture.quantize(8), format="PNG"))[0].mode == "RGB"
    assert read(stored(picture.convert("L").quantize(8), format="GIF"))[0].mode == "L"
    assert read(stored(picture.quantize(8), format="PNG", transparency=0))[0].mode == "RGBA"
    image, _ = read(stored(picture, format="PNG", transparency=tuple(COLOUR[0, 0].tolist())))
    assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0
    assert read(stored(picture.convert("L"), format="PNG", transparency=7))[0].mode == "LA"
    assert read(stored(picture.convert("1"), format="PNG"))[0].mode == "L"


@pytest.mark.parametrize("gamma, applied", [(1 / 2.2, False), (1.0, True)])
def test_gamma(gamma, applied):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", round(gamma * 100_000).to_bytes(4, "big"))
    image, remarks = read(stored(COLOUR[:, :6], format="PNG", pnginfo=chunks))
    expected = np.rint(255 * (COLOUR[:, :6] / 255) ** (1 / 2.2)) if applied else COLOUR[:, :6]
    assert np.array_equal(image, expected) and remarks == ({decoding.GAMMA} if applied else set())


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_only_the_first_frame_is_read_and_that_is_said(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image, remarks = read(stored(frames[0], format=format, save_all=True, append_images=frames[1:]))
    assert remarks == {decoding.FRAMES} and image.convert("RGB").getpixel((4, 4))[0] > 250


def test_profiles_and_cmyk_are_remarks():
    assert read(stored(COLOUR, format="PNG", icc_profile=b"Adobe RGB (1998)"))[1] == {decoding.PROFILE}
    assert read(stored(COLOUR, format="PNG", icc_profile="sRGB IEC61966".encode("utf-16-be")))[1] == set()
    assert read(stored(Image.new("CMYK", (8, 8)), format="JPEG"))[1] == {decoding.CMYK}


def test_opening_a_data_set_says_how_its_images_are_read(capsys):
    dataset = ImageDataset(CASES / "sixteen_bit")
    assert dataset.num_channels == 1 and len(np.unique(dataset.images([0]))) > 2
    assert "note: " in (said := capsys.readouterr().err) and f"2 images {decoding.DEEP} (such as 0.png)" in said
    assert ImageFiles(CASES / "exif").notes() == []


@pytest.mark.parametrize("format", [*decoding.FORMATS, "TGA"])
def test_formats_of_pixels_are_read(format):
    extension = next(ext for ext in decoding.EXTENSIONS if Image.EXTENSION[ext] == format)
    if format == "SUN":
        pytest.skip("Pillow does not write it")
    image, _ = read(stored(COLOUR[:, :6], format=format), f"picture{extension.upper()}")
    assert image.size == (6, 6) and image.mode == "RGB"


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.tga"])
def test_content_of_another_kind_is_not_looked_into(name, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: pytest.fail("PostScript was opened"))
    for reader in (decoding.decode, lambda content, name: decoding.header(io.BytesIO(content), name)):
        with pytest.raises(Exception, match="cannot identify image file"):
            reader(stored(COLOUR, format="EPS"), name)


def test_one_large_picture_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 15)
    file, running, most = io.BytesIO(), [], []
    Image.new("L", (4, 4)).save(file, "PNG")

    def convert(_):
        with decoding.turn():
            decoding.decode(file.getvalue(), "a.png")
            decoding.decode(file.getvalue(), "a.png")  # a thread does not wait for itself
            running.append(1)
            time.sleep(0.01)
            most.append(len(running))
            running.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(convert, range(8)))
    assert max(most) == 1
    monkeypatch.setattr(decoding, "LARGE", 16)
    barrier = threading.Barrier(2, timeout=10)

    def together(_):
        with decoding.turn():
            decoding.decode(file.getvalue(), "a.png")
            barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(together, range(2)))
