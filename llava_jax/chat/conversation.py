"""The conversation of a chat: its turns and images, and the file that it is saved to."""

from typing import NamedTuple

from PIL import Image

from llava_jax.data import transcript
from llava_jax.data.images import load_image
from llava_jax.data.transcript import absolute_path, marked, unmarked
from llava_jax.inference.requests import Request


class Attached(NamedTuple):
    """An image and its file."""

    file: str
    image: Image.Image


class Conversation:
    """The turns so far, their images, and the images that wait for the next message."""

    def __init__(self, system: str | None, allow_absolute: bool = False):
        self.system, self.allow_absolute = system, allow_absolute
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.turns: list[tuple[str, str]] = []
        self.images: list[Attached] = []
        self.waiting: list[Attached] = []

    def attach(self, file: str) -> Image.Image:
        """Adds an image to the next message."""
        self.waiting.append(_attached(file))
        return self.waiting[-1].image

    def request(self, text: str) -> Request:
        """The request of the next message."""
        system = [] if self.system is None else [("system", self.system)]
        images = [attached.image for attached in [*self.images, *self.waiting]]
        return Request([*system, *self.turns, ("user", marked(text, len(self.waiting)))], images)

    def add(self, text: str, answer: str) -> None:
        """Adds a message and its answer."""
        self.turns += [("user", marked(text, len(self.waiting))), ("assistant", unmarked(answer))]
        self.images += self.waiting
        self.waiting = []

    def save(self, file: str) -> None:
        folder = f"{absolute_path(file).parent}/"
        names = [attached.file.removeprefix(folder) for attached in self.images]
        transcript.save(absolute_path(file), transcript.Transcript(self.turns, names, self.system))

    def load(self, file: str) -> None:
        turns, names, system = transcript.load(absolute_path(file), self.allow_absolute)
        images = [_attached(name) for name in names]
        self.turns, self.images, self.waiting, self.system = list(turns), images, [], system


def _attached(file: str) -> Attached:
    path = absolute_path(file)
    return Attached(str(path), load_image(path))
