"""The chat page in a headless browser: what a person sees and does, and what a model's words may not do."""

import base64
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Answers, Page, opened
from PIL import Image

from arriero.serving.page import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

HOSTILE = """<img src=x onerror="window.broken=1"><script>window.broken=1</script>
[a](javascript:window.broken=1) [b](data:text/html,x) ![c](http://127.0.0.1:9/pixel.png) <iframe src=/x></iframe>
**<svg onload=window.broken=1>** `<b>code</b>` | [d](https://example.com/"onmouseover="window.broken=1)

| <b>cell</b> | b |
|---|---|
| <script>window.broken=1</script> | <a href=javascript:window.broken=1>x</a> |

```"><script>window.broken=1</script>
</code></pre><script>window.broken=1</script>
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, opened(Path(folder)) as found:
        yield found


@pytest.fixture
def server(browser: Page) -> Iterator[Answers]:
    with Answers(page()) as found:
        browser.size(1200, 800)
        browser.call("Page.navigate", url=found.url)
        browser.wait("document.readyState === 'complete' && document.getElementById('model')?.textContent")
        yield found
        found.shutdown()


def ask(browser: Page, text: str) -> None:
    """Types a message, sends it, and waits for the answer's end."""
    browser.run("text.focus()")
    browser.call("Input.insertText", text=text)
    browser.press("Enter", 13, "\r")
    browser.wait("messages.length && messages.at(-1).done && !running")


def answer(browser: Page) -> str:
    found: str = browser.run("[...document.querySelectorAll('.answer')].at(-1).innerHTML")
    return found


def test_it_is_one_file_that_asks_nobody_else() -> None:
    text = page().decode()
    assert not re.search("(SCRIPT|STYLE)-HASH", text)
    assert "/*S" not in text
    addresses = set(re.findall(r"https?://[^\s'\"`<>)\\]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=\"(?!data:)", text)
    assert "innerHTML" not in text
    assert "connect-src 'self'" in text


def test_an_answer_streams_with_its_figures(browser: Page, server: Answers) -> None:
    server.pieces, server.pause = ["A **bo", "ld** `x", "<y`", " word."], 0.02
    ask(browser, "Say a word.")
    assert answer(browser) == "<p>A <strong>bold</strong> <code>x&lt;y</code> word.</p>"
    figures = browser.run("[...document.querySelectorAll('.figures')].at(-1).textContent")
    assert re.fullmatch(
        r"4 tokens · [\d.]+ tokens/s · first after \d\.\d\d s · 512 of 530 prompt tokens cached", figures
    )
    (asked,) = server.asked
    assert asked["messages"] == [{"role": "user", "content": "Say a word."}]
    assert asked["model"] == "tiny-llama4"
    assert asked["stream_options"] == {"include_usage": True}


def test_a_models_words_run_nothing_and_fetch_nothing(browser: Page, server: Answers) -> None:
    server.pieces = [HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7)]
    ask(browser, "<img src=x onerror='window.broken=1'>")
    assert browser.run("window.broken") is None
    kinds = "img, script, iframe, svg, a[href^=javascript], a[href^=data], [onerror], [onload], [onmouseover]"
    assert browser.run(f"document.querySelectorAll('.answer :is({kinds}), .body *').length") == 0
    assert "&lt;script&gt;" in answer(browser)
    assert set(server.paths) <= {"/", "/v1/models", "/v1/chat/completions"}
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.broken=2><p style=color:red id=p>')"
    )
    assert browser.run("new Promise((done) => setTimeout(() => done(window.broken), 200))") is None  # its policy
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 1, (error) => String(error))").startswith("TypeError")


