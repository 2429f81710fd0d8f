"""Reads TensorBoard's files."""

from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def events(board: Path) -> Iterator[Event]:
    """Those of the one file of a board: records of length, checksum, event, checksum."""
    (file,) = board.iterdir()
    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
