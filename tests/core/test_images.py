import base64
import contextlib
import http.server
import io
import os
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from vilavt_core.errors import EngineError, ImageError
from vilavt_core.images import ImageLimits, UrlPolicy, image_file, image_size, load_image, to_rgb
from vilavt_core.results import Sample
from vilavt_core.sources import image_list

RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def upright() -> Image.Image:
    """40 x 20, left half red, right half blue."""
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    return image


FORMS = {
    "path": lambda path, data, image: path,
    "text of a path": lambda path, data, image: str(path),
    "numpy's text of a path": lambda path, data, image: np.str_(path),
    "os.PathLike": lambda path, data, image: next(os.scandir(path.parent)),
    "bytes": lambda path, data, image: data,
    "bytearray": lambda path, data, image: bytearray(data),
    "memoryview": lambda path, data, image: memoryview(data),
    "data URL": lambda path, data, image: "data:image/png;base64," + base64.b64encode(data).decode(),
    "BytesIO": lambda path, data, image: io.BytesIO(data),
    "open file": lambda path, data, image: path.open("rb"),
    "what can only be read": lambda path, data, image: Stream(data),
    "row with bytes": lambda path, data, image: {"bytes": data, "path": "elsewhere.png"},
    "row with a path": lambda path, data, image: {"bytes": None, "path": str(path)},
    "PIL image": lambda path, data, image: image,
    "PIL image from a file": lambda path, data, image: Image.open(path),
    "array": lambda path, data, image: np.asarray(image),
    "array, channels first": lambda path, data, image: np.moveaxis(np.asarray(image), -1, 0),
    "array with alpha": lambda path, data, image: np.asarray(image.convert("RGBA")),
    "floats to 1": lambda path, data, image: np.asarray(image) / 255,
    "floats to 255": lambda path, data, image: np.asarray(image).astype(np.float32),
    "wide integers": lambda path, data, image: np.asarray(image).astype(np.int64),
    "16 bits": lambda path, data, image: np.asarray(image).astype(np.uint16) * 257,
    "tensor-like": lambda path, data, image: Tensor(np.moveaxis(np.asarray(image), -1, 0)),
}
"""Every form of a picture, made of the path of its file, its bytes, and the picture."""


class Stream:
    """Bytes that can be read once, like a response."""

    def __init__(self, data: bytes):
        self.data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self.data.read(size)