MARKDOWN = [
    ("# A\n\ntext  \nmore", "<h1>A</h1><p>text<br>more</p>"),
    ("- a\n  - b\n- c\n\npara", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul><p>para</p>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
    ("a _b_ *c* ~~d~~ snake_case_name 2*3*4",
     "<p>a <em>b</em> <em>c</em> <del>d</del> snake_case_name 2<em>3</em>4</p>"),
    ("\\*a\\* ***", "<p>*a* ***</p>"),
    ("---", "<hr>"),
    ("| a | b |\n|--|:-:|\n| 1 | `x` |",
     '<div class="table"><table><thead><tr><th>a</th><th class="center">b</th></tr></thead>'
     '<tbody><tr><td>1</td><td class="center"><code>x</code></td></tr></tbody></table></div>'),
    ("https://a.b/c.", '<p><a href="https://a.b/c" target="_blank" rel="noopener noreferrer nofollow">https://a.b/c</a>.</p>'),
]  # fmt: skip


def test_markdown_is_rendered(browser: Page, server: Answers) -> None:
    render = "((text) => { const box = make('div'); renderInto(box, text); return box.innerHTML })"
    for text, expected in MARKDOWN:
        assert browser.run(f"{render}({text!r})") == expected
        assert (
            browser.run(
                f"(() => {{ const box = make('div'); for (let at = 0; at <= {len(text)}; at += 1) "
                f"renderInto(box, {text!r}.slice(0, at)); return box.innerHTML }})()"
            )
            == expected
        )
    code = "1. Do:\n   ```sh\n   # not a heading\n\n   ls\n   ```\n2. Then\n\n```python\nx = '<b>'  # c\n```\nend"
    found = browser.run(f"{render}({code!r})")
    assert found.count('<div class="code">') == 2
    assert "<h1>" not in found
    assert found.endswith("<p>end</p>")
    assert "<span class=\"s\">'&lt;b&gt;'</span>" in found
    for text in (
        "*a " * 3000,
        "`" * 9000,
        "[" * 9000,
        "> " * 3000,
        "- " * 3000,
        "**a" * 3000,
        "|" * 5000 + "\n|-|\n",
        "_" * 9000,
    ):
        assert (
            browser.run(
                f"(() => {{ const from = performance.now(); {render}({text!r}); return performance.now() - from }})()"
            )
            < 5000
        )


def test_images_go_along(browser: Page, server: Answers) -> None:
    data = io.BytesIO()
    Image.new("RGB", (3000, 40), "red").save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    file = (
        f"new File([Uint8Array.from(atob('{encoded}'), (sign) => sign.charCodeAt(0))], 'a.png', {{type: 'image/png'}})"
    )
    for kind, event in (("drop", "DragEvent"), ("paste", "ClipboardEvent")):
        name = "dataTransfer" if kind == "drop" else "clipboardData"
        browser.run(
            f"(() => {{ const data = new DataTransfer(); data.items.add({file}); "
            f"document.dispatchEvent(new {event}('{kind}', {{{name}: data, cancelable: true}})) }})()"
        )
    browser.wait("pending.length === 2")
    browser.run("document.querySelector('#images button').click()")
    ask(browser, "What is it?")
    image, text = server.asked[-1]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    kind, _, sent = image["image_url"]["url"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(sent))) as picture:
        assert (picture.width, picture.height) == (1344, 18)
    assert kind == "data:image/png;base64"
    assert browser.run("document.querySelectorAll('.pictures img').length") == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_a_model_of_texts_alone_is_offered_no_images(browser: Page, server: Answers, width: int) -> None:
    browser.size(width, 760)
    shown = "[...document.querySelectorAll('.of-images')].filter((each) => each.checkVisibility()).length"
    assert browser.run(shown) == 3  # the button, an example, and what the page says
    server.inputs = ["text"]
    browser.run("readModel()")
    assert browser.run(shown) == 0
    assert browser.run("document.querySelector('#empty p').textContent") == (
        "Ask, or drop an image. All stays between this page and its server."
    )
    assert browser.run("document.querySelector('#empty p').innerText").startswith("Ask. All stays")
    picture = "data.items.add(new File(['x'], 'a.png', {type: 'image/png'}))"
    for kind, event, name in (("drop", "DragEvent", "dataTransfer"), ("paste", "ClipboardEvent", "clipboardData")):
        browser.run(
            f"(() => {{ const data = new DataTransfer(); {picture}; "
            f"document.dispatchEvent(new {event}('{kind}', {{{name}: data, cancelable: true}})) }})()"
        )
    assert browser.run("[pending.length, text.validationMessage]") == [0, "This model takes text only."]
    server.inputs = ["text", "image"]
    browser.run("readModel()")
    assert browser.run(shown) == 3


def test_an_answer_is_stopped_retried_and_its_question_edited(browser: Page, server: Answers) -> None:
    server.pieces, server.pause = ["word "] * 500, 0.02
    browser.run("text.focus()")
    browser.call("Input.insertText", text="Go on.")
    browser.press("Enter", 13, "\r")
    browser.wait("messages.at(-1)?.content?.length > 20")
    browser.press("Escape", 27)
    browser.wait("!running && messages.at(-1).done")
    assert "stopped" in browser.run("document.querySelector('.turn.assistant .figures').textContent")
    assert server.is_cut.wait(20)
    server.pieces, server.pause = ["Other."], 0.0
    browser.run("document.querySelector('[aria-label=\"Try again\"]').click()")
    browser.wait("!running && messages.at(-1).content === 'Other.'")
    assert [each["role"] for each in server.asked[-1]["messages"]] == ["user"]
    browser.run("text.focus()")
    browser.press("ArrowUp", 38)
    browser.run("document.querySelector('.edit').value = 'Edited.'")
    browser.press("Enter", 13, "\r")
    browser.wait("!running && messages.length === 2 && messages[0].content === 'Edited.' && messages[1].done")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Edited."}]


def test_errors_are_shown_and_the_next_question_is_taken(browser: Page, server: Answers) -> None:
    server.status = 429
    ask(browser, "One.")
    assert browser.run("document.querySelector('.fault').textContent") == "too many <b>requests</b> Try again in 7 s."
    server.status = 200
    ask(browser, "Two.")
    assert answer(browser) == "<p>Hello.</p>"
    assert [each["content"] for each in server.asked[-1]["messages"]] == ["One.", "Two."]


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_phones_and_desks_in_light_and_dark(browser: Page, server: Answers, width: int, dark: bool) -> None:
    browser.size(width, 760, dark=dark)
    server.pieces = ["A word" + "x" * 300 + "\n\n```\n" + "y" * 400 + "\n```\n\n|" + "z|" * 60 + "\n|" + "-|" * 60]
    ask(browser, "w" * 300)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(
        "[...document.querySelectorAll('main *')].every((each) => each.closest('pre, .table') || "
        "each.getBoundingClientRect().right <= innerWidth + 1)"
    )
    colours: list[Any] = browser.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours)
    assert (ink > 0.8 and paper < 0.2) if dark else (ink < 0.2 and paper > 0.8)
    sizes = browser.run(
        "[...document.querySelectorAll('header .icon, .row .icon')].map((each) => each.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 40
