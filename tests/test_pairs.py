"""From crawls to shards: what is found, what is dropped and why, against independent readers."""

import hashlib
import io
import itertools
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import brotli
import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image
from warcio.archiveiterator import ArchiveIterator

from semantica.errors import UserError
from semantica.train.pages.config import MineConfig, UrlsConfig
from semantica.train.pages.mine import mine
from semantica.train.pages.urls import write_urls


def dig(*inputs, out, **options) -> dict:
    return mine(MineConfig(tuple(inputs), out, **{"encoder": "none", "processes": 1} | options))


def stored(shards: Path) -> dict[str, list[dict]]:
    """Page URL -> its pictures as the JSON has them, read with tarfile alone."""
    pages = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    pages[record["url"]] = record["images"]
    return pages


def contents(shards: Path) -> dict[str, bytes]:
    return {str(p.relative_to(shards)): p.read_bytes() for p in sorted(shards.rglob("*")) if p.is_file()}


def reference(*paths: Path) -> dict[str, set[str]]:
    """Page URL -> SHA-256 of the decodable pictures that it links by <img src>, <a href> and og:image: warcio and
    BeautifulSoup, whole files in memory."""
    pages, bodies = {}, {}
    for path in paths:
        with open(path, "rb") as file:
            for record in ArchiveIterator(file):
                url = record.rec_headers.get_header("WARC-Target-URI")
                if record.rec_type == "response" and record.http_headers.get_statuscode() == "200":
                    code = record.http_headers.get_header("Content-Encoding")
                    if code == "br":
                        # warcio does not know this version of brotli
                        record.http_headers.remove_header("Content-Encoding")
                    body = record.content_stream().read()
                    body = brotli.decompress(body) if code == "br" else body
                    kind = record.http_headers.get_header("Content-Type")
                    (pages if kind.startswith("text/html") else bodies)[url] = body
    result = {}
    for url, html in pages.items():
        soup = BeautifulSoup(html, "html.parser")
        base = urljoin(url, soup.base["href"]) if soup.base else url
        links = [tag.get("src") for tag in soup.find_all("img")]
        links += [tag.get("content") for tag in soup.find_all("meta", property="og:image")]
        links += [tag["href"] for tag in soup.find_all("a", href=True) if ".jpg" in tag["href"]]
        found = set()
        for link in links:
            body = bodies.get(urldefrag(urljoin(base, link or "")).url, b"")
            try:
                Image.open(io.BytesIO(body)).load()
            except OSError:
                continue
            found.add(hashlib.sha256(body).hexdigest())
        result[url] = found
    return result


def test_every_linked_picture_is_found_as_independent_readers_count(crawl, tmp_path):
    rng = random.Random(4)
    codes = itertools.cycle(["", "gzip", "br", "deflate", "deflate raw"])
    seed = itertools.count()
    paths = []
    for number in range(3):
        one = crawl.Crawl(compress=number != 1)
        for page in range(12):
            url = f"http://site{number}.org/a{page}/b/index.html"
            tags, pictures = [], []
            base = f"/base{page}/" if page % 3 == 0 else ""
            for _ in range(rng.randrange(6)):
                name = f"{next(seed)}.jpg"
                link, where = rng.choice([
                    (name, None), (f"../{name}", None), (f"/x/{name}", None), (f"//cdn.org/{name}", None),
                    (f"http://cdn.org/y/{name}#part", None), (f"missing-{name}", ""), (f"text-{name}", "text"),
                ])  # fmt: skip
                forms = ['<img src="{}">', "<a href={}>x</a>", '<meta property="og:image" content="{}">']
                tags.append(rng.choice(forms).format(link))
                if where != "":
                    body = crawl.photo(int(name[:-4])) if where is None else b"<p>no picture</p>"
                    pictures.append((urldefrag(urljoin(urljoin(url, base), link)).url, body))
            rng.shuffle(pictures)
            head = f'<base href="{base}">' if base else ""
            html = f"<html><head>{head}</head><body>caf\u00e9 {' '.join(tags)}</body></html>"
            before = rng.random() < 0.5
            for target, body in pictures if before else ():
                one.picture(target, body, encoding=next(codes))
            one.request(url).page(url, html, encoding=next(codes), chunked=page % 2 == 0)
            for target, body in () if before else pictures:
                one.picture(target, body, chunked=rng.random() < 0.3)
        paths.append(one.save(tmp_path / f"{number}.warc{'.gz' if number != 1 else ''}"))
    stats = dig(*paths, out=tmp_path / "shards")
    wanted = reference(*paths)
    assert stats["pages"]["pages"] == len(wanted) == 36
    found = {url: {image["sha256"] for image in images} for url, images in stored(tmp_path / "shards").items()}
    assert found == {url: pictures for url, pictures in wanted.items() if len(pictures) > 1} and len(found) > 10
    assert stats["pictures"]["alone"] == sum(len(pictures) == 1 for pictures in wanted.values())
    assert stats["stored"]["pairs"] == sum(len(p) * (len(p) - 1) for p in found.values())
    texts = [what for row in stats["inputs"] for _, what in row["problems_named"]]
    assert stats["problems"] == len(texts) > 0 and all("not a picture" in what for what in texts)
    whole = b"".join(contents(tmp_path / "shards").values())
    assert b"secret" not in whole and b"Cookie" not in whole


