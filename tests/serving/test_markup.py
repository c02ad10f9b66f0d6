"""The right texts in HTML are translated, and the result is HTML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt_moe.serving.markup import SplitMarkup


def shout(content: str) -> str:
    """Convert the texts in HTML to capitals."""
    split = SplitMarkup(content)
    return split.join([text.upper() for text in split.texts])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat", "A CAT"),
        ("<p class='x' title=\"a&amp;b\">a  <B>cat</B>\n </p>", None),
        ("a &lt;b&gt; &amp; c&nbsp;d", "A &lt;B&gt; &amp; C D"),
        ("  a <br/> b <img src=x alt='no text'> c", "  A <br/> B <img src=x alt='no text'> C"),
        ("<script>if (a < b) c('<b>')</script>a", "<script>if (a < b) c('<b>')</script>A"),
        ("<style>p > a { }</style>a", "<style>p > a { }</style>A"),
        ("<p translate=no>a <b>b</b></p>c", "<p translate=no>a <b>b</b></p>C"),
        (
            "<p translate=no>a <b translate=yes>b</b></p>",
            "<p translate=no>a <b translate=yes>B</b></p>",
        ),
        ("<p class='x notranslate'>a &lt;</p>b", "<p class='x notranslate'>a &lt;</p>B"),
        ("<!DOCTYPE html><!-- a -->b", "<!DOCTYPE html><!-- a -->B"),
        ("</i>a<b>b", "A<b>B</b>"),
        ("<b><i>a</b>c</i>", "<b><i>A</i></b>C"),
        ("<ul><li>a<li>b</ul>", "<ul><li>A<li>B</ul>"),
        ("<pre>a\n  b</pre> <p>a\n  b</p>", "<pre>A\n  B</pre> <p>A B</p>"),
        ("a < b", "A &lt; B"),
        ("<script>a", "<script>a</script>"),
    ],
)
def test_texts_are_translated_and_tags_kept(content: str, expected: str | None):
    if expected is None:
        expected = "<p class='x' title=\"a&amp;b\">A  <B>CAT</b>\n </p>"
    assert shout(content) == expected


def test_a_translation_is_always_treated_as_text():
    split = SplitMarkup("<p>a</p>")
    assert split.join(["<script>alert(1)</script> & </p>"]) == (
        "<p>&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;/p&gt;</p>"
    )


PARTS = st.lists(
    st.sampled_from(
        ["<p>", "</p>", "<b x='1'>", "</b>", "<br>", "a", " ", "&amp;", "&#60;", "<", ">", "\n"]
        + ["<script>", "</script>", "<!--", "-->", "<!", "]]>", "<pre>", "é", '"', "</", "<?", "/>"]
    ),
    max_size=12,
).map("".join)


@given(PARTS)
def test_the_result_is_stable_html(content: str):
    """Check that the result contains the same texts, and that repetition changes nothing."""
    split = SplitMarkup(content)
    once = split.join(split.texts)
    again = SplitMarkup(once)
    assert again.texts == split.texts
    assert again.join(again.texts) == once
