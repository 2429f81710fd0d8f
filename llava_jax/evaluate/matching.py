"""Readings of the letter that an answer chooses, from `rule_options`."""

from llava_jax.evaluate.dataset_files import Item
from llava_jax.evaluate.rule_options import Choice, vlmevalkit
from llava_jax.evaluate.rules import Reading

UNREAD = "an unread answer is wrong, where the toolkit draws an option"


def chosen(found: Choice, item: Item) -> Reading:
    """Right if the letter is the right one."""
    letter, why = found
    return Reading(float(letter in item.answers), letter or None, why)


def matched(text: str, item: Item) -> Reading:
    """VLMEvalKit's matcher, of the answer, else of the reply of a judge about it. Z chooses no option."""
    letter, why = vlmevalkit(text, item.by_letter)
    if not letter and item.reply:
        letter, said = vlmevalkit(item.reply, item.by_letter)
        why = f"judge: {said}"
    return chosen(("" if letter == "Z" else letter, why), item)
