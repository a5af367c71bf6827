"""HTML: the text of a page, where a recipe asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.formats import Content, Found, text


def rows(content: Content) -> Iterator[Found]:
    """Yield the main text of the page as one document."""
    page = bytearray()
    for chunk in content.chunks:
        page += chunk
        if len(page) > content.max_bytes:
            yield content.too_long(1, 0)
            return
    yield text.document(content, extract(bytes(page)), None)


def extract(page: bytes) -> str:
    """Return the main text of an HTML page: without navigation, scripts and styles."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse_from_bytes(page, detect_encoding(page) or "utf-8")
    return str(extract_plain_text(tree, main_content=True, preserve_formatting=True))