def test_inputs_in_any_order_under_any_name_give_the_same_bytes(crawl, tmp_path):
    first = crawl.site(3).save(tmp_path / "a" / "x.warc.gz")
    second = crawl.site(4, host="other.org", first=3).save(tmp_path / "a" / "y.warc.gz")
    dig(first, second, out=tmp_path / "one")
    (tmp_path / "b").mkdir()
    for path, name in ((first, "2.warc.gz"), (second, "1.warc.gz")):
        os.link(path, tmp_path / "b" / name)
    # a copy is the same input
    os.link(first, tmp_path / "b" / "3.warc.gz")
    dig(tmp_path / "b", out=tmp_path / "two", processes=2)
    names = {"stats.json", "report.html"}
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in one.items() if k.endswith(("tar", "safetensors", "index.json"))} == {
        k: v for k, v in two.items() if k.endswith(("tar", "safetensors", "index.json"))
    }
    assert set(one) == set(two) and names < set(one)
    assert not [name for name in one if "incomplete" in name or name.startswith("work")]
    with tarfile.open(next((tmp_path / "one").glob("*.tar"))) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    keys = [m.name.split(".")[0] for m in members]
    assert [m.name.split(".", 1)[1] for m in members if m.name.startswith(keys[0])] == [
        "0.jpg", "1.jpg", "2.jpg", "3.jpg", "json",
    ]  # fmt: skip


def test_revisits_and_redirects_lead_to_payloads_also_in_other_files(crawl, tmp_path):
    pictures = [crawl.photo(i) for i in range(5)]
    html = "".join(f"<img src=/{i}.jpg>" for i in range(5))
    a = crawl.Crawl().page("http://e.org/", html)
    for i in (0, 1):
        a.picture(f"http://e.org/{i}.jpg", pictures[i])
    a.picture("http://cdn.org/2", pictures[2], mime="application/octet-stream")
    a.picture("http://old.org/3.jpg", pictures[3])
    # by digest, by address, over two redirects, and a page that was already there
    b = crawl.Crawl().page("http://e.org/new", html.replace("/0", "/again"))
    b.revisit("http://e.org/again.jpg", pictures[0]).redirect("http://e.org/2.jpg", "/hop").redirect(
        "http://e.org/hop", "http://cdn.org/2"
    )
    b.revisit("https://e.org/3.jpg", pictures[3], of="http://old.org/3.jpg")
    b.revisit("http://e.org/", html.encode()).revisit("http://e.org/moved/", html.encode())
    b.revisit("http://e.org/4.jpg", b"unknown").redirect("http://l.org/a", "/b").redirect("http://l.org/b", "/a")
    b.page("http://l.org/", "<img src=a><img src=b>")
    paths = [a.save(tmp_path / "a.warc.gz"), b.save(tmp_path / "b.warc.gz")]
    stats = dig(*paths, out=tmp_path / "both", furniture_pages=50)
    pages = {url: [i["sha256"] for i in images] for url, images in stored(tmp_path / "both").items()}
    found = [hashlib.sha256(picture).hexdigest() for picture in pictures[:4]]
    assert pages == {"http://e.org/": found, "http://e.org/new": found, "http://e.org/moved/": found}
    assert {name: n for name, n in stats["pages"].items() if "re" in name} == {
        "pages_repeated": 1, "revisits_resolved": 4, "revisits_unresolved": 1,
    }  # fmt: skip
    assert stats["pictures"]["redirect_loop"] == 2 and stats["pictures"]["revisit_unresolved"] == 3
    # by itself, b has only what it holds
    alone = dig(paths[1], out=tmp_path / "alone")
    assert alone["pages"]["revisits_unresolved"] == 5 and alone["stored"]["images"] == 0


