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


def dark_in(picture, left, top, right, bottom):
    return bool((np.asarray(picture.convert("L"))[top:bottom, left:right] < 128).any())


def test_titles_of_columns_and_rows(tmp_path):
    stack, path = np.full([6, 1, 32, 32], 200, np.uint8), tmp_path / "grid.png"
    pictures.save_grid(path, stack, columns=3, titles=(["cat", "fox", "owl"], []))
    with Image.open(path) as grid:
        top = grid.height - 64
        assert grid.size == (96, top + 64) and 0 < top < 24, "short names lie"
        assert all(dark_in(grid, x, 0, x + 32, top) for x in (0, 32, 64)) and not dark_in(grid, 0, top, 96, grid.height)
    pictures.save_grid(path, stack, columns=3, titles=(["cat", "a very long name of a class", "owl"], []))
    with Image.open(path) as grid:
        assert grid.width == 96 and 96 + 64 < grid.height < 200 + 64, "a long name turns all, and is shortened"
    pictures.save_grid(path, stack, columns=3, titles=([], ["cat", "cat"]))
    with Image.open(path) as grid:
        left = grid.width - 96
        assert grid.height == 64 and left > 0 and dark_in(grid, 0, 24, left, 40), "one title for equal neighbours"
        assert not dark_in(grid, 0, 0, left, 20)


def test_titles_in_a_figure_and_on_transparent_pictures(tmp_path):
    stack = np.full([4, 4, 16, 16], 200, np.uint8)
    heights = []
    for number, titles in enumerate([((), ()), (["cat", "fox"], ())]):
        pictures.save_side_by_side(tmp_path / f"{number}.png", [("a", stack), ("b", stack)], columns=2, titles=titles)
        heights.append(Image.open(tmp_path / f"{number}.png").height)
    assert heights[0] < heights[1]
    pictures.save_grid(tmp_path / "grid.png", stack, columns=2, titles=(["cat", "fox"], ()))
    assert Image.open(tmp_path / "grid.png").mode == "RGB"


def test_names_that_the_font_lacks_are_known():
    assert all(map(pictures.is_drawable, ("Animals & Nature", "cat-1", "x" * 100)))
    assert not any(map(pictures.is_drawable, ("猫", "a\nb", "Bären")))