class Tensor:
    """What a tensor on another device has: it becomes an array behind `detach` and `cpu` only."""

    def __init__(self, values: np.ndarray, at_home: bool = False):
        self.values, self.at_home = values, at_home
        self.shape, self.dtype = values.shape, object()

    def detach(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return Tensor(self.values, at_home=True)

    def is_floating_point(self) -> bool:
        return False

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        assert self.at_home
        return self.values


@pytest.fixture
def stored(tmp_path, upright):
    path = tmp_path / "only" / "a.png"
    path.parent.mkdir()
    path.write_bytes(encoded(upright))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_loads_alike_in_every_form(form, stored, upright):
    source = FORMS[form](stored, stored.read_bytes(), upright)
    image = load_image(source)
    assert image.mode == "RGB"
    assert image.tobytes() == upright.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_is_a_list_of_one_in_every_form(form, stored, upright):
    source = FORMS[form](stored, stored.read_bytes(), upright)
    for images in (source, [source], (source,), iter([source])):
        (found,) = image_list(images)
        assert found is source
    (found,) = Sample(source, "what?").images
    assert found is source
    assert load_image(io.BytesIO(image_file(source))).tobytes() == upright.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_a_picture_is_known_in_every_form(form, stored, upright):
    assert image_size(FORMS[form](stored, stored.read_bytes(), upright)) == (40, 20)


def test_several_pictures_in_one_array_are_a_list(upright):
    pixels = np.asarray(upright)
    assert [load_image(image).tobytes() for image in image_list(np.stack([pixels, pixels]))] == [upright.tobytes()] * 2
    rows = np.array([{"bytes": encoded(upright), "path": None}, "b.png"], dtype=object)
    assert image_list(rows) == list(rows)


def test_a_grey_array_is_a_grey_picture():
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    for values in (grey, grey[..., None], grey[None], grey / 255):
        assert (np.asarray(load_image(values)) == grey[..., None]).all()
    assert load_image(np.eye(4, dtype=bool)).getpixel((1, 1)) == (255,) * 3


def test_an_open_file_is_read_from_its_beginning_and_left_where_it_was(upright):
    file = io.BytesIO()
    upright.save(file, "PNG")
    end = file.tell()
    for _ in range(2):
        assert load_image(file).size == (40, 20)
        assert file.tell() == end
        assert not file.closed


@pytest.mark.parametrize(
    "source, says",
    [
        (np.zeros((3, 40, 3)), r"shape \(3, 40, 3\) of a numpy.ndarray can be read with channels first or last"),
        (np.zeros((40, 20, 2)), r"shape \(40, 20, 2\) of a numpy.ndarray"),
        (np.zeros(40), r"shape \(40,\)"),
        (np.full((9, 9), -1.0), "values from -1 to -1; pixels are 0 to 255"),
        (np.full((9, 9), 256), "values from 256 to 256"),
        (np.full((9, 9), np.nan), "values from nan"),
        (np.full((9, 9), "a", dtype=object), "an array of object"),
        (np.zeros((0, 9)), "9 x 0 px"),
        (np.zeros((1, 900), np.uint8), "side ratio of 900"),
        ({"url": "a.png"}, "'bytes' or 'path'.*this one has 'url'"),
        ({"bytes": b"x", "path": "a", "id": 3}, "this one has 'id'"),
        ({"bytes": None, "path": None}, "this one has neither"),
        ({"bytes": "text"}, "'bytes' of the dict is a str"),
        ({"bytes": b"rubbish", "path": "cat.png"}, "cat.png: 7 bytes"),
        (io.StringIO("text"), "reading the _io.StringIO gives a str, not bytes; open the file with mode 'rb'"),
        ([1, 2], "cannot load a list"),
        ("/" + "x" * 300_000, r"x… \(300001 characters\)"),
    ],
)
def test_what_is_no_picture_is_named(source, says):
    with pytest.raises(ImageError, match=says) as error:
        load_image(source)
    assert len(str(error.value)) < 1000


def test_a_closed_file_is_named(upright):
    file = io.BytesIO(encoded(upright))
    file.close()
    with pytest.raises(ImageError, match="open file cannot be read: I/O operation on closed file"):
        load_image(file)


def test_a_file_is_not_read_beyond_the_cap():
    file = io.BytesIO(b"x" * 1000)
    with pytest.raises(ImageError, match="at most 99 are allowed"):
        load_image(file, ImageLimits(max_bytes=99))


def test_the_path_of_a_row_is_no_way_around_what_is_allowed(stored):
    for row in ({"path": str(stored)}, {"path": "https://example.com/a.png"}):
        with pytest.raises(ImageError, match="not allowed here"):
            load_image(row, allow_paths=False)


@pytest.mark.parametrize("images, name", [(None, "NoneType"), (3, "int"), ({"a.png"}, "set"), (object(), "object")])
def test_what_holds_no_images_is_named(images, name):
    with pytest.raises(ImageError, match=rf"\b{name}\b.*; .*a path, a data URL"):
        image_list(images)


@pytest.mark.parametrize(
    "entry, says",
    [
        (("a.png", "what?", "more"), r"not a tuple of 3; id, seed and limits go into Sample"),
        ("what?", "not a str"),
        ((("what?"), Image.new("RGB", (9, 9))), "the question is a PIL.Image.Image, it must be text; check the order"),
    ],
)
def test_what_is_no_sample_is_named(entry, says):
    with pytest.raises(EngineError, match=says):
        Sample.of(entry)


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text + "\n",
        lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        lambda text: f" {text}%0A",
    ],
    ids=["newline", "wrapped", "url-safe", "unpadded", "percent", "blanks around"],
)
def test_base64_is_read_however_it_is_written(write):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    data = encoded(noise)
    plain = base64.b64encode(data + b"\0" * (1 + -len(data) % 3)).decode()  # padded
    assert all(sign in plain for sign in "+/=")
    assert load_image("data:image/png;base64," + write(plain)).tobytes() == noise.tobytes()
    assert image_size("data:image/png;base64," + write(plain)) == (40, 20)


@pytest.mark.parametrize("broken", ["!!!", "AA AA", "AAAA=AAA", "A", "ä", "%41%41"])
def test_what_is_no_base64_is_refused(broken):
    with pytest.raises(ImageError, match="its base64 data cannot be read"):
        load_image("data:image/png;base64," + broken)


def test_the_cap_on_bytes_does_not_count_line_breaks(upright):
    data = encoded(upright)
    wrapped = "data:image/png;base64," + "\n".join(base64.b64encode(data).decode()) + "\n"
    limits = ImageLimits(max_bytes=len(data) + 2)
    assert load_image(wrapped, limits).size == (40, 20)
    with pytest.raises(ImageError, match=f"at most {len(data) - 3} are allowed"):
        load_image(wrapped, ImageLimits(max_bytes=len(data) - 3))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


LARGE = b"a" * 3_000_000
NOTES = {
    "profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(LARGE)),
    "packed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE)),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
    "plain text": chunk(b"tEXt", b"Comment\0" + LARGE) * 23,
}