def test_the_capture_nearest_in_time_is_the_pages_picture(crawl, tmp_path):
    one = crawl.Crawl()
    days = ["2024-01-01T00:00:00Z", "2024-03-01T00:00:00Z"]
    for number, day in enumerate(days):
        one.page(f"http://e.org/{number}", "<img src=/a.jpg><img src=/b.jpg>", date=day)
    one.picture("http://e.org/b.jpg", crawl.photo(0))
    for number in (1, 0):
        day = days[number].replace("01T", "02T")
        one.picture("http://e.org/a.jpg", crawl.photo(number + 1), date=day)
        one.add("http://e.org/a.jpg", b"gone", "text/html", status="404 Not Found", date=days[number])
    dig(one.save(tmp_path / "x.warc"), out=tmp_path / "shards")
    for number in range(2):
        images = stored(tmp_path / "shards")[f"http://e.org/{number}"]
        assert images[0]["sha256"] == hashlib.sha256(crawl.photo(number + 1)).hexdigest()


def test_furniture_is_counted_over_the_whole_site_and_all_files(crawl, tmp_path):
    first, second = crawl.site(2), crawl.site(2, first=2)
    # on two pages only, of this site; and on many pages of another site
    for one, page in ((first, 0), (second, 2)):
        one.page(f"http://example.com/extra{page}", f"<img src=/both.jpg><img src=/p{page}/0.jpg>")
    first.picture("http://example.com/both.jpg", crawl.photo(77))
    other = crawl.Crawl()
    for page in range(5):
        other.page(f"http://other.org/{page}", f"<img src=http://example.com/both.jpg><img src=/{page}.jpg>")
        other.picture(f"http://other.org/{page}.jpg", crawl.photo(100 + page))
    paths = [one.save(tmp_path / f"{i}.warc.gz") for i, one in enumerate((first, second, other))]
    stats = dig(*paths, out=tmp_path / "shards")
    assert stats["pictures"]["furniture"] == 4 + 5
    both, logo = (hashlib.sha256(p).hexdigest() for p in (crawl.photo(77), crawl.photo(10**6, 128, 128, "PNG")))
    pages = {url: {image["sha256"] for image in images} for url, images in stored(tmp_path / "shards").items()}
    assert {url for url, images in pages.items() if both in images} == {
        "http://example.com/extra0", "http://example.com/extra2",
    }  # fmt: skip
    assert not any(logo in images for images in pages.values()) and len(pages) == 6


