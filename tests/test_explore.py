"""The explorer: what it shows, and its page in a real browser, where a photo is dropped and a slider moved."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_vis.explore import Explorer, codebook_facts, heat
from tokenizers_vis.images import load_image
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture
def saved(tiny, tmp_path) -> dict[str, str]:
    """Two tokenizers as files, the second without prefixes."""
    torch.manual_seed(0)
    paths = {}
    for encoder in ("flextok", "titok"):
        paths[encoder] = str(tmp_path / f"{encoder}.safetensors")
        Tokenizer.from_config(tiny(encoder=encoder)).save(paths[encoder])
    return paths


class TestExplorer:
    def test_it_shows_what_the_tokenizer_does(self, saved, photos):
        name = saved["flextok"]
        explorer = Explorer([name], "cpu")
        tok = explorer.tokenizer(name)
        look = explorer.look(str(photos[0]), name, 3)
        seen = tok.canvas.fit(load_image(photos[0]))
        painted = tok.reconstruct(seen, n_tokens=3)[0]
        assert np.abs(np.asarray(look.reconstruction) / 255 - painted.permute(1, 2, 0).numpy()).max() < 0.003
        psnr = -10 * (painted - seen).square().mean().log10().item()
        assert look.facts["PSNR"] == f"{psnr:.2f} dB" and look.facts["tokens"] == "3 (1 to 6)"
        assert look.facts["bytes"] == "3 (8 bits a token)" and look.tokens.n_tokens == 3
        page = look.to_html()
        assert page.count("data:image/png;base64,") == 2 and look.tokens._repr_html_() in page
        assert explorer.tokenizer(name) is tok

    def test_a_tokenizer_without_prefixes_takes_all(self, saved, photos):
        look = Explorer([saved["titok"]], "cpu").look(photos[0], saved["titok"], 2)
        assert look.facts["tokens"] == "6, always" and look.tokens.n_tokens == 6

    def test_continuous_tokens_have_no_ids(self, tiny, tmp_path, photos):
        table = tiny(encoder="titok") | {"quantizer": {"kind": "gaussian", "dim": 3}}
        table["encoder"] |= {"dim": 6}  # a mean and a deviation for each of 3 numbers
        Tokenizer.from_config(table).save(tmp_path / "vae.safetensors")
        name = str(tmp_path / "vae.safetensors")
        look = Explorer([name], "cpu").look(photos[0], name, 6)
        assert look.facts["codebook"] == "none, vectors" and "<details>" not in look.to_html()

    def test_what_it_does_not_list_is_not_loaded(self, saved, tmp_path):
        with pytest.raises(ValueError, match="this page shows"):
            Explorer([saved["titok"]]).tokenizer("titok-l-32")
        with pytest.raises(ValueError, match="name one at least"):
            Explorer([])
        (tmp_path / "broken.jpg").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="broken.jpg"):
            Explorer([saved["titok"]]).look(tmp_path / "broken.jpg", saved["titok"], 6)


def test_codebook_facts():
    facts = codebook_facts(Tokens(torch.tensor([[5, 5, 7, 9]]), (16,), "t"))
    assert facts == {
        "codebook": "16 ids",
        "distinct ids here": "3 of 4",
        "commonest id": "2 times",
        "entropy of the ids": "1.50 bits, at most 2.00 here",
    }
    facts = codebook_facts(Tokens(torch.tensor([[[1, 1], [2, 1]]]), (4, 16), "t"))
    assert facts["codebooks"] == "2 of 16 ids" and facts["distinct ids here"] == "1.5 of 2 in a codebook, on average"


def test_heat_goes_from_black_to_white():
    picture = np.asarray(heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0, 5.0]])))
    assert picture.tolist() == [[[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255], [255, 255, 255]]]


@pytest.fixture
def address(saved, tmp_path) -> Iterator[str]:
    """Of a page that the command serves."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'tokenizers-vis[explore]'")
    # A process of its own, in which gradio's and its libraries' own warnings are no errors.
    command = [sys.executable, "-u", "-m", "tokenizers_vis.cli", "explore", *saved.values(), "--no-open"]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "gradio"), "PYTHONPATH": str(ROOT)}
    with (
        open(tmp_path / "errors", "w") as errors,
        subprocess.Popen(
            [*command, "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=tmp_path,
            env=environment,
            # What a shell starts in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as server,
    ):
        try:
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line + (tmp_path / "errors").read_text()
            yield found[0]
            server.send_signal(signal.SIGINT)
            assert server.wait(120) == 0
        finally:
            server.kill()
    assert not list((tmp_path / "gradio").rglob("dropped*")), "a photo that was dropped is left behind"


@pytest.fixture
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if BROWSER is None:
        pytest.skip("looks at the page in a browser: install chromium or google-chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_in_a_browser(address, chromium, saved, photos, tmp_path):
    tab = chromium.new_page(viewport={"width": 1280, "height": 1000})
    asked, failed = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.set_default_timeout(120_000)
    tab.goto(address)
    facts = {side: tab.locator(f"#look-{side} dl") for side in "AB"}
    expect = {"A": "tokens6 (1 to 6)", "B": "tokens6, always"}
    for side, text in expect.items():
        tab.wait_for_function(
            "([s, t]) => document.querySelector(s)?.textContent.startsWith(t)", arg=[f"#look-{side} dl", text]
        )
    first = tab.locator("#look-A img[alt=difference]").get_attribute("src")

    # Drop a photo where another was.
    tab.locator("#photo button[aria-label='Remove Image']").click()
    data = base64.b64encode(photos[1].read_bytes()).decode()
    dropped = tab.evaluate_handle(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), drop = new DataTransfer();
            drop.items.add(new File([bytes], "dropped.jpg", {type: "image/jpeg"}));
            return drop;
        }""",
        data,
    )
    zone = tab.locator("#photo button[aria-label^='Drop']")
    zone.wait_for()
    zone.dispatch_event("drop", {"dataTransfer": dropped})
    tab.wait_for_function(
        "old => { const i = document.querySelector('#look-A img[alt=difference]'); return i && i.src != old }",
        arg=first,
    )
    explorer = Explorer(list(saved.values()), "cpu")
    look = explorer.look(photos[1], saved["flextok"], 6)
    assert look.facts["PSNR"] in facts["A"].text_content()

    # Slide.
    slider = tab.locator("#tokens-A input[type=range]")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
    tab.wait_for_function("document.querySelector('#look-A dl')?.textContent.startsWith('tokens2 (1 to 6)')")
    look = explorer.look(photos[1], saved["flextok"], 2)
    assert look.facts["PSNR"] in facts["A"].text_content() and "bytes2 (8 bits" in facts["A"].text_content()
    assert tab.locator("#tokens-B input[type=range]").is_disabled()

    # Compare with another tokenizer.
    tab.locator("#tokenizer-B input").click()
    tab.locator("[role=option]", has_text="flextok").click()
    tab.wait_for_function("document.querySelector('#look-B dl')?.textContent.startsWith('tokens6 (1 to 6)')")
    assert tab.locator("#tokens-B input[type=range]").is_enabled()

    for name, width in (("desk", 1280), ("phone", 390)):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        shot = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert shot.shape[1] == width and shot.std() > 20
        assert not tab.evaluate("document.documentElement.scrollWidth > innerWidth"), "it scrolls sideways"
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside, "everything comes from this machine"
    assert not failed
