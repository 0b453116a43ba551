"""One reader for all images: upright, on white, cropped, scaled to 8 bits."""

import numpy as np
import pytest
import torch
from PIL import Image

from mu.concepts.sets import read_image
from mu.images import open_image

LEFT, RIGHT = (255, 0, 0), (0, 0, 255)


def halves(side=32):
    """Return an image whose upper half is red and whose lower half is blue."""
    rows = [[LEFT] * side] * (side // 2) + [[RIGHT] * side] * (side // 2)
    return Image.fromarray(np.array(rows, np.uint8))


def levels(image):
    return np.asarray(image).astype(int)


def test_the_middle_of_a_wide_image_is_kept(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert levels(open_image(tmp_path / "wide.png", 20)).tolist() == wide[:, 20:40].tolist()
    assert open_image(tmp_path / "wide.png").size == (60, 20)


def rgba(path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., :3] = (200, 0, 255)  # below full transparency
    pixels[4:12, 4:12] = (255, 255, 0, 255)
    Image.fromarray(pixels).save(path)


def palette(path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 255, 0] + [0] * 750)
    image.paste(1, (4, 4, 12, 12))
    image.save(path, transparency=0)


@pytest.mark.parametrize("save", [rgba, palette])
def test_transparency_is_white(tmp_path, save):
    save(tmp_path / "image.png")
    expected = np.full((16, 16, 3), 255)
    expected[4:12, 4:12] = (255, 255, 0)
    assert levels(open_image(tmp_path / "image.png", 16)).tolist() == expected.tolist()


@pytest.mark.parametrize("orientation, turned", [(3, 180), (6, -90), (8, 90)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_images_are_upright(tmp_path, orientation, turned, suffix):
    image = halves()
    exif = image.getexif()
    exif[274] = orientation
    options = {".jpg": dict(quality=100, subsampling=0), ".webp": dict(lossless=True)}
    image.save(tmp_path / f"turned{suffix}", exif=exif, **options.get(suffix, {}))
    found = levels(open_image(tmp_path / f"turned{suffix}", 32))
    assert np.abs(found - levels(image.rotate(turned))).max() < 8


def test_sixteen_bits_and_floats_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 16 * 16).reshape(16, 16)
    expected = np.rint(ramp * 255).astype(int)
    Image.fromarray(np.rint(ramp * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.rint(ramp * 65535).astype(np.uint16)).save(tmp_path / "deep.tif")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "deep.tif", "float.tif"):
        found = levels(open_image(tmp_path / name, 16))
        assert np.abs(found - expected[..., None]).max() <= 1, name
    for wrong in (np.full((4, 4), np.nan), ramp * 255, ramp - 1):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "wrong.tif")
        with pytest.raises(ValueError, match="wrong.tif is not a readable image .levels from"):
            open_image(tmp_path / "wrong.tif")


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P"])
def test_all_modes_become_rgb(tmp_path, mode):
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    halves().convert(mode).save(file)
    assert open_image(file, 8).mode == "RGB"


def test_broken_files_and_bombs_are_named(tmp_path, monkeypatch):
    halves().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            open_image(tmp_path / name, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="whole.png is not a readable image .*remove or replace"):
        open_image(tmp_path / "whole.png", 8)


def test_training_and_import_read_the_same(tmp_path):
    rgba(tmp_path / "image.png")
    found = (read_image(tmp_path / "image.png", 12) + 1) / 2 * 255
    expected = torch.from_numpy(levels(open_image(tmp_path / "image.png", 12))).permute(2, 0, 1)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-3)
