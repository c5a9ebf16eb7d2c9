"""Films of a walk from seed to seed, and sheets whose rows and columns change one thing each."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN
from PIL import Image

from di_refine.commands import films, styles
from di_refine.commands.generate import main
from di_refine.files import film, pictures
from di_refine.generators import load_sampler

GAN, EDM = GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl", GOLDEN / "edm/iddpm.pkl"
UNCONDITIONAL = GOLDEN / "edm/ddpmpp_uncond.pkl"


def generate(*arguments):
    return CliRunner().invoke(main, ["--device=cpu", *(str(argument) for argument in arguments)])


def picture(folder, seed, *options, network=GAN):
    """The picture of a seed as the command writes it."""
    result = generate(
        f"--network={network}", f"--seeds={seed}", f"--outdir={folder}", "--no-grid", "--steps=2", *options
    )
    assert result.exit_code == 0, result.stderr
    return pictures_of(folder / f"seed{seed:04d}.png")


def pictures_of(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def cells(path, columns, rows, size, scale=2, gap=2):
    """The images of a sheet [rows][columns], at their own size; titles stand above and left of them."""
    sheet, step = pictures_of(path), size * scale + gap
    top, left = sheet.shape[0] - (rows * step - gap), sheet.shape[1] - (columns * step - gap)
    inner = sheet[top:, left:]
    return [
        [inner[r * step :, c * step :][: size * scale : scale, : size * scale : scale] for c in range(columns)]
        for r in range(rows)
    ]


def close(a, b):
    """Another batch size may round the last bit of a float differently."""
    return np.abs(a - b).max() <= 1


def frames_of(path):
    with Image.open(path) as opened:
        for number in range(opened.n_frames):
            opened.seek(number)
            yield np.asarray(opened.convert("RGB")).astype(int)


def test_a_turn_keeps_the_length_and_shares_the_angle():
    a, b = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0))
    quarter, half = styles.slerp(a, b, 0.25), styles.slerp(a, b, 0.5)

    def angle(u, v):
        return torch.nn.functional.cosine_similarity(u, v).acos()

    assert torch.allclose(styles.slerp(a, b, 0.0), a) and torch.allclose(styles.slerp(a, b, 1.0), b, atol=1e-5)
    assert torch.allclose(angle(a, quarter), angle(a, b) / 4, atol=1e-3)
    assert torch.allclose(half.norm(dim=1), (a.norm(dim=1) + b.norm(dim=1)) / 2)
    assert torch.allclose(styles.slerp(a, a, 0.3), a, atol=1e-5)


@pytest.mark.parametrize(("network", "walk", "size"), [(GAN, "w", 32), (GAN, "z", 32), (EDM, "z", 16)])
def test_a_walk_visits_the_seeds_and_comes_back(tmp_path, network, walk, size):
    path = tmp_path / "deep" / "walk.webp"
    result = generate(
        f"--network={network}", "--seeds=3,4,5,6", f"--video={path}", f"--walk={walk}", "--tiles=2", "--columns=1",
        "--fps=2", "--seconds=1.5", "--class=1", "--steps=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["frames"] == 6
    frames = list(frames_of(path))
    scale = 128 // size
    assert len(frames) == 6 and frames[0].shape == (2 * 128, 128, 3)
    for number, station in ((0, (3, 4)), (3, (5, 6))):
        for tile, seed in enumerate(station):
            shown = frames[number][tile * 128 :: scale, ::scale][:size]
            assert close(shown, picture(tmp_path, seed, "--class=1", network=network))
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1])]
    assert 0 < max(steps) < 4 * min(steps)  # also from the last frame to the first


def test_a_tile_keeps_the_label_of_its_first_seed(tmp_path):
    sampler = load_sampler(GAN, noise_mode="const")
    first, *_ = films.Walk([0, 1, 2, 3], tiles=2, frames=1).images(sampler, sampler.law.in_turn([0, 1]))
    result = generate(f"--network={GAN}", "--seeds=0-3", f"--video={tmp_path / 'a.webp'}", "--tiles=2", "--fps=1")
    assert result.exit_code == 0, result.stderr
    shown = next(frames_of(tmp_path / "a.webp"))
    assert close(shown[::4, ::4], pictures.make_grid(first, 2).transpose(1, 2, 0).astype(int))
    assert close(shown[::4, 128::4], picture(tmp_path, 1))


def test_two_networks_walk_beside_each_other(tmp_path):
    path = tmp_path / "both.gif"
    result = generate(f"--network={GAN}", f"--beside={GAN}", "--seeds=0,1", f"--video={path}", "--fps=3")
    assert result.exit_code == 0, result.stderr
    frames = list(frames_of(path))
    width = frames[0].shape[1] // 2
    assert len(frames) == 6 and np.array_equal(frames[2][:, :width], frames[2][:, width:])
    with Image.open(path) as opened:
        assert opened.info["duration"] == 330 and opened.info["loop"] == 0


def test_mp4(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="MP4 needs the extra video")
    odd = [Image.new("L", (33, 17), 20 * number) for number in range(5)]
    assert film.save(tmp_path / "a.mp4", odd, 10) == 5
    count, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert count == 5 and seconds == pytest.approx(0.5, abs=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_truncations(tmp_path):
    assert generate(f"--network={GAN}", "--seeds=3,4", "--psis=0.3,1", f"--outdir={tmp_path}").exit_code == 0
    sheet = cells(tmp_path / "truncation.png", 2, 2, 32)
    assert close(sheet[1][0], picture(tmp_path / "a", 4, "--truncation=0.3"))
    assert close(sheet[0][1], picture(tmp_path / "b", 3))


def test_each_class(tmp_path):
    assert generate(f"--network={GAN}", "--seeds=3,4", "--each-class", f"--outdir={tmp_path}").exit_code == 0
    sheet = cells(tmp_path / "classes.png", 10, 2, 32)
    assert close(sheet[1][7], picture(tmp_path / "a", 4, "--class=7"))


def test_style_mixing(tmp_path):
    layers = load_sampler(GAN).generator.net.num_ws
    options = [f"--network={GAN}", "--seeds=0,10", "--class=0", "--mix=20,30,40", f"--outdir={tmp_path}"]
    assert generate(*options, f"--mix-layers=0-{layers - 1}").exit_code == 0
    sheet = cells(tmp_path / "mixing.png", 4, 3, 32)
    alone = picture(tmp_path, 30, "--class=0")
    assert all(close(sheet[row][2], alone) for row in range(3)) and (sheet[0][0] == 255).all()
    assert close(sheet[2][0], picture(tmp_path, 10, "--class=0"))
    assert generate(*options, "--mix-layers=0-3").exit_code == 0
    some = cells(tmp_path / "mixing.png", 4, 3, 32)
    assert close(some[0][2], alone) and not close(some[1][2], alone) and not close(some[1][2], some[1][0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--video=a.avi"], "--video=a.avi: a film is one of .gif, .webp, .mp4"),
        (["--psis=1", "--columns=3"], "--columns is for pictures and films"),
        (["--video=a.gif", "--seeds=0"], "at least two, and --seeds gives 1"),
        (["--video=a.gif", "--seeds=0-6", "--tiles=2"], "give a multiple of 2, or change --tiles"),
        (["--video=new/a.gif", f"--beside={EDM}"], "has other latents or classes"),
        (["--video=a.gif", "--each-class"], "--video and --each-class each write something of their own"),
        (["--video=a.gif", "--latents=edm"], "--latents=edm is for pictures one by one, without --video"),
        (["--fps=10"], "--fps is for --video; give that, too, or leave it out"),
        (["--mix-layers=0"], "--mix-layers is for --mix"),
        (["--mix=1", "--mix-layers=3-99"], "has the layers 0 to"),
        (["--psis=1", "--truncation=0.5"], "leave --truncation out"),
        (["--psis=1,x"], "'x' is not"),
        ([f"--network={EDM}", "--psis=1"], "--psis is for StyleGAN2 generators"),
        ([f"--network={EDM}", "--video=new/a.gif", "--walk=w"], "--walk=w is for StyleGAN2 generators"),
        ([f"--network={UNCONDITIONAL}", "--each-class"], "has no classes"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    result = generate(f"--network={GAN}", *options)
    assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_mp4_without_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(film, "find_spec", lambda name: None)
    result = generate(f"--network={GAN}", f"--video={tmp_path / 'a.mp4'}")
    assert result.exit_code == 2 and "pip install 'di-refine[video]'" in result.stderr
