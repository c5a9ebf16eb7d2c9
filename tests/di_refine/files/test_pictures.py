import numpy as np
import pytest
import torch
from PIL import Image

from di_refine.errors import InputError
from di_refine.files import pictures


def test_to_uint8_rounds_as_the_field_does():
    values = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.0039, 0.004, 0.99, 1.0, 3.0])
    expected = [0, 0, 0, 128, 128, 128, 254, 255, 255]  # floor(127.5 x + 128) within 0..255
    assert pictures.to_uint8(values).tolist() == expected
    assert pictures.to_uint8(values.half()).dtype == torch.uint8
    levels = torch.arange(256)
    assert torch.equal(pictures.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8)), (
        "8-bit images survive a round trip"
    )


def test_make_grid_places_scales_and_pads():
    stack = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    grid = pictures.make_grid(stack, columns=3, scale=2, gap=1)
    assert grid.shape == (1, 5, 8)
    expected = [
        [0, 0, 255, 1, 1, 255, 2, 2],
        [0, 0, 255, 1, 1, 255, 2, 2],
        [255] * 8,
        [3, 3, 255, 4, 4, 255, 255, 255],
        [3, 3, 255, 4, 4, 255, 255, 255],
    ]
    assert grid[0].tolist() == expected


def test_make_grid_keeps_colours_and_defaults_to_a_square():
    stack = torch.randint(0, 256, [9, 3, 4, 4], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = pictures.make_grid(stack)
    assert grid.shape == (3, 12, 12)
    assert np.array_equal(grid[:, 4:8, 8:12], stack[5])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 5, 4, 4), (3, 4, 4)])
def test_make_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="expected images"):
        pictures.make_grid(np.zeros(shape, np.uint8))


def test_integer_images_that_are_not_uint8_are_refused():
    with pytest.raises(ValueError, match="int64"):
        pictures.make_grid(torch.zeros([1, 1, 2, 2], dtype=torch.int64))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_save_png_and_grid_round_trip(tmp_path, channels, mode):
    stack = torch.rand([4, channels, 8, 8], generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures.save_png(tmp_path / "one.png", stack[0])
    pictures.save_grid(tmp_path / "grid.png", stack, columns=2)
    one, grid = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "grid.png")
    assert (one.mode, grid.mode, grid.size) == (mode, mode, (16, 16))
    pixels = np.asarray(one).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels, pictures.to_uint8(stack[0]))
    assert np.array_equal(np.asarray(grid)[:8, :8], np.asarray(one))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grid.png", "one.png"]


def test_other_numbers_of_channels_are_one_sentence():
    pictures.check_channels(4)
    with pytest.raises(InputError, match="images of 5 channels, and a PNG picture holds 1 to 4"):
        pictures.check_channels(5)


def test_transparent_pixels_are_white_where_panels_are_compared(tmp_path):
    clear = np.zeros([1, 4, 8, 8], np.uint8)
    pictures.save_side_by_side(tmp_path / "f.png", [("clear", clear)], scale=4)
    figure = np.asarray(Image.open(tmp_path / "f.png"))
    assert (figure[-40:-20] == 255).all()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "one.png"
    pictures.save_png(path, np.zeros([1, 2, 2], np.uint8))
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.save_png(path, np.ones([1, 2, 2], np.uint8))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["one.png"]


def test_side_by_side_has_titles_above_panels(tmp_path):
    dark = np.zeros([4, 1, 8, 8], np.uint8)
    red = np.zeros([4, 3, 8, 8], np.uint8)
    red[:, 0] = 255
    pictures.save_side_by_side(tmp_path / "f.png", [("before\nFID 6.5", dark), ("after", red)], columns=2, scale=4)
    figure = np.asarray(Image.open(tmp_path / "f.png")).astype(int)
    height, width, _ = figure.shape
    panel = 2 * 8 * 4 + 2  # two enlarged images and the gap
    top = height - 16 - panel
    assert (figure[0] == 255).all() and (figure[:, 0] == 255).all(), "a white margin"
    assert (figure[:top, : width // 2] < 128).any() and (figure[:top, width // 2 :] < 128).any(), "a title above each"
    is_red = (figure == [255, 0, 0]).all(axis=2)
    assert is_red[:, width // 2 :].sum() == 4 * 32 * 32 and not is_red[:, : width // 2].any()
