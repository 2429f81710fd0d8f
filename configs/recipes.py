"""The argument of the published recipes, as in `configs/finetune.py:13b,v1.5`, for recipes of your own."""

from llava_jax.recipes.arguments import MAX_ROWS_PER_DEVICE as MAX_ROWS_PER_DEVICE
from llava_jax.recipes.arguments import parse as parse
from llava_jax.recipes.arguments import set_size as set_size
