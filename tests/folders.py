"Folders of pictures and tables of attributes as people have them, drawn by hypothesis"

import io
import os
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

ODD = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=6).filter(
    lambda s: s.strip(". ") and len(s.encode()) < 60
)
FOLDERS = st.one_of(
    st.sampled_from(["cat", "dog", "train", "test", "valid", "Val", "ü$x$", "a|b", ".git", "犬", "e\u0301"]), ODD
)
ENDINGS = st.sampled_from([".png"] * 6 + [".PNG", ".jpg", ".jfif", ".gif", "", ".txt", ".heic"])
KINDS = st.sampled_from(
    ["RGB"] * 8 + ["L", "RGBA", "P", "1", "CMYK", "I;16", "empty", "cut", "text", "link", "broken", "loop", "folder"]
)
CELLS = st.sampled_from(["0", "1", "-1", "cat", "dog", "nan", "", "NA", "1.0", "é", "a;b", "a|b", "$x$", '"', "2.5"])


def content(kind, side, i):
    "Bytes of a picture of one kind; no two alike"
    if kind == "empty":
        return b""
    if kind == "text":
        return b"no picture"
    mode = kind if kind not in ("cut",) else "RGB"
    im = Image.new("RGB", (side, side), (i % 256, i * 7 % 256, i * 13 % 256))
    out = io.BytesIO()
    im = Image.new("I;16", (side, side), 5000) if mode == "I;16" else im.convert(mode)
    im.save(out, "TIFF" if mode == "CMYK" else "PNG")
    return out.getvalue()[:30] if kind == "cut" else out.getvalue()


@st.composite
def trees(draw, least=0, most=6):
    "What a folder holds: `(path, kind, side)` each; `least` good pictures and some of all kinds"
    base = draw(
        st.sampled_from(
            [
                ("cat", "dog"),
                ("",),
                ("car", "train", "boat"),
                ("train/a", "train/b", "test"),
                ("train", "valid", "test"),
                ("train/a", "train/b", "valid/a", "test/b"),
            ]
        )
    )
    n = draw(st.sampled_from([max(least, 40), max(least, 24), max(least, 5)])) * (2 if "train" in str(base) else 1)
    out = [(f"{base[i % len(base)]}/{i}.png".lstrip("/"), "RGB", 8) for i in range(n)]
    sides = st.sampled_from([8] * 12 + [12, 28])
    where = st.one_of(*[st.sampled_from(base)] * 5, FOLDERS)  # mostly among the others
    for place, name, ending, kind, side in draw(st.lists(st.tuples(where, ODD, ENDINGS, KINDS, sides), max_size=most)):
        out.append((f"{place}/{name}{ending}".lstrip("/"), kind, side))
    return out


@st.composite
def tables(draw, names):
    "Text of a table for some of `names`, and for some that are not there; or nothing"
    if draw(st.integers(0, 3)) == 0:
        return None
    width, delimiter = (
        draw(st.sampled_from([1, 2, 3, 1, 2, 3, 1, 2, 3, 0])),
        draw(st.sampled_from([",", ",", ";", "\t", " "])),
    )
    called = st.sampled_from(["{}", "{}", "{}", "./{}"])
    some = draw(st.lists(st.sampled_from(names), max_size=len(names), unique=True)) if draw(st.booleans()) else names
    values = draw(
        st.lists(
            st.sampled_from([("0", "1"), ("-1", "1"), ("cat", "dog"), ("1.0", "nan"), ("x", "x")]),
            min_size=width,
            max_size=width,
        )
    )
    rows = [[draw(called).format(n), *(v[i % 2] for v in values)] for i, n in enumerate(some)]
    for i in draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=3)):
        if rows and width:
            rows[i][1 + i % width] = draw(CELLS)
    for name in draw(st.lists(ODD, max_size=2)):
        rows.append([name, *["1"] * width])
    if rows and draw(st.integers(0, 5)) == 0:
        rows.append(rows[0])
    if draw(st.booleans()):
        rows.insert(0, ["file", *[f"a{i}" for i in range(width)]])
    return draw(st.sampled_from(["", "", "", "\ufeff", "sep=;\n"])) + "\n".join(delimiter.join(r) for r in rows)


def write(root, tree):
    "Make the folder; what does not fit into the file system is passed over. Names of what was made"
    root, made = Path(root), []
    root.mkdir()
    for i, (name, kind, side) in enumerate(tree):
        p = root / name
        try:
            p.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(p):
                continue
            if kind == "link":
                p.symlink_to((root / made[0]).resolve()) if made else None
            elif kind == "broken":
                p.symlink_to(root / "nowhere")
            elif kind == "loop":
                p.symlink_to(root, target_is_directory=True)
            elif kind == "folder":
                p.mkdir()
            else:
                p.write_bytes(content(kind, side, i))
        except OSError:
            continue
        made.append(name)
    return made
