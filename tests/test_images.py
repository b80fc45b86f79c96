"Images: batches, digits, shapes, files that cannot be pictures, the cache, CIFAR-10's readers, sets that do not belong"

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ldebm import cifar, decode
from ldebm.attributes import read_attributes
from ldebm.cifar import CIFAR10_ARCHIVE, CIFAR10_CLASSES, CIFAR10_FILES, cifar10, read_cifar10
from ldebm.core import cache_folder
from ldebm.decode import BadImage, Decoding, decode_files, decode_image
from ldebm.image_files import ChangedFile, find_images, list_images
from ldebm.image_folders import images_from_files
from ldebm.image_sets import load_images
from ldebm.images import Images, fair_order, fewer_levels, image_batches, plot_grid
from ldebm.outliers import (
    blended,
    blurred,
    house_numbers,
    inverted,
    noise_images,
    only_class,
    permuted,
    rotated,
    shuffled,
    textures,
    without_class,
)
from ldebm.shapes import N_JITTER, SHAPES, draw_shapes, shapes


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(w=12, h=12, seed=0, fmt="PNG", mode="RGB", **kw):
    from PIL import Image

    a = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    b = io.BytesIO()
    Image.fromarray(a).convert(mode).save(b, fmt, **kw)
    return b.getvalue()


def pixels_of(data):
    "By Pillow alone"
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()).permute(2, 0, 1)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for k, v in files.items():
            z.writestr(k, v)
    return path


def write_folder(path, files):
    for k, v in files.items():
        (path / k).parent.mkdir(parents=True, exist_ok=True)
        (path / k).write_bytes(v)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LDEBM_DOWNLOAD", raising=False)


# -- sets and batches


def test_images_checks_itself():
    px = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    for kw, wrong in [
        (dict(pixels=px.float()), "uint8"),
        (dict(pixels=px[0]), "shape"),
        (dict(pixels=px + 9, levels=4), "a pixel is 9"),
        (dict(pixels=px, labels=torch.zeros(3, 1, dtype=torch.long)), "labels must be long of shape"),
        (dict(pixels=px, labels=torch.full((3, 1), 2), attributes={"a": ("x", "y")}), "beyond its 2 values"),
        (dict(pixels=px, labels=torch.full((3, 1), -2), attributes={"a": ("x", "y")}), "beyond its 2 values"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            Images("t", **kw)
    assert Images("t", px, attributes={"a": ("x", "y")}).labels.tolist() == [[-1]] * 3


def test_x_covers_the_unit_interval():
    for levels in (2, 17, 256):
        x = Images("t", torch.arange(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1), levels=levels).x().flatten()
        assert x.dtype == torch.float32
        assert_close(x, torch.linspace(0, 1, levels))


@pytest.mark.parametrize("kw", [{}, {"drop_last": True}, {"weights": torch.linspace(0, 1, 50)}])
def test_resumed_batches_are_the_tail(kw):
    images = shapes(50, gen(), 8)
    g, h = gen(1), gen(1)
    whole = list(image_batches(images, 8, gen=g, **kw))
    for start in (0, 3, len(whole)):
        tail = list(image_batches(images, 8, gen=gen(1), start=start, **kw))
        assert len(tail) == len(whole) - start
        for a, b in zip(whole[start:], tail):
            assert torch.equal(a.x, b.x) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)
    image_batches(images, 8, gen=h, **kw)  # not one batch used
    assert torch.equal(g.get_state(), h.get_state())
    for b in whole:
        assert torch.equal(b.x, images.x(b.index)) and torch.equal(b.labels, images.labels[b.index])
    if kw.get("drop_last"):
        assert {len(b) for b in whole} == {8}


def test_batches_in_order_and_weighted():
    images = shapes(20, gen(), 8)
    assert torch.cat([b.index for b in image_batches(images, 6)]).tolist() == list(range(20))
    w = torch.zeros(20)
    w[[3, 5]] = torch.tensor([1.0, 3.0])
    seen = torch.cat(
        [torch.cat([b.index for b in image_batches(images, 6, gen=gen(i), weights=w)]) for i in range(100)]
    )
    assert set(seen.tolist()) == {3, 5}
    p = (seen == 5).float().mean()
    assert abs(p - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5
    with pytest.raises(ValueError, match="weights need gen"):
        next(image_batches(images, 6, weights=w))
    with pytest.raises(ValueError, match="shape"):
        next(image_batches(images, 6, gen=gen(), weights=w[1:]))
    with pytest.raises(ValueError, match="batch_size"):
        image_batches(images, 0)


def test_every_prefix_is_fair():
    y = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    o = fair_order(y, 1000, gen())
    assert sorted(o.tolist()) == list(range(1000))
    for n in (10, 100, 333, 999):
        assert ((y[o[:n]].bincount(minlength=3) - n * torch.tensor([0.5, 0.3, 0.2])).abs() <= 2).all()
    even = fair_order(torch.arange(1000) % 10, 1000, gen()) % 10
    assert (even.reshape(-1, 10).sort(1).values == torch.arange(10)).all()  # equal classes: each block has every one
    assert len({tuple(b) for b in even.reshape(-1, 10).tolist()}) > 90  # in no fixed order
    assert not torch.equal(o, fair_order(y, 1000, gen(1)))


# -- digits


def test_digits_split():
    from sklearn.datasets import load_digits

    sets = load_images("digits")
    assert [len(s) for s in sets.values()] == [1257, 180, 360]
    assert all(s.levels == 17 and s.shape == (1, 8, 8) for s in sets.values())
    every = torch.cat([s.pixels for s in sets.values()]).flatten(1)
    want = torch.tensor(load_digits().data, dtype=torch.uint8)
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, want.tolist()))  # each picture in one split
    share = torch.tensor(load_digits().target).bincount() / 1797
    for s in sets.values():
        assert (s.label("class").bincount() - len(s) * share).abs().max() <= 2
    assert torch.equal(load_images("digits", limit=50)["train"].pixels, sets["train"].pixels[:50])
    assert torch.equal(load_images("digits", seed=3)["test"].pixels, sets["test"].pixels)
    # fixed for good: another order would make records that cannot be compared
    assert sets["test"].label("class")[:20].tolist() == [1, 7, 9, 4, 8, 0, 5, 3, 6, 1, 2, 8, 7, 3, 0, 6, 4, 9, 2, 3]
    with pytest.raises(ValueError, match="8 pixels a side"):
        load_images("digits", size=32)
    with pytest.raises(ValueError, match="attributes_csv"):
        load_images("digits", attributes_csv="a.csv")


# -- shapes


