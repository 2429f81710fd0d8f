"""Questions that the web page offers before anything was asked, with pictures drawn here."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = 256


def draw_examples(directory: Path) -> list[dict[str, Any]]:
    """Writes the pictures there; -> the examples of a Gradio Chatbot."""
    shape, house = directory / "shape.png", directory / "house.png"
    _draw_shape().save(shape)
    _draw_house().save(house)
    return [
        {"text": "What is the color of the shape?", "files": [str(shape)]},
        {"text": "What shape is in the image?", "files": [str(shape)]},
        {"text": "Describe this picture.", "files": [str(house)]},
    ]


def _draw_shape() -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), (236, 228, 240))
    ImageDraw.Draw(image).polygon([(60, 190), (196, 190), (128, 66)], fill=(30, 60, 210))
    return image


def _draw_house() -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), (150, 200, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 190, SIZE, SIZE), fill=(90, 160, 70))
    draw.rectangle((70, 120, 190, 210), fill=(225, 205, 170))
    draw.polygon([(55, 122), (205, 122), (130, 55)], fill=(170, 60, 50))
    draw.rectangle((115, 160, 145, 210), fill=(110, 70, 40))
    draw.ellipse((200, 20, 240, 60), fill=(250, 220, 60))
    return image