def test_versions_of_one_picture_are_one_and_the_largest_stays(crawl, tmp_path):
    big, small = crawl.photo(1, 400, 320), crawl.photo(1, 100, 80)
    copy = crawl.photo(2)
    tags = "<img src=small.jpg srcset='mid.jpg 2x, big.jpg 4x'><img src=a.jpg><img src=b.jpg>"
    one = crawl.Crawl().page("http://e.org/", tags + "<img src=c.jpg><img src=x-sprite.jpg><img src=/icons/q.jpg>")
    for name, body in (("small", small), ("big", big), ("a", copy), ("b", copy), ("c", crawl.photo(3)),
                       ("x-sprite", crawl.photo(4)), ("icons/q", crawl.photo(5))):  # fmt: skip
        one.picture(f"http://e.org/{name}.jpg", body)
    stats = dig(one.save(tmp_path / "x.warc"), out=tmp_path / "shards")
    (images,) = stored(tmp_path / "shards").values()
    assert [(image["url"].rsplit("/", 1)[1], image["width"]) for image in images] == [
        ("big.jpg", 400), ("a.jpg", 96), ("c.jpg", 96),
    ]  # fmt: skip
    assert stats["pictures"] == {"kept": 3, "same_look": 1, "same_bytes": 1, "sprite": 1, "icon": 1}