@pytest.mark.parametrize("size", [16, 32])
def test_shapes_factors_are_in_the_pictures(size):
    s = shapes(1500, gen(2), size)
    assert s.shape == (3, size, size) and list(s.attributes) == list(SHAPES)
    x = s.x()
    excess = (x - x.flatten(2).median(-1).values[..., None, None]).clamp(0)
    hot = excess.sum((2, 3)) > 0.5 * excess.sum((2, 3)).amax(1, keepdim=True)
    colour = torch.where(hot[:, 0], hot[:, 1].long(), torch.where(hot[:, 1], 2, 3))
    assert torch.equal(colour, s.label("colour"))
    m, half = excess.sum(1), size // 2
    down, right = (
        m[:, half:].sum((1, 2)) > m[:, :half].sum((1, 2)),
        m[..., half:].sum((1, 2)) > m[..., :half].sum((1, 2)),
    )
    assert torch.equal(2 * down.long() + right.long(), s.label("position"))
    area = (m > 0.5 * m.amax((1, 2), keepdim=True)).float().mean((1, 2))
    for k in range(4):
        a, big = area[s.label("shape") == k], s.label("size")[s.label("shape") == k] == 1
        assert (a[big].min() > a[~big].max()) or size == 16 and a[big].mean() > 1.8 * a[~big].mean()
    # a triangle's rows get wider downwards: their centre of mass is below the middle of its height
    rows, cy = (m > 0.5 * m.amax((1, 2), keepdim=True)).float().sum(2), torch.arange(size)
    tri, sq = s.label("shape") == 2, s.label("shape") == 1
    lean = ((rows * cy).sum(1) / rows.sum(1)) - ((rows > 0) * cy).sum(1) / (rows > 0).sum(1)
    assert lean[tri].mean() > 0.05 * size / 2 > lean[sq].abs().mean()


def test_shapes_are_no_table_and_are_reproducible():
    a, b = shapes(400, gen(5)), shapes(400, gen(5))
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.pixels, shapes(400, gen(6)).pixels)
    same = shapes(200, gen(), labels=torch.tensor([[2, 1, 1, 3]]).expand(200, 4))
    assert len({p.numpy().tobytes() for p in same.pixels}) == 200
    n = shapes(6000, gen(7), 8).labels
    for j, v in enumerate(SHAPES.values()):
        p = n[:, j].bincount(minlength=len(v)) / 6000
        assert (p - 1 / len(v)).abs().max() < 5 * (0.25 / 6000) ** 0.5
    pairs = (n[:, 0] * 4 + n[:, 1]).bincount(minlength=16) / 6000  # independent
    assert (pairs - 1 / 16).abs().max() < 5 * (1 / 16 * 15 / 16 / 6000) ** 0.5
    with pytest.raises(ValueError, match="beyond"):
        shapes(1, gen(), labels=torch.tensor([[0, 4, 0, 0]]))
    with pytest.raises(ValueError, match="at least 8"):
        shapes(1, gen(), size=4)


def test_shapes_colour_changes_colour_only():
    j = torch.rand(1, N_JITTER, generator=gen())
    a, b = (draw_shapes(torch.tensor([[1, c, 1, 0]]), j, 32)[0] for c in (0, 2))
    changed = (a != b).any(0)
    assert changed[:16, :16].sum() > 50 and changed[20:].sum() == 0 and changed[:, 20:].sum() == 0


def test_shapes_loader():
    sets = load_images("shapes", limit=300, size=8)
    assert [len(s) for s in sets.values()] == [300, 1000, 2000] and sets["train"].shape == (3, 8, 8)
    assert not set(map(bytes, sets["train"].pixels.flatten(1).numpy())) & set(
        map(bytes, sets["test"].pixels.flatten(1).numpy())
    )


# -- files


@pytest.fixture
def pets():
    return {f"pets/{c}/{i}.png": picture(seed=100 * j + i) for j, c in enumerate(("cat", "dog")) for i in range(40)}


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_pixels_and_labels_are_those_of_the_files(kind, tmp_path, pets):
    path = write_zip(tmp_path / "p.zip", pets) if kind == "zip" else write_folder(tmp_path / "p", pets)
    sets = load_images(path)
    assert [len(s) for s in sets.values()] == [72, 4, 4] and sets["train"].name == "p"
    of = {pixels_of(v).numpy().tobytes(): k for k, v in pets.items()}
    names = []
    for s in sets.values():
        for p, y in zip(s.pixels, s.labels[:, 0].tolist()):
            name = of[p.numpy().tobytes()]  # bit for bit
            names.append(name)
            assert name.split("/")[1] == s.attributes["class"][y]
    assert len(set(names)) == 80  # no picture in two splits
    again = load_images(path)
    assert all(torch.equal(again[k].pixels, sets[k].pixels) for k in sets)
    assert not torch.equal(load_images(path, seed=1)["train"].pixels, sets["train"].pixels)


def test_folder_and_zip_agree(tmp_path, pets):
    a, b = (
        load_images(write_zip(tmp_path / "p.zip", pets), limit=20),
        load_images(write_folder(tmp_path / "p", pets), limit=20),
    )
    for k in a:
        assert torch.equal(a[k].pixels, b[k].pixels) and torch.equal(a[k].labels, b[k].labels)


def test_limit_decodes_only_what_is_needed(tmp_path, pets, monkeypatch):
    path, calls = write_zip(tmp_path / "p.zip", pets), []
    monkeypatch.setattr(decode, "decode_image", lambda *a, **k: (calls.append(1), decode_image(*a, **k))[1])
    sets = load_images(path, limit=10, cache=False)
    assert len(sets["train"]) == 10 and len(calls) == 10 + 4 + 4
    assert sets["train"].label("class").bincount().tolist() == [5, 5]


def test_split_folders(tmp_path):
    files = {
        f"d/{s}/{c}/{i}.png": picture(seed=ord(s[0]) * 1000 + ord(c) * 50 + i)
        for s, n in {"Train": 12, "val": 3, "test": 4}.items()
        for c in "ab"
        for i in range(n)
    }
    sets = load_images(write_zip(tmp_path / "d.zip", files))
    assert [len(s) for s in sets.values()] == [24, 6, 8] and all(
        s.attributes == {"class": ("a", "b")} for s in sets.values()
    )
    flat = load_images(write_zip(tmp_path / "f.zip", {f"img/{i}.png": picture(seed=i) for i in range(60)}))
    assert [len(s) for s in flat.values()] == [54, 3, 3] and flat["train"].labels.shape == (54, 0)
    for extra, wrong in [
        ("d/x.png", "outside its split folders, such as d/x.png"),
        ("d/train/x.png", "some pictures have a class"),
    ]:
        with pytest.raises(ValueError, match=wrong):
            load_images(write_zip(tmp_path / "w.zip", files | {extra: picture()}))
    with pytest.raises(ValueError, match="none named train"):
        load_images(write_zip(tmp_path / "t.zip", {k: v for k, v in files.items() if "Train" not in k}))


