"""Published data sets: their contents and where their images come from, to explain incomplete downloads."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import tensorflow_datasets as tfds
from etils import epath

OTHER_EXTENSIONS = (".png", ".gif", ".jpeg", ".JPG", ".webp")


@dataclasses.dataclass(eq=False, kw_only=True)
class Published(tfds.core.BuilderConfig):
    """A published data set."""

    json: str  # the name of its file
    samples: int
    text_only: int | None = 0  # samples without an image; None if unknown
    folders: dict[str, str]  # subfolders of the folder of images ("" is that itself) -> their origin
    source: str  # who publishes the file


COCO = "COCO train2017 (images.cocodataset.org/zips/train2017.zip)"
PUBLISHED = (
    Published(
        name="cc3m595k",
        description="CC3M, 595K image-text pairs balanced by concept: stage 1 of the first LLaVA.",
        json="chat.json",
        samples=595_375,
        folders={"": "images.zip of the same place"},
        source="huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K",
    ),
    Published(
        name="pretrain558k",
        description="LAION, CC and SBU with BLIP captions, 558K: stage 1 of LLaVA 1.5.",
        json="blip_laion_cc_sbu_558k.json",
        samples=558_128,
        folders={"": "images.zip of the same place"},
        source="huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    ),
    Published(
        name="instruct150k",
        description="LLaVA-Instruct: conversations, details and reasoning about COCO pictures.",
        json="llava_instruct_150k.json",
        samples=157_712,
        folders={"": COCO},
        source="huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    ),
    Published(
        name="mix665k",
        description="The instruction mixture of LLaVA 1.5.",
        json="llava_v1_5_mix665k.json",
        samples=665_298,
        text_only=40_688,  # ShareGPT
        folders={
            "coco/train2017": COCO,
            "gqa/images": "GQA (images.zip of cs.stanford.edu/people/dorarad/gqa)",
            "ocr_vqa/images": "OCR-VQA, by its download script, every file called .jpg",
            "textvqa/train_images": "TextVQA (train_val_images.zip of textvqa.org)",
            "vg/VG_100K": "Visual Genome, part 1 (images.zip)",
            "vg/VG_100K_2": "Visual Genome, part 2 (images2.zip)",
        },
        source="huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    ),
    Published(
        name="scienceqa",
        description="ScienceQA's training split as conversations, QCM-LEA or QCM-LEPA.",
        json="llava_train_QCM-LEA.json",
        samples=12_726,
        text_only=None,
        folders={"": "ScienceQA's images/train"},
        source="scripts/convert_sqa_to_llava.py of the original LLaVA, from problems.json and pid_splits.json",
    ),
)


def folder_problems(published: Published, images: epath.Path) -> Iterator[str]:
    """Messages about missing folders of images."""
    for folder, origin in published.folders.items():
        if not (images / folder).is_dir():
            yield f"{images / folder} is missing: it holds {origin}"


def count_problems(published: Published, samples: int, text_only: int) -> Iterator[str]:
    """Messages about numbers of samples that differ from the published ones."""
    if samples != published.samples:
        yield f"{samples:,} samples where {published.json} of {published.source} has {published.samples:,}"
    elif published.text_only is not None and text_only != published.text_only:
        yield f"{text_only:,} samples without an image where {published.json} has {published.text_only:,}"


def explain_missing(images: epath.Path, missing: Mapping[str, str]) -> Iterator[str]:
    """Messages about missing images (name -> the id of a sample), by folder, and whether they were renamed."""
    folders = collections.defaultdict(list)
    for name in missing:
        folders[str(PurePosixPath(name).parent)].append(name)
    for folder, names in sorted(folders.items()):
        message = f"{len(names):,} images missing in {images / folder}, such as {names[0]}; it is "
        message += f"of sample {missing[names[0]]}"
        first = names[:100]
        renamed = sum(any((images / name).with_suffix(s).exists() for s in OTHER_EXTENSIONS) for name in first)
        if renamed:
            message += (
                f"; {renamed} of the first {len(first)} are there with another extension: rename them to "
                "what the data calls them (the content of a file decides what it is, not its name)"
            )
        yield message
