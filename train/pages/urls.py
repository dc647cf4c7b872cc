"""`semantica pairs --urls-only`: pages and their links as a table for img2dataset, for crawls that hold only HTML."""

from collections.abc import Iterator
from pathlib import Path

from semantica.errors import UserError
from semantica.files import written
from semantica.train.pages.config import UrlsConfig
from semantica.train.pages.links import BadPage, canonical, page_links
from semantica.train.pages.read import Problems
from semantica.train.pages.sources import PAGE_COLUMN, Input, events, find_inputs
from semantica.train.pages.warc import Capture

# of the ways in which one element names its picture, the best one is downloaded
BEST = {kind: rank for rank, kind in enumerate(("source", "srcset", "lazy", "css", "img"))}
ROWS = 100_000


def write_urls(config: UrlsConfig) -> int:
    """Write (page, url, alt) of every page with two links or more, file after file; returns the number of rows.

    Raises:
        UserError: inputs that cannot be read, no parquet writer, or a file that cannot be written.
    """
    config.check()
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("--urls-only needs pyarrow: install semantica-diffusion[pairs]") from error
    sources = find_inputs(config.inputs)
    out = Path(config.out)
    if out.suffix != ".parquet":
        raise UserError(f"--out {out} must be a .parquet file with --urls-only")
    text = pyarrow.string()
    schema = pyarrow.schema([(PAGE_COLUMN, text), ("url", text), ("alt", text)])
    total, problems = 0, Problems()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written(out) as aside, pyarrow.parquet.ParquetWriter(aside, schema) as writer:
            rows: list[tuple[str, str, str]] = []
            for source in sources:
                for page in pages(source, problems):
                    rows += page
                    if len(rows) >= ROWS:
                        total += flush(writer, schema, rows)
            total += flush(writer, schema, rows)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another file") from error
    for place, what in problems.named:
        print(f"{place}: {what}")
    print(f"{total} links in {out}; {problems.count} problems")
    print(f"next: img2dataset --url_list {out} --input_format parquet --url_col url --caption_col alt "
          f"--save_additional_columns '[\"{PAGE_COLUMN}\"]' --output_format webdataset --resize_mode no "
          "--output_folder IMAGES, then: semantica pairs IMAGES --out SHARDS")  # fmt: skip
    return total


def flush(writer, schema, rows: list[tuple[str, str, str]]) -> int:
    """Write the rows and forget them; returns how many."""
    import pyarrow

    count = len(rows)
    columns = list(zip(*rows)) if rows else [[], [], []]
    writer.write_table(pyarrow.table([pyarrow.array(c, pyarrow.string()) for c in columns], schema=schema))
    rows.clear()
    return count


def pages(source: Input, problems: Problems) -> Iterator[list[tuple[str, str, str]]]:
    """The rows of each page of an input that links two pictures or more."""
    for event in events(source, problems):
        if not isinstance(event, Capture) or event.kind != "html":
            continue
        try:
            base, links = page_links(event.body, event.charset)
        except BadPage as error:
            problems(event.url[:200], str(error))
            continue
        base = (canonical(base, event.url) if base else None) or event.url
        best = {}
        for link in sorted(links, key=lambda link: BEST.get(link.kind, len(BEST))):
            address = canonical(link.url, base)
            if address and address[:5] != "file:":
                best.setdefault(link.element, (address, link.alt))
        found = dict(reversed([best[element] for element in sorted(best)]))
        if len(found) > 1:
            yield [(event.url, url, alt) for url, alt in reversed(found.items())]