def test_bad_containers(tmp_path, monkeypatch):
    write_folder(tmp_path / "empty", {"readme.txt": b"hello"})
    with pytest.raises(ValueError, match="has no pictures: 1 files"):
        load_images(tmp_path / "empty")
    good = write_zip(tmp_path / "g.zip", {f"{i}.png": picture(seed=i) for i in range(30)})
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut short"):
        load_images(tmp_path / "cut.zip")
    for name in ("../a.png", "/etc/a.png", "C:/a.png", "x/../../a.png", "a\\b.png"):
        with pytest.raises(ValueError, match="leads out of the archive"):
            info = zipfile.ZipInfo("a.png")
            info.filename = name
            with zipfile.ZipFile(tmp_path / "trick.zip", "w") as z:
                z.writestr(info, picture())
            load_images(tmp_path / "trick.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "twice.zip", "w") as z:
            z.writestr("a.png", b"1")
            z.writestr("a.png", b"2")
    with pytest.raises(ValueError, match="a.png is in it twice"):
        load_images(tmp_path / "twice.zip")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_images("cifar")
    with pytest.raises(FileNotFoundError, match="no such folder or zip"):
        load_images(tmp_path / "none.zip")
    with pytest.raises(ValueError, match="too few"):
        load_images(write_zip(tmp_path / "few.zip", {"a.png": picture(), "b.png": picture()}))
    for bad in (dict(limit=0), dict(on_bad="ignore"), dict(channels=4), dict(size=0), dict(download=True)):
        with pytest.raises(ValueError, match=list(bad)[0] if "download" not in bad else "cannot be downloaded"):
            load_images(good, **bad)
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder lsun_church and no lsun_church.zip"):
        load_images("lsun_church")


# -- corrupt pictures


def zip_with_damage(path):
    "One picture cut short, one that is text, and one whose bytes in the zip no longer match their checksum"
    files = {f"{i:02}.png": picture(seed=i) for i in range(40)} | {
        "cut.png": picture()[:80],
        "text.jpg": b"not a picture",
    }
    write_zip(path, files | {"flip.png": picture(40, 40, seed=99)})
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as z:
        at = z.getinfo("flip.png").header_offset
    for i in range(at + 200, at + 260):
        raw[i] ^= 255
    path.write_bytes(raw)
    return path


def load_damaged(path, **kw):
    files = list_images(path)
    return files, decode_files(path, files, Decoding(size=12, **kw))


@pytest.mark.parametrize("cache", [False, True])
def test_corrupt_pictures_are_fatal_or_left_out(tmp_path, cache):
    path = zip_with_damage(tmp_path / "p.zip")
    with pytest.raises(BadImage, match=r"corrupt picture cut.png .*on_bad='skip'"):
        load_damaged(path, cache=cache)
    assert not list((tmp_path / "cache").rglob("*.*"))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="left out 3 corrupt pictures: cut.png, flip.png, text.jpg"):
            files, (px, kept) = load_damaged(path, on_bad="skip", cache=cache)
        assert [files[i].name for i in kept.tolist()] == [f"{i:02}.png" for i in range(40)]
        for i, p in enumerate(px):
            assert torch.equal(p, pixels_of(picture(seed=i)))
    with pytest.raises(BadImage, match="corrupt picture cut.png"):
        load_damaged(path, cache=cache)  # the cache hides nothing
    with pytest.raises(BadImage):
        load_images(path, size=12)
    with pytest.warns(UserWarning, match="left out"):
        sets = load_images(path, size=12, on_bad="skip")
    assert sum(map(len, sets.values())) == 40
    every = write_zip(tmp_path / "e.zip", {f"{i}.png": b"?" for i in range(30)})
    with pytest.raises(ValueError, match="none of 28 pictures can be decoded; the first: "):
        load_images(every, on_bad="skip")


def test_wrong_sizes(tmp_path):
    square = {f"{i:02}.png": picture(seed=i) for i in range(40)}
    path = write_zip(tmp_path / "w.zip", square | {f"w{i}.png": picture(20, 12) for i in range(9)})
    with pytest.raises(ValueError, match=r"w\d.png is 20×12 pixels, not square; give size="):
        load_images(path)
    with pytest.raises(ValueError, match="not square"):
        load_images(path, on_bad="skip")  # a size is no damage
    assert load_images(path, size=8)["train"].shape == (3, 8, 8)
    path = write_zip(tmp_path / "m.zip", square | {f"m{i}.png": picture(16, 16) for i in range(20)})
    with pytest.raises(ValueError, match=r".png is (16×16|12×12) pixels, and .*; give size="):
        load_images(path)
    assert load_images(path, size=8, channels=1)["test"].shape == (1, 8, 8)


def test_decoding_conventions():
    from PIL import Image

    a = np.zeros((8, 16, 3), np.uint8)
    a[:, 4:12] = 200  # the middle square alone is bright
    b = io.BytesIO()
    Image.fromarray(a).save(b, "PNG")
    assert (decode_image(b.getvalue(), size=8) == 200).all()
    assert (decode_image(b.getvalue(), size=4, channels=1) == 200).all()
    clear = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear, "PNG")
    assert (decode_image(clear.getvalue()) == 255).all()  # on white
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(a).save(turned, "PNG", exif=exif)
    assert decode_image(turned.getvalue()).shape == (3, 16, 8)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(deep, "PNG")
    with pytest.raises(BadImage, match="more than 8 bits"):
        decode_image(deep.getvalue())
    for fmt, mode in (("GIF", "P"), ("BMP", "RGB"), ("TIFF", "CMYK"), ("WEBP", "RGB"), ("JPEG", "L")):
        assert decode_image(picture(fmt=fmt, mode=mode)).shape == (3, 12, 12)
    for n in range(0, len(picture()), 7):  # never anything but BadImage
        try:
            decode_image(picture()[:n])
        except BadImage:
            pass


# -- the cache


def test_cache_is_used_and_refreshed(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "p", {f"{i}.png": picture(seed=i) for i in range(30)})
    files = list_images(path)
    px, _ = decode_files(path, files, Decoding(cache=True))
    assert {p.suffix for p in (tmp_path / "cache" / "images").iterdir()} == {".u8", ".json"}
    calls = []
    monkeypatch.setattr(decode, "decode_image", lambda *a, **k: (calls.append(1), decode_image(*a, **k))[1])
    assert torch.equal(decode_files(path, files, Decoding(cache=True))[0], px) and not calls
    decode_files(path, files, Decoding(size=6, cache=True))
    assert len(calls) == 30  # other settings, other file
    (path / "3.png").write_bytes(picture(seed=333))
    os.utime(path / "3.png", ns=(1, 1))
    files = list_images(path)
    new, _ = decode_files(path, files, Decoding(cache=True))
    at = [f.name for f in files].index("3.png")
    assert torch.equal(new[at], pixels_of(picture(seed=333))) and not torch.equal(px[at], new[at])
    px[0] = 0  # a mapped tensor may be written to; the file stays
    assert torch.equal(decode_files(path, files, Decoding(cache=True))[0], new)