BEFORE_AND_BEHIND = [(kind, False) for kind in NOTES] + [(kind, True) for kind in NOTES if kind != "profile"]
"""Where the pixels may be, for each kind of note; a profile always stands before them."""


@pytest.mark.parametrize("kind, behind", BEFORE_AND_BEHIND)
def test_a_png_with_a_large_profile_or_text_is_a_picture(kind, behind, upright, tmp_path):
    data = encoded(upright)
    at = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    data = data[:at] + NOTES[kind] + data[at:]
    (tmp_path / "a.png").write_bytes(data)
    limits = ImageLimits(max_bytes=100_000_000)
    with pytest.raises(ValueError, match=r"too large|Too much memory"), Image.open(io.BytesIO(data)) as refused:
        refused.load()
    assert load_image(data, limits).tobytes() == upright.tobytes()
    assert load_image(tmp_path / "a.png", limits).tobytes() == upright.tobytes()
    assert image_size(tmp_path / "a.png", limits) == image_size(data, limits) == (40, 20)


def test_a_text_that_states_the_orientation_of_a_png_still_counts(upright):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(upright)
    at = data.index(b"IDAT") - 4
    for text in (b"XML:com.adobe.xmp\0\0\0\0\0" + xmp, b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)):
        turned = data[:at] + chunk(b"iTXt", text) + NOTES["profile"] + data[at:]
        assert load_image(turned).size == (20, 40)
        assert image_size(turned) == (20, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_common_formats_are_read(kind, upright):
    image = load_image(encoded(upright, kind))
    assert image.size == (40, 20)
    assert np.abs(np.asarray(image).astype(int)[10, 5] - RED).max() < 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, upright):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    assert load_image(data).tobytes() == upright.tobytes()
    assert load_image(data, rules="published").tobytes() == stored.tobytes()


def test_an_exif_orientation_of_a_palette_picture_is_applied(upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90).convert("P")
    assert load_image(encoded(stored, exif=exif)).size == (40, 20)


def test_unreadable_exif_data_is_ignored(upright):
    assert load_image(encoded(upright, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).size == (40, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0)).convert(mode)
    assert load_image(image).getpixel((15, 15)) == (255, 255, 255)


def test_half_transparent_black_becomes_grey():
    assert load_image(encoded(Image.new("RGBA", (30, 30), (0, 0, 0, 128)))).getpixel((15, 15)) == (127, 127, 127)


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (30, 30), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 15, 30))
    loaded = load_image(encoded(image, transparency=0))
    assert loaded.getpixel((20, 15)) == (255, 255, 255)
    assert loaded.getpixel((5, 15)) == RED


def test_a_transparent_colour_of_a_true_colour_picture_becomes_white():
    assert load_image(encoded(Image.new("RGB", (30, 30), (1, 2, 3)), transparency=(1, 2, 3))).getpixel((3, 3)) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    grey = Image.new("L", (30, 30), 255)
    image = grey.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (30, 30), (255, 128, 128))
    assert load_image(image).mode == "RGB"
    if mode != "LAB":
        assert min(load_image(image).getpixel((9, 9))) >= 254


def test_a_cmyk_jpeg_keeps_its_colours():
    image = Image.new("RGB", (30, 30), RED).convert("CMYK")
    red, green, blue = load_image(encoded(image, "JPEG")).getpixel((15, 15))
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), kind)))
    assert (loaded[0, :, 0] == np.arange(256)).all()


def test_thirty_two_bit_and_float_pictures_are_scaled():
    assert load_image(Image.fromarray(np.full((30, 30), 65535, np.int32))).getpixel((0, 0)) == (255,) * 3
    assert to_rgb(Image.fromarray(np.array([[0, 1_000_000]], np.int32))).getpixel((1, 0)) == (255,) * 3
    assert to_rgb(Image.fromarray(np.array([[0.5, 1.0]], np.float32))).getpixel((0, 0)) == (128,) * 3
    assert to_rgb(Image.fromarray(np.array([[100.0, np.nan, 300.0]], np.float32))).tobytes() == bytes(
        [100] * 3 + [0] * 3 + [255] * 3
    )


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert load_image(data).getpixel((15, 15)) == RED


