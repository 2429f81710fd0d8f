"""Makes docs/images/demo.png: asks a server of the quickstart's checkpoint about a photograph, in a real browser."""

import argparse
import os
import shutil
from pathlib import Path

import skimage
from playwright.sync_api import expect, sync_playwright

from llava_jax.cli import Parser, UserError, run

EPILOG = """example, after make quickstart and make test-browser:
  .venv/bin/python -m llava_jax.serve --checkpoint runs/quickstart/finetune --port 8000 &
  .venv/bin/python docs/screenshot.py --url http://127.0.0.1:8000"""
QUESTIONS = ("Is there a circle in the image?", "Is there a triangle in the image?")
SIZES = {"desktop": {"width": 900, "height": 900}, "phone": {"width": 390, "height": 844}}


def main() -> None:
    args = _parse()
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if chromium is None:
        raise UserError("there is no chromium: `make test-browser` installs it, CHROMIUM=FILE names another")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZES[args.size], color_scheme=args.theme)
        page.goto(args.url)
        expect(page.locator("#model")).not_to_be_empty(timeout=60_000)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add images").click()
        chooser.value.set_files(args.image)
        for question in QUESTIONS:
            page.get_by_label("Your question").fill(question)
            page.get_by_role("button", name="Send").click()
            expect(page.get_by_role("button", name="Retry").last).to_be_visible(timeout=60_000)
        page.mouse.move(0, 0)
        page.screenshot(path=args.output)
        browser.close()
    print(f"wrote {args.output}")


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--image", default=Path(skimage.data_dir) / "coffee.png", type=Path, metavar="F", help="a file")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--size", choices=SIZES, default="desktop")
    parser.add_argument("--output", default="docs/images/demo.png", type=Path, metavar="F")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