def test_large_sets_are_mapped_from_a_file(tmp_path, monkeypatch, pets):
    monkeypatch.setattr(decode, "CACHE_FROM", 10_000)
    sets = load_images(write_zip(tmp_path / "p.zip", pets))
    assert len(list((tmp_path / "cache" / "images").glob("*.u8"))) == 1  # train alone is large
    plain = load_images(tmp_path / "p.zip", cache=False)
    for k in sets:
        assert torch.equal(sets[k].pixels, plain[k].pixels)
    assert torch.equal(
        next(image_batches(sets["train"], 7, gen=gen())).x, next(image_batches(plain["train"], 7, gen=gen())).x
    )


def test_killed_decoding_leaves_nothing_to_mistake(tmp_path):
    path = write_folder(tmp_path / "p", {f"{i:03}.png": picture(seed=i) for i in range(30)})
    code = (
        "import sys, time\n"
        "from ldebm import decode as d, image_files as f\n"
        "real, n = d.decode_image, []\n"
        "def slow(*a):\n"
        "    n.append(1)\n"
        "    if len(n) == 20: print('now', flush=True); time.sleep(60)\n"
        "    return real(*a)\n"
        "d.decode_image = slow\n"
        "d.decode_files(sys.argv[1], f.list_images(sys.argv[1]), d.Decoding(cache=True))\n"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "IN_TEST": "1"}
    )
    assert p.stdout.readline() == "now\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    folder = tmp_path / "cache" / "images"
    left = list(folder.iterdir())
    assert len(left) == 1 and left[0].suffix == ".tmp"  # it had begun
    os.utime(left[0], (time.time() - 7200,) * 2)
    px, kept = decode_files(path, list_images(path), Decoding(cache=True))
    px = px.clone()
    assert len(kept) == 30 and torch.equal(px[29], pixels_of(picture(seed=29)))
    assert {q.suffix for q in folder.iterdir()} == {".u8", ".json"}  # and what was left is gone
    raw = next(folder.glob("*.u8"))
    raw.write_bytes(raw.read_bytes()[:-1])  # a file that was cut is not believed either
    assert torch.equal(decode_files(path, list_images(path), Decoding(cache=True))[0], px)


# -- attributes


def test_attributes_csv(tmp_path, pets):
    path = write_zip(tmp_path / "p.zip", pets)
    names = sorted(pets)
    rows = [
        f"{n.split('/', 1)[1]},{i % 2},{'-1' if i % 3 else '1'},{'long' if i % 5 else 'short'}"
        for i, n in enumerate(names)
        if i % 7
    ]
    (tmp_path / "a.csv").write_text("file,smiling,young,fur\n" + "\n".join(rows) + "\n", encoding="utf-8-sig")
    labels, att = read_attributes(tmp_path / "a.csv", names)
    assert att == {"smiling": ("no", "yes"), "young": ("no", "yes"), "fur": ("long", "short")}
    for i, y in enumerate(labels.tolist()):
        assert y == ([i % 2, int(i % 3 == 0), int(i % 5 == 0)] if i % 7 else [-1] * 3)
    sets = load_images(path, attributes_csv=tmp_path / "a.csv", limit=30)
    assert list(sets["train"].attributes) == ["class", "smiling", "young", "fur"]
    of = {pixels_of(v).numpy().tobytes(): names.index(k) for k, v in pets.items()}
    for s in sets.values():
        for p, y in zip(s.pixels, s.labels.tolist()):
            assert y[1:] == labels[of[p.numpy().tobytes()]].tolist()


@pytest.mark.parametrize(
    "text,wrong",
    [
        (
            "file,a\nnone1.png,0\nnone2.png,1\n",
            "none of its 2 rows names a picture that is there, such as none1.png.*pictures are named like cat/1.png",
        ),
        ("file,a\n", "a line for each picture is needed besides"),
        ("file,a\ncat/1.png,NA\n", "no column that is an attribute: .*nothing known"),
        ('file,a\ncat/1.png,"' + "x" * 140_000 + '"\n', "is no table"),
        ("file,a\n1.png,1\n", "1.png could be cat/1.png or dog/1.png"),
        ("file,a\ncat/1.png,1\ncat/1.png,0\n", "line 3: a second row for cat/1.png"),
        ("file,a,b\ncat/1.png,1\n", "line 2: 2 columns, and 3 names"),
        ("file,a\ncat/1.png,-1\ndog/1.png,0\ncat/2.png,1\n", "'a' has -1, 0 and 1"),
        ("file,a,a\ncat/1.png,1,1\n", "need names that differ"),
        ("file\ncat/1.png\n", "are needed"),
        ("", "are needed"),
        ("file,a\nbilly,\udce9\n", "not UTF-8"),
    ],
)
def test_attribute_files_that_do_not_fit(tmp_path, text, wrong):
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=wrong):
        read_attributes(tmp_path / "a.csv", ["cat/1.png", "cat/2.png", "dog/1.png"])


NAMES = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/é.png"]


@pytest.mark.parametrize(
    "text,labels,values,said",
    [
        (
            "cat/1.png,dog\ncat/2.png,cat\n",
            [1, 0, -1, -1],
            ("cat", "dog"),
            "no line of names: the attribute is called attribute 1.*2 of 4 pictures have no row",
        ),
        (
            "gone.png,0\n1.png,1\n2.png,0\n",
            [1, 0, -1, -1],
            ("no", "yes"),
            "no line of names.*1 of 3 rows name pictures that are not there: gone.png; they are not used",
        ),
        (
            "gone,dog\n1,cat\n2,dog\n3,cat\n",
            [0, 1, 0, -1],
            ("cat", "dog"),
            "no line of names",
        ),  # no endings, and no first picture
        ("file;a\n1.png;x\n2.png;y,z\n", [0, 1, -1, -1], ("x", "y,z"), ""),
        ("file\ta\n1.png\tx\n2.png\ty\n", [0, 1, -1, -1], ("x", "y"), ""),
        ("sep=;\nfile;a\n1.png;x\n2.png;y\n", [0, 1, -1, -1], ("x", "y"), ""),
        ("file|a\r1.png|x\r2.png|y\r", [0, 1, -1, -1], ("x", "y"), ""),
        ('file,a\r\n1.png,"x\r\ny"\r\n2.png,z\r\n', [0, 1, -1, -1], (r"x\r\ny", "z"), ""),
        ("file,a\n1.png,1.0\n2.png,0.0\n3.png,nan\n", [1, 0, -1, -1], ("no", "yes"), ""),
        ("file,a\n1.png,-1\n2.png,1\n3.png,?\n", [0, 1, -1, -1], ("no", "yes"), ""),
        ("file,a\n1.png,x\n2.png,<NA>\n3.png,null\n", [0, -1, -1, -1], ("x",), ""),
        (
            ",file,a\n0,1.png,x\n1,2.png,y\n",
            [0, 1, -1, -1],
            ("x", "y"),
            "columns that are no attributes.*without a name",
        ),  # as pandas writes an index
        ("a\n1.png,x\n2.png,y\n", [0, 1, -1, -1], ("x", "y"), ""),  # as R writes names of rows
        (
            "id,a\ndog\\3,x\n./cat/1.png,y\nE\u0301.PNG,x\n",
            [1, -1, 0, 0],
            ("x", "y"),
            "1 of 4 pictures have no row",
        ),  # other slashes, letters and case; no ending
        ("file,a\n1.png,x\n1.png,x\n2.png,y,,\n", [0, 1, -1, -1], ("x", "y"), ""),
        ("file,a,\n1.png,x,\n2.png,y,\n", [0, 1, -1, -1], ("x", "y"), ""),
        ("file a\n1.png   x\n2.png y\n", [0, 1, -1, -1], ("x", "y"), ""),
    ],
)
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_people_have_them(tmp_path, text, labels, values, said, code):
    (tmp_path / "a.csv").write_bytes(text.encode(code))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        got, att = read_attributes(tmp_path / "a.csv", NAMES)
    assert got[:, 0].tolist() == labels and list(att.values()) == [values]
    import re

    assert re.search(said, " ".join(str(o.message) for o in w))


