"""Find the texts to translate in HTML, and replace them with their translations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape, unescape
from html.parser import HTMLParser

VOID = {
    *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param"),
    *("source", "track", "wbr"),
}
# Elements that may lack an end tag.
SELF_ENDING = {
    *("html", "head", "body", "p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot"),
    *("colgroup", "option", "optgroup", "rt", "rp"),
}
# Elements that do not contain text.
UNTOUCHED = {"script", "style"}
# Elements that preserve line breaks.
PREFORMATTED = {"pre", "textarea", "listing"}


class SplitMarkup(HTMLParser):
    """The texts within a fragment of HTML.

    Scripts, style sheets, comments, attributes, and elements with `translate="no"` or the class
    `notranslate` are not translated. Tags are kept verbatim; an end tag without a start tag is
    dropped, and a missing end tag is added.

    Attributes:
        texts: The texts to translate, in order, with references such as `&amp;` resolved.
    """

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        # Each part is markup, or the white space before and after a text.
        self._parts: list[str | tuple[str, str]] = []
        self._open: list[tuple[str, bool, bool]] = []  # name, is translated, is preformatted
        self._num_open: Counter[str] = Counter()
        self._text = ""  # text since the last tag
        # Do not pass text after the last ">" to the parser, which would need quadratic time.
        end = content.rfind(">") + 1
        self.feed(content[:end])
        if self.cdata_elem is not None:
            self.feed(content[end:])
            self.feed(f"</{self.cdata_elem}>")  # the parser would drop a script without an end tag
            end = len(content)
        self.close()
        self.handle_data(unescape(content[end:]))
        self._end_text()
        while self._open:
            self._end()

    def join(self, translated: Sequence[str]) -> str:
        """Return the HTML with its texts translated."""
        left = iter(translated)
        return "".join(
            part if isinstance(part, str) else f"{part[0]}{escape(next(left), False)}{part[1]}"
            for part in self._parts
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a start tag, and record whether its content is translated."""
        self._mark(self.get_starttag_text() or "")
        if tag in VOID:
            return
        _, is_translated, is_preformatted = self._open[-1] if self._open else ("", True, False)
        given = dict(attrs)
        choice = (given.get("translate") or "").strip().lower()
        if choice in ("yes", "no"):
            is_translated = choice == "yes"
        if tag in UNTOUCHED or "notranslate" in (given.get("class") or "").split():
            is_translated = False
        self._open.append((tag, is_translated, is_preformatted or tag in PREFORMATTED))
        self._num_open[tag] += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag such as `<br/>`."""
        self._mark(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        """Keep an end tag that has a start tag."""
        if not self._num_open[tag]:
            return
        while self._open[-1][0] != tag:
            self._end()
        self._end(is_written=True)

    def handle_data(self, data: str) -> None:
        """Keep a text, which may arrive in parts."""
        self._text += data

    def handle_comment(self, data: str) -> None:
        """Keep a comment."""
        self._mark(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        """Keep `<!DOCTYPE html>`."""
        self._mark(f"<!{decl}>")

    def handle_pi(self, data: str) -> None:
        """Keep `<?xml ...?>`."""
        self._mark(f"<?{data}>")

    def unknown_decl(self, data: str) -> None:
        """Keep `<![CDATA[...]]>`."""
        self._mark(f"<![{data}]>")

    def _mark(self, mark: str) -> None:
        """Keep markup, which ends the text before it."""
        self._end_text()
        self._parts.append(mark)

    def _end_text(self) -> None:
        """Keep the text since the last tag, either to be translated or unchanged."""
        text, self._text = self._text, ""
        name, is_translated, is_preformatted = self._open[-1] if self._open else ("", True, False)
        core = text.strip()
        if name in UNTOUCHED:
            self._parts.append(text)
        elif not is_translated or not core:
            self._parts.append(escape(text, quote=False))
        else:
            start = text.index(core)
            self._parts.append((text[:start], text[start + len(core) :]))
            self.texts.append(core if is_preformatted else " ".join(core.split()))

    def _end(self, is_written: bool = False) -> None:
        """End the innermost element, and add its end tag if it is missing but required."""
        self._end_text()
        name = self._open.pop()[0]
        self._num_open[name] -= 1
        if is_written or name not in SELF_ENDING:
            self._parts.append(f"</{name}>")
