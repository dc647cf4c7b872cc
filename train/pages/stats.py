"""The figures of a mining run: sums over its inputs, and a row for each."""

from collections import Counter
from pathlib import Path

from semantica.files import read_json

# why a link of a page is not a stored picture, in the order in which a link meets the rules
REASONS = {
    "bad_url": "no usable address",
    "not_captured": "not in the crawl",
    "http_error": "the server had none",
    "redirect_loop": "redirects without end",
    "revisit_unresolved": "a revisit of what is not in the inputs",
    "not_a_picture": "leads to a page",
    "bad_page": "leads to a broken page",
    "encoding": "unknown or broken encoding",
    "too_long": "too many bytes",
    "format": "not a picture in a known format",
    "broken": "cannot be decoded",
    "bomb": "too many pixels",
    "tracking_pixel": "counts visitors",
    "small": "too small",
    "aspect": "too long and thin",
    "blank": "one colour",
    "sprite": "many icons in one file",
    "icon": "an icon",
    "furniture": "on many pages of its site",
    "same_bytes": "twice on the page",
    "same_look": "on the page in two versions",
    "over_limit": "the page has enough",
    "alone": "the only one of its page",
    "kept": "stored",
}
HISTOGRAMS = ("images_per_page", "side")


def gather(out: Path, digests: list[str]) -> tuple[dict, list[dict]]:
    """stats.json and the list of shards, from the inputs' markers in `out/done`."""
    total: dict[str, Counter] = {name: Counter() for name in ("captures", "pages", "pictures", *HISTOGRAMS)}
    rows, shards, similarity, problems = [], [], None, 0
    for sha in digests:
        mark = read_json(out / "done" / f"{sha}.json")
        for name, counter in total.items():
            counter.update(mark[name])
        similarity = [a + b for a, b in zip(similarity, mark["similarity"])] if similarity else mark["similarity"]
        problems += mark["problems"]
        shards += mark["shards"]
        rows.append(row(mark))
    stored = {name: sum(shard[name] for shard in shards) for name in ("pages", "images", "pairs", "bytes")}
    stats = {"stored": stored | {"shards": len(shards)}, "problems": problems, "inputs": rows, "similarity": similarity}
    for name, counter in total.items():
        numeric = name in HISTOGRAMS
        stats[name] = dict(sorted(counter.items(), key=(lambda kv: int(kv[0])) if numeric else None))
    return stats, shards


def row(mark: dict) -> dict:
    """One input in stats.json."""
    counts = {name: sum(shard[name] for shard in mark["shards"]) for name in ("pages", "images", "pairs")}
    pages = mark["pages"]
    return {
        "name": mark["input"]["name"],
        "sha256": mark["input"]["sha256"],
        "pages": pages.get("pages", 0),
        "linked": pages.get("linked", 0),
        "revisits_resolved": pages.get("revisits_resolved", 0),
        "revisits_unresolved": pages.get("revisits_unresolved", 0),
        "pages_repeated": pages.get("pages_repeated", 0),
        "pictures": mark["pictures"],
        "stored": counts,
        "problems": mark["problems"],
        "problems_named": mark["problems_named"],
    }