def test_part_of_celeba_with_the_official_table(tmp_path):
    "Fewer pictures than rows: the rows there are pictures for are used, and it is said how many are not"
    folder = write_folder(tmp_path / "p", {f"{i:06}.jpg": picture(seed=i, fmt="JPEG") for i in range(1, 61, 2)})
    (folder / "list_attr_celeba.txt").write_text(
        "60\nMale Smiling\n" + "".join(f"{i:06}.jpg {1 if i % 3 else -1:2d} -1\n" for i in range(1, 61))
    )
    with pytest.warns(UserWarning, match="30 of 60 rows name pictures that are not there"):
        sets = load_images(folder, attributes_csv=folder / "list_attr_celeba.txt")
    assert sum(len(s) for s in sets.values()) == 30 and sum(int(s.label("Male").sum()) for s in sets.values()) == 20


# -- folders as people have them


def said_by(f, *a, **kw):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        return f(*a, **kw), " ".join(str(o.message) for o in w)


@pytest.mark.skipif(os.name != "posix", reason="links as on Unix")
def test_links_are_followed_and_loops_found(tmp_path):
    store = write_folder(
        tmp_path / "store",
        {f"{c}/{i}.png": picture(seed=100 * j + i) for j, c in enumerate(("dog", "cow", "dog/old")) for i in range(3)},
    )
    p = write_folder(tmp_path / "pics", {f"cat/{i}.png": picture(seed=300 + i) for i in range(3)})
    for name, to in {
        "dog": store / "dog",
        "hound": store / "dog",
        "old": store / "dog" / "old",
        "cat/self": p,
        "up": tmp_path,
        "gone": tmp_path / "nowhere",
        "feline": p / "cat",
    }.items():
        (p / name).symlink_to(to, target_is_directory=True)
    (p / "cow").mkdir()
    for i in range(3):
        (p / "cow" / f"{i}.png").symlink_to(store / "cow" / f"{i}.png")
    (p / "cat" / "broken.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(p / "cat" / "pipe.png")
    files, said = said_by(list_images, p)
    assert [f.name for f in files] == sorted(
        [f"{c}/{i}.png" for c in ("cat", "cow", "dog", "dog/old") for i in range(3)]
    )
    for part in (
        "in it already under another name (cat/self, feline, hound and 1 more)",
        "1 links to a folder around it (up)",
        "2 broken links (cat/broken.png, gone)",
        "1 neither files nor folders (cat/pipe.png)",
    ):
        assert part in said, said
    (tmp_path / "link").symlink_to(p)
    assert said_by(list_images, tmp_path / "link")[0] == files


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_what_is_left_out_is_counted_and_named(kind, tmp_path, pets):
    files = pets | {"pets/cat/a.heic": b"x", "pets/b": b"y", "pets/dog/.DS_Store": b"z", "pets/table.csv": b"1.png,x\n"}
    path = write_zip(tmp_path / "p.zip", files) if kind == "zip" else write_folder(tmp_path / "p", files)
    sets, said = said_by(load_images, path)
    assert sum(map(len, sets.values())) == 80 and "80 pictures; left out: " in said
    for part in (
        "1 hidden files and folders (pets/dog/.DS_Store)",
        "3 files without a picture's ending",
        "pets/cat/a.heic",
    ):
        assert part in said
    more = {
        k.replace(".png", e): v for (k, v), e in zip(pets.items(), [".jfif", ".JPE", ".pbm", ".tga"] * 20)
    }  # decoded by what they hold
    assert len(list_images(write_zip(tmp_path / "m.zip", more))) == 80
    if kind == "folder":
        (path / "pets" / "empty").mkdir()
        assert (
            "2 files without" in said_by(list_images, path, [path / "pets" / "table.csv"])[1]
            and "1 empty folders (pets/empty)" in said_by(list_images, path)[1]
        )


@pytest.mark.parametrize(
    "names,layout,want",
    [
        (["car", "train", "boat"], "classes", {"boat", "car", "train"}),
        (["test", "exam"], "classes", {"exam", "test"}),
        (["train/train", "train/car"], "splits", {"car", "train"}),
        (["cat/train", "cat/dog"], "classes", {"dog", "train"}),
        (["x/train/a", "x/train/b", "x/test/a"], "splits", {"a", "b"}),
        (["train/a", "train/b", "test"], "splits", {"a", "b"}),
        (["dev/a", "dev/b"], "classes", {"a", "b"}),
        (["train", "test"], "splits", set()),
        (["one"], "flat", set()),
    ],
)
def test_layout_by_evidence(names, layout, want, tmp_path):
    "A class may be called as a split is, and a split may have no classes; the same when it is stated"
    path = write_zip(tmp_path / "p.zip", {f"{c}/{i}.png": picture(seed=i) for c in names for i in range(22)})
    for stated in ("auto", layout):
        sets = said_by(load_images, path, layout=stated)[0]
        assert set(sets["train"].attributes.get("class", ())) == want and sum(map(len, sets.values())) == 22 * len(
            names
        )
    if names[-1] == "test" and want:
        assert (sets["test"].labels == -1).all() and (sets["train"].labels >= 0).all()
    flat = load_images(path, layout="flat")
    assert sum(map(len, flat.values())) == 22 * len(names) and not flat["train"].attributes


def test_layouts_that_could_be_either(tmp_path):
    path = write_zip(
        tmp_path / "p.zip", {f"{c}/{i}.png": picture(seed=i) for c in ("train", "test", "moon") for i in range(22)}
    )
    with pytest.raises(
        ValueError,
        match="folders test, train may be splits, or classes like moon: say layout='splits', "
        "which leaves out what is in no split, or layout='classes'",
    ):
        load_images(path)
    sets, said = said_by(load_images, path, layout="splits")
    assert sum(map(len, sets.values())) == 44 and "22 pictures are outside its split folders" in said
    assert load_images(path, layout="classes")["train"].attributes["class"] == ("moon", "test", "train")
    with pytest.raises(ValueError, match="layout must be one of auto, flat, classes, splits"):
        load_images(path, layout="class")
    with pytest.raises(ValueError, match="digits has its own labels; layout is for pictures in files"):
        load_images("digits", layout="flat")
    with pytest.raises(ValueError, match="none named train: .*layout='flat'"):
        load_images(
            write_zip(tmp_path / "q.zip", {f"{c}/{i}.png": picture() for c in ("a", "b") for i in range(22)}),
            layout="splits",
        )


@pytest.mark.parametrize(
    "data,says",
    [
        (picture(), r"is a single picture \(PNG\), not a zip: name the folder"),
        (picture(fmt="JPEG"), "single picture .JPEG."),
        (b"\x1f\x8b\x08 and more", "is a gzip archive, not a zip: unpack it"),
        (b"", "is empty"),
        (b"file,a\n", "is not a zip: name a folder"),
        (b"Rar!\x1a\x07", "is a RAR archive"),
        (b"\0" * 257 + b"ustar\0", "is a tar archive, not a zip: unpack it and name the folder"),
        (b"PK\x03\x04 and no more", "cut short"),
    ],
)
def test_what_is_no_zip_is_called_what_it_is(tmp_path, data, says):
    (tmp_path / "p.zip").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        load_images(tmp_path / "p.zip")


# -- one snapshot


@pytest.mark.parametrize("change", ["write", "old date", "remove", "zip"])
def test_pictures_that_change_between_listing_and_decoding(tmp_path, change):
    good = {f"{i:02}.png": picture(seed=i) for i in range(30)}
    path = write_zip(tmp_path / "p.zip", good) if change == "zip" else write_folder(tmp_path / "p", good)
    files, at = list_images(path), path / "07.png"
    if change == "zip":
        write_zip(path, good | {"07.png": picture(seed=99)})
    elif change == "remove":
        at.unlink()
    else:
        old = at.stat()
        at.write_bytes(picture(seed=99))
        if change == "old date":
            os.utime(at, ns=(old.st_atime_ns, old.st_mtime_ns))
    for cache in (False, True):
        with pytest.raises(
            ChangedFile, match="07.png (has changed since|was removed after) the pictures were listed; start again"
        ):
            decode_files(path, files, Decoding(on_bad="skip", cache=cache))
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_file_put_back_with_its_old_date_is_decoded_again(tmp_path):
    path = write_folder(tmp_path / "p", {f"{i}.png": picture(seed=i) for i in range(30)})
    px = decode_files(path, list_images(path), Decoding(cache=True))[0].clone()
    old = (path / "3.png").stat()
    (path / "3.png").write_bytes(picture(seed=33)[: old.st_size].ljust(old.st_size, b"\0"))
    os.utime(path / "3.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert not torch.equal(decode_files(path, list_images(path), Decoding(cache=True))[0], px)


# -- a cache that cannot be written


def test_pictures_without_a_home(tmp_path, monkeypatch):
    "No folder for the cache: the pictures are there, the warning names the variable, and what can be read is read"
    path = write_folder(tmp_path / "p", {f"{i}.png": picture(seed=i) for i in range(30)})
    want = decode_files(path, list_images(path), Decoding(cache=True))[0].clone()
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("LDEBM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    for _ in range(2):
        got, said = said_by(decode_files, path, list_images(path), Decoding(cache=True))
        assert torch.equal(got[0], want)
    assert (
        "stands in for it until this process ends; name a folder that lasts in LDEBM_CACHE"
        in said_by(cache_folder, "images")[1]
    )
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="name another one in LDEBM_CACHE"):
        decode_files(path, list_images(path), Decoding(cache=True))
    assert torch.equal(decode_files(path, list_images(path), Decoding(cache=False))[0], want)


def test_every_user_of_the_cache_does_without_a_home(tmp_path, monkeypatch):
    "Compiled programs and downloads: a home that cannot be written, no home at all, and LDEBM_CACHE itself at fault"
    from ldebm import core, native
    from ldebm.data import data_root, find_data

    if core.os.name != "posix":
        pytest.skip("homes as on Unix")

    def made(command, **kw):
        return (
            native.Path(command[-1]).write_text("made") if "-o" in command else None,
            subprocess.CompletedProcess(command, 0, "version 1", ""),
        )[1]

    monkeypatch.setattr(native.subprocess, "run", made)
    monkeypatch.setattr(native, "compiler", lambda: ["c++"])
    (tmp_path / "served.txt").write_text("words")
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path / "none"))

    def fetched():
        return find_data("words", {"served.txt": None}, url=tmp_path.as_uri(), download=True)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDEBM_CACHE", str(tmp_path / "file" / "cache"))
    for f in (lambda: native.compiled(torch.float32), fetched):
        with pytest.raises(OSError, match="name another one in LDEBM_CACHE"):
            f()
    monkeypatch.delenv("LDEBM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    for f in (lambda: native.compiled(torch.float32).read_text(), lambda: (fetched() / "served.txt").read_text()):
        with pytest.warns(UserWarning, match="until this process ends; name a folder that lasts in LDEBM_CACHE"):
            assert f() in ("made", "words")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(core.Path, "home", homeless)
    assert core._passing_cache() in data_root() and (core.cache_folder("part")).is_dir()


# -- anything


def test_any_folder_is_read_or_refused_in_one_sentence(monkeypatch):
    "Whatever hypothesis draws: each picture in one split and unused files named, or one sentence that says why not"
    monkeypatch.setenv("IN_TEST", "1")
    read = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.data())
    def holds(data):
        with tempfile.TemporaryDirectory() as t:
            made = folders.write(f"{t}/p", data.draw(folders.trees()))
            table = data.draw(folders.tables(made))
            if table is not None:
                Path(t, "t.csv").write_text(table, encoding="utf-8", newline="")
            kw = dict(
                on_bad=data.draw(st.sampled_from(["skip", "error"])),
                size=data.draw(st.sampled_from([8, None])),
                layout=data.draw(st.sampled_from(["auto", "auto", "flat", "splits", "classes"])),
            )
            try:
                sets, said = said_by(
                    load_images, f"{t}/p", attributes_csv=None if table is None else f"{t}/t.csv", **kw
                )
            except (ValueError, FileNotFoundError) as e:
                assert str(e) and "\n" not in str(e)
                return
            used = sum(map(len, sets.values()))
            assert used <= len(made) and (used == len(made) or "left out" in said)
            assert all(
                v.attributes == sets["train"].attributes and v.shape == sets["train"].shape for v in sets.values()
            )
            assert "\n" not in said and said.encode() is not None
            read.append(used)

    holds()
    assert len(read) > 5