def test_saved_pages_wacz_and_img2dataset_are_inputs_too(crawl, tmp_path):
    pages = tmp_path / "saved"
    (pages / "trip_files").mkdir(parents=True)
    for i in range(3):
        (pages / "trip_files" / f"photo {i}.jpg").write_bytes(crawl.photo(i))
    (tmp_path / "secret.jpg").write_bytes(crawl.photo(9))
    (pages / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (pages / "trip.html").write_text(
        "<img src='trip_files/photo 0.jpg'><img src='trip_files/photo%201.jpg'><a href='./trip_files/photo 2.jpg'>x</a>"
        "<img src=../secret.jpg><img src=link.jpg><img src=/etc/passwd>"
    )
    stats = dig(pages, out=tmp_path / "s1")
    assert stats["pictures"] == {"kept": 3, "not_captured": 3}
    assert [image["url"] for image in stored(tmp_path / "s1")["file:///trip.html"]][
        0
    ] == "file:///trip_files/photo%200.jpg"

    with zipfile.ZipFile(tmp_path / "x.wacz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.warc.gz", crawl.site(2).bytes())
        archive.writestr("datapackage.json", "{}")
    assert dig(tmp_path / "x.wacz", out=tmp_path / "s2", furniture_pages=50)["stored"]["images"] == 2 * 5

    html = [f"<img src=/{n}/small.jpg srcset='/{n}/a.jpg 2x'><img src=b.jpg alt='a  b'>" for n in range(4)]
    one = crawl.Crawl()
    for number, text in enumerate(html):
        one.page(f"http://e.org/{number}/", text)
    one.page("http://e.org/one/", "<img src=b.jpg>")
    table = tmp_path / "urls.parquet"
    assert write_urls(UrlsConfig((one.save(tmp_path / "x.warc"),), table)) == 8
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert rows[:2] == [
        {"page": "http://e.org/0/", "url": "http://e.org/0/a.jpg", "alt": ""},
        {"page": "http://e.org/0/", "url": "http://e.org/0/b.jpg", "alt": "a b"},
    ]
    # as img2dataset writes them: shards of samples in the order in which downloads ended
    (tmp_path / "images").mkdir()
    random.Random(0).shuffle(rows)
    for shard, part in enumerate((rows[:3], rows[3:])):
        with tarfile.open(tmp_path / "images" / f"{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(part):
                key = f"{shard:05d}{number:04d}"
                record = {"url": row["url"], "caption": row["alt"], "page": row["page"], "status": "success"}
                seed = int.from_bytes(hashlib.sha256(row["url"].encode()).digest()[:4], "big")
                for suffix, data in (("jpg", crawl.photo(seed)), ("json", json.dumps(record).encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    dig(tmp_path / "images", out=tmp_path / "s3")
    found = {url: {image["url"] for image in images} for url, images in stored(tmp_path / "s3").items()}
    assert found == {f"http://e.org/{n}/": {f"http://e.org/{n}/{x}.jpg" for x in "ab"} for n in range(4)}


def test_embeddings_are_the_encoders_own_whatever_else_is_in_the_batch(crawl, tmp_path):
    import torch
    import transformers

    from semantica.images import fit, load_image, to_tensor
    from semantica.model.encoders import PretrainedEncoder

    torch.manual_seed(0)
    tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=14)
    transformers.Dinov2Model(transformers.Dinov2Config(**tiny, image_size=28)).save_pretrained(tmp_path / "encoder")
    path = crawl.site(20).save(tmp_path / "x.warc.gz")
    dig(path, out=tmp_path / "shards", encoder=str(tmp_path / "encoder"))
    encoder = PretrainedEncoder.from_source(str(tmp_path / "encoder"))
    count = 0
    for shard in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in files.items():
            if name.endswith(".emb.npy"):
                rows = np.load(io.BytesIO(data), allow_pickle=False)
                assert rows.dtype == np.float16 and rows.shape == (4, 32)
                for i, row in enumerate(rows):
                    jpeg = io.BytesIO(files[name.replace("emb.npy", f"{i}.jpg")])
                    image = load_image(jpeg, near=2 * encoder.image_size)
                    view = to_tensor(fit(image, encoder.image_size)[None])
                    own = torch.nn.functional.normalize(encoder(view).pooled, dim=-1)[0].numpy()
                    assert np.abs(row.astype(np.float64) - own).max() < 2**-11
                    count += 1
    assert count == 80
    with pytest.raises(UserError, match="was made with --encoder .*, not none"):
        dig(path, out=tmp_path / "shards")


def test_files_and_folders_may_have_any_name_but_none_within_the_input(crawl, tmp_path):
    """Names are bytes, and need not be text; what is broken in such a file is written down and shown."""
    (tmp_path / "pages").mkdir()
    for i, name in enumerate((b"0.jpg", b"\xff.jpg", b"\xfe.jpg")):
        body = crawl.photo(i)
        (tmp_path / "pages" / os.fsdecode(name)).write_bytes(body if i < 2 else body[:500])
    (tmp_path / "pages" / "index.html").write_text("<img src=0.jpg><img src=%FF.jpg><img src=%FE.jpg>")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("\udcff.jpg", "\udcff.json"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"{"))
    # a path ends there in an address
    stats = dig(tmp_path / "pages", tmp_path / "x.tar", out=tmp_path / "50%25 #1?", processes=1)
    assert stats["stored"]["images"] == 2 and len(stored(tmp_path / "50%25 #1?")) == 1
    named = {place for row in stats["inputs"] for place, _ in row["problems_named"]}
    assert named == {"file:///%FE.jpg", "\\udcff.json", "file"}
    with pytest.raises(UserError, match="--out .*shards lies in the input .*: choose another"):
        dig(tmp_path / "pages", out=tmp_path / "pages" / "shards")
    assert not (tmp_path / "pages" / "shards").exists()


def test_mistakes_are_one_line(crawl, tmp_path):
    path = crawl.site(1).save(tmp_path / "x.warc.gz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    dig(path, out=tmp_path / "done")
    for inputs, options, words in (
        ((tmp_path / "no.warc",), {}, "does not exist"),
        ((tmp_path / "full",), {}, "none that can be read"),
        ((path,), {"out": tmp_path / "full"}, "holds no shards"),
        ((path,), {"out": tmp_path / "file"}, "holds no shards"),
        ((path,), {"out": tmp_path / "file" / "x"}, "cannot be written"),
        ((path,), {"out": tmp_path / "done", "min_side": 80}, "made with --min-side 64, not 80"),
        ((crawl.site(2).save(tmp_path / "y.warc.gz"),), {"out": tmp_path / "done"}, "not the same"),
        ((path,), {"encoder": str(tmp_path / "nowhere")}, "or give --encoder colour-and-shape"),
        ((path,), {"max_aspect": 0.5}, "--max-aspect is 0.5"),
        ((path,), {"processes": 0}, "--processes is 0"),
        ((), {}, "nothing to do"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            dig(*inputs, **{"out": tmp_path / "new"} | options)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
