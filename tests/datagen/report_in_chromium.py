"""The reports in Chromium: `make test-browser` runs this."""

import json
import os
import re
import shutil
import subprocess

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from report_files import report, write_files
from test_style import data_report, evaluation_report


def test_the_browser_of_samples(tmp_path):
    """Run without the policy, which would not let the test's own script run: texts stay texts all the same."""
    write_files(tmp_path)
    text = report(tmp_path, "--captions", tmp_path / "contexts.jsonl")
    steps = r"""<script>
        const log = [];
        const note = () => log.push([byId("place").textContent, document.querySelectorAll(".box").length,
          [...document.querySelectorAll("mark")].map((mark) => mark.textContent).join("+")].join(" "));
        const set = (id, key, value) => {
          byId(id)[key] = value; byId(id).dispatchEvent(new Event("input")); note(); };
        note();
        set("group", "value", "conversation");
        set("boxes", "checked", false);
        set("group", "value", "rejected"); byId("next").click(); note();
        set("group", "value", ""); set("search", "value", "PUPPY"); set("search", "value", "(*[");
        set("search", "value", ""); set("unsupported", "checked", true);
        document.body.replaceChildren(JSON.stringify(log));
        </script></body>"""
    policy = re.search("<meta http-equiv=[^>]*>", text)[0]
    (tmp_path / "driven.html").write_text(text.replace(policy, "").replace("</body>", steps))
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert chromium, "there is no chromium: `make test-browser` installs it, CHROMIUM=FILE names another"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", f"file://{tmp_path / 'driven.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True)
    assert "<title>run" not in dom.stdout
    log = json.loads(re.search(r"<body>(\[.*\])", dom.stdout)[1])
    of_conversations = ["1 / 1 1 ", "1 / 1 0 "]  # with and without boxes
    searched = ["1 / 1 0 puppy", "none 0 ", "1 / 5 0 "]
    assert log == ["1 / 5 1 ", *of_conversations, "1 / 2 0 ", "2 / 2 0 ", "1 / 5 0 ", *searched, "1 / 1 0 puppy"]


@pytest.mark.parametrize("make", [data_report, evaluation_report])
def test_the_reports_are_accessible_in_both_themes(make, tmp_path):
    (tmp_path / "page.html").write_text(make(tmp_path))
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            page = browser.new_page(color_scheme=theme, bypass_csp=True)
            page.goto(f"file://{tmp_path / 'page.html'}")
            assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"
            found = Axe().run(page).response["violations"]
            assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        browser.close()