def test_celeba(tmp_path, monkeypatch):
    folder = write_folder(
        tmp_path / "celeba",
        {f"img_align_celeba/{i:06}.jpg": picture(178, 218, seed=i, fmt="JPEG") for i in range(1, 41)},
    )
    rows = [f"{i:06}.jpg {1 if i % 2 else -1:2d} {1 if i > 20 else -1:2d}\n" for i in range(1, 41)]
    (folder / "list_attr_celeba.txt").write_text("40\nMale Smiling\n" + "".join(rows))
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    sets = load_images("celeba")
    assert (
        sets["train"].name == "celeba"
        and sets["train"].shape == (3, 64, 64)
        and [len(s) for s in sets.values()] == [36, 2, 2]
    )
    assert sets["train"].attributes == {"Male": ("no", "yes"), "Smiling": ("no", "yes")}
    assert (
        sum(int(s.label("Male").sum()) for s in sets.values()) == 20
        and sum(int(s.label("Smiling").sum()) for s in sets.values()) == 20
    )
    assert load_images("celeba", size=16)["train"].shape == (3, 16, 16)
    write_zip(tmp_path / "lsun-church.zip", {f"c/{i}.jpg": picture(30, 20, seed=i, fmt="JPEG") for i in range(40)})
    assert find_images("lsun_church") == tmp_path / "lsun-church.zip"
    assert load_images("lsun_church", limit=3)["train"].pixels.shape == (3, 3, 64, 64)