def test_the_argument_is_left_as_it_was(tmp_path, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(encoded(upright, exif=exif))
    with Image.open(tmp_path / "a.png") as image:
        assert load_image(image).size == (20, 40)
        assert image.size == (40, 20)
        assert image.getexif()[0x0112] == 6
        assert image.getpixel((5, 5)) == RED


def test_too_many_bytes_are_refused_before_reading(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(ImageError, match=r"large\.png: 5000000000 bytes, at most 67108864.*ImageLimits"):
        load_image(path)
    with pytest.raises(ImageError, match="100 bytes, at most 99"):
        load_image(b"x" * 100, ImageLimits(max_bytes=99))


def test_too_many_pixels_are_refused_before_decoding():
    data = encoded(Image.new("1", (12_000, 12_000)))
    damaged = data[: len(data) // 2]
    with pytest.raises(ImageError, match=r"big\.png: 12000 x 12000 = 144000000 pixels, at most 100000000.*ImageLimits"):
        load_image(damaged, name="big.png")


def test_a_decompression_bomb_is_refused_with_its_numbers():
    header = encoded(Image.new("1", (1, 1)))
    width = (60_000).to_bytes(4, "big")
    chunk = b"IHDR" + width + width + header[24:29]
    bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:]
    with pytest.raises(ImageError, match="3600000000 pixels"):
        load_image(bomb)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_file_cut_short_is_an_image_error_that_names_it(kind, tmp_path):
    data = encoded(Image.effect_noise((200, 200), 90).convert("RGB"), kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.bin"):
        load_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_picture_is_an_image_error(data):
    with pytest.raises(ImageError, match=f"{len(data)} bytes"):
        load_image(data)


def test_damaged_bytes_never_raise_anything_else():
    pristine = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    random = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(pristine)
        for at in random.integers(2, len(data), 20):
            data[at] = random.integers(256)
        with contextlib.suppress(ImageError):
            assert load_image(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("size", [(2010, 10), (10, 2010)])
def test_too_long_a_picture_is_refused(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} px has a side ratio of 201, at most 200"):
        load_image(Image.new("RGB", size))


def test_an_empty_picture_is_refused():
    with pytest.raises(ImageError, match="0 x 5 px"):
        load_image(Image.new("RGB", (0, 5)))


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing.png": "no such file",
        "pipe": "not a regular file",
        ".": "not a regular file",
        "a\0b": "a",
    }.items():
        with pytest.raises(ImageError, match=message):
            load_image(str(tmp_path / name))


def test_paths_can_be_switched_off():
    with pytest.raises(ImageError, match="paths are not allowed"):
        load_image("/etc/hostname", allow_paths=False)


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64,%%%", "data:image/png;base64"])
def test_a_bad_data_url_is_refused(url):
    with pytest.raises(ImageError, match="data URL"):
        load_image(url)


def test_something_else_is_refused():
    with pytest.raises(ImageError, match="cannot load a int"):
        load_image(5)


class Handler(http.server.BaseHTTPRequestHandler):
    """/ok a picture, /big too many bytes, /to?<url> a redirect, anything else 404."""

    def do_GET(self):
        path, _, target = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif path in ("/ok", "/big"):
            body = encoded(Image.new("RGB", (40, 20), "red")) if path == "/ok" else b"x" * 5000
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


LOCAL = UrlPolicy(private_hosts=True, timeout=5)


def test_a_url_is_loaded_only_if_allowed(server):
    with pytest.raises(ImageError, match="allow_urls=True"):
        load_image(f"{server}/ok")
    assert load_image(f"{server}/ok", allow_urls=True, url_policy=LOCAL).getpixel((0, 0)) == RED
    assert load_image(f"{server}/to?/ok", allow_urls=True, url_policy=LOCAL).getpixel((0, 0)) == RED


def test_private_hosts_are_refused_unless_allowed(server):
    with pytest.raises(ImageError, match=r"127\.0\.0\.1, not a public address"):
        load_image(f"{server}/ok", allow_urls=True)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.png", "gopher://example.org/"])
def test_other_schemes_are_refused(url, server):
    with pytest.raises(ImageError, match="scheme"):
        load_image(url, allow_urls=True)
    with pytest.raises(ImageError, match=r"scheme|Redirection to url .* is not allowed"):
        load_image(f"{server}/to?{url}", allow_urls=True, url_policy=LOCAL)


def test_a_download_is_capped(server):
    with pytest.raises(ImageError, match="at most 4000"):
        load_image(f"{server}/big", ImageLimits(max_bytes=4000), allow_urls=True, url_policy=LOCAL)


def test_endless_redirects_and_missing_pages_are_image_errors(server):
    for path in ("/none", "/to?/to?/to?/to?/to?/ok", "/to?//"):
        with pytest.raises(ImageError, match=server.removeprefix("http://")):
            load_image(f"{server}{path}", allow_urls=True, url_policy=LOCAL)


@pytest.mark.parametrize("allow_urls", [True, False])
def test_a_file_url_is_told_to_be_a_path(tmp_path, allow_urls):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="give the path itself, without file://"):
        load_image((tmp_path / "a.png").as_uri(), allow_urls=allow_urls)
