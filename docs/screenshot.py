"""Makes docs/images/demo.png: asks a server of the quickstart's checkpoint about a picture, in a real browser."""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from llava_jax.cli import Parser, UserError, run

EPILOG = """example, after make quickstart and make test-browser:
  .venv/bin/python -m llava_jax.serve --checkpoint runs/quickstart/finetune --port 8000 &
  .venv/bin/python docs/screenshot.py --url http://127.0.0.1:8000"""
QUESTIONS = ("What is the color of the shape?", "Is there a circle in the image?")


def main() -> None:
    args = _parse()
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if chromium is None:
        raise UserError("there is no chromium: `make test-browser` installs it, CHROMIUM=FILE names another")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 840})
        page.goto(args.url)
        page.wait_for_load_state("networkidle")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Upload a file").click()
        chooser.value.set_files(args.image)
        expect(page.locator("#message .thumbnail-item")).to_have_count(1)
        for number, question in enumerate(QUESTIONS, 1):
            page.locator("#message textarea").fill(question)
            page.get_by_test_id("submit-button").click()
            expect(page.get_by_test_id("bot")).to_have_count(number, timeout=60_000)
            expect(page.get_by_test_id("submit-button")).to_be_visible(timeout=60_000)
        page.wait_for_timeout(1000)  # the conversation scrolls to its end
        page.screenshot(path=args.output)
        browser.close()
    print(f"wrote {args.output}")


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--image", default=_easy_vqa_picture(), type=Path, metavar="F", help="to ask about")
    parser.add_argument("--output", default="docs/images/demo.png", type=Path, metavar="F")
    return parser.parse_args()


def _easy_vqa_picture() -> Path:
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data/test/images/0.png"


if __name__ == "__main__":
    run(main)