# -- CIFAR-10


def record(y, seed):
    return bytes([y]) + np.random.default_rng(seed).integers(0, 256, 3072, dtype=np.uint8).tobytes()


def fake_files(n=20):
    names = [f for fs in CIFAR10_FILES.values() for f in fs]
    return {f: b"".join(record(j % 10, 100 * i + j) for j in range(n)) for i, f in enumerate(names)}


def fake_archive(path, files):
    with tarfile.open(path, "w:gz") as t:
        for k, v in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{k}")
            info.size = len(v)
            t.addfile(info, io.BytesIO(v))
    return path


def test_binary_archive(tmp_path, monkeypatch):
    files = fake_files()
    path = fake_archive(tmp_path / CIFAR10_ARCHIVE, files)
    from ldebm.data import checksum

    want = checksum(path.read_bytes(), "md5")
    with pytest.raises(ValueError, match="wrong checksum: wanted md5:c32a1d4ab5d03f1284b67883e8d87530"):
        read_cifar10(path)
    with pytest.raises(ValueError, match="not 30,730,000"):
        read_cifar10(path, want)
    px, y = read_cifar10(path, None)["train"]
    assert y[:20].tolist() == [j % 10 for j in range(20)] and px.shape == (100, 3, 32, 32)
    raw = files["data_batch_2.bin"][3 * 3073 : 4 * 3073]
    # planes of red, green and blue
    assert (
        px[23, 0, 0, 1] == raw[1 + 1] and px[23, 1, 2, 3] == raw[1 + 1024 + 2 * 32 + 3] and px[23, 2, 31, 31] == raw[-1]
    )
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    sets = cifar10(want=None, held=10)
    assert [len(s) for s in sets.values()] == [90, 10, 20]
    assert sets["train"].name == "cifar10" and sets["train"].attributes == {"class": CIFAR10_CLASSES}
    seen = {
        p.numpy().tobytes(): int(c) for s in (sets["train"], sets["valid"]) for p, c in zip(s.pixels, s.labels[:, 0])
    }
    assert seen == {p.numpy().tobytes(): int(c) for p, c in zip(px, y)}
    assert torch.equal(cifar10(30, want=None, held=10)["train"].pixels, sets["train"].pixels[:30])
    (tmp_path / CIFAR10_ARCHIVE).unlink()
    folder = write_folder(tmp_path / "cifar10" / "cifar-10-batches-bin", files)
    assert torch.equal(cifar10(want=None, held=10)["test"].pixels, sets["test"].pixels)
    with pytest.raises(ValueError, match="not 30,730,000"):
        load_images("cifar10")
    with pytest.raises(ValueError, match="not 30,730,000"):
        load_images(folder)


def test_damaged_archives(tmp_path):
    files = fake_files()
    whole = fake_archive(tmp_path / "a.tar.gz", files).read_bytes()
    for n in (0, 100, len(whole) // 2, len(whole) - 200):
        (tmp_path / "a.tar.gz").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="cut short|is without"):
            read_cifar10(tmp_path / "a.tar.gz", None)
    with pytest.raises(ValueError, match="is without data_batch_3.bin"):
        read_cifar10(fake_archive(tmp_path / "a.tar.gz", {k: v for k, v in files.items() if "_3" not in k}), None)
    with pytest.raises(ValueError, match="data_batch_1.bin: class 11 at picture 2"):
        read_cifar10(
            fake_archive(tmp_path / "a.tar.gz", files | {"data_batch_1.bin": record(1, 0) * 2 + record(11, 0)}), None
        )
    with pytest.raises(ValueError, match="whole number of records"):
        read_cifar10(
            fake_archive(tmp_path / "a.tar.gz", files | {"test_batch.bin": files["test_batch.bin"][:-1]}), None
        )


def test_archive_is_never_unpacked(tmp_path):
    "Links and names that climb are passed over: nothing is written, and what they claim to be is missing"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        t.addfile(link)
        out = tarfile.TarInfo("../../escaped.bin")
        out.size = 3
        t.addfile(out, io.BytesIO(b"abc"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is without data_batch_1.bin"):
        read_cifar10(tmp_path / "a.tar.gz", None)
    assert sorted(tmp_path.rglob("*")) == before


def test_cifar_download_is_checked(tmp_path, monkeypatch):
    archive = fake_archive(tmp_path / "served.tar.gz", fake_files())
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(cifar, "_CIFAR10_URL", archive.as_uri())
    with pytest.raises(FileNotFoundError, match="set LDEBM_DOWNLOAD=1"):
        load_images("cifar10")
    with pytest.raises(ValueError, match="wrong checksum"):
        load_images("cifar10", download=True)
    assert not list((tmp_path / "cache").rglob("*.gz"))  # nothing is kept that failed its check
    assert len(cifar10(want=None, held=10, download=True)["train"]) == 90
    assert (tmp_path / "cache" / "cifar10" / CIFAR10_ARCHIVE).is_file()


def test_copies_say_what_they_are(tmp_path, monkeypatch):
    def files(fmt):
        return {
            f"{s}/{c}/{i}.{fmt}": picture(32, 32, seed=i, fmt=fmt.upper())
            for s in ("train", "test")
            for c in CIFAR10_CLASSES
            for i in range(4)
        }

    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    write_zip(tmp_path / "cifar10-jpeg.zip", files("jpeg"))
    sets = cifar10(held=10)
    assert {s.name for s in sets.values()} == {"cifar10-jpeg"} and [len(s) for s in sets.values()] == [30, 10, 40]
    assert sets["valid"].label("class").bincount().tolist() == [1] * 10
    write_folder(tmp_path / "cifar10", files("png"))
    assert cifar10(held=10)["train"].name == "cifar10-png"  # no losses: preferred
    assert cifar10(held=10, name="cifar10-jpeg")["train"].name == "cifar10-jpeg"
    fake_archive(tmp_path / CIFAR10_ARCHIVE, fake_files())
    assert cifar10(held=10, want=None)["train"].name == "cifar10"  # the official one comes first
    write_zip(tmp_path / "cifar10-jpeg.zip", {k.replace("truck", "lorry"): v for k, v in files("jpeg").items()})
    with pytest.raises(ValueError, match="is no copy of CIFAR-10"):
        cifar10(held=10, name="cifar10-jpeg")


@pytest.mark.data
@pytest.mark.slow
def test_cifar10_at_hand(ldebm_data):
    sets = load_images("cifar10", limit=500)
    assert [len(s) for s in sets.values()] == [500, 5000, 10_000]
    assert sets["train"].shape == (3, 32, 32) and sets["train"].attributes["class"] == CIFAR10_CLASSES
    assert (
        sets["train"].label("class").bincount().tolist() == [50] * 10
        and sets["test"].label("class").bincount().tolist() == [1000] * 10
    )
    if (ldebm_data / "cifar10-jpeg.zip").exists() and not (ldebm_data / CIFAR10_ARCHIVE).exists():
        assert sets["train"].name == "cifar10-jpeg"
    m = sets["test"].x().mean((0, 2, 3))
    assert_close(m, torch.tensor([0.4942, 0.4851, 0.4504]), atol=4e-3, rtol=0)  # known means of the test set


# -- sets that do not belong


def test_permuted_keeps_values_and_is_one_permutation():
    s = shapes(30, gen(), 8)
    p = permuted(s, gen(1))
    assert torch.equal(p.pixels, permuted(s, gen(1)).pixels) and not torch.equal(p.pixels, permuted(s, gen(2)).pixels)
    where = Images("t", torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(2, 3, 8, 8).contiguous())
    order = permuted(where, gen(1)).pixels.reshape(6, 64).long()
    assert (order == order[0]).all() and sorted(order[0].tolist()) == list(range(64))
    assert torch.equal(p.pixels.reshape(30, 3, 64), s.pixels.reshape(30, 3, 64)[:, :, order[0]])
    assert torch.equal(p.labels, s.labels) and p.name == "shapes, permuted"


def test_other_strangers():
    d = load_images("digits", limit=20)["train"]
    assert_close(inverted(d).x(), 1 - d.x())
    assert torch.equal(rotated(rotated(rotated(rotated(d)))).pixels, d.pixels) and torch.equal(
        rotated(d, 2).pixels, d.pixels.flip(2, 3)
    )
    n = noise_images((1, 8, 8), 500, gen(), 17)
    c = n.pixels.flatten().long().bincount(minlength=17) / n.pixels.numel()
    assert (c - 1 / 17).abs().max() < 5 * (1 / 17 / n.pixels.numel()) ** 0.5
    t = textures((3, 32, 32), 300, gen())
    assert torch.equal(t.pixels, textures((3, 32, 32), 300, gen()).pixels) and t.label("texture").bincount().min() > 60
    x = t.x()
    rough = (x.diff(dim=-1) ** 2).mean((1, 2, 3)) / x.var((1, 2, 3)).clamp(min=1e-6)
    assert (x.amax((1, 2, 3)) - x.amin((1, 2, 3)) > 0.2).all()  # none is blank
    assert rough.median() < 0.5  # white noise has 2
    assert textures((1, 8, 8), 5, gen(), 17).levels == 17


def test_spoilt_pictures():
    s = shapes(6, gen(), 32)
    flat = Images("flat", torch.full((2, 3, 32, 32), 7, dtype=torch.uint8))
    assert torch.equal(blurred(flat).pixels, flat.pixels)
    assert (blurred(s).x().diff(dim=-1).abs().amax((1, 2, 3)) < s.x().diff(dim=-1).abs().amax((1, 2, 3))).all()
    assert_close(blended(s).x()[3], (s.x()[3] + s.x()[2]) / 2, atol=0.51 / 255, rtol=0)
    moved = shuffled(s).pixels
    assert torch.equal(moved[:, :, :16, :16], s.pixels[:, :, 16:, 16:])
    assert torch.equal(moved[:, :, 16:, :16], s.pixels[:, :, :16, 16:])


def test_house_numbers_are_two_colours_and_their_mixtures():
    train = load_images("digits", limit=200)["train"]
    h = house_numbers(train, 32, 50, gen())
    assert h.pixels.shape == (50, 3, 32, 32) and torch.equal(h.pixels, house_numbers(train, 32, 50, gen()).pixels)
    x = h.x().flatten(2)
    corner = x[:, :, :1]
    assert (x.amax(2) - x.amin(2) > 0.15).all(), "the digit can be seen in every channel"
    away = (x - corner).abs()
    ratio = away / away.amax(2, keepdim=True)  # how much ink, the same in every channel
    assert (ratio.amax(1) - ratio.amin(1)).max() < 0.05


def test_held_out_class_and_levels():
    s = shapes(200, gen(), 8)
    rest, held = without_class(s, "red", "colour"), only_class(s, "red", "colour")
    assert len(rest) + len(held) == 200 and (rest.label("colour") != 0).all() and (held.label("colour") == 0).all()
    unknown = Images("u", s.pixels, s.labels.clone().index_fill_(0, torch.arange(10), -1), s.attributes)
    assert (without_class(unknown, 0, "colour").label("colour") > 0).all()
    with pytest.raises(ValueError, match="no 'pink'"):
        only_class(s, "pink", "colour")
    with pytest.raises(ValueError, match="no attribute 'class'"):
        without_class(s, 1)
    f = fewer_levels(s, 32)
    assert f.levels == 32 and torch.equal(f.pixels, s.pixels // 8)


def test_plot_grid():
    import matplotlib

    matplotlib.use("Agg")
    ax = plot_grid(torch.zeros(5, 1, 4, 4), cols=3, title="zeros")
    a = ax.images[0].get_array()
    assert (
        a.shape[:2] == (2 * 6, 3 * 6) and float(a[1:5, 1:5].max()) == 0 and float(a[6:, 12:].min()) == 1
    )  # the sixth place is white
    with pytest.raises(ValueError, match="1 or 3"):
        plot_grid(torch.zeros(5, 2, 4, 4))
    matplotlib.pyplot.close("all")


def test_pillow_is_named_when_missing():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from ldebm.decode import decode_image\n"
        "try: decode_image(b'')\n"
        "except ImportError as e: print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install pillow" in out.stdout, out.stderr


def test_notes_beside_the_cache_are_plain_json(tmp_path):
    path = write_zip(tmp_path / "p.zip", {f"{i}.png": picture(seed=i) for i in range(30)})
    decode_files(path, list_images(path), Decoding(cache=True))
    note = json.loads(next((tmp_path / "cache" / "images").glob("*.json")).read_text())
    assert note["shape"] == [30, 3, 12, 12] and note["kept"] == list(range(30)) and note["bad"] == []
    assert images_from_files(path, decoding=Decoding(cache=True))["train"].shape == (3, 12, 12)
